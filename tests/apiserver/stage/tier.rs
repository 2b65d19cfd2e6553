//! A cache tier as its members would be seen from outside: roles, who names whom, and what each answers. No I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use larder::operator::cache_cluster::names::{SENTINEL_PORT, SERVER_PORT};
use larder::policy::agent::{DataState, Position, Proved, ServerPhase, StateReport, VERSION};
use larder::policy::told;
use tokio::sync::broadcast;

use super::keeper;
use super::tls::{Pair, Presented};
use super::wire::Reply;

/// The history that all copies of a tier count in.
const LINEAGE: &str = "8f14e45fceea167a5a36dedd4bea2543a1b2c3d4";
/// How far all copies are: nobody writes here.
const OFFSET: u64 = 4096;

/// What runs in a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Member {
    Server(u16),
    Sentinel(u16),
}

/// What the pods' volumes hold, as the kubelets mount it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mounted {
    /// Larder's own user and its password.
    pub login: Option<(String, String)>,
    /// The generation of the servers' users.
    pub users: Option<u64>,
    /// The generation of each agent's configuration, by ordinal: every server that is wanted has one.
    pub agents: BTreeMap<u16, u64>,
    /// The servers' certificate, and the sentinels'. `None`: plain TCP.
    pub certificates: Option<(Pair, Pair)>,
}

/// What a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Its agent has not decided yet, and keeps its port closed.
    Undecided,
    Primary,
    Replica(SocketAddr),
}

#[derive(Debug, Clone)]
struct Server {
    address: SocketAddr,
    role: Role,
    priority: String,
    /// What it has been told of users besides their file, by their names.
    users: BTreeMap<String, Vec<String>>,
}

impl Server {
    /// The generation of users that it is being told of; 0 where it is not.
    fn told(&self) -> u64 {
        let rules = self.users.get(told::MARK);
        rules.and_then(|rules| rules.iter().find_map(|rule| told::generation(rule))).unwrap_or(0)
    }
}

#[derive(Debug, Clone)]
struct Sentinel {
    address: IpAddr,
    watch: Option<Watch>,
    /// What it has been told of users.
    users: BTreeSet<String>,
    /// How old a connection that nobody answers is to be before it makes another, in milliseconds.
    reconnects_after: String,
    /// What it read when it started.
    presented: Option<Presented>,
}

#[derive(Debug, Clone, Copy)]
struct Watch {
    primary: SocketAddr,
    quorum: u16,
}

/// The members of one tier that run.
#[derive(Debug)]
pub struct Tier {
    servers: BTreeMap<u16, Server>,
    sentinels: BTreeMap<u16, Sentinel>,
    mounted: Mounted,
    /// What servers show: they take up what is mounted while they run.
    presented: Option<Presented>,
    switches: broadcast::Sender<String>,
    /// Commands that nobody here knows.
    pub unknown: Vec<String>,
    /// How often one server took over from another.
    pub failovers: u32,
    /// The fewest sentinels that ran at the same time since this was last raised.
    pub fewest_sentinels: usize,
    /// Whether kubelets bring no new users to the servers' files.
    pub users_are_late: bool,
    /// Whether agents take requests and answer none.
    pub agents_hang: bool,
    /// A real server that keeps what the primary is told, and passes on what is published there. `None`: nothing is kept.
    pub kept_by: Option<SocketAddr>,
}

impl Default for Tier {
    fn default() -> Self {
        Self {
            servers: BTreeMap::new(),
            sentinels: BTreeMap::new(),
            mounted: Mounted::default(),
            presented: None,
            switches: broadcast::Sender::new(16),
            unknown: Vec::new(),
            failovers: 0,
            fewest_sentinels: usize::MAX,
            users_are_late: false,
            agents_hang: false,
            kept_by: None,
        }
    }
}

impl Tier {
    /// A pod's containers run, and its Service has this address.
    pub fn start(&mut self, member: Member, address: IpAddr) {
        match member {
            Member::Server(ordinal) => {
                let address = SocketAddr::new(address, SERVER_PORT);
                let server = Server { address, role: Role::Undecided, priority: "100".to_owned(), users: BTreeMap::new() };
                self.servers.insert(ordinal, server);
            }
            Member::Sentinel(ordinal) => {
                let presented = self.mounted.certificates.as_ref().map(|(_, pair)| pair.present());
                let reconnects_after = "15000".to_owned();
                let sentinel = Sentinel { address, watch: None, users: BTreeSet::new(), reconnects_after, presented };
                self.sentinels.insert(ordinal, sentinel);
            }
        }
        self.settle();
    }

    /// A pod's containers have ended.
    pub fn stop(&mut self, member: Member) {
        match member {
            Member::Server(ordinal) => drop(self.servers.remove(&ordinal)),
            Member::Sentinel(ordinal) => {
                self.sentinels.remove(&ordinal);
                self.fewest_sentinels = self.fewest_sentinels.min(self.sentinels.len());
            }
        }
        self.settle();
    }

    /// The volumes hold this now.
    pub fn mount(&mut self, mut mounted: Mounted) {
        if self.users_are_late {
            mounted.users = self.mounted.users;
        }
        // As agents do: what was told before the file came counts no more once the file is as new.
        for server in self.servers.values_mut().filter(|server| mounted.users.is_some_and(|users| users >= server.told())) {
            server.users.clear();
        }
        if self.mounted != mounted {
            if self.mounted.certificates != mounted.certificates {
                self.presented = mounted.certificates.as_ref().map(|(pair, _)| pair.present());
            }
            self.mounted = mounted;
            self.settle();
        }
    }

    /// Whether pods find what they mount, certificates among it where they ask for them.
    pub fn is_mounted(&self, member: Member, tls: bool) -> bool {
        let Mounted { login, users, agents, certificates } = &self.mounted;
        let configured = match member {
            Member::Server(ordinal) => agents.contains_key(&ordinal),
            Member::Sentinel(_) => true,
        };
        login.is_some() && users.is_some() && configured && (certificates.is_some() || !tls)
    }

    /// What a member shows to whoever connects; `None` where it speaks in the clear.
    pub fn presented(&self, member: Member) -> Option<Presented> {
        match member {
            Member::Server(_) => self.presented.clone(),
            Member::Sentinel(ordinal) => self.sentinels.get(&ordinal)?.presented.clone(),
        }
    }

    /// Larder's own login.
    pub fn login(&self) -> Option<&(String, String)> {
        self.mounted.login.as_ref()
    }

    pub fn subscribe(&self) -> broadcast::Receiver<String> {
        self.switches.subscribe()
    }

    /// The ordinal of the server that acts as primary.
    pub fn primary(&self) -> Option<u16> {
        self.servers.iter().find(|(_, server)| server.role == Role::Primary).map(|(ordinal, _)| *ordinal)
    }

    /// The generation of users in the servers' files.
    pub fn users_in_files(&self) -> Option<u64> {
        self.mounted.users
    }

    /// What each server was told of a user besides its file.
    pub fn told_to_servers(&self, user: &str) -> Vec<Option<String>> {
        self.servers.values().map(|server| server.users.get(user).map(|rules| rules.join(" "))).collect()
    }

    /// The servers that sentinels are told of as users.
    pub fn users_on_sentinels(&self) -> Vec<BTreeSet<String>> {
        self.sentinels.values().map(|sentinel| sentinel.users.clone()).collect()
    }

    fn at(&self, address: SocketAddr) -> Option<u16> {
        self.servers.iter().find(|(_, server)| server.address == address).map(|(ordinal, _)| *ordinal)
    }

    fn named(&self) -> Option<SocketAddr> {
        let named = self.sentinels.values().filter_map(|sentinel| sentinel.watch.map(|watch| watch.primary));
        let all = self.sentinels.len();
        named.clone().find(|primary| named.clone().filter(|other| other == primary).count() > all / 2)
    }

    /// What agents and sentinels do by themselves: a first start, a fail-over of a primary that is gone, replicas that find their primary.
    fn settle(&mut self) {
        if self.primary().is_none() {
            let in_step = |server: &Server| matches!(server.role, Role::Replica(_));
            let replica = self.servers.iter().find(|(_, server)| in_step(server)).map(|(ordinal, _)| *ordinal);
            match (self.named().and_then(|named| self.at(named)), replica) {
                // The one that is named is about to start.
                (Some(ordinal), None) => self.promote(ordinal),
                (None, Some(ordinal)) if self.named().is_some() => {
                    self.promote(ordinal);
                    self.failovers += 1;
                }
                // Nobody names anybody, and every server that is wanted says that it is empty.
                (None, None) if self.named().is_none() && self.mounted.agents.keys().all(|id| self.servers.contains_key(id)) => {
                    if let Some(lowest) = self.servers.keys().next().copied() {
                        self.promote(lowest);
                    }
                }
                _ => {}
            }
        }
        let Some(primary) = self.primary().and_then(|ordinal| self.servers.get(&ordinal)).map(|server| server.address) else {
            return;
        };
        for server in self.servers.values_mut().filter(|server| server.role != Role::Primary) {
            server.role = Role::Replica(primary);
        }
    }

    /// Makes a server the primary, and every sentinel that watches anything name it.
    fn promote(&mut self, ordinal: u16) {
        let Some(address) = self.servers.get(&ordinal).map(|server| server.address) else { return };
        for server in self.servers.values_mut() {
            server.role = if server.address == address { Role::Primary } else { Role::Replica(address) };
        }
        for watch in self.sentinels.values_mut().filter_map(|sentinel| sentinel.watch.as_mut()) {
            watch.primary = address;
        }
        // Nobody may be listening.
        let _ = self.switches.send(address.to_string());
    }

    /// What an agent tells of its server; `None` where its pod does not run.
    pub fn report(&self, ordinal: u16) -> Option<StateReport> {
        let server = self.servers.get(&ordinal)?;
        let position = |led| DataState::Complete(Position { lineage: LINEAGE.to_owned(), offset: OFFSET, led, exact: false });
        let (phase, data) = match server.role {
            Role::Undecided => (ServerPhase::Deciding, DataState::Empty),
            Role::Primary => (ServerPhase::Primary, position(true)),
            Role::Replica(of) => (ServerPhase::Replica { of: of.to_string(), link_up: true }, position(false)),
        };
        let generation = self.mounted.agents.get(&ordinal).copied().unwrap_or_default();
        let runs = server.role != Role::Undecided;
        let proved = Proved {
            settings: runs.then_some(generation),
            users: self.mounted.users.filter(|_| runs),
            users_told: runs.then(|| server.told()),
            certificate: self.presented.as_ref().filter(|_| runs).map(|presented| presented.fingerprint.clone()),
            replication: runs.then(|| self.mounted.login.as_ref().map(|(user, _)| user.clone())).flatten(),
            ..Proved::default()
        };
        let address = Some(server.address.to_string());
        Some(StateReport { version: VERSION, ordinal, address, generation, data, claim: None, server: phase, proved })
    }

    /// The real server that answers a command in a member's stead.
    pub fn keeper(&self, member: Member, verb: &str) -> Option<SocketAddr> {
        let is_primary = matches!(member, Member::Server(ordinal) if self.primary() == Some(ordinal));
        self.kept_by.filter(|_| is_primary && keeper::is_asked(verb))
    }

    /// What a member answers to a command of a user that is logged in.
    pub fn answer(&mut self, member: Member, words: &[&str]) -> Reply {
        let is_there = match member {
            Member::Server(ordinal) => self.servers.contains_key(&ordinal),
            Member::Sentinel(ordinal) => self.sentinels.contains_key(&ordinal),
        };
        if !is_there {
            // Its pod is being replaced: who asked over a connection from before is no stranger for it.
            return Reply::error("ERR the server is shutting down");
        }
        let known = match member {
            Member::Server(ordinal) => self.answer_of_server(ordinal, words),
            Member::Sentinel(ordinal) => self.answer_of_sentinel(ordinal, words),
        };
        known.unwrap_or_else(|| {
            let name = words.iter().take(2).copied().collect::<Vec<_>>().join(" ");
            self.unknown.push(format!("{member:?}: {name}"));
            Reply::error(format!("ERR unknown command '{name}'"))
        })
    }

    fn answer_of_server(&mut self, ordinal: u16, words: &[&str]) -> Option<Reply> {
        let command = words.iter().map(|word| word.to_ascii_uppercase()).collect::<Vec<_>>();
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        if let ["ACL", ..] = command[..] {
            return users_of(&mut self.servers.get_mut(&ordinal)?.users, words);
        }
        Some(match command[..] {
            ["PING"] => Reply::Simple("PONG"),
            ["INFO", ..] => Reply::bulk(self.info(ordinal)?),
            ["CLIENT", "PAUSE" | "UNPAUSE", ..] => Reply::Simple("OK"),
            ["CONFIG", "GET", "REPLICA-PRIORITY"] => {
                Reply::strings(["replica-priority", &self.servers.get(&ordinal)?.priority.clone()])
            }
            ["CONFIG", "SET", "REPLICA-PRIORITY", priority] => {
                self.servers.get_mut(&ordinal)?.priority = priority.to_owned();
                Reply::Simple("OK")
            }
            ["ROLE"] => match self.servers.get(&ordinal)?.role {
                Role::Replica(of) => Reply::strings(["slave", &of.ip().to_string(), &of.port().to_string(), "connected", "0"]),
                Role::Primary | Role::Undecided => {
                    Reply::Array(vec![Reply::bulk("master"), Reply::Integer(0), Reply::Array(Vec::new())])
                }
            },
            // Where no real server is behind it, nobody holds keys: whoever puts some there is to try again.
            ["EVAL" | "GETRANGE" | "SET" | "DEL" | "SREM" | "PUBLISH" | "SUBSCRIBE" | "UNSUBSCRIBE" | "HELLO", ..] => {
                Reply::error("LOADING a played server keeps nothing")
            }
            ["REPLICAOF", "NO", "ONE"] => {
                self.promote(ordinal);
                Reply::Simple("OK")
            }
            ["REPLICAOF", host, port] => {
                let of = SocketAddr::new(host.parse().ok()?, port.parse().ok()?);
                self.servers.get_mut(&ordinal)?.role = Role::Replica(of);
                Reply::Simple("OK")
            }
            _ => return None,
        })
    }

    fn info(&self, ordinal: u16) -> Option<String> {
        let server = self.servers.get(&ordinal)?;
        let mut lines = vec!["redis_version:7.0.15".to_owned(), "loading:0".to_owned(), format!("master_replid:{LINEAGE}")];
        match server.role {
            Role::Replica(of) => lines.extend([
                "role:slave".to_owned(),
                format!("master_host:{}", of.ip()),
                format!("master_port:{}", of.port()),
                "master_link_status:up".to_owned(),
                format!("slave_repl_offset:{OFFSET}"),
            ]),
            Role::Primary | Role::Undecided => {
                lines.push("role:master".to_owned());
                let replicas = self.servers.values().filter(|other| other.role == Role::Replica(server.address));
                lines.extend(replicas.enumerate().map(|(index, replica)| {
                    let (ip, port) = (replica.address.ip(), replica.address.port());
                    format!("slave{index}:ip={ip},port={port},state=online,offset={OFFSET},lag=0")
                }));
            }
        }
        lines.push(format!("master_repl_offset:{OFFSET}"));
        Some(lines.join("\r\n") + "\r\n")
    }

    fn answer_of_sentinel(&mut self, ordinal: u16, words: &[&str]) -> Option<Reply> {
        let verb = words.first()?.to_ascii_uppercase();
        let what = words.get(1).map(|word| word.to_ascii_uppercase()).unwrap_or_default();
        let no_such = || Reply::error("ERR No such master with that name");
        let watch = self.sentinels.get(&ordinal)?.watch;
        Some(match (verb.as_str(), what.as_str(), &words[1..]) {
            ("PING", ..) => Reply::Simple("PONG"),
            // One that does nothing to speak of.
            ("INFO", "CPU", _) => Reply::bulk("# CPU\r\nused_cpu_sys:0.100000\r\nused_cpu_user:0.100000\r\n"),
            ("INFO", "SENTINEL", _) => Reply::bulk("# Sentinel\r\nsentinel_tilt:0\r\n"),
            ("SENTINEL", "DEBUG", [_, period, millis]) if period.eq_ignore_ascii_case("min-link-reconnect-period") => {
                self.sentinels.get_mut(&ordinal)?.reconnects_after = (*millis).to_owned();
                Reply::Simple("OK")
            }
            ("SENTINEL", "DEBUG", [_]) => {
                Reply::strings(["MIN-LINK-RECONNECT-PERIOD", &self.sentinels.get(&ordinal)?.reconnects_after.clone()])
            }
            ("ACL", "SETUSER", [_, name, ..]) => {
                self.sentinels.get_mut(&ordinal)?.users.insert((*name).to_owned());
                Reply::Simple("OK")
            }
            ("ACL", "USERS", _) => {
                let users = &self.sentinels.get(&ordinal)?.users;
                Reply::Array(users.iter().map(Reply::bulk).collect())
            }
            ("ACL", "DELUSER", [_, name]) => {
                let removed = self.sentinels.get_mut(&ordinal)?.users.remove(*name);
                Reply::Integer(i64::from(removed))
            }
            ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", _) => match watch {
                Some(Watch { primary, .. }) => Reply::strings([&primary.ip().to_string(), &primary.port().to_string()]),
                None => Reply::Array(Vec::new()),
            },
            ("SENTINEL", "MASTERS", _) => Reply::Array(watch.into_iter().map(|watch| self.master(ordinal, watch)).collect()),
            ("SENTINEL", "MASTER", _) => watch.map_or_else(no_such, |watch| self.master(ordinal, watch)),
            ("SENTINEL", "REPLICAS", _) => watch.map_or_else(no_such, |watch| self.replicas(watch)),
            ("SENTINEL", "MONITOR", [_, _, host, port, quorum]) => {
                let primary = SocketAddr::new(host.parse().ok()?, port.parse().ok()?);
                self.sentinels.get_mut(&ordinal)?.watch = Some(Watch { primary, quorum: quorum.parse().ok()? });
                Reply::Simple("OK")
            }
            ("SENTINEL", "REMOVE", _) => match self.sentinels.get_mut(&ordinal)?.watch.take() {
                Some(_) => Reply::Simple("OK"),
                None => no_such(),
            },
            ("SENTINEL", "SET", [_, _, options @ ..]) => {
                let quorum = options.chunks(2).find(|pair| pair[0] == "quorum").and_then(|pair| pair.get(1)?.parse().ok());
                if let (Some(quorum), Some(watch)) = (quorum, self.sentinels.get_mut(&ordinal)?.watch.as_mut()) {
                    watch.quorum = quorum;
                }
                if watch.is_some() { Reply::Simple("OK") } else { no_such() }
            }
            ("SENTINEL", "CONFIG", [_, "GET", "announce-ip"]) => {
                Reply::strings(["announce-ip", &self.sentinels.get(&ordinal)?.address.to_string()])
            }
            ("SENTINEL", "CKQUORUM", _) if watch.is_some() => Reply::bulk("OK usable Sentinels"),
            ("SENTINEL", "RESET", _) => Reply::Integer(i64::from(watch.is_some())),
            ("SENTINEL", "FAILOVER", [_, _]) => self.fail_over(),
            _ => return None,
        })
    }

    /// To the replica that is preferred, else the first.
    fn fail_over(&mut self) -> Reply {
        let replicas = self.servers.iter().filter(|(_, server)| matches!(server.role, Role::Replica(_)));
        let best = replicas.min_by_key(|(_, server)| server.priority.parse::<u16>().unwrap_or(u16::MAX));
        match best.map(|(ordinal, _)| *ordinal) {
            Some(ordinal) => {
                self.promote(ordinal);
                self.failovers += 1;
                Reply::Simple("OK")
            }
            None => Reply::error("NOGOODSLAVE No suitable replica to promote"),
        }
    }

    fn master(&self, ordinal: u16, Watch { primary, quorum }: Watch) -> Reply {
        let watching = |(other, sentinel): &(&u16, &Sentinel)| **other != ordinal && sentinel.watch.is_some();
        let others = self.sentinels.iter().filter(watching).count();
        let replicas = self.servers.values().filter(|server| server.role == Role::Replica(primary)).count();
        let down = self.at(primary).is_none();
        Reply::strings([
            "ip",
            &primary.ip().to_string(),
            "port",
            &primary.port().to_string(),
            "flags",
            if down { "s_down,master" } else { "master" },
            "num-slaves",
            &replicas.to_string(),
            "num-other-sentinels",
            &others.to_string(),
            "quorum",
            &quorum.to_string(),
        ])
    }

    fn replicas(&self, watch: Watch) -> Reply {
        let replicas = self.servers.values().filter(|server| server.role == Role::Replica(watch.primary));
        let fields = replicas.map(|server| {
            let (ip, port) = (server.address.ip().to_string(), SERVER_PORT.to_string());
            Reply::strings(["ip", &ip, "port", &port, "slave-priority", &server.priority])
        });
        Reply::Array(fields.collect())
    }
}

/// What a server answers to questions and orders about users.
fn users_of(users: &mut BTreeMap<String, Vec<String>>, words: &[&str]) -> Option<Reply> {
    let what = words.get(1)?.to_ascii_uppercase();
    Some(match (what.as_str(), &words[2..]) {
        ("SETUSER", [name, rules @ ..]) => {
            users.insert((*name).to_owned(), rules.iter().map(|rule| (*rule).to_owned()).collect());
            Reply::Simple("OK")
        }
        ("GETUSER", [name]) => match users.get(*name) {
            None => Reply::Nil,
            Some(rules) => {
                let with = |prefix: char| rules.iter().filter(move |rule| rule.starts_with(prefix));
                let flag = if rules.iter().any(|rule| rule == "on") { "on" } else { "off" };
                let keys = with('~').map(String::as_str).collect::<Vec<_>>().join(" ");
                Reply::Array(vec![
                    Reply::bulk("flags"),
                    Reply::strings([flag]),
                    Reply::bulk("passwords"),
                    Reply::Array(with('#').map(|hash| Reply::bulk(&hash[1..])).collect()),
                    Reply::bulk("keys"),
                    Reply::bulk(keys),
                ])
            }
        },
        _ => return None,
    })
}

/// Where a sentinel listens.
pub fn sentinel_address(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, SENTINEL_PORT)
}
