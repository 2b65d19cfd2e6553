//! Which operator acts: none while another's Lease stands; and one that loses its own, since the API server stands still, and gets it back
//! before anybody else has it.

use std::time::Duration;

use reqwest::Method;

use super::audit::Entry;
use super::control_plane::User;
use super::forming;
use super::injected::leads_elsewhere;
use super::operator::Operator;
use super::policies;
use super::scene::{Scene, cache_cluster, eventually};

const SHOP: &str = "shop";
const SOON: Duration = Duration::from_secs(120);

async fn await_leading(operator: &Operator, leads: bool) {
    eventually(&format!("leads: {leads}"), SOON, async || {
        let found = operator.figure("larder_operator_leads", None).await;
        if found == Some(f64::from(u8::from(leads))) { Ok(()) } else { Err(format!("{found:?}\n{}", operator.log_end())) }
    })
    .await;
}

/// What the operator wrote but for Leases, as verbs and paths.
fn written(audit: &[Entry]) -> Vec<String> {
    let of_operator = audit.iter().filter(|entry| entry.user.username == User::Operator.name() && entry.is_end());
    let writes = of_operator.filter(|entry| !["get", "list", "watch"].contains(&entry.verb.as_str()));
    let others = writes.filter(|entry| entry.object_ref.resource != "leases");
    others.map(|entry| format!("{} {}", entry.verb, entry.uri)).collect()
}

/// It has everything at hand, and does nothing with it.
#[tokio::test]
async fn an_operator_makes_nothing_while_another_leads() {
    let scene = Scene::start(&[SHOP]).await;
    let lease = leads_elsewhere(&scene).await;
    scene.apply(&cache_cluster(SHOP, "main")).await.expect("applied");
    let operator = scene.operator();
    eventually("the operator asks for the Lease, again and again", SOON, async || {
        let asks =
            |entry: &&Entry| entry.user.username == User::Operator.name() && entry.right() == "get coordination.k8s.io/leases";
        let (asked, waits_for) = (scene.plane.audit().iter().filter(asks).count(), operator.waits_for().await);
        if asked >= 3 && waits_for.is_none() {
            Ok(())
        } else {
            Err(format!("{asked} times, {waits_for:?}\n{}", operator.log_end()))
        }
    })
    .await;
    assert_eq!(written(&scene.plane.audit()), Vec::<String>::new(), "{}", operator.log_end());
    assert_eq!(scene.plane.request(Method::DELETE, &lease, &[], None).await.0, 200, "the other ends");
    scene.await_ready(&operator, SHOP, "main").await;
    operator.stop();
}

/// Nobody can have changed anything meanwhile: nothing is written anew, for a thousand objects as little as for one.
#[tokio::test]
async fn an_operator_that_gets_its_lease_back_writes_nothing_anew() {
    let scene = Scene::start(&[SHOP]).await;
    let operator = scene.operator();
    scene.apply(&cache_cluster(SHOP, "main")).await.expect("applied");
    scene.await_ready(&operator, SHOP, "main").await;
    policies::begin_with_policy(&scene, &operator).await;
    forming::nothing_is_written(&scene, &operator).await;
    let asked = scene.plane.audit().len();
    let looks = async || operator.figure("larder_operator_policy_looks_total", Some("ok")).await.unwrap_or_default();
    let before = looks().await;

    scene.plane.stand_still(true);
    await_leading(&operator, false).await;
    scene.plane.stand_still(false);
    await_leading(&operator, true).await;

    scene.await_looks(&operator, 1).await;
    eventually("policies are looked at", SOON, async || {
        let now = looks().await;
        if now > before { Ok(()) } else { Err(format!("{now} looks, {before} before\n{}", operator.log_end())) }
    })
    .await;
    let audit = scene.plane.audit().split_off(asked);
    assert_eq!(written(&audit), Vec::<String>::new(), "{}", operator.log_end());
    operator.stop();
}
