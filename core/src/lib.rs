//! The decisions of Hawker, without I/O, clock or randomness: the next step of each daemon, given the inputs so far.
//!
//! - [`piece`]: the pieces of a blob, and how each is verified on its own
//! - [`right`]: the right by which a blob is read at its origin; [`intercept`]: the handling of requests that only
//!   pass through
//! - [`node`], [`fetch`], [`parents`], [`peers`], [`message`]: one peer's downloads and uploads; [`share`]: the part
//!   of a task that may come from other zones
//! - [`origin_reads`]: the spans of a blob to read at its origin, and over how many connections; [`byte_set`]: sets of
//!   bytes
//! - [`swarm`]: the scheduler's view of all peers; [`place`]: the place of each
//! - [`limit`], [`cache`], [`lru`]: rates, the disk cache, and maps with a bound; [`admission`]: admission to the peer
//!   port; [`connections`]: places for client connections
//!
//! Names come from [`hawker_oci`]: digests, hosts, repositories. Time comes in as [`Time`], randomness as `rng: &mut R`. The proxy, the scheduler and the simulator run this same code.

pub mod admission;
pub mod application;
pub mod byte_set;
pub mod cache;
pub mod connections;
pub mod fetch;
pub mod intercept;
pub mod limit;
pub mod lru;
pub mod memory;
pub mod message;
pub mod node;
pub mod offer;
pub mod origin_reads;
pub mod parents;
pub mod peers;
pub mod piece;
pub mod place;
pub mod proof;
pub mod reader;
pub mod rendezvous;
pub mod right;
pub mod share;
pub mod swarm;

use std::time::Duration;

/// A moment, as time since some fixed start of the daemon's (or the simulation's) choosing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub Duration);

impl Time {
    /// How long ago `earlier` was; zero when it is not earlier.
    pub fn since(self, earlier: Time) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl std::ops::Add<Duration> for Time {
    type Output = Time;

    fn add(self, wait: Duration) -> Time {
        Time(self.0.saturating_add(wait))
    }
}
