//! Bounds that the kernel programs, the gateway and the functions share.

/// A function's name is one DNS label, because it is also the first label of its host names (RFC 1035 §2.3.4).
pub const FUNCTION_NAME_BYTES: usize = 63;

/// A TLS ClientHello longer than this is refused: browsers send less than 2 KiB, post-quantum key shares included,
/// and the bound is what keeps a client from feeding the parser for ever.
pub const CLIENT_HELLO_BYTES: u32 = 16 * 1024;
