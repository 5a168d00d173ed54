//! `hit`: a committed 1 GiB blob served on loopback to 1 and to 8 clients, against nginx with sendfile on the same file.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{HawkerPlan, Host};
use serde_json::json;

use crate::Options;
use crate::baseline::Nginx;
use crate::client::get;
use crate::measure::{GIB, Watch, cpu_seconds, median, together, with_load};
use crate::report::{Report, Target};
use crate::stage::{Stage, committed};

const SIZE_BYTES: u64 = GIB;
/// The least that one measurement moves, so that neither clock ticks nor the choice of cores matter.
const MOVED_GIB: u64 = 8;

/// One side of the comparison: its address, and the processes whose CPU time counts.
#[derive(Clone, Copy)]
struct Side<'a> {
    name: &'static str,
    server: SocketAddr,
    target: &'a str,
    pid: u32,
}

/// The result of one measurement.
pub(crate) struct Served {
    pub(crate) gib_per_s: f64,
    pub(crate) cpu_s_per_gib: f64,
}

pub(crate) fn run(report: &mut Report, options: &Options) -> Result<()> {
    let mut stage = Stage::new(None, 3)?;
    let host = stage.host("node")?;
    let hawker = HawkerPlan::proxy(&host)
        .plain_registry(stage.registry())
        .start()?;
    let blob = stage.fresh_blob(SIZE_BYTES)?;
    let target = stage.mirror_target(&blob);
    host.enter(|| get(hawker.mirror(), &target, None))??;
    let nginx = Nginx::start(&host)?;
    nginx.serve(&committed(&hawker, &blob)?)?;
    stage.origin.clear_log();

    let pid = hawker.pid().context("hawker ended")?;
    let ours = Side {
        name: "hawker",
        server: hawker.mirror(),
        target: &target,
        pid,
    };
    let theirs = Side {
        name: "nginx",
        server: nginx.loopback(),
        target: "/blob",
        pid: nginx.pid(),
    };
    let mut addresses = Addresses(0);
    let (mut throughput, mut cpu) = (f64::INFINITY, 0_f64);
    for clients in [1, 8] {
        let mut found = [Vec::new(), Vec::new()];
        for round in 1..=options.rounds {
            for (side, found) in [ours, theirs].into_iter().zip(&mut found) {
                found.push(measure(
                    report,
                    &host,
                    side,
                    clients,
                    round,
                    &mut addresses,
                )?);
            }
        }
        let ratio = |value: fn(&Served) -> f64| {
            median(found[0].iter().map(value)) / median(found[1].iter().map(value))
        };
        throughput = throughput.min(ratio(|served| served.gib_per_s));
        cpu = cpu.max(ratio(|served| served.cpu_s_per_gib));
    }
    ensure!(
        stage.origin.totals().blob_bytes == 0,
        "the origin sent bytes of a blob that was committed"
    );
    report.figure("throughput_ratio", throughput, Some(Target::AtLeast(0.9)));
    report.figure("cpu_ratio", cpu, Some(Target::AtMost(1.5)));
    Ok(())
}

/// nginx alone, for `machine`.
pub(crate) fn nginx(
    report: &mut Report,
    host: &Host,
    nginx: &Nginx,
    clients: u64,
    round: u32,
) -> Result<Served> {
    let side = Side {
        name: "nginx",
        server: nginx.loopback(),
        target: "/blob",
        pid: nginx.pid(),
    };
    measure(report, host, side, clients, round, &mut Addresses(0))
}

/// Loopback addresses that were not used before. A client that asks again for what it has got is suspicious of it, and has
/// the node rehash it; these clients are not meant to be the same one.
struct Addresses(u32);

impl Addresses {
    fn next(&mut self) -> IpAddr {
        self.0 += 1;
        Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 0).to_bits() + self.0).into()
    }
}

fn measure(
    report: &mut Report,
    host: &Host,
    side: Side<'_>,
    clients: u64,
    round: u32,
    addresses: &mut Addresses,
) -> Result<Served> {
    let times = MOVED_GIB.div_ceil(clients);
    let sources: Vec<Vec<IpAddr>> = (0..clients)
        .map(|_| (0..times).map(|_| addresses.next()).collect())
        .collect();
    let cpu = cpu_seconds(side.pid)?;
    let watch = Watch::start()?;
    let got = host.enter(|| {
        together(sources.into_iter().map(|sources| {
            move || {
                sources
                    .into_iter()
                    .map(|from| get(side.server, side.target, Some(from)))
                    .collect::<Result<Vec<_>>>()
            }
        }))
    })??;
    let load = watch.stop()?;
    let got: Vec<_> = got.into_iter().flatten().collect();
    let start = got.iter().map(|got| got.start).min().context("no client")?;
    let end = got.iter().map(|got| got.end).max().context("no client")?;
    // The server's own end of the last response is still to be accounted.
    std::thread::sleep(Duration::from_millis(50));
    let gib = got.iter().map(|got| got.body_bytes).sum::<u64>() as f64 / GIB as f64;
    let served = Served {
        gib_per_s: gib / (end - start).as_secs_f64(),
        cpu_s_per_gib: (cpu_seconds(side.pid)? - cpu) / gib,
    };
    let run = json!({
        "side": side.name, "clients": clients, "round": round,
        "gib_per_s": served.gib_per_s, "cpu_s_per_gib": served.cpu_s_per_gib,
    });
    report.run(with_load(run, load));
    Ok(served)
}
