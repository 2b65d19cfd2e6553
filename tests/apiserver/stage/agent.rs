//! The agents' port, of which the operator reads `/state` alone.

use std::io;

use larder::operator::queue::Key;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::tier::Member;
use super::{Tiers, listener, tls};

/// Serves for one server's agent, until it is dropped with all its connections.
pub async fn serve(listener: TcpListener, tiers: Tiers, key: Key, ordinal: u16) {
    listener::serve(listener, |stream| converse(stream, tiers.clone(), key.clone(), ordinal)).await;
}

async fn converse(stream: TcpStream, tiers: Tiers, key: Key, ordinal: u16) -> io::Result<()> {
    let presented = tiers.with(&key, |tier| tier.presented(Member::Server(ordinal)));
    let mut stream = BufReader::new(tls::accept(stream, presented).await?);
    loop {
        let mut request = String::new();
        while !request.ends_with("\r\n\r\n") {
            if stream.read_line(&mut request).await? == 0 {
                return Ok(());
            }
        }
        if tiers.with(&key, |tier| tier.agents_hang) {
            return std::future::pending().await;
        }
        let report = tiers.with(&key, |tier| tier.report(ordinal)).filter(|_| request.starts_with("GET /state "));
        let (status, body) = match report {
            Some(report) => ("200 OK", serde_json::to_string(&report).expect("a report serialises")),
            // A connection that has outlived its pod.
            None => ("503 Service Unavailable", String::new()),
        };
        let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).await?;
        stream.flush().await?;
    }
}
