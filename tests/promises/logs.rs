//! Logs are lines for people or objects for machines, and a function logs what it answered when asked to.
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::{Verdicts, eventually, metrics::Metrics, stack::Plan};

/// The access log's entry for a path.
fn entry(line: &str, path: &str) -> Option<Value> {
    let record: Value = serde_json::from_str(&line[line.find('{')?..]).ok()?;
    (record["path"] == path).then_some(record)
}

#[test]
fn a_function_logs_its_answers_when_asked_to() -> Result<()> {
    // The last function of the configuration is hello.
    let mut stack = Plan::new(Verdicts::Auto).configuration("access_log = true\n").start();
    let mut client = stack.client()?;
    let peer = client.socket().local_addr()?;
    let answer = client.request("GET", "/function/hello/some/%22path%22?secret=1", "x", None)?;
    ensure!(stack.client()?.request("GET", "/function/echo/some/path", "x", None)?.status() == 200);
    let path = "/function/hello/some/%22path%22";
    let record =
        eventually("the entry", || stack.supervisor().said().iter().find_map(|line| entry(line, path)));
    ensure!(record["method"] == "GET" && record["status"] == answer.status(), "{record}");
    ensure!(record["bytes"] == answer.body.len() && record["duration_us"].is_u64(), "{record}");
    ensure!(record["peer"] == peer.to_string(), "{record} for {peer}");
    // Only who was asked to.
    let said = stack.supervisor().said().join("\n");
    ensure!(!said.contains("/function/echo/some") && !said.contains("secret"), "{said}");
    Ok(())
}

#[test]
fn logs_are_objects_when_asked_for() -> Result<()> {
    let mut stack = Plan::new(Verdicts::Auto)
        .gateway_argument("--log-format=json")
        .supervisor_argument("--log-format=json")
        .configuration("access_log = true\n")
        .start();
    ensure!(stack.client()?.request("GET", "/function/hello", "x", None)?.status() == 200);
    eventually("the access log", || {
        let said = stack.supervisor().said();
        said.iter().any(|line| line.contains("\"record\":{\"method\":\"GET\"")).then_some(())
    });
    let said = [stack.gateway().said(), stack.supervisor().said()].concat();
    for line in &said {
        let object: Value = serde_json::from_str(line).with_context(|| line.clone())?;
        ensure!(object["timestamp"].is_string(), "{line}");
        ensure!(object["message"].is_string() || object["record"].is_object(), "{line}");
    }
    ensure!(said.iter().any(|line| line.contains("\"message\":\"ready\"")), "{said:?}");
    Ok(())
}

/// A log that nobody reads holds up nobody, and says what it lacks when it is read again.
#[test]
fn an_access_log_that_is_not_read_makes_nobody_wait() -> Result<()> {
    let mut stack = Plan::new(Verdicts::Auto).configuration("access_log = true\n").start();
    stack.supervisor().signal(Signal::SIGSTOP);
    let mut client = stack.client()?;
    // Several times what the pipe between the two holds.
    let asked = (0..3000).try_for_each(|_| {
        let answer = client.request("GET", "/function/hello/some/where", "x", None)?;
        ensure!(answer.head.version == 1, "{answer:?}");
        Ok(())
    });
    stack.supervisor().signal(Signal::SIGCONT);
    asked?;
    eventually("each answer to be logged or called dropped", || {
        let answered =
            Metrics::scrape(&stack).ok()?.sum("pointsman_requests_total", &[("function", "hello")]);
        let said = stack.supervisor().said();
        let records = said.iter().filter_map(|line| {
            serde_json::from_str::<Value>(&line[line.find("hello | {")? + "hello | ".len()..]).ok()
        });
        let (mut logged, mut dropped) = (0, 0);
        for record in records {
            logged += u64::from(record["path"].is_string());
            dropped += record["dropped"].as_u64().unwrap_or(0);
        }
        (dropped > 0 && (logged + dropped) as f64 == answered).then_some(())
    });
    Ok(())
}
