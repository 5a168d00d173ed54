//! A download as its readers and the driver share it: verified bytes, loose bytes, and the reason when none come.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use hawker_core::byte_set::ByteSet;
use hawker_core::node::Failure;
use hawker_core::piece::{PieceIndex, PieceLayout, PieceSet};
use hawker_core::reader::Storage;
use hawker_oci::digest::Digest;
use tokio::sync::Notify;

use crate::buffer::BLOCK_BYTES;
use crate::store::Blob;

mod loose;

use loose::Loose;

/// Longest stretch of the file handed out at once.
pub(crate) const FILE_SEGMENT_BYTES: u64 = 8 << 20;

/// Why a reader gets no (more) bytes.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FlightError {
    /// Peers had nothing and the origin answered with this status: pass it on.
    #[error("the origin answered {0}")]
    Origin(u16),
    /// Peers had nothing and the origin could not be reached, is forbidden, or broke off.
    #[error("{0}")]
    Unreachable(String),
    /// The origin's bytes do not hash to the digest.
    #[error("the origin's bytes do not match {0}")]
    WrongDigest(Digest),
    /// The disk let what it had of it rot. Asked again, it is fetched anew.
    #[error("what was on disk of {0} was rotten and is gone: ask again")]
    Rotten(Digest),
    /// The origin does not say how long the blob is: stream it without pieces.
    #[error("the origin does not say how long the blob is")]
    UnknownLength,
    /// The origin says another length than was known; the known facts about it have been thrown away.
    #[error("the origin says another length of {0} than before")]
    WrongSize(Digest),
    /// Another registry says another size than this client's, and none is proved right: stream it without pieces.
    #[error(
        "registries disagree on the size of {0}: it is streamed from the client's own until one size is proved"
    )]
    OtherSize(Digest),
    /// The bytes here came from elsewhere, and this registry has not proved that it has the blob.
    #[error("the registry has not proved that it has the blob: {0}")]
    Unproved(String),
    /// The same, and nothing speaks against the registry: the blob can come from it, past what is here.
    #[error("the registry can't prove that it has {0}")]
    Unprovable(Digest),
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    Stopping,
}

impl FlightError {
    /// The meaning of a failure of the origin for a reader.
    pub(crate) fn of(task: Digest, failure: Failure, reason: &str) -> Self {
        match failure {
            Failure::Status(status) => FlightError::Origin(status),
            Failure::Unreachable => FlightError::Unreachable(reason.to_owned()),
            Failure::WrongDigest => FlightError::WrongDigest(task),
            Failure::UnknownLength => FlightError::UnknownLength,
            Failure::WrongSize => FlightError::WrongSize(task),
        }
    }
}

/// Verified bytes of a blob, for a client.
#[derive(Clone, Debug)]
pub enum Segment {
    /// From memory, at most 64 KiB.
    Memory(Bytes),
    /// The same, in a buffer of a connection to the origin: it is to be sent before more is taken.
    Passed(Bytes),
    /// In a file: this range of it.
    File {
        /// The file.
        file: Arc<File>,
        /// The range in the file.
        range: Range<u64>,
    },
}

/// The state that the driver and a task's readers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) task: Digest,
    state: Mutex<State>,
    pub(crate) changed: Notify,
}

/// How far a task's download is, as its readers see it.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) layout: Option<PieceLayout>,
    /// Pieces that clients may see.
    pub(crate) shown: Option<PieceSet>,
    /// Verified pieces that are not in the file yet.
    pub(crate) hot: BTreeMap<PieceIndex, Bytes>,
    /// Grows when all that was shown turns out to be wrong: bytes from before and after then make no blob together.
    pub(crate) epoch: u64,
    /// Pieces in the file.
    pub(crate) written: Option<PieceSet>,
    pub(crate) file: Option<Arc<File>>,
    /// The file is that of this blob: its pieces are checked before they are shown.
    pub(crate) blob: Option<Blob>,
    /// Bytes in the file that this node read from the origin and that nothing has verified yet.
    pub(crate) loose: Loose,
    /// How often the origin failed to give loose bytes, and why it did last.
    pub(crate) loose_failures: u32,
    pub(crate) loose_failed: Option<FlightError>,
    pub(crate) failed: Option<FlightError>,
    /// The registry that told the size; `None` where it came from the disk or from peers.
    pub(crate) sized_by: Option<String>,
    /// The size is right: this node or the issuer that sealed the table compared all bytes with the digest.
    pub(crate) is_size_proven: bool,
    /// The place of verified pieces.
    pub(crate) storage: Storage,
    /// Nobody but the origin is about to bring pieces, so ranges are read from the origin at once.
    pub(crate) is_alone: bool,
}

impl Shared {
    pub(crate) fn new(task: Digest) -> Self {
        Self {
            task,
            state: Mutex::default(),
            changed: Notify::new(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file, and which pieces are in it.
    pub(crate) fn on_disk(&self) -> Option<(Arc<File>, PieceSet)> {
        let state = self.lock();
        state.file.clone().zip(state.written.clone())
    }

    /// Changes the state and wakes all readers.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let out = change(&mut self.lock());
        self.changed.notify_waiters();
        out
    }
}

impl State {
    /// All that was shown turns out to be wrong.
    pub(crate) fn take_back(&mut self) {
        self.epoch += 1;
        self.is_size_proven = false;
        self.hot.clear();
        self.blob = None;
        self.loose = Loose::default();
        for set in [&mut self.shown, &mut self.written].into_iter().flatten() {
            *set = PieceSet::empty(set.count());
        }
    }

    /// Whether the disk refuses: pieces before the slowest reader are gone.
    pub(crate) fn in_memory(&self) -> bool {
        self.storage != Storage::Disk
    }

    /// Whether the piece at `at` is in memory or has not come yet. Without a disk, pieces that all readers had passed are gone.
    pub(crate) fn is_to_come(&self, layout: PieceLayout, at: u64) -> bool {
        let piece = layout.containing(at);
        self.shown
            .as_ref()
            .is_none_or(|shown| !shown.contains(piece))
            || self.hot.contains_key(&piece)
    }

    /// Whether the size is another registry's word, and not what a client's own `registry` says.
    pub(crate) fn is_other_size(&self, size_hint: Option<u64>, registry: &str) -> bool {
        let Some(layout) = self.layout else {
            return false;
        };
        let is_own = self.sized_by.as_deref() == Some(registry);
        !self.is_size_proven
            && !is_own
            && size_hint.map_or(self.sized_by.is_some(), |hint| hint != layout.size_bytes())
    }

    /// All bytes that are here, verified or not.
    pub(crate) fn present(&self) -> ByteSet {
        let mut present = ByteSet::default();
        self.loose.add_to(&mut present);
        let Some(layout) = self.layout else {
            return present;
        };
        let written = self.written.iter().flat_map(PieceSet::iter);
        written
            .chain(self.hot.keys().copied())
            .for_each(|piece| present.insert(layout.range(piece)));
        present
    }

    /// The end of bytes from `at` on that nobody needs to read: they are here.
    pub(crate) fn present_until(&self, at: u64) -> u64 {
        if let Some((end, _)) = self.loose.run_at(at) {
            return end;
        }
        let Some(layout) = self.layout.filter(|layout| at < layout.size_bytes()) else {
            return at;
        };
        let piece = layout.containing(at);
        let is_written = self
            .written
            .as_ref()
            .is_some_and(|written| written.contains(piece));
        if is_written || self.hot.contains_key(&piece) {
            layout.range(piece).end
        } else {
            at
        }
    }

    /// Loose bytes from `at` on that this registry gave.
    pub(crate) fn loose_at(&self, registry: &str, at: u64, end: u64) -> Option<Segment> {
        let limit = end
            .min(at + FILE_SEGMENT_BYTES)
            .min(self.loose.end_of(registry, at));
        let file = self.file.as_ref().filter(|_| limit > at)?;
        Some(Segment::File {
            file: Arc::clone(file),
            range: at..limit,
        })
    }

    /// The bytes at `at`, if clients may see them now.
    pub(crate) fn bytes_at(&self, at: u64, end: u64) -> Option<Segment> {
        let (layout, shown) = (self.layout?, self.shown.as_ref()?);
        let piece = layout.containing(at);
        if !shown.contains(piece) {
            return None;
        }
        let on_disk = |piece| {
            shown.contains(piece) && self.written.as_ref().is_some_and(|w| w.contains(piece))
        };
        if let (true, Some(file)) = (on_disk(piece), &self.file) {
            let mut last = piece;
            let limit = end.min(at + FILE_SEGMENT_BYTES);
            while layout.range(last).end < limit && on_disk(last + 1) {
                last += 1;
            }
            return Some(Segment::File {
                file: Arc::clone(file),
                range: at..layout.range(last).end.min(limit),
            });
        }
        let bytes = self.hot.get(&piece)?;
        let from = (at - layout.start(piece)) as usize;
        let to = bytes
            .len()
            .min(from + BLOCK_BYTES)
            .min((end - layout.start(piece)) as usize);
        // A copy, so that a slow client holds these bytes and not the whole piece.
        Some(Segment::Memory(Bytes::copy_from_slice(&bytes[from..to])))
    }
}
