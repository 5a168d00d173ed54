//! What a scheduler without a mirror shows at its admin address.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use hawker_proxy::admin::{Status, StatusSource};
use hawker_scheduler::{Numbers, SchedulerConfig};

/// Status and metrics of one scheduler. Cheap to share.
pub(crate) struct SchedulerPage {
    name: String,
    cluster: String,
    started: Instant,
    numbers: Arc<Numbers>,
}

impl SchedulerPage {
    /// Of the scheduler that is about to run with this configuration.
    pub(crate) fn new(config: &SchedulerConfig) -> Arc<Self> {
        let numbers = Arc::clone(&config.numbers);
        let (name, cluster) = (config.name.clone(), config.cluster.clone());
        Arc::new(Self { name, cluster, started: Instant::now(), numbers })
    }

    /// The OpenMetrics text.
    pub(crate) fn metrics(&self) -> String {
        let n = &self.numbers;
        let gauges = [
            ("peers", "Peers and seeds", &n.peers),
            ("tasks", "Tasks of which something is known", &n.tasks),
            ("isolated", "Isolated peers", &n.isolated),
            ("streams", "Open streams", &n.streams),
        ];
        let counters = [
            ("isolated_wrong_bytes", "Peers isolated for wrong bytes", &n.isolated_for_wrong_bytes),
            ("isolated_stalled", "Peers isolated because they stalled", &n.isolated_for_stalls),
            (
                "isolated_contradiction",
                "Peers isolated because they sealed two tables of one task",
                &n.isolated_for_contradictions,
            ),
            ("messages_received", "Messages received", &n.received),
            ("messages_sent", "Messages sent", &n.sent),
            ("streams_dropped", "Streams closed because their peer read too slowly", &n.dropped),
            ("joins", "Nodes that joined", &n.joins),
            ("joins_refused", "Attempts to join that were refused", &n.joins_refused),
        ];
        let mut out = String::new();
        gauges.iter().for_each(|metric| sample(&mut out, "gauge", "", metric));
        counters.iter().for_each(|metric| sample(&mut out, "counter", "_total", metric));
        out.push_str("# EOF\n");
        out
    }
}

fn sample(out: &mut String, kind: &str, end: &str, (name, help, number): &(&str, &str, &AtomicU64)) {
    let value = number.load(Ordering::Relaxed);
    let name = format!("hawker_scheduler_{name}");
    // Writing to a string does not fail.
    let _ = writeln!(out, "# HELP {name} {help}.\n# TYPE {name} {kind}\n{name}{end} {value}");
}

impl StatusSource for SchedulerPage {
    fn status(&self) -> Status {
        Status {
            name: self.name.clone(),
            role: "scheduler".to_owned(),
            cluster: self.cluster.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_s: self.started.elapsed().as_secs(),
            ready: true,
            ..Status::default()
        }
    }
}
