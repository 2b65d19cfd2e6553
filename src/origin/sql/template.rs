//! Statements with `$part` placeholders.
//!
//! A placeholder counts only where a parameter may stand: not in string literals, quoted identifiers, comments or dollar
//! quotes. The statement is cut into text and placeholders once; what a key holds never becomes text of a statement.

use super::super::Carriage;
use crate::policy::KeyPattern;

/// What stands for the value in a statement that stores it.
const VALUE: &str = "value";
/// What stands for the number that rises with each write of a key, in a statement that is told from a journal.
const VERSION: &str = "version";
/// What stands for how much a number is raised, in a statement that raises one.
const BY: &str = "by";
/// The longest statement, in bytes.
const MAX_STATEMENT_BYTES: usize = 64 * 1024;

/// Whose lexical rules a statement follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Postgres,
    Sqlite,
}

/// A statement, cut at its placeholders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Template {
    pieces: Vec<Piece>,
    /// Which of the pattern's parts the statement uses, in the order of its parameters.
    parts: Vec<Used>,
    /// What it uses besides.
    values: Vec<Taken>,
}

/// What a statement takes that is no part of the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Taken {
    /// What a way through JSON objects leads to; without a step the value itself.
    Value(Vec<String>),
    /// A field of the value, which is a hash.
    Field(String),
    /// The number of the write.
    Version,
    /// By how much a number is raised.
    By,
}

/// A part of the key, or of the value, that a statement uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) name: String,
    /// Its place among the pattern's parts, and behind these among what is used besides.
    pub(super) index: usize,
}

/// What a statement is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To find values.
    Read,
    /// To store one, `$value`.
    Write(Carriage),
    /// To store one that is a hash, each field as `$value.name`.
    WriteFields,
    /// To delete.
    Delete(Carriage),
    /// To raise a number, by `$by`.
    Increment,
}

impl Purpose {
    /// The placeholders that are no parts of the key.
    const fn words(self) -> &'static [&'static str] {
        match self {
            Self::Write(Carriage::Through) | Self::WriteFields => &[VALUE],
            Self::Write(Carriage::Behind) => &[VALUE, VERSION],
            Self::Delete(Carriage::Behind) => &[VERSION],
            Self::Increment => &[BY],
            Self::Read | Self::Delete(Carriage::Through) => &[],
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    /// The index into `Template::parts`.
    Parameter(usize),
}

impl Template {
    /// Cuts `statement` at its placeholders, each of which must be a part of `keys`. The error says what to write instead.
    pub(super) fn parse(statement: &str, keys: &KeyPattern, dialect: Dialect, purpose: Purpose) -> Result<Self, String> {
        if statement.len() > MAX_STATEMENT_BYTES {
            return Err(format!("the statement is longer than {MAX_STATEMENT_BYTES} bytes"));
        }
        if statement.contains('\0') {
            return Err("the statement holds a NUL byte".to_owned());
        }
        if let Some(word) = purpose.words().iter().find(|word| keys.parts().any(|part| part == **word)) {
            return Err(format!(
                "`{word}` is a part of the key, and ${word} stands for something else: give that part another name"
            ));
        }
        let (literal, template) = (String::new(), Self::empty());
        let mut cutter = Cutter { text: statement, at: 0, dialect, purpose, literal, depth: 0, template };
        cutter.run(keys)?;
        let template = cutter.template;
        match template.pieces.first() {
            Some(Piece::Text(text)) if is_fit(text, dialect, purpose) => Ok(template),
            Some(_) if purpose == Purpose::Read => Err("it must be a query: SELECT, VALUES or WITH … SELECT".to_owned()),
            Some(_) => Err("it must change rows: INSERT, UPDATE, DELETE or WITH … one of them".to_owned()),
            None => Err("the statement is empty: write one".to_owned()),
        }
    }

    fn empty() -> Self {
        Self { pieces: Vec::new(), parts: Vec::new(), values: Vec::new() }
    }

    /// What it uses besides the key, in the order of the places behind the pattern's parts.
    pub(super) fn values(&self) -> &[Taken] {
        &self.values
    }

    /// Whether it stores anything of the value.
    pub(super) fn stores(&self) -> bool {
        self.values.iter().any(|taken| matches!(taken, Taken::Value(_) | Taken::Field(_)))
    }

    /// The fields that it takes, where the value is a hash.
    pub(super) fn fields(&self) -> Vec<String> {
        let field = |taken: &Taken| match taken {
            Taken::Field(name) => Some(name.clone()),
            Taken::Value(_) | Taken::Version | Taken::By => None,
        };
        self.values.iter().filter_map(field).collect()
    }

    /// Whether it compares the number of the write.
    pub(super) fn compares(&self) -> bool {
        self.values.contains(&Taken::Version)
    }

    /// Whether it raises a number by as much as is asked for.
    pub(super) fn raises(&self) -> bool {
        self.values.contains(&Taken::By)
    }

    /// Whether the word stands anywhere in its text.
    pub(super) fn mentions(&self, word: &str) -> bool {
        let words = |text: &str| text.split(|c: char| !is_word(c)).any(|found| found.eq_ignore_ascii_case(word));
        self.pieces.iter().any(|piece| matches!(piece, Piece::Text(text) if words(text)))
    }

    /// The parts it uses, in the order of its parameters.
    pub(super) fn parts(&self) -> &[Used] {
        &self.parts
    }

    /// The statement with `parameter(n)` for each placeholder, where `n` counts from 0 in the order of [`Self::parts`].
    pub(super) fn render(&self, mut parameter: impl FnMut(usize) -> String) -> String {
        let mut sql = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => sql.push_str(text),
                Piece::Parameter(index) => sql.push_str(&parameter(*index)),
            }
        }
        sql
    }
}

struct Cutter<'a> {
    text: &'a str,
    at: usize,
    dialect: Dialect,
    purpose: Purpose,
    literal: String,
    depth: u32,
    template: Template,
}

impl<'a> Cutter<'a> {
    fn run(&mut self, keys: &KeyPattern) -> Result<(), String> {
        while let Some(next) = self.rest().chars().next() {
            match next {
                '\'' => self.string(false)?,
                '"' => self.quoted('"')?,
                '`' if self.dialect == Dialect::Sqlite => self.quoted('`')?,
                '[' if self.dialect == Dialect::Sqlite => self.bracketed()?,
                '-' if self.rest().starts_with("--") => self.line_comment(),
                '/' if self.rest().starts_with("/*") => self.block_comment()?,
                '$' => self.dollar(keys)?,
                '?' | ':' | '@' if self.dialect == Dialect::Sqlite => self.refuse_other_placeholder()?,
                ';' => return self.end_of_statement(),
                '(' | ')' => self.parenthesis(next)?,
                _ if is_word_start(next) => self.word()?,
                _ if next.is_ascii_digit() => self.number(),
                _ => self.take(next.len_utf8()),
            }
        }
        self.finish()
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// Copies `length` bytes into the text.
    fn take(&mut self, length: usize) {
        let text = self.text;
        self.literal.push_str(&text[self.at..self.at + length]);
        self.at += length;
    }

    fn finish(&mut self) -> Result<(), String> {
        if self.depth > 0 {
            return Err("a parenthesis is not closed".to_owned());
        }
        self.flush();
        Ok(())
    }

    fn flush(&mut self) {
        if !self.literal.is_empty() {
            self.template.pieces.push(Piece::Text(std::mem::take(&mut self.literal)));
        }
    }

    /// A string literal; in the form `E'…'` a backslash takes the next character with it.
    fn string(&mut self, escapes: bool) -> Result<(), String> {
        let mut after = self.rest().char_indices().skip(1).peekable();
        while let Some((at, c)) = after.next() {
            match c {
                '\\' if escapes => {
                    after.next();
                }
                '\'' if after.peek().is_some_and(|(_, next)| *next == '\'') => {
                    after.next();
                }
                '\'' => {
                    self.take(at + 1);
                    return Ok(());
                }
                _ => {}
            }
        }
        Err("a string literal is not closed".to_owned())
    }

    /// An identifier between quotes, in which a doubled quote stands for itself.
    fn quoted(&mut self, quote: char) -> Result<(), String> {
        let mut after = self.rest().char_indices().skip(1).peekable();
        while let Some((at, c)) = after.next() {
            if c == quote && after.next_if(|(_, next)| *next == quote).is_none() {
                self.take(at + 1);
                return Ok(());
            }
        }
        Err("a quoted identifier is not closed".to_owned())
    }

    fn bracketed(&mut self) -> Result<(), String> {
        let end = self.rest().find(']').ok_or("a quoted identifier is not closed")?;
        self.take(end + 1);
        Ok(())
    }

    /// A comment says nothing to the server, and one at the end would swallow what is put around the statement.
    fn line_comment(&mut self) {
        self.at += self.rest().find('\n').unwrap_or(self.rest().len());
        self.literal.push(' ');
    }

    /// Postgres nests these comments, SQLite does not.
    fn block_comment(&mut self) -> Result<(), String> {
        let bytes = self.rest().as_bytes();
        let (mut at, mut depth) = (2, 1);
        while depth > 0 {
            match bytes.get(at..at + 2) {
                Some(b"*/") => depth -= 1,
                Some(b"/*") if self.dialect == Dialect::Postgres => depth += 1,
                Some(_) => {
                    at += 1;
                    continue;
                }
                None => return Err("a comment is not closed".to_owned()),
            }
            at += 2;
        }
        self.at += at;
        self.literal.push(' ');
        Ok(())
    }

    fn dollar(&mut self, keys: &KeyPattern) -> Result<(), String> {
        let after = &self.rest()[1..];
        let length = after.find(|c: char| !is_word(c)).unwrap_or(after.len());
        let name = &after[..length];
        if self.dialect == Dialect::Postgres
            && after[length..].starts_with('$')
            && !name.starts_with(|c: char| c.is_ascii_digit())
        {
            return self.dollar_quote(length + 2);
        }
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(format!("`${name}` names no part: write $ and the name of a part of the key, such as $id"));
        }
        match self.purpose.words().iter().find(|word| **word == name) {
            Some(&VALUE) => return self.value(&after[length..], keys),
            Some(word) => {
                let taken = if *word == BY { Taken::By } else { Taken::Version };
                self.besides((*word).to_owned(), taken, keys, 1 + length);
                return Ok(());
            }
            None => {}
        }
        let Some(index) = keys.parts().position(|part| part == name) else {
            let known = keys.parts().map(|part| format!("${part}")).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none".to_owned() } else { known };
            return Err(format!("`${name}` is not a part of the pattern {keys}: its parts are {known}"));
        };
        self.parameter(name.to_owned(), index, 1 + length);
        Ok(())
    }

    /// `$value`, or a way into it, `$value.address.city`. `after` stands behind the first word.
    fn value(&mut self, after: &str, keys: &KeyPattern) -> Result<(), String> {
        let (mut way, mut rest) = (Vec::new(), after);
        while let Some(next) = rest.strip_prefix('.').filter(|next| next.starts_with(is_word_start)) {
            let length = next.find(|c: char| !is_word(c)).unwrap_or(next.len());
            way.push(next[..length].to_owned());
            rest = &next[length..];
        }
        if rest.starts_with('.') {
            return Err(format!("`${VALUE}` is followed by a dot: write $value, or $value.name for a member of its JSON object"));
        }
        let (name, length) = ([vec![VALUE.to_owned()], way.clone()].concat().join("."), after.len() - rest.len());
        let taken = match (self.purpose, way.as_slice()) {
            (Purpose::WriteFields, [field]) => Taken::Field(field.clone()),
            (Purpose::WriteFields, []) => {
                return Err(format!("a hash has no whole value `${name}`: write ${name}.field for each of its fields"));
            }
            (Purpose::WriteFields, [field, ..]) => {
                return Err(format!("the fields of a hash have no members such as `${name}`: write ${VALUE}.{field}"));
            }
            _ => Taken::Value(way),
        };
        self.besides(name, taken, keys, 1 + VALUE.len() + length);
        Ok(())
    }

    /// A placeholder of `length` bytes for what is no part of the key.
    fn besides(&mut self, name: String, taken: Taken, keys: &KeyPattern, length: usize) {
        let values = &mut self.template.values;
        let place = values.iter().position(|known| *known == taken).unwrap_or_else(|| {
            values.push(taken);
            values.len() - 1
        });
        self.parameter(name, keys.parts().count() + place, length);
    }

    /// A placeholder of `length` bytes.
    fn parameter(&mut self, name: String, index: usize, length: usize) {
        let parts = &mut self.template.parts;
        let parameter = parts.iter().position(|used| used.index == index).unwrap_or_else(|| {
            parts.push(Used { name, index });
            parts.len() - 1
        });
        let end = self.at + length;
        self.flush();
        self.template.pieces.push(Piece::Parameter(parameter));
        self.at = end;
    }

    /// `$tag$ … $tag$`, of which `opening` bytes open and close it.
    fn dollar_quote(&mut self, opening: usize) -> Result<(), String> {
        let (tag, body) = self.rest().split_at(opening);
        let end = body.find(tag).ok_or_else(|| format!("the quote {tag} is not closed"))?;
        self.take(opening + end + opening);
        Ok(())
    }

    fn refuse_other_placeholder(&self) -> Result<(), String> {
        let token: String = self.rest().chars().take(1).chain(self.rest().chars().skip(1).take_while(|c| is_word(*c))).collect();
        Err(format!("`{token}` is a placeholder of another kind: write $ and the name of a part, such as $id"))
    }

    fn end_of_statement(&mut self) -> Result<(), String> {
        self.at += 1;
        while let Some(next) = self.rest().chars().next() {
            match next {
                '-' if self.rest().starts_with("--") => self.line_comment(),
                '/' if self.rest().starts_with("/*") => self.block_comment()?,
                _ if next.is_whitespace() || next == ';' => self.at += next.len_utf8(),
                _ => return Err("it holds more than one statement: write a single query".to_owned()),
            }
        }
        self.finish()
    }

    fn parenthesis(&mut self, which: char) -> Result<(), String> {
        self.depth = match which {
            '(' => self.depth + 1,
            _ => self.depth.checked_sub(1).ok_or("a parenthesis is closed that was not opened")?,
        };
        self.take(1);
        Ok(())
    }

    /// A keyword or an identifier. In Postgres and in SQLite a `$` may stand inside of one, where it is no placeholder.
    fn word(&mut self) -> Result<(), String> {
        let length = self.rest().find(|c: char| !is_word(c) && c != '$').unwrap_or(self.rest().len());
        let escapes = self.dialect == Dialect::Postgres && length == 1 && self.rest().starts_with(['e', 'E']);
        self.take(length);
        if escapes && self.rest().starts_with('\'') {
            return self.string(true);
        }
        Ok(())
    }

    fn number(&mut self) {
        let length = self.rest().find(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '_').unwrap_or(self.rest().len());
        self.take(length);
    }
}

fn is_word_start(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || !c.is_ascii()
}

fn is_word(c: char) -> bool {
    is_word_start(c) || c.is_ascii_digit()
}

/// Whether the statement begins as one for this purpose.
fn is_fit(text: &str, dialect: Dialect, purpose: Purpose) -> bool {
    let text = text.trim_start_matches(|c: char| c.is_whitespace() || c == '(');
    let word: String = text.chars().take_while(|c| is_word(*c)).collect();
    let word = word.to_ascii_uppercase();
    match (purpose, dialect) {
        (_, _) if word == "WITH" => true,
        (Purpose::Read, Dialect::Postgres) if word == "TABLE" => true,
        (Purpose::Read, _) => matches!(word.as_str(), "SELECT" | "VALUES"),
        (_, Dialect::Postgres) if word == "MERGE" => true,
        (_, Dialect::Sqlite) if word == "REPLACE" => true,
        (_, _) => matches!(word.as_str(), "INSERT" | "UPDATE" | "DELETE"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(statement: &str, dialect: Dialect) -> Result<(String, Vec<String>), String> {
        let keys: KeyPattern = "shop:{tenant}:{id}".parse().expect("valid");
        let template = Template::parse(statement, &keys, dialect, Purpose::Read)?;
        let parts = template.parts().iter().map(|used| used.name.clone()).collect();
        Ok((template.render(|n| format!("<{n}>")), parts))
    }

    #[track_caller]
    fn check(dialect: Dialect, statement: &str, rendered: &str, parts: &[&str]) {
        let (sql, used) = parse(statement, dialect).expect(statement);
        assert_eq!((sql.as_str(), used.iter().map(String::as_str).collect::<Vec<_>>().as_slice()), (rendered, parts));
    }

    #[test]
    fn placeholders_become_parameters() {
        for dialect in [Dialect::Postgres, Dialect::Sqlite] {
            let check = |statement, rendered, parts: &[&str]| check(dialect, statement, rendered, parts);
            check("SELECT 1 WHERE a = $id", "SELECT 1 WHERE a = <0>", &["id"]);
            check("SELECT $id, $tenant, $id", "SELECT <0>, <1>, <0>", &["id", "tenant"]);
            check("select '$id', \"$id\", $id", "select '$id', \"$id\", <0>", &["id"]);
            check("select 'it''s $id' || $id", "select 'it''s $id' || <0>", &["id"]);
            check("select 1 -- $id\n, $id", "select 1  \n, <0>", &["id"]);
            check("select /* $id */ $id;", "select   <0>", &["id"]);
            check("select $id ; -- over\n", "select <0>  ", &["id"]);
            check("select a$id, 1", "select a$id, 1", &[]);
            check("(select ($id))", "(select (<0>))", &["id"]);
            check("with x as (values (1)) select * from x", "with x as (values (1)) select * from x", &[]);
            check("select 'é$id', é, $id", "select 'é$id', é, <0>", &["id"]);
        }
    }

    fn parse_write(statement: &str, dialect: Dialect) -> Result<(String, Vec<String>), String> {
        let keys: KeyPattern = "shop:{tenant}:{id}".parse().expect("valid");
        let template = Template::parse(statement, &keys, dialect, Purpose::Write(Carriage::Through))?;
        let used = template.parts().iter().map(|used| format!("{}@{}", used.name, used.index)).collect();
        Ok((template.render(|n| format!("<{n}>")), used))
    }

    #[test]
    fn a_value_and_its_members_are_parameters_behind_the_key_s_parts() {
        for dialect in [Dialect::Postgres, Dialect::Sqlite] {
            let check = |statement, rendered: &str, used: &[&str]| {
                let (sql, names) = parse_write(statement, dialect).expect(statement);
                assert_eq!((sql.as_str(), names.iter().map(String::as_str).collect::<Vec<_>>().as_slice()), (rendered, used));
            };
            check(
                "INSERT INTO t VALUES ($id, $value.name, $value.a.b, $value, $value.name)",
                "INSERT INTO t VALUES (<0>, <1>, <2>, <3>, <1>)",
                &["id@1", "value.name@2", "value.a.b@3", "value@4"],
            );
            check(
                "UPDATE t SET v = '$value.x' || $value WHERE id = $id",
                "UPDATE t SET v = '$value.x' || <0> WHERE id = <1>",
                &["value@2", "id@1"],
            );
            for (statement, word) in [
                ("SELECT $value", "must change rows"),
                ("INSERT INTO t VALUES ($value.)", "followed by a dot"),
                ("INSERT INTO t VALUES ($value.1)", "followed by a dot"),
                ("INSERT INTO t VALUES ($values)", "its parts are"),
                ("INSERT INTO t VALUES ($id); DROP TABLE t", "single"),
            ] {
                assert!(parse_write(statement, dialect).is_err_and(|error| error.contains(word)), "{statement}");
            }
        }
        let keys: KeyPattern = "a:{value}".parse().expect("valid");
        let clash = Template::parse("INSERT INTO t VALUES ($value)", &keys, Dialect::Postgres, Purpose::Write(Carriage::Through));
        assert!(clash.is_err_and(|error| error.contains("another name")));
        let delete = Template::parse(
            "DELETE FROM t WHERE v = $value",
            &"a:{id}".parse().expect("valid"),
            Dialect::Postgres,
            Purpose::Delete(Carriage::Through),
        );
        assert!(delete.is_err_and(|error| error.contains("not a part")));
    }

    #[test]
    fn by_how_much_a_number_is_raised_is_a_parameter() {
        let keys: KeyPattern = "a:{id}".parse().expect("valid");
        let parse = |statement, purpose| Template::parse(statement, &keys, Dialect::Postgres, purpose);
        let statement = "UPDATE t SET n = n + $by WHERE id = $id RETURNING n";
        let template = parse(statement, Purpose::Increment).expect("valid");
        assert_eq!((template.raises(), template.values()), (true, &[Taken::By][..]));
        assert!(template.mentions("returning") && !template.mentions("return"));
        assert!(parse(statement, Purpose::Write(Carriage::Through)).is_err_and(|error| error.contains("its parts are $id")));
        assert!(!parse("UPDATE t SET n = 1 WHERE id = $id", Purpose::Increment).expect("valid").raises());
        assert!(
            parse("UPDATE t SET n = $value WHERE id = $id", Purpose::Increment)
                .is_err_and(|error| error.contains("its parts are"))
        );
    }

    #[test]
    fn of_a_hash_each_field_is_a_parameter() {
        let keys: KeyPattern = "a:{id}".parse().expect("valid");
        let parse = |statement| Template::parse(statement, &keys, Dialect::Postgres, Purpose::WriteFields);
        let template = parse("INSERT INTO t VALUES ($id, $value.name, $value.age) ON CONFLICT DO UPDATE SET name = $value.name");
        let template = template.expect("valid");
        assert_eq!((template.fields(), template.stores()), (vec!["name".to_owned(), "age".to_owned()], true));
        for (statement, words) in [
            ("INSERT INTO t VALUES ($id, $value)", "write $value.field for each"),
            ("INSERT INTO t VALUES ($id, $value.a.b)", "write $value.a"),
            ("INSERT INTO t VALUES ($id, $field.a)", "its parts are $id"),
        ] {
            assert!(parse(statement).is_err_and(|error| error.contains(words)), "{statement}");
        }
    }

    #[test]
    fn what_is_told_from_a_journal_may_compare_versions() {
        let keys: KeyPattern = "a:{id}".parse().expect("valid");
        let parse = |statement, purpose| Template::parse(statement, &keys, Dialect::Postgres, purpose);
        let write = "INSERT INTO t VALUES ($id, $value, $version) ON CONFLICT (id) DO UPDATE SET v = $value WHERE t.n < $version";
        let template = parse(write, Purpose::Write(Carriage::Behind)).expect("valid");
        let used: Vec<_> = template.parts().iter().map(|used| (used.name.as_str(), used.index)).collect();
        assert_eq!(used, [("id", 0), ("value", 1), ("version", 2)]);
        assert!(template.stores() && template.compares());
        let delete = parse("DELETE FROM t WHERE id = $id AND n < $version", Purpose::Delete(Carriage::Behind)).expect("valid");
        assert!(delete.compares() && !delete.stores());
        assert!(parse(write, Purpose::Write(Carriage::Through)).is_err_and(|error| error.contains("its parts are $id")));
        let keys: KeyPattern = "a:{version}".parse().expect("valid");
        let clash = Template::parse(write, &keys, Dialect::Postgres, Purpose::Write(Carriage::Behind));
        assert!(clash.is_err_and(|error| error.contains("another name")));
    }

    #[test]
    fn postgres_has_rules_of_its_own() {
        let check = |statement, rendered, parts: &[&str]| check(Dialect::Postgres, statement, rendered, parts);
        check("select $id::int8 where b @> c ? 'x'", "select <0>::int8 where b @> c ? 'x'", &["id"]);
        check("select $$ $id $$, $q$ $id $$ $q$, $id", "select $$ $id $$, $q$ $id $$ $q$, <0>", &["id"]);
        check(r"select e'\' $id', $id", r"select e'\' $id', <0>", &["id"]);
        check(r"select U&'\0061 $id', $id", r"select U&'\0061 $id', <0>", &["id"]);
        check(r"select '\', $id", r"select '\', <0>", &["id"]);
        check("select /* /* $id */ */ $id", "select   <0>", &["id"]);
        check("select a[1], b[$id], c[1:2]", "select a[1], b[<0>], c[1:2]", &["id"]);
        check("table users", "table users", &[]);
    }

    #[test]
    fn sqlite_has_rules_of_its_own() {
        let check = |statement, rendered, parts: &[&str]| check(Dialect::Sqlite, statement, rendered, parts);
        check("select [$id], `$id`, $id", "select [$id], `$id`, <0>", &["id"]);
        check("select /* /* $id */ $id", "select   <0>", &["id"]);
        check("select e'\\', $id", "select e'\\', <0>", &["id"]);
    }

    #[test]
    fn what_is_refused_says_what_to_write() {
        for (statement, word) in [
            ("", "empty"),
            ("  ", "query"),
            ("DELETE FROM t WHERE id = $id", "query"),
            ("$id", "query"),
            ("select $1", "$id"),
            ("select $", "$id"),
            ("select $nope", "its parts are $tenant, $id"),
            ("select 'x", "literal"),
            ("select \"x", "identifier"),
            ("select /* x", "comment"),
            ("select 1; select 2", "single"),
            ("select 1) --", "not opened"),
            ("select (1", "not closed"),
            ("select 1\0", "NUL"),
        ] {
            for dialect in [Dialect::Postgres, Dialect::Sqlite] {
                let error = parse(statement, dialect).expect_err(statement);
                assert!(error.contains(word), "{statement}: {error}");
            }
        }
        assert!(parse("select $q$ x", Dialect::Postgres).expect_err("open").contains("$q$"));
        for other in ["?", "?1", ":id", "@id"] {
            assert!(parse(&format!("select {other}"), Dialect::Sqlite).expect_err(other).contains(other));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in r#"SELECT [ $'"a-z()\[\]/*;:E\\éß?`\n-]{0,60}"#) {
            for dialect in [Dialect::Postgres, Dialect::Sqlite] {
                let _ = parse(&text, dialect);
            }
        }

        /// Whatever stands in quotes or comments stays what it was, and what stands outside is found.
        #[test]
        fn quoting_hides_and_nothing_else_does(inner in "[a-z $?:(;éE]{0,20}") {
            for quoted in [format!("'{inner}'"), format!("\"{inner}\""), format!("/*{inner}*/"), format!("--{inner}\n")] {
                let (sql, parts) = parse(&format!("SELECT {quoted}, $id"), Dialect::Postgres).expect("parses");
                prop_assert_eq!(&parts, &["id".to_owned()]);
                prop_assert!(sql.ends_with(", <0>"));
                if quoted.starts_with(['\'', '"']) {
                    prop_assert!(sql.contains(&quoted));
                }
            }
        }
    }
}
