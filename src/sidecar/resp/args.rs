//! A client's command, as ranges over the bytes in which it arrived.

use std::ops::Range;

/// The arguments of one command, its name first. Borrows; copies nothing.
#[derive(Debug, Clone, Copy)]
pub struct CommandArgs<'a> {
    buffer: &'a [u8],
    ranges: &'a [Range<u32>],
}

impl<'a> CommandArgs<'a> {
    /// The arguments that `ranges` cut out of `buffer`.
    pub fn new(buffer: &'a [u8], ranges: &'a [Range<u32>]) -> Self {
        Self { buffer, ranges }
    }

    /// How many there are, the name included.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether there is not even a name.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The argument at `index`; the name is at 0. `None` past the end.
    pub fn get(&self, index: usize) -> Option<&'a [u8]> {
        self.ranges.get(index).map(|range| &self.buffer[range.start as usize..range.end as usize])
    }

    /// The command's name as the client wrote it. Empty where there is none.
    pub fn name(&self) -> &'a [u8] {
        self.get(0).unwrap_or_default()
    }

    /// All arguments, the name first.
    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let buffer = self.buffer;
        self.ranges.iter().map(move |range| &buffer[range.start as usize..range.end as usize])
    }
}
