//! Which pieces of a committed blob were found right since the daemon started.
//!
//! The disk may have been damaged while no daemon ran. So each piece of a blob that an earlier run committed is hashed before its
//! bytes leave for the first time. Pieces that this run wrote were hashed on their way in. A file that was changed since counts as
//! one that was never looked at.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hawker_core::piece::{PieceIndex, PieceSet};
use tokio::time::timeout;

use super::blob::Blob;
use super::disk;
use hawker_lanes::{self as lanes, Lane};

/// The longest wait for one piece to be hashed. A disk that takes longer is taken for one that can't be read.
const HASHED_WITHIN: Duration = Duration::from_secs(30);

/// The facts about one committed blob. They live as long as the blob is in the store, and cost one bit a piece at
/// most.
#[derive(Debug, Default)]
pub(super) struct Checks {
    state: Mutex<State>,
    /// Held while a piece is hashed: concurrent readers hash each piece once.
    turn: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Default)]
struct State {
    stamp: Option<Stamp>,
    right: Right,
    /// A piece was wrong. Nothing else of the file is believed, whatever happens to it.
    rotten: bool,
}

#[derive(Debug, Default)]
enum Right {
    #[default]
    None,
    Some(PieceSet),
    All,
}

/// Changes whenever somebody writes to the file. Decay of the disk itself does not change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size_bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            size_bytes: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

impl Checks {
    /// Those of a blob that this run of the daemon wrote.
    pub(super) fn all_right(file: &File) -> Self {
        let state = State {
            stamp: Stamp::of(file).ok(),
            right: Right::All,
            rotten: false,
        };
        Self {
            state: Mutex::new(state),
            turn: Arc::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a change that the daemon itself made to the file: it says nothing about the bytes.
    pub(super) fn changed_by_us(&self, file: &File, change: impl FnOnce()) {
        let mut state = self.state();
        state.look_at(file);
        change();
        state.stamp = Stamp::of(file).ok();
    }

    /// Whether all these pieces were found right, and the file has not changed since.
    fn has(&self, file: &File, pieces: Range<PieceIndex>) -> bool {
        let mut state = self.state();
        state.look_at(file);
        match &state.right {
            _ if pieces.is_empty() => true,
            Right::All => !state.rotten,
            Right::Some(right) => !state.rotten && right.first_missing(pieces.start) >= pieces.end,
            Right::None => false,
        }
    }

    pub(super) fn is_rotten(&self) -> bool {
        self.state().rotten
    }

    pub(super) fn found_rotten(&self) {
        self.state().rotten = true;
    }

    /// Bytes that were written since the file was last looked at are not known to be right: then nothing is noted.
    fn found_right(&self, file: &File, pieces: Range<PieceIndex>, count: u32) {
        let mut state = self.state();
        if !state.look_at(file) {
            return;
        }
        state.right = match std::mem::take(&mut state.right) {
            Right::All => Right::All,
            known => {
                let mut right = if let Right::Some(right) = known {
                    right
                } else {
                    PieceSet::empty(count)
                };
                right.insert_range(pieces);
                if right.is_full() {
                    Right::All
                } else {
                    Right::Some(right)
                }
            }
        };
    }
}

impl State {
    /// Forgets what was found where somebody has written to the file since it was last looked at. Whether it is unchanged.
    fn look_at(&mut self, file: &File) -> bool {
        let stamp = Stamp::of(file).ok();
        let unchanged = stamp.is_some() && stamp == self.stamp;
        if !unchanged {
            self.right = Right::None;
        }
        self.stamp = stamp;
        unchanged
    }
}

impl Blob {
    /// Whether the pieces with these bytes were found right since the daemon started: they may leave as they are. Does not block.
    pub fn is_checked(&self, bytes: &Range<u64>) -> bool {
        self.checks()
            .has(&self.file, self.table.layout().covering(bytes.clone()))
    }

    /// Whether both were read from the same copy of the blob on disk.
    pub fn is_same(&self, other: &Blob) -> bool {
        Arc::ptr_eq(self.checks(), other.checks())
    }

    /// Makes sure that a piece is right: hashes it, unless that was done since the daemon started. `false` when it is wrong, and then
    /// the blob is gone from the store; also when it can't be read in time.
    pub async fn check(&self, piece: PieceIndex) -> bool {
        let pieces = piece..piece + 1;
        if self.checks().has(&self.file, pieces.clone()) {
            return true;
        }
        let hashing = async {
            let turn = Arc::clone(&self.checks().turn).lock_owned().await;
            if self.checks().is_rotten() || self.checks().has(&self.file, pieces) {
                return !self.checks().is_rotten();
            }
            let blob = self.clone();
            // It goes on to its end, even if the reader leaves.
            let hash = move || {
                let _turn = turn;
                blob.check_now(piece)
            };
            lanes::run(Lane::Clients, hash).await.unwrap_or(false)
        };
        timeout(HASHED_WITHIN, hashing).await.unwrap_or_else(|_| {
            tracing::warn!(task = %self.table.task(), piece, "the disk takes too long to read a piece");
            false
        })
    }

    /// Hashes a piece. Blocking.
    pub(super) fn check_now(&self, piece: PieceIndex) -> bool {
        let task = self.table.task();
        self.checks().state().look_at(&self.file);
        let right = disk::piece_is_right(&self.file, &self.table, piece);
        if !matches!(right, Ok(true)) {
            let why = right.map_or_else(
                |error| format!("{error}"),
                |_| "its bytes are wrong".to_owned(),
            );
            if let Err(error) = self.drop_rotten(&format!("piece {piece}: {why}")) {
                tracing::warn!(%task, %error, "a rotten blob can't be deleted");
            }
            return false;
        }
        self.checks()
            .found_right(&self.file, piece..piece + 1, self.table.layout().count());
        true
    }
}
