//! What `pgoutput` says, as it was recorded, and by chance.

use proptest::prelude::*;

use super::*;

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal digits")).collect()
}

/// What Postgres 15 said of `users (id bigint PRIMARY KEY, name text, big text, feeling mood)`, whose `big` is kept outside the row, and of
/// `addresses (id int PRIMARY KEY, user_id int, street text)` with REPLICA IDENTITY FULL.
const USERS: &str = "52000040057075626c6963007573657273006400040169640000000014ffffffff006e616d650000000019ffffffff\
     006269670000000019ffffffff006665656c696e670000004001ffffffff";
const ADDRESSES: &str = "520000400c7075626c696300616464726573736573006600030169640000000017ffffffff\
     01757365725f69640000000017ffffffff017374726565740000000019ffffffff";
const RECORDED: [&str; 13] = [
    "420000000001534bd800030478142002d5000002db",
    "59000040017075626c6963006d6f6f6400",
    USERS,
    "490000400c4e0003740000000131740000000137740000000141",
    "55000040054e000474000000013774000000034265617574000000026f6b",
    "55000040054b00047400000001376e6e6e4e00047400000001386e7574000000026f6b",
    ADDRESSES,
    "550000400c4f00037400000001317400000001377400000001414e0003740000000131740000000138740000000141",
    "440000400c4f0003740000000131740000000138740000000141",
    "44000040054b00047400000001386e6e6e",
    "540000000200000040050000400c",
    "4d0100000000015347d86c61726465720000000006757365723a37",
    "43000000000001534bd80000000001534c0800030478142002d5",
];

fn text(text: &str) -> Cell<'_> {
    Cell::Text(text.as_bytes())
}

#[test]
fn what_postgres_said_is_understood() {
    let recorded: Vec<Vec<u8>> = RECORDED.iter().map(|hex| bytes(hex)).collect();
    let read: Vec<Message<'_>> = recorded.iter().map(|bytes| Message::parse(bytes).expect("a message")).collect();
    let (users, addresses) = (0x4005, 0x400c);
    let time = 849_338_710_360_789;
    assert_eq!(read[0], Message::Begin { commit: Lsn(0x153_4bd8), time, xid: 0x2db });
    assert_eq!(read[1], Message::Type);
    let Message::Relation(table) = &read[2] else { panic!("{:?}", read[2]) };
    assert_eq!((table.id, &*table.schema, &*table.name, table.identity), (users, "public", "users", Identity::Default));
    let columns: Vec<_> = table.columns.iter().map(|column| (&*column.name, column.identity, column.kind)).collect();
    assert_eq!(columns, [("id", true, 20), ("name", false, 25), ("big", false, 25), ("feeling", false, 0x4001)]);
    assert_eq!(read[3], Message::Insert { table: addresses, new: vec![text("1"), text("7"), text("A")] });
    let new = vec![text("7"), text("Bea"), Cell::Unchanged, text("ok")];
    assert_eq!(read[4], Message::Update { table: users, old: None, new });
    let old = Some(Old::Key(vec![text("7"), Cell::Null, Cell::Null, Cell::Null]));
    let new = vec![text("8"), Cell::Null, Cell::Unchanged, text("ok")];
    assert_eq!(read[5], Message::Update { table: users, old, new });
    let Message::Relation(table) = &read[6] else { panic!("{:?}", read[6]) };
    assert!(table.identity == Identity::Full && table.columns.iter().all(|column| column.identity));
    let old = Some(Old::Full(vec![text("1"), text("7"), text("A")]));
    let new = vec![text("1"), text("8"), text("A")];
    assert_eq!(read[7], Message::Update { table: addresses, old, new: new.clone() });
    assert_eq!(read[8], Message::Delete { table: addresses, old: Old::Full(new) });
    let old = Old::Key(vec![text("8"), Cell::Null, Cell::Null, Cell::Null]);
    assert_eq!(read[9], Message::Delete { table: users, old });
    assert_eq!(read[10], Message::Truncate(vec![users, addresses]));
    assert_eq!(read[11], Message::Note { transactional: true, prefix: b"larder", content: b"user:7" });
    assert_eq!(read[12], Message::Commit { end: Lsn(0x153_4c08), time });
}

#[test]
fn bytes_that_are_no_message_say_why() {
    for (hex, error) in [
        ("", DecodeError::Short),
        ("5a", DecodeError::Kind(b'Z')),
        ("42000000", DecodeError::Short),
        ("59000040017075626c6963006d6f6f640000", DecodeError::Trailing(1)),
        ("490000400c4b0000", DecodeError::Row(b'K')),
        ("490000400c4e000162", DecodeError::Cell(b'b')),
        ("490000400c4e000174ffffffff41", DecodeError::Short),
        ("440000400c4e0000", DecodeError::Row(b'N')),
        ("54ffffffff00", DecodeError::Short),
        ("5200004005ff00ff0064ffff", DecodeError::Name),
        ("52000040050061007a0000", DecodeError::Identity(b'z')),
    ] {
        assert_eq!(Message::parse(&bytes(hex)), Err(error), "{hex}");
    }
}

#[test]
fn places_in_the_log_are_written_as_postgres_does() {
    for text in ["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"] {
        assert_eq!(text.parse::<Lsn>().map(|lsn| lsn.to_string()).as_deref(), Ok(text));
    }
    for bad in ["", "1", "1/", "1/x", "1/100000000"] {
        assert!(bad.parse::<Lsn>().is_err(), "{bad}");
    }
}

/// A message as Postgres writes it.
fn encode(message: &Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    let name = |out: &mut Vec<u8>, text: &str| {
        out.extend(text.as_bytes());
        out.push(0);
    };
    let row = |out: &mut Vec<u8>, kind: u8, row: &Row<'_>| {
        out.push(kind);
        out.extend(u16::try_from(row.len()).expect("few").to_be_bytes());
        for cell in row {
            match cell {
                Cell::Null => out.push(b'n'),
                Cell::Unchanged => out.push(b'u'),
                Cell::Text(text) => {
                    out.push(b't');
                    out.extend(u32::try_from(text.len()).expect("short").to_be_bytes());
                    out.extend(*text);
                }
            }
        }
    };
    let old_row = |out: &mut Vec<u8>, old: &Old<'_>| match old {
        Old::Key(cells) => row(out, b'K', cells),
        Old::Full(cells) => row(out, b'O', cells),
    };
    match message {
        Message::Begin { commit, time, xid } => {
            out.push(b'B');
            out.extend(commit.0.to_be_bytes().into_iter().chain(time.to_be_bytes()).chain(xid.to_be_bytes()));
        }
        Message::Commit { end, time } => {
            out.extend([b'C'; 1].into_iter().chain([0; 9]));
            out.extend(end.0.to_be_bytes().into_iter().chain(time.to_be_bytes()));
        }
        Message::Origin => out.extend(b"O\0\0\0\0\0\0\0\x07from\0"),
        Message::Type => out.extend(b"Y\0\0\0\x07public\0mood\0"),
        Message::Relation(Relation { id, schema, name: table, identity, columns }) => {
            out.push(b'R');
            out.extend(id.to_be_bytes());
            name(&mut out, schema);
            name(&mut out, table);
            out.push(match identity {
                Identity::Default => b'd',
                Identity::Nothing => b'n',
                Identity::Full => b'f',
                Identity::Index => b'i',
            });
            out.extend(u16::try_from(columns.len()).expect("few").to_be_bytes());
            for column in columns {
                out.push(u8::from(column.identity));
                name(&mut out, &column.name);
                out.extend(column.kind.to_be_bytes().into_iter().chain([0xff; 4]));
            }
        }
        Message::Insert { table, new } => {
            out.push(b'I');
            out.extend(table.to_be_bytes());
            row(&mut out, b'N', new);
        }
        Message::Update { table, old, new } => {
            out.push(b'U');
            out.extend(table.to_be_bytes());
            if let Some(old) = old {
                old_row(&mut out, old);
            }
            row(&mut out, b'N', new);
        }
        Message::Delete { table, old } => {
            out.push(b'D');
            out.extend(table.to_be_bytes());
            old_row(&mut out, old);
        }
        Message::Truncate(tables) => {
            out.push(b'T');
            out.extend(u32::try_from(tables.len()).expect("few").to_be_bytes());
            out.push(3);
            out.extend(tables.iter().flat_map(|table| table.to_be_bytes()));
        }
        Message::Note { transactional, prefix, content } => {
            out.extend([b'M', u8::from(*transactional)].into_iter().chain([0; 8]).chain(prefix.iter().copied()).chain([0]));
            out.extend(u32::try_from(content.len()).expect("short").to_be_bytes().iter().chain(*content));
        }
    }
    out
}

static TEXTS: [&[u8]; 4] = [b"", b"7", b"\xff\0", b"a longer text"];

fn row() -> impl Strategy<Value = Row<'static>> {
    let cell = prop_oneof![Just(Cell::Null), Just(Cell::Unchanged), (0..TEXTS.len()).prop_map(|at| Cell::Text(TEXTS[at])),];
    proptest::collection::vec(cell, 0..5)
}

fn old() -> impl Strategy<Value = Old<'static>> {
    prop_oneof![row().prop_map(Old::Key), row().prop_map(Old::Full)]
}

fn relation() -> impl Strategy<Value = Relation> {
    let identity = prop_oneof![Just(Identity::Default), Just(Identity::Nothing), Just(Identity::Full), Just(Identity::Index)];
    let column = ("[a-zä]{0,6}", any::<bool>(), any::<u32>()).prop_map(|(name, identity, kind)| Column { name, identity, kind });
    (any::<u32>(), "[a-z]{1,6}", "[a-zä]{0,6}", identity, proptest::collection::vec(column, 0..5))
        .prop_map(|(id, schema, name, identity, columns)| Relation { id, schema, name, identity, columns })
}

fn message() -> impl Strategy<Value = Message<'static>> {
    prop_oneof![
        (any::<u64>(), any::<i64>(), any::<u32>()).prop_map(|(commit, time, xid)| Message::Begin {
            commit: Lsn(commit),
            time,
            xid
        }),
        (any::<u64>(), any::<i64>()).prop_map(|(end, time)| Message::Commit { end: Lsn(end), time }),
        Just(Message::Origin),
        Just(Message::Type),
        relation().prop_map(Message::Relation),
        (any::<u32>(), row()).prop_map(|(table, new)| Message::Insert { table, new }),
        (any::<u32>(), proptest::option::of(old()), row()).prop_map(|(table, old, new)| Message::Update { table, old, new }),
        (any::<u32>(), old()).prop_map(|(table, old)| Message::Delete { table, old }),
        proptest::collection::vec(any::<u32>(), 0..5).prop_map(Message::Truncate),
        (any::<bool>(), 1..TEXTS.len() - 2, 0..TEXTS.len()).prop_map(|(transactional, prefix, content)| Message::Note {
            transactional,
            prefix: TEXTS[prefix],
            content: TEXTS[content]
        }),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(message in message()) {
        let bytes = encode(&message);
        prop_assert_eq!(Message::parse(&bytes), Ok(message));
    }

    /// A part of a message is none, and neither is one that goes on: so nothing is ever read that was not sent as a whole.
    #[test]
    fn no_part_of_a_message_is_one(message in message(), cut in any::<proptest::sample::Index>()) {
        let mut bytes = encode(&message);
        prop_assert!(Message::parse(&bytes[..cut.index(bytes.len())]).is_err());
        bytes.push(0);
        prop_assert_eq!(Message::parse(&bytes), Err(DecodeError::Trailing(1)));
    }

    #[test]
    fn no_bytes_make_it_panic_or_take_room(kind in "[BCORYIUDTM]", rest in any::<Vec<u8>>()) {
        let bytes = [kind.as_bytes(), &rest].concat();
        let _ = Message::parse(&bytes);
    }

    #[test]
    fn a_changed_byte_does_no_harm(message in message(), at in any::<proptest::sample::Index>(), to in any::<u8>()) {
        let mut bytes = encode(&message);
        let at = at.index(bytes.len());
        bytes[at] = to;
        let _ = Message::parse(&bytes);
    }
}
