//! Whether processes rest when nothing happens: a loop that turns without an event turns until something ends it, and is
//! seen by nobody who asks for answers only.
use std::{collections::HashMap, fs, thread, time::Duration};

use crate::eventually;

/// Long enough that a thread which is woken now and then doesn't fill half of it.
const WINDOW: Duration = Duration::from_millis(20);

/// Waits until none of these processes' threads wants a processor all the time.
pub fn wait_for_rest(processes: &[i32]) {
    eventually("the processes to rest", || rest(processes).then_some(()));
}

/// Looks at them for a while.
fn rest(processes: &[i32]) -> bool {
    let before = wanted(processes);
    thread::sleep(WINDOW);
    let after = wanted(processes);
    let is_busy = |thread: &i32, wanted: Duration| {
        before.get(thread).is_some_and(|before| wanted.saturating_sub(*before) > WINDOW / 2)
    };
    !after.iter().any(|(thread, &wanted)| is_busy(thread, wanted))
}

/// How long each thread has run or waited for a processor: the first two fields of schedstat, in nanoseconds
/// (Documentation/scheduler/sched-stats.rst).
fn wanted(processes: &[i32]) -> HashMap<i32, Duration> {
    let tasks =
        processes.iter().flat_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten());
    tasks
        .flatten()
        .filter_map(|task| {
            let statistics = fs::read_to_string(task.path().join("schedstat")).ok()?;
            let nanoseconds =
                statistics.split_whitespace().take(2).map_while(|field| field.parse::<u64>().ok());
            let thread = task.file_name().to_str()?.parse().ok()?;
            Some((thread, Duration::from_nanos(nanoseconds.sum())))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn who_turns_in_a_loop_does_not_rest() {
        let mut busy = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let mut idle = Command::new("sleep").arg("60").spawn().unwrap();
        let [busy_pid, idle_pid] = [&busy, &idle].map(|child| child.id().cast_signed());
        wait_for_rest(&[idle_pid]);
        let rested = (0..10).any(|_| rest(&[idle_pid, busy_pid]));
        for child in [&mut busy, &mut idle] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(!rested);
    }
}
