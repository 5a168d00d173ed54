//! How fast one task may go: piece by piece, before it is asked for, sent, or read on from the origin.
//!
//! A bucket that owes nothing lets the next piece through, however long that is, and owes it from then on. So nothing waits
//! that holds memory, a slot or a connection, and on the average the rate is kept.

use crate::Time;
use crate::limit::{Rates, TokenBucket};

/// The buckets of one task.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    pub(super) upload: TokenBucket,
    pub(super) download: TokenBucket,
    pub(super) origin: TokenBucket,
    pub(super) prefetch: TokenBucket,
}

impl Pace {
    pub(super) fn new(rates: &Rates, now: Time) -> Self {
        Self {
            upload: TokenBucket::new(rates.upload, now),
            download: TokenBucket::new(rates.download, now),
            origin: TokenBucket::new(rates.origin, now),
            prefetch: TokenBucket::new(rates.prefetch, now),
        }
    }

    pub(super) fn set(&mut self, rates: &Rates, now: Time) {
        self.upload.set_rate(rates.upload, now);
        self.download.set_rate(rates.download, now);
        self.origin.set_rate(rates.origin, now);
        self.prefetch.set_rate(rates.prefetch, now);
    }
}
