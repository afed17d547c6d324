//! The status page: counters that an instance writes and the gateway reads without a message or a system call.
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
};

use crate::{
    Counters, Counts, Error,
    shared::{PAGE_BYTES, Read, Shared, Written},
};

pub const STATUS_PAGE_BYTES: usize = PAGE_BYTES;

const COUNTED_BYTES: usize = 16 + size_of::<Counters>();

/// Shared memory, so both ends agree on it as they do on a message; native byte order, as it never leaves the host.
#[repr(C)]
struct Page {
    taken: AtomicU64,
    open: AtomicU32,
    draining: AtomicU32,
    counters: Counters,
    /// Zero; counters to come begin here.
    reserved: [AtomicU8; STATUS_PAGE_BYTES - COUNTED_BYTES],
}

const _: () = assert!(size_of::<Page>() == STATUS_PAGE_BYTES && align_of::<Page>() <= 16);

// SAFETY: it is as large as a page and made of atomics, which the reader below loads with `Relaxed`.
unsafe impl Shared for Page {}

/// The instance's side; its drop leaves the last values to the reader.
pub struct StatusWriter(Written);

impl StatusWriter {
    pub fn create() -> Result<Self, Error> {
        Written::create("pointsman-status").map(Self).map_err(Error::CreateStatusPage)
    }

    /// Counts connections that came out of the pool connection's queue.
    pub(crate) fn add_taken(&self, connections: usize) {
        self.page().taken.fetch_add(connections as u64, Relaxed);
    }

    /// How many connections the worker has open, whichever way they came.
    pub fn set_open(&self, connections: u32) {
        self.page().open.store(connections, Relaxed);
    }

    /// Asks the gateway to choose others from now on.
    pub fn set_draining(&self) {
        self.page().draining.store(1, Relaxed);
    }

    /// The counters of what the worker does; its thread alone writes them.
    pub fn counters(&self) -> &Counters {
        &self.page().counters
    }

    fn page(&self) -> &Page {
        self.0.get()
    }
}

impl AsFd for StatusWriter {
    /// The memory, to be passed to the reader.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The gateway's side; works on after the instance's death.
pub struct StatusReader(Read);

impl StatusReader {
    /// Maps memory that an instance sent; the descriptor is closed, the map stays.
    pub(crate) fn open(memory: OwnedFd) -> Result<Self, Error> {
        Read::open(memory).map(Self).map_err(|reason| Error::StatusPage { reason })
    }

    /// Connections that came out of the pool connection's queue so far.
    pub fn taken(&self) -> u64 {
        self.page().taken.load(Relaxed)
    }

    /// Connections that the worker has open.
    pub fn open_connections(&self) -> u32 {
        self.page().open.load(Relaxed)
    }

    /// Whether the worker wants no more connections.
    pub fn draining(&self) -> bool {
        self.page().draining.load(Relaxed) != 0
    }

    /// What the worker has counted so far.
    pub fn counts(&self) -> Counts {
        self.page().counters.read()
    }

    fn page(&self) -> &Page {
        self.0.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Kind, Method};
    use std::time::Duration;

    fn reader_of(writer: &StatusWriter) -> StatusReader {
        StatusReader::open(writer.as_fd().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn the_reader_sees_what_the_writer_wrote_last() {
        let writer = StatusWriter::create().unwrap();
        let reader = reader_of(&writer);
        assert_eq!((reader.taken(), reader.open_connections(), reader.draining()), (0, 0, false));
        writer.add_taken(64);
        writer.add_taken(1);
        writer.set_open(7);
        writer.set_draining();
        assert_eq!((reader.taken(), reader.open_connections(), reader.draining()), (65, 7, true));
        writer.counters().request(Kind::new(Method::Get, 200), Duration::from_millis(3));
        drop(writer);
        assert_eq!((reader.taken(), reader.open_connections()), (65, 7));
        assert_eq!(reader.counts().requests[&Kind::new(Method::Get, 200)].count(), 1);
    }
}
