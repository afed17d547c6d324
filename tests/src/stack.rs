//! The product as its users run it: a supervisor, its functions, a gateway; and the proof that all of it goes away.
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    ops::Deref,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::Command,
    rc::Rc,
    sync::Arc,
};

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::ClientConfig;
use tempfile::TempDir;

use crate::{
    authority::{Authority, Certificate},
    bpf::Objects,
    cgroup::Cgroup,
    eventually,
    http::Response,
    leftovers::Seen,
    net::Net,
    pins,
    process::Process,
    programs,
    rest::wait_for_rest,
    tls,
    wire::{Client, Wire},
};

/// Where the verdicts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdicts {
    Sockmap,
    Peek,
    Auto,
}

impl Verdicts {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sockmap => "sockmap",
            Self::Peek => "peek",
            Self::Auto => "auto",
        }
    }
}

/// The domains that the configuration names, the usual ones.
pub const DOMAINS: [&str; 2] = ["faas.local", "localhost"];

/// What a stack shall be before it is one.
pub struct Plan {
    verdicts: Verdicts,
    net: Option<Rc<Net>>,
    /// Name and program; a program of `None` is a function that is configured and not there.
    functions: Vec<(String, Option<String>)>,
    /// Functions that answer a bare GET with something else than 200.
    unready: Vec<String>,
    settings: BTreeMap<String, String>,
    function_settings: Vec<(String, String)>,
    strangers: Vec<String>,
    anchors: bool,
    gateway_arguments: Vec<String>,
    supervisor_arguments: Vec<String>,
    gateway_descriptors: Option<u64>,
    address: IpAddr,
    ports: Option<(u16, u16)>,
    extra: String,
    log: Option<String>,
}

pub struct Stack {
    // The order is that of dropping: processes, then what they used.
    gateway: Option<Process>,
    supervisor: Option<Process>,
    seen: Seen,
    cgroups: Cgroups,
    pub net: Rc<Net>,
    pub authority: Authority,
    book: AddressBook,
    config: PathBuf,
    gateway_arguments: Vec<String>,
    log: Option<String>,
    supervisor_arguments: Vec<String>,
    gateway_descriptors: Option<u64>,
    verdicts: Verdicts,
    functions: Vec<String>,
    folder: TempDir,
}

struct Cgroups {
    gateway: Cgroup,
    functions: Cgroup,
    all: Cgroup,
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        // Nothing may stay to disturb other tests, whatever went wrong.
        self.all.kill();
        pins::below(self.all.path()).iter().for_each(|set| pins::remove(set));
    }
}

impl Plan {
    pub fn new(verdicts: Verdicts) -> Self {
        Self {
            verdicts,
            net: None,
            functions: ["echo", "hello"].map(|name| (name.to_owned(), Some(name.to_owned()))).into(),
            unready: Vec::new(),
            settings: BTreeMap::new(),
            function_settings: Vec::new(),
            strangers: Vec::new(),
            anchors: true,
            gateway_arguments: Vec::new(),
            supervisor_arguments: Vec::new(),
            gateway_descriptors: None,
            address: Ipv4Addr::LOCALHOST.into(),
            ports: None,
            extra: String::new(),
            log: None,
        }
    }

    /// Shares a namespace with other stacks of the same thread, or has one that was prepared.
    pub fn in_net(mut self, net: impl Into<Rc<Net>>) -> Self {
        self.net = Some(net.into());
        self
    }

    /// Adds a function that `program` serves.
    pub fn function(mut self, name: &str, program: &str) -> Self {
        self.functions.push((name.into(), Some(program.into())));
        self
    }

    /// Adds a function that nobody serves.
    pub fn absent_function(mut self, name: &str) -> Self {
        self.functions.push((name.into(), None));
        self
    }

    /// Adds a line to a function's table.
    pub fn function_setting(mut self, name: &str, line: &str) -> Self {
        self.function_settings.push((name.into(), line.into()));
        self
    }

    /// Gives a function a certificate of an authority that nobody knows.
    pub fn stranger(mut self, name: &str) -> Self {
        self.strangers.push(name.into());
        self
    }

    /// Leaves functions without what they would know each other by.
    pub fn without_anchors(mut self) -> Self {
        self.anchors = false;
        self
    }

    /// Doesn't wait for an answer of 200 from a function that gives none to a bare GET.
    pub fn without_readiness(mut self, name: &str) -> Self {
        self.unready.push(name.into());
        self
    }

    /// Sets a key of the configuration's `[gateway]` table to a TOML value.
    pub fn setting(mut self, key: &str, value: impl ToString) -> Self {
        self.settings.insert(key.into(), value.to_string());
        self
    }

    pub fn gateway_argument(mut self, argument: &str) -> Self {
        self.gateway_arguments.push(argument.into());
        self
    }

    pub fn supervisor_argument(mut self, argument: &str) -> Self {
        self.supervisor_arguments.push(argument.into());
        self
    }

    /// Lets the gateway have no more open files than this.
    pub fn gateway_descriptors(mut self, limit: u64) -> Self {
        self.gateway_descriptors = Some(limit);
        self
    }

    /// The address that clients connect to; the listeners take both families.
    pub fn clients_use(mut self, address: impl Into<IpAddr>) -> Self {
        self.address = address.into();
        self
    }

    /// The ports for HTTP and HTTPS, where a listener's address is set by hand.
    pub fn with_ports(mut self, http: u16, https: u16) -> Self {
        self.ports = Some((http, https));
        self
    }

    /// What all processes log, in POINTSMAN_LOG's syntax; a failed test shows it.
    pub fn log(mut self, filter: &str) -> Self {
        self.log = Some(filter.into());
        self
    }

    /// Appends text to the configuration file.
    pub fn configuration(mut self, text: &str) -> Self {
        self.extra.push_str(text);
        self
    }

    /// Starts all processes and waits until every function answers.
    pub fn start(self) -> Stack {
        let mut stack = self.prepare();
        stack.start_supervisor();
        stack.start_gateway();
        stack.wait_until_ready();
        stack
    }

    /// Writes the configuration and starts nothing.
    pub fn prepare(self) -> Stack {
        raise_file_limit();
        let net = self.net.unwrap_or_else(|| Rc::new(Net::private()));
        let folder = tempfile::Builder::new().prefix("pointsman-test.").tempdir().expect("making a folder");
        let authority = Authority::new(folder.path());
        let (http, https) = self.ports.unwrap_or_else(|| (net.free_port(), net.free_port()));
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, net.free_port()));
        let mut certificates = BTreeMap::new();
        let mut text = String::from("[gateway]\n");
        let sockets = folder.path().join("functions");
        let strangers = folder.path().join("strangers");
        for folder in [&sockets, &strangers] {
            fs::create_dir(folder).expect("making a folder");
        }
        let defaults = [
            ("http", format!("\"[::]:{http}\"")),
            ("https", format!("\"[::]:{https}\"")),
            ("admin", format!("\"{admin}\"")),
            ("verdict", format!("\"{}\"", self.verdicts.as_str())),
            ("functions_dir", format!("{sockets:?}")),
        ];
        if self.anchors {
            writeln!(text, "anchors = {:?}", authority.path()).expect("a String takes all");
        }
        for (key, value) in &defaults {
            let value = self.settings.get(*key).unwrap_or(value);
            writeln!(text, "{key} = {value}").expect("a String takes all");
        }
        for (key, value) in &self.settings {
            if defaults.iter().all(|(default, _)| default != key) {
                writeln!(text, "{key} = {value}").expect("a String takes all");
            }
        }
        for (name, program) in &self.functions {
            writeln!(text, "\n[functions.{name}]").expect("a String takes all");
            let certificate = match self.strangers.contains(name) {
                true => Authority::new(&strangers).issue(name, &DOMAINS),
                false => authority.issue(name, &DOMAINS),
            };
            writeln!(text, "certificate = {:?}\nkey = {:?}", certificate.path, certificate.key)
                .expect("a String takes all");
            for (_, line) in self.function_settings.iter().filter(|(of, _)| of == name) {
                writeln!(text, "{line}").expect("a String takes all");
            }
            certificates.insert(name.clone(), certificate);
            if let Some(program) = program {
                writeln!(text, "command = [{:?}]", programs::product(program)).expect("a String takes all");
            }
        }
        text.push_str(&self.extra);
        let config = folder.path().join("pointsman.toml");
        fs::write(&config, text).expect("writing the configuration");

        let all = Cgroup::new();
        all.divide_memory();
        let cgroups = Cgroups { gateway: all.child("gateway"), functions: all.child("functions"), all };
        let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
        Stack {
            gateway: None,
            supervisor: None,
            seen: Seen::default(),
            cgroups,
            net,
            book: AddressBook {
                http: (self.address, http).into(),
                https: (self.address, https).into(),
                admin,
                tls: Arc::new(tls::config(&authority, &versions)),
                certificates: Arc::new(certificates),
            },
            authority,
            config,
            gateway_arguments: self.gateway_arguments,
            log: self.log,
            supervisor_arguments: self.supervisor_arguments,
            gateway_descriptors: self.gateway_descriptors,
            verdicts: self.verdicts,
            functions: self
                .functions
                .into_iter()
                .filter_map(|(name, program)| program.map(|_| name))
                .filter(|name| !self.unready.contains(name))
                .collect(),
            folder,
        }
    }
}

impl Stack {
    pub fn start(verdicts: Verdicts) -> Self {
        Plan::new(verdicts).start()
    }

    pub fn start_supervisor(&mut self) {
        let mut command = Command::new(programs::product("pointsman"));
        command.args(["supervise", "--config"]).arg(&self.config).args(&self.supervisor_arguments);
        command.envs(self.log.as_ref().map(|filter| ("POINTSMAN_LOG", filter)));
        self.supervisor = Some(Process::spawn("supervisor", &mut command, Some(&self.cgroups.functions)));
    }

    pub fn start_gateway(&mut self) {
        self.gateway = Some(self.spawn_gateway(&[]));
    }

    /// Starts one more gateway on the same ports for clients, as an operator might by mistake.
    pub fn another_gateway(&self) -> Process {
        self.spawn_gateway(&["--admin", "127.0.0.1:0"])
    }

    fn spawn_gateway(&self, arguments: &[&str]) -> Process {
        let mut command = Command::new(programs::product("pointsman"));
        command.args(["gateway", "--config"]).arg(&self.config).args(&self.gateway_arguments).args(arguments);
        command.envs(self.log.as_ref().map(|filter| ("POINTSMAN_LOG", filter)));
        if let Some(limit) = self.gateway_descriptors {
            // SAFETY: the closure makes one system call and touches no memory but its own.
            unsafe {
                command.pre_exec(move || Ok(setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?));
            }
        }
        Process::spawn("gateway", &mut command, Some(&self.cgroups.gateway))
    }

    pub fn gateway(&mut self) -> &mut Process {
        self.gateway.as_mut().expect("the gateway was started")
    }

    pub fn supervisor(&mut self) -> &mut Process {
        self.supervisor.as_mut().expect("the supervisor was started")
    }

    /// Waits until each function that has a program answers a request of each kind.
    pub fn wait_until_ready(&mut self) {
        for function in self.functions.clone() {
            eventually(&format!("{function} to answer"), || {
                for process in [&mut self.gateway, &mut self.supervisor].into_iter().flatten() {
                    let ended = process.has_ended();
                    assert!(
                        ended.is_none(),
                        "a process has ended at once ({ended:?}):\n{}",
                        process.said().join("\n")
                    );
                }
                let answer = self.client().and_then(|mut client| {
                    client.request("GET", &format!("/function/{function}"), "localhost", None)
                });
                answer.is_ok_and(|answer| answer.status() == 200).then_some(())
            });
        }
        if self.verdicts == Verdicts::Sockmap {
            let held = self.look();
            let gateway = self.gateway().said().join("\n");
            assert!(!held.programs.is_empty(), "sockmap was asked for and no program is loaded:\n{gateway}");
        }
    }

    /// For threads that are at work while the stack is changed.
    pub fn address_book(&self) -> AddressBook {
        self.book.clone()
    }

    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// Where the functions' sockets are.
    pub fn sockets(&self) -> PathBuf {
        self.folder.path().join("functions")
    }

    pub fn config_path(&self) -> &std::path::Path {
        &self.config
    }

    /// Remembers what the gateway holds of the kernel's, and returns it.
    pub fn look(&mut self) -> Objects {
        let pid = self.gateway().id();
        self.seen.look(pid)
    }

    /// What of it the kernel still has, if a gateway was killed.
    pub fn kernel_objects(&self) -> Vec<String> {
        self.seen.alive()
    }

    /// The sets of pins of this stack's gateways.
    pub fn pins(&self) -> Vec<PathBuf> {
        pins::below(self.cgroups.gateway.path())
    }

    /// Removes the cgroup that a killed gateway left.
    pub fn remove_gateways_cgroup(&self) -> std::io::Result<()> {
        self.cgroups.gateway.remove_children()
    }

    pub fn gateway_fds(&mut self) -> usize {
        count_fds(self.gateway().id())
    }

    /// The functions' processes (refusal's too), not the supervisor's.
    pub fn function_processes(&mut self) -> Vec<i32> {
        let supervisor = self.supervisor().id();
        let mut processes = self.cgroups.functions.processes();
        processes.retain(|&pid| pid != supervisor);
        processes
    }

    /// The processes that serve a function, by the name that its program was started with.
    pub fn processes_of(&mut self, program: &str) -> Vec<i32> {
        let mut processes = self.function_processes();
        processes.retain(|pid| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == program)
        });
        processes
    }

    /// The processes of one function, whatever its program.
    pub fn processes_named(&mut self, function: &str) -> Vec<i32> {
        let variable = format!("POINTSMAN_NAME={function}");
        let mut processes = self.function_processes();
        processes.retain(|pid| {
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environment| {
                environment.split(|&byte| byte == 0).any(|own| own == variable.as_bytes())
            })
        });
        processes
    }

    pub fn function_fds(&mut self) -> usize {
        self.function_processes().into_iter().map(count_fds).sum()
    }

    /// Ends everything as Ctrl-C does and checks that all ended well and left nothing.
    pub fn stop(mut self) {
        self.end();
    }

    fn is_cut_short(&self) -> bool {
        [&self.gateway, &self.supervisor].into_iter().flatten().any(Process::was_killed)
    }

    fn end(&mut self) {
        let own = [&self.gateway, &self.supervisor].into_iter().flatten().map(Process::id);
        let processes: Vec<_> = own.chain(self.cgroups.functions.processes()).collect();
        wait_for_rest(&processes);
        if let Some(gateway) = &mut self.gateway {
            self.seen.look(gateway.id());
            let status = gateway.terminate();
            assert!(status.success(), "the gateway ended with {status}:\n{}", gateway.said().join("\n"));
        }
        if let Some(supervisor) = &mut self.supervisor {
            let status = supervisor.terminate();
            assert!(
                status.success(),
                "the supervisor ended with {status}:\n{}",
                supervisor.said().join("\n")
            );
        }
        (self.gateway, self.supervisor) = (None, None);
        let pins = self.pins();
        assert!(pins.is_empty(), "pins are left behind: {pins:?}");
        self.cgroups.gateway.assert_empty();
        self.cgroups.functions.assert_empty();
        let sockets: Vec<_> = fs::read_dir(self.sockets()).into_iter().flatten().flatten().collect();
        assert!(sockets.is_empty(), "sockets are left behind: {sockets:?}");
        self.seen.assert_gone();
        if Rc::strong_count(&self.net) == 1 {
            self.net.assert_no_socket_is_held();
        }
    }
}

impl Deref for Stack {
    type Target = AddressBook;

    fn deref(&self) -> &AddressBook {
        &self.book
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // After a failure the first one is the one that counts; a test that killed a process and did not start it again
        // is on its way to say one.
        if self.is_cut_short() {
            for process in [&self.gateway, &self.supervisor].into_iter().flatten() {
                process.report();
            }
        } else if !std::thread::panicking() {
            self.end();
        }
    }
}

/// What a client needs to know; unlike the stack it may go to other threads.
#[derive(Clone)]
pub struct AddressBook {
    pub http: SocketAddr,
    pub https: SocketAddr,
    pub admin: SocketAddr,
    tls: Arc<ClientConfig>,
    certificates: Arc<BTreeMap<String, Certificate>>,
}

impl AddressBook {
    pub fn connect_http(&self) -> Result<TcpStream> {
        TcpStream::connect(self.http).context("connecting to the HTTP port")
    }

    pub fn connect_https(&self) -> Result<TcpStream> {
        TcpStream::connect(self.https).context("connecting to the HTTPS port")
    }

    /// A client of the HTTP port.
    pub fn client(&self) -> Result<Client> {
        Ok(Client::new(Wire::Plain(self.connect_http()?)))
    }

    /// What the admin listener answers to a GET.
    pub fn admin(&self, path: &str) -> Result<Response> {
        let stream = TcpStream::connect(self.admin).context("connecting to the admin listener")?;
        Client::new(Wire::Plain(stream)).request("GET", path, "admin", None)
    }

    /// A client of the HTTPS port with a session that the named function has accepted.
    pub fn tls_client(&self, function: &str) -> Result<Client> {
        tls::connect(self.https, &host(function), self.tls.clone())
    }

    pub fn certificate(&self, function: &str) -> &Certificate {
        &self.certificates[function]
    }

    /// Which function shows this certificate.
    pub fn owner_of(&self, certificate: &[u8]) -> Option<&str> {
        let owner = self.certificates.iter().find(|(_, known)| known.der.as_ref() == certificate);
        owner.map(|(name, _)| name.as_str())
    }
}

pub fn host(function: &str) -> String {
    format!("{function}.{}", DOMAINS[0])
}

pub fn count_fds(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |entries| entries.count())
}

/// Debian's soft limit of 1024 files is for programs that use select; the crowds here are larger.
fn raise_file_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("reading the limit of open files");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("raising the limit of open files");
}
