//! docs/operator.md and docs/policies.md name every reason that a condition can have: who meets one looks there. docs/operators-pitfalls.md names tests that exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The words in quotes right after each of the openings, in code without its tests.
fn quoted_after(path: &str, openings: &[&str]) -> BTreeSet<String> {
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let word = |rest: &str| rest.split('"').next().unwrap_or_default().to_owned();
    let found =
        openings.iter().flat_map(|opening| code.match_indices(opening).map(move |(at, _)| word(&code[at + opening.len()..])));
    found.filter(|word| word.starts_with(char::is_uppercase) && word.chars().all(char::is_alphanumeric)).collect()
}

#[test]
fn every_reason_of_a_condition_is_explained() {
    let mut reasons = quoted_after(
        "src/operator/cache_cluster/judge.rs",
        &["Verdict::yes(\"", "Verdict::no(\"", "            \"", "        { \""],
    );
    reasons.extend(quoted_after("src/operator/cache_cluster/judge/cluster.rs", &["Verdict::yes(\"", "Verdict::no(\""]));
    reasons.extend(quoted_after("src/operator/cache_cluster/reconcile.rs", &["Verdict::no(\"", "place, \""]));
    for expected in ["Serving", "Rolling", "SecretMissing", "InvalidSpec", "TooFewNodes", "SlotsNotServed"] {
        assert!(reasons.contains(expected), "{expected} is not found in the code any more: {reasons:?}");
    }
    let docs = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operator.md")).expect("docs/operator.md");
    let missing: Vec<&String> = reasons.iter().filter(|reason| !docs.contains(&format!("`{reason}`"))).collect();
    assert!(missing.is_empty(), "docs/operator.md does not explain {missing:?}");
}

#[test]
fn every_reason_of_a_policy_s_condition_is_explained() {
    let mut reasons = quoted_after("src/operator/cache_policy/verdict.rs", &["Verdict::yes(\"", "=> \""]);
    reasons.extend(quoted_after("src/operator/cache_policy/origins.rs", &["=> \""]));
    reasons.extend(quoted_after(
        "src/operator/cache_policy/report.rs",
        &["Verdict::yes(\"", "Verdict::no(\"", "Verdict::no(\n            \"", "Verdict::no(\n                \""],
    ));
    for expected in ["Overlap", "SecretNotFound", "CacheClusterNotFound", "NoWorkload", "NotWritten"] {
        assert!(reasons.contains(expected), "{expected} is not found in the code any more: {reasons:?}");
    }
    let docs = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/policies.md")).expect("docs/policies.md");
    let missing: Vec<&String> = reasons.iter().filter(|reason| !docs.contains(&format!("`{reason}`"))).collect();
    assert!(missing.is_empty(), "docs/policies.md does not explain {missing:?}");
}

#[test]
fn every_test_that_is_named_against_a_pitfall_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_to_string(root.join("docs/operators-pitfalls.md")).expect("docs/operators-pitfalls.md");
    let rows: Vec<&str> = docs.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
    assert!(rows.len() > 20, "the table is not read");
    for row in rows {
        let named: Vec<(&str, &str)> = row.split('`').filter_map(|word| word.split_once(".rs::")).collect();
        assert!(!named.is_empty(), "no test is named: {row}");
        for (file, test) in named {
            let text = fs::read_to_string(root.join(format!("{file}.rs"))).unwrap_or_else(|error| panic!("{file}.rs: {error}"));
            assert!(text.contains(&format!("fn {test}(")), "{file}.rs has no {test}");
        }
    }
}
