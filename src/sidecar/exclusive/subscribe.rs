//! SUBSCRIBE, PSUBSCRIBE, SSUBSCRIBE and their opposites.
//!
//! A client's first subscription opens a connection that brings its messages ([`feed`](super::feed)); shard channels of a
//! Cluster have one for each slot. Under RESP3 the client then goes on with any commands on the shared connections, and
//! messages are pushed between the replies. Under RESP2 only these commands, PING, QUIT and RESET are answered until the last
//! subscription has ended, as by Redis.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::feed::{Counts, Feed, Kind, confirmation};
use super::turn::{Turn, Want, turn};
use super::{guard, refuse, stream};
use crate::sidecar::commands::{self, Class, CommandSpec};
use crate::sidecar::resp::{Protocol, encode};
use crate::sidecar::session::reader::{Front, MOST_HELD_BYTES, Taken};
use crate::sidecar::session::{Ending, Reader, Session};
use crate::sidecar::upstream::queue::ANY_SLOT;

/// The most slots whose shard channels one client is subscribed to.
const MOST_FEEDS: usize = 64;

/// One client's subscriptions.
#[derive(Debug, Default)]
pub struct Subscription {
    feeds: RefCell<Vec<Rc<Feed>>>,
    counts: Rc<Counts>,
}

/// What the client does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Another command is looked at here.
    Here,
    /// It goes back to the shared connections.
    Shared,
}

/// Serves a client whose next command is about subscriptions.
pub async fn run(reader: &mut Reader) {
    let session = reader.session().clone();
    loop {
        match reader.take_front() {
            Front::Broken => return,
            Front::Command(command) => {
                if serve(reader, &session, command).await == Next::Shared {
                    return;
                }
            }
            Front::Long | Front::Partial if !is_bound(&session) => return,
            Front::Long => stream::refuse_long(reader, "ERR this command is too long for a client with subscriptions").await,
            Front::Partial => {
                let want = Want { input: MOST_HELD_BYTES, may_drain: true, ..Want::default() };
                if matches!(turn(reader, None, want).await, Turn::Ended | Turn::Gone) {
                    return session.end(Ending::Now);
                }
            }
        }
    }
}

/// Whether the client may send nothing but commands about subscriptions.
pub fn is_bound(session: &Rc<Session>) -> bool {
    session.protocol() == Protocol::Resp2 && session.held().borrow().is_subscribed()
}

async fn serve(reader: &mut Reader, session: &Rc<Session>, command: Taken) -> Next {
    let spec = commands::resolve(&command.args());
    match spec {
        Ok(spec) if spec.class == Class::PubSub => change(reader, session, &command, spec).await,
        _ if !is_bound(session) => {
            reader.put_back(command);
            return Next::Shared;
        }
        Err(error) => session.answer_now(|out| error.write(&command.args(), out)),
        Ok(spec) => match spec.name {
            "ping" => session.answer_now(|out| {
                encode::array(out, 2);
                encode::bulk(out, b"pong");
                encode::bulk(out, command.args().get(1).unwrap_or_default());
            }),
            "quit" | "reset" => {
                session.held().borrow_mut().subscription = None;
                reader.put_back(command);
                return Next::Shared;
            }
            name => refuse(
                session,
                &format!(
                    "ERR Can't execute '{}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this \
                     context",
                    if name.is_empty() { String::from_utf8_lossy(command.args().name()).to_lowercase() } else { name.into() }
                ),
            ),
        },
    }
    Next::Here
}

/// Subscribes or unsubscribes, and waits for the confirmations.
async fn change(reader: &mut Reader, session: &Rc<Session>, command: &Taken, spec: &CommandSpec) {
    let slot = match guard::admit(session, &command.args(), spec) {
        Ok(slot) => slot,
        Err(text) => return refuse(session, &text),
    };
    if session.is_skipping() {
        // Confirmations are pushes, which come in any case.
        session.unmute();
    }
    let subscription = session.held().borrow_mut().subscription.get_or_insert_default().clone();
    match subscription.ask(session, command, spec, slot, false) {
        Err(text) => refuse(session, &text),
        Ok(feeds) if feeds.is_empty() => session.deliver_push(&subscription.nothing(session, spec)),
        Ok(feeds) => {
            for text in wait_for(reader, session, &feeds).await {
                refuse(session, &text);
            }
        }
    }
    subscription.settle(session);
}

/// The same within a transaction, whose EXEC has been carried out: what stands in its reply.
pub async fn within(reader: &mut Reader, command: &Taken, spec: &CommandSpec) -> Vec<u8> {
    let session = reader.session().clone();
    let subscription = session.held().borrow_mut().subscription.get_or_insert_default().clone();
    let mut told = Vec::new();
    // No server takes SSUBSCRIBE there, and a slot's channels end where they are.
    let asked = match (spec.name, guard::admit(&session, &command.args(), spec)) {
        ("ssubscribe", _) => Err("ERR SSUBSCRIBE isn't allowed for a DENY BLOCKING client".to_owned()),
        (_, admitted) => admitted.and_then(|slot| subscription.ask(&session, command, spec, slot, true)),
    };
    match asked {
        Err(text) => encode::error(&mut told, &text),
        Ok(feeds) if feeds.is_empty() => told = subscription.nothing(&session, spec),
        Ok(feeds) => {
            let failed = wait_for(reader, &session, &feeds).await;
            feeds.iter().for_each(|feed| told.append(&mut feed.take_kept()));
            failed.iter().for_each(|text| encode::error(&mut told, text));
        }
    }
    subscription.settle(&session);
    told
}

/// The kind that a command is about, and whether it subscribes.
fn kind_of(spec: &CommandSpec) -> (Kind, bool) {
    let all = Kind::ALL.into_iter().flat_map(|kind| [(kind, true), (kind, false)]);
    all.into_iter().find(|(kind, subscribe)| kind.command(*subscribe) == spec.name).unwrap_or((Kind::Channel, false))
}

/// Waits for what the servers of `feeds` confirm, as long as the policy's patience. The texts of errors, where they do not.
async fn wait_for(reader: &mut Reader, session: &Rc<Session>, feeds: &[Rc<Feed>]) -> Vec<String> {
    let mut failed = Vec::new();
    let deadline = Instant::now() + Duration::from_millis(session.worker().patience());
    let want = Want { input: MOST_HELD_BYTES, ..Want::default() };
    for feed in feeds {
        loop {
            tokio::select! {
                () = feed.confirmed() => break,
                () = sleep_until(deadline) => {
                    feed.withdraw();
                    failed.push(session.worker().unreachable_text());
                    break;
                }
                turned = turn(reader, None, want) => {
                    if matches!(turned, Turn::Ended | Turn::Gone) {
                        session.end(Ending::Now);
                        return failed;
                    }
                }
            }
        }
    }
    failed
}

impl Subscription {
    /// How many subscriptions of each kind there are.
    pub fn counts(&self) -> [usize; 3] {
        Kind::ALL.map(|kind| self.feeds.borrow().iter().map(|feed| feed.channels(kind).len()).sum())
    }

    /// The feed of a slot's server, made where there is none.
    fn feed(&self, session: &Rc<Session>, slot: u16) -> Result<Rc<Feed>, String> {
        let mut feeds = self.feeds.borrow_mut();
        if let Some(feed) = feeds.iter().find(|feed| feed.slot() == slot) {
            return Ok(feed.clone());
        }
        if feeds.len() >= MOST_FEEDS {
            return Err(format!("ERR a client may be subscribed to shard channels of at most {MOST_FEEDS} slots"));
        }
        let feed = Rc::new(Feed::start(session, slot, self.counts.clone()));
        feeds.push(feed.clone());
        Ok(feed)
    }

    /// Asks for what a command says. Who confirms it; nobody, where all subscriptions of a kind are to end and there are none.
    fn ask(
        &self,
        session: &Rc<Session>,
        command: &Taken,
        spec: &CommandSpec,
        slot: u16,
        kept: bool,
    ) -> Result<Vec<Rc<Feed>>, String> {
        let (kind, subscribe) = kind_of(spec);
        let channels: Vec<Vec<u8>> = command.args().iter().skip(1).map(<[u8]>::to_vec).collect();
        if channels.is_empty() {
            return Ok(self.ask_for_all(kind, kept));
        }
        let feed = self.feed(session, if kind == Kind::Shard { slot } else { ANY_SLOT })?;
        feed.ask(kind, subscribe, channels, kept);
        Ok(vec![feed])
    }

    /// What is told where all subscriptions of a kind are to end, and there are none.
    fn nothing(&self, session: &Session, spec: &CommandSpec) -> Vec<u8> {
        confirmation(session.protocol(), kind_of(spec).0, false, None, &self.counts)
    }

    /// Ends the feeds that have nothing to bring, and with the last one the subscription.
    fn settle(&self, session: &Session) {
        self.feeds.borrow_mut().retain(|feed| !feed.is_idle());
        if self.feeds.borrow().is_empty() {
            session.held().borrow_mut().subscription = None;
        }
    }

    /// Ends all subscriptions of a kind.
    fn ask_for_all(&self, kind: Kind, kept: bool) -> Vec<Rc<Feed>> {
        let mut asked = Vec::new();
        for feed in self.feeds.borrow().iter() {
            let channels = feed.channels(kind);
            if !channels.is_empty() {
                feed.ask(kind, false, channels, kept);
                asked.push(feed.clone());
            }
        }
        asked
    }
}
