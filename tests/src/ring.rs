//! A BPF ring buffer that looks full to the programs that write into it.
use std::{
    ffi::c_void,
    io,
    num::NonZeroUsize,
    ptr::NonNull,
    sync::atomic::{AtomicUsize, Ordering},
};

use nix::{
    sys::mman::{MapFlags, ProtFlags, mmap, munmap},
    unistd::{SysconfVar, sysconf},
};

use crate::bpf::Map;

/// While it lives, the reader seems to be a whole buffer behind. The real reader must stand still.
///
/// The first page of the mapping is the reader's position, which user space may write; the second one is the
/// writer's (kernel/bpf/ringbuf.c).
pub struct Full {
    page_bytes: usize,
    base: NonNull<c_void>,
    position: usize,
}

impl Full {
    pub fn new(ring: &Map) -> io::Result<Self> {
        let page_bytes = sysconf(SysconfVar::PAGE_SIZE)?.expect("there is a page size") as usize;
        let length = NonZeroUsize::new(page_bytes).expect("a page has bytes");
        let map = |protection, offset| {
            // SAFETY: a new mapping at an address that the kernel chooses.
            unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, ring, offset) }
        };
        let producer = map(ProtFlags::PROT_READ, page_bytes as i64)?;
        let written = counter(&producer).load(Ordering::Acquire);
        unmap(producer, page_bytes);
        let base = map(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, 0)?;
        let position = counter(&base).swap(written.wrapping_sub(ring.max_entries), Ordering::AcqRel);
        Ok(Self { page_bytes, base, position })
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        counter(&self.base).store(self.position, Ordering::Release);
        unmap(self.base, self.page_bytes);
    }
}

fn counter(page: &NonNull<c_void>) -> &AtomicUsize {
    // SAFETY: the page is mapped while its pointer is here, begins with a word, and the kernel changes that as one.
    unsafe { page.cast().as_ref() }
}

fn unmap(page: NonNull<c_void>, bytes: usize) {
    // SAFETY: nothing refers to the page any more.
    unsafe { munmap(page, bytes) }.expect("the page is mapped");
}
