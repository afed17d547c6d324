//! Metrics are exact: what happened is counted, once, and stays counted whoever restarts.
use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tests::{
    Stack, Verdicts,
    configuration::{Configuration, reload, without},
    eventually,
    metrics::Metrics,
    stack::Plan,
};

in_both_modes!(
    known_traffic_is_counted_exactly,
    a_restarted_function_goes_on_counting,
    a_stopping_function_counts_to_the_end,
    requests_without_a_gateway_are_told_to_the_next,
    moves_are_counted_and_their_age_is_no_wait,
    functions_of_a_reload_are_told,
);

/// Scrapes until nothing is in flight any more, so that all that clients saw is counted.
fn settled(stack: &Stack) -> Metrics {
    eventually("connections to arrive", || {
        let metrics = Metrics::scrape(stack).expect("the gateway answers");
        (metrics.sum("pointsman_in_flight_connections", &[]) == 0.0).then_some(metrics)
    })
}

fn known_traffic_is_counted_exactly(verdicts: Verdicts) -> Result<()> {
    let stack = Stack::start(verdicts);
    let before = settled(&stack);
    for _ in 0..20 {
        ensure!(stack.client()?.request("GET", "/function/echo", "x", None)?.status() == 200);
    }
    let mut kept = stack.client()?;
    for _ in 0..5 {
        ensure!(kept.request("POST", "/function/echo", "x", Some(b"body"))?.status() == 200);
    }
    // Found to be nobody's by the function, and by the gateway.
    ensure!(kept.request("GET", "/nowhere", "x", None)?.status() == 404);
    for _ in 0..3 {
        ensure!(stack.client()?.request("GET", "/function/nobody", "x", None)?.status() == 404);
    }
    for _ in 0..4 {
        ensure!(stack.tls_client("hello")?.request("GET", "/", "hello.faas.local", None)?.status() == 200);
    }
    let after = settled(&stack);
    after.check_histograms()?;
    let connections = 20.0 + 1.0 + 3.0 + 4.0;
    let (kernel, user) = if verdicts == Verdicts::Sockmap { (connections, 0.0) } else { (0.0, connections) };
    let grown = |name: &str, labels: &[(&str, &str)]| after.grown(&before, name, labels);
    let by_kernel = grown("pointsman_verdicts_total", &[("path", "kernel_at_accept")])
        + grown("pointsman_verdicts_total", &[("path", "kernel_late")]);
    ensure!(by_kernel == kernel, "{by_kernel} verdicts by the kernel");
    let echo = ("function", "echo");
    let (get, post) = (("method", "GET"), ("method", "POST"));
    let (found, missing) = (("status", "200"), ("status", "404"));
    for (name, labels, expected) in [
        ("pointsman_connections_accepted_total", &[][..], connections),
        ("pointsman_verdicts_total", &[("path", "user_space")], user),
        ("pointsman_verdicts_total", &[("outcome", "route")], 25.0),
        ("pointsman_verdicts_total", &[("outcome", "no_function")], 3.0),
        ("pointsman_connections_total", &[("outcome", "served")], 25.0),
        ("pointsman_connections_total", &[("outcome", "refused")], 3.0),
        ("pointsman_connections_total", &[("outcome", "dropped")], 0.0),
        ("pointsman_refusals_total", &[("reason", "no_function")], 3.0),
        ("pointsman_refusals_total", &[], 3.0),
        ("pointsman_handoff_batch_connections_sum", &[], connections),
        ("pointsman_handoffs_total", &[echo], 21.0),
        ("pointsman_handoffs_total", &[("function", "hello")], 4.0),
        ("pointsman_handoffs_total", &[("function", "refusal")], 3.0),
        ("pointsman_handoff_seconds_count", &[echo], 21.0),
        ("pointsman_handoff_seconds_bucket", &[echo, ("le", "+Inf")], 21.0),
        ("pointsman_requests_total", &[echo, get, found], 20.0),
        ("pointsman_requests_total", &[echo, post, found], 5.0),
        ("pointsman_requests_total", &[echo, get, missing], 1.0),
        ("pointsman_requests_total", &[echo], 26.0),
        ("pointsman_requests_total", &[("function", "hello")], 4.0),
        ("pointsman_request_duration_seconds_count", &[echo, post], 5.0),
        ("gateway_function_invocation_total", &[("function_name", "echo"), ("code", "200")], 25.0),
        ("gateway_functions_seconds_count", &[("function_name", "echo")], 26.0),
        ("pointsman_handoffs_lost_total", &[], 0.0),
        ("pointsman_instance_restarts_total", &[], 0.0),
    ] {
        ensure!(grown(name, labels) == expected, "{name} {labels:?}: {} for {expected}", grown(name, labels));
    }
    for (name, labels, expected) in [
        ("gateway_service_count", &[("function_name", "echo")][..], 1.0),
        ("pointsman_instances_up", &[("function", "refusal")], 1.0),
        ("pointsman_open_connections", &[echo], 1.0),
        ("pointsman_verdict_path", &[("path", verdicts.as_str())], 1.0),
    ] {
        let has = if name == "pointsman_open_connections" {
            // Those that were closed are so a moment later.
            eventually("closed connections to be gone", || {
                let now = Metrics::scrape(&stack).ok()?.sum(name, labels);
                (now == expected).then_some(now)
            })
        } else {
            after.sum(name, labels)
        };
        ensure!(has == expected, "{name} {labels:?}: {has} for {expected}");
    }
    drop(kept);
    Ok(())
}

/// Counted things of a later scrape are never fewer than those of an earlier one.
fn ensure_grown(before: &Metrics, after: &Metrics) -> Result<()> {
    for (sample, value) in before.counts() {
        let now = after.value(sample).with_context(|| format!("{sample:?} is gone"))?;
        ensure!(now >= value, "{sample:?} fell from {value} to {now}");
    }
    Ok(())
}

fn serve(stack: &Stack, times: usize) -> Result<()> {
    (0..times).try_for_each(|_| {
        let answer = stack.client()?.request("PUT", "/function/echo", "x", Some(b"x"))?;
        ensure!(answer.status() == 200, "{answer:?}");
        Ok(())
    })
}

fn a_restarted_function_goes_on_counting(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let puts = [("function", "echo"), ("method", "PUT")];
    for round in 1..=3 {
        serve(&stack, 10)?;
        let before = settled(&stack);
        ensure!(before.sum("pointsman_requests_total", &puts) == 10.0 * f64::from(round));
        for process in stack.processes_of("echo") {
            kill(Pid::from_raw(process), Signal::SIGKILL)?;
        }
        let restarts = eventually("the restart to be counted", || {
            let metrics = Metrics::scrape(&stack).ok()?;
            let restarts = metrics.sum("pointsman_instance_restarts_total", &[("function", "echo")]);
            (restarts >= f64::from(round)).then_some(restarts)
        });
        ensure!(restarts == f64::from(round), "round {round}: {restarts} restarts");
        ensure_grown(&before, &settled(&stack)).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

/// It takes nothing more before its last request ends, which may have come by an earlier gateway's pool connection.
fn a_stopping_function_counts_to_the_end(verdicts: Verdicts) -> Result<()> {
    counts_to_the_end(verdicts, |_| {}).context("with its first gateway")?;
    let restart = |stack: &mut Stack| {
        stack.gateway().kill();
        stack.start_gateway();
    };
    counts_to_the_end(verdicts, restart).context("with another gateway")
}

fn counts_to_the_end(verdicts: Verdicts, before_the_stop: impl FnOnce(&mut Stack)) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let mut client = stack.client()?;
    client.send(b"PATCH /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf ")?;
    serve(&stack, 1)?;
    let is_open = |stack: &Stack| {
        eventually("the one connection to be told", || {
            let metrics = Metrics::scrape(stack).ok()?;
            (metrics.sum("pointsman_open_connections", &[("function", "echo")]) == 1.0).then_some(())
        });
    };
    is_open(&stack);
    before_the_stop(&mut stack);
    is_open(&stack);
    let processes = stack.processes_of("echo");
    for &process in &processes {
        kill(Pid::from_raw(process), Signal::SIGTERM)?;
    }
    let patched = [("function", "echo"), ("method", "PATCH")];
    eventually("the gateway to see the function stop", || {
        let metrics = Metrics::scrape(&stack).ok()?;
        (metrics.sum("pointsman_instances_up", &[("function", "echo")]) == 0.0).then_some(())
    });
    ensure!(settled(&stack).sum("pointsman_requests_total", &patched) == 0.0);
    client.send(b"done.")?;
    ensure!(client.response()?.status() == 200);
    eventually("its last request to be counted", || {
        let metrics = Metrics::scrape(&stack).ok()?;
        (metrics.sum("pointsman_requests_total", &patched) == 1.0).then_some(())
    });
    eventually("echo to serve again", || serve(&stack, 1).ok());
    // The page of the process that is gone was kept.
    ensure!(settled(&stack).sum("pointsman_requests_total", &patched) == 1.0);
    Ok(())
}

fn requests_without_a_gateway_are_told_to_the_next(verdicts: Verdicts) -> Result<()> {
    let mut stack = Stack::start(verdicts);
    let mut kept = stack.client()?;
    ensure!(kept.request("DELETE", "/function/echo", "x", None)?.status() == 200);
    stack.look();
    stack.gateway().kill();
    // Noticed by every worker before the next request, which would else be counted for the one that is gone.
    eventually("the function to notice", || {
        let fds = stack.processes_of("echo").iter().map(|pid| pool_connections(*pid)).sum::<usize>();
        (fds == 0).then_some(())
    });
    for _ in 0..7 {
        ensure!(kept.request("DELETE", "/function/echo", "x", None)?.status() == 200);
    }
    stack.start_gateway();
    stack.wait_until_ready();
    let deleted = [("function", "echo"), ("method", "DELETE")];
    // The worker that has the connection may be the last one that the gateway hears of.
    eventually("the requests to be told", || {
        (settled(&stack).sum("pointsman_requests_total", &deleted) == 7.0).then_some(())
    });
    ensure!(kept.request("DELETE", "/function/echo", "x", None)?.status() == 200);
    ensure!(settled(&stack).sum("pointsman_requests_total", &deleted) == 8.0);
    Ok(())
}

/// A connection that moves is taken by each of its functions, and came to the gateway once.
fn moves_are_counted_and_their_age_is_no_wait(verdicts: Verdicts) -> Result<()> {
    const ROUNDS: usize = 10;
    let stack = Stack::start(verdicts);
    let before = settled(&stack);
    let mut client = stack.client()?;
    for _ in 0..ROUNDS {
        for function in ["/function/echo", "/function/hello"] {
            ensure!(client.request("GET", function, "x", None)?.status() == 200);
        }
    }
    let after = settled(&stack);
    let rounds = ROUNDS as f64;
    let (echo, hello) = (("function", "echo"), ("function", "hello"));
    let moved = ("outcome", "moved");
    for (name, labels, expected) in [
        ("pointsman_moves_total", &[("source", "echo"), ("target", "hello"), moved][..], rounds),
        ("pointsman_moves_total", &[("source", "hello"), ("target", "echo"), moved], rounds - 1.0),
        ("pointsman_moves_total", &[], 2.0 * rounds - 1.0),
        ("pointsman_connections_accepted_total", &[], 1.0),
        ("pointsman_connections_total", &[], 1.0),
        ("pointsman_handoffs_total", &[echo], rounds),
        ("pointsman_handoffs_total", &[hello], rounds),
        ("pointsman_handoff_seconds_count", &[echo], 1.0),
        ("pointsman_handoff_seconds_count", &[hello], 0.0),
        ("pointsman_requests_total", &[echo], rounds),
        ("pointsman_requests_total", &[hello], rounds),
        ("pointsman_handoffs_lost_total", &[], 0.0),
    ] {
        let grown = after.grown(&before, name, labels);
        ensure!(grown == expected, "{name} {labels:?}: {grown} for {expected}");
    }
    Ok(())
}

fn functions_of_a_reload_are_told(verdicts: Verdicts) -> Result<()> {
    let mut stack = Plan::new(verdicts).function("extra", "echo").start();
    let configuration = Configuration::of(&stack);
    let with = configuration.text();
    let extra = [("function", "extra")];
    let told =
        |stack: &Stack, name: &str| Metrics::scrape(stack).ok().map(|metrics| metrics.sum(name, &extra));
    ensure!(stack.client()?.request("GET", "/function/extra", "x", None)?.status() == 200);
    let requests = settled(&stack).sum("pointsman_requests_total", &extra);
    for (text, up) in [(without(&with, "extra"), 0.0), (with, 1.0)] {
        configuration.replace(&text);
        reload(&mut stack);
        eventually("the reload to be told", || {
            (told(&stack, "pointsman_instances_up") == Some(up)).then_some(())
        });
        // What it did is not forgotten.
        ensure!(settled(&stack).sum("pointsman_requests_total", &extra) >= requests);
    }
    Ok(())
}

/// Status pages that a process has open: one for each pool connection.
fn pool_connections(pid: i32) -> usize {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let links = files.filter_map(|file| fs::read_link(file.path()).ok());
    links.filter(|link| link.to_string_lossy().contains("pointsman-status")).count()
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// Names in `text` that are metrics' by their prefix.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let ours =
        |word: &&str| ["pointsman_", "gateway_f", "gateway_s"].iter().any(|prefix| word.starts_with(prefix));
    words.filter(ours).map(str::to_owned).collect()
}

fn collect_queries(value: &Value, queries: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(text) if key == "expr" || key == "query" || key == "definition" => {
                        queries.push(text.clone());
                    }
                    value => collect_queries(value, queries),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect_queries(value, queries)),
        _ => {}
    }
}

/// What has no sample before a connection moved.
const RARE: [&str; 1] = ["pointsman_moves_total"];

#[test]
fn dashboards_and_documents_name_what_is_exported() -> Result<()> {
    let stack = Stack::start(Verdicts::Sockmap);
    let metrics = settled(&stack);
    let exported: BTreeSet<String> =
        metrics.families.keys().cloned().chain(RARE.map(str::to_owned)).collect();
    let known = |name: &str| metrics.family_of(name).is_some() || RARE.contains(&name);

    let dashboard = fs::read_to_string(repository().join("packaging/grafana/pointsman.json"))?;
    let mut queries = Vec::new();
    collect_queries(&serde_json::from_str(&dashboard)?, &mut queries);
    let used: BTreeSet<String> = queries.iter().flat_map(|query| names(query)).collect();
    ensure!(used.len() > 10, "the dashboard uses {used:?}");
    let unknown: Vec<_> = used.iter().filter(|name| !known(name)).collect();
    ensure!(unknown.is_empty(), "the dashboard uses {unknown:?}, which nobody exports");

    let reference = fs::read_to_string(repository().join("docs/metrics.md"))?;
    let documented = names(&reference);
    let missing: Vec<_> = exported.difference(&documented).collect();
    ensure!(missing.is_empty(), "docs/metrics.md lacks {missing:?}");
    let invented: Vec<_> = documented.iter().filter(|name| !known(name)).collect();
    ensure!(invented.is_empty(), "docs/metrics.md knows {invented:?}, which nobody exports");
    Ok(())
}

#[test]
fn maps_and_programs_are_looked_into() -> Result<()> {
    let stack = Stack::start(Verdicts::Sockmap);
    let before = settled(&stack);
    // Without a verdict a connection stays with the programs.
    let mut undecided = stack.client()?;
    undecided.send(b"GET /func")?;
    eventually("the connection to be in the map", || {
        let metrics = Metrics::scrape(&stack).ok()?;
        (metrics.sum("pointsman_bpf_map_entries", &[("map", "pm_flights")]) == 1.0).then_some(())
    });
    let now = Metrics::scrape(&stack)?;
    ensure!(now.sum("pointsman_bpf_map_entries", &[("map", "pm_connections")]) >= 1.0);
    ensure!(now.sum("pointsman_connections_held", &[]) == 1.0);
    ensure!(now.sum("pointsman_bpf_map_capacity", &[("map", "pm_connections")]) >= 1024.0);
    ensure!(now.grown(&before, "pointsman_kernel_events_total", &[("event", "enrolled")]) == 1.0);
    let programs = now.label_values("pointsman_bpf_program_runs_total", "program");
    ensure!(programs.iter().any(|name| name == "pm_verdict"), "{programs:?}");
    Ok(())
}
