//! Writes a configuration as the file that would say the same: defaults filled in, paths absolute.
use toml::{Table, Value};

use super::{Config, DEFAULT_GROUP, Function, Gateway, VerdictMode};

impl Config {
    pub fn to_toml(&self) -> String {
        let functions = self
            .functions
            .iter()
            .map(|(name, function)| {
                (
                    name.to_string(),
                    Value::Table(function_table(name.as_str(), function, &self.gateway.domains)),
                )
            })
            .collect();
        let mut file = Table::new();
        file.insert("gateway".to_owned(), Value::Table(gateway_table(&self.gateway)));
        file.insert("functions".to_owned(), Value::Table(functions));
        file.to_string()
    }
}

impl VerdictMode {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Sockmap => "sockmap",
            Self::Peek => "peek",
        }
    }
}

fn gateway_table(gateway: &Gateway) -> Table {
    // The configuration bounds the time, so it always fits.
    let head_timeout_ms = i64::try_from(gateway.head_timeout.as_millis()).unwrap_or(i64::MAX);
    let anchors = gateway.anchors.as_ref().map(|path| Value::from(path.to_string_lossy().into_owned()));
    let table = [
        ("http", Value::from(gateway.http.to_string())),
        ("https", Value::from(gateway.https.to_string())),
        ("admin", Value::from(gateway.admin.map_or("off".to_owned(), |admin| admin.to_string()))),
        ("verdict", Value::from(gateway.verdict.as_str())),
        ("head_timeout_ms", Value::from(head_timeout_ms)),
        ("functions_dir", Value::from(gateway.functions_dir.to_string_lossy().into_owned())),
        ("domains", strings(&gateway.domains)),
    ];
    table
        .into_iter()
        .chain(anchors.map(|anchors| ("anchors", anchors)))
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

fn function_table(name: &str, function: &Function, domains: &[String]) -> Table {
    let is_generated = |host: &str| {
        domains
            .iter()
            .any(|domain| host.strip_prefix(name).and_then(|rest| rest.strip_prefix('.')) == Some(domain))
    };
    let hosts: Vec<String> = function.hosts.iter().filter(|host| !is_generated(host)).cloned().collect();
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref().map(|path| Value::from(path.to_string_lossy().into_owned()))
    };
    let env: Table =
        function.env.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str()))).collect();
    let weights: Table =
        function.weights.iter().map(|(id, &weight)| (id.clone(), Value::from(i64::from(weight)))).collect();
    [
        ("hosts", (!hosts.is_empty()).then(|| strings(&hosts))),
        ("command", function.command.as_ref().map(|command| strings(command))),
        ("certificate", path(&function.certificate)),
        ("key", path(&function.key)),
        ("instances", (function.instances != 1).then(|| Value::from(i64::from(function.instances)))),
        ("user", function.user.as_deref().map(Value::from)),
        ("access_log", function.access_log.then_some(Value::from(true))),
        ("env", (!env.is_empty()).then_some(Value::Table(env))),
        (
            "trust_group",
            (function.trust_group != DEFAULT_GROUP).then(|| Value::from(function.trust_group.as_str())),
        ),
        (
            "moves_to",
            function
                .moves_to
                .as_ref()
                .map(|names| Value::Array(names.iter().map(|name| Value::from(name.as_str())).collect())),
        ),
        ("memory_max", function.memory_max.map(|bytes| Value::from(bytes.to_string()))),
        ("restart_limit", function.restart_limit.map(|limit| Value::from(i64::from(limit)))),
        ("weights", (!weights.is_empty()).then_some(Value::Table(weights))),
    ]
    .into_iter()
    .filter_map(|(key, value)| Some((key.to_owned(), value?)))
    .collect()
}

fn strings(values: &[String]) -> Value {
    Value::Array(values.iter().map(|value| Value::from(value.as_str())).collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::parse;

    fn read(path: &str, text: &str) -> Config {
        parse(Path::new(path), text, Path::new("/usr/lib/pointsman")).unwrap()
    }

    #[test]
    fn what_is_written_is_read_as_the_same_wherever_it_lies() {
        let config = read(
            "/etc/pointsman/pointsman.toml",
            r#"
            [gateway]
            http = "127.0.0.1:80"
            admin = "off"
            verdict = "sockmap"
            head_timeout_ms = 2500
            functions_dir = "sockets"
            domains = ["example.org"]
            [functions.thumb]
            hosts = ["thumbs.example.com", "thumb.example.net"]
            command = ["./resize", "--workers", "2"]
            certificate = "thumb.pem"
            key = "thumb.key"
            instances = 3
            user = "nobody"
            access_log = true
            env = { LEVEL = "high \"est\"" }
            memory_max = "256M"
            restart_limit = 0
            [functions.other]
            weights = { large = 4, 2 = 1 }
            "#,
        );
        assert_eq!(read("/elsewhere/copy.toml", &config.to_toml()), config);
        let defaults = Config::load(None).unwrap();
        assert_eq!(read("/elsewhere/copy.toml", &defaults.to_toml()), defaults);
    }
}
