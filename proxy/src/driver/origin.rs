//! The driver's dealings with the origin: one reader a task, told the wanted bytes.

use std::ops::Range;
use std::sync::Arc;

use hawker_core::node::{Failure, Input, Verdict};
use hawker_core::piece::{PieceIndex, PieceTable};
use hawker_oci::digest::{Chain, Digest};
use tracing::{debug, info, warn};

use super::origin_reader::{LooseFile, OriginReader, Rest, Setup};
use super::task::{Reading, TaskState};
use super::{Driver, Event};
use crate::buffer::PieceBuffer;
use crate::download::FlightError;
use crate::store::StoreError;
use hawker_lanes::{self as lanes, Lane};

impl Driver {
    /// The core wants the rest of a task read in order, from this piece on.
    pub(super) fn read_origin(&mut self, task: Digest, from: PieceIndex) {
        let chain = match self.node.table(&task) {
            Some(table) => table.chain_at(from),
            None => Some(Chain::new(task.algorithm())),
        };
        let Some(chain) = chain else { return };
        self.generation += 1;
        let generation = self.generation;
        debug!(%task, from, "reading from the origin");
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        state.reading = Some(generation);
        let rest = Rest {
            generation,
            from,
            chain,
        };
        self.with_origin(&task, |origin| {
            origin.wish(|wishes| wishes.rest = Some(rest))
        });
        self.wish_ranges(&task);
    }

    /// A reader waits for bytes that nobody else can give.
    pub(super) fn read_at_origin(&mut self, task: Digest, reader: u64, ranges: Vec<Range<u64>>) {
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        let Some(reading) = state.readers.get_mut(&reader) else {
            return;
        };
        reading.at_origin = ranges;
        self.with_origin(&task, |_| {});
        self.wish_ranges(&task);
    }

    /// Tells the origin's reader what clients wait for.
    pub(super) fn wish_ranges(&self, task: &Digest) {
        let Some(state) = self.tasks.get(task) else {
            return;
        };
        let (Some(origin), Some(layout)) = (&state.origin, state.shared.lock().layout) else {
            return;
        };
        let reads_rest = state.reading.is_some();
        let ranges = |reading: &Reading| match &reading.pieces {
            _ if !reading.at_origin.is_empty() => reading.at_origin.clone(),
            Some(pieces) if reads_rest && !pieces.is_empty() => {
                std::iter::once(layout.start(pieces.start)..layout.range(pieces.end - 1).end)
                    .collect()
            }
            _ => Vec::new(),
        };
        let readers: Vec<Range<u64>> = state.readers.values().flat_map(ranges).collect();
        origin.wish(|wishes| wishes.readers = readers);
    }

    /// Does something with the task's reader; a first one begins here.
    fn with_origin(&mut self, task: &Digest, act: impl FnOnce(&OriginReader)) {
        let layout = self.node.table(task).map(PieceTable::layout);
        let Some(state) = self.tasks.get_mut(task) else {
            return;
        };
        if state.origin.is_none() {
            let source = (self.config.sources)(*task, state.grants.subscribe());
            let reader = OriginReader::start(Setup {
                task: *task,
                source,
                layout,
                pool: self.pool.clone(),
                shared: Arc::clone(&state.shared),
                slots: self.slots.clone(),
                window: state.window.subscribe(),
                resumes: state.resumes.subscribe(),
                events: self.config.events.clone(),
            });
            let file = state
                .disk
                .partial()
                .cloned()
                .filter(|_| !state.in_memory())
                .map(LooseFile);
            reader.wish(|wishes| wishes.file = file);
            state.origin = Some(reader);
        }
        if let Some(origin) = &state.origin {
            origin.wish(|wishes| (wishes.layout, wishes.size_guess) = (layout, state.size_guess));
            act(origin);
        }
    }

    /// The origin gave no more.
    pub(super) fn origin_failed(
        &mut self,
        task: Digest,
        generation: Option<u64>,
        failure: Failure,
        reason: String,
    ) {
        let now = self.now();
        info!(%task, ?failure, reason, "the origin gave no more");
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        let error = FlightError::of(task, failure, &reason);
        state
            .readers
            .values_mut()
            .for_each(|reading| reading.at_origin.clear());
        state.shared.update(|s| {
            s.loose_failures += 1;
            s.loose_failed = Some(error);
        });
        state.last_failure = reason;
        if generation.is_some_and(|generation| state.reading == Some(generation)) {
            state.reading = None;
            self.node.handle(
                now,
                Input::OriginOver {
                    task,
                    failure: Some(failure),
                },
            );
        }
        self.wish_ranges(&task);
    }

    /// A piece was hashed from the file, where its bytes were loose.
    pub(super) fn note_on_disk(&mut self, task: Digest, piece: PieceIndex, buffer: PieceBuffer) {
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        let Some(partial) = state.disk.partial().cloned().filter(|_| !state.in_memory()) else {
            return self.take(task, piece, buffer, Verdict::Keep);
        };
        let data = buffer.freeze();
        state.shared.update(|s| s.hot.insert(piece, data));
        state.writing += 1;
        let (generation, events) = (state.generation, self.config.events.clone());
        lanes::start(Lane::Downloads, move || {
            let outcome = partial.note(piece);
            let _ = events.blocking_send(Event::Written {
                task,
                generation,
                piece,
                outcome,
            });
        });
        self.announce(&task);
    }

    /// The disk refused loose bytes: the task goes on without it.
    pub(super) fn disk_refused(&mut self, task: Digest, error: &StoreError) {
        if self.tasks.get(&task).is_none_or(TaskState::in_memory) {
            return;
        }
        warn!(%task, %error, "the disk refuses: this task goes on in memory");
        self.enter_memory(task);
        if !self.node.is_shared(&task) {
            self.holding(&task, 0, 0, false);
        }
    }
}
