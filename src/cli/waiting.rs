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
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.set_message(format!("waiting for {what}"));
    spinner.enable_steady_tick(Duration::from_millis(100));
    let value = future.await;
    spinner.finish_and_clear();
    value
}
