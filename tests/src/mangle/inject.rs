//! Segments that a connection's client did not send: copies, overlaps, pieces ahead of time.
use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::AsRawFd,
};

use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    pattern::Random,
    segments::{wait_until_sent, write_all},
};

/// Forges segments of one connection, from the client to the server.
pub struct Injector {
    raw: Socket,
    client: SocketAddr,
    server: SocketAddr,
}

/// What the client will send and expects next.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    pub send: u32,
    pub receive: u32,
}

impl Injector {
    pub fn new(stream: &TcpStream) -> io::Result<Self> {
        let (client, server) = (stream.local_addr()?, stream.peer_addr()?);
        // IPPROTO_RAW sends whole packets and, unlike a raw TCP socket, receives none.
        let raw =
            Socket::new(Domain::for_address(server), Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
        raw.set_nonblocking(true)?;
        Ok(Self { raw, client, server })
    }

    /// Delivers the beginning of what the client is about to write, so that the client's own segment overlaps it.
    ///
    /// Whatever the client wrote before must have been sent.
    pub fn ahead(&self, stream: &TcpStream, prefix: &[u8]) -> io::Result<()> {
        let sequence = sequence(stream)?;
        self.segment(sequence.send, sequence.receive, prefix)
    }

    /// Delivers `sent`'s end again with the beginning of the next write behind it.
    pub fn astride(&self, stream: &TcpStream, sent: &[u8], prefix: &[u8]) -> io::Result<()> {
        let sequence = sequence(stream)?;
        let payload = [sent, prefix].concat();
        self.segment(sequence.send.wrapping_sub(sent.len() as u32), sequence.receive, &payload)
    }

    /// Delivers the last bytes that the client sent once more.
    pub fn again(&self, stream: &TcpStream, sent: &[u8]) -> io::Result<()> {
        self.astride(stream, sent, &[])
    }

    /// Delivers what the client is about to write, byte by byte from its end, and leaves out the first one.
    pub fn backwards(&self, stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
        let sequence = sequence(stream)?;
        for (position, byte) in bytes.iter().enumerate().skip(1).rev() {
            let at = sequence.send.wrapping_add(position as u32);
            self.segment(at, sequence.receive, &[*byte])?;
        }
        Ok(())
    }

    /// Writes `bytes` in pieces of which somebody else delivers some beforehand, alone or with what came before.
    pub fn write_with_overlaps(
        &self,
        stream: &TcpStream,
        random: &mut Random,
        bytes: &[u8],
    ) -> io::Result<()> {
        const TAIL_BYTES: usize = 100;
        let count = random.within(3, 12);
        let cuts = random.cuts(bytes.len(), count);
        let mut start = 0;
        for end in cuts.into_iter().chain([bytes.len()]) {
            let (sent, next) = (&bytes[..start], &bytes[start..end]);
            wait_until_sent(stream)?;
            let prefix = &next[..random.within(1, next.len())];
            let tail = &sent[sent.len() - random.below(sent.len().min(TAIL_BYTES) + 1)..];
            match random.below(4) {
                0 => self.astride(stream, tail, prefix)?,
                1 if !tail.is_empty() => self.again(stream, tail)?,
                _ => self.ahead(stream, prefix)?,
            }
            write_all(stream, next)?;
            start = end;
        }
        Ok(())
    }

    fn segment(&self, sequence: u32, acknowledgement: u32, payload: &[u8]) -> io::Result<()> {
        let packet = packet(self.client, self.server, sequence, acknowledgement, payload);
        // The raw socket's address carries no port, and IPv6 refuses one.
        let target = SocketAddr::new(self.server.ip(), 0);
        self.raw.send_to(&packet, &target.into()).map(drop)
    }
}

/// Asks the kernel by TCP_REPAIR where the connection stands.
pub fn sequence(stream: &TcpStream) -> io::Result<Sequence> {
    const TCP_REPAIR_ON: i32 = 1;
    const TCP_REPAIR_OFF_WITHOUT_PROBE: i32 = -1;
    const RECEIVE_QUEUE: i32 = 1;
    const SEND_QUEUE: i32 = 2;
    set(stream, libc::TCP_REPAIR, TCP_REPAIR_ON)?;
    let of = |queue| {
        set(stream, libc::TCP_REPAIR_QUEUE, queue)?;
        get(stream, libc::TCP_QUEUE_SEQ)
    };
    let sequence = of(SEND_QUEUE).and_then(|send| Ok(Sequence { send, receive: of(RECEIVE_QUEUE)? }));
    set(stream, libc::TCP_REPAIR, TCP_REPAIR_OFF_WITHOUT_PROBE)?;
    sequence
}

fn set(stream: &TcpStream, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: the value is four bytes that live until the call returns.
    let result = unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), 4)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn get(stream: &TcpStream, option: i32) -> io::Result<u32> {
    let mut value = 0u32;
    let mut length = 4;
    // SAFETY: the kernel writes at most four bytes to `value`.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

fn packet(from: SocketAddr, to: SocketAddr, sequence: u32, acknowledgement: u32, payload: &[u8]) -> Vec<u8> {
    const PSH_ACK: u8 = 0x18;
    const WORDS_AND_FLAGS: [u8; 2] = [5 << 4, PSH_ACK];
    const WINDOW: u16 = 0x4000;
    let mut tcp = Vec::with_capacity(20 + payload.len());
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(acknowledgement.to_be_bytes());
    tcp.extend(WORDS_AND_FLAGS);
    tcp.extend(WINDOW.to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend(payload);

    let addresses = [octets(from.ip()), octets(to.ip())].concat();
    let pseudo =
        [&addresses[..], &(tcp.len() as u32).to_be_bytes(), &[0, 0, 0, libc::IPPROTO_TCP as u8]].concat();
    let checksum = checksum(&[&pseudo, &tcp]);
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());

    let mut packet = match to.ip() {
        // The kernel fills in the length, the identification and the checksum.
        IpAddr::V4(_) => vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, libc::IPPROTO_TCP as u8, 0, 0],
        IpAddr::V6(_) => {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend((tcp.len() as u16).to_be_bytes());
            header.extend([libc::IPPROTO_TCP as u8, 64]);
            header
        }
    };
    packet.extend(addresses);
    packet.extend(tcp);
    packet
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The Internet checksum (RFC 1071) of parts of which all but the last are even in length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 =
        words.map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or_default())).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_with_its_checksum_sums_up_to_nothing() {
        for (from, to) in [("127.0.0.1:1000", "127.0.0.1:80"), ("[::1]:1000", "[::1]:80")] {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let packet = packet(from, to, 7, 9, b"odd");
            let tcp = &packet[packet.len() - 23..];
            let addresses = [octets(from.ip()), octets(to.ip())].concat();
            assert_eq!(checksum(&[&addresses, &[0, 0, 0, 23, 0, 0, 0, 6], tcp]), 0);
        }
    }
}
