//! Pieces on their way to the disk, and the commit at the end.

use std::sync::Arc;

use bytes::Bytes;
use hawker_core::node::{Input, Phase, Verdict};
use hawker_core::piece::PieceIndex;
use hawker_oci::digest::Digest;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::task::{OnDisk, TaskState};
use super::{Driver, Event};
use crate::buffer::PieceBuffer;
use crate::store::{Blob, Partial, StoreError};
use hawker_lanes::{self as lanes, Lane};
use hawker_tracker::Holding;

impl Driver {
    /// Takes a piece's bytes.
    pub(super) fn take(
        &mut self,
        task: Digest,
        piece: PieceIndex,
        buffer: PieceBuffer,
        verdict: Verdict,
    ) {
        match verdict {
            Verdict::Drop => return,
            Verdict::Wrong => {
                warn!(%task, piece, "wrong bytes were thrown away");
                self.config.metrics.pieces_rejected.inc();
                return;
            }
            Verdict::Keep => {}
        }
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        let data = buffer.freeze();
        state.shared.update(|s| s.hot.insert(piece, data.clone()));
        if state.in_memory() {
            return self.announce(&task);
        }
        match state.disk.partial().cloned() {
            Some(partial) => {
                write(
                    state,
                    partial,
                    self.config.events.clone(),
                    task,
                    piece,
                    data,
                );
            }
            None => state.unwritten.push(piece),
        }
        self.announce(&task);
    }

    /// Writes what came before the file was there.
    pub(super) fn flush(&mut self, task: Digest) {
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        let Some(partial) = state.disk.partial().cloned() else {
            return;
        };
        for piece in std::mem::take(&mut state.unwritten) {
            let Some(data) = state.shared.lock().hot.get(&piece).cloned() else {
                continue;
            };
            write(
                state,
                partial.clone(),
                self.config.events.clone(),
                task,
                piece,
                data,
            );
        }
        self.commit_if_written(task);
    }

    pub(super) fn written(
        &mut self,
        task: Digest,
        generation: u64,
        piece: PieceIndex,
        outcome: Result<(), StoreError>,
    ) {
        let Some(state) = self
            .tasks
            .get_mut(&task)
            .filter(|t| t.generation == generation)
        else {
            return;
        };
        state.writing -= 1;
        match outcome {
            Ok(()) => {
                let in_memory = state.shared.update(|s| {
                    if let Some(written) = &mut s.written {
                        written.insert(piece);
                    }
                    s.hot.remove(&piece);
                    s.in_memory()
                });
                if in_memory {
                    self.tell(Input::OnDisk { task, piece });
                }
            }
            Err(error) => {
                if !state.in_memory() {
                    warn!(%task, %error, "the disk refuses: this task goes on in memory");
                    self.enter_memory(task);
                    if !self.node.is_shared(&task) {
                        self.holding(&task, 0, 0, false);
                    }
                }
            }
        }
        self.commit_if_written(task);
    }

    pub(super) fn complete(&mut self, task: Digest) {
        if self.tasks.get(&task).is_some_and(TaskState::in_memory) {
            self.unwant(&task);
        }
        self.commit_if_written(task);
    }

    pub(super) fn commit_if_written(&mut self, task: Digest) {
        let is_complete = self.node.phase(&task) == Phase::Committing;
        let Some(state) = self.tasks.get_mut(&task).filter(|_| is_complete) else {
            return;
        };
        if state.writing > 0 || !state.unwritten.is_empty() || state.in_memory() {
            return;
        }
        let (OnDisk::Partial(partial), Some(table)) =
            (&state.disk, self.node.table(&task).cloned())
        else {
            return;
        };
        let partial = partial.clone();
        state.disk = OnDisk::Committing(partial.clone());
        let (events, generation) = (self.config.events.clone(), state.generation);
        lanes::start(Lane::Downloads, move || {
            let outcome = partial.commit(&table);
            drop(partial);
            let _ = events.blocking_send(Event::Committed {
                task,
                generation,
                outcome,
            });
        });
    }

    pub(super) fn committed(
        &mut self,
        task: Digest,
        generation: u64,
        outcome: Result<Blob, StoreError>,
    ) {
        let Some(state) = self
            .tasks
            .get_mut(&task)
            .filter(|t| t.generation == generation)
        else {
            return;
        };
        match outcome {
            Ok(blob) => {
                info!(%task, size_bytes = blob.size_bytes(), "committed");
                self.sizes_doubted.remove(&task);
                state
                    .shared
                    .update(|s| s.file = Some(Arc::clone(&blob.file)));
                (state.origin, state.reading) = (None, None);
                let (size_bytes, count) = (blob.size_bytes(), blob.table.layout().count());
                state.disk = OnDisk::Blob(blob);
                self.tell(Input::Committed(task));
                self.config.proofs.settle(&task);
                self.holding(&task, size_bytes, count, true);
            }
            // The pieces are verified and readable; only the commit is missing. A restart finds them.
            Err(error) => {
                warn!(%task, %error, "could not commit: the blob is served but may not be kept")
            }
        }
        // Only now: before, the scheduler would know neither a holder nor anybody who is about to be one.
        self.unwant(&task);
    }

    /// The scheduler need not look for parents any more.
    pub(super) fn unwant(&self, task: &Digest) {
        if let Some(tracker) = &self.config.tracker {
            tracker.forget(task);
        }
    }

    /// Tells the scheduler how much is held.
    pub(super) fn announce(&self, task: &Digest) {
        if !self.node.is_shared(task) {
            return;
        }
        if let (Some(held), Some(table)) = (self.node.held(task), self.node.table(task)) {
            self.holding(task, table.layout().size_bytes(), held.len(), false);
        }
    }

    pub(super) fn holding(&self, task: &Digest, size_bytes: u64, pieces: u32, complete: bool) {
        if let Some(tracker) = &self.config.tracker {
            tracker.holding(Holding {
                task: *task,
                size_bytes,
                pieces,
                complete,
            });
        }
    }
}

/// Puts a verified piece on its way to the disk; [`Event::Written`] follows.
fn write(
    state: &mut TaskState,
    partial: Partial,
    events: mpsc::Sender<Event>,
    task: Digest,
    piece: PieceIndex,
    data: Bytes,
) {
    state.writing += 1;
    let generation = state.generation;
    lanes::start(Lane::Downloads, move || {
        let outcome = partial.write(piece, &data);
        // The memory is free before the driver hears of it.
        drop(data);
        let _ = events.blocking_send(Event::Written {
            task,
            generation,
            piece,
            outcome,
        });
    });
}
