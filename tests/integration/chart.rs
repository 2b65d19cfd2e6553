//! The Helm chart: what it grants, and what it refuses. The tests that render it need `helm`, which tests/kind builds; without it they
//! say so, or fail where LARDER_HELM=required, as in continuous integration.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The helm of the path, or the one that tests/kind built.
fn helm() -> Option<PathBuf> {
    let cache = env::var_os("LARDER_KIND_CACHE").map(PathBuf::from).or_else(|| {
        let caches = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        caches.or_else(|| env::home_dir().map(|home| home.join(".cache"))).map(|dir| dir.join("larder-kind"))
    });
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = env::split_paths(&path).collect();
    places.extend(cache.map(|cache| cache.join("bin")));
    let found = places.into_iter().map(|dir| dir.join("helm")).find(|helm| helm.is_file());
    if found.is_none() {
        assert!(
            env::var_os("LARDER_HELM").is_none_or(|wanted| wanted != "required"),
            "there is no helm; tests/kind/tools builds it"
        );
        println!("left out: there is no helm; tests/kind/tools builds it");
    }
    found
}

/// The objects that the chart makes with some values, or what helm says against them.
fn render(helm: &Path, arguments: &[&str]) -> Result<Vec<Value>, String> {
    let output = Command::new(helm)
        .args(["template", "larder", "charts/larder", "--namespace", "system", "--kube-version", "1.34"])
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("helm starts");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8(output.stdout).expect("a text");
    let objects: Vec<Value> = serde_saphyr::from_multiple(&text).expect("YAML");
    Ok(objects.into_iter().filter(|object| !object.is_null()).collect())
}

fn of_kind<'a>(objects: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| object["kind"] == kind)
}

fn texts(value: &Value) -> BTreeSet<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Namespace or kind, and `verb resource` of every rule that is granted.
fn grants(objects: &[Value]) -> BTreeSet<(String, String)> {
    let mut granted = BTreeSet::new();
    for role in of_kind(objects, "Role").chain(of_kind(objects, "ClusterRole")) {
        let place = role["metadata"]["namespace"].as_str().unwrap_or("all").to_owned();
        for rule in role["rules"].as_array().expect("rules") {
            for (group, resource) in texts(&rule["apiGroups"])
                .iter()
                .flat_map(|group| texts(&rule["resources"]).into_iter().map(move |resource| (group.clone(), resource)))
            {
                for verb in texts(&rule["verbs"]) {
                    granted.insert((place.clone(), format!("{verb} {group}/{resource}")));
                }
            }
        }
    }
    granted
}

#[test]
fn the_chart_has_the_definitions_and_the_version_of_the_code() {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(root().join("crds")).expect("crds/") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        let copy = fs::read_to_string(root().join("charts/larder/files/crds").join(&name)).unwrap_or_default();
        assert!(
            fs::read_to_string(&path).expect("a text") == copy,
            "run `cp crds/*.yaml charts/larder/files/crds/`: {name} differs"
        );
        names.insert(name);
    }
    assert_eq!(fs::read_dir(root().join("charts/larder/files/crds")).expect("a directory").count(), names.len());
    let chart = fs::read_to_string(root().join("charts/larder/Chart.yaml")).expect("Chart.yaml");
    for key in ["version", "appVersion"] {
        let line = format!("\n{key}: {}\n", env!("CARGO_PKG_VERSION"));
        assert!(chart.contains(&line), "Chart.yaml does not say{line}");
    }
}

#[test]
fn rights_end_at_the_watched_namespaces() {
    let Some(helm) = helm() else { return };
    let objects = render(&helm, &["--set", "watchNamespaces={shop,search}"]).expect("rendered");
    let granted = grants(&objects);
    let places: BTreeSet<&str> = granted.iter().map(|(place, _)| place.as_str()).collect();
    assert_eq!(places, BTreeSet::from(["all", "search", "shop", "system"]));
    let all = |place: &str| granted.iter().filter(|(at, _)| at == place).map(|(_, what)| what.as_str()).collect::<BTreeSet<_>>();
    assert_eq!(all("all"), BTreeSet::from(["list /nodes", "watch /nodes"]));
    assert!(all("system").iter().all(|what| what.ends_with(" coordination.k8s.io/leases")), "{:?}", all("system"));
    assert_eq!(all("shop"), all("search"));
    assert!(all("shop").contains("list /secrets"));

    let own = grants(&render(&helm, &[]).expect("rendered"));
    let places: BTreeSet<&str> = own.iter().map(|(place, _)| place.as_str()).collect();
    assert_eq!(places, BTreeSet::from(["all", "system"]), "without watchNamespaces it is the release's own");

    let wide = grants(&render(&helm, &["--set", "clusterWide=true"]).expect("rendered"));
    assert!(wide.contains(&("all".to_owned(), "list /secrets".to_owned())), "{wide:?}");
}

#[test]
fn nothing_grants_more_than_it_names() {
    let Some(helm) = helm() else { return };
    for values in [&[][..], &["--set", "clusterWide=true"], &["--set", "uninstall.force=true"]] {
        let objects = render(&helm, values).expect("rendered");
        for (place, what) in grants(&objects) {
            let refused = ["*", "exec", "attach", "portforward", "proxy", "escalate", "bind ", "impersonate", "rbac.", "/token"];
            assert!(!refused.iter().any(|part| what.contains(part)), "{values:?} grant {what} in {place}");
        }
        let bound: Vec<&Value> = of_kind(&objects, "RoleBinding").chain(of_kind(&objects, "ClusterRoleBinding")).collect();
        let made: BTreeSet<&str> = of_kind(&objects, "Role")
            .chain(of_kind(&objects, "ClusterRole"))
            .filter_map(|role| role["metadata"]["name"].as_str())
            .collect();
        assert!(!bound.is_empty());
        for binding in bound {
            let name = binding["roleRef"]["name"].as_str().expect("a name");
            assert!(made.contains(name), "{values:?} bind {name}, which is no role of the chart");
        }
    }
}

#[test]
fn pods_hold_to_the_restricted_profile() {
    let Some(helm) = helm() else { return };
    let objects = render(&helm, &[]).expect("rendered");
    let mut seen = 0;
    for owner in of_kind(&objects, "Deployment").chain(of_kind(&objects, "Job")) {
        let pod = &owner["spec"]["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        for container in pod["containers"].as_array().expect("containers") {
            assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
            assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
            assert_eq!(texts(&container["securityContext"]["capabilities"]["drop"]), BTreeSet::from(["ALL".to_owned()]));
            assert!(
                container["resources"]["limits"]["memory"].is_string() && container["resources"]["requests"]["cpu"].is_string()
            );
            seen += 1;
        }
    }
    assert_eq!(seen, 2);
}

#[test]
fn two_replicas_have_a_budget_a_network_policy_and_the_registrys_login() {
    let Some(helm) = helm() else { return };
    let objects = render(&helm, &["--set", "imagePullSecrets={registry}"]).expect("rendered");
    let only = |objects: &[Value], kind| {
        let mut found = of_kind(objects, kind);
        let first = found.next().map(|object| object["spec"].clone());
        assert!(found.next().is_none(), "another {kind}");
        first
    };
    let [deployment, budget, policy] =
        ["Deployment", "PodDisruptionBudget", "NetworkPolicy"].map(|kind| only(&objects, kind).expect(kind));
    assert_eq!(deployment["replicas"], 2);
    let selector = json!({"matchLabels": {
        "app.kubernetes.io/name": "larder", "app.kubernetes.io/instance": "larder", "app.kubernetes.io/component": "operator",
    }});
    assert_eq!((&deployment["selector"], &policy["podSelector"]), (&selector, &selector));
    assert_eq!(budget, json!({"maxUnavailable": 1, "selector": selector}));
    let (labels, selected) =
        (&deployment["template"]["metadata"]["labels"], selector["matchLabels"].as_object().expect("labels"));
    assert!(selected.iter().all(|(label, value)| labels[label] == *value), "{labels}");
    for pod in [&deployment, &only(&objects, "Job").expect("the uninstall hook")].map(|owner| &owner["template"]["spec"]) {
        assert_eq!(pod["imagePullSecrets"], json!([{"name": "registry"}]));
    }

    // In: metrics alone. Out: the API server, which no label tells, names, and what Larder made.
    assert_eq!(
        (&policy["policyTypes"], &policy["ingress"]),
        (&json!(["Ingress", "Egress"]), &json!([{"ports": [{"port": "http"}]}]))
    );
    let tiers = json!([{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/managed-by": "larder"}}}]);
    let egress = json!([
        {"ports": [{"port": 443}, {"port": 6443}]},
        {"ports": [{"port": 6379}, {"port": 9121}, {"port": 26379}], "to": tiers},
        {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
    ]);
    assert_eq!(policy["egress"], egress);

    // One replica may be drained, since nothing else would let its node go.
    let alone = render(&helm, &["--set", "replicas=1", "--set", "networkPolicy.enabled=false"]).expect("rendered");
    assert!(only(&alone, "PodDisruptionBudget").is_none() && only(&alone, "NetworkPolicy").is_none());
}

#[test]
fn definitions_outlive_the_release_and_a_digest_pins_the_image() {
    let Some(helm) = helm() else { return };
    let digest = format!("sha256:{}", "a".repeat(64));
    let values = ["--set", &format!("image.digest={digest}"), "--set", "image.repository=registry.example/larder"];
    let objects = render(&helm, &values).expect("rendered");
    let kept = of_kind(&objects, "CustomResourceDefinition")
        .filter(|object| object["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep")
        .count();
    assert_eq!(kept, 2);
    let image = format!("registry.example/larder:{}@{digest}", env!("CARGO_PKG_VERSION"));
    let operator = &of_kind(&objects, "Deployment").next().expect("a Deployment")["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(operator["image"], *image);
    assert!(texts(&operator["args"]).contains(&format!("--larder-image={image}")));

    let without = render(&helm, &["--set", "crds.install=false"]).expect("rendered");
    assert_eq!(of_kind(&without, "CustomResourceDefinition").count(), 0);
}

#[test]
fn the_injector_asks_for_what_it_names_and_leaves_the_cluster_alone() {
    let Some(helm) = helm() else { return };
    let plain = render(&helm, &["--set", "watchNamespaces={shop,system}"]).expect("rendered");
    assert_eq!(of_kind(&plain, "MutatingWebhookConfiguration").count(), 0);
    let values = ["--set", "watchNamespaces={shop,system}", "--set", "injector.enabled=true"];
    let objects = render(&helm, &values).expect("rendered");
    let configuration = of_kind(&objects, "MutatingWebhookConfiguration").next().expect("a configuration");
    let webhook = &configuration["webhooks"][0];
    assert_eq!((&webhook["failurePolicy"], &webhook["timeoutSeconds"]), (&"Ignore".into(), &2.into()));
    let selector = &webhook["namespaceSelector"];
    assert_eq!(selector["matchLabels"]["larder.dev/injection"], "enabled");
    assert_eq!(texts(&selector["matchExpressions"][0]["values"]), ["kube-system", "system"].map(str::to_owned).into());
    assert_eq!(selector["matchExpressions"][0]["operator"], "NotIn");
    assert_eq!(texts(&selector["matchExpressions"][1]["values"]), ["shop", "system"].map(str::to_owned).into());
    let strict = render(&helm, &[&values[..], &["--set", "injector.failurePolicy=Fail"]].concat()).expect("rendered");
    let policies_of = |kind: &str| {
        let configuration = strict.iter().find(|object| object["kind"] == kind).expect("a configuration");
        let webhooks = configuration["webhooks"].as_array().expect("webhooks");
        webhooks.iter().map(|webhook| webhook["failurePolicy"].as_str().expect("a policy").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(policies_of("MutatingWebhookConfiguration"), ["Fail"]);
    assert_eq!(policies_of("ValidatingWebhookConfiguration"), ["Ignore", "Ignore"], "the cluster never waits for them");
    let looking = of_kind(&objects, "ValidatingWebhookConfiguration").next().expect("a configuration");
    assert_eq!(looking["metadata"]["name"], configuration["metadata"]["name"]);
    for (webhook, (resource, path)) in [("cacheclusters", "/clusters"), ("cachepolicies", "/policies")].iter().enumerate() {
        let webhook = &looking["webhooks"][webhook];
        assert_eq!(texts(&webhook["rules"][0]["resources"]), [(*resource).to_owned()].into(), "and not their status");
        assert_eq!(webhook["clientConfig"]["service"]["path"], *path);
        let selected = &webhook["namespaceSelector"]["matchExpressions"][0]["values"];
        assert_eq!(texts(selected), ["shop", "system"].map(str::to_owned).into());
    }

    // What leads to the webhook, and what the operator is told of it, fit each other.
    let name = |kind: &'static str| of_kind(&objects, kind).next().expect(kind)["metadata"]["name"].as_str().expect("a name");
    assert_eq!(webhook["clientConfig"]["service"]["name"], name("Service"));
    let operator = &of_kind(&objects, "Deployment").next().expect("a Deployment")["spec"]["template"]["spec"]["containers"][0];
    let arguments = texts(&operator["args"]);
    for argument in [
        format!("--webhook-configuration={}", configuration["metadata"]["name"].as_str().expect("a name")),
        format!("--webhook-secret={}", name("Secret")),
        format!("--webhook-host={}.system.svc", name("Service")),
    ] {
        assert!(arguments.contains(&argument), "{argument}: {arguments:?}");
    }

    let more: BTreeSet<(String, String)> = grants(&objects).difference(&grants(&plain)).cloned().collect();
    let expected = [
        ("all", "admissionregistration.k8s.io/mutatingwebhookconfigurations", &["list", "watch", "patch"][..]),
        ("all", "admissionregistration.k8s.io/validatingwebhookconfigurations", &["list", "watch", "patch"]),
        ("shop", "/namespaces", &["get"]),
        ("system", "/namespaces", &["get"]),
    ];
    let expected = expected
        .iter()
        .flat_map(|(place, what, verbs)| verbs.iter().map(move |verb| ((*place).to_owned(), format!("{verb} {what}"))));
    assert_eq!(more, expected.collect::<BTreeSet<_>>());
    let cluster_wide = of_kind(&objects, "ClusterRole").filter(|role| role["metadata"]["name"] == "system-larder-injector");
    let rule = &cluster_wide.last().expect("a ClusterRole")["rules"][0];
    assert_eq!(texts(&rule["resourceNames"]), BTreeSet::from(["system-larder-injector".to_owned()]));

    let alone = render(&helm, &["--set", "injector.enabled=true"]).expect_err("its own namespace");
    assert!(alone.contains("name others in watchNamespaces"), "{alone}");
    assert!(render(&helm, &["--set", "injector.enabled=true", "--set", "clusterWide=true"]).is_ok());
}

#[test]
fn wrong_values_are_refused() {
    let Some(helm) = helm() else { return };
    for (value, part) in [
        ("image.digest=sha256:12", "image/digest"),
        ("image.repository=", "image/repository"),
        ("replica=3", "replica"),
        ("replicas=-1", "replicas"),
        ("watchNamespaces={Shop}", "watchNamespaces"),
        ("logs.format=xml", "logs/format"),
        ("networkPolicy.apiServerPorts={0}", "apiServerPorts"),
        ("injector.failurePolicy=Maybe", "failurePolicy"),
        ("injector.sidecar.uid=0", "sidecar/uid"),
        ("injector.sidecar.memory=128M", "sidecar/memory"),
        ("relays.memory=128M", "relays/memory"),
    ] {
        let refused = render(&helm, &["--set", value]).expect_err(value);
        assert!(refused.contains(part), "{value}: {refused}");
    }
    let both = render(&helm, &["--set", "clusterWide=true", "--set", "watchNamespaces={shop}"]).expect_err("both");
    assert!(both.contains("remove watchNamespaces, or write clusterWide: false"), "{both}");
}
