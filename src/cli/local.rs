//! Asks a process of this machine or container over its Unix socket.

use std::io;
use std::path::Path;
use std::time::Duration;

use reqwest::{Client, Method, StatusCode};

use super::Failure;

/// The status and the text of the answer. `whose` says whose socket is to be named, where nobody answers.
pub fn ask(socket: &Path, method: Method, path: &str, limit: Duration, whose: &str) -> Result<(StatusCode, String), Failure> {
    let fail = |error: &dyn std::fmt::Display| {
        Failure::new(format!("{}: {error}", socket.display()), format!("name the socket of {whose} with --socket"))
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| fail(&error))?;
    let exchange = async {
        // The image may have no certificates, without which the usual verifier does not start.
        let client = Client::builder().no_proxy().tls_certs_only([]).unix_socket(socket).timeout(limit).build()?;
        let response = client.request(method, format!("http://local{path}")).send().await?;
        let status = response.status();
        Ok::<_, reqwest::Error>((status, response.text().await?))
    };
    runtime.block_on(exchange).map_err(|error| fail(&innermost(&error)))
}

/// What lies behind an error of the client, which itself only says that a request failed.
fn innermost(error: &reqwest::Error) -> String {
    let mut deepest: &(dyn std::error::Error + 'static) = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    match deepest.downcast_ref::<io::Error>() {
        Some(cause) if cause.kind() == io::ErrorKind::NotFound => "there is no such socket".to_owned(),
        _ if deepest.to_string() == error.to_string() => error.to_string(),
        _ => format!("{error}: {deepest}"),
    }
}
