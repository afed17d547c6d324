//! How much is received and worked on at once, away from the threads that serve connections.
use std::{sync::Arc, thread};

use base::Body;
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::refusal::Refusal;

/// An upload's size: more than any picture within the bound of pixels needs that was encoded with care.
pub const MAX_BODY_BYTES: u64 = 32 << 20;

/// Uploads that are held at once, in all; one more is refused instead of running out of memory.
const UPLOADS_KIB: u32 = 256 << 10;

/// Pictures that wait for each that is being worked on: at a tenth of a second each, nobody waits for a second.
const WAITING_PER_HAND: usize = 8;

pub struct Workshop {
    uploads_kib: Arc<Semaphore>,
    /// A place for what is worked on or waits to be.
    places: Arc<Semaphore>,
    /// One for each core: more would only share them, each with memory of its own.
    hands: Arc<Semaphore>,
}

/// A body, and its share of the memory for bodies.
pub struct Upload {
    pub bytes: Vec<u8>,
    _share: OwnedSemaphorePermit,
}

impl Workshop {
    pub fn new() -> Self {
        Self::with_hands(thread::available_parallelism().map_or(1, usize::from))
    }

    fn with_hands(hands: usize) -> Self {
        Self {
            uploads_kib: Arc::new(Semaphore::new(UPLOADS_KIB as usize)),
            places: Arc::new(Semaphore::new(hands * (1 + WAITING_PER_HAND))),
            hands: Arc::new(Semaphore::new(hands)),
        }
    }

    /// Receives a whole body. Its memory is set aside before, so that many large ones can't take it all.
    pub async fn receive(&self, body: Body) -> Result<Upload, Refusal> {
        let hint = body.size_hint();
        if hint.lower() > MAX_BODY_BYTES {
            return Err(Refusal::TooManyBytes);
        }
        let most = hint.upper().unwrap_or(MAX_BODY_BYTES).min(MAX_BODY_BYTES);
        let kib = most.div_ceil(1 << 10) as u32;
        let share =
            Arc::clone(&self.uploads_kib).try_acquire_many_owned(kib).map_err(|_| Refusal::Saturated)?;
        let mut bytes = Vec::with_capacity(hint.exact().unwrap_or(0) as usize);
        let mut body = Limited::new(body, MAX_BODY_BYTES as usize);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                if error.is::<LengthLimitError>() { Refusal::TooManyBytes } else { Refusal::Interrupted }
            })?;
            if let Some(data) = frame.data_ref() {
                bytes.extend_from_slice(data);
            }
        }
        if bytes.is_empty() { Err(Refusal::Empty) } else { Ok(Upload { bytes, _share: share }) }
    }

    /// Does work on a thread of its own when it is its turn. If the caller is dropped meanwhile, work that has begun
    /// still holds its place until it ends.
    pub async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| Refusal::Saturated)?;
        let hand = Arc::clone(&self.hands).acquire_owned().await.map_err(|_| Refusal::Failed)?;
        let done = tokio::task::spawn_blocking(move || {
            let _held = (place, hand);
            work()
        });
        done.await.unwrap_or_else(|error| {
            tracing::error!(%error, "a picture could not be worked on");
            Err(Refusal::Failed)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn work_beyond_hands_and_places_is_refused_at_once() {
        let workshop = Arc::new(Workshop::with_hands(1));
        let (go, gate) = mpsc::channel::<()>();
        let (began, begun) = tokio::sync::oneshot::channel();
        let first = tokio::spawn({
            let workshop = Arc::clone(&workshop);
            async move {
                let work = move || {
                    began.send(()).unwrap();
                    gate.recv().map_err(|_| Refusal::Failed)
                };
                workshop.work(work).await
            }
        });
        begun.await.unwrap();
        let waiting: Vec<_> = (0..WAITING_PER_HAND)
            .map(|index| {
                let workshop = Arc::clone(&workshop);
                tokio::spawn(async move { workshop.work(move || Ok(index)).await })
            })
            .collect();
        // Each has had its turn to take a place.
        tokio::task::yield_now().await;
        assert!(matches!(workshop.work(|| Ok(())).await, Err(Refusal::Saturated)));
        go.send(()).unwrap();
        assert!(first.await.unwrap().is_ok());
        for (index, waiting) in waiting.into_iter().enumerate() {
            assert_eq!(waiting.await.unwrap().unwrap(), index);
        }
        assert!(workshop.work(|| Ok(())).await.is_ok());
    }

    #[tokio::test]
    async fn a_panic_is_that_pictures_alone() {
        let workshop = Workshop::with_hands(1);
        let panicked = workshop.work(|| -> Result<(), _> { panic!("as a decoder may") }).await;
        assert!(matches!(panicked, Err(Refusal::Failed)));
        assert!(workshop.work(|| Ok(())).await.is_ok());
    }

    #[tokio::test]
    async fn uploads_have_a_size_and_share_a_memory() {
        let workshop = Workshop::with_hands(1);
        let body = |bytes: u64| Body::from(vec![1u8; bytes as usize]);
        assert!(matches!(workshop.receive(body(MAX_BODY_BYTES + 1)).await, Err(Refusal::TooManyBytes)));
        assert!(matches!(workshop.receive(Body::empty()).await, Err(Refusal::Empty)));
        let mut held = Vec::new();
        for _ in 0..UPLOADS_KIB as u64 * 1024 / MAX_BODY_BYTES {
            held.push(workshop.receive(body(MAX_BODY_BYTES)).await.unwrap());
        }
        assert!(matches!(workshop.receive(body(1)).await, Err(Refusal::Saturated)));
        held.pop();
        assert_eq!(workshop.receive(body(1)).await.unwrap().bytes, [1]);
    }
}
