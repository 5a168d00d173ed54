//! What the driver keeps of one task beside the core's own state.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use hawker_core::application::Purpose;
use hawker_core::node::Child;
use hawker_core::piece::{PieceIndex, PieceLayout, PieceSet};
use tokio::sync::watch;

use super::origin_read;
use crate::flight::Shared;
use crate::grant::Grant;
use crate::peer::PieceSource;
use crate::store::{Blob, Partial};

/// Registries, and rights there, that may be tried for the same digest.
const GRANTS: usize = 4;

/// Peers that wait for the disk to be looked at.
pub(super) const ASKING: usize = 1024;

/// What a client's reader wants.
pub(super) struct Reading {
    /// The pieces that it still needs, once it has said so.
    pub(super) pieces: Option<Range<PieceIndex>>,
    /// For whom, and how urgent.
    pub(super) purpose: Purpose,
}

pub(super) struct TaskState {
    pub(super) shared: Arc<Shared>,
    /// Where it can be had and with what right, the newest last. Whoever reads the origin follows it.
    pub(super) grants: watch::Sender<Vec<Grant>>,
    /// The disk has been looked at and the core knows the task.
    pub(super) ready: bool,
    pub(super) partial: Option<Partial>,
    pub(super) blob: Option<Blob>,
    /// Each client's reader.
    pub(super) readers: HashMap<u64, Reading>,
    /// Peers that asked before the disk had been looked at.
    pub(super) asking: Vec<Child>,
    pub(super) for_peers: bool,
    pub(super) whole: bool,
    pub(super) elected: bool,
    pub(super) idle_since: Option<Instant>,
    pub(super) origin: Option<origin_read::Reading>,
    /// Changes when everything is thrown away: late news from before then does not count.
    pub(super) generation: u64,
    pub(super) writing: usize,
    pub(super) unwritten: Vec<PieceIndex>,
    pub(super) completing: bool,
    pub(super) last_failure: String,
    /// It is one of the few tasks that hold memory because the disk refuses.
    pub(super) holds_memory: bool,
    /// It may not hold any: its origin is too slow.
    pub(super) starved: bool,
    /// The end of what may be read from the origin: moves with the readers when the disk refuses.
    pub(super) window: watch::Sender<PieceIndex>,
    /// When the origin may be read on, for the rates' sake.
    pub(super) resumes: watch::Sender<tokio::time::Instant>,
}

impl TaskState {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            grants: watch::Sender::default(),
            ready: false,
            partial: None,
            blob: None,
            readers: HashMap::new(),
            asking: Vec::new(),
            for_peers: false,
            whole: false,
            elected: false,
            idle_since: None,
            origin: None,
            generation: 0,
            writing: 0,
            unwritten: Vec::new(),
            completing: false,
            last_failure: String::new(),
            holds_memory: false,
            starved: false,
            window: watch::Sender::new(PieceIndex::MAX),
            resumes: watch::Sender::new(tokio::time::Instant::now()),
        }
    }

    /// What the clients want it for, all together; `None`: nobody reads it.
    pub(super) fn purpose(&self) -> Option<Purpose> {
        Purpose::common(self.readers.values().map(|reading| &reading.purpose))
    }

    /// The newest right at a registry takes the place of the one before it.
    pub(super) fn add_grant(&self, grant: Grant) {
        let named = |grant: &Grant| !grant.source.registry.is_empty();
        let same = |old: &Grant| {
            old.source == grant.source && old.authorization.is_some() == grant.authorization.is_some()
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
        self.shared.update(|s| {
            s.layout = Some(layout);
            s.shown = Some(PieceSet::empty(layout.count()));
            s.written = Some(PieceSet::empty(layout.count()));
        });
    }

    pub(super) fn in_memory(&self) -> bool {
        self.shared.lock().in_memory
    }

    /// From now on nothing goes to the disk. What is there already may be read.
    pub(super) fn degrade(&mut self) {
        self.shared.update(|s| s.in_memory = true);
        self.completing = false;
        self.unwritten.clear();
    }

    /// The pieces to hold in memory: from the slowest reader on, `bytes` long or two pieces; with no bytes, none. Drops the rest.
    pub(super) fn memory_window(&mut self, bytes: u64) -> Range<PieceIndex> {
        let slowest =
            self.readers.values().map(|at| at.pieces.as_ref().map_or(0, |pieces| pieces.start)).min();
        let start = slowest.unwrap_or(0);
        let window = self.shared.update(|s| {
            s.no_memory = bytes == 0;
            if s.no_memory {
                s.hot.clear();
                return 0..0;
            }
            s.hot.retain(|piece, _| *piece >= start);
            let end = s.layout.map_or(start + 2, |layout| {
                layout.containing(layout.start(start).saturating_add(bytes)).max(start.saturating_add(2))
            });
            start..end
        });
        self.window.send_if_modified(|end| std::mem::replace(end, window.end) != window.end);
        window
    }

    /// Where a piece's bytes are for an upload.
    pub(super) fn piece_source(&self, piece: PieceIndex) -> Option<PieceSource> {
        let state = self.shared.lock();
        let layout = state.layout?;
        if state.written.as_ref().is_some_and(|w| w.contains(piece))
            && let Some(file) = &state.file
        {
            return Some(PieceSource::File { file: Arc::clone(file), range: layout.range(piece) });
        }
        state.hot.get(&piece).map(super::memory)
    }
}
