//! Finds the first rule that covers a key, at a cost that does not grow with the number of rules.

use super::pattern::{KeyPattern, MAX_PATTERN_BYTES};
use super::pattern_scan::PatternScan;

/// A radix tree over the literal prefixes of patterns. A look-up walks the key's first bytes once and tries only the patterns whose
/// prefix it passed.
#[derive(Debug, Clone, Default)]
pub struct RuleIndex {
    patterns: Vec<KeyPattern>,
    nodes: Vec<Node>,
}

#[derive(Debug, Clone, Default)]
struct Node {
    /// What stands between the parent's prefix and this one's. Empty at the root alone.
    label: Box<[u8]>,
    /// Rules whose literal prefix ends here, in order.
    rules: Vec<u32>,
    /// By the first byte of their labels, in order.
    children: Vec<(u8, u32)>,
}

impl RuleIndex {
    /// An index over `patterns`, whose order is the order of precedence.
    pub fn new(patterns: impl IntoIterator<Item = KeyPattern>) -> Self {
        let mut index = Self { patterns: Vec::new(), nodes: vec![Node::default()] };
        for pattern in patterns {
            let at = index.node_of(pattern.literal_prefix());
            index.nodes[at].rules.push(index.patterns.len() as u32);
            index.patterns.push(pattern);
        }
        index
    }

    /// The node of a prefix, which is made where there is none.
    fn node_of(&mut self, prefix: &[u8]) -> usize {
        let (mut at, mut rest) = (0, prefix);
        while let Some(first) = rest.first() {
            let place = match self.nodes[at].children.binary_search_by_key(first, |child| child.0) {
                Ok(place) => place,
                Err(place) => {
                    let leaf = self.add(Node { label: rest.into(), ..Node::default() });
                    self.nodes[at].children.insert(place, (*first, leaf as u32));
                    return leaf;
                }
            };
            let child = self.nodes[at].children[place].1 as usize;
            let shared = self.nodes[child].label.iter().zip(rest).take_while(|(own, other)| own == other).count();
            if shared < self.nodes[child].label.len() {
                self.split(child, shared);
            }
            (at, rest) = (child, &rest[shared..]);
        }
        at
    }

    fn add(&mut self, node: Node) -> usize {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// Cuts a node's label after `kept` bytes: a child of its own takes the rest, and all that hung from it.
    fn split(&mut self, node: usize, kept: usize) {
        let Node { label, rules, children } = std::mem::take(&mut self.nodes[node]);
        let lower = self.add(Node { label: label[kept..].into(), rules, children });
        self.nodes[node] = Node { label: label[..kept].into(), rules: Vec::new(), children: vec![(label[kept], lower as u32)] };
    }

    /// The position of the first pattern that covers `key`.
    #[inline]
    pub fn find(&self, key: &[u8]) -> Option<usize> {
        let mut best: Option<u32> = None;
        self.walk(key, |rules, passed| {
            for rule in rules {
                if best.is_some_and(|found| found <= *rule) {
                    break;
                }
                if self.patterns[*rule as usize].matches_behind(key, passed) {
                    best = Some(*rule);
                    break;
                }
            }
        });
        best.map(|rule| rule as usize)
    }

    /// Visits the rules whose literal prefix `key` begins with, those of one prefix at a time, in order, with the prefix's length.
    #[inline]
    fn walk(&self, key: &[u8], mut visit: impl FnMut(&[u32], usize)) {
        let Some(mut node) = self.nodes.first() else { return };
        let mut passed = 0;
        loop {
            visit(&node.rules, passed);
            let Some(first) = key.get(passed) else { break };
            // Most nodes have one child.
            let next = match node.children.as_slice() {
                [] => break,
                [(only, child)] if only == first => *child,
                [_] => break,
                children => match children.binary_search_by_key(first, |child| child.0) {
                    Ok(found) => children[found].1,
                    Err(_) => break,
                },
            };
            node = &self.nodes[next as usize];
            if !key[passed..].starts_with(&node.label) {
                break;
            }
            passed += node.label.len();
        }
    }
}

/// The search for the first pattern that covers a key which comes in pieces; the same as [`RuleIndex::find`] of the whole.
#[derive(Debug, Clone, Default)]
pub struct RuleScan {
    /// The start of the key, until it is longer than any literal prefix.
    head: Vec<u8>,
    /// Then the patterns that may still cover it, in order.
    candidates: Option<Vec<(u32, PatternScan)>>,
}

impl RuleScan {
    /// Takes the next bytes of the key. `index` is the same each time.
    pub fn feed(&mut self, index: &RuleIndex, bytes: &[u8]) {
        let Some(candidates) = &mut self.candidates else { return self.feed_head(index, bytes) };
        candidates.iter_mut().for_each(|(_, scan)| scan.feed(bytes));
        candidates.retain(|(_, scan)| !scan.is_dead());
        if let Some(certain) = candidates.iter().position(|(_, scan)| scan.is_certain()) {
            candidates.truncate(certain + 1);
        }
    }

    fn feed_head(&mut self, index: &RuleIndex, bytes: &[u8]) {
        let (head, rest) = bytes.split_at(bytes.len().min(MAX_PATTERN_BYTES + 1 - self.head.len()));
        self.head.extend_from_slice(head);
        if self.head.len() > MAX_PATTERN_BYTES {
            let mut rules = Vec::new();
            index.walk(&self.head, |found, _| rules.extend_from_slice(found));
            rules.sort_unstable();
            let scan = |rule: u32| (rule, PatternScan::new(&index.patterns[rule as usize]));
            self.candidates = Some(rules.into_iter().map(scan).collect());
            let head = std::mem::take(&mut self.head);
            self.feed(index, &head);
            self.feed(index, rest);
        }
    }

    /// The position of the first pattern that covers the key, at its end.
    pub fn finish(&self, index: &RuleIndex) -> Option<usize> {
        match &self.candidates {
            None => index.find(&self.head),
            Some(candidates) => candidates.iter().find(|(_, scan)| scan.matches()).map(|(rule, _)| *rule as usize),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POOL: [&str; 12] =
        ["a:{x}", "a:b", "a:{x}:{y}", "ab:{x}", "{x}", "{x…}", "b{x}", "a{x…}", "ab:{x…}", "abab{x}", "ab:b:{x}-{y}", "aba"];

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

        #[test]
        fn a_long_key_in_pieces_finds_the_same_rule(
            chosen in proptest::collection::vec(0..POOL.len(), 0..6),
            start in "[ab:]{0,4}",
            filler in "[ab:]",
            length in 500usize..1200,
            end in "[ab:]{0,2}",
            step in 1usize..700,
        ) {
            let index = RuleIndex::new(chosen.iter().map(|at| POOL[*at].parse::<KeyPattern>().expect("valid")));
            let key = [start, filler.repeat(length), end].concat();
            let mut scan = RuleScan::default();
            key.as_bytes().chunks(step).for_each(|piece| scan.feed(&index, piece));
            prop_assert_eq!(scan.finish(&index), index.find(key.as_bytes()));
        }
    }
}
