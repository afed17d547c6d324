//! Proves on the running kernel what the sockmap path stands on, before a client depends on it.
use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use common::{Protocol, Verdict, map_values::Counter, route::RouteKey};
use nix::libc;
use socket2::{Domain, Socket, Type};

use super::{Cgroup, Error, Kernel, Options, inject};
use crate::listener;

/// Why this kernel is not trusted with clients' bytes.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Kernel(#[from] Error),
    #[error("the self-test could not {operation}")]
    Io { operation: &'static str, source: io::Error },
    #[error("accept does not return the verdict on this kernel")]
    NoVerdict,
    #[error("the self-test's duplicate segment was not seen by the verdict program")]
    NotProvoked,
    #[error("this kernel delivers wrong bytes through a sockmap in spite of trimming")]
    WrongBytes,
    #[error("a connection does not leave the sockmap at its first send on this kernel")]
    NotRetired,
}

const FUNCTION: &[u8] = b"self-test";
const ROUTE: u16 = 7;
const HEAD: &[u8] = b"POST /function/self-test HTTP/1.1\r\n";
const BODY: &[u8] = b"these bytes arrive twice in part and have to be read once";
const REPEATED_BYTES: usize = 20;

/// Loopback answers in microseconds; this only keeps a broken kernel from hanging the start.
const PATIENCE: Duration = Duration::from_secs(2);

/// Runs the whole life of one connection on loopback.
pub fn run(cgroup: &Cgroup) -> Result<(), Failure> {
    live(cgroup, true)
}

fn live(cgroup: &Cgroup, trim: bool) -> Result<(), Failure> {
    let listener = listen().map_err(at("listen on loopback"))?;
    let address = local_address(&listener).map_err(at("read its listener's address"))?;
    // Port 0 belongs to no connection.
    let mut kernel = Kernel::load(&Options { http_port: address.port(), https_port: 0, trim }, cgroup, None)?;
    let key = RouteKey::new(0, Protocol::Http, FUNCTION).ok_or(Failure::NoVerdict)?;
    kernel.publish(0, [(key, ROUTE)].into_iter())?;

    let mut client = TcpStream::connect(address).map_err(at("connect on loopback"))?;
    client.set_nodelay(true).map_err(at("set TCP_NODELAY"))?;
    client.write_all(HEAD).and_then(|()| settle(&client)).map_err(at("send"))?;
    let (server, name) = listener::accept(&listener).map_err(at("accept"))?;
    if kernel.verdict_at_accept(name) != Some(Verdict::Route { generation: 0, index: ROUTE }) {
        return Err(Failure::NoVerdict);
    }
    let mut server = TcpStream::from(server);
    server.set_nonblocking(false).map_err(at("make its socket blocking"))?;
    server.set_read_timeout(Some(PATIENCE)).map_err(at("set a time-out"))?;
    client.set_read_timeout(Some(PATIENCE)).map_err(at("set a time-out"))?;

    let mut received = vec![0; HEAD.len() + BODY.len()];
    let (early, late) = received.split_at_mut(HEAD.len() + REPEATED_BYTES);
    inject::send_beside(&client, &BODY[..REPEATED_BYTES]).map_err(at("inject a segment"))?;
    server.read_exact(early).map_err(at("receive what was injected"))?;
    // The client's stack knows nothing of the injected segment and sends its bytes again.
    client.write_all(BODY).map_err(at("send"))?;
    server.read_exact(late).map_err(at("receive what was sent"))?;
    if received != [HEAD, BODY].concat() {
        return Err(Failure::WrongBytes);
    }
    if kernel.counter(Counter::Trimmed) == 0 {
        return Err(Failure::NotProvoked);
    }

    server.write_all(HEAD).map_err(at("answer"))?;
    if kernel.counter(Counter::Retired) != 1 || !kernel.enrolled().is_empty() {
        return Err(Failure::NotRetired);
    }
    echo(&mut client, &mut server).map_err(at("use the connection after it left the sockmap"))
}

/// As a gateway listens: what is accepted has its first bytes, and at `[::]`, where there is IPv6, even IPv4 clients
/// come by way of the IPv6 hook.
fn listen() -> io::Result<Socket> {
    let listener = match Socket::new(Domain::IPV6, Type::STREAM, None) {
        Ok(listener) => {
            listener.set_only_v6(false)?;
            listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), 0)).into())?;
            listener
        }
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            let listener = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
            listener
        }
        Err(error) => return Err(error),
    };
    listener::set_defer_accept(&listener, PATIENCE)?;
    listener.listen(1)?;
    Ok(listener)
}

/// Waits until the peer's kernel has taken all that was sent, so that what follows is a segment of its own.
fn settle(client: &TcpStream) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while unacknowledged(client)? > 0 {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::yield_now();
    }
    Ok(())
}

/// Bytes in the send queue (tcp(7), SIOCOUTQ).
fn unacknowledged(client: &TcpStream) -> io::Result<libc::c_int> {
    let mut bytes = 0;
    // SAFETY: the kernel writes one integer.
    let result = unsafe { libc::ioctl(client.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == 0 { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

fn local_address(listener: &Socket) -> io::Result<SocketAddr> {
    let address = listener.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

fn echo(client: &mut TcpStream, server: &mut TcpStream) -> io::Result<()> {
    let mut answer = vec![0; HEAD.len()];
    client.read_exact(&mut answer)?;
    client.write_all(BODY)?;
    let mut received = vec![0; BODY.len()];
    server.read_exact(&mut received)?;
    if answer == HEAD && received == BODY { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

fn at(operation: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |source| Failure::Io { operation, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_passes_with_trimming_and_only_with_it() {
        // The hook that the default listeners use is the one that is tested.
        assert_eq!(listen().unwrap().domain().unwrap(), Domain::IPV6);
        let cgroup = Cgroup::enter("self-test-").unwrap();
        if let Err(failure) = run(&cgroup) {
            panic!("{failure}: {failure:?}");
        }
        assert!(matches!(live(&cgroup, false), Err(Failure::WrongBytes)));
    }
}
