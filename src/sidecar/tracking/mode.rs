//! What a client wants to hear: CLIENT TRACKING's options, as the servers read them.

use std::collections::BTreeSet;

use crate::sidecar::commands::parse_i64;
use crate::sidecar::resp::{Protocol, encode};

/// The most prefixes of one client, and their longest sum.
const MOST_PREFIXES: usize = 256;
const MOST_PREFIX_BYTES: usize = 64 * 1024;
const SYNTAX: &str = "ERR syntax error";
const NO_TRACKING: &str =
    "ERR CLIENT CACHING can be called only when the client is in tracking mode with OPTIN or OPTOUT mode enabled";

/// Which reads are tracked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// All.
    #[default]
    All,
    /// Those after `CLIENT CACHING YES`.
    OptIn,
    /// All but those after `CLIENT CACHING NO`.
    OptOut,
}

/// The mode of a client that tracks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mode {
    /// Whether it hears of all keys that begin so, read or not.
    pub broadcast: bool,
    /// Which reads are tracked.
    pub choice: Choice,
    /// Whether it need not hear of its own writes.
    pub no_loop: bool,
    /// Who gets the messages. `None`: itself.
    pub redirect: Option<u64>,
    /// Beginnings of the keys that it hears of.
    pub prefixes: BTreeSet<Vec<u8>>,
}

/// `CLIENT TRACKING`'s arguments.
#[derive(Debug, PartialEq, Eq)]
pub enum Wish {
    /// ON, in this mode.
    On(Mode),
    /// OFF.
    Off,
}

impl Wish {
    /// Reads what comes after `CLIENT TRACKING`, of a client in `old` mode.
    pub fn parse(words: &[&[u8]], old: Option<&Mode>) -> Result<Self, String> {
        let [word, options @ ..] = words else { return Err(SYNTAX.to_owned()) };
        let (mode, prefixes) = read_options(options)?;
        if word.eq_ignore_ascii_case(b"off") {
            return Ok(Self::Off);
        }
        if !word.eq_ignore_ascii_case(b"on") {
            return Err(SYNTAX.to_owned());
        }
        fits(mode, prefixes, old).map(Self::On)
    }
}

/// The options, and the prefixes in the order in which they were given.
fn read_options(mut options: &[&[u8]]) -> Result<(Mode, Vec<Vec<u8>>), String> {
    let (mut mode, mut prefixes, mut out_too) = (Mode::default(), Vec::new(), false);
    while let [option, rest @ ..] = options {
        options = rest;
        match (option.to_ascii_lowercase().as_slice(), rest) {
            (b"redirect", [id, rest @ ..]) => {
                options = rest;
                if mode.redirect.is_some() {
                    return Err("ERR A client can only redirect to a single other client".to_owned());
                }
                let id = parse_i64(id).ok_or("ERR value is not an integer or out of range")?;
                // No client has a number below one.
                mode.redirect = Some(u64::try_from(id).unwrap_or_default());
            }
            (b"prefix", [prefix, rest @ ..]) => {
                options = rest;
                prefixes.push(prefix.to_vec());
            }
            (b"bcast", _) => mode.broadcast = true,
            (b"optin", _) if out_too => return Err(both()),
            (b"optin", _) => mode.choice = Choice::OptIn,
            (b"optout", _) if mode.choice == Choice::OptIn => return Err(both()),
            (b"optout", _) => (mode.choice, out_too) = (Choice::OptOut, true),
            (b"noloop", _) => mode.no_loop = true,
            _ => return Err(SYNTAX.to_owned()),
        }
    }
    Ok((mode, prefixes))
}

fn both() -> String {
    "ERR You can't specify both OPTIN mode and OPTOUT mode".to_owned()
}

fn fits(mut mode: Mode, prefixes: Vec<Vec<u8>>, old: Option<&Mode>) -> Result<Mode, String> {
    let again = "before disabling tracking for this client, and then re-enabling it with a different mode.";
    if !mode.broadcast && !prefixes.is_empty() {
        return Err("ERR PREFIX option requires BCAST mode to be enabled".to_owned());
    }
    if old.is_some_and(|old| old.broadcast != mode.broadcast) {
        return Err(format!("ERR You can't switch BCAST mode on/off {again}"));
    }
    if mode.broadcast && mode.choice != Choice::All {
        return Err("ERR OPTIN and OPTOUT are not compatible with BCAST".to_owned());
    }
    let switches = |old: &Mode| old.choice != Choice::All && mode.choice != Choice::All && old.choice != mode.choice;
    if old.is_some_and(switches) {
        return Err(format!("ERR You can't switch OPTIN/OPTOUT mode {again}"));
    }
    if let Some(old) = old {
        mode.prefixes.clone_from(&old.prefixes);
    }
    collide(&prefixes, &mode.prefixes)?;
    if mode.broadcast && prefixes.is_empty() {
        // What all keys begin with.
        mode.prefixes.insert(Vec::new());
    }
    mode.prefixes.extend(prefixes);
    let bytes: usize = mode.prefixes.iter().map(Vec::len).sum();
    if mode.prefixes.len() > MOST_PREFIXES || bytes > MOST_PREFIX_BYTES {
        return Err(format!("ERR a client may have {MOST_PREFIXES} prefixes of {MOST_PREFIX_BYTES} bytes together"));
    }
    Ok(mode)
}

fn collide(fresh: &[Vec<u8>], old: &BTreeSet<Vec<u8>>) -> Result<(), String> {
    let overlap = |one: &[u8], other: &[u8]| one.starts_with(other) || other.starts_with(one);
    let error = |one: &[u8], kind: &str, other: &[u8]| {
        let [one, other] = [one, other].map(|text| String::from_utf8_lossy(&text[..text.len().min(128)]).into_owned());
        Err(format!("ERR Prefix '{one}' overlaps with {kind} prefix '{other}'. Prefixes for a single client must not overlap."))
    };
    for (index, prefix) in fresh.iter().enumerate() {
        if let Some(other) = old.iter().find(|other| overlap(prefix, other)) {
            return error(prefix, "an existing", other);
        }
        if let Some(other) = fresh[index + 1..].iter().find(|other| overlap(prefix, other)) {
            return error(prefix, "another provided", other);
        }
    }
    Ok(())
}

impl Mode {
    /// Whether messages about `key` are for a client that hears of keys it has not read.
    pub fn wants(&self, key: &[u8]) -> bool {
        self.prefixes.iter().any(|prefix| key.starts_with(prefix))
    }

    /// Whether the next command is tracked, given what CLIENT CACHING said before it.
    pub fn tracks(&self, caching: Option<bool>) -> bool {
        match self.choice {
            Choice::All => true,
            Choice::OptIn => caching == Some(true),
            Choice::OptOut => caching != Some(false),
        }
    }
}

/// Reads `CLIENT CACHING`'s argument, of a client in `mode`.
pub fn caching(word: &[u8], mode: Option<&Mode>) -> Result<bool, String> {
    let choice = mode.map_or(Choice::All, |mode| mode.choice);
    let wrong = |answer: &str, choice: &str| {
        Err(format!("ERR CLIENT CACHING {answer} is only valid when tracking is enabled in {choice} mode."))
    };
    match (word.to_ascii_lowercase().as_slice(), mode, choice) {
        (_, None, _) => Err(NO_TRACKING.to_owned()),
        (b"yes", _, Choice::OptIn) => Ok(true),
        (b"yes", ..) => wrong("YES", "OPTIN"),
        (b"no", _, Choice::OptOut) => Ok(false),
        (b"no", ..) => wrong("NO", "OPTOUT"),
        _ => Err(SYNTAX.to_owned()),
    }
}

/// Writes `CLIENT GETREDIR`'s answer.
pub fn redirection(mode: Option<&Mode>) -> i64 {
    mode.map_or(-1, |mode| mode.redirect.unwrap_or_default().cast_signed())
}

/// Writes `CLIENT TRACKINGINFO`'s answer.
pub fn info(mode: Option<&Mode>, caching: Option<bool>, broken: bool, protocol: Protocol, out: &mut Vec<u8>) {
    let mut flags: Vec<&[u8]> = vec![if mode.is_some() { b"on" } else { b"off" }];
    if let Some(mode) = mode {
        let marks: [(bool, &[u8]); 7] = [
            (mode.broadcast, b"bcast"),
            (mode.choice == Choice::OptIn, b"optin"),
            (caching == Some(true), b"caching-yes"),
            (mode.choice == Choice::OptOut, b"optout"),
            (caching == Some(false), b"caching-no"),
            (mode.no_loop, b"noloop"),
            (broken, b"broken_redirect"),
        ];
        flags.extend(marks.into_iter().filter_map(|(holds, flag)| holds.then_some(flag)));
    }
    encode::map(out, protocol, 3);
    encode::bulk(out, b"flags");
    encode::set(out, protocol, flags.len());
    flags.iter().for_each(|flag| encode::bulk(out, flag));
    encode::bulk(out, b"redirect");
    encode::integer(out, redirection(mode));
    encode::bulk(out, b"prefixes");
    let prefixes = mode.map(|mode| &mode.prefixes);
    encode::array(out, prefixes.map_or(0, BTreeSet::len));
    prefixes.into_iter().flatten().for_each(|prefix| encode::bulk(out, prefix));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str, old: Option<&Mode>) -> Result<Wish, String> {
        Wish::parse(&line.split_whitespace().map(str::as_bytes).collect::<Vec<_>>(), old)
    }

    #[track_caller]
    fn on(line: &str, old: Option<&Mode>) -> Mode {
        match parse(line, old) {
            Ok(Wish::On(mode)) => mode,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn refused(line: &str, old: Option<&Mode>, words: &str) {
        let error = parse(line, old).expect_err(line);
        assert!(error.contains(words), "{line}: {error}");
    }

    #[test]
    fn options_are_read_as_by_the_servers() {
        assert_eq!(parse("off", None), Ok(Wish::Off));
        assert_eq!(on("ON", None), Mode::default());
        let all = on("on REDIRECT 7 bcast PREFIX a: PREFIX b: NOLOOP", None);
        assert_eq!((all.redirect, all.broadcast, all.no_loop, all.prefixes.len()), (Some(7), true, true, 2));
        assert_eq!(on("on bcast PREFIX c:", Some(&all)).prefixes.len(), 3);
        let opt_in = on("on OPTIN", None);
        assert!(!opt_in.tracks(None) && opt_in.tracks(Some(true)) && on("on optout", None).tracks(None));
        refused("x", None, "syntax error");
        refused("off x", None, "syntax error");
        refused("on PREFIX a", None, "requires BCAST");
        refused("on REDIRECT x", None, "not an integer");
        refused("on OPTIN OPTOUT", None, "both OPTIN mode and OPTOUT");
        refused("on BCAST OPTIN", None, "not compatible with BCAST");
        refused("on BCAST", Some(&opt_in), "switch BCAST mode");
        refused("on OPTOUT", Some(&opt_in), "switch OPTIN/OPTOUT mode");
        refused("on bcast PREFIX a PREFIX ab", None, "'a' overlaps with another provided prefix 'ab'");
        refused("on bcast PREFIX a:x", Some(&all), "'a:x' overlaps with an existing prefix 'a:'");
        assert!(all.wants(b"a:1") && !all.wants(b"c:1") && on("on bcast", None).wants(b""));
    }
}
