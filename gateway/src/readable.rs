//! Descriptors that a task waits on until they are readable.
use std::{io, os::fd::AsRawFd};

use tokio::io::{Interest, unix::AsyncFd};

/// A type whose descriptor is its own and stays open until it is dropped.
///
/// # Safety
/// `as_raw_fd` gives the same open descriptor for the whole life of the value.
pub unsafe trait OwnsDescriptor: AsRawFd {}

// SAFETY: a `Socket` is an `OwnedFd`.
unsafe impl OwnsDescriptor for socket2::Socket {}

/// Must be called within a runtime.
pub fn watch<T: OwnsDescriptor>(source: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: what the trait promises is what this asks for.
    unsafe { AsyncFd::register_with_interest(source, Interest::READABLE) }
        .map_err(|error| error.into_parts().1)
}

/// Done when the source may be readable; never without one.
pub async fn readable<T: AsRawFd>(source: Option<&AsyncFd<T>>) {
    let Some(source) = source else { return std::future::pending().await };
    match source.readable().await {
        Ok(mut guard) => guard.retain_ready(),
        // The runtime shuts down, and its signals end whatever waits here.
        Err(_) => std::future::pending().await,
    }
}
