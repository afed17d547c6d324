//! What the kernel programs, the gateway and the functions must agree on, in one `no_std` crate.
#![cfg_attr(not(any(test, feature = "std")), no_std)]

pub mod limits;
pub mod name;
pub mod protocol;
pub mod refusal;

pub use name::{FunctionName, InvalidName};
pub use protocol::Protocol;
pub use refusal::Refusal;
