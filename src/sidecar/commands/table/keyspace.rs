//! Commands on keys of any type, and on the whole key space.

use super::super::{Access, Begin, Class, CommandSpec, Effect, Gather, Join, KeyPart, Refusal, Ttl};
use super::{D_ALL, D1, D1_W2, NONE, R_ALL, R1, R1_W2, R2, ROUTE_1, W1, group, plain, read, row, update, write};

const SORT: &[KeyPart] = &[KeyPart::at(1, Effect::Read), KeyPart { begin: Begin::SortStore, effect: Effect::Write }];

const OBJECT: &[CommandSpec] = &[
    read("object|encoding", 3, R2),
    read("object|freq", 3, R2),
    plain("object|help", 2, Class::AnyNode),
    read("object|idletime", 3, R2),
    read("object|refcount", 3, R2),
];

pub(super) const COMMANDS: &[CommandSpec] = &[
    write("copy", -3, R1_W2, Ttl::Copy),
    row("del", -2, Class::Split(Join::Sum), Access::Write, D_ALL, Ttl::Keeps),
    read("dump", 2, R1),
    row("exists", -2, Class::Split(Join::Sum), Access::Read, R_ALL, Ttl::Keeps),
    write("expire", -3, W1, Ttl::Expire(1000)),
    write("expireat", -3, W1, Ttl::ExpireAt),
    read("expiretime", 2, R1),
    // The copy in the other database keeps the TTL.
    update("move", 3, D1),
    group("object", -2, Class::AnyNode, OBJECT),
    write("persist", 2, W1, Ttl::Persist),
    write("pexpire", -3, W1, Ttl::Expire(1)),
    write("pexpireat", -3, W1, Ttl::ExpireAt),
    read("pexpiretime", 2, R1),
    read("pttl", 2, R1),
    write("rename", 3, D1_W2, Ttl::Carries),
    write("renamenx", 3, D1_W2, Ttl::Carries),
    write("restore", -4, W1, Ttl::Restore),
    write("sort", -2, SORT, Ttl::Creates),
    read("sort_ro", -2, R1),
    row("touch", -2, Class::Split(Join::Sum), Access::Read, R_ALL, Ttl::Keeps),
    read("ttl", 2, R1),
    read("type", 2, R1),
    row("unlink", -2, Class::Split(Join::Sum), Access::Write, D_ALL, Ttl::Keeps),
    // The whole key space.
    row("clusterscan", -2, Class::Scan, Access::Read, ROUTE_1, Ttl::Keeps),
    row("dbsize", 1, Class::AllShards(Gather::Sum), Access::Read, NONE, Ttl::Keeps),
    row("flushall", -1, Class::Gated(Gather::First), Access::Write, NONE, Ttl::Keeps),
    row("flushdb", -1, Class::Gated(Gather::First), Access::Write, NONE, Ttl::Keeps),
    row("keys", 2, Class::Gated(Gather::Concat), Access::Read, NONE, Ttl::Keeps),
    row("randomkey", 1, Class::Scan, Access::Read, NONE, Ttl::Keeps),
    row("scan", -2, Class::Scan, Access::Read, NONE, Ttl::Keeps),
    // Cluster refuses it; under Sentinel the primary does it.
    row("swapdb", 3, Class::AnyNode, Access::Write, NONE, Ttl::Keeps),
    // Parts of moving slots.
    plain("migrate", -6, Class::Refused(Refusal::Slots)),
    plain("restore-asking", -4, Class::Refused(Refusal::Slots)),
];
