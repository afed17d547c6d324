//! Ten thousand connections of every fate leave no descriptor, no map entry and no slot behind.
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use socket2::SockRef;
use tests::{
    Stack, Verdicts,
    crowd::crowd,
    eventually,
    hello::Hello,
    net::Net,
    stack::{AddressBook, Plan},
};

in_both_modes!(ten_thousand_connections);

const CONNECTIONS: usize = 10_000;
const WARM_UP: usize = 400;

fn ten_thousand_connections(verdicts: Verdicts) -> Result<()> {
    let mut stack = Plan::new(verdicts).in_net(Net::private()).absent_function("absent").start();
    let clients = stack.address_book();
    crowd(16, WARM_UP, |number| connection(&clients, number));
    let before = settled(&mut stack);
    crowd(16, CONNECTIONS, |number| connection(&clients, number));
    let mut now = (0, 0, vec![]);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        eventually("everything to be given back", || {
            now = holdings(&mut stack);
            // Something of the warm-up may have been left when it seemed to be over, on a busy machine.
            let mut maps = now.2.iter().zip(&before.2);
            let given_back = maps.all(|(now, before)| now.0 == before.0 && now.1 <= before.1);
            (now.0 <= before.0 && now.1 <= before.1 && given_back).then_some(())
        });
    }));
    ensure!(outcome.is_ok(), "the gateway's fds, the functions' fds, map entries: {before:?} became {now:?}");
    Ok(())
}

type Holdings = (usize, usize, Vec<(String, usize)>);

fn holdings(stack: &mut Stack) -> Holdings {
    (stack.gateway_fds(), stack.function_fds(), stack.look().entries())
}

/// Waits until closed connections have left the maps and the tables of files.
fn settled(stack: &mut Stack) -> Holdings {
    let mut last = holdings(stack);
    let mut same = 0;
    eventually("the warm-up's connections to end", || {
        let now = holdings(stack);
        same = if now == last { same + 1 } else { 0 };
        last = now;
        (same == 40).then_some(())
    });
    last
}

fn connection(stack: &AddressBook, number: usize) -> Result<()> {
    match number % 10 {
        0..=2 => {
            let mut client = stack.client()?;
            for _ in 0..2 {
                let answer = client.request("GET", "/function/hello", "x", None)?;
                ensure!(answer.status() == 200, "{answer:?}");
            }
            Ok(())
        }
        3 => {
            let answer = stack.client()?.request("POST", "/function/echo", "x", Some(&[b'x'; 3000]))?;
            ensure!(answer.body.len() == 3000, "{answer:?}");
            Ok(())
        }
        4 => {
            let answer = stack.tls_client("echo")?.request("GET", "/", "echo.faas.local", None)?;
            ensure!(answer.status() == 200, "{answer:?}");
            Ok(())
        }
        5 => {
            let answer = stack.client()?.request("GET", "/function/absent", "x", None)?;
            ensure!(answer.status() == 503, "{answer:?}");
            let answer = stack.client()?.request("GET", "/nobody", "x", None)?;
            ensure!(answer.status() == 404, "{answer:?}");
            Ok(())
        }
        6 => {
            // Reset before a byte, and behind a part of a head.
            for head in [&b""[..], b"GET /func"] {
                let mut socket = stack.connect_http()?;
                socket.write_all(head)?;
                SockRef::from(&socket).set_linger(Some(std::time::Duration::ZERO))?;
            }
            Ok(())
        }
        7 => {
            // Reset after the request: before accept, before the handoff or behind it.
            let mut socket = stack.connect_http()?;
            socket.write_all(b"GET /function/echo HTTP/1.1\r\nHost: x\r\n\r\n")?;
            SockRef::from(&socket).set_linger(Some(std::time::Duration::ZERO))?;
            Ok(())
        }
        8 => {
            // The verdict is late, and the client ends in the middle of its hello.
            let hello = Hello::named(b"echo.faas.local").post_quantum().bytes();
            let mut socket = stack.connect_https()?;
            socket.write_all(&hello[..number % hello.len()])?;
            Ok(())
        }
        _ => {
            let mut socket = stack.connect_http()?;
            let head = b"GET /function/hello HTTP/1.0\r\n\r\n";
            socket.write_all(&head[..20])?;
            socket.write_all(&head[20..])?;
            let mut answer = String::new();
            socket.set_read_timeout(Some(tests::PATIENCE))?;
            socket.read_to_string(&mut answer).context("reading an answer")?;
            ensure!(answer.contains("Hello, "), "{answer}");
            Ok(())
        }
    }
}
