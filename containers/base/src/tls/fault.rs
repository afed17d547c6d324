//! What can be wrong with an established session, with the alert that says so to the peer.

use rustls::AlertDescription;
use thiserror::Error;

/// Why a session ended other than by close_notify.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Fault {
    #[error("a record doesn't authenticate")]
    BadRecordMac,
    #[error("a record is longer than TLS allows")]
    RecordOverflow,
    #[error("unexpected in an established session: {0}")]
    UnexpectedMessage(&'static str),
    #[error("malformed: {0}")]
    Decode(&'static str),
    #[error("a field has a value that TLS doesn't allow: {0}")]
    IllegalParameter(&'static str),
    #[error("more than a working peer sends: {0}")]
    TooMany(&'static str),
    #[error("the session's keys have sealed as many records as they may")]
    KeysExhausted,
    #[error("the peer gave up with the alert {0:?}")]
    PeerAlert(AlertDescription),
}

impl Fault {
    /// `None` where RFC 8446 §6.2 forbids an answer: an alert isn't answered by an alert.
    pub fn alert(self) -> Option<AlertDescription> {
        match self {
            Self::BadRecordMac => Some(AlertDescription::BadRecordMac),
            Self::RecordOverflow => Some(AlertDescription::RecordOverflow),
            // BoringSSL and rustls use the same for their caps; TLS has no alert that says "too many".
            Self::UnexpectedMessage(_) | Self::TooMany(_) => Some(AlertDescription::UnexpectedMessage),
            Self::Decode(_) => Some(AlertDescription::DecodeError),
            Self::IllegalParameter(_) => Some(AlertDescription::IllegalParameter),
            // The peer did nothing wrong; it may open a new connection at once.
            Self::KeysExhausted => Some(AlertDescription::CloseNotify),
            Self::PeerAlert(_) => None,
        }
    }
}
