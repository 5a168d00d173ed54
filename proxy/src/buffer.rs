//! Memory for pieces on their way: bounded for the whole daemon, and reused.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

/// Accounting unit, in bytes; also the longest data frame between peers.
pub const BLOCK_BYTES: usize = 64 << 10;

/// Pieces longer than this part of the memory have half of it together: however many are on their way and however slowly, the other
/// half is left to shorter ones.
const LONG_PART: usize = 8;

/// A wait for memory that is longer than this is a nuisance to a client.
const LONG: Duration = Duration::from_secs(2);
/// A holder of memory looks this often whether a request has waited for memory for long.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The source of buffers for pieces.
///
/// A buffer in use holds permits for its memory until it is dropped. Memory that is kept to be reused never exceeds what
/// is free at that moment, so that both together stay within the budget.
#[derive(Clone)]
pub struct BufferPool {
    budget: Arc<Semaphore>,
    total_blocks: usize,
    /// The part of the budget for long pieces.
    long: Arc<Semaphore>,
    spare: Arc<Mutex<Spare>>,
    /// The number of requests that have waited for longer than `LONG`.
    wanting: Arc<AtomicUsize>,
}

/// A request for memory that has waited for longer than `LONG`, counted until it is dropped.
struct Wanting(Arc<AtomicUsize>);

impl Wanting {
    fn new(all: &Arc<AtomicUsize>) -> Self {
        all.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(all))
    }
}

impl Drop for Wanting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl BufferPool {
    /// A pool of `bytes` in all.
    pub fn new(bytes: u64) -> Self {
        // The semaphore takes and gives 32 bits of permits at once: 256 TiB, which is no limit.
        let most = Semaphore::MAX_PERMITS.min(u32::MAX as usize);
        let total_blocks = (bytes as usize / BLOCK_BYTES).clamp(1, most);
        let budget = Arc::new(Semaphore::new(total_blocks));
        let long = Arc::new(Semaphore::new((total_blocks / 2).max(1)));
        Self {
            budget,
            total_blocks,
            long,
            spare: Arc::default(),
            wanting: Arc::default(),
        }
    }

    /// A buffer for a piece of `len` bytes; waits until there is room. A piece longer than the whole pool gets all of it.
    ///
    /// The wait can take as long as others hold their buffers. A holder that fills a buffer slowly gives it back when
    /// [`BufferPool::is_wanted`].
    pub async fn get(&self, len: usize) -> PieceBuffer {
        let blocks = len.div_ceil(BLOCK_BYTES).clamp(1, self.total_blocks);
        let mut acquiring = Box::pin(self.acquire(blocks));
        let permit = match timeout(LONG, &mut acquiring).await {
            Ok(permit) => permit,
            Err(_) => {
                let _wanting = Wanting::new(&self.wanting);
                acquiring.await
            }
        };
        let (permit, long) = permit.expect("the semaphores are never closed");
        let capacity = len.max(blocks * BLOCK_BYTES);
        let reused = {
            let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
            let reused = spare.take(capacity);
            spare.shrink_to(self.budget.available_permits());
            reused
        };
        let mut bytes = reused.unwrap_or_else(|| Vec::with_capacity(capacity));
        bytes.clear();
        let home = Home {
            spare: Arc::clone(&self.spare),
            budget: Arc::clone(&self.budget),
            permit,
            _long: long,
        };
        PieceBuffer {
            bytes,
            len,
            home: Some(home),
        }
    }

    /// Permits for a buffer. A long one takes its turn among the long ones first, so that it does not stand in the way of others.
    async fn acquire(
        &self,
        blocks: usize,
    ) -> Result<(OwnedSemaphorePermit, Option<OwnedSemaphorePermit>), AcquireError> {
        let is_long = blocks > self.total_blocks / LONG_PART;
        let long_blocks = blocks.min((self.total_blocks / 2).max(1));
        let long = match is_long {
            true => Some(
                Arc::clone(&self.long)
                    .acquire_many_owned(long_blocks as u32)
                    .await?,
            ),
            false => None,
        };
        Ok((
            Arc::clone(&self.budget)
                .acquire_many_owned(blocks as u32)
                .await?,
            long,
        ))
    }

    /// Waits until somebody has waited for memory for long, and for `patience` at least.
    pub async fn is_wanted(&self, patience: Duration) {
        sleep(patience).await;
        while self.wanting.load(Ordering::Relaxed) == 0 {
            sleep(LOOK_EVERY).await;
        }
    }

    /// A request has waited for memory for longer than two seconds.
    pub fn has_long_waits(&self) -> bool {
        self.wanting.load(Ordering::Relaxed) > 0
    }

    /// Frees the memory that was kept to be reused and was not needed since the last call.
    pub fn trim(&self) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        spare.trim();
    }

    /// Bytes that could be had now without waiting.
    pub fn free_bytes(&self) -> u64 {
        (self.budget.available_permits() * BLOCK_BYTES) as u64
    }
}

/// Memory kept to be reused. Each buffer has a whole number of blocks.
#[derive(Default)]
struct Spare {
    /// The one used last is at the end, and is the next to be used.
    buffers: Vec<Vec<u8>>,
    blocks: usize,
    /// The fewest blocks that were spare since the last trim: so many were not needed.
    unneeded_blocks: usize,
}

impl Spare {
    /// A buffer of just this capacity: a larger one would take more than its permits say.
    fn take(&mut self, capacity: usize) -> Option<Vec<u8>> {
        let at = self
            .buffers
            .iter()
            .rposition(|buffer| buffer.capacity() == capacity)?;
        let buffer = self.buffers.remove(at);
        self.forget(&buffer);
        Some(buffer)
    }

    fn forget(&mut self, buffer: &Vec<u8>) {
        self.blocks -= blocks_of(buffer);
        self.unneeded_blocks = self.unneeded_blocks.min(self.blocks);
    }

    fn trim(&mut self) {
        let mut unneeded = self.unneeded_blocks;
        self.buffers
            .retain(|buffer| match unneeded.checked_sub(blocks_of(buffer)) {
                Some(rest) => {
                    unneeded = rest;
                    false
                }
                None => true,
            });
        self.blocks = self.buffers.iter().map(blocks_of).sum();
        self.unneeded_blocks = self.blocks;
    }

    fn put(&mut self, buffer: Vec<u8>) {
        self.blocks += blocks_of(&buffer);
        self.buffers.push(buffer);
    }

    fn shrink_to(&mut self, blocks: usize) {
        while self.blocks > blocks
            && let Some(buffer) = self.buffers.pop()
        {
            self.forget(&buffer);
        }
    }
}

const fn blocks_of(buffer: &Vec<u8>) -> usize {
    buffer.capacity().div_ceil(BLOCK_BYTES)
}

struct Home {
    spare: Arc<Mutex<Spare>>,
    budget: Arc<Semaphore>,
    permit: OwnedSemaphorePermit,
    /// A long piece's part of what long pieces have.
    _long: Option<OwnedSemaphorePermit>,
}

impl Home {
    /// Keeps a buffer to be reused, if it is as large as its permits say and there is room for it once they are back.
    fn take_back(self, buffer: Vec<u8>) {
        if buffer.capacity() != self.permit.num_permits() * BLOCK_BYTES {
            return;
        }
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        // This buffer's own permits are free in a moment and pay for it; the others must pay for what is spare already.
        if spare.blocks <= self.budget.available_permits() {
            spare.put(buffer);
        }
        // The permits go back only now that the buffer counts as spare: the next holder sees it and makes room.
    }
}

/// One piece's memory, filled from the front.
pub struct PieceBuffer {
    bytes: Vec<u8>,
    len: usize,
    home: Option<Home>,
}

impl PieceBuffer {
    /// How many bytes the piece has.
    pub const fn piece_len(&self) -> usize {
        self.len
    }

    /// Bytes still missing.
    pub fn missing(&self) -> usize {
        self.len - self.bytes.len()
    }

    /// Bytes filled so far.
    pub fn filled(&self) -> &[u8] {
        &self.bytes
    }

    /// Appends at most what is missing; how much was taken.
    pub fn extend(&mut self, data: &[u8]) -> usize {
        let take = data.len().min(self.missing());
        self.bytes.extend_from_slice(&data[..take]);
        take
    }

    /// The vector to read into: append at most [`PieceBuffer::missing`] bytes.
    pub const fn as_mut_vec(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Empties it, to start over.
    pub fn reset(&mut self) {
        self.bytes.clear();
    }

    /// As shared bytes; the memory goes back to the pool when the last of them is dropped.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for PieceBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for PieceBuffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.take_back(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use tokio::time::timeout;

    use super::*;

    const BLOCK: u64 = BLOCK_BYTES as u64;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
    }

    fn spare_blocks(pool: &BufferPool) -> usize {
        let spare = pool.spare.lock().unwrap();
        let real: usize = spare.buffers.iter().map(blocks_of).sum();
        assert_eq!(spare.blocks, real);
        real
    }

    #[test]
    fn a_buffer_is_filled_up_to_its_piece() {
        runtime().block_on(async {
            let mut buffer = BufferPool::new(4 * BLOCK).get(5).await;
            assert_eq!((buffer.piece_len(), buffer.missing()), (5, 5));
            assert_eq!(buffer.extend(b"abc"), 3);
            assert_eq!(buffer.extend(b"defg"), 2);
            assert_eq!((buffer.filled(), buffer.missing()), (&b"abcde"[..], 0));
            buffer.reset();
            assert_eq!(buffer.missing(), 5);
            buffer.as_mut_vec().extend_from_slice(b"vwxyz");
            assert_eq!(buffer.freeze(), "vwxyz");
        });
    }

    #[test]
    fn whoever_finds_no_room_waits_until_the_last_share_of_a_buffer_is_dropped() {
        runtime().block_on(async {
            let pool = BufferPool::new(4 * BLOCK);
            let first = pool.get(3 * BLOCK_BYTES).await.freeze();
            let share = first.clone();
            drop(first);
            assert_eq!(pool.free_bytes(), BLOCK);
            assert!(
                timeout(Duration::from_millis(20), pool.get(2 * BLOCK_BYTES))
                    .await
                    .is_err()
            );
            drop(share);
            assert_eq!(pool.free_bytes(), 4 * BLOCK);
            assert!(
                timeout(Duration::from_secs(5), pool.get(2 * BLOCK_BYTES))
                    .await
                    .is_ok()
            );
        });
    }

    #[test]
    fn long_pieces_leave_half_of_the_memory_to_short_ones() {
        runtime().block_on(async {
            let pool = BufferPool::new(48 * BLOCK);
            let long = pool.get(16 * BLOCK_BYTES).await;
            // The second long one waits, and nobody waits behind it.
            let waiting = tokio::spawn({
                let pool = pool.clone();
                async move { pool.get(16 * BLOCK_BYTES).await.missing() }
            });
            tokio::task::yield_now().await;
            let mut short = Vec::new();
            for _ in 0..8 {
                short.push(
                    timeout(Duration::from_secs(1), pool.get(4 * BLOCK_BYTES))
                        .await
                        .unwrap(),
                );
            }
            assert_eq!(pool.free_bytes(), 0);
            drop((long, short));
            assert_eq!(waiting.await.unwrap(), 16 * BLOCK_BYTES);
        });
    }

    #[test]
    fn a_piece_longer_than_the_pool_gets_all_of_it_and_is_not_kept() {
        runtime().block_on(async {
            let pool = BufferPool::new(2 * BLOCK);
            let buffer = pool.get(5 * BLOCK_BYTES).await;
            assert_eq!((buffer.missing(), pool.free_bytes()), (5 * BLOCK_BYTES, 0));
            drop(buffer);
            assert_eq!((pool.free_bytes(), spare_blocks(&pool)), (2 * BLOCK, 0));
        });
    }

    #[test]
    fn memory_is_reused() {
        runtime().block_on(async {
            let pool = BufferPool::new(4 * BLOCK);
            let mut buffer = pool.get(100).await;
            buffer.extend(b"old");
            let at = buffer.filled().as_ptr();
            drop(buffer);
            let mut again = pool.get(200).await;
            assert_eq!(again.filled(), b"");
            again.extend(b"new");
            assert_eq!(again.filled().as_ptr(), at);
        });
    }

    #[test]
    fn memory_that_was_not_needed_between_two_trims_is_freed() {
        runtime().block_on(async {
            let pool = BufferPool::new(8 * BLOCK);
            let used = [pool.get(1).await, pool.get(1).await, pool.get(1).await];
            drop(used);
            // The first trim only begins to count.
            pool.trim();
            assert_eq!(spare_blocks(&pool), 3);
            drop(pool.get(1).await);
            pool.trim();
            assert_eq!(spare_blocks(&pool), 1);
            pool.trim();
            assert_eq!(spare_blocks(&pool), 0);
            // A short trim leaves a buffer that is only partly unneeded.
            drop(pool.get(3 * BLOCK_BYTES).await);
            pool.trim();
            drop((pool.get(3 * BLOCK_BYTES).await, pool.get(1).await));
            pool.trim();
            assert_eq!(spare_blocks(&pool), 4);
            pool.trim();
            assert_eq!(spare_blocks(&pool), 0);
        });
    }

    #[test]
    fn many_threads_stay_within_the_budget() {
        let pool = BufferPool::new(16 * BLOCK);
        let in_use = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4usize {
                let (pool, in_use) = (&pool, &in_use);
                scope.spawn(move || {
                    runtime().block_on(async {
                        for round in 0..500 {
                            let buffer = pool.get((thread + round) % 7 * BLOCK_BYTES + 1).await;
                            let mine = blocks_of(&buffer.bytes);
                            let now = in_use.fetch_add(mine, Ordering::SeqCst) + mine;
                            assert!(now <= 16);
                            in_use.fetch_sub(mine, Ordering::SeqCst);
                        }
                    });
                });
            }
        });
        assert_eq!(pool.free_bytes(), 16 * BLOCK);
        assert!(spare_blocks(&pool) <= 16);
    }

    proptest! {
        /// Gets buffers as long as there is room, and drops any: used and spare memory never exceed the budget.
        #[test]
        fn used_and_spare_memory_together_stay_within_the_budget(
            total in 1..40u64,
            steps in prop::collection::vec((any::<bool>(), 0..12 * BLOCK_BYTES), 1..80),
        ) {
            let pool = BufferPool::new(total * BLOCK);
            runtime().block_on(async {
                let mut used: Vec<PieceBuffer> = Vec::new();
                for (get, number) in steps {
                    let blocks = number.div_ceil(BLOCK_BYTES).max(1) as u64;
                    if get && blocks * BLOCK <= pool.free_bytes() {
                        // Only a long piece may have to wait although there is room: for its turn among the long ones.
                        match timeout(Duration::ZERO, pool.get(number)).await {
                            Ok(buffer) => used.push(buffer),
                            Err(_) => assert!(blocks > total / LONG_PART as u64),
                        }
                    } else if !used.is_empty() {
                        used.swap_remove(number % used.len());
                    }
                    let blocks_used: usize = used.iter().map(|buffer| blocks_of(&buffer.bytes)).sum();
                    assert!(blocks_used + spare_blocks(&pool) <= total as usize);
                    assert_eq!(pool.free_bytes(), (total as usize - blocks_used) as u64 * BLOCK);
                }
            });
        }
    }
}
