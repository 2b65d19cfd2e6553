//! The authority by which the API server believes the webhooks is replaced, and no pod is made without its sidecar meanwhile.

use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use super::chart;
use super::control_plane::SYSTEM;
use super::encrypted::make_older;
use super::injected::{CONFIGURATION, NAME, await_sidecars, has_sidecar, install, make, policy, selected, start};
use super::operator::Operator;
use super::scene::{Scene, eventually};

const SHOP: &str = "shop";
const STATE: &str = "pki.json";
const SOON: Duration = Duration::from_secs(120);
/// Days that pass, and how many authorities are believed then: 30 days before the end of a certificate's 90 there is another; two years before the
/// end of an authority's ten a second one is believed, which signs a month later, and is believed alone another month later.
const PASS: [(u64, usize); 4] = [(61, 1), (8 * 365, 2), (31, 2), (31, 1)];
/// How many pods are made once all is done.
const MORE: u32 = 20;

/// What the Secret remembers.
async fn state(scene: &Scene) -> Value {
    let secret = scene.api::<Secret>(SYSTEM).get(NAME).await.expect("a Secret");
    let ByteString(state) = secret.data.and_then(|mut data| data.remove(STATE)).expect("an entry");
    serde_json::from_slice(&state).expect("JSON")
}

/// How many authorities the API server is told to believe.
async fn believed(scene: &Scene) -> usize {
    let path = format!("/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/{CONFIGURATION}");
    let found: MutatingWebhookConfiguration = serde_json::from_value(scene.plane.get(&path).await).expect("a configuration");
    let bundle = found.webhooks.and_then(|mut webhooks| webhooks.remove(0).client_config.ca_bundle);
    bundle.map_or(0, |ByteString(bundle)| String::from_utf8_lossy(&bundle).matches("BEGIN CERTIFICATE").count())
}

async fn make_pod(scene: &Scene, operator: &Operator) {
    let (status, made) = make(scene, SHOP, &selected("meanwhile"), "dryRun=All").await;
    assert!(status == 201 && has_sidecar(&made), "{status} {made}\n{}", operator.log_end());
}

/// So many days pass at once. Pods are made until there is another certificate, and so many authorities are believed.
async fn days_pass(scene: &Scene, operator: &Operator, days: u64, authorities: usize) {
    let before = state(scene).await["servers"]["certificate"].clone();
    assert!(before.is_string(), "there is a certificate");
    let mut older = state(scene).await;
    make_older(&mut older, days);
    let patch = Patch::Merge(json!({"stringData": {STATE: older.to_string()}}));
    scene.api::<Secret>(SYSTEM).patch(NAME, &PatchParams::default(), &patch).await.expect("changed");
    eventually(&format!("another certificate after {days} days"), SOON, async || {
        make_pod(scene, operator).await;
        let (now, believed) = (state(scene).await["servers"]["certificate"].clone(), believed(scene).await);
        let is_done = now != before && believed == authorities;
        if is_done { Ok(()) } else { Err(format!("{believed} are believed\n{}", operator.log_end())) }
    })
    .await;
    for _ in 0..MORE {
        make_pod(scene, operator).await;
    }
}

#[tokio::test]
async fn the_webhooks_authority_is_replaced_without_a_gap() {
    let scene = Scene::start(&[SHOP]).await;
    install(&scene, &chart::render_with(&[SHOP], &["injector.enabled=true"])).await;
    let operator = start(&scene).await;
    scene.apply(&policy("catalog", "main", "shop", "user:{id}")).await.expect("a policy");
    await_sidecars(&scene, &operator).await;
    for (days, authorities) in PASS {
        days_pass(&scene, &operator, days, authorities).await;
    }
    operator.stop();
}
