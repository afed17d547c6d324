//! Host names: what one is, and whose each is.
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use common::{FunctionName, limits::HOST_NAME_BYTES};
use toml::Spanned;

use super::file::Invalid;

/// DNS's bound of one label (RFC 1035 §2.3.4).
const LABEL_BYTES: usize = 63;

/// Whose each host name is.
#[derive(Default)]
pub struct Hosts {
    owners: BTreeMap<String, FunctionName>,
    pub in_order: Vec<(String, FunctionName)>,
}

impl Hosts {
    pub fn claim_generated(
        &mut self,
        key: &Spanned<String>,
        name: FunctionName,
        domains: &[String],
    ) -> Result<(), Invalid> {
        for domain in domains {
            let host = format!("{name}.{domain}");
            if host.len() > HOST_NAME_BYTES {
                let reason = format!(
                    "{host} has {} bytes; at most {HOST_NAME_BYTES} can be routed: shorten the name or the domain",
                    host.len()
                );
                return Err(Invalid::at(key, reason));
            }
            self.insert(key, host, name)?;
        }
        Ok(())
    }

    pub fn claim(&mut self, host: &Spanned<String>, name: FunctionName) -> Result<(), Invalid> {
        let valid = host_name(host.get_ref()).map_err(|reason| Invalid::at(host, reason))?;
        self.insert(host, valid, name)
    }

    fn insert(&mut self, at: &Spanned<String>, host: String, name: FunctionName) -> Result<(), Invalid> {
        if let Some(owner) = self.owners.get(&host) {
            let reason = format!(
                "functions.{name}: the host {host} belongs to functions.{owner} already; a host has one function"
            );
            return Err(Invalid::at(at, reason));
        }
        self.owners.insert(host.clone(), name);
        self.in_order.push((host, name));
        Ok(())
    }
}

/// Domains in lower case, each once.
pub fn unique(domains: &[Spanned<String>]) -> Result<Vec<String>, Invalid> {
    let mut seen = BTreeSet::new();
    let mut valid = Vec::new();
    for domain in domains {
        let name = host_name(domain.get_ref()).map_err(|reason| Invalid::at(domain, reason))?;
        if !seen.insert(name.clone()) {
            return Err(Invalid::at(domain, format!("the domain {name} stands here twice")));
        }
        valid.push(name);
    }
    Ok(valid)
}

/// A host name as SNI and Host carry it (RFC 1123 §2.1), in lower case.
fn host_name(host: &str) -> Result<String, String> {
    let host = host.to_ascii_lowercase();
    if host.is_empty() {
        return Err("a host name must not be empty".to_owned());
    }
    if host.len() > HOST_NAME_BYTES {
        return Err(format!("{host} has {} bytes; at most {HOST_NAME_BYTES} can be routed", host.len()));
    }
    if host.parse::<IpAddr>().is_ok() || host.starts_with('[') {
        return Err(format!("{host} is an address; TLS carries host names only (RFC 6066 §3)"));
    }
    if host.ends_with('.') {
        return Err(format!("{host:?} ends with a dot, which SNI never does; leave it out"));
    }
    if !host.is_ascii() {
        return Err(format!(
            "{host:?} is not ASCII; write it as SNI carries it, with xn-- labels (RFC 5890)"
        ));
    }
    for part in host.split('.') {
        label(part).map_err(|reason| format!("{host:?} is not a host name: {reason}"))?;
    }
    Ok(host)
}

pub fn label(label: &str) -> Result<(), String> {
    if label.is_empty() || label.len() > LABEL_BYTES {
        return Err(format!("each label has 1 to {LABEL_BYTES} bytes"));
    }
    if let Some(wrong) = label.chars().find(|c| !c.is_ascii_alphanumeric() && *c != '-') {
        return Err(format!("{wrong:?} can't stand in a label; letters, digits and '-' can"));
    }
    if label.starts_with('-') || label.ends_with('-') {
        return Err(format!("the label {label:?} must not begin or end with '-'"));
    }
    Ok(())
}
