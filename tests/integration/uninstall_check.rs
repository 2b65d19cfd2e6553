//! `larder uninstall-check` against API servers that do not answer, or refuse.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::process::Command;
use std::thread;

use crate::support::server::free_port;

/// What it writes where the API server is on this port, and whether it refuses.
fn check_against(port: u16) -> (bool, String) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let kubeconfig = directory.path().join("config");
    let text = format!(
        "{{apiVersion: v1, kind: Config, current-context: c, clusters: [{{name: c, cluster: {{server: 'http://127.0.0.1:{port}'}}}}], \
         contexts: [{{name: c, context: {{cluster: c, user: u}}}}], users: [{{name: u, user: {{token: t}}}}]}}"
    );
    fs::write(&kubeconfig, text).expect("the directory is writable");
    let output = Command::new(env!("CARGO_BIN_EXE_larder"))
        .args(["uninstall-check", "--watch-namespaces", "shop"])
        .env("KUBECONFIG", &kubeconfig)
        .output()
        .expect("larder runs");
    (!output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn an_api_server_that_cannot_be_reached_is_told_so() {
    let (refused, told) = check_against(free_port());
    assert!(refused && told.contains("cannot be reached"), "{told}");
    assert!(told.to_lowercase().contains("connection refused"), "{told}");
    assert!(!told.contains("Role") && !told.contains("may list"), "it speaks of rights: {told}");
    assert!(!told.contains("failed with"), "the client library repeats it: {told}");
}

#[test]
fn a_right_that_lacks_is_told_so() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let lines = BufReader::new(&stream).lines().map_while(Result::ok);
            lines.take_while(|line| !line.is_empty()).for_each(drop);
            let body = r#"{"kind":"Status","apiVersion":"v1","status":"Failure","message":"no list of those","reason":"Forbidden","code":403}"#;
            let head = "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: ";
            let _ = write!(stream, "{head}{}\r\n\r\n{body}", body.len());
        }
    });
    let (refused, told) = check_against(port);
    assert!(refused && told.contains("no list of those") && told.contains("Role"), "{told}");
    assert!(!told.contains("cannot be reached"), "{told}");
}
