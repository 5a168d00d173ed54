//! `machine`: the other side of each ratio on this machine: the goodput of shaped links, nginx, curl and openssl. No
//! Hawker takes part; the figures help to judge other runs.

use std::path::Path;

use anyhow::Result;
use hawker_conformance::lab::Mbit;
use serde_json::json;

use crate::Options;
use crate::baseline::{Nginx, curl};
use crate::goodput::{alone, both_ways, mbit};
use crate::measure::{GIB, MIB, Watch, median, with_load};
use crate::report::Report;
use crate::stage::Stage;
use crate::{cpu, hit};

pub(crate) fn run(report: &mut Report, options: &Options) -> Result<()> {
    links(report, options)?;
    servers(report, options)
}

fn links(report: &mut Report, options: &Options) -> Result<()> {
    for (rate, names) in [
        (100, ["goodput_100_one_way", "goodput_100_both_ways"]),
        (200, ["goodput_200_one_way", "goodput_200_both_ways"]),
    ] {
        let stage = Stage::new(Some(Mbit(rate)), 1)?;
        let node = stage.host("node")?;
        let (mut single, mut double) = (Vec::new(), Vec::new());
        for round in 1..=options.rounds {
            let [forth, back] = both_ways(&stage.origin_host, &node)?.map(mbit);
            let one_way = mbit(alone(&stage.origin_host, &node)?);
            report.run(
                json!({"link_mbit": rate, "round": round, "one_way": one_way, "both_ways": [forth, back]}),
            );
            single.push(one_way);
            double.push(forth.min(back));
        }
        report.figure(names[0], median(single), None);
        report.figure(names[1], median(double), None);
    }
    Ok(())
}

fn servers(report: &mut Report, options: &Options) -> Result<()> {
    let mut stage = Stage::new(None, 4)?;
    let (host, client) = (stage.host("server")?, stage.host("client")?);
    let blob = stage.fresh_blob(GIB)?;
    let file = host.dir().join("blob");
    curl(&host, &stage.origin_url(&blob), &file, None)?;
    let nginx = Nginx::start(&host)?;
    nginx.serve(&file)?;
    for (clients, names) in [
        (1, ["nginx_1_gib_per_s", "nginx_1_cpu_s_per_gib"]),
        (8, ["nginx_8_gib_per_s", "nginx_8_cpu_s_per_gib"]),
    ] {
        let rounds =
            (1..=options.rounds).map(|round| hit::nginx(report, &host, &nginx, clients, round));
        let served = rounds.collect::<Result<Vec<_>>>()?;
        report.figure(
            names[0],
            median(served.iter().map(|served| served.gib_per_s)),
            None,
        );
        report.figure(
            names[1],
            median(served.iter().map(|served| served.cpu_s_per_gib)),
            None,
        );
    }
    for (tls, name) in [
        (true, "curl_https_openssl_cpu_s_per_gib"),
        (false, "curl_http_openssl_cpu_s_per_gib"),
    ] {
        let rounds = (1..=options.rounds)
            .map(|round| cpu::curl_and_openssl(report, &client, &nginx, &blob, tls, round));
        let cpu_s = median(rounds.collect::<Result<Vec<_>>>()?);
        report.figure(name, cpu_s, None);
    }
    origin(report, &mut stage, options)
}

/// How fast the origin itself can feed: it must not be what limits.
fn origin(report: &mut Report, stage: &mut Stage, options: &Options) -> Result<()> {
    let host = stage.host("puller")?;
    let mut rates = Vec::new();
    for round in 1..=options.rounds {
        let blob = stage.fresh_blob(GIB)?;
        let watch = Watch::start()?;
        let got = curl(
            &host,
            &stage.origin_url(&blob),
            Path::new("/dev/null"),
            None,
        )?;
        rates.push(GIB as f64 / got.seconds / MIB as f64);
        report.run(with_load(
            json!({"side": "origin", "round": round, "seconds": got.seconds}),
            watch.stop()?,
        ));
    }
    report.figure("origin_mib_per_s", median(rates), None);
    Ok(())
}
