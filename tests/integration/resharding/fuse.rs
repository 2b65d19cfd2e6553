//! Stands before servers and lets so many commands through. Then whoever sends them is as good as dead. What servers send each other as
//! they move keys passes: they live.

use std::io::{self, BufReader, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::JoinHandle;

use crate::support::resp::{Value, encode, read_value};

/// One port before each server.
pub struct Fuse {
    ports: Vec<u16>,
    left: Arc<AtomicI64>,
    over: Arc<AtomicBool>,
    acceptors: Vec<JoinHandle<()>>,
}

impl Fuse {
    pub fn before(servers: &[u16]) -> Self {
        let (left, over) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicBool::new(false)));
        let (mut ports, mut acceptors) = (Vec::new(), Vec::new());
        for server in servers.iter().copied() {
            let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
            ports.push(listener.local_addr().expect("it is bound").port());
            let (left, over) = (left.clone(), over.clone());
            acceptors.push(std::thread::spawn(move || accept(&listener, server, &left, &over)));
        }
        Self { ports, left, over, acceptors }
    }

    /// Where to come instead of to the servers, in their order.
    pub fn ports(&self) -> &[u16] {
        &self.ports
    }

    /// Lets so many commands through from now on, over all connections.
    pub fn allow(&self, commands: i64) {
        self.left.store(commands, Ordering::SeqCst);
    }

    /// Whether somebody has sent more.
    pub fn is_blown(&self) -> bool {
        self.left.load(Ordering::SeqCst) < 0
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        for (port, acceptor) in self.ports.iter().zip(self.acceptors.drain(..)) {
            // It waits for one more.
            let _ = TcpStream::connect(("127.0.0.1", *port));
            let _ = acceptor.join();
        }
    }
}

fn accept(listener: &TcpListener, server: u16, left: &Arc<AtomicI64>, over: &AtomicBool) {
    for client in listener.incoming() {
        if over.load(Ordering::SeqCst) {
            return;
        }
        let (Ok(client), Ok(server)) = (client, TcpStream::connect(("127.0.0.1", server))) else { continue };
        let (Ok(mut from_server), Ok(mut to_client)) = (server.try_clone(), client.try_clone()) else { continue };
        let left = left.clone();
        std::thread::spawn(move || {
            let _ = pass_on(&client, &server, &left);
            let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
        });
        std::thread::spawn(move || {
            let _ = io::copy(&mut from_server, &mut to_client);
            let _ = (from_server.shutdown(Shutdown::Both), to_client.shutdown(Shutdown::Both));
        });
    }
}

fn pass_on(client: &TcpStream, mut server: &TcpStream, left: &AtomicI64) -> io::Result<()> {
    server.set_nodelay(true)?;
    let mut reader = BufReader::new(client);
    loop {
        let bytes = |word: Value| if let Value::Bulk(bytes) = word { bytes } else { Vec::new() };
        let words: Vec<Vec<u8>> = read_value(&mut reader)?.items().into_iter().map(bytes).collect();
        let is_servers = words.first().is_some_and(|name| name == b"RESTORE-ASKING");
        if !is_servers && left.fetch_sub(1, Ordering::SeqCst) <= 0 {
            return Ok(());
        }
        server.write_all(&encode(&words))?;
    }
}
