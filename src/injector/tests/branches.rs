//! Each branch.

use serde_json::{Value, json};

use super::*;
use crate::policy::binding::BindingName;

fn annotated(annotations: &Value, spec: &Value) -> Value {
    let mut pod = pod(spec);
    pod["metadata"]["annotations"] = annotations.clone();
    pod
}

#[track_caller]
fn refused(outcome: Outcome) -> String {
    match outcome {
        Outcome::Refused { message } => message,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn stays(outcome: Outcome) -> (&'static str, Vec<String>) {
    match outcome {
        Outcome::Unchanged { why, warnings } => (why, warnings),
        other => panic!("{other:?}"),
    }
}

fn arguments(pod: &Value) -> String {
    let arguments: Vec<&str> = sidecar(pod)["args"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    arguments.join(" ")
}

#[test]
fn a_pod_gets_its_sidecar() {
    let pod = pod(&json!({"initContainers": [{"name": "migrate", "image": "app:1"}]}));
    let changed = injected(&pod);
    let sidecar = sidecar(&changed);
    let binding = BindingName::of("Deployment", "shop", "main");
    assert_eq!(
        arguments(&changed),
        format!(
            "sidecar --snapshot /etc/larder/policy/snapshot.json --binding {binding} --listen 127.0.0.1:6379 --listen [::1]:6379 \
             --admin [::]:9121 --admin-socket /run/larder-admin/admin.sock --drain 1s"
        )
    );
    assert_eq!(sidecar["resources"], json!({"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "128Mi"}}));
    for (field, value) in [
        ("runAsNonRoot", json!(true)),
        ("runAsUser", json!(65532)),
        ("allowPrivilegeEscalation", json!(false)),
        ("readOnlyRootFilesystem", json!(true)),
        ("capabilities", json!({"drop": ["ALL"]})),
        ("seccompProfile", json!({"type": "RuntimeDefault"})),
    ] {
        assert_eq!(sidecar["securityContext"][field], value, "{field}");
    }
    let asks = |probe: &str| &sidecar[probe]["httpGet"]["path"];
    assert_eq!(asks("livenessProbe"), "/livez", "it asks whether the sidecar listens, and nothing else");
    assert_eq!(asks("startupProbe"), "/livez?started", "applications start under their policy");
    assert!(sidecar.get("readinessProbe").is_none());
    let volumes = changed["spec"]["volumes"].as_array().unwrap();
    assert_eq!(volumes[0]["configMap"], json!({"name": binding.object_name(), "optional": true, "defaultMode": 0o644}));
    assert_eq!(volumes[1]["secret"]["secretName"], *binding.object_name());
    assert_eq!(volumes[1]["secret"]["optional"], true);
    assert!(!changed.to_string().contains("subPath"));
    assert_eq!(changed["metadata"]["labels"]["larder.dev/binding"], *binding.as_str());
    assert_eq!(env_of(&changed, "app", "REDIS_URL"), Some("redis://127.0.0.1:6379"));
    assert_eq!(env_of(&changed, "app", "REDIS_HOST"), Some("127.0.0.1"));
    assert_eq!(env_of(&changed, "app", "REDIS_PORT"), Some("6379"));
    assert_eq!(changed["spec"]["initContainers"][1]["env"][0]["name"], "REDIS_URL", "init containers may use the cache");
}

#[test]
fn some_pods_stay_as_they_are() {
    assert_eq!(stays(under(&[], &pod(&json!({})))).0, "no policy selects it");
    let opted_out = annotated(&json!({"larder.dev/inject": "false"}), &json!({}));
    assert_eq!(stays(plainly(&opted_out)), ("it does not want one", vec![]));
    let mut server = pod(&json!({}));
    server["metadata"]["labels"]["larder.dev/cluster"] = "main".into();
    assert_eq!(stays(plainly(&server)).0, "it is part of a cache");
    let (why, warnings) = stays(plainly(&pod(&json!({"hostNetwork": true}))));
    assert_eq!(why, "it has the node's network");
    assert!(warnings[0].contains("CachePolicy a") && warnings[0].contains("remove hostNetwork"), "{warnings:?}");
    let (why, warnings) = stays(plainly(&pod(&json!({"os": {"name": "windows"}}))));
    assert_eq!((why, warnings.len()), ("it runs on Windows", 1));
}

#[test]
fn what_cannot_be_is_refused() {
    let message = refused(plainly(&annotated(&json!({"larder.dev/sidecar-uid": "root"}), &json!({}))));
    assert!(message.contains("larder.dev/sidecar-uid"), "{message}");
    let message = refused(plainly(&annotated(&json!({"larder.dev/inject-containers": "web"}), &json!({}))));
    assert!(message.contains("no container web"), "{message}");
    let declares = json!({"containers": [{"name": "app", "ports": [{"containerPort": 7000}]}]});
    let message = refused(plainly(&annotated(&json!({"larder.dev/inject-port": "7000"}), &declares)));
    assert!(message.contains("port 7000"), "{message}");
    let message = refused(plainly(&pod(&json!({"volumes": [{"name": "larder-tmp", "emptyDir": {}}]}))));
    assert!(message.contains("a volume larder-tmp"), "{message}");
    let message = refused(plainly(&pod(&json!({"initContainers": [{"name": "larder-sidecar"}]}))));
    assert!(message.contains("a container larder-sidecar"), "{message}");
}

#[test]
fn a_pod_may_ask_otherwise() {
    let wishes = json!({
        "larder.dev/sidecar-uid": "1000730000", "larder.dev/sidecar-image": "mirror.example/larder:2", "larder.dev/sidecar-cpu": "1",
        "larder.dev/sidecar-memory": "256Mi", "larder.dev/inject-port": "7000", "larder.dev/inject-socket": "true",
        "larder.dev/inject-containers": "app",
    });
    let spec = json!({"containers": [{"name": "app"}, {"name": "proxy"}]});
    let changed = injected(&annotated(&wishes, &spec));
    let sidecar = sidecar(&changed);
    assert_eq!(sidecar["securityContext"]["runAsUser"], 1_000_730_000);
    assert_eq!(sidecar["image"], "mirror.example/larder:2");
    assert_eq!(sidecar["resources"]["requests"], json!({"cpu": "1", "memory": "256Mi"}));
    assert!(arguments(&changed).contains("--listen 127.0.0.1:7000"));
    assert!(arguments(&changed).contains("--socket /run/larder/redis.sock --socket-mode 666"), "{}", arguments(&changed));
    assert_eq!(env_of(&changed, "app", "REDIS_URL"), Some("redis://127.0.0.1:7000"));
    assert_eq!(texts(&changed["spec"]["containers"][0]["volumeMounts"], "mountPath"), ["/run/larder"]);
    assert_eq!(changed["spec"]["containers"][1], json!({"name": "proxy"}), "it was not asked for");
}

#[test]
fn policies_say_how_and_the_oldest_counts() {
    let policies = [
        policy("young", "2026-03-01T00:00:00Z", "main", &json!({"env": "Override", "port": 7001, "socket": true})),
        policy("old", "2026-01-01T00:00:00Z", "main", &json!({"port": 7000})),
        policy("stranger", "2026-02-01T00:00:00Z", "other", &json!({"port": 7002})),
    ];
    let pod = pod(&json!({"containers": [{"name": "app", "env": [{"name": "REDIS_URL", "value": "redis://elsewhere"}]}]}));
    let (changed, warnings) = patched(under(&policies, &pod), &pod);
    assert_eq!(env_of(&changed, "app", "REDIS_URL"), Some("redis://127.0.0.1:7000"));
    assert!(arguments(&changed).contains("--socket "));
    assert_eq!(changed["metadata"]["labels"]["larder.dev/binding"], *BindingName::of("Deployment", "shop", "main").as_str());
    assert!(warnings.len() == 1 && warnings[0].contains("stranger") && warnings[0].contains("other"), "{warnings:?}");
    // The pod's own word is above theirs.
    let mut asking = pod.clone();
    asking["metadata"]["annotations"] = json!({"larder.dev/inject-env": "IfAbsent", "larder.dev/inject-socket": "false"});
    let (changed, _) = patched(under(&policies, &asking), &asking);
    assert_eq!(env_of(&changed, "app", "REDIS_URL"), Some("redis://elsewhere"));
    assert!(!arguments(&changed).contains("--socket "));
}

#[test]
fn ports_that_containers_declare_are_left_to_them() {
    let ports = json!([{"containerPort": 6379}, {"containerPort": 9121, "protocol": "TCP"}]);
    let changed = injected(&pod(&json!({"containers": [{"name": "app", "ports": ports}]})));
    assert!(
        arguments(&changed).contains("--listen 127.0.0.1:6380 --listen [::1]:6380 --admin [::]:9122"),
        "{}",
        arguments(&changed)
    );
    assert_eq!(env_of(&changed, "app", "REDIS_PORT"), Some("6380"));
    assert_eq!(sidecar(&changed)["livenessProbe"]["httpGet"]["port"], 9122);
    assert_eq!(sidecar(&changed)["ports"][0]["containerPort"], 9122);
}

#[test]
fn guaranteed_pods_stay_so() {
    let promised = json!({"limits": {"cpu": "1", "memory": "1Gi"}});
    let equal = json!({"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}});
    let changed =
        injected(&pod(&json!({"containers": [{"name": "a", "resources": promised}, {"name": "b", "resources": equal}]})));
    let whole = json!({"cpu": "500m", "memory": "128Mi"});
    assert_eq!(sidecar(&changed)["resources"], json!({"requests": whole, "limits": whole}));
    let less = json!({"requests": {"cpu": "500m"}, "limits": {"cpu": "1", "memory": "1Gi"}});
    let changed =
        injected(&pod(&json!({"containers": [{"name": "a", "resources": promised}, {"name": "b", "resources": less}]})));
    assert_eq!(sidecar(&changed)["resources"]["limits"], json!({"memory": "128Mi"}));
    let changed = injected(&pod(&json!({"resources": {"limits": {"cpu": "2", "memory": "1Gi"}}})));
    assert!(sidecar(&changed).get("resources").is_none(), "the pod's own are for all of its containers");
}

#[test]
fn variables_of_a_container_are_kept_or_taken_as_policies_say() {
    let env = json!([{"name": "REDIS_HOST", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}, {"name": "URL", "value": "redis://$(REDIS_HOST)"}]);
    let pod = pod(&json!({"containers": [{"name": "app", "env": env}]}));
    let (changed, warnings) = patched(plainly(&pod), &pod);
    assert_eq!(changed["spec"]["containers"][0]["env"], env, "all three or none: others would lead elsewhere");
    assert!(warnings.len() == 1 && warnings[0].contains("sets REDIS_HOST itself"), "{warnings:?}");
    let all = [policy("a", "2026-01-01T00:00:00Z", "main", &json!({"env": "Override"}))];
    let (changed, warnings) = patched(under(&all, &pod), &pod);
    let names = texts(&changed["spec"]["containers"][0]["env"], "name");
    assert_eq!(names, ["REDIS_URL", "REDIS_PORT", "REDIS_HOST", "URL"], "in front of what may refer to them");
    assert_eq!(changed["spec"]["containers"][0]["env"][2], json!({"name": "REDIS_HOST", "value": "127.0.0.1"}));
    assert_eq!(warnings, Vec::<String>::new());
}

#[test]
fn what_variables_hide_is_told() {
    let outcome = |spec: &Value, has_redis_service: bool| {
        let (pod, policy) = (pod(spec), policy("a", "2026-01-01T00:00:00Z", "main", &Value::Null));
        let occasion = Occasion { pod: &pod, policies: &[&policy], has_cluster: &|_| true, has_redis_service };
        patched(inject(&occasion, &settings()), &pod).1.join(" ")
    };
    let from = json!({"containers": [{"name": "app", "envFrom": [{"secretRef": {"name": "s"}}]}]});
    assert!(outcome(&from, false).contains("what envFrom says of them has no effect"));
    assert!(outcome(&from, true).contains("envFrom") && outcome(&from, true).contains("Service redis"));
    assert!(outcome(&json!({}), true).contains("the REDIS_PORT of the Service redis has no effect"));
    assert_eq!(outcome(&json!({}), false), "");
    assert_eq!(outcome(&json!({"enableServiceLinks": false}), true), "");
    assert!(outcome(&json!({"shareProcessNamespace": true}), false).contains("shareProcessNamespace"));
}

#[test]
fn a_cluster_that_is_missing_is_told() {
    let (pod, policy) = (pod(&json!({})), policy("a", "2026-01-01T00:00:00Z", "main", &Value::Null));
    let occasion = Occasion { pod: &pod, policies: &[&policy], has_cluster: &|name| name != "main", has_redis_service: false };
    let (_, warnings) = patched(inject(&occasion, &settings()), &pod);
    assert!(warnings.len() == 1 && warnings[0].contains("no CacheCluster main yet"), "{warnings:?}");
}

#[test]
fn pull_secrets_are_named_beside_the_pods_own() {
    let settings = Settings { pull_secrets: vec!["mine".to_owned(), "registry".to_owned()], ..settings() };
    let (pod, policy) =
        (pod(&json!({"imagePullSecrets": [{"name": "mine"}]})), policy("a", "2026-01-01T00:00:00Z", "main", &Value::Null));
    let occasion = Occasion { pod: &pod, policies: &[&policy], has_cluster: &|_| true, has_redis_service: false };
    let (changed, _) = patched(inject(&occasion, &settings), &pod);
    assert_eq!(texts(&changed["spec"]["imagePullSecrets"], "name"), ["mine", "registry"]);
}

#[test]
fn what_others_changed_since_is_put_right_and_theirs_is_left() {
    let first = injected(&pod(&json!({})));
    assert_eq!(stays(plainly(&first)), ("it has its sidecar", vec![]));
    let mut since = first.clone();
    // Another webhook puts itself first, rewrites images, mounts something everywhere, and adds a container that declares the port.
    since["spec"]["initContainers"].as_array_mut().unwrap().insert(0, json!({"name": "mesh", "restartPolicy": "Always"}));
    since["spec"]["initContainers"][1]["image"] = "mirror.example/larder:1".into();
    since["spec"]["initContainers"][1]["securityContext"]["runAsUser"] = 0.into();
    since["spec"]["initContainers"][1]["env"] = json!([{"name": "TRACE", "value": "1"}]);
    since["spec"]["volumes"].as_array_mut().unwrap().retain(|volume| volume["name"] != "larder-secret");
    let (again, _) = patched(plainly(&since), &since);
    let repaired = sidecar(&again);
    assert_eq!(repaired["image"], "mirror.example/larder:1");
    assert_eq!(repaired["securityContext"]["runAsUser"], 65532);
    assert_eq!(texts(&repaired["env"], "name"), ["TRACE", "POD_NAME"]);
    assert_eq!(again["spec"]["initContainers"][1]["name"], "mesh");

    let mut declared = first;
    declared["spec"]["containers"].as_array_mut().unwrap().push(json!({"name": "redis", "ports": [{"containerPort": 6379}]}));
    let (moved, warnings) = patched(plainly(&declared), &declared);
    assert_eq!(warnings, Vec::<String>::new());
    assert_eq!(env_of(&moved, "app", "REDIS_PORT"), Some("6380"), "what an earlier look wrote is its own");
    assert!(arguments(&moved).contains("127.0.0.1:6380"));
    assert_eq!(stays(plainly(&moved)).0, "it has its sidecar");
}
