//! The scenario of a simulation.

use std::time::Duration;

use hawker_core::piece::PieceLayout;

/// As many are simulated with long pieces only: it would take ten minutes otherwise.
const MANY_HOSTS: u32 = 10_000;

/// A swarm and what becomes of it. Rates in bytes a second, each way.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Nodes that pull, all at once.
    pub hosts: u32,
    /// Seed peers besides.
    pub seed_peers: u32,
    /// The size of each node's pull, in bytes.
    pub size_bytes: u64,
    /// Into how many blobs that is cut.
    pub layers: u32,
    /// Pieces are of 4 MiB at least: of a blob of 1 GiB a quarter of the transfers. So are those of 10,000 hosts and more.
    pub long_pieces: bool,
    /// Of each host's link.
    pub rate: f64,
    /// Of the origin's link.
    pub origin_rate: f64,
    /// Zones, over which hosts are spread evenly; a zone's link to the outside carries a tenth of the sum of its hosts'.
    pub zones: u32,
    /// From the end of one link to the start of the next.
    pub delay: Duration,
    /// The data committed ahead of an uplink, as time at its rate.
    pub buffer: Duration,
    /// The part of a piece sent in one turn when several go at once.
    pub turn_bytes: u64,
    /// Pieces that a node sends at once.
    pub upload_slots: usize,
    /// Bytes that a node asks for at once.
    pub in_flight_bytes: u64,
    /// The faults.
    pub faults: Faults,
    /// Origin bytes over the size, at most: more is a violation.
    pub origin_copies_max: f64,
    /// When the run is given up, if not after ten times what the slowest need at best, and two minutes.
    pub ends_after: Option<Duration>,
    /// Seed of all chance.
    pub rng: u64,
}

/// The faults in a run.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// The part of the hosts that is slow.
    pub slow: f64,
    /// How slow, as a part of the rate.
    pub slow_rate: f64,
    /// The part of the hosts that dies while it pulls.
    pub die: f64,
    /// The part of the hosts that sends wrong bytes.
    pub lie: f64,
    /// When the scheduler is restarted, each time for [`Faults::scheduler_away`].
    pub scheduler_restarts: Vec<Duration>,
    /// How long a restart takes.
    pub scheduler_away: Duration,
    /// How long a dead peer's connections seem alive.
    pub noticed_after: Duration,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            hosts: 100,
            seed_peers: 1,
            size_bytes: 128 << 20,
            layers: 1,
            long_pieces: false,
            rate: 125e6,
            origin_rate: 1.25e9,
            zones: 1,
            delay: Duration::from_micros(250),
            buffer: Duration::from_millis(4),
            turn_bytes: 1 << 20,
            // As the daemon's defaults.
            upload_slots: 8,
            in_flight_bytes: (48 << 20) / 3 * 2,
            faults: Faults::default(),
            origin_copies_max: 1.5,
            ends_after: None,
            rng: 1,
        }
    }
}

impl Scenario {
    /// The least time in which everybody at full rate can have everything, in seconds: max(F/u_origin, F/d_seed, F/u_seeds, F/min d,
    /// N*F/(u_seeds + sum u)).
    pub fn bound_s(&self) -> f64 {
        let (size, seeds, hosts) = (
            self.size_bytes as f64,
            f64::from(self.seed_peers),
            f64::from(self.hosts),
        );
        let slow = (self.faults.slow * hosts).round();
        let up = self.rate * (seeds + hosts - slow + slow * self.faults.slow_rate);
        let seeds_up = if self.seed_peers > 0 {
            seeds * self.rate
        } else {
            self.rate
        };
        [
            size / self.origin_rate,
            size / self.rate,
            size / seeds_up,
            hosts * size / up,
        ]
        .into_iter()
        .fold(0.0, f64::max)
    }

    /// How long each blob is.
    pub fn blob_bytes(&self) -> u64 {
        self.size_bytes / u64::from(self.layers.max(1))
    }

    /// How each blob is cut.
    pub fn layout(&self) -> fn(u64) -> PieceLayout {
        if self.long_pieces || self.hosts >= MANY_HOSTS {
            PieceLayout::long
        } else {
            PieceLayout::new
        }
    }

    /// The end of the run's patience: a download that has not ended by then never will.
    pub fn limit(&self) -> Duration {
        let slowest = if self.faults.slow > 0.0 {
            self.faults.slow_rate.max(0.01)
        } else {
            1.0
        };
        self.ends_after.unwrap_or(Duration::from_secs_f64(
            self.bound_s() / slowest * 10.0 + 120.0,
        ))
    }
}
