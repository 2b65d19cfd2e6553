//! Each connection sends a batch, waits for its replies, and sends the next: the greatest throughput. One thread, one epoll; every
//! byte of every reply is compared.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::{Events, Poll};

use crate::load::{Batch, LoadError, STALL, Workload, compare, connect, histogram};

/// What was measured, warm-up excluded.
pub struct Sample {
    pub requests: u64,
    pub elapsed: Duration,
    /// Of a whole batch, in nanoseconds.
    pub latency: Histogram<u64>,
}

struct Client {
    stream: TcpStream,
    batch: usize,
    unsent: usize,
    received: usize,
    sent_at: Instant,
}

impl Client {
    fn start_batch(&mut self, batches: &[Batch], now: Instant) -> io::Result<()> {
        self.batch = (self.batch + 1) % batches.len();
        self.unsent = batches[self.batch].request.len();
        self.received = 0;
        self.sent_at = now;
        self.send(batches)
    }

    fn send(&mut self, batches: &[Batch]) -> io::Result<()> {
        let request = &batches[self.batch].request;
        while self.unsent > 0 {
            match self.stream.write(&request[request.len() - self.unsent..]) {
                Ok(written) => self.unsent -= written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads what is there. Gives the latency of each batch that was completed to `done`.
    fn turn(&mut self, batches: &[Batch], buffer: &mut [u8], mut done: impl FnMut(Duration)) -> Result<(), LoadError> {
        if self.unsent > 0 {
            self.send(batches)?;
        }
        loop {
            let read = match self.stream.read(buffer) {
                Ok(0) => return Err(LoadError::Closed),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            compare(&batches[self.batch].replies, self.received, &buffer[..read])?;
            self.received += read;
            if self.received == batches[self.batch].replies.len() {
                let now = Instant::now();
                done(now - self.sent_at);
                // Nothing more can be there before the next batch is out.
                return Ok(self.start_batch(batches, now)?);
            }
            if read < buffer.len() {
                return Ok(());
            }
        }
    }
}

/// Runs `workload` for `warm_up` and then for `measured`. `edge` is called at the start and at the end of the measured time.
pub fn run(
    address: SocketAddr,
    workload: &Workload,
    warm_up: Duration,
    measured: Duration,
    mut edge: impl FnMut(),
) -> Result<Sample, LoadError> {
    let batches = &workload.batches;
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(1024);
    let mut buffer = vec![0; 64 * 1024];
    let mut latency = histogram();
    let mut clients = start(&poll, address, workload)?;
    let start = Instant::now();
    let mut last_progress = start;
    let mut begun: Option<Instant> = None;
    loop {
        poll.poll(&mut events, Some(Duration::from_millis(100)))?;
        for event in &events {
            let took = |took: Duration| latency.saturating_record(took.as_nanos() as u64);
            clients[event.token().0].turn(batches, &mut buffer, took)?;
        }
        let now = Instant::now();
        if !events.is_empty() {
            last_progress = now;
        } else if now - last_progress > STALL {
            return Err(LoadError::Stalled);
        }
        match begun {
            None if now - start >= warm_up => {
                latency.clear();
                edge();
                begun = Some(Instant::now());
            }
            Some(begun) if now - begun >= measured => {
                edge();
                return Ok(Sample { requests: latency.len() * workload.pipeline as u64, elapsed: now - begun, latency });
            }
            _ => {}
        }
    }
}

fn start(poll: &Poll, address: SocketAddr, workload: &Workload) -> io::Result<Vec<Client>> {
    let streams = connect(poll, address, workload.connections)?.into_iter().enumerate();
    let mut clients: Vec<Client> = streams
        .map(|(number, stream)| Client {
            stream,
            batch: number * 7 % workload.batches.len(),
            unsent: 0,
            received: 0,
            sent_at: Instant::now(),
        })
        .collect();
    clients.iter_mut().try_for_each(|client| client.start_batch(&workload.batches, Instant::now()))?;
    Ok(clients)
}
