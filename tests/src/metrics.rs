//! Metrics as Prometheus would read them, by a reader that shares nothing with what wrote them.
use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};

use crate::stack::AddressBook;

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// The type of each family.
    pub families: BTreeMap<String, String>,
    samples: BTreeMap<Sample, f64>,
}

/// A name, which may have a suffix that its family has not, and labels in their order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
}

impl Metrics {
    pub fn scrape(stack: &AddressBook) -> Result<Self> {
        let answer = stack.admin("/metrics")?;
        ensure!(answer.status() == 200, "{answer:?}");
        let kind = answer.head.field("content-type").context("a content type")?;
        ensure!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
        Self::parse(&answer.text())
    }

    fn parse(text: &str) -> Result<Self> {
        let mut metrics = Self::default();
        for line in text.lines() {
            if let Some(family) = line.strip_prefix("# TYPE ") {
                let (name, kind) = family.split_once(' ').context("a type")?;
                let known = metrics.families.insert(name.to_owned(), kind.to_owned());
                ensure!(known.is_none(), "{name} comes twice");
            } else if !line.starts_with('#') {
                let (sample, value) = parse_sample(line).with_context(|| format!("sample {line:?}"))?;
                ensure!(metrics.family_of(&sample.name).is_some(), "{line:?} belongs to no family");
                let known = metrics.samples.insert(sample, value);
                ensure!(known.is_none(), "{line:?} comes twice");
            }
        }
        Ok(metrics)
    }

    pub fn family_of(&self, name: &str) -> Option<&str> {
        let suffixes = ["", "_bucket", "_sum", "_count"];
        let bases = suffixes.iter().filter_map(|suffix| name.strip_suffix(suffix));
        bases.filter_map(|base| self.families.get_key_value(base)).map(|(family, _)| family.as_str()).next()
    }

    /// The sum over all samples of a name that have these labels, whatever others they have.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let matches = |sample: &Sample| {
            sample.name == name
                && labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|has| has == value))
        };
        self.samples.iter().filter(|(sample, _)| matches(sample)).map(|(_, value)| value).sum()
    }

    /// How much a sum grew since an earlier scrape.
    pub fn grown(&self, earlier: &Self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.sum(name, labels) - earlier.sum(name, labels)
    }

    pub fn label_values(&self, name: &str, label: &str) -> BTreeSet<String> {
        let samples = self.samples.keys().filter(|sample| sample.name == name);
        samples.filter_map(|sample| sample.labels.get(label).cloned()).collect()
    }

    /// Samples that count, and must therefore never shrink.
    pub fn counts(&self) -> impl Iterator<Item = (&Sample, f64)> {
        let counts = |sample: &Sample| {
            let kind = self.family_of(&sample.name).and_then(|family| self.families.get(family));
            kind.is_some_and(|kind| kind == "counter" || kind == "histogram")
        };
        self.samples.iter().filter(move |(sample, _)| counts(sample)).map(|(sample, value)| (sample, *value))
    }

    pub fn value(&self, sample: &Sample) -> Option<f64> {
        self.samples.get(sample).copied()
    }

    /// Every histogram's buckets ascend, and the last one counts all.
    pub fn check_histograms(&self) -> Result<()> {
        let histograms = self.families.iter().filter(|(_, kind)| *kind == "histogram");
        for (name, _) in histograms {
            let mut by_labels: BTreeMap<BTreeMap<String, String>, Vec<(f64, f64)>> = BTreeMap::new();
            for (sample, value) in &self.samples {
                if sample.name == format!("{name}_bucket") {
                    let mut labels = sample.labels.clone();
                    let bound: f64 = labels.remove("le").context("a bucket's bound")?.parse()?;
                    by_labels.entry(labels).or_default().push((bound, *value));
                }
            }
            ensure!(!by_labels.is_empty(), "{name} has no buckets");
            for (labels, mut buckets) in by_labels {
                buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
                ensure!(buckets.is_sorted_by(|a, b| a.1 <= b.1), "{name} {labels:?}: {buckets:?}");
                let (bound, all) = buckets.last().context("buckets")?;
                let sample = Sample { name: format!("{name}_count"), labels };
                ensure!(bound.is_infinite() && Some(*all) == self.value(&sample), "{sample:?}: {buckets:?}");
            }
        }
        Ok(())
    }
}

fn parse_sample(line: &str) -> Result<(Sample, f64)> {
    let (series, value) = line.rsplit_once(' ').context("a value")?;
    let (name, labels) = match series.split_once('{') {
        Some((name, rest)) => (name, rest.strip_suffix('}').context("the labels' end")?),
        None => (series, ""),
    };
    ensure!(!name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "name {name:?}");
    let mut pairs = BTreeMap::new();
    let mut rest = labels;
    while !rest.is_empty() {
        let (key, quoted) = rest.split_once("=\"").context("a label")?;
        let (value, after) = quoted.split_once('"').context("a label's end")?;
        // No label here holds what would have to be escaped.
        if value.contains('\\') {
            bail!("an escape in {value:?}");
        }
        pairs.insert(key.to_owned(), value.to_owned());
        rest = after.strip_prefix(',').unwrap_or(after);
    }
    Ok((Sample { name: name.to_owned(), labels: pairs }, value.parse()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_their_labels() {
        let text = "# HELP a_total x\n# TYPE a_total counter\na_total{b=\"1\",c=\"x\"} 2\na_total{b=\"2\",c=\"x\"} 3\n";
        let metrics = Metrics::parse(text).unwrap();
        assert_eq!(metrics.sum("a_total", &[("c", "x")]), 5.0);
        assert_eq!(metrics.sum("a_total", &[("b", "2")]), 3.0);
        assert_eq!(metrics.counts().count(), 2);
        assert!(Metrics::parse("a 1\n").is_err());
    }
}
