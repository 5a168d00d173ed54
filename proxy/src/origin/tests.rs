use hawker_core::place::Network;
use http::header::RETRY_AFTER;
use hyper_util::client::proxy::matcher::Matcher;

use super::body::FRAME_BYTES;
use super::request::MAX_REDIRECTS;
use super::testing::{Reply, Seen, TestRegistry, knowing, noise, origin, say, sha256};
use super::*;
use crate::settings::{Rates, RegistrySettings};

fn blob(registry: &TestRegistry, data: &[u8]) -> Target {
    Target {
        source: registry.source("a/b"),
        content: Content::Blob(sha256(data)),
    }
}

async fn whole(body: &mut OriginBody) -> Result<Vec<u8>, OriginError> {
    let mut all = Vec::new();
    while let Some(data) = body.next().await.transpose()? {
        assert!(data.len() <= FRAME_BYTES);
        all.extend_from_slice(&data);
    }
    Ok(all)
}

fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in list {
        map.append(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        );
    }
    map
}

#[tokio::test]
async fn requests_say_who_we_are_and_pass_on_only_what_is_needed() {
    let data = noise(300_000, 1);
    let copy = data.clone();
    let registry = TestRegistry::start(move |seen| say(seen, 200, &[], &copy)).await;
    let origin = origin(&knowing(&[&registry]));
    let sent = headers(&[
        ("accept", "a/b"),
        ("accept", "c/d;q=0.5"),
        ("range", "bytes=0-"),
        ("via", "1.1 fred"),
        ("cookie", "secret"),
        ("x-other", "y"),
        ("accept-encoding", "gzip"),
    ]);
    for _ in 0..3 {
        let mut response = origin.get(&blob(&registry, &data), &sent).await.unwrap();
        assert_eq!(whole(response.body_mut()).await.unwrap(), data);
    }
    let seen = registry.seen();
    assert_eq!(
        seen.iter().map(|s| s.connection).max(),
        Some(0),
        "the connection is used again"
    );
    assert_eq!(seen[0].target, format!("/v2/a/b/blobs/{}", sha256(&data)));
    assert_eq!(seen[0].header("accept"), Some("a/b, c/d;q=0.5"));
    assert_eq!(seen[0].header("range"), Some("bytes=0-"));
    assert_eq!(seen[0].header("accept-encoding"), Some("identity"));
    assert_eq!(
        seen[0].header("user-agent"),
        Some(concat!("hawker/", env!("CARGO_PKG_VERSION")))
    );
    let vias: Vec<&str> = seen[0]
        .headers
        .iter()
        .filter(|(n, _)| n == "via")
        .map(|(_, v)| v.as_str())
        .collect();
    assert_eq!(vias, ["1.1 fred", &format!("1.1 {}", origin.pseudonym())]);
    assert!(seen[0].header("cookie").is_none() && seen[0].header("x-other").is_none());
}

#[tokio::test]
async fn redirects_are_followed_and_credentials_stay_at_home() {
    let data = noise(1000, 2);
    let copy = data.clone();
    let store = TestRegistry::start(move |seen| say(seen, 200, &[], &copy)).await;
    let there = format!("http://localhost:{}/signed?token=x", store.address.port());
    let registry = TestRegistry::start(move |seen| match seen.target.as_str() {
        "/second" => say(seen, 302, &[("Location", &there)], b""),
        _ => say(seen, 307, &[("Location", "/second")], b""),
    })
    .await;
    let live = knowing(&[&registry]);
    let mut settings = (**live.load()).clone();
    settings
        .registries
        .allow_networks
        .extend(Network::new("127.0.0.0".parse().unwrap(), 8));
    live.store(Arc::new(settings));
    let origin = origin(&live);
    let sent = headers(&[("authorization", "Bearer secret"), ("range", "bytes=0-")]);
    let mut response = origin.get(&blob(&registry, &data), &sent).await.unwrap();
    assert_eq!(whole(response.body_mut()).await.unwrap(), data);
    assert!(
        registry
            .seen()
            .iter()
            .all(|seen| seen.header("authorization") == Some("Bearer secret"))
    );
    assert_eq!(store.seen()[0].header("authorization"), None);
    assert_eq!(store.seen()[0].header("range"), Some("bytes=0-"));
    assert_eq!(
        origin
            .head(&blob(&registry, &data), &sent)
            .await
            .unwrap()
            .status(),
        200
    );
    assert_eq!(store.seen()[1].method, "HEAD");
}

#[tokio::test]
async fn a_redirect_to_another_port_of_the_same_host_keeps_the_credentials() {
    let data = noise(1000, 2);
    let copy = data.clone();
    let back = TestRegistry::start(move |seen| match seen.header("authorization") {
        Some("Bearer tok") => say(seen, 200, &[], &copy),
        _ => say(seen, 401, &[], b""),
    })
    .await;
    let there = back.address;
    let front = TestRegistry::start(move |seen| {
        say(
            seen,
            308,
            &[("Location", &format!("http://{there}{}", seen.target))],
            b"",
        )
    })
    .await;
    let origin = origin(&knowing(&[&front, &back]));
    let sent = headers(&[("authorization", "Bearer tok")]);
    let mut response = origin.get(&blob(&front, &data), &sent).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(whole(response.body_mut()).await.unwrap(), data);
}

#[tokio::test]
async fn redirects_without_end_and_to_other_schemes_are_refused() {
    for location in [
        "/again",
        "ftp://x.example/",
        "file:///etc/passwd",
        "http://[bad",
    ] {
        let registry =
            TestRegistry::start(move |seen| say(seen, 302, &[("Location", location)], b"")).await;
        let answer = origin(&knowing(&[&registry]))
            .get(&blob(&registry, b""), &HeaderMap::new())
            .await;
        assert!(
            matches!(answer.err(), Some(OriginError::Broken { .. })),
            "{location}"
        );
        assert!(registry.seen().len() <= MAX_REDIRECTS + 1);
    }
}

#[tokio::test]
async fn a_client_can_not_lead_us_into_the_private_network() {
    let inside = TestRegistry::start(|seen| say(seen, 200, &[], b"secret")).await;
    let origin = origin(&Arc::default());
    for registry in [
        inside.name(),
        format!("localhost:{}", inside.address.port()),
        "169.254.169.254".into(),
    ] {
        let source = Source {
            registry,
            repository: "a".into(),
        };
        let target = Target {
            source,
            content: Content::Ping,
        };
        let refused = origin.get(&target, &HeaderMap::new()).await.err();
        assert!(
            matches!(refused, Some(OriginError::Forbidden(_))),
            "{refused:?}"
        );
    }
    assert!(inside.seen().is_empty());
}

#[tokio::test]
async fn a_known_registry_may_not_redirect_into_the_private_network() {
    let inside = TestRegistry::start(|seen| say(seen, 200, &[], b"secret")).await;
    let there = format!("http://{}/", inside.address);
    let registry =
        TestRegistry::start(move |seen| say(seen, 302, &[("Location", &there)], b"")).await;
    let live = knowing(&[&registry]);
    let refused = origin(&live)
        .get(&blob(&registry, b""), &HeaderMap::new())
        .await
        .err();
    assert!(
        matches!(refused, Some(OriginError::Forbidden(_))),
        "{refused:?}"
    );
    assert!(inside.seen().is_empty());
    let mut settings = (**live.load()).clone();
    settings
        .registries
        .allow_networks
        .extend(Network::new("127.0.0.0".parse().unwrap(), 8));
    live.store(Arc::new(settings));
    assert!(
        origin(&live)
            .get(&blob(&registry, b""), &HeaderMap::new())
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn short_long_and_reset_bodies_are_broken() {
    type Bad = fn(&Seen) -> Reply;
    let cases: [(&str, Bad); 4] = [
        ("short", |_| {
            Reply::Cut(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345".to_vec())
        }),
        ("reset", |_| {
            Reply::Reset(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345".to_vec())
        }),
        ("chunked", |_| {
            Reply::Cut(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345".to_vec())
        }),
        ("garbage", |_| Reply::Cut(b"nonsense\r\n\r\n".to_vec())),
    ];
    for (name, bad) in cases {
        let registry = TestRegistry::start(bad).await;
        let failed = match origin(&knowing(&[&registry]))
            .get(&blob(&registry, b""), &HeaderMap::new())
            .await
        {
            Ok(mut response) => whole(response.body_mut()).await.err(),
            Err(error) => Some(error),
        };
        assert!(
            matches!(failed, Some(OriginError::Broken { .. })),
            "{name}: {failed:?}"
        );
    }
}

#[tokio::test]
async fn odd_heads_are_read_as_gos_client_reads_them() {
    let lines = |count: usize, length: usize| -> String {
        (0..count)
            .map(|i| format!("Set-Cookie: a{i}={}\r\n", "x".repeat(length)))
            .collect()
    };
    let cases = [
        ("no reason", "HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok".to_owned()),
        ("150 lines", format!("HTTP/1.1 200 OK\r\n{}Content-Length: 2\r\n\r\nok", lines(150, 1))),
        ("2,000 lines", format!("HTTP/1.1 200 OK\r\n{}Content-Length: 2\r\n\r\nok", lines(2000, 1))),
        ("200 KiB", format!("HTTP/1.1 200 OK\r\n{}Content-Length: 2\r\n\r\nok", lines(200, 1000))),
        ("folded", "HTTP/1.1 200 OK\r\nX-Policy: a;\r\n  b\r\n\tc\r\nContent-Length: 2\r\n\r\nok".into()),
        ("blank before the colon", "HTTP/1.1 200 OK\r\nX-A : b\r\nContent-Length : 2\r\n\r\nok".into()),
        ("length twice", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok".into()),
        ("bare LF", "HTTP/1.1 200 OK\nContent-Length: 2\n\nok".into()),
        ("HTTP/1.0", "HTTP/1.0 200 OK\r\n\r\nok".into()),
        (
            "early hints",
            "HTTP/1.1 103 Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".into(),
        ),
        ("latin-1", "HTTP/1.1 200 OK\r\nServer: Registr\u{e9}\r\nContent-Length: 2\r\n\r\nok".into()),
    ];
    for (name, answer) in cases {
        let bytes: Vec<u8> = answer.chars().map(|c| c as u8).collect();
        let registry = TestRegistry::start(move |_| Reply::Cut(bytes.clone())).await;
        let origin = origin(&knowing(&[&registry]));
        let mut response = origin
            .get(&blob(&registry, b"ok"), &HeaderMap::new())
            .await
            .expect(name);
        assert_eq!(
            whole(response.body_mut()).await.expect(name),
            b"ok",
            "{name}"
        );
    }
}

#[tokio::test]
async fn heads_over_the_bound_are_refused() {
    let long = "x".repeat(2 * MAX_HEAD_BYTES);
    let registry = TestRegistry::start(move |seen| say(seen, 200, &[("X-Long", &long)], b"")).await;
    let failed = origin(&knowing(&[&registry]))
        .get(&blob(&registry, b""), &HeaderMap::new())
        .await
        .err();
    assert!(
        matches!(failed, Some(OriginError::Broken { .. })),
        "{failed:?}"
    );
}

#[tokio::test]
async fn endpoints_are_tried_in_order() {
    let missing = TestRegistry::start(|seen| say(seen, 404, &[], b"")).await;
    let good = TestRegistry::start(|seen| say(seen, 200, &[], b"here")).await;
    let gone = {
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        closed.local_addr().unwrap()
    };
    let live = knowing(&[]);
    let mut settings = (**live.load()).clone();
    let url = |address: SocketAddr| Url::parse(&format!("http://{address}/mirror/")).unwrap();
    let listed = |endpoints: Vec<Url>| RegistrySettings {
        endpoints,
        ..RegistrySettings::default()
    };
    let known = &mut settings.registries.known;
    known.insert(
        "r.example".into(),
        listed(vec![url(gone), url(missing.address), url(good.address)]),
    );
    known.insert(
        "down.example".into(),
        listed(vec![url(missing.address), url(gone)]),
    );
    known.insert("gone.example".into(), listed(vec![url(gone)]));
    live.store(Arc::new(settings));
    let origin = origin(&live);
    let target = |registry: &str| Target {
        source: Source {
            registry: registry.into(),
            repository: "a".into(),
        },
        content: Content::Manifest("v1".into()),
    };
    let found = origin
        .get(&target("r.example"), &HeaderMap::new())
        .await
        .unwrap();
    assert_eq!(found.status(), 200);
    assert_eq!(good.seen()[0].target, "/mirror/v2/a/manifests/v1");
    assert_eq!(
        origin
            .get(&target("down.example"), &HeaderMap::new())
            .await
            .unwrap()
            .status(),
        404
    );
    let failed = origin
        .get(&target("gone.example"), &HeaderMap::new())
        .await
        .err();
    assert!(
        matches!(failed, Some(OriginError::Unreachable { .. })),
        "{failed:?}"
    );
    // Credentials are for the registry itself, which is the last one.
    let before = missing.seen().len();
    let sent = headers(&[("authorization", "Basic c2VjcmV0")]);
    assert_eq!(
        origin
            .get(&target("r.example"), &sent)
            .await
            .unwrap()
            .status(),
        200
    );
    assert_eq!(missing.seen().len(), before);
}

#[tokio::test]
async fn a_mirror_that_says_nothing_holds_up_the_next_one_only_so_long() {
    let silent = TestRegistry::start(|_| Reply::Silence).await;
    let good = TestRegistry::start(|seen| say(seen, 200, &[], b"here")).await;
    let live = knowing(&[]);
    let mut settings = (**live.load()).clone();
    let endpoints = [&silent, &good]
        .map(|r| Url::parse(&format!("http://{}", r.address)).unwrap())
        .to_vec();
    let listed = RegistrySettings {
        endpoints,
        ..RegistrySettings::default()
    };
    settings.registries.known.insert("r.example".into(), listed);
    live.store(Arc::new(settings));
    let source = Source {
        registry: "r.example".into(),
        repository: "a".into(),
    };
    let target = Target {
        source,
        content: Content::Manifest("v1".into()),
    };
    let start = Instant::now();
    assert_eq!(
        origin(&live)
            .get(&target, &HeaderMap::new())
            .await
            .unwrap()
            .status(),
        200
    );
    assert!(
        start.elapsed() < HEAD_OF_MIRROR + Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn an_endpoint_that_can_not_be_reached_is_asked_last_for_a_while() {
    let dead = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let silent = TestRegistry::start(|_| Reply::Silence).await;
    let good = TestRegistry::start(|seen| match seen.target.contains("gone") {
        true => say(seen, 404, &[], b""),
        false => say(seen, 200, &[], b"here"),
    })
    .await;
    let live = knowing(&[]);
    let mut settings = (**live.load()).clone();
    let url = |address: SocketAddr| Url::parse(&format!("http://{address}")).unwrap();
    let endpoints = vec![url(dead), url(silent.address), url(good.address)];
    let listed = RegistrySettings {
        endpoints,
        ..RegistrySettings::default()
    };
    settings.registries.known.insert("r.example".into(), listed);
    live.store(Arc::new(settings));
    let origin = origin(&live);
    let target = |tag: &str| Target {
        source: Source {
            registry: "r.example".into(),
            repository: "a".into(),
        },
        content: Content::Manifest(tag.into()),
    };
    assert_eq!(
        origin
            .get(&target("v1"), &HeaderMap::new())
            .await
            .unwrap()
            .status(),
        200
    );
    let start = Instant::now();
    for (tag, status) in [("v1", 200), ("gone", 404)] {
        assert_eq!(
            origin
                .get(&target(tag), &HeaderMap::new())
                .await
                .unwrap()
                .status(),
            status
        );
    }
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(silent.seen().len(), 1);
}

#[test]
fn an_endpoints_path_stands_before_v2_or_says_what_stands_behind_it() {
    for (endpoint, path, expected) in [
        (
            "https://r.example",
            "/v2/a/b/tags/list",
            "https://r.example/v2/a/b/tags/list",
        ),
        (
            "https://r.example/sub/",
            "/v2/a/b/tags/list",
            "https://r.example/sub/v2/a/b/tags/list",
        ),
        (
            "https://r.example/v2",
            "/v2/a/tags/list",
            "https://r.example/v2/a/tags/list",
        ),
        (
            "https://r.example/v2/hub",
            "/v2/a/tags/list",
            "https://r.example/v2/hub/a/tags/list",
        ),
        (
            "https://r.example/v2/hub/",
            "/v2/a/tags/list",
            "https://r.example/v2/hub/a/tags/list",
        ),
        (
            "https://r.example/v2/hub/two",
            "/v2/a/tags/list",
            "https://r.example/v2/hub/two/a/tags/list",
        ),
        (
            "https://r.example/api/v2/hub",
            "/v2/a/tags/list",
            "https://r.example/api/v2/hub/a/tags/list",
        ),
        ("https://r.example/v2/hub", "/v2/", "https://r.example/v2/"),
        ("https://r.example/sub", "/v2/", "https://r.example/sub/v2/"),
    ] {
        let url = join(&endpoint.parse().unwrap(), path, None);
        assert_eq!(url.as_str(), expected, "{endpoint}");
    }
    for (endpoint, name) in [
        ("https://r.example/v2/hub", "hub/a"),
        ("https://r.example/sub", "a"),
    ] {
        assert_eq!(remote_name(&endpoint.parse().unwrap(), "a"), name);
    }
}

#[tokio::test]
async fn a_registry_that_says_429_is_left_alone_by_whom_it_said_it_to() {
    let registry =
        TestRegistry::start(|seen| say(seen, 429, &[("Retry-After", "30")], b"{}")).await;
    let origin = origin(&knowing(&[&registry]));
    let callers = [
        HeaderMap::new(),
        headers(&[("authorization", "Bearer x")]),
        headers(&[("authorization", "Bearer y")]),
    ];
    for (asked, caller) in callers.iter().enumerate() {
        for _ in 0..6 {
            let answer = origin.head(&blob(&registry, b""), caller).await.unwrap();
            assert_eq!(answer.status(), 429);
            assert!(
                answer.headers()[RETRY_AFTER]
                    .to_str()
                    .unwrap()
                    .parse::<u64>()
                    .unwrap()
                    >= 29
            );
            assert_eq!(registry.seen().len(), asked + 1);
        }
    }
}

#[tokio::test]
async fn a_connection_that_died_in_the_pool_is_replaced() {
    let registry = TestRegistry::start(|_| {
        Reply::Cut(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".to_vec())
    })
    .await;
    let origin = origin(&knowing(&[&registry]));
    for _ in 0..5 {
        let mut response = origin
            .get(&blob(&registry, b""), &HeaderMap::new())
            .await
            .unwrap();
        assert_eq!(whole(response.body_mut()).await.unwrap(), b"ok");
    }
}

#[tokio::test]
async fn an_origin_over_ipv6_is_reached() {
    let registry = TestRegistry::start_at("[::1]:0", |seen| say(seen, 200, &[], b"six")).await;
    let mut response = origin(&knowing(&[&registry]))
        .get(&blob(&registry, b""), &HeaderMap::new())
        .await
        .unwrap();
    assert_eq!(whole(response.body_mut()).await.unwrap(), b"six");
}

#[tokio::test]
async fn bodies_are_charged_to_the_origins_rate() {
    let data = noise(200_000, 3);
    let copy = data.clone();
    let registry = TestRegistry::start(move |seen| say(seen, 200, &[], &copy)).await;
    let live = knowing(&[&registry]);
    let mut settings = (**live.load()).clone();
    settings.rates = Rates {
        origin: Some(400_000),
        ..Rates::default()
    };
    live.store(Arc::new(settings));
    let start = Instant::now();
    let mut response = origin(&live)
        .get(&blob(&registry, &data), &HeaderMap::new())
        .await
        .unwrap();
    assert_eq!(whole(response.body_mut()).await.unwrap(), data);
    assert!(
        start.elapsed() > Duration::from_millis(250),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn the_environments_proxy_is_used_but_never_our_own_mirror() {
    let registry = TestRegistry::start(|seen| say(seen, 200, &[], b"direct")).await;
    let proxy = TestRegistry::start(|seen| say(seen, 200, &[], b"proxied")).await;
    let live = knowing(&[&registry]);
    for (own, expected) in [
        (vec![], b"proxied".as_slice()),
        (vec![proxy.address], b"direct"),
    ] {
        let matcher = Matcher::builder()
            .http(format!("http://name:word@{}", proxy.address))
            .build();
        let limits = Limits::new(Arc::clone(&live));
        let origin = Origin::through(
            Arc::clone(&live),
            limits,
            Proxies::new(matcher, own),
            Arc::default(),
        );
        let mut response = origin
            .get(&blob(&registry, b""), &HeaderMap::new())
            .await
            .unwrap();
        assert_eq!(whole(response.body_mut()).await.unwrap(), expected);
    }
    let seen = proxy.seen();
    assert_eq!(seen.len(), 1);
    assert!(
        seen[0]
            .target
            .starts_with(&format!("http://{}/v2/", registry.address)),
        "{}",
        seen[0].target
    );
    assert!(
        seen[0]
            .header("proxy-authorization")
            .is_some_and(|a| a.starts_with("Basic "))
    );
    assert_eq!(registry.seen()[0].header("proxy-authorization"), None);
}

/// TLS with a certificate of our own authority, for `localhost`.
async fn tls_registry() -> (SocketAddr, tempfile::NamedTempFile) {
    use std::io::Write as _;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .unwrap()
    .with_no_client_auth()
    .with_single_cert(vec![cert.der().clone()], key)
    .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let Ok(mut tls) = acceptor.accept(socket).await else {
                continue;
            };
            let _ = tls.read(&mut [0; 4096]).await;
            let _ = tls
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\ntls")
                .await;
            let _ = tls.shutdown().await;
        }
    });
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(cert.pem().as_bytes()).unwrap();
    (address, file)
}

#[tokio::test]
async fn tls_is_believed_by_the_systems_authorities_the_registrys_own_or_when_told_so() {
    let (address, ca) = tls_registry().await;
    let name = format!("localhost:{}", address.port());
    let missing = std::path::PathBuf::from("/nonexistent/ca.pem");
    for (ca, insecure, works) in [
        (None, false, false),
        (Some(ca.path().to_owned()), false, true),
        (None, true, true),
        (Some(missing), false, false),
    ] {
        let live = knowing(&[]);
        let mut settings = (**live.load()).clone();
        let own = RegistrySettings {
            ca,
            insecure,
            ..RegistrySettings::default()
        };
        settings.registries.known.insert(name.clone(), own);
        live.store(Arc::new(settings));
        let source = Source {
            registry: name.clone(),
            repository: "a".into(),
        };
        let target = Target {
            source,
            content: Content::Manifest("v1".into()),
        };
        let answer = origin(&live).get(&target, &HeaderMap::new()).await;
        assert_eq!(answer.is_ok(), works, "{:?}", answer.err());
    }
}

/// A registry that takes nobody without a certificate of `ca`. It counts the connections that showed one.
async fn mtls_registry(
    dir: &std::path::Path,
    shown: Arc<std::sync::atomic::AtomicUsize>,
) -> SocketAddr {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa,
        KeyPair,
    };
    use rustls::server::WebPkiClientVerifier;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let leaf = |purpose| {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &authority).unwrap(), key)
    };
    let (server, server_key) = leaf(ExtendedKeyUsagePurpose::ServerAuth);
    for name in ["one", "two"] {
        let (client, key) = leaf(ExtendedKeyUsagePurpose::ClientAuth);
        std::fs::write(dir.join(format!("{name}.pem")), client.pem()).unwrap();
        std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
    std::fs::write(dir.join("ca.pem"), authority.pem()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.der().clone()).unwrap();
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let key = rustls_pki_types::PrivateKeyDer::try_from(server_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![server.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let Ok(mut tls) = acceptor.accept(socket).await else {
                continue;
            };
            shown.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let _ = tls.read(&mut [0; 4096]).await;
            let _ = tls
                .write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\ntls")
                .await;
            let _ = tls.shutdown().await;
        }
    });
    address
}

#[tokio::test]
async fn a_registry_that_wants_a_certificate_gets_the_one_that_its_files_hold_now() {
    use crate::settings::ClientIdentity;
    let folder = tempfile::tempdir().unwrap();
    let shown = Arc::default();
    let address = mtls_registry(folder.path(), Arc::clone(&shown)).await;
    let name = format!("localhost:{}", address.port());
    let file = |name: &str| folder.path().join(name);
    let identity = ClientIdentity {
        certificate: file("used.pem"),
        key: file("used.key"),
    };
    let settings = |identity| {
        let live = knowing(&[]);
        let mut settings = (**live.load()).clone();
        let own = RegistrySettings {
            ca: Some(file("ca.pem")),
            identity,
            ..RegistrySettings::default()
        };
        settings.registries.known.insert(name.clone(), own);
        live.store(Arc::new(settings));
        live
    };
    let source = Source {
        registry: name.clone(),
        repository: "a".into(),
    };
    let target = Target {
        source,
        content: Content::Manifest("v1".into()),
    };
    assert!(
        origin(&settings(None))
            .get(&target, &HeaderMap::new())
            .await
            .is_err()
    );

    let origin = origin(&settings(Some(identity.clone())));
    let missing = origin
        .get(&target, &HeaderMap::new())
        .await
        .err()
        .unwrap()
        .to_string();
    assert!(missing.contains("used.pem"), "{missing}");
    let put = |from: &str, to: &str| assert!(std::fs::copy(file(from), file(to)).unwrap() > 0);
    put("one.pem", "used.pem");
    put("two.key", "used.key");
    let mismatched = check_identity(&identity).unwrap_err();
    assert!(
        mismatched.contains("used.key") && !mismatched.contains("PRIVATE"),
        "{mismatched}"
    );
    put("ca.pem", "used.key");
    assert!(
        check_identity(&identity)
            .unwrap_err()
            .contains("unencrypted PEM")
    );
    put("one.key", "used.key");
    assert_eq!(check_identity(&identity), Ok(()));
    tokio::time::sleep(LOOK_AT_FILES).await;
    assert!(origin.get(&target, &HeaderMap::new()).await.is_ok());

    // In the middle of a rotation the pair before is still used, and the new one as soon as it is there.
    put("two.pem", "used.pem");
    tokio::time::sleep(LOOK_AT_FILES).await;
    assert!(origin.get(&target, &HeaderMap::new()).await.is_ok());
    put("two.key", "used.key");
    tokio::time::sleep(LOOK_AT_FILES).await;
    assert!(origin.get(&target, &HeaderMap::new()).await.is_ok());
    assert_eq!(shown.load(std::sync::atomic::Ordering::Relaxed), 3);
}

/// A SOCKS5 proxy that wants name and password, and connects to `to` whatever it is asked for. The names that it was asked for.
async fn socks_proxy(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<Vec<u8>>>>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, asked) = (
        listener.local_addr().unwrap(),
        Arc::new(Mutex::new(Vec::new())),
    );
    let log = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut buffer = [0; 512];
            let _ = client.read(&mut buffer).await;
            let _ = client.write_all(&[5, 2]).await;
            let n = client.read(&mut buffer).await.unwrap_or_default();
            let good = &buffer[..n] == b"\x01\x04na:e\x02wd";
            let _ = client.write_all(&[1, u8::from(!good)]).await;
            let n = client.read(&mut buffer).await.unwrap_or_default();
            log.lock().unwrap().push(buffer[..n].to_vec());
            let _ = client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await;
            let mut there = tokio::net::TcpStream::connect(to).await.unwrap();
            tokio::spawn(
                async move { tokio::io::copy_bidirectional(&mut client, &mut there).await },
            );
        }
    });
    (address, asked)
}

#[tokio::test]
async fn a_socks_proxy_gets_the_name_and_the_rules_about_addresses_still_hold() {
    let registry = TestRegistry::start(|seen| say(seen, 200, &[], b"proxied")).await;
    let (proxy, asked) = socks_proxy(registry.address).await;
    for scheme in ["socks5", "socks5h"] {
        let through = |live: &Arc<ArcSwap<LiveSettings>>| {
            let matcher = Matcher::builder()
                .all(format!("{scheme}://na%3Ae:wd@{proxy}"))
                .build();
            let limits = Limits::new(Arc::clone(live));
            Origin::through(
                Arc::clone(live),
                limits,
                Proxies::new(matcher, Vec::new()),
                Arc::default(),
            )
        };
        let live = knowing(&[]);
        let mut settings = (**live.load()).clone();
        let endpoints = vec!["http://reg.invalid:5000".parse().unwrap()];
        let own = RegistrySettings {
            endpoints,
            ..RegistrySettings::default()
        };
        settings.registries.known.insert("reg.invalid".into(), own);
        live.store(Arc::new(settings));
        let target = |registry: &str| Target {
            source: Source {
                registry: registry.into(),
                repository: "a".into(),
            },
            content: Content::Manifest("v1".into()),
        };
        let mut response = through(&live)
            .get(&target("reg.invalid"), &HeaderMap::new())
            .await
            .unwrap();
        assert_eq!(whole(response.body_mut()).await.unwrap(), b"proxied");
        assert_eq!(
            asked.lock().unwrap().pop().unwrap(),
            b"\x05\x01\x00\x03\x0breg.invalid\x13\x88"
        );
        let refused = through(&live)
            .get(&target("127.0.0.1:5000"), &HeaderMap::new())
            .await
            .err();
        assert!(
            matches!(refused, Some(OriginError::Forbidden(_))),
            "{refused:?}"
        );
        assert!(asked.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_blob_that_its_registry_does_not_have_comes_from_its_urls_but_from_no_private_network() {
    let data = noise(100_000, 3);
    let copy = data.clone();
    let elsewhere = TestRegistry::start(move |seen| match seen.target.as_str() {
        "/layer" => say(
            seen,
            206,
            &[("Content-Range", "bytes 5-99999/100000")],
            &copy[5..],
        ),
        _ => say(seen, 404, &[], b"not here"),
    })
    .await;
    let registry = TestRegistry::start(|seen| say(seen, 404, &[], b"unknown")).await;
    let live = knowing(&[&registry, &elsewhere]);
    let origin = origin(&live);
    let (target, manifest) = (blob(&registry, &data), sha256(b"manifest"));
    let urls =
        ["/gone", "/layer"].map(|path| format!("http://me:secret@{}{path}", elsewhere.address));
    let part = Part {
        digest: sha256(&data),
        size_bytes: None,
        urls: urls.to_vec(),
        vouched: false,
    };
    origin.note_urls(&target.source, &manifest, &part);
    let sent = headers(&[("authorization", "Bearer secret"), ("range", "bytes=5-")]);
    let refused = origin.get(&target, &sent).await.unwrap();
    assert_eq!(
        refused.status(),
        404,
        "no manifest leads into the private network, not even to a known registry"
    );
    assert!(elsewhere.seen().is_empty());

    let mut settings = (**live.load()).clone();
    settings
        .registries
        .allow_networks
        .extend(Network::new("127.0.0.0".parse().unwrap(), 8));
    live.store(Arc::new(settings.clone()));
    let mut found = origin.get(&target, &sent).await.unwrap();
    assert_eq!(
        (
            found.status().as_u16(),
            whole(found.body_mut()).await.unwrap()
        ),
        (206, data[5..].to_vec())
    );
    let seen = elsewhere.seen();
    assert_eq!(
        seen.iter().map(|s| s.target.as_str()).collect::<Vec<_>>(),
        ["/gone", "/layer"]
    );
    assert!(
        seen.iter()
            .all(|s| s.header("authorization").is_none() && s.header("range") == Some("bytes=5-"))
    );
    assert_eq!(
        origin.head(&target, &sent).await.unwrap().status(),
        404,
        "what the registry says is for it to say"
    );
    let other = Target {
        source: registry.source("c/d"),
        ..target.clone()
    };
    assert_eq!(
        origin.get(&other, &sent).await.unwrap().status(),
        404,
        "another repository does not name it"
    );

    settings.registries.allow.push("quay.io".into());
    live.store(Arc::new(settings));
    assert_eq!(
        origin.get(&target, &sent).await.unwrap().status(),
        404,
        "nor past the allow-list"
    );
    assert_eq!(elsewhere.seen().len(), 2);
}
