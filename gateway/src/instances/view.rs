//! A look at the instances for whoever inspects the gateway: cheap to take, read elsewhere.
use std::{collections::BTreeSet, sync::Arc};

use common::FunctionName;
use handoff::StatusReader;

use super::{Instances, instance::Instance, ledger::Totals, worker::Worker};

/// A function's instances and its past.
pub struct FunctionView {
    pub name: FunctionName,
    pub totals: Totals,
    /// Pages of ended pool connections that still count.
    pub unfinished: Vec<Arc<StatusReader>>,
    pub instances: Vec<InstanceView>,
}

pub struct InstanceView {
    pub socket: String,
    /// Its socket is in the functions' directory.
    pub listed: bool,
    /// As the instance sees it; `None` before its first HELLO.
    pub pid: Option<u32>,
    pub restarts: u64,
    /// How many workers it says that it has.
    pub wanted: usize,
    pub workers: Vec<WorkerView>,
}

pub struct WorkerView {
    pub sent: u64,
    pub taking: bool,
    pub stalled: bool,
    pub page: Arc<StatusReader>,
}

impl Instances {
    /// The functions that have instances or had some, and these; all others have nothing to tell.
    pub fn view(&mut self) -> Vec<FunctionView> {
        self.begin_round();
        for instance in self.slots.iter_mut().flatten() {
            instance.refresh(self.round);
        }
        self.ledger.settle();
        let present = self.slots.iter().flatten().map(|instance| instance.function);
        let names: BTreeSet<_> = present.chain(self.ledger.functions()).collect();
        let of = |name: FunctionName| {
            let instances = self.slots.iter().flatten().filter(|instance| instance.function == name);
            FunctionView {
                name,
                totals: self.ledger.totals(&name),
                unfinished: self.ledger.unfinished(&name).collect(),
                instances: instances.map(Instance::view).collect(),
            }
        };
        names.into_iter().map(of).collect()
    }
}

impl Instance {
    fn view(&self) -> InstanceView {
        InstanceView {
            socket: self.socket.clone(),
            listed: self.is_listed(),
            pid: self.pid(),
            restarts: self.restarts(),
            wanted: self.wanted(),
            workers: self.workers.iter().map(Worker::view).collect(),
        }
    }
}

impl Worker {
    fn view(&self) -> WorkerView {
        WorkerView {
            sent: self.sent(),
            taking: self.is_taking(),
            stalled: self.load().is_some_and(|load| load.stalled),
            page: self.page(),
        }
    }
}
