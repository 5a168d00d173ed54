//! `cpu`: the CPU time of a node that receives 1 GiB from a peer over TLS, verifies it, stores it and serves it to its
//! client, against `curl -o f` over TLS and `openssl dgst -sha256 f`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{Bytes, Cluster, Host};
use hawker_conformance::origin::Blob;
use serde_json::json;

use crate::Options;
use crate::baseline::{Nginx, curl, openssl_sha256};
use crate::client::get;
use crate::measure::{GIB, Watch, cpu_seconds, median, with_load};
use crate::report::{Report, Target};
use crate::stage::{Stage, committed};

const SIZE_BYTES: u64 = GIB;

pub(crate) fn run(report: &mut Report, options: &Options) -> Result<()> {
    let mut stage = Stage::new(None, 3 + 2 * u64::from(options.rounds))?;
    let cluster = stage.cluster(1)?;
    let nginx = Nginx::start(cluster.seed.host())?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        let blob = stage.fresh_blob(SIZE_BYTES)?;
        let target = stage.mirror_target(&blob);
        let seed = &cluster.seed;
        seed.host().enter(|| get(seed.mirror(), &target, None))??;
        nginx.serve(&committed(seed, &blob)?)?;
        ours.push(node(report, &cluster, &target, &blob, round)?);
        theirs.push(curl_and_openssl(
            report,
            cluster.nodes[0].host(),
            &nginx,
            &blob,
            true,
            round,
        )?);
        curl_and_openssl(report, cluster.nodes[0].host(), &nginx, &blob, false, round)?;
    }
    report.figure(
        "cpu_ratio",
        median(ours) / median(theirs),
        Some(Target::AtMost(2.0)),
    );
    Ok(())
}

/// CPU seconds that the node spends from the request until the blob is served and committed.
fn node(
    report: &mut Report,
    cluster: &Cluster,
    target: &str,
    blob: &Blob,
    round: u32,
) -> Result<f64> {
    let node = &cluster.nodes[0];
    let pid = node.pid().context("the node ended")?;
    let before = (cpu_seconds(pid)?, node.status()?.bytes);
    let watch = Watch::start()?;
    let got = node.host().enter(|| get(node.mirror(), target, None))??;
    let load = watch.stop()?;
    committed(node, blob)?;
    // The work after a commit (telling the tracker, closing files) counts as well.
    std::thread::sleep(Duration::from_millis(200));
    let cpu_s = cpu_seconds(pid)? - before.0;
    let bytes = node.status()?.bytes;
    let received = |bytes: &Bytes| bytes.received_peers + bytes.received_seeds;
    let from_peers = (received(&bytes) - received(&before.1)) as f64 / SIZE_BYTES as f64;
    ensure!(
        from_peers > 0.99,
        "only {from_peers:.3} of the blob came from a peer: this is not what is to be measured"
    );
    let run = json!({
        "side": "hawker", "round": round, "cpu_s": cpu_s, "seconds": got.seconds(),
        "from_peers": from_peers,
    });
    report.run(with_load(run, load));
    Ok(cpu_s)
}

/// CPU seconds of both commands together, fetching from nginx by HTTPS (TLS 1.3) or HTTP.
pub(crate) fn curl_and_openssl(
    report: &mut Report,
    host: &Host,
    nginx: &Nginx,
    blob: &Blob,
    tls: bool,
    round: u32,
) -> Result<f64> {
    let file = host.dir().join("curled");
    let url = if tls {
        nginx.https_url()
    } else {
        nginx.http_url()
    };
    let certificate = nginx.certificate();
    let watch = Watch::start()?;
    let fetched = curl(host, &url, &file, tls.then_some(certificate.as_path()))?;
    let openssl_cpu_s = openssl_sha256(&file, &blob.digest.hex())?;
    let load = watch.stop()?;
    remove(&file)?;
    let cpu_s = fetched.cpu_s + openssl_cpu_s;
    let run = json!({
        "side": if tls { "curl https + openssl" } else { "curl http + openssl" }, "round": round, "cpu_s": cpu_s,
        "curl_cpu_s": fetched.cpu_s, "openssl_cpu_s": openssl_cpu_s, "seconds": fetched.seconds,
    });
    report.run(with_load(run, load));
    Ok(cpu_s)
}

fn remove(file: &Path) -> Result<()> {
    fs::remove_file(file).with_context(|| format!("removing {}", file.display()))
}
