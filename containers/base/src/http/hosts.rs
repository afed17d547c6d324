//! Whose a host name is, as far as a function was told.
use std::collections::HashSet;

use common::FunctionName;

use super::head::split_port;

/// The host names that belong to somebody: this function, or another one.
#[derive(Clone, Debug, Default)]
pub struct Hosts {
    own: Vec<String>,
    /// In lower case, because a configuration may have many.
    others: HashSet<Box<[u8]>>,
    /// Under each of these every name is a function's.
    domains: Vec<String>,
}

impl Hosts {
    /// `own` are those of the function beside `NAME.DOMAIN`, `others` those of others that lie under no domain.
    pub fn new(name: FunctionName, domains: &[String], own: &[String], others: &[String]) -> Self {
        let generated = domains.iter().map(|domain| format!("{name}.{domain}"));
        let given =
            |hosts: &[String]| hosts.iter().filter(|host| !host.is_empty()).cloned().collect::<Vec<_>>();
        let others = given(others).into_iter().map(|host| host.to_ascii_lowercase().into_bytes().into());
        Self {
            own: generated.chain(given(own)).collect(),
            others: others.collect(),
            domains: domains.to_vec(),
        }
    }

    /// True when the host of a request (RFC 9110 §7.2) is another function's for sure. What belongs to nobody, such as
    /// an address, is served by whoever is asked.
    pub fn is_others(&self, host: &[u8]) -> bool {
        let (host, _) = split_port(host);
        // A host name may be written as absolute (RFC 3986 §3.2.2).
        let host = host.strip_suffix(b".").unwrap_or(host);
        if self.own.iter().any(|own| own.as_bytes().eq_ignore_ascii_case(host)) {
            return false;
        }
        self.domains.iter().any(|domain| is_under(domain.as_bytes(), host))
            || (!self.others.is_empty() && self.others.contains(host.to_ascii_lowercase().as_slice()))
    }
}

/// The host is `X.<domain>`.
fn is_under(domain: &[u8], host: &[u8]) -> bool {
    let Some(length) = host.len().checked_sub(domain.len()) else { return false };
    let (rest, end) = host.split_at(length);
    end.eq_ignore_ascii_case(domain) && rest.len() > 1 && rest.ends_with(b".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(own: &[&str], others: &[&str]) -> Hosts {
        let list = |hosts: &[&str]| hosts.iter().map(|host| host.to_string()).collect::<Vec<_>>();
        Hosts::new("echo".parse().unwrap(), &list(&["faas.local", "localhost"]), &list(own), &list(others))
    }

    #[test]
    fn a_name_under_a_domain_is_that_functions() {
        let hosts = hosts(&[], &[]);
        for own in ["echo.faas.local", "ECHO.FAAS.local:8443", "echo.localhost."] {
            assert!(!hosts.is_others(own.as_bytes()), "{own}");
        }
        for other in ["hello.faas.local", "Hello.Localhost:8443", "a.echo.faas.local", "hello.localhost."] {
            assert!(hosts.is_others(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn a_name_that_was_given_to_somebody_is_that_functions() {
        let hosts = hosts(&["pics.faas.local", "Pics.example", ""], &["Greetings.example", ""]);
        for own in ["pics.faas.local", "PICS.example:1", "echo.faas.local"] {
            assert!(!hosts.is_others(own.as_bytes()), "{own}");
        }
        for other in ["greetings.example", "GREETINGS.example.:443", "pics.localhost"] {
            assert!(hosts.is_others(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn a_name_that_nobody_has_is_served() {
        let hosts = hosts(&["pics.example"], &["greetings.example"]);
        for nobodys in [
            "",
            ":1",
            "localhost",
            "faas.local:1",
            ".faas.local",
            "hellofaas.local",
            "[::1]:8443",
            "x.greetings.example",
        ] {
            assert!(!hosts.is_others(nobodys.as_bytes()), "{nobodys}");
        }
    }
}
