//! How the reading of a database's changes is, as the cache tells it to whoever asks: relays note it there beside what they say.

use std::time::Duration;

use super::scripts::{AnswerError, Call};
use crate::policy::events::{feed_claim_key, feed_state_key};

/// How old a change may be that is not said before something is wrong: a relay that has nothing to say writes that every few seconds.
pub const LATE: Duration = Duration::from_secs(30);
/// The longest text of what is wrong, in characters.
pub const MOST_TROUBLE_CHARS: usize = 400;

/// KEYS: claim, state.
const VIEW: &str = "\
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local state = redis.call('HMGET', KEYS[2], 'position', 'through', 'kept', 'trouble', 'removed')
local behind = ''
if state[2] then behind = string.format('%.0f', math.max(now - tonumber(state[2]), 0)) end
return {'view', redis.call('GET', KEYS[1]) or '', state[1] or '', behind, state[3] or '', state[4] or '', state[5] or ''}";

/// What the cache tells of a feed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// The token of the relay that has it.
    pub reader: Option<String>,
    /// Up to where in the database's log all is said.
    pub position: Option<String>,
    /// How old the oldest change may be that is not said, in milliseconds. `None`: nothing was ever said.
    pub behind_ms: Option<u64>,
    /// How many bytes of its log the database kept a few seconds ago.
    pub kept_bytes: Option<u64>,
    /// What is wrong, as the relay that has it says: at most [`MOST_TROUBLE_CHARS`].
    pub trouble: Option<String>,
    /// Whether its slot was taken away.
    pub is_removed: bool,
}

/// Asks how the feed of this slot is, whoever has it.
pub fn view(slot: &str) -> Call {
    Call::new(VIEW, vec![feed_claim_key(slot).into_bytes(), feed_state_key(slot).into_bytes()], Vec::new())
}

/// Reads the answer.
///
/// # Errors
/// It is none.
pub fn viewed(answer: &[&[u8]]) -> Result<View, AnswerError> {
    let [b"view", reader, position, behind, kept, trouble, removed] = answer else { return Err(AnswerError) };
    let text = |bytes: &[u8]| (!bytes.is_empty()).then(|| begin(&String::from_utf8_lossy(bytes)));
    let number = |bytes: &[u8]| std::str::from_utf8(bytes).ok()?.parse().ok();
    Ok(View {
        reader: text(reader),
        // Behind the place stands whose log it is.
        position: text(position).and_then(|text| Some(text.split_once(' ')?.0.to_owned())),
        behind_ms: number(behind),
        kept_bytes: number(kept),
        trouble: text(trouble),
        is_removed: !removed.is_empty(),
    })
}

/// The first characters of a text that others chose.
pub fn begin(text: &str) -> String {
    text.chars().take(MOST_TROUBLE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        assert_eq!(viewed(&[b"view", b"", b"", b"", b"", b"", b""]), Ok(View::default()));
        let view = viewed(&[b"view", b"a", b"1/FF 7/1/shop", b"70", b"9", b"no table", b"1"]).unwrap();
        assert_eq!((view.reader.as_deref(), view.position.as_deref()), (Some("a"), Some("1/FF")));
        assert_eq!((view.behind_ms, view.kept_bytes, view.trouble.as_deref()), (Some(70), Some(9), Some("no table")));
        assert!(view.is_removed && viewed(&[b"view"]).is_err());
    }
}
