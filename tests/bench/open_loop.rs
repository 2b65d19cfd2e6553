//! Single commands at random (Poisson) moments of a fixed rate, whether or not earlier ones were answered. Latencies count from the
//! moment each command was due, so that a stalled target cannot hide its stalls.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::{Events, Poll};

use crate::load::{Batch, LoadError, STALL, Workload, compare, connect, histogram};

/// The most commands that may be outstanding before the target counts as overrun.
const MOST_OUTSTANDING: usize = 50_000;

struct Client {
    stream: TcpStream,
    unsent: Vec<u8>,
    /// Which batch, and when it was due.
    outstanding: VecDeque<(usize, Instant)>,
    received: usize,
}

impl Client {
    fn send(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(written) => drop(self.unsent.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads what is there; says how many commands it completed.
    fn receive(&mut self, batches: &[Batch], buffer: &mut [u8], latency: &mut Histogram<u64>) -> Result<usize, LoadError> {
        let mut completed = 0;
        loop {
            let read = match self.stream.read(buffer) {
                Ok(0) => return Err(LoadError::Closed),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(completed),
                Err(error) => return Err(error.into()),
            };
            let now = Instant::now();
            let mut rest = &buffer[..read];
            while !rest.is_empty() {
                let Some((batch, due)) = self.outstanding.front().copied() else {
                    return compare(&[], 0, rest).map(|()| completed);
                };
                let replies = &batches[batch].replies;
                let take = rest.len().min(replies.len() - self.received);
                compare(replies, self.received, &rest[..take])?;
                self.received += take;
                rest = &rest[take..];
                if self.received == replies.len() {
                    latency.saturating_record((now - due).as_nanos() as u64);
                    self.outstanding.pop_front();
                    self.received = 0;
                    completed += 1;
                }
            }
            if read < buffer.len() {
                return Ok(completed);
            }
        }
    }
}

/// Runs for `measured`, then until all are answered. Latencies in nanoseconds. The thread never sleeps: it would oversleep.
pub fn run(address: SocketAddr, workload: &Workload, rate: f64, measured: Duration) -> Result<Histogram<u64>, LoadError> {
    let batches = &workload.batches;
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(1024);
    let mut buffer = vec![0; 64 * 1024];
    let mut clients: Vec<Client> = connect(&poll, address, workload.connections)?
        .into_iter()
        .map(|stream| Client { stream, unsent: Vec::new(), outstanding: VecDeque::new(), received: 0 })
        .collect();
    let mut latency = histogram();
    let mut random = fastrand::Rng::with_seed(7);
    let start = Instant::now();
    let (mut due, mut last_progress) = (start, start);
    let (mut sent, mut answered) = (0usize, 0usize);
    loop {
        let now = Instant::now();
        while due <= now && due - start < measured {
            let client = &mut clients[sent % workload.connections];
            let batch = sent % batches.len();
            client.unsent.extend_from_slice(&batches[batch].request);
            client.outstanding.push_back((batch, due));
            client.send()?;
            sent += 1;
            due += Duration::from_secs_f64(-(1.0 - random.f64()).ln() / rate);
        }
        poll.poll(&mut events, Some(Duration::ZERO))?;
        for event in &events {
            let client = &mut clients[event.token().0];
            client.send()?;
            answered += client.receive(batches, &mut buffer, &mut latency)?;
            last_progress = now;
        }
        match sent - answered {
            0 if due - start >= measured => return Ok(latency),
            outstanding if outstanding > MOST_OUTSTANDING => return Err(LoadError::Overrun),
            _ if now - last_progress > STALL => return Err(LoadError::Stalled),
            _ => {}
        }
    }
}
