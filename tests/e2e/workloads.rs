//! Cases of policies that are about workloads themselves: every kind of them, their end, their passwords, and what a person is told.

use std::os::unix::fs::symlink;
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::{apply, eventually, get, kubectl, list, name, run};
use super::install::{PLACE, image};
use super::policies::{STARTS_WITHIN, Scene};
use super::shop::{container, has_sidecar, secret_of};

/// The program as a person has it.
pub const LARDER: &str = env!("CARGO_BIN_EXE_larder");
/// Where a sidecar explains itself, as its owner alone can see.
const OWNERS_DIR: &str = "/run/larder-admin";
/// A client that is there as soon as its cache is: a kubelet may bring files a moment later than it starts containers.
const CLIENT: &str = "
import os, redis, signal, time
client = redis.from_url(os.environ.get('CACHE') or os.environ['REDIS_URL'])
deadline = time.monotonic() + 90
while True:
    try:
        client.set('kinds:first', 'x')
        break
    except redis.RedisError as error:
        if time.monotonic() > deadline: raise
        print(error, flush=True)
        time.sleep(0.2)
";
const STORES: &str = "
client.set('kinds:value', 'x')
ttl = client.ttl('kinds:value')
assert client.get('kinds:value') == b'x' and 90 <= ttl <= 120, ttl
print('stored', flush=True)
";
/// Uses the cache until it is told to end, and for a second longer.
const USES_TO_THE_END: &str = "
ends = []
signal.signal(signal.SIGTERM, lambda *_: ends.append(time.monotonic() + 1))
while not ends or time.monotonic() < ends[0]:
    client.set('kinds:value', 'x')
    client.get('kinds:value')
    time.sleep(0.005)
print('ended well', flush=True)
";
/// How soon a person is told that nobody uses a sidecar: no client for two minutes, two intervals of heartbeats, and a look.
const TOLD_WITHIN: Duration = Duration::from_secs(300);
/// A password is proved by every server, and what is proved is told by each agent's file, which kubelets bring.
const ROTATES_WITHIN: Duration = Duration::from_secs(300);

/// A container that runs Python under the restricted profile.
fn python(program: &str) -> Value {
    json!({
        "name": "app", "image": image("LARDER_E2E_SHOP_IMAGE"), "command": ["python3", "-c", program],
        "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}},
    })
}

/// A template of pods of one kind of workload, which end within two seconds.
pub fn template(of: &str, program: &str) -> Value {
    json!({
        "metadata": {"labels": {"app": "kinds", "of": of}},
        "spec": {
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 2,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [python(program)],
        },
    })
}

fn workload(group: &str, kind: &str, spec: &Value) {
    apply(&json!({"apiVersion": group, "kind": kind, "metadata": {"name": "kinds", "namespace": PLACE}, "spec": spec}))
        .expect("applied");
}

fn apply_policy() {
    let policy = json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": "kinds", "namespace": PLACE},
        "spec": {
            "cacheCluster": "shop", "workloads": {"matchLabels": {"app": "kinds"}},
            "rules": [{"name": "kinds", "keys": "kinds:{key}", "strategy": "CacheAside", "ttl": "2m"}],
        },
    });
    apply(&policy).expect("applied");
}

/// How a container of a pod ended, once it has.
fn exit_code(pod: &Value, container: &str) -> Option<i64> {
    let lists = ["initContainerStatuses", "containerStatuses"].into_iter().filter_map(|list| pod["status"][list].as_array());
    let status = lists.flatten().find(|status| status["name"] == container)?;
    status["state"]["terminated"]["exitCode"].as_i64()
}

fn log_of(pod: &str) -> String {
    kubectl(&["-n", PLACE, "logs", pod, "-c", "app"]).unwrap_or_else(|error| error)
}

/// A pod of each kind of workload stores under its policy, that of the StatefulSet by its Unix socket; the Job comes to its end, and its sidecar
/// with it.
pub fn every_kind_is_served(_: &Scene) -> String {
    apply_policy();
    let runs = format!("{CLIENT}{STORES}signal.pause()");
    let mut job = template("job", &format!("{CLIENT}{STORES}"));
    job["spec"]["restartPolicy"] = json!("Never");
    let selector = |of: &str| json!({"matchLabels": {"app": "kinds", "of": of}});
    workload("batch/v1", "Job", &json!({"backoffLimit": 0, "template": job}));
    let mut by_socket = template("set", &runs);
    by_socket["metadata"]["annotations"] = json!({"larder.dev/inject-socket": "true"});
    by_socket["spec"]["containers"][0]["env"] = json!([{"name": "CACHE", "value": "unix:///run/larder/redis.sock"}]);
    let set = json!({"serviceName": "kinds", "selector": selector("set"), "template": by_socket});
    workload("apps/v1", "StatefulSet", &set);
    workload("apps/v1", "DaemonSet", &json!({"selector": selector("daemon"), "template": template("daemon", &runs)}));

    let ended = eventually("the Job completes", STARTS_WITHIN, || {
        let pods = list(PLACE, "pods", "app=kinds,of=job");
        let pod = pods.first().ok_or("it has no pod")?.clone();
        match pod["status"]["phase"].as_str() {
            Some("Succeeded") => Ok(pod),
            phase => Err(format!("{phase:?}: {}", log_of(&name(&pod)))),
        }
    });
    assert_eq!((exit_code(&ended, "app"), exit_code(&ended, "larder-sidecar")), (Some(0), Some(0)), "{}", ended["status"]);
    let mut served = 1;
    for of in ["set", "daemon"] {
        served += eventually(&format!("each pod of the {of} has stored"), STARTS_WITHIN, || {
            let pods = list(PLACE, "pods", &format!("app=kinds,of={of}"));
            let silent: Vec<String> =
                pods.iter().map(|pod| log_of(&name(pod))).filter(|log| log.lines().last() != Some("stored")).collect();
            if pods.is_empty() || !silent.is_empty() {
                return Err(format!("{} pods; {silent:?}", pods.len()));
            }
            assert!(pods.iter().all(has_sidecar), "one has no sidecar");
            Ok(pods.len())
        });
    }
    for kind in ["job", "statefulset", "daemonset"] {
        kubectl(&["-n", PLACE, "delete", kind, "kinds", "--wait"]).expect("deleted");
    }
    format!("{served} pods of a Job, a StatefulSet and a DaemonSet; the Job's sidecar ended with it")
}

/// A pod that has two seconds to end uses its cache in the first of them: no command fails, and nobody has to kill its sidecar.
pub fn two_seconds_are_enough_to_end(_: &Scene) -> String {
    apply_policy();
    let pod = "kinds-ends";
    let mut manifest = template("ends", &format!("{CLIENT}{STORES}{USES_TO_THE_END}"));
    manifest["apiVersion"] = json!("v1");
    manifest["kind"] = json!("Pod");
    manifest["metadata"]["name"] = json!(pod);
    manifest["metadata"]["namespace"] = json!(PLACE);
    // So that it can be looked at when it has ended.
    manifest["metadata"]["finalizers"] = json!(["larder.dev/looked-at"]);
    manifest["spec"]["restartPolicy"] = json!("Never");
    apply(&manifest).expect("applied");
    let held = Held(pod);
    eventually("it uses its cache", STARTS_WITHIN, || match log_of(pod) {
        log if log.lines().last() == Some("stored") => Ok(()),
        log => Err(log),
    });
    kubectl(&["-n", PLACE, "delete", "pod", pod, "--wait=false"]).expect("deleted");
    let codes = eventually("it has ended", STARTS_WITHIN, || {
        let found = get(PLACE, &format!("pod/{pod}")).ok_or("it is gone")?;
        let codes = exit_code(&found, "app").zip(exit_code(&found, "larder-sidecar"));
        codes.ok_or_else(|| found["status"].to_string())
    });
    drop(held);
    assert_eq!(codes, (0, 0), "how the application and its sidecar ended");
    "the application used its cache a second beyond SIGTERM, and both ended by themselves".to_owned()
}

/// A pod that stays when it is deleted, until this is dropped.
struct Held(&'static str);

impl Drop for Held {
    fn drop(&mut self) {
        let patch = ["-n", PLACE, "patch", "pod", self.0, "--type=merge", "-p", "{\"metadata\":{\"finalizers\":null}}"];
        if let Err(error) = kubectl(&patch) {
            eprintln!("{} stays: {error}", self.0);
        }
        let _ = kubectl(&["-n", PLACE, "delete", "pod", self.0, "--ignore-not-found", "--wait=false"]);
    }
}

/// The policy of a pod whose application never comes to its sidecar says so.
pub fn an_unused_sidecar_is_told_of(scene: &Scene) -> String {
    scene.idle_pod();
    let told = eventually("an Event of the policy", TOLD_WITHIN, || {
        let found = kubectl(&["-n", PLACE, "get", "events", "--field-selector", "reason=SidecarUnused", "-o", "json"])?;
        let found: Value = serde_json::from_str(&found).map_err(|error| error.to_string())?;
        let events = found["items"].as_array().cloned().unwrap_or_default();
        let about = events.iter().find(|event| {
            event["involvedObject"]["name"] == "shop" && event["message"].as_str().is_some_and(|text| text.contains("with-token"))
        });
        about.map(|event| event["message"].to_string()).ok_or_else(|| format!("{events:?}"))
    });
    scene.remove_idle_pod();
    told
}

/// What a person asks of a workload, of one key, and as a plugin of kubectl; and that nobody but the owner reaches what answers.
pub fn a_person_is_answered(scene: &Scene) -> String {
    let pod = scene.shop.pods().remove(0);
    let sidecar = container(&pod, "larder-sidecar").expect("a sidecar");
    let (pod, program) = (name(&pod), sidecar["command"][0].as_str().unwrap_or("/larderd").to_owned());
    let inside = ["-n", PLACE, "exec", &pod, "-c", "larder-sidecar", "--", &program, "explain", "product:1"];
    let answered: Value =
        kubectl(&inside).and_then(|said| serde_json::from_str(&said).map_err(|error| format!("{said}: {error}"))).expect("JSON");
    assert_eq!(answered["rule"], "product", "{answered}");

    let ask = |arguments: &[&str]| -> Value {
        let said = run(LARDER, arguments, "").unwrap_or_else(|error| panic!("{error}"));
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{said}: {error}"))
    };
    let explained = ask(&["explain", "product:1", "--workload", "deployment/shop", "-n", PLACE, "--output", "json"]);
    assert_eq!((&explained["policy"], explained["source"]["sidecar"]["pod"].is_string()), (&json!("shop"), true), "{explained}");
    eventually("it is said to be well", Duration::from_secs(60), || {
        let status = ask_whatever(&["status", "shop", "-n", PLACE, "--output", "json"])?;
        if status["well"] == true { Ok(()) } else { Err(status.to_string()) }
    });

    let plugins = tempfile::tempdir().expect("a temporary directory");
    symlink(LARDER, plugins.path().join("kubectl-larder")).expect("a link");
    let path = format!("PATH={}:{}", plugins.path().display(), std::env::var("PATH").expect("PATH"));
    let said = run("env", &[&path, "kubectl", "larder", "explain", "product:1", "-w", "deployment/shop", "-n", PLACE], "")
        .expect("a plugin");
    assert!(said.contains("product"), "{said}");

    let looks = format!("import os; print(os.path.exists('{OWNERS_DIR}'))");
    assert_eq!(scene.shop.python(&pod, "shop", &looks).expect("an answer"), "False", "the application reaches {OWNERS_DIR}");
    format!("rule {} of {}", answered["rule"], explained["policy"])
}

/// What `larder` says, whatever its exit code.
fn ask_whatever(arguments: &[&str]) -> Result<Value, String> {
    let output = std::process::Command::new(LARDER).args(arguments).output().map_err(|error| error.to_string())?;
    serde_json::from_slice(&output.stdout).map_err(|error| format!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// A workload gets another password because somebody asks for it: no customer notices.
pub fn a_password_is_rotated(scene: &Scene) -> String {
    let secret = secret_of(&scene.shop.pods()[0]);
    let lying = || get(PLACE, &format!("secret/{secret}")).unwrap_or_default();
    let (before, asked) = (lying(), super::cluster::uid(&lying()));
    let began = std::time::Instant::now();
    let visits = scene.visited_during(|| {
        let annotation = format!("larder.dev/rotate-password={asked}");
        kubectl(&["-n", PLACE, "annotate", "secret", &secret, "--overwrite", &annotation]).expect("annotated");
        eventually("another password is in its place", ROTATES_WITHIN, || {
            let now = lying();
            let is_heeded = now["metadata"]["annotations"]["larder.dev/password-rotated-for"] == *asked;
            let is_another = now["data"]["password"].is_string() && now["data"]["password"] != before["data"]["password"];
            if is_heeded && is_another { Ok(()) } else { Err(now["metadata"].to_string()) }
        });
    });
    visits.are_right();
    format!("after {} s; {}", began.elapsed().as_secs(), visits.whole)
}

/// A workload without pods, which is known by its template.
fn workload_on_paper(name: &str) {
    let mut template = template("paper", "");
    template["metadata"]["labels"] = json!({"app": name});
    apply(&json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": PLACE},
        "spec": {"replicas": 0, "selector": {"matchLabels": {"app": name}}, "template": template},
    }))
    .expect("applied");
}

/// A policy about such a workload.
fn policy_about(name: &str, app: &str, cluster: &str, more: &Value) {
    let mut spec = json!({
        "cacheCluster": cluster, "workloads": {"matchLabels": {"app": app}},
        "rules": [{"name": "told", "keys": format!("{app}:{{id}}"), "strategy": "CacheAside", "ttl": "2m"}],
    });
    for (field, value) in more.as_object().into_iter().flatten() {
        spec[field] = value.clone();
    }
    let manifest = json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": name, "namespace": PLACE}, "spec": spec,
    });
    apply(&manifest).expect("applied");
}

/// Waits until a condition of a policy has this status, reason and these words.
fn await_told(policy: &str, kind: &str, (status, reason, words): (&str, &str, &str)) {
    eventually(&format!("{policy} is told {kind}={status} by {reason}"), Duration::from_secs(60), || {
        let object = get(PLACE, &format!("cachepolicy/{policy}")).ok_or("it is gone")?;
        let found = super::cluster::condition(&object, kind).ok_or_else(|| object["status"].to_string())?;
        let says = found["message"].as_str().is_some_and(|text| text.contains(words));
        if found["status"] == status && found["reason"] == reason && says { Ok(()) } else { Err(found.to_string()) }
    });
}

/// What the API server takes and Larder cannot carry out is told in the policy's conditions, with what to do; and it is over as soon as that
/// is done.
pub fn refusals_are_told(_: &Scene) -> String {
    let workloads = ["told", "told-lost", "told-url"];
    workloads.iter().for_each(|name| workload_on_paper(name));
    let none = json!({});
    policy_about("told-a-first", "told", "shop", &none);
    await_told("told-a-first", "Accepted", ("True", "Accepted", "its rules are part of the snapshot"));
    policy_about("told-b-same-keys", "told", "shop", &none);
    await_told("told-b-same-keys", "Accepted", ("False", "Overlap", "`told-a-first` stays in force; narrow one of the patterns"));
    policy_about("told-c-other-cluster", "told", "other", &none);
    await_told("told-c-other-cluster", "Accepted", ("False", "TwoClusters", "name `shop` here too, or select other workloads"));
    policy_about("told-nobody", "told-nobody", "shop", &none);
    await_told("told-nobody", "Delivered", ("False", "NoWorkload", ""));
    policy_about("told-lost", "told-lost", "nowhere", &none);
    await_told("told-lost", "ResolvedRefs", ("False", "CacheClusterNotFound", "create it, or name another in spec.cacheCluster"));
    policy_about("told-lost", "told-lost", "shop", &none);
    await_told("told-lost", "ResolvedRefs", ("True", "ResolvedRefs", ""));

    let reference = json!({"secretKeyRef": {"name": "told-url", "key": "url"}});
    let loads = json!({
        "origins": [{"name": "db", "sql": {"url": reference}}],
        "rules": [{
            "name": "told", "keys": "told-url:{id}", "strategy": "ReadThrough", "ttl": "2m",
            "origin": {"name": "db", "read": "SELECT $id"},
        }],
    });
    let secret = |entries: &Value| {
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "told-url", "namespace": PLACE}, "stringData": entries});
        apply(&secret).expect("applied");
    };
    policy_about("told-url", "told-url", "shop", &loads);
    await_told("told-url", "ResolvedRefs", ("False", "SecretNotFound", "told-url"));
    secret(&json!({"address": "postgres://db/shop"}));
    await_told("told-url", "ResolvedRefs", ("False", "SecretKeyNotFound", "url"));
    secret(&json!({"url": "mongodb://db/shop"}));
    await_told("told-url", "ResolvedRefs", ("False", "InvalidSecret", ""));
    secret(&json!({"url": "postgres://db/shop"}));
    await_told("told-url", "ResolvedRefs", ("True", "ResolvedRefs", "all that it names is there"));

    let policies = ["told-a-first", "told-b-same-keys", "told-c-other-cluster", "told-nobody", "told-lost", "told-url"];
    for (kind, names) in [("cachepolicy", &policies[..]), ("deployment", &workloads), ("secret", &["told-url"])] {
        for name in names {
            kubectl(&["-n", PLACE, "delete", kind, name, "--wait=false"]).expect("deleted");
        }
    }
    "by Overlap, TwoClusters, NoWorkload, CacheClusterNotFound, SecretNotFound, SecretKeyNotFound and InvalidSecret, and taken back".to_owned()
}
