//! The configuration is read again: functions come and go, and those that stay notice nothing.
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tests::{
    Stack, Verdicts,
    configuration::{Configuration, reload, with_lines, without},
    eventually,
    hello::Hello,
    load::Load,
    probe::{self, Manner, Outcome, Port},
    stack::{AddressBook, Plan, host},
    tls::alert,
    wire::Client,
};

in_both_modes!(
    functions_come_and_go_under_load,
    a_first_flight_is_judged_by_the_routes_it_began_with,
    a_bad_file_is_refused_and_what_runs_stays,
    a_watched_file_needs_no_signal,
    routes_that_find_no_room_wait_for_it,
);

/// How the function `extra` is answered: by itself, or by nobody.
fn extra(stack: &AddressBook) -> Result<[Outcome; 2]> {
    let request = b"GET /function/extra HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let plain = probe::probe(stack, Port::Http, request, &Manner::default())?;
    let hello = Hello::named(host("extra").as_bytes()).bytes();
    Ok([plain, probe::probe(stack, Port::Https, &hello, &Manner::default())?])
}

fn absent() -> [Outcome; 2] {
    [Outcome::Status(404), Outcome::Alert(alert::UNRECOGNIZED_NAME)]
}

fn is_served(outcomes: &[Outcome; 2]) -> bool {
    let secure = [Outcome::Tls13, Outcome::Function("extra".into())];
    outcomes[0] == Outcome::Function("echo".into()) && secure.contains(&outcomes[1])
}

fn functions_come_and_go_under_load(verdicts: Verdicts) -> Result<()> {
    const ROUNDS: usize = 20;
    // Former routes go when no connection can hold them: one time-out later.
    let plan = Plan::new(verdicts).setting("head_timeout_ms", 2000);
    let mut stack = plan.function("extra", "echo").start();
    let configuration = Configuration::of(&stack);
    let with = configuration.text();
    let without = without(&with, "extra");
    let kept = [stack.processes_of("hello"), stack.processes_of("echo")];
    let routes = routes_in_the_kernel(&mut stack);
    let loads = ["echo", "hello"].map(|function| Load::start(&stack, function));
    for round in 0..ROUNDS {
        let there = round % 2 == 1;
        configuration.replace(if there { &with } else { &without });
        reload(&mut stack);
        eventually(&format!("reload {round} to be followed"), || {
            let outcomes = extra(&stack).expect("there is always an answer");
            (if there { is_served(&outcomes) } else { outcomes == absent() }).then_some(())
        });
        loads.iter().for_each(Load::wait_for_more);
    }
    loads.into_iter().try_for_each(Load::stop)?;
    ensure!(stack.processes_of("hello") == kept[0]);
    ensure!(kept[1].iter().filter(|pid| stack.processes_of("echo").contains(pid)).count() == 1);
    eventually("former routes to be gone from the kernel", || {
        (routes_in_the_kernel(&mut stack) == routes).then_some(())
    });
    Ok(())
}

/// The entries of the kernel's table; none in user space.
fn routes_in_the_kernel(stack: &mut Stack) -> usize {
    let entries = stack.look().entries();
    entries.iter().filter(|(name, _)| name == "pm_routes").map(|(_, entries)| entries).sum()
}

fn a_first_flight_is_judged_by_the_routes_it_began_with(verdicts: Verdicts) -> Result<()> {
    let mut stack = Plan::new(verdicts).function("extra", "echo").start();
    let configuration = Configuration::of(&stack);
    let with = configuration.text();
    let half = |stack: &Stack| -> Result<Client> {
        let mut client = stack.client()?;
        client.send(b"GET /function/ec")?;
        Ok(client)
    };
    let mut early = half(&stack)?;
    // Judged later than the half flight was seen.
    ensure!(is_served(&extra(&stack)?));
    for round in 0..4 {
        configuration.replace(&if round % 2 == 0 { without(&with, "extra") } else { with.clone() });
        reload(&mut stack);
        eventually("the reload to be followed", || {
            let outcomes = extra(&stack).expect("there is always an answer");
            (is_served(&outcomes) == (round % 2 == 1)).then_some(())
        });
        let mut late = half(&stack)?;
        late.send(b"ho HTTP/1.1\r\nHost: x\r\n\r\n")?;
        ensure!(late.response()?.status() == 200);
    }
    early.send(b"ho HTTP/1.1\r\nHost: x\r\n\r\n")?;
    ensure!(early.response()?.status() == 200);
    Ok(())
}

fn a_bad_file_is_refused_and_what_runs_stays(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let configuration = Configuration::of(&stack);
    let good = configuration.text();
    configuration.replace(&format!("{good}\n[functions.hello2]\nhost = [\"a.example\"]\n"));
    let line = good.lines().count() + 3;
    reload(&mut stack);
    let place = format!("pointsman.toml:{line}");
    for said in [stack.gateway().wait_for_line(&place), stack.supervisor().wait_for_line(&place)] {
        let said = said.context("it says where")?;
        ensure!(said.contains("hosts"), "what would be right: {said}");
    }
    // Listeners can't change: that is said, and the rest is followed.
    let moved = good.replace("http = \"[::]:", "http = \"127.0.0.1:");
    ensure!(moved != good);
    configuration.replace(&without(&moved, "hello"));
    reload(&mut stack);
    stack.gateway().wait_for_line("until its next start").context("it says so")?;
    eventually("hello to be gone", || {
        let answer = stack.client().ok()?.request("GET", "/function/hello", "x", None).ok()?;
        (answer.status() == 404).then_some(())
    });
    let answer = stack.client()?.request("GET", "/function/echo", "x", None)?;
    ensure!(answer.status() == 200, "{answer:?}");
    Ok(())
}

fn a_watched_file_needs_no_signal(verdicts: Verdicts) -> Result<()> {
    let stack = Plan::new(verdicts).gateway_argument("--watch").function("extra", "echo").start();
    let configuration = Configuration::of(&stack);
    let with = configuration.text();
    for text in [without(&with, "extra"), with.clone()] {
        configuration.replace(&text);
        eventually("the file to be followed", || {
            let outcomes = extra(&stack).expect("there is always an answer");
            (is_served(&outcomes) == (text == with)).then_some(())
        });
    }
    Ok(())
}

/// The kernel's table holds two of the largest configurations; a third waits until the first one's time is over.
fn routes_that_find_no_room_wait_for_it(verdicts: Verdicts) -> Result<()> {
    const HOSTS: usize = 4000;
    let mut stack = Plan::new(verdicts).setting("head_timeout_ms", 1000).function("extra", "echo").start();
    let configuration = Configuration::of(&stack);
    let with = configuration.text();
    let crowded = |text: &str, round: usize| {
        let hosts: Vec<_> = (0..HOSTS).map(|host| format!("\"h{host}.r{round}.example\"")).collect();
        with_lines(text, "echo", &format!("hosts = [{}]", hosts.join(", ")))
    };
    let load = Load::start(&stack, "echo");
    for round in 0..2 {
        configuration.replace(&crowded(&with, round));
        stack.gateway().signal(Signal::SIGHUP);
        let host = format!("h7.r{round}.example");
        eventually("the new host to lead to echo", || {
            let hello = Hello::named(host.as_bytes()).bytes();
            let outcome = probe::probe(&stack, Port::Https, &hello, &Manner::default()).ok()?;
            (outcome != Outcome::Alert(alert::UNRECOGNIZED_NAME)).then_some(())
        });
    }
    configuration.replace(&crowded(&without(&with, "extra"), 2));
    stack.gateway().signal(Signal::SIGHUP);
    stack.gateway().wait_for_line("waits until connections").context("it says so")?;
    eventually("the last one to be followed", || (extra(&stack).ok()? == absent()).then_some(()));
    load.stop()?;
    Ok(())
}

/// A reload that comes too early is no end.
#[test]
fn a_hangup_while_the_gateway_starts_does_not_end_it() -> Result<()> {
    let mut stack = Plan::new(Verdicts::Auto).prepare();
    stack.start_supervisor();
    stack.start_gateway();
    stack.gateway().wait_for_line("verdicts come from").context("it begins")?;
    stack.gateway().signal(Signal::SIGHUP);
    stack.wait_until_ready();
    Ok(())
}
