//! Requests as bytes, and answers as they come.

use anyhow::{Context, Result, bail};

use super::order::Request;
use super::stream::Stream;

/// No side sends a longer head.
const HEAD_BYTES: usize = 8 * 1024;
const FIELDS: usize = 32;

pub fn get(request: &Request, close: bool) -> Vec<u8> {
    head("GET", request, if close { "Connection: close\r\n" } else { "" })
}

pub fn post(request: &Request, bytes: u64) -> Vec<u8> {
    head("POST", request, &format!("Content-Length: {bytes}\r\n"))
}

fn head(method: &str, request: &Request, fields: &str) -> Vec<u8> {
    let Request { host, target } = request;
    format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: pointsman-bench\r\n{fields}\r\n")
        .into()
}

/// Reads answers; its buffer outlives them.
pub struct Reader {
    buffer: Box<[u8]>,
}

/// What a head says of its body.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    head_bytes: usize,
    content_bytes: Option<u64>,
}

impl Reader {
    pub fn new() -> Self {
        Self { buffer: vec![0; 64 * 1024].into() }
    }

    /// Reads an answer whole and gives its body's length; `progress` hears of each piece of it. What isn't 200 is an
    /// error.
    pub async fn answer(&mut self, stream: &mut Stream, mut progress: impl FnMut(u64)) -> Result<u64> {
        let mut filled = 0;
        let head = loop {
            if filled == HEAD_BYTES {
                bail!("the answer's head is too long");
            }
            match stream.read(&mut self.buffer[filled..]).await? {
                0 => bail!("the connection ended before the answer"),
                length => filled += length,
            }
            if let Some(head) = parse(&self.buffer[..filled])? {
                break head;
            }
        };
        if head.status != 200 {
            bail!("status {}", head.status);
        }
        let length = head.content_bytes.context("the answer has no Content-Length")?;
        let mut body = (filled - head.head_bytes) as u64;
        progress(body);
        while body < length {
            match stream.read(&mut self.buffer).await? {
                0 => bail!("the connection ended in the answer"),
                piece => {
                    body += piece as u64;
                    progress(piece as u64);
                }
            }
        }
        if body > length {
            bail!("more came than the answer");
        }
        Ok(body)
    }

    /// Reads until the other end closes.
    pub async fn end(&mut self, stream: &mut Stream) -> Result<()> {
        while stream.read(&mut self.buffer).await? > 0 {}
        Ok(())
    }
}

fn parse(bytes: &[u8]) -> Result<Option<Head>> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(head_bytes) = response.parse(bytes).context("the answer's head")? else {
        return Ok(None);
    };
    let status = response.code.context("an answer without a status")?;
    let length = response.headers.iter().find(|field| field.name.eq_ignore_ascii_case("content-length"));
    let content_bytes = length
        .map(|field| str::from_utf8(field.value)?.parse().context("the answer's Content-Length"))
        .transpose()?;
    Ok(Some(Head { status, head_bytes, content_bytes }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_whole_or_not_yet() {
        let text = b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\nHello";
        for end in 0..text.len() - 5 {
            assert_eq!(parse(&text[..end]).unwrap(), None);
        }
        let head = parse(text).unwrap().unwrap();
        assert_eq!(head, Head { status: 200, head_bytes: text.len() - 5, content_bytes: Some(12) });
        assert!(parse(b"SSH-2.0\r\n\r\n").is_err());
    }
}
