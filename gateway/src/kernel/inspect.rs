//! Looks into the maps and programs for whoever inspects the gateway, through descriptors of its own.
use std::{
    fs,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData, MapError, PerCpuArray, SockHash},
    programs::{ProgramError, ProgramInfo},
};
use common::{
    first_flight::FirstFlight,
    limits::{ENROLLED_CONNECTIONS, ROUTES},
    map_values::{Connection, Counter, Route},
    route::RouteKey,
};

use super::{Pins, Shared, attach};

const STATS_ENABLED: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Independent of the loop that uses the same maps; may be sent to another thread.
pub struct Inspection {
    counters: PerCpuArray<MapData, u64>,
    connections: HashMap<MapData, u64, Shared<Connection>>,
    flights: HashMap<MapData, u64, Shared<FirstFlight>>,
    routes: HashMap<MapData, Shared<RouteKey>, Shared<Route>>,
    sockets: SockHash<MapData, u64>,
    programs: Vec<(String, OwnedFd)>,
}

/// How full a map is.
pub struct Occupancy {
    pub map: &'static str,
    pub entries: usize,
    pub capacity: usize,
}

/// What a program took of the processors, while the kernel counted that.
pub struct RunTime {
    pub program: String,
    pub runs: u64,
    pub time: Duration,
}

impl Inspection {
    /// Before the maps are taken out of the object.
    pub(super) fn of(object: &Ebpf) -> Result<Self, super::Error> {
        Ok(Self {
            counters: second(object, "pm_counters")?,
            connections: second(object, "pm_connections")?,
            flights: second(object, "pm_flights")?,
            routes: second(object, "pm_routes")?,
            sockets: second(object, "pm_sockets")?,
            programs: object
                .programs()
                .filter_map(|(name, program)| {
                    let fd = program.fd().ok()?.as_fd().try_clone_to_owned().ok()?;
                    Some((name.to_owned(), fd))
                })
                .collect(),
        })
    }

    /// Of what a killed gateway left.
    pub(super) fn of_pinned(pins: &Pins) -> Result<Self, super::Error> {
        let program = |name: &'static str| {
            let fd = ProgramInfo::from_pin(pins.program(name)).and_then(|info| info.fd());
            let fd =
                fd.map_err(|source| super::Error::Program { operation: "open", program: name, source })?;
            let fd = fd.as_fd().try_clone_to_owned().map_err(ProgramError::IOError);
            fd.map(|fd| (name.to_owned(), fd)).map_err(|source| super::Error::Program {
                operation: "open",
                program: name,
                source,
            })
        };
        Ok(Self {
            counters: attach::pinned(pins, "pm_counters")?,
            connections: attach::pinned(pins, "pm_connections")?,
            flights: attach::pinned(pins, "pm_flights")?,
            routes: attach::pinned(pins, "pm_routes")?,
            sockets: attach::pinned(pins, "pm_sockets")?,
            programs: attach::PROGRAMS.into_iter().map(program).collect::<Result<_, _>>()?,
        })
    }

    /// Since the programs were loaded.
    pub fn counter(&self, counter: Counter) -> u64 {
        self.counters.get(&(counter as u32), 0).map(|values| values.iter().sum()).unwrap_or_default()
    }

    /// Counted key by key, so not for the gateway's loop.
    pub fn occupancy(&self) -> [Occupancy; 4] {
        let connections = |map, entries| Occupancy { map, entries, capacity: ENROLLED_CONNECTIONS };
        [
            connections("pm_sockets", count(self.sockets.keys(), ENROLLED_CONNECTIONS)),
            connections("pm_connections", count(self.connections.keys(), ENROLLED_CONNECTIONS)),
            connections("pm_flights", count(self.flights.keys(), ENROLLED_CONNECTIONS)),
            Occupancy { map: "pm_routes", entries: count(self.routes.keys(), ROUTES), capacity: ROUTES },
        ]
    }

    pub fn run_times(&self) -> Vec<RunTime> {
        self.programs.iter().filter_map(|(name, fd)| run_time(name, fd)).collect()
    }
}

/// Whether the kernel measures run times (sysctl kernel.bpf_stats_enabled), which costs each run two looks at a clock.
pub fn stats_enabled() -> bool {
    fs::read_to_string(STATS_ENABLED).is_ok_and(|value| value.trim() == "1")
}

/// Another descriptor of a map.
fn second<T>(object: &Ebpf, name: &'static str) -> Result<T, super::Error>
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = object.map(name).ok_or(super::Error::Missing(name))?;
    let (Map::HashMap(data) | Map::SockHash(data) | Map::PerCpuArray(data)) = map else {
        return Err(super::Error::Missing(name));
    };
    let open = || {
        let fd = data.fd().as_fd().try_clone_to_owned().map_err(MapError::IoError)?;
        T::try_from(Map::from_map_data(MapData::from_fd(fd)?)?)
    };
    open().map_err(|source| super::Error::Map { map: name, source })
}

/// A map that changes meanwhile begins anew when the key that was reached is gone; the bound ends that.
fn count<K>(keys: impl Iterator<Item = Result<K, MapError>>, capacity: usize) -> usize {
    keys.take(capacity).take_while(Result::is_ok).count()
}

/// As /proc says it of the program's descriptor (kernel/bpf/syscall.c, bpf_prog_show_fdinfo).
fn run_time(name: &str, fd: &OwnedFd) -> Option<RunTime> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok();
    Some(RunTime {
        program: name.to_owned(),
        runs: field("run_cnt:")?,
        time: Duration::from_nanos(field("run_time_ns:")?),
    })
}
