//! Reads the texts in which the kernel describes itself.

/// A capability and its bit (capabilities(7), include/uapi/linux/capability.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    pub name: &'static str,
    pub bit: u32,
}

/// Major and minor number of `uname -r`.
pub fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(['.', '-', '+', '_']).map(str::parse::<u32>);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The effective capabilities in `/proc/self/status`.
pub fn effective_capabilities(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

pub fn lacking<'a>(effective: u64, wanted: &'a [Capability]) -> impl Iterator<Item = &'static str> + 'a {
    wanted
        .iter()
        .filter(move |capability| effective & (1 << capability.bit) == 0)
        .map(|capability| capability.name)
}

/// Soft and hard limit of a line in `/proc/self/limits`; "unlimited" is the largest number.
pub fn limit(limits: &str, name: &str) -> Option<(u64, u64)> {
    let values = limits.lines().find_map(|line| line.strip_prefix(name))?;
    let mut values = values.split_whitespace().map(|value| match value {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    });
    Some((values.next()??, values.next()??))
}

/// True when `/proc/kallsyms` names the function, in the kernel or in a loaded module.
pub fn has_symbol(symbols: &str, name: &str) -> bool {
    symbols.lines().any(|line| line.split_whitespace().nth(2) == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_all_distributions_are_read() {
        for (release, version) in [
            ("6.18.44-fc-v657\n", (6, 18)),
            ("6.1.0-25-amd64", (6, 1)),
            ("5.15.0-1064-aws", (5, 15)),
            ("6.12-rc3", (6, 12)),
            ("6.8.0+", (6, 8)),
        ] {
            assert_eq!(kernel_version(release), Some(version), "{release}");
        }
        assert_eq!(kernel_version("next"), None);
        assert_eq!(kernel_version("6"), None);
    }

    #[test]
    fn lacking_capabilities_are_named() {
        let wanted = [Capability { name: "CAP_NET_ADMIN", bit: 12 }, Capability { name: "CAP_BPF", bit: 39 }];
        let status = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t0000008000000000\n";
        let effective = effective_capabilities(status).unwrap();
        assert_eq!(lacking(effective, &wanted).collect::<Vec<_>>(), ["CAP_NET_ADMIN"]);
        assert_eq!(lacking(0, &wanted).count(), 2);
        assert_eq!(effective_capabilities("CapEff:\tx\n"), None);
        assert_eq!(effective_capabilities(""), None);
    }

    #[test]
    fn limits_have_two_values() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1024                 1048576              files     \n\
                      Max locked memory         unlimited            unlimited            bytes     \n";
        assert_eq!(limit(limits, "Max open files"), Some((1024, 1_048_576)));
        assert_eq!(limit(limits, "Max locked memory"), Some((u64::MAX, u64::MAX)));
        assert_eq!(limit(limits, "Max nothing"), None);
    }

    #[test]
    fn a_symbol_is_a_whole_word() {
        let symbols = "ffffffff820989b0 t tcp_diag_destroy\n0000000000000000 T sk_psock_init_link\t[x]\n";
        assert!(has_symbol(symbols, "tcp_diag_destroy"));
        assert!(has_symbol(symbols, "sk_psock_init_link"));
        assert!(!has_symbol(symbols, "sk_psock_init"));
    }
}
