//! `full-disk`: the same 128 MiB to four nodes at once, all links 100 Mbit/s: with room on the seed's disk, with that disk full, and a
//! few seconds after it has room again.

use std::time::Duration;

use anyhow::Result;
use hawker_conformance::lab::ClusterPlan;

use crate::Options;
use crate::burst::{Burst, LINK, TOTAL_BYTES, measure};
use crate::measure::{MIB, median};
use crate::report::{Report, Target};
use crate::stage::Stage;

const NODES: usize = 4;

/// The seed finds out within this time that its disk has room again.
const RECOVERY: Duration = Duration::from_secs(5);

pub(crate) fn run(report: &mut Report, options: &Options) -> Result<()> {
    let mut stage = Stage::new(Some(LINK), 1)?;
    // Room for all that the nodes are to keep: only the seed's disk is to be full.
    let disk_mib = (3 * u64::from(options.rounds) + 4) * TOTAL_BYTES / MIB;
    let cluster = stage.cluster_of(ClusterPlan {
        nodes: NODES,
        disk_mib: Some(disk_mib),
        ..ClusterPlan::default()
    })?;
    let seed_disk = cluster.seed.disk();
    let (mut healthy, mut full, mut room_again) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        healthy.push(measure(report, &mut stage, &cluster, 1, "healthy", round)?);
        seed_disk.fill()?;
        full.push(measure(
            report,
            &mut stage,
            &cluster,
            1,
            "seed full",
            round,
        )?);
        seed_disk.make_room()?;
        std::thread::sleep(RECOVERY);
        room_again.push(measure(
            report,
            &mut stage,
            &cluster,
            1,
            "room again",
            round,
        )?);
    }
    let seconds = |bursts: &[Burst]| median(bursts.iter().map(|burst| burst.seconds));
    let copies = |bursts: &[Burst]| median(bursts.iter().map(|burst| burst.origin_copies));
    report.figure(
        "time_ratio",
        seconds(&full) / seconds(&healthy),
        Some(Target::AtMost(1.3)),
    );
    report.figure("origin_copies", copies(&full), Some(Target::AtMost(1.05)));
    let again = seconds(&room_again) / seconds(&healthy);
    report.figure("room_again_time_ratio", again, Some(Target::AtMost(1.05)));
    report.figure(
        "room_again_origin_copies",
        copies(&room_again),
        Some(Target::AtMost(1.02)),
    );
    Ok(())
}
