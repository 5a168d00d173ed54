//! A registry's word that it has some content opens nothing that came from elsewhere: it must prove that it has it.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use anyhow::{Result, ensure};
use hawker_conformance::lab::{Cluster, ClusterPlan, Hawker, Host, Lab};
use hawker_conformance::origin::{Blob, Content, Origin};
use hawker_conformance::scene::{
    REPOSITORY, Scene, blob_path, right, start_origin, until_committed,
};

const SIZE_BYTES: u64 = (8 << 20) + 4321;

/// A registry that says yes to every HEAD and has nothing.
fn start_claimant(host: &Host) -> Result<SocketAddr> {
    let address = host.at(5000);
    let listener = host.enter(|| TcpListener::bind(address))??;
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut head = Vec::new();
                let mut byte = [0];
                while stream.read_exact(&mut byte).is_ok() {
                    head.push(byte[0]);
                    if !head.ends_with(b"\r\n\r\n") {
                        continue;
                    }
                    let text = String::from_utf8_lossy(&head).into_owned();
                    let target = text.split(' ').nth(1).unwrap_or_default();
                    let digest = target.rsplit('/').next().unwrap_or_default();
                    let answer = match text.starts_with("HEAD ") {
                        true => {
                            format!("HTTP/1.1 200 OK\r\nDocker-Content-Digest: {digest}\r\n\r\n")
                        }
                        false => "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}".to_owned(),
                    };
                    if stream.write_all(answer.as_bytes()).is_err() {
                        return;
                    }
                    head.clear();
                }
            });
        }
    });
    Ok(address)
}

struct World {
    scene: Scene,
    claimant: SocketAddr,
    /// Another registry that has the same blobs.
    second: Origin,
}

fn world(nodes: usize, play: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    let lab = Arc::new(Lab::new()?);
    let origin_host = lab.host("origin")?;
    let origin = start_origin(&origin_host)?;
    let claimant = start_claimant(&lab.host("claimant")?)?;
    let second = start_origin(&lab.host("second")?)?;
    let registries = [origin.address(), claimant, second.address()];
    let plan = ClusterPlan {
        nodes,
        plain_registries: registries.iter().map(ToString::to_string).collect(),
        args: registries
            .iter()
            .flat_map(|registry| ["--registry-must-prove".to_owned(), registry.to_string()])
            .collect(),
        ..ClusterPlan::default()
    };
    let cluster = lab.explain(Cluster::start(&lab, &plan))?;
    let mut world = World {
        scene: Scene {
            cluster,
            origin,
            origin_host,
            lab,
        },
        claimant,
        second,
    };
    let outcome = play(&mut world);
    world.scene.lab.explain(outcome)
}

impl World {
    fn blob(&self, seed: u64) -> Result<Blob> {
        let content = Content::generated(7000 + seed, SIZE_BYTES);
        self.second.add_blob(REPOSITORY, content.clone())?;
        Ok(self.scene.origin.add_blob(REPOSITORY, content)?)
    }

    /// Checks that the claimant's clients get nothing of a blob from this node.
    fn is_withheld(&self, node: &Hawker, blob: &Blob) -> Result<()> {
        for range in [
            None,
            Some("bytes=0-0"),
            Some("bytes=1000-1999,5000-5999"),
            Some("bytes=-1"),
        ] {
            let request = node.request(self.claimant, &blob_path(blob));
            let request = range
                .iter()
                .fold(request, |request, range| request.header("range", *range));
            let answer = request.send(node.host())?;
            ensure!(
                matches!(answer.status, 404 | 416 | 502) && answer.body_bytes < 1000,
                "{range:?}: {} with {} bytes",
                answer.status,
                answer.body_bytes
            );
            let size = blob.size_bytes.to_string();
            ensure!(
                !answer.text().contains(&size),
                "{range:?}: it tells the size"
            );
        }
        Ok(())
    }
}

/// How often a registry was asked for bytes of a blob, and how many it sent.
fn gets(origin: &Origin, blob: &Blob) -> (usize, u64) {
    let digest = blob.digest.to_string();
    let log = origin.log();
    let gets = log
        .iter()
        .filter(|entry| entry.method == "GET" && entry.target.contains(&digest));
    (
        gets.clone().count(),
        gets.map(|entry| entry.body_bytes).sum(),
    )
}

#[test]
fn a_registry_gets_nothing_of_a_blob_that_it_only_claims_to_have() -> Result<()> {
    world(3, |world| {
        let [holder, _, stranger] = &world.scene.cluster.nodes[..] else {
            unreachable!("three nodes")
        };
        let blob = world.blob(1)?;
        world.scene.pull(holder, &blob)?;
        until_committed(holder, &blob)?;
        world.is_withheld(holder, &blob)?;
        world.is_withheld(stranger, &blob)?;
        // A blob that only the seed has.
        let seeds = world.blob(2)?;
        world.scene.pull(&world.scene.cluster.seed, &seeds)?;
        until_committed(&world.scene.cluster.seed, &seeds)?;
        world.is_withheld(&world.scene.cluster.seed, &seeds)?;
        world.is_withheld(stranger, &seeds)?;
        // Asked about the claimant's clients again and again, the seed vouches for nothing.
        world.is_withheld(stranger, &seeds)?;
        // While the blob is on its way for others.
        let moving = world.blob(3)?;
        std::thread::scope(|scope| {
            let pull = scope.spawn(|| world.scene.pull(holder, &moving));
            world.is_withheld(holder, &moving)?;
            hawker_conformance::scene::join(pull.join()).map(drop)
        })
    })
}

#[test]
fn a_cold_pull_asks_the_registry_for_nothing_more_and_neither_does_a_restart() -> Result<()> {
    world(3, |world| {
        let blob = world.blob(4)?;
        world.scene.pull_on_all(&world.scene.cluster.nodes, &blob)?;
        for node in &world.scene.cluster.nodes {
            until_committed(node, &blob)?;
        }
        ensure!(
            gets(&world.scene.origin, &blob) == (1, blob.size_bytes),
            "{:?}",
            gets(&world.scene.origin, &blob)
        );
        // The names are written in the background.
        std::thread::sleep(std::time::Duration::from_millis(500));
        world.scene.cluster.nodes[0].kill()?;
        world.scene.cluster.nodes[0].restart()?;
        world.scene.pull(world.scene.node(), &blob)?;
        ensure!(
            gets(&world.scene.origin, &blob).0 == 1,
            "{:?}",
            gets(&world.scene.origin, &blob)
        );
        Ok(())
    })
}

#[test]
fn another_registry_that_has_the_blob_sends_a_small_part_of_it_once_for_each_node() -> Result<()> {
    world(2, |world| {
        let blob = world.blob(5)?;
        let [holder, other] = &world.scene.cluster.nodes[..] else {
            unreachable!("two nodes")
        };
        world.scene.pull(holder, &blob)?;
        until_committed(holder, &blob)?;
        for _ in 0..3 {
            right(
                holder
                    .request(world.second.address(), &blob_path(&blob))
                    .discard()
                    .send(holder.host())?,
                &blob,
            )?;
        }
        let (asked, bytes) = gets(&world.second, &blob);
        ensure!(
            asked == 1 && bytes <= 4096,
            "{asked} requests, {bytes} bytes"
        );
        // And where the bytes come from peers only.
        right(
            other
                .request(world.second.address(), &blob_path(&blob))
                .discard()
                .send(other.host())?,
            &blob,
        )?;
        let (asked, bytes) = gets(&world.second, &blob);
        ensure!(
            asked <= 12 && bytes <= 12 * 4096,
            "{asked} requests, {bytes} bytes"
        );
        ensure!(
            gets(&world.scene.origin, &blob).0 == 1,
            "the first registry was asked again"
        );
        Ok(())
    })
}
