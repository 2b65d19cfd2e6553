//! The URLs of origins, which a sidecar reads from files of the binding's Secret.
//!
//! A snapshot arrives within seconds, through the cache; the Secret when the kubelet brings it. A file must therefore never come to stand
//! for another origin than a snapshot means by it: its name is made from what the URL is read from, not from the origin's place in a
//! list. An origin that is new has no file for a while, and its loads fail; none asks another's database.

use std::collections::BTreeMap;
use std::fmt;

use super::place::file;
use crate::api::cache_policy::{OriginAccess, OriginSpec, RuleSpec};
use crate::api::compile::check_url;
use crate::api::{CachePolicy, SecretKeyRef};
use crate::policy::digest::sha256;
use crate::policy::snapshot::{Origin, OriginKind, Sensitive, Snapshot};

/// Hexadecimal digits that tell one file from another.
const FINGERPRINT: usize = 10;
/// How the name of each file begins and ends.
const FILE_BEGINS: &str = "origin-";
const FILE_ENDS: &str = "-url";
/// The longest URL, as in a policy.
const MAX_URL_BYTES: usize = 2048;

/// Entries of the binding's Secret, by their names. `Debug` shows the names alone.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Files(pub BTreeMap<String, String>);

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// The Secrets of a namespace, by their names, with their entries: those that policies refer to. `Debug` shows the names alone.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct KnownSecrets(pub BTreeMap<String, BTreeMap<String, Vec<u8>>>);

impl fmt::Debug for KnownSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.0.iter().map(|(name, entries)| (name, entries.keys().collect::<Vec<_>>()));
        f.debug_map().entries(entries).finish()
    }
}

/// Why a URL cannot be read. The text says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// There is no such Secret.
    #[error("spec.origins `{origin}` names the Secret `{secret}`, which does not exist: create it, with the URL under `{key}`")]
    NoSecret {
        /// The origin.
        origin: String,
        /// The Secret.
        secret: String,
        /// The entry that is wanted.
        key: String,
    },
    /// It has no such entry.
    #[error("spec.origins `{origin}` names the entry `{key}` of the Secret `{secret}`, which has none: add it, or name another")]
    NoEntry {
        /// The origin.
        origin: String,
        /// The Secret.
        secret: String,
        /// The entry that is wanted.
        key: String,
    },
    /// What it holds is no URL of this kind of origin.
    #[error("the entry `{key}` of the Secret `{secret}` holds no URL for spec.origins `{origin}`: {remedy}")]
    NoUrl {
        /// The origin.
        origin: String,
        /// The Secret.
        secret: String,
        /// The entry.
        key: String,
        /// What to write there.
        remedy: &'static str,
    },
}

impl UrlError {
    /// In one word.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NoSecret { .. } => "SecretNotFound",
            Self::NoEntry { .. } => "SecretKeyNotFound",
            Self::NoUrl { .. } => "InvalidSecret",
        }
    }
}

/// An origin that some rule of its policy loads from.
struct Used<'a> {
    policy: &'a str,
    spec: &'a OriginSpec,
    kind: &'static str,
    access: &'a OriginAccess,
}

/// The origins of a policy, in order; `None` for one that no rule loads from.
fn used(policy: &CachePolicy) -> impl Iterator<Item = Option<Used<'_>>> {
    policy.spec.origins.iter().map(|spec| {
        let named = |rule: &RuleSpec| rule.origin.as_ref().is_some_and(|used| used.name == spec.name);
        let (kind, access) = match (&spec.sql, &spec.http) {
            (Some(access), _) => ("sql", access),
            (None, access) => ("http", access.as_ref()?),
        };
        let used = Used { policy: policy.metadata.name.as_deref().unwrap_or_default(), spec, kind, access };
        policy.spec.rules.iter().any(named).then_some(used)
    })
}

impl Used<'_> {
    /// The name of its file. Nothing secret has a part in it: a password that is written in place changes the file, not its name.
    fn entry(&self) -> String {
        let source = match (&self.access.url.secret_key_ref, &self.access.url.value) {
            (Some(SecretKeyRef { name, key }), _) => format!("secret {name} {key}"),
            (None, value) => {
                format!("value {} {} {}", self.policy, self.spec.name, place_of(value.as_deref().unwrap_or_default()))
            }
        };
        format!("{FILE_BEGINS}{}{FILE_ENDS}", &sha256(source.as_bytes())[..FINGERPRINT])
    }

    fn url(&self, secrets: &KnownSecrets) -> Result<String, UrlError> {
        let url = &self.access.url;
        let Some(SecretKeyRef { name, key }) = &url.secret_key_ref else { return Ok(url.value.clone().unwrap_or_default()) };
        let (origin, secret, key) = (self.spec.name.clone(), name.clone(), key.clone());
        let Some(entries) = secrets.0.get(name) else { return Err(UrlError::NoSecret { origin, secret, key }) };
        let Some(bytes) = entries.get(&key) else { return Err(UrlError::NoEntry { origin, secret, key }) };
        // Whoever pipes a URL into `kubectl create secret` ends it with a line feed.
        let text = std::str::from_utf8(bytes).map(|text| text.trim_end_matches(['\r', '\n']));
        let checked = match text {
            Ok(text) if text.len() <= MAX_URL_BYTES && !text.contains(['\r', '\n']) => check_url(self.kind, text).map(|()| text),
            _ => Err("write one line of at most 2048 characters"),
        };
        checked.map(str::to_owned).map_err(|remedy| UrlError::NoUrl { origin, secret, key, remedy })
    }
}

/// A URL without what may be secret in it: user and password, and what is behind `?`.
fn place_of(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    format!("{scheme}://{}{path}", authority.rsplit('@').next().unwrap_or_default())
}

/// Whether an entry of a binding's Secret is such a file.
pub fn is_file_of_an_origin(entry: &str) -> bool {
    entry.starts_with(FILE_BEGINS) && entry.ends_with(FILE_ENDS)
}

/// The URLs that a policy's rules load from.
#[derive(Debug, PartialEq, Eq)]
pub struct Urls {
    /// Each under the name of its file; `None` where there is none for some.
    pub files: Option<Files>,
    /// What cannot be read. Where there are files nevertheless, they are what was read when it could.
    pub missing: Option<UrlError>,
}

/// The URLs that a policy's rules load from. `lying`: the files of the workload's binding, of which one that has the name goes on as it
/// is, where what it is made of is there no more.
pub fn urls(policy: &CachePolicy, secrets: &KnownSecrets, lying: Option<&Files>) -> Urls {
    let (mut files, mut missing, mut is_whole) = (BTreeMap::new(), None, true);
    for used in used(policy).flatten() {
        let entry = used.entry();
        let url = used.url(secrets).or_else(|error| {
            let earlier = lying.and_then(|lying| lying.0.get(&entry)).cloned();
            missing.get_or_insert(error);
            earlier.ok_or(())
        });
        match url {
            Ok(url) => drop(files.insert(entry, url)),
            Err(()) => is_whole = false,
        }
    }
    Urls { files: is_whole.then_some(Files(files)), missing }
}

/// Has a snapshot of these policies, in the order in which they were compiled, name files instead of URLs; without origins that no rule
/// loads from.
pub fn read_from_files(snapshot: &mut Snapshot, policies: &[&CachePolicy]) {
    let entries: Vec<Option<String>> =
        policies.iter().flat_map(|policy| used(policy)).map(|used| used.map(|used| used.entry())).collect();
    let origins = std::mem::take(&mut snapshot.origins).into_iter().zip(entries);
    let in_file = |(mut origin, entry): (Origin, Option<String>)| {
        let (OriginKind::Sql { url } | OriginKind::Http { url }) = &mut origin.kind;
        *url = Sensitive::File(file(&entry?));
        Some(origin)
    };
    snapshot.origins = origins.filter_map(in_file).collect();
}
