//! Carries what a function's process writes into the log, each line with the time and the instance's label.
use std::{
    convert::Infallible,
    future::pending,
    io::{self, PipeReader, Read},
};

use rustix::io::ioctl_fionbio;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::{io::unix::AsyncFd, task::yield_now};
use tracing_subscriber::fmt::{
    format,
    time::{FormatTime, SystemTime},
};

use super::lines::{Lines, append_escaped};
use crate::{
    logs::{Format, Log},
    readable::{OwnsDescriptor, watch},
};

/// What a full pipe holds by default (pipe(7)): the last words of a process that has ended.
const PIPE_BYTES: usize = 64 * 1024;

const SEPARATOR: &str = " | ";

// SAFETY: a `PipeReader` is an `OwnedFd`, which keeps its descriptor until it is dropped.
unsafe impl OwnsDescriptor for PipeReader {}

/// The end of the pipe that is the process's standard output and standard error.
pub struct Output {
    pipe: AsyncFd<PipeReader>,
    lines: Lines,
    entries: Entries,
}

impl Output {
    /// Must be called within a runtime.
    pub fn new(pipe: PipeReader, label: &str, log: Log) -> io::Result<Self> {
        ioctl_fionbio(&pipe, true)?;
        let entries = Entries { label: label.to_owned(), time: String::new(), bytes: Vec::new(), log };
        Ok(Self { pipe: watch(pipe)?, lines: Lines::new(), entries })
    }

    /// May be dropped and called again.
    pub async fn carry(&mut self) -> Infallible {
        loop {
            let Ok(mut ready) = self.pipe.readable().await else { return pending().await };
            match ready.try_io(|pipe| self.entries.carry(&mut self.lines, pipe.get_ref())) {
                // At the end, or broken: nothing comes any more.
                Ok(Ok(0) | Err(_)) => return pending().await,
                // A function that never stops writing must not keep signals and the others from their turn.
                Ok(Ok(_)) => yield_now().await,
                Err(_would_block) => {}
            }
        }
    }

    /// Carries what is there without waiting for more: a process that got away may hold the pipe open for ever.
    pub fn drain(&mut self) {
        let mut drained = 0;
        while drained < PIPE_BYTES {
            match self.entries.carry(&mut self.lines, self.pipe.get_ref()) {
                Ok(0) | Err(_) => break,
                Ok(read) => drained += read,
            }
        }
        // A line that was begun is ended here; reading nothing can't fail.
        let _ = self.entries.carry(&mut self.lines, io::empty());
    }
}

/// Makes lines into entries of the log; its buffers are used again.
struct Entries {
    label: String,
    time: String,
    bytes: Vec<u8>,
    log: Log,
}

impl Entries {
    fn carry(&mut self, lines: &mut Lines, source: impl Read) -> io::Result<usize> {
        self.time.clear();
        // In the form of the supervisor's own lines; functions leave the time to whoever reads them. A String takes all.
        let _ = SystemTime.format_time(&mut format::Writer::new(&mut self.time));
        self.bytes.clear();
        let format = self.log.format();
        let read = lines.read(source, |line| {
            match format {
                Format::Text => {
                    for part in [&self.time, " ", self.label.as_str(), SEPARATOR] {
                        self.bytes.extend_from_slice(part.as_bytes());
                    }
                    append_escaped(line, &mut self.bytes);
                }
                Format::Json => append_object(&self.time, self.label.as_str(), line, &mut self.bytes),
            }
            self.bytes.push(b'\n');
        })?;
        self.log.append(&self.bytes);
        Ok(read)
    }
}

/// A line of a function as an object; what is one already, such as an entry of the access log, stays one.
fn append_object(time: &str, function: &str, line: &[u8], out: &mut Vec<u8>) {
    #[derive(Serialize)]
    struct Entry<'a> {
        timestamp: &'a str,
        function: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        message: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        record: Option<&'a RawValue>,
    }
    let mut escaped = Vec::with_capacity(line.len());
    append_escaped(line, &mut escaped);
    let text = String::from_utf8_lossy(&escaped);
    let record = Some(&*text)
        .filter(|text| text.starts_with('{') && text.as_bytes() == line)
        .and_then(|text| serde_json::from_str::<&RawValue>(text).ok());
    let message = record.is_none().then_some(&*text);
    // Strings and what was parsed can be written, and a Vec takes all.
    let _ = serde_json::to_writer(out, &Entry { timestamp: time, function, message, record });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(line: &[u8]) -> String {
        let mut out = Vec::new();
        append_object("now", "echo", line, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_are_objects_and_objects_stay_objects() {
        for (line, expected) in [
            (&b"a \"word\""[..], r#"{"timestamp":"now","function":"echo","message":"a \"word\""}"#),
            (br#"{"status":200}"#, r#"{"timestamp":"now","function":"echo","record":{"status":200}}"#),
            (b"{half", r#"{"timestamp":"now","function":"echo","message":"{half"}"#),
            (b"{} {}", r#"{"timestamp":"now","function":"echo","message":"{} {}"}"#),
            (b"\x1b[2J\xff", r#"{"timestamp":"now","function":"echo","message":"\\u{1b}[2J\\xff"}"#),
        ] {
            assert_eq!(object(line), expected);
        }
    }
}
