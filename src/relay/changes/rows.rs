//! Which keys and tags a changed row is about. Pure.
//!
//! A row is about the key, or the tag, that its columns give, as it was and as it is. Where the old row cannot be known, or what it gives cannot be
//! named, all keys of the rule go: that costs loads, and shows nothing old.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use super::wanted::{Wanted, Why};
use crate::origin::changes::noted;
use crate::origin::changes::pgoutput::{Cell, Column, Message, Old, Relation, Row};
use crate::policy::KeyPattern;
use crate::policy::changes::Follow;

/// The numbers of the types whose text is not what a key has: `t` for true, and blanks up to the column's width.
const BOOL: u32 = 16;
const BPCHAR: u32 = 1042;

/// A rule that follows a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    /// The rule's keys.
    pub keys: KeyPattern,
    /// Which rule it is, the table, and what a row of it means.
    pub follow: Follow,
}

/// A row of a table of which nothing was said: the stream is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a row of the table {0}, which was not introduced")]
pub struct UnknownTable(pub u32);

/// The tables that a stream has told of, and who follows them.
#[derive(Debug)]
pub struct Tables {
    watches: Vec<Watch>,
    known: HashMap<u32, Vec<Outlet>>,
    /// The slot that is read, for which writes through Larder leave their notes.
    slot: String,
    /// The keys that writes through Larder changed in the transaction that is being read: the cache has heard of these.
    own: HashSet<Vec<u8>>,
    #[cfg(test)]
    broken: Option<Broken>,
}

/// Who follows a table, as the table is now.
#[derive(Debug)]
struct Outlet {
    /// Among the watches.
    watch: usize,
    parts: Parts,
}

/// Where the parts of a rule's keys, or of a tag, come from.
#[derive(Debug)]
enum Parts {
    /// From nowhere: each change is about all of the rule's keys.
    All(Why),
    /// From these columns, in the order of the template's parts.
    Columns {
        template: KeyPattern,
        places: Vec<Place>,
        /// The first of them whose old value is not told.
        untold: Option<Why>,
    },
}

#[derive(Debug)]
struct Place {
    column: usize,
    kind: u32,
    /// Whether its old value is told.
    identity: bool,
}

/// What a row's columns give.
enum Made {
    /// This key, or this tag.
    Text(Vec<u8>),
    /// Nothing: no key, and no tag, stands for such a row.
    Nothing,
    /// It cannot be told, as this column's value is not there.
    Untold(usize),
}

/// What the tests break, one at a time, to see that they would notice.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// The row as it was is not looked at.
    Old,
    /// Its absence always means that nothing of it changed.
    Absence,
    /// Cells that did not change are taken for none.
    Unchanged,
    /// The old row's other columns are taken for null.
    OtherColumns,
}

impl Tables {
    /// Nothing is known yet. `slot`: the one that is read.
    pub fn new(watches: Vec<Watch>, slot: &str) -> Self {
        Self {
            watches,
            known: HashMap::new(),
            slot: slot.to_owned(),
            own: HashSet::new(),
            #[cfg(test)]
            broken: None,
        }
    }

    /// Who follows which tables.
    pub fn watches(&self) -> &[Watch] {
        &self.watches
    }

    /// Takes note of a table, of what Larder itself writes, and of rows that changed: adds to `wanted` what is to go.
    ///
    /// # Errors
    /// Rows of a table that was not told of.
    pub fn take(&mut self, message: &Message<'_>, wanted: &mut Wanted) -> Result<(), UnknownTable> {
        match message {
            Message::Relation(relation) => {
                let outlets = self.outlets(relation);
                self.known.insert(relation.id, outlets);
            }
            Message::Insert { table, new } => {
                self.each(*table, wanted, |this, outlet, wanted| this.row(outlet, new, None, wanted))?
            }
            Message::Update { table, old, new } => self.each(*table, wanted, |this, outlet, wanted| {
                this.row(outlet, new, old.as_ref(), wanted);
                this.old_row(outlet, old.as_ref(), wanted);
            })?,
            Message::Delete { table, old } => {
                self.each(*table, wanted, |this, outlet, wanted| this.old_row(outlet, Some(old), wanted))?
            }
            Message::Truncate(tables) => {
                for table in tables {
                    self.each(*table, wanted, |this, outlet, wanted| this.all(outlet, Why::Said, wanted))?;
                }
            }
            Message::Begin { .. } => self.own.clear(),
            Message::Note { .. } => self.own.extend(noted(message, &self.slot).map(<[u8]>::to_vec)),
            Message::Commit { .. } | Message::Origin | Message::Type => {}
        }
        Ok(())
    }

    /// Says that all keys of all rules go.
    pub fn all_of_all(&self, why: &Why, wanted: &mut Wanted) {
        self.watches.iter().for_each(|watch| wanted.rule(&watch.follow.rule, why.clone()));
    }

    fn each(
        &self,
        table: u32,
        wanted: &mut Wanted,
        mut note: impl FnMut(&Self, &Outlet, &mut Wanted),
    ) -> Result<(), UnknownTable> {
        let outlets = self.known.get(&table).ok_or(UnknownTable(table))?;
        outlets.iter().for_each(|outlet| note(self, outlet, wanted));
        Ok(())
    }

    fn outlets(&self, relation: &Relation) -> Vec<Outlet> {
        let follows = |watch: &Watch| watch.follow.table.is(&relation.schema, &relation.name);
        let watches = self.watches.iter().enumerate().filter(|(_, watch)| follows(watch));
        watches.map(|(at, watch)| Outlet { watch: at, parts: parts_of(watch, relation) }).collect()
    }

    fn all(&self, outlet: &Outlet, why: Why, wanted: &mut Wanted) {
        wanted.rule(&self.watches[outlet.watch].follow.rule, why);
    }

    /// The row as it is.
    fn row(&self, outlet: &Outlet, new: &Row<'_>, old: Option<&Old<'_>>, wanted: &mut Wanted) {
        let before: &[Cell<'_>] = match old {
            Some(Old::Key(before) | Old::Full(before)) => before,
            None => &[],
        };
        self.note(outlet, new, before, wanted);
    }

    /// The row as it was, of an update or a deletion.
    fn old_row(&self, outlet: &Outlet, old: Option<&Old<'_>>, wanted: &mut Wanted) {
        #[cfg(test)]
        if self.broken == Some(Broken::Old) || (self.broken == Some(Broken::Absence) && old.is_none()) {
            return;
        }
        let untold = match &outlet.parts {
            Parts::All(why) => return self.all(outlet, why.clone(), wanted),
            Parts::Columns { untold, .. } => untold.as_ref(),
        };
        match (old, untold) {
            (Some(Old::Full(before)), _) | (Some(Old::Key(before)), None) => self.note(outlet, before, &[], wanted),
            // What gives the key is the same as in the row as it is.
            (None, None) => {}
            #[cfg(test)]
            (Some(_), Some(_)) if self.broken == Some(Broken::OtherColumns) => {}
            (Some(Old::Key(_)) | None, Some(why)) => self.all(outlet, why.clone(), wanted),
        }
    }

    /// What the cells of a row give. What did not change is taken from `before`, the row as it was.
    fn note(&self, outlet: &Outlet, cells: &[Cell<'_>], before: &[Cell<'_>], wanted: &mut Wanted) {
        let watch = &self.watches[outlet.watch];
        let (template, places) = match &outlet.parts {
            Parts::All(why) => return self.all(outlet, why.clone(), wanted),
            Parts::Columns { template, places, .. } => (template, places),
        };
        match make(template, places, cells, before) {
            // Others have the tag as well, whose values a write of Larder's own has not stored.
            Made::Text(tag) if watch.follow.touches.tag().is_some() => wanted.tag(&watch.follow.rule, tag),
            Made::Text(key) if self.own.contains(&key) => {}
            Made::Text(key) => wanted.key(&watch.follow.rule, key),
            Made::Nothing => {}
            #[cfg(test)]
            Made::Untold(_) if self.broken == Some(Broken::Unchanged) => {}
            Made::Untold(part) => {
                let column = watch.follow.columns(&watch.keys).get(part).copied().unwrap_or_default().to_owned();
                self.all(outlet, Why::Identity { table: watch.follow.table.to_string(), column }, wanted);
            }
        }
    }
}

fn parts_of(watch: &Watch, relation: &Relation) -> Parts {
    let Some(template) = watch.follow.template(&watch.keys) else { return Parts::All(Why::Said) };
    let table = watch.follow.table.to_string();
    let (mut places, mut untold) = (Vec::new(), None);
    for name in watch.follow.columns(&watch.keys) {
        let found = relation.columns.iter().enumerate().find(|(_, column)| column.name == name);
        let Some((at, Column { identity, kind, .. })) = found else {
            return Parts::All(Why::Column { table, column: name.to_owned() });
        };
        if !identity && untold.is_none() {
            untold = Some(Why::Identity { table: table.clone(), column: name.to_owned() });
        }
        places.push(Place { column: at, kind: *kind, identity: *identity });
    }
    Parts::Columns { template: template.clone(), places, untold }
}

fn make(template: &KeyPattern, places: &[Place], cells: &[Cell<'_>], before: &[Cell<'_>]) -> Made {
    let mut values: Vec<Cow<'_, [u8]>> = Vec::with_capacity(places.len());
    for (part, place) in places.iter().enumerate() {
        let cell = match cells.get(place.column) {
            Some(Cell::Unchanged) if place.identity => before.get(place.column),
            cell => cell,
        };
        match cell {
            Some(Cell::Text(text)) => values.push(as_part(place.kind, text)),
            // A column without a value is equal to no part of a key or a tag.
            Some(Cell::Null) => return Made::Nothing,
            Some(Cell::Unchanged) | None => return Made::Untold(part),
        }
    }
    let mut parts = values.iter();
    let text = template.render(|_| parts.next().map(Cow::as_ref));
    text.map_or(Made::Nothing, Made::Text)
}

/// A column's text as it stands in a key: as Postgres casts it to `text`.
fn as_part(kind: u32, text: &[u8]) -> Cow<'_, [u8]> {
    match (kind, text) {
        (BOOL, b"t") => Cow::Borrowed(b"true"),
        (BOOL, b"f") => Cow::Borrowed(b"false"),
        (BPCHAR, padded) => {
            let end = padded.iter().rposition(|byte| *byte != b' ').map_or(0, |last| last + 1);
            Cow::Borrowed(&padded[..end])
        }
        (_, text) => Cow::Borrowed(text),
    }
}

#[cfg(test)]
mod tests;
