//! Sends a TCP segment beside the stack, so that a receiver gets the same bytes twice.
use std::{
    io::{self},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    os::fd::{AsFd, AsRawFd as _},
};

use nix::{
    libc,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket},
};

/// `TCP_REPAIR_OFF_NO_WP` (include/uapi/linux/tcp.h): leave repair mode without a window probe.
const REPAIR_OFF_SILENTLY: libc::c_int = -1;
const REPAIR_ON: libc::c_int = 1;
const RECEIVE_QUEUE: libc::c_int = 1;
const SEND_QUEUE: libc::c_int = 2;

const TCP_HEADER_BYTES: usize = 20;
const FLAGS_ACK_PSH: u8 = 0x18;

/// Sends `bytes` as if the client's stack had sent them next, without its knowing.
pub fn send_beside(client: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    let (source, destination) = (v4(client.local_addr()?)?, v4(client.peer_addr()?)?);
    let (sequence, acknowledgement) = sequence_numbers(client)?;
    let segment = segment(source, destination, sequence, acknowledgement, bytes);
    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)?;
    nix::sys::socket::bind(raw.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(*source.ip(), 0)))?;
    let to = SockaddrIn::from(SocketAddrV4::new(*destination.ip(), 0));
    sendto(raw.as_raw_fd(), &segment, &to, MsgFlags::empty())?;
    Ok(())
}

fn v4(address: std::net::SocketAddr) -> io::Result<SocketAddrV4> {
    match address {
        std::net::SocketAddr::V4(address) => Ok(address),
        std::net::SocketAddr::V6(_) => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// The next sequence number to send and the next one expected, as checkpointing tools read them (TCP_REPAIR).
fn sequence_numbers(stream: &TcpStream) -> io::Result<(u32, u32)> {
    set(stream, libc::TCP_REPAIR, REPAIR_ON)?;
    let numbers = queue_sequence(stream, SEND_QUEUE)
        .and_then(|send| queue_sequence(stream, RECEIVE_QUEUE).map(|receive| (send, receive)));
    set(stream, libc::TCP_REPAIR, REPAIR_OFF_SILENTLY)?;
    numbers
}

fn queue_sequence(stream: &TcpStream, queue: libc::c_int) -> io::Result<u32> {
    set(stream, libc::TCP_REPAIR_QUEUE, queue)?;
    let mut value = 0u32;
    let mut length = size_of::<u32>() as libc::socklen_t;
    // SAFETY: the value is as long as the length says.
    let result = unsafe {
        libc::getsockopt(
            stream.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_QUEUE_SEQ,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

fn set(stream: &TcpStream, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the value is as long as the length says.
    let result = unsafe {
        libc::setsockopt(
            stream.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A TCP segment without options (RFC 9293 §3.1).
fn segment(
    source: SocketAddrV4,
    destination: SocketAddrV4,
    sequence: u32,
    acknowledgement: u32,
    payload: &[u8],
) -> Vec<u8> {
    let mut segment = Vec::with_capacity(TCP_HEADER_BYTES + payload.len());
    segment.extend(source.port().to_be_bytes());
    segment.extend(destination.port().to_be_bytes());
    segment.extend(sequence.to_be_bytes());
    segment.extend(acknowledgement.to_be_bytes());
    segment.extend([(TCP_HEADER_BYTES as u8 / 4) << 4, FLAGS_ACK_PSH]);
    segment.extend(u16::MAX.to_be_bytes());
    segment.extend([0; 4]);
    segment.extend(payload);
    let checksum = checksum(*source.ip(), *destination.ip(), &segment);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    segment
}

/// The Internet checksum over the pseudo header and the segment (RFC 1071).
fn checksum(source: Ipv4Addr, destination: Ipv4Addr, segment: &[u8]) -> u16 {
    let pseudo = [
        &source.octets()[..],
        &destination.octets(),
        &[0, libc::IPPROTO_TCP as u8],
        &(segment.len() as u16).to_be_bytes(),
    ]
    .concat();
    let mut sum: u32 = pseudo
        .chunks(2)
        .chain(segment.chunks(2))
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::TcpListener,
    };

    use super::*;

    #[test]
    fn a_native_receiver_gets_the_bytes_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        send_beside(&client, b"0123").unwrap();
        let mut early = [0; 4];
        server.read_exact(&mut early).unwrap();
        client.write_all(b"0123456789").unwrap();
        let mut late = [0; 6];
        server.read_exact(&mut late).unwrap();
        assert_eq!((&early, &late), (b"0123", b"456789"));
    }
}
