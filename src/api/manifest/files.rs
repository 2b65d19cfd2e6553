//! From paths to documents, within bounds.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_saphyr::{budget, options};

use super::Document;
use super::tree::{Node, Position};
use crate::api::finding::Finding;

/// The largest file, in bytes. etcd refuses objects above 1.5 MiB.
pub const MAX_FILE_BYTES: u64 = 4 << 20;
/// The most files in one run.
pub const MAX_FILES: usize = 1000;

/// Reads the documents of all `paths`; `-` stands for standard input.
pub(super) fn read(paths: &[PathBuf], findings: &mut Vec<Finding>) -> Vec<Document> {
    let mut documents = Vec::new();
    let mut files = 0;
    for path in paths {
        for file in expand(path, findings) {
            files += 1;
            if files > MAX_FILES {
                findings.push(Finding::about_file(path, format!("there are more than {MAX_FILES} files"), "name fewer of them"));
                return documents;
            }
            match read_bounded(&file) {
                Ok(bytes) => documents.extend(parse(&file, &bytes, findings)),
                Err(error) => findings.push(Finding::about_file(&file, format!("it cannot be read: {error}"), remedy(&error))),
            }
        }
    }
    documents
}

/// The files that `path` stands for.
fn expand(path: &Path, findings: &mut Vec<Finding>) -> Vec<PathBuf> {
    if !path.is_dir() {
        return vec![path.to_owned()];
    }
    let listed = fs::read_dir(path).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>());
    let mut files = match listed {
        Ok(files) => files,
        Err(error) => {
            findings.push(Finding::about_file(path, format!("the directory cannot be read: {error}"), remedy(&error)));
            return Vec::new();
        }
    };
    files.retain(|file| is_manifest(file) && !file.is_dir());
    files.sort();
    if files.is_empty() {
        findings.push(Finding::about_file(path, "the directory holds no .yaml, .yml or .json file", "name one that does"));
    }
    files
}

/// Whether a file of this name in a directory is one.
pub fn is_manifest(file: &Path) -> bool {
    let hidden = file.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && file.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension == *known))
}

fn read_bounded(file: &Path) -> io::Result<Vec<u8>> {
    let source: Box<dyn io::Read> = if file == Path::new("-") { Box::new(io::stdin()) } else { Box::new(File::open(file)?) };
    let mut bytes = Vec::new();
    source.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {MAX_FILE_BYTES} bytes")));
    }
    Ok(bytes)
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "check the path",
        io::ErrorKind::PermissionDenied => "make it readable",
        io::ErrorKind::FileTooLarge => "split it",
        _ => "make it a readable file",
    }
}

/// The documents of one file. Empty ones are skipped, as kubectl skips them.
pub(super) fn parse(file: &Path, bytes: &[u8], findings: &mut Vec<Finding>) -> Vec<Document> {
    let shared: Arc<Path> = file.into();
    // Plain scalars mean what they mean to kubectl, whose YAML 1.1 has `yes` and `off`.
    let options = options! {
        budget: budget! { max_depth: 64, max_nodes: 200_000, max_documents: 1000 },
        with_snippet: false,
    };
    let mut reader = bytes;
    let mut documents = Vec::new();
    for parsed in serde_saphyr::read_with_options::<_, Node>(&mut reader, options) {
        match parsed {
            Ok(root) => documents.push(Document { file: Arc::clone(&shared), root }),
            Err(error) => {
                let position = Position::of_error(&error);
                let what = format!("it is not YAML that Larder reads: {error}");
                findings.push(Finding { position, ..Finding::about_file(file, what, "correct the YAML") });
            }
        }
    }
    documents
}
