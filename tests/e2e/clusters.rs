//! Mode Cluster: what disturbs tiers under Sentinel is done to one shard of three, and shards come and go, roll and lose their majority. The
//! writers write to all shards meanwhile.
//!
//! In `make e2e` each case is done with one of two engines, one of them in memory, the other with volumes, or with both, and the operator is
//! restarted in the midst of every second change. With `LARDER_E2E_FULL=1` both engines meet every case that their storage allows.

use serde_json::Value;

use super::cluster::{eventually, kubectl, name, uid};
use super::disruptions::{Again, Case, Needs, Promise, Scene};
use super::install::PLACE;
use super::nodes::kill_pod;
use super::tier::{REDIS_7_0, SETTLES_WITHIN, Tier, VALKEY_9_1};
use super::{faults, matrix, planned, shards};

const SHARDS: u32 = 3;

/// In which of the two tiers a case is done in `make e2e`.
#[derive(Clone, Copy)]
enum In {
    Memory,
    /// Nor is it with `LARDER_E2E_FULL`.
    MemoryAlone,
    Volumes,
    Both,
}

/// The cases, but for the upgrade.
pub fn cases(tier: &Tier) -> Vec<Case> {
    use Again::After;
    use In::{Both, Memory, MemoryAlone, Volumes};
    use Needs::{Alone, Nodes, NodesAlone, Nothing};
    use Promise::{Emptied, Fault, Kept, Outage, Planned, Unnoticed};
    let (case, change) = (Case::of, Case::change);
    let all = [
        (Both, case("primary pod deleted", Planned, Nothing, planned::delete_primary)),
        (Memory, change("live parameter", Unnoticed, Nothing, planned::change_live_parameter)),
        (Volumes, change("password rotated", Unnoticed, Nothing, planned::rotate_password)),
        (Both, case("server process killed", Fault, Nodes, faults::kill_server)),
        (Memory, case("agent killed", Fault, Nodes, faults::kill_agent)),
        (Volumes, change("bad image, reverted", Planned, Nothing, planned::name_a_bad_image)),
        (Volumes, case("pod killed", Fault, Nodes, faults::kill_whole_pod)),
        (Volumes, change("parameter that restarts", Planned, Nothing, planned::change_start_parameter)),
        (
            Memory,
            Case { again: After(planned::remove_replica), ..change("replica added", Planned, Nothing, planned::add_replica) },
        ),
        (Memory, case("primary cut off", Fault, Nodes, faults::cut_primary_off)),
        (
            Memory,
            Case { again: After(planned::add_replica), ..change("replica removed", Planned, Nothing, planned::remove_replica) },
        ),
        (Volumes, case("pod lost, operator away", Fault, Alone, faults::kill_while_operator_is_away)),
        (Memory, case("node paused and back", Fault, NodesAlone, faults::pause_node)),
        // A volume stays on its node, and its pod with it; as long as that waits, no second one of the node may be drained.
        (
            MemoryAlone,
            Case { before: Some(planned::fill), ..change("node drained, cache full", Planned, Alone, planned::drain_node) },
        ),
        // Who asks the Service for a server may get one that is about to leave. Behind a sidecar nobody notices, which the case itself sees to.
        (Both, case("shards 3, 5 and 3", Kept, Nothing, shards::come_and_go)),
        (Memory, case("half of the servers killed, most primaries", Outage, Nodes, kill_half)),
        (Volumes, case("all pods deleted", if tier.durable { Kept } else { Emptied }, Nothing, faults::delete_all_pods)),
    ];
    let is_done = |of: In| match of {
        Both => true,
        MemoryAlone => !tier.durable,
        Memory => !tier.durable || matrix::is_full(),
        Volumes => tier.durable || matrix::is_full(),
    };
    all.into_iter().filter(|(of, _)| is_done(*of)).map(|(_, case)| case).collect()
}

/// Two of three primaries, without which nobody votes, and the third one's replica: the operator has the other two's replicas take over.
fn kill_half(scene: &Scene<'_>) {
    let tier = scene.tier;
    let plays = |pod: &String, role: &str| tier.ask(pod, "6379", &["role"]).is_ok_and(|said| said.starts_with(role));
    // The one that is disturbed by the others, too, and any other: slots have moved between the shards.
    let first = tier.primary();
    let mut rest: Vec<String> = tier.servers().iter().map(name).filter(|pod| *pod != first).collect();
    let second = rest.iter().find(|pod| plays(pod, "master")).expect("another primary").clone();
    for pod in [&first, &second] {
        let shard: Vec<String> = tier.shard_of(pod).iter().map(name).collect();
        rest.retain(|pod| !shard.contains(pod));
    }
    let third = rest.into_iter().find(|pod| plays(pod, "slave")).expect("a replica of the third shard");
    let killed = [first, second, third];
    // Deleted alone, each would still be asked to hand over.
    killed.iter().for_each(|pod| kill_pod(pod));
    let before: Vec<String> = tier.servers().iter().filter(|pod| killed.contains(&name(pod))).map(uid).collect();
    let command = ["-n", PLACE, "delete", "pod", "--wait=false", "--force", "--grace-period=0"];
    kubectl(&[&command[..], &killed.iter().map(String::as_str).collect::<Vec<_>>()].concat()).expect("deleted");
    let is_left = |pod: &Value| before.contains(&uid(pod));
    eventually("the pods are others", SETTLES_WITHIN, || match tier.servers().iter().find(|pod| is_left(pod)) {
        Some(pod) => Err(format!("{} is not", name(pod))),
        None => Ok(()),
    });
    tier.settle("after half of the pods were killed at once");
}

/// All slots are served, by as many primaries as there are shards.
pub fn is_formed(tier: &Tier, shards: u32) -> Result<(), String> {
    let info = tier.ask(&tier.primary_seen(None)?, "6379", &["cluster", "info"])?;
    let wanted = ["cluster_state:ok".to_owned(), "cluster_slots_ok:16384".to_owned(), format!("cluster_size:{shards}")];
    let says = |wanted: &String| info.lines().any(|line| line.trim_end() == wanted);
    if wanted.iter().all(says) { Ok(()) } else { Err(info) }
}

#[test]
fn clusters_redis_7_0_persistent() {
    matrix::suite(Tier { durable: true, shards: Some(SHARDS), ..Tier::of("cluster-redis-7-0-p", REDIS_7_0) });
}

#[test]
fn clusters_valkey_9_1_ephemeral() {
    matrix::suite(Tier { shards: Some(SHARDS), ..Tier::of("cluster-valkey-9-1-e", VALKEY_9_1) });
}
