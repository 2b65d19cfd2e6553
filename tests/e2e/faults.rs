//! Faults: what nobody asked for, and what must come of it.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::cluster::{eventually, kubectl, list, name};
use super::counter::{Counter, Counts};
use super::disruptions::{Scene, changed, replaced};
use super::install::PLACE;
use super::nodes::{Closed, CutOff, Paused, is_on_foreign_nodes, kill_pod, kill_process, node_of};
use super::operator::Away;
use super::planned::{MAX_LAG, await_setting, spread};
use super::primaries::{Reign, TAGS};
use super::tier::{SETTLES_WITHIN, Tier, is_ready};

/// The process of a server, which another takes the place of.
struct Process<'a> {
    tier: &'a Tier,
    reign: Reign,
    run: String,
}

impl<'a> Process<'a> {
    fn of_primary(tier: &'a Tier) -> Self {
        let reign = tier.reign();
        let run = Self::run(tier, &reign.pod).expect("it is told");
        Self { tier, reign, run }
    }

    fn run(tier: &Tier, pod: &str) -> Result<String, String> {
        let info = tier.ask(pod, "6379", &["info", "server"])?;
        info.lines().find_map(|line| line.strip_prefix("run_id:")).map(|run| run.trim_end().to_owned()).ok_or(info)
    }

    /// Waits until another server is primary. In a Cluster with volumes it may itself be back with all that it had before others vote.
    fn wait_until_survived(self) {
        let Self { tier, reign, run } = self;
        if !(tier.is_cluster() && tier.durable) {
            return changed(tier, &reign);
        }
        eventually("another process", SETTLES_WITHIN, || match Self::run(tier, &reign.pod)? {
            now if now == run => Err(now),
            _ => tier.primary_seen(None),
        });
        tier.settle("with another process");
    }
}

pub fn kill_server(scene: &Scene<'_>) {
    let primary = Process::of_primary(scene.tier);
    kill_process(&primary.reign.pod, &scene.tier.engine.server());
    primary.wait_until_survived();
}

pub fn kill_agent(scene: &Scene<'_>) {
    let primary = Process::of_primary(scene.tier);
    kill_process(&primary.reign.pod, "larderd");
    primary.wait_until_survived();
}

pub fn kill_whole_pod(scene: &Scene<'_>) {
    let primary = Process::of_primary(scene.tier);
    kill_pod(&primary.reign.pod);
    primary.wait_until_survived();
}

pub fn delete_all_pods(scene: &Scene<'_>) {
    let before = scene.tier.server_uids();
    let labels = format!("larder.dev/cluster={}", scene.tier.name);
    kubectl(&["-n", PLACE, "delete", "pods", "-l", &labels, "--wait=false"]).expect("deleted");
    replaced(scene.tier, &before);
}

/// Waits until a server that was the primary follows another, or was handed the shard anew, and nobody else of it believes to be one.
fn await_demotion(tier: &Tier, former: &Reign) {
    let pod = &former.pod;
    eventually(&format!("{pod} follows another, and there is one primary"), SETTLES_WITHIN, || {
        let role = tier.ask(pod, "6379", &["role"])?;
        if !role.starts_with("slave") && tier.reign_seen()? == *former {
            return Err(format!("{pod} says {role}"));
        }
        let servers = tier.shard_of(pod);
        let is_primary = |pod: &String| tier.ask(pod, "6379", &["role"]).is_ok_and(|role| role.starts_with("master"));
        let primaries: Vec<String> = servers.iter().map(name).filter(is_primary).collect();
        if primaries.len() == 1 { Ok(()) } else { Err(format!("{primaries:?} are primaries")) }
    });
}

/// Kubernetes has noticed it, too, where the tier is durable; otherwise it lasts only until another serves.
pub fn pause_node(scene: &Scene<'_>) {
    let tier = scene.tier;
    let primary = tier.reign();
    let node = node_of(&primary.pod);
    let paused = Paused::node(&node);
    eventually("another serves as primary", Duration::from_secs(90), || match tier.primary_seen(Some(&node))? {
        now if now == primary.pod => Err(format!("{now} still is")),
        _ => Ok(()),
    });
    scene.writers.await_more();
    if tier.durable {
        paused.await_noticed();
    }
    paused.resume();
    await_demotion(tier, &primary);
    tier.settle("with the node back");
}

/// A client on the primary's own side of the cut says what it still acknowledges there.
pub fn cut_primary_off(scene: &Scene<'_>) {
    let tier = scene.tier;
    let writes = json!({"minReplicas": 1, "maxLag": format!("{}s", MAX_LAG.as_secs())});
    tier.patch(&json!({"replicas": 2, "writes": writes}));
    tier.settle("with two replicas");
    await_setting(tier, "min-replicas-to-write", "1");
    let primary = tier.reign();
    let (every, key) = (Duration::from_millis(50), TAGS[0].key("counter"));
    let inside = Counter::start(tier, &primary.pod, &key, every, Duration::from_secs(120));
    inside.await_more(40);

    let cut = CutOff::pod(&primary.pod);
    let (begun, begun_at) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH).expect("a time"));
    let ends = begun + MAX_LAG + Duration::from_secs(1);
    eventually("another serves as primary", Duration::from_secs(90), || match tier.primary_seen(None)? {
        now if now == primary.pod => Err(format!("{now} still is")),
        _ => Ok(()),
    });
    scene.writers.await_more();
    // Long enough beyond it to see that it has ended.
    thread::sleep((ends + Duration::from_secs(3)).saturating_duration_since(Instant::now()));
    let heard = inside.finish();
    cut.heal();
    await_demotion(tier, &primary);
    tier.settle("with the primary that was cut off back");

    let counts = Counts::of(&heard, begun);
    let last = counts.last();
    // A Cluster's server that knows itself in a minority says so first.
    let is_refusal = |line: &str| line.contains("NOREPLICAS") || line.contains("CLUSTERDOWN");
    let refused = heard.iter().filter(|(at, line)| *at > last && is_refusal(line)).count();
    assert!(refused >= 20, "its own side was not there to be refused: {:?}", heard.last());
    let over = last.saturating_duration_since(begun);
    // It looks at its replicas as late as it was late with other things on this machine.
    let late = counts.gaps(begun).0.saturating_sub(every);
    assert!(
        last <= ends + late,
        "it acknowledged for {over:?} after it was cut off, with a maxLag of {MAX_LAG:?}, late by {late:?}"
    );
    let kept = tier.ask(&tier.primary(), "6379", &["get", &key]).expect("an answer").parse::<usize>().expect("a number");
    let lost = counts.all().saturating_sub(kept);
    // What was not yet replicated counts as of the window, for the writers elsewhere, too.
    let second = Duration::from_secs(1);
    let window = counts.since(begun - second);
    assert!(lost <= window, "{lost} were lost, and {window} were acknowledged in the window");
    scene.losses_lie_within(begun_at - second, begun_at + MAX_LAG + second + late);
    scene.note(format!(
        "on its own side acknowledged for {} ms more, {lost} lost, the server late by {} ms",
        over.as_millis(),
        late.as_millis()
    ));
}

/// The primary's pod is gone at once, and nobody but sentinels, in a Cluster the other primaries, and agents is there to see to it.
pub fn kill_while_operator_is_away(scene: &Scene<'_>) {
    let tier = scene.tier;
    let primary = tier.reign();
    let away = Away::begin();
    // Deleted alone, it would still be asked to hand over.
    if !is_on_foreign_nodes() {
        kill_pod(&primary.pod);
    }
    kubectl(&["-n", PLACE, "delete", "pod", &primary.pod, "--grace-period=0", "--force", "--wait=false"]).expect("deleted");
    eventually("another serves as primary", Duration::from_secs(90), || match tier.primary_seen(None)? {
        now if now == primary.pod => Err(format!("{now} still is")),
        _ => Ok(()),
    });
    scene.writers.await_more();
    // Its successor finds its place by its agent alone.
    await_demotion(tier, &primary);
    away.end();
    tier.settle("with the operator back");
    if tier.is_cluster() {
        return;
    }
    let now = tier.primary();
    eventually("the Service of the primary points at it", SETTLES_WITHIN, || {
        let slices = list(PLACE, "endpointslices", &format!("kubernetes.io/service-name={}-primary", tier.name));
        let targets: Vec<_> = slices.iter().map(|slice| slice["endpoints"][0]["targetRef"]["name"].clone()).collect();
        if targets.iter().any(|target| *target == *now) { Ok(()) } else { Err(format!("{targets:?} instead of {now}")) }
    });
}

/// Nobody can fail over while the primary dies. With volumes, nobody serves until the sentinels are back; without, the dead server's copy is
/// gone, so that the operator promotes the one that is left.
pub fn lose_majority_and_primary(scene: &Scene<'_>) {
    let tier = scene.tier;
    let primary = tier.primary();
    let sentinels: Vec<String> = tier.sentinels().iter().map(name).collect();
    let majority = sentinels.len() / 2 + 1;
    let closed = Closed::to(&tier.name);
    for sentinel in sentinels.iter().take(majority) {
        kubectl(&["-n", PLACE, "delete", "pod", sentinel, "--grace-period=0", "--force", "--wait=false"]).expect("deleted");
    }
    let ready = || tier.sentinels().iter().filter(|pod| is_ready(pod)).count();
    eventually("most sentinels are away", Duration::from_secs(30), || match ready() {
        left if left < majority => Ok(()),
        left => Err(format!("{left} are ready")),
    });
    kill_process(&primary, &tier.engine.server());
    let acknowledged = scene.writers.acknowledged();
    thread::sleep(3 * scene.down_after);
    let now = scene.writers.acknowledged();
    // One for each writer may have been on its way.
    assert!(now <= acknowledged + 4, "{} acknowledged by nobody's leave", now - acknowledged);
    if !tier.durable {
        scene.writers.await_acknowledged_beyond(now, SETTLES_WITHIN);
    }
    closed.open();
    eventually("most sentinels are back", Duration::from_secs(120), || match ready() {
        now if now >= majority => Ok(()),
        now => Err(format!("{now} are ready")),
    });
    scene.writers.await_acknowledged_beyond(now, scene.bound_of_faults());
    spread(tier);
    tier.settle("with the sentinels back");
}
