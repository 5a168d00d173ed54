//! Partial tasks: a sparse file as long as the blob will be, and an index that says which of its pieces count.
//!
//! A piece is noted after it is written, so each piece in the index is there after kill -9. After a power failure it
//! may not be, and while no daemon ran the disk may have rotted: each piece that an earlier run noted is hashed again.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hawker_core::byte_set::ByteSet;
use hawker_core::piece::{MAX_BLOB_BYTES, PieceIndex, PieceLayout, PieceSet, PieceTable};
use hawker_oci::digest::{Chain, Digest};

use super::blob::{self, Blob, MAX_INDEX_BYTES};
use super::disk::Disk;
use super::record::{self, Contents, Header};
use super::state::{Entry, Inner, Key, leave};
use super::{Partial, PartialTask, StoreError, disk};

/// A partial task on disk, under lease.
///
/// Dropping the last handle leaves it on disk, to go on from later, or to be evicted.
struct FilePartial {
    store: Arc<Inner>,
    task: Digest,
    layout: PieceLayout,
    file: Arc<File>,
    begun_with: (PieceSet, PieceTable),
    /// Held over writes: the kernel lets one writer into a file at a time, and the others would spin on its lock.
    writing: Mutex<Written>,
    /// Held over appends to the index, which are short and must not mix.
    index: Mutex<Index>,
}

/// The parts of the file that have been written.
struct Written {
    /// Pieces with verified bytes: loose bytes never overwrite these.
    verified: PieceSet,
    /// Bytes that nobody has verified. They take room on the disk as well.
    loose: ByteSet,
}

/// Bytes a write: longer ones make the kernel look for folios of their size, which was measured to cost up to four times the CPU.
const WRITE_BYTES: usize = 128 << 10;

fn write_at(disk: &dyn Disk, file: &File, data: &[u8], start: u64) -> io::Result<()> {
    let mut at = start;
    data.chunks(WRITE_BYTES).try_for_each(|chunk| {
        disk.write_at(file, chunk, at)?;
        at += chunk.len() as u64;
        Ok(())
    })
}

struct Index {
    file: File,
    /// The place of the next record.
    end: u64,
    /// An append failed and may have left bytes after `end`.
    torn: bool,
    held: PieceSet,
    table: PieceTable,
    /// Committed or thrown away: nothing is written any more.
    finished: bool,
}

impl Index {
    fn append(&mut self, store: &Inner, path: &str, records: &[u8]) -> Result<(), StoreError> {
        let (file, end) = (&self.file, self.end);
        // Bytes of a torn record after a shorter one that follows could read as a record of their own.
        let was_torn = std::mem::replace(&mut self.torn, true);
        store.write(
            || format!("noting in {path}"),
            records.len() as u64,
            || {
                if was_torn {
                    store.disk.set_len(file, end)?;
                }
                store.disk.write_at(file, records, end)
            },
        )?;
        self.torn = false;
        self.end += records.len() as u64;
        Ok(())
    }
}

impl PartialTask for FilePartial {
    fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    fn held(&self) -> PieceSet {
        self.begun_with.0.clone()
    }

    fn table(&self) -> PieceTable {
        self.begun_with.1.clone()
    }

    fn write(&self, piece: PieceIndex, data: &[u8]) -> Result<(), StoreError> {
        let Self {
            store,
            task,
            layout,
            file,
            ..
        } = self;
        let range = layout.range(piece);
        let what = || {
            format!(
                "writing piece {piece} of {}",
                store.layout.partial(task).display()
            )
        };
        if range.is_empty() || range.end - range.start != data.len() as u64 {
            return Err(misuse(what(), "the piece has another length"));
        }
        if self.skips(piece) {
            return Ok(());
        }
        {
            let mut written = self.written();
            written.verified.insert(piece);
            store.write(what, data.len() as u64, || {
                write_at(&*store.disk, file, data, range.start)
            })?;
        }
        self.note(piece)
    }

    fn note(&self, piece: PieceIndex) -> Result<(), StoreError> {
        let store = &self.store;
        let loose_bytes = {
            let mut written = self.written();
            written.verified.insert(piece);
            written.loose.remove(self.layout.range(piece));
            written.loose.len_bytes()
        };
        let mut index = self.index();
        if index.finished || index.held.contains(piece) {
            return Ok(());
        }
        index.append(store, &self.index_path(), &record::piece(piece))?;
        index.held.insert(piece);
        self.weigh(&index.held, loose_bytes);
        Ok(())
    }

    fn write_loose(&self, start: u64, data: &[u8]) -> Result<(), StoreError> {
        let Self {
            store,
            task,
            layout,
            file,
            ..
        } = self;
        let what = || {
            format!(
                "writing loose bytes of {}",
                store.layout.partial(task).display()
            )
        };
        let range = start..start.saturating_add(data.len() as u64);
        if range.end > layout.size_bytes() {
            return Err(misuse(what(), "the bytes lie past the end of the blob"));
        }
        let mut written = self.written();
        if self.index().finished {
            return Ok(());
        }
        for piece in layout.covering(range.clone()) {
            if written.verified.contains(piece) {
                continue;
            }
            let piece = layout.range(piece);
            let part = piece.start.max(range.start)..piece.end.min(range.end);
            let bytes = &data[(part.start - start) as usize..(part.end - start) as usize];
            store.write(what, bytes.len() as u64, || {
                write_at(&*store.disk, file, bytes, part.start)
            })?;
            written.loose.insert(part);
        }
        let loose_bytes = written.loose.len_bytes();
        drop(written);
        let index = self.index();
        if !index.finished {
            self.weigh(&index.held, loose_bytes);
        }
        Ok(())
    }

    fn keep_table(&self, table: &PieceTable) -> Result<(), StoreError> {
        let Self { store, task, .. } = self;
        let mut index = self.index();
        if index.finished {
            return Ok(());
        }
        let known = index.table.values().len();
        let mut newer = index.table.clone();
        let grew = newer
            .extend(0, table.values(), table.signed().cloned())
            .map_err(|_| StoreError::Rotten(*task))?;
        if !grew {
            return Ok(());
        }
        let new_statement = newer.signed() != index.table.signed();
        index.append(
            store,
            &self.index_path(),
            &record::table(&newer, known, new_statement),
        )?;
        index.table = newer;
        Ok(())
    }

    /// By fsync, rename, fsync of the folder.
    fn commit(&self, table: &PieceTable) -> Result<Blob, StoreError> {
        let Self {
            store, task, file, ..
        } = self;
        let _claim = store.claim(task)?;
        self.check_complete(table)?;
        if let Err(source) = store.disk.sync(file) {
            let error = store.failed(
                format!("making {} durable", store.layout.partial(task).display()),
                source,
            );
            self.throw_away()?;
            return Err(error);
        }
        blob::write_table(store, table)?;
        blob::move_in(store, task)?;
        self.index().finished = true;
        match store.disk.sync_folder(&store.layout.shard(task)) {
            Ok(()) => leave(&store.layout.index(task)),
            // The file may be found under its old name after a crash, and then the index beside it is needed.
            Err(source) => {
                let shard = store.layout.shard(task);
                drop(store.failed(
                    format!("making the names in {} durable", shard.display()),
                    source,
                ));
            }
        }
        Ok(blob::enter(store, Arc::clone(file), table))
    }

    fn discard(&self) -> Result<(), StoreError> {
        let _claim = self.store.claim(&self.task)?;
        self.throw_away()
    }
}

impl FilePartial {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn index_path(&self) -> String {
        self.store.layout.index(&self.task).display().to_string()
    }

    fn skips(&self, piece: PieceIndex) -> bool {
        let index = self.index();
        index.finished || index.held.contains(piece)
    }

    /// Tells the cache how much room the task takes. Called with the index locked: it can't be finished meanwhile.
    fn weigh(&self, held: &PieceSet, loose_bytes: u64) {
        let now = self.store.now();
        let mut state = self.store.state();
        if let Some(Entry::Partial {
            pieces, held_bytes, ..
        }) = state.tasks.get_mut(&self.task)
        {
            *pieces = Some(held.len());
            *held_bytes = bytes_of(self.layout, held).saturating_add(loose_bytes);
            let bytes = *held_bytes;
            state.cache.insert(Key::Task(self.task), bytes, now);
        }
    }

    fn check_complete(&self, table: &PieceTable) -> Result<(), StoreError> {
        let what = || {
            format!(
                "committing {}",
                self.store.layout.partial(&self.task).display()
            )
        };
        let index = self.index();
        if index.finished {
            return Err(misuse(what(), "it is committed or thrown away already"));
        }
        if !index.held.is_full() || table.values().len() != table.full_count() as usize {
            return Err(misuse(what(), "pieces are missing"));
        }
        let empty = self.layout.count() == 0;
        let rotten = table.task() != &self.task
            || table.layout() != self.layout
            || !table.values().starts_with(index.table.values())
            || (empty && Chain::new(self.task.algorithm()).finish() != self.task);
        if rotten {
            Err(StoreError::Rotten(self.task))
        } else {
            Ok(())
        }
    }

    /// The caller holds a claim.
    fn throw_away(&self) -> Result<(), StoreError> {
        let Self { store, task, .. } = self;
        if std::mem::replace(&mut self.index().finished, true) {
            return Ok(());
        }
        store.state().forget(task);
        let path = store.layout.partial(task);
        store
            .delete_partial(task)
            .map_err(|source| store.failed(format!("deleting {}", path.display()), source))
    }
}

impl Drop for FilePartial {
    fn drop(&mut self) {
        let finished = self.index().finished;
        let mut state = self.store.state();
        state.cache.release(&Key::Task(self.task));
        if !finished && let Some(Entry::Partial { open, .. }) = state.tasks.get_mut(&self.task) {
            *open = false;
        }
    }
}

/// The caller did what it must not. It goes on without the disk, as after any other failure.
fn misuse(what: String, why: &'static str) -> StoreError {
    StoreError::Disk {
        what,
        source: io::Error::new(ErrorKind::InvalidInput, why),
    }
}

/// Bytes of the pieces in `held`.
pub(super) fn bytes_of(layout: PieceLayout, held: &PieceSet) -> u64 {
    if held.is_full() {
        layout.size_bytes()
    } else {
        held.iter().map(|piece| layout.len_bytes(piece)).sum()
    }
}

/// Goes on with the partial task on disk, or begins a new one.
pub(super) fn begin(
    store: &Arc<Inner>,
    task: &Digest,
    size_bytes: u64,
) -> Result<Partial, StoreError> {
    store.refuse_while_degraded()?;
    if size_bytes > MAX_BLOB_BYTES {
        let what = format!("beginning {task} of {size_bytes} bytes");
        return Err(StoreError::Disk {
            what,
            source: ErrorKind::FileTooLarge.into(),
        });
    }
    known_partial(store, task)?;
    let claim = store.claim(task)?;
    let known = known_partial(store, task)?;
    let left_bytes = size_bytes.saturating_sub(known.as_ref().map_or(0, |known| known.held_bytes));
    store.refuse_what_never_fits(task, left_bytes)?;
    let resumed = match known {
        Some(known) if known.size_bytes == size_bytes => resume(store, task, &known)?,
        Some(known) => {
            tracing::warn!(%task, was_bytes = known.size_bytes, size_bytes, "a partial task had another size and is begun anew");
            None
        }
        None => None,
    };
    let (file, index) = match resumed {
        Some(both) => both,
        None => create(store, task, size_bytes)?,
    };
    let partial = enter(store, task, PieceLayout::new(size_bytes), file, index);
    drop(claim);
    Ok(partial)
}

/// The content of the disk for a task.
struct Known {
    size_bytes: u64,
    held_bytes: u64,
    /// Its pieces were verified in this run of the daemon.
    verified: bool,
}

/// A partial task that nobody has open.
fn known_partial(store: &Inner, task: &Digest) -> Result<Option<Known>, StoreError> {
    match store.state().tasks.get(task) {
        None => Ok(None),
        Some(Entry::Partial {
            size_bytes,
            held_bytes,
            pieces,
            open: false,
        }) => Ok(Some(Known {
            size_bytes: *size_bytes,
            held_bytes: *held_bytes,
            verified: pieces.is_some(),
        })),
        Some(_) => Err(StoreError::Busy),
    }
}

fn enter(
    store: &Arc<Inner>,
    task: &Digest,
    layout: PieceLayout,
    file: File,
    index: Index,
) -> Partial {
    let held_bytes = bytes_of(layout, &index.held);
    let entry = Entry::Partial {
        size_bytes: layout.size_bytes(),
        pieces: Some(index.held.len()),
        held_bytes,
        open: true,
    };
    let now = store.now();
    let mut state = store.state();
    state.tasks.insert(*task, entry);
    state.cache.insert(Key::Task(*task), held_bytes, now);
    state.cache.lease(&Key::Task(*task), now);
    drop(state);
    let partial = FilePartial {
        store: Arc::clone(store),
        task: *task,
        layout,
        file: Arc::new(file),
        begun_with: (index.held.clone(), index.table.clone()),
        writing: Mutex::new(Written {
            verified: index.held.clone(),
            loose: ByteSet::default(),
        }),
        index: Mutex::new(index),
    };
    Arc::new(partial)
}

fn create(store: &Inner, task: &Digest, size_bytes: u64) -> Result<(File, Index), StoreError> {
    let (path, index_path) = (store.layout.partial(task), store.layout.index(task));
    let head = record::header(&Header {
        digest: *task,
        size_bytes,
    });
    let made = store.write(
        || format!("beginning {}", path.display()),
        0,
        || {
            // The old index goes first: it must not speak for the new file.
            store.disk.remove(&index_path)?;
            store.disk.remove(&path)?;
            let file = store.disk.create(&path)?;
            store.disk.set_len(&file, size_bytes)?;
            let index = store.disk.create(&index_path)?;
            store.disk.write_at(&index, &head, 0)?;
            Ok((file, index))
        },
    );
    let (file, index) = made.inspect_err(|_| {
        leave(&index_path);
        leave(&path);
        store.state().forget(task);
    })?;
    let layout = PieceLayout::new(size_bytes);
    let index = Index {
        file: index,
        end: head.len() as u64,
        torn: false,
        held: PieceSet::empty(layout.count()),
        table: PieceTable::new(*task, layout),
        finished: false,
    };
    Ok((file, index))
}

/// The content of the index at this path, if it and its data file are those of `task`; else the reason why not.
pub(super) fn read_index(
    data: &File,
    index: &Path,
    task: &Digest,
) -> io::Result<Result<Contents, String>> {
    let raw = disk::read_whole(&disk::open_to_read(index)?, MAX_INDEX_BYTES)?;
    let contents = match record::read(&raw) {
        Ok(contents) => contents,
        Err(why) => return Ok(Err(format!("its index can't be read: {why}"))),
    };
    let Header { digest, size_bytes } = contents.header;
    Ok(match data.metadata() {
        Ok(actual) if digest == *task && size_bytes == actual.len() => Ok(contents),
        Ok(_) => Err("its index is about something else".to_owned()),
        Err(error) => Err(error.to_string()),
    })
}

/// Opens what is on disk; `None` when it is of no use.
fn resume(
    store: &Inner,
    task: &Digest,
    known: &Known,
) -> Result<Option<(File, Index)>, StoreError> {
    match try_resume(store, task, known) {
        Ok(Ok(both)) => Ok(Some(both)),
        Ok(Err(why)) => {
            tracing::warn!(%task, "a partial task is begun anew: {why}");
            Ok(None)
        }
        Err(e) if disk::means_another_thing(e.kind()) => Ok(None),
        Err(source) => Err(store.failed(
            format!("going on with {}", store.layout.partial(task).display()),
            source,
        )),
    }
}

fn try_resume(
    store: &Inner,
    task: &Digest,
    known: &Known,
) -> io::Result<Result<(File, Index), String>> {
    let path = store.layout.index(task);
    let file = disk::open(&store.layout.partial(task))?;
    let mut contents = match read_index(&file, &path, task)? {
        Ok(contents) if contents.header.size_bytes == known.size_bytes => contents,
        Ok(_) => return Ok(Err("it has another size".to_owned())),
        Err(why) => return Ok(Err(why)),
    };
    let mut end = contents.whole_bytes as u64;
    if !known.verified {
        keep_what_is_right(&file, &mut contents);
    }
    if contents.drop_unverifiable() || !known.verified {
        let verified = record::index(&contents.header, &contents.table, &contents.held);
        store.disk.replace(&path, &verified)?;
        end = verified.len() as u64;
    }
    let index_file = disk::open(&path)?;
    store.disk.set_len(&index_file, end)?;
    let Contents { held, table, .. } = contents;
    Ok(Ok((
        file,
        Index {
            file: index_file,
            end,
            torn: false,
            held,
            table,
            finished: false,
        },
    )))
}

/// Hashes pieces of a partial task that nobody has open again. If one is rotten, all of them are before they count again.
pub(super) fn recheck(store: &Inner, task: &Digest, bytes: Range<u64>) -> Option<bool> {
    if !known_partial(store, task).ok()??.verified {
        return None;
    }
    let file = disk::open_to_read(&store.layout.partial(task)).ok()?;
    let Contents { held, table, .. } = read_index(&file, &store.layout.index(task), task)
        .ok()?
        .ok()?;
    let right = disk::held_is_right(&file, &table, &held, bytes);
    if right == Some(false) {
        store.doubt(task);
    }
    right
}

/// Hashes the noted pieces again, and takes out what does not match, can't be read, or can't be verified.
fn keep_what_is_right(file: &File, contents: &mut Contents) {
    let noted: Vec<_> = contents.held.iter().collect();
    for piece in &noted {
        if !disk::piece_is_right(file, &contents.table, *piece).unwrap_or(false) {
            contents.held.remove(*piece);
        }
    }
    tracing::info!(
        task = %contents.header.digest, noted = noted.len(), right = contents.held.len(),
        "verified a partial task again after a restart"
    );
}
