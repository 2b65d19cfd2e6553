//! How long a shared cache may keep a response (RFC 9111, the parts that limit).

use reqwest::header::{AGE, CACHE_CONTROL, EXPIRES, HeaderMap, HeaderValue};

use super::date;
use crate::policy::Span;

/// The longest time that the response allows. Zero: it must not be stored. `None`: it sets no limit.
pub(super) fn max_age(headers: &HeaderMap) -> Option<Span> {
    let mut shared = None;
    let mut general = None;
    for value in headers.get_all(CACHE_CONTROL) {
        // A value that is no text cannot be understood, and what cannot be understood is not stored.
        let Ok(value) = value.to_str() else { return Some(Span::default()) };
        for directive in value.split(',') {
            let (name, argument) = match directive.split_once('=') {
                Some((name, argument)) => (name.trim(), argument.trim().trim_matches('"')),
                None => (directive.trim(), ""),
            };
            match name.to_ascii_lowercase().as_str() {
                // The cache is shared, and it cannot revalidate.
                "no-store" | "no-cache" | "private" => return Some(Span::default()),
                "s-maxage" => shared = least(shared, argument),
                "max-age" => general = least(general, argument),
                _ => {}
            }
        }
    }
    let allowed = shared.or(general).or_else(|| until_expiry(headers))?;
    let age = headers.get(AGE).and_then(|age| age.to_str().ok()?.trim().parse::<u64>().ok()).unwrap_or(0);
    Some(Span::from_secs(allowed.saturating_sub(age)))
}

/// How many seconds `Expires` leaves, which counts where `Cache-Control` sets no limit. What is no date is past.
fn until_expiry(headers: &HeaderMap) -> Option<u64> {
    let left = |value: &HeaderValue| value.to_str().ok().and_then(|text| date::seconds_until(text, headers)).unwrap_or(0);
    headers.get_all(EXPIRES).iter().map(left).min()
}

/// The lesser of two limits; one that cannot be read is none at all.
fn least(before: Option<u64>, seconds: &str) -> Option<u64> {
    let digits = !seconds.is_empty() && seconds.bytes().all(|b| b.is_ascii_digit());
    let seconds = if digits { seconds.parse().unwrap_or(u64::MAX) } else { 0 };
    Some(before.map_or(seconds, |before| before.min(seconds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(headers: &[(&'static str, &'static str)], seconds: Option<u64>) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().expect("a header"));
        }
        assert_eq!(max_age(&map), seconds.map(Span::from_secs), "{headers:?}");
    }

    #[test]
    fn limits_are_read() {
        check(&[], None);
        check(&[("cache-control", "public")], None);
        check(&[("cache-control", "max-age=60")], Some(60));
        check(&[("cache-control", "Public, Max-Age=\"60\"")], Some(60));
        check(&[("cache-control", "max-age=60, s-maxage=5")], Some(5));
        check(&[("cache-control", "s-maxage=600, max-age=5")], Some(600));
        check(&[("cache-control", "max-age=60"), ("cache-control", "max-age=30")], Some(30));
        check(&[("cache-control", "max-age=60"), ("age", "50")], Some(10));
        check(&[("cache-control", "max-age=60"), ("age", "61")], Some(0));
        check(&[("cache-control", "max-age=60"), ("cache-control", "no-store")], Some(0));
        check(&[("cache-control", "private, max-age=60")], Some(0));
        check(&[("cache-control", "no-cache=\"set-cookie\"")], Some(0));
        let date = ("date", "Sun, 06 Nov 1994 08:49:37 GMT");
        check(&[date, ("expires", "Sun, 06 Nov 1994 08:50:37 GMT")], Some(60));
        check(&[date, ("expires", "Sun, 06 Nov 1994 08:50:37 GMT"), ("age", "50")], Some(10));
        check(&[date, ("expires", "Sun, 06 Nov 1994 08:50:37 GMT"), ("cache-control", "public")], Some(60));
        check(&[date, ("expires", "Sun, 06 Nov 1994 08:50:37 GMT"), ("cache-control", "max-age=5")], Some(5));
        check(&[date, ("expires", "Sun, 06 Nov 1994 08:50:37 GMT"), ("cache-control", "no-store")], Some(0));
        check(&[("expires", "Sun, 06 Nov 1994 08:50:37 GMT")], Some(0));
        check(&[date, ("expires", "Sun Nov  6 08:50:37 1994")], Some(60));
        check(&[("expires", "0")], Some(0));
        check(&[("cache-control", "max-age=soon")], Some(0));
        check(&[("cache-control", "max-age=-1")], Some(0));
        check(&[("cache-control", "max-age=99999999999999999999")], Some(Span::MAX.as_millis() / 1000));
    }
}
