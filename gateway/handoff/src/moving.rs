//! The messages by which a connection moves from one instance to another, as bytes.
use common::{FunctionName, limits::FUNCTION_NAME_BYTES};

use crate::{
    DecodeError,
    message::{
        Bytes, CONNECTION_BYTES, Connection, HEADER_BYTES, MAX_BATCH, MAX_MESSAGE_BYTES, put, put_connection,
        put_header, take_connection, take_header,
    },
    reader::Reader,
};

/// What travels with the connections of one message: of each a request's head and what came with it, and a TLS session's
/// state with what it had not decrypted. With the records it stays below the send buffer that Linux gives a socket by
/// default.
pub const PAYLOAD_BYTES: usize = 176 * 1024;
/// Connections that move in one message: what a busy worker gives back in one turn is less.
pub const MAX_MOVES: usize = 32;
/// One flight of a key agreement: two certificate chains of the longest kind fit.
pub const FLIGHT_BYTES: usize = 64 * 1024;

const NAME_FIELD_BYTES: usize = 1 + FUNCTION_NAME_BYTES;
const GRANT_BYTES: usize = NAME_FIELD_BYTES + 8 + 8 + 4 + 2 + 1 + 1;
const FLIGHT_FIXED_BYTES: usize = NAME_FIELD_BYTES + 8 + 8 + 1 + 7;
const MOVE_BYTES: usize = CONNECTION_BYTES + 8 + 4 + 4;

/// The longest message on a pool connection.
pub const LONGEST_MESSAGE_BYTES: usize = HEADER_BYTES + MAX_MOVES * MOVE_BYTES + PAYLOAD_BYTES;

const _: () = assert!(HEADER_BYTES + FLIGHT_FIXED_BYTES + FLIGHT_BYTES <= LONGEST_MESSAGE_BYTES);
const _: () = assert!(HEADER_BYTES + MAX_MOVES * MOVE_BYTES <= MAX_MESSAGE_BYTES && MAX_MOVES <= MAX_BATCH);

const KIND_ASK: u16 = 3;
const KIND_GRANT: u16 = 4;
const KIND_FLIGHT: u16 = 5;
const KIND_RETURN: u16 = 6;
const KIND_MOVED: u16 = 7;
const KIND_REVOKE: u16 = 8;
const KIND_REVOKED: u16 = 9;
const KIND_DRAIN: u16 = 10;
const KIND_DRAINED: u16 = 11;

/// A worker's pool connection, as its gateway numbers it: the same number is never given twice by one gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId(pub u64);

/// The gateway's answer to the question where connections for a function may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    pub function: FunctionName,
    pub answer: GrantAnswer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantAnswer {
    Granted(Berth),
    /// There is no function of this name.
    Unknown,
    /// No instance of it takes connections now.
    Unavailable,
}

/// Places that are kept for connections which move to one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Berth {
    pub to: WorkerId,
    /// The instance that the worker belongs to, as its gateway numbers it.
    pub instance: u64,
    /// The worker's number within its instance.
    pub worker: u16,
    /// How many connections there is place for.
    pub places: u32,
}

/// Who sends a flight of a key agreement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Initiator,
    Responder,
}

/// A flight of a key agreement between two instances, which the gateway passes on without understanding it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flight<'a> {
    /// The worker at the other end: whom it is for on the way to the gateway, whom it is from on the way from it.
    pub peer: WorkerId,
    /// The function of that worker. On the way to the gateway it says nothing.
    pub function: FunctionName,
    /// The initiator's number for this agreement.
    pub agreement: u64,
    pub from: Role,
    pub bytes: &'a [u8],
}

/// A connection between two functions; its descriptor travels beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move<'a> {
    /// Its purpose names the function that it moves to.
    pub connection: Connection,
    /// The worker at the other end, as in a flight.
    pub peer: WorkerId,
    /// What the receiving function needs to go on; opaque to the gateway.
    pub payload: &'a [u8],
}

/// A message as its receiver sees it.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded<'a, M> {
    Said(M),
    /// Connections that move, each with a descriptor beside the message: RETURN from an instance, MOVED from a gateway.
    Moves(Vec<Move<'a>>),
}

impl<M> Decoded<'_, M> {
    /// How many descriptors belong to the message.
    pub fn descriptors(&self) -> usize {
        match self {
            Self::Said(_) => 0,
            Self::Moves(moves) => moves.len(),
        }
    }
}

/// What an instance says after HELLO, beside giving connections back.
#[derive(Debug, PartialEq, Eq)]
pub enum InstanceMessage<'a> {
    /// Where may connections for this function go?
    Ask(FunctionName),
    Flight(Flight<'a>),
    /// Nothing more will go to this worker from here.
    Revoked(WorkerId),
    /// Nothing more should come here.
    Drain,
}

/// What a gateway says beside handing connections over.
#[derive(Debug, PartialEq, Eq)]
pub enum GatewayMessage<'a> {
    Grant(Grant),
    Flight(Flight<'a>),
    /// This worker takes nothing more.
    Revoke(WorkerId),
    /// No connection comes any more; what the instance says is heard, and answered, until it ends. Only to those whose
    /// HELLO offered it.
    Drained,
}

/// How many of `moves` go with the next message.
pub fn moves_in_a_message(moves: &[Move<'_>]) -> usize {
    let mut payload_bytes = 0;
    let fits = |moved: &&Move<'_>| {
        payload_bytes += moved.payload.len();
        payload_bytes <= PAYLOAD_BYTES
    };
    moves.iter().take(MAX_MOVES).take_while(fits).count()
}

/// Writes a RETURN without the payloads that end it into `out`, which is cleared first. `moves` fit into a message.
pub fn encode_return(moves: &[Move<'_>], out: &mut Bytes) {
    put_moves(out, KIND_RETURN, moves);
}

/// As [`encode_return`], a MOVED.
pub fn encode_moved(moves: &[Move<'_>], out: &mut Bytes) {
    put_moves(out, KIND_MOVED, moves);
}

/// Writes all of a message but the flight or nothing that ends it into `out`, which is cleared first; that end is returned.
pub fn encode_instance_message<'a>(message: &InstanceMessage<'a>, out: &mut Bytes) -> &'a [u8] {
    out.clear();
    match message {
        InstanceMessage::Ask(function) => {
            put_header(out, KIND_ASK, 1, NAME_FIELD_BYTES);
            put_name(out, function);
            &[]
        }
        InstanceMessage::Flight(flight) => put_flight(out, flight),
        InstanceMessage::Revoked(worker) => {
            put_header(out, KIND_REVOKED, 1, 8);
            put(out, worker.0.to_le_bytes());
            &[]
        }
        InstanceMessage::Drain => {
            put_header(out, KIND_DRAIN, 1, 0);
            &[]
        }
    }
}

/// As [`encode_instance_message`].
pub fn encode_gateway_message<'a>(message: &GatewayMessage<'a>, out: &mut Bytes) -> &'a [u8] {
    out.clear();
    match message {
        GatewayMessage::Grant(grant) => {
            put_header(out, KIND_GRANT, 1, GRANT_BYTES);
            put_grant(out, grant);
            &[]
        }
        GatewayMessage::Flight(flight) => put_flight(out, flight),
        GatewayMessage::Revoke(worker) => {
            put_header(out, KIND_REVOKE, 1, 8);
            put(out, worker.0.to_le_bytes());
            &[]
        }
        GatewayMessage::Drained => {
            put_header(out, KIND_DRAINED, 1, 0);
            &[]
        }
    }
}

pub fn decode_instance_message(message: &[u8]) -> Result<Decoded<'_, InstanceMessage<'_>>, DecodeError> {
    decode(message, KIND_RETURN, |kind, reader| {
        Ok(match kind {
            KIND_ASK => InstanceMessage::Ask(take_name(reader)?),
            KIND_FLIGHT => InstanceMessage::Flight(take_flight(reader)?),
            KIND_REVOKED => InstanceMessage::Revoked(WorkerId(reader.u64()?)),
            KIND_DRAIN => InstanceMessage::Drain,
            got => return Err(DecodeError::Kind { expected: KIND_ASK, got }),
        })
    })
}

pub fn decode_gateway_message(message: &[u8]) -> Result<Decoded<'_, GatewayMessage<'_>>, DecodeError> {
    decode(message, KIND_MOVED, |kind, reader| {
        Ok(match kind {
            KIND_GRANT => GatewayMessage::Grant(take_grant(reader)?),
            KIND_FLIGHT => GatewayMessage::Flight(take_flight(reader)?),
            KIND_REVOKE => GatewayMessage::Revoke(WorkerId(reader.u64()?)),
            KIND_DRAINED => GatewayMessage::Drained,
            got => return Err(DecodeError::Kind { expected: KIND_GRANT, got }),
        })
    })
}

fn decode<'a, M>(
    message: &'a [u8],
    kind_of_moves: u16,
    take_said: impl FnOnce(u16, &mut Reader<'a>) -> Result<M, DecodeError>,
) -> Result<Decoded<'a, M>, DecodeError> {
    let mut reader = Reader(message);
    let (kind, count) = take_header(&mut reader, message.len())?;
    let decoded = match count {
        count if kind == kind_of_moves => Decoded::Moves(take_moves(&mut reader, count)?),
        1 => Decoded::Said(take_said(kind, &mut reader)?),
        count => return Err(DecodeError::Count(count)),
    };
    reader.end()?;
    Ok(decoded)
}

fn put_name(out: &mut Bytes, name: &FunctionName) {
    let mut field = [0; NAME_FIELD_BYTES];
    let bytes = name.as_bytes();
    field[0] = bytes.len() as u8;
    field[1..=bytes.len()].copy_from_slice(bytes);
    put(out, field);
}

fn take_name(reader: &mut Reader) -> Result<FunctionName, DecodeError> {
    let [length, padded @ ..] = reader.take::<NAME_FIELD_BYTES>()?;
    let (name, rest) = padded
        .split_at_checked(usize::from(length))
        .ok_or(DecodeError::Value { field: "name length", value: length.into() })?;
    if rest.iter().any(|&byte| byte != 0) {
        return Err(DecodeError::Padding);
    }
    FunctionName::new(name).map_err(DecodeError::Name)
}

fn put_grant(out: &mut Bytes, grant: &Grant) {
    let (answer, berth) = match grant.answer {
        GrantAnswer::Granted(berth) => (0, berth),
        GrantAnswer::Unknown => (1, NO_BERTH),
        GrantAnswer::Unavailable => (2, NO_BERTH),
    };
    put_name(out, &grant.function);
    put(out, berth.to.0.to_le_bytes());
    put(out, berth.instance.to_le_bytes());
    put(out, berth.places.to_le_bytes());
    put(out, berth.worker.to_le_bytes());
    put(out, [answer, 0]);
}

const NO_BERTH: Berth = Berth { to: WorkerId(0), instance: 0, worker: 0, places: 0 };

fn take_grant(reader: &mut Reader) -> Result<Grant, DecodeError> {
    let function = take_name(reader)?;
    let (to, instance) = (WorkerId(reader.u64()?), reader.u64()?);
    let (places, worker) = (reader.u32()?, reader.u16()?);
    let berth = Berth { to, instance, worker, places };
    let [answer] = reader.take()?;
    reader.zeros::<1>()?;
    let answer = match answer {
        0 if places > 0 => GrantAnswer::Granted(berth),
        0 => return Err(DecodeError::Value { field: "places", value: 0 }),
        1 | 2 if berth != NO_BERTH => return Err(DecodeError::Padding),
        1 => GrantAnswer::Unknown,
        2 => GrantAnswer::Unavailable,
        unknown => return Err(DecodeError::Value { field: "answer", value: unknown.into() }),
    };
    Ok(Grant { function, answer })
}

fn put_flight<'a>(out: &mut Bytes, flight: &Flight<'a>) -> &'a [u8] {
    put_header(out, KIND_FLIGHT, 1, FLIGHT_FIXED_BYTES + flight.bytes.len());
    put_name(out, &flight.function);
    put(out, flight.peer.0.to_le_bytes());
    put(out, flight.agreement.to_le_bytes());
    put(
        out,
        [match flight.from {
            Role::Initiator => 1,
            Role::Responder => 2,
        }],
    );
    put(out, [0; 7]);
    flight.bytes
}

fn take_flight<'a>(reader: &mut Reader<'a>) -> Result<Flight<'a>, DecodeError> {
    let function = take_name(reader)?;
    let (peer, agreement) = (WorkerId(reader.u64()?), reader.u64()?);
    let from = match reader.take()? {
        [1] => Role::Initiator,
        [2] => Role::Responder,
        [unknown] => return Err(DecodeError::Value { field: "role", value: unknown.into() }),
    };
    reader.zeros::<7>()?;
    let bytes = reader.rest(FLIGHT_BYTES)?;
    Ok(Flight { peer, function, agreement, from, bytes })
}

fn put_moves(out: &mut Bytes, kind: u16, moves: &[Move<'_>]) {
    debug_assert_eq!(moves_in_a_message(moves), moves.len());
    out.clear();
    let payload_bytes: usize = moves.iter().map(|moved| moved.payload.len()).sum();
    put_header(out, kind, moves.len() as u16, moves.len() * MOVE_BYTES + payload_bytes);
    for moved in moves {
        put_connection(out, &moved.connection);
        put(out, moved.peer.0.to_le_bytes());
        put(out, (moved.payload.len() as u32).to_le_bytes());
        put(out, [0; 4]);
    }
}

fn take_moves<'a>(reader: &mut Reader<'a>, count: u16) -> Result<Vec<Move<'a>>, DecodeError> {
    let count = usize::from(count);
    if count == 0 || count > MAX_MOVES {
        return Err(DecodeError::Count(count as u16));
    }
    let mut records = Reader(reader.bytes(count * MOVE_BYTES)?);
    if reader.0.len() > PAYLOAD_BYTES {
        return Err(DecodeError::Trailing(reader.0.len() - PAYLOAD_BYTES));
    }
    let mut take = || {
        let connection = take_connection(&mut records)?;
        let peer = WorkerId(records.u64()?);
        let payload_bytes = records.u32()?;
        records.zeros::<4>()?;
        Ok(Move { connection, peer, payload: reader.bytes(payload_bytes as usize)? })
    };
    (0..count).map(|_| take()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Purpose, tests::connection};
    use proptest::{prelude::*, sample::select};

    fn name() -> impl Strategy<Value = FunctionName> {
        "[a-z0-9-]{1,63}".prop_map(|name| name.parse().unwrap())
    }

    prop_compose! {
        fn grant()(function in name(), to: u64, instance: u64, worker: u16, places in 1u32.., answer in 0..3) -> Grant {
            let answer = match answer {
                0 => GrantAnswer::Granted(Berth { to: WorkerId(to), instance, worker, places }),
                1 => GrantAnswer::Unknown,
                _ => GrantAnswer::Unavailable,
            };
            Grant { function, answer }
        }
    }

    fn role() -> impl Strategy<Value = Role> {
        select(&[Role::Initiator, Role::Responder][..])
    }

    fn encoded<'a, M>(
        decoded: &Decoded<'a, M>,
        said: impl FnOnce(&M, &mut Bytes) -> &'a [u8],
        moves: impl FnOnce(&[Move<'a>], &mut Bytes),
    ) -> Vec<u8> {
        let mut fixed = Bytes::new();
        match decoded {
            Decoded::Said(message) => {
                let end = said(message, &mut fixed);
                [&fixed[..], end].concat()
            }
            Decoded::Moves(moved) => {
                moves(moved, &mut fixed);
                let payloads = moved.iter().flat_map(|moved| moved.payload);
                fixed.iter().chain(payloads).copied().collect()
            }
        }
    }

    fn from_instance<'a>(message: &Decoded<'a, InstanceMessage<'a>>) -> Vec<u8> {
        encoded(message, encode_instance_message, encode_return)
    }

    fn from_gateway<'a>(message: &Decoded<'a, GatewayMessage<'a>>) -> Vec<u8> {
        encoded(message, encode_gateway_message, encode_moved)
    }

    /// Messages of every kind, from both ends.
    fn both(
        function: FunctionName,
        grant: Grant,
        flight: Flight,
        moves: &[Move],
        worker: WorkerId,
    ) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        let instance = [
            Decoded::Said(InstanceMessage::Ask(function)),
            Decoded::Said(InstanceMessage::Flight(flight)),
            Decoded::Moves(moves.to_vec()),
            Decoded::Said(InstanceMessage::Revoked(worker)),
            Decoded::Said(InstanceMessage::Drain),
        ];
        let gateway = [
            Decoded::Said(GatewayMessage::Grant(grant)),
            Decoded::Said(GatewayMessage::Flight(flight)),
            Decoded::Moves(moves.to_vec()),
            Decoded::Said(GatewayMessage::Revoke(worker)),
            Decoded::Said(GatewayMessage::Drained),
        ];
        let mut encoded = (Vec::new(), Vec::new());
        for message in instance {
            let bytes = from_instance(&message);
            assert_eq!(decode_instance_message(&bytes), Ok(message));
            encoded.0.push(bytes);
        }
        for message in gateway {
            let bytes = from_gateway(&message);
            assert_eq!(decode_gateway_message(&bytes), Ok(message));
            encoded.1.push(bytes);
        }
        encoded
    }

    proptest! {
        #[test]
        fn messages_survive_and_every_altered_byte_means_something_or_is_refused(
            function in name(), grant in grant(), connection in connection(), from in role(), peer: u64, agreement: u64,
            payload in prop::collection::vec(any::<u8>(), 0..300), count in 1..=MAX_MOVES,
            at: prop::sample::Index, value: u8,
        ) {
            let peer = WorkerId(peer);
            let flight = Flight { peer, function, agreement, from, bytes: &payload };
            let payloads = (0..count).map(|skipped| payload.get(skipped..).unwrap_or_default());
            let moves: Vec<_> = payloads.map(|payload| Move { connection, peer, payload }).collect();
            let (instance, gateway) = both(function, grant, flight, &moves, peer);
            for mut bytes in instance {
                let at = at.index(bytes.len());
                bytes[at] = value;
                if let Ok(message) = decode_instance_message(&bytes) {
                    prop_assert_eq!(from_instance(&message), bytes);
                }
            }
            for mut bytes in gateway {
                let at = at.index(bytes.len());
                bytes[at] = value;
                if let Ok(message) = decode_gateway_message(&bytes) {
                    prop_assert_eq!(from_gateway(&message), bytes);
                }
            }
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..1000)) {
            prop_assert!(decode_instance_message(&bytes).is_err() && decode_gateway_message(&bytes).is_err());
        }
    }

    fn moved(payload: &[u8]) -> Move<'_> {
        let connection = Connection {
            id: 7,
            accepted_at_ns: 8,
            protocol: common::Protocol::Https,
            purpose: Purpose::Serve("hello".parse().unwrap()),
            peer: None,
            local: None,
        };
        Move { connection, peer: WorkerId(9), payload }
    }

    fn sample() -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        let function = "hello".parse().unwrap();
        let berth = Berth { to: WorkerId(1), instance: 2, worker: 3, places: 4 };
        both(
            function,
            Grant { function, answer: GrantAnswer::Granted(berth) },
            Flight { peer: WorkerId(5), function, agreement: 6, from: Role::Responder, bytes: &[] },
            &[moved(b""), moved(b"payload")],
            WorkerId(10),
        )
    }

    #[test]
    fn every_prefix_and_every_extension_is_refused() {
        let (instance, gateway) = sample();
        for bytes in instance {
            for length in 0..bytes.len() {
                assert!(decode_instance_message(&bytes[..length]).is_err());
            }
            assert!(decode_instance_message(&[&bytes[..], &[0]].concat()).is_err());
            assert!(decode_gateway_message(&bytes).is_err() || bytes[6] == KIND_FLIGHT as u8);
        }
        for bytes in gateway {
            for length in 0..bytes.len() {
                assert!(decode_gateway_message(&bytes[..length]).is_err());
            }
            assert!(decode_gateway_message(&[&bytes[..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn ends_beyond_their_bounds_are_refused() {
        let function = "hello".parse().unwrap();
        let bytes = vec![0; FLIGHT_BYTES + 1];
        let flight = |bytes| {
            let flight = Flight { peer: WorkerId(5), function, agreement: 6, from: Role::Initiator, bytes };
            from_instance(&Decoded::Said(InstanceMessage::Flight(flight)))
        };
        assert!(decode_instance_message(&flight(&bytes[1..])).is_ok());
        assert!(decode_instance_message(&flight(&bytes)).is_err());
    }

    #[test]
    fn a_message_holds_so_many_moves_and_payload_bytes() {
        let moves = |count, payload| vec![moved(payload); count];
        assert_eq!(moves_in_a_message(&[]), 0);
        assert_eq!(moves_in_a_message(&moves(MAX_MOVES + 1, &[])), MAX_MOVES);
        let half = vec![0; PAYLOAD_BYTES / 2];
        assert_eq!(moves_in_a_message(&moves(3, &half)), 2);
        let longest = moves(2, &half);
        let bytes = from_instance(&Decoded::Moves(longest.clone()));
        assert_eq!(decode_instance_message(&bytes), Ok(Decoded::Moves(longest)));
        assert!(bytes.len() <= LONGEST_MESSAGE_BYTES);

        for count in [0, MAX_MOVES as u16 + 1] {
            let mut bytes = Bytes::new();
            put_header(&mut bytes, KIND_RETURN, count, 0);
            assert_eq!(decode_instance_message(&bytes), Err(DecodeError::Count(count)));
        }
    }

    #[test]
    fn more_payload_than_a_message_holds_is_refused() {
        let one = from_instance(&Decoded::Moves(vec![moved(&[])]));
        let longer = |payload_bytes: usize| {
            let mut bytes = one.clone();
            let end = bytes.len();
            bytes[end - 8..end - 4].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
            bytes.resize(end + payload_bytes, 0);
            let length = bytes.len() as u32;
            bytes[8..12].copy_from_slice(&length.to_le_bytes());
            bytes
        };
        assert!(decode_instance_message(&longer(PAYLOAD_BYTES)).is_ok());
        assert_eq!(decode_instance_message(&longer(PAYLOAD_BYTES + 1)), Err(DecodeError::Trailing(1)));
    }
}
