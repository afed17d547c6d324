//! The access log: a line of JSON for each answer, on standard output.
use std::{
    cell::RefCell,
    io::{self, Write},
    net::SocketAddr,
    os::fd::AsFd,
    rc::Rc,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use tokio::{task::spawn_local, time::sleep};

use crate::socket::Socket;

/// What a pipe takes whole or not at all (PIPE_BUF, pipe(7)), so that lines of several workers don't mix, and what it
/// surely has room for when it says that it is writable.
const BATCH_BYTES: usize = 4096;

/// Lines wait this long for others to be written with.
const BATCH_TIME: Duration = Duration::from_millis(100);

/// A longer path would not fit into a batch with everything else.
const PATH_BYTES: usize = 1024;

/// One per worker.
#[derive(Clone, Default)]
pub struct AccessLog(Rc<RefCell<Batch>>);

#[derive(Default)]
struct Batch {
    lines: Vec<u8>,
    /// Lines that nobody took; whoever waits for his log serves nobody.
    dropped: u64,
    scheduled: bool,
}

/// A request and its answer. What could not be read of the request is left out.
#[derive(Serialize)]
pub struct Entry<'a> {
    pub method: Option<&'a str>,
    /// Without the query, which may hold what is not for a log.
    pub path: Option<&'a str>,
    pub status: Option<u16>,
    /// Of the answer's body.
    pub bytes: u64,
    pub duration_us: u64,
    pub peer: Option<SocketAddr>,
}

/// The client's address, as it was written to connect: IPv4 also on a listener for both families.
pub fn peer(socket: &Socket) -> Option<SocketAddr> {
    let address = socket.peer().ok()?.get()?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

impl AccessLog {
    /// Must be called within a worker.
    pub fn write(&self, mut entry: Entry<'_>) {
        entry.path = entry.path.map(|path| &path[..path.floor_char_boundary(PATH_BYTES)]);
        let mut line = Vec::with_capacity(256);
        if serde_json::to_writer(&mut line, &entry).is_err() {
            return;
        }
        line.push(b'\n');
        let mut batch = self.0.borrow_mut();
        if batch.lines.len() + line.len() > BATCH_BYTES {
            batch.flush();
        }
        batch.lines.extend_from_slice(&line);
        if !batch.scheduled {
            batch.scheduled = true;
            spawn_local(flush_soon(self.clone()));
        }
    }
}

/// Until all is written, and what could not be is reported.
async fn flush_soon(log: AccessLog) {
    loop {
        sleep(BATCH_TIME).await;
        let mut batch = log.0.borrow_mut();
        batch.flush();
        if batch.dropped == 0 {
            batch.scheduled = false;
            return;
        }
    }
}

impl Batch {
    fn flush(&mut self) {
        if self.dropped > 0 && write(format!("{{\"dropped\":{}}}\n", self.dropped).as_bytes()) {
            self.dropped = 0;
        }
        if !self.lines.is_empty() && !write(&self.lines) {
            self.dropped += self.lines.iter().filter(|&&byte| byte == b'\n').count() as u64;
        }
        self.lines.clear();
    }
}

/// Whoever stops with a worker writes what is left.
impl Drop for Batch {
    fn drop(&mut self) {
        if !self.lines.is_empty() {
            self.flush();
        }
    }
}

/// Writes a batch to standard output, if that takes it at once.
fn write(batch: &[u8]) -> bool {
    // What one worker sees room for, another must not fill.
    static WRITING: Mutex<()> = Mutex::new(());
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let stdout = io::stdout();
    if !is_writable(&stdout) {
        return false;
    }
    let mut stdout = stdout.lock();
    stdout.write_all(batch).and_then(|()| stdout.flush()).is_ok()
}

fn is_writable(output: &impl AsFd) -> bool {
    let mut files = [PollFd::new(output.as_fd(), PollFlags::POLLOUT)];
    poll(&mut files, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        && files[0].revents().is_some_and(|events| events.contains(PollFlags::POLLOUT))
}
