//! A client that asks for the same bytes again may have got wrong ones: the bytes on the disk are hashed before they
//! are served once more.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hawker_core::Time;
use hawker_core::cache::Recheck;
use hawker_oci::digest::Digest;
use tokio::time::{Instant, timeout};

use crate::flight::Flights;

/// Questions that are remembered.
const QUESTIONS: NonZeroUsize = NonZeroUsize::new(16 << 10).expect("not zero");
/// The wait for a hashing under way to end. A client that waits in vain gets the bytes as they are, and another chance
/// when it asks again.
const TURN: Duration = Duration::from_secs(1);
/// For bytes to be hashed before they are served all the same.
const HASHED_WITHIN: Duration = Duration::from_secs(10);

pub(super) struct Rechecks {
    flights: Flights,
    memory: Mutex<Recheck<IpAddr, Digest>>,
    /// Held while anything is hashed: one at a time.
    turn: Arc<tokio::sync::Mutex<()>>,
    started: Instant,
}

impl Rechecks {
    pub(super) fn new(flights: Flights) -> Self {
        Self {
            flights,
            memory: Mutex::new(Recheck::new(QUESTIONS)),
            turn: Arc::default(),
            started: Instant::now(),
        }
    }

    /// Notes that a client asks for these bytes. If it did before, and they are `held`, they are right after this, or gone.
    pub(super) async fn asked(
        self: &Arc<Self>,
        client: IpAddr,
        task: Digest,
        bytes: Range<u64>,
        held: bool,
    ) {
        let is_suspicious = || self.with(|memory, now| memory.asked(client, task, &bytes, now));
        if !is_suspicious() || !held {
            return;
        }
        let Ok(turn) = timeout(TURN, Arc::clone(&self.turn).lock_owned()).await else {
            return;
        };
        // A client that waited may find out that they were hashed meanwhile.
        if !is_suspicious() {
            return;
        }
        let (this, bytes) = (Arc::clone(self), bytes.clone());
        // A task of its own: the hashing goes on to its end after the client that began it is gone.
        let hashing = tokio::spawn(async move {
            if this.flights.recheck(task, bytes.clone()).await == Some(true) {
                this.with(|memory, now| memory.found_sound(task, bytes, now));
            }
            drop(turn);
        });
        if timeout(HASHED_WITHIN, hashing).await.is_err() {
            tracing::warn!(%task, "takes too long to be hashed again: it is served as it is");
        }
    }

    fn with<T>(&self, what: impl FnOnce(&mut Recheck<IpAddr, Digest>, Time) -> T) -> T {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        what(&mut memory, Time(self.started.elapsed()))
    }
}
