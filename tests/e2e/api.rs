//! Reads of the API server, by way of one `kubectl proxy` for the whole run: states are polled, and a `kubectl` each costs a tenth of a
//! second of processor time.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;

const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// Ends the proxy with these tests, however they end: they hold the other end of its standard input.
const SCRIPT: &str = "kubectl proxy --port=0 --address=127.0.0.1 & read -r nothing; kill $!";

struct Proxy {
    address: String,
    _child: Child,
}

fn proxy() -> &'static Proxy {
    static PROXY: OnceLock<Proxy> = OnceLock::new();
    PROXY.get_or_init(|| {
        let mut command = Command::new("sh");
        command.args(["-c", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("sh runs");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
        // It says no other line: nothing is lost with the pipe.
        let address = line.trim().rsplit(' ').next().unwrap_or_default().to_owned();
        assert!(address.contains(':'), "kubectl proxy said {line:?}");
        Proxy { address, _child: child }
    })
}

/// Where the objects of a kind are.
pub fn path(namespace: &str, kind: &str) -> String {
    let place = format!("namespaces/{namespace}/");
    match kind.trim_end_matches('s') {
        "cachecluster" => format!("/apis/larder.dev/v1alpha1/{place}cacheclusters"),
        "cachepolicy" => format!("/apis/larder.dev/v1alpha1/{place}cachepolicies"),
        "crd" => "/apis/apiextensions.k8s.io/v1/customresourcedefinitions".to_owned(),
        "deployment" => format!("/apis/apps/v1/{place}deployments"),
        "statefulset" => format!("/apis/apps/v1/{place}statefulsets"),
        "endpointslice" => format!("/apis/discovery.k8s.io/v1/{place}endpointslices"),
        core => format!("/api/v1/{place}{core}s"),
    }
}

/// A text as it stands in a query.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

/// What stands there. None where nothing does, or where the API server does not answer: states are polled.
pub fn get(path: &str) -> Option<Value> {
    serde_json::from_str(&text(path)?).ok()
}

/// The same as a text, which what is asked through the API server may answer.
pub fn text(path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(&proxy().address).ok()?;
    stream.set_read_timeout(Some(ANSWER_WITHIN)).ok()?;
    // By HTTP/1.0 the answer ends with the connection.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n\r\n").as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let text = String::from_utf8(answer).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let is_ok = head.split_ascii_whitespace().nth(1) == Some("200");
    is_ok.then(|| body.to_owned())
}
