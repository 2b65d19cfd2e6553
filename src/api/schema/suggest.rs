//! The word that was probably meant.

/// What to do about a field that does not exist.
pub(super) fn remedy<'a>(written: &str, known: impl Iterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.collect();
    match nearest(written, &known) {
        Some(meant) => format!("write {meant}, if that was meant, or remove it"),
        None => format!("remove it, or write one of {}", known.join(", ")),
    }
}

/// What to do about a value that is not one of `allowed`.
pub(super) fn one_of(written: &str, allowed: &[&str]) -> String {
    match nearest(written, allowed) {
        Some(meant) => format!("write {meant}, if that was meant; it takes {}", allowed.join(", ")),
        None => format!("write one of {}", allowed.join(", ")),
    }
}

/// The known word that differs in case, or in at most two letters.
fn nearest<'a>(written: &str, known: &[&'a str]) -> Option<&'a str> {
    let distance = |word: &&&str| edit_distance(&written.to_ascii_lowercase(), &word.to_ascii_lowercase());
    let best = known.iter().min_by_key(distance)?;
    let allowed = match written.len() {
        0..=2 => 0,
        3..=4 => 1,
        _ => 2,
    };
    (distance(&best) <= allowed).then_some(best)
}

/// How many letters must be added, removed or replaced. Words are at most 64 letters long here; longer ones are cut.
fn edit_distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (at, from) in left.chars().take(64).enumerate() {
        let mut diagonal = at;
        let mut last = at + 1;
        for (cell, to) in row.iter_mut().skip(1).zip(&right) {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = *cell;
            last = replaced.min(last + 1).min(diagonal + 1);
            *cell = last;
        }
        if let Some(first) = row.first_mut() {
            *first = at + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised() {
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(nearest("readthrough", &["CacheAside", "ReadThrough"]), Some("ReadThrough"));
        assert_eq!(nearest("negativeTTL", &["negativeTtl", "ttl"]), Some("negativeTtl"));
        assert_eq!(nearest("strtegy", &["strategy", "ttl"]), Some("strategy"));
        assert_eq!(nearest("foo", &["ttl", "as"]), None);
        assert!(remedy("foo", ["ttl", "as"].into_iter()).contains("ttl, as"));
    }
}
