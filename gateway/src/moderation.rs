//! Lets other threads go first while so much comes that waiting makes the gateway's turns worth more.
//!
//! A thread that wakes interrupts whoever runs. On a busy machine those are the clients and functions that would have
//! caused the next events, so the gateway finds the one connection that woke it, and pays for a turn of its own for
//! each. As `SCHED_BATCH` (sched(7)) it interrupts nobody: it runs when a processor has nothing else to do, or when
//! somebody's slice is over, and finds more.
use std::{io, time::Duration};

use nix::libc;
use tokio::time::Instant;

/// How long turns are watched before anything changes, and so how long a mistake lasts.
const WINDOW: Duration = Duration::from_millis(100);

/// With fewer turns or connections a second than this, little is to be gained.
const BUSY: u32 = 500;

/// Connections in a turn that are worth waiting for.
const WORTHWHILE: u32 = 3;

/// Connections in a prompt turn that promise more in a patient one.
const PROMISING: u32 = 2;

/// How long waiting isn't tried again when it was no use: a single client that waits for each answer, for example, has
/// nothing more to send in the meantime. Each failure in a row doubles it, which holds for as long as turns promise
/// nothing else.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(16);

/// How the gateway's thread takes its turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// At once.
    Prompt,
    /// When nobody else is running.
    Patient,
}

/// Chooses the manner of the thread that it is called from.
pub struct Moderation {
    /// `None` when somebody else has decided how the thread is scheduled, or nothing can be changed.
    choice: Option<Choice>,
}

impl Moderation {
    pub fn new(now: Instant) -> Self {
        Self { choice: is_ordinary().then(|| Choice::new(now)) }
    }

    /// After each turn: how many connections it accepted.
    pub fn turn(&mut self, now: Instant, connections: u64) {
        let Some(choice) = &mut self.choice else { return };
        let Some(manner) = choice.turn(now, connections) else { return };
        tracing::debug!(?manner, "the loop changes how it takes its turns");
        if let Err(error) = adopt(manner) {
            tracing::debug!(%error, "the loop can't change how it takes its turns");
            self.choice = None;
        }
    }
}

struct Choice {
    manner: Manner,
    since: Instant,
    turns: u64,
    connections: u64,
    failed_at: Option<Instant>,
    pause: Duration,
}

impl Choice {
    fn new(now: Instant) -> Self {
        Self {
            manner: Manner::Prompt,
            since: now,
            turns: 0,
            connections: 0,
            failed_at: None,
            pause: SHORTEST_PAUSE,
        }
    }

    /// The manner for the next turns, if it changes.
    fn turn(&mut self, now: Instant, connections: u64) -> Option<Manner> {
        if connections == 0 {
            return None;
        }
        self.turns += 1;
        self.connections += connections;
        let watched = now.duration_since(self.since);
        if watched < WINDOW {
            return None;
        }
        let manner = self.judge(now, watched);
        (self.since, self.turns, self.connections) = (now, 0, 0);
        (manner != self.manner).then(|| {
            self.manner = manner;
            manner
        })
    }

    fn judge(&mut self, now: Instant, watched: Duration) -> Manner {
        let is_busy = |count: u64| u128::from(count) * 1000 >= u128::from(BUSY) * watched.as_millis();
        let brings = |connections: u32| self.connections >= self.turns * u64::from(connections);
        match self.manner {
            Manner::Prompt => {
                let pause = if brings(PROMISING) { SHORTEST_PAUSE } else { self.pause };
                let is_over = self.failed_at.is_none_or(|failed_at| now.duration_since(failed_at) >= pause);
                if is_over && is_busy(self.turns) { Manner::Patient } else { Manner::Prompt }
            }
            Manner::Patient if !brings(WORTHWHILE) => {
                self.failed_at = Some(now);
                self.pause = LONGEST_PAUSE.min(self.pause * 2);
                Manner::Prompt
            }
            Manner::Patient => {
                self.pause = SHORTEST_PAUSE;
                if is_busy(self.connections) { Manner::Patient } else { Manner::Prompt }
            }
        }
    }
}

/// Whether this thread is scheduled as threads are by default.
fn is_ordinary() -> bool {
    // SAFETY: the call takes a number and touches no memory.
    unsafe { libc::sched_getscheduler(0) == libc::SCHED_OTHER }
}

fn adopt(manner: Manner) -> io::Result<()> {
    let policy = match manner {
        Manner::Prompt => libc::SCHED_OTHER,
        Manner::Patient => libc::SCHED_BATCH,
    };
    // SAFETY: all fields of this structure are integers.
    let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    parameters.sched_priority = 0;
    // SAFETY: the structure lives until the call returns.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Loop {
        choice: Choice,
        now: Instant,
    }

    impl Loop {
        fn new() -> Self {
            let now = Instant::now();
            Self { choice: Choice::new(now), now }
        }

        /// So many turns a second, with so many connections each, for so long; says how the last ones were taken.
        fn runs(&mut self, turns: u32, connections: u64, duration: Duration) -> Manner {
            let end = self.now + duration;
            while self.now < end {
                self.now += Duration::from_secs(1) / turns;
                self.choice.turn(self.now, connections);
            }
            self.choice.manner
        }
    }

    #[test]
    fn a_loop_with_little_to_do_is_prompt() {
        assert_eq!(Loop::new().runs(BUSY - 50, 1, Duration::from_secs(5)), Manner::Prompt);
    }

    #[test]
    fn a_busy_loop_is_patient_for_as_long_as_its_turns_are_worth_it() {
        let mut busy = Loop::new();
        assert_eq!(busy.runs(1000, 2, WINDOW), Manner::Patient);
        assert_eq!(busy.runs(300, 6, WINDOW * 20), Manner::Patient);
        assert_eq!(busy.runs(20, 6, WINDOW * 2), Manner::Prompt);
    }

    #[test]
    fn where_nothing_is_gained_it_is_tried_ever_less_often() {
        let mut single = Loop::new();
        let mut patient = Duration::ZERO;
        for _ in 0..60_000 {
            if single.runs(1000, 1, Duration::from_millis(1)) == Manner::Patient {
                patient += Duration::from_millis(1);
            }
        }
        assert!(!patient.is_zero() && patient <= WINDOW * 8, "{patient:?}");
    }

    #[test]
    fn when_more_comes_it_is_tried_soon_again() {
        let mut changing = Loop::new();
        changing.runs(1000, 1, Duration::from_secs(40));
        assert_eq!(changing.runs(1000, 3, SHORTEST_PAUSE + WINDOW * 2), Manner::Patient);
        assert_eq!(changing.runs(1000, 1, WINDOW * 2), Manner::Prompt);
        assert_eq!(changing.runs(1000, 8, SHORTEST_PAUSE + WINDOW * 2), Manner::Patient);
    }

    #[test]
    fn turns_that_were_for_nothing_say_nothing() {
        assert_eq!(Loop::new().runs(1000, 0, Duration::from_secs(1)), Manner::Prompt);
    }

    #[test]
    fn the_threads_policy_follows() {
        std::thread::spawn(|| {
            assert!(is_ordinary());
            adopt(Manner::Patient).unwrap();
            assert!(!is_ordinary());
            adopt(Manner::Prompt).unwrap();
            assert!(is_ordinary());
        })
        .join()
        .unwrap();
    }
}
