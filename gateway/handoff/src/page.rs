//! The status page: counters that an instance writes and the gateway reads without a message or a system call.
use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};

use memmap2::{Mmap, MmapMut, MmapOptions};
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create},
    io::Errno,
};

use crate::{Counters, Counts, Error};

/// One page of the smallest size that Linux has.
pub const STATUS_PAGE_BYTES: usize = 4096;

/// A page that could shrink would kill its reader by SIGBUS, and one that could lose its seals could shrink.
const NEEDED_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

const COUNTED_BYTES: usize = 16 + size_of::<Counters>();

/// Shared memory, so both ends agree on it as they do on a message; native byte order, as it never leaves the host.
#[repr(C)]
struct Page {
    taken: AtomicU64,
    open: AtomicU32,
    draining: AtomicU32,
    counters: Counters,
    /// Zero; counters to come begin here.
    reserved: [u8; STATUS_PAGE_BYTES - COUNTED_BYTES],
}

const _: () = assert!(size_of::<Page>() == STATUS_PAGE_BYTES && align_of::<Page>() <= 16);

/// The instance's side; its drop leaves the last values to the reader.
pub struct StatusWriter {
    map: MmapMut,
    memory: OwnedFd,
}

impl StatusWriter {
    pub fn create() -> Result<Self, Error> {
        let memory = create_memfd().map_err(|errno| Error::CreateStatusPage(errno.into()))?;
        ftruncate(&memory, STATUS_PAGE_BYTES as u64)
            .map_err(|errno| Error::CreateStatusPage(errno.into()))?;
        // SAFETY: the memory is this process's own and not yet known to another one; its size is fixed by the seals
        // below before it is, and its values are only used as atomics.
        let map = unsafe { MmapOptions::new().len(STATUS_PAGE_BYTES).map_mut(&memory) }
            .map_err(Error::CreateStatusPage)?;
        // The map above stays writable; FUTURE_WRITE keeps everybody else from making another one that is.
        fcntl_add_seals(&memory, NEEDED_SEALS | SealFlags::FUTURE_WRITE)
            .map_err(|errno| Error::CreateStatusPage(errno.into()))?;
        Ok(Self { map, memory })
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
        // SAFETY: the map has the size of a page, is aligned to one, lives as long as `self`, and all bytes are valid
        // for the plain integers in `Page`; those that change are atomics.
        unsafe { &*self.map.as_ptr().cast::<Page>() }
    }
}

impl AsFd for StatusWriter {
    /// The memory, to be passed to the reader.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

/// The gateway's side; works on after the instance's death.
pub struct StatusReader {
    map: Mmap,
}

impl StatusReader {
    /// Maps memory that an instance sent; the descriptor is closed, the map stays.
    pub(crate) fn open(memory: OwnedFd) -> Result<Self, Error> {
        let unusable = |reason: String| Error::StatusPage { reason };
        let seals =
            fcntl_get_seals(&memory).map_err(|errno| unusable(format!("it has no seals: {errno}")))?;
        if !seals.contains(NEEDED_SEALS) {
            return Err(unusable(format!("it can still change its size (seals {:#x})", seals.bits())));
        }
        let size = fstat(&memory).map_err(|errno| unusable(format!("its size is unknown: {errno}")))?.st_size;
        if size != STATUS_PAGE_BYTES as i64 {
            return Err(unusable(format!("it has {size} bytes instead of {STATUS_PAGE_BYTES}")));
        }
        // SAFETY: the seals checked above fix the size for good, so no access can fault; the other process may change
        // the values at any time, and they are only read as atomics.
        let map = unsafe { MmapOptions::new().len(STATUS_PAGE_BYTES).map(&File::from(memory)) }
            .map_err(|error| unusable(format!("it can't be mapped: {error}")))?;
        Ok(Self { map })
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
        // SAFETY: as in the writer; the map is read-only and so is every access.
        unsafe { &*self.map.as_ptr().cast::<Page>() }
    }
}

fn create_memfd() -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create("pointsman-status", flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 doesn't know the flag.
        Err(Errno::INVAL) => memfd_create("pointsman-status", flags),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Kind, Method};
    use std::{io::Write, time::Duration};

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

    #[test]
    fn nobody_else_can_change_the_page() {
        let writer = StatusWriter::create().unwrap();
        let mut file = File::from(writer.as_fd().try_clone_to_owned().unwrap());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(2 * STATUS_PAGE_BYTES as u64).is_err());
        assert!(file.write(&[1]).is_err());
        // SAFETY: a map that is never read.
        assert!(unsafe { MmapOptions::new().map_mut(&file) }.is_err());
    }

    #[test]
    fn memory_that_could_change_its_size_is_refused() {
        for (size, seals) in [
            (STATUS_PAGE_BYTES, SealFlags::empty()),
            (STATUS_PAGE_BYTES, SealFlags::SHRINK | SealFlags::GROW),
            (STATUS_PAGE_BYTES, SealFlags::GROW | SealFlags::SEAL),
            (STATUS_PAGE_BYTES - 1, NEEDED_SEALS),
            (2 * STATUS_PAGE_BYTES, NEEDED_SEALS),
            (0, NEEDED_SEALS),
        ] {
            let memory = create_memfd().unwrap();
            ftruncate(&memory, size as u64).unwrap();
            fcntl_add_seals(&memory, seals).unwrap();
            assert!(matches!(StatusReader::open(memory), Err(Error::StatusPage { .. })), "{size} {seals:?}");
        }
    }

    #[test]
    fn other_kinds_of_files_are_refused() {
        for file in [File::open("/dev/zero").unwrap(), tempfile::tempfile().unwrap()] {
            assert!(matches!(StatusReader::open(file.into()), Err(Error::StatusPage { .. })));
        }
    }
}
