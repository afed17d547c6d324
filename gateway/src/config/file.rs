//! The configuration file as it is written, and what it has to satisfy.
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use common::{FunctionName, InvalidName, limits::ROUTES};
use serde::Deserialize;
use toml::Spanned;

use super::{
    Bytes, Config, DEFAULT_GROUP, Function, Gateway, REFUSAL, VerdictMode,
    hosts::{self, Hosts},
    size::Size,
};

/// The kernel's table of routes holds two generations while one replaces the other.
const MAX_ROUTES: usize = ROUTES / 2;

/// Functions are told whose hosts are whose by variables of their environment, of which the kernel takes none that is
/// longer than 128 KiB (execve(2), MAX_ARG_STRLEN).
const HOSTS_BYTES: usize = 120 * 1024;

/// Shorter ones would cut clients at the other end of a satellite link, longer ones would hold what nobody uses.
const HEAD_TIMEOUT_MS: std::ops::RangeInclusive<u64> = 100..=600_000;
const DEFAULT_HEAD_TIMEOUT_MS: u64 = 10_000;

/// Each is a process with threads for all cores; more than this on one host is a slip of the pen.
const INSTANCES: std::ops::RangeInclusive<u16> = 1..=64;

/// Less does not hold a function's program and its threads' stacks.
const LEAST_MEMORY: Bytes = Bytes(1 << 20);

/// A share of a hundred is as fine as anybody can tell apart.
const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=100;

/// With the function's name and the rest of `NAME@ID.sock` it is a file's name.
const INSTANCE_ID_BYTES: usize = 64;
/// In place of an address.
const ADMIN_OFF: &str = "off";

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    gateway: GatewayTable,
    #[serde(default)]
    functions: BTreeMap<Spanned<String>, FunctionTable>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct GatewayTable {
    http: Option<Spanned<String>>,
    https: Option<Spanned<String>>,
    admin: Option<Spanned<String>>,
    verdict: Option<VerdictMode>,
    head_timeout_ms: Option<Spanned<u64>>,
    functions_dir: Option<PathBuf>,
    domains: Option<Vec<Spanned<String>>>,
    anchors: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FunctionTable {
    #[serde(default)]
    hosts: Vec<Spanned<String>>,
    command: Option<Spanned<Vec<String>>>,
    certificate: Option<Spanned<PathBuf>>,
    key: Option<Spanned<PathBuf>>,
    instances: Option<Spanned<u16>>,
    user: Option<Spanned<String>>,
    #[serde(default)]
    env: BTreeMap<Spanned<String>, String>,
    trust_group: Option<String>,
    moves_to: Option<Vec<Spanned<String>>>,
    memory_max: Option<Spanned<Size>>,
    restart_limit: Option<Spanned<u32>>,
    #[serde(default)]
    weights: BTreeMap<Spanned<String>, Spanned<u32>>,
    #[serde(default)]
    access_log: bool,
}

/// What is wrong, and the byte of the file at which it begins.
#[derive(Debug, PartialEq)]
pub struct Invalid {
    offset: usize,
    pub reason: String,
}

impl Invalid {
    pub fn line(&self, text: &str) -> usize {
        1 + text.bytes().take(self.offset).filter(|&byte| byte == b'\n').count()
    }

    pub fn at<T>(value: &Spanned<T>, reason: impl Into<String>) -> Self {
        Self { offset: value.span().start, reason: reason.into() }
    }
}

pub fn parse(text: &str, base: &Path, programs: &Path) -> Result<Config, Invalid> {
    let file: File = toml::from_str(text).map_err(|error| Invalid {
        offset: error.span().map_or(0, |span| span.start),
        reason: error.message().trim_end().replace('\n', ", "),
    })?;
    let gateway = file.gateway.validate(base)?;
    let mut known = Hosts::default();
    let mut functions = BTreeMap::new();
    for (key, table) in &file.functions {
        let name = function_name(key)?;
        known.claim_generated(key, name, &gateway.domains)?;
        functions.insert(name, table.validate(name, base, programs)?);
    }
    for (key, table) in &file.functions {
        let Some(names) = &table.moves_to else { continue };
        let receivers = names.iter().map(|name| receiver(name, &functions)).collect::<Result<_, _>>()?;
        if let Some(function) = functions.get_mut(&function_name(key)?) {
            function.moves_to = Some(receivers);
        }
    }
    let mut hosts_bytes = 0;
    // Own hosts come after all generated ones, so that the line that is shown is the one to change.
    for (key, table) in &file.functions {
        let name = function_name(key)?;
        for host in &table.hosts {
            known.claim(host, name)?;
            hosts_bytes += host.get_ref().len() + 1;
            if hosts_bytes > HOSTS_BYTES {
                let reason = format!(
                    "with this host all have more than the {HOSTS_BYTES} bytes that functions can be told"
                );
                return Err(Invalid::at(host, reason));
            }
        }
    }
    for (host, name) in known.in_order {
        if let Some(function) = functions.get_mut(&name) {
            function.hosts.push(host);
        }
    }
    let routes: usize = functions.values().map(|function| 1 + function.hosts.len()).sum();
    if routes > MAX_ROUTES {
        let reason = format!("{routes} names and hosts are more than the {MAX_ROUTES} that can be routed");
        return Err(Invalid { offset: 0, reason });
    }
    Ok(Config { gateway, functions })
}

impl GatewayTable {
    fn defaults(&self) -> Gateway {
        Gateway {
            http: SocketAddr::new(IpAddr::from([0u16; 8]), 8080),
            https: SocketAddr::new(IpAddr::from([0u16; 8]), 8443),
            admin: Some(SocketAddr::new(IpAddr::from([127, 0, 0, 1]), 8081)),
            verdict: self.verdict.unwrap_or(VerdictMode::Auto),
            head_timeout: Duration::from_millis(DEFAULT_HEAD_TIMEOUT_MS),
            functions_dir: PathBuf::from("/run/pointsman/functions"),
            domains: vec!["faas.local".to_owned(), "localhost".to_owned()],
            anchors: None,
        }
    }

    fn validate(&self, base: &Path) -> Result<Gateway, Invalid> {
        let mut gateway = self.defaults();
        if let Some(http) = &self.http {
            gateway.http = listener(http)?;
        }
        if let Some(https) = &self.https {
            gateway.https = listener(https)?;
        }
        if gateway.http == gateway.https && gateway.http.port() != 0 {
            let offset = self.https.as_ref().or(self.http.as_ref()).map_or(0, |value| value.span().start);
            let reason = format!("http and https both listen at {}; give each its own port", gateway.http);
            return Err(Invalid { offset, reason });
        }
        if let Some(admin) = &self.admin {
            gateway.admin = if admin.get_ref() == ADMIN_OFF { None } else { Some(listener(admin)?) };
        }
        if gateway
            .admin
            .is_some_and(|admin| admin.port() != 0 && [gateway.http, gateway.https].contains(&admin))
        {
            let offset = self.admin.as_ref().or(self.http.as_ref()).map_or(0, |value| value.span().start);
            let reason = "admin listens where http or https does; give each its own port".to_owned();
            return Err(Invalid { offset, reason });
        }
        if let Some(timeout) = &self.head_timeout_ms {
            if !HEAD_TIMEOUT_MS.contains(timeout.get_ref()) {
                let (least, most) = HEAD_TIMEOUT_MS.into_inner();
                return Err(Invalid::at(timeout, format!("head_timeout_ms is from {least} to {most}")));
            }
            gateway.head_timeout = Duration::from_millis(*timeout.get_ref());
        }
        if let Some(directory) = &self.functions_dir {
            gateway.functions_dir = base.join(directory);
        }
        gateway.anchors = self.anchors.as_ref().map(|anchors| base.join(anchors));
        if let Some(domains) = &self.domains {
            gateway.domains = hosts::unique(domains)?;
        }
        Ok(gateway)
    }
}

impl FunctionTable {
    /// Everything but the hosts, which are compared with those of all functions.
    fn validate(&self, name: FunctionName, base: &Path, programs: &Path) -> Result<Function, Invalid> {
        let command = self.command.as_ref().map(|command| absolute_command(command, base, programs));
        match (&self.certificate, &self.key) {
            (Some(certificate), None) => {
                return Err(Invalid::at(
                    certificate,
                    format!("functions.{name} has a certificate and no key"),
                ));
            }
            (None, Some(key)) => {
                return Err(Invalid::at(key, format!("functions.{name} has a key and no certificate")));
            }
            _ => {}
        }
        for variable in self.env.keys() {
            if variable.get_ref().is_empty() || variable.get_ref().contains(['=', '\0']) {
                let reason = format!("{:?} can't be the name of a variable", variable.get_ref());
                return Err(Invalid::at(variable, reason));
            }
        }
        if let Some((variable, _)) = self.env.iter().find(|(_, value)| value.contains('\0')) {
            return Err(Invalid::at(variable, "a variable's value can't hold a NUL"));
        }
        self.check_who_starts(name)?;
        let path = |path: &Option<Spanned<PathBuf>>| path.as_ref().map(|path| base.join(path.get_ref()));
        Ok(Function {
            hosts: Vec::new(),
            command: command.transpose()?,
            certificate: path(&self.certificate),
            key: path(&self.key),
            instances: self.instances.as_ref().map_or(Ok(1), instances)?,
            user: self.user.as_ref().map(|user| user.get_ref().clone()),
            env: self.env.iter().map(|(name, value)| (name.get_ref().clone(), value.clone())).collect(),
            trust_group: self.trust_group.clone().unwrap_or_else(|| DEFAULT_GROUP.to_owned()),
            moves_to: None,
            memory_max: self.memory_max.as_ref().map(memory).transpose()?,
            restart_limit: self.restart_limit.as_ref().map(|limit| *limit.get_ref()),
            weights: self.weights.iter().map(weight).collect::<Result<_, _>>()?,
            access_log: self.access_log,
        })
    }

    /// What says how the supervisor starts a function needs something to start, and all instances of one command are
    /// alike.
    fn check_who_starts(&self, name: FunctionName) -> Result<(), Invalid> {
        if self.command.is_some() {
            return match self.weights.keys().next() {
                Some(id) => Err(Invalid::at(
                    id,
                    format!(
                        "functions.{name} has a command, whose instances are all alike; weights are for instances that somebody else starts"
                    ),
                )),
                None => Ok(()),
            };
        }
        let offsets = [
            ("instances", self.instances.as_ref().map(|value| value.span())),
            ("memory_max", self.memory_max.as_ref().map(|value| value.span())),
            ("restart_limit", self.restart_limit.as_ref().map(|value| value.span())),
        ];
        match offsets.into_iter().find_map(|(key, span)| Some((key, span?))) {
            Some((key, span)) => Err(Invalid {
                offset: span.start,
                reason: format!(
                    "functions.{name} has {key} and no command: whoever starts the function decides that"
                ),
            }),
            None => Ok(()),
        }
    }
}

fn instances(instances: &Spanned<u16>) -> Result<u16, Invalid> {
    if !INSTANCES.contains(instances.get_ref()) {
        let (least, most) = INSTANCES.into_inner();
        return Err(Invalid::at(instances, format!("instances is from {least} to {most}")));
    }
    Ok(*instances.get_ref())
}

fn memory(size: &Spanned<Size>) -> Result<Bytes, Invalid> {
    let bytes =
        size.get_ref().bytes().map_err(|reason| Invalid::at(size, format!("memory_max: {reason}")))?;
    if bytes < LEAST_MEMORY {
        return Err(Invalid::at(size, format!("memory_max is at least {LEAST_MEMORY}")));
    }
    Ok(bytes)
}

fn weight((id, weight): (&Spanned<String>, &Spanned<u32>)) -> Result<(String, u32), Invalid> {
    let text = id.get_ref();
    if text.is_empty() || text.len() > INSTANCE_ID_BYTES || text.contains(['/', '\0']) {
        let reason = format!("{text:?} can't be the ID in a socket's name, NAME@ID.sock");
        return Err(Invalid::at(id, reason));
    }
    if !WEIGHTS.contains(weight.get_ref()) {
        let (least, most) = WEIGHTS.into_inner();
        return Err(Invalid::at(weight, format!("a weight is from {least} to {most}")));
    }
    Ok((text.clone(), *weight.get_ref()))
}

fn function_name(key: &Spanned<String>) -> Result<FunctionName, Invalid> {
    let name = FunctionName::from_str(key.get_ref()).map_err(|reason: InvalidName| {
        Invalid::at(key, format!("functions.{:?}: {reason}", key.get_ref()))
    })?;
    if name.as_str() == REFUSAL {
        return Err(Invalid::at(key, "`refusal` is the built-in function that refuses; choose another name"));
    }
    if let Err(reason) = hosts::label(name.as_str()) {
        return Err(Invalid::at(key, format!("functions.{name}: {reason}")));
    }
    Ok(name)
}

fn receiver(
    name: &Spanned<String>,
    functions: &BTreeMap<FunctionName, Function>,
) -> Result<FunctionName, Invalid> {
    let receiver = name.get_ref().parse().ok().filter(|receiver| functions.contains_key(receiver));
    receiver.ok_or_else(|| {
        let known: Vec<_> = functions.keys().map(FunctionName::as_str).collect();
        let reason =
            format!("{:?} is no function of this file; there are {}", name.get_ref(), known.join(", "));
        Invalid::at(name, reason)
    })
}

fn listener(address: &Spanned<String>) -> Result<SocketAddr, Invalid> {
    address.get_ref().parse().map_err(|_| {
        let reason = format!(
            "{:?} is not an address to listen at; right would be ADDRESS:PORT, such as \"127.0.0.1:8080\" or \"[::]:8080\"",
            address.get_ref()
        );
        Invalid::at(address, reason)
    })
}

/// A program is named by its path, absolute or from the file's directory, or by its bare name beside this program.
fn absolute_command(
    command: &Spanned<Vec<String>>,
    base: &Path,
    programs: &Path,
) -> Result<Vec<String>, Invalid> {
    let mut words = command.get_ref().clone();
    if words.iter().any(|word| word.contains('\0')) {
        return Err(Invalid::at(command, "a command can't hold a NUL"));
    }
    match words.first_mut() {
        Some(program) if !program.is_empty() => {
            let directory = if program.contains('/') { base } else { programs };
            // Both come from a String and this program's own path; one that is not UTF-8 is beyond a TOML file.
            *program = directory.join(program.as_str()).to_string_lossy().into_owned();
            Ok(words)
        }
        _ => {
            Err(Invalid::at(command, "command is empty; right would be [\"/path/of/program\", \"argument\"]"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, Invalid> {
        parse(text, Path::new("/etc/pointsman"), Path::new("/usr/lib/pointsman"))
    }

    /// The line and the reason of a refusal.
    fn refused(text: &str) -> (usize, String) {
        let invalid = read(text).expect_err(text);
        (invalid.line(text), invalid.reason)
    }

    fn name(text: &str) -> FunctionName {
        text.parse().unwrap()
    }

    #[test]
    fn an_empty_file_has_the_defaults_and_no_functions() {
        let config = read("").unwrap();
        assert_eq!(config.gateway, GatewayTable::default().defaults());
        assert!(config.functions.is_empty());
    }

    #[test]
    fn every_key_is_read() {
        let config = read(
            r#"
            [gateway]
            http = "127.0.0.1:80"
            https = "[::1]:443"
            admin = "[::1]:9000"
            verdict = "peek"
            head_timeout_ms = 2500
            functions_dir = "sockets"
            domains = ["Example.ORG"]
            anchors = "ca.pem"

            [functions.thumb]
            hosts = ["Thumbs.example.com"]
            command = ["resize", "--workers", "2"]
            certificate = "thumb.pem"
            key = "/keys/thumb.key"
            instances = 4
            user = "nobody"
            env = { LEVEL = "high" }
            trust_group = "pictures"
            moves_to = ["other"]
            memory_max = "64M"
            restart_limit = 5
            access_log = true

            [functions.other]
            weights = { big = 3 }
            "#,
        )
        .unwrap();
        assert_eq!(config.gateway.http, "127.0.0.1:80".parse().unwrap());
        assert_eq!(config.gateway.https, "[::1]:443".parse().unwrap());
        assert_eq!(config.gateway.admin, Some("[::1]:9000".parse().unwrap()));
        assert_eq!(config.gateway.verdict, VerdictMode::Peek);
        assert_eq!(config.gateway.head_timeout, Duration::from_millis(2500));
        assert_eq!(config.gateway.functions_dir, Path::new("/etc/pointsman/sockets"));
        assert_eq!(config.gateway.anchors.as_deref(), Some(Path::new("/etc/pointsman/ca.pem")));
        let thumb = &config.functions[&name("thumb")];
        assert_eq!(thumb.hosts, ["thumb.example.org", "thumbs.example.com"]);
        assert_eq!(thumb.command.as_ref().unwrap(), &["/usr/lib/pointsman/resize", "--workers", "2"]);
        assert_eq!(thumb.certificate.as_deref(), Some(Path::new("/etc/pointsman/thumb.pem")));
        assert_eq!(thumb.key.as_deref(), Some(Path::new("/keys/thumb.key")));
        assert_eq!(thumb.user.as_deref(), Some("nobody"));
        assert_eq!(thumb.env["LEVEL"], "high");
        assert_eq!((thumb.trust_group.as_str(), &thumb.moves_to), ("pictures", &Some(vec![name("other")])));
        assert_eq!((thumb.instances, thumb.restart_limit), (4, Some(5)));
        assert_eq!(thumb.memory_max, Some(Bytes(64 << 20)));
        let other = &config.functions[&name("other")];
        assert_eq!((other.command.as_ref(), other.instances, other.memory_max), (None, 1, None));
        assert_eq!(other.weights, [("big".to_owned(), 3)].into());
        assert!(thumb.access_log && !other.access_log);
        assert_eq!(read("[gateway]\nadmin = \"off\"\n").unwrap().gateway.admin, None);
    }

    #[test]
    fn connections_move_within_a_group_or_where_they_are_told() {
        let receivers = |text: &str, function: &str| {
            let names = read(text).unwrap().receivers(&name(function))?;
            Some(names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        let one_group = "[functions.a]\n[functions.b]\n";
        assert_eq!(receivers(one_group, "a"), None);
        let two_groups = format!("{one_group}[functions.c]\ntrust_group = \"other\"\n");
        assert_eq!(receivers(&two_groups, "a").unwrap(), "b");
        assert_eq!(receivers(&two_groups, "c").unwrap(), "");
        let told = format!("{two_groups}moves_to = [\"a\"]\n");
        assert_eq!(receivers(&told, "c").unwrap(), "a");
        assert_eq!(receivers(&told, "a").unwrap(), "b");
    }

    #[test]
    fn a_refusal_names_the_line_and_what_would_be_right() {
        for (text, line, part) in [
            ("\n[gateway]\nhtp = \"x\"\n", 3, "expected one of `http`"),
            ("[gateway]\nhttp = \"8080\"\n", 2, "ADDRESS:PORT"),
            ("[gateway]\n\nhttps = \"[::]:8080\"\n", 3, "its own port"),
            ("[gateway]\nadmin = \"on\"\n", 2, "ADDRESS:PORT"),
            ("[gateway]\nhttps = \"[::1]:1\"\nadmin = \"[::1]:1\"\n", 3, "its own port"),
            ("[gateway]\nverdict = \"fast\"\n", 2, "sockmap"),
            ("[gateway]\nhead_timeout_ms = 5\n", 2, "from 100 to 600000"),
            ("[functions.a]\nmoves_to = [\"b\"]\n", 2, "there are a"),
            ("[gateway]\ndomains = [\"a.b\",\n \"A.B\"]\n", 3, "twice"),
            ("[gateway\n", 1, "expected"),
            ("\n[functions.Echo]\n", 2, "a-z"),
            ("[functions.\"a.b\"]\n", 1, "a-z"),
            ("[functions.-a]\n", 1, "must not begin"),
            ("[functions.refusal]\n", 1, "built-in"),
            ("[functions.a]\ncomand = [\"x\"]\n", 2, "expected one of"),
            ("[functions.a]\ncommand = []\n", 2, "/path/of/program"),
            ("[functions.a]\ncommand = [\"x\"]\ncertificate = \"c\"\n", 3, "no key"),
            ("[functions.a]\ncommand = [\"x\"]\nkey = \"c\"\n", 3, "no certificate"),
            ("[functions.a]\ncommand = [\"x\"]\n[functions.a.env]\n\"A=B\" = \"\"\n", 4, "variable"),
            ("[functions.a]\ncommand = [\"x\"]\ninstances = 0\n", 3, "from 1 to 64"),
            ("[functions.a]\ncommand = [\"x\"]\ninstances = 65\n", 3, "from 1 to 64"),
            ("[functions.a]\ninstances = 2\n", 2, "no command"),
            ("[functions.a]\nmemory_max = \"1G\"\n", 2, "no command"),
            ("[functions.a]\nrestart_limit = 2\n", 2, "no command"),
            ("[functions.a]\ncommand = [\"x\"]\nmemory_max = \"lots\"\n", 3, "\"256M\""),
            ("[functions.a]\ncommand = [\"x\"]\nmemory_max = 1000\n", 3, "at least 1M"),
            ("[functions.a]\ncommand = [\"x\"]\nrestart_limit = -1\n", 3, "u32"),
            ("[functions.a]\ncommand = [\"x\"]\nweights = { 1 = 2 }\n", 3, "all alike"),
            ("[functions.a]\nweights = { \"a/b\" = 2 }\n", 2, "NAME@ID.sock"),
            ("[functions.a]\nweights = { a = 0 }\n", 2, "from 1 to 100"),
        ] {
            let (at, reason) = refused(text);
            assert!(at == line && reason.contains(part), "{text:?}: line {at}: {reason}");
            assert!(!reason.contains('\n'), "{reason:?}");
        }
    }

    #[test]
    fn a_host_is_a_dns_name_of_one_function() {
        let host = |host: &str| refused(&format!("[functions.a]\nhosts = [\n\"{host}\"]\n"));
        for (wrong, part) in [
            ("", "empty"),
            ("127.0.0.1", "an address"),
            ("::1", "an address"),
            ("[::1]", "an address"),
            ("a.b.", "ends with a dot"),
            ("a..b", "1 to 63"),
            ("b\u{fc}ro.example", "xn--"),
            ("a_b.example", "'_'"),
            ("*.example", "'*'"),
            ("a-.example", "begin or end"),
            ("a.faas.local", "functions.a already"),
        ] {
            let (line, reason) = host(wrong);
            assert!(line == 3 && reason.contains(part), "{wrong:?}: line {line}: {reason}");
        }
        let (line, reason) = host(&["a"; 63].join("."));
        assert!(line == 3 && reason.contains("at most 124"), "{reason}");
        assert!(host(&"a".repeat(64)).1.contains("1 to 63"));
    }

    #[test]
    fn two_functions_never_share_a_host() {
        let (line, reason) =
            refused("[functions.a]\nhosts = [\"X.example\"]\n[functions.b]\nhosts = [\"x.example\"]\n");
        assert!(line == 4 && reason.contains("functions.a"), "line {line}: {reason}");
        // The line shown is that of the host, which can be changed, not that of the name it collides with.
        let (line, reason) = refused("[functions.a]\nhosts = [\"b.localhost\"]\n[functions.b]\n");
        assert!(line == 2 && reason.contains("functions.b"), "line {line}: {reason}");
    }

    #[test]
    fn more_hosts_than_functions_can_be_told_are_refused() {
        let label = "h".repeat(50);
        let host = |number: usize| format!("\"{label}{number:04}.{label}\",\n");
        let hosts: String = (0..1159).map(host).collect();
        assert!(read(&format!("[functions.a]\nhosts = [\n{hosts}]\n")).is_ok());
        let (line, reason) = refused(&format!("[functions.a]\nhosts = [\n{hosts}{}]\n", host(1159)));
        assert!(line == 1162 && reason.contains("bytes"), "line {line}: {reason}");
    }

    #[test]
    fn a_name_that_is_too_long_with_its_domain_is_refused() {
        let domain = ["d".repeat(60), "e".repeat(60)].join(".");
        let (line, reason) = refused(&format!("[gateway]\ndomains = [\"{domain}\"]\n[functions.long]\n"));
        assert!(line == 3 && reason.contains("shorten"), "line {line}: {reason}");
    }
}
