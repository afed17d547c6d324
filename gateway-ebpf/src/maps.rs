//! The maps: who writes each, who reads it, when an entry dies.
use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, PerCpuArray, RingBuf, SockHash},
    macros::btf_map,
};
use common::{
    first_flight::FirstFlight,
    limits::{ENROLLED_CONNECTIONS, EVENT_RING_BYTES, ROUTES as ROUTE_ENTRIES},
    map_values::{Connection, Counter, Event, Route, Settings},
    route::RouteKey,
};

/// Enrolled sockets by cookie. `enrol` writes; retirement deletes; the kernel deletes at close.
#[btf_map(name = "pm_sockets")]
pub static SOCKETS: SockHash<u64, ENROLLED_CONNECTIONS> = SockHash::new();

/// What is known of each enrolled socket, by cookie. `enrol` makes an entry before the socket enters `SOCKETS`;
/// the other programs change it under the socket's lock; retirement and close delete it.
#[btf_map(name = "pm_connections")]
pub static CONNECTIONS: HashMap<u64, Connection, ENROLLED_CONNECTIONS> = HashMap::new();

/// The scanners of incomplete first flights, by cookie. The verdict program makes an entry when a segment ends
/// before the name, and deletes it with the verdict; close deletes it too.
#[btf_map(name = "pm_flights")]
pub static FLIGHTS: HashMap<u64, FirstFlight, ENROLLED_CONNECTIONS, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// The configured routes. The gateway writes; the verdict program reads.
#[btf_map(name = "pm_routes")]
pub static ROUTES: HashMap<RouteKey, Route, ROUTE_ENTRIES> = HashMap::new();

/// One entry, which the gateway writes and the verdict program reads.
#[btf_map(name = "pm_settings")]
pub static SETTINGS: Array<Settings, 1> = Array::new();

/// Verdicts of connections that `accept` had returned before. The programs write, the gateway reads.
#[btf_map(name = "pm_events")]
pub static EVENTS: RingBuf<Event, EVENT_RING_BYTES> = RingBuf::new();

/// Counters by [`Counter`].
#[btf_map(name = "pm_counters")]
pub static COUNTERS: PerCpuArray<u64, { Counter::ALL.len() }> = PerCpuArray::new();

/// What the verdict program works on; it is too large for the stack.
#[btf_map(name = "pm_scratch")]
pub static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

#[repr(C)]
pub struct Scratch {
    pub flight: FirstFlight,
    /// The part of the segment that is being scanned.
    pub window: [u8; WINDOW_BYTES],
    /// The segment's offset of the next byte to scan, of the window's first byte and of the byte behind its last.
    pub offset: u32,
    pub window_start: u32,
    pub window_end: u32,
    pub segment_end: u32,
    /// The verdict's word; `Pending` until it is known.
    pub verdict: u32,
}

/// One load serves the usual request line, or the part of a hello up to its extensions.
pub const WINDOW_BYTES: usize = 256;

#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot is this CPU's own. A program that interrupts this one may lose an increment, never more.
        unsafe { *value = (*value).wrapping_add(1) };
    }
}
