//! Carries out what the desk says.

use std::rc::Rc;

use super::{Aside, Element, scripts};
use crate::sidecar::engine::lease::{Begun, Effect, Mode, Name, Rule};
use crate::sidecar::slots;
use crate::sidecar::upstream::lane::Lane;
use crate::sidecar::upstream::queue::{ANY_SLOT, Pending, Retry};
use crate::sidecar::upstream::sink::{Answer, Sink};
use crate::sidecar::worker::Worker;

impl Aside {
    /// Carries out effects, in order.
    pub(super) fn carry_out(&self, worker: &Rc<Worker>, effects: Vec<Effect<Element>>) {
        for effect in effects {
            match effect {
                Effect::Ask { name, mode, fresh, rule } => self.ask(worker, name, mode, fresh, &rule),
                Effect::Answer { asker, answer } => self.answer(worker, asker, &answer),
                Effect::Early { asker, refresh } => self.answer_early(worker, asker, refresh),
                Effect::GiveBack { name, token } => {
                    let mut wire = Vec::new();
                    scripts::release(&scripts::Names::of(&name.key), &token, &mut wire);
                    self.send(worker, &name, &wire, Sink::Drop);
                }
                Effect::Watch { name } => self.wake.watch(worker, &name),
                Effect::Unwatch { name } => self.wake.unwatch(&name),
                Effect::Disarmed { rule, until } => disarmed(worker, rule, until),
            }
        }
    }

    fn ask(&self, worker: &Rc<Worker>, name: Rc<Name>, mode: Mode, fresh: u64, rule: &Rule) {
        let mut wire = Vec::new();
        scripts::begin(&scripts::Names::of(&name.key), fresh, mode, rule, &mut wire);
        let asked = name.clone();
        let sink = Sink::Call(Box::new(move |worker, answer| {
            let begun = match answer {
                Answer::Reply(bytes) => scripts::begun(bytes, fresh).unwrap_or_else(|error| {
                    tracing::debug!(%error, "the cache cannot be asked for a lease");
                    Begun::Failed
                }),
                Answer::Failed(_) => Begun::Failed,
            };
            worker.aside().run(worker, |desk, now, effects| desk.begun(now, &asked, fresh, begun, effects));
        }));
        self.send(worker, &name, &wire, sink);
    }

    fn send(&self, worker: &Rc<Worker>, name: &Name, wire: &[u8], sink: Sink) {
        let slot = if worker.is_cluster() { slots::slot_of(&name.key) } else { ANY_SLOT };
        let lane = Lane::of(self.protocol.get(), name.database as u8);
        worker.submit(&[wire], Pending::new(sink, slot, Retry::Safe, lane, worker.now()));
    }
}

#[cold]
fn disarmed(worker: &Rc<Worker>, rule: u16, until: u64) {
    let policy = worker.policy();
    let name = policy.rule(rule).map_or("", |rule| &rule.name);
    let seconds = until.saturating_sub(worker.now()) / 1000;
    tracing::warn!(rule = name, seconds, "misses of this rule are seldom filled: no leases for a while");
    worker.metrics().disarmed(rule);
}
