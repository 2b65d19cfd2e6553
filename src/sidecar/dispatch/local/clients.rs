//! CLIENT LIST, KILL and UNBLOCK: over all clients of this sidecar, which are all the workload's own.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;

use tokio::sync::oneshot;

use super::super::names::answer_later;
use super::super::{Flow, Request, refuse};
use super::quoted;
use crate::sidecar::commands::parse_i64;
use crate::sidecar::exclusive::Waits;
use crate::sidecar::resp::{Protocol, encode, reply};
use crate::sidecar::session::{Ending, Session};
use crate::sidecar::tracking::{Tracks, mode};
use crate::sidecar::upstream::lane::{Lane, Mode};
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{Answer, Sink};
use crate::sidecar::worker::Worker;

const SYNTAX: &str = "ERR syntax error";

/// What clients are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Ids(Vec<i64>),
    Address(Vec<u8>),
    LocalAddress(Vec<u8>),
    Host(Vec<u8>),
    User(Vec<u8>),
    Name(Vec<u8>),
    Library(Vec<u8>),
    LibraryVersion(Vec<u8>),
    Database(i64),
    /// At least so many seconds old.
    Age(i64),
    /// Whether it has subscriptions. `None`: one that no client of a sidecar is.
    Subscribed(Option<bool>),
}

/// Which clients are meant: all tests must hold, or not where they are negated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Filter {
    tests: Vec<(bool, Test)>,
}

impl Filter {
    /// Reads filters, of CLIENT LIST or CLIENT KILL.
    fn parse(mut words: &[&[u8]], kills: bool, skip_me: &mut bool) -> Result<Self, String> {
        let mut filter = Self::default();
        while let [option, value, rest @ ..] = words {
            let option = option.to_ascii_lowercase();
            words = rest;
            if kills && option == b"skipme" {
                *skip_me = match value.to_ascii_lowercase().as_slice() {
                    b"yes" => true,
                    b"no" => false,
                    _ => return Err(SYNTAX.to_owned()),
                };
                continue;
            }
            let (negated, name) = option.strip_prefix(b"not-").map_or((false, &option[..]), |name| (true, name));
            let test = match name {
                b"id" => {
                    let wrong = if kills { "ERR client-id should be greater than 0" } else { "ERR Invalid client ID" };
                    let id = parse_i64(value).filter(|id| *id > 0).ok_or(wrong)?;
                    let more = words.iter().map_while(|word| parse_i64(word).filter(|id| *id > 0));
                    let ids: Vec<i64> = std::iter::once(id).chain(more).collect();
                    words = &words[ids.len() - 1..];
                    Test::Ids(ids)
                }
                b"addr" => Test::Address(value.to_vec()),
                b"laddr" => Test::LocalAddress(value.to_vec()),
                b"ip" => Test::Host(value.to_vec()),
                b"user" if *value != DEFAULT_USER => return Err(format!("ERR No such user '{}'", quoted(value))),
                b"user" => Test::User(value.to_vec()),
                b"name" => Test::Name(value.to_vec()),
                b"lib-name" => Test::Library(value.to_vec()),
                b"lib-ver" => Test::LibraryVersion(value.to_vec()),
                b"db" => Test::Database(parse_i64(value).ok_or("ERR DB is not an integer or out of range")?),
                b"maxage" => Test::Age(parse_i64(value).ok_or("ERR maxage is not an integer or out of range")?),
                b"type" => Test::Subscribed(parse_type(value)?),
                _ => return Err(SYNTAX.to_owned()),
            };
            filter.tests.push((negated, test));
        }
        if words.is_empty() { Ok(filter) } else { Err(SYNTAX.to_owned()) }
    }

    fn takes(&self, session: &Session) -> bool {
        self.tests.iter().all(|(negated, test)| test.holds(session) != *negated)
    }
}

/// Whoever reaches the sidecar is the workload; under which name it says so is not kept.
const DEFAULT_USER: &[u8] = b"default";

fn parse_type(word: &[u8]) -> Result<Option<bool>, String> {
    match word.to_ascii_lowercase().as_slice() {
        b"normal" => Ok(Some(false)),
        b"pubsub" => Ok(Some(true)),
        b"master" | b"primary" | b"slave" | b"replica" => Ok(None),
        _ => Err(format!("ERR Unknown client type '{}'", quoted(word))),
    }
}

impl Test {
    fn holds(&self, session: &Session) -> bool {
        let about = session.about.borrow();
        match self {
            Self::Ids(ids) => ids.contains(&session.id().cast_signed()),
            Self::Address(address) => show(session.peer_addr()).as_bytes() == address,
            Self::LocalAddress(address) => show(session.local_addr()).as_bytes() == address,
            Self::Host(host) => session.peer_addr().is_some_and(|peer| peer.ip().to_string().as_bytes() == host),
            Self::User(user) => user == DEFAULT_USER,
            Self::Name(name) => about.name == *name,
            Self::Library(name) => about.library == *name,
            Self::LibraryVersion(version) => about.library_version == *version,
            Self::Database(database) => i64::from(session.lane().database) == *database,
            Self::Age(seconds) => session.age_seconds().cast_signed() >= *seconds,
            Self::Subscribed(subscribed) => *subscribed == Some(session.held().borrow().is_subscribed()),
        }
    }
}

fn show(address: Option<SocketAddr>) -> String {
    address.map_or_else(|| ":0".to_owned(), |address| address.to_string())
}

/// CLIENT LIST.
pub fn list(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let words: Vec<&[u8]> = request.args.iter().skip(2).collect();
    let filter = match Filter::parse(&words, false, &mut false) {
        Ok(filter) => filter,
        Err(text) => return refuse(session, &text),
    };
    let (roster, protocol) = (session.worker().roster().clone(), session.protocol());
    answer_later(session, async move {
        let look = move |worker: &Rc<Worker>, answer: oneshot::Sender<Vec<(u64, String)>>| {
            let mut lines = Vec::new();
            worker.each_session(|session| {
                if filter.takes(session) {
                    lines.push((session.id(), describe(session)));
                }
            });
            // Whoever asked may have gone.
            let _ = answer.send(lines);
        };
        let mut lines: Vec<(u64, String)> = roster.ask_all(look).await.concat();
        lines.sort_unstable();
        let text: String = lines.into_iter().map(|(_, line)| line).collect();
        let mut out = Vec::new();
        encode::verbatim(&mut out, protocol, text.as_bytes());
        Ok(out)
    })
}

/// A client's line in CLIENT LIST. What only a server can know is as of a connection that has done nothing.
pub fn describe(session: &Session) -> String {
    let about = session.about.borrow();
    let [channels, patterns, shard_channels] = session.held().borrow().subscriptions();
    let mut flags = String::new();
    let tracks = session.tracks().borrow();
    let tracks = tracks.as_deref();
    let redirection = mode::redirection(tracks.map(Tracks::mode));
    let marks = [
        (tracks.is_some(), 't'),
        (tracks.is_some_and(Tracks::is_broken), 'R'),
        (tracks.is_some_and(|tracks| tracks.mode().broadcast), 'B'),
        (channels + patterns + shard_channels > 0, 'P'),
        (!session.waits().is_empty(), 'b'),
        (session.lane().has(Mode::NoTouch), 'T'),
        (session.lane().has(Mode::ImportSource), 'I'),
        (session.peer_addr().is_none(), 'U'),
    ];
    marks.iter().filter(|(holds, _)| *holds).for_each(|(_, mark)| flags.push(*mark));
    if flags.is_empty() {
        flags.push('N');
    }
    let mut line = String::new();
    let _ = writeln!(
        line,
        "id={} addr={} laddr={} fd=-1 name={} age={} idle=0 flags={flags} db={} sub={channels} psub={patterns} \
         ssub={shard_channels} multi=-1 cmd=client user=default redir={redirection} resp={} lib-name={} lib-ver={}",
        session.id(),
        show(session.peer_addr()),
        show(session.local_addr()),
        String::from_utf8_lossy(&about.name),
        session.age_seconds(),
        session.lane().database,
        if session.protocol() == Protocol::Resp3 { 3 } else { 2 },
        String::from_utf8_lossy(&about.library),
        String::from_utf8_lossy(&about.library_version),
    );
    line
}

/// Whether there is a client of that number.
pub async fn exists(worker: &Rc<Worker>, id: u64) -> bool {
    let look = move |worker: &Rc<Worker>, answer: oneshot::Sender<bool>| {
        let mut found = false;
        worker.each_session(|session| found |= session.id() == id);
        let _ = answer.send(found);
    };
    worker.roster().ask_all(look).await.contains(&true)
}

/// CLIENT KILL, in its old form (an address) and its new one (filters).
pub fn kill(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let words: Vec<&[u8]> = request.args.iter().skip(2).collect();
    let mut skip_me = true;
    let parsed = match words[..] {
        [address] => {
            skip_me = false;
            Ok(Filter { tests: vec![(false, Test::Address(address.to_vec()))] })
        }
        _ => Filter::parse(&words, true, &mut skip_me),
    };
    let filter = match parsed {
        Ok(filter) => filter,
        Err(text) => return refuse(session, &text),
    };
    let (roster, own, by_address) = (session.worker().roster().clone(), session.clone(), words.len() == 1);
    answer_later(session, async move {
        let me = own.id();
        let look = move |worker: &Rc<Worker>, answer: oneshot::Sender<i64>| {
            let mut killed = 0;
            worker.each_session(|session| {
                if filter.takes(session) && !(skip_me && session.id() == me) {
                    killed += 1;
                    // One's own connection ends after the answer.
                    session.end(if session.id() == me { Ending::Draining } else { Ending::Now });
                }
            });
            let _ = answer.send(killed);
        };
        let killed: i64 = roster.ask_all(look).await.into_iter().sum();
        let mut out = Vec::new();
        match (by_address, killed) {
            (true, 0) => return Err("ERR No such client".to_owned()),
            (true, _) => encode::status(&mut out, "OK"),
            (false, killed) => encode::integer(&mut out, killed),
        }
        Ok(out)
    })
}

/// CLIENT UNBLOCK: the server on which the other client waits ends that, so that what it has popped by then is that client's.
pub fn unblock(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let Some(id) = request.args.get(2).and_then(parse_i64) else {
        return refuse(session, "ERR value is not an integer or out of range");
    };
    let reason = match (request.args.get(3).map(<[u8]>::to_ascii_uppercase), request.args.len()) {
        (None, _) => b"TIMEOUT".to_vec(),
        (Some(reason), 4) if reason == b"TIMEOUT" || reason == b"ERROR" => reason,
        (_, 4) => return refuse(session, "ERR CLIENT UNBLOCK reason should be TIMEOUT or ERROR"),
        _ => return refuse(session, SYNTAX),
    };
    let roster = session.worker().roster().clone();
    answer_later(session, async move {
        let look = move |worker: &Rc<Worker>, answer: oneshot::Sender<Vec<oneshot::Receiver<Result<i64, String>>>>| {
            let mut asked = Vec::new();
            worker.each_session(|session| {
                if session.id().cast_signed() == id {
                    asked.extend(session.waits().iter().map(|wait| end_wait(worker, wait, &reason)));
                }
            });
            let _ = answer.send(asked);
        };
        let mut ended = 0;
        for told in roster.ask_all(look).await.into_iter().flatten() {
            ended = told.await.unwrap_or(Ok(0))?.max(ended);
        }
        let mut out = Vec::new();
        encode::integer(&mut out, ended);
        Ok(out)
    })
}

/// Asks a server to end a wait.
fn end_wait(worker: &Rc<Worker>, wait: &Waits, reason: &[u8]) -> oneshot::Receiver<Result<i64, String>> {
    // Should the wait be over when this arrives, its connection must be nobody else's.
    wait.spoiled.set(true);
    let (sender, answer) = oneshot::channel();
    let sink = Sink::Call(Box::new(move |_, answer| {
        let answer = match answer {
            Answer::Reply([b'-', error @ ..]) => Err(String::from_utf8_lossy(error).trim_end().to_owned()),
            Answer::Reply(bytes) => Ok(reply::integer(bytes).unwrap_or_default()),
            Answer::Failed(text) => Err(text.to_owned()),
        };
        let _ = sender.send(answer);
    }));
    let mut command = Vec::new();
    encode::command(&mut command, &[&b"CLIENT"[..], b"UNBLOCK", wait.number.to_string().as_bytes(), reason]);
    let lane = Lane::default();
    let mux = worker.router().node_at(&wait.node).mux(worker, lane);
    mux.push(&[&command], Pending::new(sink, ANY_SLOT, Retry::Here, lane, worker.now()));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<(Filter, bool), String> {
        let words: Vec<&[u8]> = line.split_whitespace().map(str::as_bytes).collect();
        let mut skip_me = true;
        Filter::parse(&words, true, &mut skip_me).map(|filter| (filter, skip_me))
    }

    #[test]
    fn filters_are_read_as_by_the_servers() {
        let ids = |ids: &[i64]| Test::Ids(ids.to_vec());
        assert_eq!(parse("ID 7"), Ok((Filter { tests: vec![(false, ids(&[7]))] }, true)));
        let many = parse("not-id 7 8 9 SKIPME no Type pubsub");
        assert_eq!(many, Ok((Filter { tests: vec![(true, ids(&[7, 8, 9])), (false, Test::Subscribed(Some(true)))] }, false)));
        for (line, error) in [
            ("ID x", "ERR client-id should be greater than 0"),
            ("ID 0", "ERR client-id should be greater than 0"),
            ("TYPE x", "ERR Unknown client type 'x'"),
            ("USER x", "ERR No such user 'x'"),
            ("SKIPME x", SYNTAX),
            ("nonsense x", SYNTAX),
            ("ID 7 ADDR", SYNTAX),
            ("MAXAGE x", "ERR maxage is not an integer or out of range"),
        ] {
            assert_eq!(parse(line), Err(error.to_owned()), "{line}");
        }
    }
}
