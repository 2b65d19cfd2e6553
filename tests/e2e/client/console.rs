//! Answers questions that come in lines, so that many of them need one connection into the pod.
//!
//! The words of a question, and the lines of an answer, stand between unit separators. `control WORD` asks the writers; `password` asks for
//! the password that the pod holds; `call ADDRESS USER PASSWORD COMMAND…` asks a server or a sentinel, as `redis-cli` would show it.
//! An answer begins with `+`, or with `-` where something failed.

use std::io::{self, BufRead as _, Write as _};

use super::resp::{Connection, Fault, Reply};
use super::{Target, ask, password};

const SEPARATOR: &str = "\u{1f}";

pub fn serve() {
    for question in io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<&str> = question.split(SEPARATOR).collect();
        let answer = match words.as_slice() {
            ["control", word] => ask(word),
            ["password"] => password(&Target::from_environment()),
            ["call", address, user, password, command @ ..] => call(address, user, password, command),
            _ => Err(format!("{question:?} is no question")),
        };
        let (sign, text) = answer.map_or_else(|error| ('-', error), |text| ('+', text));
        let mut out = io::stdout().lock();
        let line = text.replace("\r\n", SEPARATOR).replace('\n', SEPARATOR);
        if writeln!(out, "{sign}{line}").and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

fn call(address: &str, user: &str, password: &str, command: &[&str]) -> Result<String, Fault> {
    let mut connection = Connection::open(address)?;
    connection.call(&["AUTH", user, password])?;
    let mut lines = Vec::new();
    show(&connection.call(command)?, &mut lines);
    Ok(lines.join("\n").trim().to_owned())
}

fn show(reply: &Reply, lines: &mut Vec<String>) {
    match reply {
        Reply::Text(text) => lines.push(text.clone()),
        Reply::Number(number) => lines.push(number.to_string()),
        Reply::Nil => lines.push(String::new()),
        Reply::List(parts) => parts.iter().for_each(|part| show(part, lines)),
    }
}
