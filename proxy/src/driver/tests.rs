//! Whole downloads through driver and reader, with sources, stores and peers in memory: without root and without sockets.

use std::os::unix::fs::FileExt;

use hawker_oci::digest::Algorithm;
use tokio::task::JoinHandle;

use super::*;
use crate::daemon::forward;
use crate::download::Segment;
use crate::flight::{Flight, Flights, Reader};
use crate::origin;
use crate::peer::memory::MemoryNetwork;
use crate::source::memory::{Behaviour, MemorySource};
use crate::store::suite::{Folder, Memory, Place};

mod cluster;
mod disk;
mod readers;

const MIB: u64 = 1 << 20;

/// A blob.
struct Content {
    bytes: Vec<u8>,
    task: Digest,
}

impl Content {
    fn new(size: u64) -> Self {
        let mut bytes = vec![0; size as usize];
        for (at, eight) in bytes.chunks_mut(8).enumerate() {
            let mixed = (at as u64 + 1)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
                .to_le_bytes();
            eight.copy_from_slice(&mixed[..eight.len()]);
        }
        let task = Digest::of(Algorithm::Sha256, &bytes);
        Self { bytes, task }
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Takes at least `len` bytes from a reader, and compares them with the blob from `at` on. The answer is the reader's position.
    async fn take(&self, reader: &mut Reader, at: u64, len: u64) -> Result<u64, FlightError> {
        let mut came = Vec::new();
        while (came.len() as u64) < len {
            match reader.next().await? {
                Some(Segment::Memory(bytes) | Segment::Passed(bytes)) => {
                    came.extend_from_slice(&bytes)
                }
                Some(Segment::File { file, range }) => {
                    let mut bytes = vec![0; (range.end - range.start) as usize];
                    file.read_exact_at(&mut bytes, range.start)
                        .expect("the file is there");
                    came.extend_from_slice(&bytes);
                }
                None => panic!("{} of {len} bytes came", came.len()),
            }
        }
        let end = at + came.len() as u64;
        assert!(
            came[..] == self.bytes[at as usize..end as usize],
            "other bytes from {at} on"
        );
        Ok(end)
    }

    /// Takes all that a reader gives from `at` to the end of the blob.
    async fn take_rest(&self, reader: &mut Reader, at: u64) -> Result<(), FlightError> {
        self.take(reader, at, self.size() - at).await.map(drop)
    }
}

/// How to run a daemon.
struct Setup {
    source: MemorySource,
    store: Arc<dyn TaskStore>,
    /// The daemon's place in a cluster.
    membership: Option<(Identity, Role, MemoryNetwork)>,
    /// The registry that clients name.
    registry: String,
    live: Arc<ArcSwap<LiveSettings>>,
}

impl Setup {
    fn new(source: &MemorySource, store: Arc<dyn TaskStore>) -> Self {
        let (registry, live) = ("memory".to_owned(), Arc::default());
        Self {
            source: source.clone(),
            store,
            membership: None,
            registry,
            live,
        }
    }
}

/// A node whose driver runs.
struct Daemon {
    registry: String,
    members: Arc<Members>,
    proofs: Arc<Proofs>,
    flights: Flights,
    store: Arc<dyn TaskStore>,
    metrics: Arc<Metrics>,
    events: mpsc::Sender<Event>,
    stop: CancellationToken,
    driving: JoinHandle<()>,
}

impl Daemon {
    fn start(setup: Setup) -> Self {
        let Setup {
            source,
            store,
            membership,
            registry,
            live,
        } = setup;
        let (metrics, members) = (Arc::new(Metrics::new()), Arc::<Members>::default());
        let origin = origin::testing::origin(&live);
        let proofs = Proofs::new(Arc::clone(&store), origin.clone());
        let (events, heard) = mpsc::channel(EVENTS);
        let peers = membership.as_ref().map(|(identity, role, network)| {
            let address = address_of(identity.peer_id());
            let peers = network.join(
                identity.peer_id(),
                *role,
                &address,
                forward(&events, Event::Peer),
            );
            Arc::new(peers) as Arc<dyn Peers>
        });
        let driver = Driver::new(DriverConfig {
            seed: membership
                .as_ref()
                .is_some_and(|(_, role, _)| *role == Role::Seed),
            identity: membership.map(|(identity, ..)| identity),
            memory_bytes: 64 << 20,
            lends_tokens: false,
            desk: Desk::new(Arc::clone(&live), Arc::clone(&metrics)),
            live,
            store: Arc::clone(&store),
            proofs: Arc::clone(&proofs),
            sources: Arc::new(move |_, _| Arc::new(source.clone())),
            origin: origin.clone(),
            peers,
            tracker: None,
            metrics: Arc::clone(&metrics),
            members: Arc::clone(&members),
            events: events.clone(),
        });
        let stop = CancellationToken::new();
        let driving = tokio::spawn(driver.run(heard, stop.clone()));
        let flights = Flights::new(events.clone(), origin);
        Self {
            registry,
            members,
            proofs,
            flights,
            store,
            metrics,
            events,
            stop,
            driving,
        }
    }

    /// A client's reader of these bytes. `partial`: of a range with an end of its own.
    async fn reader(
        &self,
        task: Digest,
        range: Range<u64>,
        partial: bool,
        size_hint: Option<u64>,
    ) -> Result<Reader, FlightError> {
        let flight = self.open(&self.registry, task, partial, size_hint).await?;
        Ok(flight.read(std::iter::once(range).collect()))
    }

    /// Joins a download, as a client of this registry.
    async fn open(
        &self,
        registry: &str,
        task: Digest,
        partial: bool,
        size_hint: Option<u64>,
    ) -> Result<Flight, FlightError> {
        let source = Source {
            registry: registry.to_owned(),
            repository: "a/b".to_owned(),
        };
        let (grant, purpose) = (Grant::own(source), Purpose::default());
        self.flights
            .open(task, grant, purpose, size_hint, partial)
            .await
    }

    async fn read(&self, content: &Content, range: Range<u64>) -> Result<(), FlightError> {
        let mut reader = self
            .reader(content.task, range.clone(), true, Some(content.size()))
            .await?;
        content
            .take(&mut reader, range.start, range.end - range.start)
            .await
            .map(drop)
    }

    async fn read_whole(&self, content: &Content) -> Result<(), FlightError> {
        let size = content.size();
        let mut reader = self
            .reader(content.task, 0..size, false, Some(size))
            .await?;
        content.take_rest(&mut reader, 0).await
    }

    async fn until_committed(&self, task: &Digest) {
        until("it is committed", || self.store.has(task)).await;
    }

    /// The downloads, as people see them.
    async fn running(&self) -> Vec<Running> {
        let (reply, answer) = oneshot::channel();
        let _ = self.events.send(Event::List(reply)).await;
        answer.await.expect("the driver runs")
    }

    async fn stop(self) {
        self.stop.cancel();
        self.driving.await.expect("the driver ends in order");
    }
}

fn address_of(peer: PeerId) -> String {
    format!("{peer}.memory")
}

/// Waits until something is so.
async fn until(what: &str, is_so: impl Fn() -> bool) {
    let so = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), so)
        .await
        .expect(what);
}

/// One node, its source and its store.
struct World {
    content: Content,
    source: MemorySource,
    daemon: Daemon,
    place: Box<dyn Place>,
}

impl World {
    fn new(size: u64, behaviour: Behaviour) -> Arc<Self> {
        Self::on(Box::new(Memory::new()), size, behaviour)
    }

    fn on(place: Box<dyn Place>, size: u64, behaviour: Behaviour) -> Arc<Self> {
        let content = Content::new(size);
        let source = MemorySource::new(content.bytes.clone(), behaviour);
        let setup = Setup::new(&source, place.open());
        Arc::new(Self {
            content,
            source,
            daemon: Daemon::start(setup),
            place,
        })
    }

    fn size(&self) -> u64 {
        self.content.size()
    }

    fn copies(&self) -> f64 {
        self.source.sent_bytes() as f64 / self.size() as f64
    }

    async fn reader(&self, range: Range<u64>, partial: bool) -> Result<Reader, FlightError> {
        self.reader_of(range, partial, Some(self.size())).await
    }

    async fn reader_of(
        &self,
        range: Range<u64>,
        partial: bool,
        size_hint: Option<u64>,
    ) -> Result<Reader, FlightError> {
        self.daemon
            .reader(self.content.task, range, partial, size_hint)
            .await
    }

    async fn take(&self, reader: &mut Reader, at: u64, len: u64) -> Result<u64, FlightError> {
        self.content.take(reader, at, len).await
    }

    async fn take_rest(&self, reader: &mut Reader, at: u64) -> Result<(), FlightError> {
        self.content.take_rest(reader, at).await
    }

    async fn read(&self, range: Range<u64>) -> Result<(), FlightError> {
        self.daemon.read(&self.content, range).await
    }

    async fn read_whole(&self) -> Result<(), FlightError> {
        self.daemon.read_whole(&self.content).await
    }

    /// Reads from each of these positions at once, `len` bytes each.
    async fn read_at_once(self: &Arc<Self>, ranges: &[Range<u64>], len: u64, partial: bool) {
        let mut reads = tokio::task::JoinSet::new();
        for range in ranges.iter().cloned() {
            let world = Arc::clone(self);
            reads.spawn(async move {
                let mut reader = world.reader(range.clone(), partial).await?;
                world.take(&mut reader, range.start, len).await.map(drop)
            });
        }
        let done: Vec<Result<(), FlightError>> = reads.join_all().await;
        assert!(done.iter().all(Result::is_ok), "{done:?}");
    }

    /// The same node after a restart of its daemon.
    async fn restarted(self: Arc<Self>) -> Arc<Self> {
        let Self {
            content,
            source,
            daemon,
            place,
        } = Arc::into_inner(self).expect("nobody reads");
        daemon.stop().await;
        let setup = Setup::new(&source, place.open());
        Arc::new(Self {
            content,
            source,
            daemon: Daemon::start(setup),
            place,
        })
    }

    async fn until_committed(&self) {
        self.daemon.until_committed(&self.content.task).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cold_blob_is_read_once_and_committed() {
    for size in [1, 100_000, 12 * MIB + 5, 40 * MIB] {
        let world = World::new(size, Behaviour::default());
        world.read_whole().await.expect("the blob comes");
        world.until_committed().await;
        assert_eq!(world.copies(), 1.0, "{size}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn range_readers_share_requests_and_do_not_bring_the_rest() {
    let world = World::new(24 * MIB, Behaviour::default());
    let ranges: Vec<Range<u64>> = (0..16)
        .map(|n| n * MIB + 7..n * MIB + 7 + (128 << 10))
        .collect();
    world
        .read_at_once(&[&ranges[..], &ranges[..]].concat(), 128 << 10, true)
        .await;
    let wanted = 16 * (128 << 10) as u64;
    assert!(
        world.source.sent_bytes() <= wanted * 13 / 10,
        "{} of {wanted}",
        world.source.sent_bytes()
    );
    // The bytes of the last piece are no reason to bring the whole.
    world
        .read(world.size() - 5000..world.size())
        .await
        .expect("the end comes");
    assert!(
        world.source.sent_bytes() < 3 * MIB,
        "{}",
        world.source.sent_bytes()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_ended_ranges_that_are_closed_after_one_buffer_cost_one_copy() {
    for (buffer, at_once) in [(MIB, 8), (2 * MIB, 3)] {
        let world = World::new(
            32 * MIB,
            Behaviour {
                rate_bytes: Some(100 * MIB),
                ..Behaviour::default()
            },
        );
        let starts: Vec<u64> = (0..world.size()).step_by(buffer as usize).collect();
        for starts in starts.chunks(at_once) {
            let ranges: Vec<Range<u64>> = starts.iter().map(|start| *start..world.size()).collect();
            world.read_at_once(&ranges, buffer, false).await;
        }
        world.until_committed().await;
        assert!(world.copies() <= 1.02, "{} copies", world.copies());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_a_slow_reader_nor_one_that_leaves_costs_another_copy() {
    let world = World::new(24 * MIB, Behaviour::default());
    let mut slow = world
        .reader(0..world.size(), false)
        .await
        .expect("it is opened");
    world
        .take(&mut slow, 0, 1)
        .await
        .expect("the first bytes come");
    let mut leaves = world
        .reader(4 * MIB..20 * MIB, true)
        .await
        .expect("it is opened");
    world
        .take(&mut leaves, 4 * MIB, 1)
        .await
        .expect("the range comes");
    drop(leaves);
    world.read_whole().await.expect("the blob comes");
    let mut rest = world
        .reader(0..world.size(), false)
        .await
        .expect("it is opened");
    world
        .take(&mut rest, 0, world.size())
        .await
        .expect("the slow reader holds nobody up");
    assert!(world.copies() <= 1.1, "{} copies", world.copies());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_without_ranges_gives_one_copy_for_all() {
    let world = World::new(
        24 * MIB,
        Behaviour {
            honours_ranges: false,
            ..Behaviour::default()
        },
    );
    world
        .read_at_once(&[20 * MIB..21 * MIB, 3 * MIB..4 * MIB], MIB, true)
        .await;
    world.read_whole().await.expect("the blob comes");
    assert_eq!((world.copies(), world.source.asked().len()), (1.0, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_a_source_are_overcome() {
    for behaviour in [
        Behaviour {
            breaks_after_bytes: Some(5 * MIB),
            ..Behaviour::default()
        },
        Behaviour {
            part_bytes: Some(3 * MIB),
            ..Behaviour::default()
        },
        Behaviour {
            part_bytes: Some(100_000),
            ..Behaviour::default()
        },
        Behaviour {
            throttles_above: Some(1),
            rate_bytes: Some(60 * MIB),
            ..Behaviour::default()
        },
    ] {
        let world = World::new(24 * MIB, behaviour);
        world
            .read_whole()
            .await
            .unwrap_or_else(|error| panic!("{behaviour:?}: {error}"));
        assert!(
            world.copies() < 1.1 || behaviour.part_bytes == Some(100_000),
            "{} copies",
            world.copies()
        );
        assert!(
            world.copies() < 2.1 && world.source.asked().len() < 30,
            "{:?}",
            world.source.asked()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_source_says_reaches_clients() {
    let refuses = World::new(
        MIB,
        Behaviour {
            refuses: Some(404),
            ..Behaviour::default()
        },
    );
    assert!(matches!(
        refuses.read_whole().await,
        Err(FlightError::Origin(404))
    ));
    assert!(matches!(
        refuses.read(5..10).await,
        Err(FlightError::Origin(404))
    ));
    let lies = World::new(
        MIB,
        Behaviour {
            lies_about_size: Some(MIB + 1),
            ..Behaviour::default()
        },
    );
    assert!(matches!(
        lies.read_whole().await,
        Err(FlightError::WrongSize(_))
    ));
    let silent = World::new(
        MIB,
        Behaviour {
            tells_size: false,
            ..Behaviour::default()
        },
    );
    let unsized_reader = silent.reader_of(0..MIB, false, None).await;
    assert!(matches!(
        unsized_reader.err(),
        Some(FlightError::UnknownLength)
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_node_goes_on_from_its_pieces() {
    let places: [Box<dyn Place>; 2] = [Box::new(Memory::new()), Box::new(Folder::new())];
    for place in places {
        let behaviour = Behaviour {
            rate_bytes: Some(60 * MIB),
            ..Behaviour::default()
        };
        let world = World::on(place, 24 * MIB, behaviour);
        let mut reader = world
            .reader(0..world.size(), false)
            .await
            .expect("it is opened");
        world
            .take(&mut reader, 0, 10 * MIB)
            .await
            .expect("the first part comes");
        drop(reader);
        let world = world.restarted().await;
        let before = world.source.sent_bytes();
        world.read_whole().await.expect("the rest comes");
        let sent_bytes = world.source.sent_bytes() - before;
        assert!(sent_bytes < 16 * MIB, "{sent_bytes}");
        world.until_committed().await;
        // A whole blob needs no source after a restart.
        let world = world.restarted().await;
        let before = world.source.sent_bytes();
        world.read_whole().await.expect("the blob is here");
        assert_eq!(world.source.sent_bytes(), before);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_disturbs_nobody_and_its_pieces_stay() {
    let world = World::new(
        8 * MIB,
        Behaviour {
            rate_bytes: Some(40 * MIB),
            ..Behaviour::default()
        },
    );
    let mut leaves = world
        .reader(0..world.size(), false)
        .await
        .expect("it is opened");
    world
        .take(&mut leaves, 0, MIB)
        .await
        .expect("the first bytes come");
    let mut stays = world
        .reader(0..world.size(), false)
        .await
        .expect("it is opened");
    let at = world
        .take(&mut stays, 0, MIB)
        .await
        .expect("the first bytes come");
    drop(leaves);
    world
        .take_rest(&mut stays, at)
        .await
        .expect("the rest comes");
    drop(stays);
    world.until_committed().await;
    world.read_whole().await.expect("it is here");
    assert!(world.copies() <= 1.02, "{} copies", world.copies());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_see_what_is_downloaded() {
    let world = World::new(
        8 * MIB,
        Behaviour {
            rate_bytes: Some(20 * MIB),
            ..Behaviour::default()
        },
    );
    let mut reader = world
        .reader(0..world.size(), false)
        .await
        .expect("it is opened");
    let at = world
        .take(&mut reader, 0, MIB)
        .await
        .expect("the first bytes come");
    let running = world.daemon.running().await;
    assert_eq!(
        (running.len(), running[0].readers, running[0].state),
        (1, 1, "downloading")
    );
    assert!(
        (1..running[0].of).contains(&running[0].pieces) && !running[0].shared,
        "{running:?}"
    );
    world
        .take_rest(&mut reader, at)
        .await
        .expect("the rest comes");
    world.until_committed().await;
    let running = world.daemon.running().await;
    assert_eq!(
        (running[0].state, running[0].size_bytes),
        ("complete", world.size())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_driver_fails_its_readers() {
    let world = World::new(
        8 * MIB,
        Behaviour {
            rate_bytes: Some(10 * MIB),
            ..Behaviour::default()
        },
    );
    let mut reader = world
        .reader(0..world.size(), false)
        .await
        .expect("it is opened");
    let at = world
        .take(&mut reader, 0, MIB)
        .await
        .expect("the first bytes come");
    world.daemon.stop.cancel();
    let rest = world.take_rest(&mut reader, at).await;
    assert!(matches!(rest, Err(FlightError::Stopping)), "{rest:?}");
    let late = world.reader(0..1, false).await;
    assert!(matches!(late.err(), Some(FlightError::Stopping)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proved_size_begins_a_download_of_another_size_anew() {
    let world = World::new(
        4 * MIB,
        Behaviour {
            rate_bytes: Some(4 * MIB),
            ..Behaviour::default()
        },
    );
    let told = world.reader_of(0..MIB, false, Some(3 * MIB)).await;
    drop(told.expect("the first word counts"));
    world
        .daemon
        .flights
        .size_proven(world.content.task, world.size());
    world.read_whole().await.expect("the proved size counts");
    world.until_committed().await;
}
