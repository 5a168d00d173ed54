//! The files on disk when the daemon starts: found, and rid of a crash's leftovers.
//!
//! Tables are not read and blobs are not hashed here: a blob is under its final name only after it was verified and
//! synced, and its files are looked at when it is first asked for. So a start stays quick however much there is.

use std::collections::HashSet;
use std::fs::{self, DirEntry, File, Metadata};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::{Duration, SystemTime};

use hawker_core::Time;
use hawker_core::piece::PieceLayout;
use hawker_oci::digest::{Algorithm, Digest};

use super::layout::{
    ALGORITHMS, INDEX, Layout, TABLE, TEMPORARY, parse_blob_name, parse_flat_name,
};
use super::partial::{bytes_of, read_index};
use super::state::{Entry, Key, State, leave, since_1970};
use super::{StoreError, disk, disk_refuses};

/// Makes the store's folders.
pub(super) fn make_folders(layout: &Layout) -> Result<(), StoreError> {
    let blobs = ALGORITHMS.map(|algorithm| layout.blobs(algorithm));
    for folder in blobs
        .iter()
        .chain(&[layout.partials(), layout.manifests(), layout.origins()])
    {
        match disk::make_folder(folder) {
            Err(error) if disk_refuses(&error) => {
                tracing::warn!(%error, folder = %folder.display(), "the disk refuses: nothing will be kept");
                break;
            }
            made => made.map_err(|source| StoreError::Disk {
                what: format!("making {}", folder.display()),
                source,
            })?,
        }
    }
    Ok(())
}

/// Locks the store for this process, until the file is closed. `None`: it can't be locked, since it can't be written.
pub(super) fn lock(layout: &Layout) -> Result<Option<File>, StoreError> {
    let path = layout.lock();
    let fail = |source| StoreError::Disk {
        what: format!("locking {}", path.display()),
        source,
    };
    // Made first and opened for reading then: a store on a read-only disk can still be read.
    let made = if path.exists() {
        Ok(())
    } else {
        disk::create(&path).map(drop)
    };
    if made
        .as_ref()
        .is_err_and(|error| disk_refuses(error) || !layout.root().exists())
    {
        return Ok(None);
    }
    let file = made.and_then(|()| File::open(&path)).map_err(fail)?;
    match try_lock_for_a_while(&file) {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::Error(source)) => Err(fail(source)),
        Err(fs::TryLockError::WouldBlock) => Err(StoreError::Disk {
            what: format!(
                "{} is in use by another hawker daemon (stop it, or give this one a data directory of its own)",
                layout.root().display()
            ),
            source: ErrorKind::ResourceBusy.into(),
        }),
    }
}

/// The holder of the lock may be about to end; and a child of its holds it for a moment, between fork and exec.
fn try_lock_for_a_while(file: &File) -> Result<(), fs::TryLockError> {
    const TRIES: u32 = 20;
    for _ in 1..TRIES {
        match file.try_lock() {
            Err(fs::TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(50)),
            settled => return settled,
        }
    }
    file.try_lock()
}

/// Something found, to be entered in the order of its last use.
struct Found {
    key: Key,
    entry: Option<Entry>,
    bytes: u64,
    used: Duration,
}

/// Finds what the store holds.
pub(super) fn scan(layout: &Layout) -> State {
    let mut found = Vec::new();
    for algorithm in ALGORITHMS {
        for (shard, folder) in list(&layout.blobs(algorithm)) {
            scan_shard(algorithm, &shard, &folder.path(), &mut found);
        }
    }
    scan_manifests(&layout.manifests(), &mut found);
    let committed = found
        .iter()
        .filter_map(|f| {
            if let Key::Task(task) = f.key {
                Some(task)
            } else {
                None
            }
        })
        .collect();
    scan_partials(layout, &committed, &mut found);
    drop_orphaned_origins(layout, &found);
    enter(found)
}

/// Removes what is noted of the origins of content that is gone.
fn drop_orphaned_origins(layout: &Layout, found: &[Found]) {
    let held: HashSet<Digest> = found
        .iter()
        .map(|found| match found.key {
            Key::Task(digest) | Key::Manifest(digest) => digest,
        })
        .collect();
    for (name, entry) in list_whole(&layout.origins()) {
        if parse_flat_name(&name).is_some_and(|digest| !held.contains(&digest)) {
            leave(&entry.path());
        }
    }
}

fn enter(mut found: Vec<Found>) -> State {
    // A clock that was wrong for a while must not make a file look used in the time to come.
    let now = since_1970(SystemTime::now());
    found.sort_unstable_by_key(|f| (f.used, f.key));
    let mut state = State::default();
    for Found {
        key,
        entry,
        bytes,
        used,
    } in found
    {
        state.cache.insert(key, bytes, Time(used.min(now)));
        if let (Key::Task(task), Some(entry)) = (key, entry) {
            state.tasks.insert(task, entry);
        }
    }
    state
}

/// Names and entries of a folder. One that can't be read is passed by: the rest of the store works without it.
fn list(folder: &Path) -> Vec<(String, DirEntry)> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.unwrap_or_else(|error| {
        tracing::warn!(%error, folder = %folder.display(), "can't read a folder of the store");
        Vec::new()
    });
    entries
        .into_iter()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry)))
        .collect()
}

/// The files of a folder, by name, without those that were being written when the daemon died: they go.
fn list_whole(folder: &Path) -> Vec<(String, DirEntry)> {
    let (torn, whole): (Vec<_>, Vec<_>) = list(folder)
        .into_iter()
        .partition(|(name, _)| name.ends_with(TEMPORARY));
    torn.iter().for_each(|(_, entry)| leave(&entry.path()));
    whole
}

/// The metadata of a file of ours; a link, a folder or a pipe in its place is removed.
fn regular(entry: &DirEntry) -> Option<Metadata> {
    let meta = entry.metadata().ok()?;
    if !meta.is_file() {
        tracing::warn!(path = %entry.path().display(), "no regular file stands where the store keeps one: it goes");
        leave(&entry.path());
    }
    meta.is_file().then_some(meta)
}

fn used(meta: &Metadata) -> Duration {
    meta.modified().map_or(Duration::ZERO, since_1970)
}

/// Blobs with a table. One file without the other means nothing.
fn scan_shard(algorithm: Algorithm, shard: &str, folder: &Path, found: &mut Vec<Found>) {
    let files = list_whole(folder);
    let names: HashSet<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    for (name, entry) in &files {
        let stem = name.strip_suffix(TABLE);
        let Some(task) = parse_blob_name(algorithm, shard, stem.unwrap_or(name)) else {
            continue;
        };
        let whole = match stem {
            Some(stem) => names.contains(stem),
            None => names.contains(format!("{name}{TABLE}").as_str()),
        };
        if !whole {
            leave(&entry.path());
        } else if stem.is_none()
            && let Some(meta) = regular(entry)
        {
            let blob = Entry::Blob {
                size_bytes: meta.len(),
                opened: std::sync::Weak::new(),
                checks: None,
            };
            found.push(Found {
                key: Key::Task(task),
                entry: Some(blob),
                bytes: meta.len(),
                used: used(&meta),
            });
        }
    }
}

fn scan_manifests(folder: &Path, found: &mut Vec<Found>) {
    for (name, entry) in list_whole(folder) {
        if let Some(digest) = parse_flat_name(&name)
            && let Some(meta) = regular(&entry)
        {
            found.push(Found {
                key: Key::Manifest(digest),
                entry: None,
                bytes: meta.len(),
                used: used(&meta),
            });
        }
    }
}

/// Partial tasks whose index speaks for their file, and that are not committed.
fn scan_partials(layout: &Layout, committed: &HashSet<Digest>, found: &mut Vec<Found>) {
    let tasks: HashSet<Digest> = list_whole(&layout.partials())
        .iter()
        .filter_map(|(name, _)| parse_flat_name(name.strip_suffix(INDEX).unwrap_or(name)))
        .collect();
    for task in tasks {
        let partial = if committed.contains(&task) {
            Err(Unfit::Leftover("the task is committed".to_owned()))
        } else {
            read_partial(layout, &task)
        };
        match partial {
            Ok(partial) => found.push(partial),
            Err(Unfit::Io(error)) => tracing::warn!(%task, %error, "can't read a partial task"),
            Err(Unfit::Leftover(why)) => {
                tracing::info!(%task, "what is left of a partial task goes: {why}");
                leave(&layout.partial(&task));
                leave(&layout.index(&task));
            }
        }
    }
}

/// Why a partial task can't be gone on with.
enum Unfit {
    /// It can't be read now, and may be another time.
    Io(io::Error),
    /// It is no use.
    Leftover(String),
}

impl From<io::Error> for Unfit {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            kind if disk::means_another_thing(kind) => {
                Unfit::Leftover("its file or its index is missing".to_owned())
            }
            ErrorKind::FileTooLarge => Unfit::Leftover("its index is too long".to_owned()),
            _ => Unfit::Io(error),
        }
    }
}

fn read_partial(layout: &Layout, task: &Digest) -> Result<Found, Unfit> {
    let file = disk::open_to_read(&layout.partial(task))?;
    let index = layout.index(task);
    let contents = read_index(&file, &index, task)?.map_err(Unfit::Leftover)?;
    let held_bytes = bytes_of(PieceLayout::new(contents.header.size_bytes), &contents.held);
    let entry = Entry::Partial {
        size_bytes: contents.header.size_bytes,
        pieces: None,
        held_bytes,
        open: false,
    };
    let used = used(&fs::metadata(&index)?);
    Ok(Found {
        key: Key::Task(*task),
        entry: Some(entry),
        bytes: held_bytes,
        used,
    })
}
