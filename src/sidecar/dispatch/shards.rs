//! Commands that concern every shard, or any one.

use std::rc::Rc;

use super::data::send;
use super::{Flow, Request, own_keys, refuse};
use crate::sidecar::commands::{Access, Gather};
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::upstream::gather::{Assembly, Meeting};
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::node::NodeAddr;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{Answer, OnReply, Sink};
use crate::sidecar::versions::{Listing, shown_list, when_known};
use crate::sidecar::worker::Worker;

/// The low bits of a cursor that say which shard it belongs to. Redis Cluster has at most a thousand nodes or so.
const SHARD_BITS: u32 = 12;
/// Cursors that every client can hold, JavaScript's numbers included, are below 2^53.
const MOST_CURSOR: u64 = 1 << (53 - SHARD_BITS);

/// Any one server answers.
pub fn any(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let retry = if request.spec.access == Access::Write { Retry::Never } else { Retry::Safe };
    send(session, &[request.raw], ANY_SLOT, retry, OnReply::Pass)
}

/// Goes to every shard; the answers become one.
pub fn all(session: &Rc<Session>, request: &Request<'_>, gather: Gather) -> Flow {
    let worker = session.worker();
    let shards = worker.router().shards();
    if !worker.is_cluster() || shards.is_empty() {
        return any(session, request);
    }
    let writes = request.spec.access == Access::Write;
    let assembly = Assembly::Shards(gather);
    let meeting = Meeting::new(session.clone(), session.take_place(), assembly, writes, shards.len());
    let mut room = true;
    for (index, (_, slot)) in shards.into_iter().enumerate() {
        let sink = Sink::Part { meeting: meeting.clone(), index: index as u32 };
        let retry = if writes { Retry::Never } else { Retry::Safe };
        room &= worker.submit(&[request.raw], Pending::new(sink, slot, retry, session.lane(), worker.now()));
    }
    if room { Flow::Continue } else { Flow::Wait }
}

/// As [`all`], for the shards that are left where `node` has answered with `element`.
pub fn others(session: &Rc<Session>, request: &Request<'_>, gather: Gather, element: &[u8], node: &NodeAddr) -> Flow {
    let worker = session.worker();
    let mut shards = worker.router().shards();
    shards.retain(|(shard, _)| shard.address() != node);
    let writes = request.spec.access == Access::Write;
    let (assembly, parts) = (Assembly::Shards(gather), shards.len() + 1);
    let meeting = Meeting::new(session.clone(), session.take_place(), assembly, writes, parts);
    meeting.deliver(0, Answer::Reply(element));
    for (index, (_, slot)) in (1..).zip(shards) {
        let sink = Sink::Part { meeting: meeting.clone(), index };
        let retry = if writes { Retry::Never } else { Retry::Safe };
        worker.submit(&[request.raw], Pending::new(sink, slot, retry, session.lane(), worker.now()));
    }
    Flow::Wait
}

/// Has every shard set a mode on the connections of the client's lane, which is new; where one refuses, the client goes back to the
/// `old` one. Until then no more is read from it.
pub fn enter_mode(session: &Rc<Session>, request: &Request<'_>, old: Lane) -> Flow {
    let (worker, place, entering) = (session.worker(), session.take_place(), session.clone());
    session.hold();
    let compose = move |parts: &[Vec<u8>], out: &mut Vec<u8>| {
        let refused = parts.iter().find(|part| part.first() == Some(&b'-'));
        if refused.is_some() {
            entering.set_lane(old);
        }
        out.extend_from_slice(refused.or(parts.first()).map_or(&[][..], Vec::as_slice));
        entering.release();
    };
    let slots = slots_of_all(worker);
    let meeting = Meeting::new(session.clone(), place, Assembly::By(Box::new(compose)), false, slots.len());
    for (index, slot) in slots.into_iter().enumerate() {
        let sink = Sink::Part { meeting: meeting.clone(), index: index as u32 };
        worker.submit(&[request.raw], Pending::new(sink, slot, Retry::Safe, session.lane(), worker.now()));
    }
    Flow::Wait
}

/// A slot of each shard; [`ANY_SLOT`] where there are no slots, or nobody is known to have any.
pub fn slots_of_all(worker: &Worker) -> Vec<u16> {
    let slots: Vec<u16> = worker.router().shards().into_iter().map(|(_, slot)| slot).collect();
    if slots.is_empty() { vec![ANY_SLOT] } else { slots }
}

/// As [`all`], where the policy allows it.
pub fn gated(session: &Rc<Session>, request: &Request<'_>, gather: Gather) -> Flow {
    if request.spec.name == "keys" && session.worker().policy().has_versions() {
        return refuse(session, "NOPERM KEYS does not tell names with versions from others, and a rule has some: use SCAN");
    }
    let allow = session.worker().policy().allow();
    let (allowed, field) = if request.spec.name == "keys" { (allow.keys, "keys") } else { (allow.flush, "flush") };
    if allowed {
        let lists = request.spec.name == "keys";
        return if lists && !session.worker().is_cluster() { listing(session, request) } else { all(session, request, gather) };
    }
    let name = request.spec.name.to_ascii_uppercase();
    let instead = if field == "keys" { "use SCAN, or set" } else { "delete by key, or set" };
    refuse(session, &format!("NOPERM {name} touches every key of a shared cache: {instead} allow.{field} in the CachePolicy"))
}

/// SCAN walks one shard after the other; the cursor says where it is.
pub fn scan(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let worker = session.worker();
    let nodes = worker.router().shards();
    if request.spec.name != "scan" {
        return any(session, request);
    }
    if !worker.is_cluster() || nodes.is_empty() {
        return listing(session, request);
    }
    let cursor = request.args.get(1).and_then(|digits| std::str::from_utf8(digits).ok()).and_then(|digits| digits.parse().ok());
    let Some(cursor): Option<u64> = cursor else {
        return refuse(session, "ERR invalid cursor");
    };
    let (shard, inner) = ((cursor & ((1 << SHARD_BITS) - 1)) as usize, cursor >> SHARD_BITS);
    let shards = nodes.len();
    let Some((_, slot)) = nodes.into_iter().nth(shard) else {
        return refuse(session, "ERR invalid cursor");
    };
    let Listing { args, glob } = Listing::of(worker, request);
    let mut wire = Vec::new();
    encode::array(&mut wire, args.len());
    for (index, arg) in args.iter().enumerate() {
        if index == 1 { encode::bulk(&mut wire, inner.to_string().as_bytes()) } else { encode::bulk(&mut wire, arg) }
    }
    let (waiting, place) = (session.clone(), session.take_place());
    let sink = Sink::Call(Box::new(move |worker, answer| {
        when_known(worker, answer, move |worker, answer| {
            let names = |names: &[u8], out: &mut Vec<u8>| shown_list(worker, names, glob.as_deref(), out);
            waiting.answer(place, |out| match answer {
                Answer::Reply(bytes) => rewrite_scan(bytes, shard, shards, out, names),
                Answer::Failed(text) => encode::error(out, text),
            });
        });
    }));
    let pending = Pending::new(sink, slot, Retry::Safe, session.lane(), worker.now());
    if worker.submit(&[&wire], pending) { Flow::Continue } else { Flow::Wait }
}

/// The one server answers SCAN or KEYS; names of Larder's own are left out.
fn listing(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let (worker, waiting, place) = (session.worker(), session.clone(), session.take_place());
    let scans = request.spec.name == "scan";
    let Listing { args, glob } = Listing::of(worker, request);
    let mut wire = Vec::new();
    encode::command(&mut wire, &args);
    let sink = Sink::Call(Box::new(move |worker, answer| {
        when_known(worker, answer, move |worker, answer| {
            let names = |names: &[u8], out: &mut Vec<u8>| shown_list(worker, names, glob.as_deref(), out);
            waiting.answer(place, |out| match answer {
                Answer::Reply(bytes) if scans => show_scan(bytes, out, names),
                Answer::Reply(bytes) => own_keys::hide(bytes, out),
                Answer::Failed(text) => encode::error(out, text),
            });
        });
    }));
    let pending = Pending::new(sink, ANY_SLOT, Retry::Safe, session.lane(), worker.now());
    if worker.submit(&[&wire], pending) { Flow::Continue } else { Flow::Wait }
}

/// Puts the shard into the cursor; the end of one shard is the start of the next.
fn rewrite_scan(bytes: &[u8], shard: usize, shards: usize, out: &mut Vec<u8>, names: impl FnOnce(&[u8], &mut Vec<u8>)) {
    let Some([cursor, items]) = reply::elements(bytes).and_then(|parts| <[&[u8]; 2]>::try_from(parts).ok()) else {
        return out.extend_from_slice(bytes);
    };
    let inner = reply::text(cursor).and_then(|digits| std::str::from_utf8(digits).ok()).and_then(|digits| digits.parse().ok());
    let next = match inner {
        Some(0) if shard + 1 < shards => shard as u64 + 1,
        Some(0) => 0,
        Some(inner) if inner < MOST_CURSOR => (inner << SHARD_BITS) | shard as u64,
        _ => return encode::error(out, "ERR the server's cursor is too large to carry the shard"),
    };
    encode::array(out, 2);
    encode::bulk(out, next.to_string().as_bytes());
    names(items, out);
}

/// Passes a SCAN's answer on without the names of Larder's own.
pub fn hide_in_scan(bytes: &[u8], out: &mut Vec<u8>) {
    show_scan(bytes, out, own_keys::hide);
}

/// Passes a SCAN's answer on, with its list of names as `names` appends it.
fn show_scan(bytes: &[u8], out: &mut Vec<u8>, names: impl FnOnce(&[u8], &mut Vec<u8>)) {
    let Some([cursor, items]) = reply::elements(bytes).and_then(|parts| <[&[u8]; 2]>::try_from(parts).ok()) else {
        return out.extend_from_slice(bytes);
    };
    encode::array(out, 2);
    out.extend_from_slice(cursor);
    names(items, out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_goes_from_shard_to_shard() {
        let turn = |cursor: &str, shard| {
            let mut out = Vec::new();
            rewrite_scan(format!("*2\r\n${}\r\n{cursor}\r\n*0\r\n", cursor.len()).as_bytes(), shard, 3, &mut out, own_keys::hide);
            let parts = reply::elements(&out).map(|parts| parts[0].to_vec()).unwrap_or_default();
            String::from_utf8_lossy(reply::text(&parts).unwrap_or_default()).into_owned()
        };
        assert_eq!(turn("7", 1), ((7 << 12) + 1).to_string());
        assert_eq!(turn("0", 1), "2");
        assert_eq!(turn("0", 2), "0");
    }
}
