//! Which of several operators acts: the one that holds a Lease.
//!
//! Times of other machines are never compared with the own clock. A lease counts as abandoned once it has not changed for its duration,
//! measured here; and the holder trusts its own for less than that, from the moment that it asked. So two never act at once, however
//! their clocks differ, as long as these run at about the same speed. Written for this one use: the public crates offer no question
//! that is cheap enough to ask before each command.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

/// For how long others leave a lease alone that is not renewed.
const DURATION: Duration = Duration::from_secs(15);
/// For how long the holder trusts it: a third is left for clocks and for a command that is on its way.
const TRUSTED: Duration = Duration::from_secs(10);
/// How often it is renewed, or looked at.
const EVERY: Duration = Duration::from_secs(3);
/// As long as any process runs.
const FOR_GOOD: Duration = Duration::from_secs(100 * 365 * 86_400);
/// How long one request may take.
const REQUEST_WITHIN: Duration = Duration::from_secs(4);

/// Whether this process may act. Cheap to ask, and to be asked before each step that others could collide with.
#[derive(Debug, Clone)]
pub struct Leadership {
    until: watch::Receiver<Option<Instant>>,
    turn: Arc<AtomicU64>,
    /// Where there is no election that would end.
    _kept: Option<Arc<watch::Sender<Option<Instant>>>>,
}

impl Leadership {
    /// One that nobody takes away: there is no other operator.
    pub fn for_good() -> Self {
        let (kept, until) = watch::channel(Some(Instant::now() + FOR_GOOD));
        Self { until, turn: Arc::default(), _kept: Some(Arc::new(kept)) }
    }

    /// One that whoever holds the other end gives and takes, as tests do.
    pub fn given(until: watch::Receiver<Option<Instant>>) -> Self {
        Self { until, turn: Arc::default(), _kept: None }
    }

    /// Whether it may act now.
    pub fn holds(&self) -> bool {
        self.until.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// Counts the times that this process began to lead after another may have led. A lease that was not renewed in time, and that nobody took
    /// meanwhile, is gone on with in the same turn: what was learned before is still so.
    pub fn turn(&self) -> u64 {
        self.turn.load(Ordering::Relaxed)
    }

    /// Returns once the right to act has come. Never, where the election has ended.
    pub async fn gained(&mut self) {
        if self.until.wait_for(Option::is_some).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Returns once the right to act has gone.
    pub async fn lost(&mut self) {
        // An election that has ended leaves nobody leading.
        let _ = self.until.wait_for(Option::is_none).await;
    }
}

/// A candidate for one lease.
#[derive(Debug)]
pub struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
    until: watch::Sender<Option<Instant>>,
    /// See [`Leadership::turn`].
    turn: Arc<AtomicU64>,
    /// As whose it was last led by this process.
    reign: Option<Reign>,
    /// The lease as it was last written here.
    own: Option<Lease>,
    /// The lease as another holds it, by its version, and since when it has been so.
    seen: Option<(Option<String>, Instant)>,
}

/// What stays the same of a lease as long as nobody else holds it: it is that object, and its holder has not changed.
#[derive(Debug, PartialEq, Eq)]
struct Reign {
    uid: Option<String>,
    transitions: Option<i32>,
}

impl Reign {
    fn of(lease: &Lease) -> Self {
        let transitions = lease.spec.as_ref().and_then(|spec| spec.lease_transitions);
        Self { uid: lease.metadata.uid.clone(), transitions }
    }
}

/// Why a round of the election brought nothing.
#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error("the lease: {0}")]
    Api(#[from] kube::Error),
    #[error("the lease: the API server does not answer within {} s", REQUEST_WITHIN.as_secs())]
    Late,
}

impl Election {
    /// A candidate by the name of `identity`, which no other process has, for the lease `name` in `namespace`.
    pub fn new(client: Client, namespace: &str, name: &str, identity: &str) -> (Self, Leadership) {
        let (until, follow) = watch::channel(None);
        let election = Self {
            api: Api::namespaced(client, namespace),
            name: name.to_owned(),
            identity: identity.to_owned(),
            until,
            turn: Arc::default(),
            reign: None,
            own: None,
            seen: None,
        };
        let turn = election.turn.clone();
        (election, Leadership { until: follow, turn, _kept: None })
    }

    /// Seeks and keeps the lease until `stop` is complete, then gives it up, so that another need not wait for it.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut stop = std::pin::pin!(stop);
        loop {
            let asked = Instant::now();
            match self.round().await {
                Ok(true) => self.lead_until(asked + TRUSTED),
                Ok(false) => self.follow("another holds the lease"),
                Err(error) => {
                    warn!(%error, "the lease could not be looked at");
                    if self.until.borrow().is_some_and(|until| Instant::now() >= until) {
                        self.follow("the lease could not be renewed");
                    }
                }
            }
            tokio::select! {
                () = &mut stop => break,
                () = sleep(EVERY.mul_f64(0.9 + fastrand::f64() * 0.2)) => {}
            }
        }
        self.follow("this process ends");
        self.release().await;
    }

    fn lead_until(&mut self, until: Instant) {
        let reign = self.own.as_ref().map(Reign::of);
        if reign.is_none() || reign != self.reign {
            // Before anybody hears that this process leads.
            self.turn.fetch_add(1, Ordering::Relaxed);
            self.reign = reign;
        }
        if self.until.send_replace(Some(until)).is_none() {
            info!(lease = %self.name, identity = %self.identity, "this operator leads");
        }
    }

    fn follow(&self, why: &str) {
        let was_leading = self.until.send_replace(None).is_some();
        if was_leading {
            info!(lease = %self.name, why, "this operator leads no more");
        }
    }

    /// Looks at the lease, and takes or renews it where that is due. Whether it is held.
    async fn round(&mut self) -> Result<bool, RoundError> {
        if let Some(own) = self.own.take() {
            match self.write(own).await {
                Err(RoundError::Api(kube::Error::Api(status))) if status.code == 409 || status.code == 404 => {
                    debug!("the lease was changed by another");
                }
                // Whether it was written is not known; the next round reads it.
                outcome => return outcome,
            }
        }
        let Some(lease) = within(self.api.get_opt(&self.name)).await? else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            return self.create(Lease { metadata, spec: None }).await;
        };
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default();
        if holder != self.identity && !holder.is_empty() && !self.is_abandoned(&lease) {
            return Ok(false);
        }
        match self.write(lease).await {
            Err(RoundError::Api(kube::Error::Api(status))) if status.code == 409 => Ok(false),
            outcome => outcome,
        }
    }

    /// Whether a lease of another has not changed for as long as it promised to.
    fn is_abandoned(&mut self, lease: &Lease) -> bool {
        let promised = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).and_then(|secs| u64::try_from(secs).ok());
        let promised = promised.map_or(DURATION, Duration::from_secs);
        let version = &lease.metadata.resource_version;
        match &self.seen {
            Some((seen, since)) if seen == version => since.elapsed() >= promised,
            _ => {
                self.seen = Some((version.clone(), Instant::now()));
                false
            }
        }
    }

    async fn create(&mut self, mut lease: Lease) -> Result<bool, RoundError> {
        lease.spec = Some(self.spec(None));
        match within(self.api.create(&PostParams::default(), &lease)).await {
            Ok(lease) => self.own = Some(lease),
            Err(RoundError::Api(kube::Error::Api(status))) if status.code == 409 => return Ok(false),
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// Writes the lease as the own, if nobody changed it in between.
    async fn write(&mut self, mut lease: Lease) -> Result<bool, RoundError> {
        lease.spec = Some(self.spec(lease.spec.as_ref()));
        self.own = Some(within(self.api.replace(&self.name, &PostParams::default(), &lease)).await?);
        Ok(true)
    }

    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let kept = before.filter(|spec| spec.holder_identity.as_deref() == Some(&self.identity));
        let changes = before.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: kept.and_then(|spec| spec.acquire_time.clone()).or_else(|| Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(if kept.is_some() || before.is_none() { changes } else { changes.saturating_add(1) }),
            ..LeaseSpec::default()
        }
    }

    async fn release(&mut self) {
        let Some(mut lease) = self.own.take() else { return };
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = None;
        }
        match within(self.api.replace(&self.name, &PostParams::default(), &lease)).await {
            Ok(_) => debug!("the lease was given up"),
            Err(error) => warn!(%error, "the lease could not be given up: another takes it in {} s", DURATION.as_secs()),
        }
    }
}

async fn within<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, RoundError> {
    timeout(REQUEST_WITHIN, request).await.map_err(|_| RoundError::Late)?.map_err(RoundError::Api)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use axum::body::to_bytes;
    use axum::extract::Request;
    use axum::http::{Method, StatusCode};
    use axum::response::{IntoResponse as _, Response};
    use serde_json::{Value, json};

    use super::*;

    #[tokio::test]
    async fn leadership_ends_by_itself() {
        let (sender, until) = watch::channel(None);
        let mut leadership = Leadership::given(until);
        assert!(!leadership.holds());
        sender.send_replace(Some(Instant::now() + TRUSTED));
        leadership.gained().await;
        assert!(leadership.holds());
        let until = Instant::now() + Duration::from_millis(10);
        sender.send_replace(Some(until));
        tokio::time::sleep_until(until).await;
        assert!(!leadership.holds());
        sender.send_replace(None);
        leadership.lost().await;
        assert!(Leadership::for_good().holds());
    }

    /// An API server that keeps one Lease.
    #[derive(Clone, Default)]
    struct Keeper(Arc<Mutex<Option<Lease>>>);

    impl Keeper {
        fn client(&self) -> Client {
            let keeper = self.clone();
            let answer = move |request: Request| {
                let keeper = keeper.clone();
                async move { keeper.answer(request).await }
            };
            Client::new(axum::Router::new().fallback(answer), "default")
        }

        async fn answer(&self, request: Request) -> Response {
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, 1 << 16).await.unwrap();
            let mut kept = self.0.lock().unwrap();
            let version = |lease: &Lease| lease.metadata.resource_version.clone();
            let reply = |code: StatusCode, body: &Value| (code, body.to_string()).into_response();
            let refusal = |code: StatusCode, reason: &str| {
                let status =
                    json!({"kind": "Status", "status": "Failure", "code": code.as_u16(), "reason": reason, "message": ""});
                reply(code, &status)
            };
            let Ok(mut sent) = serde_json::from_slice::<Lease>(&body) else {
                let missing = || refusal(StatusCode::NOT_FOUND, "NotFound");
                return kept.as_ref().map_or_else(missing, |lease| reply(StatusCode::OK, &json!(lease)));
            };
            if parts.method == Method::PUT && kept.as_ref().map(version) != Some(version(&sent)) {
                return refusal(StatusCode::CONFLICT, "Conflict");
            }
            let next: u64 = kept.as_ref().and_then(version).and_then(|version| version.parse().ok()).unwrap_or(0);
            sent.metadata.resource_version = Some((next + 1).to_string());
            sent.metadata.uid.get_or_insert_with(|| "7".to_owned());
            *kept = Some(sent.clone());
            reply(StatusCode::OK, &json!(sent))
        }
    }

    #[tokio::test]
    async fn a_lease_that_nobody_took_is_gone_on_with_in_the_same_turn() {
        let keeper = Keeper::default();
        let candidate = |identity: &str| Election::new(keeper.client(), "larder-system", "larder-operator", identity);
        let ((mut one, leads), (mut other, _)) = (candidate("one"), candidate("other"));
        let mut turns = Vec::new();
        let mut lead = async |election: &mut Election| {
            assert!(election.round().await.unwrap());
            election.lead_until(Instant::now() + TRUSTED);
            turns.push(leads.turn());
        };
        lead(&mut one).await;
        lead(&mut one).await;
        one.follow("it could not be renewed");
        lead(&mut one).await;
        // Whether the last request arrived is not known.
        (one.own, one.seen) = (None, None);
        one.follow("it could not be renewed");
        lead(&mut one).await;
        one.release().await;
        one.follow("another may take it");
        lead(&mut one).await;
        one.release().await;
        assert!(other.round().await.unwrap());
        other.release().await;
        one.follow("another has had it");
        lead(&mut one).await;
        assert_eq!(turns, [1, 1, 1, 1, 2, 3]);
    }

    #[test]
    fn the_holder_stops_before_others_begin() {
        // A request that was sent in the last moment has the rest to arrive in.
        assert!(TRUSTED + REQUEST_WITHIN < DURATION && EVERY * 2 + REQUEST_WITHIN <= TRUSTED);
    }
}
