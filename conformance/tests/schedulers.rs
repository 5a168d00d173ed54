//! Several schedulers, and schedulers that die in the middle of a burst: nobody goes back to the origin for it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use hawker_conformance::lab::{Cluster, Hawker, HawkerPlan, Lab, Mbit, TokenFrom, run};
use hawker_conformance::origin::{Blob, Content};
use hawker_conformance::rogue::{Conduct, Rogue};
use hawker_conformance::scene::{REPOSITORY, Scene, join, right, start_origin, until};
use hawker_core::swarm::WARM_UP;

/// At 100 Mbit/s this takes about four seconds to arrive: enough to die in and to come back.
const SIZE_BYTES: u64 = 48 << 20;
const LINK: Mbit = Mbit(100);
/// When the killing starts.
const SOME_BYTES: u64 = 4 << 20;

/// Schedulers, the first of which has the authority, and nodes without a seed: one of them is elected for each blob.
struct Stage {
    schedulers: Vec<Hawker>,
    scene: Scene,
}

impl Stage {
    fn play(
        schedulers: usize,
        nodes: usize,
        play: impl FnOnce(&mut Stage) -> Result<()>,
    ) -> Result<()> {
        let lab = Arc::new(Lab::new()?);
        lab.explain((|| {
            let origin_host = lab.host("origin")?;
            origin_host.shape(LINK, LINK)?;
            let origin = start_origin(&origin_host)?;
            let first = HawkerPlan::scheduler(&lab.host("scheduler1")?).start()?;
            let mut all = vec![first];
            for n in 2..=schedulers {
                let plan = HawkerPlan::scheduler(&lab.host(&format!("scheduler{n}"))?);
                let token = all[0].token("scheduler")?;
                all.push(
                    plan.join(all[0].scheduler(), &token, TokenFrom::File)
                        .start()?,
                );
            }
            let node = |name: String| -> Result<Hawker> {
                let host = lab.host(&name)?;
                host.shape(LINK, LINK)?;
                // Each is told of the first scheduler alone, and hears of the others from that one.
                let node = HawkerPlan::proxy(&host)
                    .plain_registry(origin.address())
                    .join_to(&all[0])?
                    .start()?;
                node.wait_status(Duration::from_secs(20), |status| {
                    status.schedulers.iter().filter(|s| s.connected).count() == schedulers
                })?;
                Ok(node)
            };
            let seed = node("node0".into())?;
            let nodes = (1..nodes)
                .map(|n| node(format!("node{n}")))
                .collect::<Result<Vec<_>>>()?;
            // A scheduler that has just started elects nobody.
            std::thread::sleep(WARM_UP + Duration::from_secs(1));
            let scene = Scene {
                cluster: Cluster {
                    seed,
                    nodes,
                    scheduler: None,
                },
                origin,
                origin_host,
                lab: Arc::clone(&lab),
            };
            play(&mut Stage {
                schedulers: all,
                scene,
            })
        })())
    }

    fn nodes(&self) -> impl Iterator<Item = &Hawker> {
        std::iter::once(&self.scene.cluster.seed).chain(&self.scene.cluster.nodes)
    }

    /// All nodes get the blobs at once; `meanwhile` runs when the first pieces have arrived. Each blob leaves the origin once.
    fn burst(
        &mut self,
        blobs: &[Blob],
        meanwhile: impl FnOnce(&mut Vec<Hawker>) -> Result<()>,
    ) -> Result<()> {
        let pulls: Vec<_> = self
            .nodes()
            .flat_map(|node| blobs.iter().map(move |blob| (node, *blob)))
            .map(|(node, blob)| (self.scene.request(node, &blob), node.host().clone(), blob))
            .collect();
        let pulls: Vec<_> = pulls
            .into_iter()
            .map(|(request, host, blob)| {
                std::thread::spawn(move || right(request.send(&host)?, &blob))
            })
            .collect();
        until(Duration::from_secs(20), "the first pieces", || {
            let bytes = self.scene.cluster.seed.status()?.bytes;
            Ok(bytes.received_origin + bytes.received_peers > SOME_BYTES)
        })?;
        meanwhile(&mut self.schedulers)?;
        pulls
            .into_iter()
            .try_for_each(|pull| join(pull.join()).map(drop))?;
        for blob in blobs {
            let copies = self.scene.origin_copies(blob);
            ensure!(copies < 1.02, "{copies} copies of {}", blob.digest);
        }
        Ok(())
    }
}

#[test]
fn a_scheduler_killed_and_restarted_in_mid_burst_costs_no_copy_from_the_origin() -> Result<()> {
    Stage::play(1, 4, |stage| {
        let blob = stage.scene.blob(SIZE_BYTES)?;
        stage.burst(&[blob], |schedulers| {
            schedulers[0].kill()?;
            schedulers[0].restart()
        })?;
        // It knows again who holds what: the next node gets it from the others.
        let late = HawkerPlan::proxy(&stage.scene.lab.host("late")?)
            .plain_registry(stage.scene.registry())
            .join_to(&stage.schedulers[0])?
            .start()?;
        late.wait_status(Duration::from_secs(20), |status| {
            status.schedulers.iter().any(|s| s.connected)
        })?;
        std::thread::sleep(WARM_UP);
        stage.scene.pull(&late, &blob)?;
        let copies = stage.scene.origin_copies(&blob);
        ensure!(copies < 1.02, "{copies} copies");
        Ok(())
    })
}

#[test]
fn one_of_three_schedulers_killed_in_mid_burst_costs_no_copy_from_the_origin() -> Result<()> {
    Stage::play(3, 4, |stage| {
        // Several blobs: each scheduler has some, by hashing.
        let blobs = (0..6)
            .map(|_| stage.scene.blob(SIZE_BYTES / 6))
            .collect::<Result<Vec<_>>>()?;
        stage.burst(&blobs, |schedulers| schedulers[1].kill())?;
        let after = stage.scene.blob(SIZE_BYTES / 6)?;
        stage.burst(&[after], |_| Ok(()))
    })
}

#[test]
fn a_peer_with_wrong_bytes_is_isolated_for_everyone_and_shown_and_its_slanders_isolate_nobody()
-> Result<()> {
    Stage::play(1, 4, |stage| {
        let size_bytes = 16 << 20;
        let blob = stage
            .scene
            .origin
            .add_blob(REPOSITORY, Content::generated(77, size_bytes))?;
        let lie = Content::generated(78, size_bytes);
        // One node has it, so that everybody gets a good parent beside the bad one.
        stage.scene.pull(&stage.scene.cluster.seed, &blob)?;
        let host = stage.scene.lab.host("rogue")?;
        let rogue = Rogue::start(
            &host,
            &stage.schedulers[0],
            "peer",
            Conduct::WrongBytes,
            &blob,
            &lie,
        )?;
        let honest = stage
            .nodes()
            .map(|node| Ok(node.status()?.peer_id.parse()?))
            .collect::<Result<Vec<_>>>()?;
        rogue.slander(&honest)?;
        stage.scene.pull_on_all(&stage.scene.cluster.nodes, &blob)?;
        ensure!(rogue.asked() > 0, "nobody asked it");
        let known = rogue.peer_id().to_string();
        for node in &stage.scene.cluster.nodes {
            let status = node.wait_status(Duration::from_secs(20), |status| {
                status
                    .members
                    .iter()
                    .any(|member| member.isolated && member.peer_id == known)
            })?;
            let isolated: Vec<_> = status
                .members
                .iter()
                .filter(|member| member.isolated)
                .collect();
            ensure!(
                isolated.len() == 1,
                "they are isolated, not the rogue alone: {isolated:?}"
            );
            let (why, left_s) = (&isolated[0].isolated_for, isolated[0].isolated_for_s);
            ensure!(
                why == "wrong bytes" && (400..=600).contains(&left_s),
                "{why}, {left_s} s"
            );
            ensure!(
                node.metric("hawker_peers_isolated", &[])? == 1.0,
                "the node does not count it"
            );
        }
        let scheduler = &stage.schedulers[0];
        let counted = scheduler.metric(
            "hawker_scheduler_isolations_total",
            &["reason=\"wrong_bytes\""],
        )?;
        ensure!(counted == 1.0, "{counted} isolations are counted");
        ensure!(
            scheduler.metric("hawker_scheduler_isolations_total", &[])? == 1.0,
            "others are counted"
        );
        ensure!(
            scheduler.metric("hawker_scheduler_isolated_peers", &[])? == 1.0,
            "nobody is isolated there"
        );
        let page =
            run(scheduler
                .cli()?
                .args(["status", "--admin", &scheduler.admin().to_string()]))?;
        ensure!(
            page.contains("ISOLATED for wrong bytes, "),
            "hawker status at the scheduler:\n{page}"
        );
        Ok(())
    })
}
