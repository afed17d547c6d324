//! Bounds that the kernel programs, the gateway and the functions share.

/// A function's name is one DNS label, because it is also the first label of its host names (RFC 1035 §2.3.4).
pub const FUNCTION_NAME_BYTES: usize = 63;

/// The longest host name that routes. DNS allows 253 bytes; this keeps a route's key at two cache lines, and a name
/// that is longer can't be configured, so it can't be missed.
pub const HOST_NAME_BYTES: usize = 124;

/// A TLS ClientHello longer than this is refused: browsers send less than 2 KiB, post-quantum key shares included,
/// and the bound is what keeps a client from feeding the parser for ever.
pub const CLIENT_HELLO_BYTES: u32 = 16 * 1024;

/// A TLSPlaintext fragment's limit (RFC 8446 §5.1).
pub const TLS_PLAINTEXT_BYTES: u16 = 1 << 14;

/// The longest registered method has 17 bytes (UPDATEREDIRECTREF).
pub const METHOD_BYTES: u16 = 32;

/// RFC 9112 §2.2 asks to tolerate empty lines before a request line; a client that sends more is not a browser.
pub const EMPTY_LINES: u16 = 16;

/// An authority is a host name of at most 253 bytes, a colon and a port.
pub const AUTHORITY_BYTES: u16 = 260;

/// How many connections the kernel path follows at once: each holds a socket, and a retired one needs no entry.
pub const ENROLLED_CONNECTIONS: usize = 65_536;

/// Keys of routes, of all generations that a connection may still hold.
pub const ROUTES: usize = 8_192;

/// Room for one event of each of a third of the enrolled connections; a lost one is found at its deadline.
pub const EVENT_RING_BYTES: usize = 512 * 1024;
