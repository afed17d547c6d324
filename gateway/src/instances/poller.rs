//! An epoll of the pool connections and of the directory's watch; itself readable when one of them is.
use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::unix::AsyncFd;

use crate::readable::{self, OwnsDescriptor};

/// Events that one turn takes up; the next turn goes on.
const BATCH: usize = 64;

/// The key of the directory's watch; no pool connection has it.
const DIRECTORY: u64 = u64::MAX;

pub struct Poller {
    epoll: Epoll,
}

/// What became readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Directory,
    /// The pool connection of this number of the instance in this slot.
    Pool {
        slot: u32,
        serial: u32,
    },
}

impl Poller {
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    /// Must be called within a runtime.
    pub fn into_async(self) -> io::Result<AsyncFd<Self>> {
        readable::watch(self)
    }

    /// Watches until the descriptor is closed; level-triggered, because an event may be left for the next turn.
    pub fn watch(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, source.key()))?;
        Ok(())
    }

    /// Appends what is readable; true when there may be more.
    pub fn readable(&self, sources: &mut Vec<Source>) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); BATCH];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
        sources.extend(events[..count].iter().map(|event| Source::of_key(event.data())));
        Ok(count == BATCH)
    }
}

// SAFETY: the poller owns its epoll and never replaces it.
unsafe impl OwnsDescriptor for Poller {}

impl AsRawFd for Poller {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }
}

impl Source {
    pub fn key(self) -> u64 {
        match self {
            Self::Directory => DIRECTORY,
            Self::Pool { slot, serial } => u64::from(slot) << 32 | u64::from(serial),
        }
    }

    pub fn of_key(key: u64) -> Self {
        match key {
            DIRECTORY => Self::Directory,
            _ => Self::Pool { slot: (key >> 32) as u32, serial: key as u32 },
        }
    }
}
