//! Bounds the memory of an instance, by a cgroup of its own.
use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    process, thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;

use crate::config::Bytes;

/// Names the cgroups of instances; the rest is the supervisor's process id and the instance's label.
const PREFIX: &str = "supervised-";

/// What the supervisor and its children move into, because cgroup2 gives controllers to the children of empty cgroups only.
const OWN_PLACE: &str = "supervisor";

/// How often the cgroup is emptied: meanwhile an instance may be born into it, or end.
const EMPTYING_ATTEMPTS: u32 = 10;

/// A killed process leaves its cgroup a moment after it was reaped.
const LEAVE_ATTEMPTS: u32 = 100;
const LEAVE_PAUSE: Duration = Duration::from_millis(5);

/// The cgroup below which instances get theirs.
pub struct Memory {
    hierarchy: Hierarchy,
    path: PathBuf,
    /// The supervisor's own, if it had to make room.
    moved: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hierarchy {
    /// cgroup2, wherever it has the controller.
    Two,
    /// The old one, which has it on hosts where both are mounted.
    One,
}

impl Memory {
    pub fn find() -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| format!("{path} can't be read"));
        let places = places(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?);
        if let Some(path) = places.two
            && lists_memory(&path.join("cgroup.controllers"))
        {
            let moved = delegate(&path)?;
            remove_abandoned(&path);
            return Ok(Self { hierarchy: Hierarchy::Two, path, moved });
        }
        let Some(path) = places.one else {
            bail!(
                "memory_max needs a cgroup with the memory controller, and this process has none; under systemd the unit needs Delegate=memory"
            );
        };
        remove_abandoned(&path);
        Ok(Self { hierarchy: Hierarchy::One, path, moved: None })
    }

    /// Makes the cgroup of an instance.
    pub fn bound(&self, label: &str, most: Bytes) -> Result<Bounded> {
        let path = self.path.join(format!("{PREFIX}{}-{label}", process::id()));
        let failed = |what: &str| format!("can't {what} the cgroup {}", path.display());
        fs::create_dir(&path).with_context(|| failed("make"))?;
        let (limit, events) = match self.hierarchy {
            Hierarchy::Two => ("memory.max", "memory.events"),
            Hierarchy::One => ("memory.limit_in_bytes", "memory.oom_control"),
        };
        let made = fs::write(path.join(limit), most.0.to_string())
            .and_then(|()| File::options().write(true).open(path.join("cgroup.procs")));
        match made {
            Ok(entrance) => Ok(Bounded { events: path.join(events), path, entrance, kills: 0 }),
            Err(error) => {
                // Nobody is in it yet.
                let _ = fs::remove_dir(&path);
                Err(error).with_context(|| failed("bound"))
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(own) = &self.moved {
            // In this order: nobody may enter a cgroup whose children have controllers.
            let undone = fs::write(self.path.join("cgroup.subtree_control"), "-memory")
                .and_then(|()| fs::write(self.path.join("cgroup.procs"), "0"))
                .and_then(|()| fs::remove_dir(own));
            if let Err(error) = undone {
                tracing::debug!(%error, path = %own.display(), "the supervisor's cgroup stays");
            }
        }
    }
}

/// The cgroup of an instance; removed when dropped.
pub struct Bounded {
    path: PathBuf,
    entrance: File,
    events: PathBuf,
    /// As of the last look.
    kills: u64,
}

impl Bounded {
    /// Whoever writes `0` here is in it.
    pub fn entrance(&self) -> BorrowedFd<'_> {
        self.entrance.as_fd()
    }

    /// Whether somebody was killed here for want of memory since the last look.
    pub fn was_exceeded(&mut self) -> bool {
        let kills = fs::read_to_string(&self.events).ok().and_then(|events| kills(&events)).unwrap_or(0);
        std::mem::replace(&mut self.kills, kills) < kills
    }
}

impl Drop for Bounded {
    fn drop(&mut self) {
        // Only cgroup2 has it, since Linux 5.14; there it reaches even those that left their process group.
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        for _ in 1..LEAVE_ATTEMPTS {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            thread::sleep(LEAVE_PAUSE);
        }
        if let Err(error) = fs::remove_dir(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "an instance's cgroup can't be removed");
        }
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Places {
    two: Option<PathBuf>,
    one: Option<PathBuf>,
}

/// This process's place in cgroup2 and in the old memory hierarchy, as far as they are mounted (proc(5), cgroups(7)).
fn places(mountinfo: &str, cgroups: &str) -> Places {
    let member = |is_it: fn(&str, &str) -> bool| {
        cgroups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, controllers) = (fields.next()?, fields.next()?);
            is_it(number, controllers).then_some(fields.next()?)
        })
    };
    let mount = |kind: &str, option: Option<&str>, member: &str| {
        mountinfo.lines().find_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut mount = mount.split(' ').skip(3);
            let (root, point) = (mount.next()?, mount.next()?);
            let mut file_system = file_system.split(' ');
            let fits = file_system.next() == Some(kind)
                && option.is_none_or(|option| {
                    file_system.nth(1).is_some_and(|options| options.split(',').any(|it| it == option))
                });
            // A part of the hierarchy may be mounted, as in a container.
            let below = Path::new(member).strip_prefix(root).ok()?;
            fits.then(|| Path::new(point).join(below))
        })
    };
    Places {
        two: member(|number, _| number == "0").and_then(|member| mount("cgroup2", None, member)),
        one: member(|_, controllers| controllers.split(',').any(|it| it == "memory"))
            .and_then(|member| mount("cgroup", Some("memory"), member)),
    }
}

/// Gives the memory controller to the children of this process's cgroup, and says where the process had to go for it.
fn delegate(path: &Path) -> Result<Option<PathBuf>> {
    let control = path.join("cgroup.subtree_control");
    if lists_memory(&control) {
        return Ok(None);
    }
    let enable = || fs::write(&control, "+memory");
    let failed = || {
        format!(
            "memory_max needs a cgroup that this process may divide, and it can't divide {}; under systemd the unit needs Delegate=memory, elsewhere a cgroup where nobody else is",
            path.display()
        )
    };
    match enable() {
        Ok(()) => Ok(None),
        Err(error) if is(&error, Errno::EBUSY) => {
            let own = path.join(OWN_PLACE);
            vacate(path, &own, enable).with_context(failed)?;
            Ok(Some(own))
        }
        Err(error) => Err(error).with_context(failed),
    }
}

/// Moves this process and those that it started out of the cgroup, until `enable` finds nobody there. Where somebody
/// else is, nobody moves.
fn vacate(path: &Path, own: &Path, enable: impl Fn() -> io::Result<()>) -> io::Result<()> {
    let mut refused = Errno::EBUSY.into();
    for _ in 0..EMPTYING_ATTEMPTS {
        let present = processes(path)?;
        if present.iter().all(|&pid| descends_from(pid, process::id(), parent)) {
            match fs::create_dir(own) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            relocate(&present, own)?;
            match enable() {
                Ok(()) => return Ok(()),
                Err(error) => refused = error,
            }
        }
    }
    if own.exists() {
        relocate(&processes(own)?, path)?;
        fs::remove_dir(own)?;
    }
    Err(refused)
}

fn processes(cgroup: &Path) -> io::Result<Vec<u32>> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

fn relocate(processes: &[u32], cgroup: &Path) -> io::Result<()> {
    for pid in processes {
        match fs::write(cgroup.join("cgroup.procs"), pid.to_string()) {
            // It has ended.
            Err(error) if is(&error, Errno::ESRCH) => {}
            moved => moved?,
        }
    }
    Ok(())
}

/// Whether a process is this ancestor or descends from it, as far as their parents live.
fn descends_from(pid: u32, ancestor: u32, parent: impl Fn(u32) -> Option<u32>) -> bool {
    std::iter::successors(Some(pid), |&pid| parent(pid))
        .take_while(|&pid| pid != 0)
        .any(|pid| pid == ancestor)
}

/// The fourth field of /proc/PID/stat (proc(5)); the second may contain anything.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

fn lists_memory(path: &Path) -> bool {
    fs::read_to_string(path).is_ok_and(|controllers| controllers.split_whitespace().any(|it| it == "memory"))
}

/// Those of supervisors that were killed.
fn remove_abandoned(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // The kernel refuses it where somebody still is.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

fn kills(events: &str) -> Option<u64> {
    events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "30 25 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n\
                          31 25 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                          32 25 0:28 / /sys/fs/cgroup/unified rw,relatime shared:10 - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_own_place_is_found_in_each_hierarchy() {
        let found = places(HYBRID, "4:memory:/jobs/a\n2:cpu,cpuacct:/b\n0::/c\n");
        let expected = Places {
            two: Some("/sys/fs/cgroup/unified/c".into()),
            one: Some("/sys/fs/cgroup/memory/jobs/a".into()),
        };
        assert_eq!(found, expected);
        assert_eq!(places(HYBRID, "2:cpu:/b\n"), Places::default());
        assert_eq!(places("", "4:memory:/a\n0::/c\n"), Places::default());
    }

    #[test]
    fn a_mounted_part_of_a_hierarchy_is_used() {
        let part = "30 25 0:26 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(places(part, "0::/docker/x/y\n").two, Some("/sys/fs/cgroup/y".into()));
        assert_eq!(places(part, "0::/elsewhere\n").two, None);
    }

    #[test]
    fn children_get_the_controller_once() {
        let folder = tempfile::tempdir().unwrap();
        let control = folder.path().join("cgroup.subtree_control");
        fs::write(&control, "cpu").unwrap();
        assert_eq!(delegate(folder.path()).unwrap(), None);
        assert_eq!(fs::read_to_string(&control).unwrap(), "+memory");
        fs::write(&control, "cpu memory").unwrap();
        assert_eq!(delegate(folder.path()).unwrap(), None);
        assert_eq!(fs::read_to_string(&control).unwrap(), "cpu memory");
        let refusal = delegate(&folder.path().join("nowhere")).unwrap_err().to_string();
        assert!(refusal.contains("Delegate=memory"), "{refusal}");
    }

    #[test]
    fn what_was_started_leaves_and_others_stay() {
        let place = tests_place();
        let own = place.0.join(OWN_PLACE);
        let enter = |place: &Path, pid: u32| fs::write(place.join("cgroup.procs"), pid.to_string()).unwrap();
        let is_empty = || match fs::read_to_string(place.0.join("cgroup.procs"))?.is_empty() {
            true => Ok(()),
            false => Err(Errno::EBUSY.into()),
        };
        let mut child = process::Command::new("sleep").arg("60").spawn().unwrap();
        enter(&place.0, child.id());
        vacate(&place.0, &own, is_empty).unwrap();
        assert_eq!(fs::read_to_string(own.join("cgroup.procs")).unwrap(), format!("{}\n", child.id()));

        // Nobody's child, because the shell between has ended.
        let shell =
            process::Command::new("sh").args(["-c", "sleep 60 >/dev/null 2>&1 & echo $!"]).output().unwrap();
        let stranger: i32 = String::from_utf8(shell.stdout).unwrap().trim().parse().unwrap();
        enter(&place.0, stranger as u32);
        enter(&place.0, child.id());
        fs::remove_dir(&own).unwrap();
        let refused = vacate(&place.0, &own, is_empty).unwrap_err();
        assert!(is(&refused, Errno::EBUSY), "{refused}");
        assert!(!own.exists());

        // Those who cannot be divided are where they were.
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(stranger), nix::sys::signal::SIGKILL).unwrap();
        while processes(&place.0).unwrap().len() > 1 {
            thread::sleep(LEAVE_PAUSE);
        }
        let refused = vacate(&place.0, &own, || Err(Errno::EBUSY.into())).unwrap_err();
        assert!(is(&refused, Errno::EBUSY), "{refused}");
        assert!(!own.exists());
        assert_eq!(processes(&place.0).unwrap(), [child.id()]);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn descent_is_followed_to_the_first_process() {
        let parent =
            |pid| [(4, 3), (3, 2), (2, 1), (1, 0), (9, 1)].into_iter().find(|it| it.0 == pid).map(|it| it.1);
        assert!(descends_from(4, 2, parent) && descends_from(2, 2, parent));
        assert!(!descends_from(9, 2, parent) && !descends_from(2, 3, parent) && !descends_from(7, 2, parent));
        let own = super::parent(process::id()).unwrap();
        assert!(descends_from(process::id(), own, super::parent));
    }

    /// A cgroup of the test's own; removed with its child.
    fn tests_place() -> Place {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let own = places(&mountinfo, &fs::read_to_string("/proc/self/cgroup").unwrap()).two.expect("cgroup2");
        let place = own.join(format!("vacated-{}", process::id()));
        fs::create_dir(&place).unwrap();
        Place(place)
    }

    struct Place(PathBuf);

    impl Drop for Place {
        fn drop(&mut self) {
            for place in [self.0.join(OWN_PLACE), self.0.clone()] {
                for _ in 1..LEAVE_ATTEMPTS {
                    if fs::remove_dir(&place).is_ok() {
                        break;
                    }
                    thread::sleep(LEAVE_PAUSE);
                }
            }
        }
    }

    #[test]
    fn kills_are_counted_in_either_file() {
        assert_eq!(kills("low 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n"), Some(1));
        assert_eq!(kills("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), Some(3));
        assert_eq!(kills(""), None);
    }

    #[test]
    fn a_bounded_cgroup_is_there_as_long_as_its_value() {
        let memory = Memory::find().unwrap();
        let mut bounded = memory.bound("echo@1", Bytes(32 << 20)).unwrap();
        let path = bounded.path.clone();
        assert!(path.exists() && !bounded.was_exceeded());
        drop(bounded);
        assert!(!path.exists());
    }
}
