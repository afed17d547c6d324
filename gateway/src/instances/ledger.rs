//! What functions did in all, with instances that are gone: totals that only grow.
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use common::FunctionName;
use handoff::{Counts, StatusReader};

use super::worker::Worker;

/// Pages of ended pool connections that are read on. A killed worker's looks as if it had work for ever, so the bound
/// is met where functions are killed again and again; the oldest is closed then.
const UNFINISHED: usize = 1024;

/// The past of a function.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Connections handed over on pool connections that have ended.
    pub sent: u64,
    /// Of these, what was never taken.
    pub lost: u64,
    pub restarts: u64,
    pub counts: Counts,
}

#[derive(Default)]
pub struct Ledger {
    totals: BTreeMap<FunctionName, Totals>,
    /// Workers that take nothing more may have requests to finish, and count them.
    unfinished: VecDeque<(FunctionName, Arc<StatusReader>)>,
}

impl Ledger {
    /// Takes the books of a pool connection that has ended; returns how many connections were lost with it.
    pub fn close(&mut self, function: FunctionName, worker: &Worker) -> u64 {
        let lost = worker.in_flight();
        let totals = self.totals.entry(function).or_default();
        totals.sent += worker.sent();
        totals.lost += lost;
        self.unfinished.push_back((function, worker.page()));
        self.settle();
        lost
    }

    pub fn restarted(&mut self, function: FunctionName) {
        self.totals.entry(function).or_default().restarts += 1;
    }

    /// Keeps the last values of workers that have finished, instead of their pages.
    pub fn settle(&mut self) {
        let excess = self.unfinished.len().saturating_sub(UNFINISHED);
        let totals = &mut self.totals;
        let mut index = 0;
        self.unfinished.retain(|(function, page)| {
            index += 1;
            let unfinished = page.open_connections() > 0 && index > excess;
            if !unfinished {
                totals.entry(*function).or_default().counts.add(&page.counts());
            }
            unfinished
        });
    }

    pub fn totals(&self, function: &FunctionName) -> Totals {
        self.totals.get(function).cloned().unwrap_or_default()
    }

    pub fn unfinished(&self, function: &FunctionName) -> impl Iterator<Item = Arc<StatusReader>> {
        self.unfinished.iter().filter(move |(name, _)| name == function).map(|(_, page)| Arc::clone(page))
    }

    /// Functions that have a past.
    pub fn functions(&self) -> impl Iterator<Item = FunctionName> {
        self.totals.keys().copied()
    }
}
