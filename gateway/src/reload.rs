//! When the configuration is to be read again: at SIGHUP and, where that is asked for, when its file changes.
use std::{
    ffi::OsString,
    future::pending,
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};
use tokio::{
    io::unix::AsyncFd,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{
    config::{Config, ConfigError, Gateway},
    readable::{OwnsDescriptor, watch},
};

/// Where the configuration comes from, each time that it is read.
pub struct Source {
    path: Option<PathBuf>,
    watched: bool,
    /// What the command line says otherwise than the file.
    overrides: Box<dyn Fn(&mut Config) + Send + Sync>,
}

#[derive(Clone, Debug, Default, clap::Args)]
pub struct SourceOptions {
    /// The configuration; without it the defaults hold. SIGHUP has it read again.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Read the configuration again when its file changes, too.
    #[arg(long, requires = "config")]
    pub watch: bool,
}

impl Source {
    pub fn new(options: SourceOptions, overrides: impl Fn(&mut Config) + Send + Sync + 'static) -> Self {
        Self { path: options.config, watched: options.watch, overrides: Box::new(overrides) }
    }

    pub fn read(&self) -> Result<Config, ConfigError> {
        let mut config = Config::load(self.path.as_deref())?;
        (self.overrides)(&mut config);
        Ok(config)
    }

    /// Hears from now on what asks to read it again. Must be called within a runtime.
    pub fn reloads(&self) -> Result<Reloads> {
        let hangups = signal(SignalKind::hangup())?;
        let file = match &self.path {
            Some(path) if self.watched => Some(FileWatch::new(path).and_then(|file| Ok(watch(file)?))?),
            _ => None,
        };
        Ok(Reloads { hangups, file })
    }
}

pub struct Reloads {
    hangups: Signal,
    file: Option<AsyncFd<FileWatch>>,
}

impl Reloads {
    /// Done when the configuration is to be read again. Nothing is missed when the future is dropped early.
    pub async fn next(&mut self) {
        let Self { hangups, file } = self;
        tokio::select! {
            Some(()) = hangups.recv() => {}
            () = changed(file.as_ref()) => {}
        }
    }
}

/// The configuration of a running gateway, which follows what can change while it runs.
pub struct Following {
    source: Source,
    reloads: Reloads,
    first: Gateway,
}

impl Following {
    /// Must be called within a runtime.
    pub fn new(source: Source, first: Gateway) -> Result<Self> {
        let reloads = source.reloads()?;
        Ok(Self { source, reloads, first })
    }

    /// Done when the configuration is to be read again. Nothing is missed when the future is dropped early.
    pub async fn asked(&mut self) {
        self.reloads.next().await;
    }

    /// What the file says now; `None` when it is refused, which is said here.
    pub fn read(&self) -> Option<Config> {
        match self.source.read() {
            Ok(config) => {
                let fixed = fixed(&self.first, &config.gateway);
                if !fixed.is_empty() {
                    tracing::warn!(
                        keys = fixed.join(" "),
                        "can't change while the gateway runs: they stay as they were until its next start"
                    );
                }
                Some(config)
            }
            Err(error) => {
                tracing::error!(%error, "the configuration is refused; the running one stays");
                None
            }
        }
    }
}

/// The keys of `[gateway]` that differ and that sockets, programs or held connections depend on.
fn fixed(first: &Gateway, now: &Gateway) -> Vec<&'static str> {
    [
        ("http", first.http != now.http),
        ("https", first.https != now.https),
        ("admin", first.admin != now.admin),
        ("verdict", first.verdict != now.verdict),
        ("head_timeout_ms", first.head_timeout != now.head_timeout),
        ("functions_dir", first.functions_dir != now.functions_dir),
    ]
    .into_iter()
    .filter_map(|(key, differs)| differs.then_some(key))
    .collect()
}

async fn changed(file: Option<&AsyncFd<FileWatch>>) {
    let Some(file) = file else { return pending().await };
    loop {
        // The runtime shuts down.
        let Ok(mut ready) = file.readable().await else { return pending().await };
        match ready.try_io(|file| file.get_ref().has_changed()) {
            Ok(Ok(true)) => return,
            Ok(Ok(false)) | Err(_) => {}
            Ok(Err(error)) => {
                tracing::error!(%error, "the configuration can't be watched any more; SIGHUP still has it read");
                return pending().await;
            }
        }
    }
}

/// The directory of a file is watched: editors put another file in its place, and that one would not be seen.
struct FileWatch {
    inotify: Inotify,
    name: OsString,
}

impl FileWatch {
    fn new(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path)?;
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            bail!("{} can't be watched, because it is no file", path.display());
        };
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .and_then(|inotify| {
                // Written as a whole, or put there; what is half written is of no use yet.
                let events = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO;
                inotify.add_watch(directory, events)?;
                Ok(inotify)
            })
            .with_context(|| format!("{} can't be watched", directory.display()))?;
        Ok(Self { inotify, name: name.to_owned() })
    }

    /// Takes all that inotify has to say; an error of kind `WouldBlock` when that is nothing.
    fn has_changed(&self) -> io::Result<bool> {
        let mut changed = false;
        let mut any = false;
        loop {
            match self.inotify.read_events() {
                Ok(events) => {
                    any = true;
                    // An overflow has no name, and may stand for the file.
                    changed |= events.iter().any(|event| match &event.name {
                        Some(name) => *name == self.name,
                        None => event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW),
                    });
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if any => return Ok(changed),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsRawFd for FileWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.inotify.as_fd().as_raw_fd()
    }
}

// SAFETY: inotify's descriptor is an `OwnedFd`, which keeps it until it is dropped.
unsafe impl OwnsDescriptor for FileWatch {}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_file_that_is_written_or_replaced_has_changed_and_its_neighbours_have_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pointsman.toml");
        fs::write(&path, "").unwrap();
        let file = watch(FileWatch::new(&path).unwrap()).unwrap();
        let change = || timeout(PATIENCE, changed(Some(&file)));
        let would_block = || file.get_ref().has_changed().unwrap_err().kind() == io::ErrorKind::WouldBlock;

        fs::write(&path, "[gateway]").unwrap();
        change().await.unwrap();
        let other = folder.path().join("other");
        fs::write(&other, "").unwrap();
        assert!(!file.get_ref().has_changed().unwrap());
        fs::rename(&other, &path).unwrap();
        change().await.unwrap();
        assert!(would_block());
    }

    #[test]
    fn what_stays_until_the_next_start_is_named() {
        let first = Config::load(None).unwrap().gateway;
        let mut now = first.clone();
        now.domains = vec!["example.org".to_owned()];
        assert!(fixed(&first, &now).is_empty());
        now.http = "[::1]:1".parse().unwrap();
        now.functions_dir = PathBuf::from("/elsewhere");
        assert_eq!(fixed(&first, &now), ["http", "functions_dir"]);
    }

    #[test]
    fn the_command_line_holds_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pointsman.toml");
        let options = SourceOptions { config: Some(path.clone()), watch: false };
        let source = Source::new(options, |config| config.gateway.http = "[::1]:1".parse().unwrap());
        for text in ["", "[gateway]\nhttp = \"[::1]:2\"\n"] {
            fs::write(&path, text).unwrap();
            assert_eq!(source.read().unwrap().gateway.http, "[::1]:1".parse().unwrap());
        }
    }
}
