//! Those of the planner's steps that are one command to one server of a Cluster, for either actuator. Pure.

use std::net::SocketAddr;

use super::plan::{Action, NodeId, ServerId};

/// A command, and who is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Which server.
    pub server: ServerId,
    /// The command, with its subcommand.
    pub command: &'static str,
    /// What follows.
    pub arguments: Vec<String>,
}

/// The command that is the whole of a step; `at` says where a server and its bus listen. `None` where a step takes more than one, or
/// is about a server that has no place.
pub fn step(action: &Action, at: impl Fn(ServerId) -> Option<(SocketAddr, u16)>) -> Option<Step> {
    let step = |server: &ServerId, command, arguments| Some(Step { server: *server, command, arguments });
    match action {
        Action::ClusterMeet { server, peer } => {
            let (address, bus_port) = at(*peer)?;
            let arguments = vec![address.ip().to_string(), address.port().to_string(), bus_port.to_string()];
            step(server, "CLUSTER MEET", arguments)
        }
        Action::AddSlots { server, slots } => {
            let bounds = slots.iter().flat_map(|range| [range.first.to_string(), range.last.to_string()]);
            step(server, "CLUSTER ADDSLOTSRANGE", bounds.collect())
        }
        Action::ClusterReplicate { server, primary: NodeId(id) } => step(server, "CLUSTER REPLICATE", vec![id.clone()]),
        Action::ClusterForget { server, node: NodeId(id) } => step(server, "CLUSTER FORGET", vec![id.clone()]),
        Action::BumpEpoch { server } => step(server, "CLUSTER BUMPEPOCH", Vec::new()),
        Action::ClusterTakeover { server } => step(server, "CLUSTER FAILOVER", vec!["TAKEOVER".to_owned()]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::SlotRange;
    use super::*;

    #[test]
    fn steps_are_commands() {
        let (zero, one) = (ServerId { shard: 0, index: 0 }, ServerId { shard: 0, index: 1 });
        let at = |id: ServerId| (id == one).then(|| (SocketAddr::from(([10, 96, 0, 1], 6379)), 16379));
        let told = |action: Action| {
            let Step { server, command, arguments } = step(&action, at)?;
            Some((server, format!("{command} {}", arguments.join(" ")).trim_end().to_owned()))
        };
        let meet = told(Action::ClusterMeet { server: zero, peer: one });
        assert_eq!(meet, Some((zero, "CLUSTER MEET 10.96.0.1 6379 16379".to_owned())));
        assert_eq!(told(Action::ClusterMeet { server: one, peer: zero }), None, "it has no place");
        let slots = vec![SlotRange { first: 0, last: 5 }, SlotRange { first: 7, last: 7 }];
        let add = told(Action::AddSlots { server: one, slots });
        assert_eq!(add, Some((one, "CLUSTER ADDSLOTSRANGE 0 5 7 7".to_owned())));
        let takeover = told(Action::ClusterTakeover { server: one });
        assert_eq!(takeover, Some((one, "CLUSTER FAILOVER TAKEOVER".to_owned())));
        assert_eq!(told(Action::Promote { server: one }), None);
    }
}
