//! What Pointsman is meant to reach, and whether a run shows it.

use super::figure::Figure;
use super::results::{Results, WorkResults};
use super::side::Side;
use super::statistics::Spread;
use super::tables::{Table, ratio_text, value_text};

struct Goal {
    words: &'static str,
    work: &'static str,
    measure: Measure,
    wanted: Wanted,
    sides: &'static [Side],
}

#[derive(Clone, Copy)]
enum Measure {
    Value(Figure),
    /// How near it comes to this side: 1 is as good, more is better.
    Ratio(Figure, Side),
    /// How near it comes to what the same side does at this work.
    Own(Figure, &'static str),
}

#[derive(Clone, Copy)]
enum Wanted {
    AtLeast(f64),
    AtMost(f64),
}

const BOTH: &[Side] = &[Side::Sockmap, Side::Peek];

const fn goal(
    words: &'static str,
    work: &'static str,
    measure: Measure,
    wanted: Wanted,
    sides: &'static [Side],
) -> Goal {
    Goal { words, work, measure, wanted, sides }
}

const GOALS: [Goal; 24] = {
    use Figure::*;
    use Measure::{Own, Ratio, Value};
    use Wanted::{AtLeast, AtMost};
    const DIRECT: Side = Side::Direct;
    const RATE: Measure = Ratio(RequestsPerSecond, DIRECT);
    const BULK: Measure = Ratio(MibPerSecond, DIRECT);
    const TOTAL: Measure = Ratio(CpuTotal, DIRECT);
    [
        goal("new HTTP connections/s, of direct", "http-new", RATE, AtLeast(0.95), &[Side::Peek]),
        goal("new HTTP connections/s, of direct", "http-new", RATE, AtLeast(0.90), &[Side::Sockmap]),
        goal("new HTTP connections, total CPU ratio to direct", "http-new", TOTAL, AtLeast(0.90), BOTH),
        goal("new TLS connections, total CPU ratio to direct", "tls-new", TOTAL, AtLeast(0.95), BOTH),
        goal("keep-alive requests/s, HTTP, of direct", "http-keepalive", RATE, AtLeast(0.98), BOTH),
        goal("keep-alive requests/s, TLS, of direct", "tls-keepalive", RATE, AtLeast(0.98), BOTH),
        goal(
            "alternating requests/s, HTTP, of nginx's",
            "http-alternating",
            Ratio(RequestsPerSecond, Side::Nginx),
            AtLeast(1.0),
            BOTH,
        ),
        goal(
            "alternating requests/s, TLS, of nginx's",
            "tls-alternating",
            Ratio(RequestsPerSecond, Side::Nginx),
            AtLeast(1.0),
            BOTH,
        ),
        goal("64 MiB down, HTTP, of direct", "http-down", BULK, AtLeast(0.95), BOTH),
        goal("64 MiB up, HTTP, of direct", "http-up", BULK, AtLeast(0.95), BOTH),
        goal("64 MiB down, TLS, of direct", "tls-down", BULK, AtLeast(0.95), BOTH),
        goal("64 MiB up, TLS, of direct", "tls-up", BULK, AtLeast(0.95), BOTH),
        goal(
            "gateway CPU s for 10 000 new HTTP connections",
            "http-new",
            Value(CpuFront),
            AtMost(0.05),
            BOTH,
        ),
        goal("gateway CPU s for 10 000 new TLS connections", "tls-new", Value(CpuFront), AtMost(0.05), BOTH),
        goal(
            "gateway CPU, new HTTP connections, ratio to peek",
            "http-new",
            Ratio(CpuFront, Side::Peek),
            AtLeast(1.0),
            &[Side::Sockmap],
        ),
        goal(
            "gateway CPU, new TLS connections, ratio to peek",
            "tls-new",
            Ratio(CpuFront, Side::Peek),
            AtLeast(1.0),
            &[Side::Sockmap],
        ),
        goal(
            "gateway CPU, hello in 4 segments, ratio to peek",
            "hello-split-4",
            Ratio(CpuFront, Side::Peek),
            AtLeast(2.0),
            &[Side::Sockmap],
        ),
        goal("gateway MiB, 10 000 idle HTTP connections", "http-idle", Value(MemoryFront), AtMost(1.0), BOTH),
        goal("gateway MiB, 10 000 idle TLS connections", "tls-idle", Value(MemoryFront), AtMost(1.0), BOTH),
        goal(
            "function's MiB, 10 000 idle TLS connections",
            "tls-idle",
            Value(MemoryFunctions),
            AtMost(40.0),
            BOTH,
        ),
        goal(
            "gateway's core beside 5000 half requests",
            "half-requests",
            Value(FrontShare),
            AtMost(0.01),
            BOTH,
        ),
        goal("gateway's core beside 5000 half hellos", "half-hellos", Value(FrontShare), AtMost(0.01), BOTH),
        goal(
            "others' p99 beside 5000 half requests, ratio to without them",
            "half-requests",
            Own(P99Us, "http-latency"),
            AtLeast(0.90),
            BOTH,
        ),
        goal(
            "others' p99 beside 5000 half hellos, ratio to without them",
            "half-hellos",
            Own(P99Us, "tls-latency"),
            AtLeast(0.90),
            BOTH,
        ),
    ]
};

impl Goal {
    fn found(&self, works: &[WorkResults], side: Side) -> Option<Spread> {
        let find = |key: &str| works.iter().find(|work| work.key == key);
        let work = find(self.work)?;
        match self.measure {
            Measure::Value(figure) => work.sides.get(&side)?.spread(figure),
            Measure::Ratio(figure, base) => work.ratio(side, base, figure),
            Measure::Own(figure, other) => {
                let (here, there) = (work.sides.get(&side)?, find(other)?.sides.get(&side)?);
                figure.ratio(&here.values(figure), &there.values(figure))
            }
        }
    }

    fn text(&self, spread: &Spread) -> String {
        match self.measure {
            Measure::Value(figure) => value_text(figure, spread),
            Measure::Ratio(..) | Measure::Own(..) => ratio_text(spread),
        }
    }
}

impl Wanted {
    fn is_reached_by(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(bound) => format!(">= {bound:.2}"),
            Self::AtMost(bound) => format!("<= {bound:.2}"),
        }
    }
}

/// One row a goal that this run says something about.
pub fn table(results: &Results) -> Table {
    let mut rows = Vec::new();
    for goal in &GOALS {
        for &side in goal.sides {
            let Some(spread) = goal.found(&results.works, side) else { continue };
            let reached = if goal.wanted.is_reached_by(spread.median) { "yes" } else { "no" };
            rows.push(vec![
                goal.words.to_owned(),
                side.as_str().to_owned(),
                goal.wanted.text(),
                goal.text(&spread),
                reached.to_owned(),
            ]);
        }
    }
    Table {
        title: "Goals".to_owned(),
        note: "judged by the median".to_owned(),
        header: ["goal", "side", "wanted", "found", "reached"].map(str::to_owned).to_vec(),
        rows,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::{results::Outcome, work::Work};
    use super::*;

    #[test]
    fn goals_are_about_works_that_exist() {
        for goal in &GOALS {
            assert!(Work::find(goal.work).is_some(), "{}", goal.work);
            if let Measure::Own(_, other) = goal.measure {
                assert!(Work::find(other).is_some(), "{other}");
            }
            assert!(!goal.sides.is_empty());
        }
    }

    #[test]
    fn a_side_can_be_compared_with_itself() {
        let work = |key: &str, p99: f64| {
            let rounds = vec![BTreeMap::from([(Figure::P99Us, p99)])];
            let sides = BTreeMap::from([(Side::Peek, Outcome { rounds, trouble: None })]);
            WorkResults { key: key.into(), title: key.into(), sides }
        };
        let works = [work("tls-latency", 300.0), work("half-hellos", 400.0)];
        let measure = Measure::Own(Figure::P99Us, "tls-latency");
        let unchanged = goal("p99", "half-hellos", measure, Wanted::AtLeast(0.9), BOTH);
        assert_eq!(unchanged.found(&works, Side::Peek).unwrap().median, 0.75);
        assert_eq!(unchanged.found(&works, Side::Sockmap), None);
        assert_eq!(unchanged.found(&works[1..], Side::Peek), None);
    }

    #[test]
    fn a_bound_is_reached_by_itself() {
        assert!(Wanted::AtLeast(0.9).is_reached_by(0.9) && !Wanted::AtLeast(0.9).is_reached_by(0.89));
        assert!(Wanted::AtMost(1.0).is_reached_by(1.0) && !Wanted::AtMost(1.0).is_reached_by(1.01));
    }
}
