//! How many files, and so connections, the benchmark's processes may have open.

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Two for each of ten thousand connections through a proxy, and room.
const WANTED: u64 = 65_536;
/// What a proxy needs besides connections.
const RESERVED: u64 = 1000;

/// Raises the limit, which everything that is started inherits, and gives it.
pub fn raise() -> Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if hard >= WANTED || setrlimit(Resource::RLIMIT_NOFILE, WANTED, WANTED).is_err() {
        // A root that may not raise the hard limit has less, as in some containers.
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")?;
    }
    limit()
}

pub fn limit() -> Result<u64> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?.0)
}

/// How many connections at once a proxy with this limit can carry.
pub fn connections(limit: u64) -> usize {
    usize::try_from(limit.saturating_sub(RESERVED) / 2).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_needs_two_descriptors_a_connection() {
        assert_eq!(connections(20_000), 9500);
        assert_eq!(connections(10), 0);
    }
}
