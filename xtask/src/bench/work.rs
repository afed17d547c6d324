//! The kinds of work that sides are measured at.

use serde::{Deserialize, Serialize};

use crate::load::order::{Held, Hello, Load, Version};

use super::settings::Settings;

/// As many clients as keep two cores busy.
const MANY: usize = 32;
/// Few enough that the machine is not busy: where it is, segments gather before anybody looks at the first.
const SLOW: usize = 8;
const BODY_BYTES: u64 = 64 << 20;
/// Deep enough in the handshake of everybody's listener that nobody's answer is a matter of luck.
const HALF_HELLOS: usize = 5000;

/// The functions that are served: `one` and `two` answer shortly, `bulk` moves large bodies.
pub const FUNCTIONS: [&str; 3] = ["one", "two", "bulk"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    pub key: &'static str,
    pub title: &'static str,
    pub kind: Kind,
    pub port: Port,
    pub tls: Option<TlsWork>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsWork {
    pub version: Version,
    pub resume: bool,
    pub hello: Hello,
}

/// Which of a side's listeners the work is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Port {
    /// Routed by the path.
    Http,
    /// Routed by the server name, TLS ends in the function.
    Https,
    /// Each request is routed; a proxy has to end TLS for that.
    HttpsByRequest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    NewConnections {
        clients: usize,
    },
    KeepAlive {
        clients: usize,
    },
    /// The same, each request for the function that did not answer the last one.
    Alternating {
        clients: usize,
    },
    Download,
    Upload,
    /// Memory of connections that wait for their next request.
    Idle,
    /// Connections that don't complete their first flight, while others are served.
    HalfFlights,
    Garbage,
}

const FULL: TlsWork = TlsWork { version: Version::V13, resume: false, hello: Hello::Whole };

const fn hello(hello: Hello) -> Option<TlsWork> {
    Some(TlsWork { hello, ..FULL })
}

const fn work(key: &'static str, title: &'static str, kind: Kind, port: Port, tls: Option<TlsWork>) -> Work {
    Work { key, title, kind, port, tls }
}

pub const WORKS: [Work; 25] = [
    work(
        "http-new",
        "HTTP, a new connection for each request",
        Kind::NewConnections { clients: MANY },
        Port::Http,
        None,
    ),
    work(
        "tls-new",
        "TLS 1.3, a new connection for each request",
        Kind::NewConnections { clients: MANY },
        Port::Https,
        Some(FULL),
    ),
    work(
        "tls-resumed",
        "TLS 1.3, a new connection with a resumed session for each request",
        Kind::NewConnections { clients: MANY },
        Port::Https,
        Some(TlsWork { resume: true, ..FULL }),
    ),
    work("http-keepalive", "HTTP, keep-alive", Kind::KeepAlive { clients: MANY }, Port::Http, None),
    work("tls-keepalive", "TLS 1.3, keep-alive", Kind::KeepAlive { clients: MANY }, Port::Https, Some(FULL)),
    work(
        "http-alternating",
        "HTTP, keep-alive, each request for the other of two functions",
        Kind::Alternating { clients: MANY },
        Port::Http,
        None,
    ),
    work(
        "tls-alternating",
        "TLS 1.3, keep-alive, each request for the other of two functions",
        Kind::Alternating { clients: MANY },
        Port::HttpsByRequest,
        Some(FULL),
    ),
    work(
        "http-latency",
        "HTTP, one client, a new connection for each request",
        Kind::NewConnections { clients: 1 },
        Port::Http,
        None,
    ),
    work(
        "tls-latency",
        "TLS 1.3, one client, a new connection for each request",
        Kind::NewConnections { clients: 1 },
        Port::Https,
        Some(FULL),
    ),
    work(
        "http-keepalive-latency",
        "HTTP, one client, keep-alive",
        Kind::KeepAlive { clients: 1 },
        Port::Http,
        None,
    ),
    work(
        "tls-keepalive-latency",
        "TLS 1.3, one client, keep-alive",
        Kind::KeepAlive { clients: 1 },
        Port::Https,
        Some(FULL),
    ),
    work(
        "hello-split-2",
        "ClientHello in 2 segments, 2 ms apart",
        Kind::NewConnections { clients: SLOW },
        Port::Https,
        hello(Hello::Split { segments: 2 }),
    ),
    work(
        "hello-split-4",
        "ClientHello in 4 segments, 2 ms apart",
        Kind::NewConnections { clients: SLOW },
        Port::Https,
        hello(Hello::Split { segments: 4 }),
    ),
    work(
        "hello-large",
        "ClientHello as long as a post-quantum one",
        Kind::NewConnections { clients: MANY },
        Port::Https,
        hello(Hello::Large),
    ),
    work("http-down", "HTTP, 64 MiB down", Kind::Download, Port::Http, None),
    work("http-up", "HTTP, 64 MiB up", Kind::Upload, Port::Http, None),
    work("tls-down", "TLS 1.3, 64 MiB down", Kind::Download, Port::Https, Some(FULL)),
    work("tls-up", "TLS 1.3, 64 MiB up", Kind::Upload, Port::Https, Some(FULL)),
    work("http-idle", "Idle HTTP connections", Kind::Idle, Port::Http, None),
    work("tls-idle", "Idle TLS 1.3 connections", Kind::Idle, Port::Https, Some(FULL)),
    work(
        "half-requests",
        "New HTTP connections beside 5000 that don't complete their head",
        Kind::HalfFlights,
        Port::Http,
        None,
    ),
    work(
        "half-hellos",
        "New TLS connections beside 5000 that don't complete their hello",
        Kind::HalfFlights,
        Port::Https,
        Some(FULL),
    ),
    work("http-garbage", "Garbage at the HTTP port", Kind::Garbage, Port::Http, None),
    work("tls-garbage", "Garbage at the HTTPS port", Kind::Garbage, Port::Https, None),
    work(
        "tls12-new",
        "TLS 1.2, a new connection for each request",
        Kind::NewConnections { clients: MANY },
        Port::Https,
        Some(TlsWork { version: Version::V12, ..FULL }),
    ),
];

impl Work {
    pub fn find(key: &str) -> Option<&'static Self> {
        WORKS.iter().find(|work| work.key == key)
    }

    /// The functions whose answers are asked for, in turn; the first one's host is the connection's.
    pub fn functions(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Alternating { .. } => &["one", "two"],
            Kind::Download | Kind::Upload => &["bulk"],
            _ => &["one"],
        }
    }

    pub fn path(&self, function: &str) -> String {
        match self.kind {
            Kind::Download => format!("/function/{function}/{BODY_BYTES}"),
            _ => format!("/function/{function}"),
        }
    }

    pub fn load(&self, settings: &Settings) -> Load {
        match self.kind {
            Kind::NewConnections { .. } => Load::NewConnections,
            Kind::KeepAlive { .. } | Kind::Alternating { .. } => Load::KeepAlive,
            Kind::Download => Load::Download { bytes: BODY_BYTES },
            Kind::Upload => Load::Upload { bytes: BODY_BYTES },
            Kind::Idle => Load::Hold { count: settings.idle_connections, what: Held::Idle },
            Kind::HalfFlights => Load::Hold { count: HALF_HELLOS, what: Held::HalfFlight },
            Kind::Garbage => Load::Garbage,
        }
    }

    pub fn clients(&self) -> usize {
        match self.kind {
            Kind::NewConnections { clients }
            | Kind::KeepAlive { clients }
            | Kind::Alternating { clients } => clients,
            Kind::Garbage => MANY,
            Kind::Download | Kind::Upload | Kind::Idle | Kind::HalfFlights => 1,
        }
    }

    /// Whether bytes count instead of requests.
    pub fn is_bulk(&self) -> bool {
        matches!(self.kind, Kind::Download | Kind::Upload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_name_one_work_each() {
        for (index, work) in WORKS.iter().enumerate() {
            assert_eq!(WORKS.iter().position(|other| other.key == work.key), Some(index));
            assert_eq!(
                work.tls.is_some() || work.key == "tls-garbage",
                work.port != Port::Http,
                "{}",
                work.key
            );
            assert!(work.functions().iter().all(|name| FUNCTIONS.contains(name)));
        }
    }
}
