//! The accept hook: gives `accept4` the verdict in place of the peer's address.
use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock_addr,
    cty::c_int,
    helpers::{bpf_get_socket_cookie, bpf_setsockopt},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use common::{
    Verdict,
    map_values::{Connection, Counter},
    verdict::address,
};

use crate::maps::{CONNECTIONS, SETTINGS, count};

/// The value that lets the kernel go on as without the hook; no other is allowed here.
const PROCEED: i32 = 1;

const SOL_SOCKET: c_int = 1;
const SO_RCVLOWAT: c_int = 18;

#[cgroup_sock_addr(getpeername4)]
pub fn pm_peername4(ctx: SockAddrContext) -> i32 {
    if let Some(word) = verdict(&ctx) {
        let (ip, port) = address::encode_v4(tag(), word);
        // SAFETY: the context is valid and this hook may write these fields.
        unsafe {
            (*ctx.sock_addr).user_ip4 = ip.to_be();
            (*ctx.sock_addr).user_port = u32::from(port.to_be());
        }
    }
    PROCEED
}

#[cgroup_sock_addr(getpeername6)]
pub fn pm_peername6(ctx: SockAddrContext) -> i32 {
    if let Some(word) = verdict(&ctx) {
        let (first, last) = address::encode_v6(tag(), word);
        let addr: *mut bpf_sock_addr = ctx.sock_addr;
        // SAFETY: as above.
        unsafe {
            (&raw mut (*addr).user_ip6[0]).write_volatile(first.to_be());
            (&raw mut (*addr).user_ip6[1]).write_volatile(0);
            (&raw mut (*addr).user_ip6[2]).write_volatile(0);
            (&raw mut (*addr).user_ip6[3]).write_volatile(last.to_be());
        }
    }
    PROCEED
}

/// The word for the first call on an enrolled socket, which is accept's own; later ones ask for the peer.
#[inline(always)]
fn verdict(ctx: &SockAddrContext) -> Option<u32> {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let connection = CONNECTIONS.get_ptr_mut(cookie)?;
    // SAFETY: the entry is changed under the socket's lock only, which accept holds around this hook.
    if unsafe { (*connection).flags } & Connection::ACCEPTED != 0 {
        return None;
    }
    // SAFETY: as above.
    if unsafe { (*connection).verdict } == Verdict::Pending.to_word() {
        kick(ctx);
    }
    // The kick may have run the verdict program, which changes the entry.
    // SAFETY: as above.
    let word = unsafe {
        (*connection).flags |= Connection::ACCEPTED;
        (&raw const (*connection).verdict).read_volatile()
    };
    if word == Verdict::Pending.to_word() {
        count(Counter::Late);
    }
    Some(word)
}

/// Tells this gateway's addresses from those that another one's programs write.
#[inline(always)]
fn tag() -> u32 {
    SETTINGS.get(0).map_or(0, |settings| u32::from(settings.tag))
}

/// Setting SO_RCVLOWAT calls the socket's data_ready, which is what hands waiting segments to the verdict program.
#[inline(always)]
fn kick(ctx: &SockAddrContext) {
    let mut one: c_int = 1;
    // SAFETY: the option's value is as long as it says.
    unsafe {
        bpf_setsockopt(
            ctx.as_ptr(),
            SOL_SOCKET,
            SO_RCVLOWAT,
            (&raw mut one).cast(),
            size_of::<c_int>() as c_int,
        )
    };
}
