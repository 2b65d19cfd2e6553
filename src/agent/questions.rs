//! Asks those who vote and peers' agents, all at once, each with a deadline.

use futures_util::future::join_all;
use tracing::debug;

use super::ballot::{self, Ballot};
use super::boot::{PeerAnswer, PeerView, Situation, Vote, Voters};
use super::charge::{Charge, PeerPlace};
use super::line::{DEADLINE, Line, LineError};
use super::peers::PeerClient;
use crate::policy::agent::{DataState, ServerPhase, StateReport, VERSION};
use crate::sidecar::upstream::access::{Access, ClusterAccess};
use crate::sidecar::upstream::admin_client::Value;
use crate::sidecar::upstream::node::NodeAddr;

/// The longest report that is read.
const MAX_REPORT_BYTES: usize = 64 * 1024;

/// What a server that is to start holds and remembers.
#[derive(Debug, Clone, PartialEq)]
pub struct Own {
    /// Its data.
    pub data: DataState,
    /// The epoch with which it would claim slots of a Cluster.
    pub claim: Option<u64>,
}

/// Asks everybody. In a Cluster also what was said by whom.
pub async fn situation(charge: &Charge, access: &ClusterAccess, http: &PeerClient, own: &Own) -> (Situation, Ballot) {
    let in_cluster = charge.cluster.is_some();
    let peers = join_all(charge.peers.iter().map(|peer| ask_peer(http, peer, in_cluster)));
    let (voters, peers, ballot) = if in_cluster {
        let (peers, ballot) = tokio::join!(peers, ballot::hold(charge, &access.servers));
        (Voters::Primaries, peers, ballot)
    } else {
        let (peers, votes) = tokio::join!(peers, ask_sentinels(charge, &access.sentinels));
        (Voters::Sentinels, peers, Ballot::of(votes))
    };
    let situation = Situation {
        ordinal: charge.config.server.ordinal,
        address: charge.address.clone(),
        own: own.data.clone(),
        claim: own.claim,
        peers,
        voters,
        votes: ballot.votes.clone(),
        accept_data_loss: charge.config.recovery.accept_data_loss,
    };
    (situation, ballot)
}

/// What each sentinel says of the primary.
pub async fn ask_sentinels(charge: &Charge, access: &Access) -> Vec<Vote> {
    join_all(charge.sentinels.iter().map(|sentinel| async {
        let mut line = Line::new(sentinel.clone(), access.clone());
        match line.ask(&["SENTINEL", "MASTER", &charge.master]).await {
            Ok(answer) => parse_master(&answer),
            Err(LineError::Refused { text, .. }) if text.starts_with("ERR No such master") => Vote::KnowsNone,
            Err(error) => {
                debug!(%error, "a sentinel does not answer");
                Vote::Unreachable
            }
        }
    }))
    .await
}

fn parse_master(answer: &Value) -> Vote {
    let text = |name: &str| answer.field(name).and_then(Value::as_str);
    let port = answer.field("port").and_then(Value::as_int).and_then(|port| u16::try_from(port).ok());
    let (Some(host), Some(port)) = (text("ip"), port) else { return Vote::Unreachable };
    let failing_over = text("flags").is_some_and(|flags| flags.split(',').any(|flag| flag == "failover_in_progress"));
    Vote::Names { primary: NodeAddr::new(host, port), claim: None, failing_over }
}

async fn ask_peer(http: &PeerClient, peer: &PeerPlace, in_cluster: bool) -> PeerView {
    let answer = match fetch(http, peer).await {
        Ok(report) => {
            PeerAnswer::State { acts_as_primary: acts_as_primary(&report, in_cluster), data: report.data, claim: report.claim }
        }
        Err(error) => {
            debug!(agent = %peer.agent, %error, "a peer's agent does not answer");
            PeerAnswer::Unreachable
        }
    };
    PeerView { ordinal: peer.ordinal, address: peer.address.clone(), answer }
}

/// A primary of a Cluster that owns no slots is none that anybody follows.
fn acts_as_primary(report: &StateReport, in_cluster: bool) -> bool {
    match &report.server {
        ServerPhase::Primary => !in_cluster || report.claim.is_some(),
        ServerPhase::Starting { as_primary: true } => true,
        ServerPhase::Starting { as_primary: false }
        | ServerPhase::Replica { .. }
        | ServerPhase::Held { .. }
        | ServerPhase::Deciding
        | ServerPhase::Stopping => false,
    }
}

/// Why a peer's report is not there.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    #[error("the report has more than {MAX_REPORT_BYTES} bytes")]
    TooLarge,
    #[error("the report cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the report is server {found}'s, not server {wanted}'s")]
    Other { found: u16, wanted: u16 },
    #[error("the report has form {0}, newer than {VERSION}")]
    TooNew(u32),
}

async fn fetch(http: &PeerClient, peer: &PeerPlace) -> Result<StateReport, FetchError> {
    let (scheme, client) = http.current()?;
    let request = client.get(format!("{scheme}://{}/state", peer.agent)).timeout(DEADLINE);
    let mut response = request.send().await?.error_for_status()?;
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > MAX_REPORT_BYTES {
            return Err(FetchError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    let report: StateReport = serde_json::from_slice(&body)?;
    if report.version > VERSION {
        return Err(FetchError::TooNew(report.version));
    }
    // An address may have gone to another pod.
    if report.ordinal != peer.ordinal {
        return Err(FetchError::Other { found: report.ordinal, wanted: peer.ordinal });
    }
    Ok(report)
}
