//! What is compared: one Redis, and the proxies in front of it, each with one thread for its work.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::load::{KEYS, encode, key, value};
use crate::processes::{Process, ask, free_address};

/// What a target is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Direct,
    Nutcracker,
    Haproxy,
    Envoy,
    /// A rule that leaves the keys alone.
    LarderBypass,
    /// A rule that gives them a TTL.
    LarderTtl,
    /// The same as the last of a hundred.
    LarderHundredRules,
    /// A read-through rule; every read is a hit.
    LarderReadThrough,
    /// A cache-aside rule with leases, stale copies and early expiry; every read is a hit.
    LarderCacheAside,
}

impl Kind {
    pub const ALL: [Self; 9] = [
        Self::Direct,
        Self::Nutcracker,
        Self::Haproxy,
        Self::Envoy,
        Self::LarderBypass,
        Self::LarderTtl,
        Self::LarderHundredRules,
        Self::LarderReadThrough,
        Self::LarderCacheAside,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Nutcracker => "nutcracker",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
            Self::LarderBypass => "larder-bypass",
            Self::LarderTtl => "larder-ttl",
            Self::LarderHundredRules => "larder-100-rules",
            Self::LarderReadThrough => "larder-read-through",
            Self::LarderCacheAside => "larder-cache-aside",
        }
    }

    pub fn is_larder(self) -> bool {
        self.name().starts_with("larder")
    }

    /// The targets that `words` name; `larder` names all of Larder's.
    pub fn select(words: &[String]) -> Result<Vec<Self>, String> {
        let known = |word: &str| word == "larder" || Self::ALL.iter().any(|kind| kind.name() == word);
        if let Some(unknown) = words.iter().find(|word| !known(word)) {
            let names: Vec<&str> = Self::ALL.iter().map(|kind| kind.name()).collect();
            return Err(format!("there is no target `{unknown}`: use larder (all of its rows), {}", names.join(", ")));
        }
        let wanted = |kind: &Self| words.iter().any(|word| word == kind.name() || (word == "larder" && kind.is_larder()));
        Ok(Self::ALL.into_iter().filter(wanted).collect())
    }
}

/// Where the programs are.
#[derive(Debug, Clone)]
pub struct Programs {
    pub redis_server: PathBuf,
    pub nutcracker: PathBuf,
    pub haproxy: PathBuf,
    pub envoy: PathBuf,
    pub larderd: PathBuf,
    /// What runs `larderd`, such as an instruction counter. Empty: nothing.
    pub wrapper: Vec<String>,
}

/// One Redis with a full key space, and the sentinel that knows it.
pub struct Upstream {
    pub address: SocketAddr,
    pub redis: Process,
    sentinel_address: SocketAddr,
    sentinel: Process,
}

impl Upstream {
    pub fn start(programs: &Programs, dir: &Path) -> Result<Self, String> {
        let (address, sentinel_address) = (free_address()?, free_address()?);
        let config = format!("bind 127.0.0.1\nport {}\nsave \"\"\nappendonly no\ndir {}\n", address.port(), dir.display());
        let redis = start(&programs.redis_server, &[], "redis", &config, dir, address)?;
        let config = format!(
            "bind 127.0.0.1\nport {}\ndir {}\nprotected-mode no\nsentinel monitor bench 127.0.0.1 {} 1\n",
            sentinel_address.port(),
            dir.display(),
            address.port()
        );
        let sentinel = start(&programs.redis_server, &["--sentinel"], "sentinel", &config, dir, sentinel_address)?;
        let upstream = Self { address, redis, sentinel_address, sentinel };
        upstream.fill()?;
        Ok(upstream)
    }

    /// Stores every key, with a day to live: under a rule no key is without a TTL.
    fn fill(&self) -> Result<(), String> {
        for numbers in (0..KEYS).collect::<Vec<_>>().chunks(500) {
            let request: Vec<u8> =
                numbers.iter().flat_map(|number| encode(&["SET", &key(*number), &value(*number), "EX", "86400"])).collect();
            let reply = ask(self.address, &request, numbers.len() * 5).map_err(|error| format!("filling: {error}"))?;
            if reply != "+OK\r\n".repeat(numbers.len()) {
                return Err(format!("filling: {reply}"));
            }
        }
        Ok(())
    }

    pub fn pids(&self) -> [u32; 2] {
        [self.redis.pid(), self.sentinel.pid()]
    }
}

/// Writes `config` and starts `program` with it as first argument.
fn start(program: &Path, after: &[&str], name: &str, config: &str, dir: &Path, at: SocketAddr) -> Result<Process, String> {
    let file = dir.join(format!("{name}.conf"));
    fs::write(&file, config).map_err(|error| format!("{}: {error}", file.display()))?;
    let mut command = Command::new(program);
    command.arg(&file).args(after);
    launch(command, name, dir, at)
}

fn launch(command: Command, name: &str, dir: &Path, at: SocketAddr) -> Result<Process, String> {
    let log = dir.join(format!("{name}.log"));
    let mut process = Process::start(command, &log)?;
    process.await_pong(at, &log)?;
    Ok(process)
}

/// A running target.
pub struct Target {
    pub kind: Kind,
    pub address: SocketAddr,
    /// Absent for `direct`.
    pub process: Option<Process>,
    log: PathBuf,
}

impl Target {
    pub fn start(kind: Kind, programs: &Programs, upstream: &Upstream, dir: &Path) -> Result<Self, String> {
        if kind == Kind::Direct {
            return Ok(Self { kind, address: upstream.address, process: None, log: dir.join("redis.log") });
        }
        let address = free_address()?;
        let file = dir.join(format!("{}.conf", kind.name()));
        let (text, command) = match kind {
            Kind::Nutcracker => (nutcracker_config(address, upstream), nutcracker(programs, &file)?),
            Kind::Haproxy => (haproxy_config(address, upstream), haproxy(programs, &file)),
            Kind::Envoy => (envoy_config(address, upstream), envoy(programs, &file)),
            _ => (snapshot(kind, upstream), larderd(programs, &file, address, dir)),
        };
        fs::write(&file, text).map_err(|error| format!("{}: {error}", file.display()))?;
        let process = launch(command, kind.name(), dir, address)?;
        let log = dir.join(format!("{}.log", kind.name()));
        let target = Self { kind, address, process: Some(process), log };
        target.prove_ttl(upstream)?;
        Ok(target)
    }

    /// Whether the rule is on: a key that is set through the target has a TTL afterwards, or has none, as its row claims.
    fn prove_ttl(&self, upstream: &Upstream) -> Result<(), String> {
        let key = key(0);
        let failed = |error| format!("{}: {error}", self.kind.name());
        let stored = ask(self.address, &encode(&["SET", &key, &value(0)]), 5).map_err(failed)?;
        let ttl = ask(upstream.address, &encode(&["PTTL", &key]), 5).map_err(failed)?;
        let has_ttl = !ttl.starts_with(":-");
        let claimed = self.kind.is_larder() && self.kind != Kind::LarderBypass;
        match stored == "+OK\r\n" && has_ttl == claimed {
            true => Ok(()),
            false => Err(format!("{}: after SET ({stored:?}) the key's PTTL is {ttl:?}", self.kind.name())),
        }
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// The end of its log, to be shown with a failure.
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(5).collect();
        tail.into_iter().rev().map(|line| format!("\n  {line}")).collect()
    }
}

fn nutcracker(programs: &Programs, file: &Path) -> Result<Command, String> {
    let mut command = Command::new(&programs.nutcracker);
    command.arg("-c").arg(file).args(["-v", "4", "-a", "127.0.0.1", "-s", &free_address()?.port().to_string()]);
    Ok(command)
}

fn nutcracker_config(listen: SocketAddr, upstream: &Upstream) -> String {
    format!(
        "bench:\n  listen: {listen}\n  redis: true\n  hash: fnv1a_64\n  distribution: ketama\n  preconnect: true\n  \
         servers:\n   - {}:1\n",
        upstream.address
    )
}

fn haproxy(programs: &Programs, file: &Path) -> Command {
    let mut command = Command::new(&programs.haproxy);
    command.arg("-db").arg("-f").arg(file);
    command
}

fn haproxy_config(listen: SocketAddr, upstream: &Upstream) -> String {
    format!(
        "global\n  nbthread 1\n  maxconn 4000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
         listen bench\n  bind {listen}\n  server redis {}\n",
        upstream.address
    )
}

fn envoy(programs: &Programs, file: &Path) -> Command {
    let mut command = Command::new(&programs.envoy);
    command.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "error", "-c"]).arg(file);
    command
}

/// JSON is YAML.
fn envoy_config(listen: SocketAddr, upstream: &Upstream) -> String {
    let socket = |address: SocketAddr| json!({"socket_address": {"address": address.ip(), "port_value": address.port()}});
    let proxy = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.redis_proxy.v3.RedisProxy",
        "stat_prefix": "bench",
        "settings": {"op_timeout": "5s"},
        "prefix_routes": {"catch_all_route": {"cluster": "redis"}},
    });
    let endpoint = json!({"endpoint": {"address": socket(upstream.address)}});
    json!({"static_resources": {
        "listeners": [{"address": socket(listen), "filter_chains": [{"filters": [
            {"name": "envoy.filters.network.redis_proxy", "typed_config": proxy}]}]}],
        "clusters": [{"name": "redis", "type": "STATIC", "connect_timeout": "5s",
            "load_assignment": {"cluster_name": "redis", "endpoints": [{"lb_endpoints": [endpoint]}]}}],
    }})
    .to_string()
}

fn larderd(programs: &Programs, file: &Path, listen: SocketAddr, dir: &Path) -> Command {
    let mut words = programs.wrapper.iter().cloned().chain([programs.larderd.display().to_string()]);
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).arg("sidecar").arg("--snapshot").arg(file).args(["--listen", &listen.to_string()]).current_dir(dir);
    command
}

/// The policy document that makes the sidecar `kind`.
fn snapshot(kind: Kind, upstream: &Upstream) -> String {
    let ttl = json!({"default": "1h", "max": "24h", "jitter": "10%"});
    let aside = json!({"cacheAside": {"ttl": ttl}});
    let rule = |name: String, keys: String, strategy| json!({"name": name, "keys": keys, "strategy": strategy});
    let strategy = match kind {
        Kind::LarderBypass => json!({"bypass": {}}),
        Kind::LarderReadThrough => json!({"readThrough": {
            "ttl": ttl, "stale": "0s", "negativeTtl": "10s", "lease": "3s", "wait": "1s",
            "load": {"origin": "unused", "query": {"http": {"path": "/{id}"}}, "reply": null},
        }}),
        Kind::LarderCacheAside => json!({"cacheAside": {
            "ttl": ttl, "stale": "1m",
            "stampede": {"lease": "3s", "wait": "1s", "earlyExpiry": 1.0, "atWaitEnd": "error"},
        }}),
        _ => aside.clone(),
    };
    let others = if kind == Kind::LarderHundredRules { 99 } else { 0 };
    let others = (0..others).map(|number| rule(format!("other-{number}"), format!("b{number}:{{id}}"), aside.clone()));
    let rules: Vec<_> = others.chain([rule("bench".to_owned(), "bench:{id}".to_owned(), strategy)]).collect();
    // No load ever reaches this origin: port 1 answers nobody, and a miss would fail the run.
    let origin = json!({"name": "unused", "kind": {"http": {"url": {"value": "http://127.0.0.1:1"}}},
        "maxConnections": 1, "connectTimeout": "1s", "timeout": "1s"});
    json!({
        "version": 1, "requires": 1, "generation": 1,
        "cluster": {"name": "bench", "topology": {"sentinel": {"master": "bench", "sentinels": [upstream.sentinel_address]}}},
        "unmatched": {"bypass": {}}, "origins": [origin], "rules": rules,
    })
    .to_string()
}
