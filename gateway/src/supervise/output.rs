//! Carries what a function's process writes into the log, each line with the time and the instance's label.
use std::{
    convert::Infallible,
    future::pending,
    io::{self, PipeReader, Read},
};

use rustix::io::ioctl_fionbio;
use tokio::{io::unix::AsyncFd, task::yield_now};
use tracing_subscriber::fmt::{
    format,
    time::{FormatTime, SystemTime},
};

use super::lines::{Lines, append_escaped};
use crate::{
    logs::Log,
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
        let read = lines.read(source, |line| {
            for part in [&self.time, " ", self.label.as_str(), SEPARATOR] {
                self.bytes.extend_from_slice(part.as_bytes());
            }
            append_escaped(line, &mut self.bytes);
            self.bytes.push(b'\n');
        })?;
        self.log.append(&self.bytes);
        Ok(read)
    }
}
