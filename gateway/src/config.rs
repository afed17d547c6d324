//! The configuration: a TOML file, or the defaults that need none, as types that are known to be valid.
use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use common::FunctionName;
use serde::Deserialize;

mod effective;
mod file;
mod hosts;
mod size;

pub use size::Bytes;

/// The built-in function that answers for connections that belong to nobody.
pub const REFUSAL: &str = "refusal";

/// What is served when no file says otherwise: the functions that are built beside this program.
const BUILT_IN: &str = r#"
[functions.echo]
command = ["echo"]
[functions.hello]
command = ["hello"]
[functions.resize]
command = ["resize"]
"#;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub gateway: Gateway,
    pub functions: BTreeMap<FunctionName, Function>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    pub http: SocketAddr,
    pub https: SocketAddr,
    /// Where metrics and state are told; `None`: nowhere.
    pub admin: Option<SocketAddr>,
    pub verdict: VerdictMode,
    /// How long a connection may take until it is known which function it is for.
    pub head_timeout: Duration,
    /// Where the functions' sockets are, `NAME.sock`.
    pub functions_dir: PathBuf,
    /// A function's host names are `NAME.DOMAIN` for each, in lower case.
    pub domains: Vec<String>,
    /// The certificates by which functions know each other; without them no TLS session moves.
    pub anchors: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Every host name, in lower case: `NAME.DOMAIN` first, then the function's own.
    pub hosts: Vec<String>,
    /// What the supervisor runs; the program's path is absolute. `None`: somebody else starts the function.
    pub command: Option<Vec<String>>,
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    /// How many processes the supervisor keeps running.
    pub instances: u16,
    /// Whom the function runs as, if not a user of its own or, where the supervisor isn't root, the supervisor's.
    pub user: Option<String>,
    pub env: BTreeMap<String, String>,
    /// Functions of one group may receive each other's connections.
    pub trust_group: String,
    /// The only functions that may receive this one's connections, whatever their group.
    pub moves_to: Option<Vec<FunctionName>>,
    /// What each instance may use; whoever needs more is killed.
    pub memory_max: Option<Bytes>,
    /// An instance that fails more often than this, one time soon after the other, is given up.
    pub restart_limit: Option<u32>,
    /// The share of each instance that somebody else starts, by its ID; 1 where none is given.
    pub weights: BTreeMap<String, u32>,
    /// The function writes a line for each answer.
    pub access_log: bool,
}

impl Default for Function {
    fn default() -> Self {
        Self {
            hosts: Vec::new(),
            command: None,
            certificate: None,
            key: None,
            instances: 1,
            user: None,
            env: BTreeMap::new(),
            access_log: false,
            memory_max: None,
            restart_limit: None,
            weights: BTreeMap::new(),
            trust_group: DEFAULT_GROUP.to_owned(),
            moves_to: None,
        }
    }
}

/// The group of functions that name none.
pub const DEFAULT_GROUP: &str = "default";

/// Who judges connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum VerdictMode {
    /// The kernel, if the self-test proves that it can; else the gateway, by peeking.
    Auto,
    /// The kernel, or no start.
    Sockmap,
    /// The gateway, by peeking.
    Peek,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}:{line}: {reason}", path.display())]
    Invalid { path: PathBuf, line: usize, reason: String },
    #[error("cannot find the directory of this program, which holds the default functions: {0}")]
    OwnDirectory(io::Error),
}

impl Config {
    /// Reads the file; without one, the defaults.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let programs = own_directory().map_err(ConfigError::OwnDirectory)?;
        let Some(path) = path else { return parse(Path::new("built-in configuration"), BUILT_IN, &programs) };
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        parse(path, &text, &programs)
    }

    /// The function's hosts beside the generated ones.
    pub fn own_hosts(&self, name: FunctionName) -> &[String] {
        let hosts = self.functions.get(&name).map_or(&[][..], |function| &function.hosts);
        hosts.get(self.gateway.domains.len()..).unwrap_or_default()
    }

    /// The hosts of other functions that no domain tells from nobody's.
    pub fn others_hosts(&self, name: FunctionName) -> Vec<&str> {
        let is_under =
            |host: &str, domain: &str| host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'));
        let others = self.functions.keys().filter(|other| **other != name);
        let hosts = others.flat_map(|other| self.own_hosts(*other)).map(String::as_str);
        hosts.filter(|host| !self.gateway.domains.iter().any(|domain| is_under(host, domain))).collect()
    }
}

impl Config {
    /// The functions that may receive this one's connections; `None` for all that there are or will be.
    pub fn receivers(&self, name: &FunctionName) -> Option<Vec<FunctionName>> {
        let function = self.functions.get(name)?;
        if function.moves_to.is_some() {
            return function.moves_to.clone();
        }
        let same_group = |other: &&Function| other.trust_group == function.trust_group;
        if self.functions.values().all(|other| same_group(&other)) {
            return None;
        }
        let others = self.functions.iter().filter(|(other, _)| *other != name);
        Some(others.filter(|(_, other)| same_group(other)).map(|(other, _)| *other).collect())
    }

    /// The weights of instances, of all functions that have any.
    pub fn weights(&self) -> HashMap<FunctionName, BTreeMap<String, u32>> {
        let weighted = self.functions.iter().filter(|(_, function)| !function.weights.is_empty());
        weighted.map(|(name, function)| (*name, function.weights.clone())).collect()
    }
}

fn parse(path: &Path, text: &str, programs: &Path) -> Result<Config, ConfigError> {
    let file =
        std::path::absolute(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let base = file.parent().unwrap_or(Path::new("/"));
    file::parse(text, base, programs).map_err(|invalid| ConfigError::Invalid {
        path: path.to_owned(),
        line: invalid.line(text),
        reason: invalid.reason,
    })
}

/// The directory of the running program, beside which its functions are installed.
pub fn own_directory() -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    program.parent().map(Path::to_owned).ok_or_else(|| io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_file_the_functions_beside_the_program_are_served() {
        let config = Config::load(None).unwrap();
        assert_eq!(config.gateway.http, "[::]:8080".parse().unwrap());
        assert_eq!(config.gateway.https, "[::]:8443".parse().unwrap());
        assert_eq!(config.gateway.admin, Some("127.0.0.1:8081".parse().unwrap()));
        assert_eq!(config.gateway.verdict, VerdictMode::Auto);
        assert_eq!(config.gateway.head_timeout, Duration::from_secs(10));
        let names: Vec<_> = config.functions.keys().map(FunctionName::as_str).collect();
        assert_eq!(names, ["echo", "hello", "resize"]);
        let echo = &config.functions[&"echo".parse().unwrap()];
        let program = own_directory().unwrap().join("echo").to_str().unwrap().to_owned();
        assert_eq!(echo.command, Some(vec![program]));
        assert_eq!(echo.hosts, ["echo.faas.local", "echo.localhost"]);
    }

    #[test]
    fn a_function_can_be_told_whose_hosts_are_whose() {
        let text = r#"
            [gateway]
            domains = ["example.org"]
            [functions.a]
            hosts = ["a.example.com", "pics.example.org"]
            [functions.b]
            hosts = ["b.example.com", "notexample.org"]
        "#;
        let config = parse(Path::new("/etc/p.toml"), text, Path::new("/")).unwrap();
        let [a, b] = ["a", "b"].map(|name| name.parse().unwrap());
        assert_eq!(config.own_hosts(a), ["a.example.com", "pics.example.org"]);
        assert_eq!(config.others_hosts(a), ["b.example.com", "notexample.org"]);
        assert_eq!(config.others_hosts(b), ["a.example.com"]);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Some(Path::new("/nowhere/pointsman.toml"))).unwrap_err();
        assert!(error.to_string().contains("/nowhere/pointsman.toml"), "{error}");
    }

    #[test]
    fn an_error_begins_with_file_and_line() {
        let error =
            parse(Path::new("/etc/p.toml"), "[gateway]\nhttp = \"here\"\n", Path::new("/")).unwrap_err();
        assert!(error.to_string().starts_with("/etc/p.toml:2: "), "{error}");
    }
}
