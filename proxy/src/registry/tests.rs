use std::net::SocketAddr;
use std::path::Path;

use hawker_oci::digest::Algorithm;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::*;
use crate::download::{FlightError, Shared, State};
use crate::driver::Event;
use crate::origin::testing::{Reply, Seen, TestRegistry, knowing, noise, origin, say, sha256};
use crate::settings::{AuthorizationMode, CacheSettings, CredentialSource};

mod odd;
mod proof;
mod ranges;
mod tags;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// The registry's, which is its own realm and gives a token to nobody.
fn challenge(registry: &str) -> String {
    format!(
        "Bearer realm=\"http://{registry}/token\",service=\"r\",scope=\"repository:private:pull\""
    )
}

/// The content of the test registry: one manifest, `a/b:v1`, that names one blob.
#[derive(Clone)]
struct Image {
    blob: Vec<u8>,
    manifest: String,
}

impl Image {
    fn new(blob_bytes: usize) -> Self {
        let blob = noise(blob_bytes, 7);
        let part = |media_type: &str, data: &[u8]| serde_json::json!({ "mediaType": media_type, "digest": sha256(data).to_string(), "size": data.len() });
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": part("application/vnd.oci.image.config.v1+json", b"{}"),
            "layers": [part("application/vnd.oci.image.layer.v1.tar", &blob)],
        });
        Self {
            blob,
            manifest: manifest.to_string(),
        }
    }

    fn blob_digest(&self) -> Digest {
        sha256(&self.blob)
    }

    fn manifest_digest(&self) -> Digest {
        sha256(self.manifest.as_bytes())
    }

    /// The answers of a registry: repository `a/b` is public, `private` wants a token, others have nothing.
    fn reply(&self, seen: &Seen) -> Reply {
        let (blob, manifest) = (
            self.blob_digest().to_string(),
            self.manifest_digest().to_string(),
        );
        let path = seen.target.split('?').next().unwrap_or_default();
        let challenge = challenge(seen.header("host").unwrap());
        let rest = match path.strip_prefix("/v2/private/") {
            Some(rest) if seen.header("authorization") == Some("Bearer good") => rest,
            Some(_) => {
                return say(
                    seen,
                    401,
                    &[("WWW-Authenticate", &challenge)],
                    b"{\"errors\":[]}",
                );
            }
            None => path.strip_prefix("/v2/a/b/").unwrap_or_default(),
        };
        if rest == "manifests/v1" || rest == format!("manifests/{manifest}") {
            let headers = [
                ("Content-Type", MANIFEST),
                ("Docker-Content-Digest", manifest.as_str()),
                ("RateLimit-Remaining", "99"),
                ("Set-Cookie", "no"),
            ];
            return say(seen, 200, &headers, self.manifest.as_bytes());
        }
        if rest == format!("blobs/{blob}") {
            return match seen.header("range") {
                Some("bytes=5-9") => {
                    let range = format!("bytes 5-9/{}", self.blob.len());
                    say(seen, 206, &[("Content-Range", &range)], &self.blob[5..10])
                }
                _ => say(seen, 200, &[], &self.blob),
            };
        }
        if rest == "tags/list" {
            return say(
                seen,
                200,
                &[("Link", "</v2/a/b/tags/list?n=1&last=v1>; rel=\"next\"")],
                b"{\"tags\":[\"v1\"]}",
            );
        }
        say(
            seen,
            404,
            &[],
            b"{\"errors\":[{\"code\":\"NAME_UNKNOWN\"}]}",
        )
    }
}

/// A mirror in front of a registry.
pub(super) struct Node {
    pub(super) address: SocketAddr,
    mirror: Mirror,
    stop: CancellationToken,
    served: JoinHandle<()>,
    pub(super) live: Arc<ArcSwap<LiveSettings>>,
    folder: tempfile::TempDir,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.cancel();
        self.served.abort();
    }
}

impl Node {
    pub(super) async fn before(registry: &TestRegistry) -> Self {
        Self::with_seeds(registry, None).await
    }

    async fn with_seeds(registry: &TestRegistry, seeds: Option<Arc<dyn SeedManifests>>) -> Self {
        // Nobody takes part in downloads here: a request that needs one is refused at once.
        Self::start(registry, seeds, tokio::sync::mpsc::channel(1).0).await
    }

    /// One whose downloads find that nobody says how long a blob is.
    async fn passing_through(registry: &TestRegistry) -> Self {
        Self::with_downloads(registry, |state, _| {
            state.failed = Some(FlightError::UnknownLength)
        })
        .await
    }

    /// One whose downloads are in the state that `set` makes of a new one and of the size that the request knows.
    async fn with_downloads(
        registry: &TestRegistry,
        set: impl Fn(&mut State, Option<u64>) + Send + 'static,
    ) -> Self {
        let (events, mut heard) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            while let Some(event) = heard.recv().await {
                if let Event::Open {
                    task,
                    reply,
                    size_hint,
                    grant,
                    ..
                } = event
                {
                    let shared = Shared::new(task);
                    shared.update(|state| {
                        state.sized_by = Some(grant.source.registry);
                        set(state, size_hint);
                    });
                    let _ = reply.send(Arc::new(shared));
                }
            }
        });
        Self::start(registry, None, events).await
    }

    async fn start(
        registry: &TestRegistry,
        seeds: Option<Arc<dyn SeedManifests>>,
        events: tokio::sync::mpsc::Sender<Event>,
    ) -> Self {
        let live = knowing(&[registry]);
        let mut settings = (**live.load()).clone();
        settings.registries.default = Some(registry.name());
        live.store(Arc::new(settings));
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(
            folder.path(),
            CacheSettings {
                high_percent: 100,
                ..CacheSettings::default()
            },
        )
        .unwrap();
        let origin = origin(&live);
        let flights = Flights::new(events, origin.clone());
        let proofs = Proofs::new(Arc::new(store.clone()), origin.clone());
        let mirror = Mirror::new(MirrorConfig {
            store,
            proofs,
            flights,
            origin,
            seeds,
            live: Arc::clone(&live),
            metrics: Arc::default(),
            desk: Desk::new(Arc::clone(&live), Arc::default()),
            pull_grace: Duration::from_secs(60),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let (serving, stopping) = (mirror.clone(), stop.clone());
        let served = tokio::spawn(async move {
            serving
                .serve(listener, stopping, Duration::from_secs(2))
                .await
        });
        Self {
            address,
            mirror,
            stop,
            served,
            live,
            folder,
        }
    }

    /// Puts a blob into the store.
    fn commit(&self, data: &[u8]) {
        self.mirror.inner.store.put(data);
    }

    pub(super) async fn ask(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Got {
        let mut client = Client::to(self.address).await;
        client.ask(method, target, headers).await
    }

    async fn get(&self, target: &str) -> Got {
        self.ask("GET", target, &[]).await
    }
}

/// A client that sees every byte.
pub(super) struct Client {
    pub(super) socket: TcpStream,
    buffer: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Got {
    pub(super) status: u16,
    headers: HeaderMap,
    pub(super) body: Vec<u8>,
    /// The body came whole.
    complete: bool,
}

impl Got {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    fn code(&self) -> String {
        let body: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        body["errors"][0]["code"].as_str().unwrap().to_owned()
    }
}

impl Client {
    pub(super) async fn to(address: SocketAddr) -> Self {
        Self {
            socket: TcpStream::connect(address).await.unwrap(),
            buffer: Vec::new(),
        }
    }

    pub(super) async fn send(&mut self, method: &str, target: &str, headers: &[(&str, &str)]) {
        let mut head = format!("{method} {target} HTTP/1.1\r\nHost: mirror\r\n");
        headers
            .iter()
            .for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        self.socket
            .write_all((head + "\r\n").as_bytes())
            .await
            .unwrap();
    }

    /// More bytes; `false` at the end. A reset is a failed test.
    async fn more(&mut self) -> bool {
        let read = tokio::time::timeout(
            Duration::from_secs(20),
            self.socket.read_buf(&mut self.buffer),
        );
        read.await.expect("it hangs").expect("no reset") > 0
    }

    pub(super) async fn receive(&mut self, method: &str) -> Got {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            assert!(self.more().await, "no response");
        };
        let head = String::from_utf8(self.buffer.drain(..end).collect()).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = HeaderMap::new();
        for (name, value) in head
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(": "))
        {
            headers.append(
                http::HeaderName::try_from(name).unwrap(),
                HeaderValue::try_from(value).unwrap(),
            );
        }
        let len = match headers.get("content-length") {
            _ if method == "HEAD" || status == 304 => 0,
            Some(len) => len.to_str().unwrap().parse::<usize>().unwrap(),
            None => return self.receive_chunks(status, headers).await,
        };
        while self.buffer.len() < len && self.more().await {}
        let complete = self.buffer.len() >= len;
        let body = self.buffer.drain(..len.min(self.buffer.len())).collect();
        Got {
            status,
            headers,
            body,
            complete,
        }
    }

    async fn receive_chunks(&mut self, status: u16, headers: HeaderMap) -> Got {
        assert_eq!(headers["transfer-encoding"], "chunked");
        while !self.buffer.ends_with(b"\r\n0\r\n\r\n") && self.more().await {}
        let complete = self.buffer.ends_with(b"\r\n0\r\n\r\n");
        let (mut body, mut rest) = (Vec::new(), self.buffer.as_slice());
        while let Some(at) = rest.windows(2).position(|w| w == b"\r\n") {
            let len = usize::from_str_radix(str::from_utf8(&rest[..at]).unwrap(), 16).unwrap();
            let end = (at + 2 + len).min(rest.len());
            body.extend_from_slice(&rest[at + 2..end]);
            rest = rest.get(end + 2..).unwrap_or_default();
        }
        self.buffer.clear();
        Got {
            status,
            headers,
            body,
            complete,
        }
    }

    async fn ask(&mut self, method: &str, target: &str, headers: &[(&str, &str)]) -> Got {
        self.send(method, target, headers).await;
        self.receive(method).await
    }
}

async fn image_node(blob_bytes: usize) -> (Image, TestRegistry, Node) {
    let image = Image::new(blob_bytes);
    let replies = image.clone();
    let registry = TestRegistry::start(move |seen| replies.reply(seen)).await;
    let node = Node::before(&registry).await;
    (image, registry, node)
}

#[tokio::test]
async fn requests_that_make_no_sense_are_answered_as_the_spec_says() {
    let (image, registry, node) = image_node(10).await;
    let digest = image.blob_digest();
    for (method, target, status, code) in [
        (
            "POST",
            format!("/v2/a/b/blobs/{digest}"),
            405,
            "UNSUPPORTED",
        ),
        ("PUT", "/v2/a/b/manifests/v1".into(), 405, "UNSUPPORTED"),
        ("PATCH", "/v2/a/b/manifests/v1".into(), 405, "UNSUPPORTED"),
        ("DELETE", "/v2/a/b/manifests/v1".into(), 405, "UNSUPPORTED"),
        (
            "GET",
            "/v2/a/b/blobs/sha256:xyz".into(),
            400,
            "DIGEST_INVALID",
        ),
        ("GET", "/v2/A/manifests/v1".into(), 400, "NAME_INVALID"),
        ("GET", "/metrics".into(), 404, "UNSUPPORTED"),
        (
            "GET",
            "/v2/a/b/manifests/v2".into(),
            404,
            "MANIFEST_UNKNOWN",
        ),
        (
            "GET",
            format!("/v2/a/b/blobs/{}", sha256(b"other")),
            404,
            "BLOB_UNKNOWN",
        ),
        (
            "GET",
            format!("/v2/a/b/manifests/{}", sha256(b"other")),
            404,
            "MANIFEST_UNKNOWN",
        ),
        (
            "GET",
            format!("/v2/a/b/blobs/{digest}?ns=169.254.169.254"),
            403,
            "DENIED",
        ),
        (
            "GET",
            "/v2/a/b/manifests/v1?ns=127.0.0.1:1".into(),
            403,
            "DENIED",
        ),
    ] {
        let got = node.ask(method, &target, &[]).await;
        assert_eq!(
            (got.status, got.code().as_str()),
            (status, code),
            "{method} {target}"
        );
        assert!(got.complete);
        assert_eq!(
            got.header("allow"),
            if status == 405 { "GET, HEAD" } else { "" }
        );
    }
    let ping = node.get("/v2/").await;
    assert_eq!((ping.status, ping.body.as_slice()), (200, b"{}".as_slice()));
    assert_eq!(
        ping.header("docker-distribution-api-version"),
        "registry/2.0"
    );
    let served = node.mirror.metrics();
    let served = [
        &served.served_cache,
        &served.served_flight,
        &served.served_origin,
    ]
    .map(|bytes| bytes.get());
    assert_eq!(served, [0; 3], "errors and pings are no content");
    // Content that a HEAD does not find is asked for by GET, since some registries refuse every HEAD.
    assert_eq!(registry.count("GET", "/v2/a/b/blobs/"), 1);
}

#[tokio::test]
async fn a_tag_is_passed_through_and_its_digest_is_served_from_the_cache() {
    let (image, registry, node) = image_node(10).await;
    let digest = image.manifest_digest().to_string();
    let by_digest = format!("/v2/a/b/manifests/{digest}");
    for method in ["HEAD", "GET"] {
        let got = node
            .ask(
                method,
                "/v2/a/b/manifests/v1",
                &[("Accept", MANIFEST), ("Accept", "*/*")],
            )
            .await;
        assert_eq!((got.status, got.header("content-type")), (200, MANIFEST));
        assert_eq!(got.header("docker-content-digest"), digest);
        assert_eq!(got.header("ratelimit-remaining"), "99");
        assert_eq!(
            got.header("content-length"),
            image.manifest.len().to_string()
        );
        assert!(got.headers.get("set-cookie").is_none());
    }
    assert_eq!(
        registry.seen()[0].header("accept"),
        Some(format!("{MANIFEST}, */*").as_str())
    );
    let before = registry.count("GET", "/v2/");
    for method in ["GET", "HEAD"] {
        let got = node.ask(method, &by_digest, &[]).await;
        assert_eq!(
            (got.status, got.header("content-type")),
            (200, MANIFEST),
            "{method}"
        );
        assert_eq!(
            got.header("content-length"),
            image.manifest.len().to_string()
        );
        let body = if method == "GET" {
            image.manifest.as_bytes()
        } else {
            b""
        };
        assert_eq!(got.body, body);
    }
    let not_modified = node
        .ask(
            "GET",
            &by_digest,
            &[("If-None-Match", &format!("\"{digest}\""))],
        )
        .await;
    assert_eq!((not_modified.status, not_modified.body.len()), (304, 0));
    assert_eq!(
        registry.count("GET", "/v2/"),
        before,
        "all of it comes from the cache"
    );
}

#[tokio::test]
async fn the_namespace_says_which_registry_and_is_returned() {
    let (_image, registry, node) = image_node(10).await;
    for target in [
        format!(
            "/v2/a/b/manifests/v1?ns={}",
            registry.name().replace(':', "%3A")
        ),
        format!("/v2/{}/a/b/manifests/v1", registry.name()),
        format!("/{}/v2/a/b/manifests/v1", registry.name()),
    ] {
        let got = node.get(&target).await;
        assert_eq!(
            (got.status, got.header("oci-namespace")),
            (200, registry.name().as_str()),
            "{target}"
        );
    }
    assert_eq!(
        node.get("/v2/a/b/manifests/v1")
            .await
            .header("oci-namespace"),
        ""
    );
}

#[tokio::test]
async fn a_manifest_that_does_not_match_its_digest_is_not_served() {
    let image = Image::new(10);
    let digest = image.manifest_digest().to_string();
    let named = digest.clone();
    let registry = TestRegistry::start(move |seen| {
        say(
            seen,
            200,
            &[
                ("Docker-Content-Digest", &named),
                ("Content-Type", MANIFEST),
            ],
            b"{\"wrong\":1}",
        )
    })
    .await;
    let node = Node::before(&registry).await;
    for target in [
        "/v2/a/b/manifests/v1".to_owned(),
        format!("/v2/a/b/manifests/{digest}"),
    ] {
        for headers in [&[][..], &[("Authorization", "Bearer x")]] {
            let got = node.ask("GET", &target, headers).await;
            assert_eq!(
                (got.status, got.code().as_str()),
                (502, "MANIFEST_INVALID"),
                "{target}"
            );
        }
    }
}

#[tokio::test]
async fn manifests_of_four_mebibytes_work_and_longer_ones_do_not() {
    for (len, status) in [(4 << 20, 200), ((4 << 20) + 1, 502)] {
        for chunked in [false, true] {
            let body = [&b"{"[..], &vec![b' '; len - 2], b"}"].concat();
            let registry = TestRegistry::start(move |seen| {
                if !chunked {
                    return say(seen, 200, &[], &body);
                }
                let framed = [
                    format!("{:x}\r\n", body.len()).as_bytes(),
                    &body,
                    b"\r\n0\r\n\r\n",
                ]
                .concat();
                say(seen, 200, &[("transfer-encoding", "chunked")], &framed)
            })
            .await;
            let node = Node::before(&registry).await;
            assert_eq!(
                node.get("/v2/a/b/manifests/v1").await.status,
                status,
                "{len} {chunked}"
            );
        }
    }
}

#[tokio::test]
async fn many_who_ask_for_a_manifest_at_once_cost_one_request() {
    let (image, registry, node) = image_node(10).await;
    let target = format!("/v2/a/b/manifests/{}", image.manifest_digest());
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (address, target) = (node.address, target.clone());
        clients.spawn(async move {
            Client::to(address)
                .await
                .ask("GET", &target, &[])
                .await
                .status
        });
    }
    assert!(clients.join_all().await.iter().all(|status| *status == 200));
    // Later callers ask whether they may have it, at most.
    assert_eq!(registry.count("GET", "/v2/a/b/manifests/"), 1);
}

#[tokio::test]
async fn who_comes_under_new_settings_gets_nothing_by_the_credentials_of_the_old_ones() {
    let image = Image::new(10);
    let registry = TestRegistry::start(|seen| match seen.header("authorization") {
        Some(_) => Reply::Silence,
        None => say(
            seen,
            401,
            &[("WWW-Authenticate", "Basic realm=\"x\"")],
            b"{\"errors\":[]}",
        ),
    })
    .await;
    let node = Node::before(&registry).await;
    let file = node.folder.path().join("config.json");
    let user = serde_json::json!({ "username": "user", "password": "secret" });
    std::fs::write(
        &file,
        serde_json::json!({ "auths": { registry.name(): user } }).to_string(),
    )
    .unwrap();
    let switch = |mode| {
        let mut settings = (**node.live.load()).clone();
        settings.credentials = vec![CredentialSource::Docker(file.clone())];
        settings
            .registries
            .known
            .get_mut(&registry.name())
            .unwrap()
            .authorization = Some(mode);
        node.live.store(Arc::new(settings));
    };
    switch(AuthorizationMode::Node);
    let target = format!("/v2/a/b/manifests/{}", image.manifest_digest());
    let mut early = Client::to(node.address).await;
    early.send("GET", &target, &[]).await;
    while registry
        .seen()
        .iter()
        .all(|seen| seen.header("authorization").is_none())
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    switch(AuthorizationMode::Relay);
    let late = tokio::time::timeout(Duration::from_secs(5), node.get(&target)).await;
    assert_eq!(late.expect("it waits for what is not for it").status, 401);
}

#[tokio::test]
async fn refusals_pass_through_with_their_challenge() {
    let (image, registry, node) = image_node(10).await;
    let challenge = challenge(&registry.name());
    node.commit(&image.blob);
    for target in [
        "/v2/private/manifests/v1".to_owned(),
        format!("/v2/private/manifests/{}", image.manifest_digest()),
        format!("/v2/private/blobs/{}", image.blob_digest()),
        "/v2/private/tags/list".to_owned(),
    ] {
        for method in ["GET", "HEAD"] {
            for headers in [&[][..], &[("Authorization", "Bearer bad")]] {
                let got = node.ask(method, &target, headers).await;
                assert_eq!(
                    (got.status, got.header("www-authenticate")),
                    (401, challenge.as_str()),
                    "{method} {target}"
                );
            }
        }
    }
}

#[tokio::test]
async fn what_a_client_may_read_is_cached_and_given_to_nobody_else() {
    let (image, registry, node) = image_node(300_000).await;
    node.commit(&image.blob);
    let (good, challenge) = (
        ("Authorization", "Bearer good"),
        challenge(&registry.name()),
    );
    let manifest = format!("/v2/private/manifests/{}", image.manifest_digest());
    let blob = format!("/v2/private/blobs/{}", image.blob_digest());
    for _ in 0..2 {
        assert_eq!(
            node.ask("GET", &manifest, &[good]).await.body,
            image.manifest.as_bytes()
        );
        let got = node.ask("GET", &blob, &[good]).await;
        assert!(got.complete && got.body == image.blob);
        let part = node
            .ask("GET", &blob, &[good, ("Range", "bytes=5-9")])
            .await;
        assert_eq!(
            (part.status, part.body.as_slice()),
            (206, &image.blob[5..10])
        );
        for headers in [&[][..], &[("Authorization", "Bearer bad")]] {
            for target in [&manifest, &blob] {
                let got = node.ask("GET", target, headers).await;
                assert_eq!(
                    (got.status, got.header("www-authenticate")),
                    (401, challenge.as_str()),
                    "{target}"
                );
            }
        }
    }
    assert_eq!(
        registry.count("GET", "/v2/private/manifests/"),
        1,
        "the others are told no by a HEAD"
    );
    assert_eq!(registry.count("GET", "/v2/private/blobs/"), 0);
    let page = node.mirror.metrics().encode();
    assert!(!page.contains("good"));
}

#[tokio::test]
async fn what_is_private_is_given_only_while_the_clients_right_is_remembered() {
    let (image, registry, node) = image_node(1000).await;
    node.commit(&image.blob);
    let good = [("Authorization", "Bearer good")];
    let manifest = format!("/v2/private/manifests/{}", image.manifest_digest());
    let blob = format!("/v2/private/blobs/{}", image.blob_digest());
    assert_eq!(node.ask("GET", &manifest, &good).await.status, 200);
    let source = registry.source("private");
    drop(registry);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(node.ask("GET", &blob, &good).await.body, image.blob);
    assert_eq!(
        node.ask("GET", &blob, &[("Authorization", "Bearer bad")])
            .await
            .status,
        502
    );
    assert_eq!(node.get(&blob).await.status, 502);
    let header = HeaderMap::from_iter([(
        http::header::AUTHORIZATION,
        HeaderValue::from_static("Bearer good"),
    )]);
    let grant = Grant {
        source,
        authorization: Authorization::of(&header),
    };
    let long_ago = Instant::now()
        .checked_sub(Duration::from_secs(600))
        .unwrap();
    node.mirror.inner.access.readable(
        access::Caller::of(&grant),
        &grant.source,
        Duration::from_secs(60),
        None,
        long_ago,
    );
    assert_eq!(
        node.ask("GET", &blob, &good).await.status,
        502,
        "nothing private is open on failure"
    );
}

#[tokio::test]
async fn a_wrong_blob_passed_through_never_completes() {
    let data = noise(200_000, 1);
    let mut wrong = data.clone();
    wrong[100] ^= 1;
    let registry = TestRegistry::start(move |seen| say(seen, 200, &[], &wrong)).await;
    let node = Node::passing_through(&registry).await;
    let target = format!("/v2/a/b/blobs/{}", sha256(&data));
    let got = node.get(&target).await;
    assert_eq!(got.status, 200);
    assert!(!got.complete, "it ends short, without a reset");
    assert!(
        got.body.len() > 60_000,
        "what came before the end was sent: {}",
        got.body.len()
    );
}

#[tokio::test]
async fn a_blob_of_unknown_length_passes_through_and_is_checked() {
    let data = noise(200_000, 1);
    for wrong in [false, true] {
        let mut sent = data.clone();
        sent[199_999] ^= u8::from(wrong);
        let registry = TestRegistry::start(move |seen| {
            let framed = [
                format!("{:x}\r\n", sent.len()).as_bytes(),
                &sent,
                b"\r\n0\r\n\r\n",
            ]
            .concat();
            say(seen, 200, &[("transfer-encoding", "chunked")], &framed)
        })
        .await;
        let node = Node::passing_through(&registry).await;
        let target = format!("/v2/a/b/blobs/{}", sha256(&data));
        let got = node.get(&target).await;
        assert_eq!(
            (got.status, got.complete, got.body == data),
            (200, !wrong, !wrong)
        );
    }
}

#[tokio::test]
async fn an_origins_broken_body_ends_the_response_short_without_a_reset() {
    let data = noise(300_000, 1);
    for reset in [false, true] {
        let copy = data.clone();
        let registry = TestRegistry::start(move |_| {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", copy.len());
            let part = [head.as_bytes(), &copy[..200_000]].concat();
            if reset {
                Reply::Reset(part)
            } else {
                Reply::Cut(part)
            }
        })
        .await;
        let node = Node::passing_through(&registry).await;
        let target = format!("/v2/a/b/blobs/{}", sha256(&data));
        let got = node.get(&target).await;
        assert!(!got.complete && got.body == data[..got.body.len()]);
    }
}

#[tokio::test]
async fn a_blob_is_served_from_the_store_in_any_range() {
    let (image, registry, node) = image_node(3_000_000).await;
    node.commit(&image.blob);
    let (size, digest) = (image.blob.len(), image.blob_digest());
    let target = format!("/v2/a/b/blobs/{digest}");
    let (etag, other) = (format!("\"{digest}\""), format!("\"{}\"", sha256(b"")));
    let mut client = Client::to(node.address).await;
    for (range, condition, expected) in [
        (None, None, Some((200, 0..size))),
        (Some("bytes=0-"), None, Some((206, 0..size))),
        (Some("bytes=0-1"), None, Some((206, 0..2))),
        (
            Some("bytes=1048576-2097151"),
            None,
            Some((206, 1 << 20..2 << 20)),
        ),
        (Some("bytes=2999999-"), None, Some((206, size - 1..size))),
        (Some("bytes=-5"), None, Some((206, size - 5..size))),
        (
            Some("bytes=2999990-9999999"),
            None,
            Some((206, size - 10..size)),
        ),
        (Some("bytes=5-9"), Some(&etag), Some((206, 5..10))),
        (Some("bytes=5-9"), Some(&other), Some((200, 0..size))),
        (Some("bytes=3000000-"), None, None),
        (Some("bytes=5-2"), None, None),
        (Some("lines=1-2"), None, None),
    ] {
        let mut headers: Vec<(&str, &str)> =
            range.map(|range| ("Range", range)).into_iter().collect();
        headers.extend(condition.map(|condition| ("If-Range", condition.as_str())));
        let got = client.ask("GET", &target, &headers).await;
        let Some((status, wanted)) = expected else {
            assert_eq!(
                (got.status, got.header("content-range")),
                (416, "bytes */3000000"),
                "{range:?}"
            );
            continue;
        };
        assert_eq!(got.status, status, "{range:?}");
        assert!(
            got.complete && got.body == image.blob[wanted.clone()],
            "{range:?}"
        );
        let content_range = format!("bytes {}-{}/{size}", wanted.start, wanted.end - 1);
        assert_eq!(
            got.header("content-range"),
            if status == 206 {
                content_range.as_str()
            } else {
                ""
            }
        );
        assert_eq!(got.header("docker-content-digest"), digest.to_string());
        assert_eq!(
            (got.header("etag"), got.header("accept-ranges")),
            (etag.as_str(), "bytes")
        );
        assert_eq!(got.header("content-type"), "application/octet-stream");
        let head = client.ask("HEAD", &target, &headers).await;
        assert_eq!(
            (head.status, head.header("content-length")),
            (got.status, got.header("content-length"))
        );
    }
    assert_eq!(
        client
            .ask("GET", &target, &[("If-None-Match", &etag)])
            .await
            .status,
        304
    );
    assert_eq!(registry.count("GET", "/v2/a/b/blobs/"), 0);
    assert_eq!(
        registry.count("HEAD", "/v2/a/b/blobs/"),
        1,
        "access is asked for once"
    );
    let unknown = node.get(&format!("/v2/other/blobs/{digest}")).await;
    assert_eq!(
        (unknown.status, unknown.code().as_str()),
        (404, "BLOB_UNKNOWN")
    );
}

#[tokio::test]
async fn an_empty_blob_is_a_200() {
    let image = Image::new(0);
    let replies = image.clone();
    let registry = TestRegistry::start(move |seen| replies.reply(seen)).await;
    let node = Node::before(&registry).await;
    node.commit(b"");
    let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
    for (range, status) in [
        ("", 200),
        ("bytes=0-", 200),
        ("bytes=-5", 200),
        ("bytes=0-1,3-4", 200),
        ("bytes=1-", 416),
    ] {
        let headers = [("Range", range)];
        let got = node
            .ask(
                "GET",
                &target,
                if range.is_empty() { &[] } else { &headers },
            )
            .await;
        assert_eq!(got.status, status, "{range}");
        assert!(
            status == 416 || got.header("content-length") == "0",
            "{range}"
        );
    }
}

#[tokio::test]
async fn a_miss_that_can_not_be_downloaded_is_an_error_at_once() {
    let (image, _registry, node) = image_node(1000).await;
    let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
    assert_eq!(node.get(&target).await.status, 503);
    // An unsatisfiable request is not even begun.
    assert_eq!(
        node.ask("GET", &target, &[("Range", "bytes=1000-")])
            .await
            .status,
        416
    );
    assert_eq!(
        node.ask("GET", &target, &[("Range", "bytes=0-900,5-600")])
            .await
            .status,
        400
    );
}

#[tokio::test]
async fn a_head_starts_no_download() {
    let (image, registry, node) = image_node(1000).await;
    let got = node
        .ask(
            "HEAD",
            &format!("/v2/a/b/blobs/{}", image.blob_digest()),
            &[],
        )
        .await;
    assert_eq!((got.status, got.header("content-length")), (200, "1000"));
    assert_eq!(registry.count("GET", "/"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_fast_and_slow_get_exactly_their_ranges() {
    use rand::{RngExt, SeedableRng};
    let (image, _registry, node) = image_node(20_000_000).await;
    node.commit(&image.blob);
    let image = Arc::new(image);
    let mut clients = tokio::task::JoinSet::new();
    for seed in 0..12 {
        let (address, image) = (node.address, Arc::clone(&image));
        clients.spawn(async move {
            let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
            let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
            let mut client = Client::to(address).await;
            for _ in 0..8 {
                let (a, b) = (
                    rng.random_range(0..image.blob.len()),
                    rng.random_range(0..image.blob.len()),
                );
                let (first, last) = (a.min(b), a.max(b));
                client
                    .send(
                        "GET",
                        &target,
                        &[("Range", &format!("bytes={first}-{last}"))],
                    )
                    .await;
                if seed % 3 == 0 {
                    tokio::time::sleep(Duration::from_millis(rng.random_range(0..50))).await;
                }
                let got = client.receive("GET").await;
                assert!(
                    got.complete && got.body == image.blob[first..=last],
                    "{first}-{last}"
                );
            }
        });
    }
    clients.join_all().await;
    assert!(node.mirror.metrics().served_cache.get() > 20_000_000);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let (image, _registry, node) = image_node(3_000_000).await;
    node.commit(&image.blob);
    let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
    let mut client = Client::to(node.address).await;
    for range in ["bytes=0-1999999", "bytes=7-7", "bytes=1000000-"] {
        client.send("GET", &target, &[("Range", range)]).await;
        client.send("GET", "/v2/", &[]).await;
    }
    for wanted in [0..2_000_000, 7..8, 1_000_000..3_000_000] {
        assert!(client.receive("GET").await.body == image.blob[wanted]);
        assert_eq!(client.receive("GET").await.body, b"{}");
    }
}

#[tokio::test]
async fn a_long_pipeline_leaves_time_for_others() {
    let (_image, _registry, node) = image_node(1000).await;
    let mut client = Client::to(node.address).await;
    let start = Instant::now();
    for _ in 0..66 {
        client.send("GET", "/v2/", &[]).await;
    }
    for _ in 0..66 {
        assert_eq!(client.receive("GET").await.body, b"{}");
    }
    assert!(
        start.elapsed() > Duration::from_millis(300),
        "{:?}",
        start.elapsed()
    );
    // A client that waits for each answer does not wait for anything else.
    let mut waits = Duration::MAX;
    for _ in 0..40 {
        let start = Instant::now();
        client.send("GET", "/v2/", &[]).await;
        client.receive("GET").await;
        waits = waits.min(start.elapsed());
    }
    assert!(waits < Duration::from_millis(8), "{waits:?}");
}

fn blob_file(folder: &Path, digest: &Digest) -> std::path::PathBuf {
    folder
        .join("blobs/sha256")
        .join(&digest.hex()[..2])
        .join(digest.hex())
}

#[tokio::test]
async fn a_file_that_shrinks_under_a_response_ends_it_short_without_a_reset() {
    let (image, _registry, node) = image_node(60_000_000).await;
    node.commit(&image.blob);
    let mut client = Client::to(node.address).await;
    client
        .send(
            "GET",
            &format!("/v2/a/b/blobs/{}", image.blob_digest()),
            &[],
        )
        .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let file = blob_file(node.folder.path(), &image.blob_digest());
    std::fs::OpenOptions::new()
        .write(true)
        .open(file)
        .unwrap()
        .set_len(30_000_000)
        .unwrap();
    let got = client.receive("GET").await;
    assert!(!got.complete);
    assert!(
        got.body == image.blob[..got.body.len()],
        "what came is right"
    );
    assert!(got.body.len() <= 30_000_000 + (1 << 20));
}

#[tokio::test]
async fn the_last_bytes_of_a_file_are_sent_at_once() {
    let (image, _registry, node) = image_node((3 << 20) + 7).await;
    node.commit(&image.blob);
    let mut client = Client::to(node.address).await;
    let mut fastest = Duration::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        client
            .send(
                "GET",
                &format!("/v2/a/b/blobs/{}", image.blob_digest()),
                &[("Range", "bytes=1-")],
            )
            .await;
        assert!(client.receive("GET").await.body == image.blob[1..]);
        fastest = fastest.min(start.elapsed());
    }
    // The kernel holds each short segment back for 200 ms where it is told to.
    assert!(fastest < Duration::from_millis(190), "{fastest:?}");
}

#[tokio::test]
async fn a_request_that_has_been_here_is_a_loop() {
    let (_image, registry, node) = image_node(10).await;
    let via = format!("1.1 fred, 1.1 {}", node.mirror.inner.origin.pseudonym());
    let got = node
        .ask("GET", "/v2/a/b/manifests/v1", &[("Via", &via)])
        .await;
    assert_eq!(got.status, 508);
    assert!(registry.seen().is_empty());
    node.ask("GET", "/v2/a/b/manifests/v1", &[("Via", "1.1 fred")])
        .await;
    assert!(
        registry.seen()[0]
            .headers
            .iter()
            .any(|(n, v)| n == "via" && v == "1.1 fred")
    );
}

#[tokio::test]
async fn a_mirror_that_is_its_own_origin_notices() {
    let (_image, _registry, node) = image_node(10).await;
    let mut settings = (**node.live.load()).clone();
    let endpoints = vec![format!("http://{}", node.address).parse().unwrap()];
    let circle = crate::settings::RegistrySettings {
        endpoints,
        ..Default::default()
    };
    settings
        .registries
        .known
        .insert("circle.example".into(), circle);
    settings.registries.default = Some("circle.example".into());
    node.live.store(Arc::new(settings));
    assert_eq!(node.get("/v2/a/b/manifests/v1").await.status, 508);
}

/// A gateway before some registries leads callers without the right to read to a page that asks for a login.
#[tokio::test]
async fn a_page_that_asks_for_a_login_is_no_yes() {
    let image = Image::new(1000);
    let replies = image.clone();
    let registry = TestRegistry::start(move |seen| {
        if seen.target.starts_with("/login") {
            return say(
                seen,
                200,
                &[("Content-Type", "text/html; charset=utf-8")],
                b"<form>who are you?</form>",
            );
        }
        match seen.header("authorization") {
            Some(_) => replies.reply(seen),
            None => say(seen, 302, &[("Location", "/login")], b""),
        }
    })
    .await;
    let node = Node::before(&registry).await;
    node.commit(&image.blob);
    let blob = format!("/v2/a/b/blobs/{}", image.blob_digest());
    let manifest = format!("/v2/a/b/manifests/{}", image.manifest_digest());
    let good = [("Authorization", "Bearer good")];
    for target in [&*manifest, "/v2/a/b/manifests/v1", &*blob] {
        assert_eq!(node.ask("GET", target, &good).await.status, 200, "{target}");
    }
    for round in 0..2 {
        for target in [
            &*blob,
            &*manifest,
            "/v2/a/b/manifests/v1",
            "/v2/a/b/manifests/latest",
        ] {
            for method in ["HEAD", "GET"] {
                let got = node.ask(method, target, &[]).await;
                assert_eq!(got.status, 502, "{method} {target}, {round}: {got:?}");
            }
        }
    }
}

#[tokio::test]
async fn what_was_confirmed_counts_while_the_origin_is_down() {
    let (image, registry, node) = image_node(1000).await;
    node.commit(&image.blob);
    let manifest = format!("/v2/a/b/manifests/{}", image.manifest_digest());
    let blob = format!("/v2/a/b/blobs/{}", image.blob_digest());
    assert_eq!(node.get(&manifest).await.status, 200);
    drop(registry);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let long_ago = Instant::now()
        .checked_sub(Duration::from_secs(600))
        .unwrap();
    let default = node.live.load().registries.default.clone().unwrap();
    let source = Source {
        registry: default,
        repository: "a/b".into(),
    };
    node.mirror.inner.access.readable(
        access::Caller::Anybody,
        &source,
        Duration::ZERO,
        None,
        long_ago,
    );
    assert_eq!(node.get(&manifest).await.status, 200);
    assert_eq!(node.get(&blob).await.body, image.blob);
    let other = node
        .get(&format!("/v2/a/b/blobs/{}", sha256(b"other")))
        .await;
    assert_eq!(other.status, 502, "a miss fails at once");
}

struct Seed(Vec<(u16, String, Bytes, bool)>);

impl SeedManifests for Seed {
    fn manifest<'a>(&'a self, _: &'a Grant, _: &'a Digest) -> SeedAnswer<'a> {
        Box::pin(async { self.0.first().cloned() })
    }
}

#[tokio::test]
async fn a_seeds_manifest_spares_the_origin_but_is_not_believed_blindly() {
    let image = Image::new(10);
    let right = (
        200,
        MANIFEST.to_owned(),
        Bytes::from(image.manifest.clone()),
        false,
    );
    for (seed, asked) in [
        (vec![right], 0),
        (
            vec![(200, MANIFEST.to_owned(), Bytes::from_static(b"{}"), true)],
            1,
        ),
        (vec![(404, String::new(), Bytes::new(), false)], 1),
        (vec![], 1),
    ] {
        let replies = image.clone();
        let registry = TestRegistry::start(move |seen| replies.reply(seen)).await;
        let node = Node::with_seeds(&registry, Some(Arc::new(Seed(seed)))).await;
        let got = node
            .get(&format!("/v2/a/b/manifests/{}", image.manifest_digest()))
            .await;
        assert_eq!(
            (got.status, got.body.as_slice()),
            (200, image.manifest.as_bytes())
        );
        assert_eq!(registry.count("GET", "/v2/a/b/manifests/"), asked);
    }
}

#[tokio::test]
async fn a_seed_gives_manifests_to_peers() {
    let (image, registry, node) = image_node(10).await;
    let (public, private) = (registry.source("a/b"), registry.source("private"));
    let (status, media_type, body, given) = node
        .mirror
        .manifest(public, image.manifest_digest(), None)
        .await;
    assert_eq!(
        (status, media_type.as_str(), body.as_ref()),
        (200, MANIFEST, image.manifest.as_bytes())
    );
    assert!(given, "this registry gave it");
    let (digest, lent) = (sha256(b"none"), Bearer::new("good"));
    assert_eq!(
        node.mirror.manifest(private.clone(), digest, lent).await.0,
        404,
        "with the right it is lent"
    );
    assert_eq!(node.mirror.manifest(private, digest, None).await.0, 401);
}

#[tokio::test]
async fn lists_come_from_the_origin_and_their_links_lead_back_here() {
    let (_image, registry, node) = image_node(10).await;
    let got = node
        .get(&format!(
            "/v2/a/b/tags/list?ns={}&n=1&last=v0",
            registry.name()
        ))
        .await;
    assert_eq!(got.body, b"{\"tags\":[\"v1\"]}");
    assert_eq!(registry.seen()[0].target, "/v2/a/b/tags/list?n=1&last=v0");
    let next = format!(
        "</v2/a/b/tags/list?n=1&last=v1&ns={}>; rel=\"next\"",
        registry.name()
    );
    assert_eq!(got.header("link"), next);
    assert_eq!(
        node.get(&format!("/v2/a/b/referrers/{}", sha256(b"x")))
            .await
            .status,
        404
    );
}

#[tokio::test]
async fn referrers_pass_through_with_their_filter_and_without_them_clients_fall_back_to_a_tag() {
    let index = b"{\"schemaVersion\":2,\"manifests\":[]}";
    let subject = sha256(b"subject");
    let fallback = format!("/v2/a/b/manifests/sha256-{}", subject.hex());
    let tag = fallback.clone();
    let registry = TestRegistry::start(move |seen| match seen.target.as_str() {
        target if target.starts_with("/v2/a/b/referrers/") => {
            let headers = [
                ("Content-Type", "application/vnd.oci.image.index.v1+json"),
                ("OCI-Filters-Applied", "artifactType"),
                ("Warning", "299 - \"soon gone\""),
            ];
            say(seen, 200, &headers, index)
        }
        target if target == tag => say(seen, 200, &[("Content-Type", MANIFEST)], index),
        _ => say(seen, 404, &[], b"{\"errors\":[]}"),
    })
    .await;
    let node = Node::before(&registry).await;
    let path = format!("referrers/{subject}?artifactType=application%2Fsig");
    let got = node
        .get(&format!("/v2/a/b/{path}&ns={}", registry.name()))
        .await;
    assert_eq!((got.status, got.body.as_slice()), (200, index.as_slice()));
    assert_eq!(got.header("oci-filters-applied"), "artifactType");
    assert_eq!(got.header("warning"), "299 - \"soon gone\"");
    assert_eq!(registry.seen()[0].target, format!("/v2/a/b/{path}"));
    let head = node
        .ask("HEAD", &format!("/v2/a/b/referrers/{subject}"), &[])
        .await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(
        node.get(&format!("/v2/old/referrers/{subject}"))
            .await
            .status,
        404
    );
    assert_eq!(node.get(&fallback).await.body, index);
    assert_eq!(
        node.get(&fallback.replace("/a/b/", "/old/")).await.status,
        404
    );
}

#[tokio::test]
async fn a_registrys_warning_reaches_clients_with_what_it_warns_of() {
    let (warning, manifest) = ("299 - \"this image is old\"", b"{}");
    let registry =
        TestRegistry::start(move |seen| say(seen, 200, &[("Warning", warning)], manifest)).await;
    let node = Node::before(&registry).await;
    for target in [
        format!("/v2/a/b/manifests/{}", sha256(manifest)),
        "/v2/a/b/manifests/v1".to_owned(),
    ] {
        assert_eq!(
            node.get(&target).await.header("warning"),
            warning,
            "{target}"
        );
    }
}

#[tokio::test]
async fn sha512_content_is_verified_as_such() {
    let manifest = b"{\"schemaVersion\":2}";
    let digest = Digest::of(Algorithm::Sha512, manifest);
    let registry =
        TestRegistry::start(move |seen| say(seen, 200, &[("Content-Type", MANIFEST)], manifest))
            .await;
    let node = Node::before(&registry).await;
    for _ in 0..2 {
        let got = node.get(&format!("/v2/a/b/manifests/{digest}")).await;
        assert_eq!(
            (got.status, got.body.as_slice()),
            (200, manifest.as_slice())
        );
        assert_eq!(got.header("docker-content-digest"), digest.to_string());
    }
    assert_eq!(registry.count("GET", "/v2/a/b/manifests/"), 1);
    let other = Digest::of(Algorithm::Sha512, b"other");
    let wrong = node.get(&format!("/v2/a/b/manifests/{other}")).await;
    assert_eq!(
        (wrong.status, wrong.code().as_str()),
        (502, "MANIFEST_INVALID")
    );
}

#[tokio::test]
async fn an_encoded_answer_is_refused() {
    let registry = TestRegistry::start(|seen| {
        say(
            seen,
            200,
            &[("Content-Encoding", "gzip")],
            b"not what was asked for",
        )
    })
    .await;
    let node = Node::passing_through(&registry).await;
    assert_eq!(node.get("/v2/a/b/manifests/v1").await.status, 502);
    let blob = format!("/v2/a/b/blobs/{}", sha256(b"x"));
    assert_eq!(node.get(&blob).await.status, 502);
}

#[tokio::test]
async fn long_heads_are_taken_up_to_the_bound() {
    let (image, _registry, node) = image_node(10_000).await;
    node.commit(&image.blob);
    let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
    let ranges: Vec<String> = (0..1024)
        .map(|n| format!("{}-{}", 1_000_000_000 + n, 1_000_000_000 + n))
        .collect();
    let ranges = format!("bytes={}", ranges.join(","));
    assert!(ranges.len() > 20_000);
    assert_eq!(
        node.ask("GET", &target, &[("Range", &ranges)]).await.status,
        416
    );
    let mut client = Client::to(node.address).await;
    client
        .send("GET", &target, &[("X", &"x".repeat(70_000))])
        .await;
    assert_eq!(client.receive("HEAD").await.status, 431);
}

#[tokio::test]
async fn a_request_that_comes_too_slowly_is_cut_off() {
    let (_image, _registry, node) = image_node(10).await;
    let mut client = Client::to(node.address).await;
    let start = Instant::now();
    client.socket.write_all(b"GET /v2/ HT").await.unwrap();
    while client.more().await {}
    assert!(start.elapsed() > Duration::from_secs(8) && start.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn stopping_ends_idle_connections_at_once_and_bodies_after_the_drain() {
    let (image, _registry, mut node) = image_node(60_000_000).await;
    node.commit(&image.blob);
    let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
    let (mut idle, mut slow, mut fast) = (
        Client::to(node.address).await,
        Client::to(node.address).await,
        Client::to(node.address).await,
    );
    assert_eq!(idle.ask("GET", "/v2/", &[]).await.status, 200);
    slow.send("GET", &target, &[]).await;
    fast.send("GET", &target, &[]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let start = Instant::now();
    node.stop.cancel();
    assert!(!idle.more().await, "the idle one ends");
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(
        TcpStream::connect(node.address).await.is_err(),
        "nobody new is let in"
    );
    let got = fast.receive("GET").await;
    assert!(got.complete && got.body == image.blob, "a body may go on");
    tokio::time::timeout(Duration::from_secs(10), &mut node.served)
        .await
        .unwrap()
        .unwrap();
    let got = slow.receive("GET").await;
    assert!(
        !got.complete && got.body == image.blob[..got.body.len()],
        "one that does not end is cut, without a reset"
    );
}

#[tokio::test]
async fn tls_is_spoken_with_clients_that_want_it_without_alpn_or_a_name() {
    let (image, _registry, node) = image_node(3_000_000).await;
    node.commit(&image.blob);
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".into()]).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let mut settings = (**node.live.load()).clone();
    settings.tls = Some(tls::server_config(vec![made.cert.der().clone()], key).unwrap());
    node.live.store(Arc::new(settings));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let client = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        let socket = TcpStream::connect(node.address).await.unwrap();
        let name = rustls_pki_types::ServerName::try_from("127.0.0.1").unwrap();
        let mut tls = tokio_rustls::TlsConnector::from(Arc::new(client))
            .connect(name, socket)
            .await
            .unwrap();
        let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
        let request = format!("GET {target} HTTP/1.1\r\nHost: mirror\r\nConnection: close\r\n\r\n");
        tls.write_all(request.as_bytes()).await.unwrap();
        // A slow start: more waits to be sent than TLS keeps.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut heard = Vec::new();
        tls.read_to_end(&mut heard)
            .await
            .expect("TLS is ended as it should be");
        assert!(heard.starts_with(b"HTTP/1.1 200"));
        assert!(heard.ends_with(&image.blob));
    }
    // The same port, without TLS.
    assert_eq!(node.get("/v2/").await.status, 200);
}

#[tokio::test]
async fn requests_are_counted_by_kind_and_status() {
    let (image, _registry, node) = image_node(1000).await;
    node.commit(&image.blob);
    node.get(&format!("/v2/a/b/blobs/{}", image.blob_digest()))
        .await;
    node.get("/v2/").await;
    node.get("/nothing").await;
    let page = node.mirror.metrics().encode();
    for (kind, code) in [("blob", 200), ("ping", 200), ("other", 404)] {
        let line = format!("hawker_requests_total{{kind=\"{kind}\",code=\"{code}\"}} 1");
        assert!(page.contains(&line), "{line} in\n{page}");
    }
}
