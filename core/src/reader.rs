//! The decisions of one client's reader: give out bytes, wait for peers, ask the origin, or give up.
//!
//! The shell describes the state at the reader's position ([`Facts`]); [`Reader::next`] answers with one [`Step`]. The shell
//! carries it out and asks again. Whole blobs wait for the download, which goes to the origin by itself. Ranges wait for peers,
//! but not for long: then the origin is asked for them, once for all that this reader is still to read.

use std::ops::Range;
use std::time::Duration;

use crate::Time;
use crate::piece::{PieceIndex, PieceLayout, PieceSet};

mod ahead;
#[cfg(test)]
mod tests;

use ahead::Ahead;

/// How long a client waits for the size of a blob.
pub const SIZE_WITHIN: Duration = Duration::from_secs(30);

/// A range whose bytes are not here after this long is read from the origin.
const RANGE_PATIENCE: Duration = Duration::from_millis(1500);

/// A whole blob that stands still for this long is read from the origin. The download itself went there two seconds sooner, if it
/// could.
const WHOLE_PATIENCE: Duration = Duration::from_secs(12);

/// A reader without a byte for this long, from peers or the origin, gives up. Its client falls through to another host.
const STALLED: Duration = Duration::from_secs(45);

/// A reader looks at the facts again after this long, although nothing has changed.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Ranges for clients are read from the origin in multiples of this, so that a blob has a bounded number of loose stretches.
const LOOSE_GRAIN_BYTES: u64 = 16 << 10;

/// The place where the verified pieces of a task are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// The task's file.
    #[default]
    Disk,
    /// A window in memory, because the disk refuses. Pieces that all readers have passed are gone.
    Memory,
    /// Nowhere: the disk refuses, and there is no memory for the task. Each reader reads the origin by itself.
    Nowhere,
}

/// The bytes at a reader's position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Here {
    /// None that can be given out.
    Nothing,
    /// Verified bytes.
    Verified,
    /// Verified bytes, but the reader's registry has neither given them nor proved that it has them.
    Unproved,
    /// Bytes that nothing has verified yet. The reader's registry gave them, so the reader may see them.
    Loose,
    /// The same, and the reader may not see them: another registry gave them, or they may be the end of the whole blob.
    HiddenLoose,
}

/// The state of the download at a reader's position.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Grows when all bytes that were shown turn out to be wrong.
    pub epoch: u64,
    /// The bytes at the position.
    pub here: Here,
    /// The place of verified pieces.
    pub storage: Storage,
    /// The piece at the position is in memory, or was never here. Otherwise it has come and gone.
    pub is_to_come: bool,
    /// Nobody but the origin is about to bring pieces, so readers of ranges need not wait.
    pub is_alone: bool,
    /// The reader has a request of its own at the origin.
    pub is_direct: bool,
    /// The download has failed.
    pub has_failed: bool,
    /// The number of times that the origin failed to give loose bytes.
    pub origin_failures: u32,
}

/// The next step of a reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The range is over.
    End,
    /// The bytes that are here are given out.
    Give,
    /// The reader's registry is to prove that it has the bytes that are here.
    Prove,
    /// Nothing is done until the facts change, or until this moment.
    Wait(Time),
    /// The task's reader of the origin is to read these ranges, for everybody who waits for them.
    AskOrigin(Vec<Range<u64>>),
    /// The reader reads the origin by itself, and goes on with the request that it has.
    ReadDirect(Stretch),
    /// The download is to bring the whole blob: nothing else can show the bytes that are missing.
    WantWhole,
    /// The reader gives up.
    GiveUp(Reason),
}

/// The reason why a reader gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Bytes that were given out turned out to be wrong.
    WrongBytes,
    /// The download has failed.
    DownloadFailed,
    /// The origin did not give the bytes that it was asked for.
    OriginFailed,
    /// The registry did not prove in time that it has the blob.
    Unproved,
    /// No byte came in time.
    Stalled,
}

/// A stretch of a blob for a request to the origin on behalf of one reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The bytes that the client gets first.
    pub range: Range<u64>,
    /// The end of the request. It lies past the range when the reader goes on there.
    pub until: u64,
    /// All bytes before the range are read too, and hashed, so that the last piece can be shown.
    pub is_proved: bool,
    /// An origin that ignores ranges is read from the start, and the bytes before the range are thrown away.
    pub may_skip: bool,
}

/// The part of the blob that a reader reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    /// Up to the end, as the download brings it.
    Whole,
    /// Ranges. `shows_end`: none of them begins at the blob's start, so the client cannot take them for the whole blob. It may see
    /// the last piece before the whole digest is known to match.
    Ranges { shows_end: bool },
}

/// The way by which a reader waits for its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The download brings them.
    Download,
    /// The task's reader of the origin was asked for them. It had failed so often before.
    Origin { failures: u32 },
    /// Only a download of the whole blob can show them.
    WholeOnly,
}

/// A client's reader.
#[derive(Debug)]
pub struct Reader {
    layout: PieceLayout,
    at: u64,
    end: u64,
    ahead: Ahead,
    extent: Extent,
    way: Way,
    has_begun: bool,
    epoch: u64,
    /// The last moment at which bytes were given out, from wherever, and from the download.
    moved: Time,
    given: Time,
}

impl Reader {
    /// A reader of these ranges, one after the other. `partial`: the client asked for ranges with an end of their own.
    pub fn new(
        now: Time,
        ranges: Vec<Range<u64>>,
        layout: PieceLayout,
        partial: bool,
        epoch: u64,
    ) -> Self {
        let mut ahead = Ahead::new(ranges, layout);
        let first = ahead.next().unwrap_or(0..0);
        let shows_end = first.start > 0 && ahead.ranges().all(|range| range.start > 0);
        Self {
            layout,
            at: first.start,
            end: first.end.min(layout.size_bytes()),
            ahead,
            extent: if partial {
                Extent::Ranges { shows_end }
            } else {
                Extent::Whole
            },
            way: Way::Download,
            has_begun: false,
            epoch,
            moved: now,
            given: now,
        }
    }

    /// The bytes of the current range that are still to be given out.
    pub const fn rest(&self) -> Range<u64> {
        self.at..self.end
    }

    /// The layout of the blob.
    pub const fn layout(&self) -> PieceLayout {
        self.layout
    }

    /// The epoch of the bytes that were given out so far.
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The pieces of the current range that are still needed.
    pub fn pieces(&self) -> Range<PieceIndex> {
        self.layout.covering(self.at..self.end)
    }

    /// The pieces of the ranges after the current one.
    pub const fn pieces_ahead(&self) -> Option<&PieceSet> {
        self.ahead.pieces()
    }

    /// Goes on to the next range, if there is one.
    pub fn next_range(&mut self) -> Option<Range<u64>> {
        let range = self.ahead.next()?;
        (self.at, self.end) = (range.start, range.end.min(self.layout.size_bytes()));
        Some(range)
    }

    /// The end of loose bytes that this reader may see: the last piece waits for the whole digest, unless the client cannot take
    /// its bytes for the whole blob.
    pub fn loose_end(&self) -> u64 {
        self.end.min(self.readable_end())
    }

    /// Bytes were given out. `is_direct`: they came by the reader's own request to the origin.
    pub const fn advance(&mut self, now: Time, bytes: u64, is_direct: bool) {
        self.moved = now;
        self.has_begun = true;
        self.at += bytes;
        if !is_direct {
            self.given = now;
        }
    }

    /// The origin sends the whole blob to a request for a part of it. The download brings it, for all readers.
    pub const fn leave_to_download(&mut self) {
        self.way = Way::WholeOnly;
    }

    /// The next step.
    pub fn next(&mut self, now: Time, facts: &Facts) -> Step {
        if self.at >= self.end {
            return Step::End;
        }
        if facts.epoch != self.epoch {
            if self.has_begun {
                return Step::GiveUp(Reason::WrongBytes);
            }
            self.epoch = facts.epoch;
        }
        let (waited, in_vain) = (now.since(self.moved), now.since(self.given));
        match facts.here {
            Here::Verified | Here::Loose => return Step::Give,
            Here::Unproved if waited >= STALLED => return Step::GiveUp(Reason::Unproved),
            Here::Unproved => return Step::Prove,
            Here::Nothing | Here::HiddenLoose => {}
        }
        let patience = self.patience(facts);
        let asks = facts.is_direct || matches!(self.way, Way::Origin { .. }) || in_vain >= patience;
        if let Some(step) = asks.then(|| self.turn_to_origin(facts)).flatten() {
            return step;
        }
        if facts.has_failed {
            return Step::GiveUp(Reason::DownloadFailed);
        }
        if waited >= STALLED {
            return Step::GiveUp(Reason::Stalled);
        }
        let until = if in_vain < patience {
            self.given + patience
        } else {
            self.moved + STALLED
        };
        Step::Wait(until.min(now + LOOK_EVERY))
    }

    /// How long the reader waits for the download before it turns to the origin.
    const fn patience(&self, facts: &Facts) -> Duration {
        match (facts.storage, self.extent) {
            (Storage::Nowhere, _) => Duration::ZERO,
            // All other readers have passed the piece, and this one has come late.
            (Storage::Memory, _) if !facts.is_to_come => Duration::ZERO,
            (_, Extent::Whole) => WHOLE_PATIENCE,
            (_, Extent::Ranges { .. }) if facts.is_alone => Duration::ZERO,
            (_, Extent::Ranges { .. }) => RANGE_PATIENCE,
        }
    }

    /// The step by which the origin gives the missing bytes; `None` when only the download can.
    fn turn_to_origin(&mut self, facts: &Facts) -> Option<Step> {
        let has_disk = facts.storage == Storage::Disk;
        let is_left_to_download = facts.has_failed || self.way == Way::WholeOnly;
        // Bytes that another registry gave are not shown to this reader, and not read twice for the others.
        if has_disk && (facts.here != Here::HiddenLoose || is_left_to_download) {
            return if is_left_to_download {
                None
            } else {
                self.ask_origin(facts.origin_failures)
            };
        }
        if has_disk && !facts.is_direct && self.at >= self.last_start() {
            return Some(self.want_whole());
        }
        Some(Step::ReadDirect(self.stretch(has_disk)))
    }

    fn ask_origin(&mut self, failures: u32) -> Option<Step> {
        if self.at >= self.readable_end() {
            return Some(self.want_whole());
        }
        if let Way::Origin { failures: before } = self.way {
            return (failures > before).then_some(Step::GiveUp(Reason::OriginFailed));
        }
        self.way = Way::Origin { failures };
        let readable = self.readable_end();
        let aligned = |range: Range<u64>| {
            let end = range
                .end
                .checked_next_multiple_of(LOOSE_GRAIN_BYTES)
                .unwrap_or(range.end);
            range.start / LOOSE_GRAIN_BYTES * LOOSE_GRAIN_BYTES..end.min(readable)
        };
        let ranges = self
            .ahead
            .to_read(self.at..self.end)
            .into_iter()
            .map(aligned);
        Some(Step::AskOrigin(
            ranges.filter(|range| !range.is_empty()).collect(),
        ))
    }

    const fn want_whole(&mut self) -> Step {
        self.way = Way::WholeOnly;
        Step::WantWhole
    }

    fn stretch(&self, has_disk: bool) -> Stretch {
        let last_start = self.last_start();
        let is_proved = !has_disk && self.end > last_start;
        let range = if is_proved {
            self.at..self.end
        } else {
            self.at..self.end.min(last_start)
        };
        let until = self.ahead.stretch(range.end).min(last_start).max(range.end);
        Stretch {
            range,
            until,
            is_proved,
            may_skip: !has_disk,
        }
    }

    /// The end of the bytes that can be shown without the whole digest.
    fn readable_end(&self) -> u64 {
        match self.extent {
            Extent::Ranges { shows_end: true } => self.layout.size_bytes(),
            _ => self.last_start(),
        }
    }

    fn last_start(&self) -> u64 {
        self.layout.last().map_or(0, |last| self.layout.start(last))
    }
}
