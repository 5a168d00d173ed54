//! `abuse`: two nodes pull new and cached blobs all the time, and meanwhile clients, strangers or members attack. Each attack has a
//! cluster of its own: a scheduler, two seeds, two nodes. The same pulls before the attack are what those during it are compared with.

mod attacks;
mod load;

use std::collections::HashMap;
use std::net::{IpAddr, UdpSocket};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use hawker_conformance::lab::{Cluster, ClusterPlan, Hawker, HawkerPlan, Host, Mbit};
use hawker_conformance::origin::{Blob, Content, Origin, OriginConfig};
use hawker_conformance::scene;
use hawker_oci::digest::Digest;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tokio::sync::broadcast;

use crate::client::get;
use crate::measure::{MIB, MemorySampler, Watch, median, with_load};
use crate::report::{Report, Target};
use crate::stage::{REPOSITORY, Stage, committed};
use attacks::Attack;
use load::{Honest, KINDS};

const NODES: usize = 2;
/// The size of the new blobs that the honest nodes pull.
const NEW_BYTES: u64 = 4 * MIB;
const CACHED_BYTES: u64 = 64 * MIB;
/// The size that a lying registry tells for each of these blobs.
const LIE_BYTES: u64 = 777_777;
/// The links of both registries. Those of members are faster: no attack is to win by its bandwidth alone.
const REGISTRY_LINK: Mbit = Mbit(100);
const REGISTRY_PORT: u16 = 5000;
const DNS_PORT: u16 = 53;
/// Pulls that do not count yet, and those that the attack is compared with.
const WARM_UP: Duration = Duration::from_secs(5);
const BEFORE: Duration = Duration::from_secs(15);
/// How long after an attack all must be as before.
const AFTER: Duration = Duration::from_secs(60);
/// The median of so long a time is what memory a daemon has now.
const MEMORY_NOW: Duration = Duration::from_secs(5);
/// How much more memory than before the attack is as before.
const MEMORY_RATIO: f64 = 1.2;

#[derive(Args, Clone)]
pub(crate) struct AbuseOptions {
    /// Write the results as JSON into this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// How many seconds each attack lasts
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// An attack to run, if not all; may be repeated
    #[arg(long = "attack", value_enum, value_name = "NAME")]
    attacks: Vec<Attack>,
}

/// The figures of each attack.
struct Figures {
    failed: f64,
    slowdown: f64,
    peak_anon_mib: f64,
    recovery_s: f64,
    memory_after_ratio: f64,
}

pub(crate) fn run(report: &mut Report, options: &AbuseOptions) -> Result<()> {
    let attacks = if options.attacks.is_empty() {
        Attack::all().collect()
    } else {
        options.attacks.clone()
    };
    let lasting = Duration::from_secs(options.seconds);
    let figures = attacks
        .into_iter()
        .map(|attack| under(attack, lasting, report));
    let figures = figures.collect::<Result<Vec<_>>>()?;
    let worst = |figure: fn(&Figures) -> f64| figures.iter().map(figure).fold(0.0, f64::max);
    report.figure("failed", worst(|f| f.failed), Some(Target::AtMost(0.0)));
    report.figure("slowdown", worst(|f| f.slowdown), Some(Target::AtMost(1.5)));
    report.figure(
        "peak_anon_mib",
        worst(|f| f.peak_anon_mib),
        Some(Target::AtMost(160.0)),
    );
    report.figure(
        "recovery_s",
        worst(|f| f.recovery_s),
        Some(Target::AtMost(5.0)),
    );
    report.figure(
        "memory_after_ratio",
        worst(|f| f.memory_after_ratio),
        Some(Target::AtMost(MEMORY_RATIO)),
    );
    Ok(())
}

/// One attack on a fresh cluster.
fn under(attack: Attack, lasting: Duration, report: &mut Report) -> Result<Figures> {
    let arena = Arena::new()?;
    let honest = Honest::new(&arena);
    let daemons = arena.daemons()?;
    let memory = MemorySampler::start(daemons.iter().map(|(_, pid)| *pid).collect())?;
    let outcome = std::thread::scope(|scope| {
        let pulling: Vec<_> = (0..NODES)
            .map(|node| {
                scope.spawn({
                    let honest = &honest;
                    move || honest.pull_at(node)
                })
            })
            .collect();
        let outcome = phases(attack, lasting, &arena, &honest, &memory);
        honest.stop();
        pulling
            .into_iter()
            .try_for_each(|thread| scene::join(thread.join()))?;
        outcome
    });
    let played = arena.stage.lab.explain(outcome)?;
    Ok(played.note(attack, &honest, &memory, &daemons, report))
}

/// When an attack's phases were.
struct Played {
    before: Range<Instant>,
    attack: Range<Instant>,
    tries: u64,
    refused: u64,
    load: serde_json::Value,
}

fn phases(
    attack: Attack,
    lasting: Duration,
    arena: &Arena,
    honest: &Honest<'_>,
    memory: &MemorySampler,
) -> Result<Played> {
    std::thread::sleep(WARM_UP);
    let before = Instant::now();
    std::thread::sleep(BEFORE);
    let before = before..Instant::now();
    allow_many_files()?;
    let watch = Watch::start()?;
    let onslaught = attack.start(arena)?;
    let start = Instant::now();
    std::thread::sleep(lasting);
    let (tries, refused) = onslaught.end();
    let played = Played {
        before,
        attack: start..Instant::now(),
        tries,
        refused,
        load: watch.stop()?,
    };
    while played.attack.end.elapsed() < AFTER {
        std::thread::sleep(Duration::from_millis(500));
        if played.recovery(honest).is_some()
            && played.attack.end.elapsed() > MEMORY_NOW
            && played.memory_after_ratio(memory) <= MEMORY_RATIO
        {
            break;
        }
    }
    Ok(played)
}

impl Played {
    /// How long after the attack's end each kind of pull is as fast as before at each node; `None` while one is not.
    fn recovery(&self, honest: &Honest<'_>) -> Option<Duration> {
        let of = |(node, kind)| {
            // As fast as all but the slowest tenth before.
            let before = honest.seconds(node, kind, &self.before);
            let limit = before
                .get(before.len() * 9 / 10)
                .copied()?
                .max(1.25 * median(before.iter().copied()));
            honest
                .first_within(node, kind, self.attack.end, limit)
                .map(|at| at - self.attack.end)
        };
        everywhere()
            .map(of)
            .collect::<Option<Vec<_>>>()?
            .into_iter()
            .max()
    }

    /// The memory of each daemon before the attack and now, in MiB.
    fn memory_before_and_now(&self, memory: &MemorySampler) -> HashMap<u32, (f64, f64)> {
        let now = Instant::now();
        let (before, mut after) = (
            memory.during(self.before.clone()),
            memory.during(now - MEMORY_NOW..now),
        );
        let both = |(pid, before)| Some((pid, (median(before), median(after.remove(&pid)?))));
        before.into_iter().filter_map(both).collect()
    }

    /// The most that a daemon has now of what it had before the attack.
    fn memory_after_ratio(&self, memory: &MemorySampler) -> f64 {
        let ratios = self
            .memory_before_and_now(memory)
            .into_values()
            .map(|(before, now)| now / before);
        ratios.fold(0.0, f64::max)
    }

    fn note(
        &self,
        attack: Attack,
        honest: &Honest<'_>,
        memory: &MemorySampler,
        daemons: &[(String, u32)],
        report: &mut Report,
    ) -> Figures {
        let end = Instant::now();
        let slowdown = |(node, kind)| {
            let median_in = |time| median(honest.seconds(node, kind, time));
            median_in(&self.attack) / median_in(&self.before)
        };
        // A pull that never ends within the attack leaves nothing to compare.
        let slowdowns: Vec<_> = everywhere()
            .map(slowdown)
            .map(|ratio| if ratio.is_nan() { f64::INFINITY } else { ratio })
            .collect();
        let peaks = memory.during(self.attack.start..end);
        let peak = |pid: &u32| {
            peaks
                .get(pid)
                .into_iter()
                .flatten()
                .copied()
                .fold(0.0, f64::max)
        };
        let each: serde_json::Map<_, _> = daemons
            .iter()
            .map(|(name, pid)| (name.clone(), json!(peak(pid))))
            .collect();
        // A process that has ended has no memory any more.
        let ended: Vec<_> = daemons
            .iter()
            .filter(|(_, pid)| !PathBuf::from(format!("/proc/{pid}/exe")).exists())
            .collect();
        let failures = honest.failures(self.attack.start..end);
        for failure in failures.iter().take(5) {
            eprintln!("    failed: {failure}");
        }
        let figures = Figures {
            failed: (failures.len() + ended.len()) as f64,
            slowdown: slowdowns.iter().copied().fold(0.0, f64::max),
            peak_anon_mib: daemons.iter().map(|(_, pid)| peak(pid)).fold(0.0, f64::max),
            recovery_s: self.recovery(honest).unwrap_or(AFTER).as_secs_f64(),
            memory_after_ratio: self.memory_after_ratio(memory),
        };
        let pulls = |time| {
            everywhere()
                .map(|(node, kind)| honest.seconds(node, kind, time).len())
                .sum::<usize>()
        };
        let before_and_now = self.memory_before_and_now(memory);
        let memory_of_each: serde_json::Map<_, _> = daemons
            .iter()
            .filter_map(|(name, pid)| Some((name.clone(), json!(before_and_now.get(pid)?))))
            .collect();
        let run = json!({
            "attack": attack.name(), "tries": self.tries, "refused": self.refused,
            "pulls_before": pulls(&self.before), "pulls": pulls(&self.attack), "failed": figures.failed,
            "slowdown": figures.slowdown, "slowdowns": slowdowns, "peak_anon_mib": figures.peak_anon_mib,
            "peak_of_each_mib": each, "before_and_after_of_each_mib": memory_of_each, "recovery_s": figures.recovery_s, "memory_after_ratio": figures.memory_after_ratio,
            "ended": ended.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        });
        report.run(with_load(run, self.load.clone()));
        figures
    }
}

/// Each kind of pull at each node.
fn everywhere() -> impl Iterator<Item = (usize, load::Kind)> {
    (0..NODES).flat_map(|node| KINDS.map(|kind| (node, kind)))
}

/// A cluster, its honest registry, and its attackers. Fields are dropped in order: the last one holds what the others live in.
struct Arena {
    cluster: Cluster,
    second_seed: Hawker,
    /// The attackers' own registry; it tells wrong sizes.
    evil: Origin,
    /// Hosts that are no members.
    outsiders: Vec<Host>,
    /// Reads what it is asked, and never answers.
    _silent_dns: UdpSocket,
    /// The blob that all nodes have from the beginning.
    cached: Blob,
    /// The digest of each blob that a node is going to pull.
    announced: broadcast::Sender<Digest>,
    blobs_made: AtomicU64,
    stage: Stage,
}

impl Arena {
    fn new() -> Result<Self> {
        let mut stage = Stage::new(None, 6)?;
        stage.origin_host.shape(REGISTRY_LINK, REGISTRY_LINK)?;
        let host = stage.lab.host("evil")?;
        host.shape(REGISTRY_LINK, REGISTRY_LINK)?;
        let evil = host.enter(|| Origin::start(OriginConfig::http(host.at(REGISTRY_PORT))))??;
        let silent_dns = host.enter(|| UdpSocket::bind(host.at(DNS_PORT)))??;
        let plan = ClusterPlan {
            nodes: NODES,
            scheduler_apart: true,
            plain_registries: vec![stage.registry(), evil.address().to_string()],
            name_server: Some(IpAddr::from(host.v4().context("the lab has IPv4")?)),
            ..ClusterPlan::default()
        };
        let cluster = Cluster::start(&stage.lab, &plan)?;
        let second_seed = plan.complete(HawkerPlan::seed(&stage.lab.host("seed2")?))?;
        let second_seed = second_seed.join_to(cluster.authority())?.start()?;
        let outsiders = ["outsider1", "outsider2"].map(|name| stage.lab.host(name));
        let outsiders = outsiders.into_iter().collect::<Result<Vec<_>>>()?;
        let cached = stage.fresh_blob(CACHED_BYTES)?;
        let target = stage.mirror_target(&cached);
        for node in &cluster.nodes {
            node.host().enter(|| get(node.mirror(), &target, None))??;
            committed(node, &cached)?;
        }
        Ok(Self {
            cluster,
            second_seed,
            evil,
            outsiders,
            _silent_dns: silent_dns,
            cached,
            announced: broadcast::channel(16).0,
            blobs_made: AtomicU64::new(1 << 32),
            stage,
        })
    }

    fn seeds(&self) -> [&Hawker; 2] {
        [&self.cluster.seed, &self.second_seed]
    }

    /// All daemons: the name of each one's host, and its process.
    fn daemons(&self) -> Result<Vec<(String, u32)>> {
        let all = self
            .seeds()
            .into_iter()
            .chain(&self.cluster.nodes)
            .chain(&self.cluster.scheduler);
        all.map(|one| Ok((one.host().name().to_owned(), one.pid().context("it ended")?)))
            .collect()
    }

    /// A blob that nobody has seen, at the honest registry. The other one has something else under its digest.
    fn next_blob(&self) -> Result<Blob> {
        let content =
            Content::generated(self.blobs_made.fetch_add(1, Ordering::Relaxed), NEW_BYTES);
        let blob = self.stage.origin.add_blob(REPOSITORY, content)?;
        self.evil
            .add_claimed_blob(REPOSITORY, &blob.digest, Content::generated(0, LIE_BYTES));
        // Few attacks listen.
        let _ = self.announced.send(blob.digest);
        Ok(blob)
    }
}

/// Attackers have thousands of connections in this process. Daemons that are there already keep their own limit.
fn allow_many_files() -> Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    Ok(setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    )?)
}
