//! One function's instances: those that serve, those that are to follow them, those that leave.
use std::{mem, time::Duration};

use common::FunctionName;
use tokio::{task, time::Instant};

use super::{
    crew::{Crew, Instance, Wanted},
    keeper::{Event, Id, Order},
};

/// Functions drain for up to 10 s after SIGTERM; whoever takes longer is killed.
pub const LEAVE_PATIENCE: Duration = Duration::from_secs(11);

/// A function that needs longer to start than this does not start.
const UP_PATIENCE: Duration = Duration::from_secs(30);

/// Those that are up serve beside the old ones for this long: the gateway has been connecting to them since their
/// sockets were there, and a busy machine may keep it from its turn for a moment.
const OVERLAP: Duration = Duration::from_millis(500);

pub struct Deployment {
    name: FunctionName,
    wanted: Wanted,
    serving: Vec<Instance>,
    rising: Option<Rising>,
    leaving: Vec<Leaving>,
}

/// Instances of another program, or of the same one with other files.
struct Rising {
    wanted: Wanted,
    instances: Vec<Instance>,
    not_up: Vec<Id>,
    /// When those that are up take over, or the others are given up.
    due: Instant,
}

struct Leaving {
    instance: Instance,
    /// `None` when it was killed.
    kill_at: Option<Instant>,
}

impl Deployment {
    pub fn new(wanted: Wanted, instances: Vec<Instance>) -> Self {
        let name = wanted.program.name;
        Self { name, wanted, serving: instances, rising: None, leaving: Vec::new() }
    }

    /// Goes from what runs to what shall run. What can't be started leaves everything as it is.
    pub fn change_to(&mut self, wanted: Wanted, crew: &mut Crew) {
        if self.rising.as_ref().is_some_and(|rising| rising.wanted == wanted) {
            return;
        }
        self.give_rising_up();
        let same = wanted.program == self.wanted.program;
        let missing = match same {
            true => usize::from(wanted.instances).saturating_sub(self.serving.len()),
            false => wanted.instances.into(),
        };
        let started = match crew.start_more(&wanted, missing) {
            Ok(keepers) => crew.employ(keepers),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(function = %self.name, error, "is not changed: what runs goes on");
                return;
            }
        };
        if same || self.serving.is_empty() {
            self.serving.extend(started);
            let surplus = self.serving.split_off(self.serving.len().min(wanted.instances.into()));
            self.send_away(surplus);
            self.wanted = wanted;
        } else {
            tracing::info!(function = %self.name, instances = started.len(), "starts anew beside what runs");
            let not_up = started.iter().map(|instance| instance.id).collect();
            let due = Instant::now() + UP_PATIENCE;
            self.rising = Some(Rising { wanted, instances: started, not_up, due });
        }
    }

    /// Lets all instances drain.
    pub fn leave(&mut self) {
        self.give_rising_up();
        let serving = mem::take(&mut self.serving);
        self.send_away(serving);
    }

    pub fn kill(&mut self) {
        for leaving in &mut self.leaving {
            leaving.instance.orders.send_replace(Order::Kill);
            leaving.kill_at = None;
        }
    }

    pub fn hear(&mut self, event: Event) {
        let Some(rising) = &mut self.rising else { return };
        match event {
            Event::Up(id) => {
                let waited = rising.not_up.len();
                rising.not_up.retain(|&waiting| waiting != id);
                if waited > 0 && rising.not_up.is_empty() {
                    rising.due = Instant::now() + OVERLAP;
                }
            }
            Event::Failed(id) if rising.not_up.contains(&id) => {
                tracing::error!(function = %self.name, "is not changed: an instance ended before it was up; what runs goes on");
                self.give_rising_up();
            }
            Event::Failed(_) => {}
        }
    }

    pub fn forget(&mut self, task: task::Id) {
        let others = |instance: &Instance| instance.task != task;
        self.serving.retain(others);
        self.leaving.retain(|leaving| others(&leaving.instance));
        if let Some(rising) = &mut self.rising {
            rising.instances.retain(others);
        }
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        let kills = self.leaving.iter().filter_map(|leaving| leaving.kill_at);
        kills.chain(self.rising.as_ref().map(|rising| rising.due)).min()
    }

    pub fn expire(&mut self, now: Instant) {
        for leaving in &mut self.leaving {
            if leaving.kill_at.take_if(|at| *at <= now).is_some() {
                leaving.instance.orders.send_replace(Order::Kill);
            }
        }
        let Some(rising) = self.rising.take_if(|rising| rising.due <= now) else { return };
        if rising.not_up.is_empty() {
            tracing::info!(function = %self.name, "those that were started anew have taken over");
            self.wanted = rising.wanted;
            let old = mem::replace(&mut self.serving, rising.instances);
            self.send_away(old);
        } else {
            tracing::error!(function = %self.name, patience = ?UP_PATIENCE, "is not changed: an instance is not up in time; what runs goes on");
            self.send_away(rising.instances);
        }
    }

    pub fn is_over(&self) -> bool {
        self.serving.is_empty() && self.rising.is_none() && self.leaving.is_empty()
    }

    fn give_rising_up(&mut self) {
        if let Some(rising) = self.rising.take() {
            self.send_away(rising.instances);
        }
    }

    fn send_away(&mut self, instances: Vec<Instance>) {
        let kill_at = Instant::now() + LEAVE_PATIENCE;
        for instance in instances {
            instance.orders.send_replace(Order::Stop);
            self.leaving.push(Leaving { instance, kill_at: Some(kill_at) });
        }
    }
}
