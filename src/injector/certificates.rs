//! Why the API server believes the webhooks: a certificate of an authority of its own, which stands in their configurations.
//!
//! All that is remembered is one JSON document in one Secret, as for CacheClusters; every replica serves what it says. The leader alone
//! writes it, and puts whom it trusts into the configurations: of the webhook that changes pods, and of those that judge
//! policies and CacheClusters.
//! While there is nothing to serve, any replica writes the first: where an upgrade brings the injector, a leader of the release before knows
//! nothing of it, and stays until a new replica is ready.
//! An authority is replaced in the same steps: both have named the new one beside the old for a month before it signs, and the old one
//! beside the new for a month after. So whichever replica answers, and however late the API servers read them, the answer is believed.
//!
//! The chart makes all three objects; to make others takes no right. A configuration that somebody removed holds nothing up.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt as _};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watch_object};
use kube::{Api, Client, Resource};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::operator::api_error;
use crate::operator::cache_cluster::pki::{Certified, IssueError, Pki, Subjects};
use crate::operator::election::Leadership;

/// The entry of the Secret.
const STATE: &str = "pki.json";
/// How often it is looked at without an occasion: certificates are renewed a month before their end.
const LOOK_EVERY: Duration = Duration::from_secs(3600);
/// How soon after a failure.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// How long one request may take.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);

/// What certificates are served from, and where they are believed.
#[derive(Debug, Clone)]
pub struct Places {
    /// The namespace of the Secret.
    pub namespace: String,
    /// The Secret.
    pub secret: String,
    /// The MutatingWebhookConfiguration, and the ValidatingWebhookConfiguration of the same name.
    pub configuration: String,
    /// The names under which the API server finds the webhooks.
    pub hosts: BTreeSet<String>,
}

/// Why nothing could be done. Each text ends in the remedy.
#[derive(Debug, thiserror::Error)]
enum KeepError {
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error("{what}: {}: {}", api_error::describe(source), api_error::remedy(source))]
    Api { what: &'static str, source: kube::Error },
    #[error("{what}: the API server does not answer within {} s: it is asked again", REQUEST_WITHIN.as_secs())]
    Late { what: &'static str },
}

/// Keeps both objects while this process leads, or while there is nothing to serve, and has `served` follow the Secret. Never ends.
pub async fn keep(
    client: Client,
    places: Places,
    leadership: Leadership,
    served: watch::Sender<Option<Arc<ServerConfig>>>,
    tell: watch::Sender<String>,
) {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &places.namespace);
    let (changing, judging) = (Configured::of(&client), Configured::of(&client));
    let mut found_secrets = std::pin::pin!(watch_object(secrets.clone(), &places.secret).default_backoff());
    let mut found_changing = std::pin::pin!(watch_object(changing.api.clone(), &places.configuration).default_backoff());
    let mut found_judging = std::pin::pin!(watch_object(judging.api.clone(), &places.configuration).default_backoff());
    let (mut gained, mut lost) = (leadership.clone(), leadership.clone());
    let mut keeper = Keeper { places, secrets, secret: None, changing, judging };
    let (mut leads, mut pause) = (false, LOOK_EVERY);
    loop {
        tokio::select! {
            secret = next("Secret", &mut found_secrets) => {
                keeper.secret = secret;
                keeper.publish(&served, &tell);
            }
            found = next("MutatingWebhookConfiguration", &mut found_changing) => keeper.changing.found = Some(found),
            found = next("ValidatingWebhookConfiguration", &mut found_judging) => keeper.judging.found = Some(found),
            () = gained.gained(), if !leads => leads = true,
            () = lost.lost(), if leads => leads = false,
            () = sleep(pause) => {}
        }
        pause = LOOK_EVERY;
        if (leads && leadership.holds() || keeper.is_vacant())
            && let Err(error) = keeper.settle(SystemTime::now()).await
        {
            warn!(%error, "the webhook's certificate could not be seen to");
            pause = LOOK_AGAIN;
        }
    }
}

/// The next state of an object that is watched; `None`: there is none.
async fn next<K>(kind: &'static str, events: &mut (impl Stream<Item = watcher::Result<Option<K>>> + Unpin)) -> Option<K> {
    loop {
        match events.next().await {
            Some(Ok(object)) => return object,
            Some(Err(error)) => {
                if let Some((error, remedy)) = api_error::of_watch(&error) {
                    warn!(kind, error, "a watch of the injector failed and begins again: {remedy}");
                }
            }
            // A watch does not end; if it did, others would still be heard.
            None => std::future::pending().await,
        }
    }
}

/// What leads the API server to webhooks, and says whom it believes there.
trait Configuration: Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned {
    /// Each webhook's name, and the authorities that are believed.
    fn webhooks(&self) -> Vec<(&str, Option<&ByteString>)>;
}

impl Configuration for MutatingWebhookConfiguration {
    fn webhooks(&self) -> Vec<(&str, Option<&ByteString>)> {
        let webhooks = self.webhooks.iter().flatten();
        webhooks.map(|webhook| (webhook.name.as_str(), webhook.client_config.ca_bundle.as_ref())).collect()
    }
}

impl Configuration for ValidatingWebhookConfiguration {
    fn webhooks(&self) -> Vec<(&str, Option<&ByteString>)> {
        let webhooks = self.webhooks.iter().flatten();
        webhooks.map(|webhook| (webhook.name.as_str(), webhook.client_config.ca_bundle.as_ref())).collect()
    }
}

/// Whether each webhook of a configuration trusts whom it should. Where there is no configuration, nobody is to.
fn trusts<C: Configuration>(found: Option<&C>, bundle: &ByteString) -> bool {
    found.is_none_or(|found| found.webhooks().iter().all(|(_, trusted)| *trusted == Some(bundle)))
}

/// One configuration.
struct Configured<C> {
    api: Api<C>,
    /// `None`: not known yet. `Some(None)`: there is none.
    found: Option<Option<C>>,
}

impl<C: Configuration<DynamicType = ()>> Configured<C> {
    fn of(client: &Client) -> Self {
        Self { api: Api::all(client.clone()), found: None }
    }

    /// See [`trusts`].
    fn trusts(&self, bundle: &ByteString) -> bool {
        self.found.as_ref().is_some_and(|found| trusts(found.as_ref(), bundle))
    }

    /// Puts whom the API server is to trust into it, where it says otherwise.
    async fn announce(&self, bundle: &ByteString) -> Result<(), KeepError> {
        let Some(Some(found)) = self.found.as_ref().filter(|_| !self.trusts(bundle)) else { return Ok(()) };
        let webhooks: Vec<_> =
            found.webhooks().iter().map(|(name, _)| json!({"name": name, "clientConfig": {"caBundle": bundle}})).collect();
        // By name, so that nothing else of them is touched.
        let patch = json!({"metadata": {"resourceVersion": found.meta().resource_version}, "webhooks": webhooks});
        let name = found.meta().name.as_deref().unwrap_or_default();
        let (how, patch) = (PatchParams::default(), Patch::Strategic(&patch));
        within("the webhooks' configuration", self.api.patch(name, &how, &patch)).await?;
        info!(kind = %C::kind(&()), name, "the API server is told whom to believe");
        Ok(())
    }
}

struct Keeper {
    places: Places,
    secrets: Api<Secret>,
    secret: Option<Secret>,
    changing: Configured<MutatingWebhookConfiguration>,
    judging: Configured<ValidatingWebhookConfiguration>,
}

impl Keeper {
    /// What the Secret remembers. One that cannot be read is begun anew.
    fn remembered(&self) -> Pki {
        let data = self.secret.as_ref().and_then(|secret| secret.data.as_ref()?.get(STATE));
        let parsed = data.map(|ByteString(json)| Pki::parse(json));
        match parsed {
            Some(Ok(pki)) => pki,
            // Its text may hold keys.
            Some(Err(_)) => {
                warn!(secret = self.places.secret, "the Secret holds no certificates of ours: they are made anew");
                Pki::default()
            }
            None => Pki::default(),
        }
    }

    /// Has the certificate served that the Secret holds now.
    fn publish(&self, served: &watch::Sender<Option<Arc<ServerConfig>>>, tell: &watch::Sender<String>) {
        let pki = self.remembered();
        let Some(certified) = pki.servers() else {
            let Places { namespace, secret, .. } = &self.places;
            let missing = if self.secret.is_some() { "the certificate in" } else { "the chart to make" };
            return drop(tell.send_replace(format!("{missing} the Secret {namespace}/{secret}")));
        };
        match server_config(certified) {
            Ok(config) => {
                served.send_replace(Some(Arc::new(config)));
                tell.send_replace(String::new());
                info!(fingerprint = certified.fingerprint(), "the webhook's certificate is served");
            }
            Err(error) => warn!(%error, "the webhook's certificate cannot be served; the one before stays"),
        }
    }

    /// Whether the Secret is there, and nothing in it that could be served.
    fn is_vacant(&self) -> bool {
        self.secret.is_some() && self.remembered().servers().is_none()
    }

    /// Makes what is due, one step at a time: each is followed by an event, which leads here again.
    async fn settle(&self, now: SystemTime) -> Result<(), KeepError> {
        let Some(secret) = &self.secret else { return Ok(()) };
        let pki = self.remembered();
        let bundle = ByteString(pki.bundle().into_bytes());
        let everybody_trusts = self.changing.trusts(&bundle) && self.judging.trusts(&bundle);
        let next = pki.next(&self.places.subjects(), everybody_trusts, now)?;
        if next != pki {
            let patch = json!({
                // Nobody else has written it since.
                "metadata": {"resourceVersion": secret.metadata.resource_version},
                "data": {STATE: ByteString(next.to_json().into_bytes())},
            });
            let (how, patch) = (PatchParams::default(), Patch::Merge(&patch));
            within("the webhook's Secret", self.secrets.patch(&self.places.secret, &how, &patch)).await?;
            info!(generation = next.generation(), "the webhook's certificates were written");
        } else {
            self.changing.announce(&bundle).await?;
            self.judging.announce(&bundle).await?;
        }
        Ok(())
    }
}

impl Places {
    fn subjects(&self) -> Subjects {
        Subjects { cluster: self.configuration.clone(), servers: self.hosts.clone(), sentinels: BTreeSet::new(), rotation: None }
    }
}

/// A request in time. That another was first is no failure: what it wrote is an event.
async fn within<T>(what: &'static str, request: impl Future<Output = Result<T, kube::Error>>) -> Result<(), KeepError> {
    match tokio::time::timeout(REQUEST_WITHIN, request).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(kube::Error::Api(status))) if status.code == 409 => Ok(()),
        Ok(Err(source)) => Err(KeepError::Api { what, source }),
        Err(_) => Err(KeepError::Late { what }),
    }
}

fn server_config(certified: &Certified) -> Result<ServerConfig, rustls::Error> {
    let refuse = |error: rustls::pki_types::pem::Error| rustls::Error::General(error.to_string());
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certified.certificate().as_bytes()).collect();
    let key = PrivateKeyDer::from_pem_slice(certified.key().as_bytes()).map_err(refuse)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    builder.with_no_client_auth().with_single_cert(chain.map_err(refuse)?, key)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use rustls::RootCertStore;
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier as _;
    use rustls::pki_types::{ServerName, UnixTime};

    use super::*;

    const HOST: &str = "larder-injector.system.svc";
    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn places() -> Places {
        Places {
            namespace: "system".to_owned(),
            secret: "larder-injector".to_owned(),
            configuration: "system-larder-injector".to_owned(),
            hosts: [HOST.to_owned()].into(),
        }
    }

    /// Whether an API server that trusts a bundle believes a certificate at this time.
    fn believes(bundle: &str, certified: &Certified, now: SystemTime) -> bool {
        let mut roots = RootCertStore::empty();
        CertificateDer::pem_slice_iter(bundle.as_bytes()).for_each(|one| roots.add(one.unwrap()).unwrap());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        let certificate = CertificateDer::from_pem_slice(certified.certificate().as_bytes()).unwrap();
        let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap());
        verifier.verify_server_cert(&certificate, &[], &ServerName::try_from(HOST).unwrap(), &[], now).is_ok()
    }

    /// Twenty years in which each is late in its own way: the configuration lags behind by a day, a replica by another.
    #[test]
    fn no_authority_is_replaced_with_a_gap() {
        let mut now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let mut pki = Pki::default().next(&places().subjects(), false, now).unwrap();
        let (mut configured, mut late) = (pki.bundle(), pki.clone());
        let mut bundles = BTreeSet::from([configured.clone()]);
        let mut certificates = BTreeSet::new();
        for day in 0..20 * 365 {
            now += DAY;
            let next = pki.next(&places().subjects(), configured == pki.bundle(), now).unwrap();
            for (whose, served) in [("a replica's", &late), ("the newest", &next)] {
                let certified = served.servers().unwrap();
                assert!(believes(&configured, certified, now), "day {day}: {whose} certificate is not believed");
                certificates.insert(certified.fingerprint().to_owned());
            }
            late = pki;
            configured = next.bundle();
            bundles.insert(configured.clone());
            pki = next;
        }
        // Each was alone, then beside the next.
        assert!(bundles.len() >= 4 && certificates.len() > 100, "{} bundles, {} certificates", bundles.len(), certificates.len());
        assert!(pki.sentinels().is_none(), "nobody asked for one");
    }

    #[test]
    fn each_webhook_of_a_configuration_counts_and_one_that_is_gone_does_not() {
        let bundle = ByteString(b"an authority".to_vec());
        let webhooks = |bundles: &[Option<&ByteString>]| -> ValidatingWebhookConfiguration {
            let webhook = |bundle: &Option<&ByteString>| json!({"name": "w", "admissionReviewVersions": ["v1"], "sideEffects": "None", "clientConfig": {"caBundle": bundle}});
            let webhooks: Vec<_> = bundles.iter().map(webhook).collect();
            serde_json::from_value(json!({"metadata": {}, "webhooks": webhooks})).unwrap()
        };
        let other = ByteString(b"another".to_vec());
        assert!(trusts(Some(&webhooks(&[Some(&bundle), Some(&bundle)])), &bundle));
        assert!(!trusts(Some(&webhooks(&[Some(&bundle), Some(&other)])), &bundle));
        assert!(!trusts(Some(&webhooks(&[Some(&bundle), None])), &bundle));
        assert!(trusts::<ValidatingWebhookConfiguration>(None, &bundle), "somebody removed it");
    }

    #[test]
    fn what_is_issued_can_be_served() {
        let now = SystemTime::now();
        let pki = Pki::default().next(&places().subjects(), false, now).unwrap();
        assert!(server_config(pki.servers().unwrap()).is_ok());
        assert!(believes(&pki.bundle(), pki.servers().unwrap(), now));
        let other = Pki::default().next(&places().subjects(), false, now).unwrap();
        assert!(!believes(&other.bundle(), pki.servers().unwrap(), now));
    }
}
