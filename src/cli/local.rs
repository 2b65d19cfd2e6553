//! Asks a process of this machine or container over its Unix socket.

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::time::Duration;

use reqwest::{Client, Method, StatusCode};

use super::Failure;

/// The status and the text of the answer. `whose` says whose socket is to be named, where nobody answers.
pub fn ask(socket: &Path, method: Method, path: &str, limit: Duration, whose: &str) -> Result<(StatusCode, String), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| unasked(socket, whose, &error))?;
    runtime.block_on(exchange(socket, method, path, limit, whose))
}

/// As [`ask`], within a runtime.
pub async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    limit: Duration,
    whose: &str,
) -> Result<(StatusCode, String), Failure> {
    let exchange = async {
        // The image may have no certificates, without which the usual verifier does not start.
        let client = Client::builder().no_proxy().tls_certs_only([]).unix_socket(socket).timeout(limit).build()?;
        let response = client.request(method, format!("http://local{path}")).send().await?;
        let status = response.status();
        Ok::<_, reqwest::Error>((status, response.text().await?))
    };
    exchange.await.map_err(|error| unasked(socket, whose, &innermost(&error)))
}

fn unasked(socket: &Path, whose: &str, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(format!("{}: {error}", socket.display()), format!("name the socket of {whose} with --socket"))
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

/// Any bytes as a value in a request line.
pub fn percent_encoded(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~:/".contains(byte) {
            text.push(char::from(*byte));
        } else {
            // Writing to a text cannot fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_key_fits_a_request_line() {
        assert_eq!(percent_encoded(b"user:42/a.b"), "user:42/a.b");
        assert_eq!(percent_encoded("a b&c=%+#\u{e9}\n\0".as_bytes()), "a%20b%26c%3D%25%2B%23%C3%A9%0A%00");
    }
}
