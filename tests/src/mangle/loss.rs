//! Classifiers on the loopback that drop some TCP packets and deliver some twice.
use std::{
    ffi::CString,
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use nix::libc;

use crate::{
    bpf::{self, Instruction, Map, assemble::*},
    net::{Net, run},
};

/// How many of a million packets.
#[derive(Clone, Copy, Debug)]
pub struct PerMillion(pub u32);

impl PerMillion {
    pub const fn percent(percent: u32) -> Self {
        Self(percent * 10_000)
    }
}

/// Lossy and duplicating as long as it lives.
pub struct Loss<'net> {
    _net: &'net Net,
    counters: Map,
}

const DROPPED: u32 = 0;
const DUPLICATED: u32 = 1;

impl<'net> Loss<'net> {
    pub fn on_loopback(net: &'net Net, dropped: PerMillion, duplicated: PerMillion) -> Self {
        let counters = Map::counters(2).expect("making a map needs root");
        run("tc", "qdisc add dev lo clsact");
        // A copy has lost its route, and the one that IPv4 looks up for it is for packets from outside.
        net.sysctl("conf/lo/route_localnet", "1");
        // A drop at the egress would be a congestion of the sender's own, which it knows of at once.
        let ends = [
            (Hook::Ingress, &drop_packet(counters.raw_fd()), dropped),
            (Hook::Egress, &send_copy(counters.raw_fd()), duplicated),
        ];
        for (hook, action, share) in ends {
            let program = bpf::load_classifier("test_loss", &classifier(share, action))
                .expect("loading the classifier");
            attach(&program, hook).expect("attaching the classifier");
        }
        Self { _net: net, counters }
    }

    pub fn dropped(&self) -> u64 {
        self.counters.counter(DROPPED)
    }

    pub fn duplicated(&self) -> u64 {
        self.counters.counter(DUPLICATED)
    }
}

impl Drop for Loss<'_> {
    fn drop(&mut self) {
        // The namespace may outlive the loss: from here on the network is honest.
        if !std::thread::panicking() {
            run("tc", "qdisc del dev lo clsact");
        }
    }
}

#[derive(Clone, Copy)]
#[repr(u32)]
enum Hook {
    Ingress = 0xffff_fff2,
    Egress = 0xffff_fff3,
}

/// Where a classifier keeps its context.
const CONTEXT: u8 = R6;

/// Runs `action` on a share of the TCP packets and passes on what it does not end.
fn classifier(share: PerMillion, action: &[Instruction]) -> Vec<Instruction> {
    const GET_PRANDOM_U32: i32 = 7;
    const SKB_LOAD_BYTES: i32 = 26;
    const SKB_PROTOCOL: i16 = 16;
    const ACTION_PASS: i32 = 0;
    const IPV4: i32 = 0x0008;
    const IPV6: i32 = 0xdd86;
    const TCP: i32 = 6;
    const ETHERNET_BYTES: i32 = 14;

    let draw = [
        call(GET_PRANDOM_U32),
        modulo(R0, 1_000_000),
        jump_if_at_least(R0, share.0.cast_signed(), action.len() as i16),
    ];
    let draw_and_act = [&draw[..], action].concat();
    // Where the transport protocol's number lies: IPv4 and IPv6 differ.
    let is_tcp = [
        copy(R1, CONTEXT),
        copy(R3, R10),
        add(R3, -8),
        set(R4, 1),
        call(SKB_LOAD_BYTES),
        load_u8(R1, R10, -8),
        jump_if_not_equal(R1, TCP, draw_and_act.len() as i16),
    ];
    let is_ip = [
        copy(CONTEXT, R1),
        store_u32(R10, -8, 0),
        load_u32(R1, CONTEXT, SKB_PROTOCOL),
        set(R2, ETHERNET_BYTES + 9),
        jump_if_equal(R1, IPV4, 2),
        set(R2, ETHERNET_BYTES + 6),
        jump_if_not_equal(R1, IPV6, (is_tcp.len() + draw_and_act.len()) as i16),
    ];
    [&is_ip[..], &is_tcp, &draw_and_act, &[set(R0, ACTION_PASS), exit()]].concat()
}

fn drop_packet(counters: RawFd) -> Vec<Instruction> {
    const ACTION_SHOT: i32 = 2;
    [&count(counters, DROPPED)[..], &[set(R0, ACTION_SHOT), exit()]].concat()
}

fn send_copy(counters: RawFd) -> Vec<Instruction> {
    const CLONE_REDIRECT: i32 = 13;
    const SKB_IFINDEX: i16 = 40;
    const TO_INGRESS: i32 = 1;
    let copy_packet =
        [copy(R1, CONTEXT), load_u32(R2, CONTEXT, SKB_IFINDEX), set(R3, TO_INGRESS), call(CLONE_REDIRECT)];
    [&count(counters, DUPLICATED)[..], &copy_packet].concat()
}

fn count(counters: RawFd, index: u32) -> [Instruction; 9] {
    const MAP_LOOKUP_ELEM: i32 = 1;
    let [map, map_high] = load_map(R1, counters);
    [
        store_u32(R10, -8, index.cast_signed()),
        map,
        map_high,
        copy(R2, R10),
        add(R2, -8),
        call(MAP_LOOKUP_ELEM),
        jump_if_equal(R0, 0, 2),
        set(R1, 1),
        atomic_add(R0, 0, R1),
    ]
}

/// RTM_NEWTFILTER on the clsact qdisc, because `tc` takes eBPF programs only from files.
fn attach(program: &OwnedFd, hook: Hook) -> io::Result<()> {
    const TCA_KIND: u16 = 1;
    const TCA_OPTIONS: u16 = 2;
    const TCA_BPF_FD: u16 = 6;
    const TCA_BPF_NAME: u16 = 7;
    const TCA_BPF_FLAGS: u16 = 8;
    const DIRECT_ACTION: u32 = 1;
    const PRIORITY: u32 = 1;
    let every_protocol = u32::from((libc::ETH_P_ALL as u16).to_be());

    let attribute = |kind: u16, body: &[u8]| {
        let mut bytes = Vec::from(((4 + body.len()) as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let options = [
        attribute(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes()),
        attribute(TCA_BPF_NAME, b"test_loss\0"),
        attribute(TCA_BPF_FLAGS, &DIRECT_ACTION.to_ne_bytes()),
    ]
    .concat();

    let name = CString::new("lo").expect("no NUL in lo");
    // SAFETY: the name is a string that ends with NUL.
    let interface = unsafe { libc::if_nametoindex(name.as_ptr()) };
    let mut body = vec![0u8; 4];
    body.extend(interface.to_ne_bytes());
    body.extend(0u32.to_ne_bytes());
    body.extend((hook as u32).to_ne_bytes());
    body.extend((PRIORITY << 16 | every_protocol).to_ne_bytes());
    body.extend(attribute(TCA_KIND, b"bpf\0"));
    body.extend(attribute(TCA_OPTIONS, &options));

    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let mut message = Vec::from(((16 + body.len()) as u32).to_ne_bytes());
    message.extend(libc::RTM_NEWTFILTER.to_ne_bytes());
    message.extend((flags as u16).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    request(&message)
}

/// Sends one rtnetlink request and reads its acknowledgement.
fn request(message: &[u8]) -> io::Result<()> {
    // SAFETY: socket takes no pointers.
    let socket =
        unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this file and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    nix::unistd::write(&socket, message)?;
    let mut answer = [0u8; 4096];
    let length = nix::unistd::read(&socket, &mut answer)?;
    // nlmsghdr is 16 bytes, the error's code follows.
    let code = answer[..length].get(16..20).ok_or(io::ErrorKind::UnexpectedEof)?;
    match i32::from_ne_bytes(code.try_into().unwrap_or_default()) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}

const _: () = assert!(mem::size_of::<Instruction>() == 8);
