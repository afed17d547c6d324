//! The report as Prometheus reads it (text format 0.0.4); docs/metrics.md says what each metric means.
use prometheus::{
    Result, TEXT_FORMAT, TextEncoder,
    proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};

use super::report::{Distribution, Function, Kernel, Report, Requests};

pub const CONTENT_TYPE: &str = TEXT_FORMAT;

type Labels<'a> = &'a [(&'a str, &'a str)];

pub fn render(report: &Report) -> Result<String> {
    let mut families = Families::default();
    of_gateway(report, &mut families);
    of_connections(report, &mut families);
    of_functions(report, &mut families);
    report.kernel.iter().for_each(|kernel| of_kernel(kernel, &mut families));
    of_openfaas(report, &mut families);
    TextEncoder::new().encode_to_string(&families.0)
}

fn of_gateway(report: &Report, families: &mut Families) {
    families.gauges(
        "pointsman_build_info",
        "The version that runs; always 1.",
        [(&[("version", report.version.as_str())][..], 1.0)],
    );
    families.gauges(
        "pointsman_start_time_seconds",
        "When the gateway started, since 1970.",
        [(&[][..], report.started_at_unix as f64)],
    );
    let verdict = &report.verdict;
    families.gauges(
        "pointsman_verdict_path",
        "Who judges connections: the kernel (sockmap) or user space (peek).",
        [(&[("configured", verdict.configured.as_str()), ("path", verdict.path.as_str())][..], 1.0)],
    );
}

fn of_connections(report: &Report, families: &mut Families) {
    let connections = &report.connections;
    families.counters(
        "pointsman_connections_accepted_total",
        "Connections that accept returned.",
        [(&[][..], connections.accepted)],
    );
    let verdicts = report.verdicts.iter().map(|verdict| {
        ([("path", verdict.path.as_str()), ("outcome", verdict.outcome.as_str())], verdict.count)
    });
    families.counters(
        "pointsman_verdicts_total",
        "Verdicts, by who gave them and what they said.",
        verdicts.collect::<Vec<_>>().iter().map(|(labels, count)| (&labels[..], *count)),
    );
    let refused = connections.refused.values().sum();
    families.counters(
        "pointsman_connections_total",
        "Connections that left the gateway, by how.",
        [
            (&[("outcome", "served")][..], connections.served),
            (&[("outcome", "refused")][..], refused),
            (&[("outcome", "closed")][..], connections.closed),
            (&[("outcome", "poisoned")][..], connections.poisoned),
            (&[("outcome", "dropped")][..], connections.dropped),
        ],
    );
    let reasons = connections.refused.iter().map(|(reason, count)| ([("reason", reason.as_str())], *count));
    families.counters(
        "pointsman_refusals_total",
        "Connections handed to refusal, by reason.",
        reasons.collect::<Vec<_>>().iter().map(|(labels, count)| (&labels[..], *count)),
    );
    families.gauges(
        "pointsman_connections_held",
        "Connections without a verdict.",
        [(&[][..], connections.held as f64)],
    );
    families.gauges(
        "pointsman_connections_waiting",
        "Connections that found no instance yet.",
        [(&[][..], connections.waiting as f64)],
    );
    families.counters(
        "pointsman_accept_pauses_total",
        "How often accepting paused for want of descriptors or memory.",
        [(&[][..], connections.accept_pauses)],
    );
    families.histograms(
        "pointsman_handoff_batch_connections",
        "Connections that went with one message.",
        [(&[][..], &report.batches)],
    );
    let moves = report.moves.iter().map(|moved| {
        let labels = [
            ("source", moved.source.as_str()),
            ("target", moved.target.as_str()),
            ("outcome", moved.outcome.as_str()),
        ];
        (labels, moved.count)
    });
    families.counters(
        "pointsman_moves_total",
        "Connections that went from one instance to another, by the functions of both.",
        moves.collect::<Vec<_>>().iter().map(|(labels, count)| (&labels[..], *count)),
    );
}

fn of_functions(report: &Report, families: &mut Families) {
    let functions =
        || report.functions.iter().map(|(name, function)| ([("function", name.as_str())], function));
    let functions: Vec<_> = functions().collect();
    let all = || functions.iter().map(|(labels, function)| (&labels[..], *function));
    type Count = fn(&Function) -> u64;
    let counters: [(&str, &str, Count); 3] = [
        ("pointsman_handoffs_total", "Connections handed over.", |function| function.handed_over),
        (
            "pointsman_handoffs_lost_total",
            "Connections that were lost with an instance that had not taken them.",
            |function| function.lost,
        ),
        (
            "pointsman_instance_restarts_total",
            "How often another process took an instance's place.",
            |function| function.restarts,
        ),
    ];
    for (name, help, value) in counters {
        families.counters(name, help, all().map(|(labels, function)| (labels, value(function))));
    }
    let gauges: [(&str, &str, Count); 4] = [
        ("pointsman_instances", "Instances whose socket is there.", |function| {
            function.instances.len() as u64
        }),
        ("pointsman_instances_up", "Instances that take connections.", |function| {
            function.instances_up() as u64
        }),
        ("pointsman_in_flight_connections", "Connections handed over and not taken yet.", |function| {
            function.in_flight
        }),
        ("pointsman_open_connections", "Connections that instances have open.", |function| function.open),
    ];
    for (name, help, value) in gauges {
        families.gauges(name, help, all().map(|(labels, function)| (labels, value(function) as f64)));
    }
    families.histograms(
        "pointsman_handoff_seconds",
        "From accept until the function took the connection.",
        all().map(|(labels, function)| (labels, &function.handoff)),
    );
    let requests: Vec<_> = report
        .functions
        .iter()
        .flat_map(|(name, function)| function.requests.iter().map(move |requests| (name, requests)))
        .map(|(name, requests)| {
            let Requests { method, status, duration } = requests;
            (
                [("function", name.as_str()), ("method", method.as_str()), ("status", status.as_str())],
                duration,
            )
        })
        .collect();
    families.counters(
        "pointsman_requests_total",
        "Requests that functions answered.",
        requests.iter().map(|(labels, duration)| (&labels[..], duration.count)),
    );
    families.histograms(
        "pointsman_request_duration_seconds",
        "From a request's head to the end of its answer.",
        requests.iter().map(|(labels, duration)| (&labels[..], *duration)),
    );
}

fn of_kernel(kernel: &Kernel, families: &mut Families) {
    let events: Vec<_> =
        kernel.events.iter().map(|(event, count)| ([("event", event.as_str())], *count)).collect();
    families.counters(
        "pointsman_kernel_events_total",
        "What the BPF programs count.",
        events.iter().map(|(labels, count)| (&labels[..], *count)),
    );
    let maps: Vec<_> = kernel.maps.iter().map(|map| ([("map", map.name.as_str())], map)).collect();
    families.gauges(
        "pointsman_bpf_map_entries",
        "Entries of a BPF map.",
        maps.iter().map(|(labels, map)| (&labels[..], map.entries as f64)),
    );
    families.gauges(
        "pointsman_bpf_map_capacity",
        "Entries that a BPF map has room for.",
        maps.iter().map(|(labels, map)| (&labels[..], map.capacity as f64)),
    );
    families.gauges(
        "pointsman_bpf_stats_enabled",
        "Whether the kernel measures run times of BPF programs.",
        [(&[][..], f64::from(u8::from(kernel.run_times_measured)))],
    );
    let programs: Vec<_> =
        kernel.programs.iter().map(|program| ([("program", program.name.as_str())], program)).collect();
    families.counters(
        "pointsman_bpf_program_runs_total",
        "Runs of a BPF program while the kernel measured them.",
        programs.iter().map(|(labels, program)| (&labels[..], program.runs)),
    );
    families.counters_of(
        "pointsman_bpf_program_run_seconds_total",
        "Time that these runs took.",
        programs.iter().map(|(labels, program)| (&labels[..], program.run_seconds)),
    );
}

/// The names and labels of OpenFaaS's gateway, for dashboards made for it.
fn of_openfaas(report: &Report, families: &mut Families) {
    let mut by_code: Vec<([(&str, &str); 2], Distribution)> = Vec::new();
    for (name, function) in report.own_functions() {
        let first = by_code.len();
        for Requests { status, duration, .. } in &function.requests {
            let labels = [("function_name", name), ("code", status.as_str())];
            match by_code[first..].iter_mut().find(|(known, _)| *known == labels) {
                Some((_, sum)) => sum.add(duration),
                None => by_code.push((labels, duration.clone())),
            }
        }
    }
    families.counters(
        "gateway_function_invocation_total",
        "Requests that functions answered, as OpenFaaS names them.",
        by_code.iter().map(|(labels, duration)| (&labels[..], duration.count)),
    );
    families.histograms(
        "gateway_functions_seconds",
        "What requests took, as OpenFaaS names it.",
        by_code.iter().map(|(labels, duration)| (&labels[..], duration)),
    );
    let services: Vec<_> = report
        .own_functions()
        .map(|(name, function)| ([("function_name", name)], function.instances_up() as f64))
        .collect();
    families.gauges(
        "gateway_service_count",
        "Instances that take connections, as OpenFaaS names them.",
        services.iter().map(|(labels, count)| (&labels[..], *count)),
    );
}

#[derive(Default)]
struct Families(Vec<MetricFamily>);

impl Families {
    fn counters<'a>(&mut self, name: &str, help: &str, values: impl IntoIterator<Item = (Labels<'a>, u64)>) {
        self.counters_of(name, help, values.into_iter().map(|(labels, value)| (labels, value as f64)));
    }

    fn counters_of<'a>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'a>, f64)>,
    ) {
        self.add(name, help, MetricType::COUNTER, values, |metric, value| {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        });
    }

    fn gauges<'a>(&mut self, name: &str, help: &str, values: impl IntoIterator<Item = (Labels<'a>, f64)>) {
        self.add(name, help, MetricType::GAUGE, values, |metric, value| {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        });
    }

    fn histograms<'a>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (Labels<'a>, &'a Distribution)>,
    ) {
        self.add(name, help, MetricType::HISTOGRAM, values, |metric, value| {
            metric.set_histogram(histogram(value))
        });
    }

    /// A family without a metric is left out, as the format wants it.
    fn add<'a, T>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        values: impl IntoIterator<Item = (Labels<'a>, T)>,
        set: impl Fn(&mut Metric, T),
    ) {
        let metrics: Vec<_> = values
            .into_iter()
            .map(|(labels, value)| {
                let mut metric = Metric::from_label(labels.iter().map(pair).collect());
                set(&mut metric, value);
                metric
            })
            .collect();
        if metrics.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics);
        self.0.push(family);
    }
}

fn pair((name, value): &(&str, &str)) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name((*name).to_owned());
    pair.set_value((*value).to_owned());
    pair
}

fn histogram(distribution: &Distribution) -> Histogram {
    let mut cumulative = 0;
    let buckets = distribution.buckets.iter().filter_map(|(bound, count)| {
        cumulative += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound((*bound)?);
        bucket.set_cumulative_count(cumulative);
        Some(bucket)
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(distribution.count);
    histogram.set_sample_sum(distribution.sum);
    histogram
}
