//! What is run for a function, checked before anything is started.
use std::{
    collections::BTreeMap,
    fs::{self, File, Metadata},
    io,
    iter::repeat,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use common::FunctionName;
use nix::libc::{O_NOCTTY, O_NONBLOCK};
use rustix::process::geteuid;

use super::user::{User, Users};
use crate::config::{Bytes, Config, Function, REFUSAL};

/// All that a function gets of the supervisor's environment: what finds programs, words messages, chooses log levels.
const INHERITED: [&str; 3] = ["PATH", "LANG", "POINTSMAN_LOG"];

/// What these files are called where they are passed.
const CERTIFICATE: &str = "certificate";
const KEY: &str = "key";

const ANY_EXECUTE: u32 = 0o111;

/// Two that are equal run the same: a file that was put in another's place, or written to, makes a difference.
#[derive(Debug, PartialEq, Eq)]
pub struct Program {
    pub name: FunctionName,
    pub executable: PathBuf,
    pub arguments: Vec<String>,
    pub environment: Vec<(String, String)>,
    pub user: Option<User>,
    /// What is passed beside the socket, by name; opened anew for each start, so that a renewed certificate counts.
    pub files: Vec<(&'static str, PathBuf)>,
    pub memory_max: Option<Bytes>,
    pub restart_limit: Option<u32>,
    /// Of the executable and the files, as they were when this was checked.
    versions: Vec<Version>,
}

/// A certificate, its key, and who can read them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    files: Vec<((&'static str, PathBuf), Option<Version>)>,
    user: Option<User>,
}

/// What changes when a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// By which names a function tells its own requests from others'.
#[derive(Default)]
struct Names<'a> {
    domains: &'a [String],
    own: &'a [String],
    others: Vec<&'a str>,
}

impl Program {
    /// `None` for a function that somebody else starts.
    pub fn of_function(
        name: FunctionName,
        function: &Function,
        config: &Config,
        users: &mut Users,
    ) -> Result<Option<Self>> {
        let Some((executable, arguments)) = function.command.as_deref().and_then(<[String]>::split_first)
        else {
            return Ok(None);
        };
        let names = Names {
            domains: &config.gateway.domains,
            own: config.own_hosts(name),
            others: config.others_hosts(name),
        };
        let mut environment = environment(name, &function.env, &names);
        if function.access_log {
            environment.push(("POINTSMAN_ACCESS_LOG".to_owned(), "true".to_owned()));
        }
        let receivers = config.receivers(&name).map_or("*".to_owned(), |receivers| {
            receivers.iter().map(FunctionName::as_str).collect::<Vec<_>>().join(",")
        });
        environment.push(("POINTSMAN_MOVES_TO".to_owned(), receivers));
        let anchors = config.gateway.anchors.iter().map(|path| ("anchors", path.clone()));
        let program = Self {
            arguments: arguments.to_vec(),
            environment,
            files: files(function).into_iter().chain(anchors).collect(),
            memory_max: function.memory_max,
            restart_limit: function.restart_limit,
            ..Self::bare(name, PathBuf::from(executable))
        };
        program.checked(function.user.as_deref(), users).map(Some)
    }

    /// The built-in function, whose certificate nobody needs: it sends alerts in place of a handshake.
    pub fn of_refusal(executable: PathBuf, users: &mut Users) -> Result<Self> {
        let name = REFUSAL.parse().context("the built-in function's name")?;
        let environment = environment(name, &BTreeMap::new(), &Names::default());
        Self { environment, ..Self::bare(name, executable) }.checked(None, users)
    }

    /// One that gets nothing but its socket.
    pub fn bare(name: FunctionName, executable: PathBuf) -> Self {
        Self {
            name,
            executable,
            arguments: Vec::new(),
            environment: Vec::new(),
            user: None,
            files: Vec::new(),
            memory_max: None,
            restart_limit: None,
            versions: Vec::new(),
        }
    }

    /// What shows to clients who the function is; `None` without a certificate.
    pub fn credentials(&self) -> Option<Credentials> {
        self.files.iter().any(|(role, _)| *role == CERTIFICATE).then(|| {
            // The first version is the executable's.
            let versions = self.versions.iter().skip(1).copied().map(Some).chain(repeat(None));
            let files = self.files.iter().cloned().zip(versions);
            let shown = files.filter(|((role, _), _)| [CERTIFICATE, KEY].contains(role));
            Credentials { files: shown.collect(), user: self.user.clone() }
        })
    }

    fn checked(mut self, user: Option<&str>, users: &mut Users) -> Result<Self> {
        let failed = format!("function {} can't be started", self.name);
        let mut check = || -> Result<_> {
            let mut versions = vec![check_executable(&self.executable)?];
            for file in self.open_files()? {
                versions.push(Version::of(&file.metadata()?));
            }
            Ok((versions, users.of_function(self.name, user, geteuid())?))
        };
        (self.versions, self.user) = check().context(failed)?;
        Ok(self)
    }

    /// Opened with the supervisor's rights, so that the function's user needs none on the paths.
    pub fn open_files(&self) -> io::Result<Vec<File>> {
        let open = |(role, path): &(&str, PathBuf)| {
            let unreadable = |error| format!("its {role} {} can't be read: {error}", path.display());
            open_regular(path).map_err(|error| io::Error::new(error.kind(), unreadable(error)))
        };
        self.files.iter().map(open).collect()
    }
}

impl Version {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

fn files(function: &Function) -> Vec<(&'static str, PathBuf)> {
    let certificate = function.certificate.iter().map(|path| (CERTIFICATE, path.clone()));
    certificate.chain(function.key.iter().map(|path| (KEY, path.clone()))).collect()
}

/// Later entries win: what the function and the supervisor agree on can't be configured away.
fn environment(
    name: FunctionName,
    configured: &BTreeMap<String, String>,
    names: &Names<'_>,
) -> Vec<(String, String)> {
    let inherited = INHERITED.iter().filter_map(|key| Some((key.to_string(), std::env::var(key).ok()?)));
    let configured = configured.iter().map(|(key, value)| (key.clone(), value.clone()));
    let agreed = [
        ("POINTSMAN_NAME", name.to_string()),
        ("POINTSMAN_DOMAINS", names.domains.join(",")),
        ("POINTSMAN_HOSTS", names.own.join(",")),
        ("POINTSMAN_OTHER_HOSTS", names.others.join(",")),
    ];
    inherited.chain(configured).chain(agreed.map(|(key, value)| (key.to_owned(), value))).collect()
}

fn check_executable(path: &Path) -> Result<Version> {
    let shown = path.display();
    let metadata = fs::metadata(path).with_context(|| format!("its program {shown}"))?;
    ensure!(metadata.is_file(), "its program {shown} is not a file");
    ensure!(metadata.permissions().mode() & ANY_EXECUTE != 0, "its program {shown} is not executable");
    Ok(Version::of(&metadata))
}

fn open_regular(path: &Path) -> io::Result<File> {
    // A FIFO or a terminal in the file's place must not hold the supervisor up.
    let file = File::options().read(true).custom_flags(O_NONBLOCK | O_NOCTTY).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(command: &[&str]) -> Function {
        let command = command.iter().map(|word| word.to_string()).collect();
        Function { command: Some(command), ..Function::default() }
    }

    fn config(function: &Function) -> Config {
        let mut config = Config::load(None).unwrap();
        let hosts = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        let own = hosts(&["echo.faas.local", "echo.localhost", "pics.faas.local", "echo.example"]);
        let other = hosts(&["hello.faas.local", "hello.localhost", "greet.faas.local", "hello.example"]);
        config.functions.insert("echo".parse().unwrap(), Function { hosts: own, ..function.clone() });
        config.functions.insert("hello".parse().unwrap(), Function { hosts: other, ..Function::default() });
        config
    }

    fn prepare(function: &Function) -> Result<Program, String> {
        let program =
            Program::of_function("echo".parse().unwrap(), function, &config(function), &mut Users::default());
        program.map(Option::unwrap).map_err(|error| format!("{error:#}"))
    }

    fn variable<'a>(program: &'a Program, name: &str) -> Option<&'a str> {
        // As `Command::envs` does.
        program.environment.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    #[test]
    fn who_has_no_command_is_not_started() {
        let function = Function { command: None, ..function(&[]) };
        let config = config(&function);
        assert!(
            Program::of_function("echo".parse().unwrap(), &function, &config, &mut Users::default())
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn the_environment_is_what_is_configured_beside_little_else() {
        let mut function = function(&["/bin/sh", "-c", "exit"]);
        function.env = [("LEVEL", "high"), ("POINTSMAN_NAME", "other")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        let program = prepare(&function).unwrap();
        assert_eq!((program.executable.as_path(), program.arguments.len()), (Path::new("/bin/sh"), 2));
        assert_eq!(variable(&program, "LEVEL"), Some("high"));
        assert_eq!(variable(&program, "POINTSMAN_ACCESS_LOG"), None);
        let logged = prepare(&Function { access_log: true, ..function.clone() }).unwrap();
        assert_eq!(variable(&logged, "POINTSMAN_ACCESS_LOG"), Some("true"));
        assert_eq!(variable(&program, "POINTSMAN_NAME"), Some("echo"));
        assert_eq!(variable(&program, "POINTSMAN_DOMAINS"), Some("faas.local,localhost"));
        assert_eq!(variable(&program, "POINTSMAN_MOVES_TO"), Some("*"));
        assert_eq!(variable(&program, "POINTSMAN_HOSTS"), Some("pics.faas.local,echo.example"));
        assert_eq!(variable(&program, "POINTSMAN_OTHER_HOSTS"), Some("hello.example"));
        assert_eq!(variable(&program, "PATH"), std::env::var("PATH").ok().as_deref());
        // Cargo sets it for tests; it stands for all that is not a function's business.
        assert!(std::env::var("CARGO_PKG_NAME").is_ok() && variable(&program, "CARGO_PKG_NAME").is_none());
    }

    #[test]
    fn what_can_not_be_run_is_named() {
        for (path, part) in [
            ("/nowhere/echo", "its program /nowhere/echo: No such file"),
            ("/etc", "its program /etc is not a file"),
            ("/etc/passwd", "its program /etc/passwd is not executable"),
        ] {
            let refusal = prepare(&function(&[path])).err().unwrap();
            assert!(
                refusal.starts_with("function echo can't be started: ") && refusal.contains(part),
                "{refusal}"
            );
        }
        let stranger = Function { user: Some("no such user".to_owned()), ..function(&["/bin/sh"]) };
        assert_eq!(
            prepare(&stranger).err().unwrap(),
            "function echo can't be started: there is no user no such user"
        );
    }

    #[test]
    fn whatever_changes_makes_another_program() {
        let folder = tempfile::tempdir().unwrap();
        let [executable, certificate, key] = ["program", "certificate", "key"].map(|name| {
            let path = folder.path().join(name);
            fs::write(&path, name).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        });
        let mut function = function(&[executable.to_str().unwrap()]);
        function.certificate = Some(certificate.clone());
        function.key = Some(key);
        let first = prepare(&function).unwrap();
        assert_eq!(prepare(&function).unwrap(), first);
        // As a package manager does, and as a renewed certificate comes.
        let other = folder.path().join("other");
        fs::copy(&executable, &other).unwrap();
        fs::rename(&other, &executable).unwrap();
        let second = prepare(&function).unwrap();
        assert_ne!(second, first);
        fs::write(&certificate, "renewed").unwrap();
        let third = prepare(&function).unwrap();
        assert_ne!(third, second);
        function.env.insert("LEVEL".to_owned(), "high".to_owned());
        assert_ne!(prepare(&function).unwrap(), third);
    }

    #[test]
    fn a_key_that_can_not_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let certificate = folder.path().join("certificate.pem");
        fs::write(&certificate, "certificate").unwrap();
        let with_key = |key: &Path| Function {
            certificate: Some(certificate.clone()),
            key: Some(key.to_owned()),
            ..function(&["/bin/sh"])
        };
        for (key, part) in [
            (folder.path().join("missing.key"), "missing.key can't be read: No such file"),
            (folder.path().to_owned(), "can't be read: not a file"),
        ] {
            let refusal = prepare(&with_key(&key)).err().unwrap();
            assert!(refusal.contains("its key") && refusal.contains(part), "{refusal}");
        }
        // Nobody ever writes to it: opening it must not wait for that.
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(prepare(&with_key(&fifo)).err().unwrap().contains("can't be read: not a file"));
        let program = prepare(&with_key(&certificate)).unwrap();
        assert_eq!(program.files.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["certificate", "key"]);
    }
}
