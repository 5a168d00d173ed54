//! The faults of members that have joined like any other: the pull goes on, and no wrong byte completes.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{End, Hawker, HawkerPlan, Lab};
use hawker_conformance::origin::{Blob, Content};
use hawker_conformance::rogue::{Conduct, Rogue};
use hawker_conformance::scene::{
    Plan, REPOSITORY, Scene, blob_path, committed_path, right, start_origin, until,
    until_committed, withheld,
};
use hawker_core::piece::PeerId;
use hawker_core::rendezvous;
use hawker_oci::digest::{Algorithm, Digest};

const SIZE_BYTES: u64 = (16 << 20) + 4321;

fn truth(seed: u64) -> Content {
    Content::generated(1000 + seed, SIZE_BYTES)
}

fn lie() -> Content {
    Content::generated(99, SIZE_BYTES)
}

/// A rogue peer beside a seed and a node: the pull is right, the rogue was asked, and most of it came from the seed.
fn beside_a_seed(
    conduct: Conduct,
    content: &Content,
    look: impl FnOnce(&Scene) -> Result<()>,
) -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.origin.add_blob(REPOSITORY, truth(0))?;
        let host = scene.lab.host("rogue")?;
        let rogue = Rogue::start(&host, &scene.cluster.seed, "peer", conduct, &blob, content)?;
        let answer = scene.pull(scene.node(), &blob)?;
        ensure!(
            answer.total < Duration::from_secs(40),
            "it took {:?}",
            answer.total
        );
        until_committed(scene.node(), &blob)?;
        is_right_on_disk(scene.node(), &blob)?;
        let copies = scene.origin_copies(&blob);
        ensure!(copies < 1.02, "{copies} copies");
        look(scene)?;
        ensure!(rogue.asked() > 0, "nobody asked it");
        // And it did no lasting harm.
        let next = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &next).map(drop)
    })
}

fn is_right_on_disk(node: &Hawker, blob: &Blob) -> Result<()> {
    let bytes = std::fs::read(committed_path(node, blob)).context("the committed blob")?;
    ensure!(
        Digest::of(Algorithm::Sha256, &bytes) == blob.digest,
        "the disk has wrong bytes"
    );
    Ok(())
}

#[test]
fn a_peer_that_sends_wrong_bytes_is_found_out_and_does_not_show() -> Result<()> {
    beside_a_seed(Conduct::WrongBytes, &lie(), |scene| {
        let rejected = scene.node().metric("hawker_pieces_rejected_total", &[])?;
        ensure!(rejected > 0.0, "nothing was rejected");
        Ok(())
    })
}

#[test]
fn a_peer_that_sends_too_many_bytes_does_not_show() -> Result<()> {
    beside_a_seed(Conduct::TooManyBytes, &truth(0), |_| Ok(()))
}

#[test]
fn a_peer_that_resets_does_not_show() -> Result<()> {
    beside_a_seed(Conduct::Reset, &truth(0), |_| Ok(()))
}

#[test]
fn a_peer_that_stalls_does_not_show() -> Result<()> {
    beside_a_seed(Conduct::Stall, &truth(0), |_| Ok(()))
}

#[test]
fn a_table_that_an_ordinary_peer_signed_does_not_count() -> Result<()> {
    beside_a_seed(Conduct::SignsLies, &lie(), |scene| {
        let poisoned = scene.node().metric("hawker_tables_poisoned_total", &[])?;
        ensure!(poisoned == 0.0, "its table counted");
        Ok(())
    })
}

/// The node got a poisoned table that counts: no wrong bytes complete, and in the end the blob is right.
fn recovers(node: &Hawker, registry: &str, blob: &Blob) -> Result<()> {
    let get = || {
        node.request(registry, &blob_path(blob))
            .discard()
            .send(node.host())
    };
    let first = get()?;
    if first.end == End::Complete && first.status == 200 {
        right(first, blob)?;
    } else {
        withheld(first)?;
    }
    let start = Instant::now();
    until(Duration::from_secs(40), "the right blob", || {
        let answer = get()?;
        if answer.end == End::Complete && answer.status == 200 {
            right(answer, blob)?;
            return Ok(true);
        }
        withheld(answer)?;
        Ok(false)
    })
    .with_context(|| format!("after {:?}", start.elapsed()))?;
    until_committed(node, blob)?;
    let poisoned = node.metric("hawker_tables_poisoned_total", &[])?;
    ensure!(poisoned > 0.0, "the table was not believed at all");
    is_right_on_disk(node, blob)
}

#[test]
fn from_a_seed_s_poisoned_table_a_node_recovers_by_the_origin() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        // The rogue's id is known only when it has joined, and then it must say what it holds: blobs are tried until one is its own.
        let up: PeerId = scene.cluster.seed.status()?.peer_id.parse()?;
        for attempt in 0..8 {
            let blob = scene.origin.add_blob(REPOSITORY, truth(attempt))?;
            let host = scene.lab.host(&format!("rogue{attempt}"))?;
            let rogue = Rogue::start(
                &host,
                &scene.cluster.seed,
                "seed",
                Conduct::SignsLies,
                &blob,
                &lie(),
            )?;
            if rendezvous::owner(&blob.digest, [up, rogue.peer_id()]) != Some(rogue.peer_id()) {
                continue;
            }
            let known = rogue.peer_id().to_string();
            scene
                .node()
                .wait_status(Duration::from_secs(10), |status| {
                    status.members.iter().any(|member| member.peer_id == known)
                })?;
            recovers(scene.node(), &scene.registry(), &blob)?;
            ensure!(rogue.asked() > 0, "nobody asked it");
            return Ok(());
        }
        anyhow::bail!("eight times heads")
    })
}

#[test]
fn from_an_elected_peer_s_poisoned_table_a_node_recovers_by_the_origin() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let origin_host = lab.host("origin")?;
        let origin = start_origin(&origin_host)?;
        let scheduler = HawkerPlan::scheduler(&lab.host("scheduler")?).start()?;
        let node = HawkerPlan::proxy(&lab.host("node")?)
            .plain_registry(origin.address())
            .join_to(&scheduler)?
            .start()?;
        let blob = origin.add_blob(REPOSITORY, truth(0))?;
        let rogue = Rogue::start(
            &lab.host("rogue")?,
            &scheduler,
            "peer",
            Conduct::SignsLies,
            &blob,
            &lie(),
        )?;
        // A scheduler that has just started waits for those who may be reading already before it elects anybody.
        std::thread::sleep(hawker_core::swarm::WARM_UP + Duration::from_secs(1));
        recovers(&node, &origin.address().to_string(), &blob)?;
        ensure!(rogue.asked() > 0, "nobody asked it");
        Ok(())
    })())
}
