//! A store around another one that refuses writes on demand, for tests.

use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hawker_core::piece::{PieceIndex, PieceSet, PieceTable};
use hawker_oci::digest::Digest;

use super::{Blob, Partial, PartialTask, StoreError, TaskStore};

/// The faults of a store. Clones are the same faults.
#[derive(Clone, Default)]
pub(crate) struct Faults(Arc<Mutex<Plan>>);

#[derive(Default)]
struct Plan {
    refuses: Option<ErrorKind>,
    room_bytes: Option<u64>,
    fails_commits: bool,
}

impl Faults {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All writes fail from now on.
    pub(crate) fn refuse(&self, kind: ErrorKind) {
        self.plan().refuses = Some(kind);
    }

    /// The disk is full once so many bytes more were written.
    pub(crate) fn leave_room(&self, bytes: u64) {
        self.plan().room_bytes = Some(bytes);
    }

    /// Nothing can be made durable from now on.
    pub(crate) fn fail_commits(&self) {
        self.plan().fails_commits = true;
    }

    /// Everything works again.
    pub(crate) fn mend(&self) {
        *self.plan() = Plan::default();
    }

    fn takes_writes(&self) -> bool {
        let plan = self.plan();
        plan.refuses.is_none() && plan.room_bytes != Some(0)
    }

    /// Something of this length is to be written.
    fn write(&self, what: &str, len: u64) -> Result<(), StoreError> {
        let mut plan = self.plan();
        let refused = match (plan.refuses, plan.room_bytes) {
            (Some(kind), _) => Some(kind),
            (None, Some(room_bytes)) if room_bytes < len.max(1) => {
                plan.room_bytes = Some(0);
                Some(ErrorKind::StorageFull)
            }
            (None, room_bytes) => {
                plan.room_bytes = room_bytes.map(|room_bytes| room_bytes - len);
                None
            }
        };
        match refused {
            Some(kind) => Err(StoreError::Disk {
                what: what.to_owned(),
                source: kind.into(),
            }),
            None => Ok(()),
        }
    }
}

pub(crate) struct FaultyStore {
    inner: Arc<dyn TaskStore>,
    faults: Faults,
}

impl FaultyStore {
    pub(crate) fn new(inner: Arc<dyn TaskStore>, faults: Faults) -> Self {
        Self { inner, faults }
    }
}

impl TaskStore for FaultyStore {
    fn committed(&self, task: &Digest) -> Option<Blob> {
        self.inner.committed(task)
    }

    fn has(&self, task: &Digest) -> bool {
        self.inner.has(task)
    }

    fn begin(&self, task: &Digest, size_bytes: u64) -> Result<Partial, StoreError> {
        self.faults.write("beginning a task", 0)?;
        let inner = self.inner.begin(task, size_bytes)?;
        Ok(Arc::new(FaultyPartial {
            inner,
            faults: self.faults.clone(),
        }))
    }

    fn partial_size(&self, task: &Digest) -> Option<u64> {
        self.inner.partial_size(task)
    }

    fn recheck(&self, task: &Digest, bytes: Range<u64>) -> Result<Option<bool>, StoreError> {
        self.inner.recheck(task, bytes)
    }

    fn doubt(&self, task: &Digest) {
        self.inner.doubt(task);
    }

    fn takes_writes(&self) -> bool {
        self.faults.takes_writes() && self.inner.takes_writes()
    }

    fn origins(&self, digest: &Digest) -> Vec<String> {
        self.inner.origins(digest)
    }

    fn add_origin(&self, digest: &Digest, registry: &str) -> Result<(), StoreError> {
        self.faults
            .write("noting an origin", registry.len() as u64)?;
        self.inner.add_origin(digest, registry)
    }
}

struct FaultyPartial {
    inner: Partial,
    faults: Faults,
}

impl PartialTask for FaultyPartial {
    fn file(&self) -> Arc<File> {
        self.inner.file()
    }

    fn held(&self) -> PieceSet {
        self.inner.held()
    }

    fn table(&self) -> PieceTable {
        self.inner.table()
    }

    fn write(&self, piece: PieceIndex, data: &[u8]) -> Result<(), StoreError> {
        self.faults.write("writing a piece", data.len() as u64)?;
        self.inner.write(piece, data)
    }

    fn note(&self, piece: PieceIndex) -> Result<(), StoreError> {
        self.faults.write("noting a piece", 0)?;
        self.inner.note(piece)
    }

    fn write_loose(&self, start: u64, data: &[u8]) -> Result<(), StoreError> {
        self.faults
            .write("writing loose bytes", data.len() as u64)?;
        self.inner.write_loose(start, data)
    }

    fn keep_table(&self, table: &PieceTable) -> Result<(), StoreError> {
        self.faults.write("noting a table", 0)?;
        self.inner.keep_table(table)
    }

    fn commit(&self, table: &PieceTable) -> Result<Blob, StoreError> {
        self.faults.write("committing a task", 0)?;
        if self.faults.plan().fails_commits {
            self.inner.discard()?;
            let (what, source) = ("making a task durable".to_owned(), ErrorKind::Other.into());
            return Err(StoreError::Disk { what, source });
        }
        self.inner.commit(table)
    }

    fn discard(&self) -> Result<(), StoreError> {
        self.inner.discard()
    }
}
