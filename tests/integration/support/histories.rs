//! How histories are played.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// How many histories are played at the same time.
const AT_ONCE: u64 = 4;

/// Plays these seeds, several at the same time, since most of each history is waiting. Another test that does waits for its turn.
pub fn play_all<T: Send>(seeds: Range<u64>, play: impl Fn(u64) -> T + Sync) -> Vec<T> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (next, all) = (AtomicU64::new(seeds.start), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let played = play(seed);
                    all.lock().unwrap().push(played);
                }
            });
        }
    });
    all.into_inner().unwrap()
}

/// How a history ends that a busy machine brings to no end: its servers do not do what a fault asks of them.
const NO_END: [&str; 4] = [
    "another primary: not within",
    "the old primary to follow: not within",
    "the replica to follow: not within",
    "the sentinels to name the same primary: not within",
];

/// [`play_all`], until as many histories came to an end as there are seeds: one of [`NO_END`] takes no others with it, and the next seed is played
/// instead, for up to one in ten. How many there were of these.
pub fn play_enough<T: Send>(seeds: Range<u64>, play: impl Fn(u64) -> T + Sync) -> (Vec<T>, u64) {
    let wanted = seeds.end - seeds.start;
    let (mut ended, mut next, mut unended) = (Vec::new(), seeds, 0);
    while !next.is_empty() && unended * 10 <= wanted {
        let played = play_all(next.clone(), |seed| ended_or_not(|| play(seed)));
        let lacking = played.iter().filter(|played| played.is_none()).count() as u64;
        ended.extend(played.into_iter().flatten());
        (next, unended) = (next.end..next.end + lacking, unended + lacking);
    }
    (ended, unended)
}

/// `None`: it is one of [`NO_END`].
fn ended_or_not<T>(play: impl FnOnce() -> T) -> Option<T> {
    let failed = match catch_unwind(AssertUnwindSafe(play)) {
        Ok(played) => return Some(played),
        Err(failed) => failed,
    };
    let text = failed.downcast_ref::<String>().map_or("", String::as_str);
    if NO_END.iter().any(|end| text.starts_with(end)) { None } else { resume_unwind(failed) }
}

/// How long before or behind another moment something was, for a person.
pub fn offset(at: Instant, from: Instant) -> String {
    match at.checked_duration_since(from) {
        Some(behind) => format!("+{behind:?}"),
        None => format!("-{:?}", from - at),
    }
}

/// A number that a variable of the environment gives, such as `HISTORIES=20`.
pub fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}
