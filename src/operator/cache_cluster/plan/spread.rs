//! Whether the members are spread over enough nodes.

use std::collections::BTreeMap;

use super::{Member, Observed};

/// One node carries a majority of the sentinels: with it, nobody could fail over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crowded {
    /// The node's name.
    pub node: String,
    /// How many sentinels it carries.
    pub sentinels: usize,
    /// Of how many.
    pub of: usize,
}

/// The node that carries a majority of the sentinels, if one does.
pub fn crowded(observed: &Observed) -> Option<Crowded> {
    let of = observed.sentinels.len();
    let mut nodes: BTreeMap<&str, usize> = BTreeMap::new();
    for (member, pod) in &observed.pods {
        if let (Member::Sentinel(_), Some(node)) = (member, &pod.node) {
            *nodes.entry(&node.name).or_default() += 1;
        }
    }
    let crowded = nodes.into_iter().find(|(_, sentinels)| *sentinels > of / 2);
    crowded.map(|(node, sentinels)| Crowded { node: node.to_owned(), sentinels, of })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::cache_cluster::plan::{Node, Pod, Sentinel, SentinelId};

    fn on(nodes: &[Option<&str>]) -> Observed {
        let mut observed = Observed::default();
        for (index, node) in nodes.iter().enumerate() {
            let id = SentinelId(index as u16);
            let node = node.map(|name| Node { name: name.to_owned(), ready: true });
            let pod = Pod { uid: String::new(), revision: None, node, started: true, ready: true, deleting: false };
            observed.sentinels.insert(id, Sentinel::Running { watch: None });
            observed.pods.insert(Member::Sentinel(id), pod);
        }
        observed
    }

    #[test]
    fn a_majority_on_one_node_is_told() {
        assert_eq!(crowded(&on(&[Some("a"), Some("b"), Some("c")])), None);
        let two_of_three = Crowded { node: "b".into(), sentinels: 2, of: 3 };
        assert_eq!(crowded(&on(&[Some("a"), Some("b"), Some("b")])), Some(two_of_three));
        assert_eq!(crowded(&on(&[Some("a"), Some("b"), Some("b"), Some("c"), Some("c")])), None);
        assert_eq!(crowded(&on(&[Some("a"), None, None])), None);
    }
}
