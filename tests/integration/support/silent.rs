//! An address where nobody answers, as that of a pod that has just died.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};

/// A listener that nobody gets an answer from: it takes no connection, and no more fit into its queue.
pub struct Silent {
    listener: TcpListener,
    waiting: Vec<TcpStream>,
}

impl Silent {
    pub async fn open() -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("it binds");
        let listener = socket.listen(1).expect("it listens");
        let address = listener.local_addr().expect("an address");
        let mut waiting = Vec::new();
        loop {
            match TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
                Ok(stream) => waiting.push(stream),
                Err(error) if error.kind() == ErrorKind::TimedOut => return Self { listener, waiting },
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("an address")
    }

    pub fn port(&self) -> u16 {
        self.address().port()
    }

    /// The connections to it that nobody has answered, by their other ends in the kernel's table: the fourth field of a line is the
    /// state, and 02 is SYN-SENT.
    pub fn attempts(&self) -> BTreeSet<String> {
        let table = fs::read_to_string("/proc/self/net/tcp").expect("the kernel's table");
        let ends = format!(":{:04X}", self.port());
        let words = table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        let ours = words.filter(|words| words.get(2).is_some_and(|other| other.ends_with(&ends)) && words.get(3) == Some(&"02"));
        ours.map(|words| words[1].to_owned()).collect()
    }

    /// From now on it takes every connection.
    pub async fn answer(self) {
        drop(self.waiting);
        while self.listener.accept().await.is_ok() {}
    }
}
