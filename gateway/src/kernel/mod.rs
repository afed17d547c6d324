//! The kernel side of the gateway: the only module that knows BPF.
mod btf;
pub mod cgroup;
mod destroy;
mod inject;
pub mod selftest;

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf, SockHash},
    programs::{CgroupAttachMode, CgroupSockAddr, Program, ProgramError, SkSkb, SockOps},
};
use aya_log::EbpfLogger;
use common::{
    Verdict,
    limits::ROUTES,
    map_values::{Connection, Counter, Event, Offsets, Route, Settings},
    route::RouteKey,
    verdict::address,
};

pub use self::cgroup::Cgroup;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Btf(#[from] btf::Error),
    #[error("can't load the BPF object")]
    Object(#[from] aya::EbpfError),
    #[error("can't {operation} the BPF program {program}")]
    Program { operation: &'static str, program: &'static str, source: ProgramError },
    #[error("the BPF object has no {0}")]
    Missing(&'static str),
    #[error("can't use the BPF map {map}")]
    Map { map: &'static str, source: MapError },
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

/// The loaded and attached programs; they leave the kernel when this is dropped.
pub struct Kernel {
    tag: u32,
    connections: HashMap<MapData, u64, Shared<Connection>>,
    routes: HashMap<MapData, Shared<RouteKey>, Shared<Route>>,
    settings: Array<MapData, Shared<Settings>>,
    counters: PerCpuArray<MapData, u64>,
    events: RingBuf<MapData>,
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
    _programs: Ebpf,
}

/// The object that build.rs made of gateway-ebpf.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/gateway-ebpf"));

impl Kernel {
    /// Loads the programs and attaches them to the sockets of a cgroup.
    pub fn load(options: &Options, cgroup: &Cgroup) -> Result<Self, Error> {
        let tag = random_tag();
        let mut programs = EbpfLoader::new()
            .override_global("HTTP_PORT", &u32::from(options.http_port), true)
            .override_global("HTTPS_PORT", &u32::from(options.https_port), true)
            .override_global("TAG", &tag, true)
            .override_global("TRIM", &u32::from(options.trim), true)
            .override_global("OFFSETS", &Shared(btf::offsets()?), true)
            .load(OBJECT)?;
        // Without log statements in the object there is no map to read them from, which is no fault.
        let logger = EbpfLogger::init(&mut programs).ok();
        attach(&mut programs, cgroup)?;
        Ok(Self {
            tag,
            connections: take(&mut programs, "pm_connections")?,
            routes: take(&mut programs, "pm_routes")?,
            settings: take(&mut programs, "pm_settings")?,
            counters: take(&mut programs, "pm_counters")?,
            events: take(&mut programs, "pm_events")?,
            logger,
            _programs: programs,
        })
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
            .set(0, Shared(Settings { generation }), 0)
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
        Verdict::from_word(address::decode(self.tag, address)?)
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
        match self.connections.get(&cookie, 0) {
            Ok(Shared(connection)) => destroy::destroy(cookie, &connection),
            Err(_) => Ok(()),
        }
    }

    /// The cookies of the connections that still depend on the programs.
    pub fn enrolled(&self) -> Vec<u64> {
        self.connections.keys().flatten().collect()
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

fn attach(programs: &mut Ebpf, cgroup: &Cgroup) -> Result<(), Error> {
    let sockets: SockHash<_, u64> =
        SockHash::try_from(programs.map("pm_sockets").ok_or(Error::Missing("pm_sockets"))?)
            .map_err(|source| Error::Map { map: "pm_sockets", source })?;
    let sockets = sockets
        .fd()
        .try_clone()
        .map_err(|error| Error::Map { map: "pm_sockets", source: MapError::IoError(error) })?;
    // The verdict program stands before the first socket can be enrolled.
    let verdict: &mut SkSkb = program(programs, "pm_verdict")?;
    step("load", "pm_verdict", verdict.load())?;
    step("attach", "pm_verdict", verdict.attach(&sockets))?;
    for name in ["pm_peername4", "pm_peername6"] {
        let hook: &mut CgroupSockAddr = program(programs, name)?;
        step("load", name, hook.load())?;
        step("attach", name, hook.attach(cgroup, CgroupAttachMode::Single))?;
    }
    let enrol: &mut SockOps = program(programs, "pm_enrol")?;
    step("load", "pm_enrol", enrol.load())?;
    step("attach", "pm_enrol", enrol.attach(cgroup, CgroupAttachMode::Single))?;
    Ok(())
}

fn program<'a, T>(programs: &'a mut Ebpf, name: &'static str) -> Result<&'a mut T, Error>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = programs.program_mut(name).ok_or(Error::Missing(name))?;
    step("use", name, program.try_into())
}

fn step<T>(
    operation: &'static str,
    program: &'static str,
    result: Result<T, ProgramError>,
) -> Result<T, Error> {
    result.map_err(|source| Error::Program { operation, program, source })
}

fn take<T>(programs: &mut Ebpf, map: &'static str) -> Result<T, Error>
where
    T: TryFrom<Map, Error = MapError>,
{
    programs.take_map(map).ok_or(Error::Missing(map))?.try_into().map_err(|source| Error::Map { map, source })
}

fn parse_event(bytes: &[u8]) -> Option<(u64, Verdict)> {
    const BYTES: usize = size_of::<Event>();
    let bytes: &[u8; BYTES] = bytes.try_into().ok()?;
    let (cookie, rest) = bytes.split_first_chunk()?;
    let (word, _) = rest.split_first_chunk()?;
    Some((u64::from_ne_bytes(*cookie), Verdict::from_word(u32::from_ne_bytes(*word))?))
}

/// Hides nothing: it only keeps a second gateway's leftover programs from being believed.
fn random_tag() -> u32 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(std::process::id()) as u32 & address::TAG_MASK
}

/// A type of `common` as aya wants it.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Shared<T>(T);

// SAFETY: integers and arrays of them without padding, as their definitions assert or show.
unsafe impl Pod for Shared<Connection> {}
// SAFETY: as above.
unsafe impl Pod for Shared<RouteKey> {}
// SAFETY: as above.
unsafe impl Pod for Shared<Route> {}
// SAFETY: as above.
unsafe impl Pod for Shared<Settings> {}
// SAFETY: as above.
unsafe impl Pod for Shared<Offsets> {}
