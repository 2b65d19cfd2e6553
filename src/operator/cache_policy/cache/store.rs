//! What the scripts are by which Larder's own keys are looked at and written, and when a snapshot in the cache is replaced.
//!
//! A value in the cache is told by its digest, which the server makes: what lies there is hardly ever read. It is replaced on condition of
//! that digest, so that no value is overwritten that was not judged.

use redis::Value;

use crate::operator::admin::{Admin, AdminError};
use crate::policy::Snapshot;
use crate::policy::binding::BindingName;
use crate::policy::heartbeat::Fleet;
use crate::policy::snapshot::{MAX_BYTES, SnapshotError};

/// The names of the bindings of which Larder put something into the cache, so that another leader takes away what is over.
pub const INDEX: &str = "larder:bindings";
/// How far a snapshot may be ahead and still be taken for one that Larder made: as far as sidecars take it for one.
const MAX_LEAD: u64 = 1 << 40;
/// How long sidecars go by the number that they were told last, where no operator tells them. Long: it may be away for a night, and
/// sidecars that are told of nobody else take all of an origin's connections, each of them.
const FLEET_SECONDS: &str = "86400";
/// The most names that are asked for at once: more than a CacheCluster has bindings.
const MOST_NAMES: &str = "1000";

/// What is at a key, in one word: `none`, `other` (no string), `large`, or a digest.
const TOLD: &str = "local function told(key)\n\
    local kind = redis.call('TYPE', key).ok\n\
    if kind ~= 'string' then return kind == 'none' and kind or 'other' end\n\
    if redis.call('STRLEN', key) > tonumber(ARGV[1]) then return 'large' end\n\
    return redis.sha1hex(redis.call('GET', key))\n\
    end\n";
/// Pairs of keys: a snapshot's and a fleet's. Tells of each.
const LOOK: &str = "local all = {}\n\
    for i = 1, #KEYS, 2 do\n\
    local fleet = ''\n\
    if redis.call('TYPE', KEYS[i + 1]).ok == 'string' and redis.call('STRLEN', KEYS[i + 1]) <= 256 then\n\
    fleet = redis.call('GET', KEYS[i + 1])\n\
    end\n\
    table.insert(all, told(KEYS[i]))\n\
    table.insert(all, fleet)\n\
    end\n\
    return all";
/// A snapshot's key; what is expected there, the snapshot and its generation. Tells what is there now.
const WRITE: &str = "local found = told(KEYS[1])\n\
    if found ~= ARGV[2] then return {0, found} end\n\
    redis.call('SET', KEYS[1], ARGV[3])\n\
    redis.call('PUBLISH', KEYS[1], ARGV[4])\n\
    return {1, told(KEYS[1])}";
/// The index; a binding, which is put into it.
const REMEMBER: &str = "if redis.call('TYPE', KEYS[1]).ok ~= 'set' then redis.call('DEL', KEYS[1]) end\n\
    return redis.call('SADD', KEYS[1], ARGV[1])";
/// The index; the most names. Tells the names in it, and takes out what can be none.
const NAMES: &str = "local names = {}\n\
    if redis.call('TYPE', KEYS[1]).ok ~= 'set' then return names end\n\
    for _, name in ipairs(redis.call('SRANDMEMBER', KEYS[1], ARGV[1])) do\n\
    if #name <= 52 then table.insert(names, name) else redis.call('SREM', KEYS[1], name) end\n\
    end\n\
    return names";

/// What is at a snapshot's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(String);

impl Tag {
    /// Nothing.
    pub fn nothing() -> Self {
        Self("none".to_owned())
    }

    /// Whether it is no snapshot for certain.
    pub fn is_no_snapshot(&self) -> bool {
        ["none", "other", "large"].contains(&self.0.as_str())
    }
}

/// What is there of a binding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// At the snapshot's key.
    pub snapshot: Tag,
    /// What sidecars are told of their number.
    pub fleet: Option<u32>,
}

/// Looks at what there is of some bindings, in their order; in a Cluster of one at a time.
pub async fn look(server: &mut Admin, bindings: &[&BindingName]) -> Result<Vec<Found>, AdminError> {
    let keys: Vec<String> = bindings.iter().flat_map(|binding| [binding.snapshot_key(), binding.fleet_key()]).collect();
    let script = format!("{TOLD}{LOOK}");
    let (count, most) = (keys.len().to_string(), MAX_BYTES.to_string());
    let mut arguments = vec![script.as_str(), &count];
    arguments.extend(keys.iter().map(String::as_str));
    arguments.push(&most);
    let told: Vec<Vec<u8>> = server.ask("EVAL", &arguments).await?;
    let found = told.chunks_exact(2).map(|pair| Found {
        snapshot: Tag(String::from_utf8_lossy(&pair[0]).into_owned()),
        fleet: Fleet::parse(&pair[1]).ok().map(|fleet| fleet.sidecars),
    });
    Ok(found.collect())
}

/// How a snapshot was written.
#[derive(Debug, PartialEq, Eq)]
pub enum Written {
    /// It is there, and was told of.
    Done(Tag),
    /// Something else than expected is there.
    Other(Tag),
}

/// Remembers at the index's server that there may be something of a binding: to be done before there is.
pub async fn remember(server: &mut Admin, binding: &BindingName) -> Result<(), AdminError> {
    let _: i64 = server.ask("EVAL", &[REMEMBER, "1", INDEX, binding.as_str()]).await?;
    Ok(())
}

/// Writes a snapshot where `expected` is still what is there, and tells of it.
pub async fn write(
    server: &mut Admin,
    binding: &BindingName,
    expected: &Tag,
    snapshot: &str,
    generation: u64,
) -> Result<Written, AdminError> {
    let (script, key, most) = (format!("{TOLD}{WRITE}"), binding.snapshot_key(), MAX_BYTES.to_string());
    let generation = generation.to_string();
    let arguments = [&script, "1", &key, &most, &expected.0, snapshot, &generation];
    let (done, tag): (bool, String) = server.ask("EVAL", &arguments).await?;
    Ok(if done { Written::Done(Tag(tag)) } else { Written::Other(Tag(tag)) })
}

/// Reads what is at a snapshot's key, as much of it as a snapshot has.
pub async fn read(server: &mut Admin, binding: &BindingName) -> Result<Vec<u8>, AdminError> {
    server.ask("GETRANGE", &[&binding.snapshot_key(), "0", &MAX_BYTES.to_string()]).await
}

/// Tells the sidecars of a binding how many they are. Where `wakes`, they look at once.
pub async fn write_fleet(server: &mut Admin, binding: &BindingName, sidecars: u32, wakes: Option<u64>) -> Result<(), AdminError> {
    let json = String::from_utf8_lossy(&Fleet::of(sidecars).to_json()).into_owned();
    let _: Value = server.ask("SET", &[&binding.fleet_key(), &json, "EX", FLEET_SECONDS]).await?;
    if let Some(generation) = wakes {
        let _: i64 = server.ask("PUBLISH", &[&binding.snapshot_key(), &generation.to_string()]).await?;
    }
    Ok(())
}

/// The names of the bindings of which there may be something.
pub async fn names(server: &mut Admin) -> Result<Vec<BindingName>, AdminError> {
    let names: Vec<Vec<u8>> = server.ask("EVAL", &[NAMES, "1", INDEX, MOST_NAMES]).await?;
    Ok(names.iter().filter_map(|name| BindingName::parse(std::str::from_utf8(name).ok()?).ok()).collect())
}

/// Takes everything of a binding away, but for its name in the index.
pub async fn remove(server: &mut Admin, binding: &BindingName) -> Result<(), AdminError> {
    let _: i64 = server.ask("DEL", &[&binding.snapshot_key(), &binding.fleet_key()]).await?;
    Ok(())
}

/// Takes its name out of the index, at the index's server.
pub async fn forget(server: &mut Admin, binding: &BindingName) -> Result<(), AdminError> {
    let _: i64 = server.ask("SREM", &[INDEX, binding.as_str()]).await?;
    Ok(())
}

/// What is to become of a value that somebody put at a snapshot's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is what is wanted.
    Same,
    /// It is older, or none.
    Replace,
    /// It is newer: its generation. Whoever knew more than this process made it.
    Keep(u64),
}

/// Judges what lies where this snapshot of this generation is wanted.
pub fn judge(found: &[u8], wanted: &str, generation: u64) -> Verdict {
    if found == wanted.as_bytes() {
        return Verdict::Same;
    }
    let claimed = match Snapshot::parse(found) {
        Ok(snapshot) => Some(snapshot.generation),
        Err(SnapshotError::TooNew(_)) => Snapshot::claimed_generation(found),
        Err(_) => None,
    };
    match claimed {
        Some(newer) if newer > generation && newer - generation <= MAX_LEAD => Verdict::Keep(newer),
        _ => Verdict::Replace,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(generation: u64, requires: u32) -> String {
        format!(
            r#"{{"version":{requires},"requires":{requires},"generation":{generation},"unmatched":{{"bypass":{{}}}},
                "cluster":{{"name":"main","topology":{{"cluster":{{"seeds":["127.0.0.1:7000"]}}}}}}}}"#
        )
    }

    #[test]
    fn only_what_is_newer_is_kept() {
        let wanted = snapshot(7, 1);
        let of = |found: &str| judge(found.as_bytes(), &wanted, 7);
        assert_eq!(of(&wanted), Verdict::Same);
        assert_eq!(of(&snapshot(6, 1)), Verdict::Replace);
        assert_eq!(of(&format!("{wanted} ")), Verdict::Replace, "of two of one generation the API server's counts");
        assert_eq!(of(&snapshot(8, 1)), Verdict::Keep(8));
        assert_eq!(of(&snapshot(8, 99)), Verdict::Keep(8), "a newer operator's");
        assert_eq!(of(&snapshot(6, 99)), Verdict::Replace);
        assert_eq!(of(&snapshot(u64::MAX, 1)), Verdict::Replace, "no sidecar takes it, and nothing could follow it");
        assert_eq!(of(r#"{"generation": 8}"#), Verdict::Replace);
        assert_eq!(of(""), Verdict::Replace);
    }
}
