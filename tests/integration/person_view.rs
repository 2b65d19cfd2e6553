//! What a person asks on the command line: `larder status`, `larder explain`, `larderd explain`, completion, and `kubectl larder`.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::server::{Engine, SentinelCluster, free_port};
use crate::support::sidecar::{Sidecar, sentinel_topology};

/// What stands for an API server: it answers each path by what `answer` makes of it. Returns its port.
fn api_server(answer: impl Fn(&str) -> (u16, Value) + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let lines: Vec<String> =
                BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            let path = lines.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_owned();
            let (status, body) = answer(&path);
            let body = body.to_string();
            let head =
                format!("HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: ");
            let _ = write!(stream, "{head}{}\r\n\r\n{body}", body.len());
        }
    });
    port
}

/// A directory with a kubeconfig `config` whose contexts `c`, in namespace `shop`, and `other` lead to this port.
fn kubeconfig(port: u16) -> TempDir {
    let directory = TempDir::new().expect("a temporary directory");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://127.0.0.1:{port}")}}],
        "contexts": [
            {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "shop"}},
            {"name": "other", "context": {"cluster": "c", "user": "u", "namespace": "elsewhere"}},
        ],
        "users": [{"name": "u", "user": {"token": "t"}}],
    });
    fs::write(directory.path().join("config"), config.to_string()).expect("the directory is writable");
    directory
}

fn larder(arguments: &[&str], config: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
    command.args(arguments).env("KUBECONFIG", config).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.output().expect("larder runs")
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Whether it failed with this code, these words, and a next step.
#[track_caller]
fn fails(output: &Output, code: i32, words: &[&str]) {
    let told = err(output);
    assert_eq!(output.status.code(), Some(code), "{told}{}", out(output));
    assert!(told.starts_with("error: ") && told.contains("\n  next: "), "{told}");
    for words in words {
        assert!(told.contains(words), "{words} in {told}");
    }
}

fn condition(kind: &str, status: &str, reason: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": "do this", "lastTransitionTime": "2026-01-01T00:00:00Z"})
}

fn object(kind: &str, name: &str, spec: Value, status: Value) -> Value {
    json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": kind, "metadata": {"namespace": "shop", "name": name, "generation": 1},
        "spec": spec, "status": status,
    })
}

fn list(kind: &str, items: &[Value]) -> (u16, Value) {
    (200, json!({"apiVersion": "larder.dev/v1alpha1", "kind": format!("{kind}List"), "metadata": {}, "items": items}))
}

/// Two CacheClusters and a CachePolicy in namespace `shop`; the second is broken.
fn objects(path: &str) -> (u16, Value) {
    let spec = json!({"engine": {"kind": "Valkey", "version": "8.1"}});
    let well = json!({"conditions": [condition("Ready", "True", "Serving")], "summary": "Ready",
        "servers": {"primary": "main-0-1", "ready": "2/2", "updated": "2/2"}, "sentinels": {"ready": "3/3", "updated": "3/3"}});
    let broken = json!({"conditions": [condition("Ready", "False", "NoPrimary")], "summary": "Not serving"});
    let policy = json!({"conditions": [condition("Accepted", "True", "Accepted")], "workloads": 1, "hitRatio": 0.991,
        "sidecars": {"current": 2, "total": 2}, "originLoadSaved": 0.9});
    let clusters = [object("CacheCluster", "main", spec.clone(), well), object("CacheCluster", "old", spec, broken)];
    let policies = [object("CachePolicy", "catalog", json!({"cacheCluster": "main"}), policy)];
    let named = path.split("metadata.name%3D").nth(1).map(|rest| rest.split('&').next().unwrap_or_default());
    let wanted = |objects: &[Value]| -> Vec<Value> {
        objects.iter().filter(|object| named.is_none_or(|name| object["metadata"]["name"] == name)).cloned().collect()
    };
    match path.split('?').next().unwrap_or_default() {
        "/apis/larder.dev/v1alpha1/namespaces/shop/cacheclusters" | "/apis/larder.dev/v1alpha1/cacheclusters" => {
            list("CacheCluster", &wanted(&clusters))
        }
        "/apis/larder.dev/v1alpha1/namespaces/shop/cachepolicies" | "/apis/larder.dev/v1alpha1/cachepolicies" => {
            list("CachePolicy", &wanted(&policies))
        }
        "/apis/larder.dev/v1alpha1/namespaces/elsewhere/cacheclusters" => list("CacheCluster", &[]),
        "/apis/larder.dev/v1alpha1/namespaces/elsewhere/cachepolicies" => list("CachePolicy", &[]),
        other => (
            404,
            json!({"kind": "Status", "apiVersion": "v1", "message": format!("no {other}"), "reason": "NotFound", "code": 404}),
        ),
    }
}

#[test]
fn status_tells_what_is_not_well_first_and_by_its_exit_code() {
    let directory = kubeconfig(api_server(objects));
    let config = directory.path().join("config");
    let output = larder(&["status"], &config);
    let shown = out(&output);
    assert_eq!(output.status.code(), Some(1), "{shown}{}", err(&output));
    let lines: Vec<&str> = shown.lines().collect();
    assert!(lines[1].starts_with("!  old") && lines[2].contains("Ready=False NoPrimary: do this"), "{shown}");
    assert!(lines[3].contains("main-0-1") && lines[3].contains("2/2") && lines[3].ends_with("Valkey 8.1"), "{shown}");
    assert!(shown.contains("99.1 %") && shown.contains("90.0 %"), "{shown}");
    assert!(shown.ends_with("not well: 1 of 2 CacheClusters, 0 of 1 CachePolicy\n"), "{shown}");
    assert!(!shown.contains('\x1b'), "colours only on a terminal: {shown}");

    let output = larder(&["status", "main"], &config);
    assert!(
        output.status.success() && out(&output).ends_with("all is well: 1 CacheCluster, 0 CachePolicies\n"),
        "{}",
        out(&output)
    );
    let output = larder(&["status", "--context", "other"], &config);
    assert!(output.status.success() && out(&output).starts_with("nothing is there"), "{}", out(&output));
    let output = larder(&["status", "-A", "--output", "json"], &config);
    assert_eq!(output.status.code(), Some(1));
    let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&json["well"], &json["clusters"][0]["name"], &json["clusters"][1]["well"]),
        (&json!(false), &json!("old"), &json!(true))
    );
    assert_eq!(json["clusters"][0]["findings"][0]["reason"], "NoPrimary");
    let output = larder(&["status", "-A", "-o", "yaml"], &config);
    assert!(out(&output).contains("reason: NoPrimary") && output.status.code() == Some(1), "{}", out(&output));
}

#[test]
fn status_that_cannot_be_told_says_what_to_do() {
    let directory = kubeconfig(api_server(objects));
    let config = directory.path().join("config");
    fails(
        &larder(&["status", "nowhere"], &config),
        2,
        &["there is no CacheCluster and no CachePolicy `nowhere` in namespace shop", "-A"],
    );
    fails(&larder(&["status", "-n", "bare"], &config), 2, &["knows no cacheclusters", "larder crds | kubectl apply"]);
    fails(&larder(&["status", "--context", "gone"], &config), 2, &["no API server is known", "gone", "--context"]);
    fails(&larder(&["status", "--kubeconfig", "no-such-file"], &config), 2, &["no API server is known", "--kubeconfig"]);
    for wrong in [&["status", "-n", "a", "-A"][..], &["status", "A,B"], &["status", "--output", "xml"]] {
        assert_eq!(larder(wrong, &config).status.code(), Some(2), "{wrong:?}");
    }
    let directory = kubeconfig(free_port());
    fails(&larder(&["status"], &directory.path().join("config")), 2, &["the list of cacheclusters failed", "cannot be reached"]);
    let forbidden =
        |_: &str| (403, json!({"kind": "Status", "apiVersion": "v1", "message": "not you", "reason": "Forbidden", "code": 403}));
    let directory = kubeconfig(api_server(forbidden));
    fails(&larder(&["status"], &directory.path().join("config")), 2, &["not you", "Role"]);
}

#[test]
fn a_slow_answer_is_waited_for_in_the_open() {
    let slow = |path: &str| {
        thread::sleep(Duration::from_millis(1500));
        objects(path)
    };
    let directory = kubeconfig(api_server(slow));
    let output = larder(&["status", "main"], &directory.path().join("config"));
    assert!(output.status.success(), "{}", err(&output));
    assert!(err(&output).contains("waiting for the API server: cacheclusters\n"), "{}", err(&output));
}

#[test]
fn help_has_examples_and_exit_codes() {
    for command in ["status", "explain"] {
        let output = larder(&[command, "--help"], Path::new("none"));
        let help = out(&output);
        assert!(output.status.success() && help.contains("Examples:") && help.contains("Exit codes"), "{help}");
        assert!(help.contains("--kubeconfig <FILE>") && help.contains("--namespace <NAME>"), "{help}");
    }
    assert!(out(&larder(&["completion", "--help"], Path::new("none"))).contains("Examples:"));
    assert!(!out(&larder(&["--help"], Path::new("none"))).contains("complete-words"));
}

#[test]
fn a_key_is_explained_from_manifests_alone() {
    let explain = |arguments: &[&str]| larder(&[&["explain"], arguments].concat(), Path::new("none"));
    let output = explain(&["cart:ann", "--file", "examples/first-policy"]);
    let shown = out(&output);
    assert!(output.status.success(), "{}", err(&output));
    for words in ["policy    shop", "rule      cart: cart:{user}", "where user = ann", "strategy  CacheAside", "ttl       30m"] {
        assert!(shown.contains(words), "{words} in {shown}");
    }
    let output = explain(&["queue:mail", "--file", "examples/first-policy", "--output", "json"]);
    let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&json["strategy"], &json["policy"]), (&json!("Bypass"), &json!("shop")), "{json}");
    let output = explain(&["user:42", "-f", "examples/read-through-sql", "-o", "yaml"]);
    assert!(out(&output).contains("WHERE id = $id") && !out(&output).contains("sqlite:"), "{}", out(&output));

    fails(&explain(&["a", "--file", "no-such-file.yaml"]), 2, &["it cannot be read", "larder check"]);
    fails(&explain(&["a", "--file", "examples/first-policy/cache.yaml"]), 2, &["hold no CachePolicy"]);
    fails(
        &explain(&["a", "--file", "examples/first-policy", "-n", "other"]),
        1,
        &["no CachePolicy of namespace other", "matchLabels"],
    );
    for wrong in [&["a"][..], &["a", "--workload", "shop"], &["a", "--workload", "service/shop"]] {
        let output = explain(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
    }
    assert!(err(&explain(&["a", "--workload", "shop"])).contains("KIND/NAME"));
}

fn larderd(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_larderd")).args(arguments).output().expect("larderd runs")
}

#[test]
fn a_sidecar_tells_its_policy_its_keys_and_what_is_hot() {
    let servers = SentinelCluster::start(Engine::Redis7, 0);
    let ttl = json!({"default": "10m", "max": "1h", "jitter": "0%"});
    let snapshot = json!({
        "version": 1, "requires": 1, "generation": 9, "cluster": sentinel_topology(&servers), "unmatched": {"bypass": {}},
        "rules": [{"name": "user", "keys": "user:{id}", "strategy": {"cacheAside": {"ttl": ttl}}}],
    });
    let directory = TempDir::new().expect("a temporary directory");
    let socket = directory.path().join("admin.sock").display().to_string();
    let sidecar = Sidecar::start_with(&snapshot, &["--admin-socket", &socket]);
    let ask = |arguments: &[&str]| larderd(&[&["explain", "--socket", &socket], arguments].concat());
    let told = |output: &Output| -> Value {
        assert!(output.status.success(), "{}", err(output));
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    let explained = told(&ask(&["user:4 2&"]));
    assert_eq!(
        (&explained["key"], &explained["rule"], &explained["parts"]["id"]),
        (&json!("user:4 2&"), &json!("user"), &json!("4 2&"))
    );
    assert_eq!((&explained["generation"], &explained["way"]), (&json!(9), &json!("file")), "{explained}");
    assert_eq!(told(&ask(&["other"]))["strategy"], "Bypass");
    assert_eq!(told(&ask(&[]))["policy"]["rules"][0]["name"], "user");

    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let mut client = sidecar.client();
    let load = thread::spawn(move || {
        while is_done.try_recv().is_err() {
            client.line("GET user:hot");
            client.line("MGET user:hot other");
        }
    });
    let hot = told(&ask(&["--hot", "1"]));
    done.send(()).expect("the load goes on");
    load.join().expect("the load ends");
    let keys = hot["keys"].as_array().expect("keys");
    assert_eq!((&keys[0]["key"], &keys[0]["rule"]), (&json!("user:hot"), &json!("user")), "{hot}");
    assert_eq!((&keys[1]["key"], &keys[1]["rule"]), (&json!("other"), &json!(null)), "{hot}");
    let count = |at: usize| keys[at]["count"].as_u64().expect("a count");
    assert!(count(0) > count(1) && count(0) + count(1) == hot["total"].as_u64().expect("a total"), "{hot}");

    let output = larderd(&["explain", "--socket", "/no/such.sock", "a"]);
    fails(&output, 1, &["/no/such.sock", "--socket"]);
    assert_eq!(ask(&["a", "--hot", "1"]).status.code(), Some(2));
}

/// A directory with `larder` and `kubectl-larder` in it.
fn path_with_larder() -> TempDir {
    let directory = TempDir::new().expect("a temporary directory");
    for name in ["larder", "kubectl-larder"] {
        symlink(env!("CARGO_BIN_EXE_larder"), directory.path().join(name)).expect("a link");
    }
    directory
}

fn with_path(directory: &Path, program: &str, arguments: &[&str]) -> Output {
    let path = format!("{}:{}", directory.display(), std::env::var("PATH").unwrap_or_default());
    Command::new(program).args(arguments).env("PATH", path).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

#[test]
fn under_kubectls_name_it_speaks_as_a_plugin() {
    let directory = path_with_larder();
    let plugin = directory.path().join("kubectl-larder");
    let help = out(&with_path(directory.path(), &plugin.to_string_lossy(), &["status", "--help"]));
    assert!(help.contains("Usage: kubectl larder status"), "{help}");
    let help = out(&with_path(directory.path(), "larder", &["status", "--help"]));
    assert!(help.contains("Usage: larder status"), "{help}");
    let output = with_path(directory.path(), &plugin.to_string_lossy(), &["stauts"]);
    assert!(output.status.code() == Some(2) && err(&output).contains("Usage: kubectl larder"), "{}", err(&output));
}

#[test]
fn shells_complete_what_there_is() {
    let directory = path_with_larder();
    let completed = |words: &str, at: usize| {
        let script = format!(
            "source <(larder completion bash); COMP_WORDS=({words}); COMP_CWORD={at}; _larder; echo \"${{COMPREPLY[*]}}\""
        );
        let output = with_path(directory.path(), "bash", &["-c", &script]);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", err(&output));
        out(&output).trim().to_owned()
    };
    assert_eq!(completed("larder sta", 1), "status");
    assert_eq!(completed("larder status --output ''", 3), "table json yaml");
    assert_eq!(completed("larder status --output = y", 4), "yaml");
    assert_eq!(completed("larder check fi", 2), "");
    let script = directory.path().join("kubectl_complete-larder");
    let output = with_path(directory.path(), "larder", &["completion", "kubectl"]);
    fs::write(&script, &output.stdout).expect("the directory is writable");
    let output = with_path(directory.path(), "sh", &[&script.to_string_lossy(), "status", "--kubec"]);
    let told = out(&output);
    let lines: Vec<&str> = told.lines().collect();
    assert!(lines[0].starts_with("--kubeconfig\t") && lines[1..] == [":0"], "{told}");
    for shell in ["zsh", "fish"] {
        let script = out(&with_path(directory.path(), "larder", &["completion", shell]));
        assert!(script.contains("complete-words --"), "{script}");
    }
}
