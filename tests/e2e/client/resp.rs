//! As much of RESP2 as the client needs.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

use super::Target;

/// Longer than any planned pause of writes that serves its purpose, shorter than what people wait for.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(1);
const CONNECT_WITHIN: Duration = Duration::from_millis(500);

/// A reply, of those that the client asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    Text(String),
    Number(i64),
    Nil,
    List(Vec<Reply>),
}

/// Why a command was not answered: the first word of an error reply, the whole of one that names another server, or the kind of an I/O
/// error.
pub type Fault = String;

/// The first words of error replies that name another server.
pub const MOVED: &str = "MOVED ";
pub const ASK: &str = "ASK ";

pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    pub fn open(address: &str) -> Result<Self, Fault> {
        let address = address.to_socket_addrs().map_err(fault)?.next().ok_or("no address")?;
        let stream = TcpStream::connect_timeout(&address, CONNECT_WITHIN).map_err(fault)?;
        stream.set_nodelay(true).map_err(fault)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(fault)?;
        stream.set_write_timeout(Some(ANSWER_WITHIN)).map_err(fault)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    pub fn call(&mut self, arguments: &[&str]) -> Result<Reply, Fault> {
        let mut bytes = format!("*{}\r\n", arguments.len());
        for argument in arguments {
            bytes.push_str(&format!("${}\r\n{argument}\r\n", argument.len()));
        }
        self.stream.get_mut().write_all(bytes.as_bytes()).map_err(fault)?;
        self.reply()
    }

    fn reply(&mut self) -> Result<Reply, Fault> {
        let mut line = String::new();
        self.stream.read_line(&mut line).map_err(fault)?;
        let line = line.strip_suffix("\r\n").ok_or("closed")?;
        let rest = line.get(1..).ok_or("empty line")?;
        let number = || rest.parse::<i64>().map_err(|_| format!("no number: {line}"));
        match line.as_bytes()[0] {
            b'+' => Ok(Reply::Text(rest.to_owned())),
            b'-' if rest.starts_with(MOVED) || rest.starts_with(ASK) => Err(rest.to_owned()),
            b'-' => Err(rest.split(' ').next().unwrap_or_default().to_owned()),
            b':' => Ok(Reply::Number(number()?)),
            b'$' | b'*' if number()? < 0 => Ok(Reply::Nil),
            b'$' => {
                let mut text = vec![0; usize::try_from(number()?).map_err(|error| error.to_string())? + 2];
                self.stream.read_exact(&mut text).map_err(fault)?;
                text.truncate(text.len() - 2);
                Ok(Reply::Text(String::from_utf8_lossy(&text).into_owned()))
            }
            b'*' => (0..number()?).map(|_| self.reply()).collect::<Result<_, _>>().map(Reply::List),
            _ => Err(format!("unexpected: {line}")),
        }
    }

    /// One with the target's login, where there is one.
    pub fn log_in(address: &str, target: &Target) -> Result<Self, Fault> {
        let mut open = Self::open(address)?;
        if let Some(login) = &target.login {
            let read = |name: &str| fs::read_to_string(login.join(name)).map(|text| text.trim().to_owned()).map_err(fault);
            open.call(&["AUTH", &read("username")?, &read("password")?])?;
        }
        Ok(open)
    }
}

fn fault(error: io::Error) -> Fault {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "timeout".to_owned(),
        kind => kind.to_string(),
    }
}
