//! `pointsman status` and `pointsman top` show a running gateway, and say so when there is none.
use std::{
    fs::File,
    io::Read,
    os::fd::OwnedFd,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    pty::{Winsize, openpty},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tests::{PATIENCE, Stack, Verdicts, net::Net, programs};

in_both_modes!(status_says_how_things_are);

/// Runs the command to its end: its exit code's success, standard output and standard error.
fn pointsman(arguments: &[&str]) -> Result<(bool, String, String)> {
    let output = Command::new(programs::product("pointsman")).args(arguments).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.success(), text(&output.stdout), text(&output.stderr)))
}

fn status_says_how_things_are(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let gateway = stack.gateway().id();
    let admin = stack.admin.to_string();
    let (success, json, stderr) = pointsman(&["status", "--json", "--admin", &admin])?;
    ensure!(success, "{stderr}");
    let report: Value = serde_json::from_str(&json).context(json)?;
    ensure!(report["verdict"]["path"] == verdicts.as_str(), "{report}");
    ensure!(report["verdict"]["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{report}");
    ensure!(report["pid"] == gateway, "{report}");
    ensure!(
        report["listeners"]["http"]
            .as_str()
            .is_some_and(|http| http.ends_with(&format!(":{}", stack.http.port())))
    );
    let echo = &report["functions"]["echo"];
    ensure!(echo["instances"][0]["state"] == "up" && echo["instances"][0]["socket"] == "echo.sock", "{echo}");
    let process = echo["instances"][0]["pid"].as_i64();
    let processes = stack.processes_of("echo");
    ensure!(processes.iter().any(|pid| Some(i64::from(*pid)) == process), "{process:?} of {processes:?}");

    // The configuration's own address is the default.
    let config = stack.config_path().to_str().context("a path")?.to_owned();
    let (success, text, stderr) = pointsman(&["status", "--config", &config])?;
    ensure!(success, "{stderr}");
    for part in ["echo", "hello.sock", "refusal", &format!("process {gateway}"), "verdicts come from"] {
        ensure!(text.contains(part), "{part} is not in:\n{text}");
    }

    let (success, frame, stderr) = pointsman(&["top", "--once", "--admin", &admin, "--interval-ms", "200"])?;
    ensure!(success, "{stderr}");
    ensure!(frame.lines().all(|line| line.chars().count() <= 80), "{frame}");
    for part in ["REQ/S", "HANDOFF", "\necho", "\n hello.sock", verdicts.as_str()] {
        ensure!(frame.contains(part), "{part:?} is not in:\n{frame}");
    }
    Ok(())
}

#[test]
fn nobody_to_ask_is_one_sentence() -> Result<()> {
    let net = Net::private();
    let admin = format!("127.0.0.1:{}", net.free_port());
    for arguments in [&["status"][..], &["status", "--json"], &["top", "--once"], &["top"]] {
        let (success, stdout, stderr) = pointsman(&[arguments, &["--admin", &admin]].concat())?;
        ensure!(!success && stdout.is_empty(), "{arguments:?}: {stdout}");
        ensure!(
            stderr.lines().count() == 1 && stderr.contains("no gateway answers") && stderr.contains(&admin),
            "{stderr}"
        );
    }
    Ok(())
}

/// What a terminal of the usual size gets to see.
struct Screen {
    child: Child,
    shown: mpsc::Receiver<Vec<u8>>,
    seen: Vec<u8>,
    keyboard: File,
}

impl Screen {
    fn top(admin: &str) -> Result<Self> {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None)?;
        let terminal = |fd: &OwnedFd| -> Result<Stdio> { Ok(fd.try_clone()?.into()) };
        let child = Command::new(programs::product("pointsman"))
            .args(["top", "--interval-ms", "100", "--admin", admin])
            .env("TERM", "xterm")
            .stdin(terminal(&pty.slave)?)
            .stdout(terminal(&pty.slave)?)
            .stderr(Stdio::piped())
            .spawn()?;
        drop(pty.slave);
        let mut screen = File::from(pty.master.try_clone()?);
        let (sender, shown) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The end of the last terminal is an error of its other side.
            while let Ok(read @ 1..) = screen.read(&mut bytes) {
                if sender.send(bytes[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, shown, seen: Vec::new(), keyboard: pty.master.into() })
    }

    fn wait_for(&mut self, text: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.seen.windows(text.len()).any(|window| window == text.as_bytes()) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.shown.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(error) => bail!("{text:?} never came ({error}): {}", self.seen.escape_ascii()),
            }
        }
        Ok(())
    }

    /// The alternate screen was left, and the cursor is visible again.
    fn expect_restored(mut self) -> Result<()> {
        self.wait_for("\x1b[?1049l")?;
        self.wait_for("\x1b[?25h")?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}");
        Ok(())
    }
}

#[test]
fn top_lives_in_a_terminal_and_gives_it_back() -> Result<()> {
    let stack = Stack::start(Verdicts::Auto);
    for ends in [0, 1] {
        let mut screen = Screen::top(&stack.admin.to_string())?;
        screen.wait_for("\x1b[?1049h")?;
        screen.wait_for("echo")?;
        if ends == 0 {
            std::io::Write::write_all(&mut screen.keyboard, b"q")?;
        } else {
            kill(Pid::from_raw(screen.child.id().cast_signed()), Signal::SIGTERM)?;
        }
        screen.expect_restored()?;
    }
    Ok(())
}
