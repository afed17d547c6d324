//! Long work that is seen to move: a step is announced, its latest line shown, its end timed.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Often enough to look alive on a terminal.
const REPAINT_MS: u64 = 500;
/// Seldom enough for a log file, often enough that nobody thinks it hangs.
const REPORT_SECONDS: u64 = 15;
/// What a failure shows: enough for the compiler's message and what led to it.
const FAILURE_LINES: usize = 60;
/// A repainted line must not wrap, or the terminal fills with its remains.
const LINE_COLUMNS: usize = 100;

pub fn announce(what: &str) {
    eprintln!("==> {what}");
}

/// Runs `command` to its end and shows its latest line meanwhile; gives what it printed to stdout.
pub fn run(what: &str, command: &mut Command) -> Result<String> {
    announce(what);
    let began = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let (lines, received) = mpsc::channel();
    let readers = [
        child.stdout.take().map(|pipe| forward(pipe, Source::Output, lines.clone())),
        child.stderr.take().map(|pipe| forward(pipe, Source::Errors, lines)),
    ];
    let (output, tail) = follow(&received, began);
    for reader in readers.into_iter().flatten() {
        // A reader that panicked has printed why; what it sent before stands.
        let _ = reader.join();
    }
    let status =
        child.wait().with_context(|| format!("cannot wait for {}", command.get_program().display()))?;
    if !status.success() {
        let tail: Vec<String> = tail.into();
        bail!("{what}: {} failed ({status}):\n{}", command.get_program().display(), tail.join("\n"));
    }
    eprintln!("    done in {:.0?}", began.elapsed());
    Ok(output)
}

#[derive(Clone, Copy, PartialEq)]
enum Source {
    Output,
    Errors,
}

fn forward(
    pipe: impl Read + Send + 'static,
    source: Source,
    lines: mpsc::Sender<(Source, String)>,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        // Programs report progress by carriage returns too, but those pipes are not terminals: lines it is.
        while matches!(pipe.read_until(b'\n', &mut line), Ok(1..)) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if lines.send((source, text)).is_err() {
                return;
            }
        }
    })
}

fn follow(received: &mpsc::Receiver<(Source, String)>, began: Instant) -> (String, VecDeque<String>) {
    let terminal = io::stderr().is_terminal();
    let interval =
        if terminal { Duration::from_millis(REPAINT_MS) } else { Duration::from_secs(REPORT_SECONDS) };
    let mut output = String::new();
    let mut tail = VecDeque::new();
    let mut shown = Instant::now();
    loop {
        match received.recv_timeout(interval.saturating_sub(shown.elapsed())) {
            Ok((source, line)) => {
                if source == Source::Output {
                    output.push_str(&line);
                    output.push('\n');
                }
                if tail.len() == FAILURE_LINES {
                    tail.pop_front();
                }
                tail.push_back(line);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let latest = tail.iter().rev().find(|line| !line.trim().is_empty());
                show(terminal, began.elapsed(), latest.map_or("", |line| line.trim()));
                shown = Instant::now();
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    if terminal {
        eprint!("\r\x1b[K");
    }
    (output, tail)
}

fn show(terminal: bool, elapsed: Duration, line: &str) {
    let line: String = line.chars().take(LINE_COLUMNS).collect();
    if terminal {
        eprint!("\r\x1b[K    {:3} s  {line}", elapsed.as_secs());
        // Progress is a courtesy; a terminal that went away is noticed elsewhere.
        let _ = io::stderr().flush();
    } else {
        eprintln!("    {:3} s  {line}", elapsed.as_secs());
    }
}
