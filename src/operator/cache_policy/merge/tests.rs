use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::api::cache_cluster::{Eviction, Fsync, Keeping};
use crate::api::cache_policy::StrategyKind;
use crate::operator::cache_policy::slots;
use crate::policy::binding::SECRET_DIR;
use crate::policy::snapshot::{Origin, OriginKind};
use crate::policy::{KeyPattern, Span, Unmatched};

/// A policy of this age in minutes.
fn policy(name: &str, age: u32, spec: &Value) -> CachePolicy {
    let mut all = json!({"cacheCluster": "main", "workloads": {"matchLabels": {"app": "shop"}}});
    spec.as_object().unwrap().iter().for_each(|(field, value)| all[field] = value.clone());
    let created = format!("2026-01-01T{:02}:{:02}:00Z", (1000 - age) / 60, (1000 - age) % 60);
    let object = json!({
        "apiVersion": "larder.dev/v1alpha1", "kind": "CachePolicy",
        "metadata": {"name": name, "namespace": "store", "creationTimestamp": created}, "spec": all,
    });
    serde_json::from_value(object).unwrap()
}

/// A policy of one rule of this pattern.
fn covering(name: &str, age: u32, keys: &str) -> CachePolicy {
    policy(name, age, &json!({"rules": [rule("r", keys)]}))
}

fn rule(name: &str, keys: &str) -> Value {
    json!({"name": name, "keys": keys, "strategy": "CacheAside"})
}

/// A policy that loads `KEYS:{id}` from an origin `db`, whose URL is `url`.
fn loading(name: &str, age: u32, keys: &str, url: &Value) -> CachePolicy {
    let load = json!({"name": "db", "read": "SELECT 1 WHERE 1 = $id"});
    policy(
        name,
        age,
        &json!({
            "origins": [{"name": "db", "sql": {"url": url}}],
            "rules": [{"name": "r", "keys": format!("{keys}:{{id}}"), "strategy": "ReadThrough", "origin": load}],
        }),
    )
}

fn place() -> Place {
    Place {
        topology: Topology::Sentinel { master: "main".to_owned(), sentinels: vec!["10.0.0.1:26379".to_owned()] },
        tls: true,
        keeping: None,
    }
}

fn namespace() -> Namespace {
    let url = BTreeMap::from([
        ("url".to_owned(), b"postgres://app:hidden@db/shop\n".to_vec()),
        ("web".to_owned(), b"http://x".to_vec()),
    ]);
    Namespace {
        clusters: BTreeMap::from([
            ("main".to_owned(), Some(place())),
            ("other".to_owned(), Some(place())),
            ("new".to_owned(), None),
        ]),
        secrets: KnownSecrets(BTreeMap::from([("shop-db".to_owned(), url)])),
        ..Namespace::default()
    }
}

fn outcome(policies: &[CachePolicy]) -> Outcome {
    merge(&Workload::shop(), &policies.iter().collect::<Vec<_>>(), &namespace(), 7).unwrap()
}

fn snapshot(policies: &[CachePolicy]) -> Snapshot {
    outcome(policies).merged.unwrap().snapshot.unwrap()
}

/// Of each policy, in order, the name and the reason of its condition `Accepted`.
fn reasons(outcome: &Outcome) -> Vec<(&str, &'static str)> {
    outcome.judgements.iter().map(|judgement| (judgement.policy.as_str(), judgement.accepted().reason)).collect()
}

fn secret(name: &str, key: &str) -> Value {
    json!({"secretKeyRef": {"name": name, "key": key}})
}

#[test]
fn a_workload_follows_policies_that_select_its_pods_in_its_namespace() {
    let elsewhere = {
        let mut policy = covering("elsewhere", 1, "a:{id}");
        policy.metadata.namespace = Some("other".to_owned());
        policy
    };
    let others =
        policy("others", 2, &json!({"workloads": {"matchLabels": {"app": "shop", "tier": "db"}}, "rules": [rule("r", "a")]}));
    assert_eq!(merge(&Workload::shop(), &[&elsewhere, &others], &namespace(), 1), None);
    let ours = covering("ours", 3, "a:{id}");
    let outcome = merge(&Workload::shop(), &[&elsewhere, &ours, &others], &namespace(), 1).unwrap();
    assert_eq!(reasons(&outcome), [("ours", "Accepted")]);
}

#[test]
fn a_policy_that_writes_behind_needs_servers_that_keep_what_they_acknowledge() {
    let mut behind = loading("behind", 1, "user", &secret("shop-db", "url"));
    behind.spec.rules[0].strategy = StrategyKind::WriteBehind;
    behind.spec.rules[0].origin.as_mut().unwrap().write = Some("INSERT INTO t VALUES ($id, $value)".to_owned());
    let with = |fsync: Option<Fsync>| {
        let mut namespace = namespace();
        let keeping = Keeping { eviction: Eviction::VolatileLfu, fsync };
        namespace.clusters.insert("main".to_owned(), Some(Place { keeping: Some(keeping), ..place() }));
        let policies = [&behind, &loading("other", 0, "user", &secret("shop-db", "url"))];
        merge(&Workload::shop(), &policies, &namespace, 1).unwrap()
    };
    for fsync in [None, Some(Fsync::EverySecond)] {
        let outcome = with(fsync);
        assert_eq!(reasons(&outcome), [("behind", "InvalidSpec"), ("other", "Accepted")], "it takes nothing from others");
    }
    let outcome = with(Some(Fsync::Always));
    assert_eq!(reasons(&outcome)[0], ("behind", "Accepted"));
    assert!(outcome.merged.unwrap().snapshot.unwrap().writes_to_disk, "they are vouched for");
}

#[test]
fn a_policy_that_follows_tables_says_so_to_its_relay() {
    let mut following = loading("following", 1, "user", &secret("shop-db", "url"));
    let changes = json!({"changes": [{"table": "users", "all": true}]});
    following.spec.rules[0].invalidate = Some(serde_json::from_value(changes).unwrap());
    let outcome = outcome(&[following, loading("other", 0, "user", &secret("shop-db", "url"))]);
    assert_eq!(reasons(&outcome)[0], ("following", "Accepted"));
    assert_eq!(outcome.merged.unwrap().snapshot.unwrap().feeds.len(), 1);
}

#[test]
fn of_two_policies_with_one_slot_the_younger_has_no_part() {
    let with_slot = |name: &str, age: u32, rule: &str| {
        let mut policy = loading(name, age, rule, &secret("shop-db", "url"));
        let changes = json!({"changes": [{"table": "users", "all": true}]});
        policy.spec.rules[0].invalidate = Some(serde_json::from_value(changes).unwrap());
        policy.spec.origins[0].sql.as_mut().unwrap().changes = Some(serde_json::from_value(json!({"slot": "cache"})).unwrap());
        policy
    };
    let (old, young) = (with_slot("old", 2, "user"), with_slot("young", 1, "member"));
    // Also where no workload follows both.
    for followed in [vec![&old, &young], vec![&young]] {
        let namespace = Namespace { taken: slots::taken(&[&young, &old]), ..namespace() };
        let outcome = merge(&Workload::shop(), &followed, &namespace, 1).unwrap();
        let judgement = outcome.judgements.last().unwrap();
        assert_eq!((judgement.policy.as_str(), judgement.accepted().reason), ("young", "SlotTaken"));
        assert!(judgement.accepted().message.contains("CachePolicy `old`"), "{}", judgement.accepted().message);
        let feeds = outcome.merged.map_or(0, |merged| merged.snapshot.unwrap().feeds.len());
        assert_eq!(feeds, followed.len() - 1);
    }
}

#[test]
fn the_snapshot_names_files_where_sidecars_find_them() {
    let outcome = outcome(&[loading("shop", 1, "user", &secret("shop-db", "url"))]);
    let merged = outcome.merged.unwrap();
    assert_eq!((merged.cluster.as_str(), &merged.binding), ("main", &BindingName::of("Deployment", "shop", "main")));
    assert!(merged.is_complete);
    let snapshot = merged.snapshot.unwrap();
    assert_eq!((snapshot.generation, &snapshot.cluster.topology), (7, &place().topology));
    let [(entry, url)] = merged.files.0.iter().collect::<Vec<_>>()[..] else { panic!("{:?}", merged.files) };
    assert_eq!(url, "postgres://app:hidden@db/shop");
    let [Origin { kind: OriginKind::Sql { url: Sensitive::File(path) }, .. }] = &snapshot.origins[..] else {
        panic!("{snapshot:?}")
    };
    assert_eq!(path, &PathBuf::from(SECRET_DIR).join(entry));
    assert!(entry.starts_with("origin-") && entry.ends_with("-url"), "{entry}");
    let json = serde_json::to_value(&snapshot).unwrap();
    assert_eq!(
        json["cluster"],
        json!({
            "name": "main",
            "topology": {"sentinel": {"master": "main", "sentinels": ["10.0.0.1:26379"]}},
            "tls": {"caFile": "/etc/larder/secret/ca.crt"},
            "auth": {"usernameFile": "/etc/larder/secret/username", "passwordFile": "/etc/larder/secret/password"},
            "sentinelAuth": {
                "usernameFile": "/etc/larder/secret/sentinel-username", "passwordFile": "/etc/larder/secret/sentinel-password",
            },
            "patience": "8s", "idleTransaction": "1m",
        })
    );
    assert_eq!(Snapshot::parse(json.to_string().as_bytes()).unwrap(), snapshot);
    assert!(!format!("{:?}{json}", merged.files).contains("hidden"));
}

/// A snapshot and the Secret arrive at different times.
#[test]
fn a_file_never_comes_to_stand_for_another_origin() {
    let entry = |url: &Value| {
        let files = outcome(&[loading("shop", 1, "user", url)]).merged.unwrap().files;
        files.0.into_keys().next().unwrap()
    };
    let value = |url: &str| entry(&json!({"value": url}));
    let plain = value("postgres://app:one@db:5432/shop?sslmode=require");
    assert_eq!(plain, value("postgres://app:two@db:5432/shop?sslmode=require"), "a password rotates in its file");
    assert_ne!(plain, value("postgres://app:one@db:5432/other?sslmode=require"));
    assert_ne!(plain, value("postgres://app:one@elsewhere:5432/shop?sslmode=require"));
    assert_ne!(value("sqlite:///a.db"), value("sqlite:///b.db"));
    assert_ne!(plain, entry(&secret("shop-db", "url")));
    // Another policy's origin of the same name is another one.
    let both = [
        loading("a", 2, "user", &json!({"value": "sqlite://a.db"})),
        loading("b", 1, "item", &json!({"value": "sqlite://a.db"})),
    ];
    assert_eq!(outcome(&both).merged.unwrap().files.0.len(), 2);
}

#[test]
fn names_that_two_policies_use_stay_apart_and_readable() {
    let snapshot = snapshot(&[
        loading("new", 1, "item", &json!({"value": "sqlite://items.db"})),
        loading("old", 2, "user", &secret("shop-db", "url")),
    ]);
    let names: Vec<&str> = snapshot.rules.iter().map(|rule| rule.name.as_str()).collect();
    let origins: Vec<&str> = snapshot.origins.iter().map(|origin| origin.name.as_str()).collect();
    assert_eq!((names, origins), (vec!["r", "new/r"], vec!["db", "new/db"]));
    snapshot.check().unwrap();
    let loads = snapshot.rules.iter().map(|rule| match &rule.strategy {
        crate::policy::Strategy::ReadThrough(read_through) => read_through.load.origin.as_str(),
        other => panic!("{other:?}"),
    });
    assert_eq!(loads.collect::<Vec<_>>(), ["db", "new/db"]);
}

#[test]
fn the_older_policy_wins_and_the_other_hears_which_rules_clash() {
    let policies = [
        covering("young", 1, "user:{id}:cart"),
        covering("beside", 2, "order:{id}"),
        covering("b", 5, "user:{id…}"),
        covering("a", 5, "page:{path…}"),
        // Refused, so that it takes nothing from those behind it.
        policy("greedy", 4, &json!({"rules": [rule("one", "order:{id}"), rule("two", "page:home")]})),
    ];
    let outcome = outcome(&policies);
    assert_eq!(
        reasons(&outcome),
        [("a", "Accepted"), ("b", "Accepted"), ("greedy", "Overlap"), ("beside", "Accepted"), ("young", "Overlap")]
    );
    let message = outcome.judgements[4].accepted().message;
    assert_eq!(
        message,
        "the rule `r` (user:{id}:cart) and the rule `r` (user:{id…}) of the CachePolicy `b`, which is older, both cover keys such as \
         `user:x:cart` for Deployment shop: `b` stays in force; narrow one of the patterns, or bring both rules into one policy"
    );
    assert!(outcome.judgements[2].accepted().message.contains("the rule `two` (page:home) and the rule `r` (page:{path…})"));
    assert_eq!(outcome.merged.unwrap().snapshot.unwrap().rules.len(), 3);
}

#[test]
fn a_workload_uses_the_cluster_of_its_oldest_policy() {
    let other = |name: &str, age: u32| {
        policy(name, age, &json!({"cacheCluster": "other", "rules": [rule("r", &format!("{name}:{{id}}"))]}))
    };
    let outcome = outcome(&[covering("main-old", 3, "a:{id}"), other("second", 2), covering("third", 1, "b:{id}")]);
    assert_eq!(reasons(&outcome), [("main-old", "Accepted"), ("second", "TwoClusters"), ("third", "Accepted")]);
    let message = outcome.judgements[1].accepted().message;
    assert!(message.contains("the CachePolicy `main-old`, which is older and names the CacheCluster `main`"), "{message}");
    // One that is not valid decides nothing.
    let broken = policy("broken", 9, &json!({"cacheCluster": "other", "rules": [rule("r", "{id}{x}")]}));
    let outcome = self::outcome(&[broken, covering("good", 1, "a:{id}")]);
    assert_eq!(reasons(&outcome), [("broken", "InvalidSpec"), ("good", "Accepted")]);
    assert!(outcome.judgements[0].accepted().message.starts_with("spec.rules[0].keys: "), "{:?}", outcome.judgements[0]);
    assert_eq!(outcome.merged.unwrap().cluster, "main");
}

#[test]
fn what_makes_the_snapshot_too_large_is_left_out() {
    let long = |name: &str, age: u32, rules: usize, chars: usize| {
        let rules = (0..rules).map(|index| {
            let read = format!("SELECT '{}' WHERE 1 = $id", "x".repeat(chars));
            json!({
                "name": format!("r{index}"), "keys": format!("{name}-{index}:{{id}}"), "strategy": "ReadThrough",
                "origin": {"name": "db", "read": read},
            })
        });
        let origins = json!([{"name": "db", "sql": {"url": {"value": "sqlite://x.db"}}}]);
        policy(name, age, &json!({"origins": origins, "rules": rules.collect::<Vec<_>>()}))
    };
    let outcome = outcome(&[long("a", 4, 200, 3900), long("b", 3, 100, 3900), long("c", 2, 5, 3900), long("d", 1, 800, 10)]);
    assert_eq!(reasons(&outcome), [("a", "Accepted"), ("b", "TooLarge"), ("c", "Accepted"), ("d", "TooLarge")]);
    let snapshot = outcome.merged.unwrap().snapshot.unwrap();
    let json = serde_json::to_vec(&snapshot).unwrap();
    assert!(json.len() <= MAX_BYTES && Snapshot::parse(&json).is_ok());
    let wide: Vec<Value> =
        (0..200).map(|index| rule(&format!("r{index}"), &format!("{index}:{}:{{id}}", "k".repeat(400)))).collect();
    let wide = self::outcome(&[policy("wide", 1, &json!({"rules": wide}))]);
    assert_eq!(reasons(&wide), [("wide", "TooManyKeys")]);
    assert_eq!(wide.merged, None);
}

#[test]
fn what_is_missing_is_told_and_keeps_its_place() {
    for (url, reason, message) in [
        (secret("none", "url"), "SecretNotFound", "spec.origins `db` names the Secret `none`, which does not exist: create it"),
        (
            secret("shop-db", "none"),
            "SecretKeyNotFound",
            "names the entry `none` of the Secret `shop-db`, which has none: add it",
        ),
        (secret("shop-db", "web"), "InvalidSecret", "holds no URL for spec.origins `db`: write postgres://"),
    ] {
        let outcome =
            outcome(&[loading("old", 2, "user", &url), covering("young", 1, "user:7"), covering("beside", 1, "page:{id}")]);
        assert_eq!(reasons(&outcome), [("old", "Accepted"), ("beside", "Accepted"), ("young", "Overlap")]);
        let verdict = outcome.judgements[0].resolved_refs();
        assert_eq!((verdict.holds, verdict.reason), (false, reason));
        assert!(verdict.message.contains(message) && verdict.message.ends_with("stays in force"), "{}", verdict.message);
        assert!(outcome.judgements[1].resolved_refs().holds);
        let merged = outcome.merged.unwrap();
        let rules: Vec<String> = merged.snapshot.unwrap().rules.iter().map(|rule| rule.keys.to_string()).collect();
        assert_eq!((merged.is_complete, rules), (false, vec!["page:{id}".to_owned()]));
    }
    for (cluster, reason) in [("none", "CacheClusterNotFound"), ("new", "CacheClusterNotReady")] {
        let outcome = outcome(&[policy("p", 1, &json!({"cacheCluster": cluster, "rules": [rule("r", "a")]}))]);
        let judgement = &outcome.judgements[0];
        assert_eq!((judgement.accepted().reason, judgement.resolved_refs().reason), ("Accepted", reason));
        let merged = outcome.merged.unwrap();
        assert_eq!((merged.snapshot, merged.is_complete, merged.cluster.as_str()), (None, false, cluster));
    }
}

/// Where its Secret is gone a policy goes on, and changes, with the URL that its sidecars have; a new origin has none.
#[test]
fn a_url_that_is_gone_goes_on_as_it_lies_there() {
    let before = outcome(&[loading("old", 2, "user", &secret("gone", "url"))]);
    assert!(!before.judgements[0].has_part());
    let entry =
        outcome(&[loading("old", 2, "user", &secret("shop-db", "url"))]).merged.unwrap().files.0.into_keys().next().unwrap();
    let lying = |entry: &str| {
        let files = Files(BTreeMap::from([(entry.to_owned(), "postgres://app:hidden@old/shop".to_owned())]));
        Namespace {
            secrets: KnownSecrets::default(),
            lying: BTreeMap::from([(Workload::shop().binding("main"), files)]),
            ..namespace()
        }
    };
    let policies = [loading("old", 2, "member", &secret("shop-db", "url")), covering("beside", 1, "page:{id}")];
    let merge = |namespace: &Namespace| merge(&Workload::shop(), &policies.iter().collect::<Vec<_>>(), namespace, 7).unwrap();
    let goes_on = merge(&lying(&entry));
    assert!(goes_on.judgements.iter().all(Judgement::has_part));
    let verdict = goes_on.judgements[0].resolved_refs();
    assert_eq!((verdict.holds, verdict.reason), (false, "SecretNotFound"));
    assert!(verdict.message.ends_with("its rules go on with the URL that was there last"), "{}", verdict.message);
    let merged = goes_on.merged.unwrap();
    let rules: Vec<String> = merged.snapshot.unwrap().rules.iter().map(|rule| rule.keys.to_string()).collect();
    assert_eq!((merged.is_complete, rules), (true, vec!["member:{id}".to_owned(), "page:{id}".to_owned()]));
    assert_eq!(merged.files.0[&entry], "postgres://app:hidden@old/shop");
    let elsewhere = merge(&lying("origin-0123456789-url"));
    assert!(!elsewhere.judgements[0].has_part() && !elsewhere.merged.unwrap().is_complete, "never another's URL");
}

#[test]
fn origins_that_no_rule_loads_from_are_nobodys_business() {
    let mut unused = loading("shop", 1, "user", &secret("shop-db", "url"));
    let other = json!([{"name": "spare", "http": {"url": secret("none", "url")}}, {"name": "db", "sql": {"url": secret("shop-db", "url")}}]);
    unused.spec.origins = serde_json::from_value(other).unwrap();
    let merged = outcome(&[unused]).merged.unwrap();
    let origins: Vec<String> = merged.snapshot.unwrap().origins.into_iter().map(|origin| origin.name).collect();
    assert_eq!((merged.is_complete, merged.files.0.len(), origins), (true, 1, vec!["db".to_owned()]));
}

#[test]
fn no_younger_policy_weakens_an_older_one() {
    let says = |name: &str, age: u32, spec: &Value| {
        let mut spec = spec.clone();
        spec["rules"] = json!([rule("r", &format!("{name}:{{id}}"))]);
        policy(name, age, &spec)
    };
    let outcome = outcome(&[
        says("a", 4, &json!({"defaults": {"ttlSweep": "5m"}, "allow": {"flush": true, "keys": true}})),
        says("b", 3, &json!({"defaults": {"unmatched": "Refuse", "ttlSweep": "1h"}, "allow": {"keys": true}})),
        says("c", 2, &json!({"defaults": {"unmatched": "Ttl", "ttl": "1m"}, "allow": {"keys": true}})),
        says("d", 1, &json!({"mode": "Observe", "defaults": {"unmatched": "Ttl"}})),
    ]);
    let remarks: Vec<&[String]> = outcome.judgements.iter().map(|judgement| judgement.remarks.as_slice()).collect();
    assert_eq!(remarks[0], ["spec.allow.flush has no effect, since not every CachePolicy of Deployment shop says it"]);
    assert_eq!(remarks[2], ["spec.defaults.unmatched is Refuse, as the CachePolicy `b` says, which is older"]);
    assert!(remarks[1].is_empty() && remarks[3].is_empty());
    assert!(outcome.judgements[2].accepted().message.contains("spec.defaults.unmatched is Refuse"));
    let snapshot = outcome.merged.unwrap().snapshot.unwrap();
    assert_eq!((snapshot.unmatched, snapshot.ttl_sweep), (Unmatched::Refuse {}, Span::from_secs(300)));
    assert_eq!(snapshot.allow, Allow { flush: false, keys: true });
}

/// Five hundred policies of one workload: each is measured with all before it only where there is no room for all.
#[test]
fn a_workload_may_follow_hundreds_of_policies() {
    let policies: Vec<CachePolicy> =
        (0..500).map(|number| covering(&format!("p{number:03}"), number, &format!("k{number}:{{id}}"))).collect();
    let outcome = outcome(&policies);
    assert!(outcome.judgements.len() == 500 && outcome.judgements.iter().all(|judgement| judgement.accepted.is_ok()));
    let merged = outcome.merged.unwrap();
    assert!(merged.is_complete && merged.snapshot.unwrap().rules.len() == 500);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever policies there are: no two that are accepted cover one key, each that is refused clashes with one that is accepted, and
    /// the order in which they are read does not matter.
    #[test]
    fn accepted_policies_never_clash(
        patterns in prop::collection::vec((prop::sample::select(vec![
            "a:{x}", "a:b", "a:{x}:{y}", "ab:{x}", "{x}", "{x…}", "b{x}", "a{x…}", "{x}-{y}", "{x…}b", "c:{x}", "c:{x…}", "d",
        ]), 0u32..4), 1..7),
        rotated in 0usize..7,
    ) {
        let mut policies: Vec<CachePolicy> =
            patterns.iter().enumerate().map(|(index, (keys, age))| covering(&format!("p{index}"), *age, keys)).collect();
        let first = outcome(&policies);
        policies.rotate_left(rotated % patterns.len());
        prop_assert_eq!(&first, &outcome(&policies));
        let keys = |name: &str| patterns[name[1..].parse::<usize>().unwrap()].0.parse::<KeyPattern>().unwrap();
        let mut accepted: Vec<KeyPattern> = Vec::new();
        for judgement in &first.judgements {
            let clashes = accepted.iter().any(|earlier| earlier.common_key(&keys(&judgement.policy)).is_some());
            prop_assert_eq!(judgement.accepted.is_err(), clashes, "{:?}", judgement);
            accepted.extend(judgement.accepted.is_ok().then(|| keys(&judgement.policy)));
        }
        prop_assert_eq!(first.merged.unwrap().snapshot.unwrap().rules.len(), accepted.len());
    }
}
