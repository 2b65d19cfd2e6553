//! `larder check` over a folder of manifests, each of which says at its end what is to be found in it:
//! `# expect LINE:COLUMN SEVERITY-OR-CODE PATH | text | text …`, where the texts occur in what, why and remedy together.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn larder(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_larder")).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("larder runs")
}

fn manifests(folder: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifests").join(folder);
    let mut files: Vec<PathBuf> =
        fs::read_dir(root).expect("the folder is there").map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{folder} is empty");
    files
}

fn text<'a>(finding: &'a Value, field: &str) -> &'a str {
    finding[field].as_str().unwrap_or_else(|| panic!("no {field} in {finding}"))
}

/// Whether one line of expectations describes one finding.
fn is_met(expectation: &str, finding: &Value) -> bool {
    let mut fields = expectation.split(" | ");
    let head: Vec<&str> = fields.next().unwrap_or_default().split_whitespace().collect();
    let kind = if text(finding, "severity") == "error" { "error" } else { text(finding, "code") };
    let place = format!("{}:{}", finding["line"], finding["column"]);
    let prose = ["what", "why", "remedy"].map(|field| text(finding, field)).join("\n");
    head == [place.as_str(), kind, text(finding, "path")].into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>()
        && fields.all(|words| prose.contains(words.trim()))
}

/// Checks one file: each expectation is met by a finding of its own, and there is no other finding.
fn check_file(file: &Path, exit_code: i32) -> Vec<String> {
    let shown = file.display();
    let output = larder(&["check", "--output", "json", &file.to_string_lossy()]);
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{shown}: {error}\n{}", String::from_utf8_lossy(&output.stderr)));
    let mut findings = report["findings"].as_array().expect("findings").clone();
    let mut wrong = Vec::new();
    if output.status.code() != Some(exit_code) {
        wrong.push(format!("{shown}: exit code {:?}, not {exit_code}", output.status.code()));
    }
    for line in fs::read_to_string(file).expect("a text").lines() {
        let Some(expectation) = line.strip_prefix("# expect ") else { continue };
        match findings.iter().position(|finding| is_met(expectation, finding)) {
            Some(at) => drop(findings.remove(at)),
            None => wrong.push(format!("{shown}: not found: {expectation}")),
        }
    }
    wrong.extend(findings.iter().map(|finding| format!("{shown}: not expected: {finding}")));
    wrong
}

fn check_folder(folder: &str, exit_code: i32) {
    let wrong: Vec<String> = manifests(folder).iter().flat_map(|file| check_file(file, exit_code)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn good_manifests_are_found_good() {
    check_folder("good", 0);
}

#[test]
fn bad_manifests_are_refused_with_place_and_remedy() {
    check_folder("bad", 2);
}

#[test]
fn unwise_manifests_are_warned_of() {
    check_folder("unwise", 1);
}

#[test]
fn every_error_and_warning_says_what_to_do() {
    for file in ["bad", "unwise"].iter().flat_map(|folder| manifests(folder)) {
        let output = larder(&["check", "--output", "json", &file.to_string_lossy()]);
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        for finding in report["findings"].as_array().expect("findings") {
            assert!(!text(finding, "what").is_empty(), "{finding}");
            assert!(text(finding, "code") == "rule" || !text(finding, "remedy").is_empty(), "no remedy: {finding}");
        }
    }
}

#[test]
fn the_examples_pass() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut checked = 0;
    for example in fs::read_dir(&root).expect("examples").map(|entry| entry.expect("an entry").path()) {
        let holds_manifests = |path: &PathBuf| {
            fs::read_dir(path).is_ok_and(|mut files| {
                files.any(|file| file.is_ok_and(|file| file.path().extension().is_some_and(|e| e == "yaml")))
            })
        };
        if !holds_manifests(&example) {
            continue;
        }
        let output = larder(&["check", &example.to_string_lossy()]);
        assert_eq!(output.status.code(), Some(0), "{}:\n{}", example.display(), String::from_utf8_lossy(&output.stdout));
        checked += 1;
    }
    assert!(checked >= 3, "only {checked} examples");
}

#[test]
fn people_see_place_reason_and_remedy() {
    let output = larder(&["check", "tests/manifests/unwise/cluster.yaml"]);
    let shown = String::from_utf8(output.stdout).expect("a text");
    let expected = "tests/manifests/unwise/cluster.yaml:8:3: warning[evicts-everything]: spec.eviction: allkeys-lru also drops keys that have no TTL\n    \
                    why: locks, queues and sessions that share the cache vanish when it is full\n    \
                    fix: write volatile-lfu: covered keys always have a TTL\n";
    assert!(shown.starts_with(expected), "{shown}");
    assert!(shown.ends_with("3 warnings; 2 CacheClusters, 0 CachePolicies, 0 Secrets\n"), "{shown}");
}

#[test]
fn a_wrong_command_line_and_a_missing_file_are_errors() {
    assert_eq!(larder(&["check"]).status.code(), Some(2));
    let output = larder(&["check", "no-such-file.yaml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("no-such-file.yaml: error: it cannot be read"));
    let output = larder(&["check", "--log", "larder=loud", "examples/first-policy"]);
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.ends_with("  next: correct --log\n"), "{error}");
    let output = larder(&["check", "--allow", "everything", "examples/first-policy"]);
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.starts_with("error: there is no warning with the code `everything`\n  next: write one of"), "{error}");
}

#[test]
fn the_definitions_on_disk_are_those_of_the_code() {
    let fresh = tempfile::tempdir().expect("a directory");
    let output = larder(&["crds", "--output", &fresh.path().to_string_lossy()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = |dir: &Path| {
        let mut files: Vec<(String, String)> = fs::read_dir(dir)
            .expect("a directory")
            .map(|entry| entry.expect("an entry"))
            .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read_to_string(entry.path()).expect("a text")))
            .collect();
        files.sort();
        files
    };
    let (code, disk) = (read(fresh.path()), read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("crds")));
    assert_eq!(code.len(), 2);
    assert!(code == disk, "crds/ differs from the code: run `larder crds --output crds`");
    let printed = String::from_utf8(larder(&["crds"]).stdout).expect("a text");
    assert_eq!(printed, code.iter().map(|(_, yaml)| yaml.as_str()).collect::<Vec<_>>().join("---\n"));
}
