//! A wrong configuration or a place already taken is one sentence that names it, not a half-started gateway.
use std::{fs, net::TcpListener, process::Command};

use anyhow::{Result, ensure};
use tests::{Verdicts, cgroup::Cgroup, net::Net, process::Process, programs, stack::Plan};

/// Runs a command that must fail, and returns all that it said.
fn refused(subcommand: &str, configuration: &str) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("wrong.toml");
    fs::write(&path, configuration)?;
    let mut command = Command::new(programs::product("pointsman"));
    command.args([subcommand, "--config"]).arg(&path);
    let cgroup = Cgroup::new();
    let mut process = Process::spawn(subcommand, &mut command, Some(&cgroup));
    let status = process.wait();
    let said = process.said().join("\n");
    ensure!(!status.success(), "{subcommand} took {configuration:?} and said:\n{said}");
    ensure!(!said.contains("panicked"), "{said}");
    Ok(said)
}

#[test]
fn a_wrong_file_is_refused_with_its_line() -> Result<()> {
    let _net = Net::private();
    for (configuration, line, telling) in [
        ("[gateway]\nhtpp = \"[::]:80\"\n", 2, "htpp"),
        ("[gateway]\nhttp = \"[::]:http\"\n", 2, "http"),
        ("[gateway]\n\nverdict = \"magic\"\n", 3, "peek"),
        ("[gateway]\n[functions.Echo]\n", 2, "Echo"),
        ("[functions.echo]\ncommand = 1\n", 2, "sequence"),
        ("[functions.a]\nhosts = [\"x.example\"]\n[functions.b]\nhosts = [\"x.example\"]\n", 4, "x.example"),
        ("[gateway\n", 1, "unclosed"),
    ] {
        for subcommand in ["gateway", "supervise"] {
            let said = refused(subcommand, configuration)?;
            let place = format!("wrong.toml:{line}");
            ensure!(
                said.contains(&place) && said.contains(telling),
                "{configuration:?} is answered by:\n{said}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_busy_port_is_named() -> Result<()> {
    let _net = Net::private();
    let busy = TcpListener::bind("[::]:0")?;
    let port = busy.local_addr()?.port();
    let said = refused("gateway", &format!("[gateway]\nhttp = \"[::]:{port}\"\nhttps = \"[::]:1\"\n"))?;
    ensure!(said.contains(&port.to_string()), "{said}");
    Ok(())
}

#[test]
fn auto_takes_the_kernel_where_it_proves_itself() {
    let mut stack = Plan::new(Verdicts::Auto).start();
    let answer = stack.client().and_then(|mut client| client.request("GET", "/function/echo", "x", None));
    assert_eq!(answer.map(|answer| answer.status()).ok(), Some(200));
    let programs = stack.look().programs.len();
    // What it decided, and why, is said once.
    let ready = stack.gateway().wait_for_line("ready").expect("it is");
    let mode = if programs > 0 { "sockmap" } else { "peek" };
    assert!(ready.contains(mode), "{mode}: {ready}");
    let said = stack.gateway().said();
    let reasons = said.iter().filter(|line| line.contains("verdicts come from")).count();
    assert_eq!(reasons, 1, "{}", said.join("\n"));
}
