//! Daemons die in the middle of pulls: the pulls finish, and what is kept is right.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{End, Hawker, HawkerPlan, Host, Lab, Mbit, Request, TokenFrom};
use hawker_conformance::origin::Blob;
use hawker_conformance::scene::{Plan, Scene, blob_path, join, right, until, until_committed};

use hawker_oci::digest::{Algorithm, Digest};

/// At 100 Mbit/s this takes about two seconds to arrive: enough to die in.
const SIZE_BYTES: u64 = 24 << 20;
const LINK: Mbit = Mbit(100);
/// When the killing starts: some pieces are there, most are not.
const SOME_BYTES: u64 = 4 << 20;

/// Waits until a node has received something of what it is pulling.
fn until_under_way(node: &Hawker) -> Result<()> {
    until(Duration::from_secs(10), "the first pieces", || {
        let bytes = node.status()?.bytes;
        Ok(bytes.received_origin + bytes.received_peers + bytes.received_seeds > SOME_BYTES)
    })
}

/// A client that, like containerd, asks for the rest after a short body or a refused connection, until it has all.
fn resuming_client(request: impl Fn(usize) -> Request, host: &Host, blob: &Blob) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(40);
    let mut body = Vec::new();
    while (body.len() as u64) < blob.size_bytes {
        ensure!(Instant::now() < deadline, "{} bytes after 40 s", body.len());
        match request(body.len()).send(host) {
            Ok(answer) if answer.status == 206 => body.extend(answer.body),
            _ => std::thread::sleep(Duration::from_millis(100)),
        }
    }
    let got = Digest::of(Algorithm::Sha256, &body);
    ensure!(got == blob.digest, "{got} for {}", blob.digest);
    Ok(())
}

#[test]
fn a_node_killed_in_mid_pull_goes_on_from_its_pieces() -> Result<()> {
    Plan::nodes(1).link(LINK).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let request = scene.request(scene.node(), &blob);
        let host = scene.node().host().clone();
        let client = std::thread::spawn(move || request.send(&host));
        until_under_way(scene.node())?;
        scene.cluster.nodes[0].kill()?;
        // This client may have seen the death in any way, but no complete blob.
        ensure!(join(client.join()).is_ok_and(|answer| answer.end != End::Complete));
        scene.cluster.nodes[0].restart()?;
        let kept = scene.node().status()?.store;
        ensure!(kept.partials == 1, "{kept:?}");
        scene.pull(scene.node(), &blob)?;
        let bytes = scene.node().status()?.bytes;
        let received = bytes.received_origin + bytes.received_peers + bytes.received_seeds;
        ensure!(
            received <= SIZE_BYTES - SOME_BYTES / 2,
            "it fetched verified pieces again: {bytes:?}"
        );
        until_committed(scene.node(), &blob)?;
        scene.pull(scene.node(), &blob).map(drop)
    })
}

#[test]
fn a_client_survives_its_node_s_restart_by_resuming() -> Result<()> {
    Plan::nodes(1).link(LINK).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let host = scene.node().host().clone();
        let request = scene.node().request(scene.registry(), &blob_path(&blob));
        let rest = move |from: usize| request.clone().header("range", format!("bytes={from}-"));
        let client = std::thread::spawn(move || resuming_client(rest, &host, &blob));
        until_under_way(scene.node())?;
        scene.cluster.nodes[0].kill()?;
        scene.cluster.nodes[0].restart()?;
        join(client.join())
    })
}

#[test]
fn a_seed_killed_in_mid_pull_does_not_end_the_pull() -> Result<()> {
    Plan::nodes(2).link(LINK).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let requests: Vec<_> = scene
            .cluster
            .nodes
            .iter()
            .map(|node| (scene.request(node, &blob), node.host().clone()))
            .collect();
        let clients: Vec<_> = requests
            .into_iter()
            .map(|(request, host)| std::thread::spawn(move || right(request.send(&host)?, &blob)))
            .collect();
        until_under_way(scene.node())?;
        scene.cluster.seed.kill()?;
        for client in clients {
            join(client.join())?;
        }
        for node in &scene.cluster.nodes {
            until_committed(node, &blob)?;
        }
        scene.cluster.seed.restart()?;
        scene.pull(&scene.cluster.seed, &blob).map(drop)
    })
}

#[test]
fn a_seed_restarted_in_mid_pull_serves_on_and_the_origin_gives_no_second_copy() -> Result<()> {
    Plan::nodes(2).link(LINK).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &blob)?;
        until_committed(&scene.cluster.seed, &blob)?;
        scene.cluster.seed.kill()?;
        scene.cluster.seed.restart()?;
        scene.pull(&scene.cluster.nodes[1], &blob)?;
        let copies = scene.origin_copies(&blob);
        ensure!(copies < 1.02, "{copies} copies");
        Ok(())
    })
}

#[test]
fn with_seed_and_scheduler_dead_pulls_go_on() -> Result<()> {
    Plan::nodes(2).play(|scene| {
        let early = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &early)?;
        scene.cluster.seed.kill()?;
        let late = scene.blob(SIZE_BYTES)?;
        for (node, blob) in [(0, &late), (1, &late), (1, &early)] {
            let answer = scene.pull(&scene.cluster.nodes[node], blob)?;
            ensure!(
                answer.total < Duration::from_secs(20),
                "node {node} took {:?}",
                answer.total
            );
        }
        Ok(())
    })
}

#[test]
fn a_node_that_starts_while_the_scheduler_is_dead_serves() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        scene.cluster.seed.kill()?;
        scene.cluster.nodes[0].kill()?;
        scene.cluster.nodes[0].restart()?;
        let blob = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &blob).map(drop)
    })
}

#[test]
fn nodes_announce_again_what_they_hold_after_the_scheduler_restarts() -> Result<()> {
    Plan::nodes(2).scheduler_apart().play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &blob)?;
        until_committed(scene.node(), &blob)?;

        scene
            .cluster
            .scheduler
            .as_mut()
            .context("it is apart")?
            .kill()?;
        // A pull that is under way does not notice.
        let during = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &during)?;
        scene
            .cluster
            .scheduler
            .as_mut()
            .context("it is apart")?
            .restart()?;
        for node in &scene.cluster.nodes {
            node.wait_status(Duration::from_secs(20), |status| {
                status.schedulers.iter().any(|s| s.connected)
            })?;
        }
        // Only node1 has it now, and only the scheduler can tell node2 so.
        scene.cluster.seed.kill()?;
        std::thread::sleep(Duration::from_secs(2));
        let before = scene.origin_bytes(&blob);
        scene.pull(&scene.cluster.nodes[1], &blob)?;
        let again = scene.origin_bytes(&blob) - before;
        ensure!(
            again < SIZE_BYTES / 10,
            "the origin was asked again for {again} bytes"
        );
        ensure!(scene.cluster.nodes[1].status()?.bytes.received_peers > SIZE_BYTES * 9 / 10);
        Ok(())
    })
}

#[test]
fn a_parent_killed_in_mid_pull_never_shows() -> Result<()> {
    Plan::nodes(3).link(LINK).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let clients: Vec<_> = scene.cluster.nodes[..2]
            .iter()
            .map(|node| (scene.request(node, &blob), node.host().clone()))
            .map(|(request, host)| std::thread::spawn(move || right(request.send(&host)?, &blob)))
            .collect();
        let third = scene.request(&scene.cluster.nodes[2], &blob);
        let host = scene.cluster.nodes[2].host().clone();
        let victim = std::thread::spawn(move || third.send(&host));
        until_under_way(scene.node())?;
        scene.cluster.nodes[2].kill()?;
        for client in clients {
            join(client.join())?;
        }
        drop(victim.join());
        let copies = scene.origin_copies(&blob);
        ensure!(copies < 1.02, "{copies} copies");
        Ok(())
    })
}

#[test]
fn a_parent_whose_cable_is_pulled_never_shows() -> Result<()> {
    Plan::nodes(2).link(LINK).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let request = scene.request(scene.node(), &blob);
        let host = scene.node().host().clone();
        let client = std::thread::spawn(move || right(request.send(&host)?, &blob));
        until_under_way(scene.node())?;
        scene.cluster.seed.host().unplug()?;
        let answer = join(client.join())?;
        ensure!(
            answer.total < Duration::from_secs(40),
            "it took {:?}",
            answer.total
        );
        Ok(())
    })
}

#[test]
fn a_blob_s_last_bytes_come_from_the_origin_when_the_seed_is_gone_that_gave_a_node_its_table()
-> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let part = |scene: &Scene, range: &str| {
            let answer = scene
                .request(scene.node(), &blob)
                .header("range", range)
                .send(scene.node().host())?;
            ensure!(
                answer.status == 206 && answer.end == End::Complete,
                "{range}: {answer:?}"
            );
            Ok(answer.total)
        };
        part(scene, "bytes=0-9")?;
        until_committed(&scene.cluster.seed, &blob)?;
        // Now the table is sealed, and the node gets it with the next piece.
        part(scene, "bytes=5000000-5000009")?;
        scene.cluster.seed.kill()?;
        let took = part(scene, "bytes=-10")?;
        ensure!(took < Duration::from_secs(25), "it took {took:?}");
        Ok(())
    })
}

#[test]
fn a_token_is_spent_at_first_use_and_a_restart_needs_none() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let up = HawkerPlan::up(&lab.host("seed")?).start()?;
        let token = up.token("peer")?;
        let mut first = HawkerPlan::proxy(&lab.host("one")?)
            .join(up.scheduler(), &token, TokenFrom::Stdin)
            .start()?;
        let (code, said) = HawkerPlan::proxy(&lab.host("two")?)
            .join(up.scheduler(), &token, TokenFrom::File)
            .refused(Duration::from_secs(20))?;
        ensure!(
            code != 0 && said.to_lowercase().contains("token"),
            "exit {code}: {said}"
        );
        ensure!(!said.contains(&token), "the token is in the log");
        first.kill()?;
        first.restart()?;
        first.wait_status(Duration::from_secs(10), |status| {
            status.schedulers.iter().any(|s| s.connected)
        })?;
        let third = HawkerPlan::proxy(&lab.host("three")?).join(
            up.scheduler(),
            &up.token("peer")?,
            TokenFrom::Environment,
        );
        drop(third.start()?);
        Ok(())
    })())
}
