//! Bytes on a pool connection: what is accepted as a message encodes to the same bytes.
#![no_main]
use handoff::message::{Bytes, decode_connections, decode_hello, encode_connections, encode_hello};
use handoff::moving::{
    Decoded, Move, decode_gateway_message, decode_instance_message, encode_gateway_message, encode_instance_message,
    encode_moved, encode_return, moves_in_a_message,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    let mut again = Bytes::new();
    if let Ok(hello) = decode_hello(message) {
        encode_hello(&hello, &mut again);
        assert_eq!(again, *message);
    }
    let mut connections = Vec::new();
    if decode_connections(message, &mut connections).is_ok() {
        assert_eq!(encode_connections(&connections, &mut again), connections.len());
        assert_eq!(again, *message);
    } else {
        assert!(connections.is_empty());
    }
    match decode_instance_message(message) {
        Ok(Decoded::Said(said)) => {
            let end = encode_instance_message(&said, &mut again);
            assert_eq!([&again[..], end].concat(), message);
        }
        Ok(Decoded::Moves(moves)) => {
            encode_return(&moves, &mut again);
            assert_eq!(with_payloads(&again, &moves), message);
        }
        Err(_) => {}
    }
    match decode_gateway_message(message) {
        Ok(Decoded::Said(said)) => {
            let end = encode_gateway_message(&said, &mut again);
            assert_eq!([&again[..], end].concat(), message);
        }
        Ok(Decoded::Moves(moves)) => {
            encode_moved(&moves, &mut again);
            assert_eq!(with_payloads(&again, &moves), message);
        }
        Err(_) => {}
    }
});

fn with_payloads(fixed: &[u8], moves: &[Move<'_>]) -> Vec<u8> {
    assert_eq!(moves_in_a_message(moves), moves.len());
    fixed.iter().chain(moves.iter().flat_map(|moved| moved.payload)).copied().collect()
}
