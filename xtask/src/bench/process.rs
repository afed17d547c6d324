//! A process that the benchmark starts, and that ends with it whatever happens.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::unistd::Pid;

/// Longer than any of the sides takes to stop by its own deadlines.
const STOP_WITHIN: Duration = Duration::from_secs(15);
/// What a failure shows of the process's words.
const LAST_LINES: usize = 12;

pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it with its words in a file of `directory`.
    pub fn start(name: &str, command: &mut Command, directory: &Path) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = spawn(command)?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    pub fn id(&self) -> i32 {
        self.child.id() as i32
    }

    /// An error, with its last words, if it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} has ended ({status}); it said:\n{}", self.name, self.last_words()),
        }
    }

    pub fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// In a group of its own, so that Ctrl-C comes to the benchmark alone, which then ends it; with the benchmark, if that
/// is killed.
pub fn spawn(command: &mut Command) -> Result<Child> {
    command.process_group(0);
    // SAFETY: two system calls that touch no memory.
    unsafe {
        command.pre_exec(|| {
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
            Ok(prctl::set_pdeathsig(Signal::SIGTERM)?)
        });
    }
    command.spawn().with_context(|| format!("cannot start {}", command.get_program().display()))
}

/// Asks it to end, and makes it end.
pub fn end(child: &mut Child) {
    let deadline = Instant::now() + STOP_WITHIN;
    // Not reaped yet, so the number is still its own.
    if matches!(child.try_wait(), Ok(None)) {
        let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
    }
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
}
