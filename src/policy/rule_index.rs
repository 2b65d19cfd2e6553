//! Finds the first rule that covers a key, at a cost that does not grow with the number of rules.

use super::pattern::KeyPattern;

/// A trie over the literal prefixes of patterns. A look-up walks the key's first bytes once and tries only the patterns whose
/// prefix it passed.
#[derive(Debug, Clone, Default)]
pub struct RuleIndex {
    patterns: Vec<KeyPattern>,
    nodes: Vec<Node>,
}

#[derive(Debug, Clone, Default)]
struct Node {
    /// Rules whose literal prefix ends here, in order.
    rules: Vec<u32>,
    /// Sorted by byte.
    children: Vec<(u8, u32)>,
}

impl RuleIndex {
    /// An index over `patterns`, whose order is the order of precedence.
    pub fn new(patterns: impl IntoIterator<Item = KeyPattern>) -> Self {
        let mut index = Self { patterns: Vec::new(), nodes: vec![Node::default()] };
        for pattern in patterns {
            index.insert(pattern);
        }
        index
    }

    fn insert(&mut self, pattern: KeyPattern) {
        let rule = self.patterns.len() as u32;
        let mut at = 0usize;
        for byte in pattern.literal_prefix() {
            at = match self.nodes[at].children.binary_search_by_key(byte, |child| child.0) {
                Ok(found) => self.nodes[at].children[found].1 as usize,
                Err(place) => {
                    let fresh = self.nodes.len();
                    self.nodes.push(Node::default());
                    self.nodes[at].children.insert(place, (*byte, fresh as u32));
                    fresh
                }
            };
        }
        self.nodes[at].rules.push(rule);
        self.patterns.push(pattern);
    }

    /// The position of the first pattern that covers `key`.
    pub fn find(&self, key: &[u8]) -> Option<usize> {
        let mut best: Option<u32> = None;
        let mut node = self.nodes.first()?;
        let mut rest = key.iter();
        loop {
            for rule in &node.rules {
                if best.is_some_and(|found| found <= *rule) {
                    break;
                }
                if self.patterns[*rule as usize].matches(key) {
                    best = Some(*rule);
                    break;
                }
            }
            let Some(byte) = rest.next() else { break };
            // Most nodes have one child.
            let next = match node.children.as_slice() {
                [] => break,
                [(only, child)] if only == byte => *child,
                [_] => break,
                children => match children.binary_search_by_key(byte, |child| child.0) {
                    Ok(found) => children[found].1,
                    Err(_) => break,
                },
            };
            node = &self.nodes[next as usize];
        }
        best.map(|rule| rule as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POOL: [&str; 9] = ["a:{x}", "a:b", "a:{x}:{y}", "ab:{x}", "{x}", "{x…}", "b{x}", "a{x…}", "ab:{x…}"];

    proptest! {
        #[test]
        fn the_index_agrees_with_trying_each_rule_in_turn(
            chosen in proptest::collection::vec(0..POOL.len(), 0..6),
            key in "[ab:]{0,6}",
        ) {
            let patterns: Vec<KeyPattern> = chosen.iter().map(|at| POOL[*at].parse().expect("valid")).collect();
            let naive = patterns.iter().position(|pattern| pattern.matches(key.as_bytes()));
            prop_assert_eq!(RuleIndex::new(patterns).find(key.as_bytes()), naive);
        }
    }
}
