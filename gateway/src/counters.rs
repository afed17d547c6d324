//! What the gateway counts: every connection ends in exactly one of the outcomes.
use common::{Refusal, Verdict};

#[derive(Clone, Debug, Default)]
pub struct Counters {
    pub accepted: u64,
    pub verdicts: Verdicts,
    /// Outcome: handed to an instance of the function.
    pub served: u64,
    /// Outcome: handed to the refusal function, by reason.
    pub refused: [u64; Refusal::ALL.len()],
    /// Outcome: ended by the client, or with bytes that could not be kept exact, before a handoff.
    pub closed: u64,
    pub poisoned: u64,
    /// Outcome: closed without an answer, because nothing could take the refusal either.
    pub dropped: u64,
    /// How often accepting paused for want of descriptors or memory.
    pub pauses: u64,
}

/// Where a verdict came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// From the kernel, with `accept`.
    AtAccept,
    /// From the kernel, after `accept`.
    Late,
    UserSpace,
}

impl Source {
    pub const ALL: [Self; 3] = [Self::AtAccept, Self::Late, Self::UserSpace];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AtAccept => "kernel_at_accept",
            Self::Late => "kernel_late",
            Self::UserSpace => "user_space",
        }
    }
}

/// A route, each refusal, poisoned, closed.
const OUTCOMES: usize = 3 + Refusal::ALL.len();

/// Verdicts by source and outcome.
#[derive(Clone, Debug, Default)]
pub struct Verdicts([[u64; OUTCOMES]; Source::ALL.len()]);

impl Verdicts {
    pub fn add(&mut self, source: Source, verdict: Verdict) {
        let outcome = match verdict {
            // It stands for more bytes that are needed, and is none.
            Verdict::Pending => return,
            Verdict::Route { .. } => 0,
            Verdict::Poisoned => 1,
            Verdict::Closed => 2,
            Verdict::Refused(refusal) => 2 + usize::from(refusal.code()),
        };
        self.0[source as usize][outcome] += 1;
    }

    pub fn of(&self, source: Source) -> u64 {
        self.0[source as usize].iter().sum()
    }

    pub fn iter(&self) -> impl Iterator<Item = (Source, &'static str, u64)> {
        let outcomes = ["route", "poisoned", "closed"].into_iter().chain(Refusal::ALL.map(Refusal::as_str));
        Source::ALL.into_iter().zip(self.0).flat_map(move |(source, counts)| {
            outcomes.clone().zip(counts).map(move |(outcome, count)| (source, outcome, count))
        })
    }
}

impl Counters {
    pub fn refused(&mut self, refusal: Refusal) {
        self.refused[usize::from(refusal.code()) - 1] += 1;
    }

    /// Says all of it, once.
    pub fn log(&self) {
        let refused = Refusal::ALL
            .into_iter()
            .zip(self.refused)
            .filter(|(_, count)| *count > 0)
            .map(|(refusal, count)| format!("{}={count}", refusal.as_str()))
            .collect::<Vec<_>>()
            .join(" ");
        tracing::info!(
            accepted = self.accepted,
            at_accept = self.verdicts.of(Source::AtAccept),
            late = self.verdicts.of(Source::Late),
            peeked = self.verdicts.of(Source::UserSpace),
            served = self.served,
            refused = %refused,
            closed = self.closed,
            poisoned = self.poisoned,
            dropped = self.dropped,
            "connections"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_verdict_has_a_place_of_its_own() {
        let mut verdicts = Verdicts::default();
        let route = Verdict::Route { generation: 1, index: 2 };
        let all: Vec<_> = [route, Verdict::Poisoned, Verdict::Closed]
            .into_iter()
            .chain(Refusal::ALL.map(Verdict::Refused))
            .collect();
        for source in Source::ALL {
            for (times, verdict) in all.iter().enumerate() {
                (0..=times).for_each(|_| verdicts.add(source, *verdict));
            }
            verdicts.add(source, Verdict::Pending);
        }
        let counted: Vec<_> = verdicts.iter().map(|(_, _, count)| count).collect();
        let expected: Vec<_> = (1..=all.len() as u64).collect();
        assert_eq!(counted, expected.repeat(3));
        let (source, outcome, count) = verdicts.iter().last().unwrap();
        assert_eq!((source.as_str(), outcome, count), ("user_space", "incomplete", all.len() as u64));
    }
}
