//! The Date field's value, formatted once a second on each thread.
use std::{
    cell::Cell,
    io::Write,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110 §5.6.7).
pub const DATE_BYTES: usize = 29;

thread_local! {
    static CACHED: Cell<(u64, [u8; DATE_BYTES])> = const { Cell::new((u64::MAX, [0; DATE_BYTES])) };
}

pub fn now() -> [u8; DATE_BYTES] {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (cached_seconds, cached) = CACHED.get();
    if seconds == cached_seconds {
        return cached;
    }
    let date = format(seconds);
    CACHED.set((seconds, date));
    date
}

fn format(seconds: u64) -> [u8; DATE_BYTES] {
    let mut date = [b' '; DATE_BYTES];
    // Every date is as long as the buffer.
    let _ = write!(&mut date[..], "{}", httpdate::HttpDate::from(UNIX_EPOCH + Duration::from_secs(seconds)));
    date
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_look_as_the_rfc_says() {
        assert_eq!(&format(784_111_777), b"Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(now().len(), httpdate::fmt_http_date(SystemTime::now()).len());
    }
}
