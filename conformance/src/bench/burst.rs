//! `burst`: the same 128 MiB to all nodes at once, as one blob and as four, all links 100 Mbit/s, against the bound and
//! against curl on all nodes at once from the origin.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{Cluster, End, Hawker, Mbit};
use hawker_conformance::origin::Blob;
use serde_json::json;

use crate::BurstOptions;
use crate::baseline::Curl;
use crate::client::{Got, get};
use crate::goodput;
use crate::measure::{MIB, Watch, median, together, with_load};
use crate::report::{Report, Target};
use crate::stage::{Stage, blob_path, committed};

pub(crate) const LINK: Mbit = Mbit(100);
pub(crate) const TOTAL_BYTES: u64 = 128 * MIB;
/// Into how many blobs the bytes are cut, and what that is called.
pub(crate) const VARIANTS: [(u64, &str); 2] = [(1, "one blob"), (4, "four blobs")];
/// With so many nodes the burst is compared with nodes that have no Hawker.
const COMPARED_NODES: usize = 8;
/// A digest run that takes longer has hung.
const DIGEST_RUN: Duration = Duration::from_secs(300);

/// One burst through Hawker.
pub(crate) struct Burst {
    pub(crate) seconds: f64,
    /// Measured just before, in bytes per second: both directions busy, the slower one.
    goodput: f64,
    slowest_ratio: f64,
    pub(crate) origin_copies: f64,
}

/// The least time in which one seed and `nodes` nodes can all have `size_bytes`, every link carrying `rate` bytes per second
/// each way: max(F/u_origin, F/d_seed, F/u_seeds, F/min d, N*F/(u_seeds + sum u)).
pub(crate) fn bound_s(size_bytes: u64, nodes: usize, rate: f64) -> f64 {
    let (size, nodes) = (size_bytes as f64, nodes as f64);
    (size / rate).max(nodes * size / (rate + nodes * rate))
}

pub(crate) fn run(report: &mut Report, options: &BurstOptions) -> Result<()> {
    let mut stage = Stage::new(Some(LINK), disk_gib(options))?;
    let nodes = usize::from(options.nodes);
    let cluster = stage.cluster(nodes)?;
    let mut bursts = VARIANTS.map(|_| Vec::new());
    let mut direct = VARIANTS.map(|_| f64::NAN);
    for (variant, _) in VARIANTS {
        check_digests(&mut stage, &cluster, variant)?;
    }
    for round in 1..=options.common.rounds {
        for (index, (blobs, name)) in VARIANTS.into_iter().enumerate() {
            bursts[index].push(measure(report, &mut stage, &cluster, blobs, name, round)?);
            // A minute and a half at eight nodes, twice that at sixteen, and nothing in it varies: once is enough, and at that size.
            if round == 1 && nodes == COMPARED_NODES {
                direct[index] = without_hawker(report, &mut stage, &cluster, blobs, name)?;
            }
        }
    }
    figures(report, nodes, &bursts, &direct);
    Ok(())
}

/// The most that the stores of all members and the origin's log take.
pub(crate) fn disk_gib(options: &BurstOptions) -> u64 {
    let pulls = VARIANTS.len() as u64 * (u64::from(options.common.rounds) + 1);
    1 + pulls * (u64::from(options.nodes) + 1) * TOTAL_BYTES / (1 << 30)
}

fn figures(report: &mut Report, nodes: usize, bursts: &[Vec<Burst>; 2], direct: &[f64; 2]) {
    let worst = |value: &dyn Fn(&Burst) -> f64| {
        bursts
            .iter()
            .map(|bursts| median(bursts.iter().map(value)))
            .fold(f64::NEG_INFINITY, f64::max)
    };
    let ratios = bursts
        .iter()
        .zip(direct)
        .map(|(bursts, direct)| direct / median(bursts.iter().map(|b| b.seconds)));
    // One goodput for the whole run: a link measured low by chance must not flatter the burst after it.
    let goodput = median(bursts.iter().flatten().map(|burst| burst.goodput));
    let bound_s = bound_s(TOTAL_BYTES, nodes, goodput);
    let direct_ratio = ratios.fold(f64::INFINITY, f64::min);
    let time_aim = if nodes == COMPARED_NODES { 1.35 } else { 1.15 };
    report.figure(
        "time_ratio",
        worst(&|burst| burst.seconds) / bound_s,
        Some(Target::AtMost(time_aim)),
    );
    report.figure(
        "origin_copies",
        worst(&|burst| burst.origin_copies),
        Some(Target::AtMost(1.02)),
    );
    if nodes == COMPARED_NODES {
        report.figure("direct_ratio", direct_ratio, Some(Target::AtLeast(5.5)));
    }
    report.figure(
        "slowest_ratio",
        worst(&|burst| burst.slowest_ratio),
        Some(Target::AtMost(1.1)),
    );
}

/// One burst of fresh blobs to all nodes, timed.
pub(crate) fn measure(
    report: &mut Report,
    stage: &mut Stage,
    cluster: &Cluster,
    blobs: u64,
    variant: &str,
    round: u32,
) -> Result<Burst> {
    let nodes = cluster.nodes.len();
    let [forth, back] = goodput::both_ways(cluster.seed.host(), cluster.nodes[0].host())?;
    let blobs = fresh_blobs(stage, blobs)?;
    stage.origin.clear_log();
    let watch = Watch::start()?;
    let got =
        together(requests(stage, cluster, &blobs).map(|(node, target)| {
            move || node.host().enter(|| get(node.mirror(), &target, None))?
        }))?;
    let load = watch.stop()?;
    let finished = finish_times(&got, blobs.len());
    let seconds = finished.last().copied().context("no nodes")?;
    let burst = Burst {
        seconds,
        goodput: forth.min(back),
        slowest_ratio: seconds / median(finished.iter().copied()),
        origin_copies: stage.origin.totals().blob_bytes as f64 / TOTAL_BYTES as f64,
    };
    let run = json!({
        "side": "hawker", "variant": variant, "nodes": nodes, "round": round,
        "seconds": seconds, "bound_s": bound_s(TOTAL_BYTES, nodes, burst.goodput),
        "median_s": median(finished.iter().copied()), "fastest_s": finished[0],
        "first_byte_ms": median(got.iter().map(Got::first_byte_ms)),
        "origin_copies": burst.origin_copies, "goodput_mbit": goodput::mbit(burst.goodput),
    });
    report.run(with_load(run, load));
    // Commits of this burst must not disturb what is measured next.
    for node in &cluster.nodes {
        blobs
            .iter()
            .try_for_each(|blob| committed(node, blob).map(drop))?;
    }
    Ok(burst)
}

pub(crate) fn fresh_blobs(stage: &mut Stage, count: u64) -> Result<Vec<Blob>> {
    (0..count)
        .map(|_| stage.fresh_blob(TOTAL_BYTES / count))
        .collect()
}

/// Every blob at every node: the node, and what its client asks for. A node's blobs follow each other.
fn requests<'a>(
    stage: &Stage,
    cluster: &'a Cluster,
    blobs: &[Blob],
) -> impl Iterator<Item = (&'a Hawker, String)> {
    let targets: Vec<_> = blobs.iter().map(|blob| stage.mirror_target(blob)).collect();
    cluster.nodes.iter().flat_map(move |node| {
        targets
            .clone()
            .into_iter()
            .map(move |target| (node, target))
    })
}

/// When each node had its last byte, in seconds from the first request of all; the fastest node first.
fn finish_times(got: &[Got], blobs_per_node: usize) -> Vec<f64> {
    let Some(start) = got.iter().map(|got| got.start).min() else {
        return Vec::new();
    };
    let last = |node: &[Got]| {
        node.iter()
            .map(|got| (got.end - start).as_secs_f64())
            .fold(0.0, f64::max)
    };
    let mut times: Vec<f64> = got.chunks(blobs_per_node).map(last).collect();
    times.sort_by(f64::total_cmp);
    times
}

/// A burst of its own in which every client hashes what it gets.
fn check_digests(stage: &mut Stage, cluster: &Cluster, blobs: u64) -> Result<()> {
    let blobs = fresh_blobs(stage, blobs)?;
    let wanted = blobs.iter().map(|blob| blob.digest.to_string()).cycle();
    let registry = stage.registry();
    let answers = together(
        cluster
            .nodes
            .iter()
            .flat_map(|node| blobs.iter().map(move |blob| (node, blob)))
            .map(|(node, blob)| {
                let path = blob_path(blob);
                let request = node.request(&registry, &path).discard().within(DIGEST_RUN);
                move || request.send(node.host())
            }),
    )?;
    for (answer, wanted) in answers.iter().zip(wanted) {
        ensure!(
            answer.end == End::Complete && answer.digest == wanted,
            "a client got {} instead of {wanted}",
            answer.digest
        );
    }
    Ok(())
}

/// curl on all nodes at once, straight from the origin; seconds.
fn without_hawker(
    report: &mut Report,
    stage: &mut Stage,
    cluster: &Cluster,
    blobs: u64,
    variant: &str,
) -> Result<f64> {
    let blobs = fresh_blobs(stage, blobs)?;
    let urls: Vec<_> = blobs.iter().map(|blob| stage.origin_url(blob)).collect();
    stage.origin.clear_log();
    let watch = Watch::start()?;
    let start = Instant::now();
    let hosts = cluster.nodes.iter().map(Hawker::host);
    let curls = hosts
        .map(|host| Curl::start(host, &urls, Path::new("/dev/null"), None))
        .collect::<Result<Vec<_>>>()?;
    let results = curls
        .into_iter()
        .map(Curl::finish)
        .collect::<Result<Vec<_>>>()?;
    let seconds = start.elapsed().as_secs_f64();
    let load = watch.stop()?;
    ensure!(
        results
            .iter()
            .all(|result| result.size_bytes == TOTAL_BYTES),
        "a curl got less than everything"
    );
    let run = json!({
        "side": "curl", "variant": variant, "nodes": results.len(), "round": 1, "seconds": seconds,
        "origin_copies": stage.origin.totals().blob_bytes as f64 / TOTAL_BYTES as f64,
    });
    report.run(with_load(run, load));
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_one_transfer_as_long_as_the_members_send_as_fast_as_they_receive() {
        for nodes in [1, 8, 64] {
            assert!((bound_s(100, nodes, 10.0) - 10.0).abs() < 1e-9);
        }
    }
}
