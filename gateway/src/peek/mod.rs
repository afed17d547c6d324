//! The user-space path to a verdict: look at the first bytes without taking them.
mod client_hello;
mod request;
mod waiting;

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use common::{Protocol, Refusal, Verdict};
use nix::sys::socket::{MsgFlags, recv};

pub use self::waiting::Waiting;
use crate::routes::Routes;

/// A ClientHello at its limit in records of one byte each, which is the longest first flight that routes.
const BUFFER_BYTES: usize = 6 * (common::limits::CLIENT_HELLO_BYTES as usize + 4);

/// What a look at the first bytes told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    Verdict(Verdict),
    /// Nothing can be said before this many bytes are there.
    Needs {
        bytes: usize,
    },
}

/// Looks at sockets, with one buffer for all.
pub struct Peek {
    buffer: Box<[u8]>,
}

impl Peek {
    pub fn new() -> Self {
        Self { buffer: vec![0; BUFFER_BYTES].into_boxed_slice() }
    }

    /// Looks at what has come; an error is the connection's own.
    pub fn look(&mut self, socket: impl AsFd, protocol: Protocol, routes: &Routes) -> io::Result<Look> {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let length = match recv(socket.as_fd().as_raw_fd(), &mut self.buffer, flags) {
            Ok(length) => length,
            Err(nix::errno::Errno::EAGAIN) => return Ok(Look::Needs { bytes: 1 }),
            Err(error) => return Err(error.into()),
        };
        if length == 0 {
            return Ok(Look::Verdict(Verdict::Refused(Refusal::Incomplete)));
        }
        let look = judge(protocol, &self.buffer[..length], routes);
        match look {
            Look::Needs { .. } if length == self.buffer.len() => {
                Ok(Look::Verdict(Verdict::Refused(Refusal::TooLong)))
            }
            look => Ok(look),
        }
    }
}

impl Default for Peek {
    fn default() -> Self {
        Self::new()
    }
}

/// The verdict of a connection that begins with these bytes.
pub fn judge(protocol: Protocol, bytes: &[u8], routes: &Routes) -> Look {
    match protocol {
        Protocol::Http => request::judge(bytes, routes),
        Protocol::Https => client_hello::judge(bytes, routes),
    }
}

#[cfg(test)]
mod tests {
    use common::{FunctionName, first_flight::FirstFlight, first_flight::Step};
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn routes() -> Routes {
        let echo: FunctionName = "echo".parse().unwrap();
        Routes::new(1, [(echo, ["echo.faas.local"])]).unwrap()
    }

    /// What the kernel's scanner says of the same bytes.
    fn scanned(protocol: Protocol, bytes: &[u8], routes: &Routes) -> Option<Verdict> {
        let mut flight = FirstFlight::new(routes.generation(), protocol);
        match flight.feed(bytes) {
            Step::More => None,
            Step::Name => Some(routes.verdict(&flight.key)),
            Step::Refuse(refusal) => Some(Verdict::Refused(refusal)),
        }
    }

    fn peeked(protocol: Protocol, bytes: &[u8], routes: &Routes) -> Option<Verdict> {
        match judge(protocol, bytes, routes) {
            Look::Verdict(verdict) => Some(verdict),
            Look::Needs { bytes: needed } => {
                assert!(needed > bytes.len());
                None
            }
        }
    }

    /// Bytes of requests and around them, so that random strings are often almost right.
    fn request() -> impl Strategy<Value = Vec<u8>> {
        const PARTS: [&[u8]; 20] = [
            b"GET ",
            b"PRI ",
            b"\r\n",
            b"\n",
            b"\r",
            b"/function/",
            b"/",
            b"echo",
            b"ECHO",
            b"%65cho",
            b"http://h:80",
            b"HTTPS://",
            b"*",
            b" ",
            b"?",
            b" HTTP/1.1\r\n",
            b"\0",
            b"\x80",
            b"\x16",
            b"AAAAAAAAAAAAAAAAAAAAAAAAA",
        ];
        let part = proptest::sample::select(&PARTS[..]);
        vec(part, 0..10).prop_map(|parts| parts.concat())
    }

    fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &(content.len() as u16).to_be_bytes(), content].concat()
    }

    fn server_name() -> impl Strategy<Value = Vec<u8>> {
        let name = prop_oneof![Just("echo.faas.local"), Just("ECHO.faas.local"), Just("x"), Just("")];
        (name, 0u8..2, -2i32..3, -2i32..3, any::<bool>()).prop_map(
            |(name, kind, list_off, name_off, exact)| {
                let (list_off, name_off) = if exact { (0, 0) } else { (list_off, name_off) };
                let length = name.len() as i32;
                let list = ((length + 3 + list_off).max(0) as u16).to_be_bytes();
                let name_length = ((length + name_off).max(0) as u16).to_be_bytes();
                extension(0, &[&list[..], &[kind * u8::from(!exact)], &name_length, name.as_bytes()].concat())
            },
        )
    }

    const RECORD_HEADER_BYTES: usize = 5;
    const RECORD_LENGTH: std::ops::Range<usize> = 3..5;

    /// What was damaged in a hello.
    #[derive(Clone, Copy, Debug)]
    struct Damage {
        at: usize,
        /// It is a record's length, so that what follows is cut into other records.
        moves_records: bool,
    }

    /// A hello in records, and what of it was damaged.
    fn hello() -> impl Strategy<Value = (Vec<u8>, Option<Damage>)> {
        let other = vec(any::<u8>(), 0..40).prop_map(|content| extension(0x0a0a, &content));
        let extensions = (vec(other.clone(), 0..3), server_name(), vec(other, 0..2))
            .prop_map(|(before, name, after)| [before.concat(), name, after.concat()].concat());
        (extensions, 0usize..34, 1usize..3, 1usize..3, 1usize..200, any::<Option<(u16, u8)>>()).prop_map(
            |(extensions, session, suites, methods, fragment, damage)| {
                let mut body = vec![3, 3];
                body.extend([7; 32]);
                body.push(session as u8);
                body.extend(vec![9; session]);
                body.extend((2 * suites as u16).to_be_bytes());
                body.extend(vec![0x13; 2 * suites]);
                body.push(methods as u8);
                body.extend(vec![0; methods]);
                body.extend((extensions.len() as u16).to_be_bytes());
                body.extend(extensions);
                let mut message = vec![1];
                message.extend(&(body.len() as u32).to_be_bytes()[1..]);
                message.extend(body);
                let mut bytes: Vec<u8> = message
                    .chunks(fragment)
                    .flat_map(|part| [&[22, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat())
                    .collect();
                let damaged = damage.map(|(at, value)| {
                    let at = usize::from(at) % bytes.len();
                    bytes[at] = value;
                    let moves_records = RECORD_LENGTH.contains(&(at % (RECORD_HEADER_BYTES + fragment)));
                    Damage { at, moves_records }
                });
                (bytes, damaged)
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn the_kernels_scanner_and_httparse_agree(bytes in request()) {
            let routes = routes();
            prop_assert_eq!(peeked(Protocol::Http, &bytes, &routes), scanned(Protocol::Http, &bytes, &routes));
        }

        #[test]
        fn the_kernels_scanner_and_tls_parser_agree((bytes, damaged) in hello()) {
            let routes = routes();
            let decided = (0..=bytes.len()).find(|&end| scanned(Protocol::Https, &bytes[..end], &routes).is_some());
            // The scanner is done at the name; tls-parser wants the whole hello, with what is broken behind the name.
            let seen_by_both = damaged.is_none_or(|damage| decided.is_none_or(|end| damage.at < end));
            if seen_by_both && let Some(verdict) = peeked(Protocol::Https, &bytes, &routes) {
                let scanned = scanned(Protocol::Https, &bytes, &routes);
                match (verdict, scanned) {
                    // One damaged byte can break a record and the hello in it; who finds which first may differ.
                    (Verdict::Refused(_), Some(Verdict::Refused(_))) if damaged.is_some() => {}
                    // The record that now ends elsewhere may hold the name, and be followed by what is no record.
                    (Verdict::Refused(_), _) if damaged.is_some_and(|damage| damage.moves_records) => {}
                    _ => prop_assert_eq!(Some(verdict), scanned),
                }
            }
        }
    }
}
