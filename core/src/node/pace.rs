//! How fast one task may go: piece by piece, before it is asked for, sent, or read on from the origin.
//!
//! A bucket that owes nothing lets the next piece through, however long that is, and owes it from then on. So nothing waits
//! that holds memory, a slot or a connection, and on the average the rate is kept.

use std::iter;

use crate::Time;
use crate::limit::{Rates, TokenBucket};

/// The buckets of one task.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    pub(super) upload: TokenBucket,
    download: TokenBucket,
    origin: TokenBucket,
    prefetch: TokenBucket,
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

    /// The buckets that a piece from a peer counts for. `prefetched`: the one of all that nobody waits for, if nobody does for this.
    pub(super) fn download<'a>(
        &'a mut self,
        prefetched: Option<&'a mut TokenBucket>,
    ) -> impl Iterator<Item = &'a mut TokenBucket> {
        let also = prefetched.map(|all| [&mut self.prefetch, all]);
        iter::once(&mut self.download).chain(also.into_iter().flatten())
    }

    /// The same for a piece from the origin.
    pub(super) fn origin<'a>(
        &'a mut self,
        prefetched: Option<&'a mut TokenBucket>,
    ) -> impl Iterator<Item = &'a mut TokenBucket> {
        let also = prefetched.map(|all| [&mut self.prefetch, all]);
        iter::once(&mut self.origin).chain(also.into_iter().flatten())
    }

    pub(super) fn set(&mut self, rates: &Rates, now: Time) {
        self.upload.set_rate(rates.upload, now);
        self.download.set_rate(rates.download, now);
        self.origin.set_rate(rates.origin, now);
        self.prefetch.set_rate(rates.prefetch, now);
    }
}
