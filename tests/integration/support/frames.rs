//! Counts the commands, or the replies, that pass by on a connection.

use larder::sidecar::resp::command::{CommandScan, CommandScanner};
use larder::sidecar::resp::reply::ReplyScanner;

/// What passes by in one direction.
pub struct Frames {
    scanner: Scanner,
    /// What has begun and is not whole.
    held: Vec<u8>,
    whole: u64,
    /// What passes by is nothing of RESP, such as a replication stream.
    is_lost: bool,
}

enum Scanner {
    Commands(CommandScanner),
    Replies(ReplyScanner),
}

impl Frames {
    pub fn commands() -> Self {
        Self::new(Scanner::Commands(CommandScanner::default()))
    }

    pub fn replies() -> Self {
        Self::new(Scanner::Replies(ReplyScanner::default()))
    }

    fn new(scanner: Scanner) -> Self {
        Self { scanner, held: Vec::new(), whole: 0, is_lost: false }
    }

    pub fn pass(&mut self, bytes: &[u8]) {
        if self.is_lost {
            return;
        }
        self.held.extend_from_slice(bytes);
        let mut at = 0;
        while let Some(length) = self.next(at) {
            // What a server says unasked answers nothing.
            self.whole += u64::from(self.held[at] != b'>');
            at += length;
        }
        self.held.drain(..at);
    }

    /// The length of what begins at `at`, once it is whole.
    fn next(&mut self, at: usize) -> Option<usize> {
        let rest = &self.held[at..];
        let scanned = match &mut self.scanner {
            Scanner::Commands(_) if rest.first().is_some_and(|first| *first != b'*') => Err(()),
            Scanner::Commands(scanner) => match scanner.scan(rest) {
                Ok(CommandScan::Complete { length } | CommandScan::Inline { length }) => Ok(Some(length)),
                Ok(CommandScan::Incomplete) => Ok(None),
                Err(_) => Err(()),
            },
            Scanner::Replies(scanner) => scanner.scan(rest).map_err(|_| ()),
        };
        self.is_lost |= scanned.is_err();
        scanned.unwrap_or(None)
    }

    /// How many commands, or answers to them, are whole. Of what is nothing of RESP: none, or as many as can be, so that whatever comes next answers
    /// whatever was asked.
    pub fn whole(&self) -> u64 {
        match &self.scanner {
            Scanner::Replies(_) if self.is_lost => u64::MAX,
            Scanner::Commands(_) if self.is_lost => 0,
            _ => self.whole,
        }
    }
}

#[test]
fn what_is_whole_is_counted_however_it_is_split() {
    let commands = b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n*1\r\n$4\r\nPING\r\n";
    let replies = b"$5\r\nvalue\r\n>2\r\n+invalidate\r\n*1\r\n$1\r\na\r\n+PONG\r\n:1";
    for (mut frames, bytes) in [(Frames::commands(), &commands[..]), (Frames::replies(), &replies[..])] {
        bytes.chunks(3).for_each(|chunk| frames.pass(chunk));
        assert_eq!(frames.whole(), 2);
    }
    let (mut commands, mut replies) = (Frames::commands(), Frames::replies());
    commands.pass(b"\0\0\0\x08");
    replies.pass(b"R\0\0\0\x08");
    assert_eq!((commands.whole(), replies.whole()), (0, u64::MAX));
}
