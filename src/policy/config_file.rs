//! The form of the servers' and sentinels' configuration files, and what of a sentinel's file is its memory. Pure: the text only.

use std::fmt::Write as _;

/// A file that grows by lines of a keyword and quoted values.
#[derive(Debug, Default)]
pub struct Lines(String);

impl Lines {
    /// Adds a line. Each value is quoted where it has to be.
    pub fn add(&mut self, keyword: &str, values: &[&str]) {
        self.0.push_str(keyword);
        for value in values {
            self.0.push(' ');
            self.0.push_str(&quoted(value));
        }
        self.0.push('\n');
    }

    /// Adds a text as it is, and ends its last line.
    pub fn add_text(&mut self, text: &str) {
        self.0.push_str(text);
        if !text.is_empty() && !text.ends_with('\n') {
            self.0.push('\n');
        }
    }

    /// The file.
    pub fn into_text(self) -> String {
        self.0
    }
}

/// A value as the servers' configuration parser reads it back.
fn quoted(value: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/*&+@~%".contains(&byte);
    if !value.is_empty() && value.bytes().all(plain) {
        return value.to_owned();
    }
    let mut text = String::from("\"");
    for byte in value.bytes() {
        match byte {
            b'"' | b'\\' => text.extend(['\\', char::from(byte)]),
            b' '..=b'~' => text.push(char::from(byte)),
            _ => {
                let _ = write!(text, "\\x{byte:02x}");
            }
        }
    }
    text.push('"');
    text
}

/// The keywords of what a sentinel remembers. The rest of its file is Larder's, and written anew.
const MEMORY: [&str; 10] = [
    "myid",
    "current-epoch",
    "monitor",
    "down-after-milliseconds",
    "failover-timeout",
    "config-epoch",
    "leader-epoch",
    "known-replica",
    "known-sentinel",
    "known-slave",
];

/// Whom a sentinel logs in as: at the servers, and at the other sentinels.
#[derive(Clone, Copy)]
pub struct SentinelLogin<'a> {
    /// The user.
    pub user: &'a str,
    /// The password.
    pub password: &'a str,
}

/// A sentinel's configuration. `own` is what Larder says: addresses, users, and its `myid` where that is not the sentinel's to choose.
/// The sentinel keeps its memory in the same file: `previous` is what the file holds now, if anything.
pub fn sentinel(own: &str, login: Option<SentinelLogin<'_>>, previous: &str) -> String {
    let mut lines = Lines::default();
    lines.add_text(own);
    if let Some(SentinelLogin { user, password }) = login {
        lines.add("sentinel", &["sentinel-user", user]);
        lines.add("sentinel", &["sentinel-pass", password]);
    }
    let words = |line: &str| line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let names_itself = own.lines().map(words).any(|words| words.starts_with(&["sentinel".to_owned(), "myid".to_owned()]));
    let memory = previous.lines().map(words).filter(|words| {
        let [sentinel, keyword, ..] = &words[..] else { return false };
        sentinel == "sentinel" && MEMORY.contains(&keyword.as_str()) && !(names_itself && keyword == "myid")
    });
    for words in memory {
        lines.add_text(&words.join(" "));
        if let ([_, keyword, master, ..], Some(SentinelLogin { user, password })) = (&words[..], login)
            && keyword == "monitor"
        {
            lines.add("sentinel", &["auth-user", master, user]);
            lines.add("sentinel", &["auth-pass", master, password]);
        }
    }
    lines.into_text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_where_they_must_be() {
        for (value, written) in [
            ("yes", "yes"),
            ("", "\"\""),
            ("two words", "\"two words\""),
            ("a\"b\\c", r#""a\"b\\c""#),
            ("line\nuser x on", r#""line\x0auser x on""#),
            ("é", r#""\xc3\xa9""#),
            ("#", "\"#\""),
        ] {
            assert_eq!(quoted(value), written);
        }
    }

    #[test]
    fn a_sentinel_keeps_its_memory_and_takes_a_new_password() {
        let previous = "port 1\nsentinel myid abc\nsentinel monitor main 127.0.0.1 7001 2\nsentinel auth-pass main old\n\
                        user larder on >old ~*\nsentinel known-replica main 127.0.0.1 7002\n";
        let login = SentinelLogin { user: "larder", password: "new" };
        let text = sentinel("port 7000", Some(login), previous);
        for kept in ["sentinel myid abc", "sentinel monitor main 127.0.0.1 7001 2", "sentinel known-replica main 127.0.0.1 7002"]
        {
            assert!(text.lines().any(|line| line == kept), "{kept}: {text}");
        }
        assert!(text.contains("sentinel auth-pass main new") && !text.contains("old") && !text.contains("port 1\n"), "{text}");
        let named = sentinel("port 7000\nsentinel myid def\n", None, previous);
        assert!(named.contains("sentinel myid def\n") && !named.contains("abc") && named.contains("monitor"), "{named}");
    }
}
