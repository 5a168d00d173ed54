//! Odd registries: the answers of some products, and the right answers to clients all the same.

use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use hawker_core::piece::PieceLayout;

use super::*;
use crate::settings::RegistrySettings;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const TAG: &str = "/v2/a/b/manifests/v1";

fn by_digest(digest: &Digest) -> String {
    format!("/v2/a/b/manifests/{digest}")
}

/// The parts of a request that most of these registries look at.
fn is_head(seen: &Seen) -> bool {
    seen.method == "HEAD"
}

/// Lets a node reach another registry as well.
fn introduce(node: &Node, registry: &TestRegistry) {
    let mut settings = (**node.live.load()).clone();
    let endpoints = vec![format!("http://{}", registry.name()).parse().unwrap()];
    let known = RegistrySettings {
        endpoints,
        ..Default::default()
    };
    settings.registries.known.insert(registry.name(), known);
    node.live.store(Arc::new(settings));
}

/// How a registry that refuses HEAD answers a GET.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ByGet {
    Range,
    Whole,
    NoRange(u16),
    Refused(u16),
}

#[tokio::test]
async fn a_get_proves_what_a_refused_head_does_not() {
    let image = Image::new(1000);
    let digest = image.blob_digest();
    for (head, by_get, status, gets) in [
        (400, ByGet::Range, 200, 1),
        (403, ByGet::Range, 200, 1),
        (404, ByGet::Range, 200, 1),
        (405, ByGet::Range, 200, 1),
        (500, ByGet::Range, 200, 1),
        (501, ByGet::Range, 200, 1),
        (503, ByGet::Range, 200, 1),
        (204, ByGet::Range, 200, 1),
        (302, ByGet::Range, 200, 1),
        (304, ByGet::Range, 200, 1),
        (403, ByGet::Whole, 200, 1),
        (403, ByGet::NoRange(416), 200, 2),
        (403, ByGet::NoRange(400), 200, 2),
        (403, ByGet::NoRange(501), 200, 2),
        (404, ByGet::Refused(404), 404, 1),
        (403, ByGet::Refused(403), 403, 1),
        (403, ByGet::Refused(401), 401, 1),
        (500, ByGet::Refused(304), 502, 1),
        (401, ByGet::Range, 401, 0),
        (429, ByGet::Range, 429, 0),
    ] {
        let blob = image.blob.clone();
        let registry =
            TestRegistry::start(
                move |seen| match (is_head(seen), by_get, seen.header("range")) {
                    (true, ..) => say(seen, head, &[], b""),
                    (_, ByGet::Refused(status), _) => say(seen, status, &[], b"{}"),
                    (_, ByGet::NoRange(status), Some(_)) => say(seen, status, &[], b"no ranges"),
                    (_, ByGet::Range, Some("bytes=0-0")) => {
                        let range = format!("bytes 0-0/{}", blob.len());
                        say(seen, 206, &[("Content-Range", &range)], &blob[..1])
                    }
                    _ => say(seen, 200, &[], &blob),
                },
            )
            .await;
        let node = Node::before(&registry).await;
        node.commit(&image.blob);
        let target = format!("/v2/a/b/blobs/{digest}");
        for _ in 0..if status == 200 { 2 } else { 1 } {
            let got = node.get(&target).await;
            assert_eq!(got.status, status, "HEAD {head}, {by_get:?}");
            assert!(status != 200 || got.body == image.blob);
        }
        assert_eq!(
            registry.count("GET", "/v2/a/b/blobs/"),
            gets,
            "HEAD {head}, {by_get:?}"
        );
        assert_eq!(
            registry.count("HEAD", "/v2/a/b/blobs/"),
            1,
            "what was proved is remembered"
        );
    }
}

#[tokio::test]
async fn a_get_that_brings_something_else_proves_nothing() {
    let image = Image::new(1000);
    let other = sha256(b"other").to_string();
    for (headers, body) in [
        (
            &[("Content-Type", "Text/HTML; charset=utf-8")][..],
            &b"<form>"[..],
        ),
        (&[("Docker-Content-Digest", &*other)], &image.blob[..]),
        (&[], b"another length"),
    ] {
        let (headers, body): (Vec<_>, _) = (
            headers
                .iter()
                .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
                .collect(),
            body.to_vec(),
        );
        let registry = TestRegistry::start(move |seen| {
            let headers: Vec<_> = headers
                .iter()
                .map(|(n, v)| (n.as_str(), v.as_str()))
                .collect();
            if is_head(seen) {
                say(seen, 403, &[], b"")
            } else {
                say(seen, 200, &headers, &body)
            }
        })
        .await;
        let node = Node::before(&registry).await;
        node.commit(&image.blob);
        let got = node
            .get(&format!("/v2/a/b/blobs/{}", image.blob_digest()))
            .await;
        assert_eq!(got.status, 502, "{:?}", registry.seen().last());
    }
}

#[tokio::test]
async fn a_manifest_is_had_from_a_registry_that_answers_no_head() {
    for head in [400, 403, 404, 405, 500, 501, 204, 304, 302] {
        let image = Image::new(10);
        let replies = image.clone();
        let registry = TestRegistry::start(move |seen| match is_head(seen) {
            true => say(seen, head, &[], b""),
            false => replies.reply(seen),
        })
        .await;
        let node = Node::before(&registry).await;
        for target in [TAG.to_owned(), by_digest(&image.manifest_digest())] {
            for round in 0..2 {
                let got = node.get(&target).await;
                assert_eq!(
                    (got.status, got.header("content-type")),
                    (200, MANIFEST),
                    "{head} {round} {target}"
                );
                assert_eq!(got.body, image.manifest.as_bytes());
            }
        }
        // A registry that does not know HEAD is asked by GET for a client that sends one.
        let knows_none = matches!(head, 400 | 405 | 501 | 204 | 304 | 302);
        let got = node.ask("HEAD", TAG, &[]).await;
        assert_eq!(got.status, if knows_none { 200 } else { head }, "{head}");
        assert!(!knows_none || got.header("content-length") == image.manifest.len().to_string());
    }
}

#[tokio::test]
async fn a_wrong_media_type_stays_with_nobody() {
    let own = format!("{{\"schemaVersion\":2,\"mediaType\":\"{INDEX}\",\"manifests\":[]}}");
    let bare = "{\"schemaVersion\":2,\"manifests\":[]}".to_owned();
    let odd = "{\"schemaVersion\":2,\"blobs\":[]}".to_owned();
    let telling = |body: &str, told: &'static str| {
        let body = body.to_owned();
        TestRegistry::start(move |seen| {
            let digest = sha256(body.as_bytes()).to_string();
            say(
                seen,
                200,
                &[("Content-Type", told), ("Docker-Content-Digest", &digest)],
                body.as_bytes(),
            )
        })
    };
    for (body, sloppy, told_sloppy, good, told_good) in [
        (&own, "application/octet-stream", INDEX, INDEX, INDEX),
        (&own, LIST, INDEX, INDEX, INDEX),
        (&own, "text/html", INDEX, "", INDEX),
        (&bare, LIST, LIST, INDEX, INDEX),
        (&bare, MANIFEST, INDEX, LIST, LIST),
        (&bare, "text/plain", INDEX, LIST, LIST),
        (
            &odd,
            "application/vnd.a+json",
            "application/vnd.a+json",
            "Application/Vnd.B+json; x=y",
            "application/vnd.b+json",
        ),
        (
            &odd,
            "application/vnd.a+json",
            "application/vnd.a+json",
            "text/plain",
            "application/octet-stream",
        ),
    ] {
        let (first, second) = (telling(body, sloppy).await, telling(body, good).await);
        let node = Node::before(&first).await;
        introduce(&node, &second);
        let digest = sha256(body.as_bytes());
        for (registry, expected) in [
            (&first, told_sloppy),
            (&second, told_good),
            (&first, told_sloppy),
        ] {
            for reference in [digest.to_string(), "v1".to_owned()] {
                for method in ["GET", "HEAD"] {
                    let target = format!("/v2/x/y/manifests/{reference}?ns={}", registry.name());
                    let got = node.ask(method, &target, &[]).await;
                    assert_eq!(got.status, 200);
                    let generic = matches!(
                        got.header("content-type"),
                        "text/plain" | "application/octet-stream"
                    );
                    let fine = got.header("content-type") == expected
                        || generic && expected == "application/octet-stream";
                    assert!(
                        fine,
                        "{body} {sloppy} {good}: {method} {target} {}",
                        got.header("content-type")
                    );
                }
            }
        }
    }
}

#[tokio::test]
async fn a_seed_does_not_say_what_a_manifest_is() {
    let index = format!("{{\"mediaType\":\"{INDEX}\",\"manifests\":[]}}");
    let bare = "{\"manifests\":[]}".to_owned();
    for (body, told, expected) in [
        (index, "", INDEX),
        (bare.clone(), LIST, LIST),
        (bare, "", INDEX),
    ] {
        let copy = body.clone();
        let registry = TestRegistry::start(move |seen| {
            say(seen, 200, &[("Content-Type", told)], copy.as_bytes())
        })
        .await;
        let seed = Seed(vec![(
            200,
            "application/vnd.evil+json".to_owned(),
            Bytes::from(body.clone()),
            false,
        )]);
        let node = Node::with_seeds(&registry, Some(Arc::new(seed))).await;
        let got = node.get(&by_digest(&sha256(body.as_bytes()))).await;
        assert_eq!(
            (got.status, got.header("content-type")),
            (200, expected),
            "{body} {told}"
        );
        assert_eq!(registry.count("GET", "/v2/"), 0);
    }
}

#[tokio::test]
async fn by_digest_the_clients_types_come_first_and_reach_the_registry() {
    let artifact = "application/vnd.acme.artifact.v1+json";
    let body = "{\"blobs\":[]}";
    let registry = TestRegistry::start(move |seen| {
        let accept = seen.header("accept").unwrap_or_default();
        match accept
            .split(", ")
            .any(|range| range.split(';').next() == Some(artifact))
        {
            true => say(seen, 200, &[("Content-Type", artifact)], body.as_bytes()),
            false => say(seen, 404, &[], b"{\"errors\":[]}"),
        }
    })
    .await;
    let node = Node::before(&registry).await;
    let target = by_digest(&sha256(body.as_bytes()));
    assert_eq!(node.get(&target).await.status, 404);
    let accept = [
        ("Accept", "application/vnd.acme.artifact.v1+json;q=0.9"),
        ("Accept", "a/b, */*"),
    ];
    for method in ["HEAD", "GET", "HEAD"] {
        let got = node.ask(method, &target, &accept).await;
        assert_eq!(
            (got.status, got.header("content-type")),
            (200, artifact),
            "{method}"
        );
    }
    let seen = registry.seen();
    let accepted = seen.last().unwrap().header("accept").unwrap().to_owned();
    assert!(
        accepted.starts_with(&format!("{artifact};q=0.9, a/b, */*, {INDEX}, ")),
        "{accepted}"
    );
    assert_eq!(accepted.matches("*/*").count(), 1);
}

#[tokio::test]
async fn a_signed_schema_1_manifest_passes_through_and_is_not_kept() {
    let signed_type = "application/vnd.docker.distribution.manifest.v1+prettyjws";
    let head = "{\"schemaVersion\":1,\"fsLayers\":[]";
    let protected = format!("{{\"formatLength\":{},\"formatTail\":\"fQ\"}}", head.len());
    let protected = URL_SAFE_NO_PAD.encode(protected);
    let body =
        format!("{head},\"signatures\":[{{\"protected\":\"{protected}\",\"signature\":\"x\"}}]}}");
    let payload = sha256(format!("{head}}}").as_bytes());
    for announces in [true, false] {
        let copy = body.clone();
        let registry = TestRegistry::start(move |seen| {
            let digest = payload.to_string();
            let headers = [
                ("Content-Type", signed_type),
                ("Docker-Content-Digest", digest.as_str()),
            ];
            say(
                seen,
                200,
                &headers[..if announces { 2 } else { 1 }],
                copy.as_bytes(),
            )
        })
        .await;
        let node = Node::before(&registry).await;
        for target in [TAG.to_owned(), by_digest(&payload)] {
            for round in 1..3 {
                let got = node.get(&target).await;
                assert_eq!(
                    (got.status, got.header("content-type")),
                    (200, signed_type),
                    "{target} {round}"
                );
                assert_eq!(got.body, body.as_bytes());
                assert_eq!(got.header("docker-content-digest"), payload.to_string());
            }
        }
        assert_eq!(registry.count("GET", "/v2/"), 4);
        assert!(node.mirror.inner.store.manifest_bytes(&payload).is_none());
        let status = node.get(&by_digest(&sha256(b"other"))).await.status;
        assert_eq!(status, 502, "what matches neither way is refused");
        let (peer, ..) = node
            .mirror
            .manifest(registry.source("a/b"), payload, None)
            .await;
        assert_eq!(peer, 404, "a peer could not compare it");
    }
}

#[tokio::test]
async fn any_success_whose_bytes_match_is_one_and_any_other_answer_is_a_502() {
    let image = Image::new(1000);
    for (status, announces, works) in [
        (200, true, true),
        (201, true, true),
        (203, true, true),
        (206, true, true),
        (226, true, true),
        (203, false, true),
        (206, false, true),
        (201, false, false),
        (101, true, false),
        (204, true, false),
        (205, true, false),
        (300, true, false),
        (302, true, false),
        (304, true, false),
        (305, true, false),
        (399, true, false),
    ] {
        let replies = image.clone();
        let registry = TestRegistry::start(move |seen| {
            let body = match seen.target.contains("/blobs/") {
                true => &replies.blob[..],
                false => replies.manifest.as_bytes(),
            };
            let digest = sha256(body).to_string();
            let range = format!("bytes 0-{}/{}", body.len() - 1, body.len());
            let mut headers = vec![("Content-Type", MANIFEST)];
            if announces {
                headers.push(("Docker-Content-Digest", &digest));
            }
            if status == 206 {
                headers.push(("Content-Range", &range));
            }
            let body = if matches!(status, 101 | 204 | 205 | 304) {
                b""
            } else {
                body
            };
            say(seen, status, &headers, body)
        })
        .await;
        let node = Node::passing_through(&registry).await;
        let blob = format!("/v2/a/b/blobs/{}", image.blob_digest());
        let by_digest = by_digest(&image.manifest_digest());
        for (method, target) in [
            ("GET", TAG),
            ("HEAD", TAG),
            ("GET", &by_digest),
            ("HEAD", &by_digest),
            ("GET", &blob),
            ("HEAD", &blob),
        ] {
            let got = node.ask(method, target, &[]).await;
            // By digest the bytes are compared with what the client asked for, whatever is announced.
            let works =
                works || (announces || target != TAG) && matches!(status, 200..=203 | 206 | 226);
            let expected = if works { 200 } else { 502 };
            assert_eq!(
                got.status, expected,
                "{status} {announces} {method} {target}"
            );
            if works && method == "GET" {
                let content = if target == blob {
                    &image.blob[..]
                } else {
                    image.manifest.as_bytes()
                };
                assert!(got.complete && got.body == content, "{status} {target}");
            }
            assert!(
                works || method == "HEAD" || got.code() != "",
                "Hawker's own error"
            );
        }
    }
}

#[tokio::test]
async fn a_206_that_nobody_asked_for_brings_the_whole_unless_it_says_otherwise() {
    let image = Image::new(1000);
    for (range, works) in [
        (None, true),
        (Some("bytes 0-999/1000"), true),
        (Some("bytes 0-999/2000"), false),
        (Some("x"), false),
    ] {
        let blob = image.blob.clone();
        let registry = TestRegistry::start(move |seen| match (is_head(seen), range) {
            (true, _) => say(seen, 200, &[], &blob),
            (_, None) => say(seen, 206, &[], &blob),
            (_, Some(range)) => say(seen, 206, &[("Content-Range", range)], &blob),
        })
        .await;
        let node = Node::passing_through(&registry).await;
        let got = node
            .get(&format!("/v2/a/b/blobs/{}", image.blob_digest()))
            .await;
        assert_eq!(got.status, if works { 200 } else { 502 }, "{range:?}");
        assert!(
            !works
                || got.complete && got.body == image.blob && got.header("content-range").is_empty()
        );
    }
}

#[tokio::test]
async fn the_length_of_a_compressed_answer_to_a_head_does_not_reach_clients() {
    let image = Image::new(10);
    let replies = image.clone();
    let registry = TestRegistry::start(move |seen| {
        let digest = replies.manifest_digest().to_string();
        let headers = [
            ("Content-Type", MANIFEST),
            ("Docker-Content-Digest", digest.as_str()),
        ];
        match is_head(seen) {
            true => {
                let encoded = [("Content-Encoding", "gzip"), ("Content-Length", "7")];
                say(seen, 200, &[&headers[..], &encoded[..]].concat(), b"")
            }
            false => say(seen, 200, &headers, replies.manifest.as_bytes()),
        }
    })
    .await;
    let node = Node::before(&registry).await;
    let got = node.ask("HEAD", TAG, &[]).await;
    assert_eq!(
        (got.status, got.header("content-length")),
        (200, image.manifest.len().to_string().as_str())
    );
}

#[tokio::test]
async fn a_part_or_a_truncated_manifest_is_not_taken_for_the_whole() {
    let whole = format!("{{\"mediaType\":\"{INDEX}\",\"manifests\":[]}}");
    let head = |more: &str| {
        format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: {INDEX}\r\n{more}\r\n")
    };
    let part = &whole[..whole.len() - 1];
    for (answer, status) in [
        (head("") + &whole, 200),
        (head("") + part, 502),
        (
            head(&format!("Content-Length: {}\r\n", whole.len())) + part,
            502,
        ),
        (
            head("Content-Range: bytes 0-9/99\r\n").replace("200 OK", "206 X") + &whole,
            502,
        ),
        (head("").replace("200 OK", "206 X") + &whole, 502),
        (head("") + "<html>", 502),
        (head("") + "[]", 502),
        (head(""), 502),
    ] {
        let copy = answer.clone();
        let registry = TestRegistry::start(move |seen| match is_head(seen) {
            true => say(seen, 405, &[], b""),
            false => Reply::Cut(copy.clone().into_bytes()),
        })
        .await;
        let node = Node::before(&registry).await;
        assert_eq!(node.get(TAG).await.status, status, "{answer}");
    }
}

#[tokio::test]
async fn a_heads_missing_or_wrong_type_and_length_do_not_reach_clients() {
    let image = Image::new(10);
    let lines = |types: &'static [&'static str], length: Option<&'static str>| {
        let image = image.clone();
        TestRegistry::start(move |seen| {
            let digest = image.manifest_digest().to_string();
            let mut headers = vec![("Docker-Content-Digest", &*digest)];
            if is_head(seen) {
                headers.extend(types.iter().map(|told| ("Content-Type", *told)));
                headers.extend(length.map(|length| ("Content-Length", length)));
            } else {
                headers.push(("Content-Type", MANIFEST));
            }
            say(seen, 200, &headers, image.manifest.as_bytes())
        })
    };
    for types in [
        &[][..],
        &[""],
        &["text/plain; charset=utf-8"],
        &["application/json"],
        &["application/octet-stream"],
        &["TEXT/HTML"],
        &["nonsense"],
        &[
            "text/plain",
            "Application/vnd.oci.image.manifest.v1+JSON; charset=utf-8",
        ],
    ] {
        for length in [None, Some("0")] {
            let registry = lines(types, length).await;
            for order in [["HEAD", "GET"], ["GET", "HEAD"]] {
                for target in [TAG.to_owned(), by_digest(&image.manifest_digest())] {
                    let node = Node::before(&registry).await;
                    for method in order {
                        let got = node.ask(method, &target, &[]).await;
                        let told = (
                            got.status,
                            got.header("content-type"),
                            got.header("content-length"),
                        );
                        let size = image.manifest.len().to_string();
                        assert_eq!(
                            told,
                            (200, MANIFEST, size.as_str()),
                            "{types:?} {length:?} {method} {target}"
                        );
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn a_digest_of_another_algorithm_or_none_is_no_contradiction() {
    let image = Image::new(1000);
    let (blob, manifest) = (image.blob.clone(), image.manifest.clone().into_bytes());
    let digests = |data: &[u8]| {
        [Algorithm::Sha256, Algorithm::Sha512]
            .map(|algorithm| Digest::of(algorithm, data).to_string())
    };
    for lines in [&[0][..], &[1], &[0, 1], &[1, 0], &[2], &[2, 0], &[3], &[]] {
        let (data, document) = (blob.clone(), manifest.clone());
        let registry = TestRegistry::start(move |seen| {
            let body = if seen.target.contains("/blobs/") {
                &data
            } else {
                &document
            };
            let digests = digests(body);
            let all = [
                &*digests[0],
                &*digests[1],
                "",
                "md5:d41d8cd98f00b204e9800998ecf8427e",
            ];
            let mut headers = vec![("Content-Type", MANIFEST)];
            headers.extend(
                lines
                    .iter()
                    .map(|line| ("Docker-Content-Digest", all[*line])),
            );
            say(seen, 200, &headers, body)
        })
        .await;
        for asked in [0, 1] {
            let node = Node::before(&registry).await;
            let (of_blob, of_manifest) = (&digests(&blob)[asked], &digests(&manifest)[asked]);
            let got = node
                .ask("HEAD", &format!("/v2/a/b/blobs/{of_blob}"), &[])
                .await;
            assert_eq!(
                (got.status, got.header("docker-content-digest")),
                (200, &**of_blob),
                "{lines:?}"
            );
            for _ in 0..2 {
                let got = node.get(&format!("/v2/a/b/manifests/{of_manifest}")).await;
                assert_eq!(
                    (got.status, got.header("docker-content-digest")),
                    (200, &**of_manifest),
                    "{lines:?}"
                );
                assert_eq!(got.header("content-type"), MANIFEST);
            }
            assert_eq!(node.get(TAG).await.body, manifest, "{lines:?}");
        }
    }
}

#[tokio::test]
async fn a_manifest_deleted_at_its_registry_is_served_no_longer_than_its_bound() {
    for ends in ["HEAD by digest", "GET by tag", "time"] {
        let image = Image::new(10);
        let (replies, gone) = (image.clone(), Arc::new(AtomicBool::new(false)));
        let is_gone = Arc::clone(&gone);
        let registry = TestRegistry::start(move |seen| match is_gone.load(Ordering::Relaxed) {
            true => say(seen, 404, &[], b"{\"errors\":[]}"),
            false => replies.reply(seen),
        })
        .await;
        let node = Node::before(&registry).await;
        let (digest, target) = (image.manifest_digest(), by_digest(&image.manifest_digest()));
        assert_eq!(node.get(TAG).await.status, 200);
        gone.store(true, Ordering::Relaxed);
        let before = registry.seen().len();
        for _ in 0..3 {
            assert_eq!(node.get(&target).await.status, 200, "within the bound");
        }
        assert_eq!(registry.seen().len(), before);
        match ends {
            "HEAD by digest" => assert_eq!(node.ask("HEAD", &target, &[]).await.status, 404),
            "GET by tag" => assert_eq!(node.get(TAG).await.status, 404),
            _ => {
                let past = auth::MANIFEST_BELONGS + Duration::from_secs(1);
                let long_ago = Instant::now().checked_sub(past).unwrap();
                node.mirror
                    .inner
                    .access
                    .belongs(&registry.source("a/b"), &digest, None, long_ago);
            }
        }
        assert_eq!(node.get(&target).await.status, 404, "after {ends}");
    }
}

#[tokio::test]
async fn a_registry_that_is_down_does_not_end_what_is_remembered_of_a_manifest() {
    let (image, registry, node) = image_node(10).await;
    let target = by_digest(&image.manifest_digest());
    assert_eq!(node.get(&target).await.status, 200);
    drop(registry);
    tokio::time::sleep(Duration::from_millis(50)).await;
    for method in ["HEAD", "GET"] {
        assert_eq!(node.ask(method, &target, &[]).await.status, 200, "{method}");
    }
}

#[tokio::test]
async fn pages_of_lists_lead_on_by_what_the_registry_calls_them() {
    let registry = TestRegistry::start(|seen| {
        let (path, query) = seen.target.split_once('?').unwrap_or((&seen.target, ""));
        let next = match query {
            "" => "one%3D%2F",
            "next_page=one%3D%2F&n=1" => "two",
            "next_page=two&n=1" => return say(seen, 200, &[], b"{\"tags\":[\"c\"]}"),
            _ => return say(seen, 400, &[], b"{\"errors\":[]}"),
        };
        let link =
            format!("<http://inside.example/proxy{path}?next_page={next}&n=1>; rel=\"next\"");
        say(seen, 200, &[("Link", &link)], b"{\"tags\":[\"x\"]}")
    })
    .await;
    let node = Node::before(&registry).await;
    let name = registry.name();
    let subject = sha256(b"subject");
    for list in ["tags/list".to_owned(), format!("referrers/{subject}")] {
        for first in [
            format!("/v2/{name}/a/{list}"),
            format!("/v2/a/{list}?ns={name}"),
            format!("/{name}/v2/a/{list}"),
        ] {
            for method in ["GET", "HEAD"] {
                let (mut target, mut pages) = (first.clone(), 0);
                loop {
                    let got = node.ask(method, &target, &[]).await;
                    assert_eq!(got.status, 200, "{target}");
                    pages += 1;
                    match got.header("link").split(['<', '>']).nth(1) {
                        Some(next) if pages < 9 => target = next.to_owned(),
                        _ => break,
                    }
                }
                assert_eq!(pages, 3, "{method} {first}");
            }
        }
    }
}

#[tokio::test]
async fn lists_are_content_or_a_refusal() {
    for (status, conditional, expected) in [
        (200, false, 200),
        (203, false, 200),
        (204, false, 502),
        (206, false, 502),
        (302, false, 502),
        (304, false, 502),
        (304, true, 304),
        (404, false, 404),
        (405, false, 405),
        (501, false, 501),
    ] {
        let registry = TestRegistry::start(move |seen| {
            say(
                seen,
                status,
                &[],
                if matches!(status, 204 | 304) {
                    b""
                } else {
                    b"{}"
                },
            )
        })
        .await;
        let node = Node::before(&registry).await;
        let headers = [("If-None-Match", "\"x\"")];
        for target in [
            "/v2/a/tags/list".to_owned(),
            format!("/v2/a/referrers/{}", sha256(b"x")),
        ] {
            for method in ["GET", "HEAD"] {
                let got = node
                    .ask(method, &target, if conditional { &headers } else { &[] })
                    .await;
                assert_eq!(got.status, expected, "{status} {method} {target}");
            }
        }
    }
}

#[tokio::test]
async fn a_part_of_a_blob_is_served_although_a_head_tells_no_size() {
    let image = Image::new(1000);
    let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
    let blob = image.blob.clone();
    let registry = TestRegistry::start(move |seen| match seen.header("range") {
        _ if is_head(seen) => say(seen, 200, &[("Content-Length", "0")], b""),
        Some("bytes=0-0") => say(
            seen,
            206,
            &[("Content-Range", "bytes 0-0/1000")],
            &blob[..1],
        ),
        Some("bytes=5-9") => say(
            seen,
            206,
            &[("Content-Range", "bytes 5-9/1000")],
            &blob[5..10],
        ),
        _ => say(seen, 200, &[], &blob),
    })
    .await;
    // A download for a part of a blob waits until somebody tells the size.
    let node = Node::with_downloads(&registry, |state, size_bytes| {
        state.failed = size_bytes
            .filter(|size| *size == 1000)
            .map(|_| FlightError::UnknownLength);
    })
    .await;
    let got = node.ask("GET", &target, &[("Range", "bytes=5-9")]).await;
    assert_eq!((got.status, &*got.body), (206, &image.blob[5..10]));
}

#[tokio::test]
async fn a_blob_comes_although_a_head_tells_a_wrong_size() {
    let image = Image::new(1000);
    let blob = image.blob.clone();
    let registry = TestRegistry::start(move |seen| match seen.header("range") {
        _ if is_head(seen) => say(seen, 200, &[("Content-Length", "777")], b""),
        Some("bytes=5-9") => say(
            seen,
            206,
            &[("Content-Range", "bytes 5-9/1000")],
            &blob[5..10],
        ),
        _ => say(seen, 200, &[], &blob),
    })
    .await;
    let digest = image.blob_digest();
    let node = Node::with_downloads(&registry, move |state, size_bytes| {
        state.layout = size_bytes.map(PieceLayout::new);
        state.failed = Some(FlightError::WrongSize(digest));
    })
    .await;
    let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
    let got = node.get(&target).await;
    assert_eq!((got.status, &*got.body), (200, &*image.blob));
    let part = node.ask("GET", &target, &[("Range", "bytes=5-9")]).await;
    assert_eq!((part.status, &*part.body), (206, &image.blob[5..10]));
}

#[tokio::test]
async fn a_head_by_tag_tells_the_type_of_the_manifest_that_is_here() {
    let image = Image::new(10);
    let replies = image.clone();
    let registry = TestRegistry::start(move |seen| {
        let digest = replies.manifest_digest().to_string();
        let headers = [("Docker-Content-Digest", &*digest), ("Content-Type", LIST)];
        say(seen, 200, &headers, replies.manifest.as_bytes())
    })
    .await;
    let node = Node::before(&registry).await;
    node.mirror
        .inner
        .store
        .put_manifest(&image.manifest_digest(), &image.manifest.clone().into())
        .unwrap();
    for _ in 0..2 {
        let got = node.ask("HEAD", TAG, &[]).await;
        assert_eq!((got.status, got.header("content-type")), (200, MANIFEST));
    }
    assert_eq!(registry.count("GET", "/v2/"), 0);
}

#[tokio::test]
async fn a_head_by_tag_that_names_no_usable_digest_is_answered_by_a_get() {
    let image = Image::new(10);
    let length = image.manifest.len().to_string();
    let quoted = format!("\"{}\"", image.manifest_digest());
    for digest in [None, Some(quoted)] {
        for get in [200, 404, 500] {
            let (replies, length, digest) = (image.clone(), length.clone(), digest.clone());
            let registry = TestRegistry::start(move |seen| {
                let mut headers = vec![("Content-Type", MANIFEST), ("Content-Length", &*length)];
                headers.extend(
                    digest
                        .as_deref()
                        .map(|digest| ("Docker-Content-Digest", digest)),
                );
                match is_head(seen) {
                    true => say(seen, 200, &headers, b""),
                    false if get == 200 => say(
                        seen,
                        200,
                        &[("Content-Type", MANIFEST)],
                        replies.manifest.as_bytes(),
                    ),
                    false => say(seen, get, &[], b"{}"),
                }
            })
            .await;
            let node = Node::before(&registry).await;
            let got = node.ask("HEAD", TAG, &[]).await;
            if get == 200 {
                assert_eq!(got.status, 200);
                assert_eq!(
                    got.header("docker-content-digest"),
                    image.manifest_digest().to_string()
                );
                assert_eq!(
                    got.header("content-length"),
                    image.manifest.len().to_string()
                );
            } else {
                // A client that heard 200 would not ask another mirror after the GET failed.
                assert_eq!(got.status, get);
            }
        }
    }
}

#[tokio::test]
async fn a_size_from_a_head_refuses_no_range() {
    let image = Image::new(1000);
    let blob = image.blob.clone();
    let registry = TestRegistry::start(move |seen| match seen.header("range") {
        _ if is_head(seen) => say(seen, 200, &[("Content-Length", "20")], b""),
        Some("bytes=500-509") => say(
            seen,
            206,
            &[("Content-Range", "bytes 500-509/1000")],
            &blob[500..510],
        ),
        Some(_) => say(seen, 416, &[("Content-Range", "bytes */1000")], b""),
        None => say(seen, 200, &[], &blob),
    })
    .await;
    let node = Node::before(&registry).await;
    let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
    let part = node
        .ask("GET", &target, &[("Range", "bytes=500-509")])
        .await;
    assert_eq!((part.status, &*part.body), (206, &image.blob[500..510]));
    let beyond = node
        .ask("GET", &target, &[("Range", "bytes=5000-5009")])
        .await;
    assert_eq!(beyond.status, 416);
}

#[tokio::test]
async fn an_error_in_place_of_a_manifest_is_none() {
    let document = b"{\"errors\":[{\"code\":\"DENIED\",\"message\":\"quota\"}]}";
    let registry = TestRegistry::start(move |seen| {
        say(seen, 200, &[("Content-Type", "application/json")], document)
    })
    .await;
    let node = Node::before(&registry).await;
    assert_eq!(node.get(TAG).await.status, 502);
}

#[tokio::test]
async fn after_an_endpoint_that_answers_with_a_page_the_next_one_is_asked() {
    let image = Image::new(1000);
    let replies = image.clone();
    let page = TestRegistry::start(|seen| {
        let body: &[u8] = if is_head(seen) {
            b""
        } else {
            b"<form>sign in</form>"
        };
        say(seen, 200, &[("Content-Type", "text/html")], body)
    })
    .await;
    let registry = TestRegistry::start(move |seen| replies.reply(seen)).await;
    let node = Node::before(&registry).await;
    let mut settings = (**node.live.load()).clone();
    let endpoints = [&page, &registry]
        .map(|one| format!("http://{}", one.name()).parse().unwrap())
        .to_vec();
    settings.registries.known.insert(
        registry.name(),
        RegistrySettings {
            endpoints,
            ..Default::default()
        },
    );
    node.live.store(Arc::new(settings));
    let got = node.get(TAG).await;
    assert_eq!((got.status, &*got.body), (200, image.manifest.as_bytes()));
    assert!(!page.seen().is_empty(), "the first one was asked");
}

#[tokio::test]
async fn a_retry_after_that_nobody_understands_is_not_passed_on() {
    for (told, passed) in [
        ("7", "7"),
        ("soon", ""),
        ("-5", ""),
        ("2.5", ""),
        ("3, 3", ""),
    ] {
        let registry =
            TestRegistry::start(move |seen| say(seen, 503, &[("Retry-After", told)], b"{}")).await;
        let node = Node::before(&registry).await;
        let got = node.get(TAG).await;
        assert_eq!(
            (got.status, got.header("retry-after")),
            (503, passed),
            "{told}"
        );
    }
}
