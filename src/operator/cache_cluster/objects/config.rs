//! What servers, agents and sentinels are told: ConfigMaps, and the Secrets with everything that opens a door.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};

use super::{Addresses, Credentials, Kept, metadata};
use crate::operator::admin::Login;
use crate::operator::cache_cluster::build::{add_cluster_lines, add_parameters};
use crate::operator::cache_cluster::handover::PRIORITY;
use crate::operator::cache_cluster::names::{AGENT_PORT, BUS_PORT, Component, SENTINEL_PORT, SERVER_PORT};
use crate::operator::cache_cluster::pki::{Certified, Pki};
use crate::operator::cache_cluster::plan::{Layout, SentinelId, ServerId};
use crate::operator::cache_cluster::validate::Wanted;
use crate::policy::agent::{AgentConfig, Failover, Peer, Recovery, ServedTls, ServerPlace, Users as UsersFile, VERSION};
use crate::policy::config_file::Lines;
use crate::policy::digest::sha256;
use crate::policy::snapshot::{Auth, Tls};
use crate::policy::{ByteSize, Span};

/// Where the ConfigMap is mounted.
pub const CONFIG_DIR: &str = "/etc/larder/config";
/// Where Larder's own login is mounted.
pub const SYSTEM_DIR: &str = "/etc/larder/system";
/// Where the users are mounted.
pub const USERS_DIR: &str = "/etc/larder/users";
/// Where the certificate, its key and the trusted authorities are mounted.
pub const TLS_DIR: &str = "/etc/larder/tls";
/// Where data is, of servers and of sentinels.
pub const DATA_DIR: &str = "/data";
/// The entry with the servers' users.
pub const USERS_FILE: &str = "users.acl";
/// The entry with the sentinels' users.
pub const SENTINEL_USERS_FILE: &str = "sentinel-users.conf";
/// The entry that only the operator reads: [`crate::operator::cache_cluster::users::Users::to_json`].
pub const USERS_STATE: &str = "state.json";
/// The entries of Larder's own login.
pub const USERNAME: &str = "username";
/// Beside [`USERNAME`].
pub const PASSWORD: &str = "password";
/// The entry that only the operator reads: [`Pki::to_json`].
pub const PKI_STATE: &str = "state.json";
/// The entries of a certificate, of its key, and of the authorities that are trusted, as Kubernetes calls them.
const CERTIFICATE: &str = "tls.crt";
/// Beside [`CERTIFICATE`].
const KEY: &str = "tls.key";
/// Beside [`CERTIFICATE`], and in the ConfigMap for clients.
pub const AUTHORITIES: &str = "ca.crt";
/// The lines with which a server follows its primary.
const REPLICATION_FILE: &str = "replication.conf";

/// How long a server may take to end; within the pod's grace, after a handover.
const SHUTDOWN: Span = Span::from_secs(20);

/// Parameters that servers read at their start only. All others are set while they run.
const READ_AT_START: [&str; 9] = [
    "disable-thp",
    "events-per-io-thread",
    "hash-seed",
    "ignore-warnings",
    "io-threads",
    "io-threads-do-reads",
    "locale-collate",
    "socket-mark-id",
    "tcp-backlog",
];

/// Whether a change of this parameter restarts servers.
pub fn is_read_at_start(parameter: &str) -> bool {
    READ_AT_START.contains(&parameter)
}

/// What a server and its agent take of a container's memory before there is any data.
const WITHOUT_DATA: u64 = 24 << 20;

/// How much of a container's memory may hold data: two thirds of what the programs leave. The rest is for buffers, fragmentation, and the
/// pages that a fork copies: a server that is killed while its only replica takes its copy takes the data along.
pub fn max_memory(limit: ByteSize) -> ByteSize {
    ByteSize::from_bytes(limit.as_bytes().saturating_sub(WITHOUT_DATA) / 3 * 2)
}

/// The setting that bounds what a server holds back for clients that read slowly, replicas among them.
const OUTPUT_LIMITS: &str = "client-output-buffer-limit";
/// For how long a replica may be behind by the half of the bound.
const BEHIND_SECS: u32 = 60;

/// How much a server holds back for its replicas until it drops them: half of what its memory leaves beside data, since the pages that a
/// fork copies, which a replica's copy begins with, take theirs at the same time. `None` where the user says it.
fn replicas_limit(wanted: &Wanted, limit: ByteSize) -> Option<String> {
    let said = wanted.parameters.get(OUTPUT_LIMITS);
    let of_replicas =
        |text: &String| text.split_ascii_whitespace().any(|word| ["replica", "slave"].contains(&&*word.to_ascii_lowercase()));
    if said.is_some_and(of_replicas) {
        return None;
    }
    let beside_data = limit.as_bytes().saturating_sub(WITHOUT_DATA).saturating_sub(max_memory(limit).as_bytes());
    let bound = beside_data / 2;
    Some(format!("replica {bound} {} {BEHIND_SECS}", bound / 2))
}

/// The ConfigMap of each shard's servers, with the generation of each agent's configuration.
pub fn of_servers(wanted: &Wanted, addresses: &Addresses, kept: &Kept) -> (Vec<ConfigMap>, BTreeMap<ServerId, u64>) {
    let mut generations = BTreeMap::new();
    let shards: BTreeSet<u16> = (0..wanted.shards()).chain(addresses.servers.keys().map(|id| id.shard)).collect();
    let maps = shards.into_iter().map(|shard| of_shard(shard, wanted, addresses, kept, &mut generations)).collect();
    (maps, generations)
}

fn of_shard(
    shard: u16,
    wanted: &Wanted,
    addresses: &Addresses,
    kept: &Kept,
    generations: &mut BTreeMap<ServerId, u64>,
) -> ConfigMap {
    let mut data = BTreeMap::from([("server.conf".to_owned(), server_conf(wanted))]);
    for (id, address) in addresses.servers.iter().filter(|(id, _)| id.shard == shard) {
        let limit = kept.memory.get(id).copied().unwrap_or(wanted.memory).min(wanted.memory);
        let config = agent_config(wanted, *id, *address, addresses, limit);
        generations.insert(*id, config.generation);
        data.insert(format!("server-{}.conf", id.index), place_conf(wanted, *address, limit));
        data.insert(format!("agent-{}.json", id.index), serde_json::to_string_pretty(&config).unwrap_or_default());
    }
    let labels = wanted.names.component_labels(Component::Server, Some(shard));
    ConfigMap { metadata: metadata(wanted, wanted.names.shard_set(shard), labels), data: Some(data), ..ConfigMap::default() }
}

/// What all servers have in common.
fn server_conf(wanted: &Wanted) -> String {
    let mut lines = Lines::default();
    lines.add("bind", &["*", "-::*"]);
    lines.add("protected-mode", &["no"]);
    add_port(&mut lines, wanted, SERVER_PORT);
    lines.add("dir", &[DATA_DIR]);
    lines.add("daemonize", &["no"]);
    lines.add("save", &[""]);
    lines.add("appendonly", &[if wanted.storage.is_some() { "yes" } else { "no" }]);
    if wanted.storage.is_some() {
        // Each rewrite of the file begins it with a snapshot, from which a server starts sooner than from the commands that led there.
        lines.add("aof-use-rdb-preamble", &["yes"]);
    }
    // A replica that returns is wanted at once, not after waiting for others that might.
    lines.add("repl-diskless-sync-delay", &["0"]);
    if wanted.is_cluster() {
        add_cluster_lines(&mut lines, BUS_PORT);
        if wanted.tls.is_some() {
            lines.add("tls-cluster", &["yes"]);
        }
    }
    for (keyword, value) in live_settings(wanted) {
        lines.add(&keyword, &value.split_ascii_whitespace().collect::<Vec<_>>());
    }
    add_parameters(&mut lines, &wanted.parameters);
    lines.add("include", &[&format!("{USERS_DIR}/{USERS_FILE}")]);
    lines.add("include", &[&format!("{SYSTEM_DIR}/{REPLICATION_FILE}")]);
    lines.into_text()
}

/// Where a server or a sentinel listens: with TLS, or without.
fn add_port(lines: &mut Lines, wanted: &Wanted, port: u16) {
    if wanted.tls.is_none() {
        return lines.add("port", &[&port.to_string()]);
    }
    lines.add("port", &["0"]);
    lines.add("tls-port", &[&port.to_string()]);
    // Of a sentinel it says how it reaches servers and the other sentinels.
    lines.add("tls-replication", &["yes"]);
    // Whoever comes logs in; nobody needs a certificate of the own.
    lines.add("tls-auth-clients", &["no"]);
    for (keyword, file) in [("tls-cert-file", CERTIFICATE), ("tls-key-file", KEY), ("tls-ca-cert-file", AUTHORITIES)] {
        lines.add(keyword, &[&format!("{TLS_DIR}/{file}")]);
    }
}

/// What one server has of its own.
fn place_conf(wanted: &Wanted, address: IpAddr, limit: ByteSize) -> String {
    let mut lines = Lines::default();
    lines.add("include", &[&format!("{CONFIG_DIR}/server.conf")]);
    lines.add("replica-announce-ip", &[&address.to_string()]);
    lines.add("replica-announce-port", &[&SERVER_PORT.to_string()]);
    if wanted.is_cluster() {
        lines.add("cluster-announce-ip", &[&address.to_string()]);
    }
    lines.add("maxmemory", &[&max_memory(limit).as_bytes().to_string()]);
    if let Some(value) = replicas_limit(wanted, limit) {
        lines.add(OUTPUT_LIMITS, &value.split_ascii_whitespace().collect::<Vec<_>>());
    }
    lines.into_text()
}

/// The address that a server's or a sentinel's own file, as it is written here, announces.
pub fn announced_address(text: &str) -> Option<IpAddr> {
    let words = ["replica-announce-ip ", "sentinel announce-ip "];
    text.lines().find_map(|line| words.iter().find_map(|word| line.strip_prefix(word))?.trim().trim_matches('"').parse().ok())
}

/// Larder's own settings that follow the object while servers run. Each is always written, so that one that is taken back is also
/// taken up.
fn live_settings(wanted: &Wanted) -> BTreeMap<String, String> {
    let (min_replicas, max_lag) = wanted.writes.map_or((0, 10), |writes| (u64::from(writes.min_replicas), writes.max_lag_secs()));
    let mut settings = BTreeMap::from([
        ("maxmemory-policy".to_owned(), wanted.eviction.as_str().to_owned()),
        ("min-replicas-to-write".to_owned(), min_replicas.to_string()),
        ("min-replicas-max-lag".to_owned(), max_lag.to_string()),
    ]);
    if let Some(storage) = &wanted.storage {
        settings.insert("appendfsync".to_owned(), storage.fsync.unwrap_or_default().as_str().to_owned());
    }
    settings
}

fn agent_config(wanted: &Wanted, id: ServerId, address: IpAddr, addresses: &Addresses, limit: ByteSize) -> AgentConfig {
    let at = |address: IpAddr, port| SocketAddr::new(address, port).to_string();
    let auth = Auth {
        username_file: Some(PathBuf::from(format!("{SYSTEM_DIR}/{USERNAME}"))),
        password_file: PathBuf::from(format!("{SYSTEM_DIR}/{PASSWORD}")),
    };
    let peers = addresses.servers.iter().filter(|(peer, _)| **peer != id && peer.shard == id.shard);
    let tls_file = |name: &str| PathBuf::from(format!("{TLS_DIR}/{name}"));
    let mut settings = live_settings(wanted);
    settings.insert("maxmemory".to_owned(), max_memory(limit).as_bytes().to_string());
    settings.extend(wanted.parameters.clone().into_iter().filter(|(name, _)| !is_read_at_start(name)));
    if let Some(ours) = replicas_limit(wanted, limit) {
        let said = settings.entry(OUTPUT_LIMITS.to_owned()).or_default();
        *said = format!("{ours} {said}").trim_end().to_owned();
    }
    let mut config = AgentConfig {
        version: VERSION,
        requires: VERSION,
        generation: 0,
        server: ServerPlace {
            ordinal: id.index,
            address: at(address, SERVER_PORT),
            dial: format!("127.0.0.1:{SERVER_PORT}"),
            directory: PathBuf::from(DATA_DIR),
            durable: wanted.storage.is_some(),
            priority: PRIORITY,
            auth: Some(auth.clone()),
            tls: wanted.tls.as_ref().map(|_| Tls {
                ca_file: tls_file(AUTHORITIES),
                cert_file: None,
                key_file: None,
                server_name: None,
            }),
            replication: Some(auth.clone()),
            serves: wanted.tls.as_ref().map(|_| ServedTls {
                cert_file: tls_file(CERTIFICATE),
                key_file: tls_file(KEY),
                ca_file: tls_file(AUTHORITIES),
            }),
            agent_tls: wanted.tls.is_some(),
        },
        peers: peers
            .map(|(peer, address)| Peer {
                ordinal: peer.index,
                address: at(*address, SERVER_PORT),
                agent: at(*address, AGENT_PORT),
            })
            .collect(),
        failover: match wanted.layout {
            Layout::Sentinel { .. } => Failover::Sentinel {
                master: wanted.master_name().to_owned(),
                sentinels: addresses.sentinels.values().map(|address| at(*address, SENTINEL_PORT)).collect(),
                auth: Some(auth),
            },
            Layout::Cluster { .. } => {
                Failover::Cluster { id: node_id(&wanted.uid, id), bus_port: BUS_PORT, shards: other_shards(id.shard, addresses) }
            }
        },
        settings,
        users: Some(UsersFile { file: PathBuf::from(format!("{USERS_DIR}/{USERS_FILE}")) }),
        recovery: Recovery { accept_data_loss: wanted.accept_data_loss },
        shutdown: SHUTDOWN,
    };
    config.generation = fingerprint(&config);
    config
}

/// The servers of every other shard.
fn other_shards(own: u16, addresses: &Addresses) -> Vec<Vec<String>> {
    let mut shards: BTreeMap<u16, Vec<String>> = BTreeMap::new();
    for (id, address) in addresses.servers.iter().filter(|(id, _)| id.shard != own) {
        shards.entry(id.shard).or_default().push(SocketAddr::new(*address, SERVER_PORT).to_string());
    }
    shards.into_values().collect()
}

/// A number that differs with each content, below 2^53 so that every reader of JSON keeps it.
fn fingerprint(config: &AgentConfig) -> u64 {
    let hash = sha256(&serde_json::to_vec(config).unwrap_or_default());
    u64::from_str_radix(hash.get(..13).unwrap_or_default(), 16).unwrap_or_default()
}

/// The ConfigMap of the sentinels. What they remember is in their own files: [`crate::policy::config_file::sentinel`].
pub fn of_sentinels(wanted: &Wanted, addresses: &Addresses) -> ConfigMap {
    let files =
        addresses.sentinels.iter().map(|(id, address)| (format!("sentinel-{}.conf", id.0), sentinel_conf(wanted, *id, *address)));
    ConfigMap {
        metadata: metadata(wanted, wanted.names.sentinel_set(), wanted.names.component_labels(Component::Sentinel, None)),
        data: Some(files.collect()),
        ..ConfigMap::default()
    }
}

fn sentinel_conf(wanted: &Wanted, id: SentinelId, address: IpAddr) -> String {
    let mut lines = Lines::default();
    lines.add("bind", &["*", "-::*"]);
    lines.add("protected-mode", &["no"]);
    add_port(&mut lines, wanted, SENTINEL_PORT);
    lines.add("dir", &[DATA_DIR]);
    lines.add("daemonize", &["no"]);
    lines.add("sentinel", &["myid", &sentinel_id(&wanted.uid, id)]);
    lines.add("sentinel", &["announce-ip", &address.to_string()]);
    lines.add("sentinel", &["announce-port", &SENTINEL_PORT.to_string()]);
    lines.into_text()
}

/// The id of a server's node in a Cluster: 40 hexadecimal digits that are the same after it lost its table of nodes, so that the others know it
/// again.
pub fn node_id(cluster_uid: &str, ServerId { shard, index }: ServerId) -> String {
    let mut hash = sha256(format!("{cluster_uid} server {shard}-{index}").as_bytes());
    hash.truncate(40);
    hash
}

/// A sentinel's identity: 40 hexadecimal digits that are the same after it lost its file, so that the others do not count it twice.
pub fn sentinel_id(cluster_uid: &str, id: SentinelId) -> String {
    let mut hash = sha256(format!("{cluster_uid} sentinel {}", id.0).as_bytes());
    hash.truncate(40);
    hash
}

/// Larder's own login, as servers, agents and sentinels read it; everybody's, as hashes; the one that clients are told; and certificates.
pub fn secrets(wanted: &Wanted, credentials: &Credentials) -> Vec<Secret> {
    let Credentials { system, users, client, pki } = credentials;
    let mut replication = Lines::default();
    replication.add("masteruser", &[&system.user]);
    replication.add("masterauth", &[&system.password]);
    let mut secrets = vec![
        secret(
            wanted,
            wanted.names.system_secret(),
            vec![
                (USERNAME, system.user.clone()),
                (PASSWORD, system.password.clone()),
                (REPLICATION_FILE, replication.into_text()),
            ],
        ),
        secret(
            wanted,
            wanted.names.users_secret(),
            vec![(USERS_FILE, users.server_file()), (SENTINEL_USERS_FILE, users.sentinel_file()), (USERS_STATE, users.to_json())],
        ),
    ];
    secrets.extend(client.iter().map(|login| client_secret(wanted, login, pki.as_ref())));
    secrets.extend(pki.iter().flat_map(|pki| tls_secrets(wanted, pki)));
    secrets
}

/// What a client needs to log in, and whom it trusts.
fn client_secret(wanted: &Wanted, login: &Login, pki: Option<&Pki>) -> Secret {
    let mut entries = vec![(USERNAME, login.user.clone()), (PASSWORD, login.password.clone())];
    entries.extend(pki.map(|pki| (AUTHORITIES, pki.bundle())));
    secret(wanted, wanted.names.client_secret(), entries)
}

fn secret(wanted: &Wanted, name: String, entries: Vec<(&str, String)>) -> Secret {
    Secret {
        metadata: metadata(wanted, name, wanted.names.labels()),
        data: Some(entries.into_iter().map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes()))).collect()),
        type_: Some("Opaque".to_owned()),
        ..Secret::default()
    }
}

/// What is remembered of certificates first: what is not remembered must not be presented.
fn tls_secrets(wanted: &Wanted, pki: &Pki) -> Vec<Secret> {
    let names = &wanted.names;
    let certificate = |name: String, certified: &Certified| {
        let (certificate, key) = (certified.certificate().to_owned(), certified.key().to_owned());
        let entries = vec![(CERTIFICATE, certificate), (KEY, key), (AUTHORITIES, pki.bundle())];
        Secret { type_: Some("kubernetes.io/tls".to_owned()), ..secret(wanted, name, entries) }
    };
    let mut secrets = vec![secret(wanted, names.pki_secret(), vec![(PKI_STATE, pki.to_json())])];
    secrets.extend(pki.servers().map(|certified| certificate(names.server_tls_secret(), certified)));
    secrets.extend(pki.sentinels().map(|certified| certificate(names.sentinel_tls_secret(), certified)));
    secrets
}

/// The authorities that clients trust, where there are any.
pub fn of_clients(wanted: &Wanted, credentials: &Credentials) -> Option<ConfigMap> {
    let data = BTreeMap::from([(AUTHORITIES.to_owned(), credentials.pki.as_ref()?.bundle())]);
    let metadata = metadata(wanted, wanted.names.authority_map(), wanted.names.labels());
    Some(ConfigMap { metadata, data: Some(data), ..ConfigMap::default() })
}
