//! Transactions, scripts, functions.

use super::super::{Access, Begin, Class, CommandSpec, Effect, Gather, KeyPart, Refusal, Ttl};
use super::{NONE, R_ALL, group, plain, row};

const W_COUNTED_2: &[KeyPart] = &[script_keys(Effect::Write)];
const R_COUNTED_2: &[KeyPart] = &[script_keys(Effect::Read)];

const fn script_keys(effect: Effect) -> KeyPart {
    KeyPart { begin: Begin::Count { count: 2, step: 1, may_be_none: true }, effect }
}

const fn script(name: &'static str) -> CommandSpec {
    row(name, -3, Class::Script, Access::Write, W_COUNTED_2, Ttl::Carries)
}

const fn script_ro(name: &'static str) -> CommandSpec {
    row(name, -3, Class::Script, Access::Read, R_COUNTED_2, Ttl::Keeps)
}

/// Changes the functions, which are part of the data set.
const fn function_write(name: &'static str, arity: i8) -> CommandSpec {
    row(name, arity, Class::ScriptAdmin(Gather::First), Access::Write, NONE, Ttl::Keeps)
}

const SCRIPT: &[CommandSpec] = &[
    plain("script|debug", -3, Class::Refused(Refusal::Debugging)),
    plain("script|exists", -3, Class::ScriptAdmin(Gather::Least)),
    plain("script|flush", -2, Class::ScriptAdmin(Gather::First)),
    plain("script|help", 2, Class::AnyNode),
    plain("script|kill", 2, Class::ScriptAdmin(Gather::AnySuccess)),
    plain("script|load", 3, Class::ScriptAdmin(Gather::First)),
    plain("script|show", 3, Class::AnyNode),
];

const FUNCTION: &[CommandSpec] = &[
    function_write("function|delete", 3),
    plain("function|dump", 2, Class::AnyNode),
    function_write("function|flush", -2),
    plain("function|help", 2, Class::AnyNode),
    plain("function|kill", 2, Class::ScriptAdmin(Gather::AnySuccess)),
    plain("function|list", -2, Class::AnyNode),
    function_write("function|load", -3),
    function_write("function|restore", -3),
    plain("function|stats", 2, Class::AnyNode),
];

pub(super) const COMMANDS: &[CommandSpec] = &[
    plain("discard", 1, Class::Transaction),
    plain("exec", 1, Class::Transaction),
    plain("multi", 1, Class::Transaction),
    plain("unwatch", 1, Class::Transaction),
    row("watch", -2, Class::Transaction, Access::None, R_ALL, Ttl::Keeps),
    script("eval"),
    script_ro("eval_ro"),
    script("evalsha"),
    script_ro("evalsha_ro"),
    script("fcall"),
    script_ro("fcall_ro"),
    group("function", -2, Class::AnyNode, FUNCTION),
    group("script", -2, Class::AnyNode, SCRIPT),
];
