//! Why a connection gets an answer from nobody's function.

/// The reason that travels with a refused connection; the answer to it depends on the connection's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Refusal {
    /// No function has this name: 404, or the alert `unrecognized_name`.
    NoFunction = 1,
    /// The first bytes break the protocol's syntax: 400, or `decode_error`.
    Malformed = 2,
    /// A field has a value that the protocol forbids: 400, or `illegal_parameter`.
    IllegalParameter = 3,
    /// A TLS hello on the HTTP port, or HTTP on the HTTPS port: a 400 in the clear that names the other port.
    OtherProtocol = 4,
    /// Neither TLS nor HTTP on the HTTPS port: `unexpected_message`.
    UnexpectedMessage = 5,
    /// An HTTP version that is not spoken here, such as the HTTP/2 preface: 505.
    UnsupportedVersion = 6,
    /// The part that routes is longer than its limit: 414, or `decode_error`.
    TooLong = 7,
    /// The routing part did not arrive in time: 408, or `user_canceled`.
    Timeout = 8,
    /// The function exists and nothing can take the connection: 503 with Retry-After, or `internal_error`.
    Unavailable = 9,
    /// The client ended its side before the routing part was complete: 400, or `decode_error`.
    Incomplete = 10,
}

impl Refusal {
    pub const ALL: [Self; 10] = [
        Self::NoFunction,
        Self::Malformed,
        Self::IllegalParameter,
        Self::OtherProtocol,
        Self::UnexpectedMessage,
        Self::UnsupportedVersion,
        Self::TooLong,
        Self::Timeout,
        Self::Unavailable,
        Self::Incomplete,
    ];

    pub const fn from_code(code: u8) -> Option<Self> {
        if code == 0 || code as usize > Self::ALL.len() { None } else { Some(Self::ALL[code as usize - 1]) }
    }

    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The name in logs and counters.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoFunction => "no_function",
            Self::Malformed => "malformed",
            Self::IllegalParameter => "illegal_parameter",
            Self::OtherProtocol => "other_protocol",
            Self::UnexpectedMessage => "unexpected_message",
            Self::UnsupportedVersion => "unsupported_version",
            Self::TooLong => "too_long",
            Self::Timeout => "timeout",
            Self::Unavailable => "unavailable",
            Self::Incomplete => "incomplete",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_reasons_are_each_others_inverse() {
        for (index, refusal) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(refusal.code()), index + 1);
            assert_eq!(Refusal::from_code(refusal.code()), Some(refusal));
        }
        assert_eq!(Refusal::from_code(0), None);
        assert_eq!(Refusal::from_code(11), None);
    }
}
