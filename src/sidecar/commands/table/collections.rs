//! Lists, sets, sorted sets, places, hashes, streams.

use super::super::{Access, Begin, Class, CommandSpec, Effect, KeyPart, Ttl};
use super::{R_ALL, R_COUNTED, R1, R2, U_COUNTED, U1, U1_W2, W1, W1_R_COUNTED, W1_R_REST, W1_R2};
use super::{counted, create, group, plain, read, row, store, update};

const U_BUT_LAST: &[KeyPart] = &[KeyPart::range(1, -2, 1, Effect::Update)];
const U_COUNTED_2: &[KeyPart] = &[counted(2, Effect::Update)];
const U2: &[KeyPart] = &[KeyPart::at(2, Effect::Update)];
const W2: &[KeyPart] = &[KeyPart::at(2, Effect::Write)];
const GEORADIUS: &[KeyPart] = &[KeyPart::at(1, Effect::Read), store(6)];
const GEORADIUSBYMEMBER: &[KeyPart] = &[KeyPart::at(1, Effect::Read), store(5)];
const XREAD: &[KeyPart] = &[KeyPart { begin: Begin::Streams, effect: Effect::Read }];
const XREADGROUP: &[KeyPart] = &[KeyPart { begin: Begin::Streams, effect: Effect::Update }];

/// May hold its connection, and takes from keys.
const fn blocking_take(name: &'static str, arity: i8, keys: &'static [KeyPart]) -> CommandSpec {
    row(name, arity, Class::Blocking, Access::Write, keys, Ttl::Keeps)
}

/// May hold its connection, takes from one key and puts into another.
const fn blocking_move(name: &'static str, arity: i8) -> CommandSpec {
    row(name, arity, Class::Blocking, Access::Write, U1_W2, Ttl::Creates)
}

const XGROUP: &[CommandSpec] = &[
    create("xgroup|create", -5, W2),
    update("xgroup|createconsumer", 5, U2),
    update("xgroup|delconsumer", 5, U2),
    update("xgroup|destroy", 4, U2),
    plain("xgroup|help", 2, Class::AnyNode),
    update("xgroup|setid", -5, U2),
];

const XINFO: &[CommandSpec] = &[
    read("xinfo|consumers", 4, R2),
    read("xinfo|groups", 3, R2),
    plain("xinfo|help", 2, Class::AnyNode),
    read("xinfo|stream", -3, R2),
];

pub(super) const COMMANDS: &[CommandSpec] = &[
    // Lists.
    blocking_move("blmove", 6),
    blocking_take("blmpop", -5, U_COUNTED_2),
    blocking_take("blpop", -3, U_BUT_LAST),
    blocking_take("brpop", -3, U_BUT_LAST),
    blocking_move("brpoplpush", 4),
    read("lindex", 3, R1),
    update("linsert", 5, U1),
    read("llen", 2, R1),
    create("lmove", 5, U1_W2),
    update("lmpop", -4, U_COUNTED),
    update("lpop", -2, U1),
    read("lpos", -3, R1),
    create("lpush", -3, W1),
    update("lpushx", -3, U1),
    read("lrange", 4, R1),
    update("lrem", 4, U1),
    update("lset", 4, U1),
    update("ltrim", 4, U1),
    update("rpop", -2, U1),
    create("rpoplpush", 3, U1_W2),
    create("rpush", -3, W1),
    update("rpushx", -3, U1),
    // Sets.
    create("sadd", -3, W1),
    read("scard", 2, R1),
    read("sdiff", -2, R_ALL),
    create("sdiffstore", -3, W1_R_REST),
    read("sinter", -2, R_ALL),
    read("sintercard", -3, R_COUNTED),
    create("sinterstore", -3, W1_R_REST),
    read("sismember", 3, R1),
    read("smembers", 2, R1),
    read("smismember", -3, R1),
    create("smove", 4, U1_W2),
    update("spop", -2, U1),
    read("srandmember", -2, R1),
    update("srem", -3, U1),
    read("sscan", -3, R1),
    read("sunion", -2, R_ALL),
    create("sunionstore", -3, W1_R_REST),
    // Sorted sets.
    blocking_take("bzmpop", -5, U_COUNTED_2),
    blocking_take("bzpopmax", -3, U_BUT_LAST),
    blocking_take("bzpopmin", -3, U_BUT_LAST),
    create("zadd", -4, W1),
    read("zcard", 2, R1),
    read("zcount", 4, R1),
    read("zdiff", -3, R_COUNTED),
    create("zdiffstore", -4, W1_R_COUNTED),
    create("zincrby", 4, W1),
    read("zinter", -3, R_COUNTED),
    read("zintercard", -3, R_COUNTED),
    create("zinterstore", -4, W1_R_COUNTED),
    read("zlexcount", 4, R1),
    update("zmpop", -4, U_COUNTED),
    read("zmscore", -3, R1),
    update("zpopmax", -2, U1),
    update("zpopmin", -2, U1),
    read("zrandmember", -2, R1),
    read("zrange", -4, R1),
    read("zrangebylex", -4, R1),
    read("zrangebyscore", -4, R1),
    create("zrangestore", -5, W1_R2),
    read("zrank", -3, R1),
    update("zrem", -3, U1),
    update("zremrangebylex", 4, U1),
    update("zremrangebyrank", 4, U1),
    update("zremrangebyscore", 4, U1),
    read("zrevrange", -4, R1),
    read("zrevrangebylex", -4, R1),
    read("zrevrangebyscore", -4, R1),
    read("zrevrank", -3, R1),
    read("zscan", -3, R1),
    read("zscore", 3, R1),
    read("zunion", -3, R_COUNTED),
    create("zunionstore", -4, W1_R_COUNTED),
    // Places.
    create("geoadd", -5, W1),
    read("geodist", -4, R1),
    read("geohash", -2, R1),
    read("geopos", -2, R1),
    create("georadius", -6, GEORADIUS),
    read("georadius_ro", -6, R1),
    create("georadiusbymember", -5, GEORADIUSBYMEMBER),
    read("georadiusbymember_ro", -5, R1),
    read("geosearch", -7, R1),
    create("geosearchstore", -8, W1_R2),
    // Hashes. The TTLs of fields are not the key's.
    update("hdel", -3, U1),
    read("hexists", 3, R1),
    update("hexpire", -6, U1),
    update("hexpireat", -6, U1),
    read("hexpiretime", -5, R1),
    read("hget", 3, R1),
    read("hgetall", 2, R1),
    update("hgetdel", -5, U1),
    update("hgetex", -5, U1),
    create("hincrby", 4, W1),
    create("hincrbyfloat", 4, W1),
    read("hkeys", 2, R1),
    read("hlen", 2, R1),
    read("hmget", -3, R1),
    create("hmset", -4, W1),
    update("hpersist", -5, U1),
    update("hpexpire", -6, U1),
    update("hpexpireat", -6, U1),
    read("hpexpiretime", -5, R1),
    read("hpttl", -5, R1),
    read("hrandfield", -2, R1),
    read("hscan", -3, R1),
    create("hset", -4, W1),
    create("hsetex", -6, W1),
    create("hsetnx", 4, W1),
    read("hstrlen", 3, R1),
    read("httl", -5, R1),
    read("hvals", 2, R1),
    // Streams.
    update("xack", -4, U1),
    update("xackdel", -6, U1),
    create("xadd", -5, W1),
    update("xautoclaim", -6, U1),
    update("xcfgset", -3, U1),
    update("xclaim", -6, U1),
    update("xdel", -3, U1),
    update("xdelex", -5, U1),
    group("xgroup", -2, Class::AnyNode, XGROUP),
    group("xinfo", -2, Class::AnyNode, XINFO),
    read("xlen", 2, R1),
    read("xpending", -3, R1),
    read("xrange", -4, R1),
    row("xread", -4, Class::Blocking, Access::Read, XREAD, Ttl::Keeps),
    row("xreadgroup", -7, Class::Blocking, Access::Write, XREADGROUP, Ttl::Keeps),
    read("xrevrange", -4, R1),
    update("xsetid", -3, U1),
    update("xtrim", -4, U1),
];
