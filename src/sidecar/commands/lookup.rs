//! From a name to its row: a hash table made by the compiler.

use super::CommandSpec;
use super::table::GROUPS;

/// Slots of the index: a power of two, at least twice the number of commands, so that most searches end at the first slot.
const SLOTS: usize = 1024;
/// 0x20 in every byte: what tells a small letter from a capital one.
const CASE: u64 = 0x2020_2020_2020_2020;

static INDEX: [Slot; SLOTS] = build_index();

/// One row's name, for comparison in a few instructions, and the row's place.
#[derive(Clone, Copy)]
struct Slot {
    name: Ends,
    /// [`CASE`] where the name has a letter: nothing else may differ.
    case: Ends,
    /// The name's length; zero in an empty slot.
    length: u8,
    group: u8,
    row: u8,
}

/// The first and the last bytes of a name, up to eight each. They overlap, and say all of a name of at most sixteen.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Ends {
    head: u64,
    tail: u64,
}

/// Finds a command by its name, in any case of letters. Containers such as XGROUP are found here, their subcommands by
/// [`CommandSpec::subcommand`].
pub fn lookup(name: &[u8]) -> Option<&'static CommandSpec> {
    let ends = Ends::of(name);
    let mut at = ends.first_slot(name.len());
    loop {
        let slot = &INDEX[at];
        if slot.length == 0 {
            return None;
        }
        let same_ends = Ends { head: ends.head | slot.case.head, tail: ends.tail | slot.case.tail } == slot.name;
        if same_ends && usize::from(slot.length) == name.len() {
            let spec = &GROUPS[usize::from(slot.group)][usize::from(slot.row)];
            if name.len() <= 16 || spec.name.as_bytes().eq_ignore_ascii_case(name) {
                return Some(spec);
            }
        }
        at = (at + 1) % SLOTS;
    }
}

impl Ends {
    const fn of(name: &[u8]) -> Self {
        if let (Some(head), Some(tail)) = (name.first_chunk::<8>(), name.last_chunk::<8>()) {
            return Self { head: u64::from_le_bytes(*head), tail: u64::from_le_bytes(*tail) };
        }
        if let (Some(head), Some(tail)) = (name.first_chunk::<4>(), name.last_chunk::<4>()) {
            return Self { head: u32::from_le_bytes(*head) as u64, tail: u32::from_le_bytes(*tail) as u64 };
        }
        match name {
            [a, b, c] => Self { head: u16::from_le_bytes([*a, *b]) as u64, tail: *c as u64 },
            [a, b] => Self { head: *a as u64, tail: *b as u64 },
            [a] => Self { head: *a as u64, tail: 0 },
            _ => Self { head: 0, tail: 0 },
        }
    }

    /// Where the search for a name begins: a hash that is blind to the case of letters.
    const fn first_slot(self, length: usize) -> usize {
        let head = (self.head | CASE).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let tail = (self.tail | CASE).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
        let mixed = (head ^ tail.rotate_left(23) ^ length as u64).wrapping_mul(0xff51_afd7_ed55_8ccd);
        (mixed >> 40) as usize % SLOTS
    }

    /// [`CASE`] at the letters.
    const fn case(self) -> Self {
        Self { head: case_of(self.head), tail: case_of(self.tail) }
    }
}

const fn case_of(bytes: u64) -> u64 {
    let mut case = bytes.to_le_bytes();
    let mut at = 0;
    while at < case.len() {
        case[at] = if case[at].is_ascii_alphabetic() { 0x20 } else { 0 };
        at += 1;
    }
    u64::from_le_bytes(case)
}

const fn build_index() -> [Slot; SLOTS] {
    let nothing = Ends { head: 0, tail: 0 };
    let mut index = [Slot { name: nothing, case: nothing, length: 0, group: 0, row: 0 }; SLOTS];
    let mut group = 0;
    while group < GROUPS.len() {
        let mut row = 0;
        while row < GROUPS[group].len() {
            let text = GROUPS[group][row].name.as_bytes();
            let name = Ends::of(text);
            let mut at = name.first_slot(text.len());
            while index[at].length != 0 {
                at = (at + 1) % SLOTS;
            }
            index[at] = Slot { name, case: name.case(), length: text.len() as u8, group: group as u8, row: row as u8 };
            row += 1;
        }
        group += 1;
    }
    index
}
