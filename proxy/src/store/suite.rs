//! The behaviour that all stores share, and the implementations that it is tried on.

use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use hawker_core::piece::{PeerId, PieceIndex, PieceLayout, PieceTable, SignedPrefix};
use hawker_oci::digest::{Algorithm, Chain, Digest};
use tempfile::TempDir;

use super::faulty::{Faults, FaultyStore};
use super::memory::MemoryStore;
use super::{Blob, Partial, Store, StoreError, TaskStore};
use crate::settings::CacheSettings;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Every byte there is.
const ALL: Range<u64> = 0..u64::MAX;

/// Content of a blob, with its digest and table.
pub(super) struct Content {
    pub(super) task: Digest,
    pub(super) bytes: Vec<u8>,
    pub(super) table: PieceTable,
}

impl Content {
    pub(super) fn new(algorithm: Algorithm, len: usize, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let bytes: Vec<u8> = (0..len)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
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

    pub(super) fn sha256(len: usize, seed: u64) -> Self {
        Self::new(Algorithm::Sha256, len, seed)
    }

    pub(super) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub(super) fn count(&self) -> u32 {
        self.table.layout().count()
    }

    pub(super) fn piece(&self, piece: PieceIndex) -> &[u8] {
        let range = self.table.layout().range(piece);
        &self.bytes[range.start as usize..range.end as usize]
    }

    pub(super) fn begin(&self, store: &dyn TaskStore) -> Partial {
        store.begin(&self.task, self.size()).unwrap()
    }

    pub(super) fn write(
        &self,
        partial: &Partial,
        pieces: impl IntoIterator<Item = PieceIndex>,
    ) -> Result<(), StoreError> {
        pieces
            .into_iter()
            .try_for_each(|piece| partial.write(piece, self.piece(piece)))
    }

    /// Goes on from what is there, to the end.
    pub(super) fn finish(&self, partial: &Partial) -> Result<Blob, StoreError> {
        partial.keep_table(&self.table)?;
        self.write(partial, partial.held().missing().collect::<Vec<_>>())?;
        partial.commit(&self.table)
    }

    pub(super) fn put(&self, store: &dyn TaskStore) -> Blob {
        self.finish(&self.begin(store)).unwrap()
    }

    pub(super) fn is_in(&self, file: &fs::File) -> bool {
        let mut read = vec![0; self.bytes.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        file.metadata().unwrap().len() == self.size() && read == self.bytes
    }

    /// Every piece that counts is in the file as it should be.
    pub(super) fn assert_held_is_right(&self, partial: &Partial) {
        for piece in partial.held().iter() {
            let mut read = vec![0; self.piece(piece).len()];
            partial
                .file()
                .read_exact_at(&mut read, self.table.layout().start(piece))
                .unwrap();
            assert_eq!(read, self.piece(piece), "piece {piece}");
        }
        assert!(self.table.values().starts_with(partial.table().values()));
    }
}

pub(super) fn signed(count: u32, sealed: bool) -> SignedPrefix {
    SignedPrefix {
        count,
        sealed,
        signed_at_s: 7,
        issuer: PeerId([1; 16]),
        registries: vec!["r.example".to_owned()],
        certificate: [2; 300].into(),
        signature: vec![3; 64],
    }
}

fn held(partial: &Partial) -> Vec<PieceIndex> {
    partial.held().iter().collect()
}

/// A place where tasks outlive restarts of the daemon.
pub(crate) trait Place: Send + Sync {
    /// The store as a daemon finds it that starts now. Handles of earlier stores must be gone.
    fn open(&self) -> Arc<dyn TaskStore>;
}

pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
}

impl Place for Folder {
    fn open(&self) -> Arc<dyn TaskStore> {
        let settings = CacheSettings {
            high_percent: 100,
            low_percent: 100,
            max_bytes: None,
        };
        Arc::new(Store::open(&self.0.path().join("store"), settings).unwrap())
    }
}

#[derive(Default)]
pub(crate) struct Memory(Mutex<MemoryStore>);

impl Memory {
    pub(crate) fn new() -> Self {
        Self::default()
    }
}

impl Place for Memory {
    fn open(&self) -> Arc<dyn TaskStore> {
        let mut store = self.0.lock().unwrap();
        *store = store.restarted();
        Arc::new(store.clone())
    }
}

pub(crate) struct Faulty<P> {
    inner: P,
    pub(crate) faults: Faults,
}

impl<P: Place> Faulty<P> {
    pub(crate) fn over(inner: P) -> Self {
        Self {
            inner,
            faults: Faults::default(),
        }
    }
}

impl<P: Place> Place for Faulty<P> {
    fn open(&self) -> Arc<dyn TaskStore> {
        Arc::new(FaultyStore::new(self.inner.open(), self.faults.clone()))
    }
}

fn a_partial_task_goes_on_after_a_restart(place: &dyn Place) {
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        let content = Content::new(algorithm, 3 * MIB + 77, 1);
        {
            let partial = content.begin(&*place.open());
            partial.keep_table(&content.table).unwrap();
            content.write(&partial, [5, 0, 2]).unwrap();
        }
        let store = place.open();
        assert_eq!(store.partial_size(&content.task), Some(content.size()));
        let partial = content.begin(&*store);
        assert_eq!(held(&partial), [0, 2, 5]);
        content.assert_held_is_right(&partial);
        assert_eq!(partial.table().values(), content.table.values());
        let blob = content.finish(&partial).unwrap();
        assert!(content.is_in(&blob.file) && blob.is_checked(&ALL));
        drop((partial, blob, store));

        let store = place.open();
        assert!(store.has(&content.task));
        assert_eq!(store.partial_size(&content.task), None);
        let blob = store.committed(&content.task).unwrap();
        assert!(content.is_in(&blob.file));
        assert_eq!(
            (blob.table.values(), blob.size_bytes()),
            (content.table.values(), content.size())
        );
        assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(true));
    }
}

fn pieces_that_the_kept_table_can_not_verify_do_not_count_after_a_restart(place: &dyn Place) {
    let content = Content::sha256(3 * MIB + 77, 1);
    let mut known = PieceTable::new(content.task, content.table.layout());
    content.table.values()[..2]
        .iter()
        .for_each(|value| known.push(*value));
    {
        let partial = content.begin(&*place.open());
        partial.keep_table(&known).unwrap();
        content
            .write(&partial, [0, 1, 2, content.count() - 1])
            .unwrap();
    }
    for _ in 0..2 {
        let partial = content.begin(&*place.open());
        assert_eq!(held(&partial), [0, 1]);
    }
    let store = place.open();
    let partial = content.begin(&*store);
    assert!(content.is_in(&content.finish(&partial).unwrap().file));
}

fn after_a_restart_only_pieces_that_match_count(place: &dyn Place) {
    let content = Content::sha256(3 * MIB, 4);
    {
        let partial = content.begin(&*place.open());
        let mut known = PieceTable::new(content.task, content.table.layout());
        known.extend(0, &content.table.values()[..3], None).unwrap();
        partial.keep_table(&known).unwrap();
        content.write(&partial, [0, 1, 2, 4]).unwrap();
        partial
            .file()
            .write_all_at(b"lost in the crash", content.table.layout().start(1) + 9)
            .unwrap();
    }
    let store = place.open();
    assert_eq!(
        store.recheck(&content.task, 0..1).unwrap(),
        None,
        "nothing counts before it is verified"
    );
    let partial = content.begin(&*store);
    assert_eq!(held(&partial), [0, 2], "1 is rotten, 4 can't be verified");

    // Verified in this run, they count at the next beginning without being hashed.
    partial
        .file()
        .write_all_at(b"rotten since", content.table.layout().start(2))
        .unwrap();
    drop(partial);
    assert_eq!(content.begin(&*store).held().len(), 2);
    assert_eq!(store.recheck(&content.task, 0..1).unwrap(), Some(true));
    assert_eq!(content.begin(&*store).held().len(), 2);
    assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(false));
    assert_eq!(held(&content.begin(&*store)), [0], "doubted, they are");
    assert!(content.is_in(&content.put(&*store).file));
}

fn a_doubted_partial_task_is_hashed_again_unless_it_is_open(place: &dyn Place) {
    let (store, content) = (place.open(), Content::sha256(2 * MIB, 5));
    let partial = content.begin(&*store);
    partial.keep_table(&content.table).unwrap();
    content.write(&partial, [0, 1]).unwrap();
    partial.file().write_all_at(b"rotten", 3).unwrap();
    store.doubt(&content.task);
    assert_eq!(
        store.recheck(&content.task, ALL).unwrap(),
        None,
        "somebody has it open"
    );
    drop(partial);
    assert_eq!(held(&content.begin(&*store)), [0, 1]);
    store.doubt(&content.task);
    assert_eq!(held(&content.begin(&*store)), [1]);
}

fn statements_and_seals_are_kept(place: &dyn Place) {
    let mut content = Content::sha256(3 * MIB, 1);
    let full = content.table.full_count();
    content.table.sign(signed(2, false));
    {
        let partial = content.begin(&*place.open());
        partial.keep_table(&content.table).unwrap();
        partial.keep_table(&content.table).unwrap();
        content.table.sign(signed(full, false));
        partial.keep_table(&content.table).unwrap();
    }
    let store = place.open();
    let partial = content.begin(&*store);
    assert_eq!(partial.table().signed(), Some(&signed(full, false)));
    let blob = content.finish(&partial).unwrap();
    content.table.sign(signed(full, true));
    blob.keep_table(&content.table).unwrap();
    assert!(!blob.table.is_sealed());
    assert!(store.committed(&content.task).unwrap().table.is_sealed());
    drop((partial, blob, store));
    assert!(
        place
            .open()
            .committed(&content.task)
            .unwrap()
            .table
            .is_sealed()
    );

    let store = place.open();
    let other = Content::sha256(3 * MIB, 2);
    let blob = store.committed(&content.task).unwrap();
    assert!(matches!(
        blob.keep_table(&other.table),
        Err(StoreError::Rotten(_))
    ));
}

fn a_blob_without_bytes_is_a_blob(place: &dyn Place) {
    for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
        let content = Content::new(algorithm, 0, 0);
        content.put(&*place.open());
        let store = place.open();
        assert_eq!(store.committed(&content.task).unwrap().size_bytes(), 0);
        assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(true));
        let not_empty = Content::new(algorithm, 5, 0).task;
        let partial = store.begin(&not_empty, 0).unwrap();
        let table = partial.table();
        assert!(matches!(partial.commit(&table), Err(StoreError::Rotten(_))));
    }
}

fn one_download_of_a_task_at_a_time(place: &dyn Place) {
    let store = place.open();
    let content = Content::sha256(MIB, 10);
    let partial = content.begin(&*store);
    let second = partial.clone();
    assert!(matches!(
        store.begin(&content.task, content.size()),
        Err(StoreError::Busy)
    ));
    drop(partial);
    assert!(matches!(
        store.begin(&content.task, content.size()),
        Err(StoreError::Busy)
    ));
    drop(second);
    let partial = content.begin(&*store);
    let blob = content.finish(&partial).unwrap();
    assert!(
        matches!(
            store.begin(&content.task, content.size()),
            Err(StoreError::Busy)
        ),
        "it is committed"
    );
    assert!(partial.commit(&content.table).is_err(), "only once");
    partial.discard().unwrap();
    assert!(
        store.has(&content.task),
        "a committed blob is not thrown away by who made it"
    );
    drop((partial, blob));

    let content = Content::sha256(MIB, 11);
    let winners = std::thread::scope(|scope| {
        let begin = || store.begin(&content.task, content.size()).ok();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(begin)).collect();
        threads
            .into_iter()
            .filter_map(|thread| thread.join().unwrap())
            .count()
    });
    assert!(winners >= 1);
}

fn a_discarded_task_begins_anew(place: &dyn Place) {
    let store = place.open();
    let content = Content::sha256(2 * MIB, 12);
    let old = content.begin(&*store);
    content.write(&old, [0, 1]).unwrap();
    old.discard().unwrap();
    assert_eq!(store.partial_size(&content.task), None);
    let new = content.begin(&*store);
    assert!(new.held().is_empty());
    // Writes that come late do nothing.
    content.write(&old, [2]).unwrap();
    old.write_loose(0, &content.bytes[..100]).unwrap();
    old.keep_table(&content.table).unwrap();
    assert!(old.commit(&content.table).is_err());
    drop(old);
    assert!(matches!(
        store.begin(&content.task, content.size()),
        Err(StoreError::Busy)
    ));
    assert!(content.is_in(&content.finish(&new).unwrap().file));
}

fn nothing_incomplete_or_contradictory_is_committed(place: &dyn Place) {
    let store = place.open();
    let content = Content::sha256(5 * MIB / 4, 13);
    let partial = content.begin(&*store);
    content.write(&partial, [0, 1, 2, 3]).unwrap();
    assert!(
        partial.commit(&content.table).is_err(),
        "a piece is missing"
    );
    assert!(
        partial.write(4, &content.piece(4)[1..]).is_err(),
        "a piece of another length"
    );
    assert!(partial.write(5, b"").is_err(), "no such piece");
    content.write(&partial, [4]).unwrap();
    let empty = PieceTable::new(content.task, content.table.layout());
    assert!(partial.commit(&empty).is_err(), "values are missing");
    partial.keep_table(&content.table).unwrap();
    let mut other = empty;
    other
        .extend(0, Content::sha256(5 * MIB / 4, 14).table.values(), None)
        .unwrap();
    assert!(matches!(partial.commit(&other), Err(StoreError::Rotten(_))));
    assert!(matches!(
        partial.keep_table(&other),
        Err(StoreError::Rotten(_))
    ));
    assert!(
        store.begin(&Content::sha256(1, 0).task, 1).is_ok(),
        "that was not the disk's fault"
    );
    assert!(partial.commit(&content.table).is_ok());
}

fn another_size_begins_anew_and_an_absurd_one_is_refused(place: &dyn Place) {
    let store = place.open();
    let content = Content::sha256(MIB, 15);
    drop(store.begin(&content.task, 77).unwrap());
    assert_eq!(store.partial_size(&content.task), Some(77));
    assert!(content.is_in(&content.put(&*store).file));
    let task = Content::sha256(1, 0).task;
    assert!(matches!(
        store.begin(&task, u64::MAX),
        Err(StoreError::Disk { .. })
    ));
    assert_eq!(store.partial_size(&task), None);
    assert!(
        store.begin(&task, 1).is_ok(),
        "that was not the disk's fault"
    );
}

fn loose_bytes_spare_verified_pieces_and_count_for_nothing(place: &dyn Place) {
    let content = Content::sha256(MIB, 16);
    {
        let partial = content.begin(&*place.open());
        content.write(&partial, [1]).unwrap();
        partial.write_loose(0, &vec![7; 600 * KIB]).unwrap();
        assert!(
            partial.write_loose(content.size() - 1, &[1, 2]).is_err(),
            "past the end"
        );
        assert!(partial.write_loose(u64::MAX, &[1]).is_err());
        let mut came = vec![0; 600 * KIB];
        partial.file().read_exact_at(&mut came, 0).unwrap();
        let piece = content.table.layout().range(1);
        assert!(came[piece.start as usize..piece.end as usize] == *content.piece(1));
        assert!(
            came[..piece.start as usize]
                .iter()
                .chain(&came[piece.end as usize..])
                .all(|byte| *byte == 7)
        );
        // Bytes that turn out to be right need no second write.
        partial.write_loose(0, content.piece(0)).unwrap();
        partial.note(0).unwrap();
        partial.keep_table(&content.table).unwrap();
    }
    let store = place.open();
    let partial = content.begin(&*store);
    assert_eq!(held(&partial), [0, 1]);
    assert!(content.is_in(&content.finish(&partial).unwrap().file));
}

fn rechecking_finds_a_flipped_byte_and_lets_the_blob_go(place: &dyn Place) {
    let store = place.open();
    let content = Content::sha256(5 * MIB, 9);
    let blob = content.put(&*store);
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
    assert_eq!(
        store.recheck(&content.task, ALL).unwrap(),
        None,
        "it is not there"
    );
    // The old lease does not hinder the blob's return.
    let again = content.put(&*store);
    drop(blob);
    assert!(content.is_in(&again.file));
    assert_eq!(store.recheck(&content.task, ALL).unwrap(), Some(true));
}

fn a_blob_of_another_length_is_not_served(place: &dyn Place) {
    let content = Content::sha256(MIB, 7);
    for restarts in [false, true] {
        let mut store = place.open();
        content.put(&*store).file.set_len(5).unwrap();
        if restarts {
            drop(store);
            store = place.open();
        }
        assert!(store.committed(&content.task).is_none());
        assert!(!store.has(&content.task));
        assert!(
            content.is_in(&content.put(&*store).file),
            "it can be had again"
        );
        store.recheck(&content.task, ALL).unwrap();
        drop(store);
        // The next turn begins without it.
        let store = place.open();
        store
            .committed(&content.task)
            .unwrap()
            .drop_rotten("the test begins again")
            .unwrap();
    }
}

#[tokio::main(flavor = "current_thread")]
async fn pieces_of_an_earlier_run_count_once_they_were_hashed(place: &dyn Place) {
    let content = Content::sha256(5 * MIB, 9);
    assert!(
        content.put(&*place.open()).is_checked(&ALL),
        "this run wrote it"
    );
    let store = place.open();
    let blob = store.committed(&content.task).unwrap();
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
}

#[tokio::main(flavor = "current_thread")]
async fn a_wrong_piece_of_an_earlier_run_is_dropped_once(place: &dyn Place) {
    let content = Content::sha256(5 * MIB, 9);
    let at = 4 * MIB as u64;
    content
        .put(&*place.open())
        .file
        .write_all_at(&[content.bytes[4 * MIB] ^ 1], at)
        .unwrap();
    let store = place.open();
    let blob = store.committed(&content.task).unwrap();
    let wrong = content.table.layout().containing(at);
    assert!(blob.check(0).await, "this piece is right");
    let (one, other) = tokio::join!(blob.check(wrong), blob.check(wrong));
    assert!(!one && !other && !store.has(&content.task));
    assert!(
        !blob.is_checked(&(0..1)),
        "nothing of it is believed any more"
    );

    let again = content.put(&*store);
    assert!(!blob.is_same(&again) && again.is_same(&store.committed(&content.task).unwrap()));
    blob.drop_rotten("late news of the copy before").unwrap();
    assert!(store.has(&content.task) && again.is_checked(&ALL));
}

fn origins_are_noted_beside_content_that_is_here(place: &dyn Place) {
    let content = Content::sha256(KIB, 17);
    let store = place.open();
    store.add_origin(&content.task, "early.test").unwrap();
    assert!(
        store.origins(&content.task).is_empty(),
        "the content is not here yet"
    );
    let blob = content.put(&*store);
    for name in ["a.test", "b.test", "a.test"] {
        store.add_origin(&content.task, name).unwrap();
    }
    drop((blob, store));
    let store = place.open();
    assert_eq!(store.origins(&content.task), ["a.test", "b.test"]);
    store
        .committed(&content.task)
        .unwrap()
        .drop_rotten("a test")
        .unwrap();
    assert!(store.origins(&content.task).is_empty());
}

fn writes_that_were_refused_do_not_count<P: Place>(place: &Faulty<P>) {
    let (content, other) = (Content::sha256(2 * MIB, 18), Content::sha256(MIB, 19));
    let store = place.open();
    let partial = content.begin(&*store);
    partial.keep_table(&content.table).unwrap();
    content.write(&partial, [0]).unwrap();
    place.faults.leave_room(content.piece(1).len() as u64);
    content.write(&partial, [1]).unwrap();
    let refused = content.write(&partial, [2]).unwrap_err();
    assert!(
        refused.is_for_want_of_room() && !store.takes_writes(),
        "{refused}"
    );
    place.faults.refuse(ErrorKind::ReadOnlyFilesystem);
    assert!(partial.write_loose(0, &[1]).is_err() && partial.note(3).is_err());
    assert!(partial.keep_table(&content.table).is_err() && partial.commit(&content.table).is_err());
    assert!(store.begin(&other.task, other.size()).is_err());
    place.faults.mend();
    assert!(store.takes_writes());
    drop((partial, store));
    let store = place.open();
    let partial = content.begin(&*store);
    assert_eq!(held(&partial), [0, 1]);
    assert!(content.is_in(&content.finish(&partial).unwrap().file));
}

fn a_task_that_can_not_be_made_durable_is_thrown_away<P: Place>(place: &Faulty<P>) {
    let content = Content::sha256(MIB, 19);
    let store = place.open();
    let partial = content.begin(&*store);
    place.faults.fail_commits();
    assert!(content.finish(&partial).is_err());
    place.faults.mend();
    assert!(content.is_in(&partial.file()), "present readers go on");
    assert!(!store.has(&content.task));
    assert!(content.begin(&*store).held().is_empty());
}

/// Runs each behaviour on one implementation.
macro_rules! suite {
    ($name:ident, $place:expr, $($behaviour:ident)*) => {
        mod $name {
            use super::*;

            $(#[test]
            fn $behaviour() {
                super::$behaviour(&$place);
            })*
        }
    };
}

macro_rules! of_all_stores {
    ($name:ident, $place:expr) => {
        suite!($name, $place,
            a_partial_task_goes_on_after_a_restart
            pieces_that_the_kept_table_can_not_verify_do_not_count_after_a_restart
            after_a_restart_only_pieces_that_match_count
            a_doubted_partial_task_is_hashed_again_unless_it_is_open
            statements_and_seals_are_kept
            a_blob_without_bytes_is_a_blob
            one_download_of_a_task_at_a_time
            a_discarded_task_begins_anew
            nothing_incomplete_or_contradictory_is_committed
            another_size_begins_anew_and_an_absurd_one_is_refused
            loose_bytes_spare_verified_pieces_and_count_for_nothing
            rechecking_finds_a_flipped_byte_and_lets_the_blob_go
            a_blob_of_another_length_is_not_served
            pieces_of_an_earlier_run_count_once_they_were_hashed
            a_wrong_piece_of_an_earlier_run_is_dropped_once
            origins_are_noted_beside_content_that_is_here
        );
    };
}

of_all_stores!(on_disk, Folder::new());
of_all_stores!(in_memory, Memory::new());
of_all_stores!(that_may_fail, Faulty::over(Memory::new()));
suite!(failing_in_memory, Faulty::over(Memory::new()),
    writes_that_were_refused_do_not_count
    a_task_that_can_not_be_made_durable_is_thrown_away
);
suite!(failing_on_disk, Faulty::over(Folder::new()),
    writes_that_were_refused_do_not_count
    a_task_that_can_not_be_made_durable_is_thrown_away
);
