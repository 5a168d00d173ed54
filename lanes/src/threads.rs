//! The threads that the lanes share.
//!
//! The thread that rested last is woken first. So the threads that one busy moment brought are no longer woken when it is over, and
//! end after [`Threads::rest`]. A pool that wakes its threads in turn keeps all of them, each with its stack and its share of the
//! allocator, for as long as there is a little work.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

type Work = Box<dyn FnOnce() + Send>;

/// A pool without a bound of its own: the lanes bound the work.
#[derive(Clone)]
pub(crate) struct Threads {
    pool: Arc<Mutex<Pool>>,
    /// A thread ends when nothing woke it for this long.
    rest: Duration,
}

#[derive(Default)]
struct Pool {
    /// The threads that sleep; the last one rested last.
    asleep: Vec<(u64, SyncSender<Work>)>,
    /// Work for the next thread that has none, while the system gives no thread.
    waiting: VecDeque<Work>,
    alive: usize,
    started: u64,
}

impl Threads {
    pub(crate) fn new(rest: Duration) -> Self {
        Self {
            pool: Arc::default(),
            rest,
        }
    }

    /// Does the work on a thread. Work that panics ends alone; the thread goes on.
    ///
    /// # Errors
    ///
    /// The system gave no thread, and no thread lives that could do the work later. A retry helps once the system has threads again.
    pub(crate) fn run(&self, work: Work) -> io::Result<()> {
        let mut pool = self.lock();
        let mut work = work;
        while let Some((_, thread)) = pool.asleep.pop() {
            match thread.try_send(work) {
                Ok(()) => return Ok(()),
                Err(mpsc::TrySendError::Full(back) | mpsc::TrySendError::Disconnected(back)) => {
                    work = back;
                }
            }
        }
        pool.started += 1;
        let id = pool.started;
        let threads = self.clone();
        // The work is handed over by the queue, so it is not lost when the thread does not start.
        pool.waiting.push_back(work);
        let started = std::thread::Builder::new()
            .name("hawker-disk".to_owned())
            .spawn(move || threads.live(id));
        match started {
            Ok(_) => pool.alive += 1,
            Err(error) if pool.alive == 0 => {
                pool.waiting.clear();
                return Err(error);
            }
            Err(_) => {}
        }
        Ok(())
    }

    fn live(&self, id: u64) {
        let (wake, woken) = mpsc::sync_channel(1);
        loop {
            let next = {
                let mut pool = self.lock();
                let next = pool.waiting.pop_front();
                if next.is_none() {
                    pool.asleep.push((id, wake.clone()));
                }
                next
            };
            let work = match next {
                Some(work) => work,
                None => match self.sleep(id, &woken) {
                    Some(work) => work,
                    None => return,
                },
            };
            // The future that waits for the work sees the panic: its sender is dropped.
            let _ = catch_unwind(AssertUnwindSafe(work));
        }
    }

    /// Sleeps until there is work; `None` when the thread is to end.
    fn sleep(&self, id: u64, woken: &mpsc::Receiver<Work>) -> Option<Work> {
        match woken.recv_timeout(self.rest) {
            Ok(work) => return Some(work),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        let mut pool = self.lock();
        let asleep = pool.asleep.len();
        pool.asleep.retain(|(other, _)| *other != id);
        if pool.asleep.len() == asleep {
            // It was woken at the last moment, and the work is in the channel.
            return woken.try_recv().ok();
        }
        pool.alive -= 1;
        None
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    fn alive(threads: &Threads) -> usize {
        threads.lock().alive
    }

    /// Runs so many pieces of work at once, all of which are under way before the first one ends.
    fn together(threads: &Threads, count: usize) {
        let (here, came) = mpsc::channel();
        let gates: Vec<_> = (0..count)
            .map(|_| {
                let (open, gate) = mpsc::channel::<()>();
                let here = here.clone();
                let work = move || {
                    let _ = here.send(());
                    let _ = gate.recv();
                };
                threads.run(Box::new(work)).expect("a thread");
                open
            })
            .collect();
        for _ in 0..count {
            came.recv().expect("each one starts");
        }
        drop(gates);
    }

    #[test]
    fn threads_of_a_busy_moment_end_while_a_little_work_goes_on() {
        let threads = Threads::new(Duration::from_millis(300));
        together(&threads, 20);
        assert_eq!(alive(&threads), 20);
        let deadline = Instant::now() + Duration::from_secs(20);
        while alive(&threads) > 2 {
            assert!(Instant::now() < deadline, "{} live", alive(&threads));
            together(&threads, 1);
            std::thread::sleep(Duration::from_millis(5));
        }
        together(&threads, 3);
    }

    #[test]
    fn a_thread_survives_work_that_panics() {
        let threads = Threads::new(Duration::from_secs(60));
        for _ in 0..50 {
            let (here, came) = mpsc::channel::<()>();
            let work = move || {
                let _here = here;
                panic!("as the test wants");
            };
            threads.run(Box::new(work)).expect("a thread");
            // The sender is dropped as the work ends.
            came.recv().expect_err("nothing is sent");
        }
        together(&threads, 1);
        // A thread that was about to rest could not be woken yet.
        assert!(alive(&threads) < 25, "{} live", alive(&threads));
    }

    #[test]
    fn work_that_comes_as_threads_go_to_rest_is_never_lost() {
        let threads = Threads::new(Duration::from_millis(1));
        for pause_us in (0..2000).map(|round| round % 40 * 50) {
            together(&threads, 1);
            std::thread::sleep(Duration::from_micros(pause_us));
        }
    }
}
