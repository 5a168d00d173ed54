//! Tags through the real daemons: the requests to the registry, and the answers to a client while it is down.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hawker_conformance::lab::{Answer, DockerRegistry, Hawker, HawkerPlan, Image, Lab};
use hawker_conformance::origin::{Content, Fault, Rule};
use hawker_conformance::scene::{Plan, REPOSITORY, Scene};

fn tag(scene: &Scene, node: &Hawker) -> Result<Answer> {
    node.request(scene.registry(), &format!("/v2/{REPOSITORY}/manifests/v1"))
        .send(node.host())
}

fn gets(scene: &Scene) -> usize {
    scene
        .origin
        .log()
        .iter()
        .filter(|e| e.method == "GET" && e.target.contains("/manifests/"))
        .count()
}

#[test]
fn a_manifest_is_read_once_for_all_nodes_and_its_tag_asked_for_each_time() -> Result<()> {
    Plan::nodes(2).play(|scene| {
        let layers = |seed| [Content::generated(seed, 100)];
        for (seed, expected) in [(1, 1), (2, 2)] {
            let image = scene.origin.add_image(REPOSITORY, "v1", &layers(seed))?;
            for node in scene.cluster.nodes.iter().chain(&scene.cluster.nodes) {
                let answer = tag(scene, node)?;
                ensure!(
                    answer.status == 200 && answer.digest == image.digest.to_string(),
                    "{}",
                    answer.status
                );
            }
            ensure!(gets(scene) == expected, "{} GETs", gets(scene));
        }
        Ok(())
    })
}

#[test]
fn a_tag_outlives_its_registry_for_as_long_as_the_configuration_says_and_is_marked() -> Result<()> {
    Plan::nodes(1).flag("--stale-tags", "9s").play(|scene| {
        let image = scene
            .origin
            .add_image(REPOSITORY, "v1", &[Content::generated(1, 100)])?;
        ensure!(tag(scene, scene.node())?.header("warning").is_none());
        for (fault, within) in [(Fault::Refuse, 1), (Fault::Hang, 7)] {
            let fault = scene.origin.add_fault(Rule::always(fault));
            let start = Instant::now();
            let stale = tag(scene, scene.node())?;
            ensure!(
                stale.status == 200 && stale.digest == image.digest.to_string(),
                "{}",
                stale.status
            );
            ensure!(
                stale.header("warning") == Some("110 - \"Response is Stale\""),
                "{:?}",
                stale.headers
            );
            ensure!(
                start.elapsed() < Duration::from_secs(within),
                "after {:?}",
                start.elapsed()
            );
            scene.origin.remove_fault(fault);
        }
        ensure!(scene.node().metric("hawker_tags_stale_total", &[])? == 2.0);
        scene.origin.add_fault(Rule::always(Fault::Refuse));
        std::thread::sleep(Duration::from_secs(10));
        let late = tag(scene, scene.node())?;
        ensure!(late.status >= 500, "{}", late.status);
        Ok(())
    })
}

#[test]
fn a_real_registry_is_asked_with_its_own_etag() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let registry = DockerRegistry::start(&lab.host("registry")?)?;
        registry.push(&Image::noise(1, &[1000]), "library/small", "latest")?;
        let node = HawkerPlan::proxy(&lab.host("node")?)
            .plain_registry(registry.authority())
            .start()?;
        let get = || {
            let request = node.request(registry.authority(), "/v2/library/small/manifests/latest");
            let request = request.header(
                "accept",
                "application/vnd.docker.distribution.manifest.v2+json",
            );
            request
                .header("accept", "application/vnd.oci.image.manifest.v1+json")
                .send(node.host())
        };
        let first = get()?;
        ensure!(first.status == 200, "{}: {}", first.status, first.text());
        for _ in 0..2 {
            ensure!(get()?.body == first.body);
        }
        let log = registry.access_log();
        let asked = |what: &str| log.lines().filter(|line| line.contains(what)).count();
        let (gets, unchanged) = (
            asked("\"GET /v2/library/small/manifests/"),
            asked("\" 304 "),
        );
        ensure!(
            gets == 1 && unchanged == 2,
            "{gets} GETs, {unchanged} answers of 304 in\n{log}"
        );
        Ok(())
    })())
}
