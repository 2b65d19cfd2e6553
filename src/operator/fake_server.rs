//! Played Redis servers and sentinels, for tests of what asks them.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread;

/// Answers each command, by its words, with what `answer` makes of it: RESP as it goes over the wire. Until the test's process ends.
pub fn listen(at: impl ToSocketAddrs, answer: impl Fn(&[String]) -> String + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind(at).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let answer = answer.clone();
            thread::spawn(move || {
                let mut answers = stream.try_clone().unwrap();
                let mut reader = BufReader::new(stream);
                while let Some(words) = read_command(&mut reader) {
                    let _ = answers.write_all(answer(&words).as_bytes());
                }
            });
        }
    });
    address
}

/// An array of bulk strings.
pub fn in_bulk(texts: &[impl AsRef<str>]) -> String {
    let bulk = |text: &str| format!("${}\r\n{text}\r\n", text.len());
    format!("*{}\r\n{}", texts.len(), texts.iter().map(|text| bulk(text.as_ref())).collect::<String>())
}

/// `*N`, and of each word `$LENGTH` and the word; none where the connection ends.
fn read_command(reader: &mut BufReader<TcpStream>) -> Option<Vec<String>> {
    let number = |reader: &mut BufReader<TcpStream>| {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        line.trim().get(1..)?.parse::<usize>().ok()
    };
    let count = number(reader)?;
    let mut words = Vec::new();
    for _ in 0..count {
        let mut bytes = vec![0; number(reader)? + 2];
        reader.read_exact(&mut bytes).ok()?;
        words.push(String::from_utf8_lossy(&bytes[..bytes.len() - 2]).into_owned());
    }
    Some(words)
}
