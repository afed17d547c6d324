//! `pointsman top`: a gateway and its functions, as they change.
use std::{
    io::{self, IsTerminal as _, Write as _},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use ratatui::{
    DefaultTerminal, Terminal,
    backend::TestBackend,
    buffer::Buffer,
    crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
};
use tokio::{
    runtime::{self, Runtime},
    signal::unix::{Signal, SignalKind, signal},
    time::{sleep, timeout},
};

use super::frame::View;
use crate::admin::{client, report::Report};

/// The usual terminal.
const WIDTH: u16 = 80;

/// How soon a signal is heard while nobody touches a key.
const SIGNAL_POLL: Duration = Duration::from_millis(100);

/// Shows a gateway until `q`, a signal or an error of the terminal; `once` prints one frame instead.
pub fn run(address: SocketAddr, interval: Duration, once: bool) -> Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let first = Look { report: runtime.block_on(client::fetch(address))?, at: Instant::now() };
    if once {
        runtime.block_on(async { sleep(interval).await });
        let second = Look { report: runtime.block_on(client::fetch(address))?, at: Instant::now() };
        return print(&second.since(&first, None, 0));
    }
    ensure!(io::stdout().is_terminal(), "top needs a terminal; --once prints one frame without one");
    let terminate = {
        let _inside = runtime.enter();
        signal(SignalKind::terminate())?
    };
    // Restores the terminal in a panic as well.
    let mut terminal = ratatui::try_init().context("the terminal can't be used")?;
    let result =
        Top { runtime, address, interval, terminate, before: None, now: first, trouble: None, scroll: 0 }
            .show(&mut terminal);
    let restored = ratatui::try_restore().context("the terminal can't be restored");
    result.and(restored)
}

struct Look {
    report: Report,
    at: Instant,
}

impl Look {
    fn since<'a>(&'a self, before: &'a Self, trouble: Option<&'a str>, scroll: usize) -> View<'a> {
        View { now: &self.report, before: Some((&before.report, self.at - before.at)), trouble, scroll }
    }
}

struct Top {
    runtime: Runtime,
    address: SocketAddr,
    interval: Duration,
    terminate: Signal,
    before: Option<Look>,
    now: Look,
    trouble: Option<String>,
    scroll: usize,
}

/// What a person or a signal wants.
enum Wish {
    Nothing,
    Redraw,
    Quit,
}

impl Top {
    fn show(&mut self, terminal: &mut DefaultTerminal) -> Result<()> {
        loop {
            self.draw(terminal)?;
            let next = Instant::now() + self.interval;
            while let Some(left) = next.checked_duration_since(Instant::now()) {
                match self.wish(left.min(SIGNAL_POLL))? {
                    Wish::Nothing => {}
                    Wish::Redraw => self.draw(terminal)?,
                    Wish::Quit => return Ok(()),
                }
            }
            self.look();
        }
    }

    fn draw(&mut self, terminal: &mut DefaultTerminal) -> Result<()> {
        let trouble = self.trouble.as_deref();
        let mut view = match &self.before {
            Some(before) => self.now.since(before, trouble, 0),
            None => View { now: &self.now.report, before: None, trouble, scroll: 0 },
        };
        self.scroll = self.scroll.min(view.rows_count().saturating_sub(1));
        view.scroll = self.scroll;
        terminal.draw(|frame| view.draw(frame))?;
        Ok(())
    }

    /// A gateway that restarts is waited for.
    fn look(&mut self) {
        match self.runtime.block_on(client::fetch(self.address)) {
            Ok(report) => {
                let now = Look { report, at: Instant::now() };
                let same = now.report.pid == self.now.report.pid;
                let before = std::mem::replace(&mut self.now, now);
                // Rates against another process's counts would mean nothing.
                self.before = same.then_some(before);
                self.trouble = None;
            }
            Err(error) => self.trouble = Some(error.to_string()),
        }
    }

    fn wish(&mut self, patience: Duration) -> Result<Wish> {
        let terminate = async { timeout(Duration::ZERO, self.terminate.recv()).await };
        if self.runtime.block_on(terminate).is_ok() {
            return Ok(Wish::Quit);
        }
        if !event::poll(patience)? {
            return Ok(Wish::Nothing);
        }
        Ok(match event::read()? {
            Event::Key(KeyEvent { kind: KeyEventKind::Release, .. }) => Wish::Nothing,
            Event::Key(KeyEvent { code: KeyCode::Char('q') | KeyCode::Esc, .. }) => Wish::Quit,
            Event::Key(KeyEvent { code: KeyCode::Char('c'), modifiers, .. })
                if modifiers.contains(KeyModifiers::CONTROL) =>
            {
                Wish::Quit
            }
            Event::Key(KeyEvent { code: KeyCode::Down, .. }) => {
                self.scroll += 1;
                Wish::Redraw
            }
            Event::Key(KeyEvent { code: KeyCode::Up, .. }) => {
                self.scroll = self.scroll.saturating_sub(1);
                Wish::Redraw
            }
            Event::Resize(..) => Wish::Redraw,
            _ => Wish::Nothing,
        })
    }
}

fn print(view: &View<'_>) -> Result<()> {
    let mut terminal = Terminal::new(TestBackend::new(WIDTH, view.lines()))?;
    terminal.draw(|frame| view.draw(frame))?;
    io::stdout().write_all(text(terminal.backend().buffer()).as_bytes()).context("writing to standard output")
}

fn text(buffer: &Buffer) -> String {
    let mut text = String::new();
    for line in buffer.content.chunks(usize::from(buffer.area.width)) {
        let line: String = line.iter().map(|cell| cell.symbol()).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
