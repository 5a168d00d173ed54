//! The daemon's counters. One [`Metrics`] a process, shared by `Arc`; counting bytes is one atomic addition, no lock.
//!
//! All names begin with `hawker_`. Bytes are body bytes: no headers, no TLS.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hawker_core::message::Refusal;
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::admin::{ApplicationStatus, BytesStatus};
use crate::recent::RecentRequests;

/// A number that goes up and down, and is never negative.
pub type Level = Gauge<u64, AtomicU64>;

/// The kind of a request at the mirror: the label `kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// `/v2/`.
    Ping,
    /// A manifest, by tag or by digest.
    Manifest,
    /// A blob.
    Blob,
    /// The list of tags.
    Tags,
    /// The list of referrers.
    Referrers,
    /// Something that the forward proxy passed on.
    Passed,
    /// CONNECT.
    Tunnel,
    /// Anything else, garbage included.
    Other,
}

impl RequestKind {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ping => "ping",
            Self::Manifest => "manifest",
            Self::Blob => "blob",
            Self::Tags => "tags",
            Self::Referrers => "referrers",
            Self::Passed => "passed",
            Self::Tunnel => "tunnel",
            Self::Other => "other",
        }
    }
}

/// The source of bytes that went to a runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServedFrom {
    /// This node's store.
    Cache,
    /// A download under way.
    Flight,
    /// The origin, passed on uncached.
    Origin,
}

/// The fate of bytes of an application's pulls: the label `how`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// To clients.
    Served,
    /// From peers and seeds.
    Received,
    /// From registries, for the cluster.
    Origin,
    /// Pieces that were begun to be sent to peers.
    Uploaded,
}

impl Moved {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Received => "received",
            Self::Origin => "origin",
            Self::Uploaded => "uploaded",
        }
    }
}

/// The kind of a peer that was told to ask elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// A peer, by this node.
    Peer,
    /// This node, by a peer.
    Us,
}

/// Why: the label `reason`.
fn reason_of(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::NotHeld => "not_held",
        Refusal::Busy => "busy",
        Refusal::Draining => "draining",
        Refusal::Unable => "unable",
        Refusal::Origin(_) => "origin",
        Refusal::OriginUnreachable => "origin_unreachable",
    }
}

type Labels<const N: usize> = [(&'static str, String); N];
type Reasons = Family<[(&'static str, &'static str); 1], Counter>;

/// All counters of one daemon. Each handle shares its number with the registry that `/metrics` prints.
pub struct Metrics {
    registry: Registry,
    requests: Family<Labels<2>, Counter>,
    refused: Reasons,
    refused_by_peers: Reasons,
    /// Of applications that the configuration names, and of all others together.
    application_bytes: Family<Labels<2>, Counter>,
    application_refused: Family<Labels<1>, Counter>,

    /// The latest requests for manifests and blobs.
    pub recent: RecentRequests,

    /// `received_bytes_total{source="peers"}`: verified bytes from peers that are no seeds.
    pub received_peers: Counter,
    /// `received_bytes_total{source="seeds"}`: verified bytes from seeds.
    pub received_seeds: Counter,
    /// `received_bytes_total{source="origin"}`: bytes read from registries.
    pub received_origin: Counter,
    /// `served_bytes_total{source="cache"}`: to runtimes, from committed blobs.
    pub served_cache: Counter,
    /// `served_bytes_total{source="flight"}`: to runtimes, while the download goes on.
    pub served_flight: Counter,
    /// `served_bytes_total{source="origin"}`: to runtimes, passed through uncached.
    pub served_origin: Counter,
    /// `uploaded_bytes_total`: pieces sent to peers.
    pub uploaded: Counter,
    /// `pieces_rejected_total`: pieces that did not match their table.
    pub pieces_rejected: Counter,
    /// `tables_poisoned_total`: tables whose pieces all matched and whose digest did not.
    pub tables_poisoned: Counter,
    /// `pulls_failed_total`: requests that ended in an error or a short body that was ours or the network's fault.
    pub pulls_failed: Counter,
    /// `origin_requests_total`: requests sent to registries.
    pub origin_requests: Counter,
    /// `tags_stale_total`: tags served as they were, because the origin could not be asked where they are.
    pub tags_stale: Counter,
    /// `bodies_unfinished_total`: bodies that did not go out whole: they failed here, or the client went away.
    pub bodies_unfinished: Counter,
    /// `connections`: runtimes' connections open now.
    pub connections: Level,
    /// `connections_refused_total`: runtimes' connections turned away because there were too many.
    pub connections_refused: Counter,
    /// `connections_displaced_total`: silent or stalled connections ended for others that came.
    pub connections_displaced: Counter,
    /// `tunnels`: connections through the forward proxy whose bytes it does not look at, open now.
    pub tunnels: Level,
    /// `tunnelled_bytes_total`: carried by them, in both directions.
    pub tunnelled: Counter,
    /// `evicted_bytes_total`: taken out of the store to make room.
    pub evicted_bytes: Counter,
    /// `tasks_active`: downloads that run now.
    pub tasks_active: Level,
    /// `readers_active`: bodies being sent to runtimes now.
    pub readers_active: Level,
    /// `peers_connected`: peers with a connection now.
    pub peers_connected: Level,
    /// `peers_isolated`: peers that this node fetches nothing from, by the schedulers' word.
    pub peers_isolated: Level,
    /// `store_bytes`: bytes of committed and partial blobs.
    pub store_bytes: Level,
    /// `store_blobs`: committed blobs.
    pub store_blobs: Level,
    /// `store_degraded`: 1 while the disk refuses writes and blobs pass through memory.
    pub store_degraded: Level,
    /// `buffer_bytes`: memory that pieces hold now.
    pub buffer_bytes: Level,
    /// `first_byte_seconds`: from a blob request's head until its first body byte.
    first_byte: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Everything at zero.
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// Everything at zero, and what `register` adds: metrics that another module keeps itself. Names get the prefix too.
    pub fn with(register: impl FnOnce(&mut Registry)) -> Self {
        let mut registry = Registry::with_prefix("hawker");
        let r = &mut registry;
        r.register(
            "build",
            "The program",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        let requests = Family::default();
        r.register(
            "requests",
            "Requests at the mirror by kind and status",
            requests.clone(),
        );
        let (refused, refused_by_peers) = (Reasons::default(), Reasons::default());
        r.register(
            "refused",
            "Peers told to ask elsewhere, by reason",
            refused.clone(),
        );
        r.register(
            "refused_by_peers",
            "What peers refused, by reason",
            refused_by_peers.clone(),
        );
        for family in [&refused, &refused_by_peers] {
            // Shown from the start: a missing series is no zero.
            drop(family.get_or_create(&[("reason", reason_of(Refusal::Busy))]));
        }
        let (application_bytes, application_refused) = (Family::default(), Family::default());
        r.register(
            "application_bytes",
            "Bytes of applications' pulls",
            application_bytes.clone(),
        );
        r.register(
            "application_refused",
            "Requests told to come later, as their application had as many as it may",
            application_refused.clone(),
        );
        let received = by_source(
            r,
            "received_bytes",
            "Bytes received",
            ["peers", "seeds", "origin"],
        );
        let [received_peers, received_seeds, received_origin] = received;
        let served = by_source(
            r,
            "served_bytes",
            "Bytes sent to runtimes",
            ["cache", "flight", "origin"],
        );
        let [served_cache, served_flight, served_origin] = served;
        // 1 ms to 65 s.
        let first_byte = Histogram::new(exponential_buckets(0.001, 2.0, 17));
        r.register(
            "first_byte_seconds",
            "From a blob request to its first byte",
            first_byte.clone(),
        );
        register(r);
        Self {
            requests,
            refused,
            refused_by_peers,
            application_bytes,
            application_refused,
            recent: RecentRequests::default(),
            received_peers,
            received_seeds,
            received_origin,
            served_cache,
            served_flight,
            served_origin,
            uploaded: counter(r, "uploaded_bytes", "Bytes of pieces sent to peers"),
            pieces_rejected: counter(
                r,
                "pieces_rejected",
                "Pieces that did not match their table",
            ),
            tables_poisoned: counter(r, "tables_poisoned", "Tables that led to another digest"),
            pulls_failed: counter(
                r,
                "pulls_failed",
                "Requests of runtimes that could not be fulfilled",
            ),
            origin_requests: counter(r, "origin_requests", "Requests sent to registries"),
            tags_stale: counter(
                r,
                "tags_stale",
                "Tags served that the origin could not confirm",
            ),
            bodies_unfinished: counter(r, "bodies_unfinished", "Bodies that did not go out whole"),
            connections: level(r, "connections", "Connections of runtimes"),
            connections_refused: counter(
                r,
                "connections_refused",
                "Connections of runtimes turned away",
            ),
            connections_displaced: counter(
                r,
                "connections_displaced",
                "Silent or stalled connections ended for others",
            ),
            tunnels: level(r, "tunnels", "Tunnels through the forward proxy"),
            tunnelled: counter(
                r,
                "tunnelled_bytes",
                "Bytes carried by tunnels, in both directions",
            ),
            evicted_bytes: counter(r, "evicted_bytes", "Bytes evicted from the store"),
            tasks_active: level(r, "tasks_active", "Downloads that run"),
            readers_active: level(r, "readers_active", "Bodies being sent to runtimes"),
            peers_connected: level(r, "peers_connected", "Peers with a connection"),
            peers_isolated: level(r, "peers_isolated", "Peers that the schedulers isolate"),
            store_bytes: level(r, "store_bytes", "Bytes in the store"),
            store_blobs: level(r, "store_blobs", "Committed blobs in the store"),
            store_degraded: level(r, "store_degraded", "1 while the disk refuses writes"),
            buffer_bytes: level(r, "buffer_bytes", "Bytes of pieces in memory"),
            first_byte,
            registry,
        }
    }

    /// A request at the mirror was answered with this status.
    pub fn request(&self, kind: RequestKind, code: u16) {
        let labels = [
            ("kind", kind.as_str().to_owned()),
            ("code", code.to_string()),
        ];
        self.requests.get_or_create(&labels).inc();
    }

    /// Somebody was told to ask elsewhere.
    pub fn refused(&self, who: Refused, why: Refusal) {
        let family = match who {
            Refused::Peer => &self.refused,
            Refused::Us => &self.refused_by_peers,
        };
        family.get_or_create(&[("reason", reason_of(why))]).inc();
    }

    /// A blob's first body byte left this long after the request's head arrived.
    pub fn first_byte(&self, after: Duration) {
        self.first_byte.observe(after.as_secs_f64());
    }

    /// Bytes went to a runtime.
    pub fn served(&self, from: ServedFrom, bytes: u64) {
        let counter = match from {
            ServedFrom::Cache => &self.served_cache,
            ServedFrom::Flight => &self.served_flight,
            ServedFrom::Origin => &self.served_origin,
        };
        counter.inc_by(bytes);
    }

    /// Bytes of an application's pull were moved. `application` is one of few: see [`crate::applications`].
    pub(crate) fn application_bytes(&self, application: &str, how: Moved, bytes: u64) {
        self.application_bytes
            .get_or_create(&bytes_of(application, how))
            .inc_by(bytes);
    }

    /// A request of this application was told to come later.
    pub(crate) fn application_refused(&self, application: &str) {
        self.application_refused
            .get_or_create(&[("application", application.to_owned())])
            .inc();
    }

    /// The counts of one application.
    pub(crate) fn application(&self, name: &str) -> ApplicationStatus {
        let bytes = |how| {
            self.application_bytes
                .get(&bytes_of(name, how))
                .map_or(0, |counter| counter.get())
        };
        let refused = self
            .application_refused
            .get(&[("application", name.to_owned())]);
        ApplicationStatus {
            name: name.to_owned(),
            served: bytes(Moved::Served),
            received: bytes(Moved::Received),
            origin: bytes(Moved::Origin),
            uploaded: bytes(Moved::Uploaded),
            refused: refused.map_or(0, |counter| counter.get()),
        }
    }

    /// Counts a runtime's connection as long as the guard lives.
    pub fn connection(&self) -> Open<'_> {
        Open::count(&self.connections)
    }

    /// Counts a tunnel as long as the guard lives.
    pub fn tunnel(&self) -> Open<'_> {
        Open::count(&self.tunnels)
    }

    /// The counters that `/status` shows.
    pub fn bytes(&self) -> BytesStatus {
        let served_cache = self.served_cache.get();
        BytesStatus {
            received_peers: self.received_peers.get(),
            received_seeds: self.received_seeds.get(),
            received_origin: self.received_origin.get(),
            served: served_cache + self.served_flight.get() + self.served_origin.get(),
            served_cache,
            uploaded: self.uploaded.get(),
        }
    }

    /// Everything in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        text::encode(&mut out, &self.registry).expect("writing to a string does not fail");
        out
    }
}

/// Something that is counted as open.
pub struct Open<'a>(&'a Level);

impl<'a> Open<'a> {
    fn count(level: &'a Level) -> Self {
        level.inc();
        Self(level)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn bytes_of(application: &str, how: Moved) -> Labels<2> {
    [
        ("application", application.to_owned()),
        ("how", how.as_str().to_owned()),
    ]
}

fn counter(registry: &mut Registry, name: &str, help: &str) -> Counter {
    let counter = Counter::default();
    registry.register(name, help, counter.clone());
    counter
}

fn level(registry: &mut Registry, name: &str, help: &str) -> Level {
    let level = Level::default();
    registry.register(name, help, level.clone());
    level
}

/// One counter for each value of the label `source`, all shown from the start: a missing series is no zero.
fn by_source<const N: usize>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    sources: [&'static str; N],
) -> [Counter; N] {
    let family: Family<[(&'static str, &'static str); 1], Counter> = Family::default();
    registry.register(name, help, family.clone());
    sources.map(|source| family.get_or_create_owned(&[("source", source)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_counted_is_printed_under_its_name() {
        let metrics = Metrics::new();
        metrics.received_peers.inc_by(5);
        metrics.served_cache.inc_by(7);
        metrics.served_flight.inc_by(4);
        metrics.request(RequestKind::Blob, 206);
        metrics.request(RequestKind::Blob, 206);
        metrics.refused(Refused::Peer, Refusal::Busy);
        metrics.tasks_active.set(3);
        metrics.first_byte(Duration::from_millis(3));
        let text = metrics.encode();
        for line in [
            "hawker_received_bytes_total{source=\"peers\"} 5",
            "hawker_received_bytes_total{source=\"seeds\"} 0",
            "hawker_served_bytes_total{source=\"cache\"} 7",
            "hawker_requests_total{kind=\"blob\",code=\"206\"} 2",
            "hawker_uploaded_bytes_total 0",
            "hawker_refused_total{reason=\"busy\"} 1",
            "hawker_refused_by_peers_total{reason=\"busy\"} 0",
            "hawker_tasks_active 3",
            "hawker_first_byte_seconds_count 1",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in\n{text}"
            );
        }
        let bytes = metrics.bytes();
        assert_eq!(
            (bytes.received_peers, bytes.served, bytes.served_cache),
            (5, 11, 7)
        );
    }

    #[test]
    fn metrics_of_other_modules_join_the_same_registry() {
        let metrics = Metrics::with(|registry| drop(counter(registry, "extra", "Another's")));
        assert!(metrics.encode().contains("hawker_extra_total 0"));
    }
}
