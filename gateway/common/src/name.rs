//! A function's name: what `/function/NAME` and the first label of a host name carry.
use core::{fmt, str};

use crate::limits::FUNCTION_NAME_BYTES;

/// One to 63 bytes of `[a-z0-9-]`; comparing is exact.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FunctionName {
    bytes: [u8; FUNCTION_NAME_BYTES],
    length: u8,
}

/// Why a text is not a function's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidName {
    Empty,
    TooLong,
    Character(u8),
}

impl FunctionName {
    pub fn new(name: &[u8]) -> Result<Self, InvalidName> {
        if name.is_empty() {
            return Err(InvalidName::Empty);
        }
        if name.len() > FUNCTION_NAME_BYTES {
            return Err(InvalidName::TooLong);
        }
        if let Some(&byte) = name.iter().find(|&&byte| !is_name_byte(byte)) {
            return Err(InvalidName::Character(byte));
        }
        let mut bytes = [0; FUNCTION_NAME_BYTES];
        bytes[..name.len()].copy_from_slice(name);
        Ok(Self { bytes, length: name.len() as u8 })
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    pub fn as_str(&self) -> &str {
        // The constructor admits ASCII only, so the fallback is never taken.
        str::from_utf8(self.as_bytes()).unwrap_or_default()
    }
}

pub const fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'
}

impl str::FromStr for FunctionName {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        Self::new(name.as_bytes())
    }
}

impl fmt::Display for FunctionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for FunctionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FunctionName({:?})", self.as_str())
    }
}

impl fmt::Display for InvalidName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("a function's name must not be empty"),
            Self::TooLong => write!(f, "a function's name has at most {FUNCTION_NAME_BYTES} bytes"),
            Self::Character(byte) => write!(
                f,
                "a function's name is made of a-z, 0-9 and '-', not of '{}'",
                char::from(*byte).escape_default()
            ),
        }
    }
}

impl core::error::Error for InvalidName {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels_in_lower_case() {
        assert_eq!(FunctionName::new(b"a-1").unwrap().as_str(), "a-1");
        assert_eq!(FunctionName::new(b""), Err(InvalidName::Empty));
        assert_eq!(FunctionName::new(b"Echo"), Err(InvalidName::Character(b'E')));
        assert_eq!(FunctionName::new(b"a.b"), Err(InvalidName::Character(b'.')));
        assert!(FunctionName::new(&[b'a'; FUNCTION_NAME_BYTES]).is_ok());
        assert_eq!(FunctionName::new(&[b'a'; FUNCTION_NAME_BYTES + 1]), Err(InvalidName::TooLong));
    }
}
