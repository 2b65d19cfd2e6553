//! Hash slots, and the names of Larder's own keys.

use std::sync::LazyLock;

/// How many slots a Cluster has.
pub const SLOTS: u16 = 16384;
/// What every key of Larder's own begins with.
pub const LARDER_PREFIX: &[u8] = b"larder:";
/// The length of every slot's tag.
const TAG_LEN: usize = 3;
/// `larder:`, the kind, `:`, and the tag in braces.
const COMPANION_PREFIX_LEN: usize = LARDER_PREFIX.len() + 2 + TAG_LEN + 2;

/// The slot of a key: CRC16 of its hash tag, or of all of it where it has none.
pub fn slot_of(key: &[u8]) -> u16 {
    crc16(hash_tag(key)) % SLOTS
}

/// What of a key decides its slot: what is between the first `{` and the next `}`, where that is not empty, else all of it.
pub fn hash_tag(key: &[u8]) -> &[u8] {
    let Some(open) = memchr::memchr(b'{', key) else {
        return key;
    };
    let rest = &key[open + 1..];
    match memchr::memchr(b'}', rest) {
        Some(length) if length > 0 => &rest[..length],
        _ => key,
    }
}

/// The slot of a key that comes in pieces; the same as [`slot_of`] of the whole.
#[derive(Debug, Clone, Default)]
pub struct SlotScan {
    tag: TagScan,
    /// The checksum of all that came, as far as it may still matter.
    whole: u16,
}

/// How far the hash tag has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum TagScan {
    /// No `{` yet.
    #[default]
    Before,
    /// Behind the first `{`: the checksum of what came, and whether anything did.
    Within { crc: u16, any: bool },
    /// The tag is whole, and this its checksum.
    Closed(u16),
    /// There is none: `{}`.
    Absent,
}

impl SlotScan {
    /// Takes the next bytes of the key.
    pub fn feed(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        if self.tag == TagScan::Before {
            let Some(open) = memchr::memchr(b'{', rest) else {
                self.whole = crc16_on(self.whole, rest);
                return;
            };
            self.whole = crc16_on(self.whole, &rest[..=open]);
            rest = &rest[open + 1..];
            self.tag = TagScan::Within { crc: 0, any: false };
        }
        if let TagScan::Within { crc, any } = self.tag {
            let close = memchr::memchr(b'}', rest);
            let within = &rest[..close.unwrap_or(rest.len())];
            let (crc, any) = (crc16_on(crc, within), any || !within.is_empty());
            self.tag = match close {
                None => TagScan::Within { crc, any },
                Some(_) if any => TagScan::Closed(crc),
                Some(_) => TagScan::Absent,
            };
        }
        if !matches!(self.tag, TagScan::Closed(_)) {
            self.whole = crc16_on(self.whole, rest);
        }
    }

    /// The slot, at the key's end.
    pub fn finish(&self) -> u16 {
        match self.tag {
            TagScan::Closed(crc) => crc % SLOTS,
            _ => self.whole % SLOTS,
        }
    }
}

/// What a companion holds for its key. Each lies in its key's slot, so that one transaction covers both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Companion {
    /// The token of the one sidecar that loads the key.
    Lease,
    /// A second copy, kept longer, for the time in which the origin fails.
    Stale,
    /// The mark that the origin does not know the key.
    Negative,
    /// A write through, on its way to the origin.
    Intent,
    /// A value that the origin has not got yet.
    Dirty,
    /// The key's versions.
    Versions,
    /// The key's tags.
    Tags,
}

impl Companion {
    /// All kinds.
    pub const ALL: [Companion; 7] = [
        Companion::Lease,
        Companion::Stale,
        Companion::Negative,
        Companion::Intent,
        Companion::Dirty,
        Companion::Versions,
        Companion::Tags,
    ];

    /// The letter in the companion's name.
    pub const fn letter(self) -> u8 {
        match self {
            Companion::Lease => b'l',
            Companion::Stale => b's',
            Companion::Negative => b'n',
            Companion::Intent => b'i',
            Companion::Dirty => b'd',
            Companion::Versions => b'v',
            Companion::Tags => b't',
        }
    }

    /// The length of the companion's name for a key of `key_len` bytes.
    pub const fn name_len(key_len: usize) -> usize {
        COMPANION_PREFIX_LEN + key_len
    }

    /// Appends the companion's name for `key`: `larder:KIND:{TAG}KEY`.
    pub fn write_name(self, key: &[u8], out: &mut Vec<u8>) {
        self.write_prefix(slot_of(key), out);
        out.extend_from_slice(key);
    }

    /// Appends what stands before the key, which lies in `slot`, in the companion's name.
    pub fn write_prefix(self, slot: u16, out: &mut Vec<u8>) {
        out.extend_from_slice(LARDER_PREFIX);
        out.extend_from_slice(&[self.letter(), b':', b'{']);
        out.extend_from_slice(&tag_of(slot));
        out.push(b'}');
    }

    /// The companion's name for `key`.
    pub fn name(self, key: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::name_len(key.len()));
        self.write_name(key, &mut out);
        out
    }

    /// The kind and the key whose companion has this name. `None` where it is no companion's name.
    pub fn parse(name: &[u8]) -> Option<(Companion, &[u8])> {
        let [kind, b':', b'{', rest @ ..] = name.strip_prefix(LARDER_PREFIX)? else {
            return None;
        };
        let (tag, rest) = rest.split_first_chunk::<TAG_LEN>()?;
        let key = rest.strip_prefix(b"}")?;
        let companion = Self::ALL.into_iter().find(|companion| companion.letter() == *kind)?;
        (*tag == tag_of(slot_of(key))).then_some((companion, key))
    }
}

/// Whether a key is Larder's own, so that no application should see or touch it.
pub fn is_larder_key(key: &[u8]) -> bool {
    key.starts_with(LARDER_PREFIX)
}

/// The tag whose slot is `slot`: three letters or digits. Slots from [`SLOTS`] on wrap around.
pub fn tag_of(slot: u16) -> [u8; TAG_LEN] {
    TAGS[usize::from(slot % SLOTS)]
}

/// For each slot the first tag, in the order of the alphabet, that falls into it.
static TAGS: LazyLock<Box<[[u8; TAG_LEN]]>> = LazyLock::new(|| {
    const ALPHABET: &[u8; 62] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    let mut tags = vec![[0; TAG_LEN]; usize::from(SLOTS)].into_boxed_slice();
    let tag_at = |number: usize| [ALPHABET[number / 3844], ALPHABET[number / 62 % 62], ALPHABET[number % 62]];
    // From the last to the first, so that the first stays.
    for tag in (0..62 * 62 * 62).rev().map(tag_at) {
        tags[usize::from(crc16(&tag) % SLOTS)] = tag;
    }
    tags
});

/// CRC16 as Redis Cluster uses it (XMODEM): polynomial 0x1021, from zero, not reflected.
fn crc16(bytes: &[u8]) -> u16 {
    crc16_on(0, bytes)
}

/// The checksum of what `crc` is the checksum of, and `bytes` behind it.
fn crc16_on(crc: u16, bytes: &[u8]) -> u16 {
    let (eights, rest) = bytes.as_chunks::<8>();
    let crc = eights.iter().fold(crc, |crc, eight| {
        let [high, low] = crc.to_be_bytes();
        let table = |behind: usize, byte: u8| CRC_TABLES[behind][usize::from(byte)];
        let front = table(7, eight[0] ^ high) ^ table(6, eight[1] ^ low) ^ table(5, eight[2]) ^ table(4, eight[3]);
        front ^ table(3, eight[4]) ^ table(2, eight[5]) ^ table(1, eight[6]) ^ table(0, eight[7])
    });
    rest.iter().fold(crc, |crc, byte| (crc << 8) ^ CRC_TABLES[0][usize::from((crc >> 8) as u8 ^ *byte)])
}

/// `CRC_TABLES[n][b]`: what byte `b` adds to the checksum when `n` bytes follow it. Eight bytes need no result of one another.
static CRC_TABLES: [[u16; 256]; 8] = crc_tables();

const fn crc_tables() -> [[u16; 256]; 8] {
    let mut tables = [[0u16; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = (byte as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut behind = 1;
    while behind < 8 {
        let mut byte = 0;
        while byte < 256 {
            let crc = tables[behind - 1][byte];
            tables[behind][byte] = (crc << 8) ^ tables[0][(crc >> 8) as usize];
            byte += 1;
        }
        behind += 1;
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, bit by bit.
    fn slow_crc16(bytes: &[u8]) -> u16 {
        bytes.iter().fold(0, |crc, byte| {
            (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 })
        })
    }

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(crc16(b"123456789"), 0x31c3);
        assert_eq!(slot_of(b"foo"), 12182);
        assert_eq!(slot_of(b""), 0);
        for (key, tag) in [
            ("{user1000}.following", "user1000"),
            ("foo{}{bar}", "foo{}{bar}"),
            ("foo{{bar}}zap", "{bar"),
            ("foo{bar}{zap}", "bar"),
            ("a}b", "a}b"),
            ("a}{b}", "b"),
            ("{x", "{x"),
        ] {
            assert_eq!(hash_tag(key.as_bytes()), tag.as_bytes(), "{key}");
        }
    }

    #[test]
    fn every_slot_has_its_tag() {
        for slot in 0..SLOTS {
            assert_eq!(slot_of(&tag_of(slot)), slot);
        }
    }

    #[test]
    fn other_keys_are_no_companions() {
        for name in
            ["larder:", "larder:l:", "larder:l:{", "larder:l:{000}x", "larder:x:{000}x", "larder:p:binding", "lander:l:{000}x"]
        {
            assert_eq!(Companion::parse(name.as_bytes()), None, "{name}");
        }
    }

    fn hostile_key() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..64),
            "[{}ab:]{0,12}".prop_map(String::into_bytes),
            "[{}]{0,3}[a-z]{0,20}[{}]{0,3}".prop_map(String::into_bytes),
        ]
    }

    proptest! {
        #[test]
        fn eight_bytes_at_once_give_the_same_checksum(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(crc16(&bytes), slow_crc16(&bytes));
        }

        #[test]
        fn keys_in_pieces_have_the_same_slot(key in hostile_key(), step in 1usize..20) {
            for cut in 0..=key.len() {
                let mut scan = SlotScan::default();
                scan.feed(&key[..cut]);
                key[cut..].chunks(step).for_each(|piece| scan.feed(piece));
                prop_assert_eq!(scan.finish(), slot_of(&key));
            }
        }

        #[test]
        fn companions_are_in_their_keys_slot_and_lead_back_to_it(key in hostile_key()) {
            for companion in Companion::ALL {
                let name = companion.name(&key);
                prop_assert_eq!(slot_of(&name), slot_of(&key));
                prop_assert_eq!(name.len(), Companion::name_len(key.len()));
                prop_assert!(is_larder_key(&name));
                prop_assert_eq!(Companion::parse(&name), Some((companion, &key[..])));
            }
        }
    }
}
