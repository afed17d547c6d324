//! Carries the functions' lines to where logs go, without making a function or the supervisor wait for it.
use std::{
    io::{self, Write},
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

use super::lines::append_escaped;

/// What waits for a reader that is slow; more is dropped, because a function that waits for its log serves nobody.
const QUEUE_BYTES: usize = 1024 * 1024;

/// How long the end waits for a reader that has stopped reading.
const FINISH_PATIENCE: Duration = Duration::from_secs(1);

/// The thread that writes.
pub struct Logs {
    log: Log,
    finished: mpsc::Receiver<()>,
}

/// Where lines are given in.
#[derive(Clone)]
pub struct Log(Arc<Shared>);

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    dropped: u64,
    closed: bool,
}

impl Logs {
    pub fn to(mut output: impl Write + Send + 'static) -> io::Result<Self> {
        let log = Log(Arc::default());
        let (writing, finished) = mpsc::channel();
        let shared = Arc::clone(&log.0);
        thread::Builder::new().name("logs".to_owned()).spawn(move || {
            shared.write_all(&mut output);
            drop(writing);
        })?;
        Ok(Self { log, finished })
    }

    pub fn log(&self) -> Log {
        self.log.clone()
    }

    /// Writes what is left.
    pub fn finish(self) {
        self.log.0.lock().closed = true;
        self.log.0.changed.notify_one();
        // An error says that the thread is through, or that nobody reads: both end the wait.
        let _ = self.finished.recv_timeout(FINISH_PATIENCE);
    }
}

impl Log {
    pub fn line(&self, name: &str, line: &[u8]) {
        let mut queue = self.0.lock();
        // The most that escaping makes of a byte is 6, `\u{1b}`.
        let room = QUEUE_BYTES.saturating_sub(queue.bytes.len());
        if name.len() + 6 * line.len() > room {
            queue.dropped += 1;
            return;
        }
        queue.report_dropped();
        queue.bytes.extend_from_slice(name.as_bytes());
        queue.bytes.extend_from_slice(b" | ");
        append_escaped(line, &mut queue.bytes);
        queue.bytes.push(b'\n');
        drop(queue);
        self.0.changed.notify_one();
    }
}

impl Queue {
    fn report_dropped(&mut self) {
        let dropped = mem::take(&mut self.dropped);
        if dropped > 0 {
            let report = format!(
                "{dropped} lines of the functions were dropped here, because this log is read too slowly\n"
            );
            self.bytes.extend_from_slice(report.as_bytes());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing that is done under the lock leaves the queue half changed.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_all(&self, output: &mut impl Write) {
        let mut bytes = Vec::new();
        loop {
            let mut queue = self.lock();
            while queue.bytes.is_empty() && !queue.closed {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            if queue.closed {
                queue.report_dropped();
            }
            if queue.bytes.is_empty() {
                return;
            }
            mem::swap(&mut bytes, &mut queue.bytes);
            drop(queue);
            // A log that can't be written has no place where that could be said.
            let _ = output.write_all(&bytes).and_then(|()| output.flush());
            bytes.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, Read, pipe};

    use super::*;

    fn through_a_pipe(give: impl FnOnce(&Log)) -> (Logs, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        let logs = Logs::to(writer).unwrap();
        give(&logs.log());
        (logs, reader)
    }

    #[test]
    fn lines_carry_the_functions_name_in_order() {
        let (logs, mut reader) = through_a_pipe(|log| {
            log.line("echo", b"one");
            log.line("hello", b"\x1btwo\r");
            log.line("echo", b"");
        });
        logs.finish();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "echo | one\nhello | \\u{1b}two\necho | \n");
    }

    #[test]
    fn a_log_that_nobody_reads_makes_nobody_wait() {
        let line = [b'x'; 8000];
        let given = 1000;
        // More than the queue and the pipe hold together; returns although nobody reads.
        let (logs, mut reader) = through_a_pipe(|log| (0..given).for_each(|_| log.line("echo", &line)));
        let reading = thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        logs.finish();
        let text = reading.join().unwrap();
        let (reports, lines): (Vec<_>, Vec<_>) =
            text.lines().partition(|line| line.contains("were dropped here"));
        let dropped: usize =
            reports.iter().map(|line| line.split(' ').next().unwrap().parse::<usize>().unwrap()).sum();
        assert!(dropped > 0 && lines.iter().all(|line| line.len() == "echo | ".len() + 8000));
        assert_eq!(dropped + lines.len(), given);
    }

    #[test]
    fn a_log_that_can_not_be_written_ends_all_the_same() {
        let (logs, reader) = through_a_pipe(|_| ());
        drop(reader);
        logs.log().line("echo", b"lost");
        logs.finish();
    }
}
