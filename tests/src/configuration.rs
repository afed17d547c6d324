//! Changes to the configuration file of a running stack.
use std::{fs, path::Path};

use nix::sys::signal::Signal;

use crate::{Stack, eventually};

/// The configuration file of a stack, as text that is changed and put in the place of the former one.
pub struct Configuration {
    path: std::path::PathBuf,
}

impl Configuration {
    pub fn of(stack: &Stack) -> Self {
        Self { path: stack.config_path().to_owned() }
    }

    pub fn text(&self) -> String {
        fs::read_to_string(&self.path).expect("reading the configuration")
    }

    /// Puts another text there as editors do, at once.
    pub fn replace(&self, text: &str) {
        let new = self.path.with_extension("new");
        fs::write(&new, text).expect("writing the configuration");
        fs::rename(&new, &self.path).expect("replacing the configuration");
    }

    /// Appends lines to a function's table.
    pub fn add_to(&self, function: &str, lines: &str) {
        self.replace(&with_lines(&self.text(), function, lines));
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The text with lines at the end of a function's table.
pub fn with_lines(text: &str, function: &str, lines: &str) -> String {
    let (before, table, after) = split(text, function);
    format!("{before}{}\n{lines}\n{after}", table.trim_end())
}

/// The text without a function.
pub fn without(text: &str, function: &str) -> String {
    let (before, _, after) = split(text, function);
    format!("{before}{after}")
}

/// What stands before a function's table, the table, what stands behind it.
fn split<'a>(text: &'a str, function: &str) -> (&'a str, &'a str, &'a str) {
    let start = text.find(&format!("[functions.{function}]")).expect("the function is configured");
    let header = start + 1;
    let end = text[header..].find("\n[").map_or(text.len(), |end| header + end + 1);
    (&text[..start], &text[start..end], &text[end..])
}

/// Has the supervisor follow the configuration, and waits until none of the processes of before serves this program.
pub fn redeploy(stack: &mut Stack, program: &str) {
    let before = stack.processes_of(program);
    stack.supervisor().signal(Signal::SIGHUP);
    until_gone(stack, program, &before);
}

/// Waits until others than these processes serve a program.
pub fn until_gone(stack: &mut Stack, program: &str, before: &[i32]) {
    eventually("other processes to serve", || {
        let now = stack.processes_of(program);
        (!now.is_empty() && now.iter().all(|pid| !before.contains(pid))).then_some(())
    });
}

/// Has the stack's processes read their configuration again.
pub fn reload(stack: &mut Stack) {
    stack.supervisor().signal(Signal::SIGHUP);
    stack.gateway().signal(Signal::SIGHUP);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_changed_and_taken_out() {
        let text = "[gateway]\n\n[functions.a]\nx = [1]\n\n[functions.b]\ny = 2\n";
        assert_eq!(without(text, "a"), "[gateway]\n\n[functions.b]\ny = 2\n");
        assert_eq!(without(text, "b"), "[gateway]\n\n[functions.a]\nx = [1]\n\n");
        let more = with_lines(text, "a", "z = 3");
        assert_eq!(more, "[gateway]\n\n[functions.a]\nx = [1]\nz = 3\n[functions.b]\ny = 2\n");
    }
}
