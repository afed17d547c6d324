//! The messages as bytes: what each holds, how it is written and which bytes are refused.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use arrayvec::ArrayVec;
use common::{FunctionName, InvalidName, Protocol, Refusal, limits::FUNCTION_NAME_BYTES};

use crate::reader::Reader;

/// The first bytes of every message, so that a foreign peer is told from another version of ours.
pub const MAGIC: [u8; 4] = *b"PTSM";
pub const VERSION: u16 = 1;

/// Connections in one message: what one accept loop yields, and below the kernel's 253 descriptors a message.
pub const MAX_BATCH: usize = 64;
/// Workers of one instance, each with a pool connection of its own: far more than cores, and it bounds what an
/// instance can make the gateway open.
pub const MAX_WORKERS: u16 = 256;

pub const HEADER_BYTES: usize = 16;
pub const HELLO_BYTES: usize = HEADER_BYTES + HELLO_BODY_BYTES;
pub const CONNECTION_BYTES: usize = 144;
/// The longest message that carries new connections.
pub const MAX_MESSAGE_BYTES: usize = HEADER_BYTES + MAX_BATCH * CONNECTION_BYTES;

const HELLO_BODY_BYTES: usize = 16;
const ADDRESS_BYTES: usize = 28;
const PADDING_BYTES: usize = 5;

const KIND_HELLO: u16 = 1;
const KIND_CONNECTIONS: u16 = 2;

const FAMILY_NONE: u16 = 0;
const FAMILY_V4: u16 = 4;
const FAMILY_V6: u16 = 6;

const PURPOSE_SERVE: u8 = 1;
const PURPOSE_REFUSE: u8 = 2;

const _: () = assert!(HEADER_BYTES == MAGIC.len() + 2 + 2 + 4 + 2 + 2);
const _: () = assert!(HELLO_BODY_BYTES == 2 + 2 + 4 + 8);
const _: () = assert!(ADDRESS_BYTES == 2 + 2 + 4 + 4 + 16);
const _: () =
    assert!(CONNECTION_BYTES == 8 + 8 + 2 * ADDRESS_BYTES + 4 + FUNCTION_NAME_BYTES + PADDING_BYTES);
const _: () = assert!(FUNCTION_NAME_BYTES <= u8::MAX as usize && MAX_MESSAGE_BYTES <= u32::MAX as usize);

/// An instance's first message on each pool connection; its status page travels with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The worker at the instance's end, below `workers`.
    pub worker: u16,
    /// How many pool connections the instance wants.
    pub workers: u16,
    /// The instance's process, as its own pid namespace numbers it; for people, never for decisions.
    pub pid: u32,
    /// What the instance understands beyond this version's messages. A gateway ignores bits it doesn't know and
    /// sends nothing that wasn't offered, which is how the wire grows without a break.
    pub features: u64,
}

impl Hello {
    /// The instance takes connections that move to it, and asks for those that leave it.
    pub const MOVES: u64 = 1 << 1;
    /// When it drains, it is told so, and not by the end of file.
    pub const DRAINED: u64 = 1 << 2;
}

/// What a connection is handed over for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The connection belongs to this function.
    Serve(FunctionName),
    /// The connection belongs to nobody and gets this answer.
    Refuse(Refusal),
}

/// The record that travels beside a connection's descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The gateway's name for the connection, for logs.
    pub id: u64,
    /// When accept returned it, on CLOCK_MONOTONIC.
    pub accepted_at_ns: u64,
    pub protocol: Protocol,
    pub purpose: Purpose,
    /// The client's address; `None` when only the socket knows it, because accept carried the verdict instead.
    pub peer: Option<SocketAddr>,
    /// The address that the client connected to; `None` as above.
    pub local: Option<SocketAddr>,
}

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("it ends {missing} bytes too early")]
    Short { missing: usize },
    #[error("it has {0} bytes too many")]
    Trailing(usize),
    #[error("it does not begin as a Pointsman message does")]
    Magic([u8; 4]),
    #[error("it is of version {0}, and this end speaks version {VERSION}")]
    Version(u16),
    #[error("it is of kind {got} where kind {expected} is due")]
    Kind { expected: u16, got: u16 },
    #[error("it says {says} bytes and has {has}")]
    Length { says: u32, has: usize },
    #[error("it says {0} records")]
    Count(u16),
    #[error("its field `{field}` has the unknown value {value}")]
    Value { field: &'static str, value: u64 },
    #[error("its function's name is not one: {0}")]
    Name(InvalidName),
    #[error("a byte that must be zero is not")]
    Padding,
}

/// A message under construction; never larger than the largest message.
pub type Bytes = ArrayVec<u8, MAX_MESSAGE_BYTES>;

/// Writes `hello` into `out`, which is cleared first.
pub fn encode_hello(hello: &Hello, out: &mut Bytes) {
    out.clear();
    put_header(out, KIND_HELLO, 1, HELLO_BODY_BYTES);
    put(out, hello.worker.to_le_bytes());
    put(out, hello.workers.to_le_bytes());
    put(out, hello.pid.to_le_bytes());
    put(out, hello.features.to_le_bytes());
}

pub fn decode_hello(message: &[u8]) -> Result<Hello, DecodeError> {
    let mut reader = Reader(message);
    let count = take_header_of(&mut reader, KIND_HELLO, message.len())?;
    if count != 1 {
        return Err(DecodeError::Count(count));
    }
    let hello =
        Hello { worker: reader.u16()?, workers: reader.u16()?, pid: reader.u32()?, features: reader.u64()? };
    reader.end()?;
    if hello.workers == 0 || hello.workers > MAX_WORKERS {
        return Err(DecodeError::Value { field: "workers", value: hello.workers.into() });
    }
    if hello.worker >= hello.workers {
        return Err(DecodeError::Value { field: "worker", value: hello.worker.into() });
    }
    Ok(hello)
}

/// Writes the first [`MAX_BATCH`] of `connections` into `out`, which is cleared first; says how many those are.
pub fn encode_connections(connections: &[Connection], out: &mut Bytes) -> usize {
    let connections = &connections[..connections.len().min(MAX_BATCH)];
    out.clear();
    put_header(out, KIND_CONNECTIONS, connections.len() as u16, connections.len() * CONNECTION_BYTES);
    for connection in connections {
        put_connection(out, connection);
    }
    connections.len()
}

/// Reads a message's records into `out`, which is cleared first and stays empty unless every record is sound.
pub fn decode_connections(message: &[u8], out: &mut Vec<Connection>) -> Result<(), DecodeError> {
    out.clear();
    let mut reader = Reader(message);
    let count = take_header_of(&mut reader, KIND_CONNECTIONS, message.len())?;
    if count == 0 || usize::from(count) > MAX_BATCH {
        return Err(DecodeError::Count(count));
    }
    let records = (0..count).try_for_each(|_| {
        out.push(take_connection(&mut reader)?);
        Ok(())
    });
    records.and_then(|()| reader.end()).inspect_err(|_| out.clear())
}

/// `Bytes` has room for the largest message, and a batch is bounded before its first record is written.
pub(crate) fn put<const N: usize>(out: &mut Bytes, bytes: [u8; N]) {
    out.extend(bytes);
}

pub(crate) fn put_header(out: &mut Bytes, kind: u16, count: u16, body_bytes: usize) {
    put(out, MAGIC);
    put(out, VERSION.to_le_bytes());
    put(out, kind.to_le_bytes());
    put(out, ((HEADER_BYTES + body_bytes) as u32).to_le_bytes());
    put(out, count.to_le_bytes());
    put(out, [0; 2]);
}

fn take_header_of(reader: &mut Reader, expected: u16, has: usize) -> Result<u16, DecodeError> {
    let (kind, count) = take_header(reader, has)?;
    if kind == expected { Ok(count) } else { Err(DecodeError::Kind { expected, got: kind }) }
}

/// The kind and the number of records.
pub(crate) fn take_header(reader: &mut Reader, has: usize) -> Result<(u16, u16), DecodeError> {
    let magic = reader.take()?;
    if magic != MAGIC {
        return Err(DecodeError::Magic(magic));
    }
    let version = reader.u16()?;
    if version != VERSION {
        return Err(DecodeError::Version(version));
    }
    let kind = reader.u16()?;
    let says = reader.u32()?;
    if says as usize != has {
        return Err(DecodeError::Length { says, has });
    }
    let count = reader.u16()?;
    reader.zeros::<2>()?;
    Ok((kind, count))
}

pub(crate) fn put_connection(out: &mut Bytes, connection: &Connection) {
    let (purpose, refusal, name) = match &connection.purpose {
        Purpose::Serve(function) => (PURPOSE_SERVE, 0, function.as_bytes()),
        Purpose::Refuse(refusal) => (PURPOSE_REFUSE, refusal.code(), &[][..]),
    };
    let mut padded = [0; FUNCTION_NAME_BYTES + PADDING_BYTES];
    padded[..name.len()].copy_from_slice(name);

    put(out, connection.id.to_le_bytes());
    put(out, connection.accepted_at_ns.to_le_bytes());
    put_address(out, connection.peer);
    put_address(out, connection.local);
    put(out, [connection.protocol.code(), purpose, refusal, name.len() as u8]);
    put(out, padded);
}

pub(crate) fn take_connection(reader: &mut Reader) -> Result<Connection, DecodeError> {
    let id = reader.u64()?;
    let accepted_at_ns = reader.u64()?;
    let peer = take_address(reader)?;
    let local = take_address(reader)?;
    let [protocol, purpose, refusal, name_bytes] = reader.take()?;
    let padded: [u8; FUNCTION_NAME_BYTES] = reader.take()?;
    reader.zeros::<PADDING_BYTES>()?;

    let protocol = Protocol::from_code(protocol)
        .ok_or(DecodeError::Value { field: "protocol", value: protocol.into() })?;
    let (name, rest) = padded
        .split_at_checked(usize::from(name_bytes))
        .ok_or(DecodeError::Value { field: "name length", value: name_bytes.into() })?;
    if rest.iter().any(|&byte| byte != 0) {
        return Err(DecodeError::Padding);
    }
    let purpose = match purpose {
        PURPOSE_SERVE if refusal == 0 => Purpose::Serve(FunctionName::new(name).map_err(DecodeError::Name)?),
        PURPOSE_REFUSE if name.is_empty() => Purpose::Refuse(
            Refusal::from_code(refusal)
                .ok_or(DecodeError::Value { field: "refusal", value: refusal.into() })?,
        ),
        PURPOSE_SERVE => return Err(DecodeError::Value { field: "refusal", value: refusal.into() }),
        PURPOSE_REFUSE => {
            return Err(DecodeError::Value { field: "name length", value: name_bytes.into() });
        }
        unknown => return Err(DecodeError::Value { field: "purpose", value: unknown.into() }),
    };
    Ok(Connection { id, accepted_at_ns, protocol, purpose, peer, local })
}

fn put_address(out: &mut Bytes, address: Option<SocketAddr>) {
    let (family, port, flow, scope, ip) = match address {
        None => (FAMILY_NONE, 0, 0, 0, [0; 16]),
        Some(SocketAddr::V4(v4)) => {
            let mut ip = [0; 16];
            ip[..4].copy_from_slice(&v4.ip().octets());
            (FAMILY_V4, v4.port(), 0, 0, ip)
        }
        Some(SocketAddr::V6(v6)) => (FAMILY_V6, v6.port(), v6.flowinfo(), v6.scope_id(), v6.ip().octets()),
    };
    put(out, family.to_le_bytes());
    put(out, port.to_le_bytes());
    put(out, flow.to_le_bytes());
    put(out, scope.to_le_bytes());
    put(out, ip);
}

fn take_address(reader: &mut Reader) -> Result<Option<SocketAddr>, DecodeError> {
    let family = reader.u16()?;
    let port = reader.u16()?;
    let flow = reader.u32()?;
    let scope = reader.u32()?;
    let ip = reader.take::<16>()?;
    let address = match family {
        FAMILY_NONE => None,
        FAMILY_V4 => {
            let [a, b, c, d, ..] = ip;
            Some(SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), port)))
        }
        FAMILY_V6 => Some(SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(ip), port, flow, scope))),
        unknown => return Err(DecodeError::Value { field: "address family", value: unknown.into() }),
    };
    let unused_is_zero = match address.map(|address| address.ip()) {
        None => port == 0 && flow == 0 && scope == 0 && ip == [0; 16],
        Some(IpAddr::V4(_)) => flow == 0 && scope == 0 && ip[4..] == [0; 12],
        Some(IpAddr::V6(_)) => true,
    };
    if unused_is_zero { Ok(address) } else { Err(DecodeError::Padding) }
}

/// Whether bytes that came from a gateway are of the kind that carries new connections.
pub(crate) fn are_connections(message: &[u8]) -> bool {
    message.get(6..8).is_some_and(|kind| kind == KIND_CONNECTIONS.to_le_bytes())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::{option, prelude::*, sample::select};

    fn hello() -> impl Strategy<Value = Hello> {
        (1..=MAX_WORKERS, any::<u32>(), any::<u64>()).prop_flat_map(|(workers, pid, features)| {
            (0..workers).prop_map(move |worker| Hello { worker, workers, pid, features })
        })
    }

    fn purpose() -> impl Strategy<Value = Purpose> {
        prop_oneof![
            "[a-z0-9-]{1,63}".prop_map(|name| Purpose::Serve(name.parse().unwrap())),
            select(&Refusal::ALL[..]).prop_map(Purpose::Refuse),
        ]
    }

    fn address() -> impl Strategy<Value = SocketAddr> {
        prop_oneof![
            any::<SocketAddrV4>().prop_map(SocketAddr::V4),
            (any::<Ipv6Addr>(), any::<u16>(), any::<u32>(), any::<u32>())
                .prop_map(|(ip, port, flow, scope)| SocketAddrV6::new(ip, port, flow, scope).into()),
        ]
    }

    prop_compose! {
        pub(crate) fn connection()(
            id: u64,
            accepted_at_ns: u64,
            protocol in select(&[Protocol::Http, Protocol::Https][..]),
            purpose in purpose(),
            peer in option::of(address()),
            local in option::of(address()),
        ) -> Connection {
            Connection { id, accepted_at_ns, protocol, purpose, peer, local }
        }
    }

    fn encoded(connections: &[Connection]) -> Bytes {
        let mut bytes = Bytes::new();
        assert_eq!(encode_connections(connections, &mut bytes), connections.len());
        bytes
    }

    fn decoded(bytes: &[u8]) -> Result<Vec<Connection>, DecodeError> {
        let mut connections = Vec::new();
        decode_connections(bytes, &mut connections).map(|()| connections)
    }

    fn example() -> Connection {
        Connection {
            id: 7,
            accepted_at_ns: 8,
            protocol: Protocol::Https,
            purpose: Purpose::Serve("echo".parse().unwrap()),
            peer: Some("192.0.2.1:4000".parse().unwrap()),
            local: Some("[2001:db8::1]:443".parse().unwrap()),
        }
    }

    proptest! {
        #[test]
        fn a_hello_survives(hello in hello()) {
            let mut bytes = Bytes::new();
            encode_hello(&hello, &mut bytes);
            prop_assert_eq!(bytes.len(), HELLO_BYTES);
            prop_assert_eq!(decode_hello(&bytes), Ok(hello));
        }

        #[test]
        fn connections_survive(connections in prop::collection::vec(connection(), 1..=MAX_BATCH)) {
            let bytes = encoded(&connections);
            prop_assert_eq!(bytes.len(), HEADER_BYTES + connections.len() * CONNECTION_BYTES);
            prop_assert_eq!(decoded(&bytes), Ok(connections));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..1000)) {
            prop_assert!(decode_hello(&bytes).is_err() && decoded(&bytes).is_err());
        }

        /// What is accepted is written the same way again, so that no byte means nothing.
        #[test]
        fn an_altered_byte_is_refused_or_means_something(
            connection in connection(), at in 0..HEADER_BYTES + CONNECTION_BYTES, value: u8
        ) {
            let mut bytes = encoded(&[connection]);
            bytes[at] = value;
            if let Ok(connections) = decoded(&bytes) {
                prop_assert_eq!(encoded(&connections), bytes);
            }
        }
    }

    #[test]
    fn every_prefix_and_every_extension_is_refused() {
        let mut hello = Bytes::new();
        encode_hello(&Hello { worker: 1, workers: 2, pid: 3, features: 4 }, &mut hello);
        let mut connections = encoded(&[example(), example()]);
        for end in 0..hello.len() {
            assert!(decode_hello(&hello[..end]).is_err(), "{end}");
        }
        for end in 0..connections.len() {
            assert!(decoded(&connections[..end]).is_err(), "{end}");
        }
        hello.push(0);
        connections.push(0);
        assert_eq!(decode_hello(&hello), Err(DecodeError::Length { says: 32, has: 33 }));
        assert_eq!(decoded(&connections), Err(DecodeError::Length { says: 304, has: 305 }));
    }

    #[test]
    fn a_length_that_lies_about_the_records_is_refused() {
        let mut bytes = encoded(&[example(), example()]);
        bytes[12] = 1;
        assert_eq!(decoded(&bytes), Err(DecodeError::Trailing(CONNECTION_BYTES)));
        bytes[12] = 3;
        assert_eq!(decoded(&bytes), Err(DecodeError::Short { missing: 8 }));
        for count in [0, MAX_BATCH as u8 + 1] {
            bytes[12] = count;
            assert_eq!(decoded(&bytes), Err(DecodeError::Count(count.into())));
        }
    }

    #[test]
    fn a_failed_decode_leaves_nothing_behind() {
        let mut bytes = encoded(&[example(), example()]);
        let last = bytes.len() - 1;
        bytes[last] = 1;
        let mut connections = vec![example()];
        assert_eq!(decode_connections(&bytes, &mut connections), Err(DecodeError::Padding));
        assert!(connections.is_empty());
    }

    /// Writes `value` at `at` of a message with one record and reads that.
    fn altered(at: usize, value: u8) -> Result<Vec<Connection>, DecodeError> {
        let mut bytes = encoded(&[example()]);
        bytes[at] = value;
        decoded(&bytes)
    }

    #[test]
    fn unknown_values_are_refused() {
        let unknown = |field, value| Err(DecodeError::Value { field, value });
        assert_eq!(altered(0, b'Q'), Err(DecodeError::Magic(*b"QTSM")));
        assert_eq!(altered(4, 2), Err(DecodeError::Version(2)));
        assert_eq!(altered(6, 1), Err(DecodeError::Kind { expected: KIND_CONNECTIONS, got: KIND_HELLO }));
        assert_eq!(altered(6, 3), Err(DecodeError::Kind { expected: KIND_CONNECTIONS, got: 3 }));
        assert_eq!(altered(14, 1), Err(DecodeError::Padding));

        let record = HEADER_BYTES;
        assert_eq!(altered(record + 16, 5), unknown("address family", 5));
        assert_eq!(altered(record + 16, 0), Err(DecodeError::Padding));
        assert_eq!(altered(record + 20, 1), Err(DecodeError::Padding));
        assert_eq!(altered(record + 43, 1), Err(DecodeError::Padding));
        assert_eq!(altered(record + 72, 3), unknown("protocol", 3));
        assert_eq!(altered(record + 73, 3), unknown("purpose", 3));
        assert_eq!(altered(record + 73, PURPOSE_REFUSE), unknown("name length", 4));
        assert_eq!(altered(record + 74, 1), unknown("refusal", 1));
        assert_eq!(altered(record + 75, 0), Err(DecodeError::Padding));
        assert_eq!(altered(record + 75, 5), Err(DecodeError::Name(InvalidName::Character(0))));
        assert_eq!(altered(record + 75, 64), unknown("name length", 64));
        let mut refused = encoded(&[Connection { purpose: Purpose::Refuse(Refusal::Timeout), ..example() }]);
        refused[record + 74] = 0;
        assert_eq!(decoded(&refused), unknown("refusal", 0));
        assert_eq!(altered(record + 76, b'E'), Err(DecodeError::Name(InvalidName::Character(b'E'))));
    }

    #[test]
    fn a_hello_names_a_worker_that_exists() {
        let mut bytes = Bytes::new();
        for (worker, workers, field) in [(0, 0, "workers"), (2, 2, "worker"), (0, MAX_WORKERS + 1, "workers")]
        {
            encode_hello(&Hello { worker, workers, pid: 1, features: 0 }, &mut bytes);
            assert!(matches!(decode_hello(&bytes), Err(DecodeError::Value { field: f, .. }) if f == field));
        }
        encode_hello(&Hello { worker: 0, workers: 1, pid: 1, features: u64::MAX }, &mut bytes);
        assert!(decode_hello(&bytes).is_ok(), "unknown features are an offer, not an error");
        bytes[12] = 2;
        assert_eq!(decode_hello(&bytes), Err(DecodeError::Count(2)));
    }

    #[test]
    fn a_batch_has_a_largest_size() {
        let mut bytes = Bytes::new();
        assert_eq!(encode_connections(&[example(); MAX_BATCH + 1], &mut bytes), MAX_BATCH);
        assert_eq!(bytes.len(), MAX_MESSAGE_BYTES);
        assert_eq!(decoded(&bytes).map(|connections| connections.len()), Ok(MAX_BATCH));
    }
}
