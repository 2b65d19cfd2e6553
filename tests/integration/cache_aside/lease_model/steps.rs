//! What may happen to a few keys, drawn at random.

use larder::sidecar::engine::lease::Millis;
use proptest::collection::vec;
use proptest::prelude::*;

/// All in one slot, as their companions are.
pub const KEYS: [&str; 3] = ["a}b{c}", "{c}", "x{c}y"];
/// A key that no rule covers, in the same slot.
pub const OTHER: &str = "other{c}";

/// One thing that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A pod asks for the lease. `copy`: its rule serves stale copies.
    Begin { key: usize, taker: u64, ask: Ask, copy: bool },
    /// A client's SET or its kin.
    Write { key: usize, form: Form, value: u8, span: Millis, right: Right },
    /// A client's MSET or MSETNX of the first two keys and of one that no rule covers, which is there or not.
    Many { only_missing: bool, other: bool, values: [u8; 2], rights: [Right; 2] },
    /// LARDER.FILL under the newest generation but `older`.
    FillIf { key: usize, older: usize, value: u8, span: Millis, copy: bool },
    /// A pod gives a lease back.
    Release { key: usize, taker: u64 },
    /// A key is deleted through a sidecar.
    Remove { key: usize, by: Removal },
    /// Something happens past all sidecars.
    Foreign { key: usize, what: Foreign },
    /// Time passes.
    Pass { span: Millis },
}

/// Why a lease is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Miss,
    /// The key is thought to live about as long as it does.
    Early,
    /// It lives much longer than was thought.
    TooEarly,
}

/// How a value is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Plain,
    Px,
    SetEx,
    PSetEx,
    Nx,
    NxGet,
    Xx,
    Get,
    GetSet,
    SetNx,
    KeepTtl,
    /// Until a moment that has passed.
    Past,
    /// With a lifetime that the server refuses.
    Invalid,
}

/// What a write may refer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    Update,
    /// The newest generation of its key but so many; one that never was, where there were fewer.
    Under(usize),
    Ambiguous,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    Del,
    Unlink,
    Invalidate,
    /// At a new primary, after a failover.
    Failover,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foreign {
    Set {
        value: u8,
        span: Millis,
    },
    Del,
    LoseLease,
    /// The key is lost, and its stale copy is not.
    LeaveCopy {
        value: u8,
    },
    LoseCopy,
    /// It is noted that the key is nowhere.
    NoteAbsence,
    LoseAbsence,
    /// The lease is one of a server that was primary before.
    OtherRun,
}

impl Step {
    /// What it is, in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Step::Begin { .. } => "BEGIN",
            Step::Write { .. } => "FILL",
            Step::Many { .. } => "FILL of many",
            Step::FillIf { .. } => "FILL_IF",
            Step::Release { .. } => "RELEASE",
            Step::Remove { .. } => "a deletion",
            Step::Foreign { .. } => "a stranger",
            Step::Pass { .. } => "time",
        }
    }
}

/// Mostly the first, so that much happens to it.
fn key() -> impl Strategy<Value = usize> {
    prop_oneof![6 => Just(0), 2 => Just(1), 1 => Just(2)]
}

/// Few, so that the same asks again. Far apart, as random ones are: the model makes generations of them and the time.
fn taker() -> impl Strategy<Value = u64> {
    prop::sample::select(&[0x00a1_9b3c_77d0_51e2, 0x4d2f_80e6_1c9b_a375, 0x9c64_2b1d_f05e_83a8, 0xe7b8_5fa2_346c_0d91][..])
}

/// Few, so that equal ones meet.
fn value() -> impl Strategy<Value = u8> {
    0u8..3
}

fn span() -> impl Strategy<Value = Millis> {
    prop_oneof![Just(50_000), Just(200_000), Just(1_000_000)]
}

fn right() -> impl Strategy<Value = Right> {
    prop_oneof![2 => Just(Right::Update), 4 => Just(Right::Under(0)), 2 => (1usize..3).prop_map(Right::Under), 2 => Just(Right::Ambiguous)]
}

fn form() -> impl Strategy<Value = Form> {
    use Form::{Get, GetSet, Invalid, KeepTtl, Nx, NxGet, PSetEx, Past, Plain, Px, SetEx, SetNx, Xx};
    let plain = prop::sample::select(vec![Plain, Px, SetEx, PSetEx]);
    let special = prop::sample::select(vec![Nx, NxGet, Xx, Get, GetSet, SetNx, KeepTtl, Past, Invalid]);
    prop_oneof![plain, special]
}

fn begin() -> impl Strategy<Value = Step> {
    let ask = prop_oneof![6 => Just(Ask::Miss), 2 => Just(Ask::Early), 1 => Just(Ask::TooEarly)];
    (key(), taker(), ask, any::<bool>()).prop_map(|(key, taker, ask, copy)| Step::Begin { key, taker, ask, copy })
}

fn write() -> impl Strategy<Value = Step> {
    (key(), form(), value(), span(), right()).prop_map(|(key, form, value, span, right)| Step::Write {
        key,
        form,
        value,
        span,
        right,
    })
}

fn many() -> impl Strategy<Value = Step> {
    (any::<bool>(), any::<bool>(), [value(), value()], [right(), right()])
        .prop_map(|(only_missing, other, values, rights)| Step::Many { only_missing, other, values, rights })
}

fn fill_if() -> impl Strategy<Value = Step> {
    (key(), 0usize..2, value(), span(), any::<bool>()).prop_map(|(key, older, value, span, copy)| Step::FillIf {
        key,
        older,
        value,
        span,
        copy,
    })
}

fn release() -> impl Strategy<Value = Step> {
    (key(), taker()).prop_map(|(key, taker)| Step::Release { key, taker })
}

fn remove() -> impl Strategy<Value = Step> {
    let by = prop::sample::select(vec![Removal::Del, Removal::Unlink, Removal::Invalidate, Removal::Failover]);
    (key(), by).prop_map(|(key, by)| Step::Remove { key, by })
}

fn foreign() -> impl Strategy<Value = Step> {
    let what = prop_oneof![
        3 => (value(), span()).prop_map(|(value, span)| Foreign::Set { value, span }),
        4 => Just(Foreign::Del),
        2 => Just(Foreign::LoseLease),
        2 => value().prop_map(|value| Foreign::LeaveCopy { value }),
        1 => Just(Foreign::LoseCopy),
        2 => Just(Foreign::NoteAbsence),
        1 => Just(Foreign::LoseAbsence),
        1 => Just(Foreign::OtherRun),
    ];
    (key(), what).prop_map(|(key, what)| Step::Foreign { key, what })
}

/// Beyond a lease, a value's life, a stale copy's, and what is remembered of a lease.
fn pass() -> impl Strategy<Value = Step> {
    prop_oneof![6 => Just(65_000), 1 => Just(40_000), 1 => Just(250_000), 1 => Just(700_000)].prop_map(|span| Step::Pass { span })
}

/// A history: of everything, or of leases that are seldom filled.
pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    let busy = prop_oneof![
        6 => begin(), 6 => write(), 2 => many(), 2 => fill_if(), 2 => release(), 1 => remove(), 2 => foreign(), 2 => pass(),
    ];
    let idle = prop_oneof![16 => begin(), 1 => write(), 4 => release(), 2 => foreign(), 8 => pass()];
    prop_oneof![2 => vec(busy, 1..80), 1 => vec(idle, 1..80)]
}
