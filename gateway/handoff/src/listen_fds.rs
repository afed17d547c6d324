//! Sockets and files that a parent passes by `LISTEN_FDS`, as systemd and `pointsman supervise` do.
use std::{
    env, fs, io,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
    process,
};

use rustix::io::{FdFlags, fcntl_setfd};

/// The first passed descriptor, after standard input, output and error (sd_listen_fds(3)).
const FIRST_FD: RawFd = 3;

/// More than any instance is given; bounds what a broken variable makes us touch.
const MAX_FDS: usize = 64;

const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The passed descriptors, each taken out by its name at most once.
#[derive(Debug, Default)]
pub struct ListenFds {
    passed: Vec<(String, OwnedFd)>,
}

#[derive(Debug, thiserror::Error)]
pub enum ListenFdsError {
    #[error("{variable}={value:?} is not a number in range")]
    Number { variable: &'static str, value: String },
    #[error("LISTEN_PID={listen_pid} names another process than this one ({own_pid})")]
    OtherProcess { listen_pid: u32, own_pid: u32 },
    #[error("LISTEN_FDNAMES has {names} names for {fds} descriptors")]
    Names { names: usize, fds: usize },
    #[error("LISTEN_FDS promises descriptor {fd}, which is not open")]
    NotOpen { fd: RawFd },
    #[error("LISTEN_FDS must be read before the process starts threads")]
    Threads,
    #[error("reading /proc/self/task: {0}")]
    CountThreads(io::Error),
}

impl ListenFds {
    /// Takes what was passed and removes the variables, so that a child doesn't take it for its own. Empty when
    /// nothing was passed, and on a second call.
    ///
    /// To be called first thing in `main`: the environment may only be changed by a process's single thread (which is
    /// checked), and descriptors from 3 on must not have another owner yet (which only the caller can know).
    pub fn take() -> Result<Self, ListenFdsError> {
        let [pid, fds, names] =
            VARIABLES.map(|variable| env::var_os(variable).map(|value| value.to_string_lossy().into_owned()));
        if fds.is_none() {
            return Ok(Self::default());
        }
        if fs::read_dir("/proc/self/task").map_err(ListenFdsError::CountThreads)?.count() != 1 {
            return Err(ListenFdsError::Threads);
        }
        for variable in VARIABLES {
            // SAFETY: no other thread exists that could read the environment now.
            unsafe { env::remove_var(variable) };
        }
        let names = parse(pid.as_deref(), fds.as_deref(), names.as_deref(), process::id())?;
        let passed = names
            .into_iter()
            .zip(FIRST_FD..)
            .map(|(name, fd)| Ok((name, own(fd)?)))
            .collect::<Result<_, _>>()?;
        Ok(Self { passed })
    }

    /// The descriptor of this name; a second one of the same name comes with the next call.
    pub fn remove(&mut self, name: &str) -> Option<OwnedFd> {
        let index = self.passed.iter().position(|(passed, _)| passed == name)?;
        Some(self.passed.remove(index).1)
    }

    /// The names of those that are left, for a message about what nobody asked for.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.passed.iter().map(|(name, _)| name.as_str())
    }
}

/// The names of the passed descriptors, in their order; an unnamed one is called `unknown`, as systemd does.
fn parse(
    pid: Option<&str>,
    fds: Option<&str>,
    names: Option<&str>,
    own_pid: u32,
) -> Result<Vec<String>, ListenFdsError> {
    let Some(fds) = fds else { return Ok(Vec::new()) };
    if let Some(pid) = pid {
        let listen_pid = pid
            .parse()
            .map_err(|_| ListenFdsError::Number { variable: "LISTEN_PID", value: pid.to_owned() })?;
        if listen_pid != own_pid {
            return Err(ListenFdsError::OtherProcess { listen_pid, own_pid });
        }
    }
    let count = fds
        .parse()
        .ok()
        .filter(|&count: &usize| count <= MAX_FDS)
        .ok_or_else(|| ListenFdsError::Number { variable: "LISTEN_FDS", value: fds.to_owned() })?;
    let names: Vec<String> = match names {
        None => vec!["unknown".to_owned(); count],
        Some("") if count == 0 => Vec::new(),
        Some(names) => names.split(':').map(str::to_owned).collect(),
    };
    if names.len() != count {
        return Err(ListenFdsError::Names { names: names.len(), fds: count });
    }
    Ok(names)
}

fn own(fd: RawFd) -> Result<OwnedFd, ListenFdsError> {
    // SAFETY: borrowed for one call, which fails without effect if the number names nothing.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(|_| ListenFdsError::NotOpen { fd })?;
    // SAFETY: the descriptor is open, and LISTEN_FDS, which is taken once, says that it was passed to this process;
    // the caller of `take` vouches that nothing else has taken it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pid: Option<&str>, fds: &str, names: Option<&str>) -> Result<Vec<String>, ListenFdsError> {
        parse(pid, Some(fds), names, 42)
    }

    #[test]
    fn descriptors_are_named_in_order() {
        let three = names(Some("42"), "3", Some("pool:certificate:key")).unwrap();
        assert_eq!(three, ["pool", "certificate", "key"]);
        assert_eq!(names(None, "1", Some("pool")).unwrap(), ["pool"]);
        assert_eq!(names(None, "2", None).unwrap(), ["unknown", "unknown"]);
        assert_eq!(names(None, "0", Some("")).unwrap(), [""; 0]);
        assert_eq!(parse(None, None, Some("pool"), 42).unwrap(), [""; 0]);
    }

    #[test]
    fn what_is_not_meant_for_this_process_is_refused() {
        assert!(matches!(names(Some("41"), "1", None), Err(ListenFdsError::OtherProcess { .. })));
        assert!(matches!(names(Some("x"), "1", None), Err(ListenFdsError::Number { .. })));
    }

    #[test]
    fn nonsense_is_refused() {
        for fds in ["", "-1", "65", "x", "99999999999999999999999"] {
            assert!(matches!(names(None, fds, None), Err(ListenFdsError::Number { .. })), "{fds}");
        }
        for (fds, list) in [("2", "pool"), ("1", "pool:key"), ("0", "pool")] {
            assert!(
                matches!(names(None, fds, Some(list)), Err(ListenFdsError::Names { .. })),
                "{fds} {list}"
            );
        }
    }

    #[test]
    fn nothing_passed_is_nothing_taken() {
        assert_eq!(ListenFds::take().unwrap().names().count(), 0);
    }
}
