//! Chooses the path to a verdict: the kernel's where it proves itself, else user space.
use common::verdict::GENERATION_MASK;

use crate::{
    config::VerdictMode,
    kernel::{self, Cgroup, Kernel, selftest},
    routes::Routes,
};

/// The kernel path, with what it needs to live.
pub struct Sockmap {
    // Before the cgroup, so that the programs are detached before it is removed.
    pub kernel: Kernel,
    _cgroup: Cgroup,
}

#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    #[error(transparent)]
    Cgroup(#[from] kernel::cgroup::Error),
    #[error(transparent)]
    SelfTest(#[from] selftest::Failure),
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
}

/// Proves the kernel path on this host and leaves nothing behind.
pub fn prove() -> Result<(), Unfit> {
    let cgroup = Cgroup::enter()?;
    Ok(selftest::run(&cgroup)?)
}

/// Enters a cgroup and runs the self-test there; must precede the listeners, which belong to the cgroup that made
/// them. `None` means user space.
pub fn prepare(mode: VerdictMode) -> Result<Option<Cgroup>, Unfit> {
    if mode == VerdictMode::Peek {
        tracing::info!("verdicts come from user space, as configured");
        return Ok(None);
    }
    match enter_and_test() {
        Ok(cgroup) => {
            tracing::info!("verdicts come from the kernel: the self-test passed");
            Ok(Some(cgroup))
        }
        Err(unfit) if mode == VerdictMode::Auto => {
            tracing::warn!(reason = %Chain(&unfit), "verdicts come from user space, because the kernel path is not fit here");
            Ok(None)
        }
        Err(unfit) => Err(unfit),
    }
}

fn enter_and_test() -> Result<Cgroup, Unfit> {
    let cgroup = Cgroup::enter()?;
    selftest::run(&cgroup)?;
    Ok(cgroup)
}

impl Sockmap {
    pub fn load(options: &kernel::Options, cgroup: Cgroup, routes: &Routes) -> Result<Self, Unfit> {
        let mut kernel = Kernel::load(options, &cgroup)?;
        kernel.publish(routes.generation() & GENERATION_MASK, routes.entries())?;
        Ok(Self { kernel, _cgroup: cgroup })
    }

    /// Takes new verdicts from these routes, or goes on with the former ones.
    pub fn follow(&mut self, routes: &Routes) -> Result<(), kernel::Error> {
        self.kernel.publish(routes.generation() & GENERATION_MASK, routes.entries()).inspect_err(|_| {
            self.kernel.withdraw(routes.entries().map(|(key, _)| key));
        })
    }
}

/// An error with its causes, on one line.
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut error = self.0;
        while let Some(source) = error.source() {
            write!(f, ": {source}")?;
            error = source;
        }
        Ok(())
    }
}
