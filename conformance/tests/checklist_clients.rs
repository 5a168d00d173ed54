//! The mirror contract, by the runtimes themselves: each pulls through Hawker as it is configured in practice, and the registry
//! is asked once.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{
    Containerd, ContainersTools, DockerRegistry, Dockerd, Hawker, HawkerPlan, Image, Lab,
    PrivateCa, RegistryPlan,
};

/// The registry's name where it is a part of a path: references allow no port there.
const ALIAS: &str = "origin.test";
/// An image of several layers that all runtimes unpack.
const LAYERS: [usize; 3] = [2 << 20, 300_000, 2000];

/// A registry, and a node that knows it under both of its names.
fn start(lab: &Lab) -> Result<(DockerRegistry, Hawker)> {
    let registry = DockerRegistry::start(&lab.host("origin")?)?;
    let alias = format!("{ALIAS}=http://{}", registry.authority());
    let plan = HawkerPlan::proxy(&lab.host("node")?).plain_registry(registry.authority());
    Ok((registry, plan.flag("--registry", alias).start()?))
}

/// Checks that the registry sent each layer once.
#[test]
fn a_kubelet_s_pull_by_the_runtime_interface_goes_through() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, node) = start(&lab)?;
        let image = Image::noise(31, &LAYERS);
        let reference = registry.push(&image, "team/app", "v1")?;
        let containerd = Containerd::start_for_kubelet(node.host(), "containerd")?;
        containerd.mirrors("_default", &[format!("http://{}", node.mirror())], None)?;
        containerd.pull_as_kubelet(&reference, None)?;
        for layer in &image.layers {
            ensure!(containerd.content_bytes(&layer.digest) == Some(layer.data.len() as u64));
        }
        registry.gave_once(&image)?;
        ensure!(
            node.status()?.bytes.served >= image.size_bytes(),
            "it went past the mirror"
        );
        Ok(())
    })())
}

#[test]
fn podman_buildah_and_skopeo_pull_through_a_path_prefix() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, node) = start(&lab)?;
        let tools = ContainersTools::new(node.host())?;
        tools.mirror(&registry.authority(), &format!("{}/{ALIAS}", node.mirror()))?;
        let image = Image::noise(32, &LAYERS);
        let reference = registry.push(&image, "team/deep/er/app", "v1")?;
        let served = || node.status().map(|status| status.bytes.served);
        let mut before = 0;
        for (tool, pull) in [
            (
                "podman",
                &(|| tools.podman_pull(&reference)) as &dyn Fn() -> Result<()>,
            ),
            ("buildah", &|| {
                tools
                    .remove_all()
                    .and_then(|()| tools.buildah_pull(&reference))
            }),
            ("skopeo", &|| tools.skopeo_copy(&reference).map(drop)),
        ] {
            pull().context(tool)?;
            let now = served()?;
            ensure!(
                now >= before + image.size_bytes(),
                "{tool} went past the mirror: {before}, {now}"
            );
            before = now;
        }
        registry.gave_once(&image)
    })())
}

/// dockerd sends no `ns`, containerd sends `docker.io`; both mean the API at another name.
#[test]
fn docker_hub_s_images_come_from_registry_1_docker_io() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (ca, origin, host) = (
            PrivateCa::new(&lab)?,
            lab.host("origin")?,
            lab.host("node")?,
        );
        let registry = RegistryPlan::on(&origin)
            .known_as("registry-1.docker.io", &ca)?
            .start()?;
        let image = Image::noise(33, &LAYERS);
        registry.push(&image, "library/app", "v1")?;
        let node = HawkerPlan::proxy(&host)
            .knows(&[("registry-1.docker.io", origin.ip())])?
            .flag(
                "--registry-ca",
                format!("docker.io={}", ca.certificate().display()),
            )
            .flag("--allow-network", "10.77.0.0/16")
            .flag("--default-registry", "docker.io")
            .start()?;
        let mirror = format!("http://{}", node.mirror());
        let containerd = Containerd::start(&host, "containerd")?;
        let dockerd = Dockerd::start(&host, &containerd, &mirror)?;
        dockerd.pull("app:v1").context("dockerd")?;
        containerd.mirrors("docker.io", &[mirror], None)?;
        containerd
            .pull("docker.io/library/app:v1")
            .context("containerd")?;
        registry.gave_once(&image)
    })())
}

#[test]
fn containerd_reaches_another_registry_by_a_path_before_v2() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (registry, node) = start(&lab)?;
        let image = Image::noise(34, &[100_000]);
        registry.push(&image, "team/app", "v1")?;
        let containerd = Containerd::start(node.host(), "containerd")?;
        // It makes /origin.test/v2/team/app/… of it, with an ns that is not meant.
        containerd.mirrors(
            "elsewhere.test",
            &[format!("http://{}/{ALIAS}", node.mirror())],
            None,
        )?;
        containerd.pull("elsewhere.test/team/app:v1")?;
        registry.gave_once(&image)
    })())
}

#[test]
fn containerd_falls_through_at_once_when_the_mirror_can_not_reach_the_origin() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let registry = DockerRegistry::start(&lab.host("origin")?)?;
        let image = Image::noise(35, &[100_000]);
        let reference = registry.push(&image, "team/app", "v1")?;
        let host = lab.host("node")?;
        // Nobody listens where this node believes the registry to be.
        let nowhere = format!("{}=http://{}", registry.authority(), registry.host().at(9));
        let node = HawkerPlan::proxy(&host)
            .flag("--registry", nowhere)
            .start()?;
        let containerd = Containerd::start(&host, "containerd")?;
        let fallback = format!("http://{}", registry.authority());
        containerd.mirrors(
            &registry.authority(),
            &[format!("http://{}", node.mirror())],
            Some(&fallback),
        )?;
        let start = Instant::now();
        containerd.pull(&reference)?;
        ensure!(
            start.elapsed() < Duration::from_secs(10),
            "it took {:?}",
            start.elapsed()
        );
        registry.gave_once(&image)
    })())
}
