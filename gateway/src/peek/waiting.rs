//! Waits for the rest of a first flight with one wake-up where the length is known, and without a busy loop else.
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use nix::{
    libc,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

use crate::readable::OwnsDescriptor;

/// How many connections one turn takes up; the next turn goes on.
const BATCH: usize = 64;

/// An epoll of the connections that are not complete; itself readable when one of them may be.
pub struct Waiting {
    epoll: Epoll,
}

impl Waiting {
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)? })
    }

    /// Waits until `bytes` bytes can be peeked at.
    pub fn wait(&self, socket: impl AsFd, key: u64, bytes: usize) -> io::Result<()> {
        // Below the low-water mark the kernel does not even wake this process.
        set_low_water_mark(&socket, bytes)?;
        // Edge-triggered, because what has been seen already stays readable.
        let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        self.epoll.add(socket, EpollEvent::new(events, key))?;
        Ok(())
    }

    /// Waits on, for more bytes than before.
    pub fn wait_on(&self, socket: impl AsFd, key: u64, bytes: usize) -> io::Result<()> {
        set_low_water_mark(&socket, bytes)?;
        let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        // Modifying looks at the state anew, so nothing that came meanwhile is missed.
        self.epoll.modify(socket, &mut EpollEvent::new(events, key))?;
        Ok(())
    }

    /// Must precede the handoff: a registration outlives the descriptor that it was made with.
    pub fn forget(&self, socket: impl AsFd) -> io::Result<()> {
        self.epoll.delete(&socket)?;
        set_low_water_mark(&socket, 1)
    }

    /// The keys of connections that may be complete, and whether their client has ended its side; true when there
    /// may be more.
    pub fn ready(&self, keys: &mut Vec<(u64, bool)>) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); BATCH];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
        let ends = EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        keys.extend(events[..count].iter().map(|event| (event.data(), event.events().intersects(ends))));
        Ok(count == BATCH)
    }
}

impl AsRawFd for Waiting {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }
}

// SAFETY: the epoll's descriptor is owned by the value.
unsafe impl OwnsDescriptor for Waiting {}

impl AsFd for Waiting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

/// SO_RCVLOWAT; the kernel keeps it below half the receive buffer (tcp_set_rcvlowat).
fn set_low_water_mark(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    // SAFETY: the value is as long as the length says.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
