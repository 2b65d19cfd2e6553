//! The file of users, in the form of the servers' own `aclfile`.

/// The most users of one server.
const MAX_USERS: usize = 1000;

/// One user.
#[derive(Clone, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Its rules, as `ACL SETUSER` takes them.
    pub rules: Vec<String>,
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("User").field("name", &self.name).finish_non_exhaustive()
    }
}

impl User {
    /// Whether it may log in.
    pub fn is_on(&self) -> bool {
        self.rules.iter().rev().find(|rule| *rule == "on" || *rule == "off").is_some_and(|rule| rule == "on")
    }

    /// The SHA-256 hashes of its passwords.
    pub fn password_hashes(&self) -> Vec<String> {
        self.rules.iter().filter_map(|rule| rule.strip_prefix('#')).map(str::to_ascii_lowercase).collect()
    }
}

/// The users of one generation.
#[derive(Debug, PartialEq, Eq)]
pub struct Generation {
    /// Its number.
    pub number: u64,
    /// Its users.
    pub users: Vec<User>,
}

/// Reads `# generation N`, and `user NAME RULE…` lines; empty ones and other remarks do not count. `own` is the user that the agent logs in as,
/// without which it would lock itself out. The errors never repeat a rule.
pub fn parse(text: &str, own: &str) -> Result<Generation, String> {
    let number = text.lines().next().and_then(|line| line.strip_prefix("# generation ")?.trim().parse().ok());
    let number = number.ok_or("line 1: write `# generation N`")?;
    let mut users: Vec<User> = Vec::new();
    let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim()));
    for (number, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
        let mut words = line.split_ascii_whitespace();
        let (Some("user"), Some(name)) = (words.next(), words.next()) else {
            return Err(format!("line {number}: write `user NAME RULE…`"));
        };
        let rules: Vec<String> = words.map(str::to_owned).collect();
        if rules.iter().any(|rule| rule.starts_with('>') || rule.starts_with('<')) {
            return Err(format!("line {number}: write passwords as # and their SHA-256, so that they can be read back"));
        }
        if users.iter().any(|user| user.name == name) {
            return Err(format!("line {number}: the user {name} is there twice"));
        }
        users.push(User { name: name.to_owned(), rules });
    }
    if users.len() > MAX_USERS {
        return Err(format!("there are more than {MAX_USERS}"));
    }
    let locked_out = users.iter().find(|user| user.name == own).map_or(own != "default", |user| !user.is_on());
    if locked_out {
        return Err(format!("the agent itself logs in as {own}, which the file must name and leave on"));
    }
    Ok(Generation { number, users })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_users_and_errors_repeat_no_rule() {
        let Generation { number, users } =
            parse("# generation 7\nuser larder on #AB ~* +@all\n\nuser shop off #01 #02 off on ~s:* +get\n", "larder").unwrap();
        assert_eq!(number, 7);
        assert_eq!((users[0].password_hashes(), users[0].is_on()), (vec!["ab".to_owned()], true));
        assert_eq!((users[1].password_hashes().len(), users[1].is_on()), (2, true));
        for (text, own, why) in [
            ("user larder on >secret", "larder", "SHA-256"),
            ("usr larder on", "larder", "line 2"),
            ("user a on\nuser a on", "default", "twice"),
            ("user shop on #01", "larder", "larder"),
            ("user larder off #01", "larder", "larder"),
            ("user default off", "default", "default"),
        ] {
            let error = parse(&format!("# generation 1\n{text}"), own).unwrap_err();
            assert!(error.contains(why) && !error.contains("secret"), "{error}");
        }
        assert!(parse("# generation 1\nuser shop on #01", "default").is_ok());
        assert!(parse("user shop on #01", "default").unwrap_err().contains("line 1"));
        assert!(!format!("{users:?}").contains("#AB"));
    }
}
