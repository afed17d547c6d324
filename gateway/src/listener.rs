//! The listening sockets and the only `accept4`.
use std::{
    fs, io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout},
};
use socket2::{Domain, SockAddr, SockFilter, SockRef, Socket, Type};

/// Room for the connections of a few milliseconds at full load; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// Where a TCP header has its flags, and two of them (RFC 9293 §3.1).
const FLAGS_OFFSET: u32 = 13;
const FLAG_SYN: u32 = 0x02;
const FLAG_ACK: u32 = 0x10;

/// A handshake that is not accepted yet, in /proc/net/tcp.
const STATE_SYN_RECV: &str = "03";

/// Takes an address, and no connections yet.
pub fn bind(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        // One listener for both families, as `[::]` is read by everybody.
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Listens so that a connection comes out of `accept` with its first bytes.
pub fn listen(socket: &Socket, defer: Duration) -> io::Result<()> {
    set_defer_accept(socket, defer)?;
    socket.listen(BACKLOG)
}

/// Drops the first segment of every further handshake, so that the queues run dry. Its client tries again after a
/// second, and is refused by then, or finds the next gateway.
pub fn stop_listening(socket: &Socket) -> io::Result<()> {
    // The kernel runs this on what arrives for the listener, from the TCP header on.
    socket.attach_filter(&[
        filter(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, FLAGS_OFFSET),
        filter(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, FLAG_SYN | FLAG_ACK),
        filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, FLAG_SYN),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ])
}

/// Takes off what a connection has inherited from a listener that stops.
pub fn forget_filter(socket: &OwnedFd) {
    // One whose handshake was complete before has none.
    let _ = SockRef::from(socket).detach_filter();
}

fn filter(code: u32, jump_true: u8, jump_false: u8, value: u32) -> SockFilter {
    SockFilter::new(code as u16, jump_true, jump_false, value)
}

/// Whether a handshake with the listener is under way, or complete and without data yet. When in doubt it is not.
pub fn is_half_open(socket: &Socket) -> bool {
    let Some(port) = socket.local_addr().ok().and_then(|address| address.as_socket()).map(|it| it.port())
    else {
        return false;
    };
    ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .any(|table| has_half_open(&table, port))
}

/// Whether `accept` would give a connection.
pub fn has_waiting(socket: &Socket) -> bool {
    let mut poll = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    nix::poll::poll(&mut poll, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// The fields are: slot, local address, remote address, state.
fn has_half_open(table: &str, port: u16) -> bool {
    let port = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&port)) && fields.nth(1) == Some(STATE_SYN_RECV)
    })
}

/// Takes a connection, non-blocking for whoever gets it, and the name that `accept4` gave it.
pub fn accept(listener: &Socket) -> io::Result<(OwnedFd, SocketAddr)> {
    // SAFETY: the storage has the length that the kernel is told, and the kernel fills in the length it wrote.
    let (fd, name) = unsafe {
        SockAddr::try_init(|storage, length| {
            match libc::accept4(
                listener.as_raw_fd(),
                storage.cast(),
                length,
                libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            ) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(OwnedFd::from_raw_fd(fd)),
            }
        })?
    };
    let name = name.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok((fd, name))
}

/// The cookie under which the kernel's maps know the socket.
pub fn cookie(socket: impl AsFd) -> io::Result<u64> {
    cookie_option(socket, libc::SO_COOKIE)
}

/// What tells this process's network namespace from all others since the host was booted.
pub fn network_namespace() -> io::Result<u64> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    cookie_option(&socket, libc::SO_NETNS_COOKIE)
}

fn cookie_option(socket: impl AsFd, option: libc::c_int) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the value is as long as the length says.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// TCP_DEFER_ACCEPT (tcp(7)).
pub fn set_defer_accept(socket: &Socket, defer: Duration) -> io::Result<()> {
    let seconds = defer.as_secs() as libc::c_int;
    // SAFETY: the value is as long as the length says.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{Ipv4Addr, TcpStream},
        thread,
    };

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    #[test]
    fn handshakes_that_were_begun_are_served_and_no_others() {
        let listener = bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        listen(&listener, PATIENCE).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        assert!(!is_half_open(&listener));
        let mut begun = TcpStream::connect(address).unwrap();
        assert!(is_half_open(&listener));
        stop_listening(&listener).unwrap();
        assert!(TcpStream::connect_timeout(&address, Duration::from_millis(100)).is_err());
        begun.write_all(b"here").unwrap();
        let accepted = loop {
            match accept(&listener) {
                Ok((accepted, _)) => break accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        };
        assert!(!is_half_open(&listener));
        forget_filter(&accepted);
        let mut accepted = TcpStream::from(accepted);
        accepted.set_nonblocking(false).unwrap();
        let mut bytes = [0; 4];
        accepted.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"here");
    }

    #[test]
    fn half_open_connections_are_found_by_port_and_state() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n\
             0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n\
             1: 0100007F:1F91 0100007F:CFAA 03 00000000:00000000\n\
             2: 0100007F:CFAA 0100007F:1F90 03 00000000:00000000\n";
        assert!(has_half_open(table, 0x1f91));
        assert!(!has_half_open(table, 0x1f90));
    }
}
