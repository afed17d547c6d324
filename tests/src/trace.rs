//! What strace saw a gateway do with its clients' sockets.
use std::collections::{BTreeSet, HashMap};

use anyhow::{Context, Result, bail};

/// Calls that give a socket's bytes to the caller or move them elsewhere; the first argument is the socket, except
/// where [`socket_of`] says otherwise.
const READS: [&str; 12] = [
    "read",
    "readv",
    "pread64",
    "preadv",
    "preadv2",
    "recvfrom",
    "recvmsg",
    "recvmmsg",
    "splice",
    "tee",
    "sendfile",
    "copy_file_range",
];
/// Calls that this analysis can't follow, so that their use makes it worthless.
const OPAQUE: [&str; 5] = ["io_uring_setup", "io_uring_enter", "dup", "dup2", "dup3"];
const BOOKKEEPING: [&str; 4] = ["accept", "accept4", "close", "close_range"];

#[derive(Debug, Default)]
pub struct Report {
    pub accepted: usize,
    /// The lines that show a read-type call on a socket between its accept and its close.
    pub reads: Vec<String>,
}

/// The argument of strace's `-e`.
pub fn filter() -> String {
    format!("trace={},{},{}", READS.join(","), OPAQUE.join(","), BOOKKEEPING.join(","))
}

pub fn report(trace: &str) -> Result<Report> {
    let mut report = Report::default();
    let mut clients = BTreeSet::new();
    for line in trace.lines() {
        let Some(call) = Call::parse(line) else { continue };
        if OPAQUE.contains(&call.name) {
            bail!("the gateway uses {}, which this test can't follow: {line}", call.name);
        }
        match call.name {
            "accept" | "accept4" => {
                if let Some(fd) = call.result.filter(|&fd| fd >= 0) {
                    clients.insert(fd);
                    report.accepted += 1;
                }
            }
            "close" => drop(call.arguments.first().map(|fd| clients.remove(fd))),
            "close_range" => {
                let (&first, &last) =
                    call.arguments.first().zip(call.arguments.get(1)).context("close_range has two ends")?;
                clients.retain(|fd| !(first..=last).contains(fd));
            }
            name if READS.contains(&name) && call.sockets().iter().any(|fd| clients.contains(fd)) => {
                report.reads.push(line.to_owned());
            }
            _ => {}
        }
    }
    Ok(report)
}

/// The listeners of all connections that were accepted, in the order of acceptance.
pub fn listeners(trace: &str) -> Vec<i64> {
    let mut begun = HashMap::new();
    let mut listeners = Vec::new();
    for line in trace.lines() {
        let Some(call) = Call::parse(line).filter(|call| call.name == "accept4") else { continue };
        let thread = line.split(char::is_whitespace).next();
        if let Some(&listener) = call.arguments.first() {
            begun.insert(thread, listener);
        }
        if call.result.is_some_and(|fd| fd >= 0) {
            listeners.extend(begun.get(&thread));
        }
    }
    listeners
}

/// One line of a trace: a call's beginning, its end, or both.
struct Call<'a> {
    name: &'a str,
    /// Those that are plain numbers, up to the first that is not.
    arguments: Vec<i64>,
    result: Option<i64>,
}

impl<'a> Call<'a> {
    /// The lines look like `PID name(1, ...) = 2`, `PID name(1, <unfinished ...>` and `PID <... name resumed>...) = 2`.
    fn parse(line: &'a str) -> Option<Self> {
        let (pid, rest) = line.split_once(char::is_whitespace)?;
        pid.parse::<u32>().ok()?;
        let rest = rest.trim_start();
        let result = rest.rsplit_once(" = ").and_then(|(_, result)| result.split(' ').next()?.parse().ok());
        if let Some(resumed) = rest.strip_prefix("<... ") {
            let name = resumed.split(' ').next()?;
            // The beginning, with the arguments, was a line of its own.
            return Some(Self { name, arguments: Vec::new(), result });
        }
        let (name, arguments) = rest.split_once('(')?;
        let number = |argument: &str| argument.trim().trim_end_matches(')').split(')').next()?.parse().ok();
        let arguments = arguments.split(',').map_while(number).collect();
        Some(Self { name, arguments, result })
    }

    fn sockets(&self) -> Vec<i64> {
        match self.name {
            // sendfile(out, in, …)
            "sendfile" => self.arguments.get(1).copied().into_iter().collect(),
            _ => self.arguments.first().copied().into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_of_clients_are_found_and_others_not() {
        let trace = "\
1 accept4(5, {sa_family=AF_INET, sin_port=htons(1), sin_addr=inet_addr(\"224.0.0.1\")}, [16], SOCK_CLOEXEC) = 9
1 recvmsg(7, {msg_name=NULL}, 0) = 10
1 recvfrom(9, \"GET\", 3, MSG_PEEK, NULL, NULL) = 3
1 close(9)                          = 0
1 recvfrom(9, \"x\", 1, 0, NULL, NULL) = 1
1 accept4(5,  <unfinished ...>
2 read(3, \"a\", 1) = 1
1 <... accept4 resumed>NULL, NULL, SOCK_CLOEXEC) = 10
1 accept4(5, NULL, NULL, SOCK_CLOEXEC) = -1 EAGAIN (Resource temporarily unavailable)
2 splice(10, NULL, 4, NULL, 100, 0 <unfinished ...>
2 <... splice resumed>) = 5
1 close_range(8, 12, 0) = 0
1 read(10, \"\", 1) = 0
+++ exited with 0 +++
";
        let report = report(trace).unwrap();
        assert_eq!(report.accepted, 2);
        assert_eq!(report.reads.len(), 2, "{report:?}");
        assert_eq!(listeners(trace), [5, 5]);
        assert!(super::report("1 io_uring_setup(8, {}) = 4\n").is_err());
    }
}
