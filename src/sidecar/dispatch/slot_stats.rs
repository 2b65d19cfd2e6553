//! CLUSTER SLOT-STATS: each shard knows its own slots; the client sees those of one server with all of them.

use std::rc::Rc;

use super::shards::slots_of_all;
use super::{Flow, Request};
use crate::sidecar::commands::parse_i64;
use crate::sidecar::resp::{encode, reply};
use crate::sidecar::session::Session;
use crate::sidecar::upstream::gather::{Assembly, Meeting};
use crate::sidecar::upstream::queue::{Pending, Retry};
use crate::sidecar::upstream::sink::Sink;

/// As which the shards' slots become one list.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Order {
    /// SLOTSRANGE.
    Slots,
    /// ORDERBY.
    Metric { name: Vec<u8>, ascending: bool, limit: usize },
}

/// Asks all shards.
pub fn run(session: &Rc<Session>, request: &Request<'_>) -> Flow {
    let (worker, order) = (session.worker(), parse(request));
    let compose = move |parts: &[Vec<u8>], out: &mut Vec<u8>| merge(&order, parts, out);
    let slots = slots_of_all(worker);
    let meeting = Meeting::new(session.clone(), session.take_place(), Assembly::By(Box::new(compose)), false, slots.len());
    let mut room = true;
    for (index, slot) in slots.into_iter().enumerate() {
        let sink = Sink::Part { meeting: meeting.clone(), index: index as u32 };
        room &= worker.submit(&[request.raw], Pending::new(sink, slot, Retry::Safe, session.lane(), worker.now()));
    }
    if room { Flow::Continue } else { Flow::Wait }
}

/// What is wrong in a request the servers say.
fn parse(request: &Request<'_>) -> Order {
    let args: Vec<&[u8]> = request.args.iter().skip(2).collect();
    let [kind, name, options @ ..] = &args[..] else { return Order::Slots };
    if !kind.eq_ignore_ascii_case(b"orderby") {
        return Order::Slots;
    }
    let limit = options.iter().skip_while(|option| !option.eq_ignore_ascii_case(b"limit")).nth(1);
    let limit = limit.and_then(|limit| parse_i64(limit)).and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
    let ascending = options.iter().any(|option| option.eq_ignore_ascii_case(b"asc"));
    Order::Metric { name: name.to_ascii_lowercase(), ascending, limit }
}

fn merge(order: &Order, parts: &[Vec<u8>], out: &mut Vec<u8>) {
    if let Some(refused) = parts.iter().find(|part| part.first() == Some(&b'-')) {
        return out.extend_from_slice(refused);
    }
    let mut rows: Vec<(i64, i64, &[u8])> =
        parts.iter().filter_map(|part| reply::elements(part)).flatten().map(|row| read(order, row)).collect();
    // Servers name slots of equal metrics in the order of slots.
    rows.sort_by_key(|(slot, metric, _)| (*metric, *slot));
    if let Order::Metric { limit, .. } = order {
        rows.truncate(*limit);
    }
    encode::array(out, rows.len());
    rows.iter().for_each(|(_, _, row)| out.extend_from_slice(row));
}

/// A row's slot, and what comes before that in the order.
fn read<'a>(order: &Order, row: &'a [u8]) -> (i64, i64, &'a [u8]) {
    let fields = reply::elements(row).unwrap_or_default();
    let slot = fields.first().and_then(|slot| reply::integer(slot)).unwrap_or_default();
    let Order::Metric { name, ascending, .. } = order else { return (slot, 0, row) };
    let metrics = fields.get(1).and_then(|metrics| reply::elements(metrics)).unwrap_or_default();
    let mut pairs = metrics.chunks_exact(2).filter(|pair| reply::text(pair[0]) == Some(name));
    let value = pairs.next().and_then(|pair| reply::integer(pair[1])).unwrap_or_default();
    (slot, if *ascending { value } else { -value }, row)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(rows: &[(u16, u32)]) -> Vec<u8> {
        let row = |(slot, keys): &(u16, u32)| format!("*2\r\n:{slot}\r\n%1\r\n$9\r\nkey-count\r\n:{keys}\r\n");
        format!("*{}\r\n{}", rows.len(), rows.iter().map(row).collect::<String>()).into_bytes()
    }

    #[track_caller]
    fn check(order: &Order, shards: &[&[(u16, u32)]], whole: &[(u16, u32)]) {
        let parts: Vec<Vec<u8>> = shards.iter().map(|rows| shard(rows)).collect();
        let mut out = Vec::new();
        merge(order, &parts, &mut out);
        assert_eq!(String::from_utf8(out).expect("text"), String::from_utf8(shard(whole)).expect("text"));
    }

    #[test]
    fn shards_become_one_list_in_the_order_that_was_asked_for() {
        let shards: &[&[(u16, u32)]] = &[&[(5, 1), (1, 7)], &[(3, 9), (4, 7)]];
        check(&Order::Slots, shards, &[(1, 7), (3, 9), (4, 7), (5, 1)]);
        let by = |ascending, limit| Order::Metric { name: b"key-count".to_vec(), ascending, limit };
        check(&by(false, 3), shards, &[(3, 9), (1, 7), (4, 7)]);
        check(&by(true, usize::MAX), shards, &[(5, 1), (1, 7), (4, 7), (3, 9)]);
        let mut out = Vec::new();
        merge(&Order::Slots, &[shard(&[(1, 1)]), b"-ERR no\r\n".to_vec()], &mut out);
        assert_eq!(out, b"-ERR no\r\n");
    }
}
