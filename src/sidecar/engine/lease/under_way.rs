//! SETs of one key that are on their way to the cache.
//!
//! A SET ends a nil when it is judged, and the older generations when the cache carries it out. Until then another client's SET may
//! overtake it: the sidecar has several connections to a server, and each keeps its own order only. What overtakes it finds the
//! generation standing that it is to end, and the nil gone that would speak of its load. So that nil speaks on, to SETs over other
//! connections than its own, until the SET that ended it is answered. Over one connection nothing overtakes anything.
//!
//! Where the SETs keep their order after all, that costs nothing: the one would have ended the generation of the other.

use smallvec::SmallVec;

use super::misses::Counted;
use super::{Doubt, Millis, Rule, Verdict};

/// One SET.
#[derive(Debug, Clone, Copy)]
struct Sent {
    connection: u64,
    /// When it was judged.
    at: Millis,
    /// The nil that it ended.
    ended: Option<Counted>,
}

/// Those of one key, oldest first.
#[derive(Debug, Clone, Default)]
pub struct UnderWay(SmallVec<[Sent; 1]>);

impl UnderWay {
    /// A SET on `connection` is sent, and has ended a nil.
    pub fn add(&mut self, connection: u64, ended: Option<Counted>, rule: &Rule, now: Millis) {
        // Each is answered. Were one not, it would not speak for ever.
        self.0.retain(|sent| now < sent.at + rule.memory);
        self.0.push(Sent { connection, at: now, ended });
    }

    /// The oldest of `connection` is answered: answers come in order.
    pub fn answered(&mut self, connection: u64) {
        if let Some(at) = self.0.iter().position(|sent| sent.connection == connection) {
            self.0.remove(at);
        }
    }

    /// What a SET on `connection` may be that is `verdict` by the nils that are outstanding.
    pub fn judge(&self, connection: u64, verdict: Verdict, rule: &Rule, now: Millis) -> Verdict {
        let Verdict::Fill(generation) = verdict else { return verdict };
        let others = self.0.iter().filter(|sent| sent.connection != connection && now < sent.at + rule.memory);
        match others.filter_map(|sent| sent.ended).find(|ended| ended.generation != Some(generation)) {
            None => verdict,
            Some(Counted { generation: Some(_) }) => Verdict::Ambiguous(Doubt::Mixed),
            Some(Counted { generation: None }) => Verdict::Ambiguous(Doubt::Undated),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Generation;
    use super::*;

    const RULE: Rule = Rule::new(1, 3_000, 1_000);

    fn generation(random: u64) -> Generation {
        Generation { random, run: 1 }
    }

    fn under(random: u64) -> Option<Counted> {
        Some(Counted { generation: Some(generation(random)) })
    }

    const UNDATED: Option<Counted> = Some(Counted { generation: None });

    #[test]
    fn what_a_set_ended_speaks_to_other_connections_until_it_is_answered() {
        let (mut under_way, fill) = (UnderWay::default(), Verdict::Fill(generation(1)));
        under_way.add(1, under(2), &RULE, 0);
        assert_eq!(under_way.judge(1, fill, &RULE, 0), fill, "nothing overtakes what came before it over the same connection");
        assert_eq!(under_way.judge(2, fill, &RULE, 0), Verdict::Ambiguous(Doubt::Mixed));
        assert_eq!(under_way.judge(2, Verdict::Update, &RULE, 0), Verdict::Update);
        under_way.answered(2);
        assert_eq!(under_way.judge(2, fill, &RULE, 0), Verdict::Ambiguous(Doubt::Mixed), "another's answer");
        under_way.answered(1);
        assert_eq!(under_way.judge(2, fill, &RULE, 0), fill);
    }

    #[test]
    fn only_a_nil_of_another_generation_speaks() {
        let (mut under_way, fill) = (UnderWay::default(), Verdict::Fill(generation(1)));
        under_way.add(1, None, &RULE, 0);
        under_way.add(1, under(1), &RULE, 0);
        assert_eq!(under_way.judge(2, fill, &RULE, 0), fill);
        under_way.add(1, UNDATED, &RULE, 0);
        assert_eq!(under_way.judge(2, fill, &RULE, 0), Verdict::Ambiguous(Doubt::Undated));
        under_way.answered(1);
        under_way.answered(1);
        assert_eq!(under_way.judge(2, fill, &RULE, 0), Verdict::Ambiguous(Doubt::Undated), "answers come in order");
        under_way.answered(1);
        assert_eq!(under_way.judge(2, fill, &RULE, 0), fill);
    }

    #[test]
    fn one_that_is_never_answered_speaks_as_long_as_any_load_may_take() {
        let (mut under_way, fill) = (UnderWay::default(), Verdict::Fill(generation(1)));
        under_way.add(1, UNDATED, &RULE, 0);
        assert_ne!(under_way.judge(2, fill, &RULE, RULE.memory - 1), fill);
        assert_eq!(under_way.judge(2, fill, &RULE, RULE.memory), fill);
        under_way.add(3, None, &RULE, RULE.memory);
        assert_eq!(under_way.0.len(), 1);
    }
}
