use hawker_core::place::Network;
use http::header::RETRY_AFTER;
use hyper_util::client::proxy::matcher::Matcher;

use super::body::FRAME_BYTES;
use super::request::MAX_REDIRECTS;
use super::testing::{Reply, Seen, TestRegistry, knowing, noise, origin, say, sha256};
use super::*;
use crate::settings::{Rates, RegistrySettings};

fn blob(registry: &TestRegistry, data: &[u8]) -> Target {
    Target { source: registry.source("a/b"), content: Content::Blob(sha256(data)) }
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
        map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
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
    assert_eq!(seen.iter().map(|s| s.connection).max(), Some(0), "the connection is used again");
    assert_eq!(seen[0].target, format!("/v2/a/b/blobs/{}", sha256(&data)));
    assert_eq!(seen[0].header("accept"), Some("a/b, c/d;q=0.5"));
    assert_eq!(seen[0].header("range"), Some("bytes=0-"));
    assert_eq!(seen[0].header("accept-encoding"), Some("identity"));
    assert_eq!(seen[0].header("user-agent"), Some(concat!("hawker/", env!("CARGO_PKG_VERSION"))));
    let vias: Vec<&str> =
        seen[0].headers.iter().filter(|(n, _)| n == "via").map(|(_, v)| v.as_str()).collect();
    assert_eq!(vias, ["1.1 fred", &format!("1.1 {}", origin.pseudonym())]);
    assert!(seen[0].header("cookie").is_none() && seen[0].header("x-other").is_none());
}

#[tokio::test]
async fn redirects_are_followed_and_credentials_stay_at_home() {
    let data = noise(1000, 2);
    let copy = data.clone();
    let store = TestRegistry::start(move |seen| say(seen, 200, &[], &copy)).await;
    let there = format!("http://{}/signed?token=x", store.address);
    let registry = TestRegistry::start(move |seen| match seen.target.as_str() {
        "/second" => say(seen, 302, &[("Location", &there)], b""),
        _ => say(seen, 307, &[("Location", "/second")], b""),
    })
    .await;
    let origin = origin(&knowing(&[&registry, &store]));
    let sent = headers(&[("authorization", "Bearer secret"), ("range", "bytes=0-")]);
    let mut response = origin.get(&blob(&registry, &data), &sent).await.unwrap();
    assert_eq!(whole(response.body_mut()).await.unwrap(), data);
    assert!(registry.seen().iter().all(|seen| seen.header("authorization") == Some("Bearer secret")));
    assert_eq!(store.seen()[0].header("authorization"), None);
    assert_eq!(store.seen()[0].header("range"), Some("bytes=0-"));
    assert_eq!(origin.head(&blob(&registry, &data), &sent).await.unwrap().status(), 200);
    assert_eq!(store.seen()[1].method, "HEAD");
}

#[tokio::test]
async fn redirects_without_end_and_to_other_schemes_are_refused() {
    for location in ["/again", "ftp://x.example/", "file:///etc/passwd", "http://[bad"] {
        let registry = TestRegistry::start(move |seen| say(seen, 302, &[("Location", location)], b"")).await;
        let answer = origin(&knowing(&[&registry])).get(&blob(&registry, b""), &HeaderMap::new()).await;
        assert!(matches!(answer.err(), Some(OriginError::Broken { .. })), "{location}");
        assert!(registry.seen().len() <= MAX_REDIRECTS + 1);
    }
}

#[tokio::test]
async fn a_client_can_not_lead_us_into_the_private_network() {
    let inside = TestRegistry::start(|seen| say(seen, 200, &[], b"secret")).await;
    let origin = origin(&Arc::default());
    for registry in [inside.name(), format!("localhost:{}", inside.address.port()), "169.254.169.254".into()]
    {
        let source = Source { registry, repository: "a".into() };
        let target = Target { source, content: Content::Ping };
        let refused = origin.get(&target, &HeaderMap::new()).await.err();
        assert!(matches!(refused, Some(OriginError::Forbidden(_))), "{refused:?}");
    }
    assert!(inside.seen().is_empty());
}

#[tokio::test]
async fn a_known_registry_may_not_redirect_into_the_private_network() {
    let inside = TestRegistry::start(|seen| say(seen, 200, &[], b"secret")).await;
    let there = format!("http://{}/", inside.address);
    let registry = TestRegistry::start(move |seen| say(seen, 302, &[("Location", &there)], b"")).await;
    let live = knowing(&[&registry]);
    let refused = origin(&live).get(&blob(&registry, b""), &HeaderMap::new()).await.err();
    assert!(matches!(refused, Some(OriginError::Forbidden(_))), "{refused:?}");
    assert!(inside.seen().is_empty());
    let mut settings = (**live.load()).clone();
    settings.registries.allow_networks.extend(Network::new("127.0.0.0".parse().unwrap(), 8));
    live.store(Arc::new(settings));
    assert!(origin(&live).get(&blob(&registry, b""), &HeaderMap::new()).await.is_ok());
}

#[tokio::test]
async fn short_long_and_reset_bodies_are_broken() {
    type Bad = fn(&Seen) -> Reply;
    let cases: [(&str, Bad); 4] = [
        ("short", |_| Reply::Cut(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345".to_vec())),
        ("reset", |_| Reply::Reset(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345".to_vec())),
        ("chunked", |_| {
            Reply::Cut(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345".to_vec())
        }),
        ("garbage", |_| Reply::Cut(b"nonsense\r\n\r\n".to_vec())),
    ];
    for (name, bad) in cases {
        let registry = TestRegistry::start(bad).await;
        let failed = match origin(&knowing(&[&registry])).get(&blob(&registry, b""), &HeaderMap::new()).await
        {
            Ok(mut response) => whole(response.body_mut()).await.err(),
            Err(error) => Some(error),
        };
        assert!(matches!(failed, Some(OriginError::Broken { .. })), "{name}: {failed:?}");
    }
}

#[tokio::test]
async fn heads_over_the_bound_are_refused() {
    let long = "x".repeat(4 * BUFFER_BYTES);
    let registry = TestRegistry::start(move |seen| say(seen, 200, &[("X-Long", &long)], b"")).await;
    let failed = origin(&knowing(&[&registry])).get(&blob(&registry, b""), &HeaderMap::new()).await.err();
    assert!(matches!(failed, Some(OriginError::Broken { .. })), "{failed:?}");
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
    let listed = |endpoints: Vec<Url>| RegistrySettings { endpoints, ..RegistrySettings::default() };
    let known = &mut settings.registries.known;
    known.insert("r.example".into(), listed(vec![url(gone), url(missing.address), url(good.address)]));
    known.insert("down.example".into(), listed(vec![url(missing.address), url(gone)]));
    known.insert("gone.example".into(), listed(vec![url(gone)]));
    live.store(Arc::new(settings));
    let origin = origin(&live);
    let target = |registry: &str| Target {
        source: Source { registry: registry.into(), repository: "a".into() },
        content: Content::Manifest("v1".into()),
    };
    let found = origin.get(&target("r.example"), &HeaderMap::new()).await.unwrap();
    assert_eq!(found.status(), 200);
    assert_eq!(good.seen()[0].target, "/mirror/v2/a/manifests/v1");
    assert_eq!(origin.get(&target("down.example"), &HeaderMap::new()).await.unwrap().status(), 404);
    let failed = origin.get(&target("gone.example"), &HeaderMap::new()).await.err();
    assert!(matches!(failed, Some(OriginError::Unreachable { .. })), "{failed:?}");
    // Credentials are for the registry itself, which is the last one.
    let before = missing.seen().len();
    let sent = headers(&[("authorization", "Basic c2VjcmV0")]);
    assert_eq!(origin.get(&target("r.example"), &sent).await.unwrap().status(), 200);
    assert_eq!(missing.seen().len(), before);
}

#[tokio::test]
async fn a_mirror_that_says_nothing_holds_up_the_next_one_only_so_long() {
    let silent = TestRegistry::start(|_| Reply::Silence).await;
    let good = TestRegistry::start(|seen| say(seen, 200, &[], b"here")).await;
    let live = knowing(&[]);
    let mut settings = (**live.load()).clone();
    let endpoints = [&silent, &good].map(|r| Url::parse(&format!("http://{}", r.address)).unwrap()).to_vec();
    let listed = RegistrySettings { endpoints, ..RegistrySettings::default() };
    settings.registries.known.insert("r.example".into(), listed);
    live.store(Arc::new(settings));
    let source = Source { registry: "r.example".into(), repository: "a".into() };
    let target = Target { source, content: Content::Manifest("v1".into()) };
    let start = Instant::now();
    assert_eq!(origin(&live).get(&target, &HeaderMap::new()).await.unwrap().status(), 200);
    assert!(start.elapsed() < HEAD_OF_MIRROR + Duration::from_secs(3), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_registry_that_says_429_is_left_alone_by_whom_it_said_it_to() {
    let registry = TestRegistry::start(|seen| say(seen, 429, &[("Retry-After", "30")], b"{}")).await;
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
            assert!(answer.headers()[RETRY_AFTER].to_str().unwrap().parse::<u64>().unwrap() >= 29);
            assert_eq!(registry.seen().len(), asked + 1);
        }
    }
}

#[tokio::test]
async fn a_connection_that_died_in_the_pool_is_replaced() {
    let registry =
        TestRegistry::start(|_| Reply::Cut(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".to_vec())).await;
    let origin = origin(&knowing(&[&registry]));
    for _ in 0..5 {
        let mut response = origin.get(&blob(&registry, b""), &HeaderMap::new()).await.unwrap();
        assert_eq!(whole(response.body_mut()).await.unwrap(), b"ok");
    }
}

#[tokio::test]
async fn an_origin_over_ipv6_is_reached() {
    let registry = TestRegistry::start_at("[::1]:0", |seen| say(seen, 200, &[], b"six")).await;
    let mut response =
        origin(&knowing(&[&registry])).get(&blob(&registry, b""), &HeaderMap::new()).await.unwrap();
    assert_eq!(whole(response.body_mut()).await.unwrap(), b"six");
}

#[tokio::test]
async fn bodies_are_charged_to_the_origins_rate() {
    let data = noise(200_000, 3);
    let copy = data.clone();
    let registry = TestRegistry::start(move |seen| say(seen, 200, &[], &copy)).await;
    let live = knowing(&[&registry]);
    let mut settings = (**live.load()).clone();
    settings.rates = Rates { origin: Some(400_000), ..Rates::default() };
    live.store(Arc::new(settings));
    let start = Instant::now();
    let mut response = origin(&live).get(&blob(&registry, &data), &HeaderMap::new()).await.unwrap();
    assert_eq!(whole(response.body_mut()).await.unwrap(), data);
    assert!(start.elapsed() > Duration::from_millis(250), "{:?}", start.elapsed());
}

#[tokio::test]
async fn the_environments_proxy_is_used_but_never_our_own_mirror() {
    let registry = TestRegistry::start(|seen| say(seen, 200, &[], b"direct")).await;
    let proxy = TestRegistry::start(|seen| say(seen, 200, &[], b"proxied")).await;
    let live = knowing(&[&registry]);
    for (own, expected) in [(vec![], b"proxied".as_slice()), (vec![proxy.address], b"direct")] {
        let matcher = Matcher::builder().http(format!("http://name:word@{}", proxy.address)).build();
        let limits = Limits::new(Arc::clone(&live));
        let origin = Origin::through(Arc::clone(&live), limits, Proxies::new(matcher, own), Arc::default());
        let mut response = origin.get(&blob(&registry, b""), &HeaderMap::new()).await.unwrap();
        assert_eq!(whole(response.body_mut()).await.unwrap(), expected);
    }
    let seen = proxy.seen();
    assert_eq!(seen.len(), 1);
    assert!(seen[0].target.starts_with(&format!("http://{}/v2/", registry.address)), "{}", seen[0].target);
    assert!(seen[0].header("proxy-authorization").is_some_and(|a| a.starts_with("Basic ")));
    assert_eq!(registry.seen()[0].header("proxy-authorization"), None);
}

/// TLS with a certificate of our own authority, for `localhost`.
async fn tls_registry() -> (SocketAddr, tempfile::NamedTempFile) {
    use std::io::Write as _;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
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
            let Ok(mut tls) = acceptor.accept(socket).await else { continue };
            let _ = tls.read(&mut [0; 4096]).await;
            let _ = tls.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\ntls").await;
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
        let own = RegistrySettings { ca, insecure, ..RegistrySettings::default() };
        settings.registries.known.insert(name.clone(), own);
        live.store(Arc::new(settings));
        let source = Source { registry: name.clone(), repository: "a".into() };
        let target = Target { source, content: Content::Manifest("v1".into()) };
        let answer = origin(&live).get(&target, &HeaderMap::new()).await;
        assert_eq!(answer.is_ok(), works, "{:?}", answer.err());
    }
}

#[tokio::test]
async fn a_blob_that_its_registry_does_not_have_comes_from_its_urls_but_from_no_private_network() {
    let data = noise(100_000, 3);
    let copy = data.clone();
    let elsewhere = TestRegistry::start(move |seen| match seen.target.as_str() {
        "/layer" => say(seen, 206, &[("Content-Range", "bytes 5-99999/100000")], &copy[5..]),
        _ => say(seen, 404, &[], b"not here"),
    })
    .await;
    let registry = TestRegistry::start(|seen| say(seen, 404, &[], b"unknown")).await;
    let live = knowing(&[&registry, &elsewhere]);
    let origin = origin(&live);
    let (target, manifest) = (blob(&registry, &data), sha256(b"manifest"));
    let urls = ["/gone", "/layer"].map(|path| format!("http://me:secret@{}{path}", elsewhere.address));
    let part = Part { digest: sha256(&data), size_bytes: None, urls: urls.to_vec(), vouched: false };
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
    settings.registries.allow_networks.extend(Network::new("127.0.0.0".parse().unwrap(), 8));
    live.store(Arc::new(settings.clone()));
    let mut found = origin.get(&target, &sent).await.unwrap();
    assert_eq!((found.status().as_u16(), whole(found.body_mut()).await.unwrap()), (206, data[5..].to_vec()));
    let seen = elsewhere.seen();
    assert_eq!(seen.iter().map(|s| s.target.as_str()).collect::<Vec<_>>(), ["/gone", "/layer"]);
    assert!(
        seen.iter().all(|s| s.header("authorization").is_none() && s.header("range") == Some("bytes=5-"))
    );
    assert_eq!(
        origin.head(&target, &sent).await.unwrap().status(),
        404,
        "what the registry says is for it to say"
    );
    let other = Target { source: registry.source("c/d"), ..target.clone() };
    assert_eq!(origin.get(&other, &sent).await.unwrap().status(), 404, "another repository does not name it");

    settings.registries.allow.push("quay.io".into());
    live.store(Arc::new(settings));
    assert_eq!(origin.get(&target, &sent).await.unwrap().status(), 404, "nor past the allow-list");
    assert_eq!(elsewhere.seen().len(), 2);
}
