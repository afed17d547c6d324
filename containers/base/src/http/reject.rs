//! Requests that are answered without a handler.
use http::StatusCode;

/// The answer to a request that no handler sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    pub status: StatusCode,
    /// What was wrong, for the person who reads the answer.
    pub sentence: &'static str,
}

impl Reject {
    pub const fn bad_request(sentence: &'static str) -> Self {
        Self { status: StatusCode::BAD_REQUEST, sentence }
    }

    pub const fn not_implemented(sentence: &'static str) -> Self {
        Self { status: StatusCode::NOT_IMPLEMENTED, sentence }
    }

    /// The answer's body is the sentence on a line.
    pub const fn text_bytes(self) -> u64 {
        self.sentence.len() as u64 + 1
    }

    pub const AUTHORITY_TOO_LONG: Self =
        Self { status: StatusCode::URI_TOO_LONG, sentence: "The request target's host is too long." };

    pub const REQUEST_LINE_TOO_LONG: Self =
        Self { status: StatusCode::URI_TOO_LONG, sentence: "The request line is longer than 8 KiB." };

    pub const HEAD_TOO_LONG: Self = Self {
        status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        sentence: "The request's head is longer than 64 KiB.",
    };

    pub const TOO_MANY_FIELDS: Self = Self {
        status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        sentence: "The request has more than 100 header fields.",
    };

    pub const VERSION: Self = Self {
        status: StatusCode::HTTP_VERSION_NOT_SUPPORTED,
        sentence: "Only HTTP/1.1 and HTTP/1.0 are spoken here.",
    };

    pub const EXPECTATION: Self = Self {
        status: StatusCode::EXPECTATION_FAILED,
        sentence: "The only expectation that can be met is 100-continue.",
    };

    pub const NO_FUNCTION: Self =
        Self { status: StatusCode::NOT_FOUND, sentence: "No function answers at this path." };

    pub const MISDIRECTED: Self = Self {
        status: StatusCode::MISDIRECTED_REQUEST,
        sentence: "This connection belongs to another function.",
    };

    pub const NO_INSTANCE: Self = Self {
        status: StatusCode::SERVICE_UNAVAILABLE,
        sentence: "No instance of this function takes connections now.",
    };

    pub const BODY_TOO_LONG: Self = Self {
        status: StatusCode::PAYLOAD_TOO_LARGE,
        sentence: "The request's body is longer than this function takes.",
    };

    pub const TIMEOUT: Self =
        Self { status: StatusCode::REQUEST_TIMEOUT, sentence: "The request did not arrive in time." };

    pub const INCOMPLETE: Self = Self::bad_request("The connection ended before the request was complete.");

    pub const FAILED: Self =
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, sentence: "The function failed." };
}
