//! `sim`: a swarm of thousands in one process, deciding with the daemons' own code: see [`hawker_conformance::sim`].

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use hawker_conformance::lab::{Memory, memory_bytes};
use hawker_conformance::sim::{self, Faults, Outcome, Scenario};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::measure::median;
use crate::report::{Report, Target};

/// The real burst: its size, its links' goodput if it is not measured, and the part that the kernel holds of it:
/// sockets' buffers and the shaped link's own queue (its latency at most).
const BURST_BYTES: u64 = 128 << 20;
const BURST_RATE: f64 = 11.9e6;
const BURST_BUFFER: Duration = Duration::from_millis(60);
const BURST_DELAY: Duration = Duration::from_millis(1);

/// How often a long run says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// The simulation to run. A scenario file has the same names as keys, and its own aims; flags override it.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(crate) struct SimOptions {
    /// A scenario (TOML): any of these flags as keys, and `[aims]`
    #[arg(value_name = "FILE")]
    #[serde(skip)]
    scenario: Option<PathBuf>,
    /// Write the results as JSON into this file
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub(crate) json: Option<PathBuf>,
    /// Draw completion over time into this file
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    svg: Option<PathBuf>,
    /// Nodes that pull, all at once
    #[arg(long)]
    hosts: Option<u32>,
    /// The size of each blob: 3GB, 128MiB
    #[arg(long)]
    size: Option<String>,
    /// Into how many blobs that is cut
    #[arg(long)]
    layers: Option<u32>,
    /// Pieces of 4 MiB at least, where those of a blob of up to 2 GiB would be of 1 MiB: fewer transfers to work out. Always so
    /// from 10,000 hosts on
    #[arg(long)]
    long_pieces: bool,
    /// Each host's link, each way: 300MB/s
    #[arg(long)]
    rate: Option<String>,
    /// The origin's link
    #[arg(long)]
    origin_rate: Option<String>,
    /// Seeds
    #[arg(long)]
    seed_peers: Option<u32>,
    /// Zones; the link of each to the outside carries a tenth of the sum of its hosts'
    #[arg(long)]
    zones: Option<u32>,
    /// The part of the hosts that is slow
    #[arg(long)]
    slow: Option<f64>,
    /// How slow: a part of the rate
    #[arg(long)]
    slow_rate: Option<f64>,
    /// The part of the hosts that dies while it pulls
    #[arg(long)]
    die: Option<f64>,
    /// The part of the hosts that sends wrong bytes
    #[arg(long)]
    lie: Option<f64>,
    /// When the scheduler is restarted, in seconds; may be given several times
    #[arg(long, value_name = "SECONDS")]
    restart_scheduler: Vec<f64>,
    /// Seed of all chance
    #[arg(long)]
    rng: Option<u64>,
    /// As `burst` does it: 128 MiB as one blob and as four, on links like its own
    #[arg(long)]
    like_burst: bool,
    /// With --like-burst: the JSON of a `burst` of as many nodes, to compare with
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    measured: Option<PathBuf>,
    #[arg(skip)]
    aims: Aims,
}

/// The upper bounds of figures.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Aims {
    p50_ratio: Option<f64>,
    p99_ratio: Option<f64>,
    p999_ratio: Option<f64>,
    origin_copies: Option<f64>,
    zone_copies: Option<f64>,
}

pub(crate) fn run(report: &mut Report, flags: &SimOptions) -> Result<()> {
    let options = match &flags.scenario {
        None => flags.clone(),
        Some(file) => flags.clone().over(read(file)?),
    };
    if options.like_burst {
        return like_burst(report, &options);
    }
    let scenario = options.scenario()?;
    let (outcome, _) = simulate(report, &scenario, "")?;
    figures(report, &outcome, &options.aims);
    draw(
        options.svg.as_deref(),
        &outcome,
        &format!("{} hosts", scenario.hosts),
    )
}

fn read(file: &Path) -> Result<SimOptions> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    toml::from_str(&text).with_context(|| format!("in {}", file.display()))
}

impl SimOptions {
    /// These flags, and what they leave open as the file has it.
    fn over(self, file: Self) -> Self {
        let restarts = if self.restart_scheduler.is_empty() {
            file.restart_scheduler
        } else {
            self.restart_scheduler
        };
        Self {
            hosts: self.hosts.or(file.hosts),
            size: self.size.or(file.size),
            layers: self.layers.or(file.layers),
            long_pieces: self.long_pieces || file.long_pieces,
            rate: self.rate.or(file.rate),
            origin_rate: self.origin_rate.or(file.origin_rate),
            seed_peers: self.seed_peers.or(file.seed_peers),
            zones: self.zones.or(file.zones),
            slow: self.slow.or(file.slow),
            slow_rate: self.slow_rate.or(file.slow_rate),
            die: self.die.or(file.die),
            lie: self.lie.or(file.lie),
            restart_scheduler: restarts,
            rng: self.rng.or(file.rng),
            like_burst: self.like_burst || file.like_burst,
            aims: file.aims,
            ..self
        }
    }

    fn scenario(&self) -> Result<Scenario> {
        let plain = Scenario::default();
        let bytes =
            |given: &Option<String>, default: f64| given.as_deref().map_or(Ok(default), quantity);
        let faults = Faults {
            slow: self.slow.unwrap_or(0.0),
            slow_rate: self.slow_rate.unwrap_or(0.33),
            die: self.die.unwrap_or(0.0),
            lie: self.lie.unwrap_or(0.0),
            scheduler_restarts: self
                .restart_scheduler
                .iter()
                .copied()
                .map(Duration::from_secs_f64)
                .collect(),
            ..plain.faults.clone()
        };
        let rate = bytes(&self.rate, plain.rate)?;
        Ok(Scenario {
            hosts: self.hosts.unwrap_or(plain.hosts),
            seed_peers: self.seed_peers.unwrap_or(plain.seed_peers),
            size_bytes: bytes(&self.size, plain.size_bytes as f64)? as u64,
            layers: self.layers.unwrap_or(plain.layers),
            long_pieces: self.long_pieces,
            rate,
            origin_rate: bytes(&self.origin_rate, plain.origin_rate.max(rate))?,
            zones: self.zones.unwrap_or(plain.zones),
            rng: self.rng.unwrap_or(plain.rng),
            faults,
            ..plain
        })
    }
}

/// `3GB`, `128MiB`, `300MB/s`: in bytes.
fn quantity(text: &str) -> Result<f64> {
    let text = text.trim().trim_end_matches("/s");
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "" | "B" => 1.0,
        "KB" | "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        unknown => bail!("{unknown:?} is no unit: write B, KB, MB, GB, KiB, MiB or GiB"),
    };
    let number: f64 = number
        .parse()
        .with_context(|| format!("{text:?} is no quantity"))?;
    ensure!(number * factor >= 1.0, "{text:?} is too little");
    Ok(number * factor)
}

fn simulate(report: &mut Report, scenario: &Scenario, variant: &str) -> Result<(Outcome, f64)> {
    let start = Instant::now();
    let mut told = start;
    let outcome = sim::run_watched(scenario, &mut |progress| {
        if told.elapsed() >= PROGRESS_EVERY {
            told = Instant::now();
            eprintln!(
                "  {:.0} s: {:.2} s simulated, {:.1} % of all pieces, {} nodes to go, {} events",
                start.elapsed().as_secs_f64(),
                progress.at_s,
                100.0 * progress.done,
                progress.unfinished,
                progress.events
            );
        }
    });
    let memory = memory_bytes(std::process::id(), Memory::Resident).context("no /proc")?;
    let per_peer = memory as f64 / f64::from(scenario.hosts + scenario.seed_peers);
    report.run(json!({
        "variant": variant, "nodes": scenario.hosts, "bound_s": outcome.bound_s, "lasted_s": outcome.lasted_s,
        "p50": outcome.quantile(0.5), "p99": outcome.quantile(0.99), "p999": outcome.quantile(0.999),
        "last": outcome.quantile(1.0), "origin_copies": outcome.origin_copies, "seed_copies": outcome.seed_copies,
        "zone_copies": outcome.zone_copies, "duplicates": outcome.duplicates, "wrong_pieces": outcome.wrong_pieces,
        "scheduler_messages_per_s": outcome.scheduler_messages_per_s,
        "peer_messages_per_s": outcome.peer_messages_per_s, "bytes_per_peer": per_peer,
        "events": outcome.events, "wall_s": start.elapsed().as_secs_f64(), "trace": format!("{:016x}", outcome.trace),
    }));
    for violation in outcome.checks.found() {
        println!("  VIOLATED: {violation}");
    }
    ensure!(
        outcome.checks.count() == 0,
        "{} violations",
        outcome.checks.count()
    );
    Ok((outcome, per_peer))
}

fn figures(report: &mut Report, outcome: &Outcome, aims: &Aims) {
    let mut figure =
        |name, value, aim: Option<f64>| report.figure(name, value, aim.map(Target::AtMost));
    figure("p50_ratio", outcome.quantile(0.5), aims.p50_ratio);
    figure("p99_ratio", outcome.quantile(0.99), aims.p99_ratio);
    figure("p999_ratio", outcome.quantile(0.999), aims.p999_ratio);
    figure("origin_copies", outcome.origin_copies, aims.origin_copies);
    figure("zone_copies", outcome.zone_copies, aims.zone_copies);
    figure("scheduler_per_s", outcome.scheduler_messages_per_s, None);
}

fn draw(file: Option<&Path>, outcome: &Outcome, title: &str) -> Result<()> {
    let Some(file) = file else { return Ok(()) };
    std::fs::write(file, sim::completion(outcome, title))
        .with_context(|| format!("writing {}", file.display()))
}

/// The real burst, simulated: `real_ratio` is the simulated time over the measured one, where it is furthest from 1.
fn like_burst(report: &mut Report, options: &SimOptions) -> Result<()> {
    let measured = options
        .measured
        .as_deref()
        .map(bursts)
        .transpose()?
        .unwrap_or_default();
    let rates = measured
        .iter()
        .filter_map(|run| run["goodput_mbit"].as_f64());
    let rate = if measured.is_empty() {
        BURST_RATE
    } else {
        median(rates) * 1e6 / 8.0
    };
    let mut ratios = Vec::new();
    for (layers, variant) in crate::burst::VARIANTS {
        let scenario = Scenario {
            size_bytes: BURST_BYTES,
            layers: layers as u32,
            rate,
            origin_rate: rate,
            buffer: BURST_BUFFER,
            delay: BURST_DELAY,
            turn_bytes: 64 << 10,
            ..options.scenario()?
        };
        let (outcome, _) = simulate(report, &scenario, variant)?;
        report.figure(
            if layers == 1 {
                "one_blob_ratio"
            } else {
                "four_blobs_ratio"
            },
            outcome.quantile(1.0),
            None,
        );
        let real: Vec<f64> = measured
            .iter()
            .filter(|run| run["variant"] == variant && run["nodes"] == scenario.hosts)
            .filter_map(|run| run["seconds"].as_f64())
            .collect();
        if !real.is_empty() {
            ratios.push(outcome.quantile(1.0) * outcome.bound_s / median(real));
        }
        draw(options.svg.as_deref(), &outcome, variant)?;
    }
    let furthest = ratios
        .into_iter()
        .max_by(|a, b| (a - 1.0).abs().total_cmp(&(b - 1.0).abs()));
    if let Some(ratio) = furthest {
        report.figure("real_ratio", ratio, Some(Target::AtMost(1.1)));
    }
    Ok(())
}

/// Hawker's runs in the JSON of a `burst`.
fn bursts(file: &Path) -> Result<Vec<Value>> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let value: Value =
        serde_json::from_str(&text).with_context(|| format!("in {}", file.display()))?;
    let runs = value["runs"].as_array().cloned().unwrap_or_default();
    Ok(runs
        .into_iter()
        .filter(|run| run["side"] == "hawker")
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read() {
        for (text, expected) in [
            ("3GB", 3e9),
            ("128MiB", 134_217_728.0),
            ("300MB/s", 3e8),
            ("1.5 KiB", 1536.0),
            ("7", 7.0),
        ] {
            assert_eq!(quantity(text).unwrap(), expected, "{text}");
        }
        for text in ["", "GB", "3 apples", "-1GB", "0"] {
            assert!(quantity(text).is_err(), "{text}");
        }
    }

    #[test]
    fn flags_override_what_the_scenario_says() {
        let file: SimOptions =
            toml::from_str("hosts = 7\nsize = '1GB'\n[aims]\np50_ratio = 1.1\n").unwrap();
        let options = SimOptions {
            hosts: Some(9),
            ..SimOptions::default()
        }
        .over(file);
        let scenario = options.scenario().unwrap();
        assert_eq!((scenario.hosts, scenario.size_bytes), (9, 1_000_000_000));
        assert_eq!(options.aims.p50_ratio, Some(1.1));
        assert!(toml::from_str::<SimOptions>("hosst = 7").is_err());
    }

    #[test]
    fn every_scenario_that_comes_along_can_be_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let files: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert!(files.len() >= 4);
        for file in files {
            read(&file)
                .and_then(|options| options.scenario().map(drop))
                .unwrap();
        }
    }
}
