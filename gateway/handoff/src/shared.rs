//! A page of memory that one process writes and others read, and whose size nobody can change.
use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use memmap2::{Advice, Mmap, MmapMut, MmapOptions};
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create},
    io::Errno,
};

/// One page of the smallest size that Linux has.
pub const PAGE_BYTES: usize = 4096;

/// A page that could shrink would kill its reader by SIGBUS, and one that could lose its seals could shrink.
const NEEDED_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// What a page can hold.
///
/// # Safety
/// The type has `PAGE_BYTES` bytes, and consists of atomic integers alone, because another process may change any of it. Of
/// what comes from a `Read` they are only loaded, and only with `Relaxed`: the memory is read-only.
pub unsafe trait Shared {}

/// The writer's side; its drop leaves the last values to the readers.
pub struct Written {
    map: MmapMut,
    memory: OwnedFd,
}

impl Written {
    /// A page of zeros; the name is for whoever looks at the process's memory.
    pub fn create(name: &str) -> io::Result<Self> {
        let memory = create_memfd(name)?;
        ftruncate(&memory, PAGE_BYTES as u64)?;
        // SAFETY: the memory is this process's own and not yet known to another one; its size is fixed by the seals
        // below before it is, and its values are only used as atomics.
        let map = unsafe { MmapOptions::new().len(PAGE_BYTES).map_mut(&memory) }?;
        // What is in it is of no use to whoever reads a core dump, or too much.
        map.advise(Advice::DontDump)?;
        // The map above stays writable; FUTURE_WRITE keeps everybody else from making another one that is.
        fcntl_add_seals(&memory, NEEDED_SEALS | SealFlags::FUTURE_WRITE)?;
        Ok(Self { map, memory })
    }

    /// Keeps the page out of the swap, where the host lets this process do so.
    pub fn lock(self) -> Self {
        let _ = self.map.lock();
        self
    }

    pub fn get<T: Shared>(&self) -> &T {
        // SAFETY: the map has the size of a page, is aligned to one, and lives as long as `self`; the rest is promised
        // by the type.
        unsafe { &*self.map.as_ptr().cast::<T>() }
    }
}

impl AsFd for Written {
    /// The memory, to be passed to a reader.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

/// A reader's side; works on after the writer's death.
pub struct Read {
    map: Mmap,
}

impl Read {
    /// Maps memory that another process passed; the descriptor is closed, the map stays. The error says what is wrong
    /// with it.
    pub fn open(memory: OwnedFd) -> Result<Self, String> {
        let seals = fcntl_get_seals(&memory).map_err(|errno| format!("it has no seals: {errno}"))?;
        if !seals.contains(NEEDED_SEALS) {
            return Err(format!("it can still change its size (seals {:#x})", seals.bits()));
        }
        let size = fstat(&memory).map_err(|errno| format!("its size is unknown: {errno}"))?.st_size;
        if size != PAGE_BYTES as i64 {
            return Err(format!("it has {size} bytes instead of {PAGE_BYTES}"));
        }
        // SAFETY: the seals checked above fix the size for good, so no access can fault; the other process may change
        // the values at any time, and they are only read as atomics.
        let map = unsafe { MmapOptions::new().len(PAGE_BYTES).map(&File::from(memory)) }
            .and_then(|map| map.advise(Advice::DontDump).map(|()| map))
            .map_err(|error| format!("it can't be mapped: {error}"))?;
        Ok(Self { map })
    }

    /// Keeps the page out of the swap, where the host lets this process do so.
    pub fn lock(self) -> Self {
        let _ = self.map.lock();
        self
    }

    pub fn get<T: Shared>(&self) -> &T {
        // SAFETY: as in the writer; the map is read-only and so is every access, as the type promises.
        unsafe { &*self.map.as_ptr().cast::<T>() }
    }
}

fn create_memfd(name: &str) -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 doesn't know the flag.
        Err(Errno::INVAL) => memfd_create(name, flags),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn nobody_else_can_change_the_page() {
        let written = Written::create("test").unwrap();
        let mut file = File::from(written.as_fd().try_clone_to_owned().unwrap());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(2 * PAGE_BYTES as u64).is_err());
        assert!(file.write(&[1]).is_err());
        // SAFETY: a map that is never read.
        assert!(unsafe { MmapOptions::new().map_mut(&file) }.is_err());
    }

    #[test]
    fn memory_that_could_change_its_size_is_refused() {
        for (size, seals) in [
            (PAGE_BYTES, SealFlags::empty()),
            (PAGE_BYTES, SealFlags::SHRINK | SealFlags::GROW),
            (PAGE_BYTES, SealFlags::GROW | SealFlags::SEAL),
            (PAGE_BYTES - 1, NEEDED_SEALS),
            (2 * PAGE_BYTES, NEEDED_SEALS),
            (0, NEEDED_SEALS),
        ] {
            let memory = create_memfd("test").unwrap();
            ftruncate(&memory, size as u64).unwrap();
            fcntl_add_seals(&memory, seals).unwrap();
            assert!(Read::open(memory).is_err(), "{size} {seals:?}");
        }
    }

    #[test]
    fn other_kinds_of_files_are_refused() {
        for file in [File::open("/dev/zero").unwrap(), tempfile::tempfile().unwrap()] {
            assert!(Read::open(file.into()).is_err());
        }
    }
}
