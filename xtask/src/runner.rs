//! The part of `cargo xtask run` that lives as long as the gateway: it starts the processes and ends them.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{BufRead, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use std::{env, io};

use anyhow::{Context, Result, bail};
use nix::libc::EAFNOSUPPORT;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, geteuid};
use toml::{Table, Value};

use crate::invitation::{self, Started};
use crate::progress::announce;

/// Follows the configuration on standard input; TOML can't hold it.
pub const END_OF_CONFIG: u8 = 0;

/// How often the start looks whether everything answers.
const PROBE_MS: u16 = 100;
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// A function that takes longer to start is named, and everything else goes on.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// Longer than the gateway and the supervisor take by their own deadlines.
const STOP_WITHIN: Duration = Duration::from_secs(45);

#[derive(clap::Args)]
pub struct Arguments {
    #[arg(long)]
    programs: PathBuf,
    #[arg(long)]
    authority: PathBuf,
}

pub struct Plan {
    /// The directory of the built programs.
    pub programs: PathBuf,
    /// The CA's certificate.
    pub authority: PathBuf,
}

impl Plan {
    pub fn arguments(&self) -> Vec<OsString> {
        let programs = self.programs.clone().into_os_string();
        let authority = self.authority.clone().into_os_string();
        vec!["runner".into(), "--programs".into(), programs, "--authority".into(), authority]
    }
}

/// As root, at the other end of the pipe.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let stdin = io::stdin();
    let mut text = Vec::new();
    stdin.lock().read_until(END_OF_CONFIG, &mut text).context("cannot read the configuration")?;
    text.pop_if(|last| *last == END_OF_CONFIG);
    let config: Table = String::from_utf8(text).context("the configuration is not text")?.parse()?;
    let plan = Plan { programs: arguments.programs.clone(), authority: arguments.authority.clone() };
    serve(&plan, config, Some(stdin.as_fd()))
}

/// Serves until Ctrl-C, SIGTERM, the end of `parent`, or the end of one of the processes.
pub fn serve(plan: &Plan, mut config: Table, parent: Option<BorrowedFd<'_>>) -> Result<ExitCode> {
    let addresses = Addresses::of(&config)?;
    addresses.check_free()?;
    let directory = RuntimeDirectory::make(addresses.http.port())?;
    let gateway = config.get_mut("gateway").and_then(Value::as_table_mut).context("no [gateway]")?;
    let functions_dir = directory.path.join("functions");
    // Before both start, because the gateway watches it and the supervisor fills it.
    DirBuilder::new().mode(0o750).recursive(true).create(&functions_dir)?;
    gateway.insert("functions_dir".to_owned(), Value::from(functions_dir.display().to_string()));
    let file = directory.path.join("pointsman.toml");
    fs::write(&file, config.to_string()).with_context(|| format!("cannot write {}", file.display()))?;

    let events = Events::catch(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP])?;
    announce("starting the functions and the gateway");
    let program = plan.programs.join("pointsman");
    let mut processes = Processes {
        supervisor: start(&program, "supervise", &file)?,
        // Owned by the struct only when both run; a failed start ends the first one by its parent-death signal.
        gateway: start(&program, "gateway", &file)?,
    };
    let functions = Started::all(&config);
    let outcome = watch(&events, parent, &mut processes, &addresses, &functions, &plan.authority);
    let stopped = processes.stop(&events);
    let succeeded = outcome? && stopped?;
    Ok(if succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Waits for a reason to stop; false if a process ended by itself.
fn watch(
    events: &Events,
    parent: Option<BorrowedFd<'_>>,
    processes: &mut Processes,
    addresses: &Addresses,
    functions: &[Started],
    authority: &Path,
) -> Result<bool> {
    let began = Instant::now();
    let mut ready = false;
    loop {
        let timeout = if ready { PollTimeout::NONE } else { PollTimeout::from(PROBE_MS) };
        match events.wait(parent, timeout)? {
            Event::Stop => {
                announce("stopping");
                return Ok(true);
            }
            Event::Child | Event::Nothing => {}
        }
        if let Some((name, status)) = processes.ended()? {
            announce(&format!("the {name} ended by itself ({status}); its reason stands above"));
            return Ok(false);
        }
        if !ready {
            let mut silent: Vec<_> = functions
                .iter()
                .map(|function| function.name.as_str())
                .filter(|name| !answers(addresses.http, name))
                .collect();
            if !addresses.https_answers() {
                silent.push("the HTTPS port");
            }
            if silent.is_empty() || began.elapsed() > READY_WITHIN {
                ready = true;
                for who in &silent {
                    announce(&format!("{who} does not answer yet; the log says why"));
                }
                print!("{}", invitation::text(addresses.http, addresses.https, functions, authority));
                // A closed standard output is no reason to stop serving.
                let _ = io::stdout().flush();
            }
        }
    }
}

struct Processes {
    supervisor: Child,
    gateway: Child,
}

impl Processes {
    fn ended(&mut self) -> Result<Option<(&'static str, std::process::ExitStatus)>> {
        for (name, child) in [("gateway", &mut self.gateway), ("supervisor", &mut self.supervisor)] {
            if let Some(status) = child.try_wait()? {
                return Ok(Some((name, status)));
            }
        }
        Ok(None)
    }

    /// The gateway first, so that no connection comes for functions that are leaving.
    fn stop(&mut self, events: &Events) -> Result<bool> {
        let gateway = end(&mut self.gateway, "gateway", events)?;
        let supervisor = end(&mut self.supervisor, "supervisor", events)?;
        Ok(gateway && supervisor)
    }
}

fn end(child: &mut Child, name: &str, events: &Events) -> Result<bool> {
    let deadline = Instant::now() + STOP_WITHIN;
    let mut asked = false;
    loop {
        // Before the signal, because a reaped child's number may be another process's.
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        let pid = Pid::from_raw(child.id().cast_signed());
        if !asked {
            kill(pid, Signal::SIGTERM)?;
            asked = true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            announce(&format!("the {name} does not end, killing it"));
            child.kill()?;
            child.wait()?;
            return Ok(false);
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if events.wait(None, timeout)? == Event::Stop {
            announce(&format!("asked again: the {name} ends at once"));
            // The supervisor takes a second signal for haste.
            kill(pid, Signal::SIGTERM)?;
        }
    }
}

/// In a process group of its own, so that Ctrl-C comes to this process alone, which then ends its children in order.
fn start(program: &Path, subcommand: &str, config: &Path) -> Result<Child> {
    let mut command = Command::new(program);
    command.arg(subcommand).arg("--config").arg(config).stdin(Stdio::null()).process_group(0);
    // SAFETY: two system calls, on memory of their own.
    unsafe {
        command.pre_exec(|| {
            prctl::set_pdeathsig(Signal::SIGTERM)?;
            // What this process takes from a descriptor, its children take as signals.
            Ok(SigSet::empty().thread_set_mask()?)
        });
    }
    command.spawn().with_context(|| format!("cannot start {} {subcommand}", program.display()))
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Stop,
    Child,
    Nothing,
}

/// Signals, taken from a descriptor.
pub struct Events {
    signals: SignalFd,
}

impl Events {
    /// Takes these as reasons to stop, and the ends of children.
    pub fn catch(stop: &[Signal]) -> Result<Self> {
        let mut signals: SigSet = stop.iter().copied().collect();
        signals.add(Signal::SIGCHLD);
        signals.thread_block().context("cannot block signals")?;
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { signals })
    }

    pub fn wait(&self, parent: Option<BorrowedFd<'_>>, timeout: PollTimeout) -> Result<Event> {
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        fds.extend(parent.map(|parent| PollFd::new(parent, PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait"),
        }
        if fds.get(1).and_then(PollFd::any).unwrap_or(false) {
            return Ok(Event::Stop);
        }
        let mut event = Event::Nothing;
        while let Some(signal) = self.signals.read_signal()? {
            if signal.ssi_signo == Signal::SIGCHLD as u32 {
                event = Event::Child;
            } else {
                return Ok(Event::Stop);
            }
        }
        Ok(event)
    }
}

/// `/run/pointsman-dev-PORT` for root; it goes away at the end, or at the next start after a kill.
struct RuntimeDirectory {
    path: PathBuf,
    _lock: File,
}

impl RuntimeDirectory {
    fn make(port: u16) -> Result<Self> {
        let base = if geteuid().is_root() {
            PathBuf::from("/run")
        } else {
            env::var_os("XDG_RUNTIME_DIR").map_or_else(env::temp_dir, PathBuf::from)
        };
        let path = base.join(format!("pointsman-dev-{port}"));
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("cannot make {}", path.display()));
            }
            _ => {}
        }
        let owner = fs::symlink_metadata(&path)?;
        if !owner.is_dir() || owner.uid() != geteuid().as_raw() {
            bail!("{} belongs to somebody else; remove it", path.display());
        }
        fs::set_permissions(&path, Permissions::from_mode(0o700))?;
        let lock = File::open(&path)?;
        if lock.try_lock().is_err() {
            bail!(
                "another `cargo xtask run` serves port {port}; end it, or choose other ports with --http and --https"
            );
        }
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for RuntimeDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

struct Addresses {
    http: SocketAddr,
    https: SocketAddr,
}

impl Addresses {
    fn of(config: &Table) -> Result<Self> {
        let address = |key: &str| -> Result<SocketAddr> {
            let text = config["gateway"]
                .get(key)
                .and_then(Value::as_str)
                .with_context(|| format!("no gateway.{key}"))?;
            Ok(text.parse()?)
        };
        Ok(Self { http: address("http")?, https: address("https")? })
    }

    fn check_free(&self) -> Result<()> {
        for (flag, address) in [("--http", self.http), ("--https", self.https)] {
            if address.port() == 0 {
                bail!("port 0 can't be printed as a curl line; choose one with {flag}");
            }
            match TcpListener::bind(address) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    bail!("port {} is in use by another program; choose another with {flag}", address.port())
                }
                Err(error) if error.raw_os_error() == Some(EAFNOSUPPORT) => {
                    bail!("this machine has no IPv6; listen at 0.0.0.0:{} with {flag}", address.port())
                }
                Err(error) => return Err(error).with_context(|| format!("cannot listen at {address}")),
            }
        }
        Ok(())
    }

    /// Anything but silence will do: the refusal function tells a client without TLS so.
    fn https_answers(&self) -> bool {
        exchange(self.https, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .is_some_and(|answer| !answer.is_empty())
    }
}

/// True when somebody else than the refusal function for absent ones answers.
fn answers(http: SocketAddr, function: &str) -> bool {
    let request =
        format!("GET /function/{function} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    exchange(http, &request)
        .is_some_and(|answer| answer.starts_with(b"HTTP/1.1 ") && !answer.starts_with(b"HTTP/1.1 503"))
}

/// The first bytes of the answer.
fn exchange(address: SocketAddr, request: &str) -> Option<Vec<u8>> {
    let connect = |target| TcpStream::connect_timeout(&target, PROBE_TIMEOUT).ok();
    let mut stream = targets(address).into_iter().find_map(connect)?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT)).ok()?;
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = vec![0; 64];
    let length = stream.read(&mut answer).ok()?;
    answer.truncate(length);
    Some(answer)
}

/// Where a listener can be reached from here; `[::]` takes both families, and one of them may be switched off.
fn targets(listener: SocketAddr) -> Vec<SocketAddr> {
    let ips: &[IpAddr] = match listener.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => &[IpAddr::V4(Ipv4Addr::LOCALHOST)],
        IpAddr::V6(ip) if ip.is_unspecified() => {
            &[IpAddr::V6(Ipv6Addr::LOCALHOST), IpAddr::V4(Ipv4Addr::LOCALHOST)]
        }
        _ => return vec![listener],
    };
    ips.iter().map(|&ip| SocketAddr::new(ip, listener.port())).collect()
}

pub fn strings(value: &Value) -> Vec<String> {
    let values = value.as_array().map(Vec::as_slice).unwrap_or_default();
    values.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(http: &str, https: &str) -> Addresses {
        Addresses { http: http.parse().unwrap(), https: https.parse().unwrap() }
    }

    #[test]
    fn a_busy_port_is_one_sentence_with_the_remedy() {
        let busy = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = busy.local_addr().unwrap().port();
        let error =
            addresses(&format!("127.0.0.1:{port}"), "127.0.0.1:1").check_free().unwrap_err().to_string();
        assert_eq!(error, format!("port {port} is in use by another program; choose another with --http"));
    }

    #[test]
    fn a_listener_of_both_families_is_reached_by_the_one_that_there_is() {
        let answerer = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = answerer.local_addr().unwrap().port();
        let answered = std::thread::spawn(move || {
            let (mut client, _) = answerer.accept().unwrap();
            client.read_exact(&mut [0; 3]).unwrap();
            client.write_all(b"yes").unwrap();
        });
        // Nobody listens at this port of [::1], as where IPv6 is switched off.
        assert_eq!(
            exchange(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port), "hi?").as_deref(),
            Some(&b"yes"[..])
        );
        answered.join().unwrap();
    }
}
