//! Strings, bitmaps, counters of distinct things.

use super::super::{Access, Begin, Class, CommandSpec, Effect, Join, KeyPart, Ttl};
use super::{D1, R_ALL, R1, U1, W1, W1_R_REST, create, read, row, update, write};

const MSET: &[KeyPart] = &[KeyPart::range(1, -1, 2, Effect::Write)];
const MSETEX: &[KeyPart] = &[KeyPart { begin: Begin::Count { count: 1, step: 2, may_be_none: false }, effect: Effect::Write }];
const BITOP: &[KeyPart] = &[KeyPart::at(2, Effect::Write), KeyPart::range(3, -1, 1, Effect::Read)];
const LCS: &[KeyPart] = &[KeyPart::range(1, 2, 1, Effect::Read)];

pub(super) const COMMANDS: &[CommandSpec] = &[
    create("append", 3, W1),
    create("decr", 2, W1),
    create("decrby", 3, W1),
    update("delex", -2, D1),
    update("delifeq", 3, D1),
    read("digest", 2, R1),
    read("get", 2, R1),
    update("getdel", 2, D1),
    write("getex", -2, W1, Ttl::GetEx),
    read("getrange", 4, R1),
    create("getset", 3, W1),
    create("incr", 2, W1),
    create("incrby", 3, W1),
    create("incrbyfloat", 3, W1),
    read("lcs", -3, LCS),
    row("mget", -2, Class::Split(Join::Elements), Access::Read, R_ALL, Ttl::Keeps),
    row("mset", -3, Class::Split(Join::AllOk), Access::Write, MSET, Ttl::Creates),
    write("msetex", -4, MSETEX, Ttl::Carries),
    create("msetnx", -3, MSET),
    write("psetex", 4, W1, Ttl::SetEx(1)),
    write("set", -3, W1, Ttl::Set),
    write("setex", 4, W1, Ttl::SetEx(1000)),
    create("setnx", 3, W1),
    create("setrange", 4, W1),
    read("strlen", 2, R1),
    read("substr", 4, R1),
    // Bitmaps.
    read("bitcount", -2, R1),
    create("bitfield", -2, W1),
    read("bitfield_ro", -2, R1),
    create("bitop", -4, BITOP),
    read("bitpos", -3, R1),
    read("getbit", 3, R1),
    create("setbit", 4, W1),
    // HyperLogLogs. PFCOUNT may refresh the cached count inside the value, which no reader can tell.
    create("pfadd", -2, W1),
    read("pfcount", -2, R_ALL),
    create("pfmerge", -2, W1_R_REST),
    // Vector sets.
    create("vadd", -5, W1),
    read("vcard", 2, R1),
    read("vdim", 2, R1),
    read("vemb", -3, R1),
    read("vgetattr", 3, R1),
    read("vinfo", 2, R1),
    read("vismember", 3, R1),
    read("vlinks", -3, R1),
    read("vrandmember", -2, R1),
    read("vrange", -4, R1),
    update("vrem", 3, U1),
    update("vsetattr", 4, U1),
    read("vsim", -4, R1),
];
