//! Members that leave for good, and members whose identity is of no use any more, with real daemons.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{Hawker, run};
use hawker_conformance::scene::{Plan, Scene, until};

const SIZE_BYTES: u64 = (4 << 20) + 321;
/// How long a removal may take until everybody refuses the member.
const REFUSED_WITHIN: Duration = Duration::from_secs(10);

fn member(authority: &Hawker, args: &[&str]) -> Result<String> {
    let mut command = authority.cli()?;
    run(command
        .arg("member")
        .args(args)
        .arg("--data-dir")
        .arg(authority.data_dir()))
}

fn is_connected(node: &Hawker) -> Result<bool> {
    Ok(node
        .status()?
        .schedulers
        .iter()
        .any(|scheduler| scheduler.connected))
}

/// The node serves, by itself.
fn serves(scene: &Scene, node: &Hawker) -> Result<()> {
    let blob = scene.blob(SIZE_BYTES)?;
    scene.pull(node, &blob).map(drop)
}

/// The second node, which was removed, says so in its status.
fn says_why_it_is_alone(scene: &Scene) -> Result<()> {
    // As long as the longest wait between two tries to connect.
    until(
        Duration::from_secs(30),
        "the removed member says why it is alone",
        || {
            let schedulers = scene.cluster.nodes[1].status()?.schedulers;
            Ok(schedulers
                .iter()
                .any(|one| !one.connected && one.problem.contains("delete its identity folder")))
        },
    )
}

#[test]
fn a_removed_member_is_refused_within_seconds_and_after_restarts() -> Result<()> {
    Plan::nodes(2).play(|scene| {
        let bad = scene.cluster.nodes[1].status()?;
        let seed = &scene.cluster.seed;
        let before = member(seed, &["ls"])?;
        let line = before
            .lines()
            .find(|line| line.contains(&bad.peer_id))
            .context("it is listed")?;
        ensure!(
            line.contains("connected") && line.contains(&bad.name) && line.contains(":6501"),
            "{before}"
        );

        member(seed, &["rm", &bad.peer_id])?;
        let begun = Instant::now();
        until(REFUSED_WITHIN, "the removed member's streams end", || {
            Ok(!is_connected(&scene.cluster.nodes[1])?)
        })?;
        until(REFUSED_WITHIN, "the others know it no more", || {
            let others = [&scene.cluster.nodes[0], &scene.cluster.seed];
            others.iter().try_fold(true, |so_far, node| {
                let list = node.data_dir();
                let saved = [
                    list.join("identity/removed.json"),
                    list.join("proxy/identity/removed.json"),
                ];
                let knows = saved
                    .iter()
                    .filter_map(|file| std::fs::read_to_string(file).ok())
                    .any(|text| text.contains(&bad.peer_id));
                Ok(so_far && knows)
            })
        })?;
        ensure!(
            begun.elapsed() < REFUSED_WITHIN,
            "it took {:?}",
            begun.elapsed()
        );
        ensure!(
            member(&scene.cluster.seed, &["ls"])?.contains("removed"),
            "it is listed as removed"
        );
        says_why_it_is_alone(scene)?;
        ensure!(
            scene.cluster.nodes[1]
                .log()
                .contains("was removed from the cluster"),
            "the log says it too"
        );
        // It serves its own runtimes alone.
        serves(scene, &scene.cluster.nodes[1])?;
        serves(scene, &scene.cluster.nodes[0])?;

        for restarted in ["the authority", "the member"] {
            let daemon = if restarted == "the member" {
                &mut scene.cluster.nodes[1]
            } else {
                &mut scene.cluster.seed
            };
            daemon.terminate(Duration::from_secs(60))?;
            daemon.restart()?;
            says_why_it_is_alone(scene)
                .with_context(|| format!("after a restart of {restarted}"))?;
        }
        until(Duration::from_secs(30), "the other node is back", || {
            is_connected(&scene.cluster.nodes[0])
        })?;
        let error = member(&scene.cluster.seed, &["rm", "nobody-has-this-name"]);
        ensure!(error.is_err(), "an unknown name is refused");
        Ok(())
    })
}

#[test]
fn a_node_with_a_damaged_identity_goes_on_alone_and_says_so() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let key = scene.node().data_dir().join("identity/key.pem");
        for damage in ["cut", "gone"] {
            scene.cluster.nodes[0].terminate(Duration::from_secs(60))?;
            match damage {
                "cut" => std::fs::write(&key, "-----BEGIN PRIVATE KEY-----\nMC4CAQ")?,
                _ => std::fs::remove_file(&key)?,
            }
            scene.cluster.nodes[0].restart()?;
            let status = scene.node().status()?;
            // The plan's token is spent: the authority refuses it, and the node stays alone.
            ensure!(
                status.ready && status.problem.contains("goes on alone"),
                "{damage}: {status:?}"
            );
            ensure!(
                scene.node().log().contains("goes on alone"),
                "{damage}: the log says it"
            );
            serves(scene, scene.node())?;
        }
        Ok(())
    })
}

#[test]
fn a_damaged_authority_ends_neither_the_mirror_nor_the_cluster_s_pulls() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let authority = scene.cluster.seed.data_dir().join("authority");
        let (key, certificate) = (authority.join("key.pem"), authority.join("certificate.pem"));
        let backups = [
            (key.clone(), std::fs::read(&key)?),
            (certificate.clone(), std::fs::read(&certificate)?),
        ];
        for damage in ["key cut", "key gone", "certificate gone"] {
            scene.cluster.seed.terminate(Duration::from_secs(60))?;
            match damage {
                "key cut" => std::fs::write(&key, "-----BEGIN PRIVATE KEY-----\nMC4CAQ")?,
                "key gone" => std::fs::remove_file(&key)?,
                _ => std::fs::remove_file(&certificate)?,
            }
            scene.cluster.seed.restart()?;
            let status = scene.cluster.seed.status()?;
            ensure!(
                status.ready && status.problem.contains("is damaged"),
                "{damage}: {status:?}"
            );
            serves(scene, &scene.cluster.seed)?;
            serves(scene, scene.node())?;
            for (file, bytes) in &backups {
                std::fs::write(file, bytes)?;
            }
        }
        scene.cluster.seed.terminate(Duration::from_secs(60))?;
        scene.cluster.seed.restart()?;
        ensure!(
            scene.cluster.seed.status()?.problem.is_empty(),
            "restored from the backup"
        );
        until(
            Duration::from_secs(30),
            "the node finds its scheduler again",
            || is_connected(scene.node()),
        )
    })
}
