//! `ranges`: sixteen scattered ranges of 128 KiB at once, as nodes ask that start containers before their image is there. A node of a
//! cluster whose seed holds the blob, and a node of a cluster in which nobody does.

use std::time::Instant;

use anyhow::{Result, anyhow};
use hawker_conformance::lab::{Hawker, HawkerPlan};
use hawker_conformance::origin::{Blob, Fault, Rule};
use serde_json::json;

use crate::Options;
use crate::client::{get, get_part};
use crate::measure::{MIB, Watch, median, with_load};
use crate::parallel::CONNECTION_BYTES_PER_S;
use crate::report::{Report, Target};
use crate::stage::{Stage, committed};

const SIZE_BYTES: u64 = 256 * MIB;
const RANGES: u64 = 16;
const RANGE_BYTES: u64 = 128 << 10;

/// How sixteen ranges were served.
struct Served {
    last_ms: f64,
    /// Bytes that came to the node from peers, and bytes that the origin sent, over the bytes that were read.
    bytes_ratio: f64,
    copies: f64,
}

pub(crate) fn run(report: &mut Report, options: &Options) -> Result<()> {
    let mut stage = Stage::new(None, 1 + u64::from(options.rounds))?;
    stage.origin.add_fault(
        Rule::always(Fault::SlowBody {
            bytes_per_s: CONNECTION_BYTES_PER_S,
        })
        .on("/blobs/"),
    );
    let cluster = stage.cluster(1)?;
    let alone_host = stage.host("alone")?;
    let registry = stage.registry();
    let alone = HawkerPlan::proxy(&alone_host)
        .plain_registry(&registry)
        .start()?;
    let (mut held, mut cold) = (Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        let blob = stage.fresh_blob(SIZE_BYTES)?;
        let target = stage.mirror_target(&blob);
        cluster
            .seed
            .host()
            .enter(|| get(cluster.seed.mirror(), &target, None))??;
        committed(&cluster.seed, &blob)?;
        held.push(serve(
            report,
            &stage,
            &cluster.nodes[0],
            &blob,
            "held",
            round,
        )?);
        let blob = stage.fresh_blob(SIZE_BYTES)?;
        cold.push(serve(report, &stage, &alone, &blob, "cold", round)?);
    }
    let middle = |served: &[Served], value: fn(&Served) -> f64| median(served.iter().map(value));
    let last_ms =
        middle(&held, |served| served.last_ms).max(middle(&cold, |served| served.last_ms));
    report.figure("last_ms", last_ms, Some(Target::AtMost(400.0)));
    report.figure(
        "bytes_ratio",
        middle(&held, |served| served.bytes_ratio),
        Some(Target::AtMost(2.0)),
    );
    report.figure(
        "copies",
        middle(&cold, |served| served.copies),
        Some(Target::AtMost(1.3)),
    );
    Ok(())
}

fn serve(
    report: &mut Report,
    stage: &Stage,
    node: &Hawker,
    blob: &Blob,
    side: &str,
    round: u32,
) -> Result<Served> {
    stage.origin.clear_log();
    let target = stage.mirror_target(blob);
    let received = || -> Result<u64> {
        let bytes = node.status()?.bytes;
        Ok(bytes.received_seeds + bytes.received_peers)
    };
    let (before, watch, begun) = (received()?, Watch::start()?, Instant::now());
    node.host().enter(|| {
        std::thread::scope(|scope| {
            let reads: Vec<_> = (0..RANGES)
                .map(|n| {
                    // No two of them in one piece, and none at the edge of one.
                    let start = n * (SIZE_BYTES / RANGES) + 3 * MIB + 12345;
                    let range = format!("bytes={start}-{}", start + RANGE_BYTES - 1);
                    let target = &target;
                    scope.spawn(move || get_part(node.mirror(), target, &range, RANGE_BYTES))
                })
                .collect();
            reads
                .into_iter()
                .try_for_each(|read| read.join().map_err(|_| anyhow!("a client panicked"))?)
        })
    })??;
    let last_ms = begun.elapsed().as_secs_f64() * 1e3;
    let load = watch.stop()?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    let read_bytes = (RANGES * RANGE_BYTES) as f64;
    let bytes_ratio = (received()? - before) as f64 / read_bytes;
    let copies = stage.origin.totals().blob_bytes as f64 / read_bytes;
    let run = json!({
        "side": side, "round": round, "last_ms": last_ms, "bytes_ratio": bytes_ratio, "copies": copies,
    });
    report.run(with_load(run, load));
    Ok(Served {
        last_ms,
        bytes_ratio,
        copies,
    })
}
