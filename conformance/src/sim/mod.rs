//! A swarm in one process: thousands of nodes and a scheduler that decide with the very code of the daemons, on links that are
//! sums. Same scenario and seed, same run: see [`Outcome::trace`].
//!
//! # The model
//!
//! - **Nodes** are [`hawker_core::node::Node`]s and the scheduler is a [`hawker_core::swarm::Swarm`], driven as the
//!   daemons' drivers do. Events are told to the node, a little later it decides once about all of them, and its
//!   orders are carried out. Nodes that decide at the same moment know nothing of each other's decisions, and each
//!   draws from chance of its own: threads share them. News that a node gathers (for children, counts for the
//!   scheduler) are gathered here, too.
//! - **Links.** Each host has an uplink and a downlink, each zone a pair to the outside, the origin one uplink: serial
//!   queues with a rate. Data that leaves one arrives at the next after the delay. Pieces that a host sends at the
//!   same time take turns of [`Scenario::turn_bytes`]. A sender does not send into a downlink that is further behind
//!   than [`Scenario::buffer`]: TCP stops it.
//! - **Buffers.** Sockets and queues hold [`Scenario::buffer`] of an uplink's time. Data in there is committed: an
//!   upload is over for the node when its last byte enters, and messages wait behind it. Messages take no room
//!   themselves.
//! - **Pieces** have no bytes. The table's chaining values are made up ([`content`]); a right piece ends in its value,
//!   one from a liar does not. A node hashes, writes and reads in no time.
//! - **Connections** take [`DIAL_ROUND_TRIPS`]; the death of a peer is noticed after [`Scenario::noticed_after`].
//!
//! Every run is watched: see [`Checks`].

mod check;
pub mod content;
mod event;
mod host;
mod link;
mod outcome;
mod picture;
mod scenario;
#[cfg(test)]
mod tests;
mod world;

pub use check::Checks;
pub use outcome::{Finish, Outcome};
pub use picture::completion;
pub use scenario::{Faults, Scenario};

/// TCP and TLS 1.3 before the first message.
pub const DIAL_ROUND_TRIPS: u32 = 2;

/// How far a run is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Events so far.
    pub events: u64,
    /// Seconds simulated.
    pub at_s: f64,
    /// The part of all pieces that is where it is to be, seeds included.
    pub done: f64,
    /// Nodes that lack something.
    pub unfinished: u32,
}

/// Runs a scenario to its end.
pub fn run(scenario: &Scenario) -> Outcome {
    run_watched(scenario, &mut |_| ())
}

/// Runs a scenario to its end, and says again and again how far it is.
pub fn run_watched(scenario: &Scenario, watch: &mut (dyn FnMut(Progress) + Send)) -> Outcome {
    // On a thread of the pool: other threads of the pool then take its shares at once.
    rayon::scope(|_| world::World::new(scenario).run(watch))
}
