//! Enrolment of a connection at its handshake, and its retirement at the function's first send.
use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::{
        BPF_SOCK_OPS_HDR_OPT_LEN_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG, BPF_TCP_CLOSE, bpf_sock_ops,
        tcp_sock,
    },
    helpers::{bpf_get_socket_cookie, bpf_probe_read_kernel, bpf_skc_to_tcp_sock, bpf_sock_hash_update},
    macros::sock_ops,
    programs::SockOpsContext,
};
use common::{
    Protocol, Verdict,
    map_values::{Connection, Counter, Offsets},
};

use crate::{
    maps::{CONNECTIONS, FLIGHTS, SOCKETS, count},
    verdict::report,
};

/// The listeners' ports, in host byte order.
#[unsafe(no_mangle)]
static HTTP_PORT: Global<u32> = Global::new(0);
#[unsafe(no_mangle)]
static HTTPS_PORT: Global<u32> = Global::new(0);

/// Where retirement finds what it has to know of the socket.
#[unsafe(no_mangle)]
static OFFSETS: Global<Offsets> = Global::new(Offsets {
    tcp_sock_copied_seq: 0,
    tcp_sock_rcv_nxt: 0,
    sock_user_data: 0,
    sock_lock_owned: 0,
    psock_refcnt: 0,
});

const AF_INET: u32 = 2;

/// `sk_user_data` carries flags in its lowest bits (include/net/sock.h, SK_USER_DATA_PTRMASK).
const USER_DATA_POINTER: u64 = !7;

/// Without this a failed `bpf_sock_hash_update` could replace another socket's entry; a cookie is never used twice.
const BPF_NOEXIST: u64 = 1;

#[sock_ops]
pub fn pm_enrol(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => enrol(&ctx),
        BPF_SOCK_OPS_HDR_OPT_LEN_CB => retire(&ctx),
        BPF_SOCK_OPS_STATE_CB => state(&ctx),
        _ => {}
    }
    1
}

#[inline(always)]
fn enrol(ctx: &SockOpsContext) {
    let Some(protocol) = protocol_of(ctx.local_port()) else { return };
    // SAFETY: the context is valid for the length of the program; the verifier checks each field's access.
    let ops = unsafe { &*ctx.ops };
    // Data that came with the SYN (TCP Fast Open) lies before rcv_nxt: the sequence check would take it for old.
    if ops.bytes_received != 0 {
        return count(Counter::NotEnrolled);
    }
    // SAFETY: as above.
    let mut cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let (local_address, remote_address) = addresses(ctx.ops);
    let connection = Connection {
        next_sequence: ops.rcv_nxt,
        verdict: Verdict::Pending.to_word(),
        protocol: protocol.code(),
        flags: 0,
        family: ops.family as u16,
        local_port: ops.local_port as u16,
        remote_port: u32::from_be(ops.remote_port) as u16,
        local_address,
        remote_address,
    };
    // The entry comes first: a socket in the SOCKHASH without its sequence number would deliver wrong bytes.
    if CONNECTIONS.insert(cookie, connection, BPF_NOEXIST).is_err() {
        return count(Counter::NotEnrolled);
    }
    // The callbacks come before the SOCKHASH: without them nothing would end the entry, and a socket in the SOCKHASH
    // without an entry would deliver repeated bytes.
    let callbacks = (BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG) as i32;
    if ctx.set_cb_flags(callbacks).is_err() || !enter_sockhash(ctx, &mut cookie) {
        let _: Result<(), i32> = ctx.set_cb_flags(0);
        let _: Result<(), i32> = CONNECTIONS.remove(cookie);
        return count(Counter::NotEnrolled);
    }
    count(Counter::Enrolled);
}

#[inline(always)]
fn enter_sockhash(ctx: &SockOpsContext, cookie: &mut u64) -> bool {
    // SAFETY: the map and the key are valid; the helper takes a sock_ops context.
    let result = unsafe {
        bpf_sock_hash_update(
            ctx.ops,
            (&raw const SOCKETS).cast_mut().cast(),
            (&raw mut *cookie).cast(),
            BPF_NOEXIST,
        )
    };
    result == 0
}

/// Takes the socket out of the SOCKHASH inside the function's own send, when nothing can be lost by it: the verdict
/// is known, all that arrived was read, the sender holds the lock, and nobody sleeps in a receive on the psock.
///
/// That the lock is held does not say by whom: accept holds it too, and the kernel acknowledges out-of-order segments
/// that arrive meanwhile when accept lets go of it. Without its verdict the connection would never get one; and one
/// that is poisoned must still be here for the gateway to destroy it.
#[inline(always)]
fn retire(ctx: &SockOpsContext) {
    // SAFETY: the verifier knows `sk` and checks it for null below.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return;
    }
    // SAFETY: `sk` is a valid socket; the helper gives null when it is no TCP socket.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk.cast()) };
    if tcp.is_null() || !can_retire(tcp) {
        return;
    }
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if !is_judged(cookie) {
        return;
    }
    // SAFETY: map and key are valid; deleting from a SOCKHASH is allowed to sock_ops.
    let removed = unsafe {
        aya_ebpf::helpers::bpf_map_delete_elem(
            (&raw const SOCKETS).cast_mut().cast(),
            (&raw const cookie).cast(),
        )
    };
    if removed != 0 {
        return;
    }
    // Its scanner went with the verdict.
    let _: Result<(), i32> = CONNECTIONS.remove(cookie);
    let _: Result<(), i32> = ctx.set_cb_flags(0);
    count(Counter::Retired);
}

#[inline(always)]
fn is_judged(cookie: u64) -> bool {
    let Some(connection) = CONNECTIONS.get_ptr(cookie) else { return false };
    // SAFETY: the entry is changed under the socket's lock only, which this callback holds.
    let word = unsafe { (*connection).verdict };
    word != Verdict::Pending.to_word() && word != Verdict::Poisoned.to_word()
}

#[inline(always)]
fn can_retire(tcp: *mut tcp_sock) -> bool {
    let offsets = OFFSETS.load();
    let copied = read::<u32>(tcp, offsets.tcp_sock_copied_seq);
    if copied.is_none() || copied != read::<u32>(tcp, offsets.tcp_sock_rcv_nxt) {
        return false;
    }
    if read::<i32>(tcp, offsets.sock_lock_owned).unwrap_or(0) == 0 {
        return false;
    }
    let Some(user_data) = read::<u64>(tcp, offsets.sock_user_data) else { return false };
    let psock = (user_data & USER_DATA_POINTER) as *mut tcp_sock;
    !psock.is_null() && read::<u32>(psock, offsets.psock_refcnt) == Some(1)
}

/// Reads a field of a kernel structure; a wrong address is an error of the helper, never a fault.
#[inline(always)]
fn read<T>(base: *mut tcp_sock, offset: u32) -> Option<T> {
    let source = (base as *const u8).wrapping_add(offset as usize).cast::<T>();
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel(source) }.ok()
}

#[inline(always)]
fn state(ctx: &SockOpsContext) {
    if ctx.arg(1) != BPF_TCP_CLOSE {
        return;
    }
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if let Some(connection) = CONNECTIONS.get_ptr(cookie) {
        // SAFETY: the entry is changed under the socket's lock only, which this callback holds.
        let connection = unsafe { &*connection };
        if connection.verdict == Verdict::Pending.to_word() && connection.flags & Connection::ACCEPTED != 0 {
            report(cookie, Verdict::Closed.to_word());
        }
        if connection.flags & Connection::SCANNING != 0 {
            let _: Result<(), i32> = FLIGHTS.remove(cookie);
        }
        let _: Result<(), i32> = CONNECTIONS.remove(cookie);
        count(Counter::Closed);
    }
}

#[inline(always)]
fn protocol_of(port: u32) -> Option<Protocol> {
    match port {
        _ if port == HTTP_PORT.load() => Some(Protocol::Http),
        _ if port == HTTPS_PORT.load() => Some(Protocol::Https),
        _ => None,
    }
}

/// The local and the remote address. Each word is read by itself at a constant offset: the verifier allows no other
/// access to a context.
#[inline(always)]
fn addresses(ops: *const bpf_sock_ops) -> ([u32; 4], [u32; 4]) {
    macro_rules! word {
        ($($field:tt)+) => {
            // SAFETY: the context is valid; the verifier checks each field's access.
            unsafe { (&raw const (*ops).$($field)+).read_volatile() }
        };
    }
    if word!(family) == AF_INET {
        return ([word!(local_ip4), 0, 0, 0], [word!(remote_ip4), 0, 0, 0]);
    }
    (
        [word!(local_ip6[0]), word!(local_ip6[1]), word!(local_ip6[2]), word!(local_ip6[3])],
        [word!(remote_ip6[0]), word!(remote_ip6[1]), word!(remote_ip6[2]), word!(remote_ip6[3])],
    )
}
