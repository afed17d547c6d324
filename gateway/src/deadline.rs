//! A moment that may never come.
use tokio::time::{Instant, sleep_until};

/// Done at the deadline; never without one.
pub async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
