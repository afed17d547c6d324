//! What a connection takes along to another instance, and its encoding.
use common::{FunctionName, Protocol};
use handoff::PAYLOAD_BYTES;
use zeroize::Zeroizing;

use crate::tls::{SessionState, StateError};

const FORMAT: u8 = 1;
const FIXED_BYTES: usize = 1 + 8 + 1;

/// What a sealed payload needs beside its luggage.
const SEAL_BYTES_MAX: usize = 1024;

/// A connection between two requests, without its socket.
pub struct Luggage {
    /// The function that the client came for, to which targets without a function's name belong.
    pub home: FunctionName,
    /// Requests that were answered on this connection.
    pub requests: u64,
    pub state: State,
}

pub enum State {
    /// What was read and belongs to the next request.
    Plain(Vec<u8>),
    Tls(Box<SessionState>),
}

#[derive(Debug, thiserror::Error)]
pub enum LuggageError {
    #[error("what a connection takes along ends too early")]
    Truncated,
    #[error("what a connection takes along has the unknown format {0}")]
    UnknownFormat(u8),
    #[error("what a connection takes along names no function")]
    Home,
    #[error("a connection would take {0} bytes along, which is too much")]
    TooLong(usize),
    #[error(transparent)]
    Session(#[from] StateError),
}

impl Luggage {
    pub fn encode(&self) -> Result<Zeroizing<Vec<u8>>, LuggageError> {
        let session;
        let rest = match &self.state {
            State::Plain(input) => input.as_slice(),
            State::Tls(state) => {
                session = state.encode();
                session.as_slice()
            }
        };
        let home = self.home.as_bytes();
        let bytes = FIXED_BYTES + home.len() + rest.len();
        if bytes > PAYLOAD_BYTES - SEAL_BYTES_MAX {
            return Err(LuggageError::TooLong(bytes));
        }
        // Reserved at once, with room for its seal, because a vector that grows leaves copies of the keys behind.
        let mut output = Zeroizing::new(Vec::with_capacity(bytes + SEAL_BYTES_MAX));
        output.push(FORMAT);
        output.extend_from_slice(&self.requests.to_le_bytes());
        output.push(home.len() as u8);
        output.extend_from_slice(home);
        output.extend_from_slice(rest);
        Ok(output)
    }

    pub fn decode(protocol: Protocol, bytes: &[u8]) -> Result<Self, LuggageError> {
        let (fixed, rest) = bytes.split_first_chunk::<FIXED_BYTES>().ok_or(LuggageError::Truncated)?;
        let [format, requests @ .., home_bytes] = fixed;
        if *format != FORMAT {
            return Err(LuggageError::UnknownFormat(*format));
        }
        let (home, rest) = rest.split_at_checked(usize::from(*home_bytes)).ok_or(LuggageError::Truncated)?;
        Ok(Self {
            home: FunctionName::new(home).map_err(|_| LuggageError::Home)?,
            requests: u64::from_le_bytes(*requests),
            state: match protocol {
                Protocol::Http => State::Plain(rest.to_vec()),
                Protocol::Https => State::Tls(Box::new(SessionState::decode(rest)?)),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(input: &[u8]) -> Luggage {
        Luggage { home: "echo".parse().unwrap(), requests: 7, state: State::Plain(input.to_vec()) }
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        for input in [&b""[..], b"GET /function/hello HTTP/1.1\r\n\r\n"] {
            let bytes = plain(input).encode().unwrap();
            let luggage = Luggage::decode(Protocol::Http, &bytes).unwrap();
            assert_eq!((luggage.home.as_str(), luggage.requests), ("echo", 7));
            assert!(matches!(luggage.state, State::Plain(unpacked) if unpacked == input));
        }
    }

    #[test]
    fn what_can_not_be_luggage_is_refused() {
        let bytes = plain(b"").encode().unwrap();
        for length in 0..bytes.len() {
            assert!(Luggage::decode(Protocol::Http, &bytes[..length]).is_err(), "{length}");
        }
        for (at, value) in [(0, 0), (0, 2), (9, 0), (9, 64), (10, b'E')] {
            let mut changed = bytes.to_vec();
            changed[at] = value;
            assert!(Luggage::decode(Protocol::Http, &changed).is_err(), "{at} {value}");
        }
        assert!(Luggage::decode(Protocol::Https, &bytes).is_err());
    }

    #[test]
    fn too_much_stays() {
        assert!(plain(&vec![0; PAYLOAD_BYTES - SEAL_BYTES_MAX - 100]).encode().is_ok());
        assert!(matches!(plain(&vec![0; PAYLOAD_BYTES]).encode(), Err(LuggageError::TooLong(_))));
    }
}
