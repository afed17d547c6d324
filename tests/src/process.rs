//! A child process whose output is an event source and whose end is certain.
use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{PATIENCE, cgroup::Cgroup, eventually};

/// A process that hangs may be what failed; nothing is judged by this.
const LAST_WORDS_PATIENCE: Duration = Duration::from_secs(3);

pub struct Process {
    name: String,
    child: Child,
    output: Arc<Output>,
    status: Option<ExitStatus>,
}

#[derive(Default)]
struct Output {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    ended_streams: usize,
}

impl Process {
    /// Starts a command in a cgroup; it dies with the thread that started it.
    pub fn spawn(name: &str, command: &mut Command, cgroup: Option<&Cgroup>) -> Self {
        let entrance = cgroup.map(|cgroup| cgroup.entrance().try_clone_to_owned().expect("cloning a file"));
        // SAFETY: the closure makes async-signal-safe system calls only and touches no memory but its own.
        unsafe {
            command.pre_exec(move || {
                if let Some(entrance) = &entrance {
                    nix::unistd::write(entrance, b"0")?;
                }
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                Ok(())
            });
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("starting {name} ({:?}): {error}", command.get_program()));
        let output = Arc::new(Output::default());
        collect(child.stdout.take().expect("stdout is piped"), output.clone());
        collect(child.stderr.take().expect("stderr is piped"), output.clone());
        Self { name: name.into(), child, output, status: None }
    }

    pub fn id(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// What it said so far, both streams.
    pub fn said(&self) -> Vec<String> {
        self.output.lines.lock().unwrap().lines.clone()
    }

    /// Prints what it said, for whoever looks for the cause of a failure.
    pub fn report(&self) {
        let said = self.said().join("\n");
        eprintln!("---- {} (pid {}, {:?}) said:\n{said}\n----", self.name, self.id(), self.status);
    }

    /// Waits for a line that holds `text`, said before or from now on; `None` when the process ended without it.
    pub fn wait_for_line(&self, text: &str) -> Option<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.output.lines.lock().unwrap();
        loop {
            if let Some(line) = lines.lines.iter().find(|line| line.contains(text)) {
                return Some(line.clone());
            }
            if lines.ended_streams == 2 {
                return None;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} never said {text:?} but:\n{}", self.name, lines.lines.join("\n"));
            lines = self.output.changed.wait_timeout(lines, left).unwrap().0;
        }
    }

    /// Waits for one more line than `seen` or for a little while, whichever comes first.
    pub fn wait_for_more(&self, seen: usize) {
        let lines = self.output.lines.lock().unwrap();
        if lines.lines.len() <= seen {
            drop(self.output.changed.wait_timeout(lines, Duration::from_millis(20)).unwrap());
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.id()), signal)
            .unwrap_or_else(|error| panic!("{signal} to {}: {error}", self.name));
    }

    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("waiting for a child");
        }
        self.status
    }

    /// Asks it to end, waits until it has, and says how it went.
    pub fn terminate(&mut self) -> ExitStatus {
        if let Some(status) = self.has_ended() {
            return status;
        }
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// The same, with something to do before its end is awaited.
    pub fn terminate_after<E>(&mut self, work: impl FnOnce() -> Result<(), E>) -> Result<ExitStatus, E> {
        self.signal(Signal::SIGTERM);
        work()?;
        Ok(self.wait())
    }

    pub fn kill(&mut self) -> ExitStatus {
        if let Some(status) = self.has_ended() {
            return status;
        }
        self.signal(Signal::SIGKILL);
        self.wait()
    }

    pub fn was_killed(&self) -> bool {
        self.status.is_some_and(|status| status.signal() == Some(Signal::SIGKILL as i32))
    }

    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        // The streams end with the process, and what it said last is read before they do.
        let mut lines = self.output.lines.lock().unwrap();
        while lines.ended_streams < 2 {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} did not end; it said:\n{}", self.name, lines.lines.join("\n"));
            lines = self.output.changed.wait_timeout(lines, left).unwrap().0;
        }
        drop(lines);
        let status = self.child.wait().expect("waiting for a child");
        self.status = Some(status);
        status
    }
}

impl Process {
    /// After a failure: asks it to end, because what it counted it says at its end.
    fn take_last_words(&self) {
        if kill(Pid::from_raw(self.id()), Signal::SIGTERM).is_err() {
            return;
        }
        let lines = self.output.lines.lock().unwrap();
        let speaking = |lines: &mut Lines| lines.ended_streams < 2;
        drop(self.output.changed.wait_timeout_while(lines, LAST_WORDS_PATIENCE, speaking));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if thread::panicking() && self.has_ended().is_none() {
            self.take_last_words();
        }
        if self.has_ended().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if thread::panicking() {
            self.report();
        }
    }
}

fn collect(stream: impl Read + Send + 'static, output: Arc<Output>) {
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            output.lines.lock().unwrap().lines.push(line);
            output.changed.notify_all();
        }
        output.lines.lock().unwrap().ended_streams += 1;
        output.changed.notify_all();
    });
}

/// Stops processes and waits until all their threads have stopped: a signal takes its time on a busy machine.
pub fn freeze(processes: &[i32]) {
    send(processes, Signal::SIGSTOP);
    let is_frozen = |pid: i32| {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        // The state stands behind the name, which is in parentheses; the small letter is for those that are traced.
        let state =
            |stat: String| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['T', 't']));
        let mut states = tasks.map(|task| fs::read_to_string(task.path().join("stat")).is_ok_and(state));
        states.all(|stopped| stopped)
    };
    eventually("the threads to stop", || processes.iter().all(|&pid| is_frozen(pid)).then_some(()));
}

/// Lets them go on.
pub fn thaw(processes: &[i32]) {
    send(processes, Signal::SIGCONT);
}

fn send(processes: &[i32], signal: Signal) {
    for &pid in processes {
        kill(Pid::from_raw(pid), signal).unwrap_or_else(|error| panic!("{signal} to {pid}: {error}"));
    }
}
