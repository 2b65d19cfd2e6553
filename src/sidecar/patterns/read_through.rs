//! Read-through: what is missing is loaded from the origin.

use std::rc::Rc;

use crate::sidecar::policy::RuleId;
use crate::sidecar::upstream::queue::Recovered;
use crate::sidecar::upstream::sink::Answer;
use crate::sidecar::worker::Worker;

/// A read of a covered key found nothing.
pub fn on_miss(worker: &Rc<Worker>, rule: RuleId, recovered: Recovered, reply: &[u8]) {
    worker.metrics().count_read(rule, true);
    recovered.pending.sink.deliver(worker, Answer::Reply(reply));
}
