//! Globs as the servers match them, for names that clients see otherwise than the servers.

/// Whether `text` matches `glob`: `*`, `?`, `[a-z]`, `[^a]`, and `\` before what stands for itself. At most their lengths' product of steps.
pub fn matches(glob: &[u8], text: &[u8]) -> bool {
    let (mut at, mut place) = (0, 0);
    // Where the last `*` was, and the text that it may take one more byte of.
    let mut star: Option<(usize, usize)> = None;
    while place < text.len() {
        match glob.get(at) {
            Some(b'*') => {
                star = Some((at + 1, place));
                at += 1;
                continue;
            }
            Some(_) => {
                let (met, next) = one(&glob[at..], text[place]);
                if met {
                    (at, place) = (at + next, place + 1);
                    continue;
                }
            }
            None => {}
        }
        match &mut star {
            Some((behind, from)) => {
                *from += 1;
                (at, place) = (*behind, *from);
            }
            None => return false,
        }
    }
    glob[at..].iter().all(|byte| *byte == b'*')
}

/// Whether the first piece of a glob, which is no `*`, takes a byte, and how long it is.
fn one(glob: &[u8], byte: u8) -> (bool, usize) {
    match glob {
        [b'?', ..] => (true, 1),
        [b'\\', escaped, ..] => (*escaped == byte, 2),
        [b'[', rest @ ..] => {
            let (negated, class) = match rest {
                [b'^', class @ ..] => (true, class),
                class => (false, class),
            };
            let (met, length) = in_class(class, byte);
            (met != negated, 1 + usize::from(negated) + length)
        }
        [own, ..] => (*own == byte, 1),
        [] => (false, 0),
    }
}

/// Whether a class has a byte, and its length, the `]` included where there is one.
fn in_class(class: &[u8], byte: u8) -> (bool, usize) {
    let (mut at, mut met) = (0, false);
    while let Some(first) = class.get(at) {
        match (first, &class[at + 1..]) {
            (b']', _) => return (met, at + 1),
            (b'\\', [escaped, ..]) => {
                met |= *escaped == byte;
                at += 2;
            }
            (from, [b'-', to, ..]) => {
                met |= (*from.min(to)..=*from.max(to)).contains(&byte);
                at += 3;
            }
            (own, _) => {
                met |= *own == byte;
                at += 1;
            }
        }
    }
    (met, class.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_as_at_the_servers() {
        for (glob, good, bad) in [
            ("user:*", "user:7", "users"),
            ("*:7", "user:7", "user:77:"),
            ("u?er:[0-9]", "user:7", "user:a"),
            ("[^a]b", "cb", "ab"),
            ("a\\*b", "a*b", "axb"),
            ("a*b*c", "aXbYbc", "aXbYb"),
            ("[\\]a]x", "]x", "bx"),
            ("*", "", "\u{0}"),
        ] {
            assert!(matches(glob.as_bytes(), good.as_bytes()), "{glob} {good}");
            assert!(glob == "*" || !matches(glob.as_bytes(), bad.as_bytes()), "{glob} {bad}");
        }
        assert!(!matches(b"", b"a") && matches(b"**", b"a") && !matches(b"[", b"a"));
    }
}
