//! `docs/benchmarks.md`, written from a run.

use std::fmt::Write as _;

use super::goals;
use super::results::Results;
use super::tables::{self, Table};
use super::words;

pub fn markdown(results: &Results) -> String {
    let mut text = String::from("# Benchmarks\n\n");
    let host = &results.host;
    let settings = &results.settings;
    let mut paragraph = |paragraph: String| {
        text.push_str(&paragraph);
        text.push_str("\n\n");
    };
    paragraph(format!(
        "This page is written by `cargo xtask bench --write-docs`. It shows one run: `{}`, begun {}, on {} ({} cores, {} \
         MiB), Linux {}, load average before {}, commit {}; {} rounds of {} ms for each side and work, {} for idle \
         connections.",
        results.command,
        results.began,
        host.processor,
        host.cores,
        host.memory_mib,
        host.kernel,
        host.load_average,
        host.commit,
        settings.rounds,
        settings.measured_ms,
        settings.idle_rounds,
    ));
    words::METHOD.into_iter().for_each(|words| paragraph(words.to_owned()));
    paragraph(words::noise(results));
    list(
        &mut text,
        "Sides",
        results.sides.iter().map(|side| {
            let state =
                side.absent.as_ref().map_or(side.version.clone(), |why| format!("not measured: {why}"));
            format!("{}: {state}", side.side.as_str())
        }),
    );
    list(&mut text, "What it means", words::findings(results));
    list(&mut text, "Where Pointsman loses", words::losses(results));
    for table in [goals::table(results), tables::overview(results), tables::processor_overview(results)] {
        section(&mut text, "##", &table);
    }
    text.push_str("## Each work\n\n");
    tables::of_works(results).iter().for_each(|table| section(&mut text, "###", table));
    text.push_str("## System calls\n\n");
    tables::of_syscalls(results).iter().for_each(|table| section(&mut text, "###", table));
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

fn list(text: &mut String, title: &str, items: impl IntoIterator<Item = String>) {
    // Writing to a String can't fail.
    let _ = writeln!(text, "## {title}\n");
    for item in items {
        let _ = writeln!(text, "- {}", one_line(&item));
    }
    text.push('\n');
}

fn section(text: &mut String, level: &str, table: &Table) {
    let _ = writeln!(text, "{level} {}\n\n{table}", table.title);
    if !table.note.is_empty() {
        let _ = writeln!(text, "{}\n", one_line(&table.note));
    }
}

fn one_line(words: &str) -> String {
    words.split_whitespace().collect::<Vec<_>>().join(" ")
}
