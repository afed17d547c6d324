//! The results as tables, for the terminal, the documents and the report alike.

use std::fmt::{self, Display};

use super::figure::Figure;
use super::results::{Results, WorkResults};
use super::side::Side;
use super::statistics::Spread;

/// A system call that fewer connections make is noise of something else.
const RARE: f64 = 0.02;

pub struct Table {
    pub title: String,
    pub note: String,
    pub header: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

enum Column {
    Value(Figure),
    /// To this side; 1 is as good.
    Ratio(Figure, Side),
}

/// One table a work.
pub fn of_works(results: &Results) -> Vec<Table> {
    results.works.iter().map(of_work).collect()
}

/// How near each side comes to the direct one, by the figure that the work is about.
pub fn overview(results: &Results) -> Table {
    ratios(
        results,
        "Ratio to the function listening itself",
        "1 is as good as direct, less is worse: requests/s or MiB/s, for idle connections memory, beside unfinished ones the others' p99",
        WorkResults::compared,
    )
}

/// The same by processor time of everything that takes part.
pub fn processor_overview(results: &Results) -> Table {
    let title = "Ratio of total processor time to the function listening itself";
    let note =
        "clients, gateway, functions and kernel threads together; 1 is as cheap as direct, less is dearer";
    ratios(results, title, note, |_| Figure::CpuTotal)
}

fn ratios(results: &Results, title: &str, note: &str, figure: impl Fn(&WorkResults) -> Figure) -> Table {
    let sides: Vec<Side> = measured(results).filter(|&side| side != Side::Direct).collect();
    let mut rows = Vec::new();
    for work in &results.works {
        let ratio = |side: &Side| work.ratio(*side, Side::Direct, figure(work));
        if sides.iter().all(|side| ratio(side).is_none()) {
            continue;
        }
        let cells = sides.iter().map(|side| ratio(side).map_or("-".to_owned(), |spread| ratio_text(&spread)));
        rows.push([vec![work.title.clone()], cells.collect()].concat());
    }
    Table {
        title: title.to_owned(),
        note: note.to_owned(),
        header: [vec!["work".to_owned()], sides.iter().map(|side| side.as_str().to_owned()).collect()]
            .concat(),
        rows,
    }
}

/// System calls per request: rows are names, columns sides.
pub fn of_syscalls(results: &Results) -> Vec<Table> {
    let mut tables = Vec::new();
    for work in &results.works {
        let counted: Vec<_> = results.syscalls.iter().filter(|counted| counted.work == work.key).collect();
        for (whose, calls) in [("gateway", true), ("functions", false)] {
            let of = |counted: &super::results::Syscalls| match calls {
                true => counted.front.clone(),
                false => counted.functions.clone(),
            };
            let sides: Vec<_> = counted.iter().filter(|counted| !of(counted).is_empty()).collect();
            let mut names: Vec<String> = sides.iter().flat_map(|counted| of(counted).into_keys()).collect();
            names.sort();
            names.dedup();
            let count =
                |side: &super::results::Syscalls, name: &str| of(side).get(name).copied().unwrap_or(0.0);
            names.retain(|name| sides.iter().any(|side| count(side, name) >= RARE));
            if names.is_empty() {
                continue;
            }
            let total = |side: &super::results::Syscalls| format!("{:.2}", of(side).values().sum::<f64>());
            let mut rows =
                vec![[vec!["all".to_owned()], sides.iter().map(|side| total(side)).collect()].concat()];
            for name in names {
                let cells = sides.iter().map(|side| match count(side, &name) {
                    0.0 => "-".to_owned(),
                    value => format!("{value:.2}"),
                });
                rows.push([vec![name.clone()], cells.collect()].concat());
            }
            tables.push(Table {
                title: format!("{}: system calls of the {whose} per request", work.title),
                note: "counted by strace, which slows the side down: batches are other than without it"
                    .to_owned(),
                header: [
                    vec!["call".to_owned()],
                    sides.iter().map(|counted| counted.side.as_str().to_owned()).collect(),
                ]
                .concat(),
                rows,
            });
        }
    }
    tables
}

fn of_work(work: &WorkResults) -> Table {
    let columns = columns(work);
    let mut header = vec!["side".to_owned()];
    header.extend(columns.iter().map(|column| match column {
        Column::Value(figure) => figure.label().to_owned(),
        Column::Ratio(_, base) => format!("x {}", base.as_str()),
    }));
    let mut rows = Vec::new();
    for (side, outcome) in &work.sides {
        let mut row = vec![side.as_str().to_owned()];
        row.extend(columns.iter().map(|column| match column {
            Column::Value(figure) => {
                outcome.spread(*figure).map_or("-".to_owned(), |spread| value_text(*figure, &spread))
            }
            Column::Ratio(figure, base) => {
                work.ratio(*side, *base, *figure).map_or("-".to_owned(), |spread| ratio_text(&spread))
            }
        }));
        rows.push(row);
    }
    let troubles: Vec<String> = work
        .sides
        .iter()
        .filter_map(|(side, outcome)| Some(format!("{}: {}", side.as_str(), outcome.trouble.as_ref()?)))
        .collect();
    Table { title: work.title.clone(), note: troubles.join("; "), header, rows }
}

fn columns(work: &WorkResults) -> Vec<Column> {
    use Column::{Ratio, Value};
    use Figure::*;
    let processor = [Value(CpuFront), Value(CpuFunctions), Value(CpuTotal), Ratio(CpuTotal, Side::Direct)];
    let mut columns = match work.headline() {
        MibPerSecond => {
            vec![Value(MibPerSecond), Ratio(MibPerSecond, Side::Direct), Ratio(MibPerSecond, Side::Peek)]
        }
        MemoryTotal => {
            return vec![
                Value(MemoryFront),
                Value(MemoryFunctions),
                Value(MemoryTotal),
                Ratio(MemoryTotal, Side::Direct),
                Value(MemorySlab),
            ];
        }
        FrontShare => {
            return vec![
                Value(FrontShare),
                Value(P50Us),
                Value(P99Us),
                Ratio(P99Us, Side::Direct),
                Value(P999Us),
            ];
        }
        _ => vec![
            Value(RequestsPerSecond),
            Ratio(RequestsPerSecond, Side::Direct),
            Ratio(RequestsPerSecond, Side::Peek),
            Value(P50Us),
            Value(P99Us),
            Value(P999Us),
        ],
    };
    columns.extend(processor);
    columns
}

fn measured(results: &Results) -> impl Iterator<Item = Side> {
    results.sides.iter().filter(|side| side.absent.is_none()).map(|side| side.side)
}

pub fn value_text(figure: Figure, spread: &Spread) -> String {
    let text = |value: f64| match figure {
        Figure::FrontShare | Figure::Foreign => format!("{:.1} %", 100.0 * value),
        Figure::CpuFront
        | Figure::CpuFunctions
        | Figure::CpuClients
        | Figure::CpuKernel
        | Figure::CpuTotal => {
            format!("{value:.3}")
        }
        Figure::MemoryFront | Figure::MemoryFunctions | Figure::MemoryTotal | Figure::MemorySlab => {
            format!("{value:.1}")
        }
        _ => format!("{value:.0}"),
    };
    match (figure, spread.min == spread.max) {
        (Figure::RequestsPerSecond | Figure::MibPerSecond, false) => {
            format!("{} ({}..{})", text(spread.median), text(spread.min), text(spread.max))
        }
        _ => text(spread.median),
    }
}

pub fn ratio_text(spread: &Spread) -> String {
    match spread.min == spread.max {
        true => format!("{:.2}", spread.median),
        false => format!("{:.2} ({:.2}..{:.2})", spread.median, spread.min, spread.max),
    }
}

/// Aligned, so that it can be read as it is, and Markdown.
impl Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = || std::iter::once(&self.header).chain(&self.rows);
        let width =
            |column: usize| rows().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..self.header.len()).map(|column| width(column).unwrap_or(0)).collect();
        for (index, row) in rows().enumerate() {
            for (column, cell) in row.iter().enumerate() {
                let width = widths.get(column).copied().unwrap_or(0);
                // The first column is words, the others are numbers.
                if column == 0 {
                    write!(formatter, "| {cell:<width$} ")?;
                } else {
                    write!(formatter, "| {cell:>width$} ")?;
                }
            }
            writeln!(formatter, "|")?;
            if index == 0 {
                for (column, width) in widths.iter().enumerate() {
                    let rule = "-".repeat(*width);
                    write!(
                        formatter,
                        "{}",
                        if column == 0 { format!("|-{rule}-") } else { format!("|-{rule}:") }
                    )?;
                }
                writeln!(formatter, "|")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_and_markdown() {
        let table = Table {
            title: String::new(),
            note: String::new(),
            header: vec!["side".into(), "µs".into()],
            rows: vec![vec!["peek".into(), "12345".into()], vec!["x".into(), "1".into()]],
        };
        let expected = "| side |    µs |\n|------|------:|\n| peek | 12345 |\n| x    |     1 |\n";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn a_spread_shows_its_extremes_unless_there_are_none() {
        let spread = Spread { median: 0.955, min: 0.9, max: 1.0 };
        assert_eq!(ratio_text(&spread), "0.95 (0.90..1.00)");
        assert_eq!(ratio_text(&Spread { median: 1.0, min: 1.0, max: 1.0 }), "1.00");
    }
}
