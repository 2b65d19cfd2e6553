//! HTTP origins: a GET whose path holds the key's parts.

mod cache_control;
mod date;
mod template;

use std::sync::OnceLock;
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IF_MATCH, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode, Url};
use tokio::time::Instant;

use self::template::Template;
use super::error::{Failure, OriginError};
use super::{Changed, Commits, Loaded};
use crate::policy::snapshot::{Origin, Sensitive};
use crate::policy::{KeyPattern, ReplyForm};

/// The largest body that is accepted, in bytes.
pub const MAX_BODY_BYTES: usize = 64 * 1024 * 1024;
/// How much of a body that explains a refusal is told to the client, in bytes.
const MAX_REASON_BYTES: usize = 256;
/// The longest `ETag` that is kept, in bytes.
const MAX_TAG_BYTES: usize = 1024;
/// Tells a service which requests are one and the same.
const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// How many redirects within the origin are followed.
const MAX_REDIRECTS: usize = 3;

/// A service and the connections to it.
#[derive(Debug)]
pub(super) struct Service {
    url: Sensitive,
    connect_timeout: Duration,
    max_connections: usize,
    /// For `http`, made at the first load.
    plain: OnceLock<Client>,
    /// For `https`, made at the first load: making it reads the machine's certificates, which there may be none of.
    secure: OnceLock<Client>,
}

/// What a rule asks of a service.
#[derive(Debug)]
pub(super) struct Question {
    path: Template,
    json: bool,
}

/// One change at a service.
#[derive(Debug)]
pub(super) struct Step<'a> {
    /// As [`Question::path`] made it.
    pub(super) path: &'a str,
    /// What is stored. `None`: the resource is deleted.
    pub(super) value: Option<&'a [u8]>,
    /// What the resource must be still, where that is asked for.
    pub(super) if_match: Option<&'a str>,
    /// The same in each attempt at this change, and in no other.
    pub(super) id: &'a str,
}

impl Question {
    pub(super) fn new(keys: &KeyPattern, path: &str, reply: Option<ReplyForm>) -> Result<Self, OriginError> {
        let path = Template::parse(path, keys).map_err(|why| OriginError::Template { place: "path", why })?;
        Ok(Self { path, json: reply == Some(ReplyForm::Json) })
    }

    /// The path for a key's parts; `None` where no path can express them.
    pub(super) fn path(&self, parts: &[&[u8]]) -> Option<String> {
        self.path.render(parts)
    }
}

impl Service {
    pub(super) fn new(origin: &Origin, url: &Sensitive) -> Result<Self, OriginError> {
        if let Sensitive::Value(url) = url {
            parse_url(url).map_err(|why| OriginError::Url { origin: origin.name.clone(), why: why.to_owned() })?;
        }
        Ok(Self {
            url: url.clone(),
            connect_timeout: origin.connect_timeout.as_duration(),
            max_connections: origin.max_connections as usize,
            plain: OnceLock::new(),
            secure: OnceLock::new(),
        })
    }

    /// Asks for `path`, which [`Question::path`] made. A URL in a file is read anew for each request.
    pub(super) async fn load(&self, question: &Question, path: &str, deadline: Instant) -> Result<Loaded, Failure> {
        let base = super::reveal(&self.url).await?;
        let url = parse_url(&base).map_err(|why| Failure::Unusable(why.to_owned()))?;
        let url = Url::parse(&format!("{}{path}", url.as_str().trim_end_matches('/')))
            .map_err(|_| Failure::Unusable("url and path do not make a URL".to_owned()))?;
        let request = self.client(url.scheme() == "https")?.get(url).timeout(deadline.saturating_duration_since(Instant::now()));
        let response = request.send().await.map_err(|error| failure(&error))?;
        answer(response, question).await
    }

    /// Makes one change, by PUT or DELETE. A service that takes heed of the idempotency key makes it once, however often it is told.
    pub(super) async fn write(
        &self,
        question: &Question,
        step: &Step<'_>,
        deadline: Instant,
        commits: &Commits,
    ) -> Result<Changed, Failure> {
        let base = super::reveal(&self.url).await?;
        let url = parse_url(&base).map_err(|why| Failure::Unusable(why.to_owned()))?;
        let url = Url::parse(&format!("{}{}", url.as_str().trim_end_matches('/'), step.path))
            .map_err(|_| Failure::Unusable("url and path do not make a URL".to_owned()))?;
        let client = self.client(url.scheme() == "https")?;
        let request = match step.value {
            Some(value) => {
                let kind = if question.json { "application/json" } else { "application/octet-stream" };
                client.put(url).header(CONTENT_TYPE, kind).body(value.to_vec())
            }
            None => client.delete(url),
        };
        let request = request.header(IDEMPOTENCY_KEY, step.id).timeout(deadline.saturating_duration_since(Instant::now()));
        let request = match step.if_match.and_then(|tag| HeaderValue::from_str(tag).ok()) {
            Some(tag) => request.header(IF_MATCH, tag),
            None => request,
        };
        commits.begin();
        let outcome = match request.send().await {
            Ok(response) => changed(response, step.value.is_none()).await,
            Err(error) if error.is_connect() => Err(failure(&error)),
            Err(error) => {
                let why = match failure(&error) {
                    Failure::Unreachable(why) => why,
                    _ => "no answer in time".to_owned(),
                };
                Err(Failure::Unknown { why, retry: true })
            }
        };
        match &outcome {
            Err(Failure::Unknown { .. }) => commits.doubt(),
            // What was answered, or never left, is settled.
            _ => commits.never_left(),
        }
        outcome
    }

    /// The client of a scheme; redirects never lead to the other.
    fn client(&self, secure: bool) -> Result<&Client, Failure> {
        let made = if secure { &self.secure } else { &self.plain };
        if let Some(client) = made.get() {
            return Ok(client);
        }
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            // An error means that another thread was faster, which is as good.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let builder = Client::builder();
        let builder = if secure { builder } else { builder.tls_certs_only([]) };
        let client = builder
            .connect_timeout(self.connect_timeout)
            .pool_max_idle_per_host(self.max_connections)
            .redirect(Policy::custom(|attempt| {
                let first = attempt.previous().first().map(Url::origin);
                let stays = first.as_ref() == Some(&attempt.url().origin());
                if stays && attempt.previous().len() <= MAX_REDIRECTS { attempt.follow() } else { attempt.stop() }
            }))
            .no_proxy()
            .user_agent(concat!("larder/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|_| Failure::Unusable("the HTTP client cannot be set up: check the machine's certificates".to_owned()))?;
        Ok(made.get_or_init(|| client))
    }
}

fn parse_url(text: &str) -> Result<Url, &'static str> {
    let url = Url::parse(text.trim()).map_err(|_| "write http://HOST or https://HOST, with a port and a path if need be")?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err("write http://HOST or https://HOST, with a port and a path if need be");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("a query belongs into the rule's path");
    }
    Ok(url)
}

async fn answer(response: Response, question: &Question) -> Result<Loaded, Failure> {
    let status = response.status();
    match status {
        StatusCode::OK | StatusCode::NON_AUTHORITATIVE_INFORMATION => {}
        StatusCode::NOT_FOUND | StatusCode::GONE | StatusCode::NO_CONTENT => return Ok(Loaded::NotFound),
        _ => return Err(refusal(status, response.headers())),
    }
    let (max_age, tag) = (cache_control::max_age(response.headers()), tag_of(response.headers()));
    let value = body(response).await?;
    if question.json && serde_json::from_slice::<serde::de::IgnoredAny>(&value).is_err() {
        return Err(Failure::Unusable("the body is not JSON: write `as: String` to keep any body".to_owned()));
    }
    Ok(Loaded::Found { value, max_age, tag })
}

/// The `ETag`, where it is one that `If-Match` can compare: a weak one never equals anything there.
fn tag_of(headers: &HeaderMap) -> Option<String> {
    let tag = headers.get(ETAG)?.to_str().ok()?;
    (tag.starts_with('"') && tag.len() <= MAX_TAG_BYTES).then(|| tag.to_owned())
}

/// What a service's answer says of a change.
async fn changed(response: Response, is_deletion: bool) -> Result<Changed, Failure> {
    let status = response.status();
    if status.is_success() {
        let tag = tag_of(response.headers());
        return Ok(Changed { rows: 1, tag, ..Changed::default() });
    }
    if is_deletion && matches!(status, StatusCode::NOT_FOUND | StatusCode::GONE) {
        return Ok(Changed::default());
    }
    match refusal(status, response.headers()) {
        // These say that the request was turned away.
        trouble @ Failure::Failed { .. }
            if matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE | StatusCode::NOT_IMPLEMENTED
            ) =>
        {
            Err(trouble)
        }
        Failure::Failed { why, retry, .. } => Err(Failure::Unknown { why, retry }),
        Failure::Unusable(why) if status.is_client_error() => Err(Failure::Rejected(reason(why, response).await)),
        other => Err(other),
    }
}

/// Why a service refuses, with the first line of what it says of it.
async fn reason(why: String, mut response: Response) -> String {
    let is_text = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).is_some_and(|kind| {
        let kind = kind.to_ascii_lowercase();
        kind.starts_with("text/plain") || kind.contains("json")
    });
    let Some(Ok(Some(chunk))) = (if is_text { Some(response.chunk().await) } else { None }) else { return why };
    let text = String::from_utf8_lossy(&chunk[..chunk.len().min(MAX_REASON_BYTES)]).into_owned();
    let line: String = text.trim().lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
    if line.is_empty() { why } else { format!("{why}: {line}") }
}

/// The body, as long as it stays within the bound.
async fn body(mut response: Response) -> Result<Vec<u8>, Failure> {
    let too_large = || Failure::Unusable(format!("the body is larger than {MAX_BODY_BYTES} bytes"));
    let announced = response.content_length().unwrap_or(0);
    if announced > MAX_BODY_BYTES as u64 {
        return Err(too_large());
    }
    let mut value = Vec::with_capacity(usize::try_from(announced).unwrap_or(0).min(1 << 20));
    while let Some(chunk) = response.chunk().await.map_err(|error| failure(&error))? {
        if value.len() + chunk.len() > MAX_BODY_BYTES {
            return Err(too_large());
        }
        value.extend_from_slice(&chunk);
    }
    Ok(value)
}

fn refusal(status: StatusCode, headers: &HeaderMap) -> Failure {
    let why = format!("it answered {}", status.as_u16());
    if status.is_redirection() {
        return Failure::Unusable(format!("{why}, a redirect to another host or a long chain: name the final host in `url`"));
    }
    let trouble = status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
    if !trouble {
        return Failure::Unusable(why);
    }
    let retry_after = retry_after(headers);
    let retry = retry_after.is_none() && !matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::NOT_IMPLEMENTED);
    Failure::Failed { why, retry, retry_after }
}

/// `Retry-After`, in seconds or as a date. Where it is neither, the breaker's own pause serves.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    text.parse().ok().or_else(|| date::seconds_until(text, headers)).map(Duration::from_secs)
}

/// What failed, without the URL that reqwest would tell.
fn failure(error: &reqwest::Error) -> Failure {
    if error.is_timeout() && !error.is_connect() {
        return Failure::Timeout;
    }
    let why = match () {
        () if error.is_connect() && error.is_timeout() => "no connection in time",
        () if error.is_connect() => "no connection: check the host, the port and its certificate",
        () if error.is_body() || error.is_decode() => "the connection broke within the body",
        () => "the connection broke",
    };
    Failure::Unreachable(why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::header::{DATE, HeaderValue};

    #[test]
    fn a_service_may_ask_for_a_pause_in_seconds_or_until_a_moment() {
        let asked = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(DATE, HeaderValue::from_static("Sun, 06 Nov 1994 08:49:37 GMT"));
            headers.insert(RETRY_AFTER, HeaderValue::from_static(value));
            retry_after(&headers).map(|pause| pause.as_secs())
        };
        assert_eq!(asked("120"), Some(120));
        assert_eq!(asked("Sun, 06 Nov 1994 08:50:07 GMT"), Some(30));
        assert_eq!(asked("Sun, 06 Nov 1994 08:00:00 GMT"), Some(0));
        assert_eq!(asked("soon"), None);
    }
}
