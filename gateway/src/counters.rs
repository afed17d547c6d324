//! What the gateway counts: every connection ends in exactly one of the outcomes.
use common::Refusal;

#[derive(Clone, Debug, Default)]
pub struct Counters {
    pub accepted: u64,
    /// Verdicts that came with `accept`, that came later from the kernel, and from user space.
    pub verdicts_at_accept: u64,
    pub verdicts_late: u64,
    pub verdicts_peeked: u64,
    /// Outcome: handed to an instance of the function.
    pub served: u64,
    /// Outcome: handed to the refusal function, by reason.
    pub refused: [u64; Refusal::ALL.len()],
    /// Outcome: ended by the client, or with bytes that could not be kept exact, before a handoff.
    pub closed: u64,
    pub poisoned: u64,
    /// Outcome: closed without an answer, because nothing could take the refusal either.
    pub dropped: u64,
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
            at_accept = self.verdicts_at_accept,
            late = self.verdicts_late,
            peeked = self.verdicts_peeked,
            served = self.served,
            refused = %refused,
            closed = self.closed,
            poisoned = self.poisoned,
            dropped = self.dropped,
            "connections"
        );
    }
}
