//! The number of a Cluster's shards changes under load, and the operator ends in the middle of it: no client meets an error, no value is lost.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;

use super::cluster::{condition, eventually, list, name};
use super::clusters;
use super::install::PLACE;
use super::operator;
use super::report::{self, Line};
use super::tier::{SETTLES_WITHIN, Tier};

/// How often each client writes.
const EVERY: Duration = Duration::from_millis(100);
/// Longer than the whole takes.
const WITHIN: Duration = Duration::from_secs(1800);

/// Clients that count up one key each, and go where the Cluster sends them.
struct Counters {
    counters: Vec<(String, Child)>,
}

impl Counters {
    /// One for each key, in the first server's pod, which stays.
    fn start(tier: &Tier) -> Self {
        let pod = format!("{}-0-0", tier.name);
        let times = (WITHIN.as_millis() / EVERY.as_millis()).to_string();
        let (every, password) = (EVERY.as_secs_f64().to_string(), tier.password());
        let start = |tag: &&str| {
            let key = format!("{{{tag}}}count");
            let mut line = tier.client_line("app", &password, &pod, "6379");
            line.extend(["-c", "-r", &times, "-i", &every, "INCR", &key].map(str::to_owned));
            let mut command = Command::new("kubectl");
            let child = command.args(line).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("kubectl runs");
            (key, child)
        };
        Self { counters: clusters::TAGS.iter().step_by(2).map(start).collect() }
    }

    /// Ends them. Each has counted up by one, every time that it was told, and what is there is what it was told last or one more.
    fn finish(self, tier: &Tier) -> usize {
        let mut all = 0;
        for (key, mut child) in self.counters {
            let _ = child.kill();
            let mut said = String::new();
            child.stdout.take().expect("a pipe").read_to_string(&mut said).expect("it is text");
            let _ = child.wait();
            // The last line may be cut off.
            let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let wrong = (1..).zip(whole.lines()).find(|(wanted, line): &(u64, &str)| line.parse() != Ok(*wanted));
            assert_eq!(wrong, None, "{key}: an answer that is none");
            let counted = whole.lines().count();
            let kept: usize = clusters::ask(tier, &["GET", &key]).expect("an answer").trim().parse().expect("a number");
            assert!(kept >= counted, "{key}: {kept} of {counted} are left");
            all += counted;
        }
        all
    }
}

/// What the status says of slots on their way, at this moment.
fn told(tier: &Tier) -> Option<String> {
    let found = condition(&tier.object(), "Progressing")?;
    let message = found["message"].as_str()?.to_owned();
    (found["reason"] == "Resharding" && message.contains("slots have moved")).then_some(message)
}

/// Asks for so many shards and waits until they are there, and nothing else. What the status said meanwhile.
fn resize(tier: &Tier, shards: u32, restarts: bool) -> BTreeSet<String> {
    tier.patch(&json!({"shards": shards}));
    let mut said = BTreeSet::new();
    eventually("slots move", SETTLES_WITHIN, || {
        said.extend(told(tier));
        if said.is_empty() { Err(tier.settled().err().unwrap_or_else(|| "it is settled".to_owned())) } else { Ok(()) }
    });
    if restarts {
        operator::restart();
    }
    eventually(&format!("{shards} shards"), SETTLES_WITHIN * 2, || {
        said.extend(told(tier));
        let primaries = clusters::primaries(tier).len();
        tier.settled()?;
        if primaries == shards as usize { Ok(()) } else { Err(format!("{primaries} own slots")) }
    });
    said
}

/// From three shards to five, and back.
pub fn come_and_go(tier: &Tier) {
    let counters = Counters::start(tier);
    let grown = resize(tier, 5, true);
    assert_eq!(tier.servers().len(), 10);
    let shrunk = resize(tier, 3, false);
    let counted = counters.finish(tier);
    assert!(counted > 0);
    for said in grown.iter().chain(&shrunk) {
        eprintln!("{}: {said}", tier.name);
    }
    report::add(Line {
        problem: Some(format!("{counted} counts by {} clients, no error", clusters::TAGS.len() / 2)),
        ..Line::of(tier, "counts meanwhile")
    });
    let is_left = |claim: &String| ["-3-", "-4-"].iter().any(|shard| claim.contains(shard));
    eventually("the volumes of the shards that left are gone", Duration::from_secs(120), || {
        let claims = list(PLACE, "persistentvolumeclaims", &format!("larder.dev/cluster={}", tier.name));
        match claims.iter().map(name).find(is_left) {
            Some(claim) => Err(claim),
            None => Ok(()),
        }
    });
}
