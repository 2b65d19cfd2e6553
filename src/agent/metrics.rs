//! The server's figures for Prometheus, under the names that dashboards for redis_exporter use, and the agent's own.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::board::{Board, Known};
use super::info::{Info, Role};
use crate::policy::agent::ServerPhase;

/// Gauges that are fields of `INFO`: field, name, help.
const GAUGES: &[(&str, &str, &str)] = &[
    ("uptime_in_seconds", "redis_uptime_in_seconds", "Seconds since the server started"),
    ("connected_clients", "redis_connected_clients", "Clients that are connected"),
    ("blocked_clients", "redis_blocked_clients", "Clients that wait in a blocking command"),
    ("maxclients", "redis_config_maxclients", "The most clients"),
    ("used_memory", "redis_memory_used_bytes", "Memory in use"),
    ("used_memory_rss", "redis_memory_used_rss_bytes", "Memory that is resident"),
    ("used_memory_peak", "redis_memory_used_peak_bytes", "The most memory that was in use"),
    ("used_memory_dataset", "redis_memory_used_dataset_bytes", "Memory that holds data"),
    ("maxmemory", "redis_memory_max_bytes", "The bound on memory"),
    ("mem_fragmentation_ratio", "redis_mem_fragmentation_ratio", "Resident memory over memory in use"),
    ("connected_slaves", "redis_connected_slaves", "Replicas that are connected"),
    ("master_repl_offset", "redis_master_repl_offset", "The replication offset"),
    ("slave_repl_offset", "redis_slave_repl_offset", "The replication offset of a replica"),
    ("master_last_io_seconds_ago", "redis_master_last_io_seconds_ago", "Seconds since the primary was heard"),
    ("master_sync_in_progress", "redis_master_sync_in_progress", "Whether a whole copy is being received"),
    ("loading", "redis_loading_dump_file", "Whether data is being loaded"),
    ("rdb_changes_since_last_save", "redis_rdb_changes_since_last_save", "Changes since the last snapshot"),
    ("rdb_bgsave_in_progress", "redis_rdb_bgsave_in_progress", "Whether a snapshot is being written"),
    ("rdb_last_save_time", "redis_rdb_last_save_timestamp_seconds", "When the last snapshot was written"),
    ("aof_enabled", "redis_aof_enabled", "Whether there is an append-only file"),
    ("aof_rewrite_in_progress", "redis_aof_rewrite_in_progress", "Whether the append-only file is being rewritten"),
    ("instantaneous_ops_per_sec", "redis_instantaneous_ops_per_sec", "Commands a second, as the server samples them"),
];

/// Counters that are fields of `INFO`: field, name without `_total`, help.
const COUNTERS: &[(&str, &str, &str)] = &[
    ("total_connections_received", "redis_connections_received", "Connections that were accepted"),
    ("rejected_connections", "redis_rejected_connections", "Connections that were refused for their number"),
    ("total_commands_processed", "redis_commands_processed", "Commands that were run"),
    ("keyspace_hits", "redis_keyspace_hits", "Reads that found a key"),
    ("keyspace_misses", "redis_keyspace_misses", "Reads that found none"),
    ("expired_keys", "redis_expired_keys", "Keys that expired"),
    ("evicted_keys", "redis_evicted_keys", "Keys that were evicted"),
    ("total_net_input_bytes", "redis_net_input_bytes", "Bytes received"),
    ("total_net_output_bytes", "redis_net_output_bytes", "Bytes sent"),
    ("sync_full", "redis_replica_resyncs_full", "Whole copies that replicas asked for"),
    ("sync_partial_ok", "redis_replica_partial_resync_accepted", "Partial copies that were granted"),
    ("sync_partial_err", "redis_replica_partial_resync_denied", "Partial copies that were denied"),
    ("total_error_replies", "redis_errors", "Replies that were errors"),
    ("used_cpu_sys", "redis_cpu_sys_seconds", "Processor time in the system"),
    ("used_cpu_user", "redis_cpu_user_seconds", "Processor time in the server"),
];

/// Everything in the OpenMetrics text format. Empty only where formatting fails, which it does not.
pub fn render(board: &Arc<Board>) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Figures(board.read())));
    let mut out = String::new();
    match text::encode(&mut out, &registry) {
        Ok(()) => out,
        Err(fmt::Error) => String::new(),
    }
}

#[derive(Debug)]
struct Figures(Known);

type Labels<'a> = [(&'static str, &'a str)];

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let known = &self.0;
        gauge(&mut encoder, "redis_up", "Whether the server answers", known.info.is_some().into(), &[])?;
        if let Some(info) = &known.info {
            encode_info(&mut encoder, info)?;
        }
        encode_agent(&mut encoder, known)
    }
}

fn encode_info(encoder: &mut DescriptorEncoder<'_>, info: &Info) -> fmt::Result {
    for (field, name, help) in GAUGES {
        if let Some(value) = info.number(field) {
            gauge(encoder, name, help, value, &[])?;
        }
    }
    for (field, name, help) in COUNTERS {
        if let Some(value) = info.number(field) {
            counter(encoder, name, help, value)?;
        }
    }
    let role = match info.role() {
        Some(Role::Replica { link_up, .. }) => {
            gauge(encoder, "redis_master_link_up", "Whether the replica follows its primary", link_up.into(), &[])?;
            "slave"
        }
        _ => "master",
    };
    let version = info.text("redis_version").unwrap_or_default();
    let labels =
        [("role", role), ("redis_version", version), ("valkey_version", info.text("valkey_version").unwrap_or_default())];
    gauge(encoder, "redis_instance_info", "What the server is", 1.0, &labels)?;
    encode_databases(encoder, info)
}

fn encode_databases(encoder: &mut DescriptorEncoder<'_>, info: &Info) -> fmt::Result {
    for (name, help, field) in
        [("redis_db_keys", "Keys in a database", "keys"), ("redis_db_keys_expiring", "Keys with a TTL in a database", "expires")]
    {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (database, fields) in info.databases() {
            let value = fields.split(',').find_map(|pair| pair.strip_prefix(field)?.strip_prefix('=')?.parse::<f64>().ok());
            let labels: &Labels<'_> = &[("db", database)];
            ConstGauge::new(value.unwrap_or(0.0)).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn encode_agent(encoder: &mut DescriptorEncoder<'_>, known: &Known) -> fmt::Result {
    let held = match &known.report.server {
        ServerPhase::Held { reason, .. } => Some(reason.as_str()),
        _ => None,
    };
    let labels = [("reason", held.unwrap_or_default())];
    let labels = if held.is_some() { &labels[..] } else { &[] };
    gauge(encoder, "larder_agent_held", "Whether the server is kept from starting", f64::from(u8::from(held.is_some())), labels)?;
    let generation = known.report.generation as f64;
    gauge(encoder, "larder_agent_generation", "The generation of the configuration that was taken up", generation, &[])?;
    let problems = known.report.proved.problems.len() as f64;
    gauge(encoder, "larder_agent_unproved", "Settings, users and certificates that could not be proved", problems, &[])?;
    let counts = known.counts;
    for (name, help, count) in [
        ("larder_agent_server_starts", "Starts of the server's process", counts.starts),
        ("larder_agent_handovers", "Handovers that ended with another primary", counts.handovers),
        ("larder_agent_handovers_aborted", "Handovers that were given up", counts.handovers_aborted),
        ("larder_agent_refusals", "Parts of the configuration that the server refused, each time", counts.refusals),
    ] {
        counter(encoder, name, help, count as f64)?;
    }
    Ok(())
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64, labels: &Labels<'_>) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    if labels.is_empty() {
        return ConstGauge::new(value).encode(family);
    }
    ConstGauge::new(value).encode(family.encode_family(&labels)?)
}

fn counter(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    ConstCounter::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_the_names_that_dashboards_know() {
        let board = Arc::new(Board::new(0));
        assert!(render(&board).contains("redis_up 0"));
        board.update(|known| {
            known.info = Some(Info::parse(
                "redis_version:7.0.15\nrole:slave\nmaster_host:h\nmaster_port:1\nmaster_link_status:up\nconnected_clients:3\n\
                 used_memory:1024\nkeyspace_hits:7\nused_cpu_sys:0.5\ndb0:keys=3,expires=1,avg_ttl=9\n",
            ));
        });
        let text = render(&board);
        for line in [
            "redis_up 1",
            "redis_connected_clients 3",
            "redis_memory_used_bytes 1024",
            "redis_keyspace_hits_total 7",
            "redis_cpu_sys_seconds_total 0.5",
            "redis_master_link_up 1",
            "redis_db_keys{db=\"db0\"} 3",
            "redis_db_keys_expiring{db=\"db0\"} 1",
            "redis_instance_info{role=\"slave\",redis_version=\"7.0.15\",valkey_version=\"\"} 1",
            "larder_agent_held 0",
        ] {
            let found = text.lines().any(|found| found == line || found.strip_suffix(".0") == Some(line));
            assert!(found, "{line} is not in\n{text}");
        }
        board.update(|known| {
            known.report.server = ServerPhase::Held { reason: "PeerAhead".into(), message: String::new() };
        });
        assert!(render(&board).contains("larder_agent_held{reason=\"PeerAhead\"} 1"));
    }
}
