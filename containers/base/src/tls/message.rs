//! The handshake messages a client may send after the handshake: reassembled in constant space, however they are cut.

use super::fault::Fault;
use super::secrets::Version;

const CLIENT_HELLO: u8 = 1;
const KEY_UPDATE: u8 = 24;

/// A KeyUpdate with its header is the longest message whose bytes matter.
pub(super) const KEPT_BYTES_MAX: usize = 5;

/// A renegotiating ClientHello is skipped, not parsed, but it must end; the first one had the same bound.
pub(super) const SKIPPED_BYTES_MAX: u32 = common::limits::CLIENT_HELLO_BYTES;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    KeyUpdate { requested: bool },
    Renegotiation,
}

/// What is there of a message that hasn't ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Partial {
    Begun { kept: [u8; KEPT_BYTES_MAX], kept_bytes: u8 },
    Skipping { rest_bytes: u32 },
}

impl Partial {
    /// Between two messages.
    pub(super) const NONE: Self = Self::Begun { kept: [0; KEPT_BYTES_MAX], kept_bytes: 0 };

    pub(super) fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    /// Takes bytes off the front of one record's content until a message is complete or nothing is left.
    pub(super) fn next(&mut self, content: &mut &[u8], version: Version) -> Result<Option<Message>, Fault> {
        while !content.is_empty() {
            let complete = match self {
                Self::Begun { kept, kept_bytes } => {
                    kept[usize::from(*kept_bytes)] = content[0];
                    *kept_bytes += 1;
                    *content = &content[1..];
                    let kept = &kept[..usize::from(*kept_bytes)];
                    match judge(kept, version)? {
                        Judgement::Complete(message) => Some(message),
                        Judgement::Incomplete => None,
                        Judgement::Skip { rest_bytes } => {
                            *self = Self::Skipping { rest_bytes };
                            None
                        }
                    }
                }
                Self::Skipping { rest_bytes } => {
                    let skipped = content.len().min(*rest_bytes as usize);
                    *rest_bytes -= skipped as u32;
                    *content = &content[skipped..];
                    (*rest_bytes == 0).then_some(Message::Renegotiation)
                }
            };
            if complete.is_some() {
                *self = Self::NONE;
                return Ok(complete);
            }
        }
        Ok(None)
    }
}

enum Judgement {
    Incomplete,
    Complete(Message),
    Skip { rest_bytes: u32 },
}

/// Judges each byte as soon as it is there, so that a message which will be refused is never waited for.
fn judge(kept: &[u8], version: Version) -> Result<Judgement, Fault> {
    use Judgement::{Complete, Incomplete, Skip};
    match (version, kept) {
        (Version::Tls13, [KEY_UPDATE, 0, 0, 1, 0]) => Ok(Complete(Message::KeyUpdate { requested: false })),
        (Version::Tls13, [KEY_UPDATE, 0, 0, 1, 1]) => Ok(Complete(Message::KeyUpdate { requested: true })),
        (Version::Tls13, [KEY_UPDATE, 0, 0, 1, _]) => {
            Err(Fault::IllegalParameter("the request of a KeyUpdate"))
        }
        (Version::Tls13, [KEY_UPDATE] | [KEY_UPDATE, 0] | [KEY_UPDATE, 0, 0] | [KEY_UPDATE, 0, 0, 1]) => {
            Ok(Incomplete)
        }
        (Version::Tls13, [KEY_UPDATE, ..]) => Err(Fault::Decode("the length of a KeyUpdate")),
        (Version::Tls12, [CLIENT_HELLO] | [CLIENT_HELLO, _] | [CLIENT_HELLO, _, _]) => Ok(Incomplete),
        (Version::Tls12, [CLIENT_HELLO, high, middle, low]) => {
            match u32::from_be_bytes([0, *high, *middle, *low]) {
                rest_bytes @ 1..=SKIPPED_BYTES_MAX => Ok(Skip { rest_bytes }),
                _ => Err(Fault::Decode("the length of a ClientHello")),
            }
        }
        // Tickets come from servers only, and a certificate is never asked for.
        _ => Err(Fault::UnexpectedMessage("a handshake message")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(partial: &mut Partial, mut content: &[u8], version: Version) -> Result<Vec<Message>, Fault> {
        let mut messages = Vec::new();
        while let Some(message) = partial.next(&mut content, version)? {
            messages.push(message);
        }
        assert!(content.is_empty());
        Ok(messages)
    }

    fn hello(body_bytes: usize) -> Vec<u8> {
        let mut hello = vec![CLIENT_HELLO];
        hello.extend_from_slice(&(body_bytes as u32).to_be_bytes()[1..]);
        hello.resize(hello.len() + body_bytes, 0xc5);
        hello
    }

    #[test]
    fn messages_cut_anywhere_are_the_same_messages() {
        let update = [KEY_UPDATE, 0, 0, 1, 1];
        let cases = [
            (Version::Tls13, update.to_vec(), Message::KeyUpdate { requested: true }),
            (Version::Tls12, hello(300), Message::Renegotiation),
        ];
        for (version, bytes, expected) in cases {
            for cut in 0..=bytes.len() {
                let mut partial = Partial::NONE;
                let mut messages = feed(&mut partial, &bytes[..cut], version).unwrap();
                assert_eq!(partial.is_none(), cut == 0 || cut == bytes.len(), "cut at {cut}");
                messages.extend(feed(&mut partial, &bytes[cut..], version).unwrap());
                assert_eq!(messages, [expected], "cut at {cut}");
                assert!(partial.is_none());
            }
        }
    }

    #[test]
    fn several_messages_in_a_row_are_told_apart() {
        let bytes = [hello(1), hello(SKIPPED_BYTES_MAX as usize), hello(70)].concat();
        let mut partial = Partial::NONE;
        let messages = feed(&mut partial, &bytes, Version::Tls12).unwrap();
        assert_eq!(messages, [Message::Renegotiation; 3]);
    }

    #[test]
    fn what_a_client_may_not_send_is_refused_at_the_byte_that_shows_it() {
        let unexpected = Fault::UnexpectedMessage("a handshake message");
        let length = Fault::Decode("the length of a KeyUpdate");
        let cases: [(Version, &[u8], Fault); 8] = [
            (Version::Tls13, &[CLIENT_HELLO], unexpected),
            (Version::Tls13, &[4], unexpected),
            (Version::Tls12, &[KEY_UPDATE], unexpected),
            (Version::Tls12, &[0], unexpected),
            (Version::Tls13, &[KEY_UPDATE, 0, 0, 2], length),
            (Version::Tls13, &[KEY_UPDATE, 1], length),
            (
                Version::Tls13,
                &[KEY_UPDATE, 0, 0, 1, 2],
                Fault::IllegalParameter("the request of a KeyUpdate"),
            ),
            (Version::Tls12, &[CLIENT_HELLO, 0, 0x40, 1], Fault::Decode("the length of a ClientHello")),
        ];
        for (version, bytes, fault) in cases {
            let (last, before) = bytes.split_last().unwrap();
            let mut partial = Partial::NONE;
            assert_eq!(feed(&mut partial, before, version), Ok(vec![]), "{bytes:x?}");
            assert_eq!(feed(&mut partial, &[*last], version), Err(fault), "{bytes:x?}");
        }
    }
}
