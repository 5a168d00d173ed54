//! The origin reader over a source in memory and a store in a temporary folder.

use std::os::unix::fs::FileExt;
use std::path::Path;

use hawker_core::piece::PieceSet;
use hawker_oci::digest::Algorithm;
use tempfile::TempDir;

use super::*;
use crate::buffer::BLOCK_BYTES as POOL_BLOCK_BYTES;
use crate::settings::CacheSettings;
use crate::source::memory::{Behaviour, MemorySource};
use crate::store::{Store, TaskStore};

const MIB: u64 = 1 << 20;

/// One task, and a stand-in for the driver that keeps what the reader brings.
struct World {
    blob: Vec<u8>,
    task: Digest,
    source: MemorySource,
    reader: OriginReader,
    events: mpsc::Receiver<Event>,
    shared: Arc<Shared>,
    partial: Partial,
    layout: PieceLayout,
    generation: u64,
    /// Pieces that came, in the order in which they came.
    pieces: Vec<PieceIndex>,
    /// Over these.
    hashed: Chain,
    _window: watch::Sender<PieceIndex>,
    resumes: watch::Sender<tokio::time::Instant>,
    _dir: TempDir,
}

/// The event that ends a read, as the stand-in heard it.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Whole,
    Failed(Failure),
}

fn content(size: u64) -> Vec<u8> {
    let mut state = 1_u64;
    (0..size)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect()
}

fn open_store(dir: &Path) -> Store {
    Store::open(dir, CacheSettings::default()).expect("a fresh folder")
}

impl World {
    fn new(size: u64, behaviour: Behaviour) -> Self {
        Self::of_known_size(size, behaviour, true)
    }

    fn of_known_size(size: u64, behaviour: Behaviour, is_known: bool) -> Self {
        let blob = content(size);
        let task = Digest::of(Algorithm::Sha256, &blob);
        let layout = PieceLayout::new(size);
        let dir = tempfile::tempdir().expect("a folder for the test");
        let store = open_store(dir.path());
        let partial = store.begin(&task, size).expect("room for the blob");
        let shared = Arc::new(Shared::new(task));
        shared.update(|state| {
            state.layout = Some(layout);
            state.shown = Some(PieceSet::empty(layout.count()));
            state.written = Some(PieceSet::empty(layout.count()));
            state.file = Some(partial.file());
        });
        let source = MemorySource::new(blob.clone(), behaviour);
        let (events_in, events) = mpsc::channel(64);
        let (window, resumes) = (
            watch::Sender::new(PieceIndex::MAX),
            watch::Sender::new(tokio::time::Instant::now()),
        );
        let reader = OriginReader::start(Setup {
            task,
            source: Arc::new(source.clone()),
            layout: is_known.then_some(layout),
            pool: BufferPool::new(256 * POOL_BLOCK_BYTES as u64),
            shared: Arc::clone(&shared),
            slots: Slots::default(),
            window: window.subscribe(),
            resumes: resumes.subscribe(),
            events: events_in,
        });
        let file = is_known.then(|| LooseFile(partial.clone()));
        reader.wish(|wishes| {
            wishes.file = file;
            wishes.layout = is_known.then_some(layout);
        });
        Self {
            blob,
            task,
            source,
            reader,
            events,
            shared,
            partial,
            layout,
            generation: 0,
            pieces: Vec::new(),
            hashed: Chain::new(task.algorithm()),
            _window: window,
            resumes,
            _dir: dir,
        }
    }

    /// Wants the rest of the blob from its first missing piece on.
    fn want_rest(&mut self) {
        self.generation += 1;
        let from = self.pieces.len() as PieceIndex;
        let mut chain = Chain::new(self.task.algorithm());
        chain.update(&self.blob[..self.layout.start(from) as usize]);
        let rest = Rest {
            generation: self.generation,
            from,
            chain,
        };
        self.reader.wish(|wishes| wishes.rest = Some(rest));
    }

    fn want_ranges(&self, ranges: &[Range<u64>]) {
        self.reader.wish(|wishes| wishes.readers = ranges.to_vec());
    }

    /// Keeps what comes until the in-order read ends.
    async fn until_end(&mut self) -> End {
        loop {
            match self.events.recv().await.expect("the reader goes on") {
                Event::OriginPiece {
                    generation,
                    piece,
                    buffer,
                    chain,
                    is_on_disk,
                    ..
                } => {
                    assert_eq!(
                        (generation, piece as usize),
                        (self.generation, self.pieces.len())
                    );
                    self.keep(piece, buffer, chain, is_on_disk);
                }
                Event::OriginOver { generation, .. } => {
                    assert_eq!(generation, self.generation);
                    return End::Whole;
                }
                Event::OriginFailed { failure, .. } => return End::Failed(failure),
                Event::OriginSized { size_bytes, .. } => {
                    assert_eq!(size_bytes, self.blob.len() as u64);
                    let file = LooseFile(self.partial.clone());
                    self.reader.wish(|wishes| wishes.file = Some(file));
                }
                Event::OriginWholeOnly { .. } => self.want_rest(),
                Event::DiskRefused { error, .. } => panic!("{error}"),
                _ => panic!("no other event comes from an origin"),
            }
        }
    }

    fn keep(&mut self, piece: PieceIndex, buffer: PieceBuffer, chain: Chain, is_on_disk: bool) {
        let range = self.layout.range(piece);
        let expected = &self.blob[range.start as usize..range.end as usize];
        assert!(buffer.filled() == expected, "piece {piece} is another");
        self.hashed.update(expected);
        assert_eq!(chain.value(), self.hashed.value(), "piece {piece}");
        match is_on_disk {
            true => self.partial.note(piece).expect("the index takes it"),
            false => self
                .partial
                .write(piece, buffer.filled())
                .expect("the disk takes it"),
        }
        self.shared
            .update(|state| state.written.as_mut().map(|written| written.insert(piece)));
        self.pieces.push(piece);
    }

    /// Waits until these bytes are shown to readers, and compares them.
    async fn until_shown(&self, range: Range<u64>) {
        let shown = async {
            loop {
                if self.shared.lock().loose.end_of("memory", range.start) >= range.end {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), shown)
            .await
            .expect("the range comes");
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.partial
            .file()
            .read_exact_at(&mut bytes, range.start)
            .expect("the file has it");
        assert!(
            bytes == self.blob[range.start as usize..range.end as usize],
            "{range:?} is another"
        );
    }

    fn copies(&self) -> f64 {
        self.source.sent_bytes() as f64 / self.blob.len() as f64
    }
}

#[tokio::test]
async fn a_cold_blob_comes_in_order_and_once() {
    for size in [1, 1000, 3 * MIB, 20 * MIB + 17] {
        let mut world = World::new(size, Behaviour::default());
        world.want_rest();
        assert_eq!(world.until_end().await, End::Whole, "{size}");
        assert_eq!(
            (world.pieces.len(), world.source.sent_bytes()),
            (world.layout.count() as usize, size)
        );
    }
}

#[tokio::test]
async fn a_slow_connection_is_multiplied() {
    let mut world = World::new(
        48 * MIB,
        Behaviour {
            rate_bytes: Some(10 * MIB),
            ..Behaviour::default()
        },
    );
    let began = Instant::now();
    world.want_rest();
    assert_eq!(world.until_end().await, End::Whole);
    assert!(
        world.source.most_connections() >= 4,
        "{} connections",
        world.source.most_connections()
    );
    // Each connection that is taken from a longer one costs what is on its way then.
    assert!(world.copies() < 1.02, "{} copies", world.copies());
    assert!(
        began.elapsed() < Duration::from_millis(4800 / 2),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test]
async fn a_rate_holds_back_all_connections_that_no_reader_needs() {
    let behaviour = Behaviour {
        rate_bytes: Some(10 * MIB),
        ..Behaviour::default()
    };
    let mut world = World::new(256 * MIB, behaviour);
    world.want_rest();
    let time = Duration::from_secs(2);
    assert!(tokio::time::timeout(time, world.until_end()).await.is_err());
    assert!(world.source.most_connections() >= 4);
    // The rate is 1 MiB a second: after each piece of 1 MiB the driver says how long to wait.
    let resumes = world.resumes.clone();
    let pieces_before = world.pieces.len();
    let rate = tokio::spawn(async move {
        for _ in 0..30 {
            resumes.send_replace(tokio::time::Instant::now() + Duration::from_millis(90));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let sent_before = world.source.sent_bytes();
    let time = Duration::from_secs(3);
    assert!(tokio::time::timeout(time, world.until_end()).await.is_err());
    rate.await.unwrap();
    let sent = world.source.sent_bytes() - sent_before;
    // One connection reads for a tenth of the time: 3 MiB. The others read a chunk each when the rate begins.
    assert!(sent < 5 * MIB, "{sent} bytes came");
    assert!(world.pieces.len() > pieces_before, "the prefix goes on");
}

#[tokio::test]
async fn ranges_are_read_alone_and_once_for_all_readers() {
    let mut world = World::new(40 * MIB, Behaviour::default());
    let ranges = [
        5 * MIB..5 * MIB + 1000,
        5 * MIB + 500..5 * MIB + 2000,
        30 * MIB..31 * MIB,
    ];
    world.want_ranges(&ranges);
    for range in &ranges {
        world.until_shown(range.clone()).await;
    }
    assert_eq!(world.source.sent_bytes(), 2000 + MIB);
    // The in-order read goes through what is there without another request for it.
    world.want_ranges(&[]);
    world.want_rest();
    assert_eq!(world.until_end().await, End::Whole);
    assert_eq!(world.copies(), 1.0);
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_gone_on_with() {
    let behaviour = Behaviour {
        breaks_after_bytes: Some(3 * MIB),
        ..Behaviour::default()
    };
    let mut world = World::new(20 * MIB, behaviour);
    world.want_rest();
    assert_eq!(world.until_end().await, End::Whole);
    assert_eq!(world.copies(), 1.0);
}

#[tokio::test]
async fn a_gateway_that_cuts_every_answer_is_asked_for_part_after_part() {
    for short_parts in [None, Some(MIB / 4)] {
        let behaviour = Behaviour {
            breaks_after_bytes: Some(MIB / 4),
            part_bytes: short_parts,
            ..Behaviour::default()
        };
        let mut world = World::new(6 * MIB, behaviour);
        world.want_rest();
        assert_eq!(world.until_end().await, End::Whole, "{short_parts:?}");
        assert!(world.copies() < 1.2, "{}", world.copies());
    }
}

#[tokio::test]
async fn a_gateway_that_answers_ranges_with_its_own_errors_is_asked_for_the_whole_at_last() {
    for status in [502, 503] {
        let behaviour = Behaviour {
            breaks_after_bytes: Some(3 * MIB),
            breaks_once: true,
            refuses_ranges: Some(status),
            ..Behaviour::default()
        };
        let mut world = World::new(6 * MIB, behaviour);
        world.want_rest();
        assert_eq!(world.until_end().await, End::Whole, "{status}");
        assert!(
            world.source.asked().len() <= 6,
            "{status}: {:?}",
            world.source.asked()
        );
    }
}

#[tokio::test]
async fn an_origin_that_gives_nothing_fails_in_bounded_tries() {
    let behaviour = Behaviour {
        breaks_after_bytes: Some(0),
        ..Behaviour::default()
    };
    let mut world = World::new(20 * MIB, behaviour);
    world.want_rest();
    assert_eq!(world.until_end().await, End::Failed(Failure::Unreachable));
    assert!(
        world.source.asked().len() <= 4,
        "{:?}",
        world.source.asked()
    );
}

#[tokio::test]
async fn an_origin_without_ranges_sends_one_copy_for_all_readers() {
    let behaviour = Behaviour {
        honours_ranges: false,
        ..Behaviour::default()
    };
    let mut world = World::new(40 * MIB, behaviour);
    world.want_ranges(&[30 * MIB..31 * MIB, 10 * MIB..11 * MIB]);
    assert_eq!(world.until_end().await, End::Whole);
    assert_eq!((world.copies(), world.source.asked().len()), (1.0, 1));
}

#[tokio::test]
async fn the_first_answer_tells_an_unknown_size() {
    let mut world = World::of_known_size(20 * MIB, Behaviour::default(), false);
    world.want_rest();
    assert_eq!(world.until_end().await, End::Whole);
    assert_eq!((world.copies(), world.source.asked()), (1.0, vec![None]));
    let behaviour = Behaviour {
        tells_size: false,
        ..Behaviour::default()
    };
    let mut world = World::of_known_size(MIB, behaviour, false);
    world.want_rest();
    assert_eq!(world.until_end().await, End::Failed(Failure::UnknownLength));
}

#[tokio::test]
async fn a_read_that_is_stopped_goes_on_from_what_it_had() {
    let mut world = World::new(
        20 * MIB,
        Behaviour {
            rate_bytes: Some(10 * MIB),
            ..Behaviour::default()
        },
    );
    world.want_rest();
    tokio::time::sleep(Duration::from_millis(900)).await;
    world.reader.wish(|wishes| wishes.rest = None);
    tokio::time::sleep(Duration::from_millis(100)).await;
    while let Ok(event) = world.events.try_recv() {
        let Event::OriginPiece {
            piece,
            buffer,
            chain,
            is_on_disk,
            ..
        } = event
        else {
            panic!("a piece")
        };
        world.keep(piece, buffer, chain, is_on_disk);
    }
    world.want_rest();
    assert_eq!(world.until_end().await, End::Whole);
    // Chunks that were on their way are asked for again.
    assert!(world.copies() < 1.1, "{} copies", world.copies());
}
