//! The load generator's process, as the benchmark drives it.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::interrupt::{self, Awaited};
use crate::load::{
    self,
    order::{Order, Seen},
};

use super::process;

pub struct Loader {
    child: Child,
    // Its end is what ends the process.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    _awaited: Option<Awaited>,
}

impl Loader {
    pub fn start(programs: &Path, order: &Order) -> Result<Self> {
        interrupt::check()?;
        let mut command = Command::new(programs.join("xtask"));
        command.arg("load").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = process::spawn(&mut command)?;
        let awaited = Awaited::new(child.id() as i32);
        let mut input = child.stdin.take().context("the load generator has no input")?;
        let output = child.stdout.take().context("the load generator has no output")?;
        let mut order = serde_json::to_vec(order)?;
        order.push(b'\n');
        input.write_all(&order).context("cannot give the load generator its order")?;
        Ok(Self { child, input: Some(input), output: BufReader::new(output), _awaited: Some(awaited) })
    }

    pub fn id(&self) -> i32 {
        self.child.id() as i32
    }

    /// Returns when the measured time begins.
    pub fn begin(&mut self) -> Result<()> {
        let line = self.line()?;
        if line != load::BEGIN {
            bail!("the load generator said {line:?} instead of beginning");
        }
        Ok(())
    }

    /// Waits for what it saw; it then idles until this is dropped.
    pub fn seen(&mut self) -> Result<Seen> {
        let line = self.line()?;
        serde_json::from_str(&line).context("what the load generator saw")
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            interrupt::check()?;
            bail!("the load generator has ended; its reason stands above");
        }
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        drop(self.input.take());
        process::end(&mut self.child);
    }
}
