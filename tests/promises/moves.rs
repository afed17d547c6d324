//! A request for another function is answered by that function's process, on the connection and in the session that the
//! client has.
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustls::{ClientConfig, SupportedProtocolVersion};
use tests::{
    Stack, Verdicts,
    crowd::crowd,
    net::Net,
    pattern::{Pattern, Random},
    stack::{AddressBook, Plan},
    tls,
    wire::{Client, Framing, Wire},
};

in_both_modes!(
    there_and_back,
    a_hundred_pipelined,
    bodies_and_methods,
    requests_of_any_kind,
    who_has_no_place,
    the_policy_decides,
    a_session_goes_home,
    many_at_random,
    a_target_dies,
    a_source_dies,
    a_client_leaves_in_between,
    a_client_ends_its_side,
    the_gateway_is_killed,
);

const FUNCTIONS: [&str; 3] = ["echo", "hello", "twin"];

/// `twin` is another echo.
fn plan(verdicts: Verdicts) -> Plan {
    Plan::new(verdicts).function("twin", "echo")
}

/// What a connection is to its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Http,
    Tls12,
    Tls13,
}

const KINDS: [Kind; 3] = [Kind::Http, Kind::Tls12, Kind::Tls13];

impl Kind {
    fn version(self) -> Option<&'static SupportedProtocolVersion> {
        match self {
            Self::Http => None,
            Self::Tls12 => Some(&rustls::version::TLS12),
            Self::Tls13 => Some(&rustls::version::TLS13),
        }
    }
}

struct Clients {
    book: AddressBook,
    configs: Vec<(Kind, Arc<ClientConfig>)>,
}

impl Clients {
    fn of(stack: &Stack) -> Self {
        let configs = KINDS.iter().filter_map(|&kind| {
            let version = kind.version()?;
            Some((kind, Arc::new(tls::config(&stack.authority, &[version]))))
        });
        Self { book: AddressBook::clone(stack), configs: configs.collect() }
    }

    /// A connection that `function` is the first to have.
    fn connect(&self, kind: Kind, function: &str) -> Result<Client> {
        let config = self.configs.iter().find(|(of, _)| *of == kind).map(|(_, config)| config.clone());
        match config {
            Some(config) => tls::connect(self.book.https, &tests::stack::host(function), config),
            None => self.book.client(),
        }
    }
}

fn greeting(client: &mut Client, name: &str) -> Result<()> {
    let target = format!("/function/hello?name={name}");
    let answer = client.request("GET", &target, "echo.faas.local", None)?;
    ensure!(answer.text().trim() == format!("Hello, {name}!"), "{} {}", answer.status(), answer.text());
    Ok(())
}

fn echoed(client: &mut Client, function: &str, body: &[u8]) -> Result<()> {
    let answer = client.request("POST", &format!("/function/{function}"), "echo.faas.local", Some(body))?;
    ensure!(answer.body == body, "{} {}", answer.status(), answer.text());
    Ok(())
}

fn there_and_back(verdicts: Verdicts) -> Result<()> {
    const ROUNDS: usize = 500;
    let stack = plan(verdicts).start();
    let clients = Clients::of(&stack);
    for kind in KINDS {
        let mut client = clients.connect(kind, "echo")?;
        for round in 0..ROUNDS {
            let context = || format!("{kind:?}, round {round}");
            echoed(&mut client, "echo", format!("body {round}").as_bytes()).with_context(context)?;
            greeting(&mut client, &format!("n{round}")).with_context(context)?;
        }
    }
    Ok(())
}

fn a_hundred_pipelined(verdicts: Verdicts) -> Result<()> {
    let stack = plan(verdicts).start();
    let clients = Clients::of(&stack);
    for kind in KINDS {
        let mut client = clients.connect(kind, "echo")?;
        let requests: String = (0..100)
            .map(|number| {
                let function = FUNCTIONS[number % 3];
                let body = format!("n{number}");
                format!(
                    "POST /function/{function}?name={body} HTTP/1.1\r\nHost: echo.faas.local\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                )
            })
            .collect();
        client.send(requests.as_bytes())?;
        for number in 0..100 {
            let answer = client.response().with_context(|| format!("{kind:?}, answer {number}"))?;
            let body = format!("n{number}");
            let expected = if number % 3 == 1 { format!("Hello, {body}!") } else { body };
            ensure!(answer.text().trim() == expected, "{kind:?} {number}: {}", answer.text());
        }
    }
    Ok(())
}

fn bodies_and_methods(verdicts: Verdicts) -> Result<()> {
    let stack = plan(verdicts).start();
    let clients = Clients::of(&stack);
    for kind in KINDS {
        let mut client = clients.connect(kind, "echo")?;
        let mut random = Random::new(7);
        for round in 0..24 {
            let function = ["echo", "twin"][round % 2];
            let length = [1, 100, 20_000, 1 << 20][round % 4] + random.below(1000) as u64;
            let framing =
                if round % 3 == 0 { Framing::Chunks(random.within(1, 30_000)) } else { Framing::Length };
            let body = Pattern::new(random.number());
            client
                .echo(&format!("/function/{function}"), "echo.faas.local", body, length, framing)
                .with_context(|| format!("{kind:?}, round {round}, {length} bytes, {framing:?}"))?;
        }
        for (round, method) in
            ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW"].iter().enumerate()
        {
            let function = ["twin", "echo"][round % 2];
            let answer =
                client.request(method, &format!("/function/{function}/x"), "echo.faas.local", None)?;
            ensure!(answer.status() == 200, "{kind:?} {method}: {}", answer.text());
            if *method != "HEAD" {
                ensure!(answer.json()["method"] == *method && answer.json()["path"] == "/x");
            }
        }
    }
    Ok(())
}

fn requests_of_any_kind(verdicts: Verdicts) -> Result<()> {
    let stack = plan(verdicts).start();
    let clients = Clients::of(&stack);
    for kind in KINDS {
        let mut client = clients.connect(kind, "echo")?;
        echoed(&mut client, "echo", b"first")?;
        // Nothing of the body is sent before it was asked for, by the function that the request is for.
        client.send(
            b"POST /function/twin HTTP/1.1\r\nHost: echo.faas.local\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n",
        )?;
        ensure!(client.any_response_to("POST")?.status() == 100, "{kind:?}");
        client.send(b"body")?;
        ensure!(client.response()?.body == b"body", "{kind:?}");
        // HTTP/1.0 moves as well, and is kept only if it asks for that.
        client
            .send(b"GET /function/hello?name=old HTTP/1.0\r\nHost: echo.faas.local\r\nConnection: keep-alive\r\n\r\n")?;
        ensure!(client.response()?.text().contains("Hello, old!"), "{kind:?}");
        client.send(b"GET /function/echo HTTP/1.0\r\nHost: echo.faas.local\r\n\r\n")?;
        ensure!(client.response()?.status() == 200, "{kind:?}");
        client.expect_close()?;
    }
    Ok(())
}

fn who_has_no_place(verdicts: Verdicts) -> Result<()> {
    let stack = plan(verdicts).absent_function("absent").start();
    let clients = Clients::of(&stack);
    for kind in KINDS {
        let mut client = clients.connect(kind, "echo")?;
        let mut get = |target| client.request("GET", target, "echo.faas.local", None);
        ensure!(get("/function/echo")?.status() == 200);
        // Neither ends the connection.
        ensure!(get("/function/nobody")?.status() == 404, "{kind:?}");
        let unavailable = get("/function/absent")?;
        ensure!(unavailable.status() == 503 && unavailable.head.field("retry-after").is_some(), "{kind:?}");
        ensure!(get("/function/hello")?.status() == 200);
        ensure!(get("/function/nobody")?.status() == 404, "{kind:?}");
        ensure!(client.request("HEAD", "/function/nobody", "echo.faas.local", None)?.status() == 404);
        greeting(&mut client, "again")?;
    }
    Ok(())
}

fn the_policy_decides(verdicts: Verdicts) -> Result<()> {
    // `twin` is of another group; `hello` may send to nobody.
    let net = std::rc::Rc::new(Net::private());
    let stack = plan(verdicts)
        .in_net(net.clone())
        .function_setting("twin", "trust_group = \"other\"")
        .function_setting("hello", "moves_to = []")
        .start();
    let clients = Clients::of(&stack);
    for kind in KINDS {
        let mut client = clients.connect(kind, "echo")?;
        echoed(&mut client, "echo", b"x")?;
        greeting(&mut client, "you")?;
        let back = client.request("GET", "/function/echo", "echo.faas.local", None)?;
        ensure!(back.status() == 421, "{kind:?}: {}", back.text());
        client.expect_close()?;
        let mut client = clients.connect(kind, "echo")?;
        echoed(&mut client, "echo", b"x")?;
        ensure!(client.request("GET", "/function/twin", "echo.faas.local", None)?.status() == 421);
        client.expect_close()?;
    }
    drop(stack);
    // Whose certificate nobody vouches for gets no session; what is in the clear needs no proof.
    let stack = plan(verdicts).in_net(net.clone()).stranger("twin").start();
    let clients = Clients::of(&stack);
    for kind in KINDS {
        let mut client = clients.connect(kind, "echo")?;
        echoed(&mut client, "echo", b"x")?;
        greeting(&mut client, "you")?;
        let answer = client.request("GET", "/function/twin", "echo.faas.local", None)?;
        let expected = if kind == Kind::Http { 200 } else { 421 };
        ensure!(answer.status() == expected, "{kind:?}: {}", answer.text());
    }
    drop(stack);
    // Without anchors nobody can prove anything.
    let stack = plan(verdicts).in_net(net).without_anchors().start();
    let clients = Clients::of(&stack);
    for kind in KINDS {
        let mut client = clients.connect(kind, "echo")?;
        let answer = client.request("GET", "/function/hello", "echo.faas.local", None)?;
        let expected = if kind == Kind::Http { 200 } else { 421 };
        ensure!(answer.status() == expected, "{kind:?}: {}", answer.text());
    }
    Ok(())
}

/// What names no function belongs to the one whose certificate the client saw, wherever the session is.
fn a_session_goes_home(verdicts: Verdicts) -> Result<()> {
    let stack = plan(verdicts).start();
    let clients = Clients::of(&stack);
    for kind in [Kind::Tls12, Kind::Tls13] {
        let mut client = clients.connect(kind, "echo")?;
        for _ in 0..3 {
            greeting(&mut client, "you")?;
            let answer = client.request("GET", "/at/home", "echo.faas.local", None)?;
            ensure!(answer.json()["path"] == "/at/home", "{kind:?}: {}", answer.text());
        }
        greeting(&mut client, "you")?;
        let answer = client.request("GET", "/", "hello.faas.local", None)?;
        ensure!(answer.status() == 421, "{kind:?}: the session is not hello's");
    }
    Ok(())
}

fn many_at_random(verdicts: Verdicts) -> Result<()> {
    let stack = plan(verdicts).in_net(Net::private().without_slow_start()).start();
    let clients = Clients::of(&stack);
    let (connections, requests) = if tests::long() { (1200, 250) } else { (160, 150) };
    let answered = AtomicUsize::new(0);
    crowd(24, connections, |number| {
        let mut random = Random::new(number as u64);
        let kind = KINDS[number % 3];
        let first = FUNCTIONS[random.below(FUNCTIONS.len())];
        let mut client = clients.connect(kind, first)?;
        if let Wire::Tls(_, session) = &mut client.wire {
            session.set_buffer_limit(None);
        }
        let mut done = 0;
        while done < requests {
            let burst = random.within(1, 8);
            random_burst(&mut client, &mut random, burst)
                .with_context(|| format!("{kind:?}, requests {done} to {}", done + burst))?;
            done += burst;
            answered.fetch_add(burst, Ordering::Relaxed);
            if random.below(10) == 0
                && kind == Kind::Tls13
                && let Wire::Tls(_, session) = &mut client.wire
            {
                session.refresh_traffic_keys()?;
            }
        }
        Ok(())
    });
    ensure!(answered.load(Ordering::Relaxed) >= connections * requests);
    Ok(())
}

/// Pipelines some requests, in pieces of any size, and compares every answer.
fn random_burst(client: &mut Client, random: &mut Random, requests: usize) -> Result<()> {
    let mut bytes = Vec::new();
    let mut expected = Vec::new();
    for _ in 0..requests {
        let function = FUNCTIONS[random.below(FUNCTIONS.len())];
        let size = *random.choose(&[0, 1, 10, 300, 5000, 20_000][..]);
        if function == "hello" {
            let name = format!("n{}", random.below(1000));
            bytes.extend(
                format!("GET /function/hello?name={name} HTTP/1.1\r\nHost: echo.faas.local\r\n\r\n").bytes(),
            );
            expected.push(format!("Hello, {name}!\n").into_bytes());
            continue;
        }
        let body = random.bytes(size.max(1));
        bytes.extend(format!("POST /function/{function} HTTP/1.1\r\nHost: echo.faas.local\r\n").bytes());
        if random.below(3) == 0 {
            bytes.extend(b"Transfer-Encoding: chunked\r\n\r\n");
            for chunk in body.chunks(random.within(1, 3000)) {
                bytes.extend(format!("{:x}\r\n", chunk.len()).bytes());
                bytes.extend([chunk, b"\r\n"].concat());
            }
            bytes.extend(b"0\r\n\r\n");
        } else {
            bytes.extend(format!("Content-Length: {}\r\n\r\n", body.len()).bytes());
            bytes.extend(&body);
        }
        expected.push(body);
    }
    let cuts = random.below(6);
    let mut position = 0;
    for cut in random.cuts(bytes.len(), cuts) {
        client.send(&bytes[position..cut])?;
        position = cut;
    }
    client.send(&bytes[position..])?;
    for (index, expected) in expected.iter().enumerate() {
        let answer = client.response().with_context(|| format!("answer {index} of {requests}"))?;
        let matches = answer.body == *expected || answer.text().trim().as_bytes() == expected.trim_ascii();
        ensure!(
            answer.status() == 200 && matches,
            "WRONG ANSWER {index}: {} {}",
            answer.status(),
            answer.text()
        );
    }
    Ok(())
}

/// Moves on and on until it is told to stop or the connection ends, which is no error here.
fn wander(clients: &Clients, kind: Kind, stop: &AtomicBool, moved: &AtomicUsize) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut client) = clients.connect(kind, "echo") else { continue };
        for round in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let function = ["echo", "twin"][round % 2];
            let body = format!("{kind:?} {round}");
            let target = format!("/function/{function}");
            match client.request("POST", &target, "echo.faas.local", Some(body.as_bytes())) {
                // Whatever happens to the processes, nobody gets somebody else's answer.
                Ok(answer) if answer.status() == 200 => ensure!(answer.text() == body, "WRONG ANSWER"),
                Ok(answer) if answer.status() == 503 => break,
                Ok(answer) => bail!("{} {}", answer.status(), answer.text()),
                Err(_) => break,
            }
            moved.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Lets clients wander while something happens, and then makes sure that all is well again.
fn while_wandering(stack: &mut Stack, happen: impl Fn(&mut Stack) -> Result<()>) -> Result<()> {
    let clients = Clients::of(stack);
    let (stop, moved) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let wanderers: Vec<_> = (0..12)
            .map(|number| {
                let (clients, stop, moved) = (&clients, &stop, &moved);
                scope.spawn(move || wander(clients, KINDS[number % 3], stop, moved))
            })
            .collect();
        let happened = (0..4).try_for_each(|_| {
            let seen = moved.load(Ordering::Relaxed);
            tests::eventually("the clients move", || {
                (moved.load(Ordering::Relaxed) > seen + 200).then_some(())
            });
            happen(stack)
        });
        stop.store(true, Ordering::Relaxed);
        for wanderer in wanderers {
            wanderer.join().expect("a client panicked")?;
        }
        happened
    })?;
    stack.wait_until_ready();
    for kind in KINDS {
        tests::eventually("sessions move again", || {
            let mut client = clients.connect(kind, "echo").ok()?;
            echoed(&mut client, "echo", b"x").and_then(|()| echoed(&mut client, "twin", b"y")).ok()
        });
    }
    Ok(())
}

fn kill_all_of(stack: &mut Stack, function: &str) -> Result<()> {
    for process in stack.processes_of(function) {
        kill(Pid::from_raw(process), Signal::SIGKILL)?;
    }
    stack.wait_until_ready();
    Ok(())
}

fn a_target_dies(verdicts: Verdicts) -> Result<()> {
    while_wandering(&mut plan(verdicts).start(), |stack| kill_all_of(stack, "twin"))
}

fn a_source_dies(verdicts: Verdicts) -> Result<()> {
    while_wandering(&mut plan(verdicts).start(), |stack| kill_all_of(stack, "echo"))
}

fn the_gateway_is_killed(verdicts: Verdicts) -> Result<()> {
    while_wandering(&mut plan(verdicts).start(), |stack| {
        stack.gateway().kill();
        stack.start_gateway();
        stack.wait_until_ready();
        Ok(())
    })
}

/// Ends of clients at every moment of a move: nothing is left behind, which the stack's own end makes sure of.
fn a_client_leaves_in_between(verdicts: Verdicts) -> Result<()> {
    let mut stack = plan(verdicts).start();
    let clients = Clients::of(&stack);
    let fds = stack.gateway_fds();
    crowd(12, 300, |number| {
        let mut client = clients.connect(KINDS[number % 3], "echo")?;
        echoed(&mut client, "echo", b"x")?;
        client.send(b"GET /function/hello HTTP/1.1\r\nHost: echo.faas.local\r\n\r\n")?;
        if number % 2 == 0 {
            socket2::SockRef::from(client.socket()).set_linger(Some(std::time::Duration::ZERO))?;
        }
        Ok(())
    });
    tests::eventually("the gateway has let all go", || (stack.gateway_fds() <= fds).then_some(()));
    Ok(())
}

fn a_client_ends_its_side(verdicts: Verdicts) -> Result<()> {
    let stack = plan(verdicts).start();
    let clients = Clients::of(&stack);
    for kind in KINDS {
        let mut client = clients.connect(kind, "echo")?;
        echoed(&mut client, "echo", b"x")?;
        client.send(b"GET /function/hello?name=last HTTP/1.1\r\nHost: echo.faas.local\r\n\r\n")?;
        client.half_close()?;
        let answer = client.response()?;
        ensure!(answer.text().contains("Hello, last!"), "{kind:?}: {}", answer.text());
        client.expect_close()?;
    }
    Ok(())
}
