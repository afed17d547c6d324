//! Keeps the bytes exact: cuts off what a segment repeats of the stream, which sockmap would deliver twice.
use aya_ebpf::{
    Global,
    bindings::__sk_buff,
    cty::{c_long, c_void},
    helpers::{bpf_loop, bpf_skb_adjust_room, bpf_skb_pull_data},
};
use common::map_values::{Connection, Counter};

use crate::maps::count;

/// What is done about repeated bytes; tests of the tests change it.
#[unsafe(no_mangle)]
static TRIM: Global<u32> = Global::new(TRIM_ON);

/// Deliver them, which is what the kernel does without this program.
const TRIM_OFF: u32 = 0;
const TRIM_ON: u32 = 1;

/// The most that bpf_skb_adjust_room changes at once.
const STEP_BYTES: u32 = 0xfff;

/// An overlap can be as long as an skb; 260 steps are more than a megabyte.
const STEPS: u32 = 260;

/// What to do with a segment.
pub enum Segment {
    Pass {
        /// No byte will follow: the client ended its side.
        ends_stream: bool,
    },
    Drop,
    /// The stream can't go on without wrong bytes.
    Poison,
}

/// Cuts the segment to the bytes that come next.
#[inline(always)]
pub fn make_exact(skb: *mut __sk_buff, connection: *mut Connection) -> Segment {
    // SAFETY: the first two words of the control block are TCP_SKB_CB's seq and end_seq; the verifier allows both.
    let (sequence, end, length) = unsafe { ((*skb).cb[0], (*skb).cb[1], (*skb).len) };
    // SAFETY: entries are changed under the socket's lock only, which the caller of this program holds.
    let next = unsafe { (*connection).next_sequence };
    // A FIN counts one in end_seq.
    let ends_stream = end.wrapping_sub(sequence) > length;
    let repeated = next.wrapping_sub(sequence);
    if repeated == 0 || TRIM.load() == TRIM_OFF {
        advance(connection, sequence.wrapping_add(length));
        return Segment::Pass { ends_stream };
    }
    if repeated as i32 <= 0 {
        count(Counter::Gaps);
        return Segment::Poison;
    }
    if repeated < length {
        count(Counter::Trimmed);
        if !trim(skb, repeated) {
            return Segment::Poison;
        }
        advance(connection, sequence.wrapping_add(length));
        return Segment::Pass { ends_stream };
    }
    count(Counter::Duplicates);
    // Cut to nothing before it is dropped, because the kernel adds a dropped segment's length to copied_seq.
    if !trim(skb, length) {
        return Segment::Poison;
    }
    // The end of the stream must not be lost with the repeated bytes.
    if ends_stream { Segment::Pass { ends_stream } } else { Segment::Drop }
}

#[inline(always)]
fn advance(connection: *mut Connection, next: u32) {
    // SAFETY: as in `make_exact`.
    unsafe { (*connection).next_sequence = next };
}

struct Cut {
    skb: *mut __sk_buff,
    left: u32,
    failed: u32,
}

#[inline(always)]
fn trim(skb: *mut __sk_buff, bytes: u32) -> bool {
    if bytes == 0 {
        return true;
    }
    if bytes <= STEP_BYTES {
        return cut(skb, bytes);
    }
    // One linear part makes each of the steps cheap.
    // SAFETY: the context is valid; the helper checks the length.
    if unsafe { bpf_skb_pull_data(skb, bytes) } != 0 {
        return false;
    }
    let mut work = Cut { skb, left: bytes, failed: 0 };
    // SAFETY: the callback and its context outlive the loop.
    unsafe { bpf_loop(STEPS, cut_step as *mut c_void, (&raw mut work).cast(), 0) };
    work.left == 0 && work.failed == 0
}

extern "C" fn cut_step(_index: u32, work: *mut c_void) -> c_long {
    // SAFETY: bpf_loop passes what `trim` gave it.
    let work = unsafe { &mut *work.cast::<Cut>() };
    if work.left == 0 {
        return 1;
    }
    let step = if work.left < STEP_BYTES { work.left } else { STEP_BYTES };
    if !cut(work.skb, step) {
        work.failed = 1;
        return 1;
    }
    work.left -= step;
    0
}

#[inline(always)]
fn cut(skb: *mut __sk_buff, bytes: u32) -> bool {
    // SAFETY: the context is valid; the helper checks the length.
    unsafe { bpf_skb_adjust_room(skb, -(bytes as i32), 0, 0) == 0 }
}
