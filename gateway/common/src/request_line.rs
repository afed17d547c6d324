//! The scanner of an HTTP request line: resumable after any byte, done as soon as the function's name is.
use crate::{
    Refusal,
    first_flight::Step,
    limits::{EMPTY_LINES, METHOD_BYTES},
    route::RouteKey,
    target::{TargetScan, TargetStep},
};

/// The first byte of a TLS record that carries a handshake (RFC 8446 §5.1).
const TLS_HANDSHAKE: u8 = 22;

/// The method of the HTTP/2 preface (RFC 9113 §3.4).
const PREFACE_METHOD: &[u8; 3] = b"PRI";

const START: u8 = 0;
const LINE_FEED: u8 = 1;
const METHOD: u8 = 2;
const TARGET: u8 = 3;

/// Where in the request line the next byte stands.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct RequestScan {
    state: u8,
    /// How many bytes of the method are those of the HTTP/2 preface.
    preface: u8,
    /// Bytes of what the state counts.
    count: u16,
    target: TargetScan,
}

impl RequestScan {
    pub const fn new() -> Self {
        Self { state: START, preface: 0, count: 0, target: TargetScan::new() }
    }

    #[inline(always)]
    pub fn step(&mut self, key: &mut RouteKey, byte: u8) -> Step {
        match self.state {
            START => self.start(byte),
            LINE_FEED if byte == b'\n' => {
                self.state = START;
                Step::More
            }
            LINE_FEED => Step::Refuse(Refusal::Malformed),
            METHOD => self.method(byte),
            _ => self.target(key, byte),
        }
    }

    #[inline(always)]
    fn start(&mut self, byte: u8) -> Step {
        match byte {
            b'\r' => self.state = LINE_FEED,
            b'\n' => {}
            TLS_HANDSHAKE if self.count == 0 => return Step::Refuse(Refusal::OtherProtocol),
            _ => {
                self.state = METHOD;
                self.count = 0;
                return self.method(byte);
            }
        }
        self.count += 1;
        if self.count > EMPTY_LINES { Step::Refuse(Refusal::Malformed) } else { Step::More }
    }

    #[inline(always)]
    fn method(&mut self, byte: u8) -> Step {
        if byte == b' ' && self.count > 0 {
            self.state = TARGET;
            return Step::More;
        }
        if !is_token_byte(byte) || self.count == METHOD_BYTES {
            return Step::Refuse(Refusal::Malformed);
        }
        if PREFACE_METHOD.get(usize::from(self.count)) == Some(&byte) {
            self.preface += 1;
        } else {
            self.preface = 0;
        }
        self.count += 1;
        Step::More
    }

    #[inline(always)]
    fn target(&mut self, key: &mut RouteKey, byte: u8) -> Step {
        match self.target.step(byte) {
            TargetStep::More => Step::More,
            TargetStep::NameByte => {
                // A function's name is shorter than a key, so there is room.
                key.push(byte);
                Step::More
            }
            TargetStep::NameEnd => Step::Name,
            TargetStep::Other if usize::from(self.preface) == PREFACE_METHOD.len() => {
                Step::Refuse(Refusal::UnsupportedVersion)
            }
            TargetStep::Other | TargetStep::NotFound => Step::Refuse(Refusal::NoFunction),
            TargetStep::TooLong => Step::Refuse(Refusal::TooLong),
            TargetStep::Malformed => Step::Refuse(Refusal::Malformed),
        }
    }
}

impl Default for RequestScan {
    fn default() -> Self {
        Self::new()
    }
}

/// A `tchar` of RFC 9110 §5.6.2.
#[inline(always)]
const fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'!' | b'#'
                | b'$'
                | b'%'
                | b'&'
                | b'\''
                | b'*'
                | b'+'
                | b'-'
                | b'.'
                | b'^'
                | b'_'
                | b'`'
                | b'|'
                | b'~'
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Protocol, first_flight::FirstFlight};

    fn scan(bytes: &[u8]) -> Result<String, Step> {
        let mut flight = FirstFlight::new(0, Protocol::Http);
        match flight.feed(bytes) {
            Step::Name => Ok(String::from_utf8(flight.key.name().to_vec()).unwrap()),
            other => Err(other),
        }
    }

    #[test]
    fn a_request_line_names_its_function() {
        assert_eq!(scan(b"GET /function/echo HTTP/1.1\r\n"), Ok("echo".into()));
        assert_eq!(scan(b"\r\n\r\nPOST /function/echo/x HTTP/1.1"), Ok("echo".into()));
        assert_eq!(scan(b"x-1~ http://h/function/echo?"), Ok("echo".into()));
        assert_eq!(scan(b"PRI /function/echo "), Ok("echo".into()));
    }

    #[test]
    fn whatever_else_is_refused_with_its_reason() {
        let refused =
            |bytes: &[u8], refusal| assert_eq!(scan(bytes), Err(Step::Refuse(refusal)), "{bytes:?}");
        refused(b"GET / HTTP/1.1\r\n", Refusal::NoFunction);
        refused(b"OPTIONS * HTTP/1.1\r\n", Refusal::NoFunction);
        refused(b"GET /function/Echo", Refusal::NoFunction);
        refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Refusal::UnsupportedVersion);
        refused(b"\x16\x03\x01", Refusal::OtherProtocol);
        refused(b" GET /", Refusal::Malformed);
        refused(b"GET  /function/echo ", Refusal::Malformed);
        refused(b"\rGET /", Refusal::Malformed);
        refused(b"\r\r", Refusal::Malformed);
        refused(b"GET /function/echo\r\n", Refusal::Malformed);
        refused(b"G\x00T", Refusal::Malformed);
        refused(&[b'\n'; 17], Refusal::Malformed);
        refused(&[b'A'; 33], Refusal::Malformed);
        refused(b"CONNECT example.org:443 HTTP/1.1", Refusal::Malformed);
        refused(&[&b"GET http://"[..], &[b'a'; 261]].concat(), Refusal::TooLong);
    }

    #[test]
    fn every_prefix_waits_and_resumes() {
        let line = b"\r\nDELETE https://[::1]:8443/function/a-9?q HTTP/1.1\r\n";
        let end = line.iter().position(|&byte| byte == b'?').unwrap();
        for cut in 0..=end {
            let mut flight = FirstFlight::new(0, Protocol::Http);
            assert_eq!(flight.feed(&line[..cut]), Step::More);
            assert_eq!(flight.feed(&line[cut..]), Step::Name);
            assert_eq!(flight.key.name(), b"a-9");
        }
    }
}
