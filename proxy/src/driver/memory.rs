//! Tasks whose pieces the disk does not take: how much memory each gets, and when the disk is tried again.

use std::time::{Duration, Instant};

use hawker_core::Time;
use hawker_core::memory::shares;
use hawker_core::node::Input;
use hawker_core::piece::{PieceIndex, PieceLayout};
use hawker_core::reader::Storage;
use hawker_oci::digest::Digest;
use tracing::{info, warn};

use super::origin_reader::LooseFile;
use super::task::{MemoryClaim, OnDisk, TaskState};
use super::{Driver, Event};
use hawker_lanes::{self as lanes, Lane};

/// The memory of one task without disk, at most.
const WINDOW_BYTES: u64 = 12 << 20;

/// A task without disk has this long to get its first reader or child going.
const CLAIMED_FOR: Duration = Duration::from_secs(5);

impl Driver {
    /// The disk refuses this task: it goes on in memory.
    pub(super) fn enter_memory(&mut self, task: Digest) {
        let now = self.now();
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        state.degrade();
        let on_disk = state.shared.lock().written.clone();
        let Some(on_disk) = on_disk else { return };
        let budget_bytes = if state.is_barred_from_memory() {
            0
        } else {
            WINDOW_BYTES
        };
        self.node.handle(
            now,
            Input::WithoutDisk {
                task,
                on_disk,
                budget_bytes,
            },
        );
        self.claim_memory(task);
        self.announce(&task);
    }

    /// A reader or a child of a task without disk has come: the task gets its share at once.
    pub(super) fn claim_memory(&mut self, task: Digest) {
        if let Some(state) = self.tasks.get_mut(&task).filter(|state| state.in_memory()) {
            if !state.is_barred_from_memory() {
                state.memory_claim = MemoryClaim::Since(Instant::now());
            }
            self.memory_changed = true;
            self.share_memory();
        }
    }

    /// Divides half of the memory among the tasks without disk that need any. The other half is for pieces on their way.
    pub(super) fn share_memory(&mut self) {
        if !std::mem::take(&mut self.memory_changed) {
            return;
        }
        let without_disk = self.tasks.iter().filter(|(_, state)| state.in_memory());
        let mut needing: Vec<(Instant, Digest, u64)> = Vec::new();
        let mut others: Vec<Digest> = Vec::new();
        for (task, state) in without_disk {
            let layout = state.shared.lock().layout;
            let claims =
                matches!(state.memory_claim, MemoryClaim::Since(at) if at.elapsed() < CLAIMED_FOR);
            let needs = claims || self.node.needs_memory(task);
            match layout.filter(|_| !state.is_barred_from_memory() && needs) {
                Some(layout) => needing.push((state.since, *task, layout.piece_bytes())),
                None => others.push(*task),
            }
        }
        needing.sort();
        let pieces_bytes: Vec<u64> = needing
            .iter()
            .map(|(_, _, piece_bytes)| *piece_bytes)
            .collect();
        let shares = shares(self.config.memory_bytes / 2, WINDOW_BYTES, &pieces_bytes);
        let needing = needing.into_iter().map(|(_, task, _)| task).zip(shares);
        for (task, bytes) in needing.chain(others.into_iter().map(|task| (task, 0))) {
            let storage = if bytes == 0 {
                Storage::Nowhere
            } else {
                Storage::Memory
            };
            self.tell(Input::MemoryBudget {
                task,
                budget_bytes: bytes,
            });
            if let Some(state) = self.tasks.get(&task)
                && state.shared.lock().storage != storage
            {
                state.shared.update(|s| s.storage = storage);
            }
        }
    }

    /// Looks whether the disk takes writes again, if any task waits for that.
    pub(super) fn try_disk(&mut self) {
        let waits = |state: &TaskState| state.in_memory() && !state.is_barred_from_memory();
        if self.trying_disk || !self.tasks.values().any(waits) {
            return;
        }
        self.trying_disk = true;
        let (store, events) = (self.config.store.clone(), self.config.events.clone());
        lanes::start(Lane::Downloads, move || {
            let _ = events.blocking_send(Event::DiskTried {
                takes_writes: store.takes_writes(),
            });
        });
    }

    /// Each task without disk goes back to it, where the disk takes writes again.
    pub(super) fn disk_tried(&mut self, takes_writes: bool) {
        self.trying_disk = false;
        if !takes_writes {
            return;
        }
        let waits = |state: &TaskState| {
            state.in_memory() && !state.is_barred_from_memory() && state.is_ready()
        };
        let waiting = self.tasks.iter().filter(|(_, state)| waits(state));
        let waiting: Vec<(Digest, bool, u64, Option<PieceLayout>)> = waiting
            .map(|(task, state)| {
                (
                    *task,
                    state.disk.partial().is_some(),
                    state.generation,
                    state.shared.lock().layout,
                )
            })
            .collect();
        for (task, has_file, generation, layout) in waiting {
            match layout {
                _ if has_file => self.leave_memory(task),
                Some(layout) => {
                    self.look(task, generation, Some(layout.size_bytes()), |_| {});
                }
                None => {}
            }
        }
    }

    /// A task has a file again: all that is in memory goes there.
    pub(super) fn leave_memory(&mut self, task: Digest) {
        let now = self.now();
        let Some(state) = self.tasks.get_mut(&task).filter(|state| state.in_memory()) else {
            return;
        };
        info!(%task, "the disk takes this task again");
        let (on_disk, in_memory) = state.shared.update(|s| {
            s.storage = Storage::Disk;
            let on_disk = s.written.clone();
            let is_written = |piece| {
                on_disk
                    .as_ref()
                    .is_some_and(|written| written.contains(piece))
            };
            let in_memory: Vec<PieceIndex> = s
                .hot
                .keys()
                .copied()
                .filter(|piece| !is_written(*piece))
                .collect();
            (on_disk, in_memory)
        });
        state.window.send_replace(PieceIndex::MAX);
        if let (Some(origin), Some(partial)) = (&state.origin, state.disk.partial()) {
            origin.wish(|wishes| wishes.file = Some(LooseFile(partial.clone())));
        }
        state.unwritten = in_memory;
        if let Some(on_disk) = on_disk {
            self.node.handle(now, Input::DiskAgain { task, on_disk });
        }
        if let Some(state) = self.tasks.get_mut(&task)
            && let OnDisk::Committing(partial) = &state.disk
        {
            // Its commit is tried again.
            state.disk = OnDisk::Partial(partial.clone());
        }
        self.memory_changed = true;
        self.keep_table(task);
        self.flush(task);
    }

    /// A task gets no memory any more: its readers go to the origin, each by itself and as slowly as that is.
    pub(super) fn starve(&mut self, now: Time, task: &Digest) {
        warn!(%task, "the origin is too slow for the memory it takes: this task is only passed through");
        if let Some(state) = self.tasks.get_mut(task) {
            (state.origin, state.reading) = (None, None);
            state.memory_claim = MemoryClaim::Barred;
        }
        self.enter_memory(*task);
        self.holding(task, 0, 0, false);
        self.node.handle(
            now,
            Input::OriginOver {
                task: *task,
                failure: None,
            },
        );
    }
}
