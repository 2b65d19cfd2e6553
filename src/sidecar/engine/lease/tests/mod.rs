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
    /// Reads get what BEGIN found although later commands were sent.
    OvertakenIgnored,
    /// Leases outlive a failover.
    RunIgnored,
    /// A command that leads one key waits for the others.
    WinnerWaits,
    /// A holder's disconnect leaves its lease.
    DisconnectKeepsLease,
    /// When a lease ends all who wait succeed.
    AllSucceed,
    /// A read before the expiry gets nil without a lease.
    EarlyWithoutLease,
    /// A read over the holder's own connection gets nil at once.
    OwnReadsPass,
    /// All reads of a connection that others' commands end the wait of get nil.
    OvertakenReadsLoad,
    /// A nil is over when its connection was told of the same miss again, after its lease.
    LentForgotten,
}

impl Switch {
    /// All of them.
    const ALL: [Switch; 15] = [
        Switch::GenerationUnchecked,
        Switch::UpdateKeepsLease,
        Switch::DeleteKeepsLease,
        Switch::MissesIgnored,
        Switch::OwnMissWins,
        Switch::DeleteEndsMisses,
        Switch::OvertakenIgnored,
        Switch::RunIgnored,
        Switch::WinnerWaits,
        Switch::DisconnectKeepsLease,
        Switch::AllSucceed,
        Switch::EarlyWithoutLease,
        Switch::OwnReadsPass,
        Switch::OvertakenReadsLoad,
        Switch::LentForgotten,
    ];
}
