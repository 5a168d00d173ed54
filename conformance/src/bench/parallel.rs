//! `parallel`: a blob of 256 MiB in buffers, several at once, each by an open-ended range that is closed after its buffer, as
//! containerd's parallel fetch does. The origin gives 10 MiB/s a connection. Through one node alone, and through three nodes with a
//! seed at once, against the same client straight at the origin.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Result, anyhow};
use hawker_conformance::lab::{Hawker, HawkerPlan, Host};
use hawker_conformance::origin::{Blob, Fault, Rule};
use serde_json::json;

use crate::Options;
use crate::client::get_part;
use crate::measure::{MIB, Watch, median, with_load};
use crate::report::{Report, Target};
use crate::stage::{Stage, blob_path};

const SIZE_BYTES: u64 = 256 * MIB;

/// The rate of one connection to the origin, as object stores limit it.
pub(crate) const CONNECTION_BYTES_PER_S: u64 = 10 * MIB;

/// Buffers at once, and the length of each.
const VARIANTS: [(u64, u64); 3] = [(8, 4 * MIB), (3, 8 * MIB), (16, 16 * MIB)];

const NODES: usize = 3;

/// One client's pull, or several at once.
struct Pull {
    seconds: f64,
    origin_copies: f64,
}

pub(crate) fn run(report: &mut Report, options: &Options) -> Result<()> {
    let pulls = VARIANTS.len() as u64 * u64::from(options.rounds);
    let mut stage = Stage::new(None, 1 + pulls * 2)?;
    stage.origin.add_fault(
        Rule::always(Fault::SlowBody {
            bytes_per_s: CONNECTION_BYTES_PER_S,
        })
        .on("/blobs/"),
    );
    let alone_host = stage.host("alone")?;
    let registry = stage.registry();
    let alone = [HawkerPlan::proxy(&alone_host)
        .plain_registry(&registry)
        .start()?];
    let cluster = stage.cluster(NODES)?;
    let (mut ratios, mut copies) = (Vec::new(), Vec::new());
    for (at_once, buffer_bytes) in VARIANTS {
        let (mut direct, mut one, mut all) = (Vec::new(), Vec::new(), Vec::new());
        for round in 1..=options.rounds {
            for (side, nodes) in [
                ("direct", &[][..]),
                ("alone", &alone[..]),
                ("cluster", &cluster.nodes[..]),
            ] {
                let blob = stage.fresh_blob(SIZE_BYTES)?;
                let watch = Watch::start()?;
                let pull = measure(&stage, nodes, &alone_host, &blob, at_once, buffer_bytes)?;
                let load = watch.stop()?;
                let run = json!({
                    "side": side, "round": round, "at_once": at_once, "buffer_bytes": buffer_bytes,
                    "seconds": pull.seconds, "origin_copies": pull.origin_copies,
                });
                report.run(with_load(run, load));
                match side {
                    "direct" => direct.push(pull),
                    "alone" => one.push(pull),
                    _ => all.push(pull),
                }
            }
        }
        let seconds = |pulls: &[Pull]| median(pulls.iter().map(|pull| pull.seconds));
        for ours in [&one, &all] {
            ratios.push(seconds(ours) / seconds(&direct));
            copies.push(median(ours.iter().map(|pull| pull.origin_copies)));
        }
    }
    let worst = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    report.figure("time_ratio", worst(&ratios), Some(Target::AtMost(1.1)));
    report.figure("origin_copies", worst(&copies), Some(Target::AtMost(1.02)));
    Ok(())
}

/// Pulls through all nodes at once, or straight from the origin where there are none.
fn measure(
    stage: &Stage,
    nodes: &[Hawker],
    host: &Host,
    blob: &Blob,
    at_once: u64,
    buffer_bytes: u64,
) -> Result<Pull> {
    stage.origin.clear_log();
    let target = stage.mirror_target(blob);
    let straight = [(stage.origin.address(), host, blob_path(blob))];
    let through = nodes
        .iter()
        .map(|node| (node.mirror(), node.host(), target.clone()));
    let clients: Vec<(SocketAddr, &Host, String)> = if nodes.is_empty() {
        straight.into()
    } else {
        through.collect()
    };
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let clients: Vec<_> = clients
            .iter()
            .map(|(server, host, target)| {
                scope.spawn(|| host.enter(|| in_buffers(*server, target, at_once, buffer_bytes))?)
            })
            .collect();
        clients
            .into_iter()
            .try_for_each(|client| client.join().map_err(|_| anyhow!("a client panicked"))?)
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    // Requests that nobody waits for would show up now.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let origin_copies = stage.origin.totals().blob_bytes as f64 / SIZE_BYTES as f64;
    Ok(Pull {
        seconds,
        origin_copies,
    })
}

/// Reads a whole blob in buffers, in the network namespace of the calling thread.
fn in_buffers(server: SocketAddr, target: &str, at_once: u64, buffer_bytes: u64) -> Result<()> {
    let next = AtomicU64::new(0);
    let work = || -> Result<()> {
        loop {
            let start = next.fetch_add(buffer_bytes, Ordering::Relaxed);
            if start >= SIZE_BYTES {
                return Ok(());
            }
            get_part(
                server,
                target,
                &format!("bytes={start}-"),
                buffer_bytes.min(SIZE_BYTES - start),
            )?;
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| anyhow!("a worker panicked"))?)
    })
}
