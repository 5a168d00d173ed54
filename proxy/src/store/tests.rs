//! The store on real file systems: restarts, crashes, full and broken disks, eviction.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use hawker_core::piece::PieceTable;
use hawker_oci::digest::Algorithm;
use proptest::prelude::*;
use tempfile::TempDir;

use super::disk::{Disk, FileSystem};
use super::suite::{Content, signed};
use super::*;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Every byte there is.
const ALL: Range<u64> = 0..u64::MAX;

fn unlimited() -> CacheSettings {
    CacheSettings {
        high_percent: 100,
        low_percent: 100,
        max_bytes: None,
    }
}

fn open(dir: &Path) -> Store {
    Store::open(dir, unlimited()).unwrap()
}

/// A store that tries again at once after writing failed.
fn open_eager(dir: &Path, settings: CacheSettings) -> Store {
    open_on(dir, settings, Duration::ZERO, FaultyDisk::default())
}

fn open_on(dir: &Path, settings: CacheSettings, retry_after: Duration, disk: FaultyDisk) -> Store {
    Store::open_with(
        dir,
        settings,
        Means {
            disk: Box::new(disk),
            retry_after,
        },
    )
    .unwrap()
}

/// The file system of the machine, which refuses all writes on demand.
#[derive(Clone, Default)]
struct FaultyDisk(Arc<Mutex<Option<ErrorKind>>>);

impl FaultyDisk {
    fn refuse(&self, kind: ErrorKind) {
        *self.0.lock().unwrap() = Some(kind);
    }

    fn mend(&self) {
        *self.0.lock().unwrap() = None;
    }

    fn real(&self) -> io::Result<FileSystem> {
        self.0
            .lock()
            .unwrap()
            .map_or(Ok(FileSystem), |kind| Err(kind.into()))
    }
}

impl Disk for FaultyDisk {
    fn make_folder(&self, path: &Path) -> io::Result<()> {
        self.real()?.make_folder(path)
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.real()?.sync_folder(path)
    }

    fn create(&self, path: &Path) -> io::Result<fs::File> {
        self.real()?.create(path)
    }

    fn write_at(&self, file: &fs::File, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.real()?.write_at(file, bytes, offset)
    }

    fn set_len(&self, file: &fs::File, len: u64) -> io::Result<()> {
        self.real()?.set_len(file, len)
    }

    fn sync(&self, file: &fs::File) -> io::Result<()> {
        self.real()?.sync(file)
    }

    fn rename_over(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.real()?.rename_over(from, to)
    }

    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        self.real()?.replace(path, content)
    }

    fn replace_unsynced(&self, path: &Path, parts: &[&[u8]]) -> io::Result<fs::File> {
        self.real()?.replace_unsynced(path, parts)
    }

    /// A disk that takes no writes still deletes.
    fn remove(&self, path: &Path) -> io::Result<()> {
        FileSystem.remove(path)
    }
}

fn folder() -> (TempDir, PathBuf) {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("store");
    (temporary, dir)
}

/// The files that kill -9 at this moment leaves behind.
fn snapshot(dir: &Path) -> (TempDir, PathBuf) {
    let (temporary, copy) = folder();
    let status = Command::new("cp")
        .arg("-a")
        .arg(dir)
        .arg(&copy)
        .status()
        .unwrap();
    assert!(status.success());
    (temporary, copy)
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            files.extend(files_below(&entry.path()));
        } else {
            files.push(entry.path());
        }
    }
    files
}

fn disk_error(error: StoreError) -> ErrorKind {
    match error {
        StoreError::Disk { what, source } => {
            assert!(what.contains('/'), "names the path: {what}");
            source.kind()
        }
        other => panic!("not the disk: {other}"),
    }
}

#[test]
fn a_partial_task_goes_on_after_a_restart() {
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        let (_temporary, dir) = folder();
        let content = Content::new(algorithm, 3 * MIB + 77, 1);
        {
            let store = open(&dir);
            let partial = content.begin(&store);
            partial.keep_table(&content.table).unwrap();
            content.write(&partial, [5, 0, 2]).unwrap();
        }
        let store = open(&dir);
        assert_eq!(store.partial_size(&content.task), Some(content.size()));
        let partial = content.begin(&store);
        assert_eq!(partial.held().iter().collect::<Vec<_>>(), [0, 2, 5]);
        assert_eq!(store.holdings(), [(content.task, content.size(), 3, false)]);
        assert_eq!(partial.table().values(), content.table.values());
        let blob = content.finish(&partial).unwrap();
        assert!(content.is_in(&blob.file));
        drop((partial, blob, store));

        let store = open(&dir);
        assert!(store.has(&content.task));
        assert_eq!(store.partial_size(&content.task), None);
        assert_eq!(
            store.holdings(),
            [(content.task, content.size(), content.count(), true)]
        );
        let blob = store.committed(&content.task).unwrap();
        assert!(content.is_in(&blob.file));
        assert_eq!(blob.table.values(), content.table.values());
        assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(true));
    }
}

#[test]
fn a_partial_task_takes_no_more_room_than_its_pieces() {
    let (_temporary, dir) = folder();
    let store = open(&dir);
    let task = Content::sha256(1, 0).task;
    let partial = store.begin(&task, 1 << 30).unwrap();
    partial.write(900, &vec![1; MIB]).unwrap();
    let meta = partial.file().metadata().unwrap();
    assert_eq!(meta.len(), 1 << 30);
    assert!(meta.blocks() * 512 < 2 * MIB as u64);
    assert_eq!(store.usage().bytes, MIB as u64);
}

#[test]
fn an_index_torn_at_any_byte_loses_its_tail_and_nothing_else() {
    let (_temporary, dir) = folder();
    let mut content = Content::sha256(MIB + 300 * KIB, 3);
    content.table.sign(signed(content.table.full_count(), true));
    let order = [3, 0, 4, 1];
    {
        let store = open(&dir);
        let partial = content.begin(&store);
        partial.keep_table(&content.table).unwrap();
        content.write(&partial, order).unwrap();
    }
    let index = open(&dir).inner.layout.index(&content.task);
    let whole = fs::read(&index).unwrap();
    let data = index.with_extension("");
    let bytes = fs::read(&data).unwrap();
    let mut seen = 0;
    for cut in 0..=whole.len() {
        fs::write(&data, &bytes).unwrap();
        let mut torn = whole[..cut].to_vec();
        torn.extend([0xff; 7].iter().take(cut % 8));
        fs::write(&index, torn).unwrap();
        let store = open(&dir);
        let partial = content.begin(&store);
        let held = partial.held();
        content.assert_held_is_right(&partial);
        assert!(
            held.len() >= seen && held.len() <= seen + 1,
            "pieces come back in the order they were noted"
        );
        assert!(
            order[..held.len() as usize]
                .iter()
                .all(|piece| held.contains(*piece))
        );
        seen = held.len();
        // It goes on: a piece noted now is there at the next start.
        partial.keep_table(&content.table).unwrap();
        content.write(&partial, [2]).unwrap();
        drop((partial, store));
        let store = open(&dir);
        let partial = content.begin(&store);
        assert_eq!(partial.held().len(), held.len() + 1);
        if cut % 50 == 0 {
            content.finish(&partial).unwrap();
            assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(true));
            drop(partial);
            store
                .inner
                .remove_rotten(&content.task, None, "the test begins again")
                .unwrap();
        }
    }
    assert_eq!(seen, order.len() as u32);
}

/// An append that failed half-way leaves bytes behind; a shorter record over them must not bring the rest to life.
#[test]
fn what_a_failed_append_left_is_never_read() {
    let (_temporary, dir) = folder();
    let content = Content::sha256(MIB, 18);
    let disk = FaultyDisk::default();
    let store = open_on(&dir, unlimited(), Duration::ZERO, disk.clone());
    let partial = content.begin(&store);
    let index = store.inner.layout.index(&content.task);
    let end = fs::metadata(&index).unwrap().len();
    disk.refuse(ErrorKind::StorageFull);
    assert!(partial.keep_table(&content.table).is_err());
    let mut left = vec![0; record::piece(0).len()];
    left.extend(record::piece(3));
    fs::File::options()
        .write(true)
        .open(&index)
        .unwrap()
        .write_all_at(&left, end)
        .unwrap();
    disk.mend();
    content.write(&partial, [0]).unwrap();
    drop((partial, store));
    let noted = record::read(&fs::read(&index).unwrap()).unwrap().held;
    assert_eq!(noted.iter().collect::<Vec<_>>(), [0]);
}

/// After a failed fsync nobody knows what the disk has of the file, and asking again says nothing.
#[test]
fn a_task_that_can_not_be_made_durable_is_thrown_away() {
    let (_temporary, dir) = folder();
    let content = Content::sha256(MIB, 19);
    let disk = FaultyDisk::default();
    let store = open_on(&dir, unlimited(), Duration::ZERO, disk.clone());
    let partial = content.begin(&store);
    partial.keep_table(&content.table).unwrap();
    content.write(&partial, 0..content.count()).unwrap();
    disk.refuse(ErrorKind::Other);
    assert_eq!(
        disk_error(partial.commit(&content.table).err().unwrap()),
        ErrorKind::Other
    );
    disk.mend();
    assert!(store.usage().degraded && store.holdings().is_empty());
    assert!(content.is_in(&partial.file()), "who reads along goes on");
    assert!(content.begin(&store).held().is_empty());
}

#[test]
fn after_a_restart_only_pieces_that_match_count() {
    let (_temporary, dir) = folder();
    let content = Content::sha256(3 * MIB, 4);
    {
        let store = open(&dir);
        let partial = content.begin(&store);
        let mut known = PieceTable::new(content.task, content.table.layout());
        known.extend(0, &content.table.values()[..3], None).unwrap();
        partial.keep_table(&known).unwrap();
        content.write(&partial, [0, 1, 2, 4]).unwrap();
        partial
            .file()
            .write_all_at(b"lost in the crash", content.table.layout().start(1) + 9)
            .unwrap();
    }
    let store = open(&dir);
    assert_eq!(
        store.holdings(),
        [(content.task, content.size(), 0, false)],
        "nothing counts before it is verified"
    );
    let partial = content.begin(&store);
    assert_eq!(
        partial.held().iter().collect::<Vec<_>>(),
        [0, 2],
        "1 is rotten, 4 can't be verified"
    );
    assert_eq!(store.holdings()[0].2, 2);

    // Verified in this run, they count at the next beginning without being hashed.
    partial
        .file()
        .write_all_at(b"rotten since", content.table.layout().start(2))
        .unwrap();
    drop(partial);
    assert_eq!(content.begin(&store).held().len(), 2);
    assert_eq!(store.holdings()[0].2, 2);
    assert_eq!(store.recheck(&content.task, 0..1).unwrap(), Some(true));
    assert_eq!(content.begin(&store).held().len(), 2);
    assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(false));
    assert_eq!(
        content.begin(&store).held().iter().collect::<Vec<_>>(),
        [0],
        "doubted, they are"
    );
    drop(store);

    let store = open(&dir);
    let blob = content.put(&store);
    assert!(content.is_in(&blob.file));
}

#[test]
fn killed_at_any_moment_everything_verified_is_there_again() {
    let (_temporary, dir) = folder();
    let content = Content::sha256(2 * MIB + 5, 5);
    let store = open(&dir);
    let mut snapshots = vec![(0, snapshot(&dir))];
    let partial = content.begin(&store);
    snapshots.push((0, snapshot(&dir)));
    partial.keep_table(&content.table).unwrap();
    for piece in (0..content.count()).rev() {
        content.write(&partial, [piece]).unwrap();
        snapshots.push((content.count() - piece, snapshot(&dir)));
    }
    // Inside commit: the table is there and the blob is not yet.
    blob::write_table(&store.inner, &content.table).unwrap();
    snapshots.push((content.count(), snapshot(&dir)));
    // The blob has its name and the index is still there.
    blob::move_in(&store.inner, &content.task).unwrap();
    snapshots.push((content.count(), snapshot(&dir)));

    for (held, (_temporary, copy)) in snapshots {
        let store = open(&copy);
        if let Some(blob) = store.committed(&content.task) {
            assert!(held == content.count() && content.is_in(&blob.file));
            assert_eq!(files_below(&copy).len(), 3, "lock, blob, table");
            continue;
        }
        let partial = content.begin(&store);
        assert_eq!(partial.held().len(), held);
        content.assert_held_is_right(&partial);
        assert!(content.is_in(&content.finish(&partial).unwrap().file));
    }
}

#[test]
fn leftovers_are_removed_at_start_and_strangers_left_alone() {
    let (_temporary, dir) = folder();
    let content = Content::sha256(300 * KIB, 6);
    drop(content.put(&open(&dir)));
    let layout = Layout::new(&dir);
    let (a, b, c) = (
        Content::sha256(1, 1).task,
        Content::sha256(1, 2).task,
        Content::sha256(1, 3).task,
    );
    let leftovers = [
        layout.partial(&a),
        layout.index(&b),
        layout.partials().join("x.0.tmp"),
        layout.partial(&c),
        layout.index(&c),
        layout.partial(&content.task),
        layout.index(&content.task),
        layout.manifests().join("m.1.tmp"),
        layout.blob(&a),
        layout.table(&b),
        layout.shard(&c).join("c.2.tmp"),
    ];
    for path in &leftovers {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"leftover").unwrap();
    }
    let stranger = layout.partials().join("README");
    fs::write(&stranger, b"?").unwrap();
    let store = open(&dir);
    for path in &leftovers {
        assert!(!path.exists(), "{}", path.display());
    }
    assert!(stranger.exists());
    assert_eq!(store.holdings(), [(content.task, content.size(), 2, true)]);
    assert!(store.committed(&content.task).is_some());
}

#[test]
fn a_committed_blob_whose_files_are_not_whole_is_not_served() {
    let content = Content::sha256(MIB, 7);
    let other = Content::sha256(MIB, 8);
    type Spoil<'a> = Box<dyn Fn(&Layout) + 'a>;
    let spoil: [(&str, Spoil<'_>); 5] = [
        (
            "table missing",
            Box::new(|l| fs::remove_file(l.table(&content.task)).unwrap()),
        ),
        (
            "table garbage",
            Box::new(|l| fs::write(l.table(&content.task), b"garbage").unwrap()),
        ),
        (
            "table of another blob",
            Box::new(|l| {
                fs::copy(l.table(&other.task), l.table(&content.task))
                    .map(drop)
                    .unwrap()
            }),
        ),
        (
            "table cut",
            Box::new(|l| {
                fs::File::options()
                    .write(true)
                    .open(l.table(&content.task))
                    .unwrap()
                    .set_len(120)
                    .unwrap()
            }),
        ),
        (
            "blob cut",
            Box::new(|l| {
                fs::File::options()
                    .write(true)
                    .open(l.blob(&content.task))
                    .unwrap()
                    .set_len(5)
                    .unwrap()
            }),
        ),
    ];
    for (name, spoil) in spoil {
        for restart in [false, true] {
            let (_temporary, dir) = folder();
            let mut store = open(&dir);
            content.put(&store);
            other.put(&store);
            spoil(&store.inner.layout);
            if restart {
                drop(store);
                store = open(&dir);
            }
            assert!(store.committed(&content.task).is_none(), "{name}");
            assert!(!store.has(&content.task), "{name}");
            assert!(!store.inner.layout.blob(&content.task).exists(), "{name}");
            assert!(store.committed(&other.task).is_some(), "{name}");
            assert!(
                content.is_in(&content.put(&store).file),
                "{name}: it can be had again"
            );
        }
    }
}

/// A blob that an earlier run of the daemon committed.
fn committed_before(dir: &Path, content: &Content) -> (Store, Blob) {
    let store = open(dir);
    assert!(content.put(&store).is_checked(&ALL), "this run wrote it");
    drop(store);
    let store = open(dir);
    let blob = store.committed(&content.task).unwrap();
    (store, blob)
}

#[tokio::test]
async fn pieces_of_an_earlier_run_count_once_they_were_hashed() {
    let (_temporary, dir) = folder();
    let content = Content::sha256(5 * MIB, 9);
    let (store, blob) = committed_before(&dir, &content);
    assert!(!blob.is_checked(&(0..1)));
    assert!(blob.check(0).await && blob.is_checked(&(0..1)));
    assert!(!blob.is_checked(&ALL), "the others were not hashed");
    for piece in 1..content.count() {
        assert!(blob.check(piece).await);
    }
    assert!(blob.is_checked(&ALL));
    drop(blob);
    let blob = store.committed(&content.task).unwrap();
    assert!(
        blob.is_checked(&ALL),
        "it is not hashed again when it is opened again"
    );

    // Somebody writes to the file, the same bytes even: it is looked at anew.
    std::thread::sleep(Duration::from_millis(20));
    fs::File::options()
        .write(true)
        .open(store.inner.layout.blob(&content.task))
        .unwrap()
        .write_all_at(&content.bytes[..1], 0)
        .unwrap();
    assert!(!blob.is_checked(&(0..1)));
    assert!(blob.check(0).await);
}

#[test]
fn what_stands_in_the_place_of_a_file_is_neither_read_nor_in_the_way() {
    type Replace = fn(&Path);
    let kinds: [(&str, Replace); 4] = [
        ("folder", |path| {
            fs::create_dir(path).unwrap();
            fs::write(path.join("inside"), b"x").unwrap();
        }),
        ("pipe", |path| {
            assert!(Command::new("mkfifo").arg(path).status().unwrap().success())
        }),
        ("link", |path| {
            std::os::unix::fs::symlink("/etc/hostname", path).unwrap()
        }),
        ("dangling link", |path| {
            std::os::unix::fs::symlink("/nowhere", path).unwrap()
        }),
    ];
    let content = Content::sha256(MIB, 7);
    let body = Bytes::from_static(b"{}");
    let manifest = Digest::of(Algorithm::Sha256, &body);
    type At = fn(&Layout, &Digest) -> PathBuf;
    let places: [(&str, At); 5] = [
        ("blob", Layout::blob),
        ("table", Layout::table),
        ("partial", Layout::partial),
        ("index", Layout::index),
        ("manifest", |layout, _| {
            layout.manifest(&Digest::of(Algorithm::Sha256, b"{}"))
        }),
    ];
    for (place, path) in places {
        for (kind, replace) in kinds {
            for restart in [false, true] {
                let (_temporary, dir) = folder();
                let mut store = open(&dir);
                store.put_manifest(&manifest, &body).unwrap();
                match place {
                    "partial" | "index" => content.write(&content.begin(&store), [0]).unwrap(),
                    _ => drop(content.put(&store)),
                }
                let path = path(&store.inner.layout, &content.task);
                fs::remove_file(&path).unwrap();
                replace(&path);
                if restart {
                    drop(store);
                    store = open(&dir);
                }
                let what = format!("{kind} for {place}, restart: {restart}");
                match place {
                    "manifest" => {
                        assert!(store.manifest(&manifest).is_none(), "{what}");
                        store.put_manifest(&manifest, &body).unwrap();
                        assert!(store.manifest(&manifest).is_some(), "{what}");
                    }
                    _ => {
                        assert!(store.committed(&content.task).is_none(), "{what}");
                        assert!(content.is_in(&content.put(&store).file), "{what}");
                        assert!(store.committed(&content.task).is_some(), "{what}");
                    }
                }
                assert!(Path::new("/etc/hostname").exists());
            }
        }
    }
}

#[test]
fn rechecking_finds_a_flipped_byte_and_evicts_the_blob() {
    let (_temporary, dir) = folder();
    let store = open(&dir);
    let content = Content::sha256(5 * MIB, 9);
    let blob = content.put(&store);
    assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(true));
    blob.file
        .write_all_at(&[content.bytes[4 * MIB] ^ 1], 4 * MIB as u64)
        .unwrap();
    assert_eq!(
        store.recheck(&content.task, 0..MIB as u64).unwrap(),
        Some(true),
        "another range is right"
    );
    assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(false));
    assert!(store.committed(&content.task).is_none());
    assert_eq!(store.evict(), [content.task], "the tracker is told");
    assert_eq!(store.evict(), []);
    assert_eq!(
        store.recheck(&content.task, ALL).unwrap(),
        None,
        "it is not there"
    );
    // The old lease does not hinder the blob's return.
    let again = content.put(&store);
    drop(blob);
    assert!(content.is_in(&again.file));
    assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(true));
}

#[test]
fn a_second_daemon_is_refused() {
    let (_temporary, dir) = folder();
    let first = Store::open(&dir, unlimited()).unwrap();
    let error = Store::open(&dir, unlimited()).err().unwrap().to_string();
    assert!(
        error.contains("in use by another hawker daemon") && error.contains(dir.to_str().unwrap()),
        "{error}"
    );
    drop(first);
    Store::open(&dir, unlimited()).unwrap();
}

#[test]
fn nobody_else_may_read_the_store() {
    let (_temporary, dir) = folder();
    let store = open(&dir);
    let _partial = Content::sha256(MIB, 16).begin(&store);
    Content::sha256(MIB, 17).put(&store);
    let _ = store
        .put_manifest(
            &Digest::of(Algorithm::Sha256, b"{}"),
            &Bytes::from_static(b"{}"),
        )
        .unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for file in files_below(&dir) {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
        assert_eq!(mode(file.parent().unwrap()), 0o700, "{}", file.display());
    }
}

fn body_at((file, range): &Place) -> Vec<u8> {
    let mut body = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut body, range.start).unwrap();
    body
}

#[test]
fn manifests_are_kept_and_rotten_ones_are_not_served() {
    let (_temporary, dir) = folder();
    let body = Bytes::from_static(b"{\"schemaVersion\":2}");
    let digest = Digest::of(Algorithm::Sha512, &body);
    {
        let store = open(&dir);
        assert!(store.manifest(&digest).is_none());
        let written = store.put_manifest(&digest, &body).unwrap().unwrap();
        assert_eq!(body_at(&written), body);
        assert!(matches!(
            store.put_manifest(&digest, &Bytes::from_static(b"?")),
            Err(StoreError::Rotten(_))
        ));
        let kept = store.manifest(&digest).unwrap();
        assert_eq!(kept.body, body);
        assert_eq!(kept.place.1, written.1);
    }
    let store = open(&dir);
    let kept = store.manifest(&digest).unwrap();
    assert_eq!(kept.body, body);
    assert!(store.manifest_bytes(&digest).unwrap() > body.len() as u64);
    assert_eq!(body_at(&kept.place), body);
    let path = store.inner.layout.manifest(&digest);
    let other = b"something else";
    let (before, after) = record::manifest(&digest, other);
    fs::write(&path, [&before, &other[..], &after].concat()).unwrap();
    assert!(store.manifest(&digest).is_none() && store.manifest_bytes(&digest).is_none());
    assert!(!path.exists());
}

#[test]
fn the_order_of_use_survives_a_restart() {
    let (_temporary, dir) = folder();
    let contents: Vec<_> = (0..4)
        .map(|seed| Content::sha256(100 * KIB, 20 + seed))
        .collect();
    {
        let store = open(&dir);
        for content in &contents {
            content.put(&store);
        }
        let hours_ago = |path: PathBuf, hours: u64| {
            let at = SystemTime::now() - Duration::from_secs(hours * 3600);
            fs::File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_modified(at)
                .unwrap();
        };
        for (content, hours) in contents.iter().zip([2, 5, 6, 3]) {
            hours_ago(store.inner.layout.blob(&content.task), hours);
        }
    }
    // Used now, the oldest becomes the newest.
    drop(open(&dir).committed(&contents[2].task).unwrap());
    let store = open_eager(
        &dir,
        CacheSettings {
            max_bytes: Some(200 * KIB as u64),
            ..unlimited()
        },
    );
    let mut gone = store.evict();
    gone.sort();
    let mut want = vec![contents[1].task, contents[3].task];
    want.sort();
    assert_eq!(gone, want);
    assert_eq!(store.usage().bytes, 200 * KIB as u64);
    assert_eq!(files_below(&dir).len(), 5, "lock, two blobs, two tables");
    store.set_limits(CacheSettings {
        max_bytes: Some(100 * KIB as u64),
        ..unlimited()
    });
    assert_eq!(store.evict().len(), 1, "other marks count at once");
    assert_eq!(store.usage().bytes, 100 * KIB as u64);
}

#[test]
fn partial_tasks_are_evicted_only_when_nobody_has_them_open() {
    let (_temporary, dir) = folder();
    let store = open_eager(
        &dir,
        CacheSettings {
            max_bytes: Some(MIB as u64),
            ..unlimited()
        },
    );
    let (open, left) = (Content::sha256(MIB, 30), Content::sha256(MIB, 31));
    let partial = open.begin(&store);
    open.write(&partial, [0, 1, 2]).unwrap();
    left.write(&left.begin(&store), [0, 1, 2]).unwrap();
    assert_eq!(store.usage().bytes, 6 * 256 * KIB as u64);
    assert_eq!(store.evict(), [left.task]);
    assert!(!store.inner.layout.partial(&left.task).exists());
    assert!(!store.inner.layout.index(&left.task).exists());
    assert!(open.is_in(&open.finish(&partial).unwrap().file));
    assert!(
        matches!(
            store.begin(&left.task, 2 * MIB as u64),
            Err(StoreError::Disk { .. })
        ),
        "it never fits"
    );
    assert!(!store.usage().degraded);
}

#[test]
fn a_disk_that_fails_is_left_alone_for_a_while_and_then_tried_again() {
    let (_temporary, dir) = folder();
    let content = Content::sha256(MIB, 40);
    for fault in [ErrorKind::QuotaExceeded, ErrorKind::Other] {
        let disk = FaultyDisk::default();
        let store = open_on(&dir, unlimited(), Duration::from_millis(200), disk.clone());
        let other = Content::sha256(MIB, 41);
        let partial = content.begin(&store);
        content.write(&partial, [0]).unwrap();
        disk.refuse(fault);
        assert_eq!(disk_error(content.write(&partial, [1]).unwrap_err()), fault);
        assert!(store.usage().degraded);
        assert!(store.begin(&other.task, other.size()).is_err());
        disk.mend();
        assert!(store.begin(&other.task, other.size()).is_err(), "not yet");
        std::thread::sleep(Duration::from_millis(250));
        assert!(store.usage().degraded, "nothing was written since");
        assert!(other.is_in(&other.put(&store).file));
        assert!(!store.usage().degraded);
        assert!(
            content.is_in(&content.finish(&partial).unwrap().file),
            "the old one goes on too"
        );
        drop(partial);
        for task in [content.task, other.task] {
            store
                .inner
                .remove_rotten(&task, None, "the test begins again")
                .unwrap();
        }
    }
}

/// A small file system of its own, unmounted at the end.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn mount(options: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let device = ["-t", "tmpfs", "-o", options, "hawker-test"];
        run(Command::new("mount").args(device).arg(folder.path()));
        Self(folder)
    }

    fn remount(&self, options: &str) {
        run(Command::new("mount")
            .arg("-o")
            .arg(format!("remount,{options}"))
            .arg(self.0.path()));
    }

    fn store(&self) -> PathBuf {
        self.0.path().join("store")
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        run(Command::new("umount").arg("-l").arg(self.0.path()));
    }
}

fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(
        status.success() || std::thread::panicking(),
        "{command:?} (needs root): {status}"
    );
}

#[test]
fn a_full_disk_is_told_and_takes_writes_again_when_there_is_room() {
    let disk = Tmpfs::mount("size=4m");
    let store = open_eager(&disk.store(), unlimited());
    let (a, b) = (Content::sha256(3 * MIB, 50), Content::sha256(3 * MIB, 51));
    let (first, second) = (a.begin(&store), b.begin(&store));
    let blob = a.finish(&first).unwrap();
    let error = b.finish(&second).map(drop).unwrap_err();
    assert!(error.to_string().contains("writing piece"), "{error}");
    assert_eq!(disk_error(error), ErrorKind::StorageFull);
    assert!(store.usage().degraded);
    assert!(a.is_in(&blob.file), "what is leased is not evicted for it");
    let held = store
        .holdings()
        .iter()
        .find(|holding| holding.0 == b.task)
        .unwrap()
        .2;
    assert!(held > 0 && held < b.count(), "{held}");

    // The lease ends: one round of eviction makes the room.
    drop((blob, first));
    b.write(&second, 0..b.count()).unwrap();
    assert!(!store.usage().degraded);
    assert!(b.is_in(&second.commit(&b.table).unwrap().file));
    assert_eq!(store.evict(), [a.task]);
    let huge = Content::sha256(5 * MIB, 52);
    assert_eq!(
        disk_error(store.begin(&huge.task, huge.size()).err().unwrap()),
        ErrorKind::StorageFull
    );
    assert!(store.has(&b.task), "what can never fit evicts nothing");
}

#[test]
fn a_disk_without_inodes_makes_room_among_what_is_not_used() {
    let disk = Tmpfs::mount("size=16m,nr_inodes=400");
    let store = open_eager(&disk.store(), unlimited());
    let mut leased = Vec::new();
    let mut refused = None;
    for seed in 0..400 {
        let content = Content::sha256(KIB, 1000 + seed);
        match store
            .begin(&content.task, content.size())
            .and_then(|partial| content.finish(&partial))
        {
            Ok(blob) => leased.push((content, blob)),
            Err(error) => {
                refused = Some(disk_error(error));
                break;
            }
        }
    }
    assert_eq!(refused, Some(ErrorKind::StorageFull));
    assert!(store.usage().degraded);
    assert!(
        leased
            .iter()
            .all(|(content, blob)| store.has(&content.task) && content.is_in(&blob.file))
    );
    drop(leased);
    for seed in 0..300 {
        let content = Content::sha256(KIB, 2000 + seed);
        assert!(content.is_in(&content.put(&store).file));
    }
    assert!(!store.usage().degraded);
    drop(store);
    let store = open(&disk.store());
    let usage = store.usage();
    assert!(usage.partials == 0 && usage.blobs > 0, "{usage:?}");
    assert!(
        store
            .holdings()
            .iter()
            .all(|(task, ..)| store.recheck(task, ALL).unwrap() == Some(true))
    );
}

#[test]
fn a_read_only_disk_is_read() {
    let disk = Tmpfs::mount("size=16m");
    let (old, new) = (Content::sha256(MIB, 60), Content::sha256(MIB, 61));
    let store = open_eager(
        &disk.store(),
        CacheSettings {
            max_bytes: Some(2 * MIB as u64),
            ..unlimited()
        },
    );
    old.put(&store);
    disk.remount("ro");
    assert!(old.is_in(&store.committed(&old.task).unwrap().file));
    assert_eq!(
        disk_error(store.begin(&new.task, new.size()).err().unwrap()),
        ErrorKind::ReadOnlyFilesystem
    );
    assert!(store.usage().degraded);
    drop(store);

    let store = open_eager(
        &disk.store(),
        CacheSettings {
            max_bytes: Some(0),
            ..unlimited()
        },
    );
    assert_eq!(store.evict(), [], "what can't be deleted is still there");
    assert!(old.is_in(&store.committed(&old.task).unwrap().file));
    drop(store);

    disk.remount("rw");
    let store = open_eager(&disk.store(), unlimited());
    assert!(new.is_in(&new.put(&store).file));
    assert!(store.has(&old.task));
}

#[test]
fn readers_get_whole_blobs_while_others_are_evicted_and_come_back() {
    let (_temporary, dir) = folder();
    let max_bytes = Some(500 * KIB as u64);
    let store = open_eager(
        &dir,
        CacheSettings {
            max_bytes,
            ..unlimited()
        },
    );
    let contents: Vec<_> = (0..4)
        .map(|seed| Content::sha256(200 * KIB, 70 + seed))
        .collect();
    let failed = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (store, contents, failed) = (&store, &contents, &failed);
            scope.spawn(move || {
                for round in 0..40 {
                    let content = &contents[(thread + round * 7) % contents.len()];
                    let blob = store.committed(&content.task).or_else(|| {
                        let partial = store.begin(&content.task, content.size()).ok()?;
                        content.finish(&partial).ok()
                    });
                    if blob.is_some_and(|blob| !content.is_in(&blob.file)) {
                        failed.store(true, std::sync::atomic::Ordering::Relaxed);
                    }
                    store.evict();
                }
            });
        }
    });
    assert!(!failed.into_inner());
    store.evict();
    assert!(store.usage().bytes <= 500 * KIB as u64);
    for (task, ..) in store.holdings() {
        assert_eq!(store.recheck(&task, ALL).unwrap(), Some(true));
    }
    assert_eq!(files_below(&dir).len() as u64, 1 + 2 * store.usage().blobs);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Commits the blob, unless it is there, and reads it for a while.
    Use(usize),
    /// All its readers are done.
    Done(usize),
    Evict,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![3 => (0..6usize).prop_map(Step::Use), 2 => (0..6usize).prop_map(Step::Done), 1 => Just(Step::Evict)];
    prop::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Against a list in the order of use: the longest unused goes, as much as is too much, and never what is read.
    #[test]
    fn eviction_takes_the_longest_unused_that_nobody_reads(steps in steps(), max_kib in 1..30usize) {
        let contents: Vec<_> = (0..6).map(|at| Content::sha256((at + 1) * KIB, 80 + at as u64)).collect();
        let (_temporary, dir) = folder();
        let max_bytes = max_kib.max(6) * KIB;
        let store = open_eager(&dir, CacheSettings { max_bytes: Some(max_bytes as u64), ..unlimited() });
        let mut by_use: Vec<usize> = Vec::new();
        let mut readers: Vec<Vec<Blob>> = vec![Vec::new(); 6];
        for step in steps {
            match step {
                Step::Use(at) => {
                    let content = &contents[at];
                    let blob = store.committed(&content.task);
                    prop_assert_eq!(blob.is_some(), by_use.contains(&at));
                    readers[at].push(blob.unwrap_or_else(|| content.put(&store)));
                    by_use.retain(|other| *other != at);
                    by_use.push(at);
                }
                Step::Done(at) => readers[at].clear(),
                Step::Evict => {
                    let mut total: usize = by_use.iter().map(|at| contents[*at].bytes.len()).sum();
                    let mut gone = Vec::new();
                    by_use.retain(|at| {
                        let goes = total > max_bytes && readers[*at].is_empty();
                        if goes {
                            total -= contents[*at].bytes.len();
                            gone.push(contents[*at].task);
                        }
                        !goes
                    });
                    gone.sort();
                    prop_assert_eq!(store.evict(), gone);
                }
            }
            for (at, content) in contents.iter().enumerate() {
                prop_assert_eq!(store.has(&content.task), by_use.contains(&at));
                prop_assert_eq!(store.inner.layout.blob(&content.task).exists(), by_use.contains(&at));
                for blob in &readers[at] {
                    prop_assert!(content.is_in(&blob.file));
                }
            }
        }
    }
}
