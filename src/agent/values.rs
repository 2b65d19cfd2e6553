//! Whether two values of a setting are the same: the servers read many spellings and answer in one.

/// Whether the server's answer `found` is what `wanted` asks for.
pub fn same_setting(wanted: &str, found: &str) -> bool {
    let words = |text: &str| text.split_ascii_whitespace().map(canonical).collect::<Vec<_>>();
    let (wanted, found) = (words(wanted.trim_matches('"')), words(found));
    // Of a setting for several classes of clients, those that were not named keep theirs.
    let by_class = !wanted.is_empty() && wanted.len() % 4 == 0 && found.len() % 4 == 0;
    wanted == found || (by_class && wanted.chunks(4).all(|class| found.chunks(4).any(|told| told == class)))
}

fn canonical(word: &str) -> String {
    let word = word.to_ascii_lowercase();
    match word.as_str() {
        "slave" => "replica".to_owned(),
        _ => bytes(&word).map_or(word, |bytes| bytes.to_string()),
    }
}

/// A number with a unit of memory, in bytes: `1k` is a thousand, `1kb` is 1024.
fn bytes(word: &str) -> Option<u64> {
    let digits = word.find(|c: char| !c.is_ascii_digit()).unwrap_or(word.len());
    let (number, unit) = word.split_at(digits);
    let scale: u64 = match unit {
        "" | "b" => 1,
        "k" => 1000,
        "kb" => 1 << 10,
        "m" => 1_000_000,
        "mb" => 1 << 20,
        "g" => 1_000_000_000,
        "gb" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_are_one_value_and_other_values_are_not() {
        for (wanted, found) in [
            ("100mb", "104857600"),
            ("1g", "1000000000"),
            ("volatile-LFU", "volatile-lfu"),
            ("3600 1  300 100", "3600 1 300 100"),
            ("\"\"", ""),
            ("replica 256mb 64mb 60", "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60"),
            ("pubsub 32mb 8mb 60 replica 1mb 1kb 9", "normal 0 0 0 slave 1048576 1024 9 pubsub 33554432 8388608 60"),
        ] {
            assert!(same_setting(wanted, found), "{wanted} {found}");
        }
        for (wanted, found) in [
            ("100mb", "100000000"),
            ("yes", "no"),
            ("", "3600 1"),
            ("a b c d", "a b c e d f g h"),
            ("a b c d e f g h", "a b c d x f g h i j k l"),
        ] {
            assert!(!same_setting(wanted, found), "{wanted} {found}");
        }
    }
}
