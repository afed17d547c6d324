//! A response's head and the framing of its body, as bytes.
use std::io::Write;

use bytes::{BufMut, BytesMut};
use http::{
    HeaderMap, HeaderName, Method, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, DATE, TRANSFER_ENCODING},
    response::Parts,
};

use super::{chunked::FORBIDDEN_TRAILERS, date, reject::Reject};

/// How a response's body is delimited (RFC 9112 §6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// There is no body, whatever the fields say.
    None {
        length: Option<u64>,
    },
    Length(u64),
    Chunked,
    /// HTTP/1.0 has no other way for a body of unknown length.
    UntilClose,
}

/// What a response says about the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// HTTP/1.1 goes on by default.
    Default,
    /// HTTP/1.0 goes on because it was asked to.
    KeepAlive,
    Close,
    Upgrade,
}

impl Persistence {
    /// How a connection that is kept says so.
    pub fn kept(version: Version) -> Self {
        if version == Version::HTTP_10 { Self::KeepAlive } else { Self::Default }
    }
}

const HOP_BY_HOP: HeaderName = HeaderName::from_static("keep-alive");

/// A guess at a head's size, so that writing it allocates once.
const HEAD_BYTES: usize = 256;

impl Coding {
    /// `exact_bytes` is what the body itself knows of its length, which wins over what the handler wrote.
    pub fn of(method: &Method, version: Version, head: &Parts, exact_bytes: Option<u64>) -> Self {
        let declared = declared_length(&head.headers);
        match head.status {
            // RFC 9110 §8.6: these have no Content-Length.
            status if status.is_informational() || status == StatusCode::NO_CONTENT => {
                Self::None { length: None }
            }
            StatusCode::NOT_MODIFIED => Self::None { length: declared },
            // A handler that left the body out doesn't mean that GET's body is empty.
            _ if method == Method::HEAD => {
                Self::None { length: declared.or(exact_bytes.filter(|&length| length > 0)) }
            }
            _ => match exact_bytes.or(declared) {
                Some(length) => Self::Length(length),
                None if version == Version::HTTP_11 => Self::Chunked,
                None => Self::UntilClose,
            },
        }
    }

    /// The framing of an answer that is one sentence.
    pub fn for_reject(method: &Method, reject: Reject) -> Self {
        let length = reject.text_bytes();
        if method == Method::HEAD { Self::None { length: Some(length) } } else { Self::Length(length) }
    }
}

fn declared_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The handler's own wish to end the connection.
pub fn asks_to_close(headers: &HeaderMap) -> bool {
    headers.get_all(CONNECTION).iter().any(|value| {
        value
            .as_bytes()
            .split(|&byte| byte == b',')
            .any(|option| option.trim_ascii().eq_ignore_ascii_case(b"close"))
    })
}

/// Writes the head; fields that frame the message are this side's, not the handler's.
pub fn write_head(out: &mut BytesMut, head: &Parts, coding: Coding, persistence: Persistence) {
    out.reserve(HEAD_BYTES);
    write_status(out, head.status);
    for (name, value) in &head.headers {
        if matches!(*name, CONTENT_LENGTH | TRANSFER_ENCODING | CONNECTION) || *name == HOP_BY_HOP {
            continue;
        }
        write_field(out, name.as_str().as_bytes(), value.as_bytes());
    }
    match coding {
        Coding::Length(length) | Coding::None { length: Some(length) } => write_length(out, length),
        Coding::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        Coding::UntilClose | Coding::None { length: None } => {}
    }
    match persistence {
        Persistence::Default => {}
        Persistence::KeepAlive => out.extend_from_slice(b"connection: keep-alive\r\n"),
        Persistence::Close => out.extend_from_slice(b"connection: close\r\n"),
        Persistence::Upgrade => out.extend_from_slice(b"connection: upgrade\r\n"),
    }
    if !head.headers.contains_key(DATE) {
        write_field(out, b"date", &date::now());
    }
    out.extend_from_slice(b"\r\n");
}

fn write_status(out: &mut BytesMut, status: StatusCode) {
    if status == StatusCode::OK {
        out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
        return;
    }
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(status.as_str().as_bytes());
    out.extend_from_slice(b" ");
    out.extend_from_slice(status.canonical_reason().unwrap_or_default().as_bytes());
    out.extend_from_slice(b"\r\n");
}

fn write_field(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    out.reserve(name.len() + value.len() + 4);
    out.put_slice(name);
    out.put_slice(b": ");
    out.put_slice(value);
    out.put_slice(b"\r\n");
}

fn write_length(out: &mut BytesMut, length: u64) {
    out.extend_from_slice(b"content-length: ");
    write_number(out, format_args!("{length}\r\n"));
}

/// A chunk's size line.
pub fn write_chunk_size(out: &mut BytesMut, bytes: usize) {
    write_number(out, format_args!("{bytes:x}\r\n"));
}

/// The end of a chunked body.
pub fn write_last_chunk(out: &mut BytesMut, trailers: &HeaderMap) {
    out.extend_from_slice(b"0\r\n");
    for (name, value) in trailers.iter().filter(|(name, _)| !FORBIDDEN_TRAILERS.contains(name)) {
        write_field(out, name.as_str().as_bytes(), value.as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}

fn write_number(out: &mut BytesMut, number: std::fmt::Arguments<'_>) {
    // Writing to memory that grows can't fail.
    let _ = out.writer().write_fmt(number);
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;

    fn head(build: impl FnOnce(http::response::Builder) -> http::response::Builder) -> Parts {
        build(Response::builder()).body(()).unwrap().into_parts().0
    }

    fn coding(method: Method, version: Version, head: &Parts, exact_bytes: Option<u64>) -> Coding {
        Coding::of(&method, version, head, exact_bytes)
    }

    #[test]
    fn the_body_decides_how_it_is_framed() {
        let (get, one) = (|| Method::GET, Version::HTTP_11);
        let plain = head(|head| head);
        assert_eq!(coding(get(), one, &plain, Some(5)), Coding::Length(5));
        assert_eq!(coding(get(), one, &plain, None), Coding::Chunked);
        assert_eq!(coding(get(), Version::HTTP_10, &plain, None), Coding::UntilClose);
        let declared = head(|head| head.header("content-length", "7"));
        assert_eq!(coding(get(), one, &declared, None), Coding::Length(7));
        assert_eq!(coding(get(), one, &declared, Some(5)), Coding::Length(5));
        assert_eq!(coding(Method::HEAD, one, &declared, Some(0)), Coding::None { length: Some(7) });
        assert_eq!(coding(Method::HEAD, one, &plain, Some(0)), Coding::None { length: None });
        assert_eq!(coding(Method::HEAD, one, &plain, Some(9)), Coding::None { length: Some(9) });
        let no_content = head(|head| head.status(204).header("content-length", "7"));
        assert_eq!(coding(get(), one, &no_content, Some(5)), Coding::None { length: None });
        let not_modified = head(|head| head.status(304).header("content-length", "7"));
        assert_eq!(coding(get(), one, &not_modified, Some(0)), Coding::None { length: Some(7) });
    }

    #[test]
    fn framing_fields_of_a_handler_never_get_out() {
        let head = head(|head| {
            head.status(404)
                .header("transfer-encoding", "gzip")
                .header("content-length", "1")
                .header("connection", "X")
                .header("keep-alive", "timeout=5")
                .header("date", "now")
                .header("x-a", "b")
        });
        let mut out = BytesMut::new();
        write_head(&mut out, &head, Coding::Length(12), Persistence::Close);
        let expected = "HTTP/1.1 404 Not Found\r\ndate: now\r\nx-a: b\r\ncontent-length: 12\r\nconnection: close\r\n\r\n";
        assert_eq!(out, expected);
    }
}
