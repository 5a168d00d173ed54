//! Tags: asked of the origin by HEAD, read from it once, and what happens when it can't be asked.

use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};

use super::*;
use crate::settings::Staleness;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A registry with one tag, which moves through `states`; a client that accepts no index gets the manifest in its
/// place.
#[derive(Clone)]
struct Moving {
    states: [&'static str; 2],
    at: Arc<AtomicUsize>,
    /// The status of every answer; 0: no such status.
    failing: Arc<AtomicU16>,
    digests: bool,
}

impl Moving {
    fn new() -> Self {
        let states = ["{\"manifests\":[]}", "{\"manifests\":[{}]}"];
        Self {
            states,
            at: Arc::default(),
            failing: Arc::default(),
            digests: true,
        }
    }

    fn reply(&self, seen: &Seen) -> Reply {
        match self.failing.load(Ordering::Relaxed) {
            0 => {}
            429 => return say(seen, 429, &[("Retry-After", "1")], b""),
            status => return say(seen, status, &[], b""),
        }
        let private = seen.target.starts_with("/v2/private/");
        if private && seen.header("authorization") != Some("Bearer good") {
            return say(seen, 401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b"");
        }
        let (now, plain) = (
            self.states[self.at.load(Ordering::Relaxed)],
            "{\"layers\":[]}",
        );
        let index = seen
            .header("accept")
            .is_some_and(|accept| accept.contains("index"));
        let named = [now, plain]
            .into_iter()
            .find(|b| seen.target.ends_with(&sha256(b.as_bytes()).hex()));
        let body = named.unwrap_or(if index { now } else { plain });
        let media_type = if body == plain { MANIFEST } else { INDEX };
        let digest = sha256(body.as_bytes()).to_string();
        let etag = format!("\"{digest}\"");
        if seen.header("if-none-match") == Some(&etag) {
            return say(seen, 304, &[("Etag", &etag)], b"");
        }
        let mut headers = vec![("Content-Type", media_type), ("Etag", &etag)];
        if self.digests {
            headers.push(("Docker-Content-Digest", &digest));
        }
        say(seen, 200, &headers, body.as_bytes())
    }

    async fn start(&self) -> (TestRegistry, Node) {
        let replies = self.clone();
        let registry = TestRegistry::start(move |seen| replies.reply(seen)).await;
        let node = Node::before(&registry).await;
        (registry, node)
    }
}

fn set_staleness(node: &Node, tags_ms: Option<u64>, public_grace: Duration) {
    let mut settings = (**node.live.load()).clone();
    settings.staleness = Staleness {
        tags: tags_ms.map(Duration::from_millis),
        public_grace,
    };
    node.live.store(Arc::new(settings));
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const TAG: &str = "/v2/a/b/manifests/v1";
const WANTS_INDEX: (&str, &str) = ("Accept", INDEX);

#[tokio::test]
async fn a_tag_is_revalidated_by_head_and_read_once_as_long_as_it_does_not_move() {
    for digests in [true, false] {
        let moving = Moving {
            digests,
            ..Moving::new()
        };
        let (registry, node) = moving.start().await;
        // A registry that does not say which digest a tag has is read again when the tag has moved back.
        for (state, gets) in [
            (0, 1),
            (0, 1),
            (0, 1),
            (1, 2),
            (1, 2),
            (0, if digests { 2 } else { 3 }),
        ] {
            moving.at.store(state, Ordering::Relaxed);
            let got = node.ask("GET", TAG, &[WANTS_INDEX]).await;
            assert_eq!(
                (got.status, got.body.as_slice()),
                (200, moving.states[state].as_bytes())
            );
            let digest = sha256(&got.body).to_string();
            assert_eq!(
                (
                    got.header("content-type"),
                    got.header("docker-content-digest")
                ),
                (INDEX, &*digest)
            );
            assert_eq!(registry.count("GET", "/v2/"), gets, "{digests} {state}");
        }
        let (got, head) = (
            node.ask("GET", TAG, &[WANTS_INDEX]).await,
            node.ask("HEAD", TAG, &[WANTS_INDEX]).await,
        );
        for name in [
            "content-type",
            "content-length",
            "docker-content-digest",
            "etag",
        ] {
            assert_eq!(head.header(name), got.header(name), "{name}");
        }
    }
}

#[tokio::test]
async fn a_tag_is_kept_apart_by_what_is_accepted_however_that_is_said() {
    let moving = Moving::new();
    let (registry, node) = moving.start().await;
    let index = moving.states[0].as_bytes();
    for (accept, expected) in [
        (&[("Accept", INDEX)][..], index),
        (&[("Accept", MANIFEST)], b"{\"layers\":[]}"),
        (&[("Accept", MANIFEST), ("Accept", INDEX)], index),
        (
            &[("Accept", &*format!("{INDEX};q=1.0 , {MANIFEST}"))],
            index,
        ),
        (&[("Accept", INDEX)], index),
        (&[("Accept", MANIFEST)], b"{\"layers\":[]}"),
    ] {
        assert_eq!(
            node.ask("GET", TAG, accept).await.body,
            expected,
            "{accept:?}"
        );
    }
    let conditions = registry
        .seen()
        .into_iter()
        .filter(|seen| seen.method == "HEAD");
    let conditions: Vec<bool> = conditions
        .map(|seen| seen.header("if-none-match").is_some())
        .collect();
    assert_eq!(
        conditions,
        [false, false, false, true, true, true],
        "what was answered before is known"
    );
    assert_eq!(registry.count("GET", "/v2/"), 2);
}

#[tokio::test]
async fn a_client_that_has_it_gets_304_and_no_other_client_does() {
    let moving = Moving::new();
    let (registry, node) = moving.start().await;
    let has = format!("\"{}\"", sha256(moving.states[0].as_bytes()));
    for _ in 0..2 {
        for method in ["GET", "HEAD"] {
            let got = node
                .ask(method, TAG, &[WANTS_INDEX, ("If-None-Match", &has)])
                .await;
            assert_eq!((got.status, got.body.len()), (304, 0));
            let other = node
                .ask(method, TAG, &[WANTS_INDEX, ("If-None-Match", "\"x\"")])
                .await;
            assert_eq!((other.status, other.header("etag")), (200, has.as_str()));
            assert_eq!(node.ask(method, TAG, &[WANTS_INDEX]).await.status, 200);
        }
    }
    assert_eq!(registry.count("GET", "/v2/"), 1);
}

#[tokio::test]
async fn a_stale_tag_is_served_within_its_bound_and_marked_and_not_unless_told() {
    let moving = Moving::new();
    let (registry, node) = moving.start().await;
    assert_eq!(node.ask("GET", TAG, &[WANTS_INDEX]).await.status, 200);
    for status in [500, 503, 429] {
        moving.failing.store(status, Ordering::Relaxed);
        let refused = node.ask("GET", TAG, &[WANTS_INDEX]).await;
        assert_eq!(
            (refused.status, refused.header("warning")),
            (status, ""),
            "off by default"
        );
        set_staleness(&node, Some(60_000), DAY);
        for method in ["GET", "HEAD"] {
            let got = node.ask(method, TAG, &[WANTS_INDEX]).await;
            assert_eq!(
                (got.status, got.header("warning")),
                (200, "110 - \"Response is Stale\""),
                "{status}"
            );
            assert_eq!(
                got.header("content-length"),
                moving.states[0].len().to_string()
            );
            assert!(method == "HEAD" || got.body == moving.states[0].as_bytes());
        }
        assert_eq!(
            node.get(TAG).await.status,
            status,
            "nobody asked for it with that Accept"
        );
        set_staleness(&node, None, DAY);
    }
    drop(registry);
    tokio::time::sleep(Duration::from_millis(50)).await;
    set_staleness(&node, Some(2_000), DAY);
    moving.failing.store(0, Ordering::Relaxed);
    let page = node.mirror.metrics().encode();
    assert!(page.contains("hawker_tags_stale_total 6"), "{page}");
    tokio::time::sleep(Duration::from_millis(2_000)).await;
    assert!(
        node.ask("GET", TAG, &[WANTS_INDEX]).await.status >= 429,
        "older than it may be"
    );
    set_staleness(&node, Some(60_000), Duration::ZERO);
    let default = node.live.load().registries.default.clone().unwrap();
    let source = Source {
        registry: default,
        repository: "a/b".into(),
    };
    let long_ago = Instant::now()
        .checked_sub(Duration::from_secs(600))
        .unwrap();
    node.mirror.inner.access.readable(
        access::Caller::Anybody,
        &source,
        Duration::ZERO,
        None,
        long_ago,
    );
    assert!(
        node.ask("GET", TAG, &[WANTS_INDEX]).await.status >= 429,
        "nobody may read it any more"
    );
}

#[tokio::test]
async fn a_stale_tag_of_a_private_repository_ends_with_its_readers_right() {
    let moving = Moving::new();
    let (registry, node) = moving.start().await;
    set_staleness(&node, Some(60_000), DAY);
    let target = "/v2/private/manifests/v1";
    let good = [WANTS_INDEX, ("Authorization", "Bearer good")];
    assert_eq!(node.ask("GET", target, &good).await.status, 200);
    moving.failing.store(503, Ordering::Relaxed);
    assert_eq!(
        node.ask("GET", target, &good).await.header("warning"),
        "110 - \"Response is Stale\""
    );
    for others in [
        &[WANTS_INDEX][..],
        &[WANTS_INDEX, ("Authorization", "Bearer bad")],
    ] {
        assert_eq!(node.ask("GET", target, others).await.status, 503);
    }
    let header = HeaderMap::from_iter([(
        http::header::AUTHORIZATION,
        HeaderValue::from_static("Bearer good"),
    )]);
    let grant = Grant {
        source: registry.source("private"),
        authorization: Authorization::of(&header),
    };
    let long_ago = Instant::now()
        .checked_sub(Duration::from_secs(600))
        .unwrap();
    let (caller, life) = (access::Caller::of(&grant), Duration::from_secs(60));
    node.mirror
        .inner
        .access
        .refused(caller, &grant.source, Instant::now());
    node.mirror
        .inner
        .access
        .readable(caller, &grant.source, life, None, long_ago);
    assert_eq!(
        node.ask("GET", target, &good).await.status,
        503,
        "its right has ended"
    );
}

#[tokio::test]
async fn a_tag_that_is_gone_or_forbidden_is_not_served_stale() {
    let moving = Moving::new();
    let (_registry, node) = moving.start().await;
    set_staleness(&node, Some(60_000), DAY);
    for status in [403, 404] {
        moving.failing.store(0, Ordering::Relaxed);
        assert_eq!(node.ask("GET", TAG, &[WANTS_INDEX]).await.status, 200);
        moving.failing.store(status, Ordering::Relaxed);
        assert_eq!(node.ask("GET", TAG, &[WANTS_INDEX]).await.status, status);
        moving.failing.store(500, Ordering::Relaxed);
        assert_eq!(
            node.ask("GET", TAG, &[WANTS_INDEX]).await.status,
            500,
            "after {status}"
        );
    }
}

#[tokio::test]
async fn a_registry_that_knows_no_head_is_asked_by_get() {
    let registry = TestRegistry::start(|seen| match seen.method.as_str() {
        "HEAD" => say(seen, 405, &[], b""),
        _ => say(seen, 200, &[("Content-Type", MANIFEST)], b"{}"),
    })
    .await;
    let node = Node::before(&registry).await;
    assert_eq!(node.get(TAG).await.body, b"{}");
    assert_eq!(node.ask("HEAD", TAG, &[]).await.status, 200);
}
