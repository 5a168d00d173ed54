//! `scheduler`: the time and memory of the scheduler's decisions, with a big cluster's books open.
//!
//! It is [`hawker_core::swarm`] itself, as the daemon runs it, without streams around it. Peers register and announce; the
//! process's resident memory tells what that took (what the allocator keeps for itself included). Then peers ask for parents: at
//! random all over the tasks, and many at once for the same one. A decision is one call, from the question to the words that
//! answer it, or one timer's news; all run on one thread.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hawker_conformance::lab::{Memory, memory_bytes};
use hawker_core::Time;
use hawker_core::message::Role;
use hawker_core::piece::{PeerId, PieceLayout};
use hawker_core::place::Place;
use hawker_core::swarm::{Holding, Input, Registration, Swarm, Terms, WARM_UP};
use hawker_oci::digest::{Algorithm, Digest};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;

use crate::SchedulerOptions;
use crate::measure::{Watch, with_load};
use crate::report::{Report, Target};

const SEEDS: u32 = 5;
const ZONES: u32 = 3;
/// A layer as they are: 24 pieces or so.
const SIZE_BYTES: u64 = 20 << 20;
/// Questions that are timed in one round.
const QUESTIONS: u32 = 50_000;
/// Peers that ask for the same new task at once.
const BURST: u32 = 10_000;
/// Between two questions: a thousand a second.
const PACE: Duration = Duration::from_millis(1);

pub(crate) fn run(report: &mut Report, options: &SchedulerOptions) -> Result<()> {
    let mut books = Books::open(options);
    let bytes_per_peer = books.measure(|books| books.register())? / f64::from(options.peers);
    let copies = f64::from(options.tasks) * f64::from(options.copies);
    let bytes_per_copy = books.measure(|books| books.announce())? / copies;
    report.run(json!({
        "peers": books.swarm.peer_count(),
        "tasks": books.swarm.task_count(),
        "copies": copies,
        "bytes_per_peer": bytes_per_peer,
        "bytes_per_copy": bytes_per_copy,
    }));
    let mut worst_us: f64 = 0.0;
    for round in 1..=options.common.rounds {
        for (variant, ask) in [
            ("all over", Books::all_over as fn(&mut Books)),
            ("one task", Books::one_task),
        ] {
            let watch = Watch::start()?;
            ask(&mut books);
            let mut times = std::mem::take(&mut books.times);
            times.sort_unstable();
            let at = |share: f64| {
                let rank = (times.len() as f64 * share) as usize;
                times
                    .get(rank.min(times.len() - 1))
                    .map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
            };
            worst_us = worst_us.max(at(0.99));
            let run = json!({
                "variant": variant,
                "round": round,
                "decisions": times.len(),
                "p50_us": at(0.5),
                "p99_us": at(0.99),
                "max_us": at(1.0),
            });
            report.run(with_load(run, watch.stop()?));
        }
    }
    report.figure("decision_p99_us", worst_us, Some(Target::AtMost(1000.0)));
    report.figure(
        "bytes_per_peer",
        bytes_per_peer,
        Some(Target::AtMost(2048.0)),
    );
    report.figure(
        "bytes_per_copy",
        bytes_per_copy,
        Some(Target::AtMost(200.0)),
    );
    Ok(())
}

/// A scheduler's books, and whoever writes in them.
struct Books {
    swarm: Swarm,
    rng: StdRng,
    now: Time,
    times: Vec<Duration>,
    peers: u32,
    tasks: u32,
    copies: u32,
    /// Tasks made up so far for bursts.
    bursts: u32,
}

impl Books {
    fn open(options: &SchedulerOptions) -> Self {
        let now = Time::default() + WARM_UP;
        Self {
            swarm: Swarm::new(Time::default()),
            rng: StdRng::seed_from_u64(1),
            now,
            times: Vec::new(),
            peers: options.peers,
            tasks: options.tasks,
            copies: options.copies,
            bursts: 0,
        }
    }

    /// How much more resident memory there is after `work`, in bytes.
    fn measure(&mut self, work: impl FnOnce(&mut Self)) -> Result<f64> {
        let resident =
            || memory_bytes(std::process::id(), Memory::Resident).context("/proc is not mounted");
        let before = resident()?;
        work(self);
        Ok(resident()?.saturating_sub(before) as f64)
    }

    fn input(&mut self, input: Input) {
        self.swarm.handle(self.now, &mut self.rng, input);
        while self.swarm.poll().is_some() {}
    }

    fn register(&mut self) {
        for n in 0..self.peers + SEEDS {
            self.input(Input::Joined(Registration {
                peer: peer(n),
                role: if n < self.peers {
                    Role::Peer
                } else {
                    Role::Seed
                },
                place: Place {
                    zone: format!("zone-{}", n % ZONES).into(),
                    ..Place::default()
                },
                upload_slots: 8,
                upload_rate_bytes: 0,
                reads_origins: true,
            }));
        }
    }

    /// Each peer says what it holds; each task comes out with as many copies as were asked for.
    fn announce(&mut self) {
        let each = (u64::from(self.tasks) * u64::from(self.copies)).div_ceil(u64::from(self.peers));
        for n in 0..self.peers {
            let first = u64::from(n) * each;
            let holdings = (first..first + each)
                .map(|copy| holding(task((copy % u64::from(self.tasks)) as u32)));
            let holdings = holdings.collect();
            self.input(Input::Holdings {
                peer: peer(n),
                replaces_all: true,
                holdings,
            });
        }
    }

    /// Peers at random ask for tasks at random, and get them.
    fn all_over(&mut self) {
        for _ in 0..QUESTIONS {
            let (n, t) = (
                self.rng.random_range(0..self.peers),
                self.rng.random_range(0..self.tasks),
            );
            self.want(n, task(t));
            self.input(Input::Holdings {
                peer: peer(n),
                replaces_all: false,
                holdings: vec![holding(task(t))],
            });
        }
    }

    /// Many ask for one new task; when all have asked they have it, one after the other.
    fn one_task(&mut self) {
        self.bursts += 1;
        let task = task(u32::MAX - self.bursts);
        let peers = self.peers;
        let first = self.rng.random_range(0..peers);
        let all = || (0..BURST.min(peers)).map(|n| (first + n) % peers);
        for n in all() {
            self.want(n, task);
        }
        for n in all() {
            self.input(Input::Holdings {
                peer: peer(n),
                replaces_all: false,
                holdings: vec![holding(task)],
            });
            self.wait();
        }
    }

    fn want(&mut self, n: u32, task: Digest) {
        self.wait();
        let want = Input::Want {
            peer: peer(n),
            task,
            size_bytes: Some(SIZE_BYTES),
            again: false,
            reads: false,
            terms: Terms::default(),
        };
        self.timed(|books| books.input(want));
    }

    /// Until the next question; timers that come due are decisions, too.
    fn wait(&mut self) {
        let end = self.now + PACE;
        while let Some(due) = self.swarm.deadline().filter(|due| *due <= end) {
            self.now = due.max(self.now);
            self.timed(|books| {
                books.swarm.tick(books.now, &mut books.rng);
                while books.swarm.poll().is_some() {}
            });
        }
        self.now = end;
    }

    fn timed(&mut self, work: impl FnOnce(&mut Self)) {
        let start = Instant::now();
        work(self);
        self.times.push(start.elapsed());
    }
}

fn peer(n: u32) -> PeerId {
    let mut id = [0; 16];
    // As ids are: hashes, in no order.
    id.copy_from_slice(&Digest::of(Algorithm::Sha256, &n.to_be_bytes()).as_bytes()[..16]);
    PeerId(id)
}

fn task(n: u32) -> Digest {
    Digest::of(
        Algorithm::Sha256,
        &[b"task".as_slice(), &n.to_be_bytes()].concat(),
    )
}

fn holding(task: Digest) -> Holding {
    Holding {
        task,
        size_bytes: SIZE_BYTES,
        pieces: PieceLayout::new(SIZE_BYTES).count(),
        complete: true,
    }
}
