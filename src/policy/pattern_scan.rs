//! A pattern looked for in a key that comes in pieces, for keys too long to be held.
//!
//! The pattern's elements (single bytes, and parts) make a non-deterministic automaton: a set of places in the pattern, moved by
//! each byte with a few operations on words of bits. Memory is a few kilobytes a pattern, whatever the key's length.

use super::pattern::{KeyPattern, Segment};

/// One pattern, part of the way through a key.
#[derive(Debug, Clone)]
pub struct PatternScan {
    /// How many words a set of places takes.
    words: usize,
    /// For each byte the elements that take it: `words` words for each.
    takers: Box<[u64]>,
    /// The elements that are parts, which may take more than one byte.
    parts: Box<[u64]>,
    /// The elements that may take the next byte as their first; the place behind the last one stands for the end.
    ahead: Box<[u64]>,
    /// The parts that have taken a byte and may take more.
    within: Box<[u64]>,
    /// The elements.
    elements: Box<[Element]>,
    /// Whether the last element is a part that takes anything.
    open: bool,
}

/// What a pattern is made of.
#[derive(Debug, Clone, Copy)]
enum Element {
    Byte(u8),
    Part { any: bool },
}

impl PatternScan {
    /// At the start of a key.
    pub fn new(pattern: &KeyPattern) -> Self {
        let elements = elements(pattern);
        let words = (elements.len() + 1).div_ceil(64);
        let mut takers = vec![0; 256 * words].into_boxed_slice();
        let mut parts = vec![0; words].into_boxed_slice();
        for (at, element) in elements.iter().enumerate() {
            let (word, bit) = (at / 64, 1 << (at % 64));
            match element {
                Element::Byte(byte) => takers[usize::from(*byte) * words + word] |= bit,
                Element::Part { any } => {
                    parts[word] |= bit;
                    (0..256)
                        .filter(|byte| *any || *byte != usize::from(b':'))
                        .for_each(|byte| takers[byte * words + word] |= bit);
                }
            }
        }
        let mut ahead = vec![0; words].into_boxed_slice();
        ahead[0] = 1;
        let open = matches!(elements.last(), Some(Element::Part { any: true }));
        let within = vec![0; words].into_boxed_slice();
        Self { words, takers, parts, ahead, within, elements: elements.into_boxed_slice(), open }
    }

    /// Takes the next bytes of the key.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.is_certain() {
            return;
        }
        if self.words == 1 {
            return self.feed_short(bytes);
        }
        for byte in bytes {
            let takers = &self.takers[usize::from(*byte) * self.words..][..self.words];
            let mut carry = 0;
            for (word, takers) in takers.iter().enumerate() {
                let taken = (self.ahead[word] | self.within[word]) & takers;
                self.within[word] = taken & self.parts[word];
                self.ahead[word] = (taken << 1) | carry;
                carry = taken >> 63;
            }
        }
    }

    /// Patterns of fewer than 64 elements: nearly all.
    fn feed_short(&mut self, bytes: &[u8]) {
        let (mut ahead, mut within, parts) = (self.ahead[0], self.within[0], self.parts[0]);
        let mut rest = bytes;
        loop {
            if within.is_power_of_two() && ahead == within << 1 {
                rest = &rest[self.idle(within.trailing_zeros() as usize, rest)..];
            }
            let Some((byte, others)) = rest.split_first() else { break };
            let taken = (ahead | within) & self.takers[usize::from(*byte)];
            within = taken & parts;
            ahead = taken << 1;
            rest = others;
            if taken == 0 {
                break;
            }
        }
        (self.ahead[0], self.within[0]) = (ahead, within);
    }

    /// How many of the next bytes change nothing, where the scan is within the part at `place` and nowhere else: most of a long key.
    fn idle(&self, place: usize, bytes: &[u8]) -> usize {
        let any = matches!(self.elements[place], Element::Part { any: true });
        let next = match self.elements.get(place + 1) {
            Some(Element::Byte(byte)) => Some(*byte),
            _ => None,
        };
        let found = match (next, any) {
            (Some(next), true) => memchr::memchr(next, bytes),
            (Some(next), false) => memchr::memchr2(next, b':', bytes),
            (None, true) => None,
            (None, false) => memchr::memchr(b':', bytes),
        };
        found.unwrap_or(bytes.len())
    }

    /// Whether the pattern cannot cover the key any more.
    pub fn is_dead(&self) -> bool {
        self.ahead.iter().chain(&self.within).all(|word| *word == 0)
    }

    /// Whether the pattern covers the key, whatever is still to come.
    pub fn is_certain(&self) -> bool {
        self.open && has(&self.within, self.elements.len() - 1)
    }

    /// Whether the pattern covers the key, if this was its end.
    pub fn matches(&self) -> bool {
        self.is_certain() || has(&self.ahead, self.elements.len())
    }
}

fn has(set: &[u64], place: usize) -> bool {
    set[place / 64] & (1 << (place % 64)) != 0
}

fn elements(pattern: &KeyPattern) -> Vec<Element> {
    let mut elements = Vec::new();
    for segment in &pattern.segments {
        match segment {
            Segment::Literal(bytes) => elements.extend(bytes.iter().map(|byte| Element::Byte(*byte))),
            Segment::Part { any, .. } => elements.push(Element::Part { any: *any }),
        }
    }
    elements
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pattern() -> impl Strategy<Value = KeyPattern> {
        let literal = prop_oneof!["[a:-]{1,3}", "[a:]{60,70}"];
        let segment = (literal, any::<bool>(), any::<bool>());
        (any::<bool>(), proptest::collection::vec(segment, 1..5), any::<bool>()).prop_map(|(lead, segments, trail)| {
            let mut text = String::new();
            for (index, (literal, any, part)) in segments.iter().enumerate() {
                if *part && (index > 0 || lead) {
                    text.push_str(&format!("{{p{index}{}}}", if *any { "…" } else { "" }));
                }
                text.push_str(literal);
            }
            if trail {
                text.push_str("{last…}");
            }
            text.parse().expect("valid")
        })
    }

    /// Keys that have a chance to fit: the pattern itself with its parts filled in, perhaps cut or changed.
    fn key(pattern: &KeyPattern, fill: &[String], cut: usize) -> Vec<u8> {
        let mut key = Vec::new();
        for (index, segment) in pattern.segments.iter().enumerate() {
            match segment {
                Segment::Literal(bytes) => key.extend_from_slice(bytes),
                Segment::Part { .. } => key.extend_from_slice(fill[index % fill.len()].as_bytes()),
            }
        }
        key.truncate(key.len().saturating_sub(cut));
        key
    }

    proptest! {
        #[test]
        fn a_scan_agrees_with_the_matcher_split_at_every_byte(
            pattern in pattern(),
            fill in proptest::collection::vec("[a:-]{0,5}", 1..4),
            cut in 0usize..4,
            noise in "[a:-]{0,12}",
            step in 1usize..9,
        ) {
            for key in [key(&pattern, &fill, cut), noise.into_bytes()] {
                for at in 0..=key.len() {
                    let mut scan = PatternScan::new(&pattern);
                    scan.feed(&key[..at]);
                    prop_assert_eq!(scan.matches(), pattern.matches(&key[..at]), "{} on {:?}", &pattern, &key[..at]);
                    key[at..].chunks(step).for_each(|piece| scan.feed(piece));
                    prop_assert_eq!(scan.matches(), pattern.matches(&key), "{} on {:?}", &pattern, &key);
                    prop_assert!(!(scan.is_dead() && scan.matches()));
                }
            }
        }
    }
}
