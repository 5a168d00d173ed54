//! Configuration that a scheduler pushes to real nodes.

use std::time::Duration;

use anyhow::{Result, ensure};
use hawker_conformance::lab::{Hawker, HawkerPlan};
use hawker_conformance::origin::{Blob, Content, Origin};
use hawker_conformance::scene::{Configured, REPOSITORY, blob_path, right, until, with_origin};

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(20);

fn blob(origin: &Origin, seed: u64) -> Result<Blob> {
    Ok(origin.add_blob(REPOSITORY, Content::generated(seed, 8 * MIB))?)
}

fn pull(node: &Hawker, origin: &Origin, blob: &Blob) -> Result<Duration> {
    let request = node
        .request(origin.address(), &blob_path(blob))
        .discard()
        .within(Duration::from_secs(90));
    Ok(right(request.send(node.host())?, blob)?.total)
}

/// The rate of 8 MiB at 2 MB/s holds a pull for 4 s.
fn held(what: &str, took: Duration) -> Result<()> {
    ensure!(
        (3..9).contains(&took.as_secs()),
        "{what}: the pull takes {took:?}"
    );
    Ok(())
}

/// The line of `hawker config show proxy` for a key.
fn shown(node: &Hawker, key: &str) -> Result<String> {
    let data_dir = format!("--data-dir={}", node.data_dir().display());
    let output = node
        .cli()?
        .args(["config", "show", "proxy", &data_dir])
        .output()?;
    let page = String::from_utf8(output.stdout)?;
    let line = page.lines().find(|line| line.starts_with(key));
    Ok(line.map(str::to_owned).unwrap_or(page))
}

#[test]
fn pushed_values_apply_at_once_and_outlive_the_scheduler_and_a_bad_document_changes_nothing()
-> Result<()> {
    with_origin(|lab, origin| {
        let host = lab.host("seed")?;
        let mut seed = Configured::start(HawkerPlan::up(&host), &host, origin, "")?;
        let mut node = seed.join(lab, origin, "node", "[cache]\nlow = 70\n")?.node;
        let blobs = (0..4)
            .map(|seed| blob(origin, seed))
            .collect::<Result<Vec<_>>>()?;
        let free = pull(&node, origin, &blobs[0])?;
        ensure!(
            free < Duration::from_secs(3),
            "without a rate the pull takes {free:?}"
        );

        let rates = "[nodes]\nlinger = \"45s\"\n[nodes.rates]\norigin = \"2MB\"\n";
        seed.set(rates)?;
        until(SOON, "the node has the pushed values", || {
            Ok(shown(&node, "linger")?.contains("45s"))
        })?;
        let line = shown(&node, "linger")?;
        ensure!(line.contains("pushed by scheduler"), "{line}");
        held("the pushed rate", pull(&node, origin, &blobs[1])?)?;

        // The mark does not fit the node's own one.
        seed.set("[nodes]\nlinger = \"10s\"\n[nodes.cache]\nhigh = 60\n")?;
        until(SOON, "the scheduler sees the refusal", || {
            Ok(seed
                .node
                .metric("hawker_scheduler_configuration_refused", &[])?
                == 1.0)
        })?;
        let members = seed
            .node
            .cli()?
            .args(["member", "ls", "--data-dir"])
            .arg(seed.node.data_dir())
            .output()?;
        let members = String::from_utf8(members.stdout)?;
        ensure!(
            members.contains("refuses the pushed configuration"),
            "{members}"
        );
        ensure!(members.contains("low mark"), "{members}");
        let status = seed.node.status()?;
        ensure!(
            status
                .problem
                .contains("node: the configuration has 1 error"),
            "{}",
            status.problem
        );
        let line = shown(&node, "linger")?;
        ensure!(
            line.contains("45s"),
            "a document is refused as a whole: {line}"
        );

        // A faulty file is refused by the scheduler itself.
        seed.set("[nodes]\ndata_dir = \"/x\"\n")?;
        ensure!(
            seed.node.log().contains("may not be pushed"),
            "{}",
            seed.node.log()
        );

        seed.node.kill()?;
        node.kill()?;
        node.restart()?;
        held("the rate from the disk", pull(&node, origin, &blobs[2])?)
    })
}
