//! Which transactions everybody sees. Pure.
//!
//! What was committed is in the log before others see it: the server tells a stream of it first, and where it waits for a replica long
//! before. Whoever loads in between gets the rows as they were. So nothing is said of a transaction until it can be seen.

use std::str::FromStr;

/// A snapshot, as `txid_current_snapshot` tells it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Transactions from this one on had not begun.
    next: u64,
    /// Those before it that were under way.
    under_way: Vec<u64>,
}

impl FromStr for Snapshot {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut fields = text.split(':');
        let (Some(_first), Some(next), Some(list), None) = (fields.next(), fields.next(), fields.next(), fields.next()) else {
            return Err(());
        };
        let number = |text: &str| text.parse::<u64>().map_err(|_| ());
        let under_way = list.split(',').filter(|text| !text.is_empty()).map(number).collect::<Result<_, _>>()?;
        Ok(Self { next: number(next)?, under_way })
    }
}

impl Snapshot {
    /// Whether a committed transaction can be seen. `xid` is its number without the epoch: the last one of this number counts.
    pub fn sees(&self, xid: u32) -> bool {
        let short = |number: &u64| (*number & u64::from(u32::MAX)) as u32;
        if self.under_way.iter().any(|number| short(number) == xid) {
            return false;
        }
        // Numbers go round: the nearer half is before, as Postgres reckons itself.
        let ahead = xid.wrapping_sub(short(&self.next));
        ahead >= 1 << 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_or_to_come_is_not_seen() {
        let snapshot: Snapshot = "730:735:731,733".parse().expect("a snapshot");
        let seen: Vec<u32> = (728..738).filter(|xid| snapshot.sees(*xid)).collect();
        assert_eq!(seen, [728, 729, 730, 732, 734]);
        assert_eq!("5:5:".parse(), Ok(Snapshot { next: 5, under_way: Vec::new() }));
        for bad in ["", "1:2", "1:x:", "1:2:3:4", "1:2:x"] {
            assert_eq!(bad.parse::<Snapshot>(), Err(()), "{bad}");
        }
    }

    #[test]
    fn numbers_go_round() {
        let epoch = 3u64 << 32;
        let snapshot: Snapshot = format!("{}:{}:{}", epoch - 3, epoch + 4, epoch - 2).parse().expect("a snapshot");
        assert!(snapshot.sees(u32::MAX - 2) && !snapshot.sees(u32::MAX - 1) && snapshot.sees(u32::MAX));
        assert!(snapshot.sees(3) && !snapshot.sees(4));
    }
}
