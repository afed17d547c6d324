//! How much is received and worked on at once, away from the threads that serve connections.
use std::{pin::pin, sync::Arc, thread, time::Duration};

use base::BoxError;
use bytes::Bytes;
use http_body::Body;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::refusal::Refusal;

/// An upload's size: more than any picture within the bound of pixels needs that was encoded with care.
pub const MAX_BODY_BYTES: u64 = 32 << 20;

/// Uploads that are held at once, in all; one more is refused instead of running out of memory.
const UPLOADS_KIB: u32 = 256 << 10;

/// From the head to the last byte: a photo of five megabytes at one megabit a second takes 40 s. Whoever dribbles holds
/// what it has sent for no longer than this.
pub const UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);

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
    share: OwnedSemaphorePermit,
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

    /// Receives a whole body within a bound of time. Its memory is set aside as it comes: what is only announced takes
    /// nothing from others.
    pub async fn receive<B>(&self, body: B) -> Result<Upload, Refusal>
    where
        B: Body<Data = Bytes, Error: Into<BoxError>>,
    {
        timeout(UPLOAD_TIMEOUT, self.collect(body)).await.unwrap_or(Err(Refusal::TooSlow))
    }

    async fn collect<B>(&self, body: B) -> Result<Upload, Refusal>
    where
        B: Body<Data = Bytes, Error: Into<BoxError>>,
    {
        let hint = body.size_hint();
        if hint.lower() > MAX_BODY_BYTES {
            return Err(Refusal::TooManyBytes);
        }
        let most_bytes = hint.upper().unwrap_or(MAX_BODY_BYTES).min(MAX_BODY_BYTES) as usize;
        let mut upload = Upload { bytes: Vec::new(), share: self.share(0)? };
        let mut body = pin!(Limited::new(body, MAX_BODY_BYTES as usize));
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                if error.is::<LengthLimitError>() { Refusal::TooManyBytes } else { Refusal::Interrupted }
            })?;
            if let Some(data) = frame.data_ref() {
                self.make_room(&mut upload, data.len(), most_bytes)?;
                upload.bytes.extend_from_slice(data);
            }
        }
        if upload.bytes.is_empty() { Err(Refusal::Empty) } else { Ok(upload) }
    }

    /// Room is doubled, so that bytes are rarely moved, but never beyond what can come.
    fn make_room(&self, upload: &mut Upload, more_bytes: usize, most_bytes: usize) -> Result<(), Refusal> {
        let Upload { bytes, share } = upload;
        let needed_bytes = bytes.len() + more_bytes;
        if needed_bytes > bytes.capacity() {
            let room_bytes = (2 * bytes.capacity()).min(most_bytes).max(needed_bytes);
            share.merge(self.share(room_bytes.div_ceil(1 << 10) - share.num_permits())?);
            bytes.reserve_exact(room_bytes - bytes.len());
        }
        Ok(())
    }

    fn share(&self, kib: usize) -> Result<OwnedSemaphorePermit, Refusal> {
        // A body's bound in KiB fits.
        let kib = kib as u32;
        Arc::clone(&self.uploads_kib).try_acquire_many_owned(kib).map_err(|_| Refusal::Saturated)
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
    use std::{
        convert::Infallible,
        pin::Pin,
        sync::mpsc,
        task::{Context, Poll},
    };

    use http_body::Frame;

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
        let body = |bytes: u64| base::Body::from(vec![1u8; bytes as usize]);
        assert!(matches!(workshop.receive(body(MAX_BODY_BYTES + 1)).await, Err(Refusal::TooManyBytes)));
        assert!(matches!(workshop.receive(base::Body::empty()).await, Err(Refusal::Empty)));
        let mut held = Vec::new();
        for _ in 0..UPLOADS_KIB as u64 * 1024 / MAX_BODY_BYTES {
            held.push(workshop.receive(body(MAX_BODY_BYTES)).await.unwrap());
        }
        assert!(matches!(workshop.receive(body(1)).await, Err(Refusal::Saturated)));
        held.pop();
        assert_eq!(workshop.receive(body(1)).await.unwrap().bytes, [1]);
    }

    /// Pieces of a body whose client then says no more, or ends it.
    struct Pieces {
        left: usize,
        ends: bool,
    }

    const PIECE: [u8; 1000] = [1; 1000];

    impl Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            match self.left {
                0 if self.ends => Poll::Ready(None),
                0 => Poll::Pending,
                _ => {
                    self.left -= 1;
                    Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&PIECE)))))
                }
            }
        }
    }

    fn taken_kib(workshop: &Workshop) -> usize {
        UPLOADS_KIB as usize - workshop.uploads_kib.available_permits()
    }

    #[tokio::test]
    async fn an_upload_takes_the_memory_that_it_needs() {
        let workshop = Workshop::with_hands(1);
        let upload = workshop.receive(Pieces { left: 1000, ends: true }).await.unwrap();
        assert_eq!(upload.bytes, vec![1; 1_000_000]);
        assert_eq!(taken_kib(&workshop), upload.bytes.capacity().div_ceil(1 << 10));
        assert!(upload.bytes.capacity() < 2 * upload.bytes.len());
        drop(upload);
        assert_eq!(taken_kib(&workshop), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_stops_holds_what_it_sent_and_not_for_ever() {
        let workshop = Workshop::with_hands(1);
        let mut slow = pin!(workshop.receive(Pieces { left: 1, ends: false }));
        assert!(timeout(UPLOAD_TIMEOUT / 2, &mut slow).await.is_err());
        assert_eq!(taken_kib(&workshop), 1);
        assert!(matches!(slow.await, Err(Refusal::TooSlow)));
        assert_eq!(taken_kib(&workshop), 0);
    }
}
