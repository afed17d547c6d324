//! The verdict of a ClientHello, by tls-parser.
use common::{
    Protocol, Refusal, Verdict,
    limits::{CLIENT_HELLO_BYTES, TLS_PLAINTEXT_BYTES},
    route::RouteKey,
};
use tls_parser::{
    TlsClientHelloContents, TlsExtension, TlsMessage, TlsMessageHandshake, TlsRecordType,
    parse_tls_extension_sni_content, parse_tls_message_handshake, parse_tls_record_header,
};

use super::Look;
use crate::routes::Routes;

const RECORD_HEADER_BYTES: usize = 5;
const MESSAGE_HEADER_BYTES: usize = 4;
const MESSAGE_CLIENT_HELLO: u8 = 1;
const VERSION_MAJOR: u8 = 3;
const EXTENSION_SERVER_NAME: u16 = 0;
const NAME_TYPE_HOST: u8 = 0;

pub fn judge(bytes: &[u8], routes: &Routes) -> Look {
    match message(bytes) {
        Err(Short::Needs { bytes }) => Look::Needs { bytes },
        Err(Short::Refused(refusal)) => Look::Verdict(Verdict::Refused(refusal)),
        Ok(message) => Look::Verdict(match server_name(&message) {
            Err(refusal) => Verdict::Refused(refusal),
            Ok(name) => match RouteKey::new(routes.generation(), Protocol::Https, &name.to_ascii_lowercase())
            {
                Some(key) => routes.verdict(&key),
                None => Verdict::Refused(Refusal::NoFunction),
            },
        }),
    }
}

/// A look puts the message together anew. Waiting for one part in so many more keeps all looks together linear in what
/// is sent, into however many records that is cut.
const PARTS_A_LOOK: usize = 8;

/// Why there is no complete handshake message.
enum Short {
    Needs { bytes: usize },
    Refused(Refusal),
}

/// The first handshake message, put together from its records.
fn message(bytes: &[u8]) -> Result<Vec<u8>, Short> {
    let mut message = Vec::new();
    let mut rest = bytes;
    let mut missing_bytes = 0;
    let needs = |next_bytes: usize, missing_bytes: usize| {
        let share = (bytes.len() / PARTS_A_LOOK).min(missing_bytes);
        Short::Needs { bytes: next_bytes.max(bytes.len() + share) }
    };
    loop {
        check_header_prefix(rest, message.is_empty()).map_err(Short::Refused)?;
        let consumed = bytes.len() - rest.len();
        let Ok((fragment, header)) = parse_tls_record_header(rest) else {
            return Err(needs(consumed + RECORD_HEADER_BYTES, missing_bytes));
        };
        if header.len == 0 || header.len > TLS_PLAINTEXT_BYTES {
            return Err(Short::Refused(Refusal::Malformed));
        }
        let length = usize::from(header.len);
        message.extend(&fragment[..length.min(fragment.len())]);
        if let Some(total) = message_bytes(&message).map_err(Short::Refused)? {
            if message.len() >= total {
                message.truncate(total);
                return Ok(message);
            }
            missing_bytes = total - message.len();
        }
        let Some((_, next)) = fragment.split_at_checked(length) else {
            return Err(needs(consumed + RECORD_HEADER_BYTES + length, missing_bytes));
        };
        rest = next;
    }
}

/// What can be said of a record's header before all of it is there.
fn check_header_prefix(record: &[u8], first: bool) -> Result<(), Refusal> {
    match record {
        [kind, ..] if *kind != u8::from(TlsRecordType::Handshake) => {
            Err(if first && kind.is_ascii_alphabetic() {
                Refusal::OtherProtocol
            } else {
                Refusal::UnexpectedMessage
            })
        }
        [_, major, ..] if *major != VERSION_MAJOR => Err(Refusal::Malformed),
        _ => Ok(()),
    }
}

/// How long the message is with its header, once that is known.
fn message_bytes(message: &[u8]) -> Result<Option<usize>, Refusal> {
    if message.first().is_some_and(|&kind| kind != MESSAGE_CLIENT_HELLO) {
        return Err(Refusal::UnexpectedMessage);
    }
    let [_, high, middle, low, ..] = *message else { return Ok(None) };
    let length = u32::from_be_bytes([0, high, middle, low]);
    if length > CLIENT_HELLO_BYTES {
        return Err(Refusal::TooLong);
    }
    Ok(Some(MESSAGE_HEADER_BYTES + length as usize))
}

fn server_name(message: &[u8]) -> Result<&[u8], Refusal> {
    let hello = match parse_tls_message_handshake(message) {
        Ok((_, TlsMessage::Handshake(TlsMessageHandshake::ClientHello(hello)))) => hello,
        _ => return Err(Refusal::Malformed),
    };
    if hello.ciphers.is_empty() || hello.comp.is_empty() {
        return Err(Refusal::Malformed);
    }
    let mut extensions = extensions(message, &hello)?;
    while let Some((kind, content, rest)) = split_extension(extensions)? {
        if kind == EXTENSION_SERVER_NAME {
            return host_name(content);
        }
        extensions = rest;
    }
    Err(Refusal::NoFunction)
}

/// tls-parser takes extensions that do not fill the message for none at all.
fn extensions<'a>(message: &[u8], hello: &TlsClientHelloContents<'a>) -> Result<&'a [u8], Refusal> {
    let before = MESSAGE_HEADER_BYTES
        + 2
        + 32
        + 1
        + hello.session_id.map_or(0, <[u8]>::len)
        + 2
        + 2 * hello.ciphers.len()
        + 1
        + hello.comp.len();
    match hello.ext {
        None if before == message.len() => Ok(&[]),
        Some(extensions) if before + 2 + extensions.len() == message.len() => Ok(extensions),
        _ => Err(Refusal::Malformed),
    }
}

/// An extension's type and content, and the extensions behind it.
type Extension<'a> = (u16, &'a [u8], &'a [u8]);

fn split_extension(extensions: &[u8]) -> Result<Option<Extension<'_>>, Refusal> {
    let [kind_high, kind_low, length_high, length_low, rest @ ..] = extensions else {
        return if extensions.is_empty() { Ok(None) } else { Err(Refusal::Malformed) };
    };
    let length = usize::from(u16::from_be_bytes([*length_high, *length_low]));
    let (content, rest) = rest.split_at_checked(length).ok_or(Refusal::Malformed)?;
    Ok(Some((u16::from_be_bytes([*kind_high, *kind_low]), content, rest)))
}

/// The one host name of a server_name extension (RFC 6066 §3).
fn host_name(content: &[u8]) -> Result<&[u8], Refusal> {
    let list = match content {
        [] => return Err(Refusal::NoFunction),
        [high, low, list @ ..] if usize::from(u16::from_be_bytes([*high, *low])) == list.len() => list,
        _ => return Err(Refusal::Malformed),
    };
    match list {
        [] => return Err(Refusal::NoFunction),
        [_] | [_, _] => return Err(Refusal::Malformed),
        [kind, ..] if *kind != NAME_TYPE_HOST => return Err(Refusal::IllegalParameter),
        _ => {}
    }
    let Ok((_, TlsExtension::SNI(names))) = parse_tls_extension_sni_content(content) else {
        return Err(Refusal::Malformed);
    };
    match names.first() {
        None => Err(Refusal::Malformed),
        // A second name, or what is left of one.
        Some((_, name)) if 3 + name.len() < list.len() => Err(Refusal::IllegalParameter),
        Some((_, [])) => Err(Refusal::NoFunction),
        Some((_, name)) => Ok(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often a flight is looked at that comes a byte at a time.
    fn looks(flight: &[u8]) -> usize {
        let routes = Routes::new(1, [("echo".parse().unwrap(), ["echo.faas.local"])]).unwrap();
        let mut arrived = 1;
        for looks in 1.. {
            match judge(&flight[..arrived], &routes) {
                Look::Verdict(verdict) => {
                    assert_eq!(verdict, Verdict::Refused(Refusal::NoFunction));
                    return looks;
                }
                Look::Needs { bytes } => {
                    assert!(arrived < bytes && bytes <= flight.len(), "{bytes} of {}", flight.len());
                    arrived = bytes;
                }
            }
        }
        unreachable!("a flight has an end");
    }

    /// A hello without a name, in records of this many bytes.
    fn hello(message_length: u16, record_bytes: usize) -> Vec<u8> {
        let padding_bytes = message_length - (2 + 32 + 1 + 4 + 2 + 2 + 4);
        let mut message =
            [&[MESSAGE_CLIENT_HELLO, 0][..], &message_length.to_be_bytes(), &[3, 3], &[7; 32]].concat();
        message.extend([0, 0, 2, 0x13, 1, 1, 0]);
        message.extend((padding_bytes + 4).to_be_bytes());
        message.extend([0, 21]);
        message.extend(padding_bytes.to_be_bytes());
        message.extend(vec![0; padding_bytes.into()]);
        let record = |part: &[u8]| [&[22, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat();
        message.chunks(record_bytes).flat_map(record).collect()
    }

    #[test]
    fn a_flight_in_many_records_is_looked_at_few_times_and_never_waited_for_beyond_its_end() {
        for record_bytes in [1, 2, 3, 100, 16_000] {
            for message_length in [60, 300, 16_000] {
                let looks = looks(&hello(message_length, record_bytes));
                assert!(looks < 150, "{looks} looks at {message_length} bytes in records of {record_bytes}");
            }
        }
    }
}
