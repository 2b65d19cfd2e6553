//! LARDER.FETCH and LARDER.FILL: reads and fills whose clients hold the lease's token themselves.
//!
//! A client without tokens is served by what its connection did; a connection that many loads share blurs that. With a token, a value
//! is stored if and only if nothing was written to its key since the token was given.

use std::rc::Rc;

use super::super::{Flow, Request, refuse, unmatched_text};
use crate::sidecar::commands::parse_i64;
use crate::sidecar::engine::lease::Generation;
use crate::sidecar::patterns::cache_aside::tokens;
use crate::sidecar::policy::UNMATCHED;
use crate::sidecar::session::Session;

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

/// `LARDER.FILL key token value [PX ms]`.
pub fn fill(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let args = &request.args;
    let lifetime = match (args.len(), args.get(4), args.get(5)) {
        (4, ..) => Ok(None),
        (6, Some(option), Some(millis)) if option.eq_ignore_ascii_case(b"px") => match number(millis) {
            Some(millis @ 1..) => Ok(Some(millis)),
            _ => Err("ERR PX takes milliseconds, at least 1".to_owned()),
        },
        (_, Some(option), _) if option.eq_ignore_ascii_case(b"tags") => {
            Err("ERR LARDER.FILL takes no TAGS: a key's tags come from its parts, by invalidate.tags of its rule".to_owned())
        }
        _ => Err("ERR syntax error: write LARDER.FILL key token value [PX milliseconds]".to_owned()),
    };
    let generation = Generation::parse(args.get(2).unwrap_or_default());
    match (lifetime, generation, refusal(session, request)) {
        (Err(text), ..) | (Ok(_), _, Some(text)) => refuse(session, &text),
        (Ok(_), None, _) => refuse(session, "ERR that is no token of LARDER.FETCH: store the value with SET, or fetch again"),
        (Ok(lifetime), Some(generation), None) => {
            let [key, value] = [1, 3].map(|at| args.get(at).unwrap_or_default());
            tokens::fill(session, key, generation, value, lifetime)
                .unwrap_or_else(|| refuse(session, "ERR no rule with leases covers the key: store the value with SET"))
        }
    }
}

fn number(text: &[u8]) -> Option<u64> {
    parse_i64(text).and_then(|number| u64::try_from(number).ok())
}

fn refusal(session: &Rc<Session>, request: &Request<'_>) -> Option<String> {
    let (policy, key) = (session.worker().policy(), request.args.get(1).unwrap_or_default());
    (policy.refuses_unmatched() && policy.find(key) == UNMATCHED).then(|| unmatched_text(key))
}
