use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;

use bytes::Bytes;
use hawker_core::intercept::{Rule, Rules, path_pattern};
use hawker_core::place::Network;
use hawker_oci::digest::Digest;
use http::{HeaderMap, Response};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::applications::Desk;
use crate::flight::Flights;
use crate::origin::testing::{
    Reply as Said, Seen, TestRegistry, knowing, noise, origin, say, sha256,
};
use crate::registry::MirrorConfig;
use crate::settings::{CacheSettings, RegistrySettings};
use crate::store::Store;

/// The challenge of the registry at `host`. It gives no tokens.
fn challenge(host: &str) -> String {
    format!("Bearer realm=\"http://{host}/token\",service=\"r\"")
}

/// A forward proxy, and the mirror behind it.
struct Proxy {
    address: SocketAddr,
    store: Store,
    mirror: Mirror,
    origin: Origin,
    live: Arc<ArcSwap<LiveSettings>>,
    folder: tempfile::TempDir,
    stop: CancellationToken,
    served: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
        self.served.abort();
    }
}

impl Proxy {
    /// One that knows this registry, shares what it has, and lets `change` have the last word.
    async fn start(registry: &TestRegistry, change: impl FnOnce(&mut LiveSettings)) -> Self {
        let live = knowing(&[registry]);
        let mut settings = (**live.load()).clone();
        settings.intercept = Rules::default().with_registries([registry.name()]);
        change(&mut settings);
        live.store(Arc::new(settings));
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheSettings {
            high_percent: 100,
            ..CacheSettings::default()
        };
        let store = Store::open(&folder.path().join("store"), cache).unwrap();
        let origin = origin(&live);
        let mirror = Mirror::new(MirrorConfig {
            store: store.clone(),
            flights: Flights::new(tokio::sync::mpsc::channel(1).0, origin.clone()),
            origin: origin.clone(),
            proofs: crate::proof::Proofs::new(Arc::new(store.clone()), origin.clone()),
            seeds: None,
            live: Arc::clone(&live),
            metrics: Arc::default(),
            desk: Desk::new(Arc::clone(&live), Arc::default()),
            pull_grace: Duration::from_secs(30),
        });
        let dir = authority_dir(folder.path());
        let proxy = ForwardProxy::open(
            &dir,
            "node",
            mirror.clone(),
            origin.clone(),
            Arc::clone(&live),
        )
        .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        let served = tokio::spawn(async move {
            proxy
                .serve(listener, stopping, Duration::from_secs(1))
                .await
        });
        Self {
            address,
            store,
            mirror,
            origin,
            live,
            folder,
            stop,
            served,
        }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// The answer to CONNECT, and the connection after it.
    async fn tunnel(&self, to: impl std::fmt::Display, early: &[u8]) -> (u16, TcpStream) {
        let mut socket = self.connect().await;
        let head = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n");
        socket
            .write_all(&[head.as_bytes(), early].concat())
            .await
            .unwrap();
        (status_of(&mut socket).await, socket)
    }

    /// A client inside of an opened connection.
    async fn opened(&self, to: &str) -> Client {
        let (status, socket) = self.tunnel(to, b"").await;
        assert_eq!(status, 200);
        let host = to.rsplit_once(':').unwrap().0.to_owned();
        let name = ServerName::try_from(host).unwrap();
        let tls = tokio_rustls::TlsConnector::from(self.trusting())
            .connect(name, socket)
            .await
            .unwrap();
        Client::over(tls, to).await
    }

    /// TLS that believes the proxy's authority; without ALPN.
    fn trusting(&self) -> Arc<ClientConfig> {
        let file = authority_dir(self.folder.path()).join(CERTIFICATE_FILE);
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(file).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider);
        let config = config.with_safe_default_protocol_versions().unwrap();
        Arc::new(config.with_root_certificates(roots).with_no_client_auth())
    }

    /// Puts a blob into the store.
    fn commit(&self, data: &[u8]) -> Digest {
        self.store.put(data)
    }
}

/// The status of the answer that comes next, of which nothing but the head does.
async fn status_of(socket: &mut (impl AsyncRead + Unpin)) -> u16 {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(
            timeout(Duration::from_secs(20), socket.read_u8())
                .await
                .expect("it hangs")
                .unwrap(),
        );
    }
    String::from_utf8(head)
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

/// An HTTP client on a connection.
struct Client {
    requests: SendRequest<Full<Bytes>>,
    host: String,
}

#[derive(Debug)]
struct Got {
    status: u16,
    headers: HeaderMap,
    body: Bytes,
}

impl Got {
    fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }
}

impl Client {
    async fn over(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        host: &str,
    ) -> Self {
        let (requests, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        Self {
            requests,
            host: host.to_owned(),
        }
    }

    async fn ask(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Got {
        let mut request = Request::builder().method(method).uri(target);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", &self.host);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .body(Full::new(Bytes::copy_from_slice(body)))
            .unwrap();
        let answer = timeout(Duration::from_secs(20), self.requests.send_request(request)).await;
        let (head, body) = answer.expect("it hangs").unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Got {
            status: head.status.as_u16(),
            headers: head.headers,
            body,
        }
    }

    async fn get(&mut self, target: &str) -> Got {
        self.ask("GET", target, &[], b"").await
    }
}

/// A registry with one repository that anybody may read, and one that wants a token.
fn reply(seen: &Seen, blob: &[u8]) -> Said {
    let manifest = br#"{"schemaVersion":2}"#;
    let digest = sha256(blob).to_string();
    match seen.target.as_str() {
        "/v2/" => say(
            seen,
            200,
            &[("Docker-Distribution-Api-Version", "registry/2.0")],
            b"{}",
        ),
        "/v2/a/b/manifests/v1" => say(
            seen,
            200,
            &[("Content-Type", "x/y"), ("X-Own", "1")],
            manifest,
        ),
        "/v2/a/b/tags/list" => say(
            seen,
            200,
            &[("Link", "</v2/a/b/tags/list?n=1>; rel=\"next\"")],
            b"{}",
        ),
        "/v2/private/manifests/v1" => {
            let challenge = challenge(seen.header("host").unwrap_or_default());
            say(seen, 401, &[("WWW-Authenticate", &challenge)], b"{}")
        }
        "/token?x=%2F..%2f" => say(
            seen,
            200,
            &[
                ("Set-Cookie", "own"),
                ("Connection", "X-Hop"),
                ("X-Hop", "1"),
            ],
            b"t",
        ),
        path if path == format!("/v2/a/b/blobs/{digest}") => say(seen, 200, &[], blob),
        _ => say(seen, 404, &[], b"{}"),
    }
}

async fn registry(blob: &[u8]) -> TestRegistry {
    let blob = blob.to_vec();
    TestRegistry::start(move |seen| reply(seen, &blob)).await
}

#[tokio::test]
async fn inside_of_an_opened_connection_the_registry_seems_to_answer() {
    let registry = registry(b"x").await;
    let proxy = Proxy::start(&registry, |_| {}).await;
    let mut client = proxy.opened(&registry.name()).await;
    let ping = client.get("/v2/").await;
    assert_eq!((ping.status, ping.body.as_ref()), (200, b"{}".as_slice()));
    let manifest = client.get("/v2/a/b/manifests/v1").await;
    assert_eq!(
        (manifest.status, manifest.header("content-type")),
        (200, "x/y")
    );
    assert_eq!(
        manifest.header("oci-namespace"),
        "",
        "a mirror's word, not the registry's"
    );
    let private = client.get("/v2/private/manifests/v1").await;
    assert_eq!(
        (private.status, private.header("www-authenticate")),
        (401, challenge(&registry.name()).as_str())
    );
    let tags = client.get("/v2/a/b/tags/list").await;
    assert_eq!(
        tags.header("link"),
        "</v2/a/b/tags/list?n=1>; rel=\"next\"",
        "it leads where the registry says"
    );
    let token = client.get("/token?x=%2F..%2f").await;
    assert_eq!(
        (
            token.status,
            token.header("set-cookie"),
            token.header("x-hop")
        ),
        (200, "own", "")
    );
    // A parameter that means something to the mirror means nothing here.
    assert_eq!(
        client
            .get("/v2/a/b/manifests/v1?ns=elsewhere.example")
            .await
            .status,
        200
    );
    assert_eq!(
        client
            .get("/elsewhere.example/v2/a/b/manifests/v1")
            .await
            .status,
        404
    );
    assert!(
        registry
            .seen()
            .iter()
            .all(|seen| seen.header("host") == Some(&registry.name()))
    );
}

#[tokio::test]
async fn what_is_cached_is_served_through_tls_in_any_range() {
    let blob = noise(3_000_000, 1);
    let registry = registry(&blob).await;
    let proxy = Proxy::start(&registry, |_| {}).await;
    let target = format!("/v2/a/b/blobs/{}", proxy.commit(&blob));
    let mut client = proxy.opened(&registry.name()).await;
    let head = client.ask("HEAD", &target, &[], b"").await;
    assert_eq!(
        (head.status, head.header("content-length")),
        (200, "3000000")
    );
    for (range, wanted) in [
        ("", 0..3_000_000),
        ("bytes=0-0", 0..1),
        ("bytes=1048570-2097160", 1_048_570..2_097_161),
        ("bytes=-70000", 2_930_000..3_000_000),
    ] {
        let headers = if range.is_empty() {
            vec![]
        } else {
            vec![("range", range)]
        };
        let got = client.ask("GET", &target, &headers, b"").await;
        assert_eq!(got.status, if range.is_empty() { 200 } else { 206 });
        assert!(got.body == blob[wanted], "{range}");
    }
    assert_eq!(registry.count("GET", "/v2/a/b/blobs/"), 0);
    assert!(proxy.mirror.metrics().served_cache.get() > 4_000_000);
}

#[tokio::test]
async fn whole_addresses_are_answered_without_tls() {
    let blob = noise(100_000, 2);
    let registry = registry(&blob).await;
    let proxy = Proxy::start(&registry, |_| {}).await;
    let base = format!("http://{}", registry.name());
    let target = format!("{base}/v2/a/b/blobs/{}", proxy.commit(&blob));
    let mut client = Client::over(proxy.connect().await, &registry.name()).await;
    let got = client
        .ask("GET", &target, &[("range", "bytes=5-9")], b"")
        .await;
    assert_eq!((got.status, got.body.as_ref()), (206, &blob[5..10]));
    assert_eq!(registry.count("GET", "/v2/a/b/blobs/"), 0);
    let token = client.get(&format!("{base}/token?x=%2F..%2f")).await;
    assert_eq!((token.status, token.header("x-hop")), (200, ""));
    let passed = registry.seen().pop().unwrap();
    assert_eq!(passed.target, "/token?x=%2F..%2f", "as it came");
    assert!(
        passed
            .header("via")
            .is_some_and(|via| via.starts_with("1.1 hawker-"))
    );
}

/// A host that takes what is sent to it and tells what it got.
async fn echo() -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = hyper::service::service_fn(|request: Request<Incoming>| async move {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let mut told = Response::new(Full::new(body));
        told.headers_mut()
            .insert("x-method", head.method.as_str().parse().unwrap());
        for name in [
            "content-length",
            "transfer-encoding",
            "x-kept",
            "x-hop",
            "proxy-authorization",
            "expect",
        ] {
            if let Some(value) = head.headers.get(name) {
                told.headers_mut().insert(
                    http::HeaderName::try_from(format!("x-got-{name}")).unwrap(),
                    value.clone(),
                );
            }
        }
        Ok::<_, hyper::Error>(told)
    });
    let serving = tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(socket), service);
            tokio::spawn(connection);
        }
    });
    (address, serving)
}

/// Lets a host be reached that is no registry.
fn reaching(settings: &mut LiveSettings, host: SocketAddr) {
    let mut rules = vec![Rule {
        host: host.to_string(),
        path: None,
        action: Action::Direct,
    }];
    let known = settings.registries.known.keys().cloned();
    rules.extend(known.map(|host| Rule {
        host,
        path: path_pattern("^/v2/").ok(),
        action: Action::P2p,
    }));
    settings.intercept = Rules::new(rules);
    settings
        .registries
        .allow_networks
        .extend(Network::new("127.0.0.0".parse().unwrap(), 8));
}

#[tokio::test]
async fn bodies_pass_in_both_directions_whatever_the_method() {
    let registry = registry(b"x").await;
    let (host, echo) = echo().await;
    let proxy = Proxy::start(&registry, |settings| {
        // Known, so that its connections are opened: a push through the proxy.
        let own = RegistrySettings {
            endpoints: vec![format!("http://{host}").parse().unwrap()],
            ..RegistrySettings::default()
        };
        settings.registries.known = BTreeMap::from([(host.to_string(), own)]);
        settings.intercept = Rules::default().with_registries([host.to_string()]);
    })
    .await;
    let body = noise(1_000_000, 3);
    let plain = Client::over(proxy.connect().await, &host.to_string()).await;
    let opened = proxy.opened(&host.to_string()).await;
    for (mut client, base) in [(plain, format!("http://{host}")), (opened, String::new())] {
        for method in ["POST", "PATCH", "PUT", "DELETE"] {
            let headers = [
                ("x-kept", "1"),
                ("connection", "x-hop"),
                ("x-hop", "1"),
                ("proxy-authorization", "Basic eA=="),
            ];
            let got = client
                .ask(
                    method,
                    &format!("{base}/v2/a/b/blobs/uploads/1?x"),
                    &headers,
                    &body,
                )
                .await;
            assert_eq!((got.status, got.header("x-method")), (200, method));
            assert!(got.body == body, "{method}");
            assert_eq!(
                (
                    got.header("x-got-x-kept"),
                    got.header("x-got-content-length")
                ),
                ("1", "1000000")
            );
            for gone in [
                "x-got-x-hop",
                "x-got-proxy-authorization",
                "x-got-transfer-encoding",
            ] {
                assert_eq!(got.header(gone), "", "{gone}");
            }
        }
        let empty = client
            .ask("POST", &format!("{base}/v2/a/b/blobs/uploads/"), &[], b"")
            .await;
        assert_eq!((empty.status, empty.body.len()), (200, 0));
    }
    // Of unknown length, and with a client that wants to be told to go on.
    let mut socket = proxy.connect().await;
    let head = format!(
        "PATCH http://{host}/v2/a/blobs/uploads/1 HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\
         Expect: 100-continue\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(status_of(&mut socket).await, 100);
    socket.write_all(b"5\r\nhello\r\n0\r\n\r\n").await.unwrap();
    assert_eq!(status_of(&mut socket).await, 200);
    echo.abort();
}

#[tokio::test]
async fn nobody_is_reached_whom_the_configuration_does_not_name() {
    let registry = registry(b"x").await;
    let (host, echo) = echo().await;
    let private = Proxy::start(&registry, |_| {}).await;
    let listing = Proxy::start(&registry, |settings| {
        settings.registries.allow = vec!["quay.io".into()];
        settings
            .registries
            .allow_networks
            .extend(Network::new("127.0.0.0".parse().unwrap(), 8));
    })
    .await;
    for (proxy, target, status) in [
        (&private, host.to_string(), 403),
        (&private, format!("localhost:{}", host.port()), 403),
        // Of the public web's ports, but not of its addresses.
        (&private, "127.0.0.1:443".into(), 403),
        (&private, "[::1]:443".into(), 403),
        (&private, "169.254.169.254:80".into(), 403),
        (&listing, host.to_string(), 403),
        (&listing, "example.com:443".into(), 403),
        (&listing, "quay.io:22".into(), 403),
        (&private, "no_host:443".into(), 400),
    ] {
        assert_eq!(
            proxy.tunnel(&target, b"").await.0,
            status,
            "CONNECT {target}"
        );
        let mut client = Client::over(proxy.connect().await, &target).await;
        assert_eq!(
            client.get(&format!("http://{target}/v2/")).await.status,
            status,
            "GET {target}"
        );
    }
    assert_eq!(private.tunnel("without-port", b"").await.0, 400);
    let mut client = Client::over(private.connect().await, "proxy").await;
    for target in ["/v2/", "/v2/a/b/manifests/v1", "ftp://quay.io/"] {
        let host = if target.starts_with('/') {
            "proxy"
        } else {
            "quay.io"
        };
        assert_eq!(
            client
                .ask("GET", target, &[("host", host)], b"")
                .await
                .status,
            400,
            "{target}"
        );
    }
    echo.abort();
}

#[tokio::test]
async fn a_tunnel_carries_bytes_both_ways_and_each_end_for_itself() {
    let registry = registry(b"x").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap();
    let proxy = Proxy::start(&registry, |settings| reaching(settings, host)).await;
    let (sent, answer) = (noise(700_000, 4), noise(900_000, 5));
    let (expected, told) = (sent.clone(), answer.clone());
    let there = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut heard = Vec::new();
        socket.read_to_end(&mut heard).await.unwrap();
        assert!(heard == expected, "what came before the other end's");
        socket.write_all(&told).await.unwrap();
    });
    // Some of it right behind the request's head.
    let (status, mut socket) = proxy.tunnel(host, &sent[..1000]).await;
    assert_eq!(status, 200);
    socket.write_all(&sent[1000..]).await.unwrap();
    socket.shutdown().await.unwrap();
    let mut heard = Vec::new();
    timeout(Duration::from_secs(20), socket.read_to_end(&mut heard))
        .await
        .expect("it hangs")
        .unwrap();
    assert!(heard == answer);
    there.await.unwrap();
    assert_eq!(proxy.mirror.metrics().tunnelled.get(), 1_600_000);
    assert!(
        proxy
            .mirror
            .metrics()
            .encode()
            .contains("hawker_requests_total{kind=\"tunnel\",code=\"200\"} 1")
    );
}

#[tokio::test]
async fn tunnels_have_a_bound() {
    let registry = registry(b"x").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap();
    let proxy = Proxy::start(&registry, |settings| reaching(settings, host)).await;
    let mut open = Vec::new();
    for _ in 0..MAX_TUNNELS {
        let (status, socket) = proxy.tunnel(host, b"").await;
        assert_eq!(status, 200);
        open.push((socket, listener.accept().await.unwrap()));
    }
    assert_eq!(proxy.tunnel(host, b"").await.0, 503);
    open.clear();
    for _ in 0..100 {
        if proxy.mirror.metrics().tunnels.get() == 0 {
            return assert_eq!(proxy.tunnel(host, b"").await.0, 200);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("tunnels stay");
}

#[tokio::test]
async fn stopping_ends_tunnels_after_the_drain() {
    let registry = registry(b"x").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap();
    let mut proxy = Proxy::start(&registry, |settings| reaching(settings, host)).await;
    let (status, mut socket) = proxy.tunnel(host, b"").await;
    assert_eq!(status, 200);
    proxy.stop.cancel();
    let mut heard = Vec::new();
    timeout(Duration::from_secs(10), socket.read_to_end(&mut heard))
        .await
        .expect("it goes on")
        .unwrap();
    timeout(Duration::from_secs(10), &mut proxy.served)
        .await
        .expect("it goes on")
        .unwrap();
}

#[tokio::test]
async fn a_circle_is_refused() {
    let registry = registry(b"x").await;
    let proxy = Proxy::start(&registry, |_| {}).await;
    let via = format!("1.1 {}", proxy.origin.pseudonym());
    let mut plain = Client::over(proxy.connect().await, &registry.name()).await;
    let target = format!("http://{}/v2/", registry.name());
    assert_eq!(
        plain
            .ask("GET", &target, &[("via", &via)], b"")
            .await
            .status,
        508
    );
    let mut opened = proxy.opened(&registry.name()).await;
    assert_eq!(
        opened
            .ask("GET", "/v2/", &[("via", &via)], b"")
            .await
            .status,
        508
    );
    assert!(registry.seen().is_empty());
}

#[tokio::test]
async fn an_opened_connection_leads_to_its_host_and_nowhere_else() {
    let registry = registry(b"x").await;
    let proxy = Proxy::start(&registry, |_| {}).await;
    for (method, target, host, status) in [
        ("GET", "/v2/", "elsewhere.example", 421),
        ("GET", "/v2/", "127.0.0.1", 421),
        (
            "GET",
            "https://elsewhere.example/v2/",
            "elsewhere.example",
            421,
        ),
        (
            "CONNECT",
            "elsewhere.example:443",
            "elsewhere.example:443",
            421,
        ),
        ("GET", "/v2/", &registry.name(), 200),
    ] {
        let mut client = proxy.opened(&registry.name()).await;
        let got = client.ask(method, target, &[("host", host)], b"").await;
        assert_eq!(got.status, status, "{method} {target} {host}");
    }
    assert_eq!(registry.seen().len(), 1);
}

#[tokio::test]
async fn a_client_that_does_not_trust_the_authority_or_speaks_no_tls_gets_nothing() {
    let registry = registry(b"x").await;
    let proxy = Proxy::start(&registry, |_| {}).await;
    let (_, mut socket) = proxy
        .tunnel(registry.name(), b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        .await;
    let mut heard = Vec::new();
    let _ = timeout(Duration::from_secs(10), socket.read_to_end(&mut heard))
        .await
        .expect("it hangs");
    assert!(!heard.starts_with(b"HTTP"), "{heard:?}");
    assert!(registry.seen().is_empty());
}

#[tokio::test]
async fn rules_change_while_the_proxy_runs() {
    let registry = registry(b"x").await;
    let proxy = Proxy::start(&registry, |_| {}).await;
    let mut opened = proxy.opened(&registry.name()).await;
    let mut settings = (**proxy.live.load()).clone();
    let rule = Rule {
        host: registry.name(),
        path: None,
        action: Action::Direct,
    };
    settings.intercept = Rules::new(vec![rule]);
    proxy.live.store(Arc::new(settings));
    // A connection that is open already passes all on; a new one is a tunnel.
    let got = opened.get("/v2/a/b/manifests/v1").await;
    assert_eq!((got.status, got.header("x-own")), (200, "1"));
    let (status, socket) = proxy.tunnel(registry.name(), b"").await;
    assert_eq!(status, 200);
    let mut through = Client::over(socket, &registry.name()).await;
    assert_eq!(through.get("/v2/").await.status, 200);
}

#[test]
fn the_authority_is_made_once_and_its_key_is_for_its_owner_alone() {
    let folder = tempfile::tempdir().unwrap();
    let dir = authority_dir(folder.path());
    let certificate = |_| {
        Authority::open_or_create(&dir, "node").unwrap();
        std::fs::read(dir.join(CERTIFICATE_FILE)).unwrap()
    };
    let [first, second] = [0, 1].map(certificate);
    assert_eq!(first, second);
    let mode = std::fs::metadata(dir.join("key.pem"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    std::fs::write(dir.join("key.pem"), "nonsense").unwrap();
    let error = Authority::open_or_create(&dir, "node")
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("key.pem") && !error.contains("nonsense"),
        "{error}"
    );
}

#[test]
fn a_hosts_certificate_is_kept_until_shortly_before_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open_or_create(&authority_dir(folder.path()), "node").unwrap();
    let now = SystemTime::now();
    let hours = |hours: u64| now + Duration::from_secs(3600 * hours);
    let first = authority.server_config("quay.io", now).unwrap();
    assert!(Arc::ptr_eq(
        &first,
        &authority.server_config("quay.io", hours(143)).unwrap()
    ));
    assert!(!Arc::ptr_eq(
        &first,
        &authority.server_config("quay.io", hours(145)).unwrap()
    ));
    assert!(!Arc::ptr_eq(
        &first,
        &authority.server_config("ghcr.io", now).unwrap()
    ));
}
