//! `burst --faults`: the burst while three nodes are killed in mid-pull, a member with a token lies about the first
//! blob, and the scheduler is killed and restarted. The figures are those of the surviving nodes, against the same
//! bound.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{Answer, Cluster, End, Hawker, Host, Request};
use hawker_conformance::origin::Blob;
use hawker_conformance::rogue::{Conduct, Rogue};
use hawker_conformance::scene::{join, until};
use serde_json::json;

use crate::BurstOptions;
use crate::burst::{LINK, TOTAL_BYTES, VARIANTS, bound_s, disk_gib, fresh_blobs};
use crate::goodput;
use crate::measure::{Watch, median, with_load};
use crate::report::{Report, Target};
use crate::stage::{Stage, blob_path};

const KILLED: usize = 3;
/// Parts of the blobs that the first victim has when it is killed, and the others when they are.
const FIRST_AT: f64 = 0.25;
const OTHERS_AT: f64 = 0.5;
/// A pull of a survivor that takes longer has hung: three times the bound, and the waits of a client whose parents are gone.
const PULL_WITHIN: Duration = Duration::from_secs(75);

/// How the survivors fared once.
struct Fared {
    seconds: f64,
    goodput: f64,
    origin_copies: f64,
    wrong: usize,
    hung: usize,
}

pub(crate) fn run(report: &mut Report, options: &BurstOptions) -> Result<()> {
    let nodes = usize::from(options.nodes);
    ensure!(
        nodes > KILLED,
        "{KILLED} nodes are killed: more than that must take part"
    );
    let mut fared = VARIANTS.map(|_| Vec::new());
    for round in 1..=options.common.rounds {
        for (fared, (blobs, name)) in fared.iter_mut().zip(VARIANTS) {
            // A killed node stays dead, and a rogue lies about one blob: each round has a cluster of its own.
            let mut stage = Stage::new(Some(LINK), disk_gib(options))?;
            fared.push(round_of(report, &mut stage, nodes, blobs, name, round)?);
        }
    }
    let all = || fared.iter().flatten();
    let goodput = median(all().map(|fared| fared.goodput));
    let worst = |value: &dyn Fn(&Fared) -> f64| {
        fared
            .iter()
            .map(|fared| median(fared.iter().map(value)))
            .fold(f64::NEG_INFINITY, f64::max)
    };
    let time_ratio = worst(&|fared| fared.seconds) / bound_s(TOTAL_BYTES, nodes, goodput);
    report.figure("time_ratio", time_ratio, Some(Target::AtMost(1.5)));
    report.figure(
        "wrong_bytes",
        all().map(|fared| fared.wrong as f64).sum(),
        Some(Target::AtMost(0.0)),
    );
    report.figure(
        "hangs",
        all().map(|fared| fared.hung as f64).sum(),
        Some(Target::AtMost(0.0)),
    );
    report.figure("origin_copies", worst(&|fared| fared.origin_copies), None);
    Ok(())
}

fn round_of(
    report: &mut Report,
    stage: &mut Stage,
    nodes: usize,
    blobs: u64,
    variant: &str,
    round: u32,
) -> Result<Fared> {
    let mut cluster = stage.cluster_and_scheduler(nodes)?;
    let [forth, back] = goodput::both_ways(cluster.seed.host(), cluster.nodes[0].host())?;
    let blobs = fresh_blobs(stage, blobs)?;
    let lie = stage.fresh_content(blobs[0].size_bytes);
    let rogue_host = stage.host("rogue")?;
    let rogue = Rogue::start(
        &rogue_host,
        cluster.authority(),
        "peer",
        Conduct::WrongBytes,
        &blobs[0],
        &lie,
    )?;
    stage.origin.clear_log();
    let watch = Watch::start()?;
    let start = Instant::now();
    let survivors = nodes - KILLED;
    let (pulls, victims) = (
        pulls(stage, &cluster.nodes[..survivors], &blobs),
        pulls(stage, &cluster.nodes[survivors..], &blobs),
    );
    let answers = std::thread::scope(|scope| {
        let send = |(request, node): (Request, Host)| {
            scope.spawn(move || request.send(&node).map(|answer| (answer, start.elapsed())))
        };
        let pulls: Vec<_> = pulls.into_iter().map(send).collect();
        // The answers to clients of the dead nodes do not matter.
        victims.into_iter().for_each(|pull| drop(send(pull)));
        break_things(&mut cluster, survivors)?;
        anyhow::Ok(
            pulls
                .into_iter()
                .map(|pull| join(pull.join()))
                .collect::<Vec<_>>(),
        )
    })?;
    let load = watch.stop()?;
    let fared = fare(stage, &blobs, &answers, forth.min(back))?;
    let run = json!({
        "side": "hawker", "variant": variant, "nodes": nodes, "round": round, "survivors": survivors,
        "seconds": fared.seconds, "bound_s": bound_s(TOTAL_BYTES, nodes, fared.goodput),
        "origin_copies": fared.origin_copies, "wrong": fared.wrong, "hung": fared.hung,
        "lies_asked": rogue.asked(), "goodput_mbit": goodput::mbit(fared.goodput),
    });
    report.run(with_load(run, load));
    Ok(fared)
}

/// Each blob at each of these nodes.
fn pulls(stage: &Stage, nodes: &[Hawker], blobs: &[Blob]) -> Vec<(Request, Host)> {
    let request = |node: &Hawker, blob: &Blob| {
        (
            node.request(stage.registry(), &blob_path(blob))
                .discard()
                .within(PULL_WITHIN),
            node.host().clone(),
        )
    };
    nodes
        .iter()
        .flat_map(|node| blobs.iter().map(move |blob| request(node, blob)))
        .collect()
}

/// Kills the last nodes, the first of them together with the scheduler, which comes back at once.
fn break_things(cluster: &mut Cluster, survivors: usize) -> Result<()> {
    under_way(&cluster.nodes[survivors], FIRST_AT)?;
    cluster.nodes[survivors].kill()?;
    let scheduler = cluster.scheduler.as_mut().context("it is apart")?;
    scheduler.kill()?;
    scheduler.restart()?;
    under_way(&cluster.nodes[survivors + 1], OTHERS_AT)?;
    cluster.nodes[survivors + 1..]
        .iter_mut()
        .try_for_each(Hawker::kill)
}

/// Waits until a node has this part of what it pulls.
fn under_way(node: &Hawker, part: f64) -> Result<()> {
    until(PULL_WITHIN, "a victim's pieces", || {
        let bytes = node.status()?.bytes;
        let received = bytes.received_origin + bytes.received_peers + bytes.received_seeds;
        Ok(received as f64 >= part * TOTAL_BYTES as f64)
    })
}

fn fare(
    stage: &Stage,
    blobs: &[Blob],
    answers: &[Result<(Answer, Duration)>],
    goodput: f64,
) -> Result<Fared> {
    let (mut wrong, mut hung, mut seconds) = (0, 0, 0.0_f64);
    for (answer, blob) in answers.iter().zip(blobs.iter().cycle()) {
        match answer {
            Ok((answer, at)) if answer.end == End::Complete && answer.status == 200 => {
                wrong += usize::from(answer.digest != blob.digest.to_string());
                seconds = seconds.max(at.as_secs_f64());
            }
            Ok((answer, at)) => anyhow::bail!(
                "a survivor's pull ended {:?} with {} after {at:?} and {} bytes: {}",
                answer.end,
                answer.status,
                answer.body_bytes,
                answer.text()
            ),
            Err(error) => {
                eprintln!("{error:#}");
                hung += 1;
                seconds = seconds.max(PULL_WITHIN.as_secs_f64());
            }
        }
    }
    let origin_copies = stage.origin.totals().blob_bytes as f64 / TOTAL_BYTES as f64;
    Ok(Fared {
        seconds,
        goodput,
        origin_copies,
        wrong,
        hung,
    })
}
