//! Networks that lie: segments that come twice, overlap, or never come.
pub mod inject;
pub mod loss;

pub use inject::Injector;
pub use loss::{Loss, PerMillion};
