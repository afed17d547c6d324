//! The kernel side of the gateway: the only module that knows BPF.
mod attach;
pub mod bpffs;
mod btf;
pub mod cgroup;
mod destroy;
mod inject;
pub mod inspect;
pub mod pins;
pub mod proof;
pub mod selftest;
mod verifier;

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
    path::Path,
};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, MapData, MapError, PerCpuArray, RingBuf, SockHash},
    pin::PinError,
    programs::{ProgramError, SkSkb, links::PinnedLink},
};
use aya_log::EbpfLogger;
use common::{
    Verdict,
    first_flight::FirstFlight,
    limits::ROUTES,
    map_values::{Connection, Counter, Event, Offsets, Route, Settings},
    route::RouteKey,
    verdict::address,
};

use self::inspect::Inspection;
pub use self::{cgroup::Cgroup, pins::Pins};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Btf(#[from] btf::Error),
    #[error("can't load the BPF object")]
    Object(#[from] aya::EbpfError),
    #[error("can't {operation} the BPF program {program}")]
    Program { operation: &'static str, program: &'static str, source: ProgramError },
    #[error("the kernel refuses the BPF program {program} ({complaint})")]
    Refused { program: &'static str, complaint: String, source: io::Error },
    #[error("the BPF object has no {0}")]
    Missing(&'static str),
    #[error("can't use the BPF map {map}")]
    Map { map: &'static str, source: MapError },
    #[error("can't pin {object}")]
    Pin { object: &'static str, source: PinError },
    #[error(transparent)]
    Label(#[from] pins::Error),
    #[error("the pinned {0} is not attached to the gateway's cgroup any more")]
    Detached(&'static str),
    #[error("can't destroy a connection")]
    Destroy(#[source] io::Error),
    #[error("{routes} routes are more than the kernel's table takes ({ROUTES})")]
    TooManyRoutes { routes: usize },
}

/// What the programs have to know before they run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub http_port: u16,
    pub https_port: u16,
    /// Off only where a test has to show what trimming prevents.
    pub trim: bool,
}

impl Options {
    /// Says which gateways can go on with the programs and maps of another: those with the same object, and the same
    /// values in it.
    pub fn layout(&self) -> String {
        let trim = if self.trim { "" } else { "-untrimmed" };
        format!("{OBJECT_ID}-{}-{}{trim}", self.http_port, self.https_port)
    }
}

/// The loaded and attached programs; without pins they leave the kernel when this is dropped.
pub struct Kernel {
    /// Drawn at each start, so that nobody takes another gateway's verdicts for its own.
    tag: u16,
    sockets: SockHash<MapData, u64>,
    connections: HashMap<MapData, u64, Shared<Connection>>,
    routes: HashMap<MapData, Shared<RouteKey>, Shared<Route>>,
    settings: Array<MapData, Shared<Settings>>,
    counters: PerCpuArray<MapData, u64>,
    events: RingBuf<MapData>,
    logger: Option<Logger>,
    inspection: Option<Inspection>,
    _programs: Programs,
}

#[expect(dead_code, reason = "held, so that they live and a look at this process shows them")]
enum Programs {
    Loaded(Ebpf, Vec<PinnedLink>),
    Adopted(Box<SkSkb>, Vec<PinnedLink>),
}

type Logger = EbpfLogger<&'static dyn log::Log>;

/// The object that build.rs made of gateway-ebpf.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/gateway-ebpf"));

/// Tells objects apart.
const OBJECT_ID: &str = env!("POINTSMAN_OBJECT_ID");

impl Kernel {
    /// Loads the programs and attaches them to the sockets of a cgroup; with pins they outlive this process.
    pub fn load(options: &Options, cgroup: &Cgroup, pins: Option<&Pins>) -> Result<Self, Error> {
        let mut programs = EbpfLoader::new()
            .override_global("HTTP_PORT", &u32::from(options.http_port), true)
            .override_global("HTTPS_PORT", &u32::from(options.https_port), true)
            .override_global("TRIM", &u32::from(options.trim), true)
            .override_global("OFFSETS", &Shared(btf::offsets()?), true)
            .load(OBJECT)?;
        // Without log statements in the object there is no map to read them from, which is no fault.
        let logger = EbpfLogger::init(&mut programs).ok();
        if let Some(pins) = pins {
            attach::pin_maps(&programs, pins)?;
        }
        let links = attach::attach(&mut programs, cgroup, pins)?;
        let inspection = Some(Inspection::of(&programs)?);
        let mut take = |map| programs.take_map(map).ok_or(Error::Missing(map));
        Ok(Self {
            tag: random_tag(),
            sockets: attach::typed("pm_sockets", take("pm_sockets")?)?,
            connections: attach::typed("pm_connections", take("pm_connections")?)?,
            routes: attach::typed("pm_routes", take("pm_routes")?)?,
            settings: attach::typed("pm_settings", take("pm_settings")?)?,
            counters: attach::typed("pm_counters", take("pm_counters")?)?,
            events: attach::typed("pm_events", take("pm_events")?)?,
            logger,
            inspection,
            _programs: Programs::Loaded(programs, links),
        })
    }

    /// Goes on with what a killed gateway left, if all of it is still at work in the cgroup of this id.
    pub fn adopt(pins: &Pins, cgroup_id: u64) -> Result<Self, Error> {
        let links = attach::attached_links(pins, cgroup_id)?;
        let sockets = attach::pinned(pins, "pm_sockets")?;
        let (verdict, logger) = attach::verdict_again(pins, &sockets)?;
        let mut kernel = Self {
            tag: random_tag(),
            sockets,
            connections: attach::pinned(pins, "pm_connections")?,
            routes: attach::pinned(pins, "pm_routes")?,
            settings: attach::pinned(pins, "pm_settings")?,
            counters: attach::pinned(pins, "pm_counters")?,
            events: attach::pinned(pins, "pm_events")?,
            logger,
            inspection: Some(Inspection::of_pinned(pins)?),
            _programs: Programs::Adopted(Box::new(verdict), links),
        };
        kernel.forget_routes()?;
        Ok(kernel)
    }

    /// No connection that was not handed over has survived its gateway, so nobody holds a route.
    fn forget_routes(&mut self) -> Result<(), Error> {
        let keys: Vec<_> = self.routes.keys().flatten().collect();
        for key in keys {
            self.routes.remove(&key).map_err(|source| Error::Map { map: "pm_routes", source })?;
        }
        Ok(())
    }

    /// For the one who inspects, once.
    pub fn take_inspection(&mut self) -> Option<Inspection> {
        self.inspection.take()
    }

    /// Makes a generation's routes known, then makes new verdicts use them.
    pub fn publish(
        &mut self,
        generation: u16,
        routes: impl ExactSizeIterator<Item = (RouteKey, u16)>,
    ) -> Result<(), Error> {
        if routes.len() > ROUTES {
            return Err(Error::TooManyRoutes { routes: routes.len() });
        }
        for (key, index) in routes {
            self.routes
                .insert(Shared(key), Shared(Route { index }), 0)
                .map_err(|source| Error::Map { map: "pm_routes", source })?;
        }
        self.settings
            .set(0, Shared(Settings { generation, tag: self.tag }), 0)
            .map_err(|source| Error::Map { map: "pm_settings", source })
    }

    /// Removes routes that no connection can hold a verdict of.
    pub fn withdraw(&mut self, routes: impl Iterator<Item = RouteKey>) {
        for key in routes {
            match self.routes.remove(&Shared(key)) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => {
                    tracing::warn!(%error, "a former route can't be removed from the kernel's table")
                }
            }
        }
    }

    /// What `accept4` said in place of the peer's address; `None` when it is the peer's.
    pub fn verdict_at_accept(&self, address: SocketAddr) -> Option<Verdict> {
        Verdict::from_word(address::decode(self.tag.into(), address)?)
    }

    /// What is known by now of an enrolled connection.
    pub fn verdict_of(&self, cookie: u64) -> Option<Verdict> {
        Verdict::from_word(self.connections.get(&cookie, 0).ok()?.0.verdict)
    }

    /// Hands the events that have come to `take`, and logs what the programs had to say.
    pub fn drain_events(&mut self, mut take: impl FnMut(u64, Verdict)) {
        while let Some(item) = self.events.next() {
            if let Some((cookie, verdict)) = parse_event(&item) {
                take(cookie, verdict);
            } else {
                tracing::error!("the kernel wrote an event that is none");
            }
        }
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
    }

    /// Ends a connection whose bytes can't be kept exact, whoever has it now.
    pub fn destroy(&self, cookie: u64) -> io::Result<()> {
        destroy_listed(&self.connections, cookie)
    }

    /// The cookies of the connections that still depend on the programs.
    pub fn enrolled(&self) -> Vec<u64> {
        // A socket that was closed has left the SOCKHASH, and one that was destroyed has no entry.
        let is_known = |cookie: &u64| self.connections.get(cookie, 0).is_ok();
        self.sockets.keys().flatten().filter(is_known).collect()
    }

    pub fn counter(&self, counter: Counter) -> u64 {
        self.counters.get(&(counter as u32), 0).map(|values| values.iter().sum()).unwrap_or_default()
    }
}

/// Readable when an event has come.
impl AsFd for Kernel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.events.as_raw_fd()) }
    }
}

impl std::os::fd::AsRawFd for Kernel {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.events.as_raw_fd()
    }
}

/// Ends the connections that depend on a set of pins which nobody owns any more.
fn destroy_all(set: &Path) -> Result<(), Error> {
    let map = pins::connections(set).map_err(|source| Error::Map { map: "pm_connections", source })?;
    let connections: HashMap<_, u64, Shared<Connection>> = attach::typed("pm_connections", map)?;
    for cookie in connections.keys().flatten() {
        destroy_listed(&connections, cookie).map_err(Error::Destroy)?;
    }
    Ok(())
}

fn destroy_listed(connections: &HashMap<MapData, u64, Shared<Connection>>, cookie: u64) -> io::Result<()> {
    match connections.get(&cookie, 0) {
        Ok(Shared(connection)) => destroy::destroy(cookie, &connection),
        // It ended by itself meanwhile.
        Err(_) => Ok(()),
    }
}

fn parse_event(bytes: &[u8]) -> Option<(u64, Verdict)> {
    const BYTES: usize = size_of::<Event>();
    let bytes: &[u8; BYTES] = bytes.try_into().ok()?;
    let (cookie, rest) = bytes.split_first_chunk()?;
    let (word, _) = rest.split_first_chunk()?;
    Some((u64::from_ne_bytes(*cookie), Verdict::from_word(u32::from_ne_bytes(*word))?))
}

/// Hides nothing: it only keeps a second gateway's leftover programs from being believed.
fn random_tag() -> u16 {
    use std::hash::{BuildHasher as _, RandomState};
    (RandomState::new().hash_one(std::process::id()) as u32 & address::TAG_MASK) as u16
}

/// A type of `common` as aya wants it.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Shared<T>(T);

// SAFETY: integers and arrays of them without padding, as their definitions assert or show.
unsafe impl Pod for Shared<Connection> {}
// SAFETY: as above.
unsafe impl Pod for Shared<FirstFlight> {}
// SAFETY: as above.
unsafe impl Pod for Shared<RouteKey> {}
// SAFETY: as above.
unsafe impl Pod for Shared<Route> {}
// SAFETY: as above.
unsafe impl Pod for Shared<Settings> {}
// SAFETY: as above.
unsafe impl Pod for Shared<Offsets> {}
