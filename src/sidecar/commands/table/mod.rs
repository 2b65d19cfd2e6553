//! The rows, in groups of at most 256.

mod collections;
mod connection;
mod keyspace;
mod scripts;
mod server;
mod values;

use super::{Access, Begin, Class, CommandSpec, Effect, KeyPart, Ttl};

/// All commands.
pub(super) static GROUPS: [&[CommandSpec]; 6] =
    [values::COMMANDS, keyspace::COMMANDS, collections::COMMANDS, scripts::COMMANDS, connection::COMMANDS, server::COMMANDS];

const NONE: &[KeyPart] = &[];
const R1: &[KeyPart] = &[KeyPart::at(1, Effect::Read)];
const U1: &[KeyPart] = &[KeyPart::at(1, Effect::Update)];
const W1: &[KeyPart] = &[KeyPart::at(1, Effect::Write)];
const D1: &[KeyPart] = &[KeyPart::at(1, Effect::Delete)];
const R2: &[KeyPart] = &[KeyPart::at(2, Effect::Read)];
const R_ALL: &[KeyPart] = &[KeyPart::range(1, -1, 1, Effect::Read)];
const D_ALL: &[KeyPart] = &[KeyPart::range(1, -1, 1, Effect::Delete)];
const W1_R2: &[KeyPart] = &[KeyPart::at(1, Effect::Write), KeyPart::at(2, Effect::Read)];
const W1_R_REST: &[KeyPart] = &[KeyPart::at(1, Effect::Write), KeyPart::range(2, -1, 1, Effect::Read)];
const W1_R_COUNTED: &[KeyPart] = &[KeyPart::at(1, Effect::Write), counted(2, Effect::Read)];
const R1_W2: &[KeyPart] = &[KeyPart::at(1, Effect::Read), KeyPart::at(2, Effect::Write)];
const U1_W2: &[KeyPart] = &[KeyPart::at(1, Effect::Update), KeyPart::at(2, Effect::Write)];
const D1_W2: &[KeyPart] = &[KeyPart::at(1, Effect::Delete), KeyPart::at(2, Effect::Write)];
const R_COUNTED: &[KeyPart] = &[counted(1, Effect::Read)];
const U_COUNTED: &[KeyPart] = &[counted(1, Effect::Update)];
const ROUTE_1: &[KeyPart] = &[KeyPart::at(1, Effect::Route)];
const ROUTE_ALL: &[KeyPart] = &[KeyPart::range(1, -1, 1, Effect::Route)];

/// At least one key, behind their number at `count`.
const fn counted(count: u8, effect: Effect) -> KeyPart {
    KeyPart { begin: Begin::Count { count, step: 1, may_be_none: false }, effect }
}

/// A key behind STORE or STOREDIST.
const fn store(from: u8) -> KeyPart {
    KeyPart { begin: Begin::Store { from }, effect: Effect::Write }
}

const fn row(name: &'static str, arity: i8, class: Class, access: Access, keys: &'static [KeyPart], ttl: Ttl) -> CommandSpec {
    CommandSpec { name, arity, class, access, keys, ttl, subcommands: &[] }
}

/// Reads keys of one slot.
const fn read(name: &'static str, arity: i8, keys: &'static [KeyPart]) -> CommandSpec {
    row(name, arity, Class::Data, Access::Read, keys, Ttl::Keeps)
}

/// Changes or removes keys of one slot; makes none.
const fn update(name: &'static str, arity: i8, keys: &'static [KeyPart]) -> CommandSpec {
    row(name, arity, Class::Data, Access::Write, keys, Ttl::Keeps)
}

/// May make keys of one slot.
const fn create(name: &'static str, arity: i8, keys: &'static [KeyPart]) -> CommandSpec {
    row(name, arity, Class::Data, Access::Write, keys, Ttl::Creates)
}

/// Writes keys of one slot in a way of its own.
const fn write(name: &'static str, arity: i8, keys: &'static [KeyPart], ttl: Ttl) -> CommandSpec {
    row(name, arity, Class::Data, Access::Write, keys, ttl)
}

/// Has no keys, neither reads nor writes.
const fn plain(name: &'static str, arity: i8, class: Class) -> CommandSpec {
    row(name, arity, class, Access::None, NONE, Ttl::Keeps)
}

/// A command of subcommands; `class` is for an invocation without one.
const fn group(name: &'static str, arity: i8, class: Class, subcommands: &'static [CommandSpec]) -> CommandSpec {
    CommandSpec { name, arity, class, access: Access::None, keys: NONE, ttl: Ttl::Keeps, subcommands }
}
