//! A function's process, from its start to its end.
use std::{
    fs::File,
    io::{self, pipe},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{self, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

use super::{
    output::Output,
    program::Program,
    setup::{Passed, Setup},
};
use crate::{
    logs::Log,
    readable::{OwnsDescriptor, watch},
};

/// The names of the listening socket and of the keys for session tickets among the passed descriptors.
const POOL: &str = "pool";
const TICKETS: &str = "tickets";

// SAFETY: an `OwnedFd` keeps its descriptor until it is dropped.
unsafe impl OwnsDescriptor for OwnedFd {}

pub struct Child {
    process: process::Child,
    pid: Pid,
    /// A pidfd: readable once the process has ended.
    exit: AsyncFd<OwnedFd>,
    output: Output,
    started: Instant,
    reaped: bool,
}

/// What a life was.
pub struct Life {
    pub status: ExitStatus,
    pub length: Duration,
}

impl Child {
    /// Starts the program, with the listening socket, the program's files and its keys for session tickets as descriptors
    /// from 3 on, in the cgroup whose `cgroup.procs` is given. What it writes is logged under the label.
    ///
    /// The process is killed when the calling thread ends (PR_SET_PDEATHSIG): that must be the supervisor's main
    /// thread. Must be called within a runtime.
    pub fn spawn(
        program: &Program,
        label: &str,
        socket: BorrowedFd<'_>,
        ticket_keys: Option<BorrowedFd<'_>>,
        cgroup: Option<BorrowedFd<'_>>,
        log: Log,
    ) -> io::Result<Self> {
        let files = program.open_files()?;
        let names = program.files.iter().map(|&(name, _)| name);
        let names = [POOL].into_iter().chain(names).chain(ticket_keys.map(|_| TICKETS));
        let passed = Passed::new(socket, files.iter().map(File::as_fd).chain(ticket_keys))?;
        let (reader, writer) = pipe()?;
        let output = Output::new(reader, label, log)?;

        let mut command = Command::new(&program.executable);
        command
            .args(&program.arguments)
            .env_clear()
            .envs(program.environment.iter().map(|(key, value)| (key, value)))
            .env_remove("LISTEN_PID")
            .env("LISTEN_FDS", passed.count().to_string())
            .env("LISTEN_FDNAMES", names.collect::<Vec<_>>().join(":"))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            // Its own, so that a terminal's Ctrl-C reaches the supervisor alone, which ends all in order.
            .process_group(0);
        let setup = Setup {
            cgroup: cgroup.map(|cgroup| cgroup.try_clone_to_owned()).transpose()?,
            passed,
            user: program.user.clone(),
            supervisor: process::id(),
        };
        // SAFETY: in a forked process only async-signal-safe calls are allowed before exec; `Setup::apply` makes
        // system calls alone, on values that were made before.
        unsafe { command.pre_exec(move || setup.apply()) };

        let mut process = command.spawn().map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", program.executable.display()))
        })?;
        let pid = Pid::from_child(&process);
        match exit_of(pid) {
            Ok(exit) => Ok(Self { process, pid, exit, output, started: Instant::now(), reaped: false }),
            Err(error) => {
                process.kill()?;
                process.wait()?;
                Err(error)
            }
        }
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Carries the output until the process has ended. May be dropped and called again.
    pub async fn ended(&mut self) {
        tokio::select! {
            biased;
            _ = self.exit.readable() => {}
            never = self.output.carry() => match never {},
        }
    }

    pub fn terminate(&self) {
        // An error says that it has ended by itself.
        let _ = pidfd_send_signal(self.exit.get_ref(), Signal::TERM);
    }

    /// Ends the process at once, with those that it has started.
    pub fn kill(&self) {
        if !self.reaped {
            // The group's number is the process's, and nobody else's before the process is reaped. An error says that
            // the group is empty.
            let _ = kill_process_group(self.pid, Signal::KILL);
        }
    }

    /// Takes leave of a process that has ended: kills those that it has started, since the next one would share its
    /// socket with them, and carries what it wrote last.
    pub fn reap(&mut self) -> io::Result<Life> {
        let length = self.started.elapsed();
        self.kill();
        self.output.drain();
        let status = self.process.wait()?;
        self.reaped = true;
        Ok(Life { status, length })
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        if !self.reaped {
            // Nobody is left to hear of an error.
            let _ = self.process.wait();
        }
    }
}

fn exit_of(pid: Pid) -> io::Result<AsyncFd<OwnedFd>> {
    watch(pidfd_open(pid, PidfdFlags::empty())?)
}
