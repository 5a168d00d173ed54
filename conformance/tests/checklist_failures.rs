//! The mirror contract's part about what goes wrong in mid-pull, and about registries that send their clients elsewhere.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hawker_conformance::lab::{
    BlobReads, Containerd, End, HawkerPlan, Image, Lab, Mbit, ObjectStore, RegistryPlan, Request,
};
use hawker_conformance::origin::{Content, Fault, Rule};
use hawker_conformance::scene::{
    Plan, REPOSITORY, blob_path, right, start_origin, until, until_committed,
};

const SIZE_BYTES: u64 = (6 << 20) + 4321;
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// podman and CRI-O choose their source at the manifest, and do not fall through afterwards.
#[test]
fn once_a_manifest_is_served_its_blobs_are_whatever_dies_or_refuses_meanwhile() -> Result<()> {
    Plan::nodes(2).play(|scene| {
        let layers = [71, 72, 73].map(|seed| Content::generated(seed, 900_000));
        scene.origin.add_image(REPOSITORY, "v1", &layers)?;
        let manifest = scene
            .node()
            .request(scene.registry(), &format!("/v2/{REPOSITORY}/manifests/v1"));
        let answer = manifest
            .header("accept", MANIFEST)
            .send(scene.node().host())?;
        ensure!(answer.status == 200, "{}", answer.status);
        // Registries that answer no HEADs of blobs, and a limit on manifests that is used up.
        for (method, path, code) in [
            ("HEAD", "/blobs/", 405),
            ("GET", "/manifests/", 429),
            ("HEAD", "/manifests/", 429),
        ] {
            let rule = Rule::always(Fault::Status {
                code,
                retry_after_s: None,
            });
            scene.origin.add_fault(rule.on(path).method(method));
        }
        let pull = |scene: &hawker_conformance::scene::Scene, layer: &Content| -> Result<()> {
            let path = format!("/v2/{REPOSITORY}/blobs/{}", layer.digest()?);
            let answer = scene
                .node()
                .request(scene.registry(), &path)
                .discard()
                .send(scene.node().host())?;
            ensure!(
                answer.status == 200 && answer.digest == layer.digest()?.to_string(),
                "{}",
                answer.status
            );
            Ok(())
        };
        pull(scene, &layers[0])?;
        scene.cluster.nodes[1].kill()?;
        scene.cluster.seed.kill()?;
        pull(scene, &layers[1])?;
        scene.origin.add_fault(
            Rule::always(Fault::ResetAfter { bytes: 300_000 })
                .on("/blobs/")
                .method("GET")
                .times(2),
        );
        pull(scene, &layers[2])
    })
}

/// A registry that goes silent in mid-body: the body moves on before runtimes lose patience, by another connection.
#[test]
fn a_registry_that_falls_silent_in_mid_body_is_asked_again_before_runtimes_give_up() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let silent = Rule::always(Fault::HangAfter { bytes: 2_000_000 })
            .on(blob.digest)
            .method("GET")
            .times(1);
        scene.origin.add_fault(silent);
        let answer = scene.pull(scene.node(), &blob)?;
        ensure!(
            answer.total < Duration::from_secs(50),
            "it took {:?}",
            answer.total
        );
        Ok(())
    })
}

#[test]
fn clients_that_go_away_leave_the_cache_right_and_cost_no_second_copy() -> Result<()> {
    Plan::nodes(1).link(Mbit(200)).play(|scene| {
        let (node, blob) = (scene.node(), scene.blob(SIZE_BYTES)?);
        for bytes in [0, 1, 100_000, 262_144, 1_500_000, 3_000_001] {
            let left = scene
                .request(node, &blob)
                .leave_after(bytes)
                .send(node.host())?;
            ensure!(
                left.status == 200 && left.end == End::Left,
                "{}: {:?}",
                left.status,
                left.end
            );
            scene
                .request(node, &blob)
                .header("range", "bytes=5000000-")
                .leave_after(1)
                .send(node.host())?;
        }
        scene.pull(node, &blob)?;
        until_committed(node, &blob)?;
        scene.pull(node, &blob)?;
        let copies = scene.origin_copies(&blob);
        ensure!(copies < 1.5, "{copies} copies");
        Ok(())
    })
}

#[test]
fn an_open_range_that_is_closed_early_stops_reading_upstream() -> Result<()> {
    Plan::nodes(1).flag("--linger", "1s").play(|scene| {
        let (node, blob) = (scene.node(), scene.blob(48 << 20)?);
        // Several connections read at this rate each.
        let slow = Fault::SlowBody {
            bytes_per_s: 1 << 20,
        };
        scene
            .origin
            .add_fault(Rule::always(slow).on(blob.digest).method("GET"));
        let left = scene
            .request(node, &blob)
            .header("range", "bytes=1000000-")
            .leave_after(500_000);
        ensure!(left.send(node.host())?.status == 206);
        let mut before = 0;
        until(
            Duration::from_secs(9),
            "the origin to send nothing more",
            || {
                std::thread::sleep(Duration::from_millis(500));
                let sent = scene.origin_bytes(&blob);
                Ok(sent == std::mem::replace(&mut before, sent))
            },
        )?;
        ensure!(
            before < blob.size_bytes * 3 / 4,
            "it sent {before} bytes for a client that had left"
        );
        scene.pull(node, &blob)?;
        Ok(())
    })
}

#[test]
fn a_resume_at_any_byte_is_the_rest_cold_partly_cached_and_cached() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        for state in ["cold", "partly cached", "cached"] {
            let blob = scene.blob(SIZE_BYTES)?;
            let bytes = Request::get(scene.origin.address(), blob_path(&blob))
                .send(&scene.origin_host)?
                .body;
            match state {
                "cold" => {}
                "cached" => {
                    scene.pull(node, &blob)?;
                    until_committed(node, &blob)?;
                }
                _ => {
                    scene.origin.add_fault(
                        Rule::always(Fault::SlowBody {
                            bytes_per_s: 6 << 20,
                        })
                        .on(blob.digest)
                        .method("GET"),
                    );
                    scene
                        .request(node, &blob)
                        .leave_after(700_000)
                        .send(node.host())?;
                }
            }
            let last = SIZE_BYTES - 1;
            for from in [
                0,
                1,
                127,
                128,
                262_143,
                262_144,
                1 << 20,
                (1 << 20) + 1,
                3_333_333,
                5 << 20,
                last,
            ] {
                let request = node.request(scene.registry(), &blob_path(&blob));
                let answer = request
                    .header("range", format!("bytes={from}-"))
                    .send(node.host())?;
                ensure!(
                    answer.status == 206 && answer.end == End::Complete,
                    "{state}, {from}: {}",
                    answer.status
                );
                let told = format!("bytes {from}-{last}/{SIZE_BYTES}");
                ensure!(
                    answer.header("content-range") == Some(told.as_str()),
                    "{state}: {:?}",
                    answer.headers
                );
                ensure!(
                    answer.body == bytes[from as usize..],
                    "{state}: other bytes from {from} on"
                );
            }
            scene.origin.clear_faults();
        }
        Ok(())
    })
}

/// stargz probes `bytes=0-1`; containerd 2.1 asks for `bytes=N-` and reads one chunk of it.
#[test]
fn probes_and_open_ranges_wait_for_their_own_bytes_only() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        // Half a minute for all of it.
        let blob = scene.blob(30 << 20)?;
        scene.origin.add_fault(
            Rule::always(Fault::SlowBody {
                bytes_per_s: 1 << 20,
            })
            .on(blob.digest)
            .method("GET"),
        );
        let node = scene.node();
        let probe = scene
            .request(node, &blob)
            .header("range", "bytes=0-1")
            .send(node.host())?;
        ensure!(
            probe.status == 206 && probe.body_bytes == 2,
            "{}",
            probe.status
        );
        ensure!(
            probe.total < Duration::from_secs(5),
            "the probe took {:?}",
            probe.total
        );
        let open = scene
            .request(node, &blob)
            .header("range", "bytes=20000000-")
            .leave_after(65_536);
        let open = open.send(node.host())?;
        ensure!(
            open.status == 206 && open.end == End::Left,
            "{}",
            open.status
        );
        ensure!(
            open.total < Duration::from_secs(10),
            "the open range took {:?}",
            open.total
        );
        Ok(())
    })
}

#[test]
fn the_registry_s_object_store_is_asked_by_the_mirror_and_gets_no_credentials() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (host, elsewhere, node) =
            (lab.host("origin")?, lab.host("objects")?, lab.host("node")?);
        let ann = ("ann", "gables");
        let registry = RegistryPlan::on(&host)
            .basic(&[ann])
            .redirect_to(&elsewhere)
            .start()?;
        let store = ObjectStore::start(&elsewhere, &registry.storage())?;
        let image = Image::noise(74, &[SIZE_BYTES as usize, 5000]);
        let reference = registry.push_as(ann, &image, "ann/app", "v1")?;
        // The registry alone is listed; it sends its clients to a private address, too.
        let node = HawkerPlan::proxy(&node)
            .plain_registry(registry.authority())
            .flag("--allow-network", "10.77.0.0/16")
            .start()?;
        let containerd = Containerd::start(node.host(), "containerd")?;
        containerd.mirrors("_default", &[format!("http://{}", node.mirror())], None)?;
        containerd.fetch_as(ann, &reference)?;
        ensure!(
            registry.blob_reads(None) == BlobReads::default(),
            "the registry sent blobs itself"
        );
        for layer in &image.layers {
            let reads = store.reads();
            let hex = layer.digest.trim_start_matches("sha256:");
            let ours: Vec<_> = reads
                .iter()
                .filter(|read| read.path.contains(hex))
                .collect();
            ensure!(
                !ours.is_empty() && reads.iter().all(|read| !read.authorization),
                "{reads:?}"
            );
            let path = format!("/v2/ann/app/blobs/{}", layer.digest);
            let request = node
                .request(registry.authority(), &path)
                .header("authorization", "Basic YW5uOmdhYmxlcw==");
            let answer = request.header("range", "bytes=10-").send(node.host())?;
            ensure!(
                answer.status == 206 && answer.body == layer.data[10..],
                "{}",
                answer.status
            );
            ensure!(answer.header("location").is_none(), "{:?}", answer.headers);
        }
        Ok(())
    })())
}

/// The behaviour of a runtime with a mirror whose registry asks it to wait: a few retries at once, then the next host.
#[test]
fn a_limited_registry_is_left_alone_while_containerd_retries_and_falls_through() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (limited_host, spare_host, host) =
            (lab.host("limited")?, lab.host("spare")?, lab.host("node")?);
        let (limited, spare) = (start_origin(&limited_host)?, start_origin(&spare_host)?);
        let layer = Content::generated(75, 200_000);
        for origin in [&limited, &spare] {
            origin.add_image(REPOSITORY, "v1", std::slice::from_ref(&layer))?;
        }
        limited.add_fault(Rule::always(Fault::Status {
            code: 429,
            retry_after_s: Some(60),
        }));
        let node = HawkerPlan::proxy(&host)
            .plain_registry(limited.address())
            .start()?;
        let containerd = Containerd::start(&host, "containerd")?;
        let registry = limited.address().to_string();
        let spare_url = format!("http://{}", spare.address());
        containerd.mirrors(
            &registry,
            &[format!("http://{}", node.mirror())],
            Some(&spare_url),
        )?;
        let start = Instant::now();
        containerd.fetch(&format!("{registry}/{REPOSITORY}:v1"))?;
        ensure!(
            start.elapsed() < Duration::from_secs(15),
            "it took {:?}",
            start.elapsed()
        );
        let asked = limited.totals().requests;
        ensure!(asked <= 2, "the registry was asked {asked} times");
        let answer = node
            .request(&registry, &format!("/v2/{REPOSITORY}/manifests/v1"))
            .send(&host)?;
        ensure!(
            answer.status == 429 && answer.header("retry-after").is_some(),
            "{}",
            answer.status
        );
        Ok(())
    })())
}

/// A runtime that was killed goes on where its partial ingest ends, at whatever is cached by then.
#[test]
fn a_killed_client_s_pull_is_resumed_and_right() -> Result<()> {
    Plan::nodes(1).link(Mbit(60)).play(|scene| {
        let layer = Content::generated(76, 20 << 20);
        scene
            .origin
            .add_image(REPOSITORY, "v1", std::slice::from_ref(&layer))?;
        let reference = format!("{}/{REPOSITORY}:v1", scene.registry());
        let containerd = Containerd::start(scene.node().host(), "containerd")?;
        containerd.mirrors(
            "_default",
            &[format!("http://{}", scene.node().mirror())],
            None,
        )?;
        let mut client = containerd
            .fetch_command(&reference)
            .stdout(Stdio::null())
            .spawn()?;
        until(Duration::from_secs(15), "some of it to come", || {
            Ok(scene.node().status()?.bytes.served > 4 << 20)
        })?;
        client.kill()?;
        client.wait()?;
        containerd.fetch(&reference)?;
        let blob = scene.origin.add_blob(REPOSITORY, layer)?;
        ensure!(containerd.content_bytes(&blob.digest.to_string()) == Some(blob.size_bytes));
        right(scene.get(scene.node(), &blob)?, &blob)?;
        let copies = scene.origin_copies(&blob);
        ensure!(copies < 1.05, "{copies} copies");
        Ok(())
    })
}
