//! RESP, from the side of whoever answers.

use std::io;

use larder::operator::queue::Key;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::keeper::Keeper;
use super::tier::Member;
use super::tls::Duplex;
use super::{Tiers, listener, tls};

/// A connection that is read command by command.
pub type Stream = BufReader<Box<dyn Duplex>>;

/// The longest command: everything that is asked here is short.
const MAX_WORDS: usize = 256;
const MAX_WORD_BYTES: usize = 64 * 1024;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Simple(&'static str),
    Error(String),
    Integer(i64),
    Bulk(String),
    Nil,
    Array(Vec<Reply>),
}

impl Reply {
    pub fn error(text: impl Into<String>) -> Self {
        Self::Error(text.into())
    }

    pub fn bulk(text: impl Into<String>) -> Self {
        Self::Bulk(text.into())
    }

    pub fn strings<const N: usize>(texts: [&str; N]) -> Self {
        Self::Array(texts.into_iter().map(Self::bulk).collect())
    }

    fn write(&self, out: &mut String) {
        match self {
            Self::Simple(text) => *out += &format!("+{text}\r\n"),
            Self::Error(text) => *out += &format!("-{text}\r\n"),
            Self::Integer(number) => *out += &format!(":{number}\r\n"),
            Self::Bulk(text) => *out += &format!("${}\r\n{text}\r\n", text.len()),
            Self::Nil => *out += "$-1\r\n",
            Self::Array(items) => {
                *out += &format!("*{}\r\n", items.len());
                items.iter().for_each(|item| item.write(out));
            }
        }
    }
}

/// Answers for one member, until it is dropped with all its connections.
pub async fn serve(listener: TcpListener, tiers: Tiers, key: Key, member: Member) {
    listener::serve(listener, |stream| converse(stream, tiers.clone(), key.clone(), member)).await;
}

async fn converse(stream: TcpStream, tiers: Tiers, key: Key, member: Member) -> io::Result<()> {
    let presented = tiers.with(&key, |tier| tier.presented(member));
    let mut stream = BufReader::new(tls::accept(stream, presented).await?);
    let (mut logged_in, mut keeper) = (false, None);
    while let Some(words) = read_command(&mut stream).await? {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let verb = words.first().copied().unwrap_or_default();
        if let Some(address) = tiers.with(&key, |tier| tier.keeper(member, verb)).filter(|_| logged_in) {
            let mut kept = match keeper.take() {
                Some(kept) => kept,
                None => Keeper::connect(address).await?,
            };
            if verb.eq_ignore_ascii_case("SUBSCRIBE") {
                return kept.join(stream, &words).await;
            }
            stream.write_all(&kept.ask(&words).await?).await?;
            stream.flush().await?;
            keeper = Some(kept);
            continue;
        }
        let reply = match words[..] {
            [verb, user, password] if verb.eq_ignore_ascii_case("AUTH") => {
                logged_in = tiers.with(&key, |tier| tier.login() == Some(&(user.to_owned(), password.to_owned())));
                if logged_in { Reply::Simple("OK") } else { Reply::error("WRONGPASS invalid username-password pair") }
            }
            _ if !logged_in => Reply::error("NOAUTH Authentication required."),
            [verb, channel] if verb.eq_ignore_ascii_case("SUBSCRIBE") => {
                return tell_of_switches(stream, &tiers, &key, channel).await;
            }
            _ => tiers.with(&key, |tier| tier.answer(member, &words)),
        };
        send(&mut stream, &reply).await?;
    }
    Ok(())
}

/// A connection that is subscribed hears of each switch until it ends.
async fn tell_of_switches(mut stream: Stream, tiers: &Tiers, key: &Key, channel: &str) -> io::Result<()> {
    let mut switches = tiers.with(key, |tier| tier.subscribe());
    let subscribed = Reply::Array(vec![Reply::bulk("subscribe"), Reply::bulk(channel), Reply::Integer(1)]);
    send(&mut stream, &subscribed).await?;
    loop {
        tokio::select! {
            switch = switches.recv() => {
                let Ok(primary) = switch else { return Ok(()) };
                send(&mut stream, &Reply::strings(["message", channel, &primary])).await?;
            }
            command = read_command(&mut stream) => if command?.is_none() { return Ok(()) },
        }
    }
}

async fn send(stream: &mut Stream, reply: &Reply) -> io::Result<()> {
    let mut text = String::new();
    reply.write(&mut text);
    stream.write_all(text.as_bytes()).await?;
    stream.flush().await
}

/// The next command; `None` at the end of the connection.
async fn read_command(stream: &mut Stream) -> io::Result<Option<Vec<String>>> {
    let Some(count) = read_head(stream, '*').await? else { return Ok(None) };
    let mut words = Vec::new();
    for _ in 0..count.min(MAX_WORDS) {
        let length = read_head(stream, '$').await?.ok_or(io::ErrorKind::UnexpectedEof)?.min(MAX_WORD_BYTES);
        let mut word = vec![0; length + 2];
        stream.read_exact(&mut word).await?;
        word.truncate(length);
        words.push(String::from_utf8(word).map_err(|_| io::ErrorKind::InvalidData)?);
    }
    Ok(Some(words))
}

async fn read_head(stream: &mut Stream, kind: char) -> io::Result<Option<usize>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let length = line.trim_end().strip_prefix(kind).and_then(|length| length.parse().ok());
    length.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
