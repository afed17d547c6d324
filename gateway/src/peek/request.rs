//! The verdict of a request line, by httparse and the shared classifier of targets.
use common::{
    Protocol, Refusal, Verdict,
    limits::{EMPTY_LINES, METHOD_BYTES},
    route::RouteKey,
    target::{TargetScan, TargetStep},
};

use super::Look;
use crate::routes::Routes;

/// The first byte of a TLS record with a handshake.
const TLS_HANDSHAKE: u8 = 22;

pub fn judge(bytes: &[u8], routes: &Routes) -> Look {
    if bytes.first() == Some(&TLS_HANDSHAKE) {
        return refuse(Refusal::OtherProtocol);
    }
    let Some(line) = after_empty_lines(bytes) else { return refuse(Refusal::Malformed) };
    let mut headers = [];
    let mut request = httparse::Request::new(&mut headers);
    // The method is all that is asked of httparse: what is wrong further on is the function's to answer.
    let parsed = request.parse(line);
    let Some(method) = request.method else {
        let too_long = line.len() > usize::from(METHOD_BYTES);
        return if parsed.is_err() || too_long { refuse(Refusal::Malformed) } else { more(bytes) };
    };
    if method.len() > usize::from(METHOD_BYTES) {
        return refuse(Refusal::Malformed);
    }
    let target = line.get(method.len() + 1..).unwrap_or_default();
    classify(method, target, routes).unwrap_or_else(|| more(bytes))
}

fn classify(method: &str, target: &[u8], routes: &Routes) -> Option<Look> {
    let mut scan = TargetScan::new();
    let mut key = RouteKey::empty(routes.generation(), Protocol::Http);
    for &byte in target {
        match scan.step(byte) {
            TargetStep::More => {}
            TargetStep::NameByte => {
                key.push(byte);
            }
            TargetStep::NameEnd => return Some(Look::Verdict(routes.verdict(&key))),
            TargetStep::Other if method == "PRI" => return Some(refuse(Refusal::UnsupportedVersion)),
            TargetStep::Other | TargetStep::NotFound => return Some(refuse(Refusal::NoFunction)),
            TargetStep::TooLong => return Some(refuse(Refusal::TooLong)),
            TargetStep::Malformed => return Some(refuse(Refusal::Malformed)),
        }
    }
    None
}

/// What follows the empty lines that RFC 9112 §2.2 asks to tolerate; `None` when they are too many or broken.
fn after_empty_lines(mut bytes: &[u8]) -> Option<&[u8]> {
    for _ in 0..=EMPTY_LINES {
        bytes = match bytes {
            [b'\r', b'\n', rest @ ..] | [b'\n', rest @ ..] => rest,
            [b'\r'] => return Some(&[]),
            [b'\r', ..] => return None,
            line => return Some(line),
        };
    }
    None
}

fn refuse(refusal: Refusal) -> Look {
    Look::Verdict(Verdict::Refused(refusal))
}

fn more(bytes: &[u8]) -> Look {
    Look::Needs { bytes: bytes.len() + 1 }
}
