//! What `cargo xtask run` prints for its user to paste: curl lines that reach each function.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use toml::{Table, Value};

use crate::runner::strings;

/// Names that resolve to this machine everywhere (RFC 6761 §6.3).
const LOCALHOST: &str = ".localhost";

/// A function that is started here.
pub struct Started {
    pub name: String,
    /// A host name of its own, the one that is easiest to reach.
    host: Option<String>,
}

impl Started {
    pub fn all(config: &Table) -> Vec<Self> {
        let domains = config.get("gateway").and_then(|gateway| gateway.get("domains"));
        let domains = domains.map(strings).unwrap_or_default();
        let functions = config.get("functions").and_then(Value::as_table);
        let started =
            functions.into_iter().flatten().filter(|(_, function)| function.get("command").is_some());
        let host = |name: &str, function: &Value| {
            let generated = domains.iter().map(|domain| format!("{name}.{domain}"));
            let mut hosts: Vec<_> =
                generated.chain(function.get("hosts").map(strings).unwrap_or_default()).collect();
            hosts.sort_by_key(|host| !host.ends_with(LOCALHOST));
            hosts.into_iter().next()
        };
        started.map(|(name, function)| Self { name: name.clone(), host: host(name, function) }).collect()
    }
}

pub fn text(http: SocketAddr, https: SocketAddr, functions: &[Started], authority: &Path) -> String {
    let curl = format!("curl --cacert {}", authority.display());
    let (http, port) = (host_and_port(http), https.port());
    let mut text = String::from("\nReady. Ctrl-C ends it and leaves nothing behind.\n\n");
    let mut line = |line: String| {
        text.push_str("  ");
        text.push_str(&line);
        text.push('\n');
    };
    for Started { name, host } in functions {
        let (query, data) = match name.as_str() {
            "echo" => ("", " -d hi"),
            "hello" => ("?name=you", ""),
            "resize" => ("?width=320", " --data-binary @picture.png -o small.png"),
            _ => ("", ""),
        };
        line(format!("curl 'http://{http}/function/{name}{query}'{data}"));
        if let Some(host) = host {
            line(format!("{curl}{} 'https://{host}:{port}/{query}'{data}", resolve(host, https)));
        }
    }
    text.push('\n');
    text
}

/// How curl learns where a host is, with a blank before it.
fn resolve(host: &str, https: SocketAddr) -> String {
    let ip = https.ip();
    // curl knows by itself where *.localhost is.
    if is_here(ip) && host.ends_with(LOCALHOST) {
        return String::new();
    }
    let ip = if ip.is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { ip };
    format!(" --resolve {host}:{}:{ip}", https.port())
}

fn is_here(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified()
}

fn host_and_port(address: SocketAddr) -> String {
    if is_here(address.ip()) { format!("localhost:{}", address.port()) } else { address.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invitation(http: &str, https: &str, config: &str) -> String {
        let functions = Started::all(&config.parse().unwrap());
        text(http.parse().unwrap(), https.parse().unwrap(), &functions, Path::new("/ca.pem"))
    }

    const TWO: &str = "
        [gateway]
        domains = [\"faas.local\", \"localhost\"]
        [functions.echo]
        command = [\"/echo\"]
        [functions.elsewhere]
        [functions.hello]
        command = [\"/hello\"]
    ";

    #[test]
    fn the_curl_lines_need_no_resolve_on_this_machine() {
        let text = invitation("[::]:8080", "[::]:8443", TWO);
        assert!(text.contains("curl 'http://localhost:8080/function/echo' -d hi\n"), "{text}");
        assert!(text.contains("curl --cacert /ca.pem 'https://hello.localhost:8443/?name=you'\n"), "{text}");
        assert!(!text.contains("elsewhere"), "{text}");
    }

    #[test]
    fn the_curl_lines_reach_another_address() {
        let text = invitation("10.1.2.3:80", "10.1.2.3:443", TWO);
        assert!(text.contains("http://10.1.2.3:80/function/echo"), "{text}");
        assert!(
            text.contains("--resolve echo.localhost:443:10.1.2.3 'https://echo.localhost:443/'"),
            "{text}"
        );
    }

    #[test]
    fn the_curl_lines_use_names_that_the_configuration_has() {
        let text = |config: &str| invitation("[::]:80", "[::]:443", config);
        let own = "[gateway]\ndomains = [\"example.org\"]\n[functions.x]\ncommand = [\"/x\"]\n";
        assert!(
            text(own).contains("--resolve x.example.org:443:127.0.0.1 'https://x.example.org:443/'"),
            "{}",
            text(own)
        );
        let only_hosts = own.replace("\"example.org\"", "") + "hosts = [\"a.example\", \"x.localhost\"]\n";
        assert!(text(&only_hosts).contains("/ca.pem 'https://x.localhost:443/'"), "{}", text(&only_hosts));
        let nameless = own.replace("\"example.org\"", "");
        assert!(!text(&nameless).contains("https"), "{}", text(&nameless));
    }
}
