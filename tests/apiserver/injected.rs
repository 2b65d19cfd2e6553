//! Pods that a policy selects come back from the API server with their sidecar; who writes a policy that has no effect is told; what cannot be
//! written behind is refused; and pods that were made while nobody answered are found.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::Path;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::admission::Waited;
use super::chart;
use super::control_plane::{SYSTEM, User};
use super::operator::Operator;
use super::scene::{Scene, eventually, restricted};

const SHOP: &str = "shop";
/// In place of 443, which takes a privilege.
const PORT: u16 = 8443;
/// The Service, and the Secret of its certificate.
pub const NAME: &str = "larder-injector";
pub const CONFIGURATION: &str = "larder-system-larder-injector";
const TOKEN_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const SOON: Duration = Duration::from_secs(120);
/// How many pods the API server is asked about for its own figures.
const PODS: u32 = 200;

/// Installs the chart with the injector.
pub async fn install(scene: &Scene, chart: &[Value]) {
    for object in chart {
        apply(scene, object).await;
    }
    opt_in(scene, SHOP).await;
    for namespace in [SHOP, SYSTEM] {
        make_account(scene, namespace).await;
    }
}

/// Applies an object of the chart, with our port.
async fn apply(scene: &Scene, object: &Value) {
    let mut object = object.clone();
    match object["kind"].as_str() {
        Some("Service") => object["spec"]["ports"][0]["port"] = PORT.into(),
        Some("MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration") => {
            for webhook in object["webhooks"].as_array_mut().expect("webhooks") {
                webhook["clientConfig"]["service"]["port"] = PORT.into();
            }
        }
        _ => {}
    }
    scene.apply(&object).await.unwrap_or_else(|error| panic!("the API server refuses the chart's {object}: {error}"));
}

async fn opt_in(scene: &Scene, namespace: &str) {
    let labels = json!({"larder.dev/injection": "enabled"});
    let labelled = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}});
    scene.apply(&labelled).await.expect("a label");
}

/// A controller would make it.
async fn make_account(scene: &Scene, namespace: &str) {
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": namespace}});
    scene.apply(&account).await.expect("an account");
}

/// Starts an operator at the address of its Service.
pub async fn start(scene: &Scene) -> Operator {
    let service = scene.plane.get(&format!("/api/v1/namespaces/{SYSTEM}/services/{NAME}")).await;
    let address = service["spec"]["clusterIP"].as_str().expect("an address");
    let arguments = [
        format!("--webhook-listen={address}:{PORT}"),
        format!("--webhook-configuration={CONFIGURATION}"),
        format!("--webhook-secret={NAME}"),
        format!("--webhook-host={NAME}.{SYSTEM}.svc"),
    ];
    Operator::start_with(&scene.plane, &[SHOP], &arguments)
}

/// Has another release lead, as where an upgrade brings an injector. Returns the path of its Lease.
pub async fn leads_elsewhere(scene: &Scene) -> String {
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "larder-operator", "namespace": SYSTEM},
        "spec": {"holderIdentity": "larder-before", "leaseDurationSeconds": 3600},
    });
    scene.apply(&lease).await.expect("a Lease");
    format!("/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/larder-operator")
}

fn pod(name: &str, labels: &Value, annotations: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "spec": {"containers": [{"name": "app", "image": "app:1", "securityContext": restricted()}]},
    })
}

/// Asks the API server to make a pod, or whether it would.
pub async fn make(scene: &Scene, namespace: &str, pod: &Value, query: &str) -> (u16, Value) {
    let path = format!("/api/v1/namespaces/{namespace}/pods?{query}");
    let (status, text) = scene.plane.request(Method::POST, &path, &[("content-type", "application/json")], Some(pod)).await;
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

pub fn has_sidecar(pod: &Value) -> bool {
    pod["spec"]["initContainers"][0]["name"] == "larder-sidecar"
}

pub fn selected(name: &str) -> Value {
    pod(name, &json!({"app": "shop"}), &json!({}))
}

/// Waits until pods get one.
pub async fn await_sidecars(scene: &Scene, operator: &Operator) {
    eventually("a pod with a sidecar", SOON, async || {
        let (_, made) = make(scene, SHOP, &selected("first"), "dryRun=All").await;
        if has_sidecar(&made) { Ok(()) } else { Err(format!("{made}\n{}", operator.log_end())) }
    })
    .await;
}

/// What is mounted in place of an account's token.
fn in_tokens_place(container: &Value) -> Option<&str> {
    let mounts = container["volumeMounts"].as_array()?;
    mounts.iter().find(|mount| mount["mountPath"] == TOKEN_DIR)?["name"].as_str()
}

/// A pod as the API server keeps it.
async fn looks_right(scene: &Scene) {
    let (status, made) = make(scene, SHOP, &selected("injected"), "fieldValidation=Strict").await;
    assert_eq!(status, 201, "the namespace holds to the restricted profile, and so does the sidecar: {made}");
    let sidecar = &made["spec"]["initContainers"][0];
    assert_eq!(sidecar["restartPolicy"], "Always");
    assert_eq!(sidecar["image"], "registry.example/larder:1");
    assert_eq!(in_tokens_place(sidecar), Some("larder-no-token"), "{made:#}");
    let app = &made["spec"]["containers"][0];
    assert!(in_tokens_place(app).is_some_and(|volume| volume.starts_with("kube-api-access-")), "{made:#}");
    assert_eq!(app["env"][0], json!({"name": "REDIS_URL", "value": "redis://127.0.0.1:6379"}));
    assert!(made["metadata"]["labels"]["larder.dev/binding"].as_str().is_some_and(|name| name.starts_with("injected-")));
    let socket =
        pod("socket", &json!({"app": "shop"}), &json!({"larder.dev/inject-socket": "true", "larder.dev/inject-port": "7000"}));
    let (status, made) = make(scene, SHOP, &socket, "fieldValidation=Strict").await;
    assert_eq!((status, &made["spec"]["containers"][0]["env"][2]["value"]), (201, &json!("7000")), "{made}");

    let whole = json!({"cpu": "1", "memory": "1Gi"});
    let mut guaranteed = selected("guaranteed");
    guaranteed["spec"]["containers"][0]["resources"] = json!({"requests": whole, "limits": whole});
    let (status, whole) = make(scene, SHOP, &guaranteed, "dryRun=All").await;
    assert_eq!((status, &whole["status"]["qosClass"]), (201, &json!("Guaranteed")), "its sidecar takes that from it: {whole}");

    // What the API server made of it and would be asked about again is left as it is.
    let mut again = made;
    for field in ["uid", "resourceVersion", "creationTimestamp", "managedFields", "generation"] {
        again["metadata"].as_object_mut().expect("metadata").remove(field);
    }
    again["metadata"]["name"] = "again".into();
    let binding = again["metadata"]["labels"]["larder.dev/binding"].clone();
    let (status, twice) = make(scene, SHOP, &again, "dryRun=All").await;
    assert_eq!(status, 201, "{twice}");
    // The pod's name is its workload's.
    assert_ne!(twice["metadata"]["labels"]["larder.dev/binding"], binding);
    let names = |pod: &Value, list: &str| -> Vec<String> {
        pod["spec"][list].as_array().into_iter().flatten().filter_map(|one| one["name"].as_str().map(str::to_owned)).collect()
    };
    for list in ["initContainers", "containers", "volumes"] {
        assert_eq!(names(&twice, list), names(&again, list), "{list}");
    }
}

/// Pods that are not to have one, and one that must be written otherwise.
async fn others_stay(scene: &Scene) {
    for (namespace, name, labels, annotations) in [
        (SHOP, "stranger", json!({"app": "other"}), json!({})),
        (SHOP, "unwilling", json!({"app": "shop"}), json!({"larder.dev/inject": "false"})),
        (SHOP, "server", json!({"app": "shop", "larder.dev/cluster": "main"}), json!({})),
        (SYSTEM, "elsewhere", json!({"app": "shop"}), json!({})),
    ] {
        let (status, made) = make(scene, namespace, &pod(name, &labels, &annotations), "dryRun=All").await;
        assert!(status == 201 && !has_sidecar(&made), "{name}: {made}");
    }
    let wrong = pod("wrong", &json!({"app": "shop"}), &json!({"larder.dev/sidecar-uid": "0"}));
    let (status, refusal) = make(scene, SHOP, &wrong, "dryRun=All").await;
    let message = refusal["message"].as_str().unwrap_or_default();
    assert!(status == 422 && message.contains("never runs as root"), "{status} {refusal}");
}

/// What a person should know of a pod comes with the API server's answer: why it has no sidecar, and which variables lead elsewhere.
async fn people_are_warned(scene: &Scene) {
    let path = format!("/api/v1/namespaces/{SHOP}/pods?dryRun=All");
    let headers = [("content-type", "application/json")];
    let told = async |change: &dyn Fn(&mut Value)| {
        let mut pod = selected("warned");
        change(&mut pod["spec"]);
        scene.plane.warnings(Method::POST, &path, &headers, Some(&pod)).await
    };
    let (status, warnings) = told(&|_| ()).await;
    assert!(
        status == 201 && warnings.lines().count() == 1 && warnings.contains("no CacheCluster main yet"),
        "{status} {warnings}"
    );
    let (_, warnings) = told(&|spec| spec["hostNetwork"] = true.into()).await;
    assert!(warnings.contains("no sidecar for CachePolicy catalog") && warnings.contains("remove hostNetwork"), "{warnings}");
    let from = json!([{"configMapRef": {"name": "settings"}}]);
    let (status, warnings) = told(&|spec| spec["containers"][0]["envFrom"] = from.clone()).await;
    assert!(status == 201 && warnings.contains("what envFrom says of them has no effect"), "{status} {warnings}");
    let env = json!([{"name": "REDIS_HOST", "value": "elsewhere"}]);
    let (status, warnings) = told(&|spec| spec["containers"][0]["env"] = env.clone()).await;
    assert!(status == 201 && warnings.contains("sets REDIS_HOST itself"), "{status} {warnings}");
}

/// The pods of examples/shop are taken as they stand, by the restricted profile too, and the shop's get their sidecar before all else.
async fn the_example_is_taken(scene: &Scene) {
    for file in ["app.yaml", "database.yaml"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/shop/app").join(file);
        let objects: Vec<Value> = serde_saphyr::from_multiple(&fs::read_to_string(&path).expect(file)).expect("YAML");
        for mut object in objects {
            object["metadata"]["namespace"] = SHOP.into();
            scene.apply(&object).await.unwrap_or_else(|error| panic!("{file}: {error}"));
            if object["kind"] != "Deployment" {
                continue;
            }
            let mut pod = object["spec"]["template"].clone();
            pod["apiVersion"] = "v1".into();
            pod["kind"] = "Pod".into();
            pod["metadata"]["name"] = object["metadata"]["name"].clone();
            let (status, made) = make(scene, SHOP, &pod, "dryRun=All&fieldValidation=Strict").await;
            assert_eq!((status, has_sidecar(&made)), (201, file == "app.yaml"), "{file}: {made}");
            if has_sidecar(&made) {
                for container in [&made["spec"]["initContainers"][1], &made["spec"]["containers"][0]] {
                    assert_eq!(container["env"][0]["name"], "REDIS_URL", "{container}");
                }
            }
        }
    }
}

/// A policy for the pods with these labels.
pub fn policy(name: &str, cluster: &str, app: &str, keys: &str) -> Value {
    json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"namespace": SHOP, "name": name},
        "spec": {
            "cacheCluster": cluster, "workloads": {"matchLabels": {"app": app}},
            "rules": [{"name": "user", "keys": keys, "strategy": "CacheAside"}],
        },
    })
}

/// Whoever writes a policy that has no effect beside the one that is there hears why, and it is taken.
async fn policies_are_advised_of(scene: &Scene, operator: &Operator) {
    let path = format!("/apis/larder.dev/v1alpha1/namespaces/{SHOP}/cachepolicies?dryRun=All");
    let headers = [("content-type", "application/json")];
    let told = async |policy: &Value| scene.plane.warnings(Method::POST, &path, &headers, Some(policy)).await;
    eventually("a warning of an overlap", SOON, async || {
        let (status, warnings) = told(&policy("wide", "main", "shop", "{kind}:{id}")).await;
        assert_eq!(status, 201, "it is never refused: {warnings}");
        let said = ["larder: has no effect", "`catalog`", "`user:x`"].iter().all(|part| warnings.contains(part));
        if said { Ok(()) } else { Err(format!("{warnings:?}\n{}", operator.log_end())) }
    })
    .await;
    let (status, warnings) = told(&policy("elsewhere", "other", "shop", "cart:{id}")).await;
    assert!(status == 201 && warnings.contains("names the CacheCluster `main`"), "{warnings}");
    for sound in [policy("beside", "main", "shop", "cart:{id}"), policy("strangers", "other", "cart", "user:{id}")] {
        assert_eq!(told(&sound).await, (201, String::new()), "{sound}");
    }
    assert!(operator.figure("larder_operator_policy_reviews_total", Some("warned")).await >= Some(2.0));
}

/// A CacheCluster that the operator leaves alone.
fn paused(fsync: &str) -> Value {
    json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CacheCluster", "metadata": {"namespace": SHOP, "name": "kept"},
        "spec": {
            "engine": {"kind": "Valkey", "version": "8.1"}, "mode": "Sentinel", "memory": "256Mi", "paused": true,
            "storage": {"size": "1Gi", "fsync": fsync},
        },
    })
}

/// Waits until a request is refused with this part of a sentence.
async fn is_refused(
    scene: &Scene,
    operator: &Operator,
    (method, path, headers): (Method, &str, &[(&str, &str)]),
    body: &Value,
    part: &str,
) {
    eventually("a refusal", SOON, async || {
        let (status, why) = scene.plane.request(method.clone(), path, headers, Some(body)).await;
        if status == 422 && why.contains(part) { Ok(()) } else { Err(format!("{status} {why}\n{}", operator.log_end())) }
    })
    .await;
}

/// What is to be written behind needs a CacheCluster that can keep its journal, from its first moment to its last.
async fn journals_are_kept(scene: &Scene, operator: &Operator) {
    let behind = json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"namespace": SHOP, "name": "behind"},
        "spec": {
            "cacheCluster": "kept", "workloads": {"matchLabels": {"app": "behind"}},
            "origins": [{"name": "db", "sql": {"url": {"secretKeyRef": {"name": "db", "key": "url"}}}}],
            "rules": [{
                "name": "user", "keys": "user:{id}", "strategy": "WriteBehind",
                "origin": {
                    "name": "db", "read": "SELECT name FROM users WHERE id = $id", "delete": "DELETE FROM users WHERE id = $id",
                    "write": "INSERT INTO users VALUES ($id, $value, $version)",
                },
            }],
        },
    });
    let path = |plural: &str| format!("/apis/larder.dev/v1alpha1/namespaces/{SHOP}/{plural}");
    let (policy_path, cluster_path) = (format!("{}/behind", path("cachepolicies")), format!("{}/kept", path("cacheclusters")));
    let json = [("content-type", "application/json")];
    let merge = [("content-type", "application/merge-patch+json")];
    let made = format!("{}?dryRun=All", path("cachepolicies"));
    eventually("a warning of a CacheCluster that is not there", SOON, async || {
        let (status, warnings) = scene.plane.warnings(Method::POST, &made, &json, Some(&behind)).await;
        let is_told = status == 201 && warnings.contains("no CacheCluster `kept` yet");
        if is_told { Ok(()) } else { Err(format!("{status} {warnings}\n{}", operator.log_end())) }
    })
    .await;

    scene.apply(&paused("EverySecond")).await.expect("a CacheCluster");
    is_refused(scene, operator, (Method::POST, &made, &json), &behind, "reach the disk after they are acknowledged").await;
    scene.apply(&paused("Always")).await.expect("it is mended");
    eventually("a policy", SOON, async || scene.apply(&behind).await.map_err(|error| error.to_string())).await;

    // As a trial, which succeeds until the policy is heard of.
    let trial = format!("{cluster_path}?dryRun=All");
    let lowered = json!({"spec": {"storage": {"fsync": "EverySecond"}}});
    is_refused(scene, operator, (Method::PATCH, &trial, &merge), &lowered, "the CachePolicy `behind`").await;
    for (path, change) in [
        (&cluster_path, json!({"metadata": {"labels": {"a": "b"}}, "spec": {"replicas": 2}})),
        (&policy_path, json!({"metadata": {"labels": {"a": "b"}}})),
    ] {
        let (status, answer) = scene.plane.request(Method::PATCH, path, &merge, Some(&change)).await;
        assert_eq!(status, 200, "{answer}");
    }
    assert!(operator.figure("larder_operator_cluster_reviews_total", Some("refused")).await >= Some(1.0));
}

/// A Deployment's pod, made while nobody answered.
async fn make_missed_pod(scene: &Scene) -> Value {
    let template = json!({"metadata": {"labels": {"app": "shop"}}, "spec": selected("x")["spec"]});
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"namespace": SHOP, "name": "web"},
        "spec": {"selector": {"matchLabels": {"app": "shop"}}, "template": template},
    });
    let made = scene.apply(&deployment).await.expect("a Deployment");
    let mut pod = pod("web-6f7c-1", &json!({"app": "shop", "pod-template-hash": "6f7c"}), &json!({}));
    pod["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-6f7c", "uid": "1", "controller": true}]);
    let (status, pod) = make(scene, SHOP, &pod, "").await;
    assert!(status == 201 && !has_sidecar(&pod), "while none answers, pods start without: {pod}");
    serde_json::to_value(made).expect("JSON")
}

/// The leader finds it, and tells its Deployment.
async fn missed_pods_are_told_of(scene: &Scene, operator: &Operator, deployment: &Value) {
    let event = eventually("an Event about the Deployment", SOON, async || {
        let events = scene.plane.get(&format!("/apis/events.k8s.io/v1/namespaces/{SHOP}/events")).await;
        let found = events["items"].as_array().into_iter().flatten().find(|event| event["reason"] == "SidecarMissing");
        found.cloned().ok_or_else(|| operator.log_end())
    })
    .await;
    assert_eq!((&event["type"], &event["regarding"]["kind"]), (&json!("Warning"), &json!("Deployment")), "{event}");
    assert_eq!(event["regarding"]["uid"], deployment["metadata"]["uid"], "describe shows it");
    let note = event["note"].as_str().unwrap_or_default();
    for part in ["1 pod of Deployment web, such as web-6f7c-1", "kubectl rollout restart deployment/web"] {
        assert!(note.contains(part), "{part}: {note}");
    }
    assert_eq!(operator.figure("larder_operator_missed_pods", None).await, Some(1.0));
}

/// Where the chart is told so, no pod is made while nobody answers, but for those of the system and of Larder itself, whatever is watched.
async fn a_strict_injector_spares_the_system(scene: &Scene) {
    let spared = ["kube-system", SYSTEM];
    let strict = chart::render_with(&[SHOP, spared[0], spared[1]], &["injector.enabled=true", "injector.failurePolicy=Fail"]);
    let configuration = strict.iter().find(|object| object["kind"] == "MutatingWebhookConfiguration").expect("a configuration");
    apply(scene, configuration).await;
    for namespace in spared {
        opt_in(scene, namespace).await;
        make_account(scene, namespace).await;
    }
    eventually("a refusal", SOON, async || {
        let (status, answer) = make(scene, SHOP, &selected("refused"), "dryRun=All").await;
        let why = answer["message"].as_str().unwrap_or_default();
        if status == 500 && why.contains("failed calling webhook") { Ok(()) } else { Err(format!("{status} {answer}")) }
    })
    .await;
    for namespace in spared {
        let (status, made) = make(scene, namespace, &selected("spared"), "dryRun=All").await;
        assert!(status == 201 && !has_sidecar(&made), "{namespace}: {status} {made}");
    }
}

/// Has the API server make pods, and returns how long it waited for an answer about each.
async fn pods_are_made(scene: &Scene, operator: &Operator) -> Waited {
    let before = Waited::until_now(scene).await;
    for _ in 0..PODS {
        assert!(has_sidecar(&make(scene, SHOP, &selected("many"), "dryRun=All").await.1));
    }
    let waited = Waited::until_now(scene).await.since(&before);
    assert!(waited.count() >= f64::from(PODS), "each is asked about: {waited:?}");
    let injected = operator.figure("larder_operator_pod_reviews_total", Some("injected")).await;
    assert!(injected > Some(f64::from(PODS)), "{injected:?}");
    println!("p50 and p99 in seconds: {:?} {:?} of {waited:?}", waited.quantile(0.5), waited.quantile(0.99));
    waited
}

#[tokio::test]
async fn selected_pods_get_their_sidecar() {
    let scene = Scene::start(&[SHOP]).await;
    let chart = chart::render_with(&[SHOP], &["injector.enabled=true"]);
    install(&scene, &chart).await;
    let lease = leads_elsewhere(&scene).await;
    let operator = start(&scene).await;
    scene.apply(&policy("catalog", "main", "shop", "user:{id}")).await.expect("a policy");
    eventually("the operator is ready", SOON, async || {
        operator.waits_for().await.map_or(Ok(()), |what| Err(format!("it waits for {what}\n{}", operator.log_end())))
    })
    .await;
    assert_eq!(scene.plane.request(Method::DELETE, &lease, &[], None).await.0, 200, "the leader of the release before ends");
    await_sidecars(&scene, &operator).await;
    looks_right(&scene).await;
    others_stay(&scene).await;
    people_are_warned(&scene).await;
    the_example_is_taken(&scene).await;
    policies_are_advised_of(&scene, &operator).await;
    journals_are_kept(&scene, &operator).await;

    let waited = pods_are_made(&scene, &operator).await;

    // While none answers, pods start without; the next leader finds them.
    operator.stop();
    let deployment = make_missed_pod(&scene).await;
    let operator = start(&scene).await;
    missed_pods_are_told_of(&scene, &operator, &deployment).await;

    let mut of_operator = scene.plane.audit();
    of_operator.retain(|entry| entry.user.username == User::Operator.name());
    let forbidden: Vec<String> =
        of_operator.iter().filter(|entry| entry.response_status.code == 403).map(|entry| entry.right()).collect();
    assert_eq!(forbidden, Vec::<String>::new());
    let used: BTreeSet<String> = of_operator.iter().map(|entry| entry.right()).collect();
    let without = chart::grants(&chart::render(&[SHOP]), "larder");
    let granted = chart::grants(&chart, "larder");
    let more: BTreeSet<&String> = granted.difference(&without).collect();
    assert!(more.len() >= 7 && more.iter().all(|right| used.contains(*right)), "{more:?} are granted for it");
    operator.stop();
    a_strict_injector_spares_the_system(&scene).await;
    if let Some(file) = env::var_os("LARDER_INJECTOR_REPORT") {
        fs::write(file, waited.report(PODS)).expect("the report");
    }
}
