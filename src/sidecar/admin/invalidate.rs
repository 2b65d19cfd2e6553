//! `POST /invalidate` and `GET /invalidate`: what an operator of the pod wants gone, and how far that is.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use tokio::time::timeout;

use super::{MAX_KEY_BYTES, Shared, as_json, percent_decoded};
use crate::sidecar::events::entry::{Event, NotUnderstood, parse};
use crate::sidecar::events::request::{Meant, Refusal, Request};

/// How long an answer may take: a trial counts for ten seconds. Shorter than a connection may be silent.
const LIMIT: Duration = Duration::from_secs(25);
/// The most keys of one request.
pub const MOST_KEYS: usize = 256;
/// What to write.
const REMEDY: &str = "write POST /invalidate?key=KEY&key=KEY, ?tag=TAG, ?rule=NAME or ?pattern=PATTERN, percent-encoded, with &dry-run to \
                      try it and &sync to wait until no sidecar shows what keys had before; and GET /invalidate?event=ID with the same tag, rule or pattern to ask how far it is";

/// Has keys go, those of a tag, of a rule or of a pattern, or tells which would.
pub(super) async fn invalidate(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let request = meant(&query).map(|(meant, Options { dry_run, sync, .. })| match (dry_run, sync) {
        (true, _) => Request::Try(meant),
        (false, true) => Request::Sync(meant),
        (false, false) => Request::Invalidate(meant),
    });
    respond(&shared, request).await
}

/// Tells how far what was wanted is.
pub(super) async fn follow(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let request = meant(&query).and_then(|(meant, Options { event, .. })| {
        let event = event.as_deref().and_then(|event| event.parse().ok()).ok_or_else(|| REMEDY.to_owned())?;
        Ok(Request::Follow(meant, event))
    });
    respond(&shared, request).await
}

async fn respond(shared: &Shared, request: Result<Request, String>) -> Response {
    let request = match request {
        Ok(request) => request,
        Err(text) => return (StatusCode::BAD_REQUEST, format!("{text}\n")).into_response(),
    };
    match timeout(LIMIT, shared.sidecar.invalidate(request)).await {
        Ok(Ok(answer)) => as_json(&answer),
        Ok(Err(Refusal::Wrong(text))) => (StatusCode::BAD_REQUEST, format!("{text}\n")).into_response(),
        Ok(Err(Refusal::Later(text))) => (StatusCode::SERVICE_UNAVAILABLE, format!("{text}\n")).into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the cache did not answer in time\n").into_response(),
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    dry_run: bool,
    sync: bool,
    event: Option<String>,
}

/// Reads which keys are meant: some, or those of one tag, rule or pattern.
fn meant(query: &str) -> Result<(Meant, Options), String> {
    let (mut keys, mut whole, mut options) = (Vec::new(), None, Options::default());
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value =
            percent_decoded(value).filter(|value| value.len() <= MAX_KEY_BYTES).ok_or("a value is malformed, or too long")?;
        match name {
            "dry-run" => options.dry_run = true,
            "sync" => options.sync = true,
            "event" => options.event = Some(String::from_utf8_lossy(&value).into_owned()),
            _ => match parse(name.as_bytes(), &value).map_err(remedy)? {
                Event::Key(key) => keys.push(key),
                _ if whole.is_some() => return Err("name one tag, rule or pattern in each request".to_owned()),
                Event::Tag(tag) => whole = Some(Meant::Tag(tag)),
                Event::Rule(name) => whole = Some(Meant::Rule(name)),
                Event::Pattern(pattern) => whole = Some(Meant::Pattern(pattern)),
            },
        }
    }
    match (whole, keys.len()) {
        (Some(whole), 0) => Ok((whole, options)),
        (None, 1..=MOST_KEYS) => Ok((Meant::Keys(keys), options)),
        (None, 0) => Err(REMEDY.to_owned()),
        (Some(_), _) => Err("name keys, a tag, a rule or a pattern: one kind in each request".to_owned()),
        (None, _) => Err(format!("name at most {MOST_KEYS} keys in each request")),
    }
}

fn remedy(error: NotUnderstood) -> String {
    if matches!(error, NotUnderstood::Kind(_)) { REMEDY.to_owned() } else { error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_says_what_is_meant() {
        let keys = |keys: &[&str]| Meant::Keys(keys.iter().map(|key| key.as_bytes().to_vec()).collect());
        let plain = Options::default;
        assert_eq!(meant("key=user:7&key=a%20b"), Ok((keys(&["user:7", "a b"]), plain())));
        assert_eq!(meant("rule=user&dry-run"), Ok((Meant::Rule("user".to_owned()), Options { dry_run: true, ..plain() })));
        assert_eq!(meant("key=user:7&sync"), Ok((keys(&["user:7"]), Options { sync: true, ..plain() })));
        assert_eq!(meant("tag=user:7"), Ok((Meant::Tag("user:7".to_owned()), plain())));
        let pattern = Meant::Pattern("user:{id}".parse().unwrap());
        let followed = Options { event: Some("7-0".to_owned()), ..plain() };
        assert_eq!(meant("pattern=user:%7Bid%7D&event=7-0"), Ok((pattern, followed)));
        for (query, words) in [
            ("", "POST /invalidate?key=KEY"),
            ("keys=a", "POST /invalidate?key=KEY"),
            ("tag=", "no key has such a tag"),
            ("key=a&rule=b", "one kind"),
            ("rule=a&tag=b", "one tag"),
            ("key=%zz", "malformed"),
            ("key=larder:l:x", "Larder's own"),
        ] {
            let text = meant(query).unwrap_err();
            assert!(text.contains(words), "{query}: {text}");
        }
    }
}
