//! The chunked coding (RFC 9112 §7.1), decoded from a buffer that grows.
use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::{
    limits::{CHUNK_EXTENSION_BYTES, CHUNK_LINE_BYTES, FIELDS, TRAILER_BYTES},
    reject::Reject,
};

/// Where in a chunked body the next byte stands.
#[derive(Debug, Default)]
pub struct Chunked {
    state: State,
    /// Bytes of chunk extensions so far.
    extensions: u64,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Size,
    Data(u64),
    DataEnd,
    Trailers,
    End,
}

/// What the buffer held next.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
    More,
}

impl Chunked {
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Decoded, Reject> {
        loop {
            match self.state {
                State::Size => {
                    let Some((size, extension_bytes, line_bytes)) = chunk_line(input)? else {
                        return Ok(Decoded::More);
                    };
                    self.extensions += extension_bytes;
                    if self.extensions > CHUNK_EXTENSION_BYTES {
                        return Err(Reject::bad_request("The chunk extensions are too long."));
                    }
                    input.advance(line_bytes);
                    self.state = if size == 0 { State::Trailers } else { State::Data(size) };
                }
                State::Data(_) if input.is_empty() => return Ok(Decoded::More),
                State::Data(left) => {
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                    let left = left - taken as u64;
                    self.state = if left == 0 { State::DataEnd } else { State::Data(left) };
                    return Ok(Decoded::Data(input.split_to(taken).freeze()));
                }
                State::DataEnd => match input.as_ref() {
                    [b'\r', b'\n', ..] => {
                        input.advance(2);
                        self.state = State::Size;
                    }
                    [] | [b'\r'] => return Ok(Decoded::More),
                    _ => return Err(Reject::bad_request("A chunk is longer than its size.")),
                },
                State::Trailers => {
                    let Some((trailers, length)) = trailers(input)? else { return Ok(Decoded::More) };
                    input.advance(length);
                    self.state = State::End;
                    if !trailers.is_empty() {
                        return Ok(Decoded::Trailers(trailers));
                    }
                }
                State::End => return Ok(Decoded::End),
            }
        }
    }

    pub fn is_end(&self) -> bool {
        self.state == State::End
    }

    /// How much of the current chunk is known to come.
    pub fn announced_bytes(&self) -> u64 {
        match self.state {
            State::Data(left) => left,
            _ => 0,
        }
    }
}

/// A chunk's size, the length of its extensions and of the whole line.
fn chunk_line(input: &[u8]) -> Result<Option<(u64, u64, usize)>, Reject> {
    let window = &input[..input.len().min(CHUNK_LINE_BYTES)];
    let Some(line_feed) = memchr::memchr(b'\n', window) else {
        if window.len() == CHUNK_LINE_BYTES {
            return Err(Reject::bad_request("A chunk's size line is too long."));
        }
        check_partial_line(window)?;
        return Ok(None);
    };
    let line = window[..line_feed].strip_suffix(b"\r").ok_or(BAD_SIZE)?;
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (size, extensions) = line.split_at(digits);
    if !is_extensions(extensions) {
        return Err(BAD_SIZE);
    }
    Ok(Some((hexadecimal(size)?, extensions.len() as u64, line_feed + 1)))
}

const BAD_SIZE: Reject = Reject::bad_request("A chunk's size is malformed.");

/// Garbage needn't wait for the end of its line.
fn check_partial_line(line: &[u8]) -> Result<(), Reject> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (size, rest) = line.split_at(digits);
    let blank = rest.iter().all(|byte| matches!(byte, b' ' | b'\t'));
    if !size.is_empty() {
        hexadecimal(size)?;
    }
    if (size.is_empty() && !line.is_empty()) || !(blank || is_extensions(rest)) {
        return Err(BAD_SIZE);
    }
    Ok(())
}

/// Sixteen digits are all that a u64 holds, so leading zeros can't go on for ever.
fn hexadecimal(digits: &[u8]) -> Result<u64, Reject> {
    if digits.is_empty() || digits.len() > 16 {
        return Err(BAD_SIZE);
    }
    digits.iter().try_fold(0, |size, &digit| {
        let value = char::from(digit).to_digit(16).ok_or(BAD_SIZE)?;
        Ok(size << 4 | u64::from(value))
    })
}

/// Empty, or blanks and a semicolon and whatever a field's value may hold; extensions have no meaning here.
fn is_extensions(bytes: &[u8]) -> bool {
    let start = bytes.iter().position(|byte| !matches!(byte, b' ' | b'\t')).unwrap_or(bytes.len());
    match &bytes[start..] {
        [] => bytes.is_empty(),
        [b';', rest @ ..] => rest.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..)),
        _ => false,
    }
}

/// The trailer section and its length, once its empty line is there.
fn trailers(input: &[u8]) -> Result<Option<(HeaderMap, usize)>, Reject> {
    let malformed = Reject::bad_request("The trailers are malformed.");
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let window = &input[..input.len().min(TRAILER_BYTES)];
    let (length, fields) = match httparse::parse_headers(window, &mut fields).map_err(|_| malformed)? {
        httparse::Status::Complete(complete) => complete,
        httparse::Status::Partial if window.len() == TRAILER_BYTES => {
            return Err(Reject { sentence: "The trailers are too long.", ..Reject::HEAD_TOO_LONG });
        }
        httparse::Status::Partial => return Ok(None),
    };
    let section = &window[..length];
    if memchr::memchr_iter(b'\n', section).any(|at| at == 0 || section[at - 1] != b'\r') {
        return Err(malformed);
    }
    let mut trailers = HeaderMap::new();
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| malformed)?;
        // RFC 9110 §6.5.1: what frames or routes a message comes too late in a trailer, so it is dropped.
        if FORBIDDEN_TRAILERS.contains(&name) {
            continue;
        }
        trailers.append(name, HeaderValue::from_bytes(field.value).map_err(|_| malformed)?);
    }
    Ok(Some((trailers, length)))
}

pub const FORBIDDEN_TRAILERS: [HeaderName; 8] = [
    header::TRANSFER_ENCODING,
    header::CONTENT_LENGTH,
    header::HOST,
    header::CONNECTION,
    header::UPGRADE,
    header::TRAILER,
    header::EXPECT,
    header::AUTHORIZATION,
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A body's data, its trailers, what follows it, and whether it ended.
    type Decodes = (Vec<u8>, Option<HeaderMap>, Vec<u8>, bool);

    fn decode_all(pieces: &[&[u8]]) -> Result<Decodes, Reject> {
        let mut chunked = Chunked::default();
        let mut input = BytesMut::new();
        let (mut data, mut trailers, mut ended) = (Vec::new(), None, false);
        for piece in pieces {
            input.extend_from_slice(piece);
            loop {
                match chunked.decode(&mut input)? {
                    Decoded::Data(bytes) => data.extend_from_slice(&bytes),
                    Decoded::Trailers(fields) => trailers = Some(fields),
                    Decoded::More => break,
                    Decoded::End => {
                        ended = true;
                        break;
                    }
                }
            }
        }
        Ok((data, trailers, input.to_vec(), ended))
    }

    #[test]
    fn every_cut_gives_the_same_body() {
        let body = b"5;x=\"y\"\r\nhello\r\n00A \t;z\r\n, chunked!\r\n0\r\nx-sum: 1\r\nhost: evil\r\n\r\nGET";
        for cut in 0..=body.len() {
            let (data, trailers, rest, ended) = decode_all(&[&body[..cut], &body[cut..]]).unwrap();
            assert_eq!(data, b"hello, chunked!");
            let trailers = trailers.unwrap();
            assert_eq!(trailers.len(), 1);
            assert_eq!(trailers["x-sum"], "1");
            assert_eq!((rest.as_slice(), ended), (&b"GET"[..], true));
        }
    }

    #[test]
    fn what_is_malformed_is_refused_whole_or_in_pieces() {
        for body in [
            &b"\r\n"[..],
            b"g\r\n",
            b"-1\r\n",
            b"+1\r\na\r\n",
            b"0x1\r\na\r\n",
            b" 1\r\na\r\n",
            b"1 \r\na\r\n",
            b"1\na\r\n",
            b"1\r\nab\r\n",
            b"1\r\na\n0\r\n\r\n",
            b"1\r\na\rx",
            b"1;a\rb\r\nx",
            b"1;a\0b\r\nx",
            b"1 x\r\n",
            b"10000000000000000\r\n",
            b"00000000000000001\r\na",
            b"0\r\n\nx",
            b"0\r\nx: y\n\r\n",
            b"0\r\nx : y\r\n\r\n",
            b"0\r\n x: y\r\n\r\n",
        ] {
            assert!(decode_all(&[body]).is_err(), "{}", body.escape_ascii());
            let bytes: Vec<_> = body.chunks(1).collect();
            assert!(decode_all(&bytes).is_err(), "{}", body.escape_ascii());
        }
    }

    #[test]
    fn framing_that_costs_more_than_it_carries_is_refused() {
        let long_line = [b"1;".as_slice(), &[b'x'; CHUNK_LINE_BYTES]].concat();
        assert!(decode_all(&[&long_line]).is_err());
        let chunk = [b"1;".as_slice(), &[b'x'; 500], b"\r\na\r\n"].concat();
        assert!(decode_all(&[chunk.as_slice(); 30]).is_ok());
        assert!(decode_all(&[chunk.as_slice(); 40]).is_err());
        let trailers = [b"0\r\n".as_slice(), &b"a: b\r\n".repeat(TRAILER_BYTES / 6 + 1)].concat();
        assert!(decode_all(&[&trailers]).is_err());
    }

    proptest! {
        #[test]
        fn any_chunks_in_any_pieces(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..300), 0..8),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let mut coded = Vec::new();
            for chunk in &chunks {
                coded.extend_from_slice(format!("{:X}\r\n", chunk.len()).as_bytes());
                coded.extend_from_slice(chunk);
                coded.extend_from_slice(b"\r\n");
            }
            coded.extend_from_slice(b"0\r\n\r\n");
            let mut offsets: Vec<usize> = cuts.iter().map(|cut| cut.index(coded.len())).collect();
            offsets.extend([0, coded.len()]);
            offsets.sort_unstable();
            let pieces: Vec<_> = offsets.windows(2).map(|pair| &coded[pair[0]..pair[1]]).collect();
            let (data, trailers, rest, ended) = decode_all(&pieces).unwrap();
            prop_assert_eq!(data, chunks.concat());
            prop_assert!(trailers.is_none() && rest.is_empty() && ended);
        }
    }
}
