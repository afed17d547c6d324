//! A crowd at one port keeps the other port's clients waiting for a turn of the loop, not for its end.
use std::{fs, io::Write, net::TcpStream, process::Command};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tests::{
    PATIENCE, Stack, Verdicts,
    hello::Hello,
    probe::{self, Outcome, Port},
    process::{Process, freeze, thaw},
    programs,
    stack::host,
    trace,
};

in_both_modes!(one_at_the_https_port, one_at_the_http_port);

/// Many turns of the loop, and fewer than the listener's queue holds.
const CROWD: usize = 3000;

fn one_at_the_https_port(verdicts: Verdicts) -> Result<()> {
    one_beside_a_crowd(verdicts, Port::Https)
}

fn one_at_the_http_port(verdicts: Verdicts) -> Result<()> {
    one_beside_a_crowd(verdicts, Port::Http)
}

fn one_beside_a_crowd(verdicts: Verdicts, port: Port) -> Result<()> {
    let crowded = if port == Port::Http { Port::Https } else { Port::Http };
    for comes_early in [true, false] {
        let mut stack = Stack::start(verdicts);
        let gateway = stack.gateway().id();
        let file = stack.folder().join("trace");
        let mut command = Command::new(programs::client("strace", "strace"));
        command.args(["-f", "-e", "trace=accept4", "-o"]).arg(&file).args(["-p", &gateway.to_string()]);
        let mut strace = Process::spawn("strace", &mut command, None);
        strace.wait_for_line("attached").context("strace must be allowed to attach (ptrace)")?;
        freeze(&[gateway]);
        let mut crowd = (0..CROWD).map(|_| begin(&stack, crowded, "nobody")).collect::<Result<Vec<_>>>()?;
        let early = comes_early.then(|| begin(&stack, port, "echo")).transpose()?;
        thaw(&[gateway]);
        let (mut one, accepted_before) = match early {
            Some(one) => (one, 0),
            None => {
                probe::outcome(&stack, crowded, &mut crowd[0]).context("the first of the crowd")?;
                // However late this client is on a busy machine, it is only what is accepted after it that counts.
                freeze(&[gateway]);
                let one = begin(&stack, port, "echo")?;
                let accepted = trace::listeners(&fs::read_to_string(&file)?).len();
                thaw(&[gateway]);
                (one, accepted)
            }
        };
        let outcome = probe::outcome(&stack, port, &mut one)?;
        ensure!(outcome == Outcome::Function("echo".into()), "{outcome:?}");
        for client in &mut crowd {
            probe::outcome(&stack, crowded, client)?;
        }
        strace.signal(Signal::SIGINT);
        strace.wait();
        let listeners = trace::listeners(&fs::read_to_string(&file)?);
        ensure!(listeners.len() > CROWD, "strace saw {} connections", listeners.len());
        let place = listeners.iter().position(|&listener| {
            listeners.iter().filter(|&&other| other == listener).count() <= listeners.len() - CROWD
        });
        let place = place.context("the one was never accepted")?;
        let waited = place.saturating_sub(accepted_before);
        ensure!(waited < CROWD / 2, "{waited} of {CROWD} were accepted before it, early: {comes_early}");
    }
    Ok(())
}

/// A connection with a whole first flight.
fn begin(stack: &Stack, port: Port, function: &str) -> Result<TcpStream> {
    let (mut socket, flight) = match port {
        Port::Http => {
            let head = format!("GET /function/{function} HTTP/1.1\r\nHost: x\r\n\r\n");
            (stack.connect_http()?, head.into_bytes())
        }
        Port::Https => (stack.connect_https()?, Hello::named(host(function).as_bytes()).bytes()),
    };
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(&flight)?;
    Ok(socket)
}
