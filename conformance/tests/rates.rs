//! Rates of a blob, changed while the daemons run; prefetches; and a seed that has more to send than it can.

use std::time::Duration;

use anyhow::{Result, ensure};
use hawker_conformance::lab::{Hawker, HawkerPlan};
use hawker_conformance::origin::{Blob, Content, Origin};
use hawker_conformance::scene::{Configured, REPOSITORY, blob_path, join, right, with_origin};

const MIB: u64 = 1 << 20;

/// How long it takes to get all of these through a node at once.
fn pull(node: &Hawker, origin: &Origin, blobs: &[Blob]) -> Result<Duration> {
    let pull = |blob: &Blob| -> Result<Duration> {
        let request = node
            .request(origin.address(), &blob_path(blob))
            .discard()
            .within(Duration::from_secs(90));
        Ok(right(request.send(node.host())?, blob)?.total)
    };
    std::thread::scope(|scope| {
        let pulls: Vec<_> = blobs
            .iter()
            .map(|blob| scope.spawn(move || pull(blob)))
            .collect();
        let took = pulls
            .into_iter()
            .map(|pull| join(pull.join()))
            .collect::<Result<Vec<_>>>()?;
        Ok(took.into_iter().max().unwrap_or_default())
    })
}

/// A client that leaves early: the node goes on by itself.
fn leave(node: &Hawker, origin: &Origin, blob: &Blob) -> Result<()> {
    node.request(origin.address(), &blob_path(blob))
        .leave_after(MIB / 2)
        .discard()
        .send(node.host())?;
    node.wait_status(Duration::from_secs(5), |status| {
        status.tasks.iter().any(|task| task.state == "prefetching")
    })?;
    Ok(())
}

fn blobs(origin: &Origin, size_bytes: u64, seeds: std::ops::Range<u64>) -> Result<Vec<Blob>> {
    seeds
        .map(|seed| Ok(origin.add_blob(REPOSITORY, Content::generated(seed, size_bytes))?))
        .collect()
}

#[test]
fn a_blobs_rates_hold_for_each_by_itself_and_change_at_sighup() -> Result<()> {
    with_origin(|lab, origin| {
        // 8 MiB at 2 MB/s are 4 s, for two at once as for one.
        let (least, most) = (Duration::from_secs(3), Duration::from_secs(6));
        let held = |what: &str, took: Duration| {
            ensure!(took > least && took < most, "{what} takes {took:?}");
            Ok(())
        };
        let host = lab.host("seed")?;
        let mut seed = Configured::start(
            HawkerPlan::up(&host),
            &host,
            origin,
            "[task_rates]\norigin = \"2MB\"\n",
        )?;
        let both = blobs(origin, 8 * MIB, 0..2)?;
        held("the origin", pull(&seed.node, origin, &both)?)?;

        seed.set("[task_rates]\nupload = \"2MB\"\n")?;
        let mut node = seed.join(lab, origin, "node", "")?;
        held("the seed's upload", pull(&node.node, origin, &both)?)?;

        seed.set("")?;
        node.set("[task_rates]\ndownload = \"2MB\"\n")?;
        held(
            "the node's download",
            pull(&node.node, origin, &blobs(origin, 8 * MIB, 2..4)?)?,
        )?;

        node.set("")?;
        let free = pull(&node.node, origin, &blobs(origin, 8 * MIB, 4..6)?)?;
        ensure!(
            free < Duration::from_secs(2),
            "without rates it takes {free:?}"
        );
        Ok(())
    })
}

#[test]
fn what_nobody_waits_for_keeps_to_its_rate_until_somebody_does() -> Result<()> {
    with_origin(|lab, origin| {
        let host = lab.host("node")?;
        let rates = "[rates]\nprefetch = \"1MB\"\n";
        let node = Configured::start(HawkerPlan::proxy(&host), &host, origin, rates)?.node;
        let blob = blobs(origin, 256 * MIB, 0..1)?[0];
        leave(&node, origin, &blob)?;
        let before = node.status()?.bytes.received_origin;
        std::thread::sleep(Duration::from_secs(4));
        let came = node.status()?.bytes.received_origin - before;
        ensure!(
            (2 * MIB..8 * MIB).contains(&came),
            "{came} bytes came in 4 s"
        );
        let took = pull(&node, origin, &[blob])?;
        ensure!(took < Duration::from_secs(20), "then it takes {took:?}");
        Ok(())
    })
}

#[test]
fn a_seed_sends_what_clients_wait_for_before_what_nobody_does() -> Result<()> {
    with_origin(|lab, origin| {
        let host = lab.host("seed")?;
        let plan = HawkerPlan::up(&host).flag("--upload-slots", "2");
        let mut seed = Configured::start(plan, &host, origin, "")?;
        let (long, short) = (
            blobs(origin, 256 * MIB, 0..1)?[0],
            blobs(origin, 16 * MIB, 1..2)?[0],
        );
        pull(&seed.node, origin, &[long, short])?;
        seed.set("[rates]\nupload = \"4MB\"\n")?;
        let [idle, busy] = ["idle", "busy"].map(|name| seed.join(lab, origin, name, ""));
        let (idle, busy) = (idle?.node, busy?.node);
        leave(&idle, origin, &long)?;
        // Pieces that were requested while the client was there go out as requested: up to 32 pieces.
        std::thread::sleep(Duration::from_secs(12));
        // 16 MiB at 4 MB/s are 4.2 s alone, and twice that at half the rate.
        let took = pull(&busy, origin, &[short])?;
        ensure!(took < Duration::from_millis(6500), "it takes {took:?}");
        let rest = idle.wait_status(Duration::from_secs(1), |status| !status.tasks.is_empty())?;
        ensure!(rest.tasks[0].state == "prefetching", "{rest:?}");
        Ok(())
    })
}

#[test]
fn an_overloaded_seed_says_so_and_is_not_taken_for_one_that_stalls() -> Result<()> {
    with_origin(|lab, origin| {
        let host = lab.host("seed")?;
        let plan = HawkerPlan::up(&host).flag("--upload-slots", "1");
        let mut seed = Configured::start(plan, &host, origin, "")?;
        let all = blobs(origin, 8 * MIB, 0..3)?;
        pull(&seed.node, origin, &all)?;
        seed.set("[rates]\nupload = \"300KB\"\n")?;
        let node = |n: usize| Ok(seed.join(lab, origin, &format!("node{n}"), "")?.node);
        let nodes = (0..3).map(node).collect::<Result<Vec<_>>>()?;
        std::thread::scope(|scope| {
            let pulls: Vec<_> = nodes
                .iter()
                .zip(&all)
                .map(|(node, blob)| scope.spawn(|| pull(node, origin, &[*blob])))
                .collect();
            pulls
                .into_iter()
                .try_for_each(|pull| join(pull.join()).map(drop))
        })?;
        let busy = ["reason=\"busy\""];
        ensure!(
            seed.node.metric("hawker_refused_total", &busy)? > 0.0,
            "nobody was sent elsewhere"
        );
        let told: f64 = nodes
            .iter()
            .map(|node| node.metric("hawker_refused_by_peers_total", &busy))
            .sum::<Result<f64>>()?;
        ensure!(told > 0.0, "nobody heard of it");
        let isolated = seed.node.metric("hawker_scheduler_isolations_total", &[])?;
        ensure!(isolated == 0.0, "{isolated} isolations are counted");
        let peers = seed.node.metric("hawker_scheduler_peers", &[])?;
        ensure!(
            peers == 4.0,
            "{peers} peers are counted by the scheduler beside the seed"
        );
        for node in &nodes {
            ensure!(
                !node.status()?.members.iter().any(|member| member.isolated),
                "the seed is isolated"
            );
        }
        Ok(())
    })
}
