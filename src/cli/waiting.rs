//! Says what is waited for, once that takes more than a moment.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::sleep;

/// What takes no longer needs no word.
const MOMENT: Duration = Duration::from_secs(1);

/// Completes with the future. What it waits for is told on standard error after a second: moving on a terminal, else as a line.
pub async fn for_answer<T>(what: &str, future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    tokio::select! {
        biased;
        value = &mut future => return value,
        () = sleep(MOMENT) => {}
    }
    if !io::stderr().is_terminal() {
        // Where standard error is gone, nobody is left to tell.
        let _ = writeln!(io::stderr().lock(), "waiting for {what}");
        return future.await;
    }
    let spinner = spinner(what);
    let value = future.await;
    spinner.finish_and_clear();
    value
}

/// Says how far something is that takes a while: moving on a terminal, else a line whenever it changes.
pub struct Progress {
    spinner: Option<ProgressBar>,
    told: std::cell::RefCell<String>,
}

impl Progress {
    /// Begins with this.
    pub fn begin(what: &str) -> Self {
        let spinner = io::stderr().is_terminal().then(|| spinner(what));
        let progress = Self { spinner, told: std::cell::RefCell::default() };
        progress.tell(what);
        progress
    }

    /// It is as far as that.
    pub fn tell(&self, what: &str) {
        if *self.told.borrow() == what {
            return;
        }
        what.clone_into(&mut self.told.borrow_mut());
        match &self.spinner {
            Some(spinner) => spinner.set_message(format!("waiting for {what}")),
            // Where standard error is gone, nobody is left to tell.
            None => drop(writeln!(io::stderr().lock(), "waiting for {what}")),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }
}

fn spinner(what: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.set_message(format!("waiting for {what}"));
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}
