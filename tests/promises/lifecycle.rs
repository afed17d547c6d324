//! Gateways come and go: what depends on a dead one goes on, what nobody needs is removed, and neighbours don't notice.
use std::{
    fs,
    net::{TcpListener, TcpStream},
    ops::Range,
    os::unix::fs::symlink,
    path::Path,
    rc::Rc,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill as send_signal},
    unistd::Pid,
};
use tests::{
    Stack, Verdicts, eventually,
    mangle::Injector,
    metrics::Metrics,
    net::Net,
    pattern::{Pattern, Random},
    pins::counter,
    process::{freeze, thaw},
    stack::{AddressBook, Plan},
    wire::{Client, Framing, Wire},
};

in_both_modes!(a_stop_resets_nobody, begun_handshakes_are_served);

/// Functions that can be halted one by one.
const HALTED: usize = 9;

fn halted(number: usize) -> String {
    format!("halted{number}")
}

/// A stack whose functions can be halted; what doesn't run answers nobody.
fn plan() -> Plan {
    (0..HALTED).fold(Plan::new(Verdicts::Sockmap), |plan, number| {
        plan.function(&halted(number), "echo").without_readiness(&halted(number))
    })
}

/// A request of which the function has a part.
struct Unanswered {
    client: Client,
    field: String,
    function: String,
    /// Processes that were halted before it came: nothing of it is read, and its socket is enrolled still.
    processes: Vec<i32>,
}

impl Unanswered {
    fn begin(stack: &AddressBook, number: usize, function: String) -> Result<Self> {
        let field = format!("value-{number}-");
        let mut client = stack.client()?;
        client
            .send(format!("GET /function/{function} HTTP/1.1\r\nHost: x\r\nX-Field: {field}").as_bytes())?;
        Ok(Self { client, field, function, processes: Vec::new() })
    }

    fn finish(mut self) -> Result<()> {
        self.go_on();
        self.client.send(b"end\r\n\r\n")?;
        let answer = self.client.response().context("a connection that was handed over")?;
        ensure!(answer.json()["headers"]["x-field"] == format!("{}end", self.field), "{answer:?}");
        // As any other from now on.
        let target = format!("/function/{}", self.function);
        self.client.echo(&target, "x", Pattern::new(5), 30_000, Framing::Chunks(777))
    }

    fn go_on(&mut self) {
        for process in self.processes.drain(..) {
            // One that is gone needs no signal.
            let _ = send_signal(Pid::from_raw(process), Signal::SIGCONT);
        }
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.go_on();
    }
}

/// Halts functions, begins a request for each, and waits until they have left the gateway.
fn begin_unanswered(stack: &mut Stack, numbers: Range<usize>) -> Result<Vec<Unanswered>> {
    let mut all = Vec::new();
    for number in numbers {
        let processes = halt(stack, &halted(number))?;
        let mut unanswered = Unanswered::begin(stack, number, halted(number))?;
        unanswered.processes = processes;
        all.push(unanswered);
    }
    have_left(stack)?;
    Ok(all)
}

fn halt(stack: &mut Stack, function: &str) -> Result<Vec<i32>> {
    let serves = |stack: &AddressBook| {
        let answer = stack.client()?.request("GET", &format!("/function/{function}"), "x", None)?;
        Ok::<_, anyhow::Error>(answer.status() == 200)
    };
    eventually("the function to be up", || serves(stack).is_ok_and(|serves| serves).then_some(()));
    let processes = stack.processes_named(function);
    ensure!(!processes.is_empty(), "{function} doesn't run");
    freeze(&processes);
    Ok(processes)
}

/// What came before this has left the gateway.
fn have_left(stack: &AddressBook) -> Result<()> {
    // The first may be accepted in the same turn and sent to its worker before the others are; the second comes later.
    (0..2).try_for_each(|_| {
        let answer = stack.client()?.request("GET", "/function/echo", "x", None)?;
        ensure!(answer.status() == 200, "{answer:?}");
        Ok(())
    })
}

fn kill(stack: &mut Stack) {
    stack.look();
    stack.gateway().kill();
}

fn restart(stack: &mut Stack) {
    stack.start_gateway();
    stack.wait_until_ready();
}

fn goes_on(stack: &mut Stack) -> bool {
    stack.gateway().said().iter().any(|line| line.contains("goes on with the BPF programs"))
}

/// The maps and programs that were found are inspected like those of one's own.
fn is_looked_into(stack: &Stack) -> Result<()> {
    let metrics = Metrics::scrape(stack)?;
    ensure!(metrics.sum("pointsman_bpf_map_entries", &[("map", "pm_connections")]) >= 1.0);
    ensure!(metrics.sum("pointsman_bpf_map_entries", &[("map", "pm_routes")]) >= 1.0);
    ensure!(metrics.sum("pointsman_kernel_events_total", &[("event", "enrolled")]) >= 1.0);
    let programs = metrics.label_values("pointsman_bpf_program_runs_total", "program");
    ensure!(programs.len() == 4, "{programs:?}");
    Ok(())
}

#[test]
fn what_a_killed_gateway_left_is_adopted() -> Result<()> {
    let mut stack = plan().start();
    let pins = stack.pins();
    ensure!(pins.len() == 1, "{pins:?}");
    let mut late = Vec::new();
    for round in 0..3 {
        let mut unanswered = begin_unanswered(&mut stack, 3 * round..3 * round + 3)?;
        late.extend(unanswered.pop());
        kill(&mut stack);
        ensure!(stack.pins() == pins, "{:?}", stack.pins());
        unanswered.pop().unwrap().finish()?;
        restart(&mut stack);
        ensure!(goes_on(&mut stack), "{:?}", stack.gateway().said());
        ensure!(stack.pins() == pins, "{:?}", stack.pins());
        is_looked_into(&stack)?;
        unanswered.into_iter().try_for_each(Unanswered::finish)?;
    }
    // They have seen two gateways die, or one.
    late.into_iter().try_for_each(Unanswered::finish)?;
    stack.stop();
    ensure!(!pins[0].exists());
    Ok(())
}

/// Segments that overlap come while no gateway runs.
#[test]
fn bytes_are_kept_exact_after_the_kill() -> Result<()> {
    const TRIMMED: usize = 5;
    let mut stack = plan().start();
    let set = stack.pins().remove(0);
    let mut clients = Vec::new();
    let processes = halt(&mut stack, "halted0")?;
    for _ in 0..8 {
        let mut client = stack.client()?;
        client.socket().set_nodelay(true)?;
        client.send(b"POST /function/halted0 HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n")?;
        clients.push(client);
    }
    have_left(&stack)?;
    kill(&mut stack);
    let mut bodies = Vec::new();
    for (seed, client) in clients.iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let body = random.bytes(3000);
        let rest = [b"\r\n", &body[..]].concat();
        Injector::new(client.socket())?.write_with_overlaps(client.socket(), &mut random, &rest)?;
        bodies.push(body);
    }
    thaw(&processes);
    for (seed, (client, body)) in clients.iter_mut().zip(bodies).enumerate() {
        let answer = client.response().with_context(|| format!("seed {seed}"))?;
        ensure!(answer.body == body, "seed {seed}");
    }
    ensure!(counter(&set, TRIMMED)? > 0, "no segment overlapped");
    drop(clients);
    restart(&mut stack);
    stack.stop();
    Ok(())
}

/// As if the next gateway had other programs.
#[test]
fn what_does_not_fit_is_kept_until_its_connections_end() -> Result<()> {
    let mut stack = plan().start();
    let old = stack.pins().remove(0);
    let mut unanswered = begin_unanswered(&mut stack, 0..3)?;
    kill(&mut stack);
    fs::remove_file(old.join("layout"))?;
    symlink("another", old.join("layout"))?;
    restart(&mut stack);
    ensure!(!goes_on(&mut stack), "{:?}", stack.gateway().said());
    let both = stack.pins();
    ensure!(both.len() == 2 && both.contains(&old), "{both:?}");
    unanswered.pop().unwrap().finish()?;
    ensure!(old.exists(), "two connections depend on it");
    unanswered.into_iter().try_for_each(Unanswered::finish)?;
    eventually("the old set to be removed", || (!old.exists()).then_some(()));
    ensure!(stack.pins().len() == 1);
    stack.stop();
    Ok(())
}

/// A stop waits for those who depend on an earlier gateway's programs, and removes both sets.
#[test]
fn a_stop_ends_what_earlier_gateways_left() -> Result<()> {
    let mut stack = plan().start();
    let old = stack.pins().remove(0);
    let mut unanswered = begin_unanswered(&mut stack, 0..2)?;
    kill(&mut stack);
    fs::remove_file(old.join("layout"))?;
    symlink("another", old.join("layout"))?;
    restart(&mut stack);
    stack.look();
    stack.gateway().signal(Signal::SIGTERM);
    stack.gateway().wait_for_line("waits for connections").context("it waits")?;
    unanswered.pop().unwrap().finish()?;
    stack.gateway().signal(Signal::SIGINT);
    stack.gateway().wait_for_line("told again").context("it is hurried")?;
    ensure!(stack.gateway().wait().success());
    // Nobody could tell its bytes from a truncated stream's.
    ensure!(unanswered.pop().unwrap().finish().is_err());
    ensure!(stack.pins().is_empty(), "{:?}", stack.pins());
    stack.stop();
    Ok(())
}

/// Service managers remove the cgroups of a service that has died.
#[test]
fn the_cgroup_of_a_killed_gateway_is_removed() -> Result<()> {
    let mut stack = plan().start();
    let old = stack.pins().remove(0);
    let mut unanswered = begin_unanswered(&mut stack, 0..4)?;
    kill(&mut stack);
    let cgroup = fs::read_link(old.join("cgroup"))?;
    eventually("the killed process to leave its cgroup", || fs::remove_dir(&cgroup).ok());
    unanswered.pop().unwrap().finish()?;
    restart(&mut stack);
    ensure!(!goes_on(&mut stack), "{:?}", stack.gateway().said());
    unanswered.into_iter().try_for_each(Unanswered::finish)?;
    eventually("the old set to be removed", || (!old.exists()).then_some(()));
    stack.stop();
    Ok(())
}

#[test]
fn neighbours_do_not_notice() -> Result<()> {
    let net = Rc::new(Net::private());
    let mut first = plan().in_net(net.clone()).start();
    let mut second = plan().in_net(net).start();
    let (first_pins, second_pins) = (first.pins(), second.pins());
    ensure!(first_pins.len() == 1 && second_pins.len() == 1 && first_pins != second_pins);
    let of_first = begin_unanswered(&mut first, 0..3)?;
    let of_second = begin_unanswered(&mut second, 0..3)?;
    kill(&mut first);
    // Another start looks at what is there, and leaves alone what others own or need.
    second.look();
    ensure!(
        second
            .gateway()
            .terminate_after(|| of_second.into_iter().try_for_each(Unanswered::finish))?
            .success()
    );
    ensure!(second.pins().is_empty() && first.pins() == first_pins, "{:?} {:?}", second.pins(), first.pins());
    restart(&mut second);
    ensure!(first.pins() == first_pins, "{:?}", first.pins());
    of_first.into_iter().try_for_each(Unanswered::finish)?;
    restart(&mut first);
    ensure!(first.pins() == first_pins && second.pins() == second_pins);
    first.stop();
    let answer = second.client()?.request("GET", "/function/echo", "x", None)?;
    ensure!(answer.status() == 200, "{answer:?}");
    second.stop();
    Ok(())
}

/// What was begun by mistake must not take away what is at work.
#[test]
fn a_second_gateway_on_the_same_ports_changes_nothing() -> Result<()> {
    let mut stack = plan().start();
    let pins = stack.pins();
    let unanswered = begin_unanswered(&mut stack, 0..2)?;
    let mut second = stack.another_gateway();
    ensure!(!second.wait().success());
    ensure!(
        second.said().iter().any(|line| line.contains("another program uses this port")),
        "{:?}",
        second.said()
    );
    ensure!(stack.pins() == pins, "{:?}", stack.pins());
    unanswered.into_iter().try_for_each(Unanswered::finish)?;
    stack.stop();
    Ok(())
}

/// A start that comes to nothing leaves what it had adopted to the next one.
#[test]
fn a_start_fails_after_the_adoption() -> Result<()> {
    let mut stack = plan().start();
    let pins = stack.pins();
    let mut unanswered = begin_unanswered(&mut stack, 0..3)?;
    kill(&mut stack);
    let occupant = eventually("the dead gateway's port to be free", || TcpListener::bind(stack.https).ok());
    let mut failing = stack.another_gateway();
    ensure!(!failing.wait().success());
    ensure!(failing.said().iter().any(|line| line.contains("goes on with")), "{:?}", failing.said());
    ensure!(stack.pins() == pins, "{:?}", stack.pins());
    unanswered.pop().unwrap().finish()?;
    drop(occupant);
    restart(&mut stack);
    ensure!(goes_on(&mut stack), "{:?}", stack.gateway().said());
    unanswered.into_iter().try_for_each(Unanswered::finish)?;
    stack.stop();
    Ok(())
}

/// Clients come and go while the gateway dies and comes back. Whatever it had handed over is served to the end.
#[test]
fn gateways_are_killed_under_load() -> Result<()> {
    const CLIENTS: usize = 6;
    const DEATHS: usize = 5;
    let mut stack = plan().start();
    let pins = stack.pins();
    let (book, ends) = (stack.address_book(), AtomicBool::new(false));
    let served = AtomicUsize::new(0);
    thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|seed| {
                let (book, ends, served) = (&book, &ends, &served);
                scope.spawn(move || -> Result<()> {
                    let mut random = Random::new(seed as u64);
                    while !ends.load(Ordering::Relaxed) {
                        let sizes = [20, 3000, 100_000, 700_000];
                        // Not yet handed over, or not accepted: it may be lost with its gateway, and only it.
                        let Ok(mut client) = first_answer(book, random.below(2) == 0) else { continue };
                        for _ in 0..random.within(1, 4) {
                            let framing =
                                if random.below(2) == 0 { Framing::Length } else { Framing::Chunks(4097) };
                            let (pattern, size) = (Pattern::new(random.number()), *random.choose(&sizes));
                            client.echo("/function/echo", "echo.faas.local", pattern, size, framing)?;
                        }
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let deaths = (0..DEATHS).try_for_each(|_| -> Result<()> {
            more(&served, 20);
            let unanswered = (0..5)
                .map(|number| Unanswered::begin(&book, number, "echo".into()))
                .collect::<Result<Vec<_>>>()?;
            have_left(&book)?;
            kill(&mut stack);
            ensure!(stack.pins() == pins, "{:?}", stack.pins());
            let late = {
                let mut unanswered = unanswered.into_iter();
                unanswered.by_ref().take(2).try_for_each(Unanswered::finish)?;
                unanswered
            };
            stack.start_gateway();
            more(&served, 20);
            late.into_iter().try_for_each(Unanswered::finish)
        });
        ends.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().expect("a client's thread")?;
        }
        deaths
    })?;
    ensure!(goes_on(&mut stack), "{:?}", stack.gateway().said());
    stack.stop();
    Ok(())
}

fn first_answer(book: &AddressBook, secure: bool) -> Result<Client> {
    let mut client = if secure { book.tls_client("echo")? } else { book.client()? };
    let answer = client.request("GET", "/function/echo", "echo.faas.local", None)?;
    ensure!(answer.status() == 200, "{answer:?}");
    Ok(client)
}

/// Waits until that many more connections were served.
fn more(served: &AtomicUsize, count: usize) {
    let wanted = served.load(Ordering::Relaxed) + count;
    eventually("more connections to be served", || (served.load(Ordering::Relaxed) >= wanted).then_some(()));
}

/// What a killed gateway left is its own for a while, although no connection needs it.
#[test]
fn another_gateway_takes_nothing_away() -> Result<()> {
    /// How long it is the other one's: on a machine that is slower than that it may be gone.
    const LEFT_ALONE: Duration = Duration::from_secs(10);
    let mut stack = Stack::start(Verdicts::Sockmap);
    let pins = stack.pins();
    for _ in 0..5 {
        kill(&mut stack);
        let killed_at = Instant::now();
        Stack::start(Verdicts::Sockmap).stop();
        let found = stack.pins();
        restart(&mut stack);
        if killed_at.elapsed() < LEFT_ALONE {
            ensure!(found == pins && !pins.is_empty(), "{found:?} of {pins:?}");
            ensure!(goes_on(&mut stack), "{:?}", stack.gateway().said());
            stack.stop();
            return Ok(());
        }
    }
    bail!("another gateway never came and went in {LEFT_ALONE:?}");
}

/// One that came while the other one lived has not seen it dead for long.
#[test]
fn a_gateway_that_died_lately_is_left_alone() -> Result<()> {
    /// Just before the other one takes up what was dead when it came, and until after it.
    const BEFORE: Duration = Duration::from_secs(9);
    const AFTER: Duration = Duration::from_secs(3);
    let mut stack = Stack::start(Verdicts::Sockmap);
    let other = Plan::new(Verdicts::Sockmap).in_net(Rc::clone(&stack.net)).start();
    let pins = stack.pins();
    thread::sleep(BEFORE);
    kill(&mut stack);
    thread::sleep(AFTER);
    ensure!(stack.pins() == pins && !pins.is_empty(), "{:?} of {pins:?}", stack.pins());
    restart(&mut stack);
    ensure!(goes_on(&mut stack), "{:?}", stack.gateway().said());
    stack.stop();
    other.stop();
    Ok(())
}

/// Every client whose connection came about gets its answer, while the gateway stops.
fn a_stop_resets_nobody(verdicts: Verdicts) -> Result<()> {
    const CLIENTS: usize = 8;
    let mut stack = Stack::start(verdicts);
    let book = stack.address_book();
    for _ in 0..5 {
        let served = AtomicUsize::new(0);
        thread::scope(|scope| -> Result<()> {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|_| {
                    scope.spawn(|| -> Result<()> {
                        // Nobody listens any more: that is the end, and no fault.
                        while let Ok(socket) =
                            TcpStream::connect_timeout(&book.http, Duration::from_millis(300))
                        {
                            let mut client = Client::new(Wire::Plain(socket));
                            let answer = client.request("GET", "/function/hello", "x", None)?;
                            ensure!(answer.status() == 200, "{answer:?}");
                            served.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(())
                    })
                })
                .collect();
            more(&served, 50);
            stack.look();
            stack.gateway().signal(Signal::SIGTERM);
            for client in clients {
                client.join().expect("a client's thread")?;
            }
            ensure!(stack.gateway().wait().success());
            Ok(())
        })?;
        restart(&mut stack);
    }
    Ok(())
}

/// A client that was connected before the gateway was told to stop sends its request after it.
fn begun_handshakes_are_served(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let mut clients = (0..5).map(|_| stack.client()).collect::<Result<Vec<_>>>()?;
    stack.look();
    stack.gateway().signal(Signal::SIGTERM);
    stack.gateway().wait_for_line("stops").context("it says that it stops")?;
    for client in &mut clients {
        let answer = client.request("POST", "/function/echo", "x", Some(b"late"))?;
        ensure!(answer.body == b"late", "{answer:?}");
    }
    ensure!(stack.gateway().wait().success());
    ensure!(stack.client().is_err(), "nobody listens any more");
    Ok(())
}

/// What the self-test has shown is remembered where nobody else can write.
#[test]
fn the_self_test_runs_once() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;

    let folder = tempfile::tempdir()?;
    let says = |arguments: &[&str]| doctor(folder.path(), arguments);
    ensure!(says(&[])?.contains("self-test: passed now"));
    ensure!(says(&[])?.contains("self-test: passed before"));
    ensure!(says(&["--self-test"])?.contains("self-test: passed now"));
    let proof = folder.path().join("self-test");
    fs::set_permissions(&proof, fs::Permissions::from_mode(0o666))?;
    ensure!(says(&[])?.contains("self-test: passed now"), "others could have written it");
    ensure!(says(&[])?.contains("self-test: passed before"));
    fs::write(&proof, fs::read_to_string(&proof)?.replace('-', "_"))?;
    ensure!(says(&[])?.contains("self-test: passed now"), "it is of another boot");
    Ok(())
}

fn doctor(runtime_directory: &Path, arguments: &[&str]) -> Result<String> {
    let output = std::process::Command::new(tests::programs::product("pointsman"))
        .arg("doctor")
        .args(arguments)
        .env("RUNTIME_DIRECTORY", runtime_directory)
        .output()?;
    Ok(String::from_utf8(output.stdout)?)
}
