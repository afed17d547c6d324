//! Why a request gets no picture, as a status and a sentence.
use http::StatusCode;
use image::ImageError;

use crate::{
    geometry::{MAX_OUTPUT_PIXELS, MAX_OUTPUT_SIDE},
    picture::{MAX_DECODED_BYTES, MAX_PIXELS, MAX_SIDE},
    workshop::{MAX_BODY_BYTES, UPLOAD_TIMEOUT},
};

#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("{0}")]
    Parameters(String),
    #[error("A picture is sent with POST or PUT; GET explains how.")]
    Method,
    #[error("The body is empty: send a PNG, JPEG or WebP picture.")]
    Empty,
    #[error("The body did not arrive as a whole.")]
    Interrupted,
    #[error("The body took more than {} s to arrive.", UPLOAD_TIMEOUT.as_secs())]
    TooSlow,
    #[error("The body has more than {} MiB.", MAX_BODY_BYTES >> 20)]
    TooManyBytes,
    #[error("The body is not a PNG, JPEG or WebP picture.")]
    UnknownFormat,
    #[error("A picture must be sent without Content-Encoding.")]
    ContentEncoding,
    #[error("The picture has {width} x {height} pixels; at most {MAX_PIXELS} are taken, {MAX_SIDE} a side.")]
    TooManyPixels { width: u32, height: u32 },
    #[error("The picture needs more than {} MiB of memory.", MAX_DECODED_BYTES >> 20)]
    TooMuchMemory,
    #[error(
        "The result would have {width} x {height} pixels; at most {MAX_OUTPUT_PIXELS} are made, {MAX_OUTPUT_SIDE} a side."
    )]
    ResultTooLarge { width: u64, height: u64 },
    #[error("The picture can't be read: {0}.")]
    Broken(ImageError),
    #[error("All hands are busy; try again in a moment.")]
    Saturated,
    /// Not the client's fault; the log has the reason.
    #[error("The picture could not be made.")]
    Failed,
}

impl Refusal {
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Parameters(_) | Self::Empty | Self::Interrupted => StatusCode::BAD_REQUEST,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::TooManyBytes => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnknownFormat | Self::ContentEncoding => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::TooManyPixels { .. }
            | Self::TooMuchMemory
            | Self::ResultTooLarge { .. }
            | Self::Broken(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Saturated => StatusCode::SERVICE_UNAVAILABLE,
            Self::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}
