//! What a function is told when it is started, by arguments or by its environment.
use std::{env, path::PathBuf, time::Duration};

use clap::Parser;
use common::FunctionName;

use crate::{http::Limits, moves::Policy};

/// Serves one function behind Pointsman.
///
/// A function takes its listening socket, named "pool", from LISTEN_FDS: it is started by `pointsman supervise` or by a
/// systemd socket unit, and the gateway hands client connections over to it. Listening TCP sockets named "http" and
/// "https" are served too, by themselves or beside it: such a function needs no gateway, and every connection is its own.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Options {
    /// The function's name, as in /function/NAME [default: the program's name]
    #[arg(long, env = "POINTSMAN_NAME", value_name = "NAME")]
    pub name: Option<FunctionName>,

    /// The domains under which NAME.DOMAIN is a function's host
    #[arg(
        long,
        env = "POINTSMAN_DOMAINS",
        value_name = "DOMAIN",
        value_delimiter = ',',
        default_value = "faas.local,localhost"
    )]
    pub domains: Vec<String>,

    /// The function's hosts beside NAME.DOMAIN
    #[arg(long, env = "POINTSMAN_HOSTS", value_name = "HOST", value_delimiter = ',')]
    pub hosts: Vec<String>,

    /// Hosts under no domain that are other functions': requests for them are sent away
    #[arg(long, env = "POINTSMAN_OTHER_HOSTS", value_name = "HOST", value_delimiter = ',')]
    pub other_hosts: Vec<String>,

    /// The certificate chain (PEM); a file passed in LISTEN_FDS as "certificate" comes first
    #[arg(long, env = "POINTSMAN_CERTIFICATE", value_name = "FILE", requires = "key")]
    pub certificate: Option<PathBuf>,

    /// The certificate's private key (PEM); a file passed in LISTEN_FDS as "key" comes first
    #[arg(long, env = "POINTSMAN_KEY", value_name = "FILE", requires = "certificate")]
    pub key: Option<PathBuf>,

    /// The certificates (PEM) that vouch for other functions, to which TLS sessions may then move; a file passed in
    /// LISTEN_FDS as "anchors" comes first [default: no session moves]
    #[arg(long, env = "POINTSMAN_ANCHORS", value_name = "FILE")]
    pub anchors: Option<PathBuf>,

    /// The functions that connections may move to: names between commas, or * for every one
    #[arg(long, env = "POINTSMAN_MOVES_TO", value_name = "NAMES", default_value = "*")]
    pub moves_to: Policy,

    /// Worker threads [default: one per core]
    #[arg(
        long,
        env = "POINTSMAN_WORKERS",
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=i64::from(handoff::MAX_WORKERS))
    )]
    pub workers: Option<u16>,

    /// Open connections of one worker; more wait in its queue, and then at the gateway
    #[arg(
        long,
        env = "POINTSMAN_MAX_CONNECTIONS",
        value_name = "N",
        default_value_t = 16_384,
        value_parser = clap::value_parser!(u32).range(handoff::MAX_BATCH as i64..)
    )]
    pub max_connections: u32,

    /// The only user whose gateway is let in [default: root and the function's own user]
    #[arg(long, env = "POINTSMAN_GATEWAY_UID", value_name = "UID")]
    pub gateway_uid: Option<u32>,

    /// Write a line of JSON to standard output for each answer
    #[arg(long, env = "POINTSMAN_ACCESS_LOG", value_parser = clap::builder::FalseyValueParser::new())]
    pub access_log: bool,

    #[command(flatten)]
    limits: LimitOptions,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Limits of a connection")]
struct LimitOptions {
    /// For a TLS handshake, and for a head from its first byte to its last
    #[arg(long, env = "POINTSMAN_HEAD_TIMEOUT_MS", value_name = "MS", default_value_t = 10_000)]
    head_timeout_ms: u64,

    /// Between requests, and without progress of a body
    #[arg(long, env = "POINTSMAN_IDLE_TIMEOUT_MS", value_name = "MS", default_value_t = 75_000)]
    idle_timeout_ms: u64,

    /// For requests in progress when the function is asked to stop
    #[arg(long, env = "POINTSMAN_STOP_TIMEOUT_MS", value_name = "MS", default_value_t = 10_000)]
    stop_timeout_ms: u64,

    /// The longest request body [default: any]
    #[arg(long, env = "POINTSMAN_MAX_BODY_BYTES", value_name = "BYTES")]
    max_body_bytes: Option<u64>,

    /// Requests on one connection [default: any]
    #[arg(
        long,
        env = "POINTSMAN_MAX_REQUESTS",
        value_name = "N",
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    max_requests: Option<u64>,
}

impl Options {
    /// The function's name; a program that wasn't told it goes by its own.
    pub fn function_name(&self) -> Option<FunctionName> {
        self.name.or_else(|| {
            let program = PathBuf::from(env::args_os().next()?);
            program.file_name()?.to_str()?.parse().ok()
        })
    }

    pub fn worker_threads(&self) -> u16 {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.unwrap_or_else(|| cores().min(usize::from(handoff::MAX_WORKERS)) as u16)
    }

    pub fn allowed_uids(&self) -> handoff::AllowedUids {
        self.gateway_uid.map_or(handoff::AllowedUids::RootAndOwn, handoff::AllowedUids::Only)
    }

    pub fn limits(&self) -> Limits {
        let limits = &self.limits;
        Limits {
            head_timeout: Duration::from_millis(limits.head_timeout_ms),
            idle_timeout: Duration::from_millis(limits.idle_timeout_ms),
            stop_timeout: Duration::from_millis(limits.stop_timeout_ms),
            body_bytes: limits.max_body_bytes,
            requests: limits.max_requests.unwrap_or(u64::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn arguments_become_options() {
        let arguments =
            ["x", "--name", "echo", "--domains", "a,b", "--workers", "3", "--idle-timeout-ms", "5"];
        let options = Options::try_parse_from(arguments).unwrap();
        assert_eq!(options.function_name(), "echo".parse().ok());
        assert_eq!(options.domains, ["a", "b"]);
        assert_eq!(options.worker_threads(), 3);
        assert_eq!(options.limits().idle_timeout, Duration::from_millis(5));
        assert_eq!(options.max_connections, 16_384);
        for wrong in [
            &["x", "--name", "Echo"][..],
            &["x", "--workers", "0"],
            &["x", "--max-connections", "63"],
            &["x", "--certificate", "c.pem"],
        ] {
            assert!(Options::try_parse_from(wrong).is_err(), "{wrong:?}");
        }
    }
}
