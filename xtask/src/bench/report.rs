//! The report: one HTML file that needs nothing else.

use anyhow::Result;
use minijinja::{Environment, context};
use serde::Serialize;

use super::results::Results;
use super::tables::{self, Table};
use super::{goals, plots, words};

#[derive(Serialize)]
struct Section {
    title: String,
    note: String,
    chart: Option<String>,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

pub fn html(results: &Results) -> Result<String> {
    let mut works = Vec::new();
    for (work, table) in results.works.iter().zip(tables::of_works(results)) {
        works.push(section(table, plots::of_work(work)?));
    }
    let overviews = [goals::table(results), tables::overview(results), tables::processor_overview(results)];
    let mut environment = Environment::new();
    // The name's end is what turns escaping on.
    environment.add_template("report.html", include_str!("../../bench/report.html"))?;
    Ok(environment.get_template("report.html")?.render(context! {
        results,
        method => words::METHOD,
        noise => words::noise(results),
        findings => words::findings(results),
        losses => words::losses(results),
        overviews => overviews.map(|table| section(table, None)),
        works,
        syscalls => tables::of_syscalls(results).into_iter().map(|table| section(table, None)).collect::<Vec<_>>(),
    })?)
}

fn section(table: Table, chart: Option<String>) -> Section {
    Section { title: table.title, note: table.note, chart, header: table.header, rows: table.rows }
}
