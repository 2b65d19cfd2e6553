//! Origins and loaders for tests.

use larder::origin::{Loaded, Loader, Origins};
use larder::policy::snapshot::{Origin, OriginKind, Sensitive};
use larder::policy::{Load, Query, ReplyForm, Span};

/// An SQL origin called `db`.
pub fn sql(url: &str) -> Origin {
    with(OriginKind::Sql { url: Sensitive::Value(url.to_owned()) })
}

/// An HTTP origin called `db`.
pub fn http(url: &str) -> Origin {
    with(OriginKind::Http { url: Sensitive::Value(url.to_owned()) })
}

/// An origin called `db` with two connections and generous limits.
pub fn with(kind: OriginKind) -> Origin {
    let limit = Span::from_secs(30);
    Origin {
        name: "db".to_owned(),
        kind,
        max_connections: 2,
        max_total_connections: None,
        load_queue: None,
        connect_timeout: limit,
        timeout: limit,
    }
}

/// The load of a rule with these statements.
pub fn reads(read: &str, read_many: Option<&str>, reply: Option<ReplyForm>) -> Load {
    let query = Query::Sql { read: read.to_owned(), read_many: read_many.map(str::to_owned) };
    Load { origin: "db".to_owned(), query, reply }
}

/// A loader of keys such as `k:{id}`.
pub fn loader(origin: &Origin, keys: &str, load: &Load) -> Loader {
    let origins = Origins::new(std::slice::from_ref(origin)).expect("a valid origin");
    origins.loader(&keys.parse().expect("a valid pattern"), load).expect("a valid load")
}

/// A value without a limit of its age.
pub fn found(value: impl AsRef<[u8]>) -> Loaded {
    Loaded::Found { value: value.as_ref().to_vec(), max_age: None, tag: None }
}
