//! The decisions of Hawker, without I/O, clock or randomness: what each daemon does next, given what it has seen.
//!
//! - [`piece`]: what a blob's pieces are and how each is verified on its own
//! - [`right`]: with what right a blob is read at its origin; [`intercept`]: what becomes of a request that is only passing
//! - [`node`], [`fetch`], [`parents`], [`peers`], [`message`]: one peer's downloads and uploads; [`share`]: what of it may come from
//!   other zones
//! - [`origin_reads`]: which spans of a blob are read at its origin, and over how many connections; [`byte_set`]: sets of bytes
//! - [`swarm`]: the scheduler's view of all peers; [`place`]: where these stand
//! - [`limit`], [`cache`], [`lru`]: how fast, what stays on disk, and what stays in memory; [`admission`]: who gets a place at the peer port; [`connections`]: which
//!   client connections have a place
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
