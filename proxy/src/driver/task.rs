//! The driver's state of one task beside the core's own.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use hawker_core::application::Purpose;
use hawker_core::node::Child;
use hawker_core::piece::{PieceIndex, PieceLayout, PieceSet};
use hawker_core::reader::Storage;
use tokio::sync::watch;

use super::origin_reader::OriginReader;
use crate::download::Shared;
use crate::grant::Grant;
use crate::peer::PieceSource;
use crate::store::{Blob, Partial};

/// Registries, and rights there, that may be tried for the same digest.
const GRANTS: usize = 4;

/// Peers that wait for the disk to be looked at.
pub(super) const ASKING: usize = 1024;

/// The wishes of a client's reader.
pub(super) struct Reading {
    /// The pieces that it still needs, once it has said so.
    pub(super) pieces: Option<Range<PieceIndex>>,
    /// Bytes that it waits for and that only the origin can give.
    pub(super) at_origin: Vec<Range<u64>>,
    /// For whom, and how urgent.
    pub(super) purpose: Purpose,
}

/// Content of the disk for one task.
pub(super) enum OnDisk {
    /// The disk has not been looked at, and the core does not know the task.
    Unknown(Early),
    /// No file: the size is not known, or the disk refuses.
    Nothing,
    /// A file with some of the pieces.
    Partial(Partial),
    /// All pieces are in the file. Its commit is under way, or has failed.
    Committing(Partial),
    /// The committed blob.
    Blob(Blob),
}

/// Events that came before the disk had been looked at.
#[derive(Default)]
pub(super) struct Early {
    /// Peers that asked for the task.
    pub(super) asking: Vec<Child>,
    /// The scheduler elected this node for what it holds.
    pub(super) is_elected: bool,
}

impl OnDisk {
    pub(super) const fn partial(&self) -> Option<&Partial> {
        match self {
            Self::Partial(partial) | Self::Committing(partial) => Some(partial),
            Self::Unknown(_) | Self::Nothing | Self::Blob(_) => None,
        }
    }

    pub(super) const fn blob(&self) -> Option<&Blob> {
        if let Self::Blob(blob) = self {
            Some(blob)
        } else {
            None
        }
    }

    /// The file with some or all of the pieces; from now on there is none.
    pub(super) fn take_partial(&mut self) -> Option<Partial> {
        let partial = self.partial().cloned()?;
        *self = Self::Nothing;
        Some(partial)
    }

    /// The events that came before the disk had been looked at, if it had not been. Now it has.
    pub(super) fn take_early(&mut self) -> Option<Early> {
        let Self::Unknown(early) = self else {
            return None;
        };
        let early = std::mem::take(early);
        *self = Self::Nothing;
        Some(early)
    }

    /// The events that come before the disk has been looked at.
    pub(super) const fn early(&mut self) -> Option<&mut Early> {
        if let Self::Unknown(early) = self {
            Some(early)
        } else {
            None
        }
    }
}

/// A task's claim to memory while the disk refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MemoryClaim {
    /// Nobody came to the task while the disk refused.
    None,
    /// A reader or a child came at that time.
    Since(Instant),
    /// The origin is too slow for the memory that it takes: the task gets none.
    Barred,
}

pub(super) struct TaskState {
    pub(super) shared: Arc<Shared>,
    /// The places and rights of it, the newest last. The reader of the origin follows it.
    pub(super) grants: watch::Sender<Vec<Grant>>,
    /// Idle tasks were let go since the disk had no room for this one.
    pub(super) has_made_room: bool,
    pub(super) disk: OnDisk,
    /// Each client's reader.
    pub(super) readers: HashMap<u64, Reading>,
    pub(super) for_peers: bool,
    /// Clients of this node read it since it last rested.
    pub(super) was_read: bool,
    pub(super) whole: bool,
    pub(super) idle_since: Option<Instant>,
    /// The reader of its origin, once one was needed.
    pub(super) origin: Option<OriginReader>,
    /// The generation of the in-order read under way.
    pub(super) reading: Option<u64>,
    /// Changes when everything is thrown away: late news from before then does not count.
    pub(super) generation: u64,
    pub(super) writing: usize,
    pub(super) unwritten: Vec<PieceIndex>,
    pub(super) last_failure: String,
    /// The size that the first client's registry told, and the name of that registry.
    pub(super) size_hint: Option<(u64, String)>,
    /// The size that a peer told: no more than a guess.
    pub(super) size_guess: Option<u64>,
    /// Since when it is in play: of tasks without disk the oldest come first.
    pub(super) since: Instant,
    pub(super) memory_claim: MemoryClaim,
    /// The end of what may be read from the origin: it moves while the disk refuses.
    pub(super) window: watch::Sender<PieceIndex>,
    /// When the origin may be read on, for the rates' sake.
    pub(super) resumes: watch::Sender<tokio::time::Instant>,
}

impl TaskState {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            grants: watch::Sender::default(),
            has_made_room: false,
            disk: OnDisk::Unknown(Early::default()),
            readers: HashMap::new(),
            for_peers: false,
            was_read: false,
            whole: false,
            idle_since: None,
            origin: None,
            reading: None,
            generation: 0,
            writing: 0,
            unwritten: Vec::new(),
            last_failure: String::new(),
            size_hint: None,
            size_guess: None,
            since: Instant::now(),
            memory_claim: MemoryClaim::None,
            window: watch::Sender::new(PieceIndex::MAX),
            resumes: watch::Sender::new(tokio::time::Instant::now()),
        }
    }

    /// The common purpose of its clients; `None`: nobody reads it.
    pub(super) fn purpose(&self) -> Option<Purpose> {
        Purpose::common(self.readers.values().map(|reading| &reading.purpose))
    }

    /// The newest right at a registry takes the place of the one before it.
    pub(super) fn add_grant(&self, grant: Grant) {
        let named = |grant: &Grant| !grant.source.registry.is_empty();
        let same = |old: &Grant| {
            old.source == grant.source
                && old.authorization.is_some() == grant.authorization.is_some()
        };
        self.grants.send_if_modified(|grants| {
            if grants.last() == Some(&grant) || !named(&grant) && !grants.is_empty() {
                return false;
            }
            grants.retain(|old| named(old) && !same(old));
            if grants.len() >= GRANTS {
                grants.remove(0);
            }
            grants.push(grant.clone());
            true
        });
    }

    /// Adds a place that a peer names for the task. It is tried after the known ones, and replaces nothing but an
    /// earlier word about the same repository: a member cannot lead others to places where they do not want to go.
    pub(super) fn add_peers_grant(&self, grant: Grant) {
        let is_new = |grants: &Vec<Grant>| {
            let named = grants.iter().filter(|old| !old.source.registry.is_empty());
            named.clone().count() > 0 && named.clone().all(|old| old.source != grant.source)
        };
        let is_new = is_new(&self.grants.borrow());
        if !is_new {
            return self.add_grant(grant);
        }
        self.grants.send_if_modified(|grants| {
            let has_room = grants.len() < GRANTS;
            if has_room {
                grants.insert(0, grant);
            }
            has_room
        });
    }

    /// Pieces `held` are in `file`.
    pub(super) fn adopt_file(&mut self, layout: PieceLayout, file: Arc<File>, held: PieceSet) {
        self.shared.update(|s| {
            if s.layout.is_none() {
                s.shown = Some(PieceSet::empty(layout.count()));
            }
            s.layout = Some(layout);
            s.written = Some(held);
            s.file = Some(file);
        });
    }

    /// The size is known, and no file is there (yet).
    pub(super) fn adopt_memory(&mut self, layout: PieceLayout) {
        if self.shared.lock().layout.is_some() {
            return;
        }
        self.shared.update(|s| {
            s.layout = Some(layout);
            s.shown = Some(PieceSet::empty(layout.count()));
            s.written = Some(PieceSet::empty(layout.count()));
        });
    }

    /// Whether the disk has been looked at, so that the core knows the task.
    pub(super) const fn is_ready(&self) -> bool {
        !matches!(self.disk, OnDisk::Unknown(_))
    }

    pub(super) fn is_barred_from_memory(&self) -> bool {
        self.memory_claim == MemoryClaim::Barred
    }

    pub(super) fn in_memory(&self) -> bool {
        self.shared.lock().in_memory()
    }

    /// From now on nothing goes to the disk. Pieces that are there already may be read.
    pub(super) fn degrade(&mut self) {
        self.shared.update(|s| {
            if s.storage == Storage::Disk {
                s.storage = Storage::Memory;
            }
        });
        if let Some(origin) = &self.origin {
            origin.wish(|wishes| wishes.file = None);
        }
        self.unwritten.clear();
    }

    /// The source of a piece's bytes for an upload.
    pub(super) fn piece_source(&self, piece: PieceIndex) -> Option<PieceSource> {
        let state = self.shared.lock();
        let layout = state.layout?;
        if state.written.as_ref().is_some_and(|w| w.contains(piece))
            && let Some(file) = &state.file
        {
            return Some(PieceSource::File {
                file: Arc::clone(file),
                range: layout.range(piece),
            });
        }
        state.hot.get(&piece).map(super::memory)
    }
}
