//! Fault runs on real nodes, by the rule of [`hawker_conformance::faults`]. Two hundred more: `hawker-bench faults --runs 200`.

use std::path::Path;

use anyhow::{Result, ensure};
use hawker_conformance::faults::{Plan, run};
use hawker_conformance::scene::join;

#[test]
fn whatever_breaks_every_pull_ends_in_time_with_right_bytes_or_for_a_reason() -> Result<()> {
    let seeds = |seeds: &'static [u64]| {
        move || -> Result<()> {
            for seed in seeds {
                let plan = Plan::of(*seed);
                let outcome = run(&plan, Path::new("/var/tmp/hawker-faults"))?;
                ensure!(outcome.violations.is_empty(), "{plan}\n{:#?}", outcome);
            }
            Ok(())
        }
    };
    std::thread::scope(|scope| {
        let runs = [scope.spawn(seeds(&[1, 2, 3])), scope.spawn(seeds(&[4, 5]))];
        runs.into_iter().try_for_each(|run| join(run.join()))
    })
}
