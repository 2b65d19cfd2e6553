//! The phases: each the same load in the same order, with everything that it needs started before and stopped after.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::client::{self, Aside, Client, ClientError, Direct, Through};
use super::keyspace::Family;
use super::load::{Load, Tally};
use super::process::{Manifests, PlainRedis, Rules, Tier, Told};
use super::records::{self, Record, now_us};
use super::{DemoError, Setting};

/// The phases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Applications ask the database.
    None,
    /// They ask a cache, and the database where that has nothing.
    Aside,
    /// The same, and the cache is Larder, which only observes: it changes nothing, and predicts what it would save.
    Observe,
    /// The same, and the cache is Larder: what its sidecars answer with nil, one client loads.
    #[serde(rename = "aside+larder")]
    AsideLarder,
    /// They ask Larder, which asks the database.
    Larder,
}

/// What an application does for a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Application {
    /// A query.
    Queries,
    /// GET, and where that is nil a query and SET.
    Aside,
    /// GET.
    Reads,
}

/// What answers its GET.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cache {
    /// Nothing: it sends none.
    Absent,
    /// A plain server.
    Plain,
    /// Sidecars under these rules.
    Sidecars(Rules),
}

impl Kind {
    /// In the order in which they run.
    pub const ALL: [Self; 5] = [Self::None, Self::Aside, Self::Observe, Self::AsideLarder, Self::Larder];

    /// As it is written in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Aside => "aside",
            Self::Observe => "observe",
            Self::AsideLarder => "aside+larder",
            Self::Larder => "larder",
        }
    }

    const fn layout(self) -> (Application, Cache) {
        match self {
            Self::None => (Application::Queries, Cache::Absent),
            Self::Aside => (Application::Aside, Cache::Plain),
            Self::Observe => (Application::Aside, Cache::Sidecars(Rules::Observe)),
            Self::AsideLarder => (Application::Aside, Cache::Sidecars(Rules::CacheAside)),
            Self::Larder => (Application::Reads, Cache::Sidecars(Rules::ReadThrough)),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One load of a phase.
#[derive(Debug)]
pub struct Run {
    /// What became of its requests.
    pub tally: Tally,
    /// The queries that it caused.
    pub records: Vec<Record>,
}

/// How a phase went.
#[derive(Debug)]
pub struct Phase {
    /// Which it was.
    pub kind: Kind,
    /// When the open loop began, in microseconds since 1970.
    pub start_us: u64,
    /// The open loop.
    pub open: Run,
    /// What sidecars told of the open loop in their metrics, where there were any.
    pub told: Option<Told>,
    /// The closed loop.
    pub closed: Run,
    /// Replies that were wrong or too old, in both loops.
    pub wrong: u64,
    /// Queries of both loops by the records.
    pub recorded: u64,
    /// The same by the counters of whoever made them: for sidecars, of their `/metrics`.
    pub counted: u64,
}

impl Phase {
    /// The share of answered requests that needed no query of their own.
    pub fn hit_ratio(&self) -> f64 {
        if self.open.tally.answered == 0 {
            return 0.0;
        }
        (1.0 - self.open.records.len() as f64 / self.open.tally.answered as f64).max(0.0)
    }

    /// How often the board that was loaded least was loaded: it expired once less.
    pub fn board_loads(&self, setting: &Setting) -> usize {
        let boards = &setting.keys[..setting.keyspace.boards];
        let loads = boards.iter().map(|key| self.open.records.iter().filter(|record| *record.query == **key).count());
        loads.min().unwrap_or_default()
    }

    /// A latency of the open loop, in milliseconds.
    pub fn latency_ms(&self, quantile: f64) -> f64 {
        millis(&self.open.tally.latency_us, quantile)
    }
}

/// The quantile of a histogram of microseconds, in milliseconds.
pub fn millis(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1000.0
}

/// What a phase has running, so that it ends with the phase.
enum Servers {
    None,
    Plain(PlainRedis),
    Tier(Tier),
}

impl Servers {
    fn start(cache: Cache, setting: &Setting) -> Result<Self, DemoError> {
        let logs: &Path = &setting.config.report;
        Ok(match cache {
            Cache::Absent => Self::None,
            Cache::Plain => Self::Plain(PlainRedis::start(&setting.config.server_program(), logs)?),
            Cache::Sidecars(rules) => {
                let manifests = setting.work.path().join(format!("manifests-{rules}"));
                Manifests::of(rules, setting).write(&manifests)?;
                Self::Tier(Tier::start(setting, &manifests)?)
            }
        })
    }

    /// Brings the records of the sidecars in.
    fn read_records(&self) -> std::io::Result<()> {
        match self {
            Self::Tier(tier) => tier.records.read(),
            Self::None | Self::Plain(_) => Ok(()),
        }
    }

    /// Every query so far by the counters of those who made them.
    fn counted(&self, setting: &Setting) -> Result<u64, DemoError> {
        let in_sidecars = match self {
            Self::Tier(tier) => tier.counted()?,
            Self::None | Self::Plain(_) => 0,
        };
        Ok(setting.origin.asking.counted() + in_sidecars)
    }

    fn told(&self) -> Result<Option<Told>, DemoError> {
        Ok(match self {
            Self::Tier(tier) => Some(tier.told()?),
            Self::None | Self::Plain(_) => None,
        })
    }

    /// The address of the client with this number.
    fn url(&self, client: usize) -> String {
        match self {
            Self::None => String::new(),
            Self::Plain(redis) => redis.url(),
            Self::Tier(tier) => tier.urls.get(client % tier.urls.len().max(1)).cloned().unwrap_or_default(),
        }
    }
}

/// Runs one phase, its open loop and then its closed loop.
///
/// # Errors
/// Where a server does not start, or the user interrupts.
pub fn run(kind: Kind, setting: &Setting) -> Result<Phase, DemoError> {
    let (application, cache) = kind.layout();
    let servers = Servers::start(cache, setting)?;
    fill(application, &servers, setting)?;
    let load = Load {
        keyspace: &setting.keyspace,
        keys: &setting.keys,
        schedule: &setting.schedule,
        truth: &setting.origin.truth,
        stop: &setting.stop,
        live: &setting.live,
    };
    let clients = || clients(application, &servers, setting);
    let recorder = &setting.origin.recorder;
    recorder.take();
    recorder.take_total();
    let counted_before = servers.counted(setting)?;
    let start_us = now_us();
    setting.display.begin(kind, "open loop", setting.schedule.length);
    let open = finish(load.run_open(clients()?)?, &servers, setting)?;
    let told = servers.told()?;
    setting.display.begin(kind, "closed loop", setting.config.closed_length());
    let closed = finish(load.run_closed(clients()?, setting.config.closed_length())?, &servers, setting)?;
    setting.check_interrupted()?;
    let longest = records::longest(&open.records).max(records::longest(&closed.records));
    let allowed = |family: Family| match cache {
        Cache::Absent => Duration::ZERO,
        Cache::Plain | Cache::Sidecars(_) => setting.config.ttls.of(family) + longest + setting.config.way_back(),
    };
    let wrong = open.tally.wrong(allowed) + closed.tally.wrong(allowed);
    let counted = servers.counted(setting)? - counted_before;
    Ok(Phase { kind, start_us, open, told, closed, wrong, recorded: recorder.take_total(), counted })
}

/// Takes the records that belong to a load that has ended.
fn finish(tally: Tally, servers: &Servers, setting: &Setting) -> Result<Run, DemoError> {
    let recorder = &setting.origin.recorder;
    setting.display.end();
    recorder.settle(|| servers.read_records()).map_err(DemoError::Records)?;
    Ok(Run { tally, records: recorder.take() })
}

/// The nightly job: one statement finds the history of every flight, and it goes into the cache. All cached phases begin with a
/// cache that has been in use, as caches have; the boards are never filled, only loaded.
fn fill(application: Application, servers: &Servers, setting: &Setting) -> Result<(), DemoError> {
    if matches!(servers, Servers::None) {
        return Ok(());
    }
    let ttl = match application {
        // Without a TTL: Larder gives each key that of its rule.
        Application::Reads => None,
        Application::Queries | Application::Aside => Some(setting.config.ttls.flight),
    };
    let history = setting.origin.history()?;
    client::fill(&servers.url(0), &history, ttl)?;
    Ok(())
}

fn clients(application: Application, servers: &Servers, setting: &Setting) -> Result<Vec<Box<dyn Client>>, ClientError> {
    let asking = || setting.origin.asking.clone();
    (0..setting.config.clients)
        .map(|index| {
            let url = servers.url(index);
            Ok(match application {
                Application::Queries => Box::new(Direct(asking())) as Box<dyn Client>,
                Application::Aside => Box::new(Aside::new(&url, asking(), setting.config.ttls)?),
                Application::Reads => Box::new(Through::new(&url)?),
            })
        })
        .collect()
}
