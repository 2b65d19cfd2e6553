//! What `kubectl explain` shows: the API server's own OpenAPI document of the resources.

use std::time::Duration;

use reqwest::Method;
use serde_json::Value;

use super::scene::{Scene, eventually};

/// Every field below a schema that has no description. Returns how many fields there are.
fn undescribed(schema: &Value, path: &str, found: &mut Vec<String>) -> usize {
    let fields = schema["properties"].as_object().into_iter().flatten();
    let mut count = 0;
    for (name, field) in fields {
        let path = format!("{path}.{name}");
        if field["description"].as_str().is_none_or(str::is_empty) {
            found.push(path.clone());
        }
        count += 1 + below(field, &path, found);
    }
    count
}

fn below(field: &Value, path: &str, found: &mut Vec<String>) -> usize {
    let inner =
        ["items", "additionalProperties"].iter().filter_map(|name| field.get(name)).map(|inner| below(inner, path, found));
    inner.sum::<usize>() + undescribed(field, path, found)
}

#[tokio::test]
async fn every_field_is_explained() {
    let scene = Scene::start(&["shop"]).await;
    let path = "/openapi/v3/apis/larder.dev/v1alpha1";
    // It is published some time after the definitions are.
    let document = eventually("the document of the definitions", Duration::from_secs(60), async || {
        match scene.plane.request(Method::GET, path, &[("accept", "application/json")], None).await {
            (200, text) => serde_json::from_str::<Value>(&text).map_err(|error| error.to_string()),
            (status, text) => Err(format!("{status}: {text}")),
        }
    })
    .await;
    for (kind, least) in [("CacheCluster", 60), ("CachePolicy", 40)] {
        let schema = &document["components"]["schemas"][format!("dev.larder.v1alpha1.{kind}")];
        assert!(schema["description"].as_str().is_some_and(|text| !text.is_empty()), "{kind} is not explained");
        let mut found = Vec::new();
        let count = ["spec", "status"].map(|part| below(&schema["properties"][part], part, &mut found)).iter().sum::<usize>();
        assert!(count >= least, "{kind} has only {count} fields here: the document is not read");
        assert!(found.is_empty(), "{kind}: no description of {}", found.join(", "));
    }
}
