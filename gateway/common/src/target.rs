//! The one definition of which function a request target names (RFC 9112 §3.2).
//!
//! The raw segment after `/function/` decides, byte for byte: nothing is percent-decoded and no dot segment is
//! removed, so that the kernel and a function can't read one target in two ways.
use crate::{
    FunctionName,
    limits::{AUTHORITY_BYTES, FUNCTION_NAME_BYTES},
    name::is_name_byte,
};

const PREFIX: &[u8; 10] = b"/function/";
const SCHEME_HTTP: &[u8; 7] = b"http://";
const SCHEME_HTTPS: &[u8; 8] = b"https://";

/// What a whole request target names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `/function/NAME`, and where in the target the rest of the path begins.
    Function { name: FunctionName, end: usize },
    /// A target outside `/function/`, `*` included.
    Other,
    /// Below `/function/`, and no function can have this name.
    NotFound,
    /// No form of request target that is served here.
    Malformed,
}

/// Classifies a whole request target.
pub fn classify(target: &[u8]) -> Target {
    let mut scan = TargetScan::new();
    let mut name = [0; FUNCTION_NAME_BYTES];
    let mut length = 0;
    // A space ends a target in a request line, so it ends this one too.
    for (offset, byte) in target.iter().copied().chain([b' ']).enumerate() {
        match scan.step(byte) {
            TargetStep::More => {}
            TargetStep::NameByte => {
                name[length] = byte;
                length += 1;
            }
            TargetStep::NameEnd => {
                return match FunctionName::new(&name[..length]) {
                    Ok(name) => Target::Function { name, end: offset },
                    Err(_) => Target::NotFound,
                };
            }
            TargetStep::Other => return Target::Other,
            TargetStep::NotFound => return Target::NotFound,
            TargetStep::TooLong | TargetStep::Malformed => return Target::Malformed,
        }
    }
    Target::Malformed
}

/// The host and port of an absolute-form target, which wins over the Host field (RFC 9112 §3.2.2).
pub fn authority(target: &[u8]) -> Option<&[u8]> {
    let rest = strip_scheme(target, SCHEME_HTTP).or_else(|| strip_scheme(target, SCHEME_HTTPS))?;
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
    Some(&rest[..end])
}

fn strip_scheme<'a>(target: &'a [u8], scheme: &[u8]) -> Option<&'a [u8]> {
    let (head, rest) = target.split_at_checked(scheme.len())?;
    head.eq_ignore_ascii_case(scheme).then_some(rest)
}

/// What one more byte of a target told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetStep {
    More,
    /// The byte belongs to the function's name.
    NameByte,
    /// The byte ended a name of at least one byte.
    NameEnd,
    Other,
    NotFound,
    /// The authority is longer than any can be.
    TooLong,
    Malformed,
}

/// The classifier as a machine that takes a byte at a time and can stop after any.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct TargetScan {
    state: u8,
    /// Bytes matched of what the state compares with.
    matched: u8,
    /// Bytes of the authority.
    authority: u16,
}

const START: u8 = 0;
const SCHEME: u8 = 1;
const AUTHORITY: u8 = 2;
const PATH: u8 = 3;
const NAME: u8 = 4;
const ASTERISK: u8 = 5;

impl TargetScan {
    pub const fn new() -> Self {
        Self { state: START, matched: 0, authority: 0 }
    }

    #[inline(always)]
    pub fn step(&mut self, byte: u8) -> TargetStep {
        let ends = byte == b' ';
        if !ends && !byte.is_ascii_graphic() {
            return TargetStep::Malformed;
        }
        match self.state {
            START => self.start(byte),
            SCHEME => self.scheme(byte),
            AUTHORITY => self.authority(byte),
            PATH => self.path(byte),
            NAME => self.name(byte),
            ASTERISK if ends => TargetStep::Other,
            _ => TargetStep::Malformed,
        }
    }

    #[inline(always)]
    fn start(&mut self, byte: u8) -> TargetStep {
        self.matched = 1;
        self.state = match byte {
            b'/' => PATH,
            b'*' => ASTERISK,
            b'h' | b'H' => SCHEME,
            _ => return TargetStep::Malformed,
        };
        TargetStep::More
    }

    /// `http://` or `https://`, in any case.
    #[inline(always)]
    fn scheme(&mut self, byte: u8) -> TargetStep {
        self.matched = match (self.matched, byte.to_ascii_lowercase()) {
            (1, b't') => 2,
            (2, b't') => 3,
            (3, b'p') => 4,
            (4, b's') => 5,
            (4 | 5, b':') => 6,
            (6, b'/') => 7,
            (7, b'/') => {
                self.state = AUTHORITY;
                0
            }
            _ => return TargetStep::Malformed,
        };
        TargetStep::More
    }

    #[inline(always)]
    fn authority(&mut self, byte: u8) -> TargetStep {
        let empty = self.authority == 0;
        match byte {
            b'/' | b'?' | b'#' | b' ' if empty => TargetStep::Malformed,
            b'/' => {
                self.state = PATH;
                self.matched = 1;
                TargetStep::More
            }
            b'?' | b'#' | b' ' => TargetStep::Other,
            _ if self.authority == AUTHORITY_BYTES => TargetStep::TooLong,
            _ => {
                self.authority += 1;
                TargetStep::More
            }
        }
    }

    #[inline(always)]
    fn path(&mut self, byte: u8) -> TargetStep {
        match PREFIX.get(usize::from(self.matched)) {
            Some(&expected) if expected == byte => {
                self.matched += 1;
                if usize::from(self.matched) == PREFIX.len() {
                    self.state = NAME;
                    self.matched = 0;
                }
                TargetStep::More
            }
            _ => TargetStep::Other,
        }
    }

    #[inline(always)]
    fn name(&mut self, byte: u8) -> TargetStep {
        let length = usize::from(self.matched);
        match byte {
            b'/' | b'?' | b'#' | b' ' if length > 0 => TargetStep::NameEnd,
            _ if is_name_byte(byte) && length < FUNCTION_NAME_BYTES => {
                self.matched += 1;
                TargetStep::NameByte
            }
            _ => TargetStep::NotFound,
        }
    }
}

impl Default for TargetScan {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(target: &str) -> (String, &str) {
        match classify(target.as_bytes()) {
            Target::Function { name, end } => (name.to_string(), &target[end..]),
            other => panic!("{target} is {other:?}"),
        }
    }

    #[test]
    fn the_raw_first_segment_decides() {
        assert_eq!(function("/function/echo"), ("echo".into(), ""));
        assert_eq!(function("/function/echo/"), ("echo".into(), "/"));
        assert_eq!(function("/function/echo/../hello"), ("echo".into(), "/../hello"));
        assert_eq!(function("/function/echo?x=1"), ("echo".into(), "?x=1"));
        assert_eq!(function("/function/echo#x"), ("echo".into(), "#x"));
        assert_eq!(function("/function/echoevil"), ("echoevil".into(), ""));
        assert_eq!(function("http://a.b:8080/function/echo/x"), ("echo".into(), "/x"));
        assert_eq!(function("HTTPS://[::1]/function/e-2"), ("e-2".into(), ""));
        let longest = "a".repeat(FUNCTION_NAME_BYTES);
        assert_eq!(function(&format!("/function/{longest}")), (longest, ""));
    }

    #[test]
    fn nothing_is_normalised() {
        for target in [
            "/function/%65cho",
            "/function/Echo",
            "/function//echo",
            "/function/",
            "/function/?x",
            "/function/..%2f",
            "/function/../echo",
            "/function/a.b",
        ] {
            assert_eq!(classify(target.as_bytes()), Target::NotFound, "{target}");
        }
        assert_eq!(classify(format!("/function/{}", "a".repeat(64)).as_bytes()), Target::NotFound);
        for target in [
            "/",
            "*",
            "/x",
            "/function",
            "/FUNCTION/echo",
            "//function/echo",
            "/functionx/echo",
            "http://a",
            "http://a?/function/echo",
            "http://a/",
            "/x/function/echo",
        ] {
            assert_eq!(classify(target.as_bytes()), Target::Other, "{target}");
        }
        for target in
            ["", "echo", "http:/a/", "http:///function/echo", "ftp://a/", "*x", "httpss://a/", "\u{e9}"]
        {
            assert_eq!(classify(target.as_bytes()), Target::Malformed, "{target}");
        }
        assert_eq!(classify(format!("http://{}/", "a".repeat(261)).as_bytes()), Target::Malformed);
    }

    #[test]
    fn an_authority_ends_where_the_path_begins() {
        assert_eq!(authority(b"http://a.b:1/x"), Some(&b"a.b:1"[..]));
        assert_eq!(authority(b"HTTPS://a?x"), Some(&b"a"[..]));
        assert_eq!(authority(b"/x"), None);
    }
}
