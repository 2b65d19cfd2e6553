//! Which of two copies of the data reaches further.

use crate::policy::agent::{DataState, Position};

/// A copy that holds something.
#[derive(Debug)]
pub(super) struct Rank<'a> {
    /// `None`: it may lack a part.
    position: Option<&'a Position>,
}

impl<'a> Rank<'a> {
    /// `None` where the server holds nothing.
    pub(super) fn of(data: &'a DataState) -> Option<Self> {
        match data {
            DataState::Empty => None,
            DataState::Partial => Some(Self { position: None }),
            DataState::Complete(position) => Some(Self { position: Some(position) }),
        }
    }

    /// Whether it is all that there was at some moment.
    pub(super) fn is_complete(&self) -> bool {
        self.position.is_some()
    }
}

/// How a copy compares with another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// It holds more.
    Ahead,
    /// Both hold the same.
    Equal,
    /// It holds less.
    Behind,
    /// Nobody can say.
    Unknown,
}

/// How `own` compares with a peer's copy.
pub(super) fn order(own: &Rank<'_>, theirs: Option<&Rank<'_>>) -> Order {
    let Some(theirs) = theirs else { return Order::Ahead };
    match (own.position, theirs.position) {
        (Some(own), Some(theirs)) => order_positions(own, theirs),
        (Some(_), None) => Order::Ahead,
        (None, Some(_)) => Order::Behind,
        // Two torn copies: one of them has to be given up, which only a person may say.
        (None, None) => Order::Unknown,
    }
}

/// How nothing compares with a peer's copy.
pub(super) fn against_nothing(theirs: Option<&Rank<'_>>) -> Order {
    if theirs.is_some() { Order::Behind } else { Order::Equal }
}

/// A primary that lost nothing is ahead of all that followed it. Otherwise the offset counts, within one lineage.
fn order_positions(own: &Position, theirs: &Position) -> Order {
    if own.lineage != theirs.lineage {
        return Order::Unknown;
    }
    let certain = |position: &Position| position.led && position.exact;
    match (certain(own), certain(theirs)) {
        (true, false) => Order::Ahead,
        (false, true) => Order::Behind,
        _ => match own.offset.cmp(&theirs.offset) {
            std::cmp::Ordering::Greater => Order::Ahead,
            std::cmp::Ordering::Equal => Order::Equal,
            std::cmp::Ordering::Less => Order::Behind,
        },
    }
}
