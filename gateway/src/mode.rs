//! Chooses who gives a verdict: the kernel's where it proves itself, else user space.
use std::net::SocketAddr;

use common::verdict::GENERATION_MASK;

use crate::{
    config::VerdictMode,
    kernel::{
        self, Cgroup, Kernel, Pins, cgroup,
        pins::{Identity, Leftovers},
        proof::Proof,
        selftest,
    },
    listener,
    routes::Routes,
};

/// The kernel path, with what it needs to live.
pub struct Sockmap {
    // In the order of their end: the process leaves the cgroup before the pins remove it.
    pub kernel: Kernel,
    _cgroup: Cgroup,
    pins: Option<Pins>,
}

/// What a gateway wants of its host.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub mode: VerdictMode,
    pub http: SocketAddr,
    pub https: SocketAddr,
    /// Off only where a test has to show what trimming prevents.
    pub trim: bool,
    pub self_test: SelfTest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SelfTest {
    /// Not where it has passed before, with the same programs, since the host was booted.
    Once,
    Always,
}

/// When the self-test passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proven {
    Now,
    Before,
}

impl Proven {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Now => "the self-test passed",
            Self::Before => "the self-test passed before, since this boot",
        }
    }
}

/// The path that was chosen, and why.
pub struct Choice<T> {
    /// The kernel path's; `None` means user space.
    pub kernel: Option<T>,
    pub reason: String,
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

/// Proves the kernel path on this host; leaves nothing behind but the memory of it.
pub fn prove(self_test: SelfTest) -> Result<Proven, Unfit> {
    let proof = Proof::here();
    if self_test == SelfTest::Once && proof.as_ref().is_some_and(Proof::holds) {
        return Ok(Proven::Before);
    }
    // In a cgroup of its own, because other programs are at work in the gateway's already.
    let cgroup = Cgroup::enter("self-test-")?;
    match selftest::run(&cgroup) {
        Ok(()) => {
            proof.iter().for_each(Proof::remember);
            Ok(Proven::Now)
        }
        Err(failure) => {
            proof.iter().for_each(Proof::forget);
            Err(failure.into())
        }
    }
}

/// The cgroup that this process is in, and what is there for its programs.
pub struct Ground {
    adopted: Option<Kernel>,
    cgroup: Cgroup,
    pins: Option<Pins>,
    /// Which later gateways can go on with the programs.
    layout: Option<String>,
    proven: Proven,
}

/// Takes the ground of the kernel path; must precede the listeners, which belong to the cgroup that made them.
pub fn prepare(wanted: &Wanted) -> Result<(Choice<Ground>, Leftovers), Unfit> {
    let identity = identity(wanted);
    let choice = match wanted.mode {
        VerdictMode::Peek => {
            tracing::info!("verdicts come from user space, as configured");
            Choice { kernel: None, reason: "as configured".to_owned() }
        }
        VerdictMode::Auto => {
            take_ground(wanted, identity.as_ref()).map_or_else(|unfit| in_user_space(&unfit), Ground::chosen)
        }
        VerdictMode::Sockmap => take_ground(wanted, identity.as_ref())?.chosen(),
    };
    // After the adoption, or it would be removed as nobody's.
    Ok((choice, Leftovers::collect(identity)))
}

/// Loads the programs, or goes on with those that were found.
pub fn load(
    wanted: &Wanted,
    choice: Choice<Ground>,
    options: &kernel::Options,
    routes: &Routes,
) -> Result<Choice<Sockmap>, Unfit> {
    let Choice { kernel, reason } = choice;
    let Some(ground) = kernel else { return Ok(Choice { kernel: None, reason }) };
    match ground.load(options, routes) {
        Ok(sockmap) => Ok(Choice { kernel: Some(sockmap), reason }),
        Err(unfit) => {
            // What was proved before does not hold any more.
            Proof::here().iter().for_each(Proof::forget);
            match wanted.mode {
                VerdictMode::Auto => Ok(in_user_space(&unfit)),
                _ => Err(unfit),
            }
        }
    }
}

fn in_user_space<T>(unfit: &Unfit) -> Choice<T> {
    let reason = Chain(unfit).to_string();
    tracing::warn!(reason, "verdicts come from user space, because the kernel path is not fit here");
    Choice { kernel: None, reason }
}

fn identity(wanted: &Wanted) -> Option<Identity> {
    let namespace = listener::network_namespace();
    if let Err(error) = &namespace {
        tracing::debug!(%error, "the network namespace has no cookie");
    }
    Some(Identity::new(wanted.http, wanted.https, namespace.ok()?))
}

fn take_ground(wanted: &Wanted, identity: Option<&Identity>) -> Result<Ground, Unfit> {
    let proven = prove(wanted.self_test)?;
    tracing::info!("verdicts come from the kernel: {}", proven.as_str());
    let layout = layout(wanted);
    if let (Some(identity), Some(layout)) = (identity, &layout)
        && let Some(pins) = Pins::take_over(identity, layout)
    {
        match adopt(&pins) {
            Ok((kernel, cgroup)) => {
                let layout = Some(layout.clone());
                return Ok(Ground { adopted: Some(kernel), cgroup, pins: Some(pins), layout, proven });
            }
            Err(unfit) => {
                tracing::info!(reason = %Chain(&unfit), "can't go on with what a killed gateway left");
                pins.leave();
            }
        }
    }
    let pins = identity.and_then(|identity| match Pins::make(identity) {
        Ok(pins) => Some(pins),
        Err(error) => {
            tracing::warn!(
                reason = %Chain(&error),
                "the BPF programs are not pinned: if this gateway is killed, connections that depend on them may hang"
            );
            None
        }
    });
    let cgroup = match &pins {
        Some(pins) => Cgroup::enter_pinned(pins)?,
        None => Cgroup::enter("")?,
    };
    Ok(Ground { adopted: None, cgroup, pins, layout, proven })
}

/// A port that the kernel chooses is another one at the next start, and the programs know their ports.
fn layout(wanted: &Wanted) -> Option<String> {
    let (http_port, https_port) = (wanted.http.port(), wanted.https.port());
    let fixed = http_port != 0 && https_port != 0;
    fixed.then(|| kernel::Options { http_port, https_port, trim: wanted.trim }.layout())
}

fn adopt(pins: &Pins) -> Result<(Kernel, Cgroup), Unfit> {
    let cgroup = cgroup::id_for(pins).ok_or(kernel::cgroup::Error::Gone)?;
    let kernel = Kernel::adopt(pins, cgroup)?;
    tracing::info!(
        set = %pins.path().display(),
        connections = kernel.enrolled().len(),
        "goes on with the BPF programs that a killed gateway left"
    );
    Ok((kernel, Cgroup::enter_pinned(pins)?))
}

impl Ground {
    fn chosen(self) -> Choice<Self> {
        let reason = self.proven.as_str().to_owned();
        Choice { kernel: Some(self), reason }
    }

    fn load(self, options: &kernel::Options, routes: &Routes) -> Result<Sockmap, Unfit> {
        let Self { adopted, cgroup, pins, layout, proven: _ } = self;
        let mut kernel = match adopted {
            Some(kernel) => kernel,
            None => Kernel::load(options, &cgroup, pins.as_ref())?,
        };
        kernel.publish(routes.generation() & GENERATION_MASK, routes.entries())?;
        if let (Some(pins), Some(layout)) = (&pins, &layout) {
            pins.label_layout(layout).map_err(kernel::Error::from)?;
        }
        Ok(Sockmap { kernel, _cgroup: cgroup, pins })
    }
}

impl Sockmap {
    /// Ends every connection that depends on the programs, and takes these away.
    pub fn end(self) {
        let Self { kernel, _cgroup: cgroup, mut pins } = self;
        let mut ended = true;
        for cookie in kernel.enrolled() {
            if let Err(error) = kernel.destroy(cookie) {
                ended = false;
                tracing::warn!(%error, "can't end a connection that depends on the BPF programs");
            }
        }
        if ended {
            pins.iter_mut().for_each(Pins::give_up);
        }
        drop((kernel, cgroup, pins));
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
