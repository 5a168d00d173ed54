//! The honest load: each node's client pulls a cached blob and a new one in turn, without end.

use std::net::Ipv4Addr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use hawker_conformance::origin::Blob;

use super::Arena;
use crate::client::get;

/// Between two pulls of a client, in milliseconds. The pauses differ: clients that pull in step share the origin's link for minutes,
/// and look slowed down.
const PAUSE_MS: Range<u64> = 50..250;

/// Which blob is pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Cached,
    New,
}

pub(super) const KINDS: [Kind; 2] = [Kind::Cached, Kind::New];

struct Pull {
    node: usize,
    kind: Kind,
    start: Instant,
    end: Instant,
    failure: Option<String>,
}

/// All clients of the nodes, and how their pulls went.
pub(super) struct Honest<'a> {
    arena: &'a Arena,
    is_over: AtomicBool,
    addresses: AtomicU32,
    pulls: Mutex<Vec<Pull>>,
}

impl<'a> Honest<'a> {
    pub(super) fn new(arena: &'a Arena) -> Self {
        let (is_over, addresses) = (AtomicBool::new(false), AtomicU32::new(0));
        Self {
            arena,
            is_over,
            addresses,
            pulls: Mutex::default(),
        }
    }

    /// Pulls at this node until [`Honest::stop`].
    pub(super) fn pull_at(&self, node: usize) -> Result<()> {
        self.arena.cluster.nodes[node].host().enter(|| {
            while !self.is_over.load(Ordering::Relaxed) {
                let new = self.arena.next_blob()?;
                for (kind, blob) in KINDS.into_iter().zip([self.arena.cached, new]) {
                    std::thread::sleep(Duration::from_millis(rand::random_range(PAUSE_MS)));
                    self.pull(node, kind, &blob);
                }
            }
            Ok(())
        })?
    }

    pub(super) fn stop(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    fn pull(&self, node: usize, kind: Kind, blob: &Blob) {
        // A client that asks again for what it has got is suspicious of it: each pull is another client's.
        let client = self.addresses.fetch_add(1, Ordering::Relaxed);
        let from = Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 1).to_bits() + client);
        let mirror = self.arena.cluster.nodes[node].mirror();
        let start = Instant::now();
        let got = get(
            mirror,
            &self.arena.stage.mirror_target(blob),
            Some(from.into()),
        );
        let (end, failure) = (
            Instant::now(),
            got.err()
                .map(|error| format!("{kind:?} at node {node}: {error:#}")),
        );
        self.pulls().push(Pull {
            node,
            kind,
            start,
            end,
            failure,
        });
    }

    fn pulls(&self) -> MutexGuard<'_, Vec<Pull>> {
        self.pulls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The seconds of the pulls that began in this time, in order.
    pub(super) fn seconds(&self, node: usize, kind: Kind, time: &Range<Instant>) -> Vec<f64> {
        let pulls = self.pulls();
        let ours = pulls
            .iter()
            .filter(|pull| pull.node == node && pull.kind == kind && time.contains(&pull.start));
        let mut seconds: Vec<_> = ours
            .map(|pull| (pull.end - pull.start).as_secs_f64())
            .collect();
        seconds.sort_by(f64::total_cmp);
        seconds
    }

    /// When the first pull began after `from` that took no longer than this.
    pub(super) fn first_within(
        &self,
        node: usize,
        kind: Kind,
        from: Instant,
        limit_s: f64,
    ) -> Option<Instant> {
        let pulls = self.pulls();
        let mut ours = pulls
            .iter()
            .filter(|pull| pull.node == node && pull.kind == kind && pull.start >= from);
        let is_fast = |pull: &&Pull| {
            pull.failure.is_none() && (pull.end - pull.start).as_secs_f64() <= limit_s
        };
        ours.find(is_fast).map(|pull| pull.start)
    }

    /// Why pulls of this time failed.
    pub(super) fn failures(&self, time: Range<Instant>) -> Vec<String> {
        let pulls = self.pulls();
        pulls
            .iter()
            .filter(|pull| time.contains(&pull.start))
            .filter_map(|pull| pull.failure.clone())
            .collect()
    }
}
