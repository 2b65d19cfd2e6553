//! What the user sees while the demo runs: a live line on a terminal, plain lines elsewhere.

use std::io::{self, IsTerminal, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::load::Live;
use super::phases::Kind;
use super::records::Recorder;

/// How often a terminal is refreshed.
const REFRESH: Duration = Duration::from_millis(250);
/// How often a plain line is written.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shows the counters of the running load.
pub struct Display {
    live: Arc<Live>,
    recorder: Arc<Recorder>,
    running: Mutex<Option<Running>>,
}

struct Running {
    done: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Display {
    /// A display of these counters.
    pub fn new(live: Arc<Live>, recorder: Arc<Recorder>) -> Self {
        Self { live, recorder, running: Mutex::new(None) }
    }

    /// Writes lines that stay.
    pub fn say(&self, text: &str) {
        say(text);
    }

    /// Begins to show a load of this length, with its counters at zero.
    pub fn begin(&self, kind: Kind, what: &str, length: Duration) {
        self.end();
        self.live.answered.store(0, Ordering::Relaxed);
        self.live.errors.store(0, Ordering::Relaxed);
        let done = Arc::new(AtomicBool::new(false));
        let view = View {
            title: format!("{kind:<12} {what:<11}"),
            length,
            live: Arc::clone(&self.live),
            recorder: Arc::clone(&self.recorder),
            done: Arc::clone(&done),
        };
        // A display that cannot have a thread is not worth failing for.
        let thread = thread::Builder::new().name("display".to_owned()).spawn(move || view.show());
        *self.lock() = thread.ok().map(|thread| Running { done, thread });
    }

    /// Ends the live line, which stays with its last figures.
    pub fn end(&self) {
        if let Some(running) = self.lock().take() {
            running.done.store(true, Ordering::Relaxed);
            let _ = running.thread.join();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.end();
    }
}

fn say(text: &str) {
    // Where standard output is gone, the report is still written.
    let _ = writeln!(io::stdout().lock(), "{text}");
}

struct View {
    title: String,
    length: Duration,
    live: Arc<Live>,
    recorder: Arc<Recorder>,
    done: Arc<AtomicBool>,
}

impl View {
    fn show(&self) {
        let start = Instant::now();
        if io::stdout().is_terminal() { self.show_bar(start) } else { self.show_lines(start) }
    }

    fn show_bar(&self, start: Instant) {
        let bar = ProgressBar::new(self.length.as_millis() as u64);
        if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:24.cyan/blue} {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(self.title.clone());
        loop {
            let done = self.done.load(Ordering::Relaxed);
            bar.set_position((start.elapsed().as_millis() as u64).min(self.length.as_millis() as u64));
            bar.set_message(self.figures(start));
            if done {
                break;
            }
            thread::sleep(REFRESH);
        }
        bar.abandon();
    }

    fn show_lines(&self, start: Instant) {
        let mut next = start + LINE_INTERVAL;
        while !self.done.load(Ordering::Relaxed) {
            if Instant::now() >= next {
                say(&format!("{} {:>4.0} s  {}", self.title, start.elapsed().as_secs_f64(), self.figures(start)));
                next += LINE_INTERVAL;
            }
            thread::sleep(REFRESH / 5);
        }
        say(&format!("{} {:>4.0} s  {}", self.title, start.elapsed().as_secs_f64(), self.figures(start)));
    }

    fn figures(&self, start: Instant) -> String {
        let answered = self.live.answered.load(Ordering::Relaxed);
        let errors = self.live.errors.load(Ordering::Relaxed);
        let rate = answered as f64 / start.elapsed().as_secs_f64().max(0.001);
        let trouble = if errors > 0 { format!(", {errors} errors") } else { String::new() };
        format!("{answered:>7} answered, {rate:>7.0} a second, {:>5} queries{trouble}", self.recorder.begun())
    }
}
