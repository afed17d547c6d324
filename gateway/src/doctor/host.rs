//! The checks of the host itself.
use std::{fs, path::Path};

use super::{
    Check, Need, Outcome,
    facts::{self, Capability},
};
use crate::kernel::{bpffs, cgroup};

/// The first kernel whose getpeername hook may set SO_RCVLOWAT, which is what makes accept return the verdict.
const KERNEL_PATH_VERSION: (u32, u32) = (6, 1);

/// The first kernel with close_range(CLOSE_RANGE_CLOEXEC) and pidfd_open, which the supervisor needs.
const OLDEST_VERSION: (u32, u32) = (5, 11);

/// Before this kernel, BPF maps counted against RLIMIT_MEMLOCK.
const MEMLOCK_FREE_VERSION: (u32, u32) = (5, 11);

const KERNEL_PATH_CAPABILITIES: [Capability; 4] = [
    Capability { name: "CAP_NET_ADMIN", bit: 12 },
    Capability { name: "CAP_NET_RAW", bit: 13 },
    Capability { name: "CAP_PERFMON", bit: 38 },
    Capability { name: "CAP_BPF", bit: 39 },
];

const SUPERVISOR_CAPABILITIES: [Capability; 2] =
    [Capability { name: "CAP_SETGID", bit: 6 }, Capability { name: "CAP_SETUID", bit: 7 }];

/// Ten thousand clients, each once in the gateway and once in a function, with room to spare.
const OPEN_FILES: u64 = 65_536;

/// What the gateway's listeners ask for.
const LISTEN_BACKLOG: u64 = 4096;

/// Enough for the maps of the kernel path.
const LOCKED_BYTES: u64 = 64 * 1024 * 1024;

pub fn checks() -> Vec<Check> {
    let version = facts::kernel_version(&read("/proc/sys/kernel/osrelease"));
    let symbols = read("/proc/kallsyms");
    let status = read("/proc/self/status");
    let limits = read("/proc/self/limits");
    vec![
        kernel(version),
        Check {
            name: "BTF",
            purpose: "the places of the kernel's own fields that the programs read",
            need: Need::KernelPath,
            outcome: exists(
                "/sys/kernel/btf/vmlinux",
                "run a kernel with CONFIG_DEBUG_INFO_BTF=y, as the distributions' kernels are",
            ),
        },
        Check {
            name: "bpf system call",
            purpose: "loading the programs",
            need: Need::KernelPath,
            outcome: exists(
                "/proc/sys/kernel/unprivileged_bpf_disabled",
                "run a kernel with CONFIG_BPF_SYSCALL=y",
            ),
        },
        jit(),
        symbol(
            &symbols,
            "__cgroup_bpf_run_filter_sock_addr",
            "cgroup programs",
            "verdicts at accept",
            Need::KernelPath,
            "run a kernel with CONFIG_CGROUP_BPF=y",
        ),
        symbol(
            &symbols,
            "sk_psock_start_verdict",
            "sockmap",
            "judging a connection's first bytes in the kernel",
            Need::KernelPath,
            "run a kernel with CONFIG_BPF_STREAM_PARSER=y",
        ),
        symbol(
            &symbols,
            "tcp_diag_destroy",
            "SOCK_DESTROY",
            "ending a connection whose bytes could not be kept exact",
            Need::KernelPath,
            "run a kernel with CONFIG_INET_DIAG_DESTROY=y; as a module: modprobe tcp_diag",
        ),
        cgroup2(),
        bpffs(),
        capabilities(
            &status,
            "capabilities of the kernel path",
            "loading and attaching the programs and testing them",
            &KERNEL_PATH_CAPABILITIES,
        ),
        capabilities(
            &status,
            "capabilities of the supervisor",
            "running functions as a user of their own",
            &SUPERVISOR_CAPABILITIES,
        ),
        open_files(&limits),
        locked_memory(&limits, version),
        backlog(),
        Check {
            name: "IPv6",
            purpose: "the default listeners [::]:8080 and [::]:8443",
            need: Need::Optional,
            outcome: exists(
                "/proc/net/if_inet6",
                "listen on IPv4 with http = \"0.0.0.0:8080\" and https = \"0.0.0.0:8443\", or boot without ipv6.disable=1",
            ),
        },
        lsm(),
    ]
}

fn kernel(version: Option<(u32, u32)>) -> Check {
    let release = read("/proc/sys/kernel/osrelease").trim().to_owned();
    let (wanted_major, wanted_minor) = KERNEL_PATH_VERSION;
    let found = format!("Linux {release}");
    let (need, outcome) = match version {
        None => (Need::KernelPath, Outcome::Unknown(found)),
        Some(version) if version < OLDEST_VERSION => {
            let (major, minor) = OLDEST_VERSION;
            (Need::Always, Outcome::Absent { found, remedy: format!("run Linux {major}.{minor} or later") })
        }
        Some(version) if version < KERNEL_PATH_VERSION => {
            let remedy = format!("run Linux {wanted_major}.{wanted_minor} or later");
            (Need::KernelPath, Outcome::Absent { found, remedy })
        }
        Some(_) => (Need::KernelPath, Outcome::Present(found)),
    };
    Check { name: "kernel", purpose: "verdicts that accept returns (Linux 6.1 or later)", need, outcome }
}

fn jit() -> Check {
    const PATH: &str = "/proc/sys/net/core/bpf_jit_enable";
    let outcome = match fs::read_to_string(PATH).as_deref().map(str::trim) {
        Ok("0") => Outcome::Absent {
            found: "off".to_owned(),
            remedy: "sysctl -w net.core.bpf_jit_enable=1".to_owned(),
        },
        Ok(_) => Outcome::Present("on".to_owned()),
        Err(_) if !Path::new(PATH).exists() => Outcome::Absent {
            found: format!("there is no {PATH}"),
            remedy: "run a kernel with CONFIG_BPF_JIT=y".to_owned(),
        },
        Err(error) => Outcome::Unknown(format!("{PATH}: {error}")),
    };
    Check { name: "BPF JIT", purpose: "programs at the machine's own speed", need: Need::Optional, outcome }
}

fn symbol(
    symbols: &str,
    symbol: &str,
    name: &'static str,
    purpose: &'static str,
    need: Need,
    remedy: &str,
) -> Check {
    let outcome = if symbols.is_empty() {
        Outcome::Unknown("/proc/kallsyms can't be read".to_owned())
    } else if facts::has_symbol(symbols, symbol) {
        Outcome::Present("in this kernel".to_owned())
    } else {
        Outcome::Absent { found: format!("this kernel has no {symbol}"), remedy: remedy.to_owned() }
    };
    Check { name, purpose, need, outcome }
}

fn cgroup2() -> Check {
    let outcome = match cgroup::mount_point(&read("/proc/self/mountinfo")) {
        Some(mount) => Outcome::Present(format!("at {}", mount.display())),
        None => Outcome::Absent {
            found: "not mounted".to_owned(),
            remedy: "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
                .to_owned(),
        },
    };
    Check {
        name: "cgroup2",
        purpose: "programs that see the gateway's own listeners and no other socket of the host",
        need: Need::KernelPath,
        outcome,
    }
}

fn bpffs() -> Check {
    const PLACE: &str = bpffs::MOUNT_POINT;
    let outcome = match bpffs::is_mounted() {
        Ok(true) => Outcome::Present(format!("on {PLACE}")),
        Ok(false) => Outcome::Absent {
            found: format!("not mounted on {PLACE}"),
            remedy: format!(
                "none needed where the gateway runs as root and mounts it; else mount -t bpf -o mode=700 bpf {PLACE}"
            ),
        },
        Err(error) => Outcome::Unknown(format!("{PLACE}: {error}")),
    };
    Check {
        name: "BPF file system",
        purpose: "the pins by which connections outlive a gateway that is killed",
        need: Need::Optional,
        outcome,
    }
}

fn capabilities(status: &str, name: &'static str, purpose: &'static str, wanted: &[Capability]) -> Check {
    let need = if wanted.iter().any(|capability| capability.name == "CAP_BPF") {
        Need::KernelPath
    } else {
        Need::Optional
    };
    let outcome = match facts::effective_capabilities(status) {
        None => Outcome::Unknown("/proc/self/status can't be read".to_owned()),
        Some(effective) => {
            let lacking: Vec<_> = facts::lacking(effective, wanted).collect();
            if lacking.is_empty() {
                let names: Vec<_> = wanted.iter().map(|capability| capability.name).collect();
                Outcome::Present(names.join(" "))
            } else {
                Outcome::Absent {
                    found: format!("without {}", lacking.join(" ")),
                    remedy: format!(
                        "run as root, or with AmbientCapabilities={} in the systemd unit",
                        lacking.join(" ")
                    ),
                }
            }
        }
    };
    Check { name, purpose, need, outcome }
}

fn open_files(limits: &str) -> Check {
    let outcome = match facts::limit(limits, "Max open files") {
        None => Outcome::Unknown("/proc/self/limits can't be read".to_owned()),
        Some((_, hard)) if hard < OPEN_FILES => Outcome::Absent {
            found: format!("at most {hard}"),
            remedy: format!(
                "ulimit -Hn {OPEN_FILES} (as root), LimitNOFILE={OPEN_FILES} in the systemd unit, \
                 or `* hard nofile {OPEN_FILES}` in /etc/security/limits.conf"
            ),
        },
        Some((_, hard)) => Outcome::Present(format!("up to {hard}")),
    };
    Check {
        name: "open files (RLIMIT_NOFILE)",
        purpose: "each connection is one; the gateway raises the soft limit to the hard one by itself",
        need: Need::Optional,
        outcome,
    }
}

fn locked_memory(limits: &str, version: Option<(u32, u32)>) -> Check {
    let outcome = match (version, facts::limit(limits, "Max locked memory")) {
        (Some(version), _) if version >= MEMLOCK_FREE_VERSION => {
            Outcome::Present("not counted for BPF by this kernel".to_owned())
        }
        (_, Some((soft, _))) if soft >= LOCKED_BYTES => Outcome::Present(format!("{soft} bytes")),
        (_, Some((soft, _))) => Outcome::Absent {
            found: format!("{soft} bytes"),
            remedy: "ulimit -l unlimited (as root), or LimitMEMLOCK=infinity in the systemd unit".to_owned(),
        },
        (_, None) => Outcome::Unknown("/proc/self/limits can't be read".to_owned()),
    };
    Check {
        name: "locked memory (RLIMIT_MEMLOCK)",
        purpose: "the programs' maps",
        need: Need::KernelPath,
        outcome,
    }
}

fn backlog() -> Check {
    let outcome = match read("/proc/sys/net/core/somaxconn").trim().parse::<u64>() {
        Ok(most) if most < LISTEN_BACKLOG => Outcome::Absent {
            found: most.to_string(),
            remedy: format!("sysctl -w net.core.somaxconn={LISTEN_BACKLOG}"),
        },
        Ok(most) => Outcome::Present(most.to_string()),
        Err(_) => Outcome::Unknown("net.core.somaxconn can't be read".to_owned()),
    };
    Check {
        name: "listen backlog (net.core.somaxconn)",
        purpose: "bursts of new connections that wait to be accepted",
        need: Need::Optional,
        outcome,
    }
}

fn lsm() -> Check {
    const PATH: &str = "/sys/kernel/security/lsm";
    let outcome = match fs::read_to_string(PATH) {
        Ok(modules) if modules.trim().split(',').any(|module| module == "bpf") => {
            Outcome::Present("active".to_owned())
        }
        Ok(modules) => Outcome::Absent {
            found: format!("active are {}", modules.trim()),
            remedy: "none needed; `lsm=...,bpf` on the kernel's command line would activate it".to_owned(),
        },
        Err(_) => Outcome::Absent {
            found: format!("{PATH} can't be read"),
            remedy: "none needed; mount -t securityfs none /sys/kernel/security would show it".to_owned(),
        },
    };
    Check {
        name: "bpf LSM",
        purpose: "nothing today: the accept hook works without it",
        need: Need::Optional,
        outcome,
    }
}

fn exists(path: &str, remedy: &str) -> Outcome {
    if Path::new(path).exists() {
        Outcome::Present(path.to_owned())
    } else {
        Outcome::Absent { found: format!("there is no {path}"), remedy: remedy.to_owned() }
    }
}

/// An unreadable file is an empty text, which every check takes for unknown.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_judged_by_what_it_can_serve() {
        assert!(matches!(
            kernel(Some((5, 2))),
            Check { need: Need::Always, outcome: Outcome::Absent { .. }, .. }
        ));
        assert!(matches!(
            kernel(Some((5, 15))),
            Check { need: Need::KernelPath, outcome: Outcome::Absent { .. }, .. }
        ));
        assert!(matches!(kernel(Some((6, 1))).outcome, Outcome::Present(_)));
        assert!(matches!(kernel(None).outcome, Outcome::Unknown(_)));
    }

    #[test]
    fn old_kernels_count_maps_as_locked_memory() {
        let limits = "Max locked memory         65536                65536                bytes\n";
        assert!(matches!(locked_memory(limits, Some((5, 10))).outcome, Outcome::Absent { .. }));
        assert!(matches!(locked_memory(limits, Some((6, 1))).outcome, Outcome::Present(_)));
    }

    #[test]
    fn each_absent_thing_has_a_remedy_and_each_check_a_purpose() {
        for check in checks() {
            assert!(!check.purpose.is_empty());
            if let Outcome::Absent { remedy, .. } = &check.outcome {
                assert!(!remedy.is_empty(), "{}", check.name);
            }
        }
    }
}
