use std::path::Path;

use super::*;
use crate::api::Manifests;

const CLUSTER: &str = r#"
apiVersion: larder.dev/v1alpha1
kind: CacheCluster
metadata: {name: main}
spec: {engine: {kind: Redis, version: "7.0"}, mode: Sentinel, memory: 256Mi}
"#;

fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: larder.dev/v1alpha1\nkind: CachePolicy\nmetadata: {{name: {name}}}\nspec:\n  cacheCluster: main\n  \
         workloads: {{matchLabels: {{app: shop}}}}\n{spec}"
    )
}

fn compile_all(policies: &[String]) -> Result<Snapshot, String> {
    compile_text(&format!("{CLUSTER}{}", policies.concat()))
}

/// A policy with these rules, and a cluster of which this is said besides.
fn compile_about_main(rules: &str, cluster: &str) -> Result<Snapshot, String> {
    let cluster = CLUSTER.replacen("memory: 256Mi", &format!("memory: 256Mi, {cluster}"), 1);
    compile_text(&format!("{cluster}{}", policy("p", rules)))
}

fn compile_text(text: &str) -> Result<Snapshot, String> {
    let manifests = Manifests::parse(Path::new("t.yaml"), text).map_err(|refused| refused.to_string())?;
    let cluster = &manifests.clusters.first().expect("a cluster").object;
    let reach = Reach {
        topology: Topology::Sentinel { master: "main".to_owned(), sentinels: vec!["127.0.0.1:26379".to_owned()] },
        tls: None,
        auth: None,
        sentinel_auth: None,
        patience: Span::from_secs(8),
    };
    let secrets = |_: &str, secret: &SecretKeyRef| match secret.name.as_str() {
        "shop-db" => Ok(Sensitive::File("/secrets/url".into())),
        name => Err(format!("there is no Secret `{name}`: create it")),
    };
    compile(cluster, &manifests.policies_for(cluster), 7, reach, &secrets).map_err(|problems| problems.to_string())
}

const READ_THROUGH: &str = r#"
  origins: [{name: db, sql: {url: {secretKeyRef: {name: shop-db, key: url}}}}]
  rules:
    - {name: user, keys: "user:{id}", strategy: ReadThrough, ttl: 48h, origin: {name: db, read: "SELECT 1"}}
"#;

#[test]
fn defaults_are_resolved() {
    let snapshot = compile_all(&[policy("shop", READ_THROUGH)]).expect("valid");
    assert_eq!(snapshot.generation, 7);
    assert_eq!(snapshot.unmatched, Unmatched::Bypass {});
    let origin = snapshot.origins.first().expect("one origin");
    assert_eq!((origin.max_connections, origin.timeout, origin.connect_timeout), (4, Span::from_secs(2), Span::from_secs(1)));
    let rule = snapshot.rules.first().expect("one rule");
    let Strategy::ReadThrough(read_through) = &rule.strategy else { panic!("not read-through") };
    assert_eq!(read_through.ttl.max, Span::from_secs(48 * 3600));
    assert_eq!((read_through.lease, read_through.wait), (Span::from_secs(3), Span::from_millis(2500)));
    assert_eq!((read_through.negative_ttl, read_through.stale), (Span::from_secs(10), Span::default()));
    let json = serde_json::to_vec(&snapshot).expect("serialises");
    assert_eq!(Snapshot::parse(&json).expect("a sidecar reads it"), snapshot);
}

/// The lease and the wait of a ReadThrough rule with this `stampede`, whose origin gives up after `timeout`.
fn of_loads(timeout: &str, stampede: &str) -> (String, String) {
    let text = READ_THROUGH.replacen("key: url}}}}", &format!("key: url}}}}, timeout: {timeout}}}}}"), 1).replacen(
        "ttl: 48h",
        &format!("ttl: 48h, stampede: {{{stampede}}}"),
        1,
    );
    let snapshot = compile_all(&[policy("shop", &text)]).expect("valid");
    let (lease, wait) = snapshot.rules.first().and_then(Rule::lease).expect("a lease");
    (lease.to_string(), wait.to_string())
}

#[test]
fn a_load_by_the_sidecar_is_waited_for_as_long_as_its_origin_may_take() {
    for (timeout, stampede, lease, wait) in [
        ("2s", "", "3s", "2s500ms"),
        ("30s", "", "31s", "30s500ms"),
        ("100ms", "", "1s100ms", "600ms"),
        ("2s", "wait: 1s", "3s", "1s"),
        ("2s", "wait: 10s", "10s500ms", "10s"),
        ("30s", "lease: 5s", "5s", "30s500ms"),
        ("30s", "lease: 5s, wait: 1s", "5s", "1s"),
    ] {
        assert_eq!(of_loads(timeout, stampede), (lease.to_owned(), wait.to_owned()), "{timeout} {stampede}");
    }
}

const WRITE_THROUGH: &str = r#"
  origins: [{name: db, sql: {url: {secretKeyRef: {name: shop-db, key: url}}}}]
  rules:
    - name: user
      keys: "user:{id}"
      strategy: WriteThrough
      origin: {name: db, read: "SELECT 1", write: "INSERT INTO t VALUES ($id, $value)", delete: "DELETE FROM t WHERE id = $id", version: v}
"#;

#[test]
fn a_rule_that_writes_through_loads_as_one_that_reads_through() {
    let snapshot = compile_all(&[policy("shop", WRITE_THROUGH)]).expect("valid");
    let rule = snapshot.rules.first().expect("one rule");
    let Strategy::WriteThrough(write_through) = &rule.strategy else { panic!("not write-through") };
    let Store::Sql { write, delete, version, increment: None } = &write_through.store else { panic!("not SQL") };
    assert_eq!((write.as_str(), version), ("INSERT INTO t VALUES ($id, $value)", &Some(RowVersion::Column("v".to_owned()))));
    assert!(delete.is_some() && snapshot.requires == 4);
    assert_eq!(rule.lease().map(|(lease, wait)| (lease.to_string(), wait.to_string())), Some(("3s".into(), "2s500ms".into())));
    let json = serde_json::to_vec(&snapshot).expect("serialises");
    assert_eq!(Snapshot::parse(&json).expect("a sidecar reads it"), snapshot);
}

#[test]
fn a_version_may_be_one_that_larder_keeps() {
    let kept = WRITE_THROUGH.replacen("version: v", "version: Kept", 1);
    let snapshot = compile_all(&[policy("shop", &kept)]).expect("valid");
    assert!(snapshot.rules[0].strategy.keeps_versions() && snapshot.requires == 10);
    let hash = compile_all(&[policy("shop", &kept.replacen("read:", "as: Hash, read:", 1))]).expect("valid");
    assert!(hash.rules[0].strategy.keeps_versions() && hash.rules[0].is_of_hashes());
}

#[test]
fn hashes_are_made_of_columns_and_written_through() {
    let hash = WRITE_THROUGH.replacen("read:", "as: Hash, read:", 1);
    let snapshot = compile_all(&[policy("shop", &hash)]).expect("valid");
    assert!(snapshot.rules[0].is_of_hashes() && snapshot.requires == 8);
    let behind = hash.replacen("WriteThrough", "WriteBehind", 1).replacen(", version: v", "", 1);
    let many = hash.replacen("read:", "readMany: \"SELECT 1\", read:", 1);
    let versioned = READ_THROUGH.replacen("read:", "as: Hash, read:", 1).replacen("ttl: 48h", "invalidate: {versioned: Rule}", 1);
    let raised = hash.replacen("read:", "increment: \"UPDATE t SET n = n + $by WHERE id = $id RETURNING n\", read:", 1);
    assert_eq!(compile_all(&[policy("shop", &raised.replacen("as: Hash, ", "", 1))]).expect("valid").requires, 8);
    for (text, path, words) in [
        (raised, "origin.increment", "no number"),
        (behind, "origin.as", "cannot be written behind"),
        (many, "origin.readMany", "MGET, which gives no hashes"),
        (versioned, "origin.as", "know no versions"),
    ] {
        let refused = compile_all(&[policy("shop", &text)]).expect_err(words);
        assert!(refused.contains(path) && refused.contains(words), "{refused}");
    }
}

const WRITE_BEHIND: &str = r#"
  origins: [{name: db, sql: {url: {secretKeyRef: {name: shop-db, key: url}}}}]
  rules:
    - name: user
      keys: "user:{id}"
      strategy: WriteBehind
      writeBehind: {journal: main, maxLag: 30s, maxBytes: 1Gi, overflow: WriteThrough}
      origin: {name: db, read: "SELECT 1", write: "INSERT INTO t VALUES ($id, $value, $version)"}
"#;

#[test]
fn a_rule_that_writes_behind_has_a_journal_of_its_policy_and_origin() {
    let snapshot = compile_about_main(WRITE_BEHIND, "storage: {size: 1Gi, fsync: Always}").expect("valid");
    let behind = snapshot.rules.first().and_then(|rule| rule.strategy.behind()).expect("it writes behind");
    let expected = crate::policy::Journal {
        name: "default.p.db".parse().expect("a name"),
        max_lag: Span::from_secs(30),
        max_depth: 100_000,
        max_bytes: crate::policy::ByteSize::from_bytes(1 << 30),
        batch: 100,
        overflow: crate::policy::Overflow::WriteThrough,
    };
    assert_eq!((&behind.journal, snapshot.requires), (&expected, 6));
    let json = serde_json::to_vec(&snapshot).expect("serialises");
    assert_eq!(Snapshot::parse(&json).expect("a sidecar reads it"), snapshot);
}

#[test]
fn what_was_acknowledged_needs_servers_that_keep_it() {
    let durable = "storage: {size: 1Gi, fsync: Always}";
    for (rules, cluster, expected) in [
        (WRITE_THROUGH, "eviction: allkeys-lru", "the marks of writes under way; write eviction: volatile-lfu there"),
        (
            WRITE_BEHIND,
            "eviction: allkeys-lru, storage: {size: 1Gi, fsync: Always}",
            "writes that no origin has yet; write eviction",
        ),
        (WRITE_BEHIND, "", "keeps its data in memory only, and what is written behind must be on disk"),
        (WRITE_BEHIND, "storage: {size: 1Gi}", "reach the disk after they are acknowledged, and what is written behind"),
    ] {
        let problems = compile_about_main(rules, cluster).expect_err(cluster);
        assert!(problems.contains(expected), "{cluster}: {problems}");
    }
    let elsewhere = WRITE_BEHIND.replacen("journal: main", "journal: other", 1);
    let problems = compile_about_main(&elsewhere, durable).expect_err("another CacheCluster");
    assert!(problems.contains("a journal lies in the policy's own CacheCluster"), "{problems}");
}

#[track_caller]
fn check_stampede(rule: &str, expected: Option<Stampede>) {
    let rules = format!("  rules: [{{name: a, keys: 'a:{{id}}', strategy: CacheAside{rule}}}]\n");
    let snapshot = compile_all(&[policy("p", &rules)]).expect("valid");
    let Some(Strategy::CacheAside(compiled)) = snapshot.rules.first().map(|rule| &rule.strategy) else {
        panic!("not cache-aside")
    };
    assert_eq!(compiled.stampede, expected, "{rule}");
    assert_eq!(snapshot.requires, if expected.is_some() { 2 } else { 1 }, "{rule}");
    let json = serde_json::to_vec(&snapshot).expect("serialises");
    assert_eq!(Snapshot::parse(&json).expect("a sidecar reads it"), snapshot);
}

#[test]
fn cache_aside_rules_take_leases_unless_told_otherwise() {
    let usual = Stampede {
        lease: Span::from_secs(3),
        wait: Span::from_secs(1),
        wait_follows_loads: true,
        early_expiry: Some(Beta::ONE),
        at_wait_end: AtWaitEnd::Error,
    };
    check_stampede("", Some(usual));
    check_stampede(", ttl: 9s", Some(Stampede { early_expiry: None, ..usual }));
    check_stampede(", stale: 1m, stampede: {earlyExpiry: 0}", Some(Stampede { early_expiry: None, ..usual }));
    let half = Stampede { lease: Span::from_secs(1), wait: Span::from_millis(500), ..usual };
    check_stampede(", stampede: {mode: Lease, lease: 1s}", Some(half));
    check_stampede(", stampede: {wait: 1s}", Some(Stampede { wait_follows_loads: false, ..usual }));
    check_stampede(", stampede: {atWaitEnd: Miss}", Some(Stampede { at_wait_end: AtWaitEnd::Miss, ..usual }));
    check_stampede(", stampede: {mode: Disabled}", None);
}

#[test]
fn a_policy_that_observes_says_so_of_its_rules_alone() {
    let first =
        policy("a", "  mode: Observe\n  defaults: {unmatched: Refuse}\n  rules: [{name: r, keys: a, strategy: CacheAside}]\n");
    let second = policy("b", "  rules: [{name: s, keys: b, strategy: CacheAside}]\n");
    let snapshot = compile_all(&[first, second]).expect("valid");
    let modes: Vec<Mode> = snapshot.rules.iter().map(|rule| rule.mode).collect();
    assert_eq!((modes, snapshot.unmatched), (vec![Mode::Observe, Mode::Enforce], Unmatched::Bypass {}));
}

#[test]
fn a_default_gives_way_to_what_was_written() {
    let rules = "  defaults: {ttl: 1h}\n  rules: [{name: a, keys: a, strategy: CacheAside, maxTtl: 1m}]\n";
    let snapshot = compile_all(&[policy("p", rules)]).expect("valid");
    let lifetime = *snapshot.rules.first().and_then(Rule::lifetime).expect("a lifetime");
    assert_eq!((lifetime.default, lifetime.max), (Span::from_secs(60), Span::from_secs(60)));
}

#[test]
fn the_shortest_sweep_counts() {
    let sweeps = |periods: &[&str]| {
        let rules = "  rules: [{name: r, keys: 'x:{id}', strategy: CacheAside}]\n";
        let named = |(index, period): (usize, &&str)| policy(&format!("p{index}"), &format!("{period}\n{rules}"));
        let policies: Vec<String> = periods.iter().enumerate().map(named).collect();
        compile_all(&policies).expect("valid").ttl_sweep
    };
    let stated = |period: &str| format!("  defaults: {{ttlSweep: {period}}}");
    assert_eq!(sweeps(&[""]), Span::from_secs(600));
    assert_eq!(sweeps(&["", &stated("5m"), &stated("1h")]), Span::from_secs(300));
    assert_eq!(sweeps(&[&stated("1h")]), Span::from_secs(3600));
}

#[test]
fn the_longest_patience_of_those_that_take_effect_counts() {
    let patience = |said: &[&str]| {
        let rules = "  rules: [{name: r, keys: 'x:{id}', strategy: CacheAside}]\n";
        let named = |(index, said): (usize, &&str)| policy(&format!("p{index}"), &format!("{said}\n{rules}"));
        let policies: Vec<String> = said.iter().enumerate().map(named).collect();
        compile_all(&policies).expect("valid").cluster.patience
    };
    let stated = |patience: &str| format!("  defaults: {{patience: {patience}}}");
    let observed = |patience: &str| format!("  mode: Observe\n{}", stated(patience));
    assert_eq!(patience(&[""]), Span::from_secs(8), "the CacheCluster's");
    assert_eq!(patience(&["", &stated("500ms")]), Span::from_millis(500));
    assert_eq!(patience(&[&stated("500ms"), &stated("30s"), &stated("2s")]), Span::from_secs(30));
    assert_eq!(patience(&[&stated("500ms"), &observed("30s")]), Span::from_millis(500));
    assert_eq!(patience(&[&observed("30s")]), Span::from_secs(8));
}

#[test]
fn policies_of_one_cluster_are_merged_by_name() {
    let first = policy("a", "  allow: {flush: true}\n  rules: [{name: r, keys: 'x:{id}', strategy: Bypass}]\n");
    let second = policy("b", "  allow: {keys: true}\n  rules: [{name: r, keys: 'y:{id}', strategy: Bypass}]\n");
    let snapshot = compile_all(&[second, first]).expect("valid");
    let names: Vec<&str> = snapshot.rules.iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(names, ["r", "b/r"]);
    assert_eq!(snapshot.allow, Allow { flush: true, keys: true });
}

#[test]
fn problems_name_the_place_and_the_remedy() {
    for (from, to, expected) in [
        ("user:{id}", "{id}{x}", "spec.rules[0].keys: `id` and `x` stand side by side; put"),
        ("name: shop-db", "name: other", "spec.origins[0].sql.url.secretKeyRef: there is no Secret `other`; create it"),
        (
            "secretKeyRef: {name: shop-db, key: url}",
            "value: 'http://x'",
            "no scheme that this kind of origin knows; write postgres",
        ),
        (
            "  origins:",
            "  defaults: {maxTtl: 1h}\n  origins:",
            "spec.rules[0].ttl: the ttl of 48h is longer than the maxTtl of 1h; shorten",
        ),
    ] {
        let text = READ_THROUGH.replacen(from, to, 1);
        assert_ne!(text, READ_THROUGH, "{from}");
        let error = compile_all(&[policy("shop", &text)]).expect_err(to);
        assert!(error.contains(expected), "{to}: {error}");
    }
    let clash = [
        policy("a", "  defaults: {unmatched: Refuse}\n  rules: [{name: r, keys: a, strategy: Bypass}]\n"),
        policy("b", "  defaults: {unmatched: Ttl}\n  rules: [{name: r, keys: b, strategy: Bypass}]\n"),
    ];
    assert!(compile_all(&clash).is_err_and(|error| error.contains("the policy `a` about the same cluster says otherwise")));
}

const FOLLOWS: &str = r#"
  origins:
    - {name: db, sql: {url: {secretKeyRef: {name: shop-db, key: url}}}}
    - {name: other, sql: {url: {value: "postgres://h/d"}, changes: {slot: theirs, publication: theirs_too, maxLag: 10Gi}}}
    - {name: web, http: {url: {value: "http://h"}}}
    - {name: file, sql: {url: {value: "sqlite://x"}}}
  rules:
    - name: user
      keys: "user:{id}"
      strategy: ReadThrough
      origin: {name: db, read: "SELECT 1"}
      invalidate: {changes: [{table: users}, {table: shop.addresses, columns: {id: user_id}}]}
    - {name: total, keys: "total:{kind}", strategy: CacheAside, invalidate: {changes: [{table: prices, origin: other, all: true}]}}
"#;

#[test]
fn rules_follow_tables_of_their_own_origin_or_of_another() {
    let snapshot = compile_all(&[policy("shop", FOLLOWS)]).expect("valid");
    assert_eq!(snapshot.requires, 6);
    let [db, other] = &snapshot.feeds[..] else { panic!("{:?}", snapshot.feeds) };
    assert!(db.slot.starts_with("larder_main_db_") && db.publication == db.slot && !db.given, "{db:?}");
    assert_eq!((db.origin.as_str(), db.max_lag.as_bytes()), ("db", 1 << 30));
    let tables: Vec<String> = db.follows.iter().map(|follow| format!("{} {}", follow.rule, follow.table)).collect();
    assert_eq!(tables, ["user users", "user shop.addresses"]);
    assert_eq!(db.follows[1].columns(&"user:{id}".parse().expect("a pattern")), ["user_id"]);
    assert_eq!((other.slot.as_str(), other.publication.as_str(), other.given), ("theirs", "theirs_too", true));
    assert_eq!((other.max_lag.as_bytes(), other.follows.len()), (10 << 30, 1));
    let json = serde_json::to_vec(&snapshot).expect("serialises");
    assert_eq!(Snapshot::parse(&json).expect("a relay reads it"), snapshot);
    // Of two policies that say the same, each has a slot of its own, and rules are called as in the snapshot.
    let both = compile_all(&[policy("shop", FOLLOWS), policy("zoo", FOLLOWS)]);
    assert!(both.is_err_and(|error| error.contains("the slot `theirs` is used twice")));
    let own = FOLLOWS.replace(", changes: {slot: theirs, publication: theirs_too, maxLag: 10Gi}", "");
    let both = compile_all(&[policy("shop", FOLLOWS), policy("zoo", &own)]).expect("valid");
    assert_eq!((both.feeds[2].origin.as_str(), both.feeds[2].follows[0].rule.as_str()), ("zoo/db", "zoo/user"));
    let observing = format!("  mode: Observe{FOLLOWS}");
    assert!(
        compile_all(&[policy("shop", &observing)]).expect("valid").feeds.is_empty(),
        "what only observes invalidates nothing"
    );
}

const TAGGED: &str = r#"
  origins: [{name: db, sql: {url: {value: "postgres://h/d"}}}]
  rules:
    - name: page
      keys: "page:{number}"
      strategy: CacheAside
      invalidate: {versioned: Entity, changes: [{table: books, tag: "author:{id}", columns: {id: author_id}, origin: db}]}
    - name: shelf
      keys: "shelf:{author}:{size}"
      strategy: CacheAside
      invalidate: {tags: ["author:{author}"], changes: [{table: authors, tag: "author:{id}", origin: db}]}
    - {name: user, keys: "user:{id}", strategy: CacheAside, invalidate: {tags: ["user:{id}"]}}
"#;

/// Whoever may have the tag follows the table too, for what cannot be told by tags.
#[test]
fn a_table_that_is_followed_by_a_tag_is_followed_by_all_rules_that_may_have_it() {
    let snapshot = compile_all(&[policy("shop", TAGGED)]).expect("valid");
    assert_eq!(snapshot.requires, 9);
    let [feed] = &snapshot.feeds[..] else { panic!("{:?}", snapshot.feeds) };
    let said =
        |follow: &Follow| format!("{} {} {}", follow.rule, follow.table, follow.columns(&snapshot.rules[0].keys).join(","));
    let mut follows: Vec<String> = feed.follows.iter().map(said).collect();
    follows.sort();
    assert_eq!(follows, ["page authors id", "page books author_id", "shelf authors id", "shelf books author_id"]);
    for (from, to, words) in [
        ("tag: \"author:{id}\", origin", "tag: \"writer:{id}\", origin", "write a tag of the form of one of author:{author}"),
        ("versioned: Entity, ", "", "no value of the rule has tags"),
        ("{id: author_id}", "{number: author_id}", "no part `number` is in the tag"),
    ] {
        let error = compile_all(&[policy("shop", &TAGGED.replacen(from, to, 1))]).expect_err(words);
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn what_cannot_be_followed_is_refused_with_a_sentence() {
    for (from, to, words) in [
        ("origin: other, ", "", "the rule loads from no origin whose table this could be"),
        ("origin: other, ", "origin: none, ", "there is no origin `none`"),
        ("origin: other, ", "origin: web, ", "the origin `web` tells of no changes"),
        ("origin: other, ", "origin: file, ", "write events to larder:events"),
        ("{id: user_id}", "{user: user_id}", "no part `user`"),
        ("table: users", "table: a.b.c", "write TABLE, of the schema public"),
        ("total:{kind}", "total", "all: true"),
    ] {
        let text = FOLLOWS.replacen(from, to, 1).replacen(", all: true", if to == "total" { "" } else { ", all: true" }, 1);
        let error = compile_all(&[policy("shop", &text)]).expect_err(words);
        assert!(error.contains(words), "{error}");
    }
}
