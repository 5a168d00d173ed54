//! Tasks whose pieces the disk does not take: which pieces stay in memory, and for how long.
//!
//! A node without disk keeps the pieces that its own readers need next. A seed or an issuer without disk also feeds its children:
//! it reads the origin once, through a bounded window of pieces in memory. A piece leaves the window when nobody needs it, or when
//! room is short and another child can give it. A child that lags far behind the others is sent elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::phase::Change;
use super::task::{OriginState, Task};
use super::{Node, Output, TableSigner};
use crate::Time;
use crate::fetch::Fetch;
use crate::message::{Refusal, Role};
use crate::piece::{PeerId, PieceIndex, PieceLayout, PieceSet};
use hawker_oci::digest::Digest;

/// A piece that one child got this long ago does not wait in memory for slower children when room is short. A whole window has to go
/// to each of several children in this time, where none of them has a disk.
const WAITS_FOR_SLOW_CHILDREN: Duration = Duration::from_secs(8);

/// When no piece has left the window for this long, children that do not take what is offered to them are sent elsewhere.
const STRAGGLERS_LEAVE_AFTER: Duration = Duration::from_secs(5);

/// A piece that children need and that nobody holds any more is read again after this long.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// The pieces and parts that a task without disk keeps.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    on_disk: PieceSet,
    pieces: BTreeMap<PieceIndex, KeptSince>,
    bytes: u64,
    budget_bytes: u64,
    /// Since when there has been no room for another piece.
    short_since: Option<Time>,
    /// Since when children have needed pieces that nobody holds.
    lost_since: Option<Time>,
    /// How far the shell may read the origin.
    read_until: Option<PieceIndex>,
}

#[derive(Clone, Copy, Debug)]
struct KeptSince {
    /// When it came.
    kept: Time,
    /// When the first child was seen to have it.
    given: Option<Time>,
}

/// A piece in memory, as far as the choice of what to drop goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept {
    piece: PieceIndex,
    len_bytes: u64,
    /// A reader of this node needs it.
    is_read: bool,
    /// Children that need it.
    needing: usize,
    /// Children that hold it and pass it on.
    spread: u16,
    /// Slower children have had time to take it.
    has_waited: bool,
}

impl Kept {
    const fn is_useless(&self) -> bool {
        !self.is_read && self.needing == 0
    }

    const fn may_go(&self) -> bool {
        !self.is_read && (self.needing == 0 || self.spread > 0 || self.has_waited)
    }
}

/// Which pieces leave the memory: those that nobody needs; then, until `wanted_bytes` of the budget are free beside what was asked
/// for, those that are spread most; then, until the budget suffices, those that are needed last.
fn to_drop(
    kept: &[Kept],
    budget_bytes: u64,
    asked_bytes: u64,
    wanted_bytes: u64,
) -> Vec<PieceIndex> {
    let (useless, mut rest): (Vec<Kept>, Vec<Kept>) =
        kept.iter().partition(|kept| kept.is_useless());
    let mut dropped: Vec<PieceIndex> = useless.iter().map(|kept| kept.piece).collect();
    let mut left_bytes: u64 = rest.iter().map(|kept| kept.len_bytes).sum();
    rest.sort_by_key(|kept| {
        (
            !kept.may_go(),
            std::cmp::Reverse(kept.spread),
            kept.needing,
            kept.piece,
        )
    });
    let may_go = rest.iter().take_while(|kept| kept.may_go()).count();
    let needed = rest.split_off(may_go);
    for kept in rest {
        if left_bytes + asked_bytes + wanted_bytes <= budget_bytes {
            break;
        }
        left_bytes -= kept.len_bytes;
        dropped.push(kept.piece);
    }
    for kept in needed.iter().rev() {
        if left_bytes <= budget_bytes {
            break;
        }
        left_bytes -= kept.len_bytes;
        dropped.push(kept.piece);
    }
    dropped
}

impl Memory {
    fn new(on_disk: PieceSet) -> Self {
        Self {
            on_disk,
            pieces: BTreeMap::new(),
            bytes: 0,
            budget_bytes: 0,
            short_since: None,
            lost_since: None,
            read_until: None,
        }
    }

    /// Forgets all pieces: verified bytes turned out to be wrong.
    pub(super) fn clear(&mut self) {
        *self = Self {
            budget_bytes: self.budget_bytes,
            ..Self::new(PieceSet::empty(self.on_disk.count()))
        };
    }

    pub(super) fn keep(&mut self, now: Time, piece: PieceIndex, len_bytes: u64) {
        if !self.on_disk.contains(piece)
            && self
                .pieces
                .insert(
                    piece,
                    KeptSince {
                        kept: now,
                        given: None,
                    },
                )
                .is_none()
        {
            self.bytes += len_bytes;
        }
    }

    pub(super) fn contains(&self, piece: PieceIndex) -> bool {
        self.on_disk.contains(piece) || self.pieces.contains_key(&piece)
    }

    /// All that can be given out.
    pub(super) fn kept(&self) -> PieceSet {
        let mut kept = self.on_disk.clone();
        for piece in self.pieces.keys() {
            kept.insert(*piece);
        }
        kept
    }

    fn since(&self, piece: PieceIndex) -> Option<Time> {
        let in_memory = || self.pieces.get(&piece).map(|since| since.kept);
        if self.on_disk.contains(piece) {
            Some(Time::default())
        } else {
            in_memory()
        }
    }

    fn remove(&mut self, piece: PieceIndex, len_bytes: u64) {
        if self.pieces.remove(&piece).is_some() {
            self.bytes -= len_bytes;
        }
    }

    /// Bytes that may still be asked for or read.
    pub(super) const fn room_bytes(&self, asked_bytes: u64) -> u64 {
        self.budget_bytes
            .saturating_sub(self.bytes)
            .saturating_sub(asked_bytes)
    }

    pub(super) const fn has_budget(&self) -> bool {
        self.budget_bytes > 0
    }
}

impl Task {
    /// Neither disk nor memory takes its pieces: its readers read the origin by themselves, and this node looks for nothing.
    pub(super) fn is_passed_through(&self) -> bool {
        self.memory
            .as_ref()
            .is_some_and(|memory| !memory.has_budget())
    }
}

impl<N: TableSigner> Node<N> {
    /// The disk takes no more pieces of this task; it has those `on_disk`, and all others that are held are in memory, which may
    /// take so much.
    pub(super) fn without_disk(
        &mut self,
        now: Time,
        digest: &Digest,
        on_disk: PieceSet,
        budget_bytes: u64,
    ) {
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        let Some(fetch) = &task.fetch else { return };
        let mut memory = Memory::new(on_disk);
        for piece in fetch.held().iter() {
            memory.keep(now, piece, fetch.layout().len_bytes(piece));
        }
        memory.budget_bytes = budget_bytes;
        task.memory = Some(memory);
        self.send_children_elsewhere(digest);
    }

    /// How much memory a task without disk may take. Zero: it keeps nothing, and its readers read the origin by themselves.
    pub(super) fn memory_budget(&mut self, now: Time, digest: &Digest, budget_bytes: u64) {
        let Some(memory) = self
            .tasks
            .get_mut(digest)
            .and_then(|task| task.memory.as_mut())
        else {
            return;
        };
        let begins_again = !memory.has_budget() && budget_bytes > 0;
        memory.budget_bytes = budget_bytes;
        if begins_again && let Some(task) = self.tasks.get_mut(digest) {
            // It has not waited for anybody meanwhile.
            task.moved = now;
        }
        self.send_children_elsewhere(digest);
    }

    /// The disk took a piece after all.
    pub(super) fn on_disk(&mut self, digest: &Digest, piece: PieceIndex) {
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        if let (Some(memory), Some(fetch)) = (&mut task.memory, &task.fetch) {
            memory.on_disk.insert(piece);
            memory.remove(piece, fetch.layout().len_bytes(piece));
        }
    }

    /// The disk takes pieces again, has those `on_disk`, and will get those in memory. Pieces that are neither there nor in memory are fetched
    /// again where clients of this node read the task, or where this node feeds others: from peers, and from the origin only where
    /// somebody waits for it.
    pub(super) fn disk_again(&mut self, now: Time, digest: &Digest, on_disk: &PieceSet) {
        let role = self.config.role;
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        // A node whose clients have had the blob does without it: hundreds that fetched it again would keep others waiting.
        let resumes = task.whole && (task.is_read || role == Role::Seed || task.is_issuer(role));
        let (Some(memory), Some(fetch)) = (task.memory.take(), &mut task.fetch) else {
            return;
        };
        fetch.keep_within(0..fetch.layout().count());
        let mut kept = memory.kept();
        kept.unite(on_disk);
        let lost: Vec<PieceIndex> = fetch.held().minus(&kept).collect();
        lost.iter().for_each(|piece| fetch.lost(*piece));
        if !lost.is_empty() {
            task.enter(Change::Lost { resumes });
            task.refills = true;
            task.moved = now;
        }
        // Parents that were left when the disk refused hear of the interest again.
        let parents: Vec<PeerId> = task
            .links
            .iter()
            .filter(|(_, link)| link.asked.is_some())
            .map(|(peer, _)| *peer)
            .collect();
        for peer in parents
            .into_iter()
            .filter(|peer| self.connected.contains_key(peer))
        {
            if task.announce {
                task.offers.join(peer, !self.isolated.contains(&peer), None);
            }
        }
    }

    /// Whether a task without disk holds pieces for anybody, has a reader that waits for some, or is to feed children: such a task needs
    /// memory. A reader that stands still does not keep it.
    pub fn needs_memory(&self, digest: &Digest) -> bool {
        let role = self.config.role;
        self.tasks.get(digest).is_some_and(|task| {
            let keeps = task
                .memory
                .as_ref()
                .is_some_and(|memory| !memory.pieces.is_empty());
            let is_read = task.fetch.as_ref().is_some_and(Fetch::has_readers_in_want);
            keeps
                || is_read
                || task.is_issuer(role) && (task.is_running() || task.offers.hungry() > 0)
        })
    }

    /// Children get nothing from a task that keeps nothing for them.
    fn send_children_elsewhere(&mut self, digest: &Digest) {
        let role = self.config.role;
        if self
            .tasks
            .get(digest)
            .is_some_and(|task| !task.may_announce(role))
        {
            self.turn_away(digest, Refusal::Unable);
        }
    }

    /// Drops what need not be kept any more, and lets in as much as there is room for.
    pub(super) fn balance_memory(&mut self, now: Time, digest: &Digest) {
        let role = self.config.role;
        let Some(task) = self.tasks.get_mut(digest) else {
            return;
        };
        let feeds = task.is_issuer(role) && !task.offers.is_empty();
        let (Some(memory), Some(fetch)) = (&mut task.memory, &mut task.fetch) else {
            return;
        };
        let layout = fetch.layout();
        if feeds {
            let offers = &task.offers;
            for (piece, since) in &mut memory.pieces {
                if since.given.is_none() && offers.is_given(*piece) {
                    since.given = Some(now);
                }
            }
        }
        let read_first = fetch.read_first(now, |piece| memory.since(piece));
        let end = read_first.map_or(0, |first| window_end(layout, first, memory.budget_bytes));
        let kept: Vec<Kept> = memory
            .pieces
            .iter()
            .map(|(piece, since)| Kept {
                piece: *piece,
                len_bytes: layout.len_bytes(*piece),
                is_read: *piece < end && fetch.is_read(now, *piece, |piece| memory.since(piece)),
                needing: if feeds {
                    task.offers.needing(*piece)
                } else {
                    0
                },
                spread: if feeds { task.offers.spread(*piece) } else { 0 },
                has_waited: since
                    .given
                    .is_some_and(|at| now.since(at) >= WAITS_FOR_SLOW_CHILDREN),
            })
            .collect();
        let asked_bytes = fetch.asked_bytes();
        let wanted_bytes = layout.piece_bytes().min(memory.budget_bytes);
        let dropped = to_drop(&kept, memory.budget_bytes, asked_bytes, wanted_bytes);
        // A child without disk does not say what it holds: when a piece goes that it was not sent, it can't count on this node.
        let mut elsewhere: BTreeSet<PeerId> = BTreeSet::new();
        // When the share shrinks, a piece may go that a reader comes to later: it is fetched again then.
        let is_read =
            |piece: &&PieceIndex| fetch.is_read(now, **piece, |piece| memory.since(piece));
        for piece in dropped.iter().filter(is_read).copied().collect::<Vec<_>>() {
            fetch.lost(piece);
            task.shown.remove(piece);
            task.phase = task.phase.after(Change::Lost { resumes: true });
        }
        for piece in dropped {
            memory.remove(piece, layout.len_bytes(piece));
            if feeds && task.offers.spread(piece) == 0 {
                elsewhere.extend(task.offers.without_disk_needing(piece));
            }
            self.outputs.push_back(Output::Drop(*digest, piece));
        }
        let room_bytes = memory.room_bytes(asked_bytes);
        if room_bytes >= wanted_bytes || asked_bytes > 0 || !feeds {
            memory.short_since = None;
        } else if now.since(*memory.short_since.get_or_insert(now)) >= STRAGGLERS_LEAVE_AFTER {
            memory.short_since = None;
            elsewhere.extend(
                task.offers
                    .stragglers(now, STRAGGLERS_LEAVE_AFTER, &memory.kept()),
            );
        }
        // The origin is read as far as there is room, and for this node's readers alone no further than these need.
        let next = if let OriginState::At(next) = task.reading {
            next
        } else {
            fetch.held().first_missing(0)
        };
        let read_until = match feeds {
            true => window_end(layout, next, room_bytes),
            false => end,
        };
        fetch.keep_within(if feeds {
            0..layout.count()
        } else {
            read_first.unwrap_or(0)..end
        });
        if memory.read_until != Some(read_until) {
            memory.read_until = Some(read_until);
            self.outputs
                .push_back(Output::ReadUntil(*digest, read_until));
        }
        for peer in elsewhere {
            self.refuse(peer, *digest, Refusal::Unable);
        }
        self.read_lost_again(now, digest);
    }

    /// Gets pieces back that children need and that nobody holds any more.
    fn read_lost_again(&mut self, now: Time, digest: &Digest) {
        let role = self.config.role;
        let Some(task) = self
            .tasks
            .get_mut(digest)
            .filter(|task| task.is_issuer(role))
        else {
            return;
        };
        let (Some(memory), Some(fetch)) = (&mut task.memory, &mut task.fetch) else {
            return;
        };
        let held = fetch.held().iter();
        let lost: Vec<PieceIndex> = held
            .filter(|piece| !memory.contains(*piece) && task.offers.is_lost(*piece))
            .collect();
        if lost.is_empty() {
            memory.lost_since = None;
        } else if now.since(*memory.lost_since.get_or_insert(now)) >= READ_AGAIN_AFTER {
            lost.iter().for_each(|piece| fetch.lost(*piece));
            memory.lost_since = None;
            task.enter(Change::Lost { resumes: true });
            task.moved = now;
        }
    }
}

/// The end of the pieces from `first` on that take at most `bytes`.
fn window_end(layout: PieceLayout, first: PieceIndex, bytes: u64) -> PieceIndex {
    let mut left_bytes = bytes;
    let fits = |piece: &PieceIndex| {
        let len_bytes = layout.len_bytes(*piece);
        let fits = len_bytes <= left_bytes;
        left_bytes = left_bytes.saturating_sub(len_bytes);
        fits
    };
    first + (first..layout.count()).take_while(fits).count() as PieceIndex
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kept(
        piece: PieceIndex,
        is_read: bool,
        needing: usize,
        spread: u16,
        has_waited: bool,
    ) -> Kept {
        Kept {
            piece,
            len_bytes: 1,
            is_read,
            needing,
            spread,
            has_waited,
        }
    }

    #[test]
    fn a_piece_leaves_when_nobody_needs_it_or_when_another_child_can_give_it() {
        let pieces = [
            kept(0, false, 0, 3, true),
            kept(1, false, 2, 0, false),
            kept(2, false, 2, 1, false),
            kept(3, true, 0, 2, true),
            kept(4, false, 1, 0, true),
        ];
        // (budget, bytes wanted, dropped)
        let cases: [(u64, u64, &[PieceIndex]); 4] = [
            (9, 1, &[0]),
            (4, 1, &[0, 2]),
            (4, 2, &[0, 2, 4]),
            (1, 1, &[0, 2, 4, 1]),
        ];
        for (budget, wanted, dropped) in cases {
            assert_eq!(
                to_drop(&pieces, budget, 0, wanted),
                dropped,
                "{budget} {wanted}"
            );
        }
    }

    proptest! {
        /// The oracle drops one piece at a time, always the first for which there is a reason.
        #[test]
        fn no_piece_leaves_without_a_reason_and_the_budget_holds(
            pieces in prop::collection::vec((1..4u64, any::<bool>(), 0..3usize, 0..3u16, any::<bool>()), 0..12),
            budget in 0..20u64, asked in 0..4u64, wanted in 0..4u64,
        ) {
            let pieces: Vec<Kept> = (0..)
                .zip(pieces)
                .map(|(piece, (len_bytes, is_read, needing, spread, has_waited))| {
                    Kept { len_bytes, ..kept(piece, is_read, needing, spread, has_waited) }
                })
                .collect();
            let mut dropped = to_drop(&pieces, budget, asked, wanted);
            let (mut left, mut expected) = (pieces, Vec::new());
            loop {
                let left_bytes: u64 = left.iter().map(|kept| kept.len_bytes).sum();
                let key = |kept: &&Kept| (std::cmp::Reverse(kept.spread), kept.needing, kept.piece);
                let useless = left.iter().find(|kept| kept.is_useless());
                let spread = || left.iter().filter(|kept| kept.may_go()).min_by_key(key);
                let needed = || left.iter().max_by_key(key);
                let next = useless
                    .or_else(|| if left_bytes + asked + wanted > budget { spread() } else { None })
                    .or_else(|| if left_bytes > budget { needed() } else { None });
                let Some(next) = next.map(|kept| kept.piece) else { break };
                expected.push(next);
                left.retain(|kept| kept.piece != next);
            }
            dropped.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(dropped, expected);
        }
    }
}
