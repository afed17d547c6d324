//! What a forked process does before it becomes a function's program: system calls alone.
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use nix::libc;
use rustix::{
    io::{Errno, fcntl_dupfd_cloexec, write},
    process::{Signal, getppid, set_parent_process_death_signal},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_keep_capabilities,
        set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};

use super::user::User;

/// Where passed descriptors begin (sd_listen_fds(3)).
const FIRST_FD: RawFd = 3;

pub struct Setup {
    /// What bounds the process's memory, if anything does: its `cgroup.procs`.
    pub cgroup: Option<OwnedFd>,
    pub passed: Passed,
    pub user: Option<User>,
    pub supervisor: u32,
}

impl Setup {
    /// Async-signal-safe: it makes system calls and neither allocates nor locks.
    pub fn apply(&self) -> io::Result<()> {
        // First, while this process may, and before another descriptor takes the number.
        if let Some(cgroup) = &self.cgroup {
            write(cgroup, b"0")?;
        }
        self.passed.place()?;
        match &self.user {
            Some(user) => change_to(user)?,
            // What a supervisor that isn't root was granted is not its functions'.
            None => set_capabilities(None, only(CapabilitySet::empty()))?,
        }
        set_no_new_privs(true)?;
        // After the change of user, which clears it.
        set_parent_process_death_signal(Some(Signal::KILL))?;
        let parent = getppid().map(|pid| pid.as_raw_pid() as u32);
        if parent != Some(self.supervisor) {
            // The supervisor died before its death would have been told.
            return Err(Errno::SRCH.into());
        }
        Ok(())
    }
}

fn change_to(user: &User) -> io::Result<()> {
    // The program may be where that user can't go, such as below a home: one capability outlives the change of user
    // and ends with exec.
    let kept = capabilities(None)?.permitted & CapabilitySet::DAC_OVERRIDE;
    set_keep_capabilities(true)?;
    set_thread_groups(&user.groups)?;
    set_thread_res_gid(user.gid, user.gid, user.gid)?;
    set_thread_res_uid(user.uid, user.uid, user.uid)?;
    if !user.uid.is_root() {
        set_capabilities(None, only(kept))?;
    }
    Ok(())
}

fn only(set: CapabilitySet) -> CapabilitySets {
    CapabilitySets { effective: set, permitted: set, inheritable: CapabilitySet::empty() }
}

/// Descriptors on their way to the numbers from 3 on.
pub struct Passed {
    /// All above the numbers that they are going to, so that none is overwritten before it was moved.
    sources: Vec<OwnedFd>,
    /// Keep std's own pipe, by which the new process reports a failure, off those numbers.
    _placeholders: Vec<OwnedFd>,
}

impl Passed {
    pub fn new<'a>(first: BorrowedFd<'a>, others: impl Iterator<Item = BorrowedFd<'a>>) -> io::Result<Self> {
        let all: Vec<_> = std::iter::once(first).chain(others).collect();
        let above = FIRST_FD + all.len() as RawFd;
        let sources = all.iter().map(|fd| fcntl_dupfd_cloexec(fd, above)).collect::<Result<_, _>>()?;
        let mut placeholders = Vec::new();
        loop {
            let lowest = fcntl_dupfd_cloexec(first, FIRST_FD)?;
            if lowest.as_raw_fd() >= above {
                return Ok(Self { sources, _placeholders: placeholders });
            }
            placeholders.push(lowest);
        }
    }

    pub fn count(&self) -> usize {
        self.sources.len()
    }

    fn place(&self) -> io::Result<()> {
        let mut target = FIRST_FD;
        for source in &self.sources {
            // SAFETY: the source is open, and what is overwritten has no owner in this process, which execs next.
            if unsafe { libc::dup2(source.as_raw_fd(), target) } == -1 {
                return Err(io::Error::last_os_error());
            }
            target += 1;
        }
        // What the supervisor's own parent left open is no business of a function.
        // SAFETY: nothing is closed before exec, and then by the kernel.
        let marked =
            unsafe { libc::syscall(libc::SYS_close_range, target, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        if marked == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
