//! The wire between the gateway and function instances: messages that carry connections as file descriptors.
//!
//! The gateway holds a [`GatewayEnd`], the instance an [`InstanceEnd`]; `docs/wire.md` shows what passes between them.
mod channel;
mod counters;
mod directory;
mod error;
pub mod listen_fds;
mod listener;
pub mod message;
pub mod moving;
mod page;
mod reader;
mod shared;
mod tickets;

pub use channel::{
    Arrivals, FromInstance, GatewayEnd, Greeting, InstanceEnd, MessageBuffer, ReceiveBuffer, Received,
    SendError,
};
pub use counters::{BUCKETS, Counters, Counts, DURATION_BOUNDS_NS, Histogram, Kind, Method, WAIT_BOUNDS_NS};
pub use directory::FunctionsDirectory;
pub use error::Error;
pub use listen_fds::ListenFds;
pub use listener::{AllowedUids, PoolConnection, PoolListener};
pub use message::{Connection, DecodeError, Hello, MAX_BATCH, MAX_WORKERS, Purpose};
pub use moving::{
    Berth, Flight, GatewayMessage, Grant, GrantAnswer, InstanceMessage, MAX_MOVES, Move, PAYLOAD_BYTES, Role,
    WorkerId,
};
pub use page::{STATUS_PAGE_BYTES, StatusReader, StatusWriter};
pub use tickets::{
    TICKET_KEY_BYTES, TICKET_NAME_BYTES, TICKET_PERIOD, TicketKey, TicketKeysReader, TicketKeysWriter,
    TicketPeriod,
};
