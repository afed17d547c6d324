//! A connection's deadline, which moves with every request without touching the timer wheel.
use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::time::{Duration, Instant, Sleep, sleep_until};

/// What a connection waits for; each wait has a deadline of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The next request's first byte.
    Request,
    /// The same on a connection that ends with it.
    LastRequest,
    /// The rest of a head.
    Head,
    /// More of a body.
    Body,
    /// The client to read.
    Reader,
}

/// The deadline of the current wait.
///
/// The timer in the runtime's wheel lags behind: when it fires too early it is set again. A connection that is busy
/// changes its deadline often and its timer once in a time-out.
#[derive(Default)]
pub struct Timer {
    deadline: Option<(Wait, Instant)>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Timer {
    /// Begins to wait, or goes on waiting; ready when that took too long.
    pub fn poll(&mut self, wait: Wait, at_most: Duration, cx: &mut Context<'_>) -> Poll<()> {
        let deadline = match self.deadline {
            Some((current, deadline)) if current == wait => deadline,
            _ => Instant::now() + at_most,
        };
        self.deadline = Some((wait, deadline));
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        while sleep.as_mut().poll(cx).is_ready() {
            if sleep.deadline() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
        Poll::Pending
    }

    /// What was waited for has come; the next wait has its full time.
    pub fn stop(&mut self) {
        self.deadline = None;
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const SHORT: Duration = Duration::from_secs(5);
    const LONG: Duration = Duration::from_secs(60);

    async fn begin(timer: &mut Timer, wait: Wait, at_most: Duration) {
        assert!(poll_fn(|cx| Poll::Ready(timer.poll(wait, at_most, cx))).await.is_pending());
    }

    async fn expire(timer: &mut Timer, wait: Wait, at_most: Duration) -> u64 {
        let begin = Instant::now();
        poll_fn(|cx| timer.poll(wait, at_most, cx)).await;
        begin.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn another_wait_has_its_own_deadline() {
        let mut timer = Timer::default();
        begin(&mut timer, Wait::Head, SHORT).await;
        assert_eq!(expire(&mut timer, Wait::Request, LONG).await, 60);
        let mut timer = Timer::default();
        begin(&mut timer, Wait::Request, LONG).await;
        assert_eq!(expire(&mut timer, Wait::Head, SHORT).await, 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_goes_on_until_it_is_stopped() {
        let mut timer = Timer::default();
        begin(&mut timer, Wait::Body, SHORT).await;
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(expire(&mut timer, Wait::Body, SHORT).await, 2);
        timer.stop();
        assert_eq!(expire(&mut timer, Wait::Body, SHORT).await, 5);
    }
}
