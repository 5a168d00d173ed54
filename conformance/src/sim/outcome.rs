//! The result of a run.

use super::Checks;

/// How one node fared.
#[derive(Clone, Copy, Debug)]
pub struct Finish {
    /// When it had everything, in seconds; `None`: it died, or never had.
    pub at_s: Option<f64>,
    /// It has a slow link.
    pub slow: bool,
    /// It was killed.
    pub dead: bool,
}

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The least time possible, in seconds.
    pub bound_s: f64,
    /// Of every node that pulls.
    pub finishes: Vec<Finish>,
    /// Bytes from the origin over the size.
    pub origin_copies: f64,
    /// Bytes that the seeds sent over the size.
    pub seed_copies: f64,
    /// Bytes into a zone over the size, for the zone with most of them.
    pub zone_copies: f64,
    /// To and from the scheduler, a second, while anybody pulled.
    pub scheduler_messages_per_s: f64,
    /// Between peers, a second and peer.
    pub peer_messages_per_s: f64,
    /// Pieces asked for twice.
    pub duplicates: u64,
    /// Pieces that came wrong.
    pub wrong_pieces: u64,
    /// Events that it took.
    pub events: u64,
    /// Seconds from the start to the last node's end.
    pub lasted_s: f64,
    /// Of everything that any node wanted done: the same for the same scenario and seed.
    pub trace: u64,
    /// The violations.
    pub checks: Checks,
}

impl Outcome {
    /// Times of all full-rate nodes that lived, over the bound, ascending.
    pub fn ratios(&self) -> Vec<f64> {
        let full = self
            .finishes
            .iter()
            .filter(|finish| !finish.slow && !finish.dead);
        let mut ratios: Vec<f64> = full
            .map(|finish| finish.at_s.unwrap_or(f64::INFINITY) / self.bound_s)
            .collect();
        ratios.sort_by(f64::total_cmp);
        ratios
    }

    /// The time over the bound within which this part of the full-rate nodes had everything.
    pub fn quantile(&self, part: f64) -> f64 {
        let ratios = self.ratios();
        let rank = (part * ratios.len() as f64).ceil() as usize;
        ratios
            .get(rank.clamp(1, ratios.len().max(1)) - 1)
            .copied()
            .unwrap_or(f64::NAN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_living_at_full_rate() {
        let finish = |at_s, slow, dead| Finish { at_s, slow, dead };
        let mut finishes: Vec<Finish> = (1..=100)
            .map(|n| finish(Some(f64::from(n)), false, false))
            .collect();
        finishes.push(finish(Some(1e6), true, false));
        finishes.push(finish(None, false, true));
        let outcome = Outcome {
            bound_s: 10.0,
            finishes,
            origin_copies: 1.0,
            seed_copies: 1.0,
            zone_copies: 1.0,
            scheduler_messages_per_s: 0.0,
            peer_messages_per_s: 0.0,
            duplicates: 0,
            wrong_pieces: 0,
            events: 0,
            lasted_s: 1.0,
            trace: 0,
            checks: Checks::default(),
        };
        assert_eq!(outcome.quantile(0.5), 5.0);
        assert_eq!(outcome.quantile(0.99), 9.9);
        assert_eq!(outcome.quantile(0.999), 10.0);
    }
}
