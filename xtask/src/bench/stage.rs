//! All sides, started at once and ready to be measured in turn.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{collections::BTreeSet, thread};

use anyhow::{Context, Result, bail};
use minijinja::{Environment, UndefinedBehavior, context};
use serde::Serialize;
use tempfile::TempDir;

use crate::authority::Authority;
use crate::load::order;
use crate::progress::announce;

use super::listener;
use super::peers::Installed;
use super::proc::Family;
use super::process::Process;
use super::side::{Peer, Side};
use super::work::{FUNCTIONS, Port, Work};
use super::{descriptors, proc};
use crate::interrupt;

/// One that `localhost`'s CA may sign for, and that needs no resolver.
const DOMAIN: &str = "localhost";
const READY_WITHIN: Duration = Duration::from_secs(20);
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
pub struct Stage {
    // Dropped in this order: what fronts the functions goes first.
    sides: Vec<Running>,
    functions: Vec<Process>,
    pub directory: TempDir,
    pub authority: PathBuf,
}

/// A side that runs.
pub struct Running {
    pub side: Side,
    front: Option<Process>,
    /// Pointsman's functions; the others' are the stage's.
    supervisor: Option<Process>,
    /// What the processes held when nothing had happened yet.
    pub fresh: Memory,
    front_roots: Vec<i32>,
    function_roots: Vec<i32>,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    pub front_mib: f64,
    pub functions_mib: f64,
    pub slab_mib: f64,
}

/// What a template may say of a function.
#[derive(Clone, Serialize)]
struct Function {
    name: &'static str,
    host: String,
    program: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
    /// Where it listens itself.
    http: u16,
    https: u16,
}

impl Stage {
    /// Starts `sides`; those that don't come up are given with the reason.
    pub fn set(programs: &Path, sides: &[(Side, Option<Installed>)]) -> Result<(Self, Vec<(Side, String)>)> {
        let directory = tempfile::Builder::new().prefix("pointsman-bench-").tempdir()?;
        // Functions run as another user, and their programs lie elsewhere.
        let path = directory.path();
        let authority = Authority::open(&path.join("authority"), &BTreeSet::from([DOMAIN.to_owned()]))?;
        let mut functions = Vec::new();
        for (index, name) in FUNCTIONS.into_iter().enumerate() {
            let issued = authority.issue(name, &[host(name)])?;
            functions.push(Function {
                name,
                host: host(name),
                program: programs.join(if name == "bulk" { "examples/bulk" } else { "hello" }),
                certificate: issued.chain,
                key: issued.key,
                http: Side::Direct.port(Port::Http, index),
                https: Side::Direct.port(Port::Https, index),
            });
        }
        let processes = functions.iter().map(|function| start_directly(function, path));
        let mut stage = Self {
            sides: Vec::new(),
            functions: processes.collect::<Result<_>>()?,
            authority: authority.certificate(),
            directory,
        };
        let mut absent = Vec::new();
        for (side, installed) in sides {
            announce(&format!("starting {}", side.as_str()));
            match stage.start(*side, programs, &functions, installed.as_ref()) {
                Ok(running) => stage.sides.push(running),
                Err(error) => absent.push((*side, format!("{error:#}"))),
            }
            interrupt::check()?;
        }
        for running in &mut stage.sides {
            running.fresh = running.memory()?;
        }
        Ok((stage, absent))
    }

    pub fn sides(&self) -> &[Running] {
        &self.sides
    }

    /// An error if one of the processes has ended.
    pub fn check(&mut self) -> Result<()> {
        let fronts = self.sides.iter_mut().flat_map(|running| [&mut running.front, &mut running.supervisor]);
        fronts.flatten().chain(&mut self.functions).try_for_each(Process::check)
    }

    fn start(
        &self,
        side: Side,
        programs: &Path,
        functions: &[Function],
        installed: Option<&Installed>,
    ) -> Result<Running> {
        let directory = self.directory.path().join(side.as_str());
        fs::create_dir(&directory)?;
        let pointsman = |verdict: &str| -> Result<(Process, Process)> {
            fs::create_dir(directory.join("functions"))?;
            let config = render(
                side,
                include_str!("../../bench/pointsman.toml"),
                &directory,
                functions,
                None,
                verdict,
            )?;
            let program = programs.join("pointsman");
            let start = |name: &str| {
                let mut command = Command::new(&program);
                Process::start(name, command.arg(name).arg("--config").arg(&config), &directory)
            };
            Ok((start("supervise")?, start("gateway")?))
        };
        let (front, supervisor) = match side.peer() {
            None if side == Side::Direct => (None, None),
            None => {
                let (supervisor, gateway) = pointsman(side.as_str())?;
                (Some(gateway), Some(supervisor))
            }
            Some(peer) => {
                let installed = installed.context("it was not looked for")?;
                (Some(start_peer(side, peer, installed, &directory, functions)?), None)
            }
        };
        let ids = |processes: &mut dyn Iterator<Item = &Process>| processes.map(Process::id).collect();
        let mut running = Running {
            front_roots: ids(&mut front.iter()),
            function_roots: match &supervisor {
                Some(supervisor) => vec![supervisor.id()],
                None => ids(&mut self.functions.iter()),
            },
            side,
            front,
            supervisor,
            fresh: Memory::default(),
        };
        running.wait_until_ready()?;
        Ok(running)
    }
}

impl Running {
    /// The processes between clients and functions.
    pub fn front(&self) -> Result<Vec<i32>> {
        Ok(Family::now()?.trees(&self.front_roots))
    }

    pub fn functions(&self) -> Result<Vec<i32>> {
        Ok(Family::now()?.trees(&self.function_roots))
    }

    pub fn memory(&self) -> Result<Memory> {
        Ok(Memory {
            front_mib: proc::memory_mib(&self.front()?),
            functions_mib: proc::memory_mib(&self.functions()?),
            slab_mib: proc::slab_mib(),
        })
    }

    pub fn address(&self, work: &Work) -> SocketAddr {
        let function = FUNCTIONS.iter().position(|name| *name == work.functions()[0]).unwrap_or(0);
        (Ipv4Addr::LOCALHOST, self.side.port(work.port, function)).into()
    }

    /// What is asked for in turn. Nobody but a router can be asked for two functions: the direct side answers twice.
    pub fn requests(&self, work: &Work) -> Vec<order::Request> {
        let first = work.functions()[0];
        let own = |name: &&str| self.side != Side::Direct || *name == first;
        let request = |name| order::Request { host: host(first), target: work.path(name) };
        work.functions().iter().copied().filter(own).map(request).collect()
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        let port = if self.side.lacks(Port::Http).is_some() { Port::Https } else { Port::Http };
        loop {
            interrupt::check()?;
            for process in [&mut self.front, &mut self.supervisor].into_iter().flatten() {
                process.check()?;
            }
            let ready = match (self.side, port) {
                (Side::Direct, _) => {
                    (0..FUNCTIONS.len()).all(|index| self.answers(port, index, FUNCTIONS[index]))
                }
                (_, Port::Http) => FUNCTIONS.iter().all(|name| self.answers(port, 0, name)),
                _ => TcpStream::connect((Ipv4Addr::LOCALHOST, self.side.port(port, 0))).is_ok(),
            };
            if ready {
                return Ok(());
            }
            if Instant::now() > deadline {
                let words = self.front.as_ref().map(Process::last_words).unwrap_or_default();
                bail!("it does not answer within {READY_WITHIN:?}; it said:\n{words}");
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn answers(&self, port: Port, index: usize, function: &str) -> bool {
        let address = (Ipv4Addr::LOCALHOST, self.side.port(port, index)).into();
        let exchange = || -> Result<bool> {
            let mut stream = TcpStream::connect_timeout(&address, ANSWER_WITHIN)?;
            stream.set_read_timeout(Some(ANSWER_WITHIN))?;
            write!(
                stream,
                "GET /function/{function} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer.starts_with(b"HTTP/1.1 200"))
        };
        exchange().unwrap_or(false)
    }
}

fn host(function: &str) -> String {
    format!("{function}.{DOMAIN}")
}

fn start_directly(function: &Function, directory: &Path) -> Result<Process> {
    let mut command = Command::new(&function.program);
    command.args(["--name", function.name, "--domains", DOMAIN]);
    command.arg("--certificate").arg(&function.certificate).arg("--key").arg(&function.key);
    let listeners =
        vec![("http", listener::listen(function.http)?), ("https", listener::listen(function.https)?)];
    listener::pass(&mut command, listeners)?;
    Process::start(function.name, &mut command, directory)
}

fn start_peer(
    side: Side,
    peer: Peer,
    installed: &Installed,
    directory: &Path,
    functions: &[Function],
) -> Result<Process> {
    let template = match peer {
        Peer::Nginx => include_str!("../../bench/nginx.conf"),
        Peer::Haproxy => include_str!("../../bench/haproxy.cfg"),
        Peer::Envoy => include_str!("../../bench/envoy.yaml"),
        Peer::Sniproxy => include_str!("../../bench/sniproxy.conf"),
    };
    let config = render(side, template, directory, functions, Some(installed), "")?;
    let mut command = installed.command();
    match peer {
        Peer::Nginx => command.arg("-e").arg("stderr").arg("-p").arg(directory).arg("-c").arg(&config),
        Peer::Haproxy => command.arg("-db").arg("-f").arg(&config),
        Peer::Envoy => command
            .args(["--disable-hot-restart", "--log-level", "warning", "--concurrency"])
            .arg(cores().to_string())
            .arg("-c")
            .arg(&config),
        Peer::Sniproxy => command.arg("-f").arg("-c").arg(&config),
    };
    Process::start(peer.as_str(), &mut command, directory)
}

/// Writes the side's configuration and gives its path.
fn render(
    side: Side,
    template: &str,
    directory: &Path,
    functions: &[Function],
    installed: Option<&Installed>,
    verdict: &str,
) -> Result<PathBuf> {
    let first = functions.first().context("there are no functions")?;
    let pair = directory.join("by-request.pem");
    // Its name ends as Envoy wants it; nobody else cares.
    let file = directory.join(format!("{}.yaml", side.as_str()));
    let values = context! {
        directory,
        functions,
        verdict,
        domain => DOMAIN,
        cores => cores(),
        descriptors => descriptors::limit()?,
        // The authority lies beside what it has issued.
        anchors => first.certificate.with_file_name("ca.pem"),
        certificate => first.certificate,
        key => first.key,
        certificate_and_key => pair,
        modules => installed.map(|installed| &installed.modules),
        listen => context! {
            http => side.port(Port::Http, 0),
            https => side.port(Port::Https, 0),
            by_request => side.port(Port::HttpsByRequest, 0),
        },
    };
    fs::write(&pair, [fs::read(&first.certificate)?, fs::read(&first.key)?].concat())?;
    fs::write(&file, expand(template, values)?)?;
    Ok(file)
}

/// A placeholder that nobody fills is an error.
fn expand(template: &str, values: minijinja::Value) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_trim_blocks(true);
    Ok(environment.render_str(template, values)?)
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_side_gets_its_own_addresses_and_every_function() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("pem"), "").unwrap();
        let pem = directory.path().join("pem");
        let function = |name| Function {
            name,
            host: host(name),
            program: "/hello".into(),
            certificate: pem.clone(),
            key: pem.clone(),
            http: 1001,
            https: 1002,
        };
        let functions = FUNCTIONS.map(function);
        let installed = Installed {
            program: "/nginx".into(),
            libraries: None,
            modules: "/modules".into(),
            version: "1".into(),
        };
        let templates = [
            (Side::Sockmap, include_str!("../../bench/pointsman.toml")),
            (Side::Nginx, include_str!("../../bench/nginx.conf")),
            (Side::Haproxy, include_str!("../../bench/haproxy.cfg")),
            (Side::Envoy, include_str!("../../bench/envoy.yaml")),
            (Side::Sniproxy, include_str!("../../bench/sniproxy.conf")),
        ];
        for (side, template) in templates {
            let file =
                render(side, template, directory.path(), &functions, Some(&installed), "peek").unwrap();
            let text = fs::read_to_string(file).unwrap();
            assert!(text.contains(&side.port(Port::Https, 0).to_string()), "{text}");
            assert!(FUNCTIONS.iter().all(|name| text.contains(name)), "{text}");
            assert!(!text.contains("{{") && !text.contains("{%"), "{text}");
        }
    }

    #[test]
    fn an_unknown_placeholder_is_an_error() {
        assert!(expand("{{ nothing }}", context! {}).is_err());
        assert_eq!(expand("{{ some }}", context! { some => 1 }).unwrap(), "1");
    }
}
