//! The planner's rules, each of which a test can switch off to see that the model catches its absence.

/// A rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// One pod at a time: nothing is disrupted while another pod is on its way.
    OneAtATime,
    /// Nothing is disrupted while there is something to heal.
    HealFirst,
    /// A primary's pod is not replaced before it has handed over.
    HandOverFirst,
    /// A pod that is not ready stays where something is lost with it.
    KeepLastCopy,
    /// A pod that is stale, not ready and holds nothing goes at once.
    ReplaceBroken,
    /// A majority of sentinels that could fail over is not contradicted.
    RespectMajority,
    /// Those who do not answer are waited for.
    Patience,
    /// Only the best copy is promoted.
    BestCopy,
    /// A server that does not come up may hold the best copy, too.
    HeedStarting,
    /// Sentinels that watch nothing are told.
    TellUnaware,
    /// Sentinels are told how many must agree.
    KeepQuorum,
    /// Ghosts are forgotten.
    Prune,
    /// One sentinel at a time forgets its ghosts.
    PruneSlowly,
    /// A sentinel that does not know everybody is waited for.
    AwaitDiscovery,
    /// A sentinel that left is forgotten before the next leaves.
    PruneBeforeLess,
    /// More sentinels must agree only once there are as many.
    RaiseQuorumLate,
    /// A while passes between handovers that fail.
    PauseHandovers,
    /// A primary that is to go hands over first.
    KeepPrimary,
    /// Sentinels' memory is taken only where nobody serves.
    KeepMemory,
    /// Sentinels whose memory keeps the agents waiting lose it.
    ForgetStale,
    /// A sentinel of a node that carries too many is made anew.
    MoveSentinels,
    /// Only where another node has room.
    MoveWhereRoom,
    /// A while passes between moves.
    MoveSlowly,
    /// A slot on its way arrives before others leave.
    FinishSlots,
    /// Slots begin to move only where nothing is to be healed.
    MoveWhenWell,
    /// A shard stays while it owns slots.
    DrainFirst,
    /// A server stays while it holds keys.
    KeepKeys,
    /// Keys of slots that have left, and that nobody drops, are dropped.
    DropStrays,
    /// Keys of slots on their way outlive the primary that was to get the slots.
    KeepArrivals,
    /// Slots begin to move to a shard once every agent knows of it.
    TellBeforeMoves,
    /// A shard is taken over only where its primary is gone for certain.
    ProveGone,
    /// Primaries that a node carries too many of hand over to others.
    SpreadPrimaries,
    /// Where none of their replicas is elsewhere, one is made anew.
    MoveReplicas,
    /// Nothing is done while paused.
    Pause,
}

/// Whether a rule is in force: always, but in a test that switched it off.
pub(super) fn holds(rule: Rule) -> bool {
    #[cfg(test)]
    return !test::is_off(rule);
    #[cfg(not(test))]
    {
        let _ = rule;
        true
    }
}

#[cfg(test)]
pub(super) mod test {
    use std::cell::Cell;

    use super::Rule;

    thread_local! {
        static OFF: Cell<Option<Rule>> = const { Cell::new(None) };
    }

    pub(in super::super) fn is_off(rule: Rule) -> bool {
        OFF.get() == Some(rule)
    }

    /// Switches one rule off for this thread, or none.
    pub(in super::super) fn switch_off(rule: Option<Rule>) {
        OFF.set(rule);
    }

    #[test]
    fn one_rule_is_off_at_a_time() {
        switch_off(Some(Rule::Prune));
        assert!(!super::holds(Rule::Prune) && super::holds(Rule::Patience));
        switch_off(None);
        assert!(super::holds(Rule::Prune));
    }
}
