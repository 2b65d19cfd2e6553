//! What the compiler does not hold: the direction of dependencies, the size of files, licences, and a tree free of places.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const MOST_LINES: usize = 800;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file under `dir`, without build products and hidden directories other than `.ci`.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let skipped = (name.starts_with('.') && name != ".ci") || ["target", "node_modules", "__pycache__"].contains(&&*name);
            match entry.file_type().unwrap() {
                _ if skipped => {}
                kind if kind.is_dir() => open.push(entry.path()),
                kind if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

fn rust_files(dir: &str) -> Vec<PathBuf> {
    files(&root().join(dir)).into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// The words between backticks.
fn quoted(text: &str) -> BTreeSet<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The layer table of src/lib.rs: which layers each may name.
fn layers() -> BTreeMap<String, BTreeSet<String>> {
    let lib = read("src/lib.rs");
    let rows: Vec<(String, String)> = lib
        .lines()
        .filter_map(|line| line.strip_prefix("//! | "))
        .filter_map(|row| {
            let cells: Vec<&str> = row.split('|').collect();
            Some((quoted(cells.first()?).into_iter().next()?, cells.get(2)?.trim().to_owned()))
        })
        .collect();
    let all: BTreeSet<String> = rows.iter().map(|(layer, _)| layer.clone()).collect();
    rows.iter()
        .map(|(layer, uses)| {
            let named = quoted(uses);
            let allowed = if uses.starts_with("all") { all.difference(&named).cloned().collect() } else { named };
            (layer.clone(), allowed)
        })
        .collect()
}

/// Code without line comments; string literals stay, since none of ours looks like a path.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The first segments of every path that starts at the crate root: `crate::a`, `crate::{a, b::c}`, and `super::` chains that
/// climb to the root from a module `depth` below it.
fn named_from_root(code: &str, depth: usize) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        first_segments(&code[at + "crate::".len()..], &mut named);
    }
    // A test module is one deeper.
    for climb in [depth, depth + 1] {
        let chain = "super::".repeat(climb);
        for (at, _) in code.match_indices(&chain).filter(|(at, _)| !code[..*at].ends_with("::")) {
            first_segments(&code[at + chain.len()..], &mut named);
        }
    }
    named
}

fn first_segments(rest: &str, named: &mut BTreeSet<String>) {
    let Some(group) = rest.strip_prefix('{') else {
        named.insert(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
        return;
    };
    let mut nesting = 0usize;
    let mut item = String::new();
    for c in group.chars() {
        match c {
            '}' if nesting == 0 => break,
            '{' => nesting += 1,
            '}' => nesting -= 1,
            ',' if nesting == 0 => first_segments(std::mem::take(&mut item).trim(), named),
            _ => {}
        }
        if nesting > 0 || c != ',' {
            item.push(c);
        }
    }
    first_segments(item.trim(), named);
}

/// How deep below the crate root the module in `path` (relative to src/) is.
fn module_depth(path: &Path) -> usize {
    path.components().count() - usize::from(path.ends_with("mod.rs"))
}

#[test]
fn layers_are_used_in_one_direction() {
    let layers = layers();
    assert!(layers.len() >= 8, "the table in src/lib.rs is not read: {layers:?}");
    let mut wrong = Vec::new();
    for path in rust_files("src") {
        let inside = path.strip_prefix(root().join("src")).unwrap();
        let layer = inside.iter().next().unwrap().to_string_lossy().trim_end_matches(".rs").to_owned();
        if ["lib", "main", "bin"].contains(&&*layer) {
            continue;
        }
        let Some(allowed) = layers.get(&layer) else {
            wrong.push(format!("{}: layer `{layer}` is not in the table of src/lib.rs", shown(&path)));
            continue;
        };
        let named = named_from_root(&code(&fs::read_to_string(&path).unwrap()), module_depth(inside));
        for other in named.iter().filter(|other| layers.contains_key(*other) && **other != layer && !allowed.contains(*other)) {
            wrong.push(format!("{}: `{layer}` may not name `{other}`", shown(&path)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_check_of_layers_sees_each_form_of_path() {
    for (text, depth, expected) in [
        ("use crate::policy::Rule;", 1, &["policy"][..]),
        ("let x = crate::api::f();", 1, &["api"]),
        ("use crate::{policy::{self, units}, api};", 1, &["api", "policy"]),
        ("use crate::{\n    origin::Origin,\n    telemetry,\n};", 2, &["origin", "telemetry"]),
        ("use super::super::api::X;", 2, &["api"]),
        ("mod tests { use super::super::super::api::X; }", 2, &["api"]),
        ("use super::units::Span;", 2, &[]),
    ] {
        let named = named_from_root(text, depth);
        let named: BTreeSet<&str> = named.iter().map(String::as_str).filter(|name| !name.is_empty()).collect();
        assert!(expected.iter().all(|name| named.contains(name)), "{text}: {named:?}");
        assert!(!expected.is_empty() || named.is_empty(), "{text}: {named:?}");
    }
    assert_eq!(module_depth(Path::new("sidecar/resp/mod.rs")), 2);
    assert_eq!(module_depth(Path::new("sidecar/engine.rs")), 2);
}

#[test]
fn the_data_plane_does_not_ask_for_the_control_plane() {
    let layers = ["policy", "journal", "origin", "telemetry", "sidecar", "agent", "relay"];
    for path in layers.iter().flat_map(|layer| rust_files(&format!("src/{layer}"))) {
        let text = fs::read_to_string(&path).unwrap();
        assert!(!code(&text).contains("control-plane"), "{}: code of the data plane depends on no feature", shown(&path));
    }
}

#[test]
fn files_have_one_subject() {
    let long: Vec<String> = ["src", "tests"]
        .iter()
        .flat_map(|dir| rust_files(dir))
        .map(|path| (fs::read_to_string(&path).unwrap().lines().count(), path))
        .filter(|(lines, _)| *lines > MOST_LINES)
        .map(|(lines, path)| format!("{}: {lines} lines, more than {MOST_LINES}", shown(&path)))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

/// The names of all direct dependencies, of whatever kind.
fn direct_dependencies() -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    let mut inside = false;
    for line in read("Cargo.toml").lines() {
        if let Some(section) = line.strip_prefix('[') {
            inside = section.trim_end_matches(']').ends_with("dependencies");
        } else if let Some((name, _)) = line.split_once('=').filter(|_| inside) {
            named.insert(name.trim().to_owned());
        }
    }
    named
}

#[test]
fn each_direct_dependency_is_explained() {
    let table: BTreeSet<String> = read("ARCHITECTURE.md")
        .lines()
        .skip_while(|line| *line != "## Dependencies")
        .take_while(|line| *line == "## Dependencies" || !line.starts_with("## "))
        .filter_map(|line| line.strip_prefix("| "))
        .flat_map(|row| quoted(row.split('|').next().unwrap_or_default()))
        .collect();
    let direct = direct_dependencies();
    assert!(direct.len() > 10, "Cargo.toml is not read: {direct:?}");
    let missing: Vec<&String> = direct.difference(&table).collect();
    assert!(missing.is_empty(), "say in ARCHITECTURE.md, section Dependencies, why these are needed: {missing:?}");
    let gone: Vec<&String> = table.difference(&direct).collect();
    assert!(gone.is_empty(), "ARCHITECTURE.md explains dependencies that Cargo.toml does not have: {gone:?}");
}

/// What cargo knows of the packages that this host's builds use.
fn packages() -> Vec<serde_json::Value> {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version", "1", "--all-features", "--filter-platform", &host()])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(metadata.status.success(), "{}", String::from_utf8_lossy(&metadata.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout).expect("JSON");
    metadata["packages"].as_array().expect("packages").clone()
}

fn host() -> String {
    let version = Command::new("rustc").arg("-vV").output().expect("rustc runs").stdout;
    let version = String::from_utf8(version).unwrap();
    version.lines().find_map(|line| line.strip_prefix("host: ")).expect("a host").to_owned()
}

/// Whether an SPDX expression can be met with the `allowed` licences alone.
fn permits(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ").replace(" WITH ", "_WITH_");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let met = either(&tokens, &mut at, allowed);
    met && at == tokens.len()
}

fn either(tokens: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut met = both(tokens, at, allowed);
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        met |= both(tokens, at, allowed);
    }
    met
}

fn both(tokens: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut met = one(tokens, at, allowed);
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(tokens, at, allowed);
    }
    met
}

fn one(tokens: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let Some(token) = tokens.get(*at) else { return false };
    *at += 1;
    if *token == "(" {
        let met = either(tokens, at, allowed);
        *at += 1;
        return met;
    }
    allowed.contains(&token.replace("_WITH_", " WITH "))
}

#[test]
fn licences_are_permissive_and_sources_public() {
    let deny = read("deny.toml");
    let allowed: BTreeSet<String> = deny
        .lines()
        .skip_while(|line| *line != "[licenses]")
        .take_while(|line| *line != "]")
        .filter_map(|line| line.trim().strip_prefix('"')?.strip_suffix("\",").map(str::to_owned))
        .collect();
    assert!(allowed.contains("MIT"), "deny.toml is not read: {allowed:?}");
    assert!(permits("MIT/Apache-2.0", &allowed) && permits("(MIT OR GPL-3.0) AND ISC", &allowed));
    assert!(!permits("GPL-3.0", &allowed) && !permits("MIT AND GPL-3.0", &allowed) && !permits("", &allowed));
    for package in packages() {
        let name = &package["name"];
        let licence = package["license"].as_str().unwrap_or_default();
        assert!(permits(licence, &allowed), "{name}: licence `{licence}` is not in deny.toml");
        let source = package["source"].as_str();
        let public = source.is_none_or(|source| source == "registry+https://github.com/rust-lang/crates.io-index");
        assert!(public, "{name}: comes from {source:?}");
    }
}

#[test]
fn the_tree_names_no_place() {
    // Spelt in halves, so that this file passes its own test.
    let paths = [["/ro", "ot/"], ["/ho", "me/"], ["/Us", "ers/"], ["/work", "/main"], ["/work", "/shared"], ["/tmp", "/wt"]];
    let paths = paths.map(|halves| halves.concat());
    let mirrors = [["index", "-url"], ["extra-index", "-url"], ["GO", "PROXY="]].map(|halves| halves.concat());
    for path in files(root()) {
        // Binary files are not ours to read.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for (number, line) in text.lines().enumerate() {
            let place = format!("{}:{}", shown(&path), number + 1);
            let found = paths.iter().chain(&mirrors).find(|word| line.contains(word.as_str()));
            assert!(found.is_none(), "{place}: names `{}`, a place of one machine or network", found.unwrap());
            let resolved = line.trim_start().strip_prefix("\"resolved\": \"");
            assert!(
                resolved.is_none_or(|url| url.starts_with("https://registry.npmjs.org/")),
                "{place}: not the public registry"
            );
        }
    }
}
