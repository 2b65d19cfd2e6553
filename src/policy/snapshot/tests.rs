use super::*;

const MINIMAL: &str = r#"{"version":1,"requires":1,"generation":1,
    "cluster":{"name":"main","topology":{"cluster":{"seeds":["127.0.0.1:7000"]}}},
    "unmatched":{"bypass":{}},
    "origins":[{"name":"db","kind":{"sql":{"url":{"value":"postgres://u:secret@h/d"}}},"maxConnections":2,"connectTimeout":"1s","timeout":"2s"}],
    "rules":[{"name":"user","keys":"user:{id}","strategy":{"readThrough":{"ttl":{"default":"10m","max":"24h","jitter":"10%"},
        "stale":"1m","negativeTtl":"10s","lease":"3s","wait":"1s",
        "load":{"origin":"db","query":{"sql":{"read":"SELECT name FROM users WHERE id = $id"}},"reply":null}}}}]}"#;

#[test]
fn a_snapshot_reads_back_what_it_writes() {
    let snapshot = Snapshot::parse(MINIMAL.as_bytes()).expect("valid");
    let json = serde_json::to_vec(&snapshot).expect("serialises");
    assert_eq!(Snapshot::parse(&json).expect("valid"), snapshot);
}

/// A minimal snapshot with one cache-aside rule.
fn cache_aside(more: &str) -> Result<Snapshot, String> {
    let rules = MINIMAL.find(r#""rules""#).expect("rules");
    let rule = format!(
        r#""rules":[{{"name":"a","keys":"a:{{id}}","strategy":{{"cacheAside":{{"ttl":{{"default":"10m","max":"24h","jitter":"10%"}}{more}}}}}}}]}}"#
    );
    Snapshot::parse(format!("{}{rule}", &MINIMAL[..rules]).as_bytes()).map_err(|error| error.to_string())
}

#[test]
fn cache_aside_rules_of_the_first_form_protect_nothing() {
    let old = cache_aside("").expect("valid");
    let Some(Strategy::CacheAside(rule)) = old.rules.first().map(|rule| &rule.strategy) else { panic!("no rule") };
    assert_eq!((rule.stale, rule.stampede), (Span::default(), None));
    assert_eq!(required_form(&[], &old.rules), 1);
    let observing = Rule { mode: Mode::Observe, ..old.rules[0].clone() };
    assert_eq!(required_form(&[], &[observing]), 2);
    assert!(!serde_json::to_string(&old).expect("serialises").contains("stampede"), "an older sidecar reads it");
}

#[test]
fn cache_aside_rules_with_leases_are_checked() {
    let stampede = |lease: &str, wait: &str, beta: &str| {
        format!(r#","stampede":{{"lease":"{lease}","wait":"{wait}","earlyExpiry":{beta},"atWaitEnd":"error"}}"#)
    };
    let new = cache_aside(&format!(r#"{},"stale":"1m""#, stampede("3s", "1s", "1"))).expect("valid");
    assert_eq!(required_form(&[], &new.rules), 2);
    assert_eq!(Snapshot::parse(&serde_json::to_vec(&new).expect("serialises")).expect("valid"), new);
    for (more, word) in [
        (stampede("1s", "1s", "1"), "shorter than its lease"),
        (stampede("0s", "0s", "1"), "shorter than its lease"),
        (stampede("3s", "1s", "0"), "up to 10"),
        (r#","stale":"1m""#.to_owned(), "needs stampede"),
    ] {
        assert!(cache_aside(&more).is_err_and(|error| error.contains(word)), "{more}");
    }
}

#[test]
fn older_readers_are_told_what_they_can_be_told() {
    let json = MINIMAL.replacen(r#""maxConnections":2"#, r#""maxConnections":2,"maxTotalConnections":50"#, 1);
    let mut newest = Snapshot::parse(json.as_bytes()).expect("valid");
    let leases = cache_aside(r#","stale":"1m","stampede":{"lease":"3s","wait":"1s","atWaitEnd":"error"}"#).expect("valid");
    newest.rules.extend(leases.rules);
    let mut watched = newest.rules[0].clone();
    (watched.name, watched.mode) = ("watched".to_owned(), Mode::Observe);
    newest.rules.push(watched);
    (newest.version, newest.requires) = (VERSION, required_form(&newest.origins, &newest.rules));
    newest.check().expect("valid");
    for form in [VERSION, VERSION + 1] {
        assert_eq!(newest.clone().in_form(form), newest);
    }
    let untagged = newest.rules.clone();
    newest.rules[0].tags.push("user:{id}".parse().expect("a pattern"));
    newest.requires = required_form(&newest.origins, &newest.rules);
    newest.rules[0].versioned = Versioned::Rule;
    let of_rule = Snapshot { version: 6, ..newest.clone() };
    assert_eq!((newest.requires, newest.clone().in_form(6)), (6, of_rule.clone()));
    newest.rules[0].versioned = Versioned::Entity;
    newest.requires = required_form(&newest.origins, &newest.rules);
    let of_key = Snapshot { version: 7, ..newest.clone() };
    assert_eq!((newest.requires, newest.clone().in_form(6), newest.clone().in_form(7)), (7, of_rule.clone(), of_key));
    for snapshot in [&newest, &of_rule] {
        let json = serde_json::to_vec(snapshot).expect("serialises");
        assert_eq!(&Snapshot::parse(&json).expect("it can be read"), snapshot);
    }
    newest.check().expect("valid");
    let second = newest.clone().in_form(2);
    assert_eq!((second.version, second.requires, &second.rules), (2, 2, &untagged));
    for form in [1, 0] {
        let first = newest.clone().in_form(form);
        assert_eq!((first.version, first.requires), (1, 1));
        assert_eq!(first.rules.len(), newest.rules.len());
        let text = serde_json::to_string(&first).expect("serialises");
        for novelty in ["mode", "stampede", "maxTotalConnections", "tags", "versioned"] {
            assert!(!text.contains(novelty), "{novelty} in {text}");
        }
        assert_eq!(first.rules.last().map(|rule| &rule.strategy), Some(&Strategy::Bypass {}));
        assert_eq!(Snapshot::parse(text.as_bytes()).expect("it can be read"), first);
    }
    let writing = write_through(r#"{"sql":{"write":"INSERT INTO users VALUES ($id, $value)"}}"#).expect("valid");
    newest.rules = writing.rules;
    newest.requires = required_form(&newest.origins, &newest.rules);
    assert_eq!(newest.clone().in_form(3), newest, "who would write past the origin is told nothing");
}

#[test]
fn an_origin_s_connections_are_shared_evenly_and_never_none() {
    let mut snapshot = Snapshot::parse(MINIMAL.as_bytes()).expect("valid");
    assert_eq!([0, 1, 1000].map(|sidecars| snapshot.origins[0].share(sidecars)), [2; 3]);
    assert_eq!(required_form(&snapshot.origins, &snapshot.rules), 1);
    snapshot.origins[0].max_connections = 8;
    snapshot.origins[0].max_total_connections = Some(50);
    assert_eq!([0, 1, 6, 7, 10, 50, 51, u32::MAX].map(|sidecars| snapshot.origins[0].share(sidecars)), [8, 8, 8, 7, 5, 1, 1, 1]);
    assert_eq!(required_form(&snapshot.origins, &snapshot.rules), 3);
}

#[test]
fn a_farewell_has_no_rules_and_a_ttl_for_every_key() {
    let snapshot = Snapshot::parse(MINIMAL.as_bytes()).expect("valid");
    let lifetime = *snapshot.rules[0].lifetime().expect("a lifetime");
    let last = snapshot.farewell(9, lifetime);
    assert_eq!(last.cluster, snapshot.cluster);
    assert!(last.rules.is_empty() && last.origins.is_empty() && last.unmatched == Unmatched::Ttl(lifetime));
    let json = serde_json::to_vec(&last).expect("serialises");
    assert_eq!(Snapshot::parse(&json).expect("valid"), last);
    assert_eq!(Snapshot::claimed_generation(&json), Some(9));
    assert_eq!(Snapshot::claimed_generation(br#"{"generation":7,"requires":99,"new":[]}"#), Some(7));
    assert_eq!(Snapshot::claimed_generation(b"{"), None);
}

fn write_through(store: &str) -> Result<Snapshot, SnapshotError> {
    let json = MINIMAL.replacen("readThrough\":{", "writeThrough\":{\"read\":{", 1);
    let json = json.replacen("\"reply\":null}}", &format!("\"reply\":null}}}},\"store\":{store}}}"), 1);
    Snapshot::parse(json.as_bytes())
}

#[test]
fn rules_that_write_behind_need_sidecars_that_know_them_and_a_journal_that_holds_a_command() {
    let behind = |depth: u64, flush: bool| {
        let read = r#"{"ttl":{"default":"1m","max":"1h","jitter":"0%"},"stale":"0s","negativeTtl":"0s","lease":"3s","wait":"1s",
            "load":{"origin":"db","query":{"sql":{"read":"SELECT v FROM t WHERE id = $id"}},"reply":null}}"#;
        let json = format!(
            r#"{{"version":5,"requires":5,"generation":1,"cluster":{{"name":"main","topology":{{"cluster":{{"seeds":["h:1"]}}}}}},
            "unmatched":{{"bypass":{{}}}},"allow":{{"flush":{flush}}},"origins":[{{"name":"db","kind":{{"sql":{{"url":{{"value":"sqlite://x"}}}}}},
            "maxConnections":1,"connectTimeout":"1s","timeout":"1s"}}],"rules":[{{"name":"a","keys":"a:{{id}}","strategy":{{"writeBehind":
            {{"read":{read},"store":{{"sql":{{"write":"INSERT INTO t VALUES ($id, $value)"}}}},"journal":{{"name":"shop.users",
            "maxLag":"30s","maxDepth":{depth},"maxBytes":"64Mi","batch":500}}}}}}}}]}}"#
        );
        Snapshot::parse(json.as_bytes())
    };
    let snapshot = behind(4096, false).expect("valid");
    assert_eq!(required_form(&snapshot.origins, &snapshot.rules), 5);
    assert_eq!(snapshot.clone().in_form(4), snapshot, "it cannot be said otherwise");
    assert!(snapshot.needs_relay());
    let mut overflowing = snapshot.clone();
    if let Strategy::WriteBehind(rule) = &mut overflowing.rules[0].strategy {
        rule.journal.overflow = Overflow::WriteThrough;
    }
    assert_eq!(required_form(&[], &overflowing.rules), 6);
    assert_eq!(overflowing.clone().in_form(5), overflowing, "it would journal past a write that goes through");
    let mut kept = snapshot.clone();
    if let Strategy::WriteBehind(rule) = &mut kept.rules[0].strategy
        && let Store::Sql { version, .. } = &mut rule.store
    {
        *version = Some(RowVersion::Kept {});
    }
    kept.requires = 10;
    assert!(kept.check().is_err_and(|error| error.to_string().contains("numbers its writes itself")));
    assert!(behind(4095, false).is_err_and(|error| error.to_string().contains("at least 4096 writes")));
    assert!(behind(4096, true).is_err_and(|error| error.to_string().contains("FLUSHALL")));
}

#[test]
fn rules_that_write_through_need_sidecars_that_know_them() {
    let sql = write_through(r#"{"sql":{"write":"INSERT INTO users VALUES ($id, $value)"}}"#).expect("valid");
    assert_eq!(required_form(&sql.origins, &sql.rules), 4);
    assert_eq!(Snapshot::parse(&serde_json::to_vec(&sql).expect("serialises")).expect("valid"), sql);
    assert!(write_through(r#"{"http":{}}"#).is_err_and(|error| error.to_string().contains("by `write`")));
    let store = r#"{"sql":{"write":"INSERT INTO users VALUES ($id, $value)"INC}}"#;
    let raising = store.replace("INC", r#","increment":"UPDATE users SET n = n + $by WHERE id = $id RETURNING n""#);
    let raising = write_through(&raising).expect("valid");
    assert_eq!(required_form(&raising.origins, &raising.rules), 8);
    assert_eq!(raising.in_form(7).rules, sql.rules, "who does not know it refuses INCR");
}

#[test]
fn versions_that_larder_keeps_need_sidecars_that_know_them() {
    let with = |version: &str| {
        let json = format!(r#"{{"sql":{{"write":"INSERT INTO users VALUES ($id, $value)"{version}}}}}"#);
        write_through(&json).expect("valid")
    };
    let (kept, none) = (with(r#","version":{"kept":{}}"#), with(""));
    assert!(kept.rules[0].strategy.keeps_versions());
    assert_eq!(required_form(&kept.origins, &kept.rules), 10);
    assert_eq!(Snapshot::parse(&serde_json::to_vec(&kept).expect("serialises")).expect("valid"), kept);
    assert_eq!(kept.clone().in_form(10).rules, kept.rules);
    let older = kept.in_form(9);
    assert_eq!((older.requires, &older.rules), (4, &none.rules), "of writes that overlap they keep none");
    // A column is told as ever, whatever its name.
    for name in ["row_version", "kept", "Kept"] {
        let column = with(&format!(r#","version":"{name}""#));
        let Some((_, Store::Sql { version: Some(version), .. })) = column.rules[0].strategy.writes() else {
            panic!("no version")
        };
        assert_eq!((version.column(), column.clone().in_form(4).rules), (Some(name), column.rules.clone()));
        assert!(serde_json::to_string(&column).expect("serialises").contains(&format!(r#""version":"{name}""#)));
    }
}

#[test]
fn rules_of_hashes_need_sidecars_that_know_them_and_columns_to_make_them_of() {
    let hashes = |json: &str| Snapshot::parse(json.replacen(r#""reply":null"#, r#""reply":"Hash""#, 1).as_bytes());
    let loading = hashes(MINIMAL).expect("valid");
    assert_eq!(required_form(&loading.origins, &loading.rules), 8);
    assert_eq!(loading.clone().in_form(7), loading, "it cannot be said otherwise");
    assert_eq!(Snapshot::parse(&serde_json::to_vec(&loading).expect("serialises")).expect("valid"), loading);
    let many = MINIMAL.replacen(r#"= $id"}}"#, r#"= $id","readMany":"SELECT id, name FROM users WHERE id = ANY($id)"}}"#, 1);
    let versioned = MINIMAL.replacen(r#""keys":"user:{id}""#, r#""versioned":true,"keys":"user:{id}""#, 1);
    let http =
        MINIMAL.replacen(r#"{"sql":{"read":"SELECT name FROM users WHERE id = $id"}}"#, r#"{"http":{"path":"/x/{id}"}}"#, 1);
    for (json, word) in [(many, "MGET"), (versioned, "versioned"), (http, "columns")] {
        assert!(hashes(&json).is_err_and(|error| error.to_string().contains(word)), "{word}");
    }
}

#[test]
fn feeds_are_of_databases_and_for_rules_that_there_are() {
    let with =
        |feed: &str| Snapshot::parse(MINIMAL.replacen(r#""origins""#, &format!(r#""feeds":[{feed}],"origins""#), 1).as_bytes());
    let feed = |origin: &str, rule: &str, touches: &str| {
        format!(
            r#"{{"origin":"{origin}","slot":"larder_main_db","publication":"larder_main_db","maxLag":"1Gi",
            "follows":[{{"rule":"{rule}","table":"users","touches":{touches}}}]}}"#
        )
    };
    let key = r#"{"key":{}}"#;
    let snapshot = with(&feed("db", "user", key)).expect("valid");
    assert_eq!(Snapshot::parse(&serde_json::to_vec(&snapshot).expect("serialises")).expect("valid"), snapshot);
    assert!(snapshot.clone().in_form(5).feeds.is_empty(), "older sidecars need not know");
    assert_eq!(snapshot.clone().in_form(6).feeds, snapshot.feeds);
    let by_tag = feed("db", "user", r#"{"tag":{"tag":"author:{id}"}}"#);
    assert!(with(&by_tag).is_err_and(|error| error.to_string().contains("no key of it has a tag `author:{id}`")));
    let json = MINIMAL.replacen(r#""origins""#, &format!(r#""feeds":[{by_tag}],"origins""#), 1);
    let tagged = Snapshot::parse(json.replacen(r#""strategy""#, r#""tags":["author:{id}"],"strategy""#, 1).as_bytes());
    let (tagged, all) = (tagged.expect("valid"), with(&feed("db", "user", r#"{"all":{}}"#)).expect("valid").feeds);
    assert_eq!((&tagged.clone().in_form(9).feeds, tagged.clone().in_form(9).requires), (&tagged.feeds, 9));
    assert_eq!((&tagged.clone().in_form(8).feeds, tagged.in_form(8).requires), (&all, 6), "an older relay has all keys go");
    let ends = feed("db", "user", key).replace(&format!(r#"{{"rule":"user","table":"users","touches":{key}}}"#), "");
    assert!(with(&ends).expect("valid").feeds[0].follows.is_empty(), "its slot is to be taken away");
    let twice = format!("{0},{0}", feed("db", "user", key));
    for (json, word) in [
        (feed("dc", "user", key), "no sql origin"),
        (feed("db", "order", key), "no rule `order`"),
        (feed("db", "user", r#"{"key":{"columns":{"x":"y"}}}"#), "no part `x`"),
        (twice, "used twice"),
    ] {
        assert!(with(&json).is_err_and(|error| error.to_string().contains(word)), "{word}");
    }
}

#[test]
fn a_snapshot_that_is_refused_tells_where_the_cache_is() {
    let known = Snapshot::parse(MINIMAL.as_bytes()).expect("valid");
    let newer = MINIMAL.replacen(r#""requires":1"#, r#""requires":99,"novel":[]"#, 1).replacen("readThrough", "readAhead", 1);
    assert!(matches!(Snapshot::parse(newer.as_bytes()), Err(SnapshotError::TooNew(99))));
    let place = Snapshot::claimed_place(newer.as_bytes()).expect("a place");
    assert_eq!(place, Snapshot::waiting(known.generation, known.cluster));
    assert!(place.rules.is_empty() && place.unmatched == Unmatched::Refuse {});
    for (from, to) in [("127.0.0.1:7000", "nowhere"), (r#""cluster":{"#, r#""cluster":{"novel":1,"#), ("}]}", "}]")] {
        let json = MINIMAL.replacen(from, to, 1);
        assert!(json != MINIMAL && Snapshot::claimed_place(json.as_bytes()).is_none(), "{json}");
    }
}

#[test]
fn secrets_do_not_show() {
    let snapshot = Snapshot::parse(MINIMAL.as_bytes()).expect("valid");
    assert!(!format!("{snapshot:?}").contains("secret"));
}

#[test]
fn contradictions_name_the_place() {
    for (from, to, word) in [
        (r#""requires":1"#, r#""requires":99"#, "upgrade"),
        (r#""generation":1"#, r#""generation":1,"extra":1"#, "extra"),
        ("127.0.0.1:7000", "nowhere", "host:port"),
        (r#""cluster":{"#, r#""cluster":{"patience":"61s","#, "at most 1m"),
        (r#""origin":"db""#, r#""origin":"dc""#, "dc"),
        (r#""maxConnections":2"#, r#""maxConnections":2,"maxTotalConnections":0"#, "above zero"),
        (r#""default":"10m""#, r#""default":"48h""#, "maxTtl"),
        (r#""name":"user","#, r#""name":"user","tags":["user:{name}"],"#, "`name`, which the keys do not have"),
        (r#""keys":"user:{id}""#, r#""versioned":true,"keys":"user:{id}:x""#, "must end in a part"),
        (r#"{"sql":{"read":"SELECT name FROM users WHERE id = $id"}}"#, r#"{"http":{"path":"/x"}}"#, "`read`"),
    ] {
        let json = MINIMAL.replacen(from, to, 1);
        assert_ne!(json, MINIMAL);
        let error = Snapshot::parse(json.as_bytes()).expect_err(to).to_string();
        assert!(error.contains(word), "{to}: {error}");
    }
}

#[test]
fn a_relay_loads_where_sidecars_outnumber_an_origin_s_connections() {
    let mut snapshot = Snapshot::parse(MINIMAL.as_bytes()).expect("valid");
    assert!(!snapshot.needs_relay());
    snapshot.origins[0].max_total_connections = Some(50);
    snapshot.origins[0].load_queue = Some("store.shop.db".parse().expect("a name"));
    snapshot.requires = required_form(&snapshot.origins, &snapshot.rules);
    snapshot.check().expect("valid");
    assert!(snapshot.requires == 8 && snapshot.needs_relay());
    assert_eq!([1, 50, 51, u32::MAX].map(|sidecars| snapshot.origins[0].queue(sidecars).is_some()), [false, false, true, true]);
    assert_eq!(snapshot.clone().shared_among(51), snapshot);
    let few = snapshot.clone().shared_among(50);
    assert!((few.requires, &few.origins[0].load_queue) == (3, &None) && !few.needs_relay());
    let older = snapshot.clone().in_form(7);
    assert_eq!((older.requires, &older.origins[0].load_queue), (3, &None));
    snapshot.origins[0].max_total_connections = None;
    assert!(snapshot.check().is_err_and(|error| error.to_string().contains("loadQueue needs maxTotalConnections")));
}
