//! What the documents show works: commands exist, and so do the files that they point to.

use std::fs;
use std::path::{Path, PathBuf};
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

/// Every document: those at the top, and all below these directories.
fn documents() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found: Vec<PathBuf> = markdown_in(root).collect();
    for directory in ["docs", "examples", "charts", "tests"] {
        let mut left = vec![root.join(directory)];
        while let Some(directory) = left.pop() {
            found.extend(markdown_in(&directory));
            let entries = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path());
            left.extend(entries.filter(|path| path.is_dir() && !path.ends_with("node_modules")));
        }
    }
    let relative = |path: PathBuf| path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
    let documents: Vec<String> = found.into_iter().map(relative).collect();
    for known in ["README.md", "CHANGELOG.md", "docs/differences.md", "docs/column-types.md", "docs/demo/README.md"] {
        assert!(documents.iter().any(|document| document == known), "{known} is not among {documents:?}");
    }
    documents
}

fn markdown_in(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|extension| extension == "md"))
}

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What a document shows as code: indented lines, and text between backticks.
fn code_of(document: &str) -> Vec<String> {
    let indented = document.lines().filter_map(|line| line.strip_prefix("    ")).map(str::to_owned);
    let prose: Vec<&str> = document.lines().filter(|line| !line.starts_with("    ")).collect();
    let prose = prose.join("\n");
    let quoted = prose.split('`').skip(1).step_by(2).map(str::to_owned);
    indented.chain(quoted).collect()
}

/// The commands of `program` in a piece of code: the words behind it, up to a comment or the next command.
fn uses<'a>(code: &'a str, program: &str) -> Option<Vec<&'a str>> {
    let mut words = code.split_whitespace().skip_while(|word| *word == "$");
    if words.next()? != program {
        return None;
    }
    Some(words.take_while(|word| !word.starts_with('#') && *word != "&&").collect())
}

#[test]
fn each_command_that_documents_show_exists() {
    let targets: Vec<String> =
        read("Makefile").lines().filter_map(|line| line.split_once(':').map(|(name, _)| name.to_owned())).collect();
    let mut found = 0;
    for document in documents() {
        for code in code_of(&read(&document)) {
            if let Some(words) = uses(&code, "make") {
                found += 1;
                assert!(words.first().is_none_or(|target| targets.iter().any(|it| it == target)), "{document}: `{code}`");
            }
            for (program, binary) in [("larder", env!("CARGO_BIN_EXE_larder")), ("larderd", env!("CARGO_BIN_EXE_larderd"))] {
                let Some(words) = uses(&code, program) else { continue };
                // A command, or one within another, as in `larderd agent exec`.
                let command: Vec<&str> = words.iter().copied().take_while(|word| word.chars().all(char::is_alphabetic)).collect();
                if command.is_empty() {
                    continue;
                }
                found += 1;
                let help = Command::new(binary).args(&command).arg("--help").output().unwrap();
                assert!(help.status.success(), "{document}: `{code}`: there is no command {command:?}");
                let help = String::from_utf8_lossy(&help.stdout).into_owned();
                for option in words.iter().filter(|word| word.starts_with("--")) {
                    let name = option.split('=').next().unwrap();
                    assert!(help.contains(name), "{document}: `{code}`: {command:?} has no option {name}");
                }
            }
        }
    }
    assert!(found >= 10, "only {found} commands were found");
}

#[test]
fn each_file_that_documents_point_to_exists() {
    let mut found = 0;
    for document in documents() {
        let text = read(&document);
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || target.contains("://") {
                continue;
            }
            found += 1;
            let base = Path::new(env!("CARGO_MANIFEST_DIR")).join(&document);
            assert!(base.parent().unwrap().join(path).exists(), "{document} points to {path}");
        }
    }
    assert!(found >= 8, "only {found} links were found");
}
