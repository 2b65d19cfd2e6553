//! What a person sees: `larder status` of objects that the API server keeps, and `larder explain` of a key, asked of a real sidecar's
//! socket. In place of kubectl stands a script that runs here what it is to run in the pod.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::control_plane::User;
use super::process::{Process, free_port};
use super::scene::{Scene, cache_cluster, eventually, restricted};

const SHOP: &str = "shop";
const POD: &str = "shop-6f7c-x";
const AS_MERGE_PATCH: (&str, &str) = ("content-type", "application/merge-patch+json");
const NOW: &str = "2026-01-01T00:00:00Z";

fn larder(scene: &Scene, arguments: &[&str], path: &str) -> Output {
    let mut command = Command::new(PathBuf::from(env!("CARGO_BIN_EXE_larder")));
    command.args(arguments).env("KUBECONFIG", scene.plane.kubeconfig(User::Admin)).env("PATH", path);
    command.output().expect("larder runs")
}

fn told(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn as_json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", told(output)))
}

async fn set_status(scene: &Scene, path: &str, status: Value) {
    let patch = json!({"status": status});
    let (code, text) = scene.plane.request(Method::PATCH, &format!("{path}/status"), &[AS_MERGE_PATCH], Some(&patch)).await;
    assert_eq!(code, 200, "{text}");
}

fn conditions(all: &[(&str, &str, &str)]) -> Value {
    all.iter()
        .map(|(kind, status, reason)| {
            json!({"type": kind, "status": status, "reason": reason, "message": "read this", "lastTransitionTime": NOW,
                "observedGeneration": 1})
        })
        .collect()
}

fn policy(name: &str, labels: Value, rules: Value) -> Value {
    json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"namespace": SHOP, "name": name},
        "spec": {"cacheCluster": "main", "workloads": {"matchLabels": labels}, "rules": rules},
    })
}

fn user_rule(ttl: &str) -> Value {
    json!([{"name": "user", "keys": "user:{id}", "strategy": "CacheAside", "ttl": ttl}])
}

/// A CacheCluster that serves, one that does not, and one that nobody has looked at.
async fn make_clusters(scene: &Scene) {
    for name in ["main", "old", "new"] {
        scene.apply(&cache_cluster(SHOP, name)).await.expect("a CacheCluster");
    }
    let path = |name: &str| format!("/apis/larder.dev/v1alpha1/namespaces/{SHOP}/cacheclusters/{name}");
    let well = [
        ("Accepted", "True", "Accepted"),
        ("Ready", "True", "Serving"),
        ("Progressing", "False", "Settled"),
        ("Degraded", "False", "Healthy"),
    ];
    let servers = json!({"primary": "main-0-0", "ready": "2/2", "updated": "2/2"});
    let sentinels = json!({"ready": "3/3", "updated": "3/3"});
    let status = json!({"observedGeneration": 1, "summary": "Ready", "conditions": conditions(&well), "servers": servers, "sentinels": sentinels});
    set_status(scene, &path("main"), status).await;
    let broken = [("Accepted", "True", "Accepted"), ("Ready", "False", "NoPrimary"), ("Degraded", "True", "ReplicasNotInStep")];
    set_status(
        scene,
        &path("old"),
        json!({"observedGeneration": 1, "summary": "Not serving", "conditions": conditions(&broken)}),
    )
    .await;
}

fn status_tells(scene: &Scene) {
    let output = larder(scene, &["status", "-n", SHOP], "");
    let shown = told(&output);
    assert_eq!(output.status.code(), Some(1), "{shown}");
    let at = |words: &str| shown.find(words).unwrap_or_else(|| panic!("no {words} in {shown}"));
    assert!(at("!  old") < at("Ready=False NoPrimary: read this") && at("Ready=False NoPrimary") < at("   main  "), "{shown}");
    assert!(at("!  new") < at("NotLookedAt") && at("Degraded=True ReplicasNotInStep") < at("   main  "), "{shown}");
    assert!(shown.contains("main-0-0") && shown.contains("Valkey 8.1") && shown.contains("2 of 3 CacheClusters"), "{shown}");

    let output = larder(scene, &["status", "main", "-n", SHOP, "-o", "json"], "");
    let report = as_json(&output);
    assert!(output.status.success(), "{report}");
    assert_eq!(
        (&report["clusters"][0]["inStep"], &report["clusters"][0]["primary"]),
        (&json!("2/2"), &json!("main-0-0")),
        "{report}"
    );
    let report = as_json(&larder(scene, &["status", "catalog", "-A", "-o", "json"], ""));
    let found = &report["policies"][0];
    assert_eq!(
        (&found["cluster"], &found["mode"], &found["sidecars"]),
        (&json!("main"), &json!("Enforce"), &json!("-")),
        "{report}"
    );
    let output = larder(scene, &["status", "-n", "empty"], "");
    assert!(output.status.success() && told(&output).starts_with("nothing is there"), "{}", told(&output));
}

/// A Deployment as written; nothing here would make its pods.
fn deployment() -> Value {
    let labels = json!({"app": "shop"});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"namespace": SHOP, "name": "shop"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [
                {"name": "app", "image": "app:1", "securityContext": restricted()},
            ]}},
        },
    })
}

/// A pod of the Deployment as it runs with its sidecar, whose socket is here.
async fn make_pod(scene: &Scene, socket: &Path) {
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": SHOP}});
    scene.apply(&account).await.expect("an account");
    let container = |name: &str| json!({"name": name, "image": "image:1", "securityContext": restricted()});
    let mut sidecar = container("larder-sidecar");
    sidecar["restartPolicy"] = "Always".into();
    sidecar["command"] = json!([env!("CARGO_BIN_EXE_larderd")]);
    sidecar["args"] = json!(["sidecar", "--admin-socket", socket]);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "namespace": SHOP, "name": POD, "labels": {"app": "shop", "pod-template-hash": "6f7c", "larder.dev/binding": "shop-1f0c8a52de"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "shop-6f7c", "uid": "8d2c", "controller": true}],
        },
        "spec": {"initContainers": [sidecar], "containers": [container("app")]},
    });
    scene.apply(&pod).await.expect("a pod");
    let running = json!({
        "phase": "Running",
        "initContainerStatuses": [{"name": "larder-sidecar", "ready": true, "started": true, "restartCount": 0, "image": "image:1",
            "imageID": "", "state": {"running": {"startedAt": NOW}}}],
    });
    set_status(scene, &format!("/api/v1/namespaces/{SHOP}/pods/{POD}"), running).await;
}

/// A sidecar of a binding under generation 12, whose rule gives another TTL than what is written now; its cache is away.
async fn start_sidecar(scene: &Scene, socket: &Path) -> Process {
    let directory = scene.plane.directory();
    let ttl = json!({"default": "5m", "max": "24h", "jitter": "10%"});
    let snapshot = json!({
        "version": 1, "requires": 1, "generation": 12, "unmatched": {"bypass": {}},
        "cluster": {"name": "main", "topology": {"sentinel": {"master": "main", "sentinels": ["127.0.0.1:1"]}}},
        "rules": [{"name": "user", "keys": "user:{id}", "strategy": {"cacheAside": {"ttl": ttl}}}],
    });
    let file = directory.join("snapshot.json");
    fs::write(&file, snapshot.to_string()).expect("the directory is writable");
    let listen = format!("127.0.0.1:{}", free_port());
    let arguments = ["sidecar", "--binding", "shop-1f0c8a52de", "--listen", &listen, "--snapshot"].map(str::to_owned).to_vec();
    let more = [file.display().to_string(), "--admin-socket".to_owned(), socket.display().to_string()];
    let larderd = Path::new(env!("CARGO_BIN_EXE_larderd"));
    let mut process = Process::start(larderd, &[arguments, more.to_vec()].concat(), &[], &directory.join("sidecar.log"));
    eventually("the sidecar's policy", Duration::from_secs(60), async || {
        assert!(!process.has_ended(), "{}", process.log_end());
        let output = Command::new(larderd).args(["explain", "--socket"]).arg(socket).arg("a").output().expect("larderd runs");
        if output.status.success() { Ok(()) } else { Err(told(&output)) }
    })
    .await;
    process
}

/// A directory with a `kubectl` that notes what it was told, and runs here what it is to run in a container.
fn stand_in(scene: &Scene) -> PathBuf {
    let directory = scene.plane.directory().join("bin");
    fs::create_dir(&directory).expect("the directory is writable");
    let kubectl = directory.join("kubectl");
    let said = directory.join("said");
    let script = format!(
        "#!/bin/sh\necho \"$*\" > {}\n[ \"$1\" = exec ] || exit 9\nwhile [ \"$1\" != -- ]; do shift; done\nshift\nexec \"$@\"\n",
        said.display()
    );
    fs::write(&kubectl, script).expect("the directory is writable");
    fs::set_permissions(&kubectl, fs::Permissions::from_mode(0o755)).expect("the file is ours");
    directory
}

const EXPLAIN: [&str; 6] = ["explain", "user:42", "--workload", "deploy/shop", "--namespace", SHOP];

/// Without a pod that could be asked, the policies are explained as they are written.
async fn explains_what_is_written(scene: &Scene) {
    let output = larder(scene, &EXPLAIN, "");
    assert_eq!(output.status.code(), Some(2), "{}", told(&output));
    assert!(told(&output).contains("there is no Deployment shop in namespace shop"), "{}", told(&output));
    scene.apply(&deployment()).await.expect("a Deployment");
    let output = larder(scene, &EXPLAIN, "");
    let shown = told(&output);
    assert!(output.status.success() && shown.contains("as they are written: no pod of it with a sidecar runs"), "{shown}");
    assert!(shown.contains("policy    catalog") && shown.contains("ttl       10m"), "{shown}");
    assert!(shown.contains("`rival` has no part in it. Overlap: "), "{shown}");
}

#[tokio::test]
async fn a_person_is_told_how_it_is_and_what_decides() {
    let scene = Scene::start(&[SHOP]).await;
    make_clusters(&scene).await;
    scene.apply(&policy("catalog", json!({"app": "shop"}), user_rule("10m"))).await.expect("a policy");
    // The younger of two, by a second at the least.
    let of_catalog = scene.plane.get(&format!("/apis/larder.dev/v1alpha1/namespaces/{SHOP}/cachepolicies/catalog")).await;
    let created = of_catalog["metadata"]["creationTimestamp"].as_str().expect("a time").to_owned();
    eventually("a younger policy", Duration::from_secs(60), async || {
        let rival = scene.apply(&policy("rival", json!({"app": "shop"}), user_rule("1m"))).await.expect("a policy");
        let rival = serde_json::to_value(&rival).expect("JSON");
        if rival["metadata"]["creationTimestamp"].as_str() > Some(created.as_str()) {
            return Ok(());
        }
        let path = format!("/apis/larder.dev/v1alpha1/namespaces/{SHOP}/cachepolicies/rival");
        scene.plane.request(Method::DELETE, &path, &[], None).await;
        Err("it is as old as the other".to_owned())
    })
    .await;
    scene.apply(&policy("others", json!({"app": "other"}), user_rule("2m"))).await.expect("a policy");
    status_tells(&scene);
    explains_what_is_written(&scene).await;

    let socket = scene.plane.directory().join("admin.sock");
    let mut sidecar = start_sidecar(&scene, &socket).await;
    make_pod(&scene, &socket).await;
    let kubectl = stand_in(&scene);
    let path = format!("{}:/usr/bin:/bin", kubectl.display());
    let output = larder(&scene, &[&EXPLAIN[..], &["--output", "json"]].concat(), &path);
    assert!(output.status.success(), "{}", told(&output));
    let explained = as_json(&output);
    let source = &explained["source"]["sidecar"];
    assert_eq!(
        (&source["pod"], &source["binding"], &source["way"]),
        (&json!(POD), &json!("shop-1f0c8a52de"), &json!("file")),
        "{explained}"
    );
    assert_eq!(
        (&explained["generation"], &explained["ttl"]["default"], &explained["policy"]),
        (&json!(12), &json!("5m"), &json!("catalog"))
    );
    let notes = explained["notes"].to_string();
    assert!(notes.contains("say otherwise (the rule `user`, CacheAside)") && notes.contains("`rival`"), "{notes}");
    let said = fs::read_to_string(kubectl.join("said")).expect("kubectl was asked");
    assert!(said.starts_with(&format!("exec --namespace {SHOP} {POD} --container larder-sidecar -- ")), "{said}");

    let output = larder(&scene, &EXPLAIN, &scene.plane.directory().display().to_string());
    assert!(output.status.code() == Some(2) && told(&output).contains("there is no kubectl on the PATH"), "{}", told(&output));
    sidecar.stop();
    let output = larder(&scene, &EXPLAIN, &path);
    assert_eq!(output.status.code(), Some(2), "{}", told(&output));
    for words in ["the sidecar of pod shop-6f7c-x could not be asked", "kubectl logs shop-6f7c-x", "--file"] {
        assert!(told(&output).contains(words), "{words}: {}", told(&output));
    }
}
