//! A network namespace of the test's own, for as long as the value lives.
use std::{
    cell::Cell,
    fs::{self, File},
    marker::PhantomData,
    ops::RangeInclusive,
    process::Command,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

use crate::eventually;

/// The calling thread, and every thread and process that it starts from now on, is alone on its loopback.
///
/// Dropping it takes the thread back home; the kernel frees the namespace with its last socket.
pub struct Net {
    home: File,
    /// What the loopback's routes say of TCP.
    route_options: String,
    /// Each is given away once.
    next_port: Cell<u16>,
    /// A namespace belongs to the thread that entered it.
    not_send: PhantomData<*const ()>,
}

/// Listeners' ports, which the kernel gives to nobody else: its own range begins above them.
const LISTENER_PORTS: RangeInclusive<u16> = 10_000..=19_999;

const RESETS: [(&str, &str); 13] = [
    ("Tcp", "OutRsts"),
    ("Tcp", "EstabResets"),
    ("Tcp", "AttemptFails"),
    ("Tcp", "RetransSegs"),
    ("TcpExt", "ListenOverflows"),
    ("TcpExt", "ListenDrops"),
    ("TcpExt", "TCPReqQFullDrop"),
    ("TcpExt", "EmbryonicRsts"),
    ("TcpExt", "TCPAbortOnData"),
    ("TcpExt", "TCPAbortOnClose"),
    ("TcpExt", "TCPAbortOnMemory"),
    ("TcpExt", "TCPAbortOnTimeout"),
    ("TcpExt", "TCPAbortFailed"),
];

/// TCP states that hold no file any more: the kernel alone ends them.
const STATE_TIME_WAIT: &str = "06";
const STATE_CLOSE: &str = "07";
const STATE_NEW_SYN_RECV: &str = "0C";

impl Net {
    pub fn private() -> Self {
        let home = File::open("/proc/thread-self/ns/net").expect("opening the thread's network namespace");
        unshare(CloneFlags::CLONE_NEWNET).unwrap_or_else(|error| {
            panic!("these tests make network namespaces, which needs root: run `cargo xtask test` ({error})")
        });
        let next_port = Cell::new(*LISTENER_PORTS.start());
        let net = Self { home, route_options: String::new(), next_port, not_send: PhantomData };
        net.ip("link set lo up");
        net
    }

    /// Shortens retransmission time-outs, so that a test under loss spends its time on connections, not on waiting.
    pub fn retransmit_fast(self) -> Self {
        self.with_route_options("rto_min 20ms")
    }

    /// Lets a sender wait for long before it takes a segment for lost: on a slow machine it is wrong about that, and then it
    /// has no window for what somebody else has delivered in its name.
    pub fn retransmit_late(self) -> Self {
        self.with_route_options("rto_min 10s")
    }

    /// Lets a sender put thousands of segments on the wire without waiting for an acknowledgement.
    pub fn without_slow_start(self) -> Self {
        self.with_route_options("initcwnd 4000 quickack 1")
    }

    fn with_route_options(mut self, options: &str) -> Self {
        let first = self.route_options.is_empty();
        self.route_options = format!("{} {options}", self.route_options);
        let options = self.route_options.trim_start();
        self.ip(&format!("route change local 127.0.0.0/8 dev lo table local proto kernel scope host src 127.0.0.1 {options}"));
        // The kernel's own route to ::1 can't be changed, only replaced by another.
        self.ip(&format!("-6 route replace local ::1 dev lo table local metric 1 {options}"));
        if first {
            self.ip("-6 route del local ::1 dev lo table local metric 0");
        }
        self
    }

    /// What a socket receives before anybody reads is about half of this.
    pub fn with_receive_buffers(self, bytes: usize) -> Self {
        self.sysctl("tcp_rmem", &format!("4096 {bytes} 6291456"));
        self
    }

    /// Leaves clients only these ports, so that each is soon used again.
    pub fn with_client_ports(self, first: u16, last: u16) -> Self {
        assert!(first > *LISTENER_PORTS.end(), "a listener may have one of the ports {first} to {last}");
        self.sysctl("ip_local_port_range", &format!("{first} {last}"));
        self
    }

    pub fn with_mtu(self, bytes: u32) -> Self {
        self.ip(&format!("link set lo mtu {bytes}"));
        self
    }

    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/net/ipv4/{name}");
        fs::write(&path, value).unwrap_or_else(|error| panic!("writing {value} to {path}: {error}"));
    }

    /// A port for a listener that nobody else here is given, before or later.
    pub fn free_port(&self) -> u16 {
        let port = self.next_port.get();
        assert!(LISTENER_PORTS.contains(&port), "all ports for listeners are given away");
        self.next_port.set(port + 1);
        port
    }

    /// What this network's TCP counted that can end a connection, for whoever has to find out why one did.
    fn account_of_resets(&self) -> String {
        let counters = RESETS.iter().map(|(group, name)| format!("{name}={}", self.counter(group, name)));
        counters.collect::<Vec<_>>().join(" ")
    }

    /// A counter of `/proc/net/snmp` or `/proc/net/netstat`, such as `Tcp RetransSegs`.
    pub fn counter(&self, group: &str, name: &str) -> u64 {
        let text = ["snmp", "netstat"]
            .map(|file| {
                fs::read_to_string(format!("/proc/thread-self/net/{file}")).expect("reading counters")
            })
            .concat();
        let mut lines = text.lines().filter(|line| line.starts_with(&format!("{group}:")));
        let (names, values) =
            (lines.next().expect("a line of names"), lines.next().expect("a line of values"));
        let position = names.split(' ').position(|word| word == name);
        let position = position.unwrap_or_else(|| panic!("this kernel has no counter {group} {name}"));
        values.split(' ').nth(position).and_then(|value| value.parse().ok()).expect("a number")
    }

    /// Every TCP socket that a file still holds, as the kernel prints it.
    pub fn held_sockets(&self) -> Vec<String> {
        let mut held = Vec::new();
        for family in ["tcp", "tcp6"] {
            let path = format!("/proc/thread-self/net/{family}");
            let Ok(text) = fs::read_to_string(&path) else { continue };
            held.extend(
                text.lines().skip(1).filter(|line| is_held(line)).map(|line| format!("{family} {line}")),
            );
        }
        held
    }

    /// Waits until no TCP socket here belongs to a file.
    pub fn assert_no_socket_is_held(&self) {
        let mut last = Vec::new();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually("the namespace's sockets to be closed", || {
                last = self.held_sockets();
                last.is_empty().then_some(())
            });
        }));
        assert!(outcome.is_ok(), "sockets are left behind:\n{}", last.join("\n"));
    }

    fn ip(&self, arguments: &str) {
        run("ip", arguments);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("---- TCP counted: {}", self.account_of_resets());
        }
        if let Err(error) = setns(&self.home, CloneFlags::CLONE_NEWNET) {
            eprintln!("the thread can't go back to its network namespace: {error}");
        }
    }
}

/// The fields are: slot, local, remote, state, queues, timer, retransmits, uid, timeout, inode.
fn is_held(line: &str) -> bool {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let without_file = [STATE_TIME_WAIT, STATE_CLOSE, STATE_NEW_SYN_RECV].contains(&fields[3]);
    // An orphan (FIN_WAIT, LAST_ACK) has no inode: its process closed it.
    !without_file && fields[9] != "0"
}

/// Runs a tool that every Debian has and that must not fail.
pub fn run(program: &str, arguments: &str) {
    let output = Command::new(program)
        .args(arguments.split(' '))
        .output()
        .unwrap_or_else(|error| panic!("running {program}: {error} (Debian has it in iproute2)"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {stderr}");
}
