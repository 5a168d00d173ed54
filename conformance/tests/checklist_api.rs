//! The mirror contract's part about the API: a client's request through Hawker is answered as docker-registry itself
//! would.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{
    Answer, DockerRegistry, Hawker, HawkerPlan, Image, Lab, Request, run,
};
use hawker_conformance::origin::Content;
use hawker_conformance::scene::{Plan, REPOSITORY, blob_path, right};

const ALIAS: &str = "origin.test";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const SCHEMA_2: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// A registry with `team/app:v1` (an OCI image), `:index` (an OCI index) and `:old` (an image of docker's schema 2), and a node
/// that knows it by its address, by [`ALIAS`], and as the default.
struct Stage {
    registry: DockerRegistry,
    node: Hawker,
    image: Image,
    _lab: Lab,
}

fn play(scene: impl FnOnce(&mut Stage) -> Result<()>) -> Result<()> {
    let lab = Lab::new()?;
    let registry = DockerRegistry::start(&lab.host("origin")?)?;
    let alias = format!("{ALIAS}=http://{}", registry.authority());
    let node = HawkerPlan::proxy(&lab.host("node")?)
        .plain_registry(registry.authority())
        .flag("--registry", alias)
        .flag("--default-registry", registry.authority())
        .start()?;
    let image = Image::noise(41, &[300_000, 4000]);
    registry.push(&image, "team/app", "v1")?;
    let layout = lab.dir().join("layout");
    Image::write_index(
        &layout,
        &[Image::noise(42, &[3000]), Image::noise(43, &[2000])],
    )?;
    let layout = format!("oci:{}:latest", layout.display());
    let copy = |from: &str, to: &str, flags: &[&str]| -> Result<String> {
        let mut skopeo = registry.host().command("skopeo");
        skopeo.args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--src-tls-verify=false",
        ]);
        run(skopeo
            .arg("--dest-tls-verify=false")
            .args(flags)
            .args([from, to]))
    };
    let tagged = |tag: &str| format!("docker://{}/team/app:{tag}", registry.authority());
    copy(&layout, &tagged("index"), &["--all", "--preserve-digests"])?;
    copy(&tagged("v1"), &tagged("old"), &["--format", "v2s2"])?;
    let mut stage = Stage {
        registry,
        node,
        image,
        _lab: lab,
    };
    let outcome = scene(&mut stage);
    stage._lab.explain(outcome)
}

impl Stage {
    /// The same request at the registry, from the node's host, and through the mirror.
    fn both(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Result<(Answer, Answer)> {
        let ns = self.registry.authority().replace(':', "%3A");
        let of = |address, target: String| {
            let request = Request::new(method, address, target);
            let request = headers.iter().fold(request, |request, (name, value)| {
                request.header(name, *value)
            });
            request.send(self.node.host())
        };
        let separator = if path.contains('?') { '&' } else { '?' };
        Ok((
            of(self.registry.authority().parse()?, path.to_owned())?,
            of(self.node.mirror(), format!("{path}{separator}ns={ns}"))?,
        ))
    }

    fn mirror(&self, method: &str, target: &str) -> Result<Answer> {
        Request::new(method, self.node.mirror(), target)
            .within(Duration::from_secs(20))
            .send(self.node.host())
    }

    fn digest_of(&self, tag: &str, accept: &str) -> Result<String> {
        let (direct, _) = self.both(
            "HEAD",
            &format!("/v2/team/app/manifests/{tag}"),
            &[("accept", accept)],
        )?;
        Ok(direct
            .header("docker-content-digest")
            .context("the registry tells no digest")?
            .to_owned())
    }
}

/// Checks that both answers tell the same about the content, in head and body.
fn alike(what: &str, (direct, mirrored): &(Answer, Answer)) -> Result<()> {
    ensure!(
        direct.status == mirrored.status,
        "{what}: {} became {}",
        direct.status,
        mirrored.status
    );
    for name in ["content-type", "content-length", "docker-content-digest"] {
        let (direct, mirrored) = (direct.header(name), mirrored.header(name));
        ensure!(
            direct == mirrored,
            "{what}: {name} {direct:?} became {mirrored:?}"
        );
    }
    ensure!(direct.body == mirrored.body, "{what}: another body");
    Ok(())
}

#[test]
fn the_ping_is_200_under_every_path_even_while_the_registry_is_down() -> Result<()> {
    play(|stage| {
        let ns = stage.registry.authority().replace(':', "%3A");
        for down in [false, true] {
            for target in [
                "/v2/",
                "/v2",
                &format!("/v2/?ns={ns}"),
                &format!("/{ALIAS}/v2/"),
            ] {
                for method in ["GET", "HEAD"] {
                    let answer = stage.mirror(method, target)?;
                    ensure!(
                        answer.status == 200,
                        "{method} {target}, down {down}: {}",
                        answer.status
                    );
                    let version = answer.header("docker-distribution-api-version");
                    ensure!(version == Some("registry/2.0"), "{target}: {version:?}");
                }
            }
            stage.registry.kill()?;
        }
        Ok(())
    })
}

#[test]
fn heads_and_bodies_are_the_registry_s_own_cold_and_cached() -> Result<()> {
    play(|stage| {
        let manifest = stage.digest_of("v1", MANIFEST)?;
        let layer = &stage.image.layers[0].digest;
        let paths = [
            "/v2/team/app/manifests/v1".to_owned(),
            format!("/v2/team/app/manifests/{manifest}"),
            format!("/v2/team/app/blobs/{layer}"),
            format!("/v2/team/app/blobs/{}", stage.image.layers[1].digest),
        ];
        for round in ["cold", "cached"] {
            for path in &paths {
                let headers = [
                    ("accept", MANIFEST),
                    ("accept-encoding", "zstd, gzip, deflate"),
                ];
                for method in ["HEAD", "GET"] {
                    let both = stage.both(method, path, &headers)?;
                    let what = format!("{method} {path}, {round}");
                    alike(&what, &both)?;
                    let mirrored = both.1;
                    ensure!(mirrored.status == 200, "{what}: {}", mirrored.status);
                    ensure!(
                        mirrored.header("content-length").is_some(),
                        "{what}: no length"
                    );
                    for absent in ["transfer-encoding", "content-encoding"] {
                        ensure!(mirrored.header(absent).is_none(), "{what}: {absent}");
                    }
                    ensure!(
                        mirrored.header("oci-namespace") == Some(&stage.registry.authority()),
                        "{what}"
                    );
                    let named = mirrored.header("docker-content-digest");
                    ensure!(
                        method == "HEAD" || named == Some(&mirrored.digest),
                        "{what}: {named:?}"
                    );
                }
            }
        }
        Ok(())
    })
}

#[test]
fn one_tag_is_several_manifests_and_accept_says_which() -> Result<()> {
    play(|stage| {
        let both = format!("{MANIFEST}, {INDEX}");
        let weighted = format!("{MANIFEST};q=0.5,{INDEX};q=0.9");
        // Twice, and in turn: the answer to one client must not be given to another that accepts something else.
        for _ in 0..2 {
            let mut outcomes = std::collections::HashSet::new();
            for (tag, accepts) in [
                ("index", &[MANIFEST, INDEX][..]),
                ("index", &[INDEX, MANIFEST]),
                ("index", &[&both]),
                ("index", &[&weighted]),
                ("index", &[MANIFEST]),
                ("index", &[SCHEMA_2]),
                ("v1", &[MANIFEST]),
                ("v1", &[SCHEMA_2, "application/json", MANIFEST]),
                ("old", &[SCHEMA_2]),
                ("old", &["text/plain", SCHEMA_2, "*/*"]),
            ] {
                let headers: Vec<_> = accepts.iter().map(|accept| ("accept", *accept)).collect();
                for method in ["HEAD", "GET"] {
                    let both =
                        stage.both(method, &format!("/v2/team/app/manifests/{tag}"), &headers)?;
                    let (direct, mirrored) = &both;
                    ensure!(
                        direct.status == mirrored.status,
                        "{method} {tag} {accepts:?}: {} became {}",
                        direct.status,
                        mirrored.status
                    );
                    if direct.status == 200 {
                        alike(&format!("{method} {tag} {accepts:?}"), &both)?;
                    }
                    outcomes.insert((
                        tag,
                        direct.status,
                        direct.header("content-type").map(str::to_owned),
                    ));
                }
            }
            ensure!(
                outcomes.contains(&("index", 200, Some(INDEX.into())))
                    && outcomes
                        .iter()
                        .any(|(tag, status, _)| *tag == "index" && *status == 404),
                "the registry does not look at Accept: {outcomes:?}"
            );
        }
        Ok(())
    })
}

#[test]
fn not_modified_is_said_to_those_only_who_have_it_already() -> Result<()> {
    play(|stage| {
        let manifest = stage.digest_of("v1", MANIFEST)?;
        let layer = stage.image.layers[0].digest.clone();
        for (path, digest) in [
            ("/v2/team/app/manifests/v1".to_owned(), &manifest),
            (format!("/v2/team/app/manifests/{manifest}"), &manifest),
            (format!("/v2/team/app/blobs/{layer}"), &layer),
        ] {
            let ask = |headers: &[(&str, &str)]| -> Result<Answer> {
                let accept = [("accept", MANIFEST)];
                Ok(stage.both("GET", &path, &[&accept, headers].concat())?.1)
            };
            for round in ["cold", "cached"] {
                let whole = ask(&[])?;
                ensure!(
                    whole.status == 200 && whole.digest == *digest,
                    "{path}, {round}: {}",
                    whole.status
                );
                let have = ask(&[("if-none-match", &format!("\"{digest}\""))])?;
                ensure!(
                    have.status == 304 && have.body.is_empty(),
                    "{path}, {round}: {}",
                    have.status
                );
                let other = ask(&[("if-none-match", "\"sha256:0\"")])?;
                ensure!(
                    other.status == 200 && other.digest == *digest,
                    "{path}, {round}: {}",
                    other.status
                );
            }
        }
        Ok(())
    })
}

#[test]
fn what_the_registry_does_not_have_is_unknown_and_says_what() -> Result<()> {
    play(|stage| {
        let nobody = format!("sha256:{}", "0".repeat(64));
        for (path, status, code) in [
            (
                "/v2/team/app/manifests/none".to_owned(),
                404,
                "MANIFEST_UNKNOWN",
            ),
            (
                format!("/v2/team/app/manifests/{nobody}"),
                404,
                "MANIFEST_UNKNOWN",
            ),
            (format!("/v2/team/app/blobs/{nobody}"), 404, "BLOB_UNKNOWN"),
            ("/v2/no/where/manifests/v1".to_owned(), 404, "_UNKNOWN"),
            (format!("/v2/no/where/blobs/{nobody}"), 404, "_UNKNOWN"),
            (
                "/v2/team/app/blobs/sha256:12".to_owned(),
                400,
                "DIGEST_INVALID",
            ),
            (
                "/v2/team/app/manifests/sha256:12".to_owned(),
                400,
                "DIGEST_INVALID",
            ),
        ] {
            let (_, answer) = stage.both("GET", &path, &[])?;
            ensure!(answer.status == status, "{path}: {}", answer.status);
            let error: serde_json::Value =
                serde_json::from_str(&answer.text()).context(path.clone())?;
            let said = error["errors"][0]["code"].as_str().unwrap_or_default();
            ensure!(said.ends_with(code), "{path}: {}", answer.text());
            ensure!(
                answer
                    .header("content-type")
                    .is_some_and(|kind| kind.starts_with("application/json"))
            );
        }
        Ok(())
    })
}

#[test]
fn referrers_that_the_registry_has_no_list_of_are_found_by_the_tag() -> Result<()> {
    play(|stage| {
        let subject = stage.digest_of("v1", MANIFEST)?;
        let (_, listed) = stage.both("GET", &format!("/v2/team/app/referrers/{subject}"), &[])?;
        ensure!(
            listed.status == 404,
            "docker-registry has no such API: {}",
            listed.status
        );
        let tag = subject.replace(':', "-");
        let mut skopeo: Command = stage.registry.host().command("skopeo");
        skopeo.args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--all",
            "--preserve-digests",
        ]);
        skopeo.args(["--src-tls-verify=false", "--dest-tls-verify=false"]);
        let tagged = |tag: &str| format!("docker://{}/team/app:{tag}", stage.registry.authority());
        run(skopeo.args([tagged("index"), tagged(&tag)]))?;
        let both = stage.both(
            "GET",
            &format!("/v2/team/app/manifests/{tag}"),
            &[("accept", INDEX)],
        )?;
        alike("the fall-back tag", &both)?;
        ensure!(both.1.status == 200, "{}", both.1.status);
        Ok(())
    })
}

#[test]
fn requests_without_ns_go_to_the_path_s_registry_or_to_the_default_one() -> Result<()> {
    play(|stage| {
        let layer = &stage.image.layers[1];
        let ns = stage.registry.authority().replace(':', "%3A");
        for target in [
            format!("/v2/team/app/blobs/{}", layer.digest),
            format!("/v2/{ALIAS}/team/app/blobs/{}", layer.digest),
            format!(
                "/v2/{}/team/app/blobs/{}",
                stage.registry.authority(),
                layer.digest
            ),
            format!("/{ALIAS}/v2/team/app/blobs/{}", layer.digest),
            // The request that containerd makes for a host with a path, whose ns is another registry's.
            format!(
                "/{ALIAS}/v2/team/app/blobs/{}?ns=elsewhere.test",
                layer.digest
            ),
            format!(
                "/v2/team/app/blobs/{}?ns={}",
                layer.digest,
                stage.registry.authority()
            ),
            format!("/v2/team/app/blobs/{}?x=1&ns={ns}", layer.digest),
            format!(
                "/v2/team/app/blobs/{}?ns={ns}",
                layer.digest.replace(':', "%3A")
            ),
        ] {
            let answer = stage.mirror("GET", &target)?;
            ensure!(
                answer.status == 200 && answer.body == layer.data,
                "{target}: {}",
                answer.status
            );
        }
        let deep = Image::noise(44, &[1000]);
        stage.registry.push(&deep, "a/b-b/c__c/d.d/e", "v1")?;
        let answer = stage.mirror(
            "GET",
            &format!("/v2/a/b-b/c__c/d.d/e/blobs/{}", deep.layers[0].digest),
        )?;
        ensure!(
            answer.status == 200 && answer.body == deep.layers[0].data,
            "{}",
            answer.status
        );
        Ok(())
    })
}

#[test]
fn who_pushes_through_the_mirror_is_refused_and_the_registry_hears_nothing() -> Result<()> {
    play(|stage| {
        let before = stage.registry.requests();
        for (method, path) in [
            ("POST", "/v2/team/app/blobs/uploads/".to_owned()),
            ("PUT", "/v2/team/app/manifests/v2".to_owned()),
            ("PATCH", "/v2/team/app/blobs/uploads/1".to_owned()),
            (
                "DELETE",
                format!("/v2/team/app/blobs/{}", stage.image.layers[0].digest),
            ),
        ] {
            let answer = stage.mirror(method, &path)?;
            ensure!(answer.status == 405, "{method} {path}: {}", answer.status);
            ensure!(
                answer
                    .header("allow")
                    .is_some_and(|allowed| allowed.contains("GET")),
                "{method}"
            );
        }
        let mut skopeo = stage.node.host().command("skopeo");
        skopeo.args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
        ]);
        skopeo.arg(format!("docker://{}/team/app:index", stage.node.mirror()));
        ensure!(run(skopeo.arg(format!("docker://{}/team/app:v2", stage.node.mirror()))).is_err());
        let writes = stage.registry.requests().split_off(before.len());
        ensure!(
            writes
                .iter()
                .all(|line| line.contains("\"GET ") || line.contains("\"HEAD ")),
            "{writes:?}"
        );
        Ok(())
    })
}

#[test]
fn a_manifest_of_4_mib_works_and_a_longer_one_is_refused() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let manifest = |bytes: usize| {
            let head = format!("{{\"schemaVersion\":2,\"mediaType\":\"{MANIFEST}\",\"padding\":\"");
            format!("{head}{}\"}}", "x".repeat(bytes - head.len() - 2))
        };
        for (tag, bytes, status) in [("max", 4 << 20, 200), ("over", (4 << 20) + 1, 502)] {
            let blob =
                scene
                    .origin
                    .add_manifest(REPOSITORY, tag, MANIFEST, manifest(bytes).as_bytes());
            for reference in [tag.to_owned(), blob.digest.to_string()] {
                let path = format!("/v2/{REPOSITORY}/manifests/{reference}");
                let answer = scene
                    .node()
                    .request(scene.registry(), &path)
                    .send(scene.node().host())?;
                ensure!(
                    answer.status == status,
                    "{tag}, {reference}: {}",
                    answer.status
                );
                if status == 200 {
                    right(answer, &blob)?;
                }
            }
        }
        Ok(())
    })
}

/// Says `requests` on one connection, and hears all that comes until the mirror ends it.
fn converse(node: &Hawker, requests: &str) -> Result<String> {
    node.host().enter(|| -> Result<String> {
        let mut stream = TcpStream::connect(node.mirror())?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(requests.as_bytes())?;
        let mut heard = Vec::new();
        stream
            .read_to_end(&mut heard)
            .with_context(|| String::from_utf8_lossy(&heard).into_owned())?;
        Ok(String::from_utf8_lossy(&heard).into_owned())
    })?
}

#[test]
fn connections_are_kept_and_ended_as_http_1_1_has_it() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        let blob = scene.origin.add_blob(REPOSITORY, Content::bytes(*b"fifteen letters"))?;
        let target = format!("{}?ns={}", blob_path(&blob), scene.registry());
        let ok = |heard: &str| heard.matches("HTTP/1.1 200 OK\r\n").count();
        // A HEAD's answer has no body; requests that come at once are answered in order; nothing after "close" is answered.
        let heard = converse(
            node,
            &format!(
                "HEAD {target} HTTP/1.1\r\nHost: m\r\n\r\nGET {target} HTTP/1.1\r\nHost: m\r\n\r\n\
                 GET /v2/ HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\nGET /v2/ HTTP/1.1\r\nHost: m\r\n\r\n"
            ),
        )?;
        ensure!(ok(&heard) == 3, "{heard}");
        ensure!(heard.matches("fifteen letters").count() == 1, "{heard}");
        // A body that nobody asked for is passed over: then follows the next request, or the connection's end.
        for body in ["Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n0\r\n\r\n"] {
            let heard = converse(
                node,
                &format!(
                    "GET /v2/ HTTP/1.1\r\nHost: m\r\n{body}\
                     GET {target} HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n"
                ),
            )?;
            let answers = heard.matches("HTTP/1.1 ").count();
            ensure!(ok(&heard) == answers, "{body:?}: {heard}");
            ensure!(answers == 1 || answers == 2 && heard.ends_with("fifteen letters"), "{body:?}: {heard}");
        }
        // HTTP/1.0 ends with the connection.
        let heard = converse(node, &format!("GET {target} HTTP/1.0\r\n\r\n"))?;
        ensure!(heard.starts_with("HTTP/1.0 200") && heard.ends_with("fifteen letters"), "{heard}");
        Ok(())
    })
}
