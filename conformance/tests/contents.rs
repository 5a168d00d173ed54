//! Contents that are rare: digests by SHA-512, blobs of no bytes, layers that the registry does not have.

use anyhow::{Result, ensure};
use hawker_conformance::lab::{End, HawkerPlan, Lab, Request};
use hawker_conformance::origin::{Blob, Content, Fault, Rule};
use hawker_conformance::scene::{
    Plan, REPOSITORY, blob_path, committed_path, right, start_origin, until_committed,
};
use hawker_oci::digest::{Algorithm, Digest};

const SIZE_BYTES: u64 = (5 << 20) + 77;

#[test]
fn a_sha512_blob_is_pulled_cold_in_pieces_and_cached() -> Result<()> {
    Plan::nodes(2).play(|scene| {
        let content = Content::generated(512, SIZE_BYTES);
        let blob = scene
            .origin
            .add_blob_by(Algorithm::Sha512, REPOSITORY, content)?;
        ensure!(blob.digest.to_string().starts_with("sha512:"));
        for node in &scene.cluster.nodes {
            for from in [0, SIZE_BYTES - 9] {
                let request = node.request(scene.registry(), &blob_path(&blob));
                let whole = request
                    .header("range", format!("bytes={from}-"))
                    .send(node.host())?;
                ensure!(
                    whole.end == End::Complete && whole.body_bytes == SIZE_BYTES - from,
                    "{from}: {whole:?}"
                );
                let digest = Digest::of(Algorithm::Sha512, &whole.body);
                ensure!(from > 0 || digest == blob.digest, "{digest}");
            }
            until_committed(node, &blob)?;
        }
        let copies = scene.origin_copies(&blob);
        ensure!(copies < 1.02, "{copies} copies");
        Ok(())
    })
}

#[test]
fn a_sha512_blob_with_a_wrong_byte_never_completes() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let content = Content::generated(513, SIZE_BYTES);
        let blob = scene
            .origin
            .add_blob_by(Algorithm::Sha512, REPOSITORY, content)?;
        scene.origin.add_fault(Rule::always(Fault::WrongBytes {
            offset: SIZE_BYTES - 1,
            length: 1,
        }));
        let answer = scene.get(scene.node(), &blob)?;
        ensure!(
            answer.status >= 400 || answer.end == End::Short,
            "{} {:?}",
            answer.status,
            answer.end
        );
        ensure!(!committed_path(scene.node(), &blob).exists());
        Ok(())
    })
}

#[test]
fn an_empty_blob_is_whole_by_either_algorithm_and_has_no_range() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let blob = scene
                .origin
                .add_blob_by(algorithm, REPOSITORY, Content::bytes([]))?;
            for (range, status) in [
                ("bytes=0-", 200),
                ("bytes=0-5,7-9", 200),
                ("bytes=-5", 200),
                ("bytes=3-", 416),
            ] {
                let request = node
                    .request(scene.registry(), &blob_path(&blob))
                    .header("range", range);
                let answer = request.send(node.host())?;
                ensure!(
                    answer.status == status,
                    "{algorithm:?} {range}: {}",
                    answer.status
                );
                let (header, told) = if status == 416 {
                    ("content-range", "bytes */0")
                } else {
                    ("content-length", "0")
                };
                ensure!(
                    answer.header(header) == Some(told),
                    "{algorithm:?} {range}: {:?}",
                    answer.headers
                );
            }
        }
        Ok(())
    })
}

/// A manifest that names one layer, which is at these URLs.
fn manifest(layer: &Blob, url: &str) -> String {
    let layer = serde_json::json!({
        "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "digest": layer.digest.to_string(), "size": layer.size_bytes, "urls": [url],
    });
    serde_json::json!({"schemaVersion": 2, "layers": [layer]}).to_string()
}

#[test]
fn a_layer_that_the_registry_does_not_have_comes_from_its_url() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let origin = start_origin(&lab.host("origin")?)?;
        let vendor_host = lab.host("vendor")?;
        let vendor = start_origin(&vendor_host)?;
        let layer = vendor.add_blob("vendor/base", Content::generated(3, SIZE_BYTES))?;
        let url = format!(
            "http://{}/v2/vendor/base/blobs/{}",
            vendor.address(),
            layer.digest
        );
        let text = manifest(&layer, &url);
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let image = origin.add_manifest(REPOSITORY, "v1", media_type, text.as_bytes());

        let registry = origin.address().to_string();
        let plan = |name: &str| -> Result<_> {
            Ok(HawkerPlan::proxy(&lab.host(name)?).plain_registry(&registry))
        };
        let network = format!("{}/32", vendor_host.ip());
        let vendors = vendor.address().to_string();
        let node = plan("node")?
            .plain_registry(&vendors)
            .flag("--allow-network", &network)
            .start()?;
        let path = format!("/v2/{REPOSITORY}/manifests/{}", image.digest);
        let unnamed = node
            .request(&registry, &blob_path(&layer))
            .send(node.host())?;
        ensure!(
            unnamed.status == 404,
            "no manifest named it yet: {}",
            unnamed.status
        );
        ensure!(node.request(&registry, &path).send(node.host())?.status == 200);
        // Content that the URL gave once belongs to the repository, and is kept from then on.
        for time in 0..2 {
            ensure!(committed_path(&node, &layer).exists() == (time > 1));
            let head = Request::new(
                "HEAD",
                node.mirror(),
                format!("{}?ns={registry}", blob_path(&layer)),
            );
            let head = head.send(node.host())?;
            ensure!(
                head.header("content-length") == Some(&*SIZE_BYTES.to_string()),
                "{:?}",
                head.headers
            );
            right(
                node.request(&registry, &blob_path(&layer))
                    .discard()
                    .send(node.host())?,
                &layer,
            )?;
        }
        until_committed(&node, &layer)?;
        ensure!(vendor.log().iter().all(|entry| !entry.authorization));

        let elsewhere = format!("/v2/other/app/blobs/{}", layer.digest);
        let answer = node.request(&registry, &elsewhere).send(node.host())?;
        ensure!(
            answer.status == 404,
            "no manifest of that repository names it: {}",
            answer.status
        );

        let strict = plan("strict")?.start()?;
        ensure!(strict.request(&registry, &path).send(strict.host())?.status == 200);
        vendor.clear_log();
        let refused = strict
            .request(&registry, &blob_path(&layer))
            .send(strict.host())?;
        ensure!(
            refused.status == 404,
            "{}: {}",
            refused.status,
            refused.text()
        );
        ensure!(
            vendor.log().is_empty(),
            "a manifest led into a private network"
        );
        Ok(())
    })())
}
