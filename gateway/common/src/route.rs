//! The key under which the kernel and the peek path look a connection's function up.
use crate::{Protocol, limits::HOST_NAME_BYTES};

/// A function's name for HTTP, a host name in lower case for HTTPS.
///
/// Bytes after `length` are zero, because the kernel's hash compares the whole key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct RouteKey {
    /// The configuration that the route belongs to.
    pub generation: u16,
    /// A protocol's code.
    pub protocol: u8,
    pub length: u8,
    pub bytes: [u8; HOST_NAME_BYTES],
}

const _: () = assert!(size_of::<RouteKey>() == 128 && align_of::<RouteKey>() == 2);
const _: () = assert!(crate::limits::FUNCTION_NAME_BYTES <= HOST_NAME_BYTES);

impl RouteKey {
    pub const fn empty(generation: u16, protocol: Protocol) -> Self {
        Self { generation, protocol: protocol.code(), length: 0, bytes: [0; HOST_NAME_BYTES] }
    }

    /// The key of a configured route; `None` when the name is too long to be one.
    pub fn new(generation: u16, protocol: Protocol, name: &[u8]) -> Option<Self> {
        let mut key = Self::empty(generation, protocol);
        key.bytes.get_mut(..name.len())?.copy_from_slice(name);
        key.length = name.len() as u8;
        Some(key)
    }

    /// Appends a byte; false when the key is full.
    #[inline(always)]
    pub fn push(&mut self, byte: u8) -> bool {
        let Some(slot) = self.bytes.get_mut(usize::from(self.length)) else { return false };
        *slot = byte;
        self.length += 1;
        true
    }

    pub fn name(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or_default()
    }
}
