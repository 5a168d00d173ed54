//! `manifest`: the delay that the mirror adds to a manifest by tag, about which the registry is asked each time; the
//! answers to thousands of short connections; the memory of an idle daemon.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{Hawker, Host, Memory, memory_bytes};
use hawker_conformance::origin::{Blob, Content};
use serde_json::json;

use crate::Options;
use crate::measure::{MIB, Watch, median, together, with_load};
use crate::report::{Report, Target};
use crate::stage::{REPOSITORY, Stage};

/// Requests to each side in a round.
const REQUESTS: usize = 2000;
/// Requests to one side before it is the other's turn: other work of the machine hits both sides.
const IN_TURN: usize = 10;
/// Differences measured at least; the median counts.
const ROUNDS: u32 = 5;
/// Short connections, and how long their beginnings are spread over.
const SHORT: usize = 5000;
const WITHIN: Duration = Duration::from_secs(10);
/// Clients that make them.
const CLIENTS: usize = 8;
/// How long a daemon is left alone before it counts as idle.
const IDLE: Duration = Duration::from_secs(5);
/// Nothing that is measured may be silent for so long.
const SILENCE: Duration = Duration::from_secs(10);
/// The layers that the image names: about what real ones have.
const LAYERS: u64 = 12;

pub(crate) fn run(report: &mut Report, options: &Options) -> Result<()> {
    let stage = Stage::new(None, 1)?;
    let cluster = stage.cluster(1)?;
    let node = &cluster.nodes[0];
    let mut idle = idle_mib(report, node, "after its start")?;

    let layers: Vec<_> = (0..LAYERS)
        .map(|seed| Content::generated(seed, 1000))
        .collect();
    let image = stage.origin.add_image(REPOSITORY, "v1", &layers)?;
    let path = |reference: &str| format!("/v2/{REPOSITORY}/manifests/{reference}");
    let ns = stage.registry().replace(':', "%3A");
    let through = |path: &str| format!("{path}?ns={ns}");

    let (tag, by_digest) = (path("v1"), through(&path(&image.digest.to_string())));
    let sides = [
        (stage.origin.address(), tag.clone()),
        (node.mirror(), through(&tag)),
    ];
    let (mut p50, mut p99) = (Vec::new(), Vec::new());
    for round in 1..=options.rounds.max(ROUNDS) {
        let [origin, mirror] = in_turn(report, node.host(), &sides, image, round)?;
        p50.push(mirror.p50_ms - origin.p50_ms);
        p99.push(mirror.p99_ms - origin.p99_ms);
    }
    let failed = short_connections(report, node, &by_digest, image)?;
    idle = idle.max(idle_mib(report, node, "after short connections")?);
    report.figure("added_p50_ms", median(p50), Some(Target::AtMost(1.0)));
    report.figure("added_p99_ms", median(p99), Some(Target::AtMost(3.0)));
    report.figure("failed", failed as f64, Some(Target::AtMost(0.0)));
    report.figure("idle_rss_mib", idle, Some(Target::AtMost(40.0)));
    Ok(())
}

struct Latency {
    p50_ms: f64,
    p99_ms: f64,
}

impl Latency {
    fn of(mut times_ms: Vec<f64>) -> Self {
        times_ms.sort_by(f64::total_cmp);
        let at = |share: f64| times_ms[((times_ms.len() - 1) as f64 * share) as usize];
        Self {
            p50_ms: at(0.5),
            p99_ms: at(0.99),
        }
    }
}

/// One connection to each side, kept alive, and a few requests to each in turn.
fn in_turn(
    report: &mut Report,
    host: &Host,
    sides: &[(SocketAddr, String); 2],
    image: Blob,
    round: u32,
) -> Result<[Latency; 2]> {
    let watch = Watch::start()?;
    let times = host.enter(|| -> Result<_> {
        let mut clients = [Client::to(sides[0].0)?, Client::to(sides[1].0)?];
        let mut times: [Vec<f64>; 2] = Default::default();
        for turn in 0..2 * REQUESTS / IN_TURN {
            let side = turn % 2;
            for _ in 0..IN_TURN {
                let start = Instant::now();
                let length = clients[side].get(&sides[side].1, "keep-alive")?;
                times[side].push(start.elapsed().as_secs_f64() * 1e3);
                ensure!(
                    length == image.size_bytes,
                    "{length} bytes of a manifest of {}",
                    image.size_bytes
                );
            }
        }
        Ok(times)
    })??;
    let load = watch.stop()?;
    let latencies = times.map(Latency::of);
    let names = ["origin", "hawker"];
    for (latency, side) in latencies.iter().zip(names) {
        let run = json!({"side": side, "round": round, "p50_ms": latency.p50_ms, "p99_ms": latency.p99_ms});
        report.run(with_load(run, load.clone()));
    }
    Ok(latencies)
}

/// Connections for one request each; how many were not answered with the manifest.
fn short_connections(
    report: &mut Report,
    node: &Hawker,
    target: &str,
    image: Blob,
) -> Result<usize> {
    let (mirror, each) = (node.mirror(), SHORT / CLIENTS);
    let watch = Watch::start()?;
    let start = Instant::now();
    let answered = node.host().enter(|| {
        together((0..CLIENTS).map(|client| {
            move || {
                let mut answered = 0;
                for n in 0..each {
                    let due = WITHIN.mul_f64((n * CLIENTS + client) as f64 / SHORT as f64);
                    std::thread::sleep(due.saturating_sub(start.elapsed()));
                    let got = Client::to(mirror).and_then(|mut client| client.get(target, "close"));
                    answered += usize::from(got.is_ok_and(|length| length == image.size_bytes));
                }
                Ok(answered)
            }
        }))
    })??;
    let seconds = start.elapsed().as_secs_f64();
    let failed = SHORT - answered.iter().sum::<usize>();
    let run = json!({"side": "hawker", "clients": CLIENTS, "connections": SHORT, "failed": failed, "seconds": seconds});
    report.run(with_load(run, watch.stop()?));
    Ok(failed)
}

/// The memory of a daemon that has nothing to do, all of its used code included.
fn idle_mib(report: &mut Report, node: &Hawker, during: &str) -> Result<f64> {
    std::thread::sleep(IDLE);
    let bytes = memory_bytes(node.pid().context("the node ended")?, Memory::Resident)
        .context("the node ended")?;
    let mib = bytes as f64 / MIB as f64;
    report.run(json!({"during": during, "rss_mib": mib}));
    Ok(mib)
}

/// A client with one connection, whose own work is next to nothing.
struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    fn to(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, SILENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        Ok(Self {
            stream,
            buffer: vec![0; 64 << 10],
        })
    }

    /// The length of the body of a 200.
    fn get(&mut self, target: &str, connection: &str) -> Result<u64> {
        let head = format!(
            "GET {target} HTTP/1.1\r\nHost: bench\r\nAccept: */*\r\nConnection: {connection}\r\n\r\n"
        );
        self.stream.write_all(head.as_bytes())?;
        let mut read = 0;
        let (length, whole) = loop {
            let count = self.stream.read(&mut self.buffer[read..])?;
            ensure!(count > 0, "the connection ended within the answer");
            read += count;
            let Some(end) = self.buffer[..read]
                .windows(4)
                .position(|w| w == b"\r\n\r\n")
            else {
                continue;
            };
            let length = crate::client::content_length(&self.buffer[..end])?;
            break (length, end + 4 + length as usize);
        };
        ensure!(whole <= self.buffer.len(), "a manifest of {length} bytes");
        self.stream
            .read_exact(&mut self.buffer[read.min(whole)..whole])?;
        Ok(length)
    }
}
