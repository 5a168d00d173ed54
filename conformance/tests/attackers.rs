//! Members and strangers that flood others: honest pulls go on, memory stays bounded, and all of it ends with them.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::attacker::{Attacker, Line, interest, invented};
use hawker_conformance::lab::{Hawker, HawkerPlan};
use hawker_conformance::origin::{Content, Fault, Rule};
use hawker_conformance::scene::{Plan, Scene, until};

/// A repository of the attacker's choice, at a registry that the cluster may ask.
const THEIRS: &str = "attacker/app";
const SIZE_BYTES: u64 = (8 << 20) + 4321;
/// An honest pull may take so long on a machine that does other things as well; a peer that is waited for in vain costs ten seconds.
const SOON: Duration = Duration::from_secs(6);
/// Anonymous memory of a daemon at most.
const MEMORY_BYTES: u64 = 160 << 20;
const WRITE: Duration = Duration::from_secs(3);

/// Pulls of blobs that nobody has seen, through a node.
fn honest_pulls_go_on(scene: &Scene, what: &str) -> Result<()> {
    for _ in 0..4 {
        let blob = scene.blob(SIZE_BYTES)?;
        let answer = scene.pull(scene.node(), &blob)?;
        ensure!(
            answer.total < SOON,
            "{what}: a pull took {:?}",
            answer.total
        );
    }
    Ok(())
}

fn open_files(daemon: &Hawker) -> Result<usize> {
    let pid = daemon.pid().context("it has ended")?;
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

fn second_seed(scene: &Scene) -> Result<Hawker> {
    let host = scene.lab.host("seed2")?;
    let plan = HawkerPlan::seed(&host).plain_registry(scene.origin.address());
    let seed = plan.join_to(&scene.cluster.seed)?.start()?;
    let known = seed.status()?.peer_id;
    scene
        .node()
        .wait_status(Duration::from_secs(10), |status| {
            status.members.iter().any(|member| member.peer_id == known)
        })?;
    Ok(seed)
}

#[test]
fn huge_blobs_of_one_member_slow_nobody_down_and_end_with_it() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let other = second_seed(scene)?;
        let attacker = Attacker::join(&scene.lab.host("attacker")?, &scene.cluster.seed)?;
        for n in 0..6 {
            let content = Content::generated(u64::from(n), 2 << 40);
            scene.origin.add_claimed_blob(THEIRS, &invented(n), content);
        }
        let slow = Fault::SlowBody {
            bytes_per_s: 1 << 20,
        };
        scene.origin.add_fault(Rule {
            path_contains: THEIRS.into(),
            ..Rule::always(slow)
        });
        let registry = scene.registry();
        let mut lines = Vec::new();
        for seed in [&scene.cluster.seed, &other] {
            let mut line = attacker.connect(seed)?;
            (0..6).try_for_each(|n| line.say(&interest(invented(n), &registry, THEIRS), WRITE))?;
            lines.push(line);
        }
        std::thread::sleep(Duration::from_secs(2));
        honest_pulls_go_on(scene, "while it waits")?;
        drop(lines);
        drop(attacker);
        let is_rid = |seed: &Hawker| -> Result<bool> {
            Ok(seed
                .status()?
                .tasks
                .iter()
                .all(|task| task.size_bytes < 1 << 40 || task.state == "paused"))
        };
        until(Duration::from_secs(15), "the end of its downloads", || {
            Ok(is_rid(&scene.cluster.seed)? && is_rid(&other)?)
        })?;
        honest_pulls_go_on(scene, "after it has gone")
    })
}

#[test]
fn tables_of_invented_digests_take_no_memory() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let attacker = Attacker::join(&scene.lab.host("attacker")?, &scene.cluster.seed)?;
        let mut line = attacker.connect(&scene.cluster.seed)?;
        let registry = scene.registry();
        let mut most_bytes = 0;
        for n in 0..150 {
            let said = line
                .say(&interest(invented(n), &registry, THEIRS), WRITE)
                .and_then(|()| line.say(&attacker.table(invented(n), 2 << 40), WRITE));
            most_bytes = most_bytes.max(scene.cluster.seed.anonymous_bytes()?);
            if said.is_err() {
                // The seed reads no more from it for now.
                break;
            }
        }
        honest_pulls_go_on(scene, "beside the tables")?;
        most_bytes = most_bytes.max(scene.cluster.seed.anonymous_bytes()?);
        ensure!(
            most_bytes < MEMORY_BYTES,
            "the seed took {} MiB",
            most_bytes >> 20
        );
        Ok(())
    })
}

#[test]
fn thousands_of_interests_lead_to_few_requests_and_files() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let attacker = Attacker::join(&scene.lab.host("attacker")?, &scene.cluster.seed)?;
        let mut line = attacker.connect(&scene.cluster.seed)?;
        let registry = scene.registry();
        let hang = Rule {
            path_contains: THEIRS.into(),
            ..Rule::always(Fault::Hang)
        };
        scene.origin.add_fault(hang);
        // An address that the configuration does not name is not asked at all.
        let flood = |line: &mut Line, first: u32, registry: &str| {
            let start = Instant::now();
            (first..first + 3000)
                .take_while(|n| {
                    start.elapsed() < Duration::from_secs(8)
                        && line
                            .say(&interest(invented(*n), registry, THEIRS), WRITE)
                            .is_ok()
                })
                .count()
        };
        let said = flood(&mut line, 0, &registry)
            + flood(&mut line, 3000, &registry.replace(":5000", ":5001"));
        honest_pulls_go_on(scene, "beside the interests")?;
        let asked = scene
            .origin
            .log()
            .iter()
            .filter(|entry| entry.target.contains(THEIRS))
            .count();
        ensure!(said > 1000, "only {said} were said");
        ensure!(asked <= 100, "the registry was asked {asked} times");
        ensure!(line.refusals() > 300, "{} were refused", line.refusals());
        let files = open_files(&scene.cluster.seed)?;
        ensure!(files < 400, "the seed has {files} files open");
        Ok(())
    })
}

#[test]
fn connections_of_one_member_and_of_strangers_keep_nobody_out() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let host = scene.lab.host("attacker")?;
        let attacker = Attacker::join(&host, &scene.cluster.seed)?;
        let mut lines = Vec::new();
        for _ in 0..40 {
            // Past the fourth they end at once, or are not even greeted.
            lines.extend(attacker.connect(&scene.cluster.seed).ok());
        }
        std::thread::sleep(Duration::from_millis(500));
        let open = lines.iter().filter(|line| !line.is_over()).count();
        ensure!(open <= 4, "{open} are open");
        let address = scene.cluster.seed.peer();
        let idle: Vec<TcpStream> = host.enter(|| {
            (0..512)
                .filter_map(|_| TcpStream::connect(address).ok())
                .collect()
        })?;
        let node = &mut scene.cluster.nodes[0];
        node.kill()?;
        node.restart()?;
        honest_pulls_go_on(scene, "beside idle connections")?;
        let blob = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &blob)?;
        let from_seeds = scene.node().metric("hawker_peers_connected", &[])?;
        ensure!(
            from_seeds >= 1.0,
            "the node has no connection with the seed"
        );
        drop(idle);
        Ok(())
    })
}

#[test]
fn a_member_that_breaks_the_protocol_is_refused_and_logged_once() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let attacker = Attacker::join(&scene.lab.host("attacker")?, &scene.cluster.seed)?;
        let mut line = attacker.connect(&scene.cluster.seed)?;
        line.write(&[0, 0, 0, 4, 1, 0xff, 0xff, 0xff], WRITE)?;
        until(SOON, "the end of its connection", || Ok(line.is_over()))?;
        for _ in 0..50 {
            ensure!(
                attacker.connect(&scene.cluster.seed).is_err(),
                "it was let in again"
            );
        }
        let lines = scene
            .cluster
            .seed
            .log()
            .lines()
            .filter(|line| line.contains("protocol"))
            .count();
        ensure!((1..=20).contains(&lines), "{lines} lines");
        honest_pulls_go_on(scene, "beside a refused member")
    })
}
