//! The values of the BPF maps, as the kernel programs write them and the gateway reads them.
//!
//! Plain integers and arrays: a value that the kernel wrote becomes a Rust type only through a constructor that
//! can refuse it.

/// One enrolled connection, under its socket's cookie; it lives from the handshake until retirement or close.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Connection {
    /// The sequence number up to which bytes were passed on.
    pub next_sequence: u32,
    /// A [`Verdict`](crate::Verdict)'s word.
    pub verdict: u32,
    /// A protocol's code.
    pub protocol: u8,
    pub flags: u8,
    /// AF_INET or AF_INET6; the addresses of AF_INET stand in the first word.
    pub family: u16,
    /// Ports in host byte order.
    pub local_port: u16,
    pub remote_port: u16,
    /// Addresses in network byte order.
    pub local_address: [u32; 4],
    pub remote_address: [u32; 4],
}

const _: () = assert!(size_of::<Connection>() == 48 && align_of::<Connection>() == 4);

impl Connection {
    /// `accept` has returned this connection, so its verdict has been told or will be an event.
    pub const ACCEPTED: u8 = 1;
    /// The first flight was incomplete: its scanner is kept under the same cookie.
    pub const SCANNING: u8 = 2;
}

/// What the kernel tells about a connection that `accept` has returned already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    pub cookie: u64,
    /// A [`Verdict`](crate::Verdict)'s word.
    pub verdict: u32,
    pub reserved: u32,
}

const _: () = assert!(size_of::<Event>() == 16 && align_of::<Event>() == 8);

/// What a route's key leads to.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Route {
    pub index: u16,
}

/// What may change while the programs run.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Settings {
    /// The generation of the routes that new verdicts are taken from.
    pub generation: u16,
    /// What the addresses that `accept` returns carry beside the verdict.
    pub tag: u16,
}

const _: () = assert!(size_of::<Settings>() == 4);

/// Where in a kernel structure a field stands, in bytes, as the running kernel's BTF says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Offsets {
    pub tcp_sock_copied_seq: u32,
    pub tcp_sock_rcv_nxt: u32,
    pub sock_user_data: u32,
    pub sock_lock_owned: u32,
    pub psock_refcnt: u32,
}

/// What the programs count, each the index of a per-CPU counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Connections that entered the SOCKHASH.
    Enrolled,
    /// Connections that did not, because a map was full or data came with the handshake.
    NotEnrolled,
    /// Verdicts that named a route.
    Routed,
    /// Verdicts that refuse.
    Refused,
    /// Connections that `accept` returned before their verdict.
    Late,
    /// Segments whose front had been delivered before and was cut off.
    Trimmed,
    /// Segments that had been delivered before as a whole.
    Duplicates,
    /// Segments that left a gap.
    Gaps,
    /// Connections whose bytes could not be kept exact.
    Poisoned,
    /// Connections that left the SOCKHASH alive.
    Retired,
    /// Connections that closed while enrolled.
    Closed,
    /// Events that found the ring full.
    EventsLost,
}

impl Counter {
    pub const ALL: [Self; 12] = [
        Self::Enrolled,
        Self::NotEnrolled,
        Self::Routed,
        Self::Refused,
        Self::Late,
        Self::Trimmed,
        Self::Duplicates,
        Self::Gaps,
        Self::Poisoned,
        Self::Retired,
        Self::Closed,
        Self::EventsLost,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enrolled => "enrolled",
            Self::NotEnrolled => "not_enrolled",
            Self::Routed => "routed",
            Self::Refused => "refused",
            Self::Late => "late",
            Self::Trimmed => "trimmed",
            Self::Duplicates => "duplicates",
            Self::Gaps => "gaps",
            Self::Poisoned => "poisoned",
            Self::Retired => "retired",
            Self::Closed => "closed",
            Self::EventsLost => "events_lost",
        }
    }
}
