//! Downloads while the disk is full, read-only, fails to make anything durable, or lets bytes rot.

use std::io::ErrorKind;

use super::*;
use crate::store::faulty::Faults;
use crate::store::suite::Faulty;

/// A node whose disk fails on demand.
fn world(size: u64, behaviour: Behaviour) -> (Arc<World>, Faults) {
    let place = Faulty::over(Memory::new());
    let faults = place.faults.clone();
    (World::on(Box::new(place), size, behaviour), faults)
}

fn slow() -> Behaviour {
    Behaviour {
        rate_bytes: Some(20 * MIB),
        ..Behaviour::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fills_up_in_the_middle_costs_no_bytes_and_is_used_again() {
    let (world, faults) = world(6 * MIB, slow());
    faults.leave_room(2 * MIB);
    let mut reader = world
        .reader(0..world.size(), false)
        .await
        .expect("it is opened");
    let at = world
        .take(&mut reader, 0, 4 * MIB)
        .await
        .expect("it comes through memory");
    assert_eq!(world.daemon.running().await[0].state, "through memory");
    world
        .take_rest(&mut reader, at)
        .await
        .expect("the rest comes");
    assert!(
        !world.daemon.store.has(&world.content.task) && world.copies() <= 1.02,
        "{}",
        world.copies()
    );
    drop(reader);
    faults.mend();
    // The disk is tried each second. Before that, late readers go to the registry themselves, and here is none.
    let again = async {
        while world.read_whole().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), again)
        .await
        .expect("the disk is used again");
    world.until_committed().await;
    world.read_whole().await.expect("it is here");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_refuses_from_the_start_is_not_needed() {
    for kind in [ErrorKind::ReadOnlyFilesystem, ErrorKind::StorageFull] {
        let (world, faults) = world(6 * MIB, slow());
        faults.refuse(kind);
        let readers = [0..world.size(), 0..world.size()];
        world.read_at_once(&readers, world.size(), false).await;
        assert!(!world.daemon.store.has(&world.content.task), "{kind}");
        assert!(world.copies() <= 1.02, "{kind}: {} copies", world.copies());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blob_that_can_not_be_made_durable_is_served() {
    let (world, faults) = world(3 * MIB, Behaviour::default());
    faults.fail_commits();
    world.read_whole().await.expect("it comes");
    world.read_whole().await.expect("it is served");
    assert!(!world.daemon.store.has(&world.content.task));
    assert_eq!(world.copies(), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_size_that_is_told_late_meets_a_full_disk() {
    let (world, faults) = world(3 * MIB, slow());
    faults.refuse(ErrorKind::StorageFull);
    let mut reader = world
        .reader_of(0..world.size(), false, None)
        .await
        .expect("the source tells the size");
    world
        .take_rest(&mut reader, 0)
        .await
        .expect("it comes through memory");
    assert_eq!(world.copies(), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotten_bytes_are_found_on_suspicion_and_fetched_again() {
    let world = World::new(3 * MIB, Behaviour::default());
    world.read_whole().await.expect("it comes");
    world.until_committed().await;
    let (task, flights) = (world.content.task, &world.daemon.flights);
    assert_eq!(flights.recheck(task, 0..world.size()).await, Some(true));
    let blob = world
        .daemon
        .store
        .committed(&task)
        .expect("it is committed");
    blob.file
        .write_all_at(&[world.content.bytes[7] ^ 1], 7)
        .expect("the file is there");
    assert_eq!(
        flights.recheck(task, MIB..2 * MIB).await,
        Some(true),
        "another range is right"
    );
    assert_eq!(flights.recheck(task, 0..MIB).await, Some(false));
    world.read_whole().await.expect("it comes again");
    assert_eq!(world.copies(), 2.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_rotted_while_no_daemon_ran_reach_no_reader() {
    let world = World::new(3 * MIB, Behaviour::default());
    world.read_whole().await.expect("it comes");
    world.until_committed().await;
    let blob = world
        .daemon
        .store
        .committed(&world.content.task)
        .expect("it is committed");
    blob.file
        .write_all_at(&[world.content.bytes[7] ^ 1], 7)
        .expect("the file is there");
    drop(blob);
    let world = world.restarted().await;
    assert!(matches!(
        world.read_whole().await,
        Err(FlightError::Rotten(_))
    ));
    world.read_whole().await.expect("it comes again");
    assert_eq!(world.copies(), 2.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_of_a_download_that_rot_are_fetched_again() {
    let world = World::new(6 * MIB, slow());
    let mut reader = world
        .reader(0..world.size(), false)
        .await
        .expect("it is opened");
    let at = world
        .take(&mut reader, 0, MIB)
        .await
        .expect("the first bytes come");
    let file = loop {
        let mut other = world.reader(0..1, true).await.expect("it is opened");
        match other.next().await.expect("the byte is here") {
            Some(Segment::File { file, .. }) => break file,
            _ => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    };
    let (task, flights) = (world.content.task, &world.daemon.flights);
    assert_eq!(flights.recheck(task, 0..1).await, Some(true));
    assert_eq!(
        flights.recheck(task, world.size() - 1..world.size()).await,
        None,
        "that is not here yet"
    );
    file.write_all_at(&[world.content.bytes[7] ^ 1], 7)
        .expect("the file is there");
    assert_eq!(flights.recheck(task, 0..1).await, Some(false));
    let rest = world.take_rest(&mut reader, at).await;
    assert!(matches!(rest, Err(FlightError::Rotten(_))), "{rest:?}");
    world.read_whole().await.expect("it comes again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_the_store_let_go_begins_anew() {
    let world = World::new(3 * MIB, Behaviour::default());
    world.read_whole().await.expect("it comes");
    world.until_committed().await;
    let task = world.content.task;
    let _ = world.daemon.events.send(Event::Crowded).await;
    assert!(world.daemon.running().await.is_empty());
    let _ = world.daemon.events.send(Event::Gone(vec![task])).await;
    world.read_whole().await.expect("it is still in the store");
    assert_eq!(world.copies(), 1.0);
}
