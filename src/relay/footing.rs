//! What a server must be before its word counts: a primary that has each write on disk before it answers, as have all replicas that follow
//! it. Pure: it says what to ask, and judges the answers. That nobody else may be promoted in its place is for who asks to make sure.
//!
//! A command and the question who has it go over one connection, within which the server stayed the same primary: what was
//! carried out there is what was confirmed.

use super::hub::words;
use crate::policy::slots;
use crate::sidecar::upstream::admin_client::Value;
use crate::sidecar::upstream::disks::{Careless, writes_all};
use crate::sidecar::upstream::heirs::Electable;
use crate::sidecar::upstream::node::NodeAddr;

/// A command, in words.
pub type Command = Vec<Vec<u8>>;

/// How long all may take to have it, and then to have it on disk, in milliseconds.
const CONFIRMED_WITHIN_MS: &str = "1000";

/// Why a server's word does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsure {
    /// The answers have another form than servers give.
    #[error("it gave an unexpected answer")]
    Answer,
    /// It does not write to disk as it must.
    #[error("it does not write each command to disk: it needs appendonly yes and appendfsync always")]
    Disk,
    /// A replica does not, or does not tell.
    #[error(transparent)]
    Replica(#[from] Careless),
    /// It is no primary, or was none in between.
    #[error("it is no longer the primary")]
    Replaced,
    /// A primary that has been replaced, and does not know it yet, has no replicas.
    #[error("no replica follows it")]
    Detached,
    /// Another might be promoted in its place.
    #[error(transparent)]
    Heir(#[from] Electable),
    /// It is not known who might be.
    #[error("the servers do not tell who might take its place (in a Cluster, by CLUSTER SHARDS)")]
    Heirs,
    /// Others follow it than before: those may be who was counted.
    #[error("other replicas follow it than before")]
    Followers,
    /// Not all had it on disk in time.
    #[error("{confirmed} of {replicas} replicas had it on disk in time (it itself: {own})")]
    Unconfirmed {
        /// Whether the server had.
        own: bool,
        /// How many replicas had.
        confirmed: i64,
        /// How many were to.
        replicas: usize,
    },
}

/// A server that carried out a command, as it was then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footing {
    /// Who must have it: all replicas that follow it, sorted.
    followers: Vec<NodeAddr>,
    /// Whether the server knows WAITAOF.
    counts_fsyncs: bool,
    /// What it calls the history of its data: another, once it has been a replica in between.
    history: Vec<u8>,
}

/// What tells that servers have each write on disk before they answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// They themselves, which takes the right to `CONFIG GET`.
    Asked,
    /// Whoever keeps them.
    VouchedFor,
}

/// Has `command`, all of whose keys lie in `slot`, carried out. [`Footing::of`] reads the answers.
pub fn carry_out(slot: u16, command: Command, disk: Disk) -> [Command; 8] {
    // A write of one's own is what the question is about: the command may be none, or a script, which not every server counts.
    let key = [&b"larder:w:{"[..], &slots::tag_of(slot), b"}"].concat();
    let mark = vec![b"SET".to_vec(), key, Vec::new(), b"PX".to_vec(), b"1000".to_vec()];
    let about_disk = match disk {
        Disk::Asked => words(&["CONFIG", "GET", "append*"]),
        Disk::VouchedFor => words(&["PING"]),
    };
    [
        about_disk,
        words(&["WAITAOF", "0", "0", "1"]),
        words(&["MULTI"]),
        words(&["ROLE"]),
        words(&["INFO", "replication"]),
        command,
        mark,
        words(&["EXEC"]),
    ]
}

impl Footing {
    /// Reads the answers to [`carry_out`]; the command's answer.
    ///
    /// # Errors
    /// The server is not what it must be. The command may have been carried out all the same.
    pub fn of(answers: &[Value], disk: Disk) -> Result<(Self, Value), Unsure> {
        let [config, waitaof, .., done] = answers else { return Err(Unsure::Answer) };
        let [role, info, answer, _] = done.as_list().ok_or(Unsure::Answer)? else { return Err(Unsure::Answer) };
        if disk == Disk::Asked && !writes_all(config) {
            return Err(Unsure::Disk);
        }
        let followers = followers_of(role).ok_or(Unsure::Replaced)?;
        if followers.is_empty() {
            return Err(Unsure::Detached);
        }
        let history = history_of(info).ok_or(Unsure::Replaced)?;
        let footing = Self { followers, counts_fsyncs: !matches!(waitaof, Value::Error(_)), history };
        Ok((footing, answer.clone()))
    }

    /// Who must have it.
    pub fn followers(&self) -> &[NodeAddr] {
        &self.followers
    }

    /// Asks who has it.
    ///
    /// A replica that reads a write and the question of `WAITAOF` together answers before it writes to disk, and says more only a second later. So
    /// `WAIT` goes before: what a replica says of what it has read it sends when that is on disk.
    pub fn question(&self) -> Vec<Command> {
        let count = self.followers.len().to_string();
        // With `appendfsync always` a server writes to disk before it answers, and a replica before it acknowledges.
        let mut question = vec![words(&["WAIT", &count, CONFIRMED_WITHIN_MS])];
        if self.counts_fsyncs {
            question.push(words(&["WAITAOF", "1", &count, CONFIRMED_WITHIN_MS]));
        }
        question.extend([words(&["INFO", "replication"]), words(&["ROLE"])]);
        question
    }

    /// Judges the answers to that.
    ///
    /// # Errors
    /// It is not known to be on disk everywhere.
    pub fn confirm(&self, answers: &[Value]) -> Result<(), Unsure> {
        let [.., confirmed, info, role] = answers else { return Err(Unsure::Answer) };
        if history_of(info).as_ref() != Some(&self.history) {
            return Err(Unsure::Replaced);
        }
        if followers_of(role).as_ref() != Some(&self.followers) {
            return Err(Unsure::Followers);
        }
        let replicas = self.followers.len();
        let (own, copies) = match (confirmed, self.counts_fsyncs) {
            (Value::List(counts), true) => match &counts[..] {
                [Value::Int(own), Value::Int(copies)] => (*own >= 1, *copies),
                _ => return Err(Unsure::Answer),
            },
            (Value::Int(copies), false) => (true, *copies),
            _ => return Err(Unsure::Answer),
        };
        let all_have = usize::try_from(copies).is_ok_and(|copies| copies >= replicas);
        if own && all_have { Ok(()) } else { Err(Unsure::Unconfirmed { own, confirmed: copies, replicas }) }
    }
}

/// Who follows a primary, sorted. `None`: it is none.
fn followers_of(role: &Value) -> Option<Vec<NodeAddr>> {
    let [kind, _, followers, ..] = role.as_list()? else { return None };
    let follower = |entry: &Value| {
        let [host, port, ..] = entry.as_list()? else { return None };
        Some(NodeAddr::new(host.as_str()?, u16::try_from(port.as_int()?).ok()?))
    };
    let mut followers = followers.as_list()?.iter().map(follower).collect::<Option<Vec<_>>>()?;
    followers.sort();
    (kind.as_str() == Some("master")).then_some(followers)
}

/// The history of a primary. `None`: it is none.
fn history_of(info: &Value) -> Option<Vec<u8>> {
    let Value::Text(info) = info else { return None };
    let field = |name: &[u8]| info.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name)).map(<[u8]>::trim_ascii);
    (field(b"role:") == Some(&b"master"[..])).then(|| field(b"master_replid:").map(<[u8]>::to_vec))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::Text(text.as_bytes().to_vec())
    }

    fn info(role: &str, history: &str) -> Value {
        text(&format!("# Replication\r\nrole:{role}\r\nconnected_slaves:1\r\nmaster_replid:{history}\r\n"))
    }

    /// The ROLE of a primary with `replicas`.
    fn role(replicas: usize) -> Value {
        let follower = |at: usize| Value::List(vec![text("127.0.0.1"), text(&(7000 + at).to_string()), text("17")]);
        Value::List(vec![text("master"), Value::Int(17), Value::List((0..replicas).map(follower).collect())])
    }

    /// What a primary with `replicas` answers.
    fn answers(replicas: usize, appendfsync: &str) -> Vec<Value> {
        let queued = || text("QUEUED");
        vec![
            Value::List(["appendonly", "yes", "appendfsync", appendfsync].map(text).to_vec()),
            Value::List(vec![Value::Int(0), Value::Int(0)]),
            text("OK"),
            queued(),
            queued(),
            queued(),
            queued(),
            Value::List(vec![role(replicas), info("master", "aa"), text("answer"), text("OK")]),
        ]
    }

    fn footing() -> Footing {
        Footing::of(&answers(2, "always"), Disk::Asked).expect("it is fit").0
    }

    #[test]
    fn a_primary_with_all_its_replicas_that_writes_to_disk_is_fit() {
        let (footing, answer) = Footing::of(&answers(2, "always"), Disk::Asked).expect("it is fit");
        assert_eq!((footing.followers.len(), answer), (2, text("answer")));
        let asked = footing.question();
        assert_eq!(asked[..2], [words(&["WAIT", "2", "1000"]), words(&["WAITAOF", "1", "2", "1000"])]);
        let counts = |own, copies| vec![Value::List(vec![Value::Int(own), Value::Int(copies)]), info("master", "aa"), role(2)];
        assert_eq!(footing.confirm(&counts(1, 2)), Ok(()));
        for (own, copies) in [(0, 2), (1, 1), (1, -1)] {
            assert!(matches!(footing.confirm(&counts(own, copies)), Err(Unsure::Unconfirmed { .. })), "{own} {copies}");
        }
    }

    #[test]
    fn one_that_lacks_replicas_or_a_disk_is_not() {
        assert_eq!(Footing::of(&answers(0, "always"), Disk::Asked), Err(Unsure::Detached));
        assert_eq!(Footing::of(&answers(1, "everysec"), Disk::Asked), Err(Unsure::Disk));
        let mut silent = answers(1, "always");
        silent[0] = Value::List(Vec::new());
        assert_eq!(Footing::of(&silent, Disk::Asked), Err(Unsure::Disk));
        assert_eq!(Footing::of(&answers(1, "always")[..7], Disk::Asked), Err(Unsure::Answer));
    }

    #[test]
    fn what_is_vouched_for_is_not_asked() {
        let [first, ..] = carry_out(7, words(&["PING"]), Disk::VouchedFor);
        assert_eq!(first, words(&["PING"]));
        let mut silent = answers(1, "always");
        silent[0] = text("PONG");
        assert!(Footing::of(&silent, Disk::VouchedFor).is_ok());
        let mut detached = answers(0, "always");
        detached[0] = text("PONG");
        assert_eq!(Footing::of(&detached, Disk::VouchedFor), Err(Unsure::Detached), "all else counts as before");
    }

    #[test]
    fn one_that_was_a_replica_in_between_is_not() {
        let all = Value::List(vec![Value::Int(1), Value::Int(2)]);
        for later in [info("master", "bb"), info("slave", "aa"), text("")] {
            assert_eq!(footing().confirm(&[all.clone(), later, role(2)]), Err(Unsure::Replaced));
        }
    }

    #[test]
    fn those_that_confirm_must_be_those_that_followed() {
        let all = Value::List(vec![Value::Int(1), Value::Int(2)]);
        for followers in [1, 3] {
            let confirmed = footing().confirm(&[all.clone(), info("master", "aa"), role(followers)]);
            assert_eq!(confirmed, Err(Unsure::Followers));
        }
        assert_eq!(footing().followers().len(), 2);
    }

    #[test]
    fn one_without_waitaof_is_asked_by_wait() {
        let mut old = answers(1, "always");
        old[1] = Value::Error("ERR unknown command".to_owned());
        let (footing, _) = Footing::of(&old, Disk::Asked).expect("it is fit");
        let asked = footing.question();
        assert_eq!(asked[..2], [words(&["WAIT", "1", "1000"]), words(&["INFO", "replication"])]);
        assert_eq!(footing.confirm(&[Value::Int(1), info("master", "aa"), role(1)]), Ok(()));
        assert!(footing.confirm(&[Value::Int(0), info("master", "aa"), role(1)]).is_err());
    }
}
