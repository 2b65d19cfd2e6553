//! From a name to its row: a hash table made by the compiler.

use super::CommandSpec;
use super::table::GROUPS;

/// Slots of the index: a power of two, at least twice the number of commands, so that most searches end at the first slot.
const SLOTS: usize = 1024;
/// The mark of an empty slot.
const EMPTY: u16 = u16::MAX;

/// For each slot the row's place: the group in the upper byte, the row within it in the lower.
static INDEX: [u16; SLOTS] = build_index();

/// Finds a command by its name, in any case of letters. Containers such as XGROUP are found here, their subcommands by
/// [`CommandSpec::subcommand`].
pub fn lookup(name: &[u8]) -> Option<&'static CommandSpec> {
    let mut slot = slot_of(name);
    loop {
        let place = INDEX[slot];
        if place == EMPTY {
            return None;
        }
        let spec = &GROUPS[usize::from(place >> 8)][usize::from(place & 0xff)];
        if spec.name.as_bytes().eq_ignore_ascii_case(name) {
            return Some(spec);
        }
        slot = (slot + 1) % SLOTS;
    }
}

/// Where the search for a name begins: a hash of its length and its first and last bytes, blind to the case of letters.
const fn slot_of(name: &[u8]) -> usize {
    let (head, tail) = match (name.first_chunk::<8>(), name.last_chunk::<8>()) {
        (Some(head), Some(tail)) => (u64::from_le_bytes(*head), u64::from_le_bytes(*tail)),
        _ => short_halves(name),
    };
    let case_blind = (head | 0x2020_2020_2020_2020).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (tail | 0x2020_2020_2020_2020).wrapping_mul(0xc2b2_ae3d_27d4_eb4f).rotate_left(23);
    let mixed = (case_blind ^ name.len() as u64).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (mixed >> 40) as usize % SLOTS
}

/// The first and the last bytes of a name of fewer than eight.
const fn short_halves(name: &[u8]) -> (u64, u64) {
    if let (Some(head), Some(tail)) = (name.first_chunk::<4>(), name.last_chunk::<4>()) {
        return (u32::from_le_bytes(*head) as u64, u32::from_le_bytes(*tail) as u64);
    }
    match name {
        [a, b, c] => (u16::from_le_bytes([*a, *b]) as u64, *c as u64),
        [a, b] => (u16::from_le_bytes([*a, *b]) as u64, 0),
        [a] => (*a as u64, 0),
        _ => (0, 0),
    }
}

const fn build_index() -> [u16; SLOTS] {
    let mut index = [EMPTY; SLOTS];
    let mut group = 0;
    while group < GROUPS.len() {
        let mut row = 0;
        while row < GROUPS[group].len() {
            let mut slot = slot_of(GROUPS[group][row].name.as_bytes());
            while index[slot] != EMPTY {
                slot = (slot + 1) % SLOTS;
            }
            index[slot] = ((group as u16) << 8) | row as u16;
            row += 1;
        }
        group += 1;
    }
    index
}
