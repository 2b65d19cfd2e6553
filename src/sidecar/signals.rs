//! The signals by which a process of the data plane is told to end.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Holds true after the first SIGTERM or SIGINT. Fails where the system lets none be waited for.
pub fn stop_on_signals() -> io::Result<watch::Receiver<bool>> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        sender.send_replace(true);
        // The others watch this channel to the end of the process.
        sender.closed().await;
    });
    Ok(receiver)
}
