//! What a handler is: a tower service, seen without its type parameters.
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};

use super::body::Body;

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Every `tower::Service<Request<Body>>` whose response has a body of `Bytes`; nothing implements it otherwise.
pub trait Service: Clone + 'static {
    type Body: http_body::Body<Data = Bytes, Error: Into<BoxError>>;
    type Error: Into<BoxError>;
    type Future: Future<Output = Result<Response<Self::Body>, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>>;
    fn call(&mut self, request: Request<Body>) -> Self::Future;
}

impl<S, B> Service for S
where
    S: tower_service::Service<Request<Body>, Response = Response<B>, Error: Into<BoxError>> + Clone + 'static,
    B: http_body::Body<Data = Bytes, Error: Into<BoxError>>,
{
    type Body = B;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        tower_service::Service::poll_ready(self, cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        tower_service::Service::call(self, request)
    }
}
