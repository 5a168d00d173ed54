//! `hawker-bench NAME --json FILE`: the cost of Hawker and its distance from the limit, against nginx, curl and the
//! bound.
//!
//! Both sides of every ratio are measured in one run, several times in turn; figures are ratios of medians, and over several
//! variants the worst. Needs root (network namespaces), nginx, curl and openssl.

#![allow(clippy::print_stdout, reason = "what it prints is its job")]

mod abuse;
mod baseline;
mod burst;
mod burst_faults;
mod client;
mod cold;
mod cpu;
mod faults;
mod full_disk;
mod goodput;
mod hit;
mod machine;
mod manifest;
mod measure;
mod memory;
mod origin;
mod parallel;
mod ranges;
mod report;
mod scheduler;
mod sim;
mod stage;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use clap::{Args, Parser, Subcommand};

use report::Report;

/// Two threads decide for ten thousand simulated nodes, and free what the other allocated: the C library's allocator makes them wait
/// for each other, and takes half as long again.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
#[command(about = "Measures Hawker against nginx, curl and the bound", version)]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Serving a committed 1 GiB blob on loopback, against nginx with sendfile
    Hit(Options),
    /// A first pull of 512 MiB through node and seed, against curl straight from the origin
    Cold(Options),
    /// Open-ended ranges that are closed after a buffer, several at once, against the same straight from the origin
    Parallel(Options),
    /// Scattered ranges at once, where the seed holds the blob and where nobody does
    Ranges(Options),
    /// CPU of a node that receives 1 GiB from a peer, against curl and openssl
    Cpu(Options),
    /// The same 128 MiB to all nodes at once, against the bound and against curl on all nodes
    Burst(BurstWithFaults),
    /// 128 MiB to four nodes while the seed's disk is full, and when it has room again, against a healthy seed
    FullDisk(Options),
    /// Honest pulls while clients, strangers and members attack, one attack after the other, against the same pulls before
    Abuse(abuse::AbuseOptions),
    /// The delay that the mirror adds to a manifest, 5,000 short connections, and the memory of an idle daemon
    Manifest(Options),
    /// Peak anonymous memory of any Hawker process in a burst and in a 4 GiB pull
    Memory(BurstOptions),
    /// The time of a scheduler's decision and the memory of its books; no daemon runs
    Scheduler(SchedulerOptions),
    /// A swarm of thousands in one process, deciding with the daemons' own code: no daemon runs
    Sim(Box<sim::SimOptions>),
    /// Real nodes killed, stopped, cut off and corrupted by seeded plans while clients pull through them
    Faults(faults::FaultsOptions),
    /// The other side of each ratio on this machine; needs no Hawker
    Machine(Options),
    /// Runs the fault-injecting origin registry until it is ended
    Origin(origin::OriginArgs),
}

#[derive(Args, Clone)]
struct Options {
    /// Write the results as JSON into this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How many times each side is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
}

#[derive(Args, Clone)]
struct BurstOptions {
    #[command(flatten)]
    common: Options,
    /// How many nodes pull at once
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    nodes: u16,
}

#[derive(Args, Clone)]
struct BurstWithFaults {
    #[command(flatten)]
    burst: BurstOptions,
    /// Three nodes are killed in mid-pull, a member lies, the scheduler is restarted: how the others fare
    #[arg(long)]
    faults: bool,
}

#[derive(Args, Clone)]
struct SchedulerOptions {
    #[command(flatten)]
    common: Options,
    /// Peers that are registered
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    peers: u32,
    /// Tasks that are announced
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(100..=4_000_000))]
    tasks: u32,
    /// Peers that hold each of them
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    copies: u32,
}

fn main() -> Result<()> {
    match Cli::parse().bench {
        Bench::Hit(options) => measured("hit", &options, hit::run),
        Bench::Cold(options) => measured("cold", &options, cold::run),
        Bench::Parallel(options) => measured("parallel", &options, parallel::run),
        Bench::Ranges(options) => measured("ranges", &options, ranges::run),
        Bench::Cpu(options) => measured("cpu", &options, cpu::run),
        Bench::Burst(options) => {
            let bench = if options.faults {
                burst_faults::run
            } else {
                burst::run
            };
            measured("burst", &options.burst.common.clone(), |report, _| {
                bench(report, &options.burst)
            })
        }
        Bench::Memory(options) => measured("memory", &options.common.clone(), |report, _| {
            memory::run(report, &options)
        }),
        Bench::FullDisk(options) => measured("full-disk", &options, full_disk::run),
        Bench::Abuse(options) => {
            build_hawker()?;
            written_anyway("abuse", options.json.as_deref(), |report| {
                abuse::run(report, &options)
            })
        }
        Bench::Manifest(options) => measured("manifest", &options, manifest::run),
        Bench::Scheduler(options) => report("scheduler", &options.common.clone(), |report, _| {
            scheduler::run(report, &options)
        }),
        Bench::Sim(options) => written_anyway("sim", options.json.as_deref(), |report| {
            sim::run(report, &options)
        }),
        Bench::Faults(options) => {
            build_hawker()?;
            written_anyway("faults", options.json.as_deref(), |report| {
                faults::run(report, &options)
            })
        }
        Bench::Machine(options) => report("machine", &options, machine::run),
        Bench::Origin(args) => origin::run(&args),
    }
}

/// A bench of the release `hawker`, which is built first.
fn measured(
    name: &'static str,
    options: &Options,
    bench: impl FnOnce(&mut Report, &Options) -> Result<()>,
) -> Result<()> {
    build_hawker()?;
    report(name, options, bench)
}

fn report(
    name: &'static str,
    options: &Options,
    bench: impl FnOnce(&mut Report, &Options) -> Result<()>,
) -> Result<()> {
    let mut report = Report::new(name);
    bench(&mut report, options)?;
    report.print_figures();
    report.write(options.json.as_deref())
}

/// A bench whose results are written even if it fails.
fn written_anyway(
    name: &'static str,
    json: Option<&Path>,
    bench: impl FnOnce(&mut Report) -> Result<()>,
) -> Result<()> {
    let mut report = Report::new(name);
    let outcome = bench(&mut report);
    report.print_figures();
    report.write(json)?;
    outcome
}

/// `HAWKER_BIN`, if set, is measured as it is; otherwise cargo puts a fresh one beside this executable.
fn build_hawker() -> Result<()> {
    if std::env::var_os("HAWKER_BIN").is_some() {
        return Ok(());
    }
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = [
        "build",
        "--release",
        "-p",
        "hawker",
        "--manifest-path",
        manifest,
    ];
    let status = Command::new(cargo)
        .args(arguments)
        .status()
        .context("starting cargo: is it in PATH?")?;
    ensure!(status.success(), "building hawker failed: {status}");
    Ok(())
}
