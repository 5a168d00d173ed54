//! The record of broken things and their times, and the answers that a client may see: the rule of [`super`], in one
//! place.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::PULL_WITHIN;
use super::schedule::Member;

/// A forbidden event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A client got a wrong byte.
    WrongBytes,
    /// A pull had not all its bytes in time.
    Hang,
    /// A client got an error or a short body though its path was whole.
    Failed,
    /// A daemon ended or panicked, or did not come back.
    Daemon,
}

/// Something that must not have happened.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which rule it is against.
    pub kind: Kind,
    /// The observation.
    pub what: String,
}

/// The state of a member during a span of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// Its clients may get errors.
    Broken,
    /// They may only have to wait.
    Slow,
}

struct Span {
    member: Member,
    why: Why,
    /// `None` while it lasts.
    until: Option<Instant>,
}

/// The notes of the faults and the clients of one run.
#[derive(Default)]
pub(super) struct Books(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    spans: Vec<Span>,
    /// Blobs that the origin lied about.
    lied: Vec<usize>,
    /// Blobs that rot on a member's disk.
    rotten: Vec<(Member, usize)>,
    violations: Vec<Violation>,
}

/// A span that has begun.
#[derive(Clone, Copy)]
pub(super) struct Open(usize);

impl Books {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be said before it happens.
    pub(super) fn begin(&self, member: Member, why: Why) -> Open {
        let mut inner = self.inner();
        inner.spans.push(Span {
            member,
            why,
            until: None,
        });
        Open(inner.spans.len() - 1)
    }

    /// To be said once all is well again.
    pub(super) fn end(&self, Open(index): Open) {
        self.inner().spans[index].until = Some(Instant::now());
    }

    pub(super) fn lied(&self, blob: usize) {
        self.inner().lied.push(blob);
    }

    pub(super) fn rotten(&self, member: Member, blob: usize) {
        self.inner().rotten.push((member, blob));
    }

    pub(super) fn violated(&self, kind: Kind, what: String) {
        self.inner().violations.push(Violation { kind, what });
    }

    pub(super) fn violations(&self) -> Vec<Violation> {
        self.inner().violations.clone()
    }

    /// Rule 1: whether an answer may have a wrong byte. `whole`: it is complete and has the blob's last byte.
    pub(super) fn may_be_wrong(&self, node: usize, blob: usize, whole: bool) -> bool {
        let inner = self.inner();
        inner.rotten.contains(&(Member::Node(node), blob)) || !whole && inner.lied.contains(&blob)
    }

    /// Rule 2: whether what was asked of a node at `since` and ended just now may be an error or short.
    pub(super) fn may_fail(&self, node: usize, blob: usize, since: Instant) -> bool {
        let inner = self.inner();
        let mut broken = inner.path(node).filter(|span| span.why == Why::Broken);
        broken.any(|span| span.until.is_none_or(|until| until >= since))
            || inner.lied.contains(&blob)
            || inner.rotten.contains(&(Member::Node(node), blob))
    }

    /// Rule 3: when a pull that began at `start` must have ended; not known while a fault of its path lasts.
    pub(super) fn deadline(&self, node: usize, start: Instant) -> Option<Instant> {
        let inner = self.inner();
        let whole = inner
            .path(node)
            .try_fold(start, |whole, span| Some(whole.max(span.until?)))?;
        Some(whole + PULL_WITHIN)
    }
}

impl Inner {
    fn path(&self, node: usize) -> impl Iterator<Item = &Span> {
        self.spans
            .iter()
            .filter(move |span| [Member::Node(node), Member::Origin].contains(&span.member))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_for_those_whose_path_is_broken_meanwhile() {
        let books = Books::default();
        let before = Instant::now();
        assert!(!books.may_fail(0, 0, before));
        let seed = books.begin(Member::Seed, Why::Broken);
        let slow = books.begin(Member::Node(0), Why::Slow);
        assert!(
            !books.may_fail(0, 0, before),
            "neither a seed nor a slow link is a reason"
        );
        let node = books.begin(Member::Node(1), Why::Broken);
        assert!(books.may_fail(1, 0, Instant::now()) && !books.may_fail(0, 0, before));
        for open in [seed, slow, node] {
            books.end(open);
        }
        assert!(books.may_fail(1, 0, before) && !books.may_fail(1, 0, Instant::now()));
        let origin = books.begin(Member::Origin, Why::Broken);
        assert!((0..2).all(|node| books.may_fail(node, 0, Instant::now())));
        books.end(origin);
    }

    #[test]
    fn the_deadline_counts_from_the_end_of_the_path_s_last_fault() {
        let books = Books::default();
        let start = Instant::now();
        assert_eq!(books.deadline(0, start), Some(start + PULL_WITHIN));
        let slow = books.begin(Member::Node(0), Why::Slow);
        let other = books.begin(Member::Node(1), Why::Broken);
        assert_eq!(books.deadline(0, start), None);
        books.end(slow);
        let deadline = books.deadline(0, start);
        assert!(deadline > Some(start + PULL_WITHIN));
        books.end(other);
        assert_eq!(
            books.deadline(0, start),
            deadline,
            "another node is not on the path"
        );
    }

    #[test]
    fn wrong_bytes_are_for_those_only_whom_the_rule_names() {
        let books = Books::default();
        assert!(!books.may_be_wrong(0, 0, false));
        books.lied(0);
        assert!(books.may_be_wrong(0, 0, false) && !books.may_be_wrong(0, 0, true));
        books.rotten(Member::Node(2), 1);
        assert!(books.may_be_wrong(2, 1, true) && !books.may_be_wrong(1, 1, false));
    }
}
