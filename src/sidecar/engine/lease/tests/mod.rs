//! The desk by hand, and in a simulated world.

mod cache;
mod plain;
mod simulation;
mod world;

/// What a test breaks, to see that the simulation finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Switch {
    /// FILL stores under any generation.
    GenerationUnchecked,
    /// An update leaves the lease.
    UpdateKeepsLease,
    /// A deletion leaves the lease.
    DeleteKeepsLease,
    /// Every SET is an update.
    MissesIgnored,
    /// A SET is stored under the generation of its own connection's nil, whatever the others'.
    OwnMissWins,
    /// A DEL ends the key's outstanding misses.
    DeleteEndsMisses,
    /// Of all outstanding misses each SET ends all.
    SetEndsAllMisses,
    /// What may be old is stored as an update is.
    DoubtStored,
    /// An outstanding miss is over with the first SET on its connection.
    SettledAtOnce,
    /// A nil is forgotten when its lease is over.
    MemoryIsALease,
    /// A SET that is the fill of its own connection's nil is not held against younger ones of others.
    NoOverlap,
    /// A SET of which nobody knows whether it was carried out has ended its miss.
    FailureUndoubted,
    /// A nil of those who must not wait is no outstanding miss.
    PassedForgotten,
    /// Nor is one for a key that nobody fills.
    SharedForgotten,
    /// Nor is one while the cache is away.
    AwayForgotten,
    /// While the cache is away, all who ask load.
    AwayForAll,
    /// A write or a deletion leaves the stale copy.
    WritesKeepCopy,
    /// A fill that is stored leaves the generation.
    FillKeepsGeneration,
    /// So does a SET that is refused.
    RefusalKeepsGeneration,
    /// So does one whose own condition fails.
    UnmetKeepsGeneration,
    /// A refused SET ends the lease of who holds it, too.
    RefusalEndsLease,
    /// Reads get what BEGIN found although later commands were sent.
    OvertakenIgnored,
    /// Reads get what BEGIN found although it had been sent before they missed.
    SinceAskIgnored,
    /// A read that waits hears nothing of what a later one on its connection found.
    SeenIgnored,
    /// Leases outlive a failover.
    RunIgnored,
    /// A command that leads one key waits for the others.
    WinnerWaits,
    /// A holder's disconnect leaves its lease.
    DisconnectKeepsLease,
    /// A lease that was won for somebody who is gone stays.
    UnclaimedKept,
    /// Who asks for a lease gets it, whoever holds it.
    LeaseForAll,
    /// RELEASE ends the lease, whoever holds it.
    ReleaseUnchecked,
    /// A key that nobody fills is leased again and again.
    LeadsUncounted,
    /// Who waits in another pod is not woken.
    SignsUnsent,
    /// Nobody who waits looks again.
    NobodyLooks,
    /// Of a connection's reads the youngest leads.
    YoungestLeads,
    /// Reads wait longer than their rule says.
    WaitsTooLong,
    /// When a lease ends all who wait succeed.
    AllSucceed,
    /// A read before the expiry gets nil without a lease.
    EarlyWithoutLease,
    /// A read before the expiry that does not get the lease is kept waiting.
    EarlyKept,
    /// A read over the holder's own connection gets nil at once.
    OwnReadsPass,
    /// All reads of a connection that others' commands end the wait of get nil.
    OvertakenReadsLoad,
    /// A nil is over when its connection was told of the same miss again, after its lease.
    LentForgotten,
    /// A nil that is lent does not speak to SETs over connections with a nil of their own, though it stands for another load.
    LentUnheard,
    /// It stands for younger loads no longer than until a lease after the first SET that was refused for its sake.
    LentBriefly,
    /// What a SET has ended that is under way does not speak to SETs over other connections.
    UnderWayIgnored,
}

impl Switch {
    /// All of them.
    const ALL: [Switch; 44] = [
        Switch::GenerationUnchecked,
        Switch::UpdateKeepsLease,
        Switch::DeleteKeepsLease,
        Switch::MissesIgnored,
        Switch::OwnMissWins,
        Switch::DeleteEndsMisses,
        Switch::SetEndsAllMisses,
        Switch::DoubtStored,
        Switch::SettledAtOnce,
        Switch::MemoryIsALease,
        Switch::NoOverlap,
        Switch::FailureUndoubted,
        Switch::PassedForgotten,
        Switch::SharedForgotten,
        Switch::AwayForgotten,
        Switch::AwayForAll,
        Switch::WritesKeepCopy,
        Switch::FillKeepsGeneration,
        Switch::RefusalKeepsGeneration,
        Switch::UnmetKeepsGeneration,
        Switch::RefusalEndsLease,
        Switch::OvertakenIgnored,
        Switch::SinceAskIgnored,
        Switch::SeenIgnored,
        Switch::RunIgnored,
        Switch::WinnerWaits,
        Switch::DisconnectKeepsLease,
        Switch::UnclaimedKept,
        Switch::LeaseForAll,
        Switch::ReleaseUnchecked,
        Switch::LeadsUncounted,
        Switch::SignsUnsent,
        Switch::NobodyLooks,
        Switch::YoungestLeads,
        Switch::WaitsTooLong,
        Switch::AllSucceed,
        Switch::EarlyWithoutLease,
        Switch::EarlyKept,
        Switch::OwnReadsPass,
        Switch::OvertakenReadsLoad,
        Switch::LentForgotten,
        Switch::LentUnheard,
        Switch::LentBriefly,
        Switch::UnderWayIgnored,
    ];
}
