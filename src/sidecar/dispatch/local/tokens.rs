//! LARDER.FETCH and LARDER.FILL: reads and fills whose clients hold the lease's token themselves.
//!
//! A client without tokens is served by what its connection did; a connection that many loads share blurs that. With a token, a value
//! is stored if and only if nothing was written to its key since the token was given.

use std::rc::Rc;

use super::super::{Flow, Request, refuse, unmatched_text};
use crate::policy::tags::{MAX_TAG_BYTES, MAX_TAGS};
use crate::sidecar::commands::parse_i64;
use crate::sidecar::patterns::cache_aside::tokens::{self, Fill, Token};
use crate::sidecar::policy::UNMATCHED;
use crate::sidecar::resp::CommandArgs;
use crate::sidecar::session::Session;

/// What to write.
const FILL_SYNTAX: &str = "ERR syntax error: write LARDER.FILL key token value [PX milliseconds] [TAGS tag [tag …]]";
/// The longest wait that a client may ask for.
const MOST_WAIT_MS: u64 = 60_000;

/// `LARDER.FETCH key [WAIT ms]`.
pub fn fetch(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let args = &request.args;
    let wait = match (args.len(), args.get(2), args.get(3)) {
        (2, ..) => Ok(None),
        (4, Some(option), Some(millis)) if option.eq_ignore_ascii_case(b"wait") => match number(millis) {
            Some(millis) if millis <= MOST_WAIT_MS => Ok(Some(millis)),
            _ => Err(format!("ERR WAIT takes milliseconds, from 0 to {MOST_WAIT_MS}")),
        },
        _ => Err("ERR syntax error: write LARDER.FETCH key [WAIT milliseconds]".to_owned()),
    };
    match (wait, refusal(session, request)) {
        (Err(text), _) | (Ok(_), Some(text)) => refuse(session, &text),
        (Ok(wait), None) => tokens::fetch(session, args.get(1).unwrap_or_default(), wait),
    }
}

/// `LARDER.FILL key token value [PX ms] [TAGS tag [tag …]]`.
pub fn fill(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let args = &request.args;
    if let Some(text) = refusal(session, request) {
        return refuse(session, &text);
    }
    let (lifetime, tags) = match options(args) {
        Ok(options) => options,
        Err(text) => return refuse(session, &text),
    };
    let Some(token) = Token::parse(args.get(2).unwrap_or_default()) else {
        return refuse(session, "ERR that is no token of LARDER.FETCH: store the value with SET, or fetch again");
    };
    let [key, value] = [1, 3].map(|at| args.get(at).unwrap_or_default());
    tokens::fill(session, &Fill { key, token, value, lifetime, tags }).unwrap_or_else(|text| refuse(session, &text))
}

/// What stands behind the value: its lifetime in milliseconds, and its tags, each once.
fn options(args: &CommandArgs<'_>) -> Result<(Option<u64>, Vec<Vec<u8>>), String> {
    let (mut lifetime, mut at) = (None, 4);
    if args.get(at).is_some_and(|word| word.eq_ignore_ascii_case(b"px")) {
        lifetime = args.get(5).and_then(number).filter(|millis| *millis > 0);
        if lifetime.is_none() {
            return Err("ERR PX takes milliseconds, at least 1".to_owned());
        }
        at = 6;
    }
    if at >= args.len() {
        return Ok((lifetime, Vec::new()));
    }
    if !args.get(at).is_some_and(|word| word.eq_ignore_ascii_case(b"tags")) || args.len() == at + 1 {
        return Err(FILL_SYNTAX.to_owned());
    }
    let mut tags: Vec<Vec<u8>> = args.iter().skip(at + 1).map(<[u8]>::to_vec).collect();
    tags.sort_unstable();
    tags.dedup();
    let is_tag = |tag: &Vec<u8>| !tag.is_empty() && tag.len() <= MAX_TAG_BYTES && std::str::from_utf8(tag).is_ok();
    match tags.len() <= MAX_TAGS && tags.iter().all(is_tag) {
        true => Ok((lifetime, tags)),
        false => Err(format!("ERR a value is given at most {MAX_TAGS} tags, each of 1 to {MAX_TAG_BYTES} bytes in UTF-8")),
    }
}

fn number(text: &[u8]) -> Option<u64> {
    parse_i64(text).and_then(|number| u64::try_from(number).ok())
}

fn refusal(session: &Rc<Session>, request: &Request<'_>) -> Option<String> {
    let (policy, key) = (session.worker().policy(), request.args.get(1).unwrap_or_default());
    (policy.refuses_unmatched() && policy.find(key) == UNMATCHED).then(|| unmatched_text(key))
}
