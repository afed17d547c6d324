//! What the figures mean, in sentences that the figures write themselves.

use super::figure::Figure;
use super::results::{Results, WorkResults};
use super::side::Side;
use super::statistics::Spread;
use super::tables::ratio_text;

/// How it was measured; the same for every run.
pub const METHOD: [&str; 5] = [
    "\"direct\" is the function's process listening itself, without anybody in front: the limit. \"sockmap\" and \"peek\" are Pointsman with the kernel or the gateway judging connections. The peers stand in front of the very processes that \"direct\" measures; Pointsman's functions are the same programs, started by its supervisor. All sides run at once in a network namespace of their own and are measured in turn, round by round, so that what disturbs a round disturbs every side of it.",
    "The load generator is a process of its own with a thread a core, and shares the cores with everything it measures: requests/s are what is left of the machine. Ratios are taken within each round; a median stands with the lowest and highest round in parentheses.",
    "Processor time comes from the scheduler's account of every thread of every process that takes part, and of the kernel's own threads, which finish what connections leave behind. It is given in seconds for 10 000 requests, or for a GiB of bodies. \"CPU gateway\" is whatever stands between clients and functions.",
    "Memory is what processes have for themselves (anonymous pages) beyond what they had when nothing had happened yet, for 10 000 connections; what the kernel needs for the sockets is given apart, for the whole machine, clients included.",
    "Loopback has no latency and no loss, and the clients' work is on the same cores: what differs here differs less over a network, and a proxy's second connection is as cheap as it can ever be.",
];

/// A difference below this is not worth a word.
const NOTICEABLE: f64 = 0.02;

/// A sentence for each work that Pointsman can do.
pub fn findings(results: &Results) -> Vec<String> {
    results.works.iter().filter_map(finding).collect()
}

/// A sentence for each work at which somebody does better, or that can't be done.
pub fn losses(results: &Results) -> Vec<String> {
    let mut losses: Vec<String> = results.works.iter().flat_map(losses_at).collect();
    if losses.is_empty() {
        losses.push("At nothing that was measured in this run.".to_owned());
    }
    losses
}

/// How quiet the machine was: others' work disturbs every figure here.
pub fn noise(results: &Results) -> String {
    if results.settings.rounds == 1 {
        return format!("{} One short round of each is an impression, not a result.", foreign(results));
    }
    foreign(results)
}

fn foreign(results: &Results) -> String {
    let outcomes = results.works.iter().flat_map(|work| work.sides.values());
    let shares: Vec<f64> = outcomes.flat_map(|outcome| outcome.values(Figure::Foreign)).collect();
    match Spread::of(&shares) {
        None => "How much else the machine did meanwhile is not known.".to_owned(),
        Some(Spread { median, max, .. }) => {
            let (median, max) = (100.0 * median, 100.0 * max);
            let verdict = if median > 5.0 {
                " That is not a quiet machine: rates and latencies are to be read with care."
            } else {
                ""
            };
            format!(
                "Other processes of the machine used {median:.0} % of its processors at the median of all measurements, {max:.0} % at most.{verdict}"
            )
        }
    }
}

fn finding(work: &WorkResults) -> Option<String> {
    let (figure, name) = compared(work);
    let own = best(work, figure, &[Side::Sockmap, Side::Peek])?;
    let mut sentence =
        format!("{}: {} reaches {} of direct in {name}", work.title, own.0.as_str(), ratio_text(&own.1));
    if let Some(other) = [Side::Sockmap, Side::Peek].into_iter().find(|&side| side != own.0)
        && let Some(ratio) = work.ratio(other, Side::Direct, figure)
    {
        sentence.push_str(&format!(", {} {}", other.as_str(), ratio_text(&ratio)));
    }
    match best(work, figure, &PEERS) {
        Some((peer, ratio)) => {
            sentence.push_str(&format!("; the best peer is {} with {}.", peer.as_str(), ratio_text(&ratio)));
        }
        None => sentence.push('.'),
    }
    Some(sentence)
}

fn losses_at(work: &WorkResults) -> Vec<String> {
    let mut losses = Vec::new();
    for side in [Side::Sockmap, Side::Peek] {
        let outcome = work.sides.get(&side);
        if let Some(trouble) = outcome.and_then(|outcome| outcome.trouble.as_ref()) {
            losses.push(format!("{}: {} has errors: {trouble}.", work.title, side.as_str()));
        }
    }
    let (figure, name) = compared(work);
    let mut figures = vec![(figure, name)];
    if work.sides.values().any(|outcome| outcome.has(Figure::CpuTotal)) {
        figures.push((Figure::CpuTotal, "total processor time"));
    }
    for (figure, name) in figures {
        let Some((own, ours)) = best(work, figure, &[Side::Sockmap, Side::Peek]) else { continue };
        if let Some((peer, theirs)) = best(work, figure, &PEERS)
            && theirs.median > ours.median + NOTICEABLE
        {
            losses.push(format!(
                "{}: in {name} {} is better ({} of direct) than {} ({}).",
                work.title,
                peer.as_str(),
                ratio_text(&theirs),
                own.as_str(),
                ratio_text(&ours)
            ));
        }
        let kernels = work.ratio(Side::Sockmap, Side::Peek, figure);
        if let Some(kernels) = kernels.filter(|ratio| ratio.median < 1.0 - NOTICEABLE) {
            losses.push(format!(
                "{}: in {name} the kernel path is at {} of peek.",
                work.title,
                ratio_text(&kernels)
            ));
        }
    }
    losses
}

const PEERS: [Side; 4] = [Side::Nginx, Side::Haproxy, Side::Envoy, Side::Sniproxy];

/// By what sides are compared at this work.
fn compared(work: &WorkResults) -> (Figure, &'static str) {
    let figure = work.compared();
    let name = match figure {
        Figure::MibPerSecond => "MiB/s",
        Figure::MemoryTotal => "memory",
        Figure::P99Us => "the others' p99",
        _ => "requests/s",
    };
    (figure, name)
}

fn best(work: &WorkResults, figure: Figure, sides: &[Side]) -> Option<(Side, Spread)> {
    let ratio = |&side: &Side| Some((side, work.ratio(side, Side::Direct, figure)?));
    sides.iter().filter_map(ratio).max_by(|(_, one), (_, other)| one.median.total_cmp(&other.median))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::results::Outcome;
    use super::*;

    fn work(sides: &[(Side, f64)]) -> WorkResults {
        let outcome = |value: f64| Outcome {
            rounds: vec![BTreeMap::from([(Figure::RequestsPerSecond, value)])],
            trouble: None,
        };
        let sides = sides.iter().map(|(side, value)| (*side, outcome(*value))).collect();
        WorkResults { key: "x".into(), title: "X".into(), sides }
    }

    #[test]
    fn a_finding_names_both_ways_and_the_best_peer() {
        let work = work(&[
            (Side::Direct, 100.0),
            (Side::Sockmap, 90.0),
            (Side::Peek, 95.0),
            (Side::Nginx, 80.0),
            (Side::Envoy, 30.0),
        ]);
        let expected =
            "X: peek reaches 0.95 of direct in requests/s, sockmap 0.90; the best peer is nginx with 0.80.";
        assert_eq!(finding(&work).unwrap(), expected);
        assert_eq!(losses_at(&work), ["X: in requests/s the kernel path is at 0.95 of peek."]);
    }

    #[test]
    fn a_loss_is_said() {
        let work = work(&[(Side::Direct, 100.0), (Side::Peek, 70.0), (Side::Nginx, 80.0)]);
        assert_eq!(losses_at(&work), ["X: in requests/s nginx is better (0.80 of direct) than peek (0.70)."]);
        assert_eq!(
            losses_at(&self::work(&[(Side::Direct, 100.0), (Side::Peek, 100.0)])),
            Vec::<String>::new()
        );
    }
}
