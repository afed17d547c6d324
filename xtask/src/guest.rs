//! Runs the tests in a virtual machine: with the kernel and the booted systemd of a Debian release.
use std::fs;
use std::io;
use std::os::unix::{ffi::OsStrExt as _, fs::symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::statvfs::statvfs;

use crate::interrupt::{self, Awaited};
use crate::packages::{self, Package};
use crate::progress::{self, announce};
use crate::toolchain;
use crate::{privilege, workspace};

/// Counts up when what a guest consists of changes.
const CACHE: &str = "guests-1";
const ARCHIVE: &str = "http://deb.debian.org/debian";

/// Beside what the kernel and systemd bring: what the tests use as clients and observers.
const INCLUDED: &str = "bpftool,ca-certificates,curl,dbus,gnutls-bin,initramfs-tools,iproute2,kmod,\
                        linux-image-cloud-amd64,openssl,procps,python3,strace,systemd,systemd-sysv,udev,zstd";

const NEEDED: [Package; 3] =
    [("debootstrap", "debootstrap"), ("mke2fs", "e2fsprogs"), ("qemu-system-x86_64", "qemu-system-x86")];

/// Of the checkout; they find it by the path of their package.
const READ_BY_TESTS: [&str; 3] = ["docs", "packaging", "tests"];

/// A tree of Debian, what it is made of, and an image of it, while they are made.
const MAKING_BYTES: u64 = 2 << 30;
/// Sizes of sparse files: room for what the tests write.
const ROOT_IMAGE: &str = "3G";
const PROGRAMS_IMAGE: &str = "2G";
const MEMORY: &str = "3G";
/// As many tests run at once, and each is some processes.
const CORES_MAX: usize = 4;

/// The release has this kernel, or a later one of the same series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Release {
    /// Linux 6.1
    Bookworm,
    /// Linux 6.12
    Trixie,
}

impl Release {
    const fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }
}

/// What the guest's first unit runs: the packaged units, then the tests.
const JOB: &str = include_str!("guest/job.sh");

/// Powers the guest off when the job has ended, whatever came of it.
const UNIT: &str = include_str!("guest/job.service");

/// Runs the tests whose name contains `filter` in a guest.
pub fn run(release: Release, programs: &Path, tests: &Path, filter: Option<&str>) -> Result<ExitCode> {
    interrupt::catch()?;
    let guest = Guest::ensure(release)?;
    let accelerator = Accelerator::of_this_host();
    let left_out = accelerator.too_slow_for();
    if !left_out.is_empty() {
        announce(&format!(
            "no hardware virtualisation here, so this takes long, and without {}",
            left_out.join(", ")
        ));
    }
    let folder = tempfile::tempdir().context("cannot make a directory")?;
    let disk = folder.path().join("programs.img");
    let contents = folder.path().join("programs");
    let skips = left_out.iter().flat_map(|test| ["--skip", test]);
    let arguments: Vec<_> = skips.chain(filter).collect();
    fill(&contents, programs, tests, &arguments).context("cannot gather what the guest runs")?;
    progress::run("making the guest's disk", image(&contents, &disk).arg(PROGRAMS_IMAGE))?;
    let result = folder.path().join("result");
    interrupt::check()?;
    announce(&format!("booting Debian {} and running the tests in it", release.name()));
    let mut machine =
        Machine(guest.machine(accelerator, &disk, &result).spawn().context("cannot start qemu")?);
    let awaited = Awaited::new(machine.0.id().cast_signed());
    let status = machine.0.wait().context("cannot wait for qemu")?;
    drop(awaited);
    interrupt::check()?;
    ensure!(status.success(), "the virtual machine failed ({status})");
    let result = fs::read_to_string(&result).context("the guest left no result")?;
    match result.trim() {
        "0" => Ok(ExitCode::SUCCESS),
        "" => bail!("the guest ended before its tests did; what it said stands above"),
        _ => Ok(ExitCode::FAILURE),
    }
}

/// The files that a guest boots from, which no run changes.
struct Guest {
    folder: PathBuf,
}

impl Guest {
    fn ensure(release: Release) -> Result<Self> {
        ensure!(cfg!(target_arch = "x86_64"), "guests are made for x86-64 only");
        ensure!(privilege::is_root(), "making a guest needs root: run this as root");
        packages::ensure(&NEEDED, "making a guest")?;
        let cache = toolchain::user_cache()?.join(CACHE);
        let guest = Self { folder: cache.join(release.name()) };
        if !guest.folder.exists() {
            fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
            guest.make(release, &cache)?;
        }
        Ok(guest)
    }

    /// In a directory that gets its name when it is complete.
    fn make(&self, release: Release, cache: &Path) -> Result<()> {
        let room = statvfs(cache).context("cannot look for room")?;
        ensure!(
            room.blocks_available() * room.fragment_size() > MAKING_BYTES,
            "{} has less than the 2 GiB that making a guest takes",
            cache.display()
        );
        let folder = tempfile::Builder::new().prefix("making-").tempdir_in(cache)?;
        let tree = folder.path().join("tree");
        let mut debootstrap = Command::new("debootstrap");
        debootstrap.args(["--variant=minbase", &format!("--include={INCLUDED}"), release.name()]);
        progress::run(
            &format!("fetching Debian {} (once)", release.name()),
            debootstrap.arg(&tree).arg(ARCHIVE),
        )?;
        for (prefix, name) in [("vmlinuz-", "kernel"), ("initrd.img-", "initrd")] {
            let found = fs::read_dir(tree.join("boot"))?
                .flatten()
                .find(|file| file.file_name().to_string_lossy().starts_with(prefix))
                .with_context(|| format!("Debian {} came without {name}", release.name()))?;
            fs::copy(found.path(), folder.path().join(name))?;
        }
        furnish(&tree).context("cannot furnish the guest")?;
        progress::run(
            "making the guest's image",
            image(&tree, &folder.path().join("root.img")).arg(ROOT_IMAGE),
        )?;
        fs::remove_dir_all(&tree)?;
        let made = folder.keep();
        fs::rename(&made, &self.folder).with_context(|| format!("cannot keep {}", self.folder.display()))
    }

    fn machine(&self, accelerator: Accelerator, disk: &Path, result: &Path) -> Command {
        let file = |name: &str| self.folder.join(name);
        let drive = |path: &Path| format!("if=virtio,format=raw,snapshot=on,file={}", path.display());
        let cores = thread::available_parallelism().map_or(1, usize::from).min(CORES_MAX);
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-machine", "q35", "-accel", accelerator.option(), "-cpu", "max,la57=off"])
            .args(["-m", MEMORY, "-smp", &cores.to_string(), "-nic", "none"])
            .args(["-display", "none", "-monitor", "none", "-no-reboot"])
            .args(["-serial", "stdio", "-serial", &format!("file:{}", result.display())])
            .args([
                "-append",
                "root=/dev/vda rw console=ttyS0 panic=-1 quiet loglevel=3 systemd.show_status=0",
            ])
            .arg("-kernel")
            .arg(file("kernel"))
            .arg("-initrd")
            .arg(file("initrd"))
            .args(["-drive", &drive(&file("root.img")), "-drive", &drive(disk)])
            .stdin(Stdio::null());
        qemu
    }
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Accelerator {
    /// The processor's own virtualisation.
    Kvm,
    /// Emulation, some ten times slower.
    Tcg,
}

impl Accelerator {
    fn of_this_host() -> Self {
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let virtualises = processor.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
        if virtualises && Path::new("/dev/kvm").exists() { Self::Kvm } else { Self::Tcg }
    }

    const fn option(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            // With a thread for each processor one runs into code that another is patching, and the kernel panics.
            Self::Tcg => "tcg,thread=single",
        }
    }

    /// Tests that need a rate of requests, or of handshakes, which emulation does not reach.
    const fn too_slow_for(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &[],
            Self::Tcg => &["moves::many_at_random", "turns::its_turns_are_rare_and_full"],
        }
    }
}

/// Ends with its value.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn image(contents: &Path, image: &Path) -> Command {
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(contents).arg(image);
    mke2fs
}

/// Has the guest run its job when it has booted, and nothing else on its console.
fn furnish(tree: &Path) -> io::Result<()> {
    let units = tree.join("etc/systemd/system");
    fs::write(units.join("job.service"), UNIT)?;
    fs::create_dir_all(units.join("multi-user.target.wants"))?;
    symlink("../job.service", units.join("multi-user.target.wants/job.service"))?;
    symlink("/dev/null", units.join("serial-getty@ttyS0.service"))?;
    fs::write(tree.join("etc/hostname"), "guest\n")?;
    fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost guest\n::1 localhost\n")
}

fn fill(disk: &Path, programs: &Path, tests: &Path, arguments: &[&str]) -> Result<()> {
    // As they lie in a target directory, where the tests look for the programs.
    let deps = disk.join("bin/deps");
    fs::create_dir_all(&deps)?;
    for (_, name) in workspace::PRODUCT {
        copy_stripped(&programs.join(name), &disk.join("bin").join(name))?;
    }
    copy_stripped(tests, &deps.join("promises"))?;
    // What tests read of the checkout, and where they look for it.
    let checkout = disk.join("checkout");
    fs::create_dir(&checkout)?;
    let mut cp = Command::new("cp");
    cp.arg("--recursive").args(READ_BY_TESTS).arg(&checkout).current_dir(workspace::root());
    ensure!(cp.status().context("cannot start cp")?.success(), "the checkout can't be copied");
    fs::write(disk.join("checkout.path"), workspace::root().as_os_str().as_bytes())?;
    fs::write(disk.join("job.sh"), JOB)?;
    fs::write(disk.join("arguments"), arguments.join(" "))?;
    Ok(())
}

/// Without what only a debugger reads, which is most of it.
fn copy_stripped(from: &Path, to: &Path) -> Result<()> {
    let done = Command::new("strip").args(["--strip-debug", "-o"]).arg(to).arg(from).status();
    ensure!(done.context("cannot start strip")?.success(), "{} can't be copied", from.display());
    Ok(())
}
