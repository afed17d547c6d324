//! One picture of `pointsman top`: what a report says, and what changed since an earlier one.
use std::time::Duration;

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row, Table},
};

use super::figures::{count, quantile, span};
use crate::admin::report::{Distribution, Function, Instance, MoveCount, Report, Requests, State};

/// Lines above the table.
const HEAD_LINES: u16 = 6;

/// Table rows without a function in them.
const TABLE_HEAD_LINES: u16 = 1;

const COLUMNS: [(&str, u16); 9] = [
    ("FUNCTION", 22),
    ("STATE", 8),
    ("REQ/S", 6),
    ("5XX/S", 6),
    ("P50", 7),
    ("P99", 7),
    ("HANDOFF", 7),
    ("FLIGHT", 6),
    ("OPEN", 5),
];

/// What is shown.
pub struct View<'a> {
    pub now: &'a Report,
    /// An earlier report and the time since; without one there are no rates.
    pub before: Option<(&'a Report, Duration)>,
    /// Why `now` is not of this moment.
    pub trouble: Option<&'a str>,
    /// Table rows that are passed over.
    pub scroll: usize,
}

impl View<'_> {
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let [head, table, foot] =
            Layout::vertical([Constraint::Length(HEAD_LINES), Constraint::Min(0), Constraint::Length(1)])
                .areas(frame.area());
        frame.render_widget(Paragraph::new(self.head()), head);
        self.draw_table(frame, table);
        frame.render_widget(Paragraph::new(self.foot()), foot);
    }

    /// Lines that show everything.
    pub fn lines(&self) -> u16 {
        let rows = u16::try_from(self.rows().len()).unwrap_or(u16::MAX);
        rows.saturating_add(HEAD_LINES + TABLE_HEAD_LINES + 1)
    }

    pub fn rows_count(&self) -> usize {
        self.rows().len()
    }

    fn head(&self) -> Vec<Line<'_>> {
        let Report { version, uptime_seconds, verdict, connections, batches, .. } = self.now;
        let rate = |get: fn(&Report) -> u64| self.rate(get(self.now), get);
        let path = |path: &str| {
            let of = |report: &Report| {
                report
                    .verdicts
                    .iter()
                    .filter(|verdict| verdict.path == path)
                    .map(|verdict| verdict.count)
                    .sum()
            };
            self.rate(of(self.now), of)
        };
        let batch = self.before.map_or_else(|| batches.clone(), |(before, _)| batches.since(&before.batches));
        let mean =
            if batch.count == 0 { "-".to_owned() } else { format!("{:.1}", batch.sum / batch.count as f64) };
        vec![
            Line::from(vec![
                Span::styled(format!("pointsman {version}"), Style::new().add_modifier(Modifier::BOLD)),
                Span::raw(format!(
                    "  up {}  verdicts by {}: {}",
                    span(*uptime_seconds),
                    verdict.path,
                    verdict.reason
                )),
            ]),
            Line::from(format!(
                "per second: accepted {}  served {}  refused {}  closed {}  dropped {}",
                rate(|report| report.connections.accepted),
                rate(|report| report.connections.served),
                rate(|report| report.connections.refused.values().sum()),
                rate(|report| report.connections.closed + report.connections.poisoned),
                rate(|report| report.connections.dropped),
            )),
            Line::from(format!(
                "verdicts/s: kernel {}, late {}  user space {}   connections a message {mean}",
                path("kernel_at_accept"),
                path("kernel_late"),
                path("user_space"),
            )),
            Line::from(format!("refusals/s: {}", self.refusals())),
            Line::from(format!(
                "held {}  waiting {}  accept pauses {}  {}",
                connections.held,
                connections.waiting,
                connections.accept_pauses,
                self.kernel()
            )),
            Line::from(self.moves()),
        ]
    }

    fn refusals(&self) -> String {
        let refused = &self.now.connections.refused;
        let reasons: Vec<_> = refused
            .iter()
            .filter(|(_, total)| **total > 0)
            .map(|(reason, total)| {
                let before = |before: &Report| before.connections.refused.get(reason).copied().unwrap_or(0);
                format!("{reason} {}", self.rate(*total, before))
            })
            .collect();
        if reasons.is_empty() { "none so far".to_owned() } else { reasons.join("  ") }
    }

    fn moves(&self) -> String {
        let moves = self.now.moves.iter().map(|moved| {
            let key = |other: &MoveCount| {
                (&other.source, &other.target, &other.outcome)
                    == (&moved.source, &moved.target, &moved.outcome)
            };
            let of = |report: &Report| {
                report.moves.iter().find(|other| key(other)).map_or(0, |earlier| earlier.count)
            };
            format!("{}→{} {} {}", moved.source, moved.target, moved.outcome, self.rate(moved.count, of))
        });
        let moves = moves.collect::<Vec<_>>().join("  ");
        if moves.is_empty() { moves } else { format!("moves/s: {moves}") }
    }

    fn kernel(&self) -> String {
        let Some(kernel) = &self.now.kernel else { return String::new() };
        let connections = kernel.maps.iter().find(|map| map.name == "pm_connections");
        connections.map_or_else(String::new, |map| {
            format!("followed by the kernel {}/{}", map.entries, map.capacity)
        })
    }

    fn foot(&self) -> Line<'_> {
        match self.trouble {
            Some(trouble) => Line::styled(trouble, Style::new().fg(Color::Red)),
            None => Line::styled("q quits, arrows scroll", Style::new().add_modifier(Modifier::DIM)),
        }
    }

    fn draw_table(&self, frame: &mut Frame<'_>, area: Rect) {
        let header =
            Row::new(COLUMNS.map(|(name, _)| name)).style(Style::new().add_modifier(Modifier::REVERSED));
        let rows = self.rows().into_iter().skip(self.scroll);
        frame.render_widget(
            Table::new(rows, COLUMNS.map(|(_, width)| Constraint::Length(width))).header(header),
            area,
        );
    }

    fn rows(&self) -> Vec<Row<'static>> {
        let rows = self.now.functions.iter().flat_map(|(name, function)| {
            let before = self.before.and_then(|(before, _)| before.functions.get(name));
            let instances = function.instances.iter().map(move |instance| {
                let known = |function: &Function| {
                    function.instances.iter().find(|known| known.socket == instance.socket).cloned()
                };
                self.instance_row(instance, before.and_then(known))
            });
            [self.function_row(name, function, before)].into_iter().chain(instances).collect::<Vec<_>>()
        });
        rows.collect()
    }

    fn function_row(&self, name: &str, function: &Function, before: Option<&Function>) -> Row<'static> {
        let durations = merged(function, |_| true);
        let failures = merged(function, |requests| requests.status.starts_with('5')).count;
        let earlier = before.map(|before| merged(before, |_| true));
        let recent = earlier.as_ref().map_or_else(|| durations.clone(), |earlier| durations.since(earlier));
        let handoff =
            before.map_or_else(|| function.handoff.clone(), |before| function.handoff.since(&before.handoff));
        let up = function.instances_up();
        let style =
            Style::new().add_modifier(Modifier::BOLD).fg(if up > 0 { Color::Reset } else { Color::Red });
        let earlier_failures =
            before.map(|before| merged(before, |requests| requests.status.starts_with('5')).count);
        row([
            name.to_owned(),
            if up > 0 { format!("{up} up") } else { "down".to_owned() },
            self.rate_since(durations.count, earlier.map(|earlier| earlier.count)),
            self.rate_since(failures, earlier_failures),
            quantile(recent.quantile(0.5)),
            quantile(recent.quantile(0.99)),
            quantile(handoff.quantile(0.99)),
            count(function.in_flight as f64),
            count(function.open as f64),
        ])
        .style(style)
    }

    fn instance_row(&self, instance: &Instance, before: Option<Instance>) -> Row<'static> {
        let color = match instance.state {
            State::Up => Color::Reset,
            State::Stalled | State::Draining => Color::Yellow,
            State::Down => Color::Red,
        };
        let nothing = String::new;
        row([
            format!(" {}", instance.socket),
            instance.state.as_str().to_owned(),
            self.rate_since(instance.requests, before.map(|before| before.requests)),
            nothing(),
            nothing(),
            nothing(),
            nothing(),
            count(instance.in_flight as f64),
            count(instance.open as f64),
        ])
        .style(Style::new().fg(color))
    }

    fn rate(&self, now: u64, before: impl Fn(&Report) -> u64) -> String {
        self.rate_since(now, self.before.map(|(report, _)| before(report)))
    }

    /// Counters of an instance begin anew with its process.
    fn rate_since(&self, now: u64, before: Option<u64>) -> String {
        match (self.before, before) {
            (Some((_, elapsed)), before) if !elapsed.is_zero() => {
                count(now.saturating_sub(before.unwrap_or(0)) as f64 / elapsed.as_secs_f64())
            }
            _ => "-".to_owned(),
        }
    }
}

fn row(cells: [String; COLUMNS.len()]) -> Row<'static> {
    Row::new(cells.map(Cell::from))
}

fn merged(function: &Function, wanted: impl Fn(&Requests) -> bool) -> Distribution {
    let mut sum = Distribution { count: 0, sum: 0.0, buckets: Vec::new() };
    for requests in function.requests.iter().filter(|requests| wanted(requests)) {
        if sum.buckets.is_empty() {
            sum = requests.duration.clone();
        } else {
            sum.add(&requests.duration);
        }
    }
    sum
}
