//! Logs: one line an event, on standard error.

use std::io::{self, IsTerminal as _};
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// How a line is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    #[default]
    Text,
    /// For machines: one JSON object a line.
    Json,
}

/// Why logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not one.
    #[error("`{0}` is no log filter: write a level such as info, or info,larder::sidecar=debug")]
    Filter(String),
}

/// What [`init`] was called with first.
static CHOSEN: OnceLock<(LogFormat, String)> = OnceLock::new();

/// Events of libraries that only repeat what this program tells of itself, with what to do: each failed request to an API server.
const REPEATED: &str = "kube_client::client::builder=off,kube_runtime::watcher=error";

/// The filter with what others only repeat left out, unless it speaks of them.
fn without_repetition(filter: &str) -> String {
    if filter.contains("kube_") { filter.to_owned() } else { format!("{filter},{REPEATED}") }
}

/// Sends events that pass `filter` (such as `info`, or `info,larder::sidecar=debug`) to standard error from now on. A second call in
/// one process changes nothing.
pub fn init(format: LogFormat, filter: &str, colours: bool) -> Result<(), LogError> {
    let _ = CHOSEN.set((format, filter.to_owned()));
    let filter = EnvFilter::try_new(without_repetition(filter)).map_err(|_| LogError::Filter(filter.to_owned()))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(BoxMakeWriter::new(io::stderr));
    // An error here means that a subscriber is set already.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(colours).with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
    };
    Ok(())
}

/// The format and the filter that this process logs by, for processes that it starts. `None` before [`init`].
pub fn chosen() -> Option<(LogFormat, &'static str)> {
    CHOSEN.get().map(|(format, filter)| (*format, filter.as_str()))
}

/// Whether standard error is a terminal whose user wants colours.
pub fn colours_on_stderr() -> bool {
    io::stderr().is_terminal() && colours_wanted()
}

/// Whether the user's environment wants colours: see no-color.org.
pub fn colours_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_filter_says_what_to_write() {
        let error = init(LogFormat::Text, "larder=loud", false).expect_err("not a level").to_string();
        assert!(error.contains("larder=loud") && error.contains("info"), "{error}");
    }
}
