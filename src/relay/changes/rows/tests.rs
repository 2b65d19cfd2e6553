//! Tables that change at random, under each identity: no key of a changed row is passed over.

use proptest::prelude::*;

use super::*;
use crate::origin::changes::pgoutput::Identity;
use crate::policy::changes::Touches;

const TABLE: u32 = 7;
const SLOT: &str = "larder_main_db";

fn watch(rule: &str, keys: &str, touches: &str) -> Watch {
    let follow = format!(r#"{{"rule":"{rule}","table":"orders","touches":{touches}}}"#);
    Watch { keys: keys.parse().expect("a pattern"), follow: serde_json::from_str(&follow).expect("a table that is followed") }
}

/// By the primary key, by another column, by both, by tags, and by none.
fn watches() -> Vec<Watch> {
    vec![
        watch("order", "order:{id}", r#"{"key":{}}"#),
        watch("user", "user:{id}", r#"{"key":{"columns":{"id":"user_id"}}}"#),
        watch("both", "both:{user}:{id}", r#"{"key":{"columns":{"user":"user_id"}}}"#),
        watch("page", "page:{number}", r#"{"tag":{"tag":"buyer:{user_id}"}}"#),
        watch("shelf", "shelf:{buyer}", r#"{"tag":{"tag":"{kind}:of:{id}","columns":{"kind":"note"}}}"#),
        watch("list", "list", r#"{"all":{}}"#),
    ]
}

fn relation(identity: Identity) -> Relation {
    let column = |name: &str, key: bool| Column {
        name: name.to_owned(),
        identity: match identity {
            Identity::Full => true,
            Identity::Nothing => false,
            Identity::Default => key,
            Identity::Index => true,
        },
        kind: 25,
    };
    let mut columns = vec![column("id", true), column("user_id", false), column("note", false)];
    // A unique index over the first two.
    columns[2].identity = identity == Identity::Full;
    Relation { id: TABLE, schema: "public".to_owned(), name: "orders".to_owned(), identity, columns }
}

/// A row: `None` for a value that is null.
type Values = [Option<&'static str>; 3];

#[derive(Debug, Clone)]
enum Change {
    Insert(Values),
    /// Columns that did not change may be kept outside the row, which then does not tell them.
    Update(Values, Values, bool),
    Delete(Values),
}

fn values() -> impl Strategy<Value = Values> {
    let text = || prop_oneof![Just(Some("1")), Just(Some("2")), Just(Some("a:b")), Just(Some(""))];
    (prop_oneof![Just(Some("1")), Just(Some("2"))], prop_oneof![3 => text(), 1 => Just(None)], text())
        .prop_map(|(a, b, c)| [a, b, c])
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        values().prop_map(Change::Insert),
        (values(), values(), any::<bool>()).prop_map(|(old, new, outside)| Change::Update(old, new, outside)),
        values().prop_map(Change::Delete),
    ]
}

fn identity() -> impl Strategy<Value = Identity> {
    prop_oneof![Just(Identity::Default), Just(Identity::Full), Just(Identity::Index)]
}

fn cells(values: &Values) -> Row<'static> {
    values.iter().map(|value| value.map_or(Cell::Null, |text| Cell::Text(text.as_bytes()))).collect()
}

/// The old row as Postgres tells it: nothing of it where the identity did not change.
fn told(relation: &Relation, old: &Values, new: Option<&Values>) -> Option<Old<'static>> {
    let keys = relation.columns.iter().map(|column| column.identity).collect::<Vec<_>>();
    if relation.identity == Identity::Full {
        return Some(Old::Full(cells(old)));
    }
    let changed = new.is_none_or(|new| (0..3).any(|at| keys[at] && old[at] != new[at]));
    let row = cells(old).into_iter().zip(keys).map(|(cell, key)| if key { cell } else { Cell::Null }).collect();
    changed.then_some(Old::Key(row))
}

fn message(relation: &Relation, change: &Change) -> Message<'static> {
    match change {
        Change::Insert(new) => Message::Insert { table: TABLE, new: cells(new) },
        Change::Update(old, new, outside) => {
            let unchanged = |at: usize| *outside && old[at] == new[at] && old[at].is_some();
            let row = cells(new).into_iter().enumerate().map(|(at, cell)| if unchanged(at) { Cell::Unchanged } else { cell });
            Message::Update { table: TABLE, old: told(relation, old, Some(new)), new: row.collect() }
        }
        Change::Delete(old) => {
            Message::Delete { table: TABLE, old: told(relation, old, None).expect("a deletion tells the row") }
        }
    }
}

/// The key of a rule, or the tag, that a row stands for, reckoned from its values.
fn key(watch: &Watch, row: &Values) -> Option<Vec<u8>> {
    let template = watch.follow.template(&watch.keys)?;
    let columns = watch.follow.columns(&watch.keys);
    let place = |name: &str| ["id", "user_id", "note"].iter().position(|column| *column == name).expect("a column");
    let parts: Vec<&str> = template.parts().collect();
    let value =
        |part: &str| parts.iter().position(|name| *name == part).and_then(|at| row[place(columns[at])]).map(str::as_bytes);
    template.render(value)
}

/// The keys that a change is about and that are passed over.
fn passed_over(identity: Identity, change: &Change, broken: Option<Broken>) -> Vec<String> {
    let mut tables = Tables::new(watches(), SLOT);
    tables.broken = broken;
    let relation = relation(identity);
    let mut wanted = Wanted::default();
    let message = message(&relation, change);
    tables.take(&Message::Relation(relation), &mut wanted).expect("a table");
    tables.take(&message, &mut wanted).expect("it is known");
    let rows: Vec<&Values> = match change {
        Change::Insert(row) | Change::Delete(row) => vec![row],
        Change::Update(old, new, _) => vec![old, new],
    };
    let said: Vec<(&[u8], Vec<u8>)> = wanted.entries(None).into_iter().flatten().collect();
    let mut missing = Vec::new();
    for watch in watches() {
        if wanted.rules().contains_key(&watch.follow.rule) {
            continue;
        }
        let kind = if watch.follow.touches.tag().is_some() { &b"tag"[..] } else { b"key" };
        let keys = rows.iter().filter_map(|row| key(&watch, row)).filter(|key| !said.contains(&(kind, key.clone())));
        missing.extend(keys.map(|key| String::from_utf8_lossy(&key).into_owned()));
        if watch.follow.touches == (Touches::All {}) {
            missing.push(watch.follow.rule);
        }
    }
    missing
}

proptest! {
    #[test]
    fn no_key_of_a_changed_row_is_passed_over(identity in identity(), change in change()) {
        prop_assert_eq!(passed_over(identity, &change, None), Vec::<String>::new());
    }

    /// Where all columns are told, exactly the keys of the rows go.
    #[test]
    fn a_full_identity_names_each_key(change in change()) {
        let mut tables = Tables::new(watches().into_iter().take(5).collect(), SLOT);
        let relation = relation(Identity::Full);
        let message = message(&relation, &change);
        let mut wanted = Wanted::default();
        tables.take(&Message::Relation(relation), &mut wanted).expect("a table");
        tables.take(&message, &mut wanted).expect("it is known");
        prop_assert!(wanted.rules().is_empty(), "{:?}", wanted.rules());
        let rows: Vec<&Values> = match &change {
            Change::Insert(row) | Change::Delete(row) => vec![row],
            Change::Update(old, new, _) => vec![old, new],
        };
        for (_, said) in wanted.entries(None).into_iter().flatten() {
            let is_asked = watches().iter().take(5).any(|watch| rows.iter().any(|row| key(watch, row).as_ref() == Some(&said)));
            prop_assert!(is_asked, "{:?}", said);
        }
    }
}

/// Each mechanism is needed: without it, some history passes a key over.
#[test]
fn what_is_broken_is_noticed() {
    let row = |id, user| [Some(id), Some(user), Some("")];
    let moved = Change::Update(row("1", "1"), row("1", "2"), false);
    let outside = Change::Update(row("1", "1"), row("1", "2"), true);
    for (broken, identity, change) in [
        (Broken::Old, Identity::Full, &moved),
        (Broken::Absence, Identity::Default, &moved),
        (Broken::Unchanged, Identity::Default, &outside),
        (Broken::OtherColumns, Identity::Default, &Change::Delete(row("1", "1"))),
    ] {
        assert_eq!(passed_over(identity, change, None), Vec::<String>::new(), "{broken:?}");
        assert!(!passed_over(identity, change, Some(broken)).is_empty(), "{broken:?} goes unnoticed");
    }
}

fn why(tables: &mut Tables, message: &Message<'_>) -> Option<String> {
    let mut wanted = Wanted::default();
    tables.take(message, &mut wanted).expect("it is known");
    wanted.rules().values().next().map(ToString::to_string)
}

#[test]
fn what_cannot_be_told_says_what_to_do() {
    let mut tables = Tables::new(vec![watch("user", "user:{id}", r#"{"key":{"columns":{"id":"user_id"}}}"#)], SLOT);
    assert_eq!(tables.take(&Message::Truncate(vec![9]), &mut Wanted::default()), Err(UnknownTable(9)));
    let mut table = relation(Identity::Default);
    assert_eq!(why(&mut tables, &Message::Relation(table.clone())), None);
    let row = [Some("1"), Some("1"), None];
    let deletion = message(&table, &Change::Delete(row));
    let said = why(&mut tables, &deletion).expect("all keys go");
    assert!(said.contains("ALTER TABLE orders REPLICA IDENTITY FULL") && said.contains("`user_id`"), "{said}");
    table.columns.remove(1);
    assert_eq!(why(&mut tables, &Message::Relation(table)), None);
    assert!(why(&mut tables, &deletion).is_some_and(|said| said.contains("has no column `user_id`")));
    // Tables that nobody follows are passed.
    let other = Relation { id: 9, name: "others".to_owned(), ..relation(Identity::Full) };
    assert_eq!(why(&mut tables, &Message::Relation(other)), None);
    assert_eq!(why(&mut tables, &Message::Truncate(vec![9])), None);
}

#[test]
fn columns_are_written_as_keys_have_them() {
    for (kind, text, part) in
        [(BOOL, "t", "true"), (BOOL, "f", "false"), (BPCHAR, "ab  ", "ab"), (BPCHAR, "  ", ""), (25, "t ", "t ")]
    {
        assert_eq!(as_part(kind, text.as_bytes()), part.as_bytes(), "{text}");
    }
}

/// What a write through Larder changes is in the cache already; what else is made from the same row is not.
#[test]
fn a_write_of_larder_s_own_takes_nothing_from_itself() {
    let mut tables = Tables::new(watches(), SLOT);
    let table = relation(Identity::Full);
    let begin = Message::Begin { commit: Default::default(), time: 0, xid: 1 };
    let note = |content| Message::Note { transactional: true, prefix: b"larder", content };
    let insert = message(&table, &Change::Insert([Some("1"), Some("2"), None]));
    let mut said = |messages: &[&Message<'_>]| {
        let mut wanted = Wanted::default();
        messages.iter().for_each(|message| tables.take(message, &mut wanted).expect("it is known"));
        let keys = wanted.entries(None).into_iter().flatten().map(|(_, what)| String::from_utf8(what).expect("text"));
        keys.collect::<Vec<_>>()
    };
    said(&[&Message::Relation(table)]);
    let all = ["list", "buyer:2", "both:2:1", "order:1", "user:2"];
    assert_eq!(said(&[&begin, &insert]), all);
    assert_eq!(said(&[&begin, &note(b"larder_main_db\0order:1"), &insert]), ["list", "buyer:2", "both:2:1", "user:2"]);
    // The next transaction is another's, and so is what is noted for another cache, or by somebody else.
    assert_eq!(said(&[&begin, &insert]), all);
    for other in [&b"larder_main_dc\0order:1"[..], b"larder_main_dborder:1", b"order:1", b""] {
        assert_eq!(said(&[&begin, &note(other), &insert]), all);
    }
}
