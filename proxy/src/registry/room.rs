//! Memory for long manifests. Nearly all manifests are short, and need none of it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::error::Problem;

/// Up to here a manifest is short. Indexes of a dozen platforms are a tenth of that.
pub(super) const SHORT_BYTES: usize = 64 << 10;
/// For all long ones together: 16 of the longest.
const ALL_KIB: usize = 64 << 10;
/// The wait for free room. The room is taken by bytes that are read from an origin or a disk, or are on their way to a
/// client from a node that could not write them to its disk.
const WAIT: Duration = Duration::from_secs(10);

/// The room that is left.
pub(super) struct Room {
    kib: Arc<Semaphore>,
    wait: Duration,
}

/// Some of it, free again when this is dropped.
#[derive(Debug)]
pub(super) struct Taken(Option<OwnedSemaphorePermit>);

impl Room {
    pub(super) fn new() -> Self {
        Self {
            kib: Arc::new(Semaphore::new(ALL_KIB)),
            wait: WAIT,
        }
    }

    /// Takes room for a manifest of so many bytes.
    pub(super) async fn take(&self, bytes: usize) -> Result<Taken, Problem> {
        if bytes <= SHORT_BYTES {
            return Ok(Taken(None));
        }
        let kib = u32::try_from(bytes.div_ceil(1 << 10).min(ALL_KIB)).unwrap_or(u32::MAX);
        let permit = timeout(self.wait, Arc::clone(&self.kib).acquire_many_owned(kib)).await;
        permit
            .ok()
            .and_then(Result::ok)
            .map(|permit| Taken(Some(permit)))
            .ok_or(Problem::Crowded)
    }
}

impl Taken {
    /// A body that holds its room as long as any copy of it lives.
    pub(super) fn by(self, body: Bytes) -> Bytes {
        struct Held(Bytes, #[expect(dead_code, reason = "held, not read")] Taken);
        impl AsRef<[u8]> for Held {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        if self.0.is_none() {
            body
        } else {
            Bytes::from_owner(Held(body, self))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn long_manifests_wait_for_room_and_short_ones_never_do() {
        let room = Room {
            wait: Duration::from_millis(20),
            ..Room::new()
        };
        let longest = 4 << 20;
        let mut held = Vec::new();
        for _ in 0..16 {
            held.push(
                room.take(longest)
                    .await
                    .unwrap()
                    .by(Bytes::from_static(b"{}")),
            );
        }
        assert!(matches!(room.take(longest).await, Err(Problem::Crowded)));
        room.take(SHORT_BYTES).await.unwrap();
        let copy = held[0].clone();
        held.remove(0);
        assert!(
            room.take(longest).await.is_err(),
            "a copy is still on its way"
        );
        drop(copy);
        room.take(longest).await.unwrap();
        room.take(usize::MAX).await.unwrap_err();
        held.clear();
        room.take(usize::MAX).await.unwrap();
    }
}
