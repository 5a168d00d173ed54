//! Real runtimes pull real images through Hawker.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{
    BlobReads, Cluster, ClusterPlan, Containerd, DockerRegistry, Hawker, Image, Lab,
    packaged_image, run,
};
use hawker_conformance::scene::join;

/// The registry's name where it is a part of a path: references allow no port there.
const ALIAS: &str = "origin.test";

/// A registry, and a cluster that knows it.
fn start(lab: &Lab, nodes: usize) -> Result<(DockerRegistry, Cluster)> {
    let registry = DockerRegistry::start(&lab.host("origin")?)?;
    let plain_registries = vec![registry.authority()];
    let alias = format!("{ALIAS}=http://{}", registry.authority());
    let args = vec!["--registry".to_owned(), alias];
    let plan = ClusterPlan {
        nodes,
        plain_registries,
        args,
        ..ClusterPlan::default()
    };
    let cluster = Cluster::start(lab, &plan)?;
    Ok((registry, cluster))
}

/// A containerd beside a node, whose only mirror is that node.
fn runtime(node: &Hawker, name: &str) -> Result<Containerd> {
    let containerd = Containerd::start(node.host(), name)?;
    containerd.mirrors("_default", &[format!("http://{}", node.mirror())], None)?;
    Ok(containerd)
}

fn pull_at_once(runtimes: &[Containerd], reference: &str) -> Result<()> {
    std::thread::scope(|scope| {
        let pulls: Vec<_> = runtimes
            .iter()
            .map(|runtime| scope.spawn(|| runtime.pull(reference)))
            .collect();
        pulls
            .into_iter()
            .try_for_each(|pull| join(pull.join()).map(drop))
    })
}

fn each_layer_is_whole_and_came_once(
    image: &Image,
    runtimes: &[Containerd],
    registry: &DockerRegistry,
) -> Result<()> {
    for layer in &image.layers {
        let size = layer.data.len() as u64;
        for runtime in runtimes {
            ensure!(
                runtime.content_bytes(&layer.digest) == Some(size),
                "{} is not whole",
                layer.digest
            );
        }
        let reads = registry.blob_reads(Some(&layer.digest));
        ensure!(
            reads.body_bytes == size,
            "the origin sent {reads:?} of a layer of {size} bytes"
        );
    }
    Ok(())
}

#[test]
fn containerd_on_every_node_pulls_at_once_and_the_origin_gives_each_blob_once() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, cluster) = start(&lab, 3)?;
        let image = Image::noise(11, &[9 << 20, 3 << 20, 700_000, 2000]);
        let reference = registry.push(&image, "team/app", "v1")?;
        let runtimes: Vec<_> = cluster
            .nodes
            .iter()
            .map(|node| runtime(node, "containerd"))
            .collect::<Result<_>>()?;
        pull_at_once(&runtimes, &reference)?;
        each_layer_is_whole_and_came_once(&image, &runtimes, &registry)?;
        for node in &cluster.nodes {
            let bytes = node.status()?.bytes;
            ensure!(
                bytes.received_origin < 10_000,
                "only manifests may come past the seed: {bytes:?}"
            );
            ensure!(
                bytes.received_peers + bytes.received_seeds >= image.size_bytes(),
                "{bytes:?}"
            );
        }
        Ok(())
    })())
}

#[test]
fn a_container_of_an_image_pulled_through_hawker_runs() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, cluster) = start(&lab, 1)?;
        let reference = registry.push_layout(&packaged_image(true)?, "debian/small", "latest")?;
        let containerd = runtime(&cluster.nodes[0], "containerd")?;
        containerd.pull(&reference)?;
        let said = containerd.run(&reference, &["/bin/sh", "-c", "echo from inside"])?;
        ensure!(said.trim() == "from inside", "{said}");
        Ok(())
    })())
}

#[test]
fn two_runtimes_on_a_node_share_one_download() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, cluster) = start(&lab, 1)?;
        let node = &cluster.nodes[0];
        let image = Image::noise(12, &[8 << 20, 1 << 20]);
        let reference = registry.push(&image, "team/app", "v1")?;
        let runtimes = [runtime(node, "one")?, runtime(node, "two")?];
        pull_at_once(&runtimes, &reference)?;
        each_layer_is_whole_and_came_once(&image, &runtimes, &registry)?;
        let bytes = node.status()?.bytes;
        let received = bytes.received_peers + bytes.received_seeds + bytes.received_origin;
        ensure!(
            received < image.size_bytes() * 11 / 10,
            "received twice: {bytes:?}"
        );
        ensure!(bytes.served >= image.size_bytes() * 2, "{bytes:?}");
        Ok(())
    })())
}

#[test]
fn skopeo_copies_through_the_path_prefix() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, cluster) = start(&lab, 1)?;
        let node = &cluster.nodes[0];
        let image = Image::noise(13, &[5 << 20, 40_000]);
        registry.push(&image, "team/deep/er/app", "v1")?;
        let source = format!("docker://{}/{ALIAS}/team/deep/er/app:v1", node.mirror());
        let target = node.host().dir().join("copied");
        let mut skopeo: Command = node.host().command("skopeo");
        skopeo.args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--src-tls-verify=false",
            &source,
        ]);
        run(skopeo.arg(format!("dir:{}", target.display())))?;
        for layer in &image.layers {
            let copied = std::fs::read(target.join(layer.digest.trim_start_matches("sha256:")))?;
            ensure!(copied == layer.data, "{} differs", layer.digest);
        }
        each_layer_is_whole_and_came_once(&image, &[], &registry)
    })())
}

#[test]
fn a_multi_platform_index_is_copied_whole() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, cluster) = start(&lab, 1)?;
        let node = &cluster.nodes[0];
        // Two images under one index, made in a layout by hand and pushed as a whole.
        let layout = lab.dir().join("layout");
        Image::write_index(
            &layout,
            &[Image::noise(14, &[2 << 20]), Image::noise(15, &[300_000])],
        )?;
        let push = |from: &str, to: &str| -> Result<String> {
            let mut skopeo = node.host().command("skopeo");
            skopeo.args([
                "--insecure-policy",
                "copy",
                "--quiet",
                "--all",
                "--preserve-digests",
            ]);
            skopeo.arg("--src-tls-verify=false");
            run(skopeo.args(["--dest-tls-verify=false", from, to]))
        };
        push(
            &format!("oci:{}:latest", layout.display()),
            &format!("docker://{}/team/multi:v1", registry.authority()),
        )?;
        let copy = node.host().dir().join("copy");
        let through = format!("docker://{}/{ALIAS}/team/multi:v1", node.mirror());
        push(&through, &format!("oci:{}:latest", copy.display()))?;
        let blobs = |layout: &std::path::Path| -> Result<Vec<_>> {
            let dir = layout.join("blobs/sha256");
            let names = std::fs::read_dir(&dir).with_context(|| dir.display().to_string())?;
            let mut names: Vec<_> = names
                .map(|entry| Ok(entry?.file_name()))
                .collect::<Result<_>>()?;
            names.sort();
            Ok(names)
        };
        let (copied, original) = (blobs(&copy)?, blobs(&layout)?);
        ensure!(copied == original, "{copied:?} in place of {original:?}");
        Ok(())
    })())
}

#[test]
fn a_mirror_that_is_down_costs_a_runtime_nothing_but_the_saving() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, mut cluster) = start(&lab, 1)?;
        let image = Image::noise(16, &[1 << 20]);
        let reference = registry.push(&image, "team/app", "v1")?;
        let node = &mut cluster.nodes[0];
        let containerd = Containerd::start(node.host(), "containerd")?;
        let fallback = format!("http://{}", registry.authority());
        containerd.mirrors(
            &registry.authority(),
            &[format!("http://{}", node.mirror())],
            Some(&fallback),
        )?;
        node.kill()?;
        containerd.pull(&reference)?;
        let reads = registry.blob_reads(Some(&image.layers[0].digest));
        ensure!(
            reads
                == BlobReads {
                    requests: 1,
                    body_bytes: image.size_bytes()
                },
            "{reads:?}"
        );
        Ok(())
    })())
}
