//! What one connection may ask for, in bytes, counts and time.
use std::time::Duration;

/// Longer than any browser's address bar takes, and what most servers and proxies allow.
pub const REQUEST_LINE_BYTES: usize = 8 * 1024;

/// Room for large cookies and tokens; a head is held in memory as a whole.
pub const HEAD_BYTES: usize = 64 * 1024;

/// Browsers send about 20 fields, chains of proxies add a dozen.
pub const FIELDS: usize = 100;

/// Trailers carry a checksum or a signature.
pub const TRAILER_BYTES: usize = 16 * 1024;

/// A chunk's size and its extensions; nobody uses the latter.
pub const CHUNK_LINE_BYTES: usize = 1024;

/// Framing that a body's chunks may cost beyond what an honest sender of small chunks needs, because a client that
/// sends one byte in a chunk with a long extension costs more than it sends.
pub const CHUNK_EXTENSION_BYTES: u64 = 16 * 1024;

/// What is read of a body that nobody wants, so that the connection can go on; sending more than this costs the
/// client more than a new connection.
pub const DRAIN_BYTES: u64 = 256 * 1024;

/// Output that is gathered before it is written: more makes a write no cheaper.
pub const OUTPUT_BYTES: usize = 64 * 1024;

/// A piece of a body up to this is copied behind its head; a longer one is written from where it lies. Above this,
/// some CPUs copy with `rep movsb`, which is slow where the destination isn't aligned.
pub const COPY_BYTES: usize = 2 * 1024;

/// A body that is still longer than this is worth a system call that takes its socket out of the gateway's sockmap.
pub const UPLOAD_BYTES: u64 = 64 * 1024;

/// How often one connection tries that: most succeed at the first attempt.
pub const NUDGES: u8 = 16;

/// How long a function that is asked to stop waits for one more request on an idle connection that no other instance
/// takes, which it answers as the last one: closed at once, the connection would swallow a request that is on its way, and only the client could know
/// whether it may be sent again (RFC 9112 §9.3.1).
pub const STOP_GRACE: Duration = Duration::from_secs(1);

/// The limits that a function's operator may set.
#[derive(Clone, Debug)]
pub struct Limits {
    /// From the connection's arrival, or a later request's first byte, to the end of the head.
    pub head_timeout: Duration,
    /// Without a request, or without progress where the client has to read or to send.
    pub idle_timeout: Duration,
    /// From the request to stop to the end of requests in progress.
    pub stop_timeout: Duration,
    pub body_bytes: Option<u64>,
    pub requests: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            stop_timeout: Duration::from_secs(10),
            body_bytes: None,
            requests: u64::MAX,
        }
    }
}
