//! Destroys a connection that belongs to whatever process, by inet_diag's SOCK_DESTROY (sock_diag(7)).
use std::{io, os::fd::AsRawFd as _};

use common::map_values::Connection;
use nix::{
    libc,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
    },
};

const SOCK_DESTROY: u16 = 21;
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = 56;
const ALL_STATES: u32 = u32::MAX;

/// The cookie makes sure that it is this connection and no later one of the same addresses.
pub fn destroy(cookie: u64, connection: &Connection) -> io::Result<()> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        Some(SockProtocol::NetlinkSockDiag),
    )?;
    sendto(netlink.as_raw_fd(), &request(cookie, connection), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 256];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    match error_of(answer.get(..length).unwrap_or_default()) {
        Some(0) => Ok(()),
        // It ended by itself meanwhile.
        Some(code) if code == -libc::ENOENT => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's netlink answer is none")),
    }
}

/// A `nlmsghdr` and an `inet_diag_req_v2`.
fn request(cookie: u64, connection: &Connection) -> [u8; HEADER_BYTES + REQUEST_BYTES] {
    let mut bytes = [0; HEADER_BYTES + REQUEST_BYTES];
    let mut at = 0;
    let mut put = |part: &[u8]| {
        bytes[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    };
    put(&((HEADER_BYTES + REQUEST_BYTES) as u32).to_ne_bytes());
    put(&SOCK_DESTROY.to_ne_bytes());
    put(&((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    put(&[0; 8]);
    put(&[connection.family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    put(&ALL_STATES.to_ne_bytes());
    put(&connection.local_port.to_be_bytes());
    put(&connection.remote_port.to_be_bytes());
    for word in connection.local_address.into_iter().chain(connection.remote_address) {
        put(&word.to_ne_bytes());
    }
    put(&0u32.to_ne_bytes());
    put(&(cookie as u32).to_ne_bytes());
    put(&((cookie >> 32) as u32).to_ne_bytes());
    bytes
}

/// The code in an NLMSG_ERROR, zero or a negative errno.
fn error_of(message: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    if i32::from(kind) != libc::NLMSG_ERROR {
        return None;
    }
    Some(i32::from_ne_bytes(message.get(HEADER_BYTES..HEADER_BYTES + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        net::{TcpListener, TcpStream},
        os::fd::AsFd as _,
    };

    use nix::sys::socket::{getsockopt, sockopt};

    use super::*;

    #[test]
    fn a_connection_of_another_owner_ends_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let mut cookie = 0u64;
        let mut length = size_of::<u64>() as libc::socklen_t;
        // SAFETY: the value is as long as the length says.
        let result = unsafe {
            libc::getsockopt(
                server.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0);
        let loopback = u32::from_ne_bytes([127, 0, 0, 1]);
        let mut connection = Connection {
            next_sequence: 0,
            verdict: 0,
            protocol: 1,
            flags: 0,
            family: libc::AF_INET as u16,
            local_port: server.local_addr().unwrap().port(),
            remote_port: client.local_addr().unwrap().port(),
            local_address: [loopback, 0, 0, 0],
            remote_address: [loopback, 0, 0, 0],
        };
        destroy(cookie ^ 1, &connection).unwrap();
        assert_eq!(
            getsockopt(&server.as_fd(), sockopt::SocketError).unwrap(),
            0,
            "another cookie, another socket"
        );
        destroy(cookie, &connection).unwrap();
        assert_eq!(getsockopt(&server.as_fd(), sockopt::SocketError).unwrap(), libc::ECONNABORTED);
        assert!(client.read(&mut [0]).is_err());
        connection.local_port = 1;
        destroy(cookie, &connection).unwrap();
    }
}
