//! Cuts what a function writes into lines that are safe to show.
use std::io::{self, Read};

/// Longer lines are cut into pieces; generous for a log, small for a function that never ends its line.
const LINE_BYTES: usize = 8 * 1024;

/// What was read and is not yet a whole line.
pub struct Lines {
    buffer: Box<[u8; LINE_BYTES]>,
    filled: usize,
}

impl Lines {
    pub fn new() -> Self {
        Self { buffer: Box::new([0; LINE_BYTES]), filled: 0 }
    }

    /// Reads once and gives every line that is complete by then; at the end what is left, too. Returns the number of
    /// bytes read, 0 at the end.
    pub fn read(&mut self, mut source: impl Read, mut line: impl FnMut(&[u8])) -> io::Result<usize> {
        let read = source.read(&mut self.buffer[self.filled..])?;
        self.filled += read;
        let mut rest = &self.buffer[..self.filled];
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            line(&rest[..end]);
            rest = &rest[end + 1..];
        }
        if !rest.is_empty() && (read == 0 || rest.len() == LINE_BYTES) {
            line(rest);
            rest = &[];
        }
        let left = rest.len();
        self.buffer.copy_within(self.filled - left..self.filled, 0);
        self.filled = left;
        Ok(read)
    }
}

/// Appends a line without what a terminal would obey or could not show: clients can make functions log what they like.
pub fn append_escaped(line: &[u8], out: &mut Vec<u8>) {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    for chunk in line.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character.is_control() && character != '\t' {
                out.extend(character.escape_default().map(|escaped| escaped as u8));
            } else {
                out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
        for byte in chunk.invalid() {
            out.extend(std::ascii::escape_default(*byte));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let mut lines = Lines::new();
        let mut found = Vec::new();
        for piece in pieces.iter().chain(&[&b""[..]]) {
            let mut piece = *piece;
            loop {
                let read =
                    lines.read(&mut piece, |line| found.push(String::from_utf8_lossy(line).into_owned()));
                if read.unwrap() == 0 || piece.is_empty() {
                    break;
                }
            }
        }
        found
    }

    fn escaped(line: &[u8]) -> String {
        let mut out = Vec::new();
        append_escaped(line, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_are_the_same_however_they_arrive() {
        let text = b"one\n\ntwo words\nlast without end";
        for cut in 0..text.len() {
            assert_eq!(lines(&[&text[..cut], &text[cut..]]), ["one", "", "two words", "last without end"]);
        }
    }

    #[test]
    fn a_line_that_never_ends_comes_in_pieces() {
        let long = vec![b'x'; 2 * LINE_BYTES + 1];
        let pieces = lines(&[&long, b"\nnext\n"]);
        assert_eq!(pieces.iter().map(String::len).collect::<Vec<_>>(), [LINE_BYTES, LINE_BYTES, 1, 4]);
        let full = [vec![b'x'; LINE_BYTES - 1], vec![b'\n']].concat();
        assert_eq!(lines(&[&full]), ["x".repeat(LINE_BYTES - 1)]);
    }

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        assert_eq!(escaped("tab\tand grüße".as_bytes()), "tab\tand grüße");
        assert_eq!(escaped(b"\x1b[2Jgone\x07\r"), "\\u{1b}[2Jgone\\u{7}");
        assert_eq!(escaped("\u{9b}31m".as_bytes()), "\\u{9b}31m");
        assert_eq!(escaped(b"\xff\xc3"), "\\xff\\xc3");
        assert_eq!(escaped(b"a\rb"), "a\\rb");
    }
}
