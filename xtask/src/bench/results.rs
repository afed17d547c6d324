//! What a run found, as it is written to JSON and read by every presentation.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::figure::Figure;
use super::settings::Settings;
use super::side::Side;
use super::statistics::Spread;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    pub host: Host,
    pub command: String,
    pub began: String,
    pub settings: Settings,
    pub sides: Vec<SideInfo>,
    pub works: Vec<WorkResults>,
    pub syscalls: Vec<Syscalls>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Host {
    pub kernel: String,
    pub processor: String,
    pub cores: usize,
    pub memory_mib: u64,
    /// Before the first round.
    pub load_average: String,
    pub commit: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SideInfo {
    pub side: Side,
    pub version: String,
    /// Why it was not measured.
    pub absent: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkResults {
    pub key: String,
    pub title: String,
    pub sides: BTreeMap<Side, Outcome>,
}

/// A side at a work.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// One a round.
    pub rounds: Vec<BTreeMap<Figure, f64>>,
    /// Why there are no figures, or what went wrong beside them.
    pub trouble: Option<String>,
}

/// System calls per request by name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Syscalls {
    pub work: String,
    pub side: Side,
    pub requests: u64,
    pub front: BTreeMap<String, f64>,
    pub functions: BTreeMap<String, f64>,
}

impl Outcome {
    pub fn values(&self, figure: Figure) -> Vec<f64> {
        self.rounds.iter().filter_map(|round| round.get(&figure).copied()).collect()
    }

    pub fn spread(&self, figure: Figure) -> Option<Spread> {
        Spread::of(&self.values(figure))
    }

    pub fn has(&self, figure: Figure) -> bool {
        self.rounds.iter().any(|round| round.contains_key(&figure))
    }
}

impl WorkResults {
    /// How near a side comes to another: 1 is as good, less is worse, whichever direction the figure has.
    pub fn ratio(&self, side: Side, base: Side, figure: Figure) -> Option<Spread> {
        let (side, base) = (self.sides.get(&side)?, self.sides.get(&base)?);
        figure.ratio(&side.values(figure), &base.values(figure))
    }

    /// What the work is mainly about.
    pub fn headline(&self) -> Figure {
        let order =
            [Figure::MibPerSecond, Figure::MemoryTotal, Figure::FrontShare, Figure::RequestsPerSecond];
        let has = |figure: &Figure| self.sides.values().any(|outcome| outcome.has(*figure));
        order.into_iter().find(has).unwrap_or(Figure::RequestsPerSecond)
    }

    /// By what sides are compared at it.
    pub fn compared(&self) -> Figure {
        match self.headline() {
            // The direct side has no gateway whose core could be compared.
            Figure::FrontShare => Figure::P99Us,
            figure => figure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(figure: Figure, values: &[f64]) -> Outcome {
        let rounds = values.iter().map(|value| BTreeMap::from([(figure, *value)])).collect();
        Outcome { rounds, trouble: None }
    }

    fn work(figure: Figure, direct: &[f64], peek: &[f64]) -> WorkResults {
        let sides =
            BTreeMap::from([(Side::Direct, outcome(figure, direct)), (Side::Peek, outcome(figure, peek))]);
        WorkResults { key: "x".into(), title: "X".into(), sides }
    }

    #[test]
    fn a_ratio_below_one_is_worse_whatever_the_figure() {
        let rate = work(Figure::RequestsPerSecond, &[100.0], &[80.0]);
        assert_eq!(rate.ratio(Side::Peek, Side::Direct, Figure::RequestsPerSecond).unwrap().median, 0.8);
        let cost = work(Figure::CpuTotal, &[1.0], &[2.0]);
        assert_eq!(cost.ratio(Side::Peek, Side::Direct, Figure::CpuTotal).unwrap().median, 0.5);
        assert_eq!(cost.ratio(Side::Nginx, Side::Direct, Figure::CpuTotal), None);
    }

    #[test]
    fn results_survive_json() {
        let written = work(Figure::MibPerSecond, &[1.5, 2.5], &[1.0, 2.0]);
        let text = serde_json::to_string(&written).unwrap();
        let read: WorkResults = serde_json::from_str(&text).unwrap();
        assert_eq!(read.headline(), Figure::MibPerSecond);
        assert_eq!(read.sides[&Side::Direct].values(Figure::MibPerSecond), [1.5, 2.5]);
    }
}
