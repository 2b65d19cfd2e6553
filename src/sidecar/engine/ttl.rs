//! What a command needs so that no covered key is ever left without a TTL, or with one above its rule's bound.
//!
//! Three means, in the order of their cost: another argument (`SET k v` becomes `SET k v PX n`), another command (`PERSIST k`
//! becomes `PEXPIRE k n`), or more commands in the same transaction (`INCR k` becomes `MULTI`, `INCR k`, `PEXPIRE k n NX`,
//! `EXEC`). In each the client gets the reply of its own command, unchanged: no reply is ever converted.
//!
//! - `PEXPIRE k n NX` gives a TTL to a key that has none; `PEXPIRE k max LT` cuts one that is too long, also one given as a
//!   moment, by the server's own clock. Both do nothing to a missing key, and nothing to a key of any type that has a fitting
//!   TTL: they are harmless behind a command that fails.
//! - What this module cannot read (a new option, arguments that contradict themselves) is sent as it came, with both behind it:
//!   an error stays the server's own, and a new option cannot evade the rule.
//! - Covered writes of keys that have companions also remove lease, stale copy and negative entry, in the same transaction:
//!   a load that began before the write is not stored, and no older copy is served after it.
//! - Where the rule keeps stale copies, what shortens the key's time shortens the copy's; and where they are the writers', a write
//!   that surely stores a value for a known time writes the copy instead of removing it: a copy holds its key's value, and outlives
//!   it by `stale` at most.

use super::super::commands::{Access, CommandSpec, Effect, KeyAt, Ttl, parse_i64};
use super::super::resp::{CommandArgs, encode};
use super::super::slots::Companion;
use crate::policy::{Lifetime, Span};

/// Which keys a policy covers.
pub trait Coverage {
    /// How `key` is covered. `None`: by no rule, or by a rule that lets commands pass.
    fn cover(&self, key: &[u8]) -> Option<Cover>;

    /// The database that the client has selected.
    fn database(&self) -> u32 {
        0
    }
}

/// How a key is covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cover {
    /// How long it may live.
    pub lifetime: Lifetime,
    /// Whether it has companions that a write must remove.
    pub companions: bool,
    /// How long a stale copy beside the key outlives it. Zero: there are none. Above zero only with `companions`.
    pub stale: Span,
    /// Whether a write stores the copy. Otherwise a load does, and a write removes it.
    pub writes_copy: bool,
}

impl Cover {
    /// Whether there may be a stale copy.
    fn keeps_copies(&self) -> bool {
        self.companions && !self.stale.is_zero()
    }
}

/// What goes to the server instead of a client's command. Byte counts are of the `out` that [`plan`] filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TtlPlan {
    /// The command as it came.
    Forward,
    /// One command, whose reply is the client's.
    Send(Body),
    /// MULTI, one command, `extra` more commands, EXEC; contiguous on its connection.
    ///
    /// The client's reply is the first element of EXEC's. Where the server refuses to queue the command, the refusal is the
    /// client's reply (a redirection or an unknown command, for example), and nothing is executed; where it refuses to queue one
    /// of the others, EXEC's error is. In a client's own transaction the commands are queued without MULTI and EXEC, and the
    /// `extra` elements behind the client's are dropped from EXEC's reply. ASKING before MULTI holds until EXEC.
    Wrap {
        /// The client's command.
        body: Body,
        /// How many commands follow it in `out`.
        extra: u32,
    },
    /// The command as it came, which may hold its connection, and `extra` commands right behind it, whose replies are dropped.
    /// Within a client's own transaction nothing blocks: as [`TtlPlan::Wrap`].
    Repair {
        /// How many commands are in `out`.
        extra: u32,
    },
}

/// The client's command, as it is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// As it came.
    AsCame,
    /// As it came, with `more` arguments behind its own: the first `len` bytes of `out`. The header counts them.
    Appended {
        /// How many arguments.
        more: u8,
        /// How many bytes.
        len: u32,
    },
    /// Another command: the first `len` bytes of `out`.
    Replaced {
        /// How many bytes.
        len: u32,
    },
}

impl Body {
    fn len(self) -> usize {
        match self {
            Body::AsCame => 0,
            Body::Appended { len, .. } | Body::Replaced { len } => len as usize,
        }
    }

    /// Appends the command. `command` is the client's, as an array of bulk strings with `args_len` elements.
    fn write(self, command: &[u8], args_len: usize, planned: &[u8], out: &mut Vec<u8>) {
        match self {
            Body::AsCame => out.extend_from_slice(command),
            Body::Appended { more, .. } => {
                encode::array(out, args_len + usize::from(more));
                let header_end = memchr::memchr(b'\n', command).map_or(command.len(), |at| at + 1);
                out.extend_from_slice(&command[header_end..]);
                out.extend_from_slice(&planned[..self.len()]);
            }
            Body::Replaced { .. } => out.extend_from_slice(&planned[..self.len()]),
        }
    }
}

/// MULTI as it is sent.
pub const MULTI: &[u8] = b"*1\r\n$5\r\nMULTI\r\n";
/// EXEC as it is sent.
pub const EXEC: &[u8] = b"*1\r\n$4\r\nEXEC\r\n";

impl TtlPlan {
    /// Appends to `out` what goes to the server, outside a transaction of the client's. `command` is the client's command, as an
    /// array of bulk strings with `args_len` elements; `planned` is what [`plan`] filled. Returns how many replies will come.
    pub fn write(self, command: &[u8], args_len: usize, planned: &[u8], out: &mut Vec<u8>) -> u32 {
        match self {
            TtlPlan::Forward => {
                out.extend_from_slice(command);
                1
            }
            TtlPlan::Send(body) => {
                body.write(command, args_len, planned, out);
                1
            }
            TtlPlan::Wrap { extra, .. } => {
                out.extend_from_slice(MULTI);
                self.write_queued(command, args_len, planned, out);
                out.extend_from_slice(EXEC);
                extra + 3
            }
            TtlPlan::Repair { .. } => 1 + self.write_queued(command, args_len, planned, out),
        }
    }

    /// Appends to `out` what is queued within a client's own transaction. Returns how many commands follow the client's: their
    /// elements are to be dropped from EXEC's reply.
    pub fn write_queued(self, command: &[u8], args_len: usize, planned: &[u8], out: &mut Vec<u8>) -> u32 {
        let (body, extra) = match self {
            TtlPlan::Forward => (Body::AsCame, 0),
            TtlPlan::Send(body) => (body, 0),
            TtlPlan::Wrap { body, extra } => (body, extra),
            TtlPlan::Repair { extra } => (Body::AsCame, extra),
        };
        body.write(command, args_len, planned, out);
        out.extend_from_slice(&planned[body.len()..]);
        extra
    }
}

/// Decides what is sent instead of a command, so that the keys that `coverage` covers keep a TTL within their rule. Fills `out`
/// with the bytes that the plan speaks of. `random` is uniform over all of `u32`; it shortens default TTLs.
pub fn plan(
    args: &CommandArgs<'_>,
    spec: &CommandSpec,
    coverage: &impl Coverage,
    random: &mut impl FnMut() -> u32,
    out: &mut Vec<u8>,
) -> TtlPlan {
    plan_and_life(args, spec, coverage, random, out).0
}

/// As [`plan`]; and how long in milliseconds the key lives that the command stores, where it has one key and stores it for certain.
pub fn plan_and_life(
    args: &CommandArgs<'_>,
    spec: &CommandSpec,
    coverage: &impl Coverage,
    random: &mut impl FnMut() -> u32,
    out: &mut Vec<u8>,
) -> (TtlPlan, Option<u64>) {
    out.clear();
    if spec.access != Access::Write {
        return (TtlPlan::Forward, None);
    }
    let mut planner = Planner { args, coverage, random, out, extra: 0, life: None };
    let body = match spec.only_key(args) {
        Some(key) => match coverage.cover(key) {
            Some(cover) => planner.plan_one(spec, key, &cover),
            None => Body::AsCame,
        },
        None => planner.plan_many(spec),
    };
    let plan = match (body, planner.extra) {
        (Body::AsCame, 0) => TtlPlan::Forward,
        (body, 0) => TtlPlan::Send(body),
        (_, extra) if spec.blocks(args) => TtlPlan::Repair { extra },
        (body, extra) => TtlPlan::Wrap { body, extra },
    };
    (plan, planner.life)
}

/// The commands that guard any command whose options are not at hand, because it is too long to be held: they go between the
/// command as it came and EXEC. Of `args` only the keys (and, for scripts and such, their number) need be whole. Fills `out`;
/// returns how many commands it holds, zero where no covered key is written.
pub fn guards(
    args: &CommandArgs<'_>,
    spec: &CommandSpec,
    coverage: &impl Coverage,
    random: &mut impl FnMut() -> u32,
    out: &mut Vec<u8>,
) -> u32 {
    out.clear();
    if spec.access != Access::Write {
        return 0;
    }
    let mut planner = Planner { args, coverage, random, out, extra: 0, life: None };
    planner.guard_keys(spec, Guard::Both);
    planner.extra
}

/// What goes before and behind the bulk string of a key that is not at hand, in a command that guards it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Around {
    /// The array's header, the command's name and whatever else stands before the key.
    pub before: Vec<u8>,
    /// The other arguments.
    pub behind: Vec<u8>,
}

/// The commands of [`guards`] that see to the TTL of one key, which is not at hand.
pub fn guards_around(lifetime: &Lifetime, random: u32) -> [Around; 2] {
    let around = |millis: u64, condition: &[u8]| {
        let (mut before, mut behind) = (Vec::new(), Vec::new());
        encode::array(&mut before, 4);
        encode::bulk(&mut before, b"PEXPIRE");
        bulk_number(&mut behind, millis);
        encode::bulk(&mut behind, condition);
        Around { before, behind }
    };
    [around(lifetime.jittered(random).as_millis(), b"NX"), around(lifetime.max.as_millis(), b"LT")]
}

/// The command that removes the companions of one key of `key_len` bytes in `slot`, which is not at hand: what stands before each
/// repetition of the key's bytes and the line end.
pub fn removal_around(key_len: usize, slot: u16) -> [Vec<u8>; REMOVED.len()] {
    let mut first = Vec::new();
    encode::array(&mut first, 1 + REMOVED.len());
    encode::bulk(&mut first, b"UNLINK");
    REMOVED.map(|companion| {
        let mut before = std::mem::take(&mut first);
        before.push(b'$');
        encode::decimal(&mut before, Companion::name_len(key_len) as u64);
        before.extend_from_slice(b"\r\n");
        companion.write_prefix(slot, &mut before);
        before
    })
}

/// The companions that a write removes.
const REMOVED: [Companion; 3] = [Companion::Lease, Companion::Stale, Companion::Negative];

/// Which commands follow the client's for a key that it writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guard {
    /// None: the TTL is known to be right.
    None,
    /// A default TTL where there is none.
    Default,
    /// The bound where the TTL is above it.
    Cap,
    /// Both.
    Both,
}

/// What an option or argument says of a TTL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Given {
    /// Nothing.
    Nothing,
    /// It stays as it is.
    Kept,
    /// It goes.
    Removed,
    /// So many milliseconds from now.
    Within(i64),
    /// Until a moment.
    Until,
    /// What this module cannot read.
    Unclear,
}

impl Given {
    /// What must follow a command that does as it says.
    fn guard(self, lifetime: &Lifetime) -> Guard {
        match self {
            Given::Within(millis) if is_within(millis, lifetime) => Guard::None,
            Given::Within(_) | Given::Until => Guard::Cap,
            Given::Nothing | Given::Kept | Given::Removed => Guard::Default,
            Given::Unclear => Guard::Both,
        }
    }
}

fn is_within(millis: i64, lifetime: &Lifetime) -> bool {
    i64::try_from(lifetime.max.as_millis()).is_ok_and(|max| millis <= max)
}

struct Planner<'p, 'a, C, R> {
    args: &'p CommandArgs<'a>,
    coverage: &'p C,
    random: &'p mut R,
    out: &'p mut Vec<u8>,
    extra: u32,
    /// How long a key lives that is stored for certain, in milliseconds.
    life: Option<u64>,
}

impl<'a, C: Coverage, R: FnMut() -> u32> Planner<'_, 'a, C, R> {
    /// A command with one key, which is covered.
    fn plan_one(&mut self, spec: &CommandSpec, key: &[u8], cover: &Cover) -> Body {
        let lifetime = &cover.lifetime;
        match spec.ttl {
            Ttl::Set => self.plan_set(key, cover),
            Ttl::SetEx(unit) => self.plan_setex(key, cover, millis(self.args.get(2), unit)),
            Ttl::GetEx => self.plan_getex(key, cover),
            Ttl::Restore => {
                let guard = self.restore_ttl().guard(lifetime);
                self.guarded(key, cover, guard)
            }
            Ttl::Expire(unit) => self.plan_expire(key, cover, millis(self.args.get(2), unit).map(Given::Within)),
            Ttl::ExpireAt => self.plan_expire(key, cover, Some(Given::Until)),
            Ttl::Persist => {
                let default = self.default_millis(lifetime);
                self.command(&[b"PEXPIRE", key], Some(default), &[]);
                let body = self.replaced();
                self.shorten_copy(key, cover, default);
                body
            }
            Ttl::Keeps => self.guarded(key, cover, Guard::None),
            Ttl::Creates => self.guarded(key, cover, Guard::Default),
            Ttl::Carries | Ttl::Copy => self.guarded(key, cover, Guard::Both),
        }
    }

    /// A command with several keys, or with keys at no fixed place.
    fn plan_many(&mut self, spec: &CommandSpec) -> Body {
        let guard = match spec.ttl {
            Ttl::Keeps => Guard::None,
            Ttl::Creates => Guard::Default,
            _ => Guard::Both,
        };
        match self.other_database(spec) {
            Some(database) => self.guard_copy(spec, database),
            None => self.guard_keys(spec, guard),
        }
        Body::AsCame
    }

    /// The client's command as it is, with what must follow it.
    fn guarded(&mut self, key: &[u8], cover: &Cover, guard: Guard) -> Body {
        self.guard_key(key, &cover.lifetime, guard);
        if cover.companions {
            self.remove_companions(&[key]);
        }
        Body::AsCame
    }

    fn plan_set(&mut self, key: &[u8], cover: &Cover) -> Body {
        let (given, always_stores) = self.set_options();
        let value = self.args.get(2).filter(|_| always_stores);
        if given != Given::Nothing {
            return self.stored(key, cover, given, value);
        }
        let default = self.default_millis(&cover.lifetime);
        encode::bulk(self.out, b"PX");
        bulk_number(self.out, default);
        let body = Body::Appended { more: 2, len: self.out.len() as u32 };
        self.stored(key, cover, Given::Within(default.cast_signed()), value);
        body
    }

    /// SETEX and PSETEX. `millis` is `None` where the time is no number: the server refuses it.
    fn plan_setex(&mut self, key: &[u8], cover: &Cover, millis: Option<i64>) -> Body {
        match millis {
            Some(millis) => self.stored(key, cover, Given::Within(millis), self.args.get(3)),
            None => self.guarded(key, cover, Guard::None),
        }
    }

    /// A command that stores `value`; `None` where it may not, or may store another.
    fn stored(&mut self, key: &[u8], cover: &Cover, given: Given, value: Option<&[u8]>) -> Body {
        if let (Given::Within(millis @ 1..), Some(_)) = (given, value) {
            self.life = Some(millis.cast_unsigned().min(cover.lifetime.max.as_millis()));
        }
        match (given, value) {
            // The server refuses a time below one, and the copy with it must not stay behind.
            (Given::Within(millis @ 1..), Some(value))
                if cover.writes_copy && cover.keeps_copies() && is_within(millis, &cover.lifetime) =>
            {
                self.write_copy(key, value, millis.cast_unsigned() + cover.stale.as_millis());
                Body::AsCame
            }
            _ => self.guarded(key, cover, given.guard(&cover.lifetime)),
        }
    }

    fn plan_getex(&mut self, key: &[u8], cover: &Cover) -> Body {
        let given = match self.args.get(2) {
            None => return Body::AsCame,
            Some(_) => self.getex_option(),
        };
        if given == Given::Removed {
            let default = self.default_millis(&cover.lifetime);
            self.command(&[self.args.name(), key, b"PX"], Some(default), &[]);
            let body = self.replaced();
            self.shorten_copy(key, cover, default);
            return body;
        }
        self.guard_key(key, &cover.lifetime, given.guard(&cover.lifetime));
        match given {
            // A moment in the past removes the key.
            Given::Until | Given::Unclear if cover.companions => self.remove_companions(&[key]),
            Given::Within(millis @ 1..) => self.shorten_copy(key, cover, millis.cast_unsigned()),
            _ => {}
        }
        Body::AsCame
    }

    /// EXPIRE and its kin. `given` is `None` where the time is no number: the server refuses it.
    fn plan_expire(&mut self, key: &[u8], cover: &Cover, given: Option<Given>) -> Body {
        let Some(given) = given else {
            return Body::AsCame;
        };
        let is_nx = |option: &[u8]| option.eq_ignore_ascii_case(b"nx");
        let mut options = self.args.iter().skip(3);
        let body = if self.args.len() > 3 && options.all(is_nx) {
            // A covered key always has a TTL: without this, a client's first EXPIRE … NX would never do anything.
            let time = self.args.get(2).unwrap_or_default();
            self.command(&[self.args.name(), key, time, b"LT"], None, &[]);
            self.replaced()
        } else {
            Body::AsCame
        };
        self.guard_key(key, &cover.lifetime, given.guard(&cover.lifetime));
        match given {
            Given::Within(millis @ 1..) => self.shorten_copy(key, cover, millis.cast_unsigned()),
            _ if cover.companions => self.remove_companions(&[key]),
            _ => {}
        }
        body
    }

    /// What follows a command that is sent as it came, for each of its keys.
    fn guard_keys(&mut self, spec: &CommandSpec, guard: Guard) {
        let Ok(keys) = spec.keys(self.args) else {
            return;
        };
        let mut loaded_through = smallvec::SmallVec::<[&[u8]; 4]>::new();
        for KeyAt { index, effect } in keys {
            let Some(key) = self.args.get(index as usize).filter(|_| changes(effect)) else {
                continue;
            };
            let Some(cover) = self.coverage.cover(key) else {
                continue;
            };
            if effect == Effect::Write {
                self.guard_key(key, &cover.lifetime, guard);
            }
            if cover.companions {
                loaded_through.push(key);
            }
        }
        if !loaded_through.is_empty() {
            self.remove_companions(&loaded_through);
        }
    }

    fn guard_key(&mut self, key: &[u8], lifetime: &Lifetime, guard: Guard) {
        if matches!(guard, Guard::Default | Guard::Both) {
            let default = self.default_millis(lifetime);
            self.command(&[b"PEXPIRE", key], Some(default), &[b"NX"]);
            self.extra += 1;
        }
        if matches!(guard, Guard::Cap | Guard::Both) {
            self.command(&[b"PEXPIRE", key], Some(lifetime.max.as_millis()), &[b"LT"]);
            self.extra += 1;
        }
    }

    /// COPY to another database: the guards are for the key there.
    fn guard_copy(&mut self, spec: &CommandSpec, database: &[u8]) {
        let (start, before) = (self.out.len(), self.extra);
        self.command(&[b"SELECT", database], None, &[]);
        self.guard_keys(spec, Guard::Both);
        if self.extra == before {
            self.out.truncate(start);
            return;
        }
        self.command(&[b"SELECT"], Some(u64::from(self.coverage.database())), &[]);
        self.extra += 2;
    }

    /// The database that COPY names.
    fn other_database(&self, spec: &CommandSpec) -> Option<&'a [u8]> {
        let mut options = self.args.iter().skip(3);
        let found = options.find(|option| option.eq_ignore_ascii_case(b"db")).filter(|_| spec.ttl == Ttl::Copy);
        found.and_then(|_| options.next())
    }

    /// Lease, stale copy and negative entry of each key, in one command.
    fn remove_companions(&mut self, keys: &[&[u8]]) {
        self.unlink(keys, &REMOVED);
    }

    fn unlink(&mut self, keys: &[&[u8]], companions: &[Companion]) {
        encode::array(self.out, 1 + keys.len() * companions.len());
        encode::bulk(self.out, b"UNLINK");
        for key in keys {
            companions.iter().for_each(|companion| self.bulk_name(*companion, key));
        }
        self.extra += 1;
    }

    fn bulk_name(&mut self, companion: Companion, key: &[u8]) {
        self.out.push(b'$');
        encode::decimal(self.out, Companion::name_len(key.len()) as u64);
        self.out.extend_from_slice(b"\r\n");
        companion.write_name(key, self.out);
        self.out.extend_from_slice(b"\r\n");
    }

    /// The stale copy of what the client's command stores; the other companions go.
    fn write_copy(&mut self, key: &[u8], value: &[u8], millis: u64) {
        self.unlink(&[key], &[Companion::Lease, Companion::Negative]);
        encode::array(self.out, 5);
        encode::bulk(self.out, b"SET");
        self.bulk_name(Companion::Stale, key);
        encode::bulk(self.out, value);
        encode::bulk(self.out, b"PX");
        bulk_number(self.out, millis);
        self.extra += 1;
    }

    /// Where a key is given `millis`, its stale copy lives no longer than they and `stale`. Only shortens: whether the key is there
    /// to be given anything, only the server knows.
    fn shorten_copy(&mut self, key: &[u8], cover: &Cover, millis: u64) {
        if cover.keeps_copies() {
            encode::array(self.out, 4);
            encode::bulk(self.out, b"PEXPIRE");
            self.bulk_name(Companion::Stale, key);
            bulk_number(self.out, millis.min(cover.lifetime.max.as_millis()) + cover.stale.as_millis());
            encode::bulk(self.out, b"LT");
            self.extra += 1;
        }
    }

    /// The default TTL in milliseconds, shortened by chance.
    fn default_millis(&mut self, lifetime: &Lifetime) -> u64 {
        lifetime.jittered((self.random)()).as_millis()
    }

    /// Everything in `out` so far, as the command to send.
    fn replaced(&self) -> Body {
        Body::Replaced { len: self.out.len() as u32 }
    }

    /// Appends a command of up to three runs: words, a number, words.
    fn command(&mut self, words: &[&[u8]], number: Option<u64>, more: &[&[u8]]) {
        encode::array(self.out, words.len() + usize::from(number.is_some()) + more.len());
        words.iter().for_each(|word| encode::bulk(self.out, word));
        if let Some(number) = number {
            bulk_number(self.out, number);
        }
        more.iter().for_each(|word| encode::bulk(self.out, word));
    }

    /// What SET's options say of the TTL, and whether it always stores its value.
    fn set_options(&self) -> (Given, bool) {
        let (mut given, mut always_stores) = (Given::Nothing, true);
        let mut options = self.args.iter().skip(3);
        while let Some(option) = options.next() {
            let is = |name: &[u8]| option.eq_ignore_ascii_case(name);
            let said = match () {
                // GET refuses a key of another type.
                () if is(b"nx") || is(b"xx") || is(b"get") => {
                    always_stores = false;
                    continue;
                }
                () if is(b"ifeq") || is(b"ifne") || is(b"ifdeq") || is(b"ifdne") => {
                    always_stores = false;
                    options.next();
                    continue;
                }
                () if is(b"keepttl") => Given::Kept,
                () => timed_option(option, options.next()),
            };
            given = if given == Given::Nothing { said } else { Given::Unclear };
        }
        (given, always_stores)
    }

    /// What GETEX' option says of the TTL.
    fn getex_option(&self) -> Given {
        match (self.args.get(2), self.args.len()) {
            (Some(option), 3) if option.eq_ignore_ascii_case(b"persist") => Given::Removed,
            (Some(option), 4) => timed_option(option, self.args.get(3)),
            _ => Given::Unclear,
        }
    }

    /// What RESTORE says of the TTL.
    fn restore_ttl(&self) -> Given {
        match self.args.get(2).and_then(parse_i64) {
            Some(0) => Given::Nothing,
            _ if self.args.iter().skip(4).any(|option| option.eq_ignore_ascii_case(b"absttl")) => Given::Until,
            Some(millis) => Given::Within(millis),
            None => Given::Unclear,
        }
    }
}

/// What `EX n` and its kin say.
fn timed_option(option: &[u8], time: Option<&[u8]>) -> Given {
    let is = |name: &[u8]| option.eq_ignore_ascii_case(name);
    let within = |unit| millis(time, unit).map_or(Given::Unclear, Given::Within);
    match () {
        () if is(b"ex") => within(1000),
        () if is(b"px") => within(1),
        () if is(b"exat") || is(b"pxat") => Given::Until,
        () => Given::Unclear,
    }
}

/// A number of units as milliseconds; one that is too great counts as the greatest. `None` where it is no number.
fn millis(time: Option<&[u8]>, unit: u16) -> Option<i64> {
    time.and_then(parse_i64).map(|number| number.saturating_mul(i64::from(unit)))
}

/// Whether a command with this effect may change what a reader gets.
pub const fn changes(effect: Effect) -> bool {
    matches!(effect, Effect::Update | Effect::Write | Effect::Delete)
}

fn bulk_number(out: &mut Vec<u8>, number: u64) {
    let length = number.checked_ilog10().unwrap_or(0) + 1;
    out.push(b'$');
    encode::decimal(out, u64::from(length));
    out.extend_from_slice(b"\r\n");
    encode::decimal(out, number);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests;
