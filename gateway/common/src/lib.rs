//! What the kernel programs, the gateway and the functions must agree on, in one `no_std` crate.
#![cfg_attr(not(any(test, feature = "std")), no_std)]

pub mod client_hello;
pub mod first_flight;
pub mod limits;
pub mod map_values;
pub mod name;
pub mod protocol;
pub mod refusal;
pub mod request_line;
pub mod route;
pub mod target;
pub mod verdict;

pub use name::{FunctionName, InvalidName};
pub use protocol::Protocol;
pub use refusal::Refusal;
pub use target::Target;
pub use verdict::Verdict;
