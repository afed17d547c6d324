//! System calls per connection by name, counted by strace while a bounded load runs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::privilege::find_program;

use super::process;

const ATTACH_WITHIN: Duration = Duration::from_secs(5);

/// A strace that counts what these processes do.
pub struct Counting {
    strace: Child,
    output: std::path::PathBuf,
}

impl Counting {
    pub fn begin(pids: &[i32], output: &Path) -> Result<Self> {
        let program = find_program("strace").context("strace is not in PATH: apt-get install strace")?;
        let mut command = Command::new(program);
        command.args(["-f", "-q", "-c", "-U", "calls,name", "-o"]).arg(output);
        for pid in pids {
            command.arg("-p").arg(pid.to_string());
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut strace = process::spawn(&mut command)?;
        let deadline = Instant::now() + ATTACH_WITHIN;
        while !pids.iter().all(|&pid| is_traced(pid)) {
            if strace.try_wait()?.is_some() || Instant::now() > deadline {
                process::end(&mut strace);
                bail!("strace could not attach");
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(Self { strace, output: output.to_owned() })
    }

    pub fn end(mut self) -> Result<BTreeMap<String, u64>> {
        // strace lets go and prints what it counted.
        kill(Pid::from_raw(self.strace.id() as i32), Signal::SIGINT)?;
        self.strace.wait()?;
        Ok(parse(&fs::read_to_string(&self.output).context("strace wrote nothing")?))
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        process::end(&mut self.strace);
    }
}

/// All threads of a process are traced, or are gone.
fn is_traced(pid: i32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    threads.flatten().all(|thread| {
        let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|pid| pid.trim() != "0"))
    })
}

/// Lines of a count and a name; the heading, rules and the total are something else.
fn parse(summary: &str) -> BTreeMap<String, u64> {
    let line = |line: &str| {
        let (calls, name) = line.trim().split_once(char::is_whitespace)?;
        let name = name.trim();
        (name != "total").then_some((name.to_owned(), calls.parse().ok()?))
    };
    summary.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_read() {
        let text = "    calls syscall\n--------- ----------------\n       12 epoll_wait\n        3 accept4\n--------- ----------------\n       15 total\n";
        let expected = BTreeMap::from([("epoll_wait".to_owned(), 12), ("accept4".to_owned(), 3)]);
        assert_eq!(parse(text), expected);
        assert_eq!(parse(""), BTreeMap::new());
    }
}
