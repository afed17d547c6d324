//! Runs the scanner of a first flight over a segment.
use core::hint::black_box;

use aya_ebpf::{
    bindings::__sk_buff,
    cty::{c_long, c_void},
    helpers::{bpf_loop, bpf_skb_load_bytes},
};
use common::{Refusal, Verdict, first_flight::Step};

use crate::maps::{ROUTES, Scratch, WINDOW_BYTES};

struct Scan {
    skb: *mut __sk_buff,
    scratch: *mut Scratch,
}

/// Scans the segment with the flight in `scratch` and leaves the verdict there.
#[inline(always)]
pub fn scan(skb: *mut __sk_buff, scratch: *mut Scratch) {
    let mut work = Scan { skb, scratch };
    // SAFETY: the scratch is this CPU's; the context is valid.
    let length = unsafe {
        let length = (*skb).len;
        (*scratch).offset = 0;
        (*scratch).window_start = 0;
        (*scratch).window_end = 0;
        (*scratch).segment_end = length;
        (*scratch).verdict = Verdict::Pending.to_word();
        length
    };
    // Each step takes at least one byte.
    // SAFETY: the callback and its context outlive the loop.
    unsafe { bpf_loop(length, step as *mut c_void, (&raw mut work).cast(), 0) };
}

extern "C" fn step(_index: u32, work: *mut c_void) -> c_long {
    // SAFETY: bpf_loop passes what `scan` gave it, and the scratch is this CPU's.
    let (skb, scratch) = unsafe {
        let work = &*work.cast::<Scan>();
        (work.skb, &mut *work.scratch)
    };
    let left = scratch.segment_end.wrapping_sub(scratch.offset);
    if left == 0 || left > scratch.segment_end {
        return 1;
    }
    let skipped = scratch.flight.skip(left);
    if skipped > 0 {
        scratch.offset += skipped;
        return 0;
    }
    if scratch.offset >= scratch.window_end && !load_window(skb, scratch) {
        scratch.verdict = Verdict::Refused(Refusal::Unavailable).to_word();
        return 1;
    }
    let index = scratch.offset.wrapping_sub(scratch.window_start) as usize;
    let Some(&byte) = scratch.window.get(index) else { return 1 };
    scratch.offset += 1;
    match scratch.flight.step(byte) {
        Step::More => 0,
        Step::Name => {
            scratch.verdict = route(scratch).to_word();
            1
        }
        Step::Refuse(refusal) => {
            scratch.verdict = Verdict::Refused(refusal).to_word();
            1
        }
    }
}

#[inline(always)]
fn load_window(skb: *mut __sk_buff, scratch: &mut Scratch) -> bool {
    // In 64 bits, because the verifier does not follow a bound from a register's lower half to the whole.
    let left = u64::from(scratch.segment_end).wrapping_sub(u64::from(scratch.offset));
    // The place of the window's last byte: nothing left wraps to a whole window, which the helper refuses. Adding one
    // is how a verifier older than Linux 6.8, which learns nothing from a comparison with zero, sees that the length is
    // at least one; the compiler must not see through it.
    const LAST: u64 = WINDOW_BYTES as u64 - 1;
    let last = left.wrapping_sub(1);
    let length = (black_box(if last < LAST { last } else { LAST }) + 1) as u32;
    // SAFETY: the window has room for `length` bytes; the helper checks the segment's bounds.
    let loaded =
        unsafe { bpf_skb_load_bytes(skb.cast(), scratch.offset, (&raw mut scratch.window).cast(), length) };
    scratch.window_start = scratch.offset;
    scratch.window_end = scratch.offset + length;
    loaded == 0
}

#[inline(always)]
fn route(scratch: &Scratch) -> Verdict {
    let key = &scratch.flight.key;
    // SAFETY: the gateway removes a route only when no connection can hold its generation.
    match unsafe { ROUTES.get(key) } {
        Some(route) => Verdict::Route { generation: key.generation, index: route.index },
        None => Verdict::Refused(Refusal::NoFunction),
    }
}
