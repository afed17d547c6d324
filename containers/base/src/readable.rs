//! Waiting for one end of the handoff to become readable.
use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
};

use tokio::io::{
    Interest,
    unix::{AsyncFd, AsyncFdReadyGuard},
};

/// An owner of one descriptor, registered with the runtime.
pub(crate) struct Readable<T: AsFd>(AsyncFd<Raw<T>>);

pub(crate) type ReadyGuard<'a, T> = AsyncFdReadyGuard<'a, Raw<T>>;

pub(crate) struct Raw<T>(T);

impl<T: AsFd> Readable<T> {
    /// `owner` must keep the same descriptor open for as long as it lives, as both ends of a pool connection do.
    pub fn new(owner: T) -> io::Result<Self> {
        // SAFETY: the owner is moved in and only lent out shared, so it closes its descriptor when this is dropped,
        // after deregistering; its callers hand in types that never change their descriptor.
        let registered = unsafe { AsyncFd::register_with_interest(Raw(owner), Interest::READABLE) };
        Ok(Self(registered?))
    }

    pub async fn ready(&self) -> io::Result<ReadyGuard<'_, T>> {
        self.0.readable().await
    }

    pub fn get_ref(&self) -> &T {
        &self.0.get_ref().0
    }
}

impl<T: AsFd> AsRawFd for Raw<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}
