//! The shop of examples/, its database, and its customers, who compare every body with what the database says.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::api;
use super::cluster::{apply, eventually, kubectl, list, name, run};
use super::install::{PLACE, image};
use super::tier::{VALKEY_8_1, is_ready};

/// Pods that run.
const STARTS_WITHIN: Duration = Duration::from_secs(180);
/// The example's manifests.
const FILES: [&str; 4] = ["app/database.yaml", "app/app.yaml", "cache.yaml", "policy.yaml"];
/// What they say of places, which differ here.
const IMAGE: &str = "registry.example/shop:1";
const POSTGRES: &str = "postgres:17";
const ENGINE: &str = "{kind: Valkey, version: \"8.1\"}";
/// The number of the server's user in [`POSTGRES`], and in the image that tests/kind makes.
const USERS: (&str, &str) = ("999", "10001");

/// The command of a container of the shop's image in which the test runs what it likes. The image that tests/kind makes has Python alone.
const WAITS_TO_BE_TOLD: [&str; 3] = ["python3", "-c", "import signal; signal.pause()"];

/// A Deployment `name` of pods of the shop's image that wait for somebody to run a program in them.
pub fn pods_that_wait(name: &str, replicas: usize) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": PLACE},
        "spec": {
            "replicas": replicas, "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {
                    "automountServiceAccountToken": false,
                    "terminationGracePeriodSeconds": 2,
                    "securityContext": {"runAsNonRoot": true, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
                    "containers": [{
                        "name": "app", "image": image("LARDER_E2E_SHOP_IMAGE"), "command": WAITS_TO_BE_TOLD,
                        "securityContext": {
                            "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
                        },
                    }],
                },
            },
        },
    })
}

/// One of the example's files, as it stands but for where images are.
pub fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/shop").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let text = text.replace(IMAGE, &image("LARDER_E2E_SHOP_IMAGE")).replace(ENGINE, &VALKEY_8_1.spec().to_string());
    match env::var("LARDER_E2E_ENGINES") {
        Ok(prefix) => {
            let postgres = format!("image: {prefix}postgres:15");
            text.replace(&format!("image: {POSTGRES}"), &postgres).replace(&format!(": {}", USERS.0), &format!(": {}", USERS.1))
        }
        Err(_) => text,
    }
}

/// A directory in which the commands of the README run: the chart, and the example with its places put in.
pub fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::os::unix::fs::symlink(root.join("charts"), directory.path().join("charts")).expect("a link");
    let shop = directory.path().join("examples/shop");
    fs::create_dir_all(shop.join("app")).expect("a directory");
    for name in FILES {
        fs::write(shop.join(name), file(name)).expect("a file");
    }
    directory
}

/// The shop in one namespace.
pub struct Shop {
    pub namespace: String,
}

impl Shop {
    pub fn of(namespace: &str) -> Self {
        Self { namespace: namespace.to_owned() }
    }

    /// Applies some of the example's files, each changed as it is to be here.
    pub fn apply(&self, files: &[&str], change: impl Fn(String) -> String) {
        for name in files {
            run("kubectl", &["-n", &self.namespace, "apply", "-f", "-"], &change(file(name))).expect(name);
        }
    }

    /// Waits until all that was applied serves, and has the database count its queries.
    pub fn await_open(&self) {
        for deployment in ["shop-db", "shop"] {
            let rollout = ["-n", &self.namespace, "rollout", "status", &format!("deployment/{deployment}"), "--timeout=180s"];
            kubectl(&rollout).unwrap_or_else(|error| panic!("{error}\n{}", super::cluster::describe(&self.namespace)));
        }
        self.sql("CREATE EXTENSION IF NOT EXISTS pg_stat_statements");
    }

    pub fn sql(&self, query: &str) -> String {
        let command = ["-n", &self.namespace, "exec", "deployment/shop-db", "--", "psql", "-h", "127.0.0.1", "-U", "postgres"];
        let password = ["env", "PGPASSWORD=change-me"];
        let (place, psql) = command.split_at(5);
        let line = [place, &password, psql, &["-tAqc", query]].concat();
        eventually(&format!("the database answers {query}"), Duration::from_secs(60), || kubectl(&line))
    }

    /// How often the shop has asked for a product, as Postgres itself counts.
    pub fn queries(&self) -> u64 {
        let counted = self.sql("SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements WHERE query LIKE '%pg_sleep(%'");
        counted.parse().unwrap_or_else(|error| panic!("{counted:?}: {error}"))
    }

    /// Its pods that are ready, those on their way out left aside.
    pub fn pods(&self) -> Vec<Value> {
        self.pods_of("shop")
    }

    pub fn pods_of(&self, app: &str) -> Vec<Value> {
        list(&self.namespace, "pods", &format!("app={app}")).into_iter().filter(is_ready).collect()
    }

    pub fn scale(&self, replicas: usize) {
        kubectl(&["-n", &self.namespace, "scale", "deployment/shop", &format!("--replicas={replicas}")]).expect("scaled");
        eventually(&format!("{replicas} pods of the shop"), STARTS_WITHIN, || match self.pods().len() {
            found if found == replicas => Ok(()),
            found => Err(format!("{found} are ready\n{}", super::cluster::describe(&self.namespace))),
        });
    }

    /// One figure of a pod's sidecar, over all labels.
    pub fn figure(&self, pod: &str, series: &str) -> Option<f64> {
        let text = api::text(&format!("/api/v1/namespaces/{}/pods/{pod}:9121/proxy/metrics", self.namespace))?;
        let of_series = text.lines().filter_map(|line| {
            let (found, value) = line.rsplit_once(' ')?;
            let name = found.split_once('{').map_or(found, |(name, _)| name);
            (name == series).then(|| value.parse::<f64>().ok()).flatten()
        });
        of_series.reduce(|sum, value| sum + value)
    }

    /// Runs Python beside the application in one of its pods, with its variables.
    pub fn python(&self, pod: &str, container: &str, program: &str) -> Result<String, String> {
        kubectl(&["-n", &self.namespace, "exec", pod, "-c", container, "--", "python3", "-c", program])
    }
}

/// A container of a pod, by its name.
pub fn container<'a>(pod: &'a Value, name: &str) -> Option<&'a Value> {
    let lists = ["initContainers", "containers"].into_iter().filter_map(|list| pod["spec"][list].as_array());
    lists.flatten().find(|container| container["name"] == name)
}

/// A volume of a pod, by its name.
pub fn volume<'a>(pod: &'a Value, name: &str) -> Option<&'a Value> {
    pod["spec"]["volumes"].as_array()?.iter().find(|volume| volume["name"] == name)
}

/// The name of the Secret of a pod's binding.
pub fn secret_of(pod: &Value) -> String {
    let mounted = volume(pod, "larder-secret").expect("the binding's Secret");
    mounted["secret"]["secretName"].as_str().expect("a name").to_owned()
}

pub fn has_sidecar(pod: &Value) -> bool {
    container(pod, "larder-sidecar").is_some()
}

/// The pod from which the shop is visited. It has no sidecar.
pub struct Customers {
    namespace: String,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Visits {
    pub requests: u64,
    pub failed: u64,
    pub wrong: u64,
    pub older: u64,
    pub strange_rows: u64,
    pub p50_ms: f64,
    pub whole: Value,
}

impl Customers {
    const POD: &str = "customers";

    pub fn start(shop: &Shop) -> Self {
        let customers = Self { namespace: shop.namespace.clone() };
        customers.remove();
        let environment = json!([
            {"name": "TARGET", "value": "http://shop"},
            {"name": "DATABASE_URL", "valueFrom": {"secretKeyRef": {"name": "shop-db", "key": "url"}}},
            // As in the example's app.yaml.
            {"name": "PAGE_KIB", "value": "47"},
        ]);
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": Self::POD, "namespace": shop.namespace, "labels": {"app": "customers"}},
            "spec": {
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "securityContext": {"runAsNonRoot": true, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{
                    "name": "customers",
                    "image": image("LARDER_E2E_SHOP_IMAGE"),
                    "command": ["python3", "/app/load.py"],
                    "env": environment,
                    "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8081}, "periodSeconds": 2},
                    "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}},
                }],
            },
        });
        apply(&pod).expect("applied");
        eventually("the customers", STARTS_WITHIN, || match shop.pods_of("customers").len() {
            1 => Ok(()),
            found => Err(format!("{found} pods")),
        });
        customers
    }

    pub fn remove(&self) {
        let _ = kubectl(&["-n", &self.namespace, "delete", "pod", Self::POD, "--ignore-not-found", "--wait"]);
    }

    fn ask(&self, what: &str) -> Result<Value, String> {
        let path = format!("/api/v1/namespaces/{}/pods/{}:8081/proxy/{what}", self.namespace, Self::POD);
        api::get(&path).ok_or_else(|| format!("the customers do not answer {what}: see their log"))
    }

    /// Begins a run: so many reads and changed prices a second.
    pub fn begin(&self, rate: u32, writes: u32) {
        self.ask(&format!("begin?rate={rate}&writes={writes}")).unwrap_or_else(|error| panic!("{error}"));
        self.await_more(u64::from(rate));
    }

    /// Waits until so many more requests were made.
    pub fn await_more(&self, more: u64) {
        let asked = |status: &Value| status["requests"].as_u64().unwrap_or(0);
        let before =
            eventually("the customers say how far they are", STARTS_WITHIN, || self.ask("status").map(|now| asked(&now)));
        eventually(&format!("{more} more requests"), Duration::from_secs(60) + Duration::from_millis(more * 50), || {
            let now = self.ask("status")?;
            if asked(&now) >= before + more { Ok(()) } else { Err(now.to_string()) }
        });
    }

    /// Ends the run.
    pub fn end(&self) -> Visits {
        let whole = self.ask("end").unwrap_or_else(|error| panic!("{error}"));
        let number = |field: &str| whole[field].as_u64().unwrap_or_else(|| panic!("{field} of {whole}"));
        Visits {
            requests: number("requests"),
            failed: number("failed"),
            wrong: number("wrong"),
            older: number("older"),
            strange_rows: number("database"),
            p50_ms: whole["p50Ms"].as_f64().unwrap_or_else(|| panic!("no reply at all: {whole}")),
            whole: whole.clone(),
        }
    }

    /// Reads one product from one pod of the shop.
    pub fn read(&self, pod: &Value, product: u32) -> Result<Value, String> {
        let found = self.ask(&format!("product?id={product}&at={}", at(pod)))?;
        if found["fault"].is_null() { Ok(found) } else { Err(found.to_string()) }
    }

    /// Changes a product's price through one pod, which forgets it.
    pub fn change(&self, pod: &Value, product: u32) {
        self.ask(&format!("delete?id={product}&at={}", at(pod))).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Reads one product from several pods at the same time, from each so many times.
    pub fn read_at_once(&self, pods: &[Value], product: u32, times: usize) -> Vec<Result<Value, String>> {
        thread::scope(|scope| {
            let readers = (0..times).flat_map(|_| pods).map(|pod| scope.spawn(move || self.read(pod, product)));
            let readers: Vec<_> = readers.collect();
            readers.into_iter().map(|reader| reader.join().expect("a reader")).collect()
        })
    }
}

fn at(pod: &Value) -> String {
    let address = pod["status"]["podIP"].as_str().unwrap_or_else(|| panic!("{} has no address", name(pod)));
    api::escaped(&format!("http://{address}:8080"))
}

impl Visits {
    /// Nothing failed, and no body was other than what the database says.
    #[track_caller]
    pub fn are_right(&self) {
        assert!(self.requests > 0, "nobody came: {}", self.whole);
        assert_eq!((self.failed, self.wrong, self.older, self.strange_rows), (0, 0, 0, 0), "{}", self.whole);
    }
}

/// The README.
pub fn readme() -> String {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
