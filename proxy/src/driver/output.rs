//! What the core asks for, carried out.

use super::*;

impl Driver {
    pub(super) fn carry_out(&mut self, output: Output) {
        match output {
            Output::Dial(peer) => self.dial(peer),
            Output::Send(peer, message) => {
                if let Message::Reject { reason, .. } | Message::Unavailable { reason, .. } = &message {
                    self.config.metrics.refused(Refused::Peer, *reason);
                }
                if let Some(peers) = &self.config.peers {
                    peers.send(peer, &message);
                }
                if let Message::Leave { task } = message {
                    debug!(%task, %peer, "left");
                }
            }
            Output::Download { peer, request, task, piece, prefetch, priority } => {
                self.download(peer, request, task, piece, prefetch, priority);
            }
            Output::Cancel { peer, request } => {
                if let Some(peers) = &self.config.peers {
                    peers.cancel(peer, request);
                }
            }
            Output::Upload { peer, request, task, piece } => self.upload(peer, request, task, piece),
            Output::ReadOrigin { task, from } => self.read_origin(task, from),
            Output::StopOrigin(task) => {
                if let Some(state) = self.tasks.get_mut(&task) {
                    state.origin = None;
                }
            }
            Output::Want { task, again, reads, partial } => {
                if let (Some(tracker), Some(state)) = (&self.config.tracker, self.tasks.get(&task))
                    && let Some(grant) = state.grants.borrow().last()
                {
                    let size_bytes = self.node.table(&task).map(|t| t.layout().size_bytes());
                    let (source, purpose) = (grant.source.clone(), self.node.purpose_of(&task));
                    tracker.want(&task, Want { size_bytes, source, purpose, again, reads, partial });
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
            Output::Load { task, source, token, child } => self.load(task, source, token.as_ref(), child),
            Output::Recheck(task) => self.complained(task),
            Output::Sized(task, size_bytes) => self.sized(task, size_bytes),
            Output::Show(task, piece) => {
                if let Some(state) = self.tasks.get(&task) {
                    state.shared.update(|s| s.shown.as_mut().map(|shown| shown.insert(piece)));
                }
            }
            Output::TableGrew(task) => self.keep_table(task),
            Output::Complete(task) => self.complete(task),
            Output::Poisoned(task) => self.poisoned(task),
            Output::Failed(task, failure) => self.failed(task, failure),
        }
    }

    pub(super) fn dial(&self, peer: PeerId) {
        let (Some(peers), dial) = (self.config.peers.clone(), self.config.members.dial(peer)) else { return };
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
        let Some(table) = self.node.table(&task) else { return };
        let (Some(chain), Some(peers)) = (table.chain_at(piece), self.config.peers.clone()) else { return };
        let len = table.layout().len_bytes(piece) as usize;
        let (pool, events) = (self.pool.clone(), self.config.events.clone());
        tokio::spawn(async move {
            let buffer = pool.get(len).await;
            let (done, outcome) = oneshot::channel();
            peers.download(peer, Download { request, task, piece, prefetch, priority, buffer, chain, done });
            let outcome = outcome.await.unwrap_or(Err(PeerError::Lost));
            let _ = events.send(Event::Piece { task, peer, request, outcome }).await;
        });
    }

    pub(super) fn upload(&mut self, peer: PeerId, request: u32, task: Digest, piece: PieceIndex) {
        let source = self.tasks.get(&task).and_then(|state| state.piece_source(piece));
        match (source, &self.config.peers) {
            (Some(source), Some(peers)) => {
                let len = self.node.table(&task).map_or(0, |table| table.layout().len_bytes(piece));
                self.config.desk.moved(&self.node.childs_labels(&task, peer), Moved::Uploaded, len);
                peers.upload(peer, request, source);
            }
            (None, Some(peers)) => {
                let reason = Refusal::NotHeld;
                self.config.metrics.refused(Refused::Peer, reason);
                peers.send(peer, &Message::Reject { request, reason });
                self.node.uploaded(peer, request);
            }
            _ => {
                self.node.uploaded(peer, request);
            }
        }
    }

    pub(super) fn read_origin(&mut self, task: Digest, from: PieceIndex) {
        self.generation += 1;
        let table = self.node.table(&task).cloned();
        let Some(state) = self.tasks.get_mut(&task) else { return };
        let chain = match &table {
            Some(table) => table.chain_at(from),
            None => Some(Chain::new(task.algorithm())),
        };
        let Some(chain) = chain else { return };
        debug!(%task, from, "reading from the origin");
        state.origin = Some(origin_read::start(origin_read::Read {
            task,
            generation: self.generation,
            grants: state.grants.subscribe(),
            layout: table.map(|t| t.layout()),
            from,
            chain,
            origin: self.config.origin.clone(),
            pool: self.pool.clone(),
            window: state.window.subscribe(),
            resumes: state.resumes.subscribe(),
            events: self.config.events.clone(),
        }));
    }

    /// A peer asks for a task.
    pub(super) fn load(&mut self, task: Digest, source: Source, token: Option<&Bearer>, child: Child) {
        let peer = child.peer;
        let grant = Grant { source, authorization: token.and_then(Authorization::bearer) };
        if self.tasks.get(&task).is_some_and(|t| t.ready) {
            if self.config.seed {
                self.enter(task, grant, None);
            }
            self.adopt(task, &child);
        } else if self.tasks.len() >= TASKS && !self.tasks.contains_key(&task) {
            self.node.refuse(peer, task, Refusal::Busy);
        } else if self.config.seed || self.tasks.contains_key(&task) || self.held_on_disk(&task) {
            let state = self.enter(task, grant, None);
            state.for_peers = true;
            if state.asking.len() < task::ASKING {
                state.asking.push(child);
            }
        } else {
            self.node.refuse(peer, task, Refusal::NotHeld);
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
    pub(super) fn recheck(&self, task: Digest, bytes: Range<u64>, reply: Option<oneshot::Sender<bool>>) {
        let seen = self.tasks.get(&task).map(|state| Arc::clone(&state.shared));
        let table = self.node.table(&task).cloned();
        let (store, events) = (self.config.store.clone(), self.config.events.clone());
        tokio::task::spawn_blocking(move || {
            let right = match (&seen, table) {
                (Some(seen), Some(table)) if !store.has(&task) => {
                    seen.on_disk().and_then(|(file, written)| held_is_right(&file, &table, &written, bytes))
                }
                _ => store.recheck(&task, bytes).unwrap_or_else(|error| {
                    warn!(%task, %error, "a rotten blob can't be deleted");
                    Some(false)
                }),
            };
            if let Some(right) = right {
                let _ = events.blocking_send(Event::Rechecked { task, seen, right, reply });
            }
        });
    }

    /// The disk let what it had of a task rot. Whoever reads it ends short; for whoever waits for it, it is fetched again.
    pub(super) fn rotten(&mut self, task: Digest, seen: Option<Arc<Shared>>) {
        warn!(%task, "what the disk had of a blob was rotten and is gone");
        let Some(state) = self.tasks.get(&task) else {
            // It may have been let go meanwhile.
            self.config.store.doubt(&task);
            return self.gone(&task);
        };
        let same = match seen {
            Some(seen) => Arc::ptr_eq(&seen, &state.shared),
            None => state.blob.is_some(),
        };
        // It has begun anew since.
        if !same {
            return;
        }
        state.shared.update(|s| {
            s.take_back();
            s.failed = Some(FlightError::Rotten(task));
        });
        match self.node.table(&task).map(|table| table.layout().size_bytes()) {
            Some(size_bytes) => self.start_over(task, Some(size_bytes)),
            None => self.gone(&task),
        }
    }

    pub(super) fn sized(&mut self, task: Digest, size_bytes: u64) {
        let Some(state) = self.tasks.get_mut(&task) else { return };
        let layout = PieceLayout::new(size_bytes);
        if state.shared.lock().layout.is_some() {
            return;
        }
        state.adopt_memory(layout);
        if !state.in_memory() {
            let generation = state.generation;
            let (store, events) = (self.config.store.clone(), self.config.events.clone());
            tokio::task::spawn_blocking(move || {
                let found = begin(&store, &task, size_bytes);
                let _ = events.blocking_send(Event::Found { task, generation, found });
            });
        }
        self.set_window(&task);
    }

    pub(super) fn keep_table(&self, task: Digest) {
        let Some(state) = self.tasks.get(&task) else { return };
        let (Some(partial), Some(table)) = (state.partial.clone(), self.node.table(&task).cloned()) else {
            return;
        };
        tokio::task::spawn_blocking(move || {
            if let Err(error) = partial.keep_table(&table) {
                debug!(%task, %error, "could not keep the table");
            }
        });
    }

    pub(super) fn poisoned(&mut self, task: Digest) {
        warn!(%task, "the piece table was wrong: starting over");
        self.config.metrics.tables_poisoned.inc();
        self.generation += 1;
        let Some(state) = self.tasks.get_mut(&task) else { return };
        state.generation = self.generation;
        state.writing = 0;
        state.completing = false;
        state.unwritten.clear();
        state.shared.update(State::take_back);
        if let Some(partial) = state.partial.take() {
            state.shared.update(|s| s.file = None);
            let (store, events) = (self.config.store.clone(), self.config.events.clone());
            let size_bytes = partial.table().layout().size_bytes();
            let generation = state.generation;
            tokio::task::spawn_blocking(move || {
                if let Err(error) = partial.discard() {
                    warn!(%task, %error, "could not discard");
                }
                drop(partial);
                let found = begin(&store, &task, size_bytes);
                let _ = events.blocking_send(Event::Found { task, generation, found });
            });
        }
    }

    pub(super) fn failed(&mut self, task: Digest, failure: Failure) {
        self.unwant(&task);
        let Some(state) = self.tasks.get(&task) else { return };
        let error = match failure {
            Failure::Status(status) => FlightError::Origin(status),
            Failure::Unreachable => FlightError::Unreachable(state.last_failure.clone()),
            Failure::WrongDigest => FlightError::WrongDigest(task),
            Failure::UnknownLength => FlightError::UnknownLength,
            Failure::WrongSize => FlightError::WrongSize(task),
        };
        state.shared.update(|s| s.failed = Some(error));
        if matches!(failure, Failure::WrongDigest | Failure::WrongSize) {
            self.doubt_size(task);
        }
    }

    /// The origin's bytes don't make up the blob, or it says another length by now: the length may be what is wrong. Whoever reads
    /// has got its error; the next one begins with what the origin says then.
    pub(super) fn doubt_size(&mut self, task: Digest) {
        if self.sizes_doubted.len() >= SIZES_DOUBTED {
            self.sizes_doubted.clear();
        }
        self.sizes_doubted.insert(task);
        self.start_over(task, None);
    }

    /// Throws away all that is held of a task, and what is known of it beside `size_hint`.
    fn start_over(&mut self, task: Digest, size_hint: Option<u64>) {
        let Some(state) = self.tasks.remove(&task) else { return };
        self.node.close(&task);
        self.holding(&task, 0, 0, false);
        self.generation += 1;
        let mut fresh = TaskState::new(Arc::new(Shared::new(task)));
        fresh.shared.update(|s| s.alone = state.shared.lock().alone);
        fresh.grants = state.grants;
        fresh.generation = self.generation;
        self.tasks.insert(task, fresh);
        self.look(task, self.generation, size_hint, move |store| {
            if let Some(error) = state.partial.and_then(|partial| partial.discard().err()) {
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
        first: impl FnOnce(&Store) + Send + 'static,
    ) {
        let (store, events) = (self.config.store.clone(), self.config.events.clone());
        let doubted = self.sizes_doubted.contains(&task);
        tokio::task::spawn_blocking(move || {
            first(&store);
            let found = look(&store, &task, size_hint, doubted);
            let _ = events.blocking_send(Event::Found { task, generation, found });
        });
    }
}
