//! The disk is damaged while the daemon is stopped: no wrong byte leaves afterwards, and what was lost is fetched anew.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{Answer, End, Hawker};
use hawker_conformance::origin::Blob;
use hawker_conformance::scene::{
    Plan, Scene, committed_path, join, partial_path, right, rot, until, until_committed,
};

const SIZE_BYTES: u64 = 5 << 20;

/// Damages a blob's file, or the table at the second path.
type Damage = fn(&Path, &Path) -> Result<()>;

const DAMAGES: [(&str, Damage); 14] = [
    ("a byte in the middle", |blob, _| rot(blob)),
    ("the first byte", |blob, _| flip(blob, 0)),
    ("the last byte", |blob, _| flip(blob, SIZE_BYTES - 1)),
    ("all zeros", |blob, _| {
        Ok(fs::write(blob, vec![0; SIZE_BYTES as usize])?)
    }),
    ("cut", |blob, _| {
        Ok(File::options()
            .write(true)
            .open(blob)?
            .set_len(SIZE_BYTES - 1)?)
    }),
    ("longer by zeros", |blob, _| {
        Ok(File::options()
            .write(true)
            .open(blob)?
            .set_len(SIZE_BYTES + 4096)?)
    }),
    ("empty", |blob, _| Ok(fs::write(blob, b"")?)),
    ("a folder", |blob, _| {
        Ok(fs::remove_file(blob).and_then(|()| fs::create_dir(blob))?)
    }),
    ("a link", |blob, _| {
        let elsewhere = blob.with_extension("moved");
        fs::rename(blob, &elsewhere)?;
        Ok(std::os::unix::fs::symlink(elsewhere, blob)?)
    }),
    ("a pipe", |blob, _| {
        fs::remove_file(blob)?;
        ensure!(
            std::process::Command::new("mkfifo")
                .arg(blob)
                .status()?
                .success()
        );
        Ok(())
    }),
    ("a byte of the table", |_, table| rot(table)),
    ("the table cut", |_, table| {
        Ok(File::options().write(true).open(table)?.set_len(100)?)
    }),
    ("the table gone", |_, table| Ok(fs::remove_file(table)?)),
    ("both", |blob, table| rot(blob).and_then(|()| rot(table))),
];

fn flip(path: &Path, at: u64) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    Ok(file.write_all_at(&[!byte[0]], at)?)
}

fn table(node: &Hawker, blob: &Blob) -> PathBuf {
    committed_path(node, blob).with_extension("table")
}

fn range(scene: &Scene, node: &Hawker, blob: &Blob, range: &str) -> Result<Answer> {
    let request = node.request(
        scene.registry(),
        &hawker_conformance::scene::blob_path(blob),
    );
    request.header("range", range).send(node.host())
}

#[test]
fn damage_under_a_stopped_daemon_never_reaches_a_client() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blobs: Vec<_> = DAMAGES
            .iter()
            .map(|_| scene.blob(SIZE_BYTES))
            .collect::<Result<_>>()?;
        let swapped = [scene.blob(SIZE_BYTES)?, scene.blob(SIZE_BYTES)?];
        let healthy = scene.blob(SIZE_BYTES)?;
        let mut parts = Vec::new();
        for blob in blobs.iter().chain(&swapped).chain([&healthy]) {
            let part = range(scene, scene.node(), blob, "bytes=2621000-2622999")?;
            ensure!(part.status == 206 && part.end == End::Complete);
            scene.pull(scene.node(), blob)?;
            until_committed(scene.node(), blob)?;
            parts.push((*blob, part.body));
        }
        scene.cluster.nodes[0].kill()?;
        for ((what, damage), blob) in DAMAGES.iter().zip(&blobs) {
            let (file, table) = (
                committed_path(scene.node(), blob),
                table(scene.node(), blob),
            );
            damage(&file, &table).with_context(|| format!("damaging: {what}"))?;
        }
        let [one, other] = swapped
            .each_ref()
            .map(|blob| committed_path(scene.node(), blob));
        let aside = one.with_extension("aside");
        fs::rename(&one, &aside)?;
        fs::rename(&other, &one)?;
        fs::rename(&aside, &other)?;
        scene.cluster.nodes[0].restart()?;

        let before = scene.origin_bytes(&healthy);
        let names = DAMAGES
            .iter()
            .map(|(what, _)| *what)
            .chain(["swapped", "swapped", "healthy"]);
        for (what, (blob, part)) in names.zip(&parts) {
            let got = range(scene, scene.node(), blob, "bytes=2621000-2622999")?;
            ensure!(
                got.status == 206 && got.body == *part,
                "{what}: the range is wrong"
            );
            let many = range(
                scene,
                scene.node(),
                blob,
                "bytes=2621000-2621999,2622000-2622999,0-0,-1",
            )?;
            let many = many
                .parts()
                .with_context(|| format!("{what}: several ranges"))?;
            ensure!(
                [many[0].1, many[1].1].concat() == *part,
                "{what}: several ranges are wrong"
            );
            let whole = || {
                scene
                    .pull(scene.node(), blob)
                    .with_context(|| format!("{what}: the whole"))
            };
            std::thread::scope(|scope| {
                let pulls: Vec<_> = (0..3).map(|_| scope.spawn(whole)).collect();
                pulls
                    .into_iter()
                    .try_for_each(|pull| join(pull.join()).map(drop))
            })?;
        }
        ensure!(
            scene.origin_bytes(&healthy) == before,
            "what was right is not fetched again"
        );
        for blob in blobs.iter().chain(&swapped) {
            until_committed(scene.node(), blob)?;
            scene.pull(scene.node(), blob)?;
        }
        Ok(())
    })
}

#[test]
fn a_blob_damaged_far_behind_its_start_is_completed_from_elsewhere_in_the_same_answer() -> Result<()>
{
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(48 << 20)?;
        scene.pull(scene.node(), &blob)?;
        until_committed(scene.node(), &blob)?;
        scene.cluster.nodes[0].kill()?;
        rot(&committed_path(scene.node(), &blob))?;
        scene.cluster.nodes[0].restart()?;
        scene.pull(scene.node(), &blob)?;
        until_committed(scene.node(), &blob)?;
        scene.pull(scene.node(), &blob).map(drop)
    })
}

#[test]
fn where_nothing_else_has_it_a_damaged_blob_is_withheld() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &blob)?;
        until_committed(scene.node(), &blob)?;
        scene.cluster.nodes[0].kill()?;
        scene.cluster.seed.kill()?;
        rot(&committed_path(scene.node(), &blob))?;
        scene.cluster.nodes[0].restart()?;
        scene.origin_host.unplug()?;
        for _ in 0..3 {
            let answer = scene
                .request(scene.node(), &blob)
                .within(Duration::from_secs(60));
            if let Ok(answer) = answer.send(scene.node().host()) {
                ensure!(
                    answer.status >= 400 || answer.end != End::Complete,
                    "{answer:?}"
                );
            }
        }
        scene.origin_host.plug()?;
        until(
            Duration::from_secs(60),
            "the blob to be fetched anew",
            || Ok(right(scene.get(scene.node(), &blob)?, &blob).is_ok()),
        )
    })
}

#[test]
fn a_seed_whose_disk_was_damaged_spreads_nothing_and_is_not_blamed() -> Result<()> {
    Plan::nodes(2).play(|scene| {
        let blob = scene.blob(4 * SIZE_BYTES)?;
        scene.pull(scene.node(), &blob)?;
        until_committed(&scene.cluster.seed, &blob)?;
        scene.cluster.seed.kill()?;
        scene.cluster.nodes[0].kill()?;
        rot(&committed_path(&scene.cluster.seed, &blob))?;
        scene.cluster.seed.restart()?;
        let other = &scene.cluster.nodes[1];
        other.wait_status(Duration::from_secs(20), |status| {
            status.schedulers.iter().any(|s| s.connected)
        })?;
        scene.pull(other, &blob)?;
        let rejected = other.metric("hawker_pieces_rejected_total", &[])?;
        ensure!(rejected == 0.0, "{rejected} wrong pieces left the seed");
        Ok(())
    })
}

#[test]
fn a_partial_blob_damaged_under_a_stopped_daemon_is_hashed_before_it_counts() -> Result<()> {
    Plan::nodes(1).flag("--linger", "1s").play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let right = range(scene, scene.node(), &blob, "bytes=2621000-2622999")?;
        let partial = partial_path(scene.node(), &blob);
        until(Duration::from_secs(10), "the piece on disk", || {
            Ok(scene.node().status()?.store.bytes > 0)
        })?;
        scene.cluster.nodes[0].kill()?;
        rot(&partial)?;
        scene.cluster.nodes[0].restart()?;
        let again = range(scene, scene.node(), &blob, "bytes=2621000-2622999")?;
        ensure!(
            again.status == 206 && again.body == right.body,
            "wrong bytes of a partial blob"
        );
        scene.pull(scene.node(), &blob).map(drop)
    })
}
