//! The verdict program: runs for each segment that arrives on an enrolled socket.
use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff,
        sk_action::{SK_DROP, SK_PASS},
    },
    helpers::bpf_get_socket_cookie,
    macros::stream_verdict,
    programs::SkBuffContext,
};
use aya_log_ebpf::error;
use common::{
    Protocol, Refusal, Verdict,
    first_flight::FirstFlight,
    map_values::{Connection, Counter, Event},
    verdict,
};

use crate::{
    exact::{Segment, make_exact},
    maps::{CONNECTIONS, EVENTS, FLIGHTS, SCRATCH, SETTINGS, Scratch, count},
    scan::scan,
};

#[stream_verdict]
pub fn pm_verdict(ctx: SkBuffContext) -> u32 {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // A socket without an entry has closed.
    let Some(connection) = CONNECTIONS.get_ptr_mut(cookie) else { return SK_PASS };
    let skb = ctx.skb.skb;
    // SAFETY: entries are changed under the socket's lock only, which the caller of this program holds.
    if unsafe { (*connection).verdict } == Verdict::Poisoned.to_word() {
        return SK_DROP;
    }
    let ends_stream = match make_exact(skb, connection) {
        Segment::Pass { ends_stream } => ends_stream,
        Segment::Drop => return SK_DROP,
        Segment::Poison => {
            count(Counter::Poisoned);
            // SAFETY: as above.
            unsafe { (*connection).verdict = Verdict::Poisoned.to_word() };
            // Whoever has the socket now must not take the truncated stream for a whole one.
            report(cookie, Verdict::Poisoned.to_word());
            error!(&ctx, "connection {} poisoned: its bytes could not be kept exact", cookie);
            return SK_DROP;
        }
    };
    // SAFETY: as above.
    if unsafe { (*connection).verdict } == Verdict::Pending.to_word() {
        judge(skb, cookie, connection, ends_stream);
    }
    SK_PASS
}

#[inline(always)]
fn judge(skb: *mut __sk_buff, cookie: u64, connection: *mut Connection, ends_stream: bool) {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return };
    // SAFETY: as in `pm_verdict`; the scratch is this CPU's and no other program uses it.
    let (connection, scratch) = unsafe { (&mut *connection, &mut *scratch) };
    resume(cookie, connection, scratch);
    scan(skb, scratch);
    // By reference: a copy of it does not fit into a BPF program's stack.
    let flight = &scratch.flight;
    let word = if scratch.verdict != Verdict::Pending.to_word() {
        scratch.verdict
    } else if ends_stream {
        Verdict::Refused(Refusal::Incomplete).to_word()
    } else if FLIGHTS.insert(cookie, flight, 0).is_ok() {
        connection.flags |= Connection::SCANNING;
        return;
    } else {
        // Without its scanner the connection can't be judged; a refusal beats a guess.
        Verdict::Refused(Refusal::Unavailable).to_word()
    };
    settle(cookie, connection, word);
}

/// Takes up the scanner where the last segment left it.
#[inline(always)]
fn resume(cookie: u64, connection: &Connection, scratch: &mut Scratch) {
    if connection.flags & Connection::SCANNING != 0
        // SAFETY: the entry is changed under the socket's lock only.
        && let Some(flight) = unsafe { FLIGHTS.get(cookie) }
    {
        scratch.flight = *flight;
        return;
    }
    let generation = SETTINGS.get(0).map_or(0, |settings| settings.generation);
    let protocol =
        if connection.protocol == Protocol::Https.code() { Protocol::Https } else { Protocol::Http };
    scratch.flight = FirstFlight::new(generation, protocol);
}

#[inline(always)]
fn settle(cookie: u64, connection: &mut Connection, word: u32) {
    connection.verdict = word;
    if connection.flags & Connection::SCANNING != 0 {
        connection.flags &= !Connection::SCANNING;
        let _: Result<(), i32> = FLIGHTS.remove(cookie);
    }
    count(if verdict::is_route(word) { Counter::Routed } else { Counter::Refused });
    if connection.flags & Connection::ACCEPTED != 0 {
        report(cookie, word);
    }
}

/// Tells the gateway about a connection that it has accepted.
#[inline(always)]
pub fn report(cookie: u64, word: u32) {
    let event = Event { cookie, verdict: word, reserved: 0 };
    if EVENTS.output(event, 0).is_err() {
        count(Counter::EventsLost);
    }
}
