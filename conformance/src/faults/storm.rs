//! Plays a plan: a cluster on shaped links, its members' troubles, and its clients.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::process::Signal;

use super::books::{Books, Kind, Violation, Why};
use super::client::{Client, Known};
use super::schedule::{Fault, Member, NODES, Plan, Pull, Trouble};
use crate::lab::{Hawker, Host, Mbit};
use crate::origin::{self, Content, Origin, Rule};
use crate::rogue::{Conduct, Rogue};
use crate::scene::{self, REPOSITORY, Scene, committed_path, partial_path};

/// Slow enough that pulls are under way when something breaks, fast enough that a run is short.
const LINK: Mbit = Mbit(50);
/// The log level that explains a failed run.
const LOG_LEVEL: &str =
    "info,hawker_proxy=debug,hawker_tracker=debug,hawker_identity=debug,hawker_credentials=debug";
/// How many wrong bytes a lying origin sends.
const LIE_BYTES: u64 = 100;

/// The result of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The forbidden events that happened.
    pub violations: Vec<Violation>,
    /// How long each pull took.
    pub pulls: Vec<Duration>,
    /// Setting the scene included.
    pub total: Duration,
    /// The folder of the daemons' logs, if anything was violated.
    pub logs: Option<PathBuf>,
}

impl Outcome {
    /// How many violations are of this kind.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        self.violations
            .iter()
            .filter(|violation| violation.kind == kind)
            .count()
    }
}

/// Plays `plan` in a lab of its own. When a rule is broken the daemons' logs, the plan and the violations go into a folder
/// below `logs`.
///
/// # Errors
/// When the cluster cannot be set up, or the lab itself fails.
pub fn run(plan: &Plan, logs: &Path) -> Result<Outcome> {
    let start = Instant::now();
    let mut outcome = None;
    let scene = scene::Plan::nodes(NODES)
        .link(LINK)
        .scheduler_apart()
        .flag("--log-level", LOG_LEVEL);
    scene.play(|scene| {
        outcome = Some(play(plan, scene, logs)?);
        Ok(())
    })?;
    let (violations, pulls, logs) = outcome.context("nothing was played")?;
    Ok(Outcome {
        violations,
        pulls,
        total: start.elapsed(),
        logs,
    })
}

type Played = (Vec<Violation>, Vec<Duration>, Option<PathBuf>);

fn play(plan: &Plan, scene: &mut Scene, logs: &Path) -> Result<Played> {
    let known = (0..)
        .zip(&plan.sizes)
        .map(|(index, size)| {
            let content = Content::generated(plan.seed.wrapping_mul(1000) + index as u64, *size);
            Ok(Known {
                index,
                blob: scene.origin.add_blob(REPOSITORY, content.clone())?,
                content,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    // It lies as long as it lives: to the end of the run.
    let _rogue = plan
        .rogue
        .map(|conduct| rogue(scene, conduct, &known[0]))
        .transpose()?;
    let books = Books::default();
    let mut pulls = storm(plan, scene, &known, &books)?;
    let calm = (0..NODES).flat_map(|node| {
        (0..known.len()).map(move |blob| Pull {
            at_ms: 0,
            node,
            blob,
            range: None,
        })
    });
    pulls.extend(all(
        calm.map(|pull| client(scene, &known, &books, &pull)),
        &[],
    ));
    check_daemons(scene, &books);
    let violations = books.violations();
    let kept = if violations.is_empty() {
        None
    } else {
        Some(keep(plan, scene, &violations, logs)?)
    };
    Ok((violations, pulls, kept))
}

fn rogue(scene: &Scene, conduct: Conduct, known: &Known) -> Result<Rogue> {
    let host = scene.lab.host("rogue")?;
    host.shape(LINK, LINK)?;
    let lies = matches!(conduct, Conduct::WrongBytes | Conduct::SignsLies);
    let content = if lies {
        Content::generated(u64::MAX, known.blob.size_bytes)
    } else {
        known.content.clone()
    };
    Rogue::start(
        &host,
        scene.cluster.authority(),
        "peer",
        conduct,
        &known.blob,
        &content,
    )
}

fn client<'a>(scene: &Scene, known: &'a [Known], books: &'a Books, pull: &Pull) -> Client<'a> {
    let (node, known) = (&scene.cluster.nodes[pull.node], &known[pull.blob]);
    let request = node.request(scene.registry(), &scene::blob_path(&known.blob));
    let range = pull.range.clone();
    Client {
        books,
        node: pull.node,
        host: node.host().clone(),
        request,
        known,
        range,
    }
}

/// All clients at once, each from its own moment on; how long each took.
fn all<'a>(clients: impl Iterator<Item = Client<'a>>, at_ms: &[u64]) -> Vec<Duration> {
    let delays = at_ms
        .iter()
        .copied()
        .chain(std::iter::repeat(0))
        .map(Duration::from_millis);
    std::thread::scope(|scope| {
        let pulls: Vec<_> = clients
            .zip(delays)
            .map(|(client, delay)| {
                scope.spawn(move || {
                    std::thread::sleep(delay);
                    client.run()
                })
            })
            .collect();
        pulls
            .into_iter()
            .filter_map(|pull| pull.join().ok())
            .collect()
    })
}

/// Troubles and pulls at once, until all are over.
fn storm(plan: &Plan, scene: &mut Scene, known: &[Known], books: &Books) -> Result<Vec<Duration>> {
    let clients: Vec<_> = plan
        .pulls
        .iter()
        .map(|pull| client(scene, known, books, pull))
        .collect();
    let at_ms: Vec<u64> = plan.pulls.iter().map(|pull| pull.at_ms).collect();
    let Scene {
        cluster,
        origin,
        origin_host,
        ..
    } = scene;
    let daemons = cluster
        .nodes
        .iter_mut()
        .enumerate()
        .map(|(number, node)| (Member::Node(number), node));
    let daemons = daemons.chain([(Member::Seed, &mut cluster.seed)]).chain(
        cluster
            .scheduler
            .as_mut()
            .map(|scheduler| (Member::Scheduler, scheduler)),
    );
    let mut victims: Vec<_> = daemons
        .map(|(member, daemon)| Victim {
            member,
            host: daemon.host().clone(),
            body: Body::Daemon(daemon),
        })
        .collect();
    victims.push(Victim {
        member: Member::Origin,
        host: origin_host.clone(),
        body: Body::Origin(origin),
    });
    let start = Instant::now();
    std::thread::scope(|scope| {
        let troubled: Vec<_> = victims
            .into_iter()
            .map(|victim| scope.spawn(move || victim.suffer(&plan.troubles, start, known, books)))
            .collect();
        let pulls = all(clients.into_iter(), &at_ms);
        troubled
            .into_iter()
            .try_for_each(|victim| scene::join(victim.join()))?;
        Ok(pulls)
    })
}

/// A member, and what can be done to it.
struct Victim<'a> {
    member: Member,
    host: Host,
    body: Body<'a>,
}

enum Body<'a> {
    Daemon(&'a mut Hawker),
    Origin(&'a Origin),
}

/// The way to mend a fault.
enum Mend {
    Restart(Option<PathBuf>),
    Continue,
    Plug,
    Shape,
    Behave(u64),
    Nothing,
}

impl Victim<'_> {
    /// All its own troubles, one after the other.
    fn suffer(
        mut self,
        troubles: &[Trouble],
        start: Instant,
        known: &[Known],
        books: &Books,
    ) -> Result<()> {
        let until = |ms: u64| {
            std::thread::sleep(
                (start + Duration::from_millis(ms)).saturating_duration_since(Instant::now()),
            );
        };
        let member = self.member;
        for trouble in troubles.iter().filter(|trouble| trouble.member == member) {
            until(trouble.from_ms);
            let why = match trouble.fault {
                Fault::Slow { .. } | Fault::Rots { .. } => Why::Slow,
                _ => Why::Broken,
            };
            let span = books.begin(member, why);
            let mend = self.begin(&trouble.fault, known, books)?;
            until(trouble.until_ms);
            if let Err(error) = self.mend(mend) {
                books.violated(
                    Kind::Daemon,
                    format!("{member:?} after {:?}: {error:#}", trouble.fault),
                );
            }
            books.end(span);
        }
        Ok(())
    }

    fn begin(&mut self, fault: &Fault, known: &[Known], books: &Books) -> Result<Mend> {
        match (fault, &mut self.body) {
            (Fault::Unplugged, _) => self.host.unplug().map(|()| Mend::Plug),
            (Fault::Slow { rate_mbit }, _) => self
                .host
                .shape(Mbit(*rate_mbit), Mbit(*rate_mbit))
                .map(|()| Mend::Shape),
            (Fault::Killed { rots }, Body::Daemon(daemon)) => {
                daemon.kill()?;
                let file = rots.and_then(|blob| rotting(self.member, daemon, &known[blob], books));
                Ok(Mend::Restart(file))
            }
            (Fault::Stopped, Body::Daemon(daemon)) => daemon
                .process()?
                .signal(Signal::STOP)
                .map(|()| Mend::Continue),
            (Fault::Rots { blob }, Body::Daemon(daemon)) => {
                if let Some(file) = rotting(self.member, daemon, &known[*blob], books) {
                    rot(&file);
                }
                Ok(Mend::Nothing)
            }
            (Fault::Misbehaves(wrong), Body::Origin(origin)) => {
                Ok(Mend::Behave(origin.add_fault(Rule::always(wrong.clone()))))
            }
            (Fault::Lies { blob, at_permille }, Body::Origin(origin)) => {
                let blob = &known[*blob];
                books.lied(blob.index);
                let offset = blob.blob.size_bytes * at_permille / 1000;
                let wrong = origin::Fault::WrongBytes {
                    offset,
                    length: LIE_BYTES,
                };
                Ok(Mend::Behave(
                    origin.add_fault(Rule::always(wrong).on(blob.blob.digest)),
                ))
            }
            (fault, _) => anyhow::bail!("{:?} cannot suffer {fault:?}", self.member),
        }
    }

    fn mend(&mut self, mend: Mend) -> Result<()> {
        match (mend, &mut self.body) {
            (Mend::Plug, _) => self.host.plug(),
            (Mend::Shape, _) => self.host.shape(LINK, LINK),
            (Mend::Restart(rotten), Body::Daemon(daemon)) => {
                rotten.iter().for_each(|file| rot(file));
                daemon.restart()
            }
            (Mend::Continue, Body::Daemon(daemon)) => daemon.process()?.signal(Signal::CONT),
            (Mend::Behave(id), Body::Origin(origin)) => {
                origin.remove_fault(id);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The file in which a daemon has the blob, or what it has of it; noted in the books before anything happens to it.
fn rotting(member: Member, daemon: &Hawker, known: &Known, books: &Books) -> Option<PathBuf> {
    let paths = [
        committed_path(daemon, &known.blob),
        partial_path(daemon, &known.blob),
    ];
    let file = paths.into_iter().find(|path| path.is_file())?;
    books.rotten(member, known.index);
    Some(file)
}

/// The file may have been renamed, or evicted, a moment ago: then nothing rots.
fn rot(file: &Path) {
    let _ = scene::rot(file);
}

/// Rule 4, for those that ended by themselves.
fn check_daemons(scene: &mut Scene, books: &Books) {
    let cluster = &mut scene.cluster;
    for daemon in cluster
        .nodes
        .iter_mut()
        .chain([&mut cluster.seed])
        .chain(cluster.scheduler.as_mut())
    {
        let name = daemon.host().name().to_owned();
        if !matches!(
            daemon.process().and_then(|process| process.try_wait()),
            Ok(None)
        ) {
            books.violated(Kind::Daemon, format!("{name} has ended"));
        }
        if let Some(line) = daemon
            .log()
            .lines()
            .find(|line| line.contains("panicked at"))
        {
            books.violated(Kind::Daemon, format!("{name}: {line}"));
        }
    }
}

/// Puts all that is known of a failed run into a folder of its own.
fn keep(plan: &Plan, scene: &Scene, violations: &[Violation], logs: &Path) -> Result<PathBuf> {
    let dir = logs.join(format!("seed-{}", plan.seed));
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    scene.lab.copy_logs(&dir)?;
    let found: String = violations
        .iter()
        .map(|v| format!("{:?}: {}\n", v.kind, v.what))
        .collect();
    std::fs::write(dir.join("plan"), format!("{plan}\n{found}"))?;
    Ok(dir)
}
