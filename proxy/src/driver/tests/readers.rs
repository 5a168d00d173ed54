//! Readers that come late, want several ranges, or are told wrong things.

use std::io::ErrorKind;

use super::*;
use crate::origin::testing::{TestRegistry, knowing, say};
use crate::store::suite::Faulty;

/// A registry on a socket that has the blob. It answers ranges, or sends the whole for each request.
async fn registry_with(blob: Vec<u8>, honours_ranges: bool) -> TestRegistry {
    TestRegistry::start(move |seen| {
        let range = seen
            .header("range")
            .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
        let Some((start, end)) = range.filter(|_| honours_ranges) else {
            return say(seen, 200, &[], &blob);
        };
        let start: usize = start.parse().unwrap_or(0);
        let end = end.parse().map_or(blob.len(), |last: usize| last + 1);
        let content_range = format!("bytes {start}-{}/{}", end - 1, blob.len());
        say(
            seen,
            206,
            &[("Content-Range", &content_range)],
            &blob[start..end],
        )
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_readers_of_a_task_without_disk_read_the_registry_themselves() {
    for honours_ranges in [true, false] {
        let content = Content::new(6 * MIB);
        let registry = registry_with(content.bytes.clone(), honours_ranges).await;
        let place = Faulty::over(Memory::new());
        place.faults.refuse(ErrorKind::StorageFull);
        let source = MemorySource::new(content.bytes.clone(), Behaviour::default());
        let (name, live) = (registry.name(), knowing(&[&registry]));
        let setup = Setup {
            registry: name,
            live,
            ..Setup::new(&source, place.open())
        };
        let daemon = Daemon::start(setup);
        daemon
            .read_whole(&content)
            .await
            .expect("it comes through memory");
        daemon
            .read_whole(&content)
            .await
            .expect("the registry gives it");
        for range in [MIB + 5..2 * MIB, 0..10, content.size() - 10..content.size()] {
            daemon
                .read(&content, range.clone())
                .await
                .unwrap_or_else(|error| panic!("{range:?}: {error}"));
        }
        assert!(registry.count("GET", "/v2/a/b/blobs/") >= 1);
        assert_eq!(
            source.sent_bytes(),
            content.size(),
            "the download itself read it once"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_gives_several_ranges_one_after_the_other() {
    let world = World::new(8 * MIB, Behaviour::default());
    let ranges = [
        5 * MIB..5 * MIB + 1000,
        MIB..MIB + 500_000,
        7 * MIB + 3..8 * MIB,
    ];
    let flight = world
        .daemon
        .open("memory", world.content.task, true, Some(world.size()))
        .await;
    let mut reader = flight.expect("it is opened").read(ranges.to_vec());
    reader.begin().await.expect("the first bytes come");
    for (n, range) in ranges.iter().enumerate() {
        world
            .take(&mut reader, range.start, range.end - range.start)
            .await
            .expect("the range comes");
        assert!(matches!(reader.next().await, Ok(None)), "{range:?} is over");
        assert_eq!(reader.next_part(), n + 1 < ranges.len());
    }
    assert!(
        world.source.sent_bytes() < 4 * MIB,
        "{}",
        world.source.sent_bytes()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_another_digest_never_complete() {
    let content = Content::new(3 * MIB);
    let mut other = content.bytes.clone();
    other[5] ^= 1;
    let source = MemorySource::new(other, Behaviour::default());
    let daemon = Daemon::start(Setup::new(&source, Memory::new().open()));
    let size = content.size();
    let mut reader = daemon
        .reader(content.task, 0..size, false, Some(size))
        .await
        .expect("it is opened");
    let mut came_bytes = 0;
    let end = loop {
        match reader.next().await {
            Ok(Some(Segment::File { range, .. })) => came_bytes += range.end - range.start,
            Ok(Some(Segment::Memory(bytes) | Segment::Passed(bytes))) => {
                came_bytes += bytes.len() as u64
            }
            Ok(None) => panic!("it is another blob"),
            Err(error) => break error,
        }
    };
    assert!(
        matches!(end, FlightError::WrongDigest(_)) && came_bytes < size,
        "{end} after {came_bytes}"
    );
    assert!(!daemon.store.has(&content.task));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_whose_registry_says_another_size_takes_no_part() {
    let world = World::new(
        3 * MIB,
        Behaviour {
            rate_bytes: Some(4 * MIB),
            ..Behaviour::default()
        },
    );
    let mut reader = world
        .reader(0..world.size(), false)
        .await
        .expect("it is opened");
    let at = world
        .take(&mut reader, 0, 1)
        .await
        .expect("the first bytes come");
    let other = world
        .daemon
        .open("other.invalid", world.content.task, false, Some(77))
        .await;
    assert!(matches!(other.err(), Some(FlightError::OtherSize(_))));
    world
        .take_rest(&mut reader, at)
        .await
        .expect("the rest comes");
    let flight = world
        .daemon
        .open("memory", world.content.task, false, Some(world.size()))
        .await;
    assert!(flight.expect("it is here").is_size_proven());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_without_bytes_is_checked_by_its_digest() {
    let world = World::new(0, Behaviour::default());
    let mut reader = world.reader(0..0, false).await.expect("it is opened");
    assert!(matches!(reader.next().await, Ok(None)));
    world.until_committed().await;
    let task = Digest::of(Algorithm::Sha256, b"five!");
    let wrong = world.daemon.reader(task, 0..0, false, Some(0)).await;
    assert!(matches!(wrong.err(), Some(FlightError::WrongDigest(_))));
}
