//! Attaches the programs and pins them, or finds those that were pinned before.
use std::fs;

use aya::{
    Ebpf,
    maps::{Map, MapData, MapError, SockHash},
    programs::{
        CgroupAttachMode, CgroupSockAddr, Program, ProgramError, SkSkb, SkSkbKind, SockOps,
        links::{FdLink, LinkError, PinnedLink},
    },
};
use aya_log::EbpfLogger;

use super::{Cgroup, Error, Logger, Pins, verifier};

/// The programs that a link attaches to the cgroup; the verdict program is the SOCKHASH's.
const LINKED: [&str; 3] = ["pm_peername4", "pm_peername6", "pm_enrol"];

pub const PROGRAMS: [&str; 4] = ["pm_peername4", "pm_peername6", "pm_enrol", "pm_verdict"];

/// Of all maps that are ours; what a library keeps beside them dies with the programs.
const MAPS: [&str; 8] = [
    "pm_sockets",
    "pm_connections",
    "pm_flights",
    "pm_routes",
    "pm_settings",
    "pm_events",
    "pm_counters",
    "pm_scratch",
];

pub fn pin_maps(programs: &Ebpf, pins: &Pins) -> Result<(), Error> {
    for name in MAPS {
        let map = programs.map(name).ok_or(Error::Missing(name))?;
        map.pin(pins.map(name)).map_err(|source| Error::Pin { object: name, source })?;
    }
    Ok(())
}

/// Loads and attaches every program, and pins it and its link where there are pins.
pub fn attach(programs: &mut Ebpf, cgroup: &Cgroup, pins: Option<&Pins>) -> Result<Vec<PinnedLink>, Error> {
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
    let attached = step("attach", "pm_verdict", verdict.attach(&sockets))?;
    if let Some(pins) = pins {
        pin(pins, "pm_verdict", |path| verdict.pin(path))?;
        // The map holds the program; to detach it with this process would strand connections.
        std::mem::forget(step("keep", "pm_verdict", verdict.take_link(attached))?);
    }
    let mut links = Vec::new();
    for name in ["pm_peername4", "pm_peername6"] {
        let hook: &mut CgroupSockAddr = program(programs, name)?;
        step("load", name, hook.load())?;
        let attached = step("attach", name, hook.attach(cgroup, CgroupAttachMode::Single))?;
        if let Some(pins) = pins {
            pin(pins, name, |path| hook.pin(path))?;
            links.push(pin_link(pins, name, step("keep", name, hook.take_link(attached))?.try_into())?);
        }
    }
    let enrol: &mut SockOps = program(programs, "pm_enrol")?;
    step("load", "pm_enrol", enrol.load())?;
    let attached = step("attach", "pm_enrol", enrol.attach(cgroup, CgroupAttachMode::Single))?;
    if let Some(pins) = pins {
        pin(pins, "pm_enrol", |path| enrol.pin(path))?;
        let link = step("keep", "pm_enrol", enrol.take_link(attached))?;
        links.push(pin_link(pins, "pm_enrol", link.try_into())?);
    }
    Ok(links)
}

/// The pinned links, if each still does its work on the cgroup of this id.
pub fn attached_links(pins: &Pins, cgroup_id: u64) -> Result<Vec<PinnedLink>, Error> {
    LINKED.into_iter().map(|name| attached_link(pins, name, cgroup_id)).collect()
}

fn attached_link(pins: &Pins, name: &'static str, cgroup_id: u64) -> Result<PinnedLink, Error> {
    let unusable = |_: LinkError| Error::Detached(name);
    let link = FdLink::from(PinnedLink::from_pin(pins.link(name)).map_err(unusable)?);
    let id = link.info().map_err(unusable)?.id();
    if cgroup_of(id) != Some(cgroup_id) {
        return Err(Error::Detached(name));
    }
    PinnedLink::from_pin(pins.link(name)).map_err(unusable)
}

/// The cgroup that an open link of this process is attached to, as the kernel prints it (proc(5), fdinfo): aya does not
/// tell. It is 0 for a link that was detached.
fn cgroup_of(link: u32) -> Option<u64> {
    let descriptors = fs::read_dir("/proc/self/fdinfo").ok()?;
    descriptors.flatten().find_map(|descriptor| {
        let text = fs::read_to_string(descriptor.path()).ok()?;
        let field = |name| text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse::<u64>().ok();
        (field("link_id:")? == u64::from(link)).then(|| field("cgroup_id:"))?
    })
}

/// Attaches the pinned verdict program again, which changes nothing where it is attached.
pub fn verdict_again(
    pins: &Pins,
    sockets: &SockHash<MapData, u64>,
) -> Result<(SkSkb, Option<Logger>), Error> {
    const NAME: &str = "pm_verdict";
    let mut verdict = step("open", NAME, SkSkb::from_pin(pins.program(NAME), SkSkbKind::StreamVerdict))?;
    let attached = step("attach", NAME, verdict.attach(sockets.fd()))?;
    std::mem::forget(step("keep", NAME, verdict.take_link(attached))?);
    let id = step("look at", NAME, verdict.info())?.id();
    Ok((verdict, EbpfLogger::init_from_id(id).ok()))
}

pub fn pinned<T>(pins: &Pins, name: &'static str) -> Result<T, Error>
where
    T: TryFrom<Map, Error = MapError>,
{
    let map = MapData::from_pin(pins.map(name)).and_then(Map::from_map_data);
    typed(name, map.map_err(|source| Error::Map { map: name, source })?)
}

pub fn typed<T>(name: &'static str, map: Map) -> Result<T, Error>
where
    T: TryFrom<Map, Error = MapError>,
{
    map.try_into().map_err(|source| Error::Map { map: name, source })
}

fn pin(
    pins: &Pins,
    name: &'static str,
    pin: impl FnOnce(std::path::PathBuf) -> Result<(), aya::pin::PinError>,
) -> Result<(), Error> {
    pin(pins.program(name)).map_err(|source| Error::Pin { object: name, source })
}

fn pin_link(pins: &Pins, name: &'static str, link: Result<FdLink, LinkError>) -> Result<PinnedLink, Error> {
    // Only kernels before links have none, and these have no verdicts at accept either.
    let link = link.map_err(|_| Error::Detached(name))?;
    link.pin(pins.link(name)).map_err(|source| Error::Pin { object: name, source })
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
    result.map_err(|source| match source {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            tracing::debug!(program, "the verifier's log:\n{log}");
            Error::Refused { program, complaint: verifier::complaint(&log), source: io_error }
        }
        source => Error::Program { operation, program, source },
    })
}
