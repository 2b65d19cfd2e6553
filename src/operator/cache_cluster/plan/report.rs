//! What an agent tells of its server, as the planner's facts.

use std::net::SocketAddr;

use super::observed::{Facts, Held, Link, Role, ServerState};
use crate::policy::agent::{DataState, ServerPhase, StateReport};

impl From<&StateReport> for ServerState {
    fn from(report: &StateReport) -> Self {
        let data = &report.data;
        match &report.server {
            ServerPhase::Held { reason, message } => {
                Self::Held(Held { reason: reason.clone(), message: message.clone(), data: data.clone() })
            }
            ServerPhase::Primary => Self::Running(facts(data, Role::Primary)),
            ServerPhase::Replica { of, link_up } => {
                let link = if *link_up { Link::Up } else { Link::Down };
                // Announced addresses are numeric; anything else is not the tier's own.
                match of.parse::<SocketAddr>() {
                    Ok(of) => Self::Running(facts(data, Role::Replica { of, link })),
                    Err(_) => Self::Starting(data.clone()),
                }
            }
            ServerPhase::Deciding | ServerPhase::Starting { .. } | ServerPhase::Stopping => Self::Starting(data.clone()),
        }
    }
}

fn facts(data: &DataState, role: Role) -> Facts {
    let position = match data {
        DataState::Complete(position) => Some(position),
        DataState::Empty | DataState::Partial => None,
    };
    Facts {
        role,
        holds_data: *data != DataState::Empty,
        offset: position.map_or(0, |position| position.offset),
        lineage: position.map(|position| position.lineage.clone()),
        // An agent lets Sentinel promote what has synchronised.
        promotable: position.is_some() || matches!(role, Role::Primary | Role::Replica { link: Link::Up, .. }),
        cluster: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::agent::{Position, Proved};

    fn state(data: DataState, server: ServerPhase) -> ServerState {
        ServerState::from(&StateReport {
            version: 1,
            ordinal: 0,
            address: None,
            generation: 1,
            data,
            claim: None,
            server,
            proved: Proved::default(),
        })
    }

    fn position(offset: u64) -> DataState {
        DataState::Complete(Position { lineage: "aa".into(), offset, led: false, exact: true })
    }

    #[test]
    fn a_replica_in_step_is_read() {
        let server = ServerPhase::Replica { of: "10.96.0.10:6379".into(), link_up: true };
        let ServerState::Running(facts) = state(position(42), server) else { panic!("it runs") };
        assert_eq!(facts.role, Role::Replica { of: SocketAddr::from(([10, 96, 0, 10], 6379)), link: Link::Up });
        assert_eq!((facts.holds_data, facts.offset, facts.lineage.as_deref(), facts.promotable), (true, 42, Some("aa"), true));
    }

    #[test]
    fn a_copy_under_way_is_no_candidate() {
        let server = ServerPhase::Replica { of: "[fd00::1]:6379".into(), link_up: false };
        let ServerState::Running(facts) = state(DataState::Partial, server) else { panic!("it runs") };
        assert_eq!((facts.holds_data, facts.lineage, facts.promotable), (true, None, false));
    }

    #[test]
    fn a_held_server_says_why() {
        let held = ServerPhase::Held { reason: "PeerAhead".into(), message: "why".into() };
        let ServerState::Held(held) = state(DataState::Empty, held) else { panic!("it is held") };
        assert_eq!((held.reason.as_str(), held.message.as_str(), held.data), ("PeerAhead", "why", DataState::Empty));
    }

    #[test]
    fn what_does_not_serve_yet_tells_what_it_would_start_with() {
        for phase in [ServerPhase::Deciding, ServerPhase::Starting { as_primary: true }, ServerPhase::Stopping] {
            assert_eq!(state(position(1), phase), ServerState::Starting(position(1)));
        }
        let elsewhere = ServerPhase::Replica { of: "cache.example:6379".into(), link_up: true };
        assert_eq!(state(position(1), elsewhere), ServerState::Starting(position(1)));
    }
}
