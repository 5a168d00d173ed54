//! The page of a scheduler without a mirror at its admin address.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use hawker_core::application::{Label, Labels};
use hawker_proxy::admin::{ApplicationStatus, MemberStatus, Status, StatusSource};
use hawker_scheduler::{Isolation, Numbers, SchedulerConfig};

/// The application, the number of its elected peers, the number that had to wait.
type ElectionsOf = (Labels, usize, u64);

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
        Arc::new(Self {
            name,
            cluster,
            started: Instant::now(),
            numbers,
        })
    }

    /// The OpenMetrics text, without its end.
    pub(crate) fn metrics(&self) -> String {
        let n = &self.numbers;
        let gauges = [
            ("peers", "Peers and seeds", &n.peers),
            ("tasks", "Tasks of which something is known", &n.tasks),
            ("isolated_peers", "Isolated peers", &n.isolated),
            ("streams", "Open streams", &n.streams),
        ];
        let counters = [
            ("messages_received", "Messages received", &n.received),
            ("messages_sent", "Messages sent", &n.sent),
            (
                "streams_dropped",
                "Streams closed because their peer read too slowly",
                &n.dropped,
            ),
            ("joins", "Nodes that joined", &n.joins),
            (
                "joins_refused",
                "Attempts to join that were refused",
                &n.joins_refused,
            ),
        ];
        let mut out = String::new();
        gauges
            .iter()
            .for_each(|metric| sample(&mut out, "gauge", "", metric));
        counters
            .iter()
            .for_each(|metric| sample(&mut out, "counter", "_total", metric));
        let name = "hawker_scheduler_isolations";
        let _ = writeln!(
            out,
            "# HELP {name} Peers isolated, by reason.\n# TYPE {name} counter"
        );
        for (reason, number) in [
            ("wrong_bytes", &n.isolated_for_wrong_bytes),
            ("stalled", &n.isolated_for_stalls),
            ("contradiction", &n.isolated_for_contradictions),
        ] {
            let value = number.load(Ordering::Relaxed);
            let _ = writeln!(out, "{name}_total{{reason=\"{reason}\"}} {value}");
        }
        let refused = n
            .refusals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len();
        let name = "hawker_scheduler_configuration_refused";
        let _ = writeln!(
            out,
            "# HELP {name} Members that refuse the pushed configuration.\n# TYPE {name} gauge"
        );
        let _ = writeln!(out, "{name} {refused}");
        let applications = n
            .applications
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (name, help, kind, end, value) in [
            (
                "elections",
                "Peers elected now",
                "gauge",
                "",
                (|one| one.1 as u64) as fn(&ElectionsOf) -> u64,
            ),
            (
                "postponed",
                "Elections that had to wait",
                "counter",
                "_total",
                |one| one.2,
            ),
        ] {
            let name = format!("hawker_scheduler_application_{name}");
            let _ = writeln!(
                out,
                "# HELP {name} {help}, where they are limited.\n# TYPE {name} {kind}"
            );
            for one in applications.iter() {
                let text = |label: &Option<Label>| {
                    label.as_ref().map(ToString::to_string).unwrap_or_default()
                };
                let (application, tag) = (text(&one.0.application), text(&one.0.tag));
                let labels = format!("application=\"{application}\",tag=\"{tag}\"");
                let _ = writeln!(out, "{name}{end}{{{labels}}} {}", value(one));
            }
        }
        out
    }

    /// How many elections had to wait, by application and tag.
    fn applications(&self) -> Vec<ApplicationStatus> {
        let applications = self
            .numbers
            .applications
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let one = |(labels, _, postponed): &ElectionsOf| ApplicationStatus {
            name: labels.to_string(),
            refused: *postponed,
            ..ApplicationStatus::default()
        };
        applications.iter().map(one).collect()
    }

    /// The members that refuse the pushed configuration, the first of them with its reason; empty if none does.
    pub(crate) fn problem(&self) -> String {
        let refusals = self
            .numbers
            .refusals
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match refusals.first() {
            Some((name, reason)) => format!(
                "{} member(s) refuse the configuration that this scheduler pushes ([nodes], [[application]]), for example {name}: \
                 {reason}",
                refusals.len()
            ),
            None => String::new(),
        }
    }

    /// The isolated members with the reasons; the others are listed by the nodes.
    fn isolated(&self) -> Vec<MemberStatus> {
        let isolations = self
            .numbers
            .isolations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let member = |isolation: &Isolation| MemberStatus {
            name: isolation.name.clone(),
            peer_id: isolation.peer.to_string(),
            isolated: true,
            isolated_for: isolation.reason.to_string(),
            isolated_for_s: isolation
                .until
                .saturating_duration_since(Instant::now())
                .as_secs(),
            ..MemberStatus::default()
        };
        isolations.iter().map(member).collect()
    }
}

fn sample(
    out: &mut String,
    kind: &str,
    end: &str,
    (name, help, number): &(&str, &str, &AtomicU64),
) {
    let value = number.load(Ordering::Relaxed);
    let name = format!("hawker_scheduler_{name}");
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "# HELP {name} {help}.\n# TYPE {name} {kind}\n{name}{end} {value}"
    );
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
            problem: self.problem(),
            members: self.isolated(),
            applications: self.applications(),
            ..Status::default()
        }
    }
}
