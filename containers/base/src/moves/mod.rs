//! Connections that leave for other functions or instances, and those that come from them.
mod agreement;
mod keyring;
mod luggage;
mod mover;
mod negotiations;
mod pairs;
mod policy;
mod post;
mod sealing;
pub mod succession;
mod wait;

pub use agreement::Agreements;
pub use luggage::{Luggage, State};
pub use mover::{Mover, Moving, Origin, Place, Refused};
pub use policy::Policy;
pub use post::{Letter, Post};
pub use succession::{Prospect, Succession};
