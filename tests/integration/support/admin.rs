//! Questions to a sidecar's admin port.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use super::sidecar::Sidecar;

/// The status and the body of a GET.
pub fn get(sidecar: &Sidecar, path: &str) -> (u16, String) {
    get_at(sidecar.admin_port(), path)
}

/// [`get`] at a port.
pub fn get_at(port: u16, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the admin port accepts");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    let request = format!("GET {path} HTTP/1.1\r\nHost: sidecar\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("the admin server reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("the admin server answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, body.to_owned())
}

/// One line of /metrics, such as `larder_rule_hits_total{rule="item"}`. Zero where there is none.
pub fn metric(sidecar: &Sidecar, line: &str) -> u64 {
    let (status, body) = get(sidecar, "/metrics");
    assert_eq!(status, 200, "{body}");
    let value = body.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(' '));
    value.map_or(0, |value| value.trim().parse().expect("a number"))
}

/// One of a rule's counters, such as `hits`.
pub fn rule_count(sidecar: &Sidecar, rule: &str, counter: &str) -> u64 {
    metric(sidecar, &format!("larder_rule_{counter}_total{{rule=\"{rule}\"}}"))
}
