//! What the README shows works.

use std::fs;
use std::path::Path;
use std::process::Command;

/// The indented block of `text` that starts with `start`.
fn block(text: &str, start: &str) -> String {
    let lines = text.lines().skip_while(|line| line.strip_prefix("    ") != Some(start));
    let lines = lines.take_while(|line| line.is_empty() || line.starts_with("    "));
    lines.map(|line| line.get(4..).unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_first_policy_passes_the_check() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let policy = block(&readme, "apiVersion: larder.dev/v1alpha1");
    assert!(policy.contains("kind: CachePolicy"), "the README shows no policy:\n{policy}");
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("policy.yaml"), policy).unwrap();
    fs::copy(root.join("examples/first-policy/cache.yaml"), dir.path().join("cache.yaml")).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_larder")).arg("check").arg(dir.path()).output().unwrap();
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
}
