//! Bytes on a pool connection: what is accepted as a message encodes to the same bytes.
#![no_main]
use handoff::message::{Bytes, decode_connections, decode_hello, encode_connections, encode_hello};
use handoff::moving::{
    decode_gateway_message, decode_instance_message, encode_gateway_message, encode_instance_message,
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
    if let Ok(decoded) = decode_instance_message(message) {
        let end = encode_instance_message(&decoded, &mut again);
        assert_eq!([&again[..], end].concat(), message);
    }
    if let Ok(decoded) = decode_gateway_message(message) {
        let end = encode_gateway_message(&decoded, &mut again);
        assert_eq!([&again[..], end].concat(), message);
    }
});
