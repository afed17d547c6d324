//! A function that moves large bodies: it answers `/N` with N bytes, and a body that it is sent with its length.
use std::{
    convert::Infallible,
    pin::Pin,
    process::ExitCode,
    task::{Context, Poll},
};

use base::Body;
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt, Either, Full};

/// More than a socket's buffer takes at a time.
static PIECE: [u8; 256 * 1024] = [b'x'; 256 * 1024];

fn main() -> ExitCode {
    base::serve(|| tower::service_fn(|request| async { Ok::<_, Infallible>(answer(request).await) }))
}

async fn answer(request: Request<Body>) -> Response<Either<Full<Bytes>, Repeated>> {
    match request.uri().path().trim_start_matches('/').parse() {
        Ok(bytes) => Response::new(Either::Right(Repeated { left: bytes })),
        Err(_) => Response::new(Either::Left(Full::from(format!("{}\n", count(request.into_body()).await)))),
    }
}

/// Reads all of it and keeps none.
async fn count(mut body: Body) -> u64 {
    let mut bytes = 0;
    while let Some(Ok(frame)) = body.frame().await {
        bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
    }
    bytes
}

/// A body of one byte again and again.
struct Repeated {
    left: u64,
}

impl http_body::Body for Repeated {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let length = self.left.min(PIECE.len() as u64);
        self.left -= length;
        let piece = (length > 0).then(|| Ok(Frame::data(Bytes::from_static(&PIECE[..length as usize]))));
        Poll::Ready(piece)
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
