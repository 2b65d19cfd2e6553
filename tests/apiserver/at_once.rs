//! How many CacheClusters an operator works on at the same time.

use std::time::Duration;

use super::scene::{Scene, cache_cluster, eventually};

const PLACE: &str = "shop";
/// More than are worked on at the same time.
const CLUSTERS: usize = 9;
const AT_ONCE: f64 = 4.0;
const LONG: Duration = Duration::from_secs(120);

/// An operator that begins has all of them to look at, and each look takes a while: agents take what they are asked, and do not answer.
#[tokio::test]
async fn no_more_than_four_cache_clusters_are_worked_on_at_the_same_time() {
    let scene = Scene::start(&[PLACE]).await;
    let operator = scene.operator();
    let names: Vec<String> = (0..CLUSTERS).map(|number| format!("cache-{number}")).collect();
    for name in &names {
        scene.apply(&cache_cluster(PLACE, name)).await.expect("applied");
    }
    for name in &names {
        scene.await_ready(&operator, PLACE, name).await;
    }
    operator.stop();
    names.iter().for_each(|name| scene.stage.with(PLACE, name, |tier| tier.agents_hang = true));

    let operator = scene.operator();
    let mut most = 0.0;
    eventually("each is looked at", LONG, async || {
        let running = operator.figure("larder_operator_reconciles_running", None).await.unwrap_or_default();
        most = f64::max(most, running);
        let looks = operator.looks().await;
        if looks >= 2.0 * CLUSTERS as f64 { Ok(()) } else { Err(format!("{looks} looks\n{}", operator.log_end())) }
    })
    .await;
    assert_eq!(most, AT_ONCE, "looks at the same time");
    operator.stop();
}
