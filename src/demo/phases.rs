//! The three phases: each the same load in the same order, with everything that it needs started before and stopped after.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::client::{self, Aside, Client, ClientError, Direct, Through};
use super::keyspace::Family;
use super::load::{Load, Tally};
use super::origin::{self, Record};
use super::process::{PlainRedis, Tier, write_manifests};
use super::{DemoError, Setting};

/// What applications do for their data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// They ask the database.
    None,
    /// They ask a cache, and the database where that has nothing.
    Aside,
    /// They ask Larder.
    Larder,
}

impl Kind {
    /// In the order in which they run.
    pub const ALL: [Self; 3] = [Self::None, Self::Aside, Self::Larder];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Aside => "aside",
            Self::Larder => "larder",
        })
    }
}

/// How a phase went.
#[derive(Debug)]
pub struct Phase {
    /// Which it was.
    pub kind: Kind,
    /// The open loop.
    pub open: Tally,
    /// The queries of the open loop.
    pub records: Vec<Record>,
    /// When the open loop began.
    pub start: Instant,
    /// Replies that were wrong or too old, in both loops.
    pub wrong: u64,
    /// The closed loop.
    pub closed: Tally,
    /// The queries of the closed loop.
    pub closed_records: Vec<Record>,
}

impl Phase {
    /// The share of answered requests that needed no query of their own.
    pub fn hit_ratio(&self) -> f64 {
        if self.open.answered == 0 {
            return 0.0;
        }
        (1.0 - self.records.len() as f64 / self.open.answered as f64).max(0.0)
    }

    /// How often the board that was loaded least was loaded: it expired once less.
    pub fn board_loads(&self, setting: &Setting) -> usize {
        let boards = &setting.keyspace.entities[..setting.keyspace.boards];
        let loads = boards.iter().map(|board| {
            let query = board.path();
            self.records.iter().filter(|record| *record.query == *query).count()
        });
        loads.min().unwrap_or_default()
    }

    /// A latency of the open loop, in milliseconds.
    pub fn latency_ms(&self, quantile: f64) -> f64 {
        millis(&self.open.latency_us, quantile)
    }
}

/// The quantile of a histogram of microseconds, in milliseconds.
pub fn millis(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1000.0
}

/// What a phase has running, so that it ends with the phase.
enum Servers {
    None,
    Aside(PlainRedis),
    Larder(Tier),
}

/// Runs one phase, its open loop and then its closed loop.
///
/// # Errors
/// Where a server does not start, or the user interrupts.
pub fn run(kind: Kind, setting: &Setting) -> Result<Phase, DemoError> {
    let servers = start(kind, setting)?;
    fill(&servers, setting)?;
    let recorder = &setting.origin.recorder;
    let load = Load {
        keyspace: &setting.keyspace,
        keys: &setting.keys,
        schedule: &setting.schedule,
        truth: &setting.origin.truth,
        stop: &setting.stop,
        live: &setting.live,
    };
    recorder.take();
    let start = Instant::now();
    setting.display.begin(kind, "open loop", setting.schedule.length);
    let open = load.run_open(clients(&servers, setting)?)?;
    let records = recorder.take();
    setting.display.begin(kind, "closed loop", setting.config.closed_length());
    let closed = load.run_closed(clients(&servers, setting)?, setting.config.closed_length())?;
    let closed_records = recorder.take();
    setting.display.end();
    setting.check_interrupted()?;
    let longest = origin::longest(&records).max(origin::longest(&closed_records));
    let allowed = |family: Family| match kind {
        Kind::None => Duration::ZERO,
        Kind::Aside | Kind::Larder => setting.config.ttls.of(family) + longest + setting.config.way_back(),
    };
    let wrong = open.wrong(allowed) + closed.wrong(allowed);
    Ok(Phase { kind, open, records, start, wrong, closed, closed_records })
}

fn start(kind: Kind, setting: &Setting) -> Result<Servers, DemoError> {
    let logs: &Path = &setting.config.report;
    Ok(match kind {
        Kind::None => Servers::None,
        Kind::Aside => Servers::Aside(PlainRedis::start(&setting.config.server_program(), logs)?),
        Kind::Larder => {
            let manifests = setting.work.path().join("manifests");
            write_manifests(&manifests, setting.origin.address, setting.config.ttls)?;
            let server = setting.config.server.as_deref();
            Servers::Larder(Tier::start(&setting.config.larder, &manifests, logs, setting.config.sidecars, server)?)
        }
    })
}

/// The nightly job: one statement finds the history of every flight, and it goes into the cache. Both cached phases begin with a
/// cache that has been in use, as caches have; the boards are never filled, only loaded.
fn fill(servers: &Servers, setting: &Setting) -> Result<(), DemoError> {
    let (url, ttl) = match servers {
        Servers::None => return Ok(()),
        Servers::Aside(redis) => (redis.url(), Some(setting.config.ttls.flight)),
        // Without a TTL: Larder gives each key that of its rule.
        Servers::Larder(tier) => (tier.urls.first().cloned().unwrap_or_default(), None),
    };
    let history = setting.origin.history()?;
    client::fill(&url, &history, ttl)?;
    Ok(())
}

fn clients(servers: &Servers, setting: &Setting) -> Result<Vec<Box<dyn Client>>, ClientError> {
    let origin = setting.origin.address;
    (0..setting.config.clients)
        .map(|index| {
            Ok(match servers {
                Servers::None => Box::new(Direct::new(origin)) as Box<dyn Client>,
                Servers::Aside(redis) => Box::new(Aside::new(&redis.url(), origin, setting.config.ttls)?),
                Servers::Larder(tier) => Box::new(Through::new(&tier.urls[index % tier.urls.len()])?),
            })
        })
        .collect()
}
