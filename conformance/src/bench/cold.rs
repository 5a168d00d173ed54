//! `cold`: the first pull of a 512 MiB blob through node and seed, all links 200 Mbit/s, against curl straight from the origin
//! on the same link. Then the same without bounds on links, from an origin that gives 10 MiB/s a connection.

use std::path::Path;

use anyhow::Result;
use hawker_conformance::lab::{Hawker, Host, Mbit};
use hawker_conformance::origin::{Fault, Rule};
use serde_json::json;

use crate::Options;
use crate::baseline::curl;
use crate::client::get;
use crate::goodput;
use crate::measure::{MIB, Watch, median, with_load};
use crate::parallel::CONNECTION_BYTES_PER_S;
use crate::report::{Report, Target};
use crate::stage::Stage;

const SIZE_BYTES: u64 = 512 * MIB;
const LINK: Mbit = Mbit(200);

/// One pull.
struct Pull {
    seconds: f64,
    first_byte_ms: f64,
}

pub(crate) fn run(report: &mut Report, options: &Options) -> Result<()> {
    let mut stage = Stage::new(Some(LINK), 2 + u64::from(options.rounds))?;
    let cluster = stage.cluster(1)?;
    let node = &cluster.nodes[0];
    let [forth, back] = goodput::both_ways(&stage.origin_host, node.host())?;
    report.run(json!({"goodput_mbit": [goodput::mbit(forth), goodput::mbit(back)]}));
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        ours.push(through_hawker(report, &mut stage, node, round)?);
        theirs.push(direct(report, &mut stage, node.host(), round)?);
    }
    let middle = |pulls: &[Pull], value: fn(&Pull) -> f64| median(pulls.iter().map(value));
    let time_ratio = middle(&ours, |pull| pull.seconds) / middle(&theirs, |pull| pull.seconds);
    let first_byte_ms =
        middle(&ours, |pull| pull.first_byte_ms) - middle(&theirs, |pull| pull.first_byte_ms);
    report.figure("time_ratio", time_ratio, Some(Target::AtMost(1.05)));
    report.figure("first_byte_ms", first_byte_ms, Some(Target::AtMost(100.0)));
    drop(cluster);
    drop(stage);
    limited_connections(report, options)
}

/// From an origin that limits each connection, as object stores do: several connections are faster than one.
fn limited_connections(report: &mut Report, options: &Options) -> Result<()> {
    let mut stage = Stage::new(None, 2 + u64::from(options.rounds))?;
    let slow = Fault::SlowBody {
        bytes_per_s: CONNECTION_BYTES_PER_S,
    };
    stage.origin.add_fault(Rule::always(slow).on("/blobs/"));
    let cluster = stage.cluster(1)?;
    let node = &cluster.nodes[0];
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        ours.push(through_hawker(report, &mut stage, node, round)?.seconds);
        theirs.push(direct(report, &mut stage, node.host(), round)?.seconds);
    }
    report.figure(
        "speedup",
        median(theirs) / median(ours),
        Some(Target::AtLeast(3.0)),
    );
    Ok(())
}

fn through_hawker(
    report: &mut Report,
    stage: &mut Stage,
    node: &Hawker,
    round: u32,
) -> Result<Pull> {
    let blob = stage.fresh_blob(SIZE_BYTES)?;
    let target = stage.mirror_target(&blob);
    stage.origin.clear_log();
    let watch = Watch::start()?;
    let got = node.host().enter(|| get(node.mirror(), &target, None))??;
    let load = watch.stop()?;
    let pull = Pull {
        seconds: got.seconds(),
        first_byte_ms: got.first_byte_ms(),
    };
    let copies = stage.origin.totals().blob_bytes as f64 / SIZE_BYTES as f64;
    note(report, "hawker", round, &pull, copies, load);
    Ok(pull)
}

fn direct(report: &mut Report, stage: &mut Stage, host: &Host, round: u32) -> Result<Pull> {
    let blob = stage.fresh_blob(SIZE_BYTES)?;
    let watch = Watch::start()?;
    let got = curl(host, &stage.origin_url(&blob), Path::new("/dev/null"), None)?;
    let load = watch.stop()?;
    let pull = Pull {
        seconds: got.seconds,
        first_byte_ms: got.first_byte_ms,
    };
    note(
        report,
        "curl",
        round,
        &pull,
        got.size_bytes as f64 / SIZE_BYTES as f64,
        load,
    );
    Ok(pull)
}

fn note(
    report: &mut Report,
    side: &str,
    round: u32,
    pull: &Pull,
    copies: f64,
    load: serde_json::Value,
) {
    let run = json!({
        "side": side, "round": round, "seconds": pull.seconds, "first_byte_ms": pull.first_byte_ms,
        "origin_copies": copies,
    });
    report.run(with_load(run, load));
}
