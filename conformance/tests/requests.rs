//! The requests of clients and their answers: shapes, ranges, and requests that are refused.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Result, ensure};
use hawker_conformance::lab::{Answer, Hawker, HawkerPlan, Lab, Request};
use hawker_conformance::origin::{Blob, Content};
use hawker_conformance::scene::{
    Plan, REPOSITORY, Scene, blob_path, right, start_origin, until_committed,
};

const SIZE_BYTES: u64 = (3 << 20) + 77;

/// A blob's bytes, straight from its origin.
fn original(scene: &Scene, blob: &Blob) -> Result<Vec<u8>> {
    Ok(Request::get(scene.origin.address(), blob_path(blob))
        .send(&scene.origin_host)?
        .body)
}

fn ask(node: &Hawker, target: &str) -> Result<Answer> {
    Request::get(node.mirror(), target)
        .within(Duration::from_secs(20))
        .send(node.host())
}

#[test]
fn a_head_tells_what_the_get_brings() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        let image = scene
            .origin
            .add_image(REPOSITORY, "v1", &[Content::generated(5, 5000)])?;
        let blob = scene.blob(SIZE_BYTES)?;
        for path in [
            blob_path(&blob),
            format!("/v2/{REPOSITORY}/manifests/v1"),
            format!("/v2/{REPOSITORY}/manifests/{}", image.digest),
        ] {
            let target = format!("{path}?ns={}", scene.registry().replace(':', "%3A"));
            let head = Request::new("HEAD", node.mirror(), &target).send(node.host())?;
            let get = ask(node, &target)?;
            ensure!(
                head.status == 200 && get.status == 200,
                "{path}: {} {}",
                head.status,
                get.status
            );
            for name in ["content-type", "content-length", "docker-content-digest"] {
                ensure!(
                    head.header(name).is_some() && head.header(name) == get.header(name),
                    "{path}: {name}"
                );
            }
            ensure!(
                get.header("docker-content-digest") == Some(get.digest.as_str()),
                "{path}"
            );
            ensure!(get.header("content-encoding").is_none(), "{path}");
        }
        Ok(())
    })
}

#[test]
fn any_range_equals_that_part_of_the_whole_cold_and_cached() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let bytes = original(scene, &blob)?;
        let last = SIZE_BYTES - 1;
        let ranges = [
            (0, 1),
            (0, last),
            (100, 199),
            (262_143, 262_145),
            (1 << 20, 2 << 20),
            (last, last),
            (5, last),
        ];
        for cached in [false, true] {
            for (from, to) in ranges {
                let header = if to == last {
                    format!("bytes={from}-")
                } else {
                    format!("bytes={from}-{to}")
                };
                let request = scene
                    .node()
                    .request(scene.registry(), &blob_path(&blob))
                    .header("range", &header);
                let answer = request.send(scene.node().host())?;
                ensure!(
                    answer.status == 206,
                    "{header}, cached {cached}: {} {}",
                    answer.status,
                    answer.text()
                );
                let told = format!("bytes {from}-{to}/{SIZE_BYTES}");
                ensure!(
                    answer.header("content-range") == Some(told.as_str()),
                    "{header}: {:?}",
                    answer.headers
                );
                ensure!(
                    answer.body == bytes[from as usize..=to as usize],
                    "{header}, cached {cached}"
                );
            }
            scene.pull(scene.node(), &blob)?;
            until_committed(scene.node(), &blob)?;
        }
        Ok(())
    })
}

#[test]
fn a_range_past_the_end_is_416_and_a_suffix_is_the_end() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        let bytes = original(scene, &blob)?;
        let range = |header: &str| {
            let request = scene
                .node()
                .request(scene.registry(), &blob_path(&blob))
                .header("range", header);
            request.send(scene.node().host())
        };
        let past = range(&format!("bytes={SIZE_BYTES}-"))?;
        ensure!(past.status == 416, "{}", past.status);
        ensure!(
            past.header("content-range") == Some(format!("bytes */{SIZE_BYTES}").as_str()),
            "{:?}",
            past.headers
        );
        let suffix = range("bytes=-100")?;
        ensure!(
            suffix.status == 206 && suffix.body == bytes[bytes.len() - 100..],
            "{}",
            suffix.status
        );
        let clamped = range(&format!("bytes=10-{}", SIZE_BYTES * 2))?;
        ensure!(
            clamped.status == 206 && clamped.body == bytes[10..],
            "{}",
            clamped.status
        );
        Ok(())
    })
}

#[test]
fn garbage_ranges_never_bring_wrong_bytes() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        for header in [
            "bytes=5-2",
            "bytes=x-y",
            "lines=1-2",
            "bytes=",
            "bytes",
            "bytes=1-99999999999999999999999",
            "=",
        ] {
            let request = scene.request(scene.node(), &blob).header("range", header);
            let answer = request.send(scene.node().host())?;
            match answer.status {
                200 => drop(right(answer, &blob)?),
                // Clamped to the blob's end.
                206 => ensure!(
                    header.starts_with("bytes=1-"),
                    "{header}: {:?}",
                    answer.headers
                ),
                400 | 416 => {}
                other => anyhow::bail!("{header}: {other}"),
            }
        }
        Ok(())
    })
}

#[test]
fn garbage_is_refused_with_the_code_that_fits() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        let ns = format!("ns={}", scene.registry().replace(':', "%3A"));
        let long = "a".repeat(300);
        for (path, statuses, code) in [
            (
                format!("/v2/{REPOSITORY}/blobs/sha256:zz"),
                &[400_u16][..],
                "DIGEST_INVALID",
            ),
            (
                format!("/v2/{REPOSITORY}/blobs/md5:d41d8cd98f00b204e9800998ecf8427e"),
                &[400],
                "DIGEST_INVALID",
            ),
            (
                format!("/v2/{REPOSITORY}/blobs/nothing"),
                &[400],
                "DIGEST_INVALID",
            ),
            ("/v2/UPPER/manifests/v1".to_owned(), &[400, 404], ""),
            (format!("/v2/{long}/manifests/v1"), &[400, 404], ""),
            ("/v2/../../etc/passwd".to_owned(), &[400, 404], ""),
            ("/v2/a/b".to_owned(), &[400, 404], ""),
            ("/v1/search".to_owned(), &[400, 404], ""),
            ("/v2/%ff%fe/manifests/v1".to_owned(), &[400, 404], ""),
        ] {
            let answer = ask(node, &format!("{path}?{ns}"))?;
            ensure!(
                statuses.contains(&answer.status),
                "{path}: {} {}",
                answer.status,
                answer.text()
            );
            ensure!(answer.text().contains(code), "{path}: {}", answer.text());
        }
        let bad_ns = ask(node, &format!("/v2/{REPOSITORY}/manifests/v1?ns=%00%2f"))?;
        ensure!(
            bad_ns.status == 400 || bad_ns.status == 404 || bad_ns.status == 403,
            "{}",
            bad_ns.status
        );
        for method in ["PUT", "POST", "PATCH", "DELETE"] {
            let target = format!("/v2/{REPOSITORY}/manifests/v1?{ns}");
            let answer = Request::new(method, node.mirror(), target)
                .header("content-length", "0")
                .send(node.host())?;
            ensure!(answer.status == 405, "{method}: {}", answer.status);
        }
        ensure!(ask(node, "/v2/")?.status == 200);
        Ok(())
    })
}

#[test]
fn bytes_that_are_no_http_do_no_harm() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        for garbage in [
            &b"\0\0\0\0"[..],
            b"GET\r\n\r\n",
            &[b'A'; 200_000],
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01\x02\0",
        ] {
            node.host().enter(|| -> Result<()> {
                let mut stream = TcpStream::connect(node.mirror())?;
                stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                // It may hang up at any point.
                let _ = stream.write_all(garbage);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let mut answer = [0; 1024];
                let _ = stream.read(&mut answer);
                Ok(())
            })??;
        }
        let blob = scene.blob(SIZE_BYTES)?;
        scene.pull(node, &blob).map(drop)
    })
}

#[test]
fn ns_leads_neither_to_private_addresses_nor_past_the_allow_list() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let origin_host = lab.host("origin")?;
        let origin = start_origin(&origin_host)?;
        let blob = origin.add_blob(REPOSITORY, Content::generated(1, 1000))?;
        // Nothing lists this origin.
        let node = HawkerPlan::proxy(&lab.host("node")?).start()?;
        let own = format!("127.0.0.1:{}", node.mirror().port());
        let mapped = format!("[::ffff:{}]:5000", origin_host.ip());
        for ns in [
            origin.address().to_string(),
            own,
            "localhost:6503".into(),
            "169.254.169.254".into(),
            mapped,
            "[fe80::1]:5000".into(),
            "[::1]:6500".into(),
            "0.0.0.0:6500".into(),
        ] {
            let answer = node.request(&ns, &blob_path(&blob)).send(node.host())?;
            ensure!(
                (400..500).contains(&answer.status),
                "{ns}: {} {}",
                answer.status,
                answer.text()
            );
        }
        ensure!(origin.log().is_empty(), "it was asked: {:?}", origin.log());
        drop(node);

        let listed = HawkerPlan::proxy(&lab.host("listed")?)
            .plain_registry(origin.address())
            .flag("--allow-registry", origin.address().to_string())
            .start()?;
        right(
            listed
                .request(origin.address(), &blob_path(&blob))
                .discard()
                .send(listed.host())?,
            &blob,
        )?;
        let other = listed
            .request("registry.example", &blob_path(&blob))
            .send(listed.host())?;
        ensure!((400..500).contains(&other.status), "{}", other.status);
        Ok(())
    })())
}

#[test]
fn a_loop_of_mirrors_is_refused() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        // Each of the two takes the other for the registry.
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        let start = |host: &hawker_conformance::lab::Host,
                     other: &hawker_conformance::lab::Host| {
            HawkerPlan::proxy(host)
                .flag("--mirror", host.at(6500).to_string())
                .flag(
                    "--registry",
                    format!("loop.example=http://{}/loop.example", other.at(6500)),
                )
                .start()
        };
        let (one, _two) = (start(&a, &b)?, start(&b, &a)?);
        let digest = format!("sha256:{}", "a".repeat(64));
        for what in [
            "manifests/v1".to_owned(),
            format!("manifests/{digest}"),
            format!("blobs/{digest}"),
        ] {
            let path = format!("/v2/{REPOSITORY}/{what}?ns=loop.example");
            let answer = Request::get(a.at(6500), path)
                .within(Duration::from_secs(20))
                .send(&a)?;
            ensure!(answer.status == 508, "{what}: {}", answer.status);
        }
        ensure!(one.status()?.ready);
        Ok(())
    })())
}

#[test]
fn a_digest_of_one_repository_is_unknown_in_another() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &blob)?;
        until_committed(scene.node(), &blob)?;
        let elsewhere = format!("/v2/other/app/blobs/{}", blob.digest);
        let answer = scene
            .node()
            .request(scene.registry(), &elsewhere)
            .send(scene.node().host())?;
        ensure!(answer.status == 404, "{}", answer.status);
        Ok(())
    })
}

#[test]
fn the_same_digest_in_two_registries_is_one_task() -> Result<()> {
    let lab = Lab::new()?;
    lab.explain((|| {
        let (one_host, two_host) = (lab.host("one")?, lab.host("two")?);
        let (one, two) = (start_origin(&one_host)?, start_origin(&two_host)?);
        let content = Content::generated(9, SIZE_BYTES);
        let blob = one.add_blob(REPOSITORY, content.clone())?;
        two.add_blob(REPOSITORY, content)?;
        let plan = HawkerPlan::proxy(&lab.host("node")?);
        let node = plan
            .plain_registry(one.address())
            .plain_registry(two.address())
            .start()?;
        for origin in [&one, &two] {
            right(
                node.request(origin.address(), &blob_path(&blob))
                    .discard()
                    .send(node.host())?,
                &blob,
            )?;
            until_committed(&node, &blob)?;
        }
        ensure!(
            two.totals().blob_bytes == 0,
            "the second registry sent it too"
        );
        Ok(())
    })())
}

#[test]
fn an_empty_blob_is_200_and_empty() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(0)?;
        for _ in 0..2 {
            let answer = scene.pull(scene.node(), &blob)?;
            ensure!(
                answer.header("content-length") == Some("0"),
                "{:?}",
                answer.headers
            );
        }
        Ok(())
    })
}

#[test]
fn many_misses_at_once_cost_one_transfer() -> Result<()> {
    Plan::nodes(2).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        std::thread::scope(|scope| -> Result<()> {
            let pulls: Vec<_> = (0..16)
                .map(|i| &scene.cluster.nodes[i % 2])
                .map(|node| scope.spawn(|| scene.pull(node, &blob)))
                .collect();
            pulls
                .into_iter()
                .try_for_each(|pull| hawker_conformance::scene::join(pull.join()).map(drop))
        })?;
        let copies = scene.origin_copies(&blob);
        ensure!(copies <= 1.02, "{copies} copies");
        Ok(())
    })
}
