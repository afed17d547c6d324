//! The systemd units: systemd takes them, and what they start is what functions and gateway expect.
use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use tests::{
    Verdicts,
    cgroup::Cgroup,
    eventually,
    probe::{self, answerer},
    process::Process,
    programs,
    stack::Plan,
};

/// The folder of the units, and their names as they are started.
fn units() -> (PathBuf, [&'static str; 4]) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../packaging/systemd");
    let names = [
        "pointsman-gateway.service",
        "pointsman-supervise.service",
        "pointsman-function@echo.service",
        "pointsman-function@echo.socket",
    ];
    (folder, names)
}

fn text(name: &str) -> Result<String> {
    let template = name.replace("@echo", "@");
    fs::read_to_string(units().0.join(&template)).with_context(|| template.clone())
}

/// All values of a key, in their order.
fn values<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    let lines = text.lines().filter_map(|line| line.split_once('='));
    lines.filter(|(found, _)| *found == key).map(|(_, value)| value).collect()
}

#[test]
fn systemd_finds_no_fault() -> Result<()> {
    let analyze = programs::client("systemd-analyze", "systemd");
    let folder = tempfile::tempdir()?;
    let mut verify = Command::new(analyze);
    verify.arg("verify");
    for name in units().1 {
        // Where the programs are before they are installed.
        let built = programs::product("pointsman");
        let built = built.parent().context("a folder")?.to_str().context("a path")?;
        let text = text(name)?
            .replace("/usr/bin", built)
            .replace("ExecStart=/usr/lib/pointsman", &format!("ExecStart={built}"));
        fs::write(folder.path().join(name.replace("@echo", "@")), text)?;
        verify.arg(folder.path().join(name));
    }
    let output = verify.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<_> = said.lines().filter(|line| line.contains("pointsman")).collect();
    ensure!(output.status.success() && ours.is_empty(), "{said}");
    Ok(())
}

#[test]
fn the_units_agree_with_the_programs() -> Result<()> {
    let [gateway, supervise, service, socket] = units().1.map(text);
    let (gateway, supervise, service, socket) = (gateway?, supervise?, service?, socket?);
    // Where the gateway looks if nothing else is configured.
    let check = Command::new(programs::product("pointsman")).arg("check").output()?;
    let defaults = String::from_utf8(check.stdout)?;
    let directory =
        defaults.lines().find_map(|line| line.strip_prefix("functions_dir = ")).context("a default")?;
    let directory = directory.trim_matches('"');
    ensure!(values(&socket, "ListenSequentialPacket") == [format!("{directory}/%i.sock")]);
    ensure!(values(&socket, "FileDescriptorName") == ["pool"]);
    for unit in [&gateway, &supervise] {
        let runtime = values(unit, "RuntimeDirectory");
        ensure!(runtime.len() == 1 && directory.starts_with(&format!("/run/{}/", runtime[0])), "{runtime:?}");
        ensure!(values(unit, "ExecReload") == ["/bin/kill -HUP $MAINPID"]);
    }
    for (unit, subcommand) in [(&gateway, "gateway"), (&supervise, "supervise")] {
        let command = values(unit, "ExecStart").concat();
        let start = format!("/usr/bin/pointsman {subcommand} --config /etc/pointsman/pointsman.toml");
        ensure!(command == start, "{command}");
        let help = Command::new(programs::product("pointsman")).args([subcommand, "--help"]).output()?;
        ensure!(help.status.success() && String::from_utf8_lossy(&help.stdout).contains("--config"));
    }
    let help = Command::new(programs::product("echo")).arg("--help").output()?;
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for variable in values(&service, "Environment").iter().flat_map(|value| value.split(' ')) {
        let name = variable.split('=').next().unwrap_or_default();
        ensure!(help.contains(name), "functions know no {name}");
    }
    Ok(())
}

/// As the socket unit does it: the function has no command, systemd listens and starts it at the first connection.
#[test]
fn a_function_that_systemd_starts_is_served() -> Result<()> {
    let activate = programs::client("systemd-socket-activate", "systemd");
    let mut stack = Plan::new(Verdicts::Auto).absent_function("other").prepare();
    stack.start_supervisor();
    stack.start_gateway();
    stack.wait_until_ready();
    let answer = stack.client()?.request("GET", "/function/other", "x", None)?;
    ensure!(answer.status() == 503, "{answer:?}");

    let certificate = stack.certificate("other").clone();
    let path = stack.sockets().join("other.sock");
    let mut command = Command::new(activate);
    command.arg("--seqpacket").arg("--fdname=pool").arg("--listen").arg(&path);
    command.args(["-E", "POINTSMAN_NAME=other"]);
    command.arg("-E").arg(format!("POINTSMAN_CERTIFICATE={}", certificate.path.display()));
    command.arg("-E").arg(format!("POINTSMAN_KEY={}", certificate.key.display()));
    command.arg(programs::product("echo"));
    let cgroup = Cgroup::new();
    let mut function = Process::spawn("other", &mut command, Some(&cgroup));
    eventually("the function to answer", || {
        let answer = stack.client().ok()?.request("GET", "/function/other", "x", None).ok()?;
        (answer.status() == 200).then_some(())
    });
    let answer = stack.tls_client("other")?.request("GET", "/", &tests::stack::host("other"), None)?;
    ensure!(answerer(&answer) == Some("echo"), "{:?}", probe::of_response(&answer));
    ensure!(function.terminate().success());
    // systemd-socket-activate leaves it; a socket unit has RemoveOnStop=.
    fs::remove_file(path)?;
    Ok(())
}
