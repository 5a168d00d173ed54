//! Lanes for work that blocks on the disk.
//!
//! All lanes share a pool of threads. Each kind of work has a lane of its own, with room for so much at once; the rest waits in
//! order. So a client that asks for what is cached never waits behind pieces that are being written, pieces for peers, or blobs that are
//! hashed again. Name look-ups are not done on these threads.

mod threads;

use std::io;
use std::sync::LazyLock;
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit, oneshot};

use threads::Threads;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// A client waits for what is on disk: blobs that are opened, pieces that are hashed before they leave, manifests.
    Clients,
    /// Downloads begin, are written and committed.
    Downloads,
    /// Pieces are read for peers.
    Uploads,
    /// Everything else: hashing on suspicion, small files of the daemon's own.
    Upkeep,
}

/// Room in each lane. A disk gains nothing from more requests at once, and each thread keeps memory of its own.
const ROOM: [usize; 4] = [32, 24, 24, 4];
/// A thread without work ends after this.
const REST: Duration = Duration::from_secs(10);

static LANES: LazyLock<[Semaphore; 4]> = LazyLock::new(|| ROOM.map(Semaphore::new));
static THREADS: LazyLock<Threads> = LazyLock::new(|| Threads::new(REST));

fn of(lane: Lane) -> &'static Semaphore {
    &LANES[lane as usize]
}

/// Does something that blocks; `None` when it panicked, or the system gives no thread.
pub async fn run<T: Send + 'static>(
    lane: Lane,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let place = of(lane).acquire().await.ok()?;
    at(place, work).ok()?.await.ok()
}

/// Begins something that blocks and waits for nothing.
pub fn start(lane: Lane, work: impl FnOnce() + Send + 'static) {
    match of(lane).try_acquire() {
        Ok(place) => drop(at(place, work)),
        Err(_) => drop(tokio::spawn(run(lane, work))),
    }
}

fn at<T: Send + 'static>(
    place: SemaphorePermit<'static>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (send, result) = oneshot::channel();
    THREADS.run(Box::new(move || {
        let value = work();
        drop(place);
        // Nobody waits for it where the future was dropped.
        let _ = send.send(value);
    }))?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_client_does_not_wait_behind_a_lane_that_is_full() {
        let gates: Vec<_> = (0..2 * ROOM[Lane::Uploads as usize])
            .map(|_| {
                let (open, gate) = mpsc::channel::<()>();
                start(Lane::Uploads, move || {
                    let _ = gate.recv();
                });
                open
            })
            .collect();
        let hit = tokio::time::timeout(Duration::from_secs(5), run(Lane::Clients, || 7)).await;
        assert_eq!(hit, Ok(Some(7)));
        let stuck = tokio::time::timeout(Duration::from_millis(50), run(Lane::Uploads, || 7)).await;
        assert!(stuck.is_err(), "the lane is full");
        drop(gates);
        assert_eq!(run(Lane::Uploads, || 7).await, Some(7));
    }
}
