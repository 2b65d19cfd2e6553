use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::operator::cache_cluster::certify;
use crate::operator::cache_cluster::users::{Access, SYSTEM_USER};
use crate::operator::cache_cluster::validate::{tests::cluster, validate};
use crate::policy::agent::AgentConfig;

fn wanted(spec: &Value) -> Wanted {
    validate(&cluster(spec)).unwrap()
}

fn installation(image: &str) -> Installation {
    Installation { larder_image: image.to_owned(), image_pull_policy: None, operator_namespace: "larder-system".to_owned() }
}

fn addresses(wanted: &Wanted, servers: u16) -> Addresses {
    let at = |third: u8, index: u16| IpAddr::from([10, 96, third, index as u8]);
    Addresses {
        servers: (0..servers).map(|index| (ServerId { shard: 0, index }, at(0, index))).collect(),
        sentinels: wanted.sentinel_ids().map(|id| (id, at(1, id.0))).collect(),
    }
}

fn credentials(access: &Access) -> Credentials {
    let system = Login { user: SYSTEM_USER.to_owned(), password: "system password".to_owned() };
    let users = Users::next(None, access, &system.password, None, std::time::SystemTime::UNIX_EPOCH);
    Credentials { system, users, client: None, pki: None }
}

fn build(spec: &Value, kept: &Kept) -> Objects {
    let wanted = wanted(spec);
    let servers = kept.servers.get(&0).copied().unwrap_or(wanted.replicas + 1);
    objects(&wanted, &installation("larder:1"), &addresses(&wanted, servers), &credentials(&Access::Open), kept)
}

fn text(objects: &Objects, map: usize, entry: &str) -> String {
    objects.config_maps[map].data.as_ref().unwrap()[entry].clone()
}

fn template(objects: &Objects, set: usize) -> &PodTemplateSpec {
    &objects.stateful_sets[set].spec.as_ref().unwrap().template
}

fn container(objects: &Objects, set: usize) -> &k8s_openapi::api::core::v1::Container {
    &template(objects, set).spec.as_ref().unwrap().containers[0]
}

#[test]
fn a_server_never_holds_more_than_its_pod_has_room_for() {
    let first = ServerId { shard: 0, index: 0 };
    let kept = Kept { memory: BTreeMap::from([(first, ByteSize::from_bytes(256 << 20))]), ..Kept::default() };
    let grown = build(&json!({"memory": "1Gi"}), &kept);
    assert!(text(&grown, 0, "server-0.conf").contains(&format!("maxmemory {}\n", (232 << 20) / 3 * 2)));
    assert!(text(&grown, 0, "server-1.conf").contains(&format!("maxmemory {}\n", (1000 << 20) / 3 * 2)));
    let shrunk = build(&json!({"memory": "128Mi"}), &kept);
    let config = AgentConfig::parse(text(&shrunk, 0, "agent-0.json").as_bytes()).unwrap();
    assert_eq!(config.settings["maxmemory"], ((104 << 20) / 3 * 2).to_string());
    assert_eq!(shrunk.agent_generations[&first], config.generation);
}

/// What a server is told of replicas' buffers, in its file and by its agent.
fn told_of_buffers(spec: &Value) -> (Option<String>, String) {
    let objects = build(spec, &Kept::default());
    let file = text(&objects, 0, "server-0.conf");
    let line = file.lines().find_map(|line| line.strip_prefix("client-output-buffer-limit "));
    let config = AgentConfig::parse(text(&objects, 0, "agent-0.json").as_bytes()).unwrap();
    (line.map(str::to_owned), config.settings["client-output-buffer-limit"].clone())
}

#[test]
fn what_replicas_have_not_read_fits_beside_the_data() {
    let limit = |mib: u64| {
        let (line, set) = told_of_buffers(&json!({"memory": format!("{mib}Mi")}));
        assert_eq!(line.as_deref(), Some(set.as_str()));
        let hard = set.split(' ').nth(1).unwrap().parse::<u64>().unwrap();
        let data = max_memory(ByteSize::from_bytes(mib << 20)).as_bytes();
        assert!(data + hard + (24 << 20) < mib << 20, "{mib} MiB hold {data} of data and {hard} for replicas");
        hard
    };
    assert!(limit(64) < limit(256) && limit(256) < 64 << 20 && limit(16 << 10) > 256 << 20);
}

#[test]
fn what_users_say_of_buffers_counts() {
    let said = |value: &str| told_of_buffers(&json!({"memory": "256Mi", "parameters": {"client-output-buffer-limit": value}}));
    assert_eq!(said("slave 1mb 1mb 1"), (None, "slave 1mb 1mb 1".to_owned()));
    let (line, set) = said("pubsub 32mb 8mb 60");
    assert_eq!(set, format!("{} pubsub 32mb 8mb 60", line.unwrap()), "of other classes alone");
}

#[test]
fn secrets_alone_hold_passwords_and_hashes() {
    let wanted = wanted(&json!({"auth": {"password": {"secretKeyRef": {"name": "shop", "key": "password"}}}}));
    let client = Some(Login { user: "shop".to_owned(), password: "client password".to_owned() });
    let credentials = Credentials { client, ..credentials(&Access::user("shop", "client password")) };
    let Objects { service_account, secrets, config_maps, network_policy, disruption_budgets, stateful_sets, .. } =
        objects(&wanted, &installation("larder:1"), &addresses(&wanted, 2), &credentials, &Kept::default());
    let open = json!([service_account, config_maps, network_policy, disruption_budgets, stateful_sets]).to_string();
    let passwords = ["system password", "client password"];
    assert!(passwords.iter().all(|password| !open.contains(password)), "{open}");
    assert!(!open.contains(&crate::policy::digest::sha256(b"client password")), "{open}");
    let entry = |secret: usize, key: &str| String::from_utf8(secrets[secret].data.as_ref().unwrap()[key].0.clone()).unwrap();
    assert_eq!(entry(0, PASSWORD), "system password");
    assert_eq!(entry(0, "replication.conf"), "masteruser larder-system\nmasterauth \"system password\"\n");
    assert!(!entry(1, "users.acl").contains("client password"));
    assert_eq!(secrets[2].metadata.name.as_deref(), Some("shop-client"));
    assert_eq!((entry(2, USERNAME), entry(2, PASSWORD)), ("shop".to_owned(), "client password".to_owned()));
    assert_eq!(secrets[2].data.as_ref().unwrap().len(), 2, "without TLS there is nobody to trust");
}

#[test]
fn under_tls_nothing_listens_in_the_clear_and_keys_stay_in_secrets() {
    let wanted = wanted(&json!({"tls": {"enabled": true}}));
    let addresses = addresses(&wanted, 2);
    let subjects = certify::subjects(&wanted, wanted.tls.as_ref().unwrap(), &addresses);
    let pki = Pki::default().next(&subjects, false, std::time::SystemTime::UNIX_EPOCH).unwrap();
    let credentials = Credentials { pki: Some(pki.clone()), ..credentials(&Access::Open) };
    let objects = objects(&wanted, &installation("larder:1"), &addresses, &credentials, &Kept::default());
    for (map, entry, port) in [(0, "server.conf", 6379), (1, "sentinel-0.conf", 26379)] {
        let lines = format!(
            "port 0\ntls-port {port}\ntls-replication yes\ntls-auth-clients no\ntls-cert-file /etc/larder/tls/tls.crt\n\
             tls-key-file /etc/larder/tls/tls.key\ntls-ca-cert-file /etc/larder/tls/ca.crt\n"
        );
        assert!(text(&objects, map, entry).contains(&lines), "{}", text(&objects, map, entry));
    }
    let config = AgentConfig::parse(text(&objects, 0, "agent-0.json").as_bytes()).unwrap();
    assert!(config.server.agent_tls && config.server.serves.is_some() && config.server.tls.is_some());
    let probe = container(&objects, 0).readiness_probe.as_ref().unwrap().http_get.as_ref().unwrap();
    assert_eq!(probe.scheme.as_deref(), Some("HTTPS"));
    for (set, secret) in [(0, "shop-server-tls"), (1, "shop-sentinel-tls")] {
        let volumes = template(&objects, set).spec.as_ref().unwrap().volumes.as_ref().unwrap();
        let mounted = volumes.iter().filter_map(|volume| volume.secret.as_ref()?.secret_name.as_deref());
        let mounted: Vec<&str> = mounted.collect();
        assert!(mounted.contains(&secret) && !mounted.contains(&"shop-pki"), "{mounted:?}");
    }
    let names = objects.secrets.iter().filter_map(|secret| secret.metadata.name.as_deref());
    let expected = ["shop-system", "shop-users", "shop-pki", "shop-server-tls", "shop-sentinel-tls"];
    assert_eq!(names.collect::<Vec<_>>(), expected, "what is remembered is written before it is presented");
    assert_eq!(text(&objects, 2, "ca.crt"), pki.bundle());
    let Objects { service_account, secrets: _, config_maps, network_policy, disruption_budgets, stateful_sets, .. } = objects;
    let open = json!([service_account, config_maps, network_policy, disruption_budgets, stateful_sets]).to_string();
    assert!(!open.contains("PRIVATE"), "{open}");
}

#[test]
fn pods_are_restricted() {
    for spec in [json!({}), json!({"storage": {"size": "1Gi"}}), json!({"tls": {"enabled": true}})] {
        let objects = build(&spec, &Kept::default());
        for set in [0, 1] {
            let pod = template(&objects, set).spec.as_ref().unwrap();
            let security = pod.security_context.as_ref().unwrap();
            assert!(
                security.run_as_non_root == Some(true) && security.seccomp_profile.as_ref().unwrap().type_ == "RuntimeDefault"
            );
            assert_eq!(pod.automount_service_account_token, Some(false));
            for container in pod.containers.iter().chain(pod.init_containers.as_ref().unwrap()) {
                let security = container.security_context.as_ref().unwrap();
                assert_eq!(security.allow_privilege_escalation, Some(false));
                assert_eq!(security.read_only_root_filesystem, Some(true));
                assert_eq!(security.capabilities.as_ref().unwrap().drop, Some(vec!["ALL".to_owned()]));
                assert!(container.resources.as_ref().unwrap().limits.as_ref().unwrap().contains_key("memory"));
                let volumes: Vec<&str> = pod.volumes.iter().flatten().map(|volume| volume.name.as_str()).collect();
                let claimed = objects.stateful_sets[set].spec.as_ref().unwrap().volume_claim_templates.is_some();
                for mount in container.volume_mounts.iter().flatten() {
                    assert!(volumes.contains(&mount.name.as_str()) || (claimed && mount.name == DATA_VOLUME), "{}", mount.name);
                }
            }
        }
    }
}

#[test]
fn an_upgrade_of_the_operator_changes_no_template() {
    let wanted = |memory: &str| wanted(&json!({ "memory": memory }));
    let build = |image: &str, memory: &str, kept: &Kept| {
        let wanted = wanted(memory);
        objects(&wanted, &installation(image), &addresses(&wanted, 2), &credentials(&Access::Open), kept)
    };
    let before = build("larder:1", "256Mi", &Kept::default());
    let names = ["shop-0", "shop-sentinel"].map(str::to_owned).into_iter();
    let mut standing: BTreeMap<_, _> = names.zip([template(&before, 0).clone(), template(&before, 1).clone()]).collect();
    // What an older release wrote differently stays as well.
    standing.get_mut("shop-0").unwrap().spec.as_mut().unwrap().termination_grace_period_seconds = Some(7);
    let kept = Kept { templates: standing.clone(), ..Kept::default() };
    let upgraded = build("larder:2", "256Mi", &kept);
    assert_eq!((template(&upgraded, 0), template(&upgraded, 1)), (&standing["shop-0"], &standing["shop-sentinel"]));
    let rolled = build("larder:2", "512Mi", &kept);
    let image =
        |objects: &Objects, set| template(objects, set).spec.as_ref().unwrap().init_containers.as_ref().unwrap()[0].image.clone();
    assert_eq!((image(&rolled, 0).as_deref(), image(&rolled, 1).as_deref()), (Some("larder:2"), Some("larder:1")));
}

#[test]
fn servers_that_are_still_to_go_keep_their_place() {
    let kept = Kept { servers: BTreeMap::from([(0, 3)]), ..Kept::default() };
    let objects = build(&json!({"replicas": 1}), &kept);
    assert_eq!(objects.stateful_sets[0].spec.as_ref().unwrap().replicas, Some(3));
    let config = AgentConfig::parse(text(&objects, 0, "agent-0.json").as_bytes()).unwrap();
    assert_eq!(config.peers.iter().map(|peer| peer.ordinal).collect::<Vec<_>>(), [1, 2]);
    let services = services(&wanted(&json!({"replicas": 1})), [ServerId { shard: 0, index: 2 }]);
    assert!(services.iter().any(|service| service.metadata.name.as_deref() == Some("shop-0-2")));
}

#[test]
fn what_is_written_of_pods_is_in_both_templates() {
    let spec = json!({"pod": {
        "labels": {"team": "shop"},
        "annotations": {"example.com/scrape": "yes"},
        "cpu": {"request": "500m", "limit": "2"},
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "cache", "operator": "Equal", "value": "only", "effect": "NoExecute", "tolerationSeconds": 60}],
        "spread": "Require",
        "priorityClassName": "important",
        "imagePullSecrets": [{"name": "registry"}],
    }});
    let (plain, built) = (build(&json!({}), &Kept::default()), build(&spec, &Kept::default()));
    for set in [0, 1] {
        let PodTemplateSpec { metadata, spec } = template(&built, set).clone();
        let (metadata, pod) = (metadata.unwrap(), json!(spec.unwrap()));
        assert_eq!(metadata.labels.unwrap()["team"], "shop");
        assert_eq!(metadata.annotations.unwrap()["example.com/scrape"], "yes");
        assert_eq!(pod["nodeSelector"], json!({"disk": "ssd"}));
        let toleration =
            json!({"key": "cache", "operator": "Equal", "value": "only", "effect": "NoExecute", "tolerationSeconds": 60});
        assert_eq!(pod["tolerations"], json!([toleration]));
        assert_eq!((&pod["priorityClassName"], &pod["imagePullSecrets"]), (&json!("important"), &json!([{"name": "registry"}])));
        let apart = |pod: &Value, how: &str| pod["affinity"]["podAntiAffinity"][how].is_array();
        let (required, preferred) =
            ("requiredDuringSchedulingIgnoredDuringExecution", "preferredDuringSchedulingIgnoredDuringExecution");
        assert!(apart(&pod, required) && !apart(&pod, preferred));
        let default = json!(template(&plain, set).spec);
        assert!(!apart(&default, required) && apart(&default, preferred));
    }
    let resources = json!(container(&built, 0).resources);
    assert_eq!((&resources["requests"]["cpu"], &resources["limits"]["cpu"]), (&json!("500m"), &json!("2")));
    // A label that the user chose never hides one by which pods are selected.
    let taken = build(&json!({"pod": {"labels": {"larder.dev/cluster": "other"}}}), &Kept::default());
    assert_eq!(template(&taken, 0).metadata.as_ref().unwrap().labels.as_ref().unwrap()["larder.dev/cluster"], "shop");
}

#[test]
fn volumes_stay_unless_they_are_to_go() {
    let volumes = |storage: Value| {
        let built = build(&json!({"storage": storage}), &Kept::default());
        [0, 1].map(|set| {
            let spec = built.stateful_sets[set].spec.as_ref().unwrap();
            (json!(spec.persistent_volume_claim_retention_policy), json!(spec.volume_claim_templates.as_ref().unwrap()[0].spec))
        })
    };
    for (storage, when_deleted) in
        [(json!({"size": "10Gi"}), "Retain"), (json!({"size": "10Gi", "class": "fast", "whenDeleted": "Delete"}), "Delete")]
    {
        let [servers, sentinels] = volumes(storage.clone());
        // Fewer servers never take volumes along: a server that comes back finds its own.
        let policy = json!({"whenDeleted": when_deleted, "whenScaled": "Retain"});
        assert_eq!((&servers.0, &sentinels.0), (&policy, &policy));
        assert_eq!(servers.1["resources"]["requests"]["storage"], "10Gi");
        assert_eq!(servers.1.get("storageClassName"), storage.get("class"));
        assert_eq!(sentinels.1.get("storageClassName"), storage.get("class"));
    }
    let ephemeral = build(&json!({}), &Kept::default());
    assert!(ephemeral.stateful_sets.iter().all(|set| set.spec.as_ref().unwrap().volume_claim_templates.is_none()));
}

#[test]
fn who_may_connect_is_what_is_written() {
    let policy = |spec| build(&spec, &Kept::default()).network_policy;
    assert!(policy(json!({"networkPolicy": {"enabled": false}})).is_none());
    let ingress = policy(json!({})).unwrap().spec.unwrap().ingress.unwrap();
    assert_eq!(json!(ingress[1].from), json!([{"podSelector": {}}]));
    assert_eq!(ingress.len(), 2);
    let written = json!({"networkPolicy": {
        "from": [{"podSelector": {"matchLabels": {"app": "shop"}}, "namespaceSelector": {}}],
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"team": "ops"}}}],
    }});
    let ingress = policy(written).unwrap().spec.unwrap().ingress.unwrap();
    assert_eq!(
        json!(ingress[1]),
        json!({
            "from": [
                {"podSelector": {"matchLabels": {"app": "shop"}}, "namespaceSelector": {}},
                {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "larder-relay", "larder.dev/uses-cluster": "shop"}}},
            ],
            "ports": [{"port": 6379, "protocol": "TCP"}, {"port": 26379, "protocol": "TCP"}],
        })
    );
    assert_eq!(json!(ingress[2].ports), json!([{"port": 9121, "protocol": "TCP"}]));
}

/// What rolls, drains and clients' connections depend on, field by field.
#[test]
fn sets_and_budgets_leave_the_order_of_pods_to_the_operator() {
    let built = build(&json!({}), &Kept::default());
    let (sets, budgets) = (json!(built.stateful_sets), json!(built.disruption_budgets));
    let [servers, sentinels] = [selected("server", Some("0")), selected("sentinel", None)];
    for (index, name, service, selected, unhealthy) in [
        (0, "shop-0", "shop-servers", servers, "IfHealthyBudget"),
        (1, "shop-sentinel", "shop-sentinels-headless", sentinels, "AlwaysAllow"),
    ] {
        let (set, budget) = (&sets[index], &budgets[index]);
        assert_eq!((&set["metadata"]["name"], &budget["metadata"]["name"]), (&json!(name), &json!(name)));
        assert_eq!(set["spec"]["updateStrategy"], json!({"type": "OnDelete"}), "{name}");
        assert_eq!((&set["spec"]["podManagementPolicy"], &set["spec"]["serviceName"]), (&json!("Parallel"), &json!(service)));
        let selector = json!({"matchLabels": selected});
        assert_eq!(set["spec"]["selector"], selector, "{name}");
        assert_eq!(
            budget["spec"],
            json!({"maxUnavailable": 1, "unhealthyPodEvictionPolicy": unhealthy, "selector": selector}),
            "{name}"
        );
    }
    assert_eq!((sets.as_array().unwrap().len(), budgets.as_array().unwrap().len()), (2, 2));
}

#[test]
fn services_lead_to_the_pods_that_they_are_for() {
    let with = |mut spec: Value, selected: Value, ports: &[&Value]| {
        (spec["selector"], spec["ports"]) = (selected, json!(ports));
        spec
    };
    let port = |name: &str, port: u16| json!({"name": name, "port": port, "protocol": "TCP", "targetPort": name});
    let (redis, agent, sentinel) = (port("redis", 6379), port("agent", 9121), port("sentinel", 26379));
    let headless = |selected: Value, ports: &[&Value]| {
        let address = json!({"type": "ClusterIP", "clusterIP": "None", "publishNotReadyAddresses": true});
        with(address, selected, ports)
    };
    let of_pod = |pod: &str, ports: &[&Value]| {
        let address = json!({"type": "ClusterIP", "publishNotReadyAddresses": true});
        with(address, json!({"statefulset.kubernetes.io/pod-name": pod}), ports)
    };
    let of_clients = |selected: Value, port: &Value| with(json!({"type": "ClusterIP"}), selected, &[port]);
    let (servers, sentinels) = (selected("server", None), selected("sentinel", None));
    let expected = BTreeMap::from([
        ("shop-servers", headless(servers.clone(), &[&redis, &agent])),
        ("shop-sentinels-headless", headless(sentinels.clone(), &[&sentinel])),
        ("shop-sentinels", of_clients(sentinels, &sentinel)),
        ("shop-replicas", of_clients(servers, &redis)),
        // Its endpoints are the operator's to write.
        ("shop-primary", json!({"type": "ClusterIP", "ports": [redis]})),
        ("shop-0-0", of_pod("shop-0-0", &[&redis, &agent])),
        ("shop-0-1", of_pod("shop-0-1", &[&redis, &agent])),
        ("shop-sentinel-0", of_pod("shop-sentinel-0", &[&sentinel])),
        ("shop-sentinel-1", of_pod("shop-sentinel-1", &[&sentinel])),
        ("shop-sentinel-2", of_pod("shop-sentinel-2", &[&sentinel])),
    ]);
    let services = services(&wanted(&json!({})), []);
    let built: BTreeMap<&str, Value> =
        services.iter().map(|service| (service.metadata.name.as_deref().unwrap(), json!(service.spec))).collect();
    assert_eq!(built, expected);
    // Services name ports, and containers have them.
    let objects = build(&json!({}), &Kept::default());
    for (set, ports) in [(0, vec![("redis", 6379), ("agent", 9121)]), (1, vec![("sentinel", 26379)])] {
        let open = container(&objects, set).ports.as_ref().unwrap();
        let open: Vec<_> = open.iter().map(|port| (port.name.as_deref().unwrap(), port.container_port)).collect();
        assert_eq!(open, ports);
    }
}

/// The labels that select pods.
fn selected(component: &str, shard: Option<&str>) -> Value {
    let mut labels = json!({"larder.dev/cluster": "shop", "app.kubernetes.io/component": component});
    if let Some(shard) = shard {
        labels["larder.dev/shard"] = json!(shard);
    }
    labels
}

#[test]
fn durable_servers_keep_their_file_with_a_snapshot_at_its_beginning() {
    let lines = |spec: Value| {
        let text = text(&build(&spec, &Kept::default()), 0, "server.conf");
        let of_persistence = |line: &&str| ["save ", "append", "aof-"].iter().any(|begin| line.starts_with(begin));
        text.lines().filter(of_persistence).map(str::to_owned).collect::<Vec<_>>()
    };
    let durable = lines(json!({"storage": {"size": "1Gi"}}));
    assert_eq!(durable, ["save \"\"", "appendonly yes", "aof-use-rdb-preamble yes", "appendfsync everysec"]);
    assert_eq!(lines(json!({})), ["save \"\"", "appendonly no"]);
}

#[test]
fn sentinels_have_one_identity_each() {
    let objects = build(&json!({}), &Kept::default());
    let id = |entry: &str| {
        let text = text(&objects, 1, entry);
        text.lines().find_map(|line| line.strip_prefix("sentinel myid ")).unwrap().to_owned()
    };
    let ids = [id("sentinel-0.conf"), id("sentinel-1.conf"), id("sentinel-2.conf")];
    assert!(ids.iter().all(|id| id.len() == 40 && id.bytes().all(|byte| byte.is_ascii_hexdigit())), "{ids:?}");
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
}

/// A specification that the definition lets pass.
fn any_spec() -> impl Strategy<Value = Value> {
    let storage = prop::option::of(prop_oneof![Just("EverySecond"), Just("Always")]);
    let parameters = prop::collection::btree_map("(hz|io-threads|list-max-listpack-size|timeout)", "[0-9]{1,3}", 0..3);
    let labels = prop::collection::btree_map("[a-z]{1,8}", "[a-z0-9]{0,8}", 0..3);
    (1u32..=5, 1u32..=4, 64u64..4096, storage, parameters, labels, any::<(bool, bool, bool)>()).prop_map(
        |(replicas, sentinels, memory, fsync, parameters, labels, (auth, writes, require))| {
            let mut spec = json!({
                "replicas": replicas, "sentinels": sentinels * 2 + 1, "memory": format!("{memory}Mi"), "parameters": parameters,
                "pod": {"labels": labels, "nodeSelector": labels, "spread": if require { "Require" } else { "Prefer" }},
            });
            if let Some(fsync) = fsync {
                spec["storage"] = json!({"size": "1Gi", "fsync": fsync});
            }
            if auth {
                spec["auth"] = json!({"password": {"value": "secret"}});
            }
            if writes {
                spec["writes"] = json!({"minReplicas": 1, "maxLag": "5s"});
            }
            spec
        },
    )
}

fn is_label(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-')
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn every_valid_cluster_has_valid_objects(spec in any_spec(), name in "[a-z]([-a-z0-9]{0,38}[a-z0-9])?") {
        let mut cluster = cluster(&spec);
        cluster.metadata.name = Some(name);
        let wanted = validate(&cluster).unwrap();
        let count = wanted.replicas + 1;
        let built = objects(
            &wanted, &installation("larder:1"), &addresses(&wanted, count), &credentials(&Access::Open), &Kept::default(),
        );
        let services = services(&wanted, []);
        prop_assert_eq!(services.len(), 5 + usize::from(count) + usize::from(wanted.sentinels()));
        let Objects { service_account, secrets, config_maps, network_policy, disruption_budgets, stateful_sets, .. } = &built;
        let lists = [
            json!(services), json!([service_account]), json!(secrets), json!(config_maps), json!([network_policy]),
            json!(disruption_budgets), json!(stateful_sets),
        ];
        for object in lists.iter().flat_map(|list| list.as_array().unwrap()) {
            let metadata = &object["metadata"];
            prop_assert!(is_label(metadata["name"].as_str().unwrap()), "{}", metadata["name"]);
            prop_assert!(metadata["labels"].as_object().unwrap().values().all(|value| value.as_str().unwrap().len() <= 63));
            prop_assert_eq!(&metadata["ownerReferences"][0]["controller"], &json!(true));
        }
        for (id, generation) in &built.agent_generations {
            let config = AgentConfig::parse(text(&built, 0, &format!("agent-{}.json", id.index)).as_bytes());
            let config = config.map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!((config.generation, config.peers.len()), (*generation, usize::from(wanted.replicas)));
            let maxmemory: u64 = config.settings["maxmemory"].parse().unwrap();
            let limit: ByteSize = container(&built, 0).resources.as_ref().unwrap().limits.as_ref().unwrap()["memory"].0.parse().unwrap();
            prop_assert!(maxmemory > 0 && maxmemory + maxmemory / 2 + (24 << 20) <= limit.as_bytes());
        }
        for set in [0, 1] {
            let spec = stateful_sets[set].spec.as_ref().unwrap();
            let labels = spec.template.metadata.as_ref().unwrap().labels.as_ref().unwrap();
            let selected = spec.selector.match_labels.as_ref().unwrap();
            prop_assert!(selected.iter().all(|(key, value)| labels.get(key) == Some(value)));
        }
    }
}
