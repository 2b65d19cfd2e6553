//! Servers: their state, their topology, their administration.

use super::super::{Class, CommandSpec, Gather, Refusal};
use super::{R2, group, plain, read};

/// Changes the topology.
const fn refused(name: &'static str, arity: i8, why: Refusal) -> CommandSpec {
    plain(name, arity, Class::Refused(why))
}

/// Asks for the topology.
const fn topology(name: &'static str, arity: i8) -> CommandSpec {
    plain(name, arity, Class::Topology)
}

const CLUSTER: &[CommandSpec] = &[
    refused("cluster|addslots", -3, Refusal::Slots),
    refused("cluster|addslotsrange", -4, Refusal::Slots),
    refused("cluster|bumpepoch", 2, Refusal::Slots),
    refused("cluster|cancelslotmigrations", 2, Refusal::Slots),
    topology("cluster|count-failure-reports", 3),
    topology("cluster|countkeysinslot", 3),
    refused("cluster|delslots", -3, Refusal::Slots),
    refused("cluster|delslotsrange", -4, Refusal::Slots),
    refused("cluster|failover", -2, Refusal::Replication),
    refused("cluster|flushslot", -3, Refusal::Slots),
    refused("cluster|flushslots", 2, Refusal::Slots),
    refused("cluster|forget", 3, Refusal::Slots),
    topology("cluster|getkeysinslot", 4),
    topology("cluster|getslotmigrations", 2),
    topology("cluster|help", 2),
    topology("cluster|info", 2),
    topology("cluster|keyslot", 3),
    topology("cluster|links", 2),
    refused("cluster|meet", -4, Refusal::Slots),
    refused("cluster|migrateslots", -4, Refusal::Slots),
    refused("cluster|migration", -3, Refusal::Slots),
    topology("cluster|myid", 2),
    topology("cluster|myshardid", 2),
    topology("cluster|nodes", 2),
    topology("cluster|replicas", 3),
    refused("cluster|replicate", -3, Refusal::Replication),
    refused("cluster|reset", -2, Refusal::Slots),
    refused("cluster|saveconfig", 2, Refusal::Lifecycle),
    refused("cluster|set-config-epoch", 3, Refusal::Slots),
    refused("cluster|setslot", -4, Refusal::Slots),
    topology("cluster|shards", 2),
    topology("cluster|slaves", 3),
    topology("cluster|slot-stats", -4),
    topology("cluster|slots", 2),
    refused("cluster|syncslots", -3, Refusal::Slots),
];

/// What a sentinel answers. Its arities are the sentinels' own.
const SENTINEL: &[CommandSpec] = &[
    topology("sentinel|ckquorum", 3),
    refused("sentinel|config", -4, Refusal::Configuration),
    refused("sentinel|debug", -2, Refusal::Debugging),
    refused("sentinel|failover", -3, Refusal::Replication),
    refused("sentinel|flushconfig", 2, Refusal::Configuration),
    topology("sentinel|get-master-addr-by-name", 3),
    topology("sentinel|get-primary-addr-by-name", 3),
    topology("sentinel|help", 2),
    topology("sentinel|info-cache", -3),
    refused("sentinel|is-master-down-by-addr", 6, Refusal::Replication),
    refused("sentinel|is-primary-down-by-addr", 6, Refusal::Replication),
    topology("sentinel|master", 3),
    topology("sentinel|masters", 2),
    refused("sentinel|monitor", 6, Refusal::Configuration),
    topology("sentinel|myid", 2),
    topology("sentinel|pending-scripts", 2),
    topology("sentinel|primaries", 2),
    topology("sentinel|primary", 3),
    refused("sentinel|remove", 3, Refusal::Configuration),
    topology("sentinel|replicas", 3),
    refused("sentinel|reset", 3, Refusal::Configuration),
    topology("sentinel|sentinels", 3),
    refused("sentinel|set", -5, Refusal::Configuration),
    refused("sentinel|simulate-failure", -3, Refusal::Debugging),
    topology("sentinel|slaves", 3),
];

const COMMAND: &[CommandSpec] = &[
    plain("command|count", 2, Class::AnyNode),
    plain("command|docs", -2, Class::AnyNode),
    plain("command|getkeys", -3, Class::AnyNode),
    plain("command|getkeysandflags", -3, Class::AnyNode),
    plain("command|help", 2, Class::AnyNode),
    plain("command|info", -2, Class::AnyNode),
    plain("command|list", -2, Class::AnyNode),
];

const CONFIG: &[CommandSpec] = &[
    plain("config|get", -3, Class::AnyNode),
    plain("config|help", 2, Class::AnyNode),
    refused("config|resetstat", 2, Refusal::Configuration),
    refused("config|rewrite", 2, Refusal::Configuration),
    refused("config|set", -4, Refusal::Configuration),
];

const COMMANDLOG: &[CommandSpec] = &[
    refused("commandlog|get", 4, Refusal::SlowLog),
    plain("commandlog|help", 2, Class::AnyNode),
    plain("commandlog|len", 3, Class::AnyNode),
    plain("commandlog|reset", 3, Class::AllShards(Gather::First)),
];

const LATENCY: &[CommandSpec] = &[
    plain("latency|doctor", 2, Class::AnyNode),
    plain("latency|graph", 3, Class::AnyNode),
    plain("latency|help", 2, Class::AnyNode),
    plain("latency|histogram", -2, Class::AnyNode),
    plain("latency|history", 3, Class::AnyNode),
    plain("latency|latest", 2, Class::AnyNode),
    plain("latency|reset", -2, Class::AllShards(Gather::Sum)),
];

const MEMORY: &[CommandSpec] = &[
    plain("memory|doctor", 2, Class::AnyNode),
    plain("memory|help", 2, Class::AnyNode),
    plain("memory|malloc-stats", 2, Class::AnyNode),
    plain("memory|purge", 2, Class::AllShards(Gather::First)),
    plain("memory|stats", 2, Class::AnyNode),
    read("memory|usage", -3, R2),
];

const MODULE: &[CommandSpec] = &[
    plain("module|help", 2, Class::AnyNode),
    plain("module|list", 2, Class::AnyNode),
    refused("module|load", -3, Refusal::Modules),
    refused("module|loadex", -3, Refusal::Modules),
    refused("module|unload", 3, Refusal::Modules),
];

const SLOWLOG: &[CommandSpec] = &[
    refused("slowlog|get", -2, Refusal::SlowLog),
    plain("slowlog|help", 2, Class::AnyNode),
    plain("slowlog|len", 2, Class::AnyNode),
    plain("slowlog|reset", 2, Class::AllShards(Gather::First)),
];

pub(super) const COMMANDS: &[CommandSpec] = &[
    group("command", -1, Class::AnyNode, COMMAND),
    group("commandlog", -2, Class::AnyNode, COMMANDLOG),
    group("config", -2, Class::AnyNode, CONFIG),
    plain("info", -1, Class::AnyNode),
    plain("lastsave", 1, Class::AnyNode),
    group("latency", -2, Class::AnyNode, LATENCY),
    plain("lolwut", -1, Class::AnyNode),
    group("memory", -2, Class::AnyNode, MEMORY),
    group("module", -2, Class::AnyNode, MODULE),
    group("slowlog", -2, Class::AnyNode, SLOWLOG),
    plain("time", 1, Class::AnyNode),
    plain("wait", 3, Class::Wait(Gather::Least)),
    plain("waitaof", 4, Class::Wait(Gather::Least)),
    // The topology.
    group("cluster", -2, Class::Topology, CLUSTER),
    plain("role", 1, Class::Topology),
    group("sentinel", -2, Class::Topology, SENTINEL),
    // Administration.
    refused("acl", -2, Refusal::Users),
    refused("bgrewriteaof", 1, Refusal::Lifecycle),
    refused("bgsave", -1, Refusal::Lifecycle),
    refused("debug", -2, Refusal::Debugging),
    refused("failover", -1, Refusal::Replication),
    refused("monitor", 1, Refusal::Debugging),
    refused("pfdebug", 3, Refusal::Debugging),
    refused("pfselftest", 1, Refusal::Debugging),
    refused("psync", -3, Refusal::Replication),
    refused("replconf", -1, Refusal::Replication),
    refused("replicaof", 3, Refusal::Replication),
    refused("save", 1, Refusal::Lifecycle),
    refused("shutdown", -1, Refusal::Lifecycle),
    refused("slaveof", 3, Refusal::Replication),
    refused("sync", 1, Refusal::Replication),
];
