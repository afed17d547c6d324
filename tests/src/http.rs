//! The answers of an HTTP/1.1 server, decoded as they arrive.
use anyhow::{Context, Result, bail, ensure};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub status: u16,
    /// The minor version: 0 or 1.
    pub version: u8,
    /// Names in lower case.
    pub fields: Vec<(String, String)>,
}

impl Head {
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub head: Head,
    pub body: Vec<u8>,
}

impl Response {
    pub fn status(&self) -> u16 {
        self.head.status
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Head(Head),
    Data(Vec<u8>),
    /// The answer is complete; the next one may follow.
    End,
}

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Head,
    Sized(u64),
    ChunkSize,
    Chunk(u64),
    ChunkEnd,
    Trailers,
    UntilClose,
    End,
}

/// Bytes in, events out; one decoder serves a connection for life.
pub struct Decoder {
    input: Vec<u8>,
    position: usize,
    expect: Expect,
    /// Whether the request was HEAD, to which an answer has no body.
    pub to_head: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { input: Vec::new(), position: 0, expect: Expect::Head, to_head: false }
    }
}

impl Decoder {
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.drain(..self.position);
        self.position = 0;
        self.input.extend_from_slice(bytes);
    }

    /// True between answers, when no byte of a next one has come.
    pub fn is_idle(&self) -> bool {
        self.expect == Expect::Head && self.position == self.input.len()
    }

    /// The peer has closed: a body without a length is complete, anything else is cut.
    pub fn close(&mut self) -> Result<()> {
        match self.expect {
            Expect::UntilClose => self.expect = Expect::End,
            _ => ensure!(
                self.is_idle(),
                "the connection was closed in the middle of an answer ({:?})",
                self.expect
            ),
        }
        Ok(())
    }

    pub fn next_event(&mut self) -> Result<Option<Event>> {
        loop {
            let input = &self.input[self.position..];
            match self.expect {
                Expect::Head => return self.head(),
                Expect::End => {
                    self.expect = Expect::Head;
                    return Ok(Some(Event::End));
                }
                Expect::Sized(0) => self.expect = Expect::End,
                Expect::Chunk(0) => self.expect = Expect::ChunkEnd,
                Expect::Sized(_) | Expect::Chunk(_) | Expect::UntilClose if input.is_empty() => {
                    return Ok(None);
                }
                Expect::Sized(left) | Expect::Chunk(left) => {
                    let length = input.len().min(usize::try_from(left)?);
                    let data = input[..length].to_vec();
                    self.position += length;
                    let left = left - length as u64;
                    self.expect = if let Expect::Sized(_) = self.expect {
                        Expect::Sized(left)
                    } else {
                        Expect::Chunk(left)
                    };
                    return Ok(Some(Event::Data(data)));
                }
                Expect::UntilClose => {
                    let data = input.to_vec();
                    self.position = self.input.len();
                    return Ok(Some(Event::Data(data)));
                }
                Expect::ChunkSize => {
                    let Some(line) = self.line() else { return Ok(None) };
                    let size = line.split(';').next().unwrap_or_default();
                    let size =
                        u64::from_str_radix(size, 16).with_context(|| format!("chunk size {line:?}"))?;
                    self.expect = if size == 0 { Expect::Trailers } else { Expect::Chunk(size) };
                }
                Expect::ChunkEnd => {
                    let Some(line) = self.line() else { return Ok(None) };
                    ensure!(line.is_empty(), "{line:?} where a chunk ends");
                    self.expect = Expect::ChunkSize;
                }
                Expect::Trailers => {
                    let Some(line) = self.line() else { return Ok(None) };
                    if line.is_empty() {
                        self.expect = Expect::End;
                    }
                }
            }
        }
    }

    fn line(&mut self) -> Option<String> {
        let input = &self.input[self.position..];
        let end = input.windows(2).position(|pair| pair == b"\r\n")?;
        let line = String::from_utf8_lossy(&input[..end]).into_owned();
        self.position += end + 2;
        Some(line)
    }

    fn head(&mut self) -> Result<Option<Event>> {
        let mut fields = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut fields);
        let input = &self.input[self.position..];
        let status = response.parse(input);
        let length = match status.with_context(|| format!("answer {:?}", String::from_utf8_lossy(input)))? {
            httparse::Status::Partial => return Ok(None),
            httparse::Status::Complete(length) => length,
        };
        let field = |field: &httparse::Header<'_>| {
            (field.name.to_ascii_lowercase(), String::from_utf8_lossy(field.value).into_owned())
        };
        let head = Head {
            status: response.code.unwrap_or_default(),
            version: response.version.unwrap_or_default(),
            fields: response.headers.iter().map(field).collect(),
        };
        self.position += length;
        self.expect = self.body_of(&head)?;
        Ok(Some(Event::Head(head)))
    }

    /// The length of a body (RFC 9112 §6.3).
    fn body_of(&self, head: &Head) -> Result<Expect> {
        if self.to_head && head.status >= 200 || matches!(head.status, 100..=199 | 204 | 304) {
            return Ok(Expect::End);
        }
        match (head.field("transfer-encoding"), head.field("content-length")) {
            (Some(_), Some(_)) => bail!("an answer with both framings: {head:?}"),
            (Some(coding), None) => {
                ensure!(coding == "chunked", "transfer coding {coding}");
                Ok(Expect::ChunkSize)
            }
            (None, Some(length)) => Ok(Expect::Sized(length.parse().context("content-length")?)),
            (None, None) => Ok(Expect::UntilClose),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8], cut: usize) -> Vec<Event> {
        let mut decoder = Decoder::default();
        let mut events = Vec::new();
        for part in [&bytes[..cut], &bytes[cut..]] {
            decoder.feed(part);
            while let Some(event) = decoder.next_event().unwrap() {
                match (events.last_mut(), event) {
                    (Some(Event::Data(before)), Event::Data(data)) => before.extend(data),
                    (_, event) => events.push(event),
                }
            }
        }
        assert!(decoder.is_idle());
        events
    }

    #[test]
    fn answers_are_the_same_in_any_cut() {
        let bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n\
            Transfer-Encoding: chunked\r\n\r\n2;x\r\nde\r\n1\r\nf\r\n0\r\nTrailer: 1\r\n\r\nHTTP/1.1 204 No\r\n\r\n";
        let whole = decode(bytes, 0);
        let data: Vec<_> = whole.iter().filter(|event| matches!(event, Event::Data(_))).collect();
        assert_eq!(data, [&Event::Data(b"abc".to_vec()), &Event::Data(b"def".to_vec())]);
        assert_eq!(whole.iter().filter(|&event| *event == Event::End).count(), 3);
        for cut in 0..=bytes.len() {
            assert_eq!(decode(bytes, cut), whole);
        }
    }

    #[test]
    fn a_cut_answer_is_not_a_complete_one() {
        let mut decoder = Decoder::default();
        decoder.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab");
        while decoder.next_event().unwrap().is_some() {}
        assert!(decoder.close().is_err());
    }
}
