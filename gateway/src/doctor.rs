//! `pointsman doctor`: what this host has and lacks, what each is for, and the remedy.
use std::{fmt, process::ExitCode};

use crate::mode::{self, Chain, Proven, SelfTest};

mod facts;
mod host;

/// One thing that Pointsman wants of a host.
#[derive(Debug, PartialEq, Eq)]
pub struct Check {
    pub name: &'static str,
    pub purpose: &'static str,
    pub need: Need,
    pub outcome: Outcome,
}

/// What is lost without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Everything.
    Always,
    /// Verdicts come from user space instead.
    KernelPath,
    /// Nothing that a client sees.
    Optional,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Present(String),
    Absent {
        found: String,
        remedy: String,
    },
    /// It can't be told from outside; the self-test decides.
    Unknown(String),
}

/// Prints every check; fails when the gateway can't run here at all.
pub fn run(self_test: SelfTest) -> ExitCode {
    let mut checks = host::checks();
    let self_test = mode::prove(self_test);
    checks.push(Check {
        name: "self-test",
        purpose: "the proof, on a real connection, that this kernel delivers exact bytes and verdicts at accept",
        need: Need::KernelPath,
        outcome: match &self_test {
            Ok(Proven::Now) => Outcome::Present("passed now".to_owned()),
            Ok(Proven::Before) => Outcome::Present(
                "passed before, since this host was booted; --self-test runs it again".to_owned(),
            ),
            Err(unfit) => Outcome::Absent {
                found: Chain(unfit).to_string(),
                remedy: "see what is missing above; until then `--verdict peek` (or auto) serves in user space".to_owned(),
            },
        },
    });
    for check in &checks {
        println!("{check}");
    }
    println!();
    let broken = checks.iter().any(|check| check.need == Need::Always && check.is_absent());
    match (&self_test, broken) {
        (_, true) => println!("The gateway can't run here: see what is missing above."),
        (Ok(_), _) => println!("The gateway will take its verdicts from the kernel (sockmap)."),
        (Err(_), _) => println!("The gateway will take its verdicts from user space (peek)."),
    }
    if broken { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

impl Check {
    fn is_absent(&self) -> bool {
        matches!(self.outcome, Outcome::Absent { .. })
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (state, found) = match (&self.outcome, self.need) {
            (Outcome::Present(found), _) => ("ok", found),
            (Outcome::Absent { found, .. }, Need::Optional) => ("absent", found),
            (Outcome::Absent { found, .. }, _) => ("MISSING", found),
            (Outcome::Unknown(found), _) => ("unknown", found),
        };
        let without = match self.need {
            Need::Always => "",
            Need::KernelPath => " [kernel path]",
            Need::Optional => " [optional]",
        };
        write!(f, "{state:8} {}: {found}\n         for {}{without}", self.name, self.purpose)?;
        if let Outcome::Absent { remedy, .. } = &self.outcome {
            write!(f, "\n         remedy: {remedy}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(need: Need, outcome: Outcome) -> Check {
        Check { name: "BTF", purpose: "offsets", need, outcome }
    }

    #[test]
    fn what_is_missing_comes_with_its_remedy() {
        let absent = || Outcome::Absent { found: "none".to_owned(), remedy: "another kernel".to_owned() };
        assert_eq!(
            check(Need::KernelPath, absent()).to_string(),
            "MISSING  BTF: none\n         for offsets [kernel path]\n         remedy: another kernel"
        );
        assert!(check(Need::Optional, absent()).to_string().starts_with("absent   BTF"));
        assert_eq!(
            check(Need::Always, Outcome::Present("here".to_owned())).to_string(),
            "ok       BTF: here\n         for offsets"
        );
    }
}
