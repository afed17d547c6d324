//! What a function's process does before it serves: logging, hardening, limits.
use std::io::{self, IsTerminal};

use nix::{
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
    },
    unistd::{User, geteuid, setgroups, setresgid, setresuid},
};
use tracing_subscriber::EnvFilter;

/// Descriptors that aren't connections: sockets of the pool, epoll, files of the function itself.
const RESERVED_DESCRIPTORS: u64 = 64;

/// Logs go to stderr, where the parent reads them.
pub(crate) fn log() {
    let filter = EnvFilter::try_from_env("POINTSMAN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let terminal = io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(terminal);
    // Only a program that set up its own logging before has any already.
    let _ = if terminal { lines.try_init() } else { lines.without_time().try_init() };
}

/// Keeps keys and clients' data from other processes and from the disk, and this process from gaining rights.
pub(crate) fn harden() -> io::Result<()> {
    prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    prctl::set_no_new_privs()?;
    Ok(())
}

/// Raises the limit of open descriptors as far as it goes, and says how many connections that leaves room for.
pub(crate) fn raise_descriptor_limit() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard.saturating_sub(RESERVED_DESCRIPTORS).max(1))
}

/// A process that needs nothing of root's gives it up for good.
pub(crate) fn become_nobody() -> io::Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let nobody = User::from_name("nobody")?
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no user `nobody`"))?;
    setgroups(&[])?;
    setresgid(nobody.gid, nobody.gid, nobody.gid)?;
    setresuid(nobody.uid, nobody.uid, nobody.uid)?;
    Ok(())
}
