//! The command table: arity, keys, and what each command means for the proxy.
//!
//! It covers Redis 7.0 to 8.4 and Valkey up to 9.1, without modules. Where versions differ in arity the table holds the looser
//! one: a server that is stricter refuses by itself. A test compares the table with what real servers say of themselves.
//!
//! A command that the table does not hold (a module's, or a newer server's) resolves to [`UNKNOWN`]: its first argument counts
//! as the one key it may write, which gives Cluster a slot to send it to and a covered key its TTL. The server's own error
//! answers what is no command at all.

mod keys;
mod lookup;
mod number;
mod table;

pub use keys::{Begin, Effect, KeyAt, KeyError, KeyPart, KeySpan, Keys};
pub use lookup::lookup;
pub use number::parse_i64;

use super::resp::CommandArgs;

/// What the proxy knows of one command, or of one subcommand.
#[derive(Debug, PartialEq, Eq)]
pub struct CommandSpec {
    /// In lower case; a subcommand as `xgroup|create`.
    pub name: &'static str,
    /// The number of arguments, the name (and the subcommand's) included; `-n` stands for `n` or more.
    pub arity: i8,
    /// How a session routes it.
    pub class: Class,
    /// Whether it reads or writes the data set.
    pub access: Access,
    /// Where its keys are.
    pub keys: &'static [KeyPart],
    /// What it does to the TTLs of the keys it writes.
    pub ttl: Ttl,
    /// The subcommands, where the second argument names one.
    pub subcommands: &'static [CommandSpec],
}

/// How a session routes a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Keys of one slot, or none: forwarded on the shared connection.
    Data,
    /// Keys that may be split by slot into several commands of the same name, whose replies are joined so.
    Split(Join),
    /// May hold its connection; see [`CommandSpec::blocks`].
    Blocking,
    /// WAIT and WAITAOF: they hold their connection, and wait for the last write made on it. After a write of its own (a key of
    /// Larder's that lives a millisecond will do), a pinned connection waits for all that the server executed until then, whoever
    /// made it. Measured: without one, Valkey 9.1 answers at once, and Redis 7.0 does where the connection sent nothing before.
    Wait(Gather),
    /// MULTI, EXEC, DISCARD, WATCH, UNWATCH.
    Transaction,
    /// SUBSCRIBE and its kin.
    PubSub,
    /// PUBLISH (any node) and SPUBLISH (the node of the channel's slot).
    Publish,
    /// EVAL, EVALSHA, FCALL and their read-only forms: keys of one slot.
    Script,
    /// Loads, removes or stops scripts: goes to every shard.
    ScriptAdmin(Gather),
    /// SCAN (every shard in turn), CLUSTERSCAN (the node of its cursor's slot) and RANDOMKEY (any shard).
    Scan,
    /// Goes to every shard.
    AllShards(Gather),
    /// [`Class::AllShards`], refused unless the policy allows it: FLUSHALL, FLUSHDB, KEYS.
    Gated(Gather),
    /// Any one primary answers it.
    AnyNode,
    /// About the client's own connection: the session answers, nothing is forwarded.
    Connection,
    /// About the topology: answered from the sidecar's view of it.
    Topology,
    /// Never passed on.
    Refused(Refusal),
    /// LARDER.*
    Larder,
    /// Not in the table; see the module's text.
    Unknown,
}

/// How the replies to the parts of a split command become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Join {
    /// An array with one element for each key, in the order of the keys.
    Elements,
    /// The sum of integers.
    Sum,
    /// OK where all are OK.
    AllOk,
}

/// How the replies of all shards become one. An error of any shard is the reply, except where said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gather {
    /// All say the same: the first.
    First,
    /// The sum of integers.
    Sum,
    /// Arrays of keys, one after the other, without those of Larder's own.
    Concat,
    /// One array after the other, each element once.
    Union,
    /// Arrays of name and number in turn: numbers of equal names are added.
    SumPairs,
    /// Arrays of numbers: the smallest at each place. An integer counts as an array of one.
    Least,
    /// The first that is no error; an error where all are.
    AnySuccess,
}

/// Why a command is never passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Changes the servers' configuration or counters.
    Configuration,
    /// Stops, saves or pauses a server.
    Lifecycle,
    /// Changes who replicates whom, or speaks the replication protocol.
    Replication,
    /// Moves slots or nodes, or is part of moving them.
    Slots,
    /// Changes or shows the servers' users.
    Users,
    /// Loads code into the servers.
    Modules,
    /// Looks into, or interferes with, a server's inside.
    Debugging,
    /// Shows commands of every workload, with their keys and values.
    SlowLog,
}

impl Refusal {
    /// What to do instead.
    pub const fn remedy(self) -> &'static str {
        match self {
            Refusal::Configuration => "set `parameters` of the CacheCluster instead",
            Refusal::Lifecycle => "the operator saves, stops and starts servers: change the CacheCluster instead",
            Refusal::Replication => "the operator and its failover decide who is primary",
            Refusal::Slots => "the operator places nodes and slots: set `shards` of the CacheCluster instead",
            Refusal::Users => "the operator gives each workload its user",
            Refusal::Modules => "modules belong in the server's image",
            Refusal::Debugging => "connect to the server itself for debugging",
            Refusal::SlowLog => "it shows every workload's keys and values: read it at the server, or the sidecar's own slow log",
        }
    }
}

/// Whether a command reads or writes the data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Neither.
    None,
    /// It may be repeated.
    Read,
    /// It may change data. Scripts count as this.
    Write,
}

/// What a command does to the TTL of a key that it writes ([`Effect::Write`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ttl {
    /// No key appears, and no TTL is removed or lengthened.
    Keeps,
    /// The key may appear, or lose its TTL.
    Creates,
    /// The key may get any TTL, or none, from elsewhere: another key, a script, a dump, options not known here.
    Carries,
    /// SET: options decide.
    Set,
    /// A TTL in the second argument, in units of so many milliseconds.
    SetEx(u16),
    /// GETEX: options decide.
    GetEx,
    /// COPY: to another database, perhaps.
    Copy,
    /// RESTORE: a TTL in the second argument.
    Restore,
    /// A TTL in the second argument, in units of so many milliseconds, and conditions.
    Expire(u16),
    /// A moment in the second argument, and conditions.
    ExpireAt,
    /// PERSIST.
    Persist,
}

/// What stands for every command that the table does not hold.
pub static UNKNOWN: CommandSpec = CommandSpec {
    name: "",
    arity: -1,
    class: Class::Unknown,
    access: Access::Write,
    keys: &[KeyPart::at(1, Effect::Write)],
    ttl: Ttl::Carries,
    subcommands: &[],
};

/// Why a command is answered with an error before it goes anywhere. [`CommandError::write`] gives the server's own words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandError {
    /// Too few or too many arguments.
    Arity(&'static CommandSpec),
    /// The second argument names none of the subcommands.
    Subcommand(&'static CommandSpec),
}

/// The longest piece of a client's text that an error repeats, as in Redis.
const MAX_QUOTED: usize = 128;

impl CommandError {
    /// Appends the error as a RESP reply.
    pub fn write(self, args: &CommandArgs<'_>, out: &mut Vec<u8>) {
        match self {
            CommandError::Arity(spec) => {
                out.extend_from_slice(b"-ERR wrong number of arguments for '");
                out.extend_from_slice(spec.name.as_bytes());
                out.extend_from_slice(b"' command\r\n");
            }
            CommandError::Subcommand(spec) => {
                out.extend_from_slice(b"-ERR unknown subcommand '");
                let given = args.get(1).unwrap_or_default();
                let quoted = &given[..given.len().min(MAX_QUOTED)];
                out.extend(quoted.iter().map(|byte| if matches!(byte, b'\r' | b'\n') { b' ' } else { *byte }));
                out.extend_from_slice(b"'. Try ");
                out.extend_from_slice(spec.name.to_ascii_uppercase().as_bytes());
                out.extend_from_slice(b" HELP.\r\n");
            }
        }
    }
}

/// Finds the command or subcommand that `args` name, and checks the number of arguments. Never fails for a name that the table
/// does not hold: that is [`UNKNOWN`].
pub fn resolve(args: &CommandArgs<'_>) -> Result<&'static CommandSpec, CommandError> {
    let Some(spec) = lookup(args.name()) else {
        return Ok(&UNKNOWN);
    };
    let spec = if spec.subcommands.is_empty() || args.len() < 2 { spec } else { spec.subcommand(args)? };
    if spec.arity_ok(args.len()) { Ok(spec) } else { Err(CommandError::Arity(spec)) }
}

impl CommandSpec {
    /// Whether a command of `args_len` arguments, the name included, has as many as it needs.
    pub const fn arity_ok(&self, args_len: usize) -> bool {
        let needed = self.arity.unsigned_abs() as usize;
        if self.arity < 0 { args_len >= needed } else { args_len == needed }
    }

    /// The subcommand that the second argument names, in any case of letters.
    pub fn subcommand(&self, args: &CommandArgs<'_>) -> Result<&'static CommandSpec, CommandError> {
        let given = args.get(1).unwrap_or_default();
        let own = self.subcommands.iter().find(|sub| sub.last_name().as_bytes().eq_ignore_ascii_case(given));
        own.ok_or_else(|| CommandError::Subcommand(lookup(self.name.as_bytes()).unwrap_or(&UNKNOWN)))
    }

    /// `create` of `xgroup|create`; the whole name of a command that is no subcommand.
    pub fn last_name(&self) -> &'static str {
        self.name.split_once('|').map_or(self.name, |(_, last)| last)
    }

    /// Each key of the command: where it is, and what happens to it. In the order in which COMMAND GETKEYS gives them.
    ///
    /// # Errors
    /// Where the arguments contradict themselves. Such a command does nothing: any node will answer with the error that fits.
    pub fn keys(&self, args: &CommandArgs<'_>) -> Result<Keys, KeyError> {
        let mut found = Keys::new();
        for part in self.keys {
            part.collect(args, &mut found)?;
        }
        Ok(found)
    }

    /// Where the keys of an unfinished command are, of whose `announced` arguments `args` have come. `Ok(None)`: that cannot be told
    /// of all yet; those of which it can be told are in `found`.
    ///
    /// # Errors
    /// As [`CommandSpec::keys`].
    pub fn spans(&self, args: &CommandArgs<'_>, announced: usize, found: &mut Vec<KeySpan>) -> Result<Option<()>, KeyError> {
        found.clear();
        let mut all = Some(());
        for part in self.keys {
            match part.span(args, announced)? {
                Some(span) => found.push(span),
                None => all = None,
            }
        }
        Ok(all)
    }

    /// Whether the places of the keys can be told before the command's end: not where a word among the arguments decides.
    pub fn has_spans(&self) -> bool {
        self.keys.iter().all(KeyPart::has_span)
    }

    /// The key of a command that has exactly one, at a fixed place. `None` for all others: ask [`CommandSpec::keys`].
    pub fn only_key<'a>(&self, args: &CommandArgs<'a>) -> Option<&'a [u8]> {
        match self.keys {
            [part] => part.fixed_single().and_then(|index| args.get(index)),
            _ => None,
        }
    }

    /// The first key where it is at a fixed place, as it is for most commands.
    pub fn first_key<'a>(&self, args: &CommandArgs<'a>) -> Option<&'a [u8]> {
        self.keys.first().and_then(KeyPart::fixed_first).and_then(|index| args.get(index))
    }

    /// Whether this invocation may hold its connection: XREAD and XREADGROUP do with BLOCK alone.
    pub fn blocks(&self, args: &CommandArgs<'_>) -> bool {
        match (self.class, self.keys) {
            (Class::Blocking, [KeyPart { begin: Begin::Streams, .. }]) => keys::has_block_option(args),
            (class, _) => matches!(class, Class::Blocking | Class::Wait(_)),
        }
    }
}

#[cfg(test)]
mod tests;
