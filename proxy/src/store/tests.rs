//! The store on real file systems: restarts, crashes, full and broken disks, eviction.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use hawker_core::digest::{Algorithm, Chain};
use hawker_core::piece::{PeerId, PieceIndex, PieceTable, SignedPrefix};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Every byte there is.
const ALL: Range<u64> = 0..u64::MAX;

/// Content of a blob, with its digest and table.
struct Content {
    task: Digest,
    bytes: Vec<u8>,
    table: PieceTable,
}

impl Content {
    fn new(algorithm: Algorithm, len: usize, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let bytes: Vec<u8> = (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect();
        let task = Digest::of(algorithm, &bytes);
        let layout = PieceLayout::new(len as u64);
        let mut table = PieceTable::new(task, layout);
        let mut chain = Chain::new(algorithm);
        for piece in 0..layout.count() {
            let range = layout.range(piece);
            chain.update(&bytes[range.start as usize..range.end as usize]);
            if let Some(value) = chain.value() {
                table.push(value);
            }
        }
        Self { task, bytes, table }
    }

    fn sha256(len: usize, seed: u64) -> Self {
        Self::new(Algorithm::Sha256, len, seed)
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn count(&self) -> u32 {
        self.table.layout().count()
    }

    fn piece(&self, piece: PieceIndex) -> &[u8] {
        let range = self.table.layout().range(piece);
        &self.bytes[range.start as usize..range.end as usize]
    }

    fn begin(&self, store: &Store) -> Partial {
        store.begin(&self.task, self.size()).unwrap()
    }

    fn write(
        &self,
        partial: &Partial,
        pieces: impl IntoIterator<Item = PieceIndex>,
    ) -> Result<(), StoreError> {
        pieces.into_iter().try_for_each(|piece| partial.write(piece, self.piece(piece)))
    }

    /// Goes on from what is there, to the end.
    fn finish(&self, partial: &Partial) -> Result<Blob, StoreError> {
        partial.keep_table(&self.table)?;
        self.write(partial, partial.held().missing().collect::<Vec<_>>())?;
        partial.commit(&self.table)
    }

    fn put(&self, store: &Store) -> Blob {
        self.finish(&self.begin(store)).unwrap()
    }

    fn is_in(&self, file: &fs::File) -> bool {
        let mut read = vec![0; self.bytes.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        file.metadata().unwrap().len() == self.size() && read == self.bytes
    }

    /// Every piece that counts is on disk as it should be.
    fn assert_held_is_right(&self, partial: &Partial) {
        for piece in partial.held().iter() {
            let mut read = vec![0; self.piece(piece).len()];
            partial.file().read_exact_at(&mut read, self.table.layout().start(piece)).unwrap();
            assert_eq!(read, self.piece(piece), "piece {piece}");
        }
        assert!(self.table.values().starts_with(partial.table().values()));
    }
}

fn signed(count: u32, sealed: bool) -> SignedPrefix {
    SignedPrefix {
        count,
        sealed,
        signed_at_s: 7,
        issuer: PeerId([1; 16]),
        certificate: [2; 300].into(),
        signature: vec![3; 64],
    }
}

fn unlimited() -> CacheSettings {
    CacheSettings { high_percent: 100, low_percent: 100, max_bytes: None }
}

fn open(dir: &Path) -> Store {
    Store::open(dir, unlimited()).unwrap()
}

/// A store that tries again at once after writing failed.
fn open_eager(dir: &Path, settings: CacheSettings) -> Store {
    let mut inner = Store::opened(dir, settings).unwrap();
    inner.set_retry_after(Duration::ZERO);
    Store { inner: Arc::new(inner) }
}

fn folder() -> (TempDir, PathBuf) {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("store");
    (temporary, dir)
}

/// What kill -9 at this moment leaves behind.
fn snapshot(dir: &Path) -> (TempDir, PathBuf) {
    let (temporary, copy) = folder();
    let status = Command::new("cp").arg("-a").arg(dir).arg(&copy).status().unwrap();
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
        assert_eq!(store.holdings(), [(content.task, content.size(), content.count(), true)]);
        let blob = store.committed(&content.task).unwrap();
        assert!(content.is_in(&blob.file));
        assert_eq!(blob.table.values(), content.table.values());
        assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(true));
    }
}

#[test]
fn pieces_that_the_kept_table_can_not_verify_do_not_count_after_a_restart() {
    let (_temporary, dir) = folder();
    let content = Content::sha256(3 * MIB + 77, 1);
    let mut known = PieceTable::new(content.task, content.table.layout());
    content.table.values()[..2].iter().for_each(|value| known.push(*value));
    {
        let partial = content.begin(&open(&dir));
        partial.keep_table(&known).unwrap();
        content.write(&partial, [0, 1, 2, content.count() - 1]).unwrap();
    }
    for _ in 0..2 {
        let partial = content.begin(&open(&dir));
        assert_eq!(partial.held().iter().collect::<Vec<_>>(), [0, 1]);
    }
    let store = open(&dir);
    let partial = content.begin(&store);
    assert!(content.is_in(&content.finish(&partial).unwrap().file));
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
fn statements_and_seals_are_kept() {
    let (_temporary, dir) = folder();
    let mut content = Content::sha256(3 * MIB, 1);
    let full = content.table.full_count();
    content.table.sign(signed(2, false));
    {
        let store = open(&dir);
        let partial = content.begin(&store);
        partial.keep_table(&content.table).unwrap();
        partial.keep_table(&content.table).unwrap();
        content.table.sign(signed(full, false));
        partial.keep_table(&content.table).unwrap();
    }
    let store = open(&dir);
    let partial = content.begin(&store);
    assert_eq!(partial.table().signed(), Some(&signed(full, false)));
    let blob = content.finish(&partial).unwrap();
    content.table.sign(signed(full, true));
    blob.keep_table(&content.table).unwrap();
    assert!(!blob.table.is_sealed());
    assert!(store.committed(&content.task).unwrap().table.is_sealed());
    drop((partial, blob, store));
    assert!(open(&dir).committed(&content.task).unwrap().table.is_sealed());

    let store = open(&dir);
    let other = Content::sha256(3 * MIB, 2);
    let blob = store.committed(&content.task).unwrap();
    assert!(matches!(blob.keep_table(&other.table), Err(StoreError::Rotten(_))));
}

#[test]
fn a_blob_without_bytes_is_a_blob() {
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        let (_temporary, dir) = folder();
        let content = Content::new(algorithm, 0, 0);
        content.put(&open(&dir));
        let store = open(&dir);
        assert_eq!(store.committed(&content.task).unwrap().size_bytes(), 0);
        assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(true));
        let not_empty = Content::new(algorithm, 5, 0).task;
        let partial = store.begin(&not_empty, 0).unwrap();
        let table = partial.table();
        assert!(matches!(partial.commit(&table), Err(StoreError::Rotten(_))));
    }
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
        assert!(order[..held.len() as usize].iter().all(|piece| held.contains(*piece)));
        seen = held.len();
        // It goes on: what is noted now is there at the next start.
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
            store.inner.drop_rotten(&content.task, "the test begins again").unwrap();
        }
    }
    assert_eq!(seen, order.len() as u32);
}

/// An append that failed half-way leaves bytes behind; a shorter record over them must not bring the rest to life.
#[test]
fn what_a_failed_append_left_is_never_read() {
    let (_temporary, dir) = folder();
    let content = Content::sha256(MIB, 18);
    let store = open_eager(&dir, unlimited());
    let partial = content.begin(&store);
    let index = store.inner.layout.index(&content.task);
    let end = fs::metadata(&index).unwrap().len();
    *store.inner.fault.lock().unwrap() = Some(ErrorKind::StorageFull);
    assert!(partial.keep_table(&content.table).is_err());
    let mut left = vec![0; record::piece(0).len()];
    left.extend(record::piece(3));
    fs::File::options().write(true).open(&index).unwrap().write_all_at(&left, end).unwrap();
    *store.inner.fault.lock().unwrap() = None;
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
    let store = open_eager(&dir, unlimited());
    let partial = content.begin(&store);
    partial.keep_table(&content.table).unwrap();
    content.write(&partial, 0..content.count()).unwrap();
    *store.inner.fault.lock().unwrap() = Some(ErrorKind::Other);
    assert_eq!(disk_error(partial.commit(&content.table).err().unwrap()), ErrorKind::Other);
    *store.inner.fault.lock().unwrap() = None;
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
        partial.file().write_all_at(b"lost in the crash", content.table.layout().start(1) + 9).unwrap();
    }
    let store = open(&dir);
    assert_eq!(
        store.holdings(),
        [(content.task, content.size(), 0, false)],
        "nothing counts before it is verified"
    );
    let partial = content.begin(&store);
    assert_eq!(partial.held().iter().collect::<Vec<_>>(), [0, 2], "1 is rotten, 4 can't be verified");
    assert_eq!(store.holdings()[0].2, 2);

    // Verified in this run, they count at the next beginning without being hashed.
    partial.file().write_all_at(b"rotten since", content.table.layout().start(2)).unwrap();
    drop(partial);
    assert_eq!(content.begin(&store).held().len(), 2);
    assert_eq!(store.holdings()[0].2, 2);
    assert_eq!(store.recheck(&content.task, 0..1).unwrap(), Some(true));
    assert_eq!(content.begin(&store).held().len(), 2);
    assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(false));
    assert_eq!(content.begin(&store).held().iter().collect::<Vec<_>>(), [0], "doubted, they are");
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
    let (a, b, c) = (Content::sha256(1, 1).task, Content::sha256(1, 2).task, Content::sha256(1, 3).task);
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
        ("table missing", Box::new(|l| fs::remove_file(l.table(&content.task)).unwrap())),
        ("table garbage", Box::new(|l| fs::write(l.table(&content.task), b"garbage").unwrap())),
        (
            "table of another blob",
            Box::new(|l| fs::copy(l.table(&other.task), l.table(&content.task)).map(drop).unwrap()),
        ),
        (
            "table cut",
            Box::new(|l| {
                fs::File::options().write(true).open(l.table(&content.task)).unwrap().set_len(120).unwrap()
            }),
        ),
        (
            "blob cut",
            Box::new(|l| {
                fs::File::options().write(true).open(l.blob(&content.task)).unwrap().set_len(5).unwrap()
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
            assert!(content.is_in(&content.put(&store).file), "{name}: it can be had again");
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
    blob.file.write_all_at(&[content.bytes[4 * MIB] ^ 1], 4 * MIB as u64).unwrap();
    assert_eq!(store.recheck(&content.task, 0..MIB as u64).unwrap(), Some(true), "another range is right");
    assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(false));
    assert!(store.committed(&content.task).is_none());
    assert_eq!(store.evict(), [content.task], "the tracker is told");
    assert_eq!(store.evict(), []);
    assert_eq!(store.recheck(&content.task, ALL).unwrap(), None, "it is not there");
    // The old lease does not hinder the blob's return.
    let again = content.put(&store);
    drop(blob);
    assert!(content.is_in(&again.file));
    assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(true));
}

#[test]
fn one_download_of_a_task_at_a_time() {
    let (_temporary, dir) = folder();
    let store = open(&dir);
    let content = Content::sha256(MIB, 10);
    let partial = content.begin(&store);
    let second = partial.clone();
    assert!(matches!(store.begin(&content.task, content.size()), Err(StoreError::Busy)));
    drop(partial);
    assert!(matches!(store.begin(&content.task, content.size()), Err(StoreError::Busy)));
    drop(second);
    let partial = content.begin(&store);
    let blob = content.finish(&partial).unwrap();
    assert!(matches!(store.begin(&content.task, content.size()), Err(StoreError::Busy)), "it is committed");
    assert!(partial.commit(&content.table).is_err(), "only once");
    partial.discard().unwrap();
    assert!(store.has(&content.task), "a committed blob is not thrown away by who made it");
    drop((partial, blob));

    let content = Content::sha256(MIB, 11);
    let winners = std::thread::scope(|scope| {
        let begin = || store.begin(&content.task, content.size()).ok();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(begin)).collect();
        threads.into_iter().filter_map(|thread| thread.join().unwrap()).count()
    });
    assert!(winners >= 1);
}

#[test]
fn a_discarded_task_begins_anew() {
    let (_temporary, dir) = folder();
    let store = open(&dir);
    let content = Content::sha256(2 * MIB, 12);
    let old = content.begin(&store);
    content.write(&old, [0, 1]).unwrap();
    old.discard().unwrap();
    assert_eq!(store.partial_size(&content.task), None);
    let new = content.begin(&store);
    assert!(new.held().is_empty());
    // Writes that come late do nothing.
    content.write(&old, [2]).unwrap();
    old.keep_table(&content.table).unwrap();
    assert!(old.commit(&content.table).is_err());
    drop(old);
    assert!(matches!(store.begin(&content.task, content.size()), Err(StoreError::Busy)));
    assert!(content.is_in(&content.finish(&new).unwrap().file));
}

#[test]
fn nothing_incomplete_or_contradictory_is_committed() {
    let (_temporary, dir) = folder();
    let store = open(&dir);
    let content = Content::sha256(5 * MIB / 4, 13);
    let partial = content.begin(&store);
    content.write(&partial, [0, 1, 2, 3]).unwrap();
    assert!(partial.commit(&content.table).is_err(), "a piece is missing");
    assert!(partial.write(4, &content.piece(4)[1..]).is_err(), "a piece of another length");
    assert!(partial.write(5, b"").is_err(), "no such piece");
    content.write(&partial, [4]).unwrap();
    let empty = PieceTable::new(content.task, content.table.layout());
    assert!(partial.commit(&empty).is_err(), "values are missing");
    partial.keep_table(&content.table).unwrap();
    let mut other = empty;
    other.extend(0, Content::sha256(5 * MIB / 4, 14).table.values(), None).unwrap();
    assert!(matches!(partial.commit(&other), Err(StoreError::Rotten(_))));
    assert!(matches!(partial.keep_table(&other), Err(StoreError::Rotten(_))));
    assert!(!store.usage().degraded, "that was not the disk's fault");
    assert!(partial.commit(&content.table).is_ok());
}

#[test]
fn another_size_begins_anew_and_an_absurd_one_is_refused() {
    let (_temporary, dir) = folder();
    let store = open(&dir);
    let content = Content::sha256(MIB, 15);
    let partial = store.begin(&content.task, 77).unwrap();
    drop(partial);
    assert_eq!(store.partial_size(&content.task), Some(77));
    assert!(content.is_in(&content.put(&store).file));
    let task = Content::sha256(1, 0).task;
    assert!(matches!(store.begin(&task, u64::MAX), Err(StoreError::Disk { .. })));
    assert!(!store.usage().degraded);
    assert_eq!(store.partial_size(&task), None);
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
    let _ =
        store.put_manifest(&Digest::of(Algorithm::Sha256, b"{}"), "a/b", &Bytes::from_static(b"{}")).unwrap();
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
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    {
        let store = open(&dir);
        assert!(store.manifest(&digest).is_none());
        let written = store.put_manifest(&digest, media_type, &body).unwrap().unwrap();
        assert_eq!(body_at(&written), body);
        assert!(matches!(
            store.put_manifest(&digest, "x", &Bytes::from_static(b"?")),
            Err(StoreError::Rotten(_))
        ));
        let kept = store.manifest(&digest).unwrap();
        assert_eq!((&*kept.media_type, &kept.body), (media_type, &body));
        assert_eq!(kept.place.1, written.1);
    }
    let store = open(&dir);
    let kept = store.manifest(&digest).unwrap();
    assert_eq!((&*kept.media_type, &kept.body), (media_type, &body));
    assert!(store.manifest_bytes(&digest).unwrap() > body.len() as u64);
    assert_eq!(body_at(&kept.place), body);
    let path = store.inner.layout.manifest(&digest);
    let other = b"something else";
    let (before, after) = record::manifest(&digest, media_type, other);
    fs::write(&path, [&before, &other[..], &after].concat()).unwrap();
    assert!(store.manifest(&digest).is_none() && store.manifest_bytes(&digest).is_none());
    assert!(!path.exists());
}

#[test]
fn the_order_of_use_survives_a_restart() {
    let (_temporary, dir) = folder();
    let contents: Vec<_> = (0..4).map(|seed| Content::sha256(100 * KIB, 20 + seed)).collect();
    {
        let store = open(&dir);
        for content in &contents {
            content.put(&store);
        }
        let hours_ago = |path: PathBuf, hours: u64| {
            let at = SystemTime::now() - Duration::from_secs(hours * 3600);
            fs::File::options().write(true).open(path).unwrap().set_modified(at).unwrap();
        };
        for (content, hours) in contents.iter().zip([2, 5, 6, 3]) {
            hours_ago(store.inner.layout.blob(&content.task), hours);
        }
    }
    // Used now, the oldest becomes the newest.
    drop(open(&dir).committed(&contents[2].task).unwrap());
    let store = open_eager(&dir, CacheSettings { max_bytes: Some(200 * KIB as u64), ..unlimited() });
    let mut gone = store.evict();
    gone.sort();
    let mut want = vec![contents[1].task, contents[3].task];
    want.sort();
    assert_eq!(gone, want);
    assert_eq!(store.usage().bytes, 200 * KIB as u64);
    assert_eq!(files_below(&dir).len(), 5, "lock, two blobs, two tables");
}

#[test]
fn partial_tasks_are_evicted_only_when_nobody_has_them_open() {
    let (_temporary, dir) = folder();
    let store = open_eager(&dir, CacheSettings { max_bytes: Some(MIB as u64), ..unlimited() });
    let (open, left) = (Content::sha256(MIB, 30), Content::sha256(MIB, 31));
    let partial = open.begin(&store);
    open.write(&partial, [0, 1, 2]).unwrap();
    left.write(&left.begin(&store), [0, 1, 2]).unwrap();
    assert_eq!(store.usage().bytes, 6 * 256 * KIB as u64);
    assert_eq!(store.evict(), [left.task]);
    assert!(!store.inner.layout.partial(&left.task).exists());
    assert!(!store.inner.layout.index(&left.task).exists());
    assert!(open.is_in(&open.finish(&partial).unwrap().file));
    assert!(matches!(store.begin(&left.task, 2 * MIB as u64), Err(StoreError::Disk { .. })), "it never fits");
    assert!(!store.usage().degraded);
}

#[test]
fn a_disk_that_fails_is_left_alone_for_a_while_and_then_tried_again() {
    let (_temporary, dir) = folder();
    let content = Content::sha256(MIB, 40);
    for fault in [ErrorKind::QuotaExceeded, ErrorKind::Other] {
        let mut inner = Store::opened(&dir, unlimited()).unwrap();
        inner.set_retry_after(Duration::from_millis(200));
        let store = Store { inner: Arc::new(inner) };
        let other = Content::sha256(MIB, 41);
        let partial = content.begin(&store);
        content.write(&partial, [0]).unwrap();
        *store.inner.fault.lock().unwrap() = Some(fault);
        assert_eq!(disk_error(content.write(&partial, [1]).unwrap_err()), fault);
        assert!(store.usage().degraded);
        assert!(store.begin(&other.task, other.size()).is_err());
        *store.inner.fault.lock().unwrap() = None;
        assert!(store.begin(&other.task, other.size()).is_err(), "not yet");
        std::thread::sleep(Duration::from_millis(250));
        assert!(store.usage().degraded, "nothing was written since");
        assert!(other.is_in(&other.put(&store).file));
        assert!(!store.usage().degraded);
        assert!(content.is_in(&content.finish(&partial).unwrap().file), "the old one goes on too");
        drop(partial);
        for task in [content.task, other.task] {
            store.inner.drop_rotten(&task, "the test begins again").unwrap();
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
        run(Command::new("mount").arg("-o").arg(format!("remount,{options}")).arg(self.0.path()));
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
    assert!(status.success() || std::thread::panicking(), "{command:?} (needs root): {status}");
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
    let held = store.holdings().iter().find(|holding| holding.0 == b.task).unwrap().2;
    assert!(held > 0 && held < b.count(), "{held}");

    // The lease ends: one round of eviction makes the room.
    drop((blob, first));
    b.write(&second, 0..b.count()).unwrap();
    assert!(!store.usage().degraded);
    assert!(b.is_in(&second.commit(&b.table).unwrap().file));
    assert_eq!(store.evict(), [a.task]);
    let huge = Content::sha256(5 * MIB, 52);
    assert_eq!(disk_error(store.begin(&huge.task, huge.size()).err().unwrap()), ErrorKind::StorageFull);
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
        match store.begin(&content.task, content.size()).and_then(|partial| content.finish(&partial)) {
            Ok(blob) => leased.push((content, blob)),
            Err(error) => {
                refused = Some(disk_error(error));
                break;
            }
        }
    }
    assert_eq!(refused, Some(ErrorKind::StorageFull));
    assert!(store.usage().degraded);
    assert!(leased.iter().all(|(content, blob)| store.has(&content.task) && content.is_in(&blob.file)));
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
    assert!(store.holdings().iter().all(|(task, ..)| store.recheck(task, ALL).unwrap() == Some(true)));
}

#[test]
fn a_read_only_disk_is_read() {
    let disk = Tmpfs::mount("size=16m");
    let (old, new) = (Content::sha256(MIB, 60), Content::sha256(MIB, 61));
    let store = open_eager(&disk.store(), CacheSettings { max_bytes: Some(2 * MIB as u64), ..unlimited() });
    old.put(&store);
    disk.remount("ro");
    assert!(old.is_in(&store.committed(&old.task).unwrap().file));
    assert_eq!(disk_error(store.begin(&new.task, new.size()).err().unwrap()), ErrorKind::ReadOnlyFilesystem);
    assert!(store.usage().degraded);
    drop(store);

    let store = open_eager(&disk.store(), CacheSettings { max_bytes: Some(0), ..unlimited() });
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
    let store = open_eager(&dir, CacheSettings { max_bytes, ..unlimited() });
    let contents: Vec<_> = (0..4).map(|seed| Content::sha256(200 * KIB, 70 + seed)).collect();
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
