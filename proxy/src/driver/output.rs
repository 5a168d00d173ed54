//! The core's orders, carried out.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use hawker_core::application::Priority;
use hawker_core::message::{Message, Refusal};
use hawker_core::node::{Child, Failure, Input, Output};
use hawker_core::parents::Fault;
use hawker_core::piece::{PeerId, PieceIndex, PieceLayout, PieceTable};
use hawker_core::right::Bearer;
use hawker_oci::digest::Digest;
use hawker_oci::reference::Source;
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use super::task::TaskState;
use super::{Driver, Event, Found, RECHECK_EVERY, SIZES_DOUBTED, TASKS, begin, look, task};
use crate::download::{FlightError, Shared, State};
use crate::grant::{Authorization, Grant};
use crate::metrics::{Moved, Refused};
use crate::peer::{Download, PeerError};
use crate::store::{Blob, TaskStore, held_is_right};
use hawker_lanes::{self as lanes, Lane};
use hawker_tracker::{ReportKind, Want};

impl Driver {
    pub(super) fn carry_out(&mut self, output: Output) {
        match output {
            Output::Dial(peer) => self.dial(peer),
            Output::Send(peer, message) => {
                if let Message::Reject { reason, .. } | Message::Unavailable { reason, .. } =
                    &message
                {
                    self.config.metrics.refused(Refused::Peer, *reason);
                }
                if let Some(peers) = &self.config.peers {
                    peers.send(peer, &message);
                }
                if let Message::Leave { task } = message {
                    debug!(%task, %peer, "left");
                }
            }
            Output::Download {
                peer,
                request,
                task,
                piece,
                prefetch,
                priority,
            } => {
                self.download(peer, request, task, piece, prefetch, priority);
            }
            Output::Cancel { peer, request } => {
                if let Some(peers) = &self.config.peers {
                    peers.cancel(peer, request);
                }
            }
            Output::Upload {
                peer,
                request,
                task,
                piece,
            } => self.upload(peer, request, task, piece, false),
            Output::ReadOrigin { task, from } => self.read_origin(task, from),
            Output::StopOrigin(task) => {
                if let Some(state) = self.tasks.get_mut(&task) {
                    state.reading = None;
                    if let Some(origin) = &state.origin {
                        origin.wish(|wishes| wishes.rest = None);
                    }
                }
            }
            Output::Want {
                task,
                again,
                reads,
                partial,
            } => {
                if let (Some(tracker), Some(state)) = (&self.config.tracker, self.tasks.get(&task))
                    && let Some(grant) = state.grants.borrow().last()
                {
                    let size_bytes = self.node.table(&task).map(|t| t.layout().size_bytes());
                    let (source, purpose) = (grant.source.clone(), self.node.purpose_of(&task));
                    tracker.want(
                        &task,
                        Want {
                            size_bytes,
                            source,
                            purpose,
                            again,
                            reads,
                            partial,
                        },
                    );
                }
            }
            Output::Report(peer, task, fault) => {
                if let Some(tracker) = &self.config.tracker {
                    let kind = match fault {
                        Fault::WrongBytes => ReportKind::WrongBytes,
                        Fault::Stalled => ReportKind::Stalled,
                        Fault::NotHeld => ReportKind::NotHeld,
                        Fault::Failed => ReportKind::Failed,
                    };
                    tracker.report(peer, &task, kind);
                }
            }
            Output::Contradiction(tables) => {
                if let Some(tracker) = &self.config.tracker {
                    tracker.contradiction(*tables);
                }
            }
            Output::Load {
                task,
                source,
                token,
                size_bytes,
                child,
            } => {
                self.load(task, source, token.as_ref(), child);
                if let Some(state) = self.tasks.get_mut(&task) {
                    state.size_guess = state.size_guess.or(size_bytes);
                }
            }
            Output::Recheck(task) => self.complained(task),
            Output::Drop(task, piece) => {
                if let Some(state) = self.tasks.get(&task).filter(|state| state.in_memory()) {
                    let is_held = self
                        .node
                        .held(&task)
                        .is_some_and(|held| held.contains(piece));
                    state.shared.update(|s| {
                        s.hot.remove(&piece);
                        // It is shown again when it has come again.
                        s.shown
                            .as_mut()
                            .filter(|_| !is_held)
                            .map(|shown| shown.remove(piece));
                    });
                }
            }
            Output::ReadUntil(task, end) => {
                if let Some(state) = self.tasks.get(&task).filter(|state| state.in_memory()) {
                    state.window.send_replace(end);
                }
            }
            Output::RatesChanged => {
                // Reads that wait for the origin's rate look again at their wait.
                let reading = self.tasks.values().filter(|state| state.reading.is_some());
                for state in reading {
                    state.resumes.send_replace(tokio::time::Instant::now());
                }
            }
            Output::Sized(task, size_bytes) => self.sized(task, size_bytes),
            Output::Show(task, piece) => {
                if let Some(state) = self.tasks.get(&task) {
                    state
                        .shared
                        .update(|s| s.shown.as_mut().map(|shown| shown.insert(piece)));
                }
            }
            Output::TableGrew(task) => {
                if self.node.table(&task).is_some_and(PieceTable::is_sealed) {
                    self.note_proven(&task);
                }
                self.keep_table(task);
            }
            Output::Complete(task) => {
                self.note_proven(&task);
                self.complete(task);
            }
            Output::LetGo(task) => {
                let unread = |state: &TaskState| state.readers.is_empty() && state.writing == 0;
                if self.tasks.get(&task).is_some_and(unread) && !self.node.is_waited_for(&task) {
                    self.let_go(&task);
                }
            }
            Output::Alone(task, is_alone) => {
                if let Some(state) = self.tasks.get(&task) {
                    let has_no_peers = self.config.peers.is_none();
                    state
                        .shared
                        .update(|s| s.is_alone = is_alone || has_no_peers);
                }
            }
            Output::Poisoned(task) => self.poisoned(task),
            Output::Failed(task, failure) => self.failed(task, failure),
        }
    }

    pub(super) fn dial(&self, peer: PeerId) {
        let (Some(peers), dial) = (self.config.peers.clone(), self.config.members.dial(peer))
        else {
            return;
        };
        let events = self.config.events.clone();
        tokio::spawn(async move {
            let reached = match dial {
                Some(dial) => match peers.dial(&dial).await {
                    Ok(_) => true,
                    Err(error) => {
                        debug!(%peer, %error, "could not dial");
                        false
                    }
                },
                None => false,
            };
            let _ = events.send(Event::Dialled { peer, reached }).await;
        });
    }

    pub(super) fn download(
        &self,
        peer: PeerId,
        request: u32,
        task: Digest,
        piece: PieceIndex,
        prefetch: bool,
        priority: Priority,
    ) {
        let Some(table) = self.node.table(&task) else {
            return;
        };
        let (Some(chain), Some(peers)) = (table.chain_at(piece), self.config.peers.clone()) else {
            return;
        };
        let len = table.layout().len_bytes(piece) as usize;
        let (pool, events) = (self.pool.clone(), self.config.events.clone());
        tokio::spawn(async move {
            let buffer = pool.get(len).await;
            let (done, outcome) = oneshot::channel();
            peers.download(
                peer,
                Download {
                    request,
                    task,
                    piece,
                    prefetch,
                    priority,
                    buffer,
                    chain,
                    done,
                },
            );
            let outcome = outcome.await.unwrap_or(Err(PeerError::Lost));
            let _ = events
                .send(Event::Piece {
                    task,
                    peer,
                    request,
                    outcome,
                })
                .await;
        });
    }

    /// Sends a piece to a peer. One of a blob that an earlier run committed is hashed first, once: a peer that got wrong bytes would
    /// ban this node. `is_rotten`: it was, and is wrong.
    pub(super) fn upload(
        &mut self,
        peer: PeerId,
        request: u32,
        task: Digest,
        piece: PieceIndex,
        is_rotten: bool,
    ) {
        let state = self.tasks.get(&task);
        let source = state
            .filter(|_| !is_rotten)
            .and_then(|state| state.piece_source(piece));
        let unchecked = state.and_then(|state| state.disk.blob()).filter(|blob| {
            let range = blob.table.layout().range(piece);
            source.is_some() && !blob.is_checked(&range)
        });
        if let Some(blob) = unchecked.cloned() {
            let events = self.config.events.clone();
            tokio::spawn(async move {
                let right = blob.check(piece).await;
                let _ = events
                    .send(Event::Checked {
                        task,
                        peer,
                        request,
                        piece,
                        blob,
                        right,
                    })
                    .await;
            });
            return;
        }
        match (source, &self.config.peers) {
            (Some(source), Some(peers)) => {
                let len = self
                    .node
                    .table(&task)
                    .map_or(0, |table| table.layout().len_bytes(piece));
                self.config
                    .desk
                    .moved(&self.node.childs_labels(&task, peer), Moved::Uploaded, len);
                peers.upload(peer, request, source);
            }
            (None, Some(peers)) => {
                // A piece in memory may have had to go just before its turn.
                let in_memory = self.tasks.get(&task).is_some_and(TaskState::in_memory);
                let reason = if in_memory {
                    Refusal::Unable
                } else {
                    Refusal::NotHeld
                };
                self.config.metrics.refused(Refused::Peer, reason);
                peers.send(peer, &Message::Reject { request, reason });
                self.tell(Input::Uploaded { peer, request });
            }
            _ => {
                self.tell(Input::Uploaded { peer, request });
            }
        }
    }

    /// A peer asks for a task.
    pub(super) fn load(
        &mut self,
        task: Digest,
        source: Source,
        token: Option<&Bearer>,
        child: Child,
    ) {
        let peer = child.peer;
        // It may have gone since.
        if !self.node.is_connected(peer) {
            return;
        }
        let is_held = || self.node.is_complete(&task) || self.config.store.has(&task);
        // An empty name: it is asked only for what is held. The settings count before anything is asked for a member's sake.
        let names_none = source.registry.is_empty();
        if self.config.seed
            && !names_none
            && !is_held()
            && !self.config.origin.may_be_asked(&source.registry)
        {
            debug!(%task, %peer, registry = source.registry, "a member names a registry that is not to be asked");
            return self.tell(Input::Refuse {
                peer,
                task,
                reason: Refusal::Origin(403),
            });
        }
        let grant = Grant {
            source,
            authorization: token.and_then(Authorization::bearer),
        };
        if self.tasks.get(&task).is_some_and(TaskState::is_ready) {
            if self.config.seed {
                self.enter_for_peer(task, grant);
            }
            self.adopt(task, &child);
        } else if self.tasks.len() >= TASKS && !self.tasks.contains_key(&task) {
            self.tell(Input::Refuse {
                peer,
                task,
                reason: Refusal::Busy,
            });
        } else if self.config.seed || self.tasks.contains_key(&task) || self.held_on_disk(&task) {
            let is_seed = self.config.seed;
            let state = self.enter_for_peer(task, grant);
            state.for_peers |= is_seed;
            if let Some(early) = state
                .disk
                .early()
                .filter(|early| early.asking.len() < task::ASKING)
            {
                early.asking.push(child);
            }
        } else {
            self.tell(Input::Refuse {
                peer,
                task,
                reason: Refusal::NotHeld,
            });
        }
    }

    pub(super) fn held_on_disk(&self, task: &Digest) -> bool {
        self.config.store.has(task) || self.config.store.partial_size(task).is_some()
    }

    /// A peer says that it got wrong bytes: the disk may be rotten, or the peer a nuisance.
    pub(super) fn complained(&mut self, task: Digest) {
        self.rechecked.retain(|_, at| at.elapsed() < RECHECK_EVERY);
        if self.rechecked.len() >= TASKS || self.rechecked.contains_key(&task) {
            return;
        }
        self.rechecked.insert(task, Instant::now());
        self.recheck(task, 0..u64::MAX, None);
    }

    /// Hashes again what the disk has of these bytes. `reply` is told whether they are right, or dropped where not all are there.
    pub(super) fn recheck(
        &self,
        task: Digest,
        bytes: Range<u64>,
        reply: Option<oneshot::Sender<bool>>,
    ) {
        let seen = self.tasks.get(&task).map(|state| Arc::clone(&state.shared));
        let table = self.node.table(&task).cloned();
        let (store, events) = (Arc::clone(&self.config.store), self.config.events.clone());
        lanes::start(Lane::Upkeep, move || {
            let right = match (&seen, table) {
                (Some(seen), Some(table)) if !store.has(&task) => seen
                    .on_disk()
                    .and_then(|(file, written)| held_is_right(&file, &table, &written, bytes)),
                _ => store.recheck(&task, bytes).unwrap_or_else(|error| {
                    warn!(%task, %error, "a rotten blob can't be deleted");
                    Some(false)
                }),
            };
            if let Some(right) = right {
                let _ = events.blocking_send(Event::Rechecked {
                    task,
                    seen,
                    right,
                    reply,
                });
            }
        });
    }

    /// A committed blob turned out to be wrong. If it is in play, it begins anew.
    pub(super) fn rotten_blob(&mut self, blob: &Blob) {
        let task = *blob.table.task();
        match self.tasks.get(&task) {
            Some(state) if state.disk.blob().is_some_and(|held| held.is_same(blob)) => {
                self.rotten(task, None);
            }
            Some(_) => {}
            None => self.holding(&task, 0, 0, false),
        }
    }

    /// The disk let its bytes of a task rot. Present readers end short; for waiting clients it is fetched again.
    pub(super) fn rotten(&mut self, task: Digest, seen: Option<Arc<Shared>>) {
        warn!(%task, "what the disk had of a blob was rotten and is gone");
        let Some(state) = self.tasks.get(&task) else {
            // It may have been let go meanwhile.
            self.config.store.doubt(&task);
            return self.gone(&task);
        };
        let same = match seen {
            Some(seen) => Arc::ptr_eq(&seen, &state.shared),
            None => state.disk.blob().is_some(),
        };
        // It has begun anew since.
        if !same {
            return;
        }
        state.shared.update(|s| {
            s.take_back();
            s.failed = Some(FlightError::Rotten(task));
        });
        match self
            .node
            .table(&task)
            .map(|table| table.layout().size_bytes())
        {
            Some(size_bytes) => self.start_over(task, Some(size_bytes)),
            None => self.gone(&task),
        }
    }

    pub(super) fn sized(&mut self, task: Digest, size_bytes: u64) {
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        let layout = PieceLayout::new(size_bytes);
        if state.shared.lock().layout.is_some() {
            return;
        }
        state.adopt_memory(layout);
        if !state.in_memory() {
            let generation = state.generation;
            let (store, events) = (Arc::clone(&self.config.store), self.config.events.clone());
            lanes::start(Lane::Downloads, move || {
                let found = begin(&*store, &task, size_bytes);
                let _ = events.blocking_send(Event::Found {
                    task,
                    generation,
                    found,
                });
            });
        }
    }

    pub(super) fn keep_table(&self, task: Digest) {
        let Some(state) = self.tasks.get(&task) else {
            return;
        };
        self.node
            .table(&task)
            .into_iter()
            .for_each(|table| self.config.proofs.claims(table));
        if state.disk.blob().is_some() {
            self.config.proofs.settle(&task);
        }
        let (Some(partial), Some(table)) = (
            state.disk.partial().cloned(),
            self.node.table(&task).cloned(),
        ) else {
            return;
        };
        // The table is kept when the disk takes pieces again.
        if state.in_memory() {
            return;
        }
        lanes::start(Lane::Downloads, move || {
            if let Err(error) = partial.keep_table(&table) {
                debug!(%task, %error, "could not keep the table");
            }
        });
    }

    pub(super) fn poisoned(&mut self, task: Digest) {
        warn!(%task, "the piece table was wrong: starting over");
        self.config.metrics.tables_poisoned.inc();
        self.config.proofs.forget(&task);
        self.generation += 1;
        let Some(state) = self.tasks.get_mut(&task) else {
            return;
        };
        state.generation = self.generation;
        state.writing = 0;
        state.unwritten.clear();
        (state.origin, state.reading) = (None, None);
        state.shared.update(State::take_back);
        if let Some(partial) = state.disk.take_partial() {
            state.shared.update(|s| s.file = None);
            let (store, events) = (Arc::clone(&self.config.store), self.config.events.clone());
            let size_bytes = partial.table().layout().size_bytes();
            let generation = state.generation;
            lanes::start(Lane::Downloads, move || {
                if let Err(error) = partial.discard() {
                    warn!(%task, %error, "could not discard");
                }
                drop(partial);
                let found = begin(&*store, &task, size_bytes);
                let _ = events.blocking_send(Event::Found {
                    task,
                    generation,
                    found,
                });
            });
        }
    }

    pub(super) fn failed(&mut self, task: Digest, failure: Failure) {
        self.unwant(&task);
        let Some(state) = self.tasks.get(&task) else {
            return;
        };
        let error = FlightError::of(task, failure, &state.last_failure);
        state.shared.update(|s| s.failed = Some(error));
        if matches!(failure, Failure::WrongDigest | Failure::WrongSize) {
            self.doubt_size(task);
        }
    }

    /// The origin's bytes don't make up the blob, or it says another length by now: the known length may be wrong.
    /// Present readers have got their error; the next one begins with the length that the origin says then.
    pub(super) fn doubt_size(&mut self, task: Digest) {
        if self.sizes_doubted.len() >= SIZES_DOUBTED {
            self.sizes_doubted.clear();
        }
        self.sizes_doubted.insert(task);
        self.start_over(task, None);
    }

    fn note_proven(&self, task: &Digest) {
        if let Some(state) = self.tasks.get(task) {
            state.shared.lock().is_size_proven = true;
        }
    }

    /// A whole blob matched its digest: a download that took it for longer or shorter begins anew.
    pub(super) fn size_proven(&mut self, task: Digest, size_bytes: u64) {
        if self.sizes_proven.len() >= SIZES_DOUBTED {
            self.sizes_proven.clear();
        }
        self.sizes_proven.insert(task, size_bytes);
        let Some(state) = self.tasks.get(&task) else {
            return;
        };
        let is_wrong = {
            let shared = state.shared.lock();
            !shared.is_size_proven
                && shared
                    .layout
                    .is_some_and(|layout| layout.size_bytes() != size_bytes)
        };
        if is_wrong {
            info!(%task, size_bytes, "the size was told wrong: the download begins anew");
            state.shared.update(|s| {
                s.take_back();
                s.failed = Some(FlightError::WrongSize(task));
            });
            self.start_over(task, Some(size_bytes));
        }
    }

    /// Throws away all that is held of a task, and what is known of it beside `size_hint`.
    fn start_over(&mut self, task: Digest, size_hint: Option<u64>) {
        let Some(mut state) = self.tasks.remove(&task) else {
            return;
        };
        self.tell(Input::Close(task));
        self.config.proofs.forget(&task);
        self.holding(&task, 0, 0, false);
        self.generation += 1;
        let mut fresh = TaskState::new(Arc::new(Shared::new(task)));
        fresh
            .shared
            .update(|s| s.is_alone = state.shared.lock().is_alone);
        let partial = state.disk.take_partial();
        fresh.grants = state.grants;
        fresh.generation = self.generation;
        self.tasks.insert(task, fresh);
        self.look(task, self.generation, size_hint, move |store| {
            if let Some(error) = partial.and_then(|partial| partial.discard().err()) {
                warn!(%task, %error, "could not discard");
            }
            // It may have been committed just before.
            let _ = store.recheck(&task, 0..u64::MAX);
        });
    }

    /// Finds out what the disk has of a task, after doing something to it `first`.
    pub(super) fn look(
        &self,
        task: Digest,
        generation: u64,
        size_hint: Option<u64>,
        first: impl FnOnce(&dyn TaskStore) + Send + 'static,
    ) {
        let (store, events) = (Arc::clone(&self.config.store), self.config.events.clone());
        let (proofs, doubted) = (
            Arc::clone(&self.config.proofs),
            self.sizes_doubted.contains(&task),
        );
        let proven = self.sizes_proven.get(&task).copied();
        lanes::start(Lane::Downloads, move || {
            first(&*store);
            let found = look(&*store, &task, size_hint, proven, doubted);
            if let Found::Blob(blob) = &found {
                proofs.reopened(&blob.table);
            }
            let _ = events.blocking_send(Event::Found {
                task,
                generation,
                found,
            });
        });
    }
}
