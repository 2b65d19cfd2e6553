//! Commands over many keys that may lie in several slots: MGET, MSET, DEL, UNLINK, EXISTS, TOUCH.

use std::rc::Rc;

use rustc_hash::FxHashMap;

use super::data::{fills, forward as forward_whole, refuse_if_unmatched, submit_write};
use super::{Flow, Request};
use crate::sidecar::commands::{Access, CommandSpec, Join};
use crate::sidecar::resp::{CommandArgs, CommandScan, CommandScanner, encode};
use crate::sidecar::session::Session;
use crate::sidecar::slots;
use crate::sidecar::upstream::gather::{Assembly, Meeting};
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::Sink;
use crate::sidecar::versions::written::guarded;

/// The keys of one slot: their arguments (with values, for MSET) and their places among the client's keys.
#[derive(Default)]
struct Part<'a> {
    args: Vec<&'a [u8]>,
    places: Vec<u32>,
}

/// Forwards a command, split by slot where its keys lie in several. EXISTS, where misses are loaded, is split by key: a count
/// does not tell which are missing.
pub fn forward(session: &Rc<Session>, request: &Request<'_>, join: Join) -> Flow {
    let worker = session.worker();
    let keys = request.spec.keys(&request.args).unwrap_or_default();
    let by_key = keys.len() > 1 && request.spec.name == "exists" && fills(session, request);
    if !by_key && (!worker.is_cluster() || keys.len() < 2) {
        return forward_whole(session, request);
    }
    let step = if request.spec.name == "mset" { 2 } else { 1 };
    if step == 2 && request.args.len().is_multiple_of(2) {
        // An odd number of arguments: any server answers with the error that fits.
        return forward_whole(session, request);
    }
    let mut parts: Vec<(u16, Part<'_>)> = Vec::new();
    let mut by_slot: FxHashMap<u16, usize> = FxHashMap::default();
    for (place, at) in keys.iter().enumerate() {
        let index = at.index as usize;
        let slot = if worker.is_cluster() { request.args.get(index).map_or(0, slots::slot_of) } else { ANY_SLOT };
        let part = match by_slot.get(&slot) {
            Some(part) if !by_key => *part,
            _ => {
                parts.push((slot, Part::default()));
                by_slot.insert(slot, parts.len() - 1);
                parts.len() - 1
            }
        };
        let part = &mut parts[part].1;
        part.places.push(place as u32);
        part.args.extend((index..index + step).filter_map(|index| request.args.get(index)));
    }
    if parts.len() == 1 {
        return forward_whole(session, request);
    }
    if let Some(refused) = refuse_if_unmatched(session, request) {
        return refused;
    }
    send_parts(session, request, join, parts)
}

fn send_parts(session: &Rc<Session>, request: &Request<'_>, join: Join, parts: Vec<(u16, Part<'_>)>) -> Flow {
    let writes = request.spec.access == Access::Write;
    let places: Vec<Vec<u32>> = parts.iter().map(|(_, part)| part.places.clone()).collect();
    let meeting = if fills(session, request) {
        Meeting::filling(session.clone(), session.take_place(), join, places, request.raw)
    } else {
        Meeting::new(session.clone(), session.take_place(), Assembly::Keys(join, places), writes, parts.len())
    };
    let mut room = true;
    let mut wire = Vec::new();
    let mut scanner = CommandScanner::default();
    for (index, (slot, part)) in parts.iter().enumerate() {
        wire.clear();
        encode::array(&mut wire, part.args.len() + 1);
        encode::bulk(&mut wire, request.args.name());
        part.args.iter().for_each(|arg| encode::bulk(&mut wire, arg));
        let sink = Sink::Part { meeting: meeting.clone(), index: index as u32 };
        room &= submit_part(session, request.spec, &wire, *slot, sink, &mut scanner);
    }
    if room { Flow::Continue } else { Flow::Wait }
}

/// Sends one part of a split command, which is whole in `wire`. `false`: the session should pause.
pub fn submit_part(
    session: &Rc<Session>,
    spec: &'static CommandSpec,
    wire: &[u8],
    slot: u16,
    sink: Sink,
    scanner: &mut CommandScanner,
) -> bool {
    let worker = session.worker();
    if spec.access != Access::Write {
        return worker.submit(&[wire], Pending::new(sink, slot, Retry::Safe, session.lane(), worker.now()));
    }
    match scanner.scan(wire) {
        Ok(CommandScan::Complete { .. }) => {
            let part = Request { raw: wire, args: CommandArgs::new(wire, scanner.ranges()), spec };
            submit_write(session, &part, slot, guarded(worker, sink))
        }
        // What was just written is whole.
        _ => true,
    }
}
