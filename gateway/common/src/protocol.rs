//! What a listener speaks; a connection keeps it for life.

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// HTTP/1.1 in the clear.
    Http = 1,
    /// HTTP/1.1 under TLS.
    Https = 2,
}

impl Protocol {
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Http),
            2 => Some(Self::Https),
            _ => None,
        }
    }

    pub const fn code(self) -> u8 {
        self as u8
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}
