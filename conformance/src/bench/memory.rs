//! `memory`: the highest RssAnon of any Hawker process in a burst, and in a 4 GiB pull as fast as this machine can.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use hawker_conformance::lab::{Cluster, Hawker};
use serde_json::json;

use crate::BurstOptions;
use crate::burst;
use crate::client::get;
use crate::measure::{GIB, MemorySampler, Watch, with_load};
use crate::report::{Report, Target};
use crate::stage::{Stage, committed};

const SIZE_BYTES: u64 = 4 * GIB;

pub(crate) fn run(report: &mut Report, options: &BurstOptions) -> Result<()> {
    let peak = in_bursts(report, options)?.max(in_a_big_pull(report)?);
    report.figure("peak_anon_mib", peak, Some(Target::AtMost(96.0)));
    Ok(())
}

fn in_bursts(report: &mut Report, options: &BurstOptions) -> Result<f64> {
    let mut stage = Stage::new(Some(burst::LINK), burst::disk_gib(options))?;
    let cluster = stage.cluster(options.nodes.into())?;
    let sampler = MemorySampler::start(pids(&cluster)?)?;
    for round in 1..=options.common.rounds {
        for (blobs, name) in burst::VARIANTS {
            burst::measure(report, &mut stage, &cluster, blobs, name, round)?;
        }
    }
    Ok(note(report, "burst", &cluster, &sampler.stop()?, json!({})))
}

fn in_a_big_pull(report: &mut Report) -> Result<f64> {
    let mut stage = Stage::new(None, 2 + 2 * SIZE_BYTES / GIB)?;
    let cluster = stage.cluster(1)?;
    let blob = stage.fresh_blob(SIZE_BYTES)?;
    let target = stage.mirror_target(&blob);
    let sampler = MemorySampler::start(pids(&cluster)?)?;
    let node = &cluster.nodes[0];
    let watch = Watch::start()?;
    node.host().enter(|| get(node.mirror(), &target, None))??;
    let load = watch.stop()?;
    committed(node, &blob)?;
    Ok(note(report, "4 GiB pull", &cluster, &sampler.stop()?, load))
}

fn members(cluster: &Cluster) -> impl Iterator<Item = &Hawker> {
    std::iter::once(&cluster.seed).chain(&cluster.nodes)
}

fn pids(cluster: &Cluster) -> Result<Vec<u32>> {
    members(cluster)
        .map(|member| {
            member
                .pid()
                .with_context(|| format!("{} ended", member.host().name()))
        })
        .collect()
}

/// Notes every member's peak; the highest.
fn note(
    report: &mut Report,
    what: &str,
    cluster: &Cluster,
    peaks: &BTreeMap<u32, f64>,
    load: serde_json::Value,
) -> f64 {
    let peak_of = |member: &Hawker| {
        member
            .pid()
            .and_then(|pid| peaks.get(&pid))
            .copied()
            .unwrap_or(f64::NAN)
    };
    let each: serde_json::Map<_, _> = members(cluster)
        .map(|member| (member.host().name().to_owned(), json!(peak_of(member))))
        .collect();
    let highest = peaks.values().copied().fold(0.0, f64::max);
    report.run(with_load(
        json!({"during": what, "peak_anon_mib": highest, "each_mib": each}),
        load,
    ));
    highest
}
