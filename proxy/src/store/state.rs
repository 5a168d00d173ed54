//! The store's facts in memory, and the rules for changing them.
//!
//! The mutex guards memory only and is never held over file I/O. Code that makes, moves or deletes a task's files
//! first takes a [`Claim`] on the task: one at a time does so, and eviction passes claimed tasks by.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use hawker_core::Time;
use hawker_core::cache::{Cache, bytes_to_free};
use hawker_oci::digest::Digest;

use super::blob::Lease;
use super::checks::Checks;
use super::disk::{Disk, FileSystem};
use super::layout::{Layout, TEMPORARY};
use super::{StoreError, Usage, disk};
use crate::settings::CacheSettings;

const RETRY_AFTER: Duration = Duration::from_secs(2);
/// A disk that refused takes writes again when it has this much room and a file of this size can be written.
const PROBE_ROOM_BYTES: u64 = 4 << 20;
const PROBE_BYTES: usize = 64 << 10;
/// How long one waits for another to be done with a task's files.
const CLAIM_WAIT: Duration = Duration::from_secs(10);
/// A round of eviction on a full disk frees at least this much, so that there are not many rounds.
const MIN_ROUND_BYTES: u64 = 1 << 20;
/// The order of use on disk is kept this coarsely.
pub(super) const USE_GRAIN: Duration = Duration::from_secs(10 * 60);

/// The candidates of eviction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    /// A blob, committed or partial.
    Task(Digest),
    /// A manifest.
    Manifest(Digest),
}

/// A task on disk.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    Blob {
        size_bytes: u64,
        /// The file and table that its readers share, while there are any.
        opened: Weak<Lease>,
        /// The checks of its pieces, once it was opened.
        checks: Option<Arc<Checks>>,
    },
    Partial {
        size_bytes: u64,
        /// Pieces that count; `None` while those that an earlier run noted are not verified again.
        pieces: Option<u32>,
        /// Bytes of those pieces; of all that are written, while they are to be verified again.
        held_bytes: u64,
        /// Whether a [`super::Partial`] of it lives.
        open: bool,
    },
}

impl Entry {
    /// The bytes that it takes on disk.
    pub(super) const fn bytes(&self) -> u64 {
        match self {
            Entry::Blob { size_bytes, .. } => *size_bytes,
            Entry::Partial { held_bytes, .. } => *held_bytes,
        }
    }
}

#[derive(Default)]
pub(super) struct State {
    pub(super) tasks: HashMap<Digest, Entry>,
    /// Partial tasks weigh what is written of them, not what they will be.
    pub(super) cache: Cache<Key>,
    busy: HashSet<Digest>,
    /// Tasks that went and that nobody was told of yet.
    gone: BTreeSet<Digest>,
    failed_at: Option<Instant>,
}

/// How a store works with its disk.
pub(super) struct Means {
    pub(super) disk: Box<dyn Disk>,
    /// How long writing is not tried again after it failed.
    pub(super) retry_after: Duration,
}

impl Default for Means {
    fn default() -> Self {
        Self {
            disk: Box::new(FileSystem),
            retry_after: RETRY_AFTER,
        }
    }
}

pub(super) struct Inner {
    pub(super) layout: Layout,
    pub(super) disk: Box<dyn Disk>,
    settings: Mutex<CacheSettings>,
    retry_after: Duration,
    state: Mutex<State>,
    unclaimed: Condvar,
    opened_at: (Instant, Duration),
    /// Locked as long as the store lives.
    _lock: Option<File>,
}

impl Inner {
    pub(super) fn new(
        layout: Layout,
        settings: CacheSettings,
        state: State,
        lock: Option<File>,
        means: Means,
    ) -> Self {
        Self {
            layout,
            disk: means.disk,
            settings: Mutex::new(settings),
            retry_after: means.retry_after,
            state: Mutex::new(state),
            unclaimed: Condvar::new(),
            opened_at: (Instant::now(), since_1970(SystemTime::now())),
            _lock: lock,
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Now, in time that never goes back, beginning at 1970 so that it compares with what files say of their last use.
    pub(super) fn now(&self) -> Time {
        Time(self.opened_at.1 + self.opened_at.0.elapsed())
    }

    /// Waits until nobody else works on the files of `task`.
    pub(super) fn claim(self: &Arc<Self>, task: &Digest) -> Result<Claim, StoreError> {
        let (mut state, wait) = self
            .unclaimed
            .wait_timeout_while(self.state(), CLAIM_WAIT, |state| state.busy.contains(task))
            .unwrap_or_else(PoisonError::into_inner);
        if wait.timed_out() && state.busy.contains(task) {
            return Err(StoreError::Busy);
        }
        state.busy.insert(*task);
        Ok(Claim {
            store: Arc::clone(self),
            task: *task,
        })
    }

    /// Does something that writes. On a full disk it evicts one round and tries once more.
    pub(super) fn write<T>(
        &self,
        what: impl Fn() -> String,
        size_bytes: u64,
        attempt: impl Fn() -> io::Result<T>,
    ) -> Result<T, StoreError> {
        let outcome = match attempt() {
            Err(e) if disk::is_full(&e) && self.make_room(size_bytes.max(MIN_ROUND_BYTES)) => {
                attempt()
            }
            outcome => outcome,
        };
        match outcome {
            Ok(done) => {
                self.state().failed_at = None;
                Ok(done)
            }
            Err(source) => Err(self.failed(what(), source)),
        }
    }

    /// Notes that writing failed: until it works again, nothing new is begun.
    pub(super) fn failed(&self, what: String, source: io::Error) -> StoreError {
        if self.state().failed_at.replace(Instant::now()).is_none() {
            tracing::warn!(error = %source, "{what} failed: going on without the disk until it takes writes again");
        }
        StoreError::Disk { what, source }
    }

    /// Whether the disk takes writes, tried with a file that goes at once.
    pub(super) fn takes_writes(&self) -> bool {
        if disk::room(self.layout.root()).is_ok_and(|(_, available)| available < PROBE_ROOM_BYTES)
            && !self.make_room(PROBE_ROOM_BYTES)
        {
            return false;
        }
        let path = self.layout.root().join(format!("probe{TEMPORARY}"));
        let written = self.write(
            || format!("writing {}", path.display()),
            PROBE_BYTES as u64,
            || {
                self.disk
                    .write_at(&self.disk.create(&path)?, &[0; PROBE_BYTES], 0)
            },
        );
        leave(&path);
        written.is_ok()
    }

    /// An error while writing failed a moment ago and is not worth a try yet.
    pub(super) fn refuse_while_degraded(&self) -> Result<(), StoreError> {
        match self.state().failed_at {
            Some(at) if at.elapsed() < self.retry_after => Err(StoreError::Disk {
                what: format!(
                    "{}: writing failed {} s ago and is tried again {} s after that",
                    self.layout.root().display(),
                    at.elapsed().as_secs(),
                    self.retry_after.as_secs()
                ),
                source: io::Error::other("the disk did not take what was written"),
            }),
            _ => Ok(()),
        }
    }

    fn settings(&self) -> CacheSettings {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps to these marks from now on.
    pub(super) fn set_limits(&self, settings: CacheSettings) {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// An error when `size_bytes` more of `task` could not be kept even if all that may go went.
    pub(super) fn refuse_what_never_fits(
        &self,
        task: &Digest,
        size_bytes: u64,
    ) -> Result<(), StoreError> {
        let Ok((total, available)) = disk::room(self.layout.root()) else {
            return Ok(());
        };
        let evictable = {
            let state = self.state();
            let own_bytes = state.tasks.get(task).map_or(0, Entry::bytes);
            state.cache.evictable_bytes().saturating_sub(own_bytes)
        };
        let CacheSettings {
            high_percent,
            max_bytes,
            ..
        } = self.settings();
        if hawker_core::cache::admits(
            size_bytes,
            total,
            available,
            evictable,
            high_percent,
            max_bytes,
        ) {
            return Ok(());
        }
        Err(StoreError::Disk {
            what: format!(
                "{}: no room for {size_bytes} bytes of {task} (raise the cache's limits or free the disk)",
                self.layout.root().display()
            ),
            source: io::ErrorKind::StorageFull.into(),
        })
    }

    /// Evicts what the watermarks ask for, and at least `at_least_bytes`; whether anything went.
    pub(super) fn make_room(&self, at_least_bytes: u64) -> bool {
        let wanted = self.excess_bytes().max(at_least_bytes);
        wanted > 0 && self.evict_bytes(wanted)
    }

    /// How much the watermarks want to have gone.
    pub(super) fn excess_bytes(&self) -> u64 {
        let (total, available) = match disk::room(self.layout.root()) {
            Ok(room) => room,
            Err(error) => {
                tracing::warn!(%error, path = %self.layout.root().display(), "can't tell how full the disk is");
                (0, 0)
            }
        };
        let CacheSettings {
            high_percent,
            low_percent,
            max_bytes,
        } = self.settings();
        let held = self.state().cache.total_bytes();
        bytes_to_free(total, available, held, high_percent, low_percent, max_bytes)
    }

    /// Deletes the longest unused, never what is leased, until `wanted` bytes are free; whether anything went.
    fn evict_bytes(&self, wanted: u64) -> bool {
        let victims = self.state().take_victims(wanted);
        let mut went = false;
        let mut disk_works = true;
        for victim in victims {
            if disk_works {
                match self.delete(victim.key, matches!(victim.entry, Some(Entry::Blob { .. }))) {
                    Ok(()) => {
                        went = true;
                        tracing::debug!(key = ?victim.key, bytes = victim.bytes, "evicted");
                    }
                    Err(error) => {
                        tracing::warn!(%error, key = ?victim.key, "eviction failed");
                        disk_works = false;
                    }
                }
            }
            self.state().settle_victim(victim, disk_works, self.now());
            self.unclaimed.notify_all();
        }
        went
    }

    /// Deletes the files behind a key. The file that names the rest goes first: leftovers of a crash are removed at
    /// start.
    fn delete(&self, key: Key, committed: bool) -> io::Result<()> {
        match key {
            Key::Manifest(digest) => {
                leave(&self.layout.origins_of(&digest));
                self.disk.remove(&self.layout.manifest(&digest))
            }
            Key::Task(task) if committed => self.delete_blob(&task),
            Key::Task(task) => self.delete_partial(&task),
        }
    }

    fn delete_blob(&self, task: &Digest) -> io::Result<()> {
        self.disk.remove(&self.layout.blob(task))?;
        leave(&self.layout.table(task));
        leave(&self.layout.origins_of(task));
        Ok(())
    }

    /// Deletes a partial task's files. The caller holds a claim.
    pub(super) fn delete_partial(&self, task: &Digest) -> io::Result<()> {
        self.disk.remove(&self.layout.partial(task))?;
        leave(&self.layout.index(task));
        Ok(())
    }

    /// Deletes a committed blob that is not what it should be, leased or not: its readers have it open.
    ///
    /// With `of`, only if it is still the copy that these checks are about.
    pub(super) fn remove_rotten(
        self: &Arc<Self>,
        task: &Digest,
        of: Option<&Arc<Checks>>,
        why: &str,
    ) -> Result<(), StoreError> {
        let claim = self.claim(task)?;
        let is_it = match self.state().tasks.get(task) {
            Some(Entry::Blob { checks, .. }) => of.is_none_or(|of| {
                checks
                    .as_ref()
                    .is_some_and(|checks| Arc::ptr_eq(of, checks))
            }),
            _ => false,
        };
        if !is_it {
            return Ok(());
        }
        tracing::warn!(%task, "a committed blob is rotten and goes: {why}");
        self.state().forget(task);
        let deleted = self.delete_blob(task);
        drop(claim);
        deleted.map_err(|source| {
            self.failed(
                format!("deleting {}", self.layout.blob(task).display()),
                source,
            )
        })
    }

    /// The pieces on disk of a partial task that nobody has open count only once they are hashed again.
    pub(super) fn doubt(&self, task: &Digest) {
        if let Some(Entry::Partial {
            pieces,
            open: false,
            ..
        }) = self.state().tasks.get_mut(task)
        {
            *pieces = None;
        }
    }

    /// Tasks that went since this was asked last and did not come back.
    pub(super) fn take_gone(&self) -> Vec<Digest> {
        let mut state = self.state();
        let gone = std::mem::take(&mut state.gone);
        gone.into_iter()
            .filter(|task| !state.tasks.contains_key(task))
            .collect()
    }

    pub(super) fn usage(&self) -> Usage {
        let state = self.state();
        let blobs = state
            .tasks
            .values()
            .filter(|entry| matches!(entry, Entry::Blob { .. }))
            .count() as u64;
        let bytes = state.tasks.values().map(Entry::bytes).sum();
        Usage {
            blobs,
            partials: state.tasks.len() as u64 - blobs,
            bytes,
            degraded: state.failed_at.is_some(),
        }
    }
}

/// Removes a file that means nothing any more; the next start removes it otherwise.
pub(super) fn leave(path: &Path) {
    if let Err(error) = disk::remove(path) {
        tracing::debug!(%error, path = %path.display(), "left behind until the next start");
    }
}

struct Victim {
    key: Key,
    entry: Option<Entry>,
    bytes: u64,
}

impl State {
    /// Removes victims from memory, claimed, before their files go.
    fn take_victims(&mut self, wanted: u64) -> Vec<Victim> {
        let keys = self.cache.victims(wanted);
        keys.into_iter()
            .filter_map(|key| self.take_victim(key))
            .collect()
    }

    fn take_victim(&mut self, key: Key) -> Option<Victim> {
        let Key::Task(task) = key else {
            return Some(Victim {
                key,
                entry: None,
                bytes: self.cache.remove(&key)?,
            });
        };
        if self.busy.contains(&task) {
            return None;
        }
        let bytes = self.cache.remove(&key)?;
        self.busy.insert(task);
        Some(Victim {
            key,
            entry: self.tasks.remove(&task),
            bytes,
        })
    }

    /// Ends the claim on a victim. One whose files could not be deleted is still there.
    fn settle_victim(&mut self, victim: Victim, went: bool, now: Time) {
        if let Key::Task(task) = victim.key {
            self.busy.remove(&task);
            if went {
                self.gone.insert(task);
            }
        }
        if !went {
            if let (Key::Task(task), Some(entry)) = (victim.key, victim.entry) {
                self.tasks.insert(task, entry);
            }
            self.cache.insert(victim.key, victim.bytes, now);
        }
    }

    /// Takes a task out of memory.
    pub(super) fn forget(&mut self, task: &Digest) {
        if self.tasks.remove(task).is_some() {
            self.cache.remove(&Key::Task(*task));
            self.gone.insert(*task);
        }
    }
}

/// The right to change a task's files, until dropped.
pub(super) struct Claim {
    store: Arc<Inner>,
    task: Digest,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.store.state().busy.remove(&self.task);
        self.store.unclaimed.notify_all();
    }
}

/// Time since 1970; zero for what is before.
pub(super) fn since_1970(at: SystemTime) -> Duration {
    at.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}
