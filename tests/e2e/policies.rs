//! Policies on Kubernetes: a shop that knows nothing of Larder runs under customers who compare every body with the database, while policies
//! and caches change, servers fail, and the operator and the API server are away.
//!
//! `make e2e E2E_ARGS=policies_` runs these tests and nothing else. `LARDER_E2E_CASES=a,b` runs the cases whose names contain one of the parts.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::{apply, eventually, get, kubectl, name, run, uid};
use super::install::{self, ELSEWHERE, PLACE, image};
use super::nodes::{Inside, is_on_foreign_nodes, kill_process};
use super::operator::{self, Away};
use super::report::{self, Line};
use super::shop::{Customers, Shop, Visits, container, has_sidecar, secret_of, volume};
use super::tier::{Tier, VALKEY_8_1, decode};
use super::workloads;

/// How soon after `kubectl apply` every sidecar is to follow a policy.
const DELIVERED_WITHIN: Duration = Duration::from_secs(5);
/// How many pods a change is to reach, and how often it is made.
const FLEET: usize = 6;
const CHANGES: usize = 5;
/// The customers' reads a second, and changed prices.
const RATE: u32 = 80;
const WRITES: u32 = 1;
/// Products that no customer asks for often: the last ones.
const RARE: std::ops::RangeInclusive<u32> = 991..=995;
/// For how long the API server stands still.
const WITHOUT_API_SERVER: Duration = Duration::from_secs(30);
pub const STARTS_WITHIN: Duration = Duration::from_secs(180);
/// The case that needs an image of a former build, and what names that.
const OLDER: &str = "older sidecar under this operator";
const OLD_IMAGE: &str = "LARDER_E2E_OLD_IMAGE";
/// By when sidecars follow what the operator has come to tell them, on processors that have much else to do.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(180);
/// By when all live sidecars have spoken, which decides what they are told.
const HEARD_WITHIN: Duration = Duration::from_secs(90);
/// A pod that is not injected.
const STRANGER: &str = "stranger";
/// A pod of the shop that nobody visits.
const IDLE: &str = "with-token";
const TOKEN_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

pub struct Scene {
    pub shop: Shop,
    pub tier: Tier,
    customers: Customers,
}

/// A case: its name, whether it must have the cluster to itself, whether it acts from nodes, which must be containers, and what it does.
/// It says what was measured.
struct Case {
    name: &'static str,
    alone: bool,
    nodes: bool,
    act: fn(&Scene) -> String,
}

const fn case(name: &'static str, act: fn(&Scene) -> String) -> Case {
    Case { name, alone: false, nodes: false, act }
}

const CASES: [Case; 17] = [
    case("one load for a cold key of two nodes", cold_keys_are_loaded_once),
    case("policy changed under load", a_change_reaches_every_pod),
    case("second policy for a running workload", a_second_policy_takes_effect),
    case("no account token in the sidecar", no_token_is_mounted),
    case("keys of others are out of reach", other_keys_are_refused),
    case("only injected pods reach the cache", others_do_not_get_through),
    case("refusals told in conditions", workloads::refusals_are_told),
    case("pods of every kind of workload", workloads::every_kind_is_served),
    case("two seconds to end", workloads::two_seconds_are_enough_to_end),
    case("Django caches through it", django_caches),
    case(OLDER, an_older_sidecar_is_told_what_it_understands),
    case("password of a workload rotated under load", workloads::a_password_is_rotated),
    case("what a person is answered", workloads::a_person_is_answered),
    case("a sidecar that nobody uses", workloads::an_unused_sidecar_is_told_of),
    case("cache upgraded under load", an_upgrade_is_not_noticed),
    Case { nodes: true, ..case("primary killed under load", a_failover_is_not_noticed) },
    Case { alone: true, nodes: true, ..case("operator and API server away", nobody_needs_the_operator) },
];

#[test]
fn policies_under_a_shop_that_knows_nothing_of_them() {
    let _cluster = install::cluster();
    let scene = Scene::open();
    let only = std::env::var("LARDER_E2E_CASES").ok();
    let mut failed = Vec::new();
    for case in CASES {
        if only.as_ref().is_some_and(|only| !only.split(',').any(|part| case.name.contains(part))) {
            continue;
        }
        if case.name == OLDER && std::env::var_os(OLD_IMAGE).is_none() {
            eprintln!("left out: {}, since {OLD_IMAGE} names no image", case.name);
            continue;
        }
        if case.nodes && is_on_foreign_nodes() {
            eprintln!("left out: {}, which is done from nodes, which must be containers of kind", case.name);
            continue;
        }
        let began = Instant::now();
        let alone = case.alone.then(install::without_others);
        let others = (!case.alone).then(|| (install::beside_others(), install::with_operator()));
        operator::await_ready();
        let outcome = catch_unwind(AssertUnwindSafe(|| (case.act)(&scene)));
        drop((alone, others));
        let told = outcome.unwrap_or_else(|panic| {
            let text =
                panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            let problem = format!("{}: {}", case.name, text.unwrap_or_default());
            eprintln!("{problem}\n{}", super::cluster::describe(PLACE));
            failed.push(problem.clone());
            problem
        });
        report::add(Line::figures(case.name, Some(began.elapsed()), &told));
    }
    // What was seen of a failure is told by now; what is left would keep the release for those that take it away.
    scene.close();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

impl Scene {
    /// The shop in the namespace of all tests, before a cache whose login and upgrades the tests can handle.
    fn open() -> Self {
        let _operator = (install::beside_others(), install::with_operator());
        operator::await_ready();
        kubectl(&["label", "namespace", PLACE, "larder.dev/injection=enabled", "--overwrite"]).expect("labelled");
        let (tier, _) = Tier::create("shop", VALKEY_8_1, false);
        let shop = Shop::of(PLACE);
        shop.apply(&["app/database.yaml", "policy.yaml", "app/app.yaml"], |text| {
            text.replace("cacheCluster: main", "cacheCluster: shop")
        });
        shop.await_open();
        let pods = shop.pods();
        assert!(pods.len() == 2 && pods.iter().all(has_sidecar), "pods without a sidecar: {pods:?}");
        let customers = Customers::start(&shop);
        Self { shop, tier, customers }
    }

    fn close(self) {
        self.customers.remove();
        self.remove_idle_pod();
        let _ = kubectl(&["-n", PLACE, "delete", "cachepolicy", "kinds", "--ignore-not-found"]);
        let ours =
            ["-n", PLACE, "delete", "--ignore-not-found", "--wait", "deployment/shop", "deployment/shop-db", "service/shop"];
        let _ = kubectl(&[&ours[..], &["service/shop-db", "secret/shop-db", "cachepolicy/shop"]].concat());
        self.tier.delete();
    }

    /// The policy with another TTL.
    fn apply_ttl(&self, ttl: &str) {
        self.shop.apply(&["policy.yaml"], |text| {
            text.replace("cacheCluster: main", "cacheCluster: shop").replace("ttl: 5m", &format!("ttl: {ttl}"))
        });
    }

    /// The seconds that a key of the shop has left, as the primary says.
    fn ttl_of(&self, product: u32) -> i64 {
        let said = self.tier.ask_as_larder(&self.tier.primary(), "6379", &["ttl", &format!("product:{product}")]);
        said.ok().and_then(|said| said.trim().parse().ok()).unwrap_or_else(|| panic!("no TTL of product:{product}"))
    }

    /// What customers see while something is done.
    pub fn visited_during(&self, act: impl FnOnce()) -> Visits {
        self.customers.begin(RATE, WRITES);
        act();
        self.customers.await_more(u64::from(RATE) * 5);
        self.customers.end()
    }

    /// A pod of the shop whose application has a token and does nothing.
    pub fn idle_pod(&self) -> &'static str {
        let manifest = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": IDLE, "namespace": PLACE, "labels": {"app": "shop"}},
            "spec": idle_spec(true, 2),
        });
        if get(PLACE, &format!("pod/{IDLE}")).is_none() {
            apply(&manifest).expect("applied");
        }
        IDLE
    }

    pub fn remove_idle_pod(&self) {
        let _ = kubectl(&["-n", PLACE, "delete", "pod", IDLE, "--ignore-not-found", "--wait"]);
    }

    /// How often the containers of the shop's pods were made, by pod.
    fn incarnations(&self) -> Vec<(String, String)> {
        let mut found: Vec<_> = self.shop.pods().iter().map(|pod| (uid(pod), restarts(pod))).collect();
        found.sort();
        found
    }
}

fn restarts(pod: &Value) -> String {
    let lists = ["initContainerStatuses", "containerStatuses"].into_iter().filter_map(|list| pod["status"][list].as_array());
    lists.flatten().map(|status| format!("{}={} ", status["name"], status["restartCount"])).collect()
}

/// Everybody on both nodes asks for a product that nobody has: the database is asked once.
fn cold_keys_are_loaded_once(scene: &Scene) -> String {
    let pods = scene.shop.pods();
    let nodes: Vec<&Value> = pods.iter().map(|pod| &pod["spec"]["nodeName"]).collect();
    assert!(pods.len() == 2 && nodes[0] != nodes[1], "the shop's pods are on {nodes:?}");
    let readers = 8;
    for product in RARE {
        scene.customers.change(&pods[0], product);
        let before = scene.shop.queries();
        let bodies = scene.customers.read_at_once(&pods, product, readers);
        let faults: Vec<&String> = bodies.iter().filter_map(|body| body.as_ref().err()).collect();
        assert!(faults.is_empty(), "product {product}: {faults:?}");
        let loads = scene.shop.queries() - before;
        assert_eq!(loads, 1, "product {product} was loaded {loads} times for {} readers on two nodes", bodies.len());
    }
    format!("one query each for {} keys, {} readers at once", RARE.count(), 2 * readers)
}

/// Each pod's sidecar follows within seconds, by its own word and by what it stores; no customer notices.
fn a_change_reaches_every_pod(scene: &Scene) -> String {
    scene.shop.scale(FLEET);
    let generation = |pod: &str| scene.shop.figure(pod, "larder_policy_generation");
    let pods = scene.shop.pods();
    let mut delays = Vec::new();
    // Clients that came and are not there any more. Nothing of ours ends a connection, and redis-py keeps those that it has.
    let left = || -> f64 {
        let of = |pod: &Value, series: &str| {
            scene.shop.figure(&name(pod), series).unwrap_or_else(|| panic!("{} has no {series}", name(pod)))
        };
        pods.iter().map(|pod| of(pod, "larder_clients_accepted_total") - of(pod, "larder_clients")).sum()
    };
    let left_before = left();
    let visits = scene.visited_during(|| {
        for round in 0..CHANGES {
            let before: Vec<(String, f64)> =
                pods.iter().map(|pod| (name(pod), generation(&name(pod)).unwrap_or_default())).collect();
            let ttl = ["90s", "80s"][round % 2];
            scene.apply_ttl(ttl);
            let applied = Instant::now();
            let reached = |(pod, before): &(String, f64)| {
                eventually(&format!("{pod} follows the change"), 4 * DELIVERED_WITHIN, || match generation(pod) {
                    Some(now) if now > *before => Ok(applied.elapsed()),
                    now => Err(format!("{now:?}, and {before} before")),
                })
            };
            let reached = &reached;
            thread::scope(|scope| {
                let reached: Vec<_> = before.iter().map(|pod| scope.spawn(move || reached(pod))).collect();
                delays.extend(reached.into_iter().map(|one| one.join().expect("a pod")));
            });
        }
    });
    visits.are_right();
    assert_eq!(left(), left_before, "connections of clients were closed");
    for (pod, product) in pods.iter().zip(RARE.clone().cycle()) {
        scene.customers.change(pod, product);
        let began = Instant::now();
        scene.customers.read(pod, product).unwrap_or_else(|error| panic!("{error}"));
        let ttl = scene.ttl_of(product);
        let passed = i64::try_from(began.elapsed().as_secs()).expect("seconds") + 1;
        assert!((60 - passed..=90).contains(&ttl), "{} stores for {ttl} s", name(pod));
    }
    scene.apply_ttl("5m");
    scene.shop.scale(2);
    delays.sort();
    let (p50, p99) = (delays[delays.len() / 2], delays[delays.len() * 99 / 100]);
    let told = format!("in force after {p50:?} (p50), {p99:?} (p99) over {} times {FLEET} pods; {}", CHANGES, visits.whole);
    assert!(p99 <= DELIVERED_WITHIN, "{told}");
    told
}

/// What a pod could not do before, it can, and is still the same pod.
fn a_second_policy_takes_effect(scene: &Scene) -> String {
    let before = scene.incarnations();
    let pod = name(&scene.shop.pods()[0]);
    let program =
        "import os, redis; c = redis.from_url(os.environ['REDIS_URL']); c.set('offer:1', 'half'); print(c.ttl('offer:1'))";
    let ttl = || {
        let said = scene.shop.python(&pod, "shop", program)?;
        said.trim().parse::<i64>().map_err(|error| format!("{said:?}: {error}"))
    };
    let refused = scene.shop.python(&pod, "shop", program).expect_err("it may write what no policy speaks of");
    assert!(refused.contains("NOPERM") || refused.contains("NoPermission"), "{refused}");
    let offers = json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": "offers", "namespace": PLACE},
        "spec": {
            "cacheCluster": "shop", "workloads": {"matchLabels": {"app": "shop"}},
            "rules": [{"name": "offer", "keys": "offer:{id}", "strategy": "CacheAside", "ttl": "2m"}],
        },
    });
    apply(&offers).expect("applied");
    let applied = Instant::now();
    // The servers permit the keys before the sidecar knows the rule.
    let ttl = eventually("the second policy is in force", Duration::from_secs(30), || match ttl()? {
        -1 => Err("no TTL".to_owned()),
        seconds => Ok(seconds),
    });
    let took = applied.elapsed();
    assert!((90..=120).contains(&ttl), "a TTL of {ttl} s");
    kubectl(&["-n", PLACE, "delete", "cachepolicy", "offers"]).expect("deleted");
    // For a while the keys may still be reached: what was given up is taken away once no sidecar's policy speaks of it.
    eventually("it is out of force once it is gone", Duration::from_secs(120), || {
        match scene.shop.python(&pod, "shop", program) {
            Ok(said) if said.trim() != "-1" => Err(format!("a TTL of {said} s")),
            _ => Ok(()),
        }
    });
    assert_eq!(scene.incarnations(), before, "nothing was restarted for it");
    format!("in force after {took:?}")
}

/// A pod whose application has the account's token: its sidecar does not.
fn no_token_is_mounted(scene: &Scene) -> String {
    let pod = scene.idle_pod();
    let listing = format!("import os; print(sorted(os.listdir('{TOKEN_DIR}')))");
    let of_application = eventually("the pod runs", STARTS_WITHIN, || scene.shop.python(pod, "shop", &listing));
    let found = get(PLACE, &format!("pod/{pod}")).expect("the pod");
    let sidecar = container(&found, "larder-sidecar").expect("a sidecar");
    let mounts = sidecar["volumeMounts"].as_array().expect("mounts");
    let there: Vec<&Value> = mounts.iter().filter(|mount| mount["mountPath"] == TOKEN_DIR).map(|mount| &mount["name"]).collect();
    assert!(of_application.contains("token"), "the application has none either: {of_application}");
    assert_eq!(there, ["larder-no-token"]);
    "an empty directory is in its place".to_owned()
}

/// With the login of its binding a workload reaches its keys, and neither those of others nor what it has no need of.
fn other_keys_are_refused(scene: &Scene) -> String {
    let secret = get(PLACE, &format!("secret/{}", secret_of(&scene.shop.pods()[0]))).expect("the binding's Secret");
    let field = |name: &str| decode(secret["data"][name].as_str().unwrap_or_default());
    let (user, password) = (field("username"), field("password"));
    let primary = scene.tier.primary();
    let ask = |command: &[&str]| {
        // Some of the engines' clients end well after an error reply.
        let said = scene.tier.ask_as(&user, &password, &primary, "6379", command);
        said.unwrap_or_else(|error| error)
    };
    assert!(!ask(&["get", "product:1"]).contains("NOPERM"), "its own keys");
    for command in [
        &["get", "other:1"][..],
        &["set", "other:1", "x"],
        &["flushall"],
        &["config", "get", "*"],
        &["acl", "list"],
        &["keys", "*"],
        &["set", "larder:p:shop", "x"],
        &["eval", "return redis.call('get', 'other:1')", "0"],
        &["publish", "other", "x"],
    ] {
        let said = ask(command);
        // The others are how scripts are told, by one engine and another.
        let words = ["NOPERM", "user executing the script", "ACL failure in script"];
        let refused = words.iter().any(|words| said.contains(words));
        assert!(refused, "{command:?}: {said}");
    }
    format!("NOPERM for the user {user}")
}

/// Opens a connection from a pod: whether that is possible.
fn connects(shop: &Shop, pod: &str, container: &str, address: &str) -> Result<(), String> {
    let program = format!("import socket; socket.create_connection(('{address}', 6379), 3); print('open')");
    shop.python(pod, container, &program).map(drop)
}

/// What a pod of the shop is whose application does nothing, with the account's token or without, and the seconds that it has to end.
fn idle_spec(token: bool, grace: u32) -> Value {
    let security = json!({"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}});
    json!({
        "automountServiceAccountToken": token,
        "terminationGracePeriodSeconds": grace,
        "securityContext": {"runAsNonRoot": true, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{
            "name": "shop", "image": image("LARDER_E2E_SHOP_IMAGE"), "command": ["python3", "-c", "import signal; signal.pause()"],
            // Not ready, and so no pod that customers come to.
            "readinessProbe": {"exec": {"command": ["false"]}}, "securityContext": security,
        }],
    })
}

/// A pod that no sidecar is put into, with labels that others have.
fn stranger(namespace: &str, labels: &Value) {
    let manifest = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": STRANGER, "namespace": namespace, "labels": labels, "annotations": {"larder.dev/inject": "false"},
        },
        "spec": idle_spec(false, 0),
    });
    apply(&manifest).expect("applied");
    eventually("a stranger runs", STARTS_WITHIN, || {
        let found = get(namespace, &format!("pod/{STRANGER}")).ok_or("it is not there")?;
        if has_sidecar(&found) {
            panic!("it has a sidecar")
        }
        if found["status"]["phase"] == "Running" { Ok(()) } else { Err(found["status"].to_string()) }
    });
}

/// The namespace, and the label that injection gives, in one peer: injected pods get through, and neither pods of the namespace that look like
/// them but for that, nor pods of another namespace that have that label, too.
fn others_do_not_get_through(scene: &Scene) -> String {
    let binding = scene.shop.pods()[0]["metadata"]["labels"]["larder.dev/binding"].clone();
    assert!(binding.is_string(), "injected pods are labelled with their binding");
    let peer = json!({
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": PLACE}},
        "podSelector": {"matchLabels": {"larder.dev/binding": binding}},
    });
    let service = get(PLACE, &format!("service/{}", scene.tier.primary())).expect("the primary's Service");
    let address = service["spec"]["clusterIP"].as_str().expect("an address").to_owned();
    stranger(PLACE, &json!({"app": "shop"}));
    stranger(ELSEWHERE, &json!({"app": "shop", "larder.dev/binding": binding}));
    let elsewhere = Shop::of(ELSEWHERE);
    let strangers = [(&scene.shop, "customers", "customers"), (&scene.shop, STRANGER, "shop"), (&elsewhere, STRANGER, "shop")];
    for (shop, pod, container) in &strangers[..2] {
        connects(shop, pod, container, &address).expect("by default all pods of the namespace get through");
    }
    scene.tier.patch(&json!({"networkPolicy": {"from": [peer]}}));
    for (shop, pod, container) in strangers {
        eventually(&format!("{pod} of {} gets through no more", shop.namespace), Duration::from_secs(60), || {
            match connects(shop, pod, container, &address) {
                Ok(()) => Err("it reaches the cache".to_owned()),
                Err(_) => Ok(()),
            }
        });
    }
    for pod in scene.shop.pods() {
        connects(&scene.shop, &name(&pod), "shop", &address).unwrap_or_else(|error| panic!("an injected pod: {error}"));
    }
    scene.visited_during(|| {}).are_right();
    scene.tier.patch(&json!({"networkPolicy": null}));
    scene.tier.settle("with an open network");
    for namespace in [PLACE, ELSEWHERE] {
        kubectl(&["-n", namespace, "delete", "pod", STRANGER, "--wait=false"]).expect("deleted");
    }
    "refused to the namespace's other pods, to one that looks like the shop, and to one of another namespace with the binding's label".to_owned()
}

/// A Django site with its own Redis cache, as its documentation has it.
fn django_caches(scene: &Scene) -> String {
    let policy = json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": "site", "namespace": PLACE},
        "spec": {
            "cacheCluster": "shop", "workloads": {"matchLabels": {"app": "site"}},
            // As docs/django.md advises: Django asks again and again for keys that nobody stores.
            "rules": [{
                "name": "site", "keys": "site:{key…}", "strategy": "CacheAside", "maxTtl": "1h", "stampede": {"atWaitEnd": "Miss"},
            }],
        },
    });
    apply(&policy).expect("applied");
    let security = json!({"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}});
    let template = json!({
        "metadata": {"labels": {"app": "site"}},
        "spec": {
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 2,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "site", "image": image("LARDER_E2E_SHOP_IMAGE"), "command": ["python3", "/app/django_site.py"],
                "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 2}, "securityContext": security,
            }],
        },
    });
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "site", "namespace": PLACE},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "site"}}, "template": template},
    });
    apply(&deployment).expect("applied");
    let pod = eventually("the site", STARTS_WITHIN, || {
        let pods = scene.shop.pods_of("site");
        pods.first().cloned().ok_or_else(|| super::cluster::describe(PLACE))
    });
    assert!(has_sidecar(&pod));
    let visit = |page: &str| {
        let path = format!("/api/v1/namespaces/{PLACE}/pods/{}:8080/proxy/{page}", name(&pod));
        super::api::get(&path).unwrap_or_else(|| panic!("the site does not answer {page}"))
    };
    // It was not started before its policy and its user were in force: the first visit already succeeds.
    let first = visit("page");
    for _ in 0..5 {
        assert_eq!(visit("page"), first, "the page is made once a minute");
    }
    let counted: Vec<Value> = (0..3).map(|_| visit("visits")).collect();
    let numbers: Vec<&Value> = counted.iter().map(|found| &found["visits"]).collect();
    assert_eq!(numbers, [&json!(1), &json!(2), &json!(3)]);
    assert_eq!(counted[2]["many"], json!({"visits": 3}));
    let hits = scene.shop.figure(&name(&pod), "larder_rule_hits_total").unwrap_or_default();
    for kind in ["deployment", "cachepolicy"] {
        kubectl(&["-n", PLACE, "delete", kind, "site", "--wait"]).expect("deleted");
    }
    assert!(hits >= 5.0, "{hits} reads were answered from the cache");
    format!("{hits} hits")
}

/// The snapshot of a workload as its sidecars mount it.
pub fn snapshot_of(pod: &Value) -> Result<Value, String> {
    let volume = volume(pod, "larder-policy").ok_or("no policy is mounted")?;
    let map = volume["configMap"]["name"].as_str().ok_or("no name")?;
    let found = get(PLACE, &format!("configmap/{map}")).ok_or(format!("no ConfigMap {map}"))?;
    let text = found["data"]["snapshot.json"].as_str().ok_or(format!("{map} is empty"))?;
    serde_json::from_str(text).map_err(|error| format!("{map}: {error}"))
}

/// Waits until each of these pods is given a policy that says something, and its sidecar follows that or a later one.
pub fn await_snapshot(what: &str, pods: &[Value], says: impl Fn(&Value) -> bool) {
    let shop = Shop::of(PLACE);
    eventually(&format!("sidecars have heard of {what}"), FOLLOWED_WITHIN, || {
        for pod in pods {
            let snapshot = snapshot_of(pod)?;
            if !says(&snapshot) {
                return Err(format!("{} is given {snapshot}", name(pod)));
            }
            let (told, follows) = (snapshot["generation"].as_f64(), shop.figure(&name(pod), "larder_policy_generation"));
            if follows < told {
                return Err(format!("{} follows {follows:?} of {told:?}", name(pod)));
            }
        }
        Ok(())
    });
}

/// A workload whose annotation asks for a sidecar of a former build: it is served, and its policy is said in that build's form, also when it
/// changes; once the sidecar is of this build, it is said in the newest.
fn an_older_sidecar_is_told_what_it_understands(scene: &Scene) -> String {
    let policy = |ttl: &str| {
        json!({
            "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy", "metadata": {"name": "older", "namespace": PLACE},
            "spec": {
                "cacheCluster": "shop", "workloads": {"matchLabels": {"app": "older"}},
                "rules": [{"name": "older", "keys": "older:{id}", "strategy": "CacheAside", "ttl": ttl}],
            },
        })
    };
    let deployment = |annotations: &Value| {
        let security =
            json!({"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}});
        let template = json!({
            "metadata": {"labels": {"app": "older"}, "annotations": annotations},
            "spec": {
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 2,
                "securityContext": {"runAsNonRoot": true, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{
                    "name": "older", "image": image("LARDER_E2E_SHOP_IMAGE"), "securityContext": security,
                    "command": ["python3", "-c", "import signal; signal.pause()"],
                }],
            },
        });
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "older", "namespace": PLACE},
            "spec": {
                "replicas": 1, "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": {"app": "older"}}, "template": template,
            },
        })
    };
    let the_pod = |image: &dyn Fn(&str) -> bool| {
        eventually("a pod with that sidecar", STARTS_WITHIN, || {
            let is_it =
                |pod: &Value| container(pod, "larder-sidecar").and_then(|sidecar| sidecar["image"].as_str()).is_some_and(image);
            scene.shop.pods_of("older").into_iter().find(is_it).ok_or_else(|| super::cluster::describe(PLACE))
        })
    };
    let stores_for = |pod: &Value, range: std::ops::RangeInclusive<i64>| {
        let program =
            "import os, redis; c = redis.from_url(os.environ['REDIS_URL']); c.set('older:1', 'x'); print(c.ttl('older:1'))";
        eventually("its policy is in force", DELIVERED_WITHIN * 6, || {
            let said = scene.shop.python(&name(pod), "older", program)?;
            let ttl: i64 = said.trim().parse().map_err(|error| format!("{said:?}: {error}"))?;
            if range.contains(&ttl) { Ok(()) } else { Err(format!("a TTL of {ttl} s")) }
        });
    };
    let newest = snapshot_of(&scene.shop.pods()[0]).expect("the shop's own")["version"].as_u64().expect("a form");
    let form = |pod: &Value, what: &str, wanted: &dyn Fn(u64) -> bool| {
        eventually(what, HEARD_WITHIN, || {
            let version = snapshot_of(pod)?["version"].as_u64().ok_or("no form")?;
            if wanted(version) { Ok(version) } else { Err(format!("it is {version}, and the newest {newest}")) }
        })
    };

    let old = image(OLD_IMAGE);
    apply(&policy("2m")).expect("applied");
    apply(&deployment(&json!({"larder.dev/sidecar-image": old}))).expect("applied");
    let pod = the_pod(&|image| image == old);
    stores_for(&pod, 90..=120);
    let older = form(&pod, "it is told in its own form", &|version| version < newest);
    apply(&policy("50s")).expect("applied");
    stores_for(&pod, 35..=50);
    assert_eq!(form(&pod, "it is still told so", &|_| true), older);
    apply(&deployment(&json!({}))).expect("applied");
    let pod = the_pod(&|image| image != old);
    stores_for(&pod, 35..=50);
    form(&pod, "a sidecar of now is told in the newest form", &|version| version == newest);
    for kind in ["deployment", "cachepolicy"] {
        kubectl(&["-n", PLACE, "delete", kind, "older", "--wait"]).expect("deleted");
    }
    format!("form {older} as long as the sidecar was of {old}, then {newest}")
}

/// Every server is replaced by one of the next version.
fn an_upgrade_is_not_noticed(scene: &Scene) -> String {
    let newer = VALKEY_8_1.newer().expect("a newer one");
    let before = scene.tier.server_uids();
    let visits = scene.visited_during(|| {
        scene.tier.patch(&json!({"engine": newer.spec()}));
        eventually("every server is another one", super::tier::SETTLES_WITHIN, || {
            let now = scene.tier.server_uids();
            if now.is_disjoint(&before) { scene.tier.settled() } else { Err("some are the same".to_owned()) }
        });
    });
    visits.are_right();
    visits.whole.to_string()
}

/// A primary dies at once: sentinels notice, and promote another. What was forgotten in the last moment before may come back for as long as
/// it lives, which is told and not judged: replication is asynchronous.
fn a_failover_is_not_noticed(scene: &Scene) -> String {
    let primary = scene.tier.primary();
    let visits = scene.visited_during(|| {
        kill_process(&primary, &scene.tier.engine.server());
        eventually("another serves as primary", Duration::from_secs(90), || match scene.tier.primary_seen(None)? {
            now if now == primary => Err(format!("{now} still is")),
            _ => Ok(()),
        });
        scene.tier.settle("after the failover");
    });
    assert_eq!((visits.failed, visits.wrong, visits.strange_rows), (0, 0, 0), "{}", visits.whole);
    visits.whole.to_string()
}

/// The API server, as long as it stands still.
struct ApiServerStands {
    node: String,
}

impl ApiServerStands {
    fn begin() -> Self {
        let found = kubectl(&["get", "nodes", "-l", "node-role.kubernetes.io/control-plane", "-o", "name"]).expect("nodes");
        let node = found.trim().trim_start_matches("node/").to_owned();
        let stands = Self { node };
        stands.signal("STOP").unwrap_or_else(|error| panic!("{error}"));
        stands
    }

    fn signal(&self, signal: &str) -> Result<String, String> {
        let script = format!(
            "for file in /proc/[0-9]*/comm; do if [ \"$(cat $file 2>/dev/null)\" = kube-apiserver ]; then \
             pid=${{file%/comm}}; kill -{signal} ${{pid#/proc/}} && echo told; fi; done"
        );
        let said = run("docker", &["exec", &self.node, "sh", "-c", &script], "")?;
        if said.contains("told") { Ok(said) } else { Err(format!("no API server runs on {}", self.node)) }
    }
}

impl Drop for ApiServerStands {
    fn drop(&mut self) {
        if let Err(error) = self.signal("CONT") {
            eprintln!("the API server still stands: {error}");
        }
    }
}

/// The operator is away, and for a while the API server: customers notice nothing. A sidecar and an application that start again while it is
/// away find their policy where they left it.
fn nobody_needs_the_operator(scene: &Scene) -> String {
    let away = Away::begin();
    let visits = scene.visited_during(|| {
        let stands = ApiServerStands::begin();
        // Nothing can be asked meanwhile, and nothing is waited for but the end of it.
        thread::sleep(WITHOUT_API_SERVER);
        drop(stands);
        eventually("the API server answers", STARTS_WITHIN, || kubectl(&["get", "--raw", "/readyz"]));
    });
    visits.are_right();
    let pod = scene.shop.pods().remove(0);
    let (inside, address) = (Inside::of(&name(&pod)), pod["status"]["podIP"].as_str().expect("an address").to_owned());
    let stands = ApiServerStands::begin();
    for program in ["larderd", "python3"] {
        inside.kill(program);
        eventually(&format!("{program} of {} starts again without an API server", name(&pod)), STARTS_WITHIN, || {
            inside.runs(program)
        });
        for product in RARE {
            eventually(&format!("product {product} after a restart of {program}"), STARTS_WITHIN, || {
                let said = inside.visit(&address, &format!("/products/{product}"))?;
                if said.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(said) }
            });
        }
    }
    drop(stands);
    eventually("the API server answers", STARTS_WITHIN, || kubectl(&["get", "--raw", "/readyz"]));
    eventually("the pod is ready", STARTS_WITHIN, || {
        let found = get(PLACE, &format!("pod/{}", name(&pod))).ok_or("it is gone")?;
        let again = restarts(&found) != restarts(&pod);
        if super::tier::is_ready(&found) && again { Ok(()) } else { Err(restarts(&found)) }
    });
    let generation = scene.shop.figure(&name(&pod), "larder_policy_generation").unwrap_or_default();
    away.end();
    assert!(generation > 0.0, "the sidecar that started again follows no policy");
    visits.whole.to_string()
}
