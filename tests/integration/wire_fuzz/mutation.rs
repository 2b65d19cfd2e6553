//! Makes new frames of old ones: bytes change, and so does what frames are made of.

/// The longest case.
const MOST_BYTES: usize = 8 * 1024;

/// What is written where a header has a number.
const NUMBERS: [&str; 22] = [
    "-1",
    "0",
    "1",
    "2",
    "3",
    "10",
    "100",
    "",
    "-0",
    "+1",
    "01",
    "-2",
    "?",
    "1 ",
    "1048577",
    "536870913",
    "2147483648",
    "4294967297",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "0000000000000000001",
];
/// Bytes that mean something.
const BYTES: &[u8] = b"*$+-:_,#(=!~>%|.;?H\r\n0129tf \0\xff";

/// An endless stream of cases, the same for the same seeds and number.
pub struct Mutator<'a> {
    seeds: &'a [Vec<u8>],
    random: fastrand::Rng,
}

impl<'a> Mutator<'a> {
    pub fn new(seeds: &'a [Vec<u8>], number: u64) -> Self {
        Self { seeds, random: fastrand::Rng::with_seed(number) }
    }

    /// The next case.
    pub fn next(&mut self) -> Vec<u8> {
        let mut case = self.seed();
        for _ in 0..self.random.usize(0..=3) {
            match self.random.u8(..12) {
                0 => self.replace(&mut case),
                1 => self.flip(&mut case),
                2 => self.insert(&mut case),
                3 => self.remove(&mut case),
                4 => case.truncate(self.random.usize(0..=case.len())),
                5 => self.repeat(&mut case),
                6 => self.splice(&mut case),
                7 => self.wrap(&mut case),
                8 => self.put_element(&mut case),
                9 => self.change_type(&mut case),
                10 => self.spoil_line_end(&mut case),
                _ => self.change_number(&mut case),
            }
        }
        case.truncate(MOST_BYTES);
        case
    }

    fn seed(&mut self) -> Vec<u8> {
        self.seeds[self.random.usize(..self.seeds.len())].clone()
    }

    /// A place in `case`, which may be its end.
    fn place(&mut self, case: &[u8]) -> usize {
        self.random.usize(0..=case.len())
    }

    fn byte(&mut self) -> u8 {
        BYTES[self.random.usize(..BYTES.len())]
    }

    fn replace(&mut self, case: &mut [u8]) {
        let byte = self.byte();
        if let Some(old) = self.random.choice(case) {
            *old = byte;
        }
    }

    fn flip(&mut self, case: &mut [u8]) {
        let bit = 1 << self.random.u8(..8);
        if let Some(old) = self.random.choice(case) {
            *old ^= bit;
        }
    }

    fn insert(&mut self, case: &mut Vec<u8>) {
        let (at, byte) = (self.place(case), self.byte());
        case.insert(at, byte);
    }

    fn remove(&mut self, case: &mut Vec<u8>) {
        let at = self.place(case);
        let end = (at + self.random.usize(1..=8)).min(case.len());
        case.drain(at..end);
    }

    fn repeat(&mut self, case: &mut Vec<u8>) {
        let at = self.place(case);
        let part = case[at..(at + 16).min(case.len())].to_vec();
        case.splice(at..at, part);
    }

    /// Another frame from its middle on.
    fn splice(&mut self, case: &mut Vec<u8>) {
        let other = self.seed();
        let (at, from) = (self.place(case), self.place(&other));
        case.truncate(at);
        case.extend_from_slice(&other[from..]);
    }

    /// The frame becomes the last element of another, which may lack some.
    fn wrap(&mut self, case: &mut Vec<u8>) {
        let header = ["*1", "*2", "~1", ">1", "%1", "|1", "*0", "|0", "%0"][self.random.usize(..9)];
        let mut wrapped = format!("{header}\r\n").into_bytes();
        if self.random.bool() {
            wrapped.extend_from_slice(b"+k\r\n");
        }
        wrapped.append(case);
        *case = wrapped;
    }

    /// Another frame between two lines.
    fn put_element(&mut self, case: &mut Vec<u8>) {
        let starts = line_starts(case);
        let at = starts[self.random.usize(..starts.len())];
        let other = self.seed();
        case.splice(at..at, other);
    }

    fn change_type(&mut self, case: &mut [u8]) {
        let starts = line_starts(case);
        let at = starts[self.random.usize(..starts.len())];
        let byte = self.byte();
        if let Some(old) = case.get_mut(at) {
            *old = byte;
        }
    }

    fn spoil_line_end(&mut self, case: &mut Vec<u8>) {
        let starts = line_starts(case);
        let at = starts[self.random.usize(..starts.len())];
        if at >= 2 {
            let ends: [&[u8]; 5] = [b"\n", b"\r", b"\r\r\n", b"\n\r\n", b"\rX"];
            case.splice(at - 2..at, ends[self.random.usize(..5)].iter().copied());
        }
    }

    fn change_number(&mut self, case: &mut Vec<u8>) {
        let is_digit = |byte: &u8| byte.is_ascii_digit() || *byte == b'-';
        let starts: Vec<usize> = line_starts(case).into_iter().filter(|at| case.get(at + 1).is_some_and(is_digit)).collect();
        let Some(at) = self.random.choice(&starts) else { return };
        let digits = at + 1..at + 1 + case[at + 1..].iter().take_while(|byte| is_digit(byte)).count();
        let old = std::str::from_utf8(&case[digits.clone()]).ok().and_then(|text| text.parse::<i64>().ok()).unwrap_or(0);
        let fresh = match self.random.u8(..4) {
            0 => old.saturating_add(1).to_string(),
            1 => old.saturating_sub(1).to_string(),
            _ => NUMBERS[self.random.usize(..NUMBERS.len())].to_owned(),
        };
        case.splice(digits, fresh.into_bytes());
    }
}

/// Where lines begin, the first one included.
fn line_starts(case: &[u8]) -> Vec<usize> {
    let ends = case.windows(2).enumerate().filter(|(_, pair)| *pair == b"\r\n").map(|(at, _)| at + 2);
    std::iter::once(0).chain(ends).collect()
}
