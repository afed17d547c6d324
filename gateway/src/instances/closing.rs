//! Closes many descriptors at once.
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};

use nix::libc;

/// Empties `descriptors` and closes them, neighbours with one system call: connections that were accepted together
/// mostly have neighbouring numbers.
pub fn close_all(descriptors: &mut Vec<OwnedFd>) {
    let mut numbers: Vec<RawFd> = descriptors.drain(..).map(IntoRawFd::into_raw_fd).collect();
    numbers.sort_unstable();
    for run in numbers.chunk_by(|a, b| a + 1 == *b) {
        close_run(run[0], run[run.len() - 1]);
    }
}

fn close_run(first: RawFd, last: RawFd) {
    if first < last {
        // SAFETY: every number in the run is a descriptor that this module owned and gives up here.
        let closed = unsafe { libc::close_range(first as libc::c_uint, last as libc::c_uint, 0) };
        if closed == 0 {
            return;
        }
    }
    // A single one, or a kernel before 5.9.
    for number in first..=last {
        // SAFETY: as above.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn all_are_closed_and_nothing_else() {
        let (mut clients, servers): (Vec<_>, Vec<_>) = (0..20).map(|_| UnixStream::pair().unwrap()).unzip();
        let mut kept = Vec::new();
        let mut closed = Vec::new();
        for (index, server) in servers.into_iter().enumerate() {
            if index % 7 == 3 { kept.push(server.into()) } else { closed.push(server.into()) }
        }
        close_all(&mut closed);
        assert!(closed.is_empty());
        for (index, client) in clients.iter_mut().enumerate() {
            client.set_nonblocking(true).unwrap();
            let ended = matches!(client.read(&mut [0]), Ok(0));
            assert_eq!(ended, index % 7 != 3, "{index}");
        }
        close_all(&mut kept);
        assert!(clients.iter_mut().all(|client| matches!(client.read(&mut [0]), Ok(0))));
    }
}
