//! How fast one task may go, and all tasks of an application or a tag together: piece by piece, before it is asked for, sent, or
//! read on from the origin.
//!
//! A bucket that owes nothing lets the next piece through, however long that is, and owes it from then on. So nothing waits
//! that holds memory, a slot or a connection, and on the average the rate is kept.

use std::iter;
use std::sync::Arc;

use crate::Time;
use crate::application::{Applications, Labels, Purpose};
use crate::limit::{Rates, TokenBucket};

/// The source of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// From a peer.
    Download,
    /// From the origin.
    Origin,
}

/// The buckets of one task, or of all that a rule holds for.
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

    pub(super) fn set(&mut self, rates: &Rates, now: Time) {
        self.upload.set_rate(rates.upload, now);
        self.download.set_rate(rates.download, now);
        self.origin.set_rate(rates.origin, now);
        self.prefetch.set_rate(rates.prefetch, now);
    }

    fn buckets(&mut self, kind: Kind, prefetch: bool) -> impl Iterator<Item = &mut TokenBucket> {
        let bucket = match kind {
            Kind::Download => &mut self.download,
            Kind::Origin => &mut self.origin,
        };
        iter::once(bucket).chain(prefetch.then_some(&mut self.prefetch))
    }
}

/// All buckets that a piece counts for: the task's `own`, those of what it is for, and that of all that is `prefetched`, if
/// nobody waits for it.
pub(super) fn buckets<'a>(
    kind: Kind,
    own: &'a mut Pace,
    quotas: &'a mut Quotas,
    purpose: &Purpose,
    prefetched: Option<&'a mut TokenBucket>,
) -> impl Iterator<Item = &'a mut TokenBucket> + use<'a> {
    let is_prefetched = prefetched.is_some();
    let labels = purpose.labels.clone();
    let paces = iter::once(own).chain(quotas.of(labels));
    paces
        .flat_map(move |pace| pace.buckets(kind, is_prefetched))
        .chain(prefetched)
}

/// The limits of each application and each tag at this node.
#[derive(Clone, Debug, Default)]
pub(super) struct Quotas {
    applications: Arc<Applications>,
    /// Of each rule, in the same order.
    paces: Vec<Pace>,
}

impl Quotas {
    /// Takes other rules; an application that was under a rule before still owes its debt. `true`: they are new.
    pub(super) fn set(&mut self, now: Time, applications: &Arc<Applications>) -> bool {
        if Arc::ptr_eq(&self.applications, applications) || self.applications == *applications {
            return false;
        }
        let paces = applications.rules().iter().map(|rule| {
            let before = self
                .applications
                .rules()
                .iter()
                .position(|old| old.labels == rule.labels);
            let before = before.and_then(|at| self.paces.get(at)).cloned();
            let mut pace = before.unwrap_or_else(|| Pace::new(&rule.limits.rates, now));
            pace.set(&rule.limits.rates, now);
            pace
        });
        self.paces = paces.collect();
        self.applications = Arc::clone(applications);
        true
    }

    fn of(&mut self, labels: Labels) -> impl Iterator<Item = &mut Pace> {
        let rules = self.applications.rules().iter().zip(&mut self.paces);
        rules
            .filter(move |(rule, _)| rule.labels.are_among(&labels))
            .map(|(_, pace)| pace)
    }

    /// Of what nothing may be sent now.
    pub(super) fn without_upload(&mut self, now: Time) -> Vec<Labels> {
        let rules = self.applications.rules().iter().zip(&mut self.paces);
        let slow = rules
            .filter_map(|(rule, pace)| (!pace.upload.is_free(now)).then(|| rule.labels.clone()));
        slow.collect()
    }

    /// Something is sent.
    pub(super) fn upload(&mut self, now: Time, purpose: &Purpose, bytes: u64) {
        for pace in self.of(purpose.labels.clone()) {
            pace.upload.reserve(now, bytes);
        }
    }

    /// Whether any rule limits how many blobs are read from their origins at once.
    pub(super) fn limit_origins(&self) -> bool {
        self.applications
            .rules()
            .iter()
            .any(|rule| rule.limits.origins.is_some())
    }

    /// Whether one more blob may be read from its origin for this purpose, beside those that are read for these.
    pub(super) fn may_read_origin(&self, purpose: &Purpose, reading: &[Purpose]) -> bool {
        self.applications.of(&purpose.labels).all(|rule| {
            let others = reading
                .iter()
                .filter(|other| rule.labels.are_among(&other.labels));
            rule.limits
                .origins
                .is_none_or(|most| others.count() < most as usize)
        })
    }
}
