//! The request to stop, heard by every connection of a worker.
use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    task::{Context, Poll, Waker},
};

use slab::Slab;

/// One per worker; waiting for it costs nothing after the first time.
#[derive(Clone, Default)]
pub struct Stop(Rc<Inner>);

#[derive(Default)]
struct Inner {
    requested: Cell<bool>,
    waiting: RefCell<Slab<Waker>>,
}

impl Stop {
    pub fn request(&self) {
        self.0.requested.set(true);
        let waiting: Vec<Waker> = self.0.waiting.borrow().iter().map(|(_, waker)| waker.clone()).collect();
        waiting.into_iter().for_each(Waker::wake);
    }

    pub fn is_requested(&self) -> bool {
        self.0.requested.get()
    }

    pub fn listener(&self) -> Listener {
        Listener { stop: self.clone(), key: None }
    }
}

/// What one task hears the request with.
pub struct Listener {
    stop: Stop,
    key: Option<usize>,
}

impl Listener {
    pub fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.stop.is_requested() {
            return Poll::Ready(());
        }
        let mut waiting = self.stop.0.waiting.borrow_mut();
        match self.key {
            Some(key) => waiting[key].clone_from(cx.waker()),
            None => self.key = Some(waiting.insert(cx.waker().clone())),
        }
        Poll::Pending
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.stop.0.waiting.borrow_mut().remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test]
    async fn whoever_waits_hears_it_and_whoever_left_is_forgotten() {
        let stop = Stop::default();
        let (mut first, mut left) = (stop.listener(), stop.listener());
        assert!(poll_fn(|cx| Poll::Ready(left.poll(cx))).await.is_pending());
        drop(left);
        let requested = stop.clone();
        let both = tokio::join!(poll_fn(|cx| first.poll(cx)), async move { requested.request() });
        assert_eq!(both, ((), ()));
        drop(first);
        assert!(stop.0.waiting.borrow().is_empty());
        poll_fn(|cx| stop.listener().poll(cx)).await;
    }
}
