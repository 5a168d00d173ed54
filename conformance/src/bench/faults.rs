//! `faults`: fault runs on real nodes, see [`hawker_conformance::faults`]: as many seeds as asked for, or one again.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use hawker_conformance::faults::{self, Kind, Outcome, Plan};
use serde_json::json;

use crate::measure::{median, together};
use crate::report::{Report, Target};

#[derive(Args, Clone)]
pub(crate) struct FaultsOptions {
    /// Write the results as JSON into this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// How many seeds
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    runs: u64,
    /// The first of them
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=u64::from(u32::MAX)))]
    seed: u64,
    /// How many runs at once: most of a run is waiting
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// Keep the logs of failed runs in this folder
    #[arg(long, value_name = "FOLDER", default_value = "/var/tmp/hawker-faults")]
    logs: PathBuf,
}

pub(crate) fn run(report: &mut Report, options: &FaultsOptions) -> Result<()> {
    let next = AtomicU64::new(options.seed);
    let end = options.seed + options.runs;
    let (report_of_all, outcomes) = (Mutex::new(report), Mutex::new(Vec::new()));
    together((0..options.jobs).map(|_| {
        || loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return Ok(());
            }
            let plan = Plan::of(seed);
            let outcome = faults::run(&plan, &options.logs)
                .with_context(|| format!("the run itself failed\n{plan}"))?;
            let poisoned = "a thread that noted a run panicked";
            tell(
                *report_of_all.lock().ok().context(poisoned)?,
                &plan,
                &outcome,
            );
            outcomes.lock().ok().context(poisoned)?.push(outcome);
        }
    }))?;
    let report = report_of_all
        .into_inner()
        .ok()
        .context("a run's thread panicked")?;
    let outcomes = outcomes
        .into_inner()
        .ok()
        .context("a run's thread panicked")?;
    let failed = outcomes
        .iter()
        .filter(|outcome| !outcome.violations.is_empty())
        .count();
    let count = |kind: Kind| {
        outcomes
            .iter()
            .map(|outcome| outcome.count(kind))
            .sum::<usize>() as f64
    };
    report.figure("failed_seeds", failed as f64, Some(Target::AtMost(0.0)));
    report.figure(
        "wrong_bytes",
        count(Kind::WrongBytes),
        Some(Target::AtMost(0.0)),
    );
    report.figure("hangs", count(Kind::Hang), Some(Target::AtMost(0.0)));
    report.figure(
        "run_s",
        median(outcomes.iter().map(|outcome| outcome.total.as_secs_f64())),
        None,
    );
    report.figure(
        "pull_s_most",
        outcomes.iter().map(slowest_s).fold(0.0, f64::max),
        None,
    );
    ensure!(failed == 0, "{failed} of {} seeds failed", outcomes.len());
    Ok(())
}

fn slowest_s(outcome: &Outcome) -> f64 {
    outcome
        .pulls
        .iter()
        .max()
        .map_or(0.0, std::time::Duration::as_secs_f64)
}

fn tell(report: &mut Report, plan: &Plan, outcome: &Outcome) {
    report.run(json!({
        "seed": plan.seed, "troubles": plan.troubles.len(), "pulls": outcome.pulls.len(),
        "violations": outcome.violations.len(), "slowest_pull_s": slowest_s(outcome),
        "seconds": outcome.total.as_secs_f64(),
    }));
    if let Some(logs) = &outcome.logs {
        println!("{plan}");
        outcome
            .violations
            .iter()
            .for_each(|violation| println!("{:?}: {}", violation.kind, violation.what));
        println!(
            "logs: {}; again: hawker-bench faults --seed {}",
            logs.display(),
            plan.seed
        );
    }
}
