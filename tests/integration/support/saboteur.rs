//! Stands between clients and a server and changes what they send. So a test breaks a mechanism of the sidecar whose code has no
//! switch for that, and shows that another test would notice.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// What is found in a stream, and what goes on in its stead. The latter may be shorter: blanks fill it up, so that lengths stay true.
#[derive(Debug, Clone, Copy)]
pub struct Change {
    pub from: &'static str,
    pub to: &'static str,
}

/// A port behind which a server will be.
pub struct Saboteur {
    listener: TcpListener,
}

/// A port behind which a server is.
pub struct Sabotage {
    port: u16,
    made: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Saboteur {
    pub fn open() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").expect("loopback has a free port") }
    }

    pub fn port(&self) -> u16 {
        self.listener.local_addr().expect("it is bound").port()
    }

    /// Begins, before the server at `server`.
    pub fn before(self, server: u16, changes: &'static [Change]) -> Sabotage {
        changes.iter().for_each(|change| assert!(!change.from.is_empty() && change.to.len() <= change.from.len(), "{change:?}"));
        let (made, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (port, ours, stop) = (self.port(), made.clone(), over.clone());
        let acceptor = std::thread::spawn(move || {
            for client in self.listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                // A server that is gone is gone for its clients, too: the connection is closed.
                let (Ok(client), Ok(server)) = (client, TcpStream::connect(("127.0.0.1", server))) else { continue };
                pass_on(client, server, changes, &ours);
            }
        });
        Sabotage { port, made, over, acceptor: Some(acceptor) }
    }
}

impl Sabotage {
    /// How often something was changed.
    pub fn made(&self) -> u64 {
        self.made.load(Ordering::SeqCst)
    }
}

impl Drop for Sabotage {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // It waits for one more.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        let _ = self.acceptor.take().map(JoinHandle::join);
    }
}

/// Both directions of one connection, each on a thread of its own, until either end is gone.
fn pass_on(client: TcpStream, server: TcpStream, changes: &'static [Change], made: &Arc<AtomicU64>) {
    let (Ok(mut from_server), Ok(mut to_client)) = (server.try_clone(), client.try_clone()) else { return };
    let made = made.clone();
    std::thread::spawn(move || {
        let _ = change(&client, &server, changes, &made);
        let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
    });
    std::thread::spawn(move || {
        let _ = io::copy(&mut from_server, &mut to_client);
        let _ = (from_server.shutdown(Shutdown::Both), to_client.shutdown(Shutdown::Both));
    });
}

fn change(mut client: &TcpStream, mut server: &TcpStream, changes: &[Change], made: &AtomicU64) -> io::Result<()> {
    server.set_nodelay(true)?;
    let (mut held, mut chunk) = (Vec::new(), vec![0; 64 * 1024]);
    loop {
        let length = client.read(&mut chunk)?;
        if length == 0 {
            return server.write_all(&held);
        }
        held.extend_from_slice(&chunk[..length]);
        made.fetch_add(changes.iter().map(|change| replace(&mut held, change)).sum(), Ordering::SeqCst);
        let rest = held.split_off(held.len() - unfinished(&held, changes));
        server.write_all(&held)?;
        held = rest;
    }
}

/// Replaces all that is found. How often.
fn replace(bytes: &mut [u8], change: &Change) -> u64 {
    let (mut at, mut times) = (0, 0);
    while let Some(found) = memchr::memmem::find(&bytes[at..], change.from.as_bytes()) {
        let place = &mut bytes[at + found..][..change.from.len()];
        place.fill(b' ');
        place[..change.to.len()].copy_from_slice(change.to.as_bytes());
        at += found + change.from.len();
        times += 1;
    }
    times
}

/// How many of the last bytes may be the beginning of something that is to be changed. No command ends with any.
fn unfinished(bytes: &[u8], changes: &[Change]) -> usize {
    let begins =
        |change: &Change| (1..change.from.len()).rev().find(|length| bytes.ends_with(&change.from.as_bytes()[..*length]));
    changes.iter().filter_map(begins).max().unwrap_or(0)
}

#[test]
fn what_is_split_is_changed_too_and_all_else_passes() {
    let changes: &[Change] = &[Change { from: "lease held", to: "nothing" }, Change { from: "UNLINK", to: "EXISTS" }];
    let text = b"a lease is no lease held: UNLINK or UNLIN\r\n";
    for split in 0..=text.len() {
        let (mut held, mut sent) = (Vec::new(), Vec::new());
        for part in [&text[..split], &text[split..]] {
            held.extend_from_slice(part);
            changes.iter().for_each(|change| _ = replace(&mut held, change));
            let rest = held.split_off(held.len() - unfinished(&held, changes));
            sent.append(&mut held);
            held = rest;
        }
        assert_eq!(
            (String::from_utf8_lossy(&sent).as_ref(), held.len()),
            ("a lease is no nothing   : EXISTS or UNLIN\r\n", 0),
            "{split}"
        );
    }
}
