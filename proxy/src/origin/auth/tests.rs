use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use arc_swap::ArcSwap;
use hawker_oci::reference::Source;

use super::*;
use crate::origin::testing::{Reply, Seen, TestRegistry, knowing, origin, say};
use crate::origin::{Origin, Target};
use crate::settings::CredentialSource;
use hawker_credentials::Secret;

const SECRET: &str = "hunter2";

/// A registry that opens to `Bearer good`, with or without digits behind it, and challenges all others.
async fn registry(challenge: String) -> TestRegistry {
    TestRegistry::start(move |seen| match seen.header("authorization") {
        Some(shown) if shown.starts_with("Bearer good") => say(seen, 200, &[], b"content"),
        _ => say(
            seen,
            401,
            &[("WWW-Authenticate", &challenge)],
            b"{\"errors\":[]}",
        ),
    })
    .await
}

fn challenge(realm: &TestRegistry) -> String {
    format!(
        "Bearer realm=\"http://{}/token?x=y\",service=\"the registry\"",
        realm.address
    )
}

/// A realm that gives `answer` to everybody.
async fn realm(answer: &'static str) -> TestRegistry {
    TestRegistry::start(move |seen| say(seen, 200, &[], answer.as_bytes())).await
}

fn manifest(registry: &TestRegistry, repository: &str) -> Target {
    Target {
        source: registry.source(repository),
        content: Content::Manifest("v1".into()),
    }
}

async fn head(origin: &Origin, registry: &TestRegistry, repository: &str) -> Response<()> {
    origin
        .head(&manifest(registry, repository), &HeaderMap::new())
        .await
        .unwrap()
}

/// Settings with credentials `user:hunter2` (or others) for `registry`, in this mode.
fn with_credentials(
    registry: &TestRegistry,
    mode: AuthorizationMode,
    entry: &serde_json::Value,
) -> (Arc<ArcSwap<LiveSettings>>, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.json");
    let config = serde_json::json!({ "auths": { registry.name(): entry } });
    std::fs::write(&file, config.to_string()).unwrap();
    let live = knowing(&[registry]);
    let mut settings = (**live.load()).clone();
    settings.credentials = vec![CredentialSource::Docker(file)];
    settings
        .registries
        .known
        .get_mut(&registry.name())
        .unwrap()
        .authorization = Some(mode);
    live.store(Arc::new(settings));
    (live, folder)
}

fn user() -> serde_json::Value {
    serde_json::json!({ "username": "user", "password": SECRET })
}

fn basic() -> String {
    let credential = Credential::Password {
        user: "user".into(),
        password: Secret::new(SECRET),
    };
    credential.to_basic().unwrap().to_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_anonymous_token_is_got_once_for_all_and_kept_for_its_repository() {
    let realm = realm(r#"{"token":"good","expires_in":300}"#).await;
    let registry = registry(challenge(&realm)).await;
    let origin = origin(&knowing(&[&registry]));
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (origin, target) = (origin.clone(), manifest(&registry, "a/b"));
        all.spawn(async move {
            origin
                .head(&target, &HeaderMap::new())
                .await
                .unwrap()
                .status()
        });
    }
    assert!(all.join_all().await.iter().all(|status| *status == 200));
    assert_eq!(realm.seen().len(), 1);
    let asked = &realm.seen()[0];
    assert!(asked.target.starts_with("/token?x=y&"), "{}", asked.target);
    assert_eq!(asked.values("service"), ["the registry"]);
    assert_eq!(
        asked.values("scope"),
        ["repository:a/b:pull"],
        "merged in: the challenge leaves it out"
    );
    assert_eq!(asked.header("authorization"), None);
    let before = registry.seen().len();
    let mut response = origin
        .get(&manifest(&registry, "a/b"), &HeaderMap::new())
        .await
        .unwrap();
    assert_eq!(
        response.body_mut().next().await.unwrap().unwrap(),
        "content"
    );
    assert_eq!(
        (registry.seen().len(), realm.seen().len()),
        (before + 1, 1),
        "no challenge any more"
    );
    assert_eq!(head(&origin, &registry, "c").await.status(), 200);
    assert_eq!(realm.seen()[1].values("scope"), ["repository:c:pull"]);
}

#[tokio::test]
async fn a_token_is_kept_no_longer_than_it_lives() {
    for (answer, lives) in [
        (r#"{"access_token":"good","expires_in":1}"#, false),
        // Nobody could use a token that lives for no time.
        (r#"{"access_token":"good","expires_in":0}"#, true),
        (r#"{"access_token":"good"}"#, true),
    ] {
        let realm = realm(answer).await;
        let registry = registry(challenge(&realm)).await;
        let origin = origin(&knowing(&[&registry]));
        assert_eq!(head(&origin, &registry, "a").await.status(), 200);
        tokio::time::sleep(Duration::from_millis(1100)).await;
        assert_eq!(head(&origin, &registry, "a").await.status(), 200);
        assert_eq!(realm.seen().len(), if lives { 1 } else { 2 }, "{answer}");
    }
}

#[tokio::test]
async fn a_token_that_the_registry_forgets_is_replaced_at_once() {
    let count = AtomicU32::new(0);
    let realm = TestRegistry::start(move |seen| {
        let answer = format!("{{\"token\":\"good{}\"}}", count.fetch_add(1, Relaxed));
        say(seen, 200, &[], answer.as_bytes())
    })
    .await;
    let challenge = challenge(&realm);
    let forgetful = AtomicU32::new(0);
    let registry = TestRegistry::start(move |seen| match seen.header("authorization") {
        Some("Bearer good0") if forgetful.fetch_add(1, Relaxed) == 0 => say(seen, 200, &[], b""),
        Some("Bearer good1") => say(seen, 200, &[], b""),
        _ => say(seen, 401, &[("WWW-Authenticate", &challenge)], b""),
    })
    .await;
    let origin = origin(&knowing(&[&registry]));
    for _ in 0..3 {
        assert_eq!(head(&origin, &registry, "a").await.status(), 200);
    }
    assert_eq!((realm.seen().len(), registry.seen().len()), (2, 5));
}

#[tokio::test]
async fn a_second_401_is_the_registrys_last_word_and_is_remembered() {
    let realm = realm(r#"{"token":"not-good-enough"}"#).await;
    let registry = registry(format!(
        "{},error=\"insufficient_scope\"",
        challenge(&realm)
    ))
    .await;
    let origin = origin(&knowing(&[&registry]));
    for asked in [2, 3, 4] {
        let refused = head(&origin, &registry, "a").await;
        assert_eq!(refused.status(), 401);
        let passed_on = refused.headers()[WWW_AUTHENTICATE].to_str().unwrap();
        assert_eq!(
            passed_on,
            challenge(&realm),
            "the client may know better, and has shown nothing yet"
        );
        assert_eq!((registry.seen().len(), realm.seen().len()), (asked, 1));
    }
}

#[tokio::test]
async fn a_realm_that_refuses_is_asked_again_later_and_the_challenge_goes_to_the_client() {
    let realm = TestRegistry::start(|seen| say(seen, 403, &[], b"{}")).await;
    let registry = registry(challenge(&realm)).await;
    let origin = origin(&knowing(&[&registry]));
    for _ in 0..3 {
        let refused = head(&origin, &registry, "a").await;
        assert_eq!(refused.status(), 401);
        assert_eq!(
            refused.headers()[WWW_AUTHENTICATE].to_str().unwrap(),
            challenge(&realm)
        );
    }
    assert_eq!(realm.seen().len(), 1);
}

#[tokio::test]
async fn a_realm_that_is_down_is_no_refusal() {
    for answer in [503, 200] {
        let realm = TestRegistry::start(move |seen| say(seen, answer, &[], b"<html>")).await;
        let registry = registry(challenge(&realm)).await;
        let failed = origin(&knowing(&[&registry]))
            .head(&manifest(&registry, "a"), &HeaderMap::new())
            .await;
        let told = failed.unwrap_err().to_string();
        assert!(told.contains("its realm 127.0.0.1"), "{told}");
    }
}

#[tokio::test]
async fn a_busy_realm_is_a_429_and_left_alone() {
    let realm = TestRegistry::start(|seen| say(seen, 429, &[("Retry-After", "30")], b"")).await;
    let registry = registry(challenge(&realm)).await;
    let origin = origin(&knowing(&[&registry]));
    for _ in 0..3 {
        let answer = head(&origin, &registry, "a").await;
        assert_eq!(answer.status(), 429);
        assert!(answer.headers().contains_key(RETRY_AFTER));
    }
    assert_eq!((registry.seen().len(), realm.seen().len()), (1, 1));
}

/// A realm that knows the user: by GET, by OAuth2's password grant, or by its refresh token.
fn knows_user(seen: &Seen, by_get: bool) -> Reply {
    let token = r#"{"token":"good"}"#.as_bytes();
    let grant = |name: &str| seen.values(name).concat();
    match seen.method.as_str() {
        "GET" if by_get && seen.header("authorization") == Some(basic().as_str()) => {
            say(seen, 200, &[], token)
        }
        "GET" if by_get => say(seen, 401, &[], b"{}"),
        "POST" if grant("grant_type") == "password" && grant("password") == SECRET => {
            say(seen, 200, &[], token)
        }
        "POST" if grant("grant_type") == "refresh_token" && grant("refresh_token") == SECRET => {
            say(seen, 200, &[], token)
        }
        _ => say(seen, 405, &[], b""),
    }
}

#[tokio::test]
async fn in_node_mode_credentials_buy_a_token_by_get_by_post_or_with_an_identity_token() {
    let identity = serde_json::json!({ "identitytoken": SECRET });
    for (entry, by_get, methods) in [
        (user(), true, &["GET"][..]),
        (user(), false, &["GET", "POST"]),
        (identity, true, &["POST"]),
    ] {
        let realm = TestRegistry::start(move |seen| knows_user(seen, by_get)).await;
        let registry = registry(challenge(&realm)).await;
        let (live, _folder) = with_credentials(&registry, AuthorizationMode::Node, &entry);
        let origin = origin(&live);
        let answer = head(&origin, &registry, "a").await;
        assert_eq!(answer.status(), 200, "{entry}");
        let by = answer
            .extensions()
            .get::<ByCredentials>()
            .expect("it took credentials");
        assert!(Arc::ptr_eq(&by.0, &live.load_full()));
        let seen = realm.seen();
        assert_eq!(
            seen.iter()
                .map(|seen| seen.method.as_str())
                .collect::<Vec<_>>(),
            methods
        );
        assert!(
            seen.iter().all(|seen| !seen.target.contains(SECRET)),
            "no secret in an address"
        );
        assert!(
            seen.iter()
                .all(|seen| seen.values("scope") == ["repository:a:pull"])
        );
        let shown = registry
            .seen()
            .into_iter()
            .filter_map(|seen| seen.header("authorization").map(str::to_owned));
        assert_eq!(
            shown.collect::<Vec<_>>(),
            ["Bearer good"],
            "the password stays away from the registry"
        );
    }
}

#[tokio::test]
async fn in_the_other_modes_a_request_without_authorization_is_anonymous() {
    for mode in [AuthorizationMode::Relay, AuthorizationMode::Token] {
        let realm = TestRegistry::start(|seen| knows_user(seen, true)).await;
        let registry = registry(challenge(&realm)).await;
        let (live, _folder) = with_credentials(&registry, mode, &user());
        assert_eq!(head(&origin(&live), &registry, "a").await.status(), 401);
        assert_eq!(realm.seen().len(), 1);
        assert_eq!(realm.seen()[0].header("authorization"), None);
    }
}

#[tokio::test]
async fn credentials_that_are_refused_do_not_stand_in_the_way_of_public_content() {
    let realm = TestRegistry::start(|seen| match seen.header("authorization") {
        Some(_) => say(seen, 401, &[], b""),
        None => say(seen, 200, &[], br#"{"token":"good"}"#),
    })
    .await;
    let registry = registry(challenge(&realm)).await;
    let (live, _folder) = with_credentials(&registry, AuthorizationMode::Node, &user());
    let answer = head(&origin(&live), &registry, "a").await;
    assert_eq!((answer.status().as_u16(), realm.seen().len()), (200, 2));
    assert!(
        answer.extensions().get::<ByCredentials>().is_none(),
        "anybody is let in"
    );
}

#[tokio::test]
async fn basic_is_answered_with_this_nodes_credentials_or_passed_on() {
    let registry = TestRegistry::start(|seen| match seen.header("authorization") {
        Some(shown) if shown == basic() => say(seen, 200, &[], b""),
        _ => say(
            seen,
            401,
            &[("WWW-Authenticate", "Basic realm=\"for people\"")],
            b"",
        ),
    })
    .await;
    let (live, _folder) = with_credentials(&registry, AuthorizationMode::Node, &user());
    let node = origin(&live);
    for _ in 0..3 {
        assert_eq!(head(&node, &registry, "a").await.status(), 200);
    }
    assert_eq!(registry.seen().len(), 4, "challenged once");
    let (live, _folder) = with_credentials(&registry, AuthorizationMode::Relay, &user());
    let refused = head(&origin(&live), &registry, "a").await;
    assert_eq!(
        refused.headers()[WWW_AUTHENTICATE],
        "Basic realm=\"for people\""
    );
}

/// A registry that opens only to this Authorization, answers others by `status`, and asks for Basic at `/v2/` alone.
async fn hiding(status: u16, good: String) -> TestRegistry {
    TestRegistry::start(
        move |seen| match (seen.header("authorization"), seen.target.as_str()) {
            (Some(shown), _) if shown == good => say(seen, 200, &[], b""),
            (_, "/v2/") => say(seen, 401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b""),
            _ => say(
                seen,
                status,
                &[("Content-Type", "text/html")],
                b"<html>no</html>",
            ),
        },
    )
    .await
}

#[tokio::test]
async fn content_that_is_hidden_without_a_challenge_is_opened_with_the_one_of_the_ping() {
    for status in [404, 403, 401] {
        let registry = hiding(status, basic()).await;
        let (live, _folder) = with_credentials(&registry, AuthorizationMode::Node, &user());
        let node = origin(&live);
        for _ in 0..3 {
            assert_eq!(head(&node, &registry, "a").await.status(), 200, "{status}");
        }
        assert_eq!(
            registry.seen().len(),
            5,
            "{status}: asked, pinged, and from then on let in"
        );
        let other = head(&node, &registry, "b").await;
        assert_eq!(
            (other.status().as_u16(), registry.seen().len()),
            (200, 7),
            "{status}: pinged once"
        );
        let (live, _folder) = with_credentials(&registry, AuthorizationMode::Relay, &user());
        let refused = head(&origin(&live), &registry, "a").await;
        assert_eq!(refused.status(), status, "credentials are for node mode");
        let challenged = refused
            .headers()
            .get(WWW_AUTHENTICATE)
            .map(HeaderValue::as_bytes);
        assert_eq!(
            challenged,
            (status == 401).then_some(b"Basic realm=\"r\"".as_slice()),
            "{status}"
        );
    }
}

#[tokio::test]
async fn ordinary_404s_and_403s_are_asked_for_once() {
    for status in [404, 403] {
        let registry = TestRegistry::start(move |seen| match seen.target.as_str() {
            "/v2/" => say(seen, 200, &[], b"{}"),
            _ => say(seen, status, &[], b"{}"),
        })
        .await;
        let (live, _folder) = with_credentials(&registry, AuthorizationMode::Node, &user());
        let node = origin(&live);
        for asked in [2, 3, 4] {
            assert_eq!(head(&node, &registry, "a").await.status(), status);
            assert_eq!(
                registry.seen().len(),
                asked,
                "{status}: `/v2/` is open, which is remembered"
            );
        }
        let relay = origin(&knowing(&[&registry]));
        assert_eq!(head(&relay, &registry, "a").await.status(), status);
        assert_eq!(registry.seen().len(), 5, "{status}");
    }
    // With credentials that open the repository, what it does not have is not asked for twice.
    let registry = TestRegistry::start(move |seen| {
        match (seen.header("authorization"), seen.target.as_str()) {
            (None, _) => say(seen, 401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b""),
            (_, target) if target.contains("gone") => say(seen, 404, &[], b""),
            _ => say(seen, 200, &[], b""),
        }
    })
    .await;
    let (live, _folder) = with_credentials(&registry, AuthorizationMode::Node, &user());
    let node = origin(&live);
    let gone = Target {
        source: registry.source("a"),
        content: Content::Manifest("gone".into()),
    };
    assert_eq!(head(&node, &registry, "a").await.status(), 200);
    for asked in [3, 4, 5] {
        assert_eq!(
            node.head(&gone, &HeaderMap::new()).await.unwrap().status(),
            404
        );
        assert_eq!(registry.seen().len(), asked);
    }
}

#[tokio::test]
async fn credentials_that_ran_out_are_read_again_however_the_registry_says_so() {
    for status in [401, 403, 404] {
        let good = Arc::new(Mutex::new(basic()));
        let now = Arc::clone(&good);
        let registry = TestRegistry::start(move |seen| match seen.header("authorization") {
            Some(shown) if shown == *now.lock().unwrap() => say(seen, 200, &[], b""),
            Some(_) => say(
                seen,
                status,
                &[("Content-Type", "text/html")],
                b"<html>expired</html>",
            ),
            None => say(seen, 401, &[("WWW-Authenticate", "Basic realm=\"r\"")], b""),
        })
        .await;
        let (live, folder) = with_credentials(&registry, AuthorizationMode::Node, &user());
        let node = origin(&live);
        assert_eq!(head(&node, &registry, "a").await.status(), 200);
        let fresh = Credential::Password {
            user: "user".into(),
            password: Secret::new("hunter3"),
        };
        *good.lock().unwrap() = fresh.to_basic().unwrap().to_str().unwrap().to_owned();
        assert_eq!(
            head(&node, &registry, "a").await.status(),
            status,
            "the node's are the old ones"
        );
        let asked = registry.seen().len();
        for _ in 0..5 {
            assert!(!head(&node, &registry, "a").await.status().is_success());
        }
        assert!(
            registry.seen().len() <= asked + 6,
            "{status}: no doubled requests"
        );
        let entry = serde_json::json!({ "username": "user", "password": "hunter3" });
        let config = serde_json::json!({ "auths": { registry.name(): entry } });
        std::fs::write(folder.path().join("new"), config.to_string()).unwrap();
        std::fs::rename(folder.path().join("new"), folder.path().join("config.json")).unwrap();
        let begun = Instant::now();
        while head(&node, &registry, "a").await.status() != 200 {
            assert!(
                begun.elapsed() < REFUSED + Duration::from_secs(2),
                "{status}"
            );
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
}

#[tokio::test]
async fn a_token_that_ran_out_is_replaced_where_the_registry_says_403() {
    let count = AtomicU32::new(0);
    let realm = TestRegistry::start(move |seen| {
        let answer = format!(
            "{{\"token\":\"good{}\",\"expires_in\":300}}",
            count.fetch_add(1, Relaxed)
        );
        say(seen, 200, &[], answer.as_bytes())
    })
    .await;
    let (challenge, over) = (challenge(&realm), Arc::new(AtomicU32::new(0)));
    let is_over = Arc::clone(&over);
    let registry = TestRegistry::start(move |seen| match seen.header("authorization") {
        Some("Bearer good0") if is_over.load(Relaxed) == 1 => say(seen, 403, &[], b"expired"),
        Some(_) if is_over.load(Relaxed) == 2 => say(seen, 403, &[], b"forbidden"),
        Some(_) => say(seen, 200, &[], b""),
        None => say(seen, 401, &[("WWW-Authenticate", &challenge)], b""),
    })
    .await;
    let node = origin(&knowing(&[&registry]));
    assert_eq!(head(&node, &registry, "a").await.status(), 200);
    over.store(1, Relaxed);
    assert_eq!(head(&node, &registry, "a").await.status(), 200);
    assert_eq!(realm.seen().len(), 2);
    over.store(2, Relaxed);
    for _ in 0..5 {
        assert_eq!(head(&node, &registry, "a").await.status(), 403);
    }
    assert_eq!(
        realm.seen().len(),
        2,
        "a 403 that stays one does not cost a token each time"
    );
}

#[tokio::test]
async fn a_new_token_that_is_not_valid_yet_is_shown_again() {
    let count = AtomicU32::new(0);
    let realm = TestRegistry::start(move |seen| {
        let answer = format!(
            "{{\"token\":\"good{}\",\"expires_in\":300}}",
            count.fetch_add(1, Relaxed)
        );
        say(seen, 200, &[], answer.as_bytes())
    })
    .await;
    let (challenge, begun) = (challenge(&realm), Instant::now());
    let registry = TestRegistry::start(move |seen| match seen.header("authorization") {
        Some("Bearer good0") if begun.elapsed() > Duration::from_millis(1500) => {
            say(seen, 200, &[], b"")
        }
        _ => say(seen, 401, &[("WWW-Authenticate", &challenge)], b""),
    })
    .await;
    let node = origin(&knowing(&[&registry]));
    for _ in 0..5 {
        assert_eq!(head(&node, &registry, "a").await.status(), 401);
    }
    assert_eq!((registry.seen().len(), realm.seen().len()), (6, 1));
    tokio::time::sleep(Duration::from_millis(1600)).await;
    assert_eq!(head(&node, &registry, "a").await.status(), 200);
    assert_eq!(realm.seen().len(), 1);
}

#[tokio::test]
async fn realms_may_be_named_by_path_and_redirect_on_their_own_host() {
    let registry =
        TestRegistry::start(
            |seen| match (seen.method.as_str(), seen.header("authorization")) {
                (_, Some("Bearer good")) => say(seen, 200, &[], b""),
                ("POST", _) if seen.target.starts_with("/token") => {
                    say(seen, 307, &[("Location", "/moved")], b"")
                }
                ("POST", _) if seen.values("refresh_token") == [SECRET] => {
                    say(seen, 201, &[], br#"{"access_token":"good"}"#)
                }
                (_, Some(shown)) if seen.target.starts_with("/moved") && shown == basic() => say(
                    seen,
                    200,
                    &[],
                    br#"{"token":"","access_token":"good","issued_at":"2999-01-01T00:00:00Z"}"#,
                ),
                _ if seen.target.starts_with("/token") => {
                    say(seen, 302, &[("Location", "/moved?a=b")], b"")
                }
                _ => say(
                    seen,
                    401,
                    &[(
                        "WWW-Authenticate",
                        "Negotiate, Bearer realm=\"/token?x=y\",service=\"s\"",
                    )],
                    b"",
                ),
            },
        )
        .await;
    let identity = serde_json::json!({ "identitytoken": SECRET });
    for entry in [user(), identity] {
        let (live, _folder) = with_credentials(&registry, AuthorizationMode::Node, &entry);
        assert_eq!(
            head(&origin(&live), &registry, "a").await.status(),
            200,
            "{entry}"
        );
    }
    let relay = origin(&knowing(&[&registry]));
    let sent = HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static("Bearer bad"))]);
    let refused = relay.head(&manifest(&registry, "a"), &sent).await.unwrap();
    let realm = format!(
        "Bearer realm=\"http://{}/token?x=y\",service=\"s\"",
        registry.address
    );
    assert_eq!(
        refused.headers()[WWW_AUTHENTICATE],
        realm,
        "clients want a whole address"
    );
}

#[tokio::test]
async fn at_a_project_endpoint_tokens_are_for_the_repository_in_the_project() {
    let realm = realm(r#"{"token":"good"}"#).await;
    let registry = registry(challenge(&realm)).await;
    let live = knowing(&[&registry]);
    let mut settings = (**live.load()).clone();
    let known = settings.registries.known.get_mut(&registry.name()).unwrap();
    known.endpoints = vec![
        format!("http://{}/v2/project", registry.address)
            .parse()
            .unwrap(),
    ];
    live.store(Arc::new(settings));
    assert_eq!(head(&origin(&live), &registry, "a/b").await.status(), 200);
    assert_eq!(registry.seen()[0].target, "/v2/project/a/b/manifests/v1");
    assert_eq!(
        realm.seen()[0].values("scope"),
        ["repository:project/a/b:pull"]
    );
}

#[tokio::test]
async fn credentials_go_to_the_registry_itself_and_to_no_mirror_of_it() {
    let realm = TestRegistry::start(|seen| knows_user(seen, true)).await;
    let mirror = registry(challenge(&realm)).await;
    let registry = registry(challenge(&realm)).await;
    let (live, _folder) = with_credentials(&registry, AuthorizationMode::Node, &user());
    let mut settings = (**live.load()).clone();
    let known = settings.registries.known.get_mut(&registry.name()).unwrap();
    known
        .endpoints
        .insert(0, format!("http://{}", mirror.address).parse().unwrap());
    live.store(Arc::new(settings));
    assert_eq!(head(&origin(&live), &registry, "a").await.status(), 200);
    let shown: Vec<_> = realm
        .seen()
        .iter()
        .map(|seen| seen.header("authorization").is_some())
        .collect();
    assert_eq!(
        shown,
        [false, true],
        "for the mirror's challenge, for the registry's"
    );
    assert!(
        mirror
            .seen()
            .iter()
            .all(|seen| seen.header("authorization").is_none())
    );
}

#[tokio::test]
async fn a_foreign_realm_is_neither_asked_nor_passed_on_unless_it_is_listed() {
    let realm = realm(r#"{"token":"good"}"#).await;
    let there = format!("http://localhost:{}/token", realm.address.port());
    let registry = registry(format!("Bearer realm=\"{there}\", Basic realm=\"x\"")).await;
    let live = knowing(&[&registry]);
    let refused = head(&origin(&live), &registry, "a").await;
    assert_eq!(refused.status(), 401);
    assert_eq!(
        refused
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .collect::<Vec<_>>(),
        ["Basic realm=\"x\""]
    );
    let sent = HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static("Bearer bad"))]);
    let refused = origin(&live)
        .head(&manifest(&registry, "a"), &sent)
        .await
        .unwrap();
    assert_eq!(
        refused.headers().get_all(WWW_AUTHENTICATE).iter().count(),
        1
    );
    assert!(realm.seen().is_empty());
    let mut settings = (**live.load()).clone();
    settings
        .registries
        .known
        .get_mut(&registry.name())
        .unwrap()
        .realms = vec![there.parse().unwrap()];
    live.store(Arc::new(settings));
    assert_eq!(head(&origin(&live), &registry, "a").await.status(), 200);
}

#[tokio::test]
async fn new_settings_begin_with_no_rights() {
    let realm = realm(r#"{"token":"good"}"#).await;
    let registry = registry(challenge(&realm)).await;
    let live = knowing(&[&registry]);
    let origin = origin(&live);
    for expected in [1, 2] {
        assert_eq!(head(&origin, &registry, "a").await.status(), 200);
        assert_eq!(realm.seen().len(), expected);
        live.store(Arc::new((**live.load()).clone()));
    }
}

async fn exchange(registry: &TestRegistry, password: &str) -> Exchanged {
    let credential = Credential::Password {
        user: "user".into(),
        password: Secret::new(password),
    };
    let source = Source {
        registry: registry.name(),
        repository: "a".into(),
    };
    origin(&knowing(&[registry]))
        .exchange(&source, &credential)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_clients_password_is_exchanged_at_the_realm() {
    let realm = TestRegistry::start(|seen| knows_user(seen, true)).await;
    let registry = registry(challenge(&realm)).await;
    let Exchanged::Granted(granted) = exchange(&registry, SECRET).await else {
        panic!("not granted")
    };
    assert_eq!(granted.authorization, "Bearer good");
    assert!(
        (50..=60).contains(&granted.life.as_secs()),
        "{:?}",
        granted.life
    );
    assert!(!format!("{granted:?}").contains("good"));
    assert_eq!(realm.seen()[0].values("scope"), ["repository:a:pull"]);
    assert!(matches!(
        exchange(&registry, "wrong").await,
        Exchanged::Refused(StatusCode::UNAUTHORIZED)
    ));
    assert!(
        registry
            .seen()
            .iter()
            .all(|seen| seen.header("authorization").is_none())
    );
}

#[tokio::test]
async fn a_clients_password_is_tried_where_the_registry_wants_it_itself() {
    let registry = TestRegistry::start(|seen| match seen.header("authorization") {
        Some(shown) if shown == basic() => say(seen, 200, &[], b""),
        _ => say(seen, 401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b""),
    })
    .await;
    let Exchanged::Granted(granted) = exchange(&registry, SECRET).await else {
        panic!("not granted")
    };
    assert_eq!(granted.authorization, basic());
    assert!(matches!(
        exchange(&registry, "wrong").await,
        Exchanged::Refused(StatusCode::UNAUTHORIZED)
    ));
    let open = TestRegistry::start(|seen| say(seen, 200, &[], b"{}")).await;
    assert!(matches!(exchange(&open, SECRET).await, Exchanged::Open));
    assert_eq!(open.seen()[0].header("authorization"), None);
}

#[tokio::test]
async fn two_names_of_one_endpoint_share_no_rights() {
    let registry = TestRegistry::start(|seen| match seen.header("authorization") {
        Some(shown) if shown == basic() => say(seen, 200, &[], b"content"),
        _ => say(
            seen,
            401,
            &[("WWW-Authenticate", "Basic realm=\"r\"")],
            b"{}",
        ),
    })
    .await;
    let (live, _folder) = with_credentials(&registry, AuthorizationMode::Node, &user());
    let mut settings = (**live.load()).clone();
    let mut other = settings.registries.known[&registry.name()].clone();
    other.authorization = Some(AuthorizationMode::Relay);
    settings
        .registries
        .known
        .insert("other.example".into(), other);
    live.store(Arc::new(settings));
    let origin = origin(&live);
    assert_eq!(head(&origin, &registry, "a").await.status(), 200);
    let source = Source {
        registry: "other.example".into(),
        repository: "a".into(),
    };
    let target = Target {
        source,
        content: Content::Manifest("v1".into()),
    };
    assert_eq!(
        origin
            .head(&target, &HeaderMap::new())
            .await
            .unwrap()
            .status(),
        401
    );
}
