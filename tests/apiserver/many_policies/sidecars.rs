//! Sidecars that speak under many policies, by their heartbeats: ten thousand under five hundred. What they take of the operator, of the
//! API server and of the cache while all stays as it is, while every figure moves, and while policies change.
//!
//! Their pods are objects of the API server, and nothing more. What they say goes through a real server, which stands behind the played
//! primary.

use std::net::SocketAddr;

use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use larder::policy::Snapshot;

use super::speaker::{Course, Speaker};
use super::*;
use crate::scene::restricted;
use crate::support::crowd::{Crowd, Load, Tally, Voice};
use crate::support::resp::Value as Reply;
use crate::support::server::{Engine, Redis};

/// Workloads of the one namespace, and sidecars of each.
const WORKLOADS: usize = 125;
const SIDECARS: usize = 80;
/// Pods that are made at the same time.
const AT_ONCE: usize = 16;
/// Of each policy a status is written at most once in so many seconds.
const APART: f64 = 10.0;
/// What one change writes of a binding at the most: the snapshot as it was kept, the one that is mounted, the one of long ago.
const MOST_OBJECTS: usize = 3;
/// The Secret with the users, as they are without what they could do before; the CacheCluster's status, when that is begun and when it is proved.
const MOST_OF_USERS: usize = 3;
/// The most memory for each sidecar and its pod.
const MOST_FOR_SIDECAR_KIB: f64 = 8.0;

/// What was used and asked in some time.
#[derive(Debug)]
struct Window {
    what: &'static str,
    time: Duration,
    /// Seconds of a processor.
    cpu: f64,
    memory_kib: u64,
    asked: Asked,
    /// How often the status of each policy was written.
    statuses: BTreeMap<String, usize>,
    counted: u64,
    looks: f64,
    heartbeats: u64,
    unheard: u64,
    load: Load,
}

/// How long it took from the answer to a change, sorted.
#[derive(Debug)]
struct Reached {
    config_map: Vec<Duration>,
    cache: Vec<Duration>,
    /// Until every status says that every sidecar has it, from the last change on.
    statuses: Duration,
}

/// In the order in which they end.
struct Speaking {
    speaker: Speaker,
    server: Redis,
    many: Many,
}

/// Policies that are delivered, and pods that mount what comes of them. The server that their cache's primary is kept by.
async fn begin() -> (Many, Redis) {
    let mut many = Many::begin(&PLACES[..1]).await;
    let server = Redis::start(Engine::Redis7);
    let kept_by = SocketAddr::from(([127, 0, 0, 1], server.port()));
    many.scene.stage.with(PLACES[0], "main", |tier| tier.kept_by = Some(kept_by));
    many.arrive(WORKLOADS).await;
    (many, server)
}

fn binding(number: usize) -> BindingName {
    BindingName::of("Deployment", &workload(number), "main")
}

/// The pods of all workloads, as the injector would make them.
async fn make_pods(many: &Many) {
    // A controller makes it, which is not here.
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"namespace": PLACES[0], "name": "default"}});
    many.scene.apply(&account).await.expect("a ServiceAccount");
    let api = many.scene.api::<Pod>(PLACES[0]);
    let pods = (0..WORKLOADS).flat_map(|app| (0..SIDECARS).map(move |number| pod(app, number)));
    let made = stream::iter(pods).map(|pod| {
        let api = api.clone();
        async move { api.create(&PostParams::default(), &pod).await.expect("a pod") }
    });
    made.buffer_unordered(AT_ONCE).for_each(|_| async {}).await;
}

fn pod(app: usize, number: usize) -> Pod {
    let (name, binding) = (workload(app), binding(app));
    let labels = json!({"app": name, "pod-template-hash": "6f7c", "larder.dev/binding": binding.as_str()});
    let owner =
        json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{name}-6f7c"), "uid": "1", "controller": true});
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("{name}-6f7c-{number:03}"), "labels": labels, "ownerReferences": [owner]},
        "spec": {"containers": [{"name": "app", "image": "app:1", "securityContext": restricted()}]},
    });
    serde_json::from_value(pod).expect("a pod")
}

/// The sidecars in these pods, under the snapshots that the cache holds.
async fn crowd(server: &Redis) -> Crowd {
    let mut client = server.client();
    let mut voices = Vec::new();
    for number in 0..WORKLOADS {
        let binding = binding(number);
        let snapshot = eventually("a snapshot in the cache", LONG, async || {
            let text = client.call(&["GET", &binding.snapshot_key()]);
            match text {
                Reply::Bulk(text) => Snapshot::parse(&text).map_err(|error| error.to_string()),
                other => Err(format!("{binding}: {other:?}")),
            }
        })
        .await;
        let rules = snapshot.rules.iter().map(|rule| rule.name.clone()).collect();
        voices.push(Voice::new(binding, rules, snapshot.generation));
    }
    Crowd { voices, each: SIDECARS, reads: true }
}

fn per_cent(part: u64, rest: u64) -> String {
    format!("{}%", part * 100 / (part + rest))
}

impl Speaking {
    /// Waits until every status tells of every sidecar that it has what is wanted, and of what they counted, where that is to be still.
    async fn await_told(&self, said: Option<Tally>) {
        let ratio = said.map(|Tally { hits, misses, .. }| per_cent(hits, misses));
        eventually("all statuses tell of all sidecars", LONG, async || {
            tokio::time::sleep(Duration::from_millis(900)).await;
            let policies = self.many.scene.list("apis/larder.dev/v1alpha1/cachepolicies", PLACES[0]).await;
            let open = policies.iter().find(|policy| !self.is_told(policy, ratio.as_deref()));
            match open {
                None if policies.len() == WORKLOADS * EACH => Ok(()),
                None => Err(format!("{} policies", policies.len())),
                Some(policy) => Err(format!("{policy:#}\n{:?}\n{}", self.speaker.heartbeats(), self.many.operator().log_end())),
            }
        })
        .await;
    }

    fn is_told(&self, policy: &Value, ratio: Option<&str>) -> bool {
        let status = &policy["status"];
        let app = policy["spec"]["workloads"]["matchLabels"]["app"].as_str().expect("a label");
        let (generation, _) = self.speaker.generation(BindingName::of("Deployment", app, "main").as_str());
        status["summary"] == "Delivered"
            && status["observedGeneration"] == policy["metadata"]["generation"]
            && status["workloads"]["generation"] == generation
            && status["sidecars"]["total"] == SIDECARS
            && status["sidecars"]["current"] == format!("{SIDECARS}/{SIDECARS}")
            && ratio.is_none_or(|ratio| status["hitRatio"] == ratio)
    }

    /// What is used and asked while something is done that changes so many policies, and for a while at the least. What does not fit while the
    /// operator got no answers is measured again, as in [`Many::undisturbed`].
    async fn watch<T>(&mut self, what: &'static str, changes: usize, mut work: impl AsyncFnMut(&mut Self) -> T) -> (T, Window) {
        for _ in 1..TRIES {
            let silences = self.many.operator().silences();
            let (done, window) = self.watch_once(what, &mut work).await;
            let faults = window.faults(changes);
            if faults.is_empty() || self.many.operator().silences() == silences {
                return (done, window);
            }
            println!("once more, after {faults:#?}");
        }
        self.watch_once(what, work).await
    }

    async fn watch_once<T>(&mut self, what: &'static str, mut work: impl AsyncFnMut(&mut Self) -> T) -> (T, Window) {
        let mut client = self.server.client();
        let (load, heartbeats, counted) =
            (Load::of(&mut client), self.speaker.heartbeats(), self.many.scene.plane.requests().await);
        let (from, looks, cpu, start) =
            (self.many.scene.plane.audit().len(), self.looks().await, self.many.operator().cpu_seconds().await, Instant::now());
        let done = work(self).await;
        while start.elapsed() < WINDOW {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let (time, now) = (start.elapsed(), self.speaker.heartbeats());
        let audit = self.many.scene.plane.audit().split_off(from);
        let window = Window {
            what,
            time,
            cpu: self.many.operator().cpu_seconds().await - cpu,
            memory_kib: self.many.operator().memory().0,
            asked: Asked::count(&audit),
            statuses: statuses(&audit),
            counted: self.many.scene.plane.requests().await.since(&counted).total(),
            looks: self.looks().await - looks,
            heartbeats: now.0 - heartbeats.0,
            unheard: now.1 - heartbeats.1,
            load: Load::of(&mut client).since(load),
        };
        println!("{}{:?}", window.row(), window.asked);
        (done, window)
    }

    async fn looks(&self) -> f64 {
        self.many.operator().figure("larder_operator_policy_looks_total", None).await.unwrap_or_default()
    }

    /// Changes a policy of one workload after another, and waits until all of it is told.
    async fn change_all(&mut self) -> Reached {
        let (mut config_map, mut changed) = (Vec::new(), Vec::new());
        for _ in 0..CHANGES {
            let app = self.many.changes % WORKLOADS;
            let took = self.many.change().await;
            config_map.push(took);
            changed.push((binding(app), Instant::now() - took));
        }
        let last = Instant::now();
        self.await_told(None).await;
        let statuses = last.elapsed();
        let reached = |(binding, answered): (BindingName, Instant)| {
            let (_, told) = self.speaker.generation(binding.as_str());
            told.expect("the cache told of it").saturating_duration_since(answered)
        };
        let mut cache: Vec<Duration> = changed.into_iter().map(reached).collect();
        cache.sort_unstable();
        config_map.sort_unstable();
        Reached { config_map, cache, statuses }
    }
}

/// How often the status of each policy was written.
fn statuses(audit: &[Entry]) -> BTreeMap<String, usize> {
    let mut all = BTreeMap::new();
    let of_operator = audit.iter().filter(|entry| entry.user.username == User::Operator.name() && entry.is_end());
    for entry in of_operator.filter(|entry| is_status(entry)) {
        *all.entry(entry.object_ref.name.clone()).or_default() += 1;
    }
    all
}

fn is_status(entry: &Entry) -> bool {
    entry.object_ref.resource == "cachepolicies" && entry.object_ref.subresource == "status" && entry.verb == "patch"
}

impl Window {
    fn written_statuses(&self) -> usize {
        self.statuses.values().sum()
    }

    /// What is written besides statuses of policies and the objects of bindings.
    fn other_writes(&self) -> usize {
        self.asked.writes - self.asked.objects - self.written_statuses()
    }

    /// Of that, what is due ten minutes after servers have proved what new workloads' users may do, whatever happens meanwhile.
    fn writes_of_users(&self) -> usize {
        let is_of_users = |kind: &str| kind.ends_with("/secrets main-users") || kind.ends_with("/cacheclusters/status main");
        self.asked.kinds.iter().filter(|(kind, _)| is_of_users(kind)).map(|(_, count)| count).sum()
    }

    /// What is not as it is to be, where so many policies were changed meanwhile.
    fn faults(&self, changes: usize) -> Vec<String> {
        let most = self.time.as_secs_f64() / APART + 1.0;
        let too_often: Vec<_> = self.statuses.iter().filter(|(_, written)| **written as f64 > most).collect();
        // A change is written by one command, whatever the policy.
        let commands = Load::most(WORKLOADS, self.time) + 2.0 * changes as f64;
        let all = [
            (too_often.is_empty(), "statuses are written too often"),
            (self.writes_of_users() <= MOST_OF_USERS, "users are written, and have not changed"),
            (self.other_writes() == self.writes_of_users(), "something else is written"),
            (self.asked.reads <= changes, "the API server is asked what has changed"),
            (self.asked.objects <= changes * MOST_OBJECTS, "objects are written that did not change"),
            (self.load.commands as f64 <= commands, "the cache is asked too often"),
        ];
        all.iter().filter(|(fits, _)| !fits).map(|(_, fault)| format!("{fault}: {too_often:?}: {self:?}")).collect()
    }

    fn row(&self) -> String {
        let (seconds, minute) = (self.time.as_secs_f64(), 60.0 / self.time.as_secs_f64());
        let per_minute = |count: f64| format!("{:.1}", count * minute);
        let cells = [
            self.what.to_owned(),
            format!("{seconds:.0} s"),
            format!("{:.0}", self.heartbeats as f64 / seconds),
            self.unheard.to_string(),
            format!("{:.1} %", self.cpu / seconds * 100.0),
            format!("{:.1} MiB", self.memory_kib as f64 / 1024.0),
            per_minute(self.looks),
            per_minute(self.written_statuses() as f64),
            self.statuses.values().max().copied().unwrap_or_default().to_string(),
            self.asked.objects.to_string(),
            (self.asked.reads + self.other_writes()).to_string(),
            per_minute(self.counted as f64),
            format!("{:.1}", self.load.commands as f64 / seconds),
            format!("{:.0}", self.load.all as f64 / seconds),
            format!("{:.1} %", self.load.cpu / seconds * 100.0),
        ];
        format!("| {} |\n", cells.join(" | "))
    }
}

fn section(windows: &[Window], reached: &Reached, memory: [u64; 3]) -> String {
    let mib = |kib: u64| kib as f64 / 1024.0;
    let at = |took: &[Duration], share: f64| took[((took.len() - 1) as f64 * share).round() as usize].as_millis();
    let mut text = format!(
        "`make apiserver-tests TEST_ARGS=many_policies::sidecars` writes this, by the profile `{}`. {} policies of {WORKLOADS} workloads in one namespace,\n\
         {SIDECARS} pods of each workload, which are objects of the API server and nothing more, and the heartbeats of as many sidecars, each of\n\
         {} rules, at a real server ({:?}) that stands behind the played primary. The operator hears them there, and writes there.\n\n\
         | while | for | heartbeats a second | of all, not heard | processor, of one | memory | looks a minute | statuses written a minute | of one policy at the most | objects of bindings written | other requests | counted by the API server, a minute | its commands to the cache a second | all calls in the cache a second | processor of the cache |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
        crate::many::profile(),
        WORKLOADS * EACH,
        EACH * RULES,
        Engine::Redis7,
    );
    text.extend(windows.iter().map(Window::row));
    let _ = write!(
        text,
        "\nOf memory the operator held {:.1} MiB before there were pods, {:.1} MiB with the pods, and {:.1} MiB at most. A changed policy was in its ConfigMap\n\
         after {} ms (p50) and {} ms (p99), and told of by the cache after {} ms and {} ms; {:.0} s after the last of {} changes every status said that all\n\
         sidecars of its workload have it.\n\n\
         Requests are the operator's own, by the audit log, without its watches and its Lease; \"counted by the API server\" also holds what\n\
         this test asks, and the API server of itself. Other requests may be three that are due ten minutes after new workloads' users. \"While every figure moves\" each ratio falls by some per cent every five seconds, so that each\n\
         status is due as often as it may be written, which is once in ten seconds, with what was gathered meanwhile: a look comes of what\n\
         sidecars told at most every two seconds, and figures that only count count as news after thirty. Calls in the cache are those within\n\
         scripts as well, and what sidecars publish and read there: each its snapshot and its number every thirty seconds. Their connections are\n\
         few here, where they would be two of each.\n",
        mib(memory[0]),
        mib(memory[1]),
        mib(memory[2]),
        at(&reached.config_map, 0.5),
        at(&reached.config_map, 0.99),
        at(&reached.cache, 0.5),
        at(&reached.cache, 0.99),
        reached.statuses.as_secs_f64(),
        reached.config_map.len(),
    );
    text
}

#[tokio::test]
async fn ten_thousand_sidecars_are_heard_in_little_memory_and_with_few_requests() {
    let (many, server) = begin().await;
    let bare = many.operator().memory();
    make_pods(&many).await;
    many.await_quiet().await;
    let with_pods = many.operator().memory().0;
    let speaker = Speaker::start(server.port(), crowd(&server).await);
    let mut speaking = Speaking { speaker, server, many };

    let even = Tally { round: 1, hits: 90, misses: 10 };
    speaking.await_told(Some(even)).await;
    let ((), steady) = speaking.watch("nothing changes", 0, async |_| ()).await;
    speaking.await_told(Some(even)).await;

    speaking.speaker.set(Course::Falling);
    let ((), moving) = speaking.watch("every figure moves", 0, async |_| ()).await;
    speaking.speaker.set(Course::Idle);
    let said = speaking.speaker.await_idle().await;
    speaking.await_told(Some(said)).await;

    let (reached, changing) = speaking.watch("policies change, one after another", CHANGES, Speaking::change_all).await;
    let peak = speaking.many.operator().memory().1;
    for (window, changes) in [(&steady, 0), (&moving, 0), (&changing, CHANGES)] {
        assert_eq!(window.faults(changes), Vec::<String>::new());
    }
    assert!(moving.written_statuses() > 0, "what moves is told: {moving:?}");
    let for_each = peak.saturating_sub(bare.1) as f64 / (WORKLOADS * SIDECARS) as f64;
    assert!(for_each <= MOST_FOR_SIDECAR_KIB, "{for_each} KiB for each sidecar");
    if let Some(file) = env::var_os("LARDER_POLICIES_REPORT") {
        write_report(file.as_ref(), None, Some(section(&[steady, moving, changing], &reached, [bare.0, with_pods, peak])));
    }
}
