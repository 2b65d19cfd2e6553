//! The README's quick start on Kubernetes, word for word but for where images are, and what comes of it: the shop before and after.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::{apply, eventually, get, kubectl, list, run};
use super::install::{self, RELEASE, SYSTEM, image};
use super::report::{self, Line};
use super::shop::{Customers, Shop, Visits, directory, has_sidecar, readme};
use super::tier::{VALKEY_8_1, decode};

/// The section of the README, and the namespaces that it makes.
const SECTION: &str = "## On Kubernetes";
const PLACES: [&str; 2] = ["shop", "larder-system"];
/// A namespace in which the same shop runs without Larder.
const BEFORE: &str = "larder-e2e-shop-before";
/// The customers' reads a second, and changed prices.
const RATE: u32 = 160;
const WRITES: u32 = 1;
/// How many requests are made before those that count, so that the cache is full and keys have begun to expire; and how many count.
const WARM_UP: u64 = 120 * RATE as u64;
const COUNTED: u64 = 240 * RATE as u64;
/// How many count without a cache, where each is a query.
const COUNTED_BEFORE: u64 = 3000;
/// The definitions, which outlive a release.
const DEFINITIONS: [&str; 2] = ["cacheclusters.larder.dev", "cachepolicies.larder.dev"];

/// The indented lines of the section: what a person would copy.
fn commands() -> String {
    let readme = readme();
    let section = readme.split_once(SECTION).unwrap_or_else(|| panic!("the README has no section {SECTION:?}")).1;
    let section = section.split("\n## ").next().unwrap_or_default();
    let lines: Vec<&str> = section.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    assert!(lines.iter().any(|line| line.contains("helm install")), "the section {SECTION:?} installs nothing");
    let larder = image("LARDER_E2E_IMAGE");
    let (repository, tag) = larder.rsplit_once(':').expect("LARDER_E2E_IMAGE is REPOSITORY:TAG");
    let (said, here) =
        ("image.repository=registry.example/larder", format!("image.repository={repository} --set-string image.tag={tag}"));
    let text = lines.join("\n");
    assert!(text.contains(said), "{text}");
    text.replace(said, &here)
}

/// The cluster without the release of the other tests, which gets it back when this is dropped.
struct Bare;

impl Bare {
    fn make() -> Self {
        let bare = Self;
        run("helm", &["uninstall", RELEASE, "--namespace", SYSTEM, "--wait", "--timeout", "120s"], "").expect("uninstalled");
        clear();
        bare
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        clear();
        if let Err(error) = install::install() {
            eprintln!("the release of the other tests is not there again: {error}");
        }
    }
}

/// Takes away all that this test makes.
fn clear() {
    let _ = kubectl(&[
        "-n",
        "shop",
        "delete",
        "cachepolicies,cacheclusters",
        "--all",
        "--ignore-not-found",
        "--wait",
        "--timeout=120s",
    ]);
    let _ = run("helm", &["uninstall", "larder", "--namespace", "larder-system", "--ignore-not-found", "--wait"], "");
    for namespace in PLACES.iter().chain([&BEFORE]) {
        let _ = kubectl(&["delete", "namespace", namespace, "--ignore-not-found", "--wait", "--timeout=180s"]);
    }
    for definition in DEFINITIONS {
        let _ = kubectl(&["delete", "crd", definition, "--ignore-not-found", "--wait", "--timeout=60s"]);
    }
}

/// A run of customers, and how many queries each of their requests took.
fn measure(shop: &Shop, customers: &Customers, requests: u64) -> (Visits, f64) {
    let before = shop.queries();
    customers.begin(RATE, WRITES);
    customers.await_more(requests);
    let visits = customers.end();
    visits.are_right();
    let queries = shop.queries() - before;
    let ratio = queries as f64 / visits.requests as f64;
    (visits, ratio)
}

/// The same shop where no namespace opted in: each request is a query.
fn without_larder() -> (Visits, f64) {
    let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
    apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": BEFORE, "labels": labels}}))
        .expect("a namespace");
    let shop = Shop::of(BEFORE);
    shop.apply(&["app/database.yaml", "app/app.yaml"], |text| text);
    shop.await_open();
    assert!(shop.pods().iter().all(|pod| !has_sidecar(pod)));
    let customers = Customers::start(&shop);
    let found = measure(&shop, &customers, COUNTED_BEFORE);
    kubectl(&["delete", "namespace", BEFORE, "--wait", "--timeout=180s"]).expect("deleted");
    found
}

#[test]
fn policies_quick_start_takes_nine_of_ten_queries_away() {
    let _cluster = install::cluster_alone();
    let _bare = Bare::make();
    let (before, queries_before) = without_larder();

    let began = Instant::now();
    let place = directory();
    let script = format!("set -eu\ncd '{}'\n{}", place.path().display(), commands());
    run("bash", &["-c", &script], "").expect("the README's commands");
    let shop = Shop::of("shop");
    shop.await_open();
    let pods = shop.pods();
    assert!(pods.len() == 2 && pods.iter().all(has_sidecar), "{} pods, not all with a sidecar", pods.len());
    let took = began.elapsed();

    let customers = Customers::start(&shop);
    customers.begin(RATE, WRITES);
    customers.await_more(WARM_UP);
    customers.end().are_right();
    let (after, queries_after) = measure(&shop, &customers, COUNTED);
    let evicted = evicted(&shop.namespace);
    let figures = format!(
        "queries per request {queries_before:.3} without, {queries_after:.3} with; p50 {} ms without, {} ms with; {evicted} keys evicted; {}",
        before.p50_ms, after.p50_ms, after.whole
    );
    report::add(Line::figures("README's quick start", Some(took), &figures));
    assert!(queries_before > 0.9, "without a cache each request is a query: {figures}");
    assert!(queries_after <= 0.1 * queries_before, "{figures}");
    // Not everything fits, as examples/shop/cache.yaml has it.
    assert!(evicted > 0, "the cache held all there was: {figures}");
    // A query waits for twenty milliseconds by itself: who asks the cache alone saves nearly all of that.
    assert!(after.p50_ms < before.p50_ms - 15.0, "{figures}");
    status_tells(&shop);
    // With all that is in it, and the operator there: nothing holds it.
    customers.remove();
    kubectl(&["delete", "namespace", &shop.namespace, "--wait", "--timeout=300s"]).expect("the namespace ends");
}

/// How many keys the primary of the shop's cache has evicted since it began, as it says itself.
fn evicted(namespace: &str) -> u64 {
    let cluster = get(namespace, "cachecluster/main").expect("the cache");
    let primary = cluster["status"]["servers"]["primary"].as_str().expect("a primary").to_owned();
    let login = get(namespace, "secret/main-system").expect("the login of Larder's own");
    let field = |name: &str| decode(login["data"][name].as_str().unwrap_or_default());
    let (cli, user, password) = (VALKEY_8_1.cli(), field("username"), field("password"));
    let place = ["-n", namespace, "exec", "-q", &primary, "--", &cli, "-p", "6379"];
    let asks = ["--user", &user, "--pass", &password, "--no-auth-warning", "info", "stats"];
    let said = kubectl(&[&place[..], &asks].concat()).unwrap_or_else(|error| panic!("{error}"));
    let count = said.lines().find_map(|line| line.trim_end().strip_prefix("evicted_keys:")?.parse().ok());
    count.unwrap_or_else(|| panic!("{primary} does not say how much it evicted: {said}"))
}

/// What `kubectl get` shows of it in the end.
fn status_tells(shop: &Shop) {
    let percent =
        |status: &Value, field: &str| status[field].as_str().and_then(|text| text.strip_suffix('%')?.parse::<f64>().ok());
    eventually("the policy's status", Duration::from_secs(60), || {
        let policy = get(&shop.namespace, "cachepolicy/shop").ok_or("there is no policy")?;
        let status = &policy["status"];
        let accepted = super::cluster::condition(&policy, "Accepted").ok_or(status.to_string())?;
        let is_told = accepted["status"] == "True"
            && status["sidecars"]["current"] == "2/2"
            && percent(status, "hitRatio").is_some_and(|hits| hits >= 80.0)
            && percent(status, "originLoadSaved").is_some_and(|saved| saved >= 80.0);
        if is_told { Ok(()) } else { Err(status.to_string()) }
    });
    assert_eq!(list(&shop.namespace, "pods", "larder.dev/binding").len(), 2);
}
