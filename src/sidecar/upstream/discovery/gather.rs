//! Asks many at once, and waits no longer for the slow ones than it must.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, timeout_at};

/// How long the rest may take once enough have answered.
const GRACE: Duration = Duration::from_millis(100);

/// Runs `asks` at once. Returns what they brought when all are done, or a little after `enough` have succeeded: one server that
/// vanished delays nothing. Those still under way are dropped.
pub async fn gather<T, E>(asks: impl IntoIterator<Item = impl Future<Output = Result<T, E>>>, enough: usize) -> (Vec<T>, Vec<E>) {
    let mut asks: FuturesUnordered<_> = asks.into_iter().collect();
    let (mut answers, mut errors) = (Vec::new(), Vec::new());
    let mut until: Option<Instant> = None;
    loop {
        let next = match until {
            None => asks.next().await,
            Some(until) => timeout_at(until, asks.next()).await.unwrap_or(None),
        };
        match next {
            Some(Ok(answer)) => answers.push(answer),
            Some(Err(error)) => errors.push(error),
            None => return (answers, errors),
        }
        if until.is_none() && answers.len() >= enough {
            until = Some(Instant::now() + GRACE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::future::{pending, ready};
    use std::pin::Pin;

    type Ask = Pin<Box<dyn Future<Output = Result<u8, u8>>>>;

    #[tokio::test]
    async fn the_slow_are_waited_for_only_until_enough_have_answered() {
        let now = |result| -> Ask { Box::pin(ready(result)) };
        let (mut answers, errors) = gather([Box::pin(pending()), now(Ok(1)), now(Err(3)), now(Ok(2))], 2).await;
        answers.sort();
        assert_eq!((answers, errors), (vec![1, 2], vec![3]));
    }

    #[tokio::test]
    async fn all_are_waited_for_while_too_few_have_answered() {
        let later = async {
            tokio::time::sleep(3 * GRACE).await;
            Ok(2)
        };
        let asks: [Ask; 3] = [Box::pin(later), Box::pin(ready(Ok(1))), Box::pin(ready(Err(3)))];
        assert_eq!(gather(asks, 2).await, (vec![1, 2], vec![3]));
    }
}
