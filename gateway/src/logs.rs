//! Writes log lines to where logs go, without making anybody wait for whoever reads them.
use std::{
    io::{self, Write},
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

/// What waits for a reader that is slow, such as a terminal that is held; more is dropped, because who waits for his
/// log serves nobody.
const QUEUE_BYTES: usize = 1024 * 1024;

/// How long the end waits for a reader that may have stopped reading.
const FINISH_PATIENCE: Duration = Duration::from_secs(1);

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// An object a line, for what collects logs.
    Json,
}

/// The thread that writes.
pub struct Logs {
    log: Log,
    finished: mpsc::Receiver<()>,
}

/// Where lines are given in.
#[derive(Clone)]
pub struct Log(Arc<Shared>);

struct Shared {
    format: Format,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    /// Lines.
    dropped: usize,
    closed: bool,
}

impl Logs {
    pub fn to(mut output: impl Write + Send + 'static, format: Format) -> io::Result<Self> {
        let log = Log(Arc::new(Shared { format, queue: Mutex::default(), changed: Condvar::new() }));
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
    pub fn format(&self) -> Format {
        self.0.format
    }

    /// Takes whole lines, or drops them if there is no room.
    pub fn append(&self, lines: &[u8]) {
        if lines.is_empty() {
            return;
        }
        let mut queue = self.0.lock();
        if queue.bytes.len() + lines.len() > QUEUE_BYTES {
            queue.dropped += lines.iter().filter(|&&byte| byte == b'\n').count();
            return;
        }
        queue.report_dropped(self.0.format);
        queue.bytes.extend_from_slice(lines);
        drop(queue);
        self.0.changed.notify_one();
    }
}

/// One call for whole lines, as tracing-subscriber makes it.
impl Write for Log {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.append(lines);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Queue {
    fn report_dropped(&mut self, format: Format) {
        let dropped = mem::take(&mut self.dropped);
        if dropped > 0 {
            let text = "lines were dropped here, because this log is read too slowly";
            let report = match format {
                Format::Text => format!("{dropped} {text}\n"),
                Format::Json => {
                    format!("{{\"level\":\"WARN\",\"message\":\"{text}\",\"dropped\":{dropped}}}\n")
                }
            };
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
                queue.report_dropped(self.format);
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
        let logs = Logs::to(writer, Format::Text).unwrap();
        give(&logs.log());
        (logs, reader)
    }

    fn line(log: &Log, text: &[u8]) {
        log.clone().write_all(&[text, b"\n"].concat()).unwrap();
    }

    #[test]
    fn lines_are_written_in_order() {
        let (logs, mut reader) = through_a_pipe(|log| {
            line(log, b"one");
            log.append(b"two\n3\n");
            line(log, b"");
        });
        logs.finish();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one\ntwo\n3\n\n");
    }

    #[test]
    fn a_log_that_nobody_reads_makes_nobody_wait() {
        let entry = [b'x'; 8000];
        let given = 1000;
        // More than the queue and the pipe hold together; returns although nobody reads.
        let (logs, mut reader) = through_a_pipe(|log| (0..given).for_each(|_| line(log, &entry)));
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
        assert!(dropped > 0 && lines.iter().all(|line| line.len() == entry.len()));
        assert_eq!(dropped + lines.len(), given);
    }

    #[test]
    fn a_log_that_can_not_be_written_ends_all_the_same() {
        let (logs, reader) = through_a_pipe(|_| ());
        drop(reader);
        line(&logs.log(), b"lost");
        logs.finish();
    }
}
