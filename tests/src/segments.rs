//! Writes that become one TCP segment each.
use std::{
    io::{self, Write},
    net::TcpStream,
    os::fd::AsRawFd,
    thread,
    time::Instant,
};

use nix::libc;

use crate::PATIENCE;

/// The segments that a connection has sent, retransmitted ones included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    pub data_segments: u32,
    pub retransmits: u32,
}

/// What fits a segment on the loopback, whose packets have 64 KiB.
const MSS_BYTES: usize = 32 << 10;

/// Sends each piece in a segment of its own and fails if the kernel did otherwise.
///
/// A piece is written when nothing before it waits to be sent, so that the kernel has nothing to merge it with. The
/// congestion window must allow it: see [`crate::net::Net::without_slow_start`].
pub fn send_segments<'a>(stream: &TcpStream, pieces: impl IntoIterator<Item = &'a [u8]>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let before = sent(stream)?;
    let (mut written, mut divisible) = (0, false);
    for piece in pieces.into_iter().filter(|piece| !piece.is_empty()) {
        write_all(stream, piece)?;
        wait_until_sent(stream)?;
        written += 1;
        divisible |= piece.len() > MSS_BYTES;
    }
    let after = sent(stream)?;
    let retransmits = after.retransmits - before.retransmits;
    let segments = after.data_segments - before.data_segments - retransmits;
    if segments != written && !divisible {
        return Err(io::Error::other(format!("{written} pieces went out as {segments} segments")));
    }
    Ok(())
}

/// Sends `bytes` in segments that end at the given offsets and at the end; without any, as the kernel likes.
pub fn send_cut_at(stream: &TcpStream, bytes: &[u8], cuts: &[usize]) -> io::Result<()> {
    if cuts.is_empty() {
        return write_all(stream, bytes);
    }
    let starts = [0].into_iter().chain(cuts.iter().copied());
    let ends = cuts.iter().copied().chain([bytes.len()]);
    send_segments(stream, starts.zip(ends).map(|(start, end)| &bytes[start..end]))
}

/// Writes to a socket that may be non-blocking.
pub fn write_all(mut stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

pub fn wait_until_sent(stream: &TcpStream) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while unsent_bytes(stream)? > 0 {
        if Instant::now() > deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer's window stays shut"));
        }
        thread::yield_now();
    }
    Ok(())
}

fn unsent_bytes(stream: &TcpStream) -> io::Result<i32> {
    const SIOCOUTQNSD: libc::c_ulong = 0x894b;
    let mut bytes = 0;
    // SAFETY: the kernel writes one int to `bytes`.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), SIOCOUTQNSD as _, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

pub fn sent(stream: &TcpStream) -> io::Result<Sent> {
    // Offsets in `struct tcp_info` (linux/tcp.h), which only ever grows at its end.
    const TOTAL_RETRANS: usize = 100;
    const DATA_SEGS_OUT: usize = 156;
    let mut info = [0u8; 256];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `info`.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let number = |offset: usize| {
        u32::from_ne_bytes([info[offset], info[offset + 1], info[offset + 2], info[offset + 3]])
    };
    Ok(Sent { data_segments: number(DATA_SEGS_OUT), retransmits: number(TOTAL_RETRANS) })
}
