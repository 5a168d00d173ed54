//! Snapshots on disk: one record a snapshot, `records/ID.json`, and one folder, `snapshots/ID/`.
//!
//! Each request changes one record, by a rename or an unlink, so a crash leaves either the old or the new state. A folder is made
//! before its record and removed after it. A folder without a record is therefore a leftover, which the next start removes.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::api::types::Mount;
use crate::catalog::{Catalog, Committal, Creation, Id, Kind, Labels, Record, Refusal, Usage};
use crate::filter::Filters;
use crate::mounts::{Folders, OverlayOptions, mounts};

/// The reason why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The request is not granted; the same request fails again.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The disk failed or is full; the state is as before, and a retry may help.
    #[error("{}: {source}", path.display())]
    Disk {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The root cannot be used.
    #[error("{0}")]
    Root(String),
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> StoreError + '_ {
    |source| StoreError::Disk {
        path: path.to_owned(),
        source,
    }
}

/// All snapshots below one root.
#[derive(Debug)]
pub struct Store {
    records: PathBuf,
    snapshots: PathBuf,
    overlay: OverlayOptions,
    state: Mutex<State>,
    /// Locked as long as the store is open.
    _lock: File,
}

#[derive(Debug)]
struct State {
    catalog: Catalog,
    next_id: Id,
    /// Folders that [`Store::clean_up`] leaves alone: of snapshots in the making, in removal, or with a record that cannot be read.
    busy: BTreeSet<Id>,
}

impl Store {
    /// Opens or makes the store at `root`, and removes the leftovers of an earlier process. A record that cannot be read is
    /// logged and left out; its folder stays.
    ///
    /// # Errors
    /// When the disk fails, another process has the store open, or the path cannot be an option of overlay.
    pub fn open(root: &Path, overlay: OverlayOptions) -> Result<Self, StoreError> {
        fs::create_dir_all(root).map_err(at(root))?;
        let root = &root.canonicalize().map_err(at(root))?;
        if root
            .to_str()
            .is_none_or(|path| path.contains([':', ',', '\\', '"']))
        {
            return Err(StoreError::Root(format!(
                "{} contains a colon, a comma, a quote or a backslash, which options of overlay cannot; choose another --root",
                root.display()
            )));
        }
        // Layers hold set-user-ID programs; users of the host must not reach them past a container.
        fs::set_permissions(root, Permissions::from_mode(0o700)).map_err(at(root))?;
        let path = root.join("lock");
        let lock = File::create(&path).map_err(at(&path))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(
            |error| {
                StoreError::Root(format!(
                    "{} is in use by another hawker snapshotter ({error}); stop it, or choose another --root",
                    root.display()
                ))
            },
        )?;
        let (records, snapshots) = (root.join("records"), root.join("snapshots"));
        for dir in [&records, &snapshots] {
            fs::create_dir_all(dir).map_err(at(dir))?;
        }
        let state = read_records(&records)?;
        let store = Self {
            records,
            snapshots,
            overlay,
            state: Mutex::new(state),
            _lock: lock,
        };
        let folders = store.folders()?;
        let mut state = store.state();
        state.next_id = state.next_id.max(folders.last().map_or(0, |id| id + 1));
        drop(state);
        store.clean_up()?;
        Ok(store)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic between a record and the catalog is no reason to refuse all other requests.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a snapshot; its mounts.
    ///
    /// # Errors
    /// As [`Catalog::plan_create`], or when the disk fails.
    pub fn create(&self, request: Creation) -> Result<Vec<Mount>, StoreError> {
        let (id, below) = {
            let mut state = self.state();
            let id = state.next_id;
            let record = state
                .catalog
                .plan_create(request.clone(), id, SystemTime::now())?;
            let below = state.catalog.ancestors(&record)?.first().copied();
            state.next_id += 1;
            state.busy.insert(id);
            (id, below)
        };
        let made = self
            .make_folders(id, request.kind, below)
            .and_then(|()| self.enter(request, id));
        if made.is_err() {
            self.remove_folders(id);
        }
        self.state().busy.remove(&id);
        made
    }

    /// Writes the record of a new snapshot with folders. Other requests may have changed the catalog since.
    fn enter(&self, request: Creation, id: Id) -> Result<Vec<Mount>, StoreError> {
        let mut state = self.state();
        let record = state.catalog.plan_create(request, id, SystemTime::now())?;
        let mounts = self.mounts_of(&state.catalog, &record)?;
        self.write(&record)?;
        state.catalog.put(None, record);
        Ok(mounts)
    }

    fn make_folders(&self, id: Id, kind: Kind, below: Option<Id>) -> Result<(), StoreError> {
        let folders = Folders::of(&self.snapshots, id);
        make_dir(folders.all(), 0o700)?;
        let files = folders.files();
        make_dir(&files, 0o755)?;
        if kind == Kind::Active {
            make_dir(&folders.work(), 0o711)?;
        }
        if let Some(below) = below {
            // The root folder of a container is the upper one: it keeps the owner that the image gave it.
            let parent = Folders::of(&self.snapshots, below).files();
            let owner = fs::metadata(&parent).map_err(at(&parent))?;
            std::os::unix::fs::chown(&files, Some(owner.uid()), Some(owner.gid()))
                .map_err(at(&files))?;
        }
        Ok(())
    }

    /// The mounts of a snapshot that is not committed.
    ///
    /// # Errors
    /// When it is missing or committed.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>, StoreError> {
        let state = self.state();
        let record = state.catalog.get(key)?;
        if record.kind == Kind::Committed {
            return Err(Refusal::Precondition(format!(
                "snapshot {key} is committed: it has no mounts, a view of it has"
            ))
            .into());
        }
        self.mounts_of(&state.catalog, record)
    }

    fn mounts_of(&self, catalog: &Catalog, record: &Record) -> Result<Vec<Mount>, StoreError> {
        let ancestors = catalog.ancestors(record)?;
        Ok(mounts(
            &self.snapshots,
            record.kind,
            record.id,
            &ancestors,
            self.overlay,
        ))
    }

    /// Commits an active snapshot.
    ///
    /// # Errors
    /// As [`Catalog::plan_commit`], or when the disk fails.
    pub fn commit(&self, request: Committal) -> Result<(), StoreError> {
        let id = self.state().catalog.active(&request.key)?.id;
        // Large layers take long to measure: no other request waits for that.
        let usage = self.measure(id)?;
        let mut state = self.state();
        let key = request.key.clone();
        let record = state
            .catalog
            .plan_commit(request, usage, SystemTime::now())?;
        self.write(&record)?;
        state.catalog.put(Some(&key), record);
        Ok(())
    }

    /// Removes a snapshot with its files.
    ///
    /// # Errors
    /// As [`Catalog::plan_remove`], or when the disk fails. Files that cannot be removed stay for [`Store::clean_up`].
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let id = {
            let mut state = self.state();
            let id = state.catalog.plan_remove(name)?.id;
            let path = self.record_path(id);
            fs::remove_file(&path).map_err(at(&path))?;
            state.catalog.forget(name);
            state.busy.insert(id);
            sync(&self.records)?;
            id
        };
        self.remove_folders(id);
        self.state().busy.remove(&id);
        Ok(())
    }

    /// Changes labels; see [`Catalog::plan_update`].
    ///
    /// # Errors
    /// As [`Catalog::plan_update`], or when the disk fails.
    pub fn update(
        &self,
        name: &str,
        labels: &Labels,
        paths: &[String],
    ) -> Result<Record, StoreError> {
        let mut state = self.state();
        let record = state
            .catalog
            .plan_update(name, labels, paths, SystemTime::now())?;
        self.write(&record)?;
        state.catalog.put(Some(name), record.clone());
        Ok(record)
    }

    /// One snapshot.
    ///
    /// # Errors
    /// When it is missing.
    pub fn stat(&self, name: &str) -> Result<Record, StoreError> {
        Ok(self.state().catalog.get(name)?.clone())
    }

    /// All snapshots that match.
    #[must_use]
    pub fn list(&self, filters: &Filters) -> Vec<Record> {
        let state = self.state();
        let matching = state
            .catalog
            .iter()
            .filter(|record| filters.match_record(record));
        matching.cloned().collect()
    }

    /// The disk space of a snapshot without its parents: as measured when it was committed, else now.
    ///
    /// # Errors
    /// When it is missing, or the disk fails.
    pub fn usage(&self, name: &str) -> Result<Usage, StoreError> {
        let record = self.stat(name)?;
        record.usage.map_or_else(|| self.measure(record.id), Ok)
    }

    /// Removes folders that belong to no snapshot.
    ///
    /// # Errors
    /// When the folders cannot be listed.
    pub fn clean_up(&self) -> Result<(), StoreError> {
        // Listed before the catalog is looked at: a folder that is made meanwhile is not in the list.
        let folders = self.folders()?;
        let leftovers: Vec<Id> = {
            let state = self.state();
            let known: BTreeSet<Id> = state.catalog.iter().map(|record| record.id).collect();
            let unknown = |id: &Id| !known.contains(id) && !state.busy.contains(id);
            folders.into_iter().filter(unknown).collect()
        };
        for id in leftovers {
            tracing::info!(id, "removing the files of a snapshot that does not exist");
            self.remove_folders(id);
        }
        Ok(())
    }

    fn folders(&self) -> Result<BTreeSet<Id>, StoreError> {
        let entries = fs::read_dir(&self.snapshots).map_err(at(&self.snapshots))?;
        Ok(entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect())
    }

    fn remove_folders(&self, id: Id) {
        let folders = Folders::of(&self.snapshots, id);
        match fs::remove_dir_all(folders.all()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(
                path = %folders.all().display(),
                %error,
                "files of a removed snapshot stay; the next cleanup tries again"
            ),
        }
    }

    fn measure(&self, id: Id) -> Result<Usage, StoreError> {
        let mut usage = Usage::default();
        // Hard links count once.
        let mut seen = BTreeSet::new();
        let mut pending = vec![Folders::of(&self.snapshots, id).files()];
        while let Some(path) = pending.pop() {
            let found = match fs::symlink_metadata(&path) {
                Ok(found) => found,
                // A container removes files while they are counted.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(at(&path)(error)),
            };
            if found.nlink() > 1 && !found.is_dir() && !seen.insert((found.dev(), found.ino())) {
                continue;
            }
            usage.size_bytes += found.blocks() * 512;
            usage.inodes += 1;
            if found.is_dir() {
                match fs::read_dir(&path) {
                    Ok(entries) => pending.extend(entries.flatten().map(|entry| entry.path())),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(at(&path)(error)),
                }
            }
        }
        Ok(usage)
    }

    fn record_path(&self, id: Id) -> PathBuf {
        self.records.join(format!("{id}.json"))
    }

    /// Puts a record in place durably: at any moment the file has all of the old or all of the new text.
    fn write(&self, record: &Record) -> Result<(), StoreError> {
        let path = self.record_path(record.id);
        let new = path.with_extension("new");
        let text = serde_json::to_vec(record).map_err(|error| at(&path)(error.into()))?;
        let written = File::create(&new)
            .and_then(|mut file| {
                file.write_all(&text)?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&new, &path));
        if let Err(error) = written {
            // A leftover would only take room; the next start removes it too.
            let _ = fs::remove_file(&new);
            return Err(at(&path)(error));
        }
        sync(&self.records)
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<(), StoreError> {
    DirBuilder::new()
        .mode(mode)
        .create(path)
        .map_err(at(path))?;
    // The umask of the process must not narrow the folders that containers see.
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(at(path))
}

fn sync(dir: &Path) -> Result<(), StoreError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(at(dir))
}

fn read_records(dir: &Path) -> Result<State, StoreError> {
    let mut state = State {
        catalog: Catalog::default(),
        next_id: 1,
        busy: BTreeSet::new(),
    };
    for entry in fs::read_dir(dir).map_err(at(dir))? {
        let path = entry.map_err(at(dir))?.path();
        let id = path
            .file_stem()
            .and_then(|stem| stem.to_str()?.parse::<Id>().ok());
        match (id, path.extension().and_then(|it| it.to_str())) {
            (Some(id), Some("json")) => {
                state.next_id = state.next_id.max(id + 1);
                match read_record(&path, id) {
                    Ok(record) if state.catalog.get(&record.name).is_err() => {
                        state.catalog.put(None, record);
                        continue;
                    }
                    Ok(record) => tracing::error!(
                        path = %path.display(),
                        name = record.name,
                        "two records have this name: this one is left out, its files stay"
                    ),
                    Err(error) => tracing::error!(
                        path = %path.display(),
                        %error,
                        "a record cannot be read: its snapshot is left out, its files stay; pull the image again"
                    ),
                }
                state.busy.insert(id);
            }
            // A record that was never put in place.
            (Some(_), Some("new")) => fs::remove_file(&path).map_err(at(&path))?,
            _ => tracing::warn!(path = %path.display(), "not a record of a snapshot: left alone"),
        }
    }
    Ok(state)
}

fn read_record(path: &Path, id: Id) -> io::Result<Record> {
    let record: Record = serde_json::from_slice(&fs::read(path)?)?;
    if record.id != id {
        return Err(io::Error::other("the number is another file's"));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(root: &Path) -> Store {
        Store::open(root, OverlayOptions::default()).unwrap()
    }

    fn prepare(store: &Store, key: &str, parent: &str) -> Result<Vec<Mount>, StoreError> {
        store.create(Creation {
            kind: Kind::Active,
            key: key.into(),
            parent: parent.into(),
            labels: Labels::from([("l".into(), "v".into())]),
        })
    }

    fn commit(store: &Store, key: &str, name: &str) -> Result<(), StoreError> {
        store.commit(Committal {
            key: key.into(),
            name: name.into(),
            parent: String::new(),
            labels: Labels::new(),
        })
    }

    fn names(store: &Store) -> Vec<String> {
        let all = Filters::parse(&[]).unwrap();
        store.list(&all).into_iter().map(|it| it.name).collect()
    }

    #[test]
    fn snapshots_survive_a_restart_as_they_were() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        prepare(&store, "a", "").unwrap();
        commit(&store, "a", "base").unwrap();
        let before = (
            prepare(&store, "run", "base").unwrap(),
            store.stat("run").unwrap(),
        );
        drop(store);
        let store = open(root.path());
        assert_eq!(names(&store), ["base", "run"]);
        assert_eq!(
            (store.mounts("run").unwrap(), store.stat("run").unwrap()),
            before
        );
        store.remove("run").unwrap();
        store.remove("base").unwrap();
        assert_eq!(store.folders().unwrap().len(), 0);
        assert_eq!(fs::read_dir(&store.records).unwrap().count(), 0);
    }

    #[test]
    fn leftovers_of_a_crash_are_removed_and_their_numbers_are_not_used_again() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        prepare(&store, "a", "").unwrap();
        drop(store);
        fs::create_dir_all(root.path().join("snapshots/7/fs/deep")).unwrap();
        fs::write(root.path().join("records/8.new"), "{").unwrap();
        let store = open(root.path());
        assert_eq!(store.folders().unwrap(), BTreeSet::from([1]));
        assert!(!root.path().join("records/8.new").exists());
        prepare(&store, "b", "").unwrap();
        assert_eq!(store.stat("b").unwrap().id, 8);
    }

    #[test]
    fn one_bad_record_costs_no_other_snapshot_and_no_file() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        prepare(&store, "a", "").unwrap();
        prepare(&store, "b", "").unwrap();
        drop(store);
        fs::write(root.path().join("records/1.json"), "").unwrap();
        let store = open(root.path());
        assert_eq!(names(&store), ["b"]);
        store.clean_up().unwrap();
        assert_eq!(store.folders().unwrap(), BTreeSet::from([1, 2]));
    }

    #[test]
    fn a_store_is_open_once() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let second = Store::open(root.path(), OverlayOptions::default());
        assert!(second.unwrap_err().to_string().contains("another hawker"));
        drop(store);
        open(root.path());
    }

    #[test]
    fn a_failed_prepare_leaves_no_folder() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        fs::remove_dir(&store.records).unwrap();
        assert!(matches!(
            prepare(&store, "a", ""),
            Err(StoreError::Disk { .. })
        ));
        assert_eq!(store.folders().unwrap().len(), 0);
        assert_eq!(names(&store).len(), 0);
    }

    #[test]
    fn of_many_prepares_of_one_key_one_succeeds() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        let granted = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| prepare(&store, "same", "").is_ok()))
                .collect();
            all.into_iter()
                .filter_map(|one| one.join().ok())
                .filter(|granted| *granted)
                .count()
        });
        assert_eq!(granted, 1);
        assert_eq!(store.folders().unwrap().len(), 1);
    }

    #[test]
    fn usage_counts_hard_links_once() {
        let root = tempfile::tempdir().unwrap();
        let store = open(root.path());
        prepare(&store, "a", "").unwrap();
        let files = Folders::of(&store.snapshots, 1).files();
        let empty = store.usage("a").unwrap();
        fs::write(files.join("one"), vec![1; 64 << 10]).unwrap();
        fs::hard_link(files.join("one"), files.join("two")).unwrap();
        let usage = store.usage("a").unwrap();
        assert_eq!(usage.inodes, empty.inodes + 1);
        assert!(usage.size_bytes >= empty.size_bytes + (64 << 10));
        assert!(usage.size_bytes < empty.size_bytes + (128 << 10));
    }
}
