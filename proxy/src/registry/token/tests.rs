use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::super::tests::{Client, Got, Node};
use super::*;
use crate::origin::testing::{Reply, Seen, TestRegistry, say};

const SECRET: &str = "hunter2";

fn basic(password: &str) -> String {
    let credential = Credential::Password {
        user: "user".into(),
        password: Secret::new(password),
    };
    credential.to_basic().unwrap().to_str().unwrap().to_owned()
}

/// A registry with a realm of its own. Its repository `private` is for the user; `a/b` is for anybody with a token.
fn reply(seen: &Seen) -> Reply {
    let host = seen.header("host").unwrap();
    let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"r\"");
    let shown = seen.header("authorization").unwrap_or_default();
    let path = seen.target.split('?').next().unwrap_or_default();
    let scope = seen.values("scope").concat();
    match path {
        "/token" if shown == basic(SECRET) => say(
            seen,
            200,
            &[],
            format!("{{\"token\":\"for:{scope}\",\"expires_in\":300}}").as_bytes(),
        ),
        "/token" if shown.is_empty() => say(seen, 200, &[], br#"{"token":"for:anybody"}"#),
        "/token" => say(seen, 401, &[], b"{}"),
        "/v2/a/b/tags/list" if shown.starts_with("Bearer for:") => say(seen, 200, &[], b"public"),
        "/v2/private/tags/list" if shown == "Bearer for:repository:private:pull" => {
            say(seen, 200, &[], b"private")
        }
        _ => say(seen, 401, &[("WWW-Authenticate", &challenge)], b"{}"),
    }
}

async fn world(mode: AuthorizationMode) -> (TestRegistry, Node) {
    let registry = TestRegistry::start(reply).await;
    let node = Node::before(&registry).await;
    set(&node, mode);
    (registry, node)
}

fn set(node: &Node, mode: AuthorizationMode) {
    let mut settings = (**node.live.load()).clone();
    settings.registries.authorization = mode;
    node.live.store(Arc::new(settings));
}

/// The token in an answer.
fn token(got: &Got) -> String {
    assert_eq!(got.status, 200, "{got:?}");
    let answer: serde_json::Value = serde_json::from_slice(&got.body).unwrap();
    assert_eq!(answer["token"], answer["access_token"]);
    assert!(answer["expires_in"].as_u64().unwrap() > 0);
    assert_eq!(
        answer["issued_at"].as_str().unwrap().len(),
        "2026-11-25T08:30:00Z".len()
    );
    format!("Bearer {}", answer["token"].as_str().unwrap())
}

async fn buy(node: &Node, query: &str, authorization: Option<&str>) -> Got {
    let headers: Vec<_> = authorization
        .map(|value| ("Authorization", value))
        .into_iter()
        .collect();
    node.ask("GET", &format!("{PATH}?{query}"), &headers).await
}

async fn get(node: &Node, target: &str, authorization: &str) -> Got {
    node.ask("GET", target, &[("Authorization", authorization)])
        .await
}

async fn post(node: &Node, form: &str) -> Got {
    let mut client = Client::to(node.address).await;
    let length = form.len().to_string();
    client
        .send("POST", PATH, &[("Content-Length", &length)])
        .await;
    client.socket.write_all(form.as_bytes()).await.unwrap();
    client.receive("POST").await
}

#[tokio::test]
async fn whoever_has_no_token_is_sent_to_the_mirrors_own_realm() {
    let (registry, node) = world(AuthorizationMode::Token).await;
    let named = format!("/v2/?ns={}", registry.name());
    let content = "/v2/private/tags/list";
    let path_form = format!("/v2/{}/private/tags/list", registry.name());
    let (own, there) = (
        "service=\"hawker mirror\"",
        format!("service=\"{}\"", registry.name()),
    );
    let scope = ",scope=\"repository:private:pull\"";
    for (target, expected) in [
        ("/v2/", own.to_owned()),
        (&named, there.clone()),
        (content, format!("{own}{scope}")),
        (&path_form, format!("{there}{scope}")),
    ] {
        for authorization in [None, Some("Bearer from-elsewhere"), Some(&*basic(SECRET))] {
            let headers: Vec<_> = authorization
                .map(|value| ("Authorization", value))
                .into_iter()
                .collect();
            let got = node.ask("GET", target, &headers).await;
            let challenge = format!("Bearer realm=\"http://mirror{PATH}\",{expected}");
            assert_eq!(
                (got.status, got.header("www-authenticate")),
                (401, &*challenge),
                "{target}"
            );
        }
        let got = node
            .ask("GET", target, &[("Authorization", "Bearer hawker-unknown")])
            .await;
        assert!(
            got.header("www-authenticate")
                .ends_with(",error=\"invalid_token\"")
        );
    }
    assert!(
        registry.seen().is_empty(),
        "the registry hears nothing of it"
    );
}

#[tokio::test]
async fn a_token_got_with_a_password_opens_its_repository_and_no_other() {
    let (registry, node) = world(AuthorizationMode::Token).await;
    for name in ["private".to_owned(), format!("{}/private", registry.name())] {
        let query = format!("service=hawker+mirror&scope=repository:{name}:pull");
        let token = token(&buy(&node, &query, Some(&basic(SECRET))).await);
        assert_eq!(
            get(&node, "/v2/private/tags/list", &token).await.body,
            b"private"
        );
        assert_eq!(get(&node, "/v2/", &token).await.status, 200);
        let other = get(&node, "/v2/a/b/tags/list", &token).await;
        assert_eq!(other.status, 401);
        assert!(
            other
                .header("www-authenticate")
                .contains("scope=\"repository:a/b:pull\"")
        );
    }
    let seen = registry.seen();
    assert!(seen.iter().all(|s| {
        !s.header("authorization")
            .unwrap_or_default()
            .contains(PREFIX)
    }));
    let shown = |s: &&Seen| s.header("authorization") == Some(&*basic(SECRET));
    assert!(
        seen.iter()
            .filter(shown)
            .all(|s| s.target.starts_with("/token?")),
        "only its realm gets it"
    );
}

#[tokio::test]
async fn a_token_got_without_a_password_stands_for_anybody() {
    let (_registry, node) = world(AuthorizationMode::Token).await;
    let token = token(&buy(&node, "scope=repository:a/b:pull", None).await);
    assert_eq!(get(&node, "/v2/", &token).await.status, 200);
    assert_eq!(
        get(&node, "/v2/a/b/tags/list", &token).await.body,
        b"public"
    );
    let refused = get(&node, "/v2/private/tags/list", &token).await;
    assert_eq!(refused.status, 401);
    let challenge = refused.header("www-authenticate");
    assert!(
        challenge.starts_with("Bearer realm=\"http://mirror/hawker/token\""),
        "{challenge}"
    );
}

#[tokio::test]
async fn a_wrong_password_is_refused_also_at_a_login() {
    let (registry, node) = world(AuthorizationMode::Token).await;
    let got = buy(
        &node,
        "scope=repository:private:pull",
        Some(&basic("wrong")),
    )
    .await;
    assert_eq!((got.status, got.header("www-authenticate")), (401, ""));
    assert_eq!(
        buy(&node, "account=user", Some(&basic("wrong")))
            .await
            .status,
        401
    );
    let login = token(&buy(&node, "account=user", Some(&basic(SECRET))).await);
    assert_eq!(
        login,
        format!("Bearer {ANYBODY}"),
        "it opens nothing by itself"
    );
    assert_eq!(get(&node, "/v2/", &login).await.status, 200);
    // With a second registry in token mode nobody knows which one the password is for.
    let mut settings = (**node.live.load()).clone();
    settings.registries.known.insert(
        "other.example".into(),
        crate::settings::RegistrySettings::default(),
    );
    node.live.store(Arc::new(settings));
    let before = registry.seen().len();
    assert_eq!(
        buy(&node, "account=user", Some(&basic("wrong")))
            .await
            .status,
        200
    );
    assert_eq!(
        registry.seen().len(),
        before,
        "no registry is shown another one's password"
    );
    let named = format!("account=user&service={}", registry.name());
    assert_eq!(buy(&node, &named, Some(&basic("wrong"))).await.status, 401);
    assert_eq!(
        get(&node, "/v2/private/tags/list", &login).await.status,
        401
    );
}

#[tokio::test]
async fn a_form_with_a_grant_is_as_good() {
    let (registry, node) = world(AuthorizationMode::Token).await;
    // As containerd asks: for the registry that the challenge named, twice the same.
    let scope = "scope=repository%3Aprivate%3Apull+repository%3Aprivate%3Apull";
    let service = format!("service={}", registry.name());
    let form = format!("grant_type=password&username=user&password={SECRET}&{service}&{scope}");
    let token = token(&post(&node, &form).await);
    assert_eq!(
        get(&node, "/v2/private/tags/list", &token).await.body,
        b"private"
    );
    assert_eq!(registry.count("GET", "/token"), 1);
    let wrong = form.replace(SECRET, "wrong");
    assert_eq!(post(&node, &wrong).await.status, 401);
    let in_address = format!("username=user&password={SECRET}&scope=repository:private:pull");
    let token = self::token(&buy(&node, &in_address, None).await);
    assert_eq!(
        token,
        format!("Bearer {ANYBODY}"),
        "a password in an address does not count"
    );
    assert_eq!(
        post(&node, &"x".repeat(MAX_FORM_BYTES + 1)).await.status,
        400
    );
    assert_eq!(node.ask("PUT", PATH, &[]).await.status, 405);
}

#[tokio::test]
async fn in_the_other_modes_nothing_changes_but_that_tokens_are_understood() {
    for mode in [AuthorizationMode::Relay, AuthorizationMode::Node] {
        let (registry, node) = world(AuthorizationMode::Token).await;
        let token = token(&buy(&node, "scope=repository:private:pull", Some(&basic(SECRET))).await);
        set(&node, mode);
        assert_eq!(node.ask("GET", "/v2/", &[]).await.status, 200);
        let got = node.ask("GET", "/v2/private/tags/list", &[]).await;
        let challenge = format!(
            "Bearer realm=\"http://{}/token\",service=\"r\"",
            registry.name()
        );
        assert_eq!(
            (got.status, got.header("www-authenticate")),
            (401, &*challenge)
        );
        assert_eq!(
            get(&node, "/v2/private/tags/list", &token).await.body,
            b"private"
        );
    }
}

#[tokio::test]
async fn a_registry_that_the_path_names_takes_passwords_in_relay_mode_and_others_give_an_anonymous_token()
 {
    for (mode, opens) in [
        (AuthorizationMode::Relay, true),
        (AuthorizationMode::Node, false),
    ] {
        let (registry, node) = world(mode).await;
        let ping = node.ask("GET", "/v2/", &[]).await;
        let challenge = format!("Bearer realm=\"http://mirror{PATH}\",service=\"hawker mirror\"");
        assert_eq!(
            (ping.status, ping.header("www-authenticate")),
            (200, &*challenge)
        );
        let query = format!("service={}&scope=repository:private:pull", registry.name());
        let mut settings = (**node.live.load()).clone();
        let other = crate::settings::RegistrySettings {
            authorization: Some(AuthorizationMode::Token),
            ..Default::default()
        };
        settings
            .registries
            .known
            .insert("other.example".into(), other);
        node.live.store(Arc::new(settings));
        // As dockerd asks that is logged in elsewhere, while another registry is in token mode.
        let got = token(&buy(&node, &query, Some(&basic(SECRET))).await);
        assert_eq!(got, format!("Bearer {ANYBODY}"));
        assert!(
            registry.seen().is_empty(),
            "its realm was asked: {:?}",
            registry.seen()
        );
        assert_eq!(get(&node, "/v2/a/b/tags/list", &got).await.body, b"public");
        let query = format!("scope=repository:{}/private:pull", registry.name());
        let got = token(&buy(&node, &query, Some(&basic(SECRET))).await);
        let private = get(
            &node,
            &format!("/v2/{}/private/tags/list", registry.name()),
            &got,
        )
        .await;
        assert_eq!(private.status == 200, opens, "{mode:?}");
        let wrong = buy(&node, &query, Some(&basic("wrong"))).await.status;
        assert_eq!(wrong, if opens { 401 } else { 200 }, "{mode:?}");
    }
}

#[tokio::test]
async fn where_the_api_is_open_and_a_repository_is_not_a_wrong_password_is_wrong() {
    let registry = TestRegistry::start(|seen| match seen.target.as_str() {
        "/v2/" => say(seen, 200, &[], b"{}"),
        _ => reply(seen),
    })
    .await;
    let node = Node::before(&registry).await;
    set(&node, AuthorizationMode::Token);
    assert_eq!(
        buy(
            &node,
            "scope=repository:private:pull",
            Some(&basic("wrong"))
        )
        .await
        .status,
        401
    );
    let token = token(&buy(&node, "scope=repository:private:pull", Some(&basic(SECRET))).await);
    assert_eq!(
        get(&node, "/v2/private/tags/list", &token).await.body,
        b"private"
    );
}

#[tokio::test]
async fn one_registry_in_token_mode_is_enough_for_the_ping() {
    let (registry, node) = world(AuthorizationMode::Relay).await;
    let mut settings = (**node.live.load()).clone();
    let known = settings.registries.known.get_mut(&registry.name()).unwrap();
    known.authorization = Some(AuthorizationMode::Token);
    node.live.store(Arc::new(settings));
    assert_eq!(node.ask("GET", "/v2/", &[]).await.status, 401);
    assert_eq!(node.ask("GET", "/v2/?ns=quay.io", &[]).await.status, 200);
}

#[test]
fn a_realm_is_where_the_client_finds_this_mirror() {
    for (host, proto, expected) in [
        ("127.0.0.1:6500", None, Some("http://127.0.0.1:6500")),
        ("[::1]:6500", None, Some("http://[::1]:6500")),
        (
            "mirror.example",
            Some("https"),
            Some("https://mirror.example"),
        ),
        ("mirror.example", Some("ftp"), Some("http://mirror.example")),
        ("evil\",realm=\"x", None, None),
        ("user@mirror", None, None),
        ("", None, None),
    ] {
        let mut request = http::Request::get("/v2/").header(HOST, host);
        if let Some(proto) = proto {
            request = request.header(FORWARDED_PROTO, proto);
        }
        let parts = request.body(()).unwrap().into_parts().0;
        assert_eq!(addressed(&parts).ok().as_deref(), expected, "{host}");
    }
}

#[test]
fn a_scope_is_about_a_registry_and_a_repository() {
    let default = Some("docker.io");
    for (scope, service, default, expected) in [
        (
            "repository:quay.io/org/x:pull",
            Some(SERVICE),
            None,
            Some("quay.io org/x"),
        ),
        (
            "repository:reg:5000/org/x:pull",
            None,
            default,
            Some("reg:5000 org/x"),
        ),
        (
            "repository:org/x:pull",
            Some("quay.io"),
            default,
            Some("quay.io org/x"),
        ),
        (
            "repository:quay.io/org/x:pull",
            Some("quay.io"),
            default,
            Some("quay.io org/x"),
        ),
        (
            "repository:library/debian:pull",
            Some(SERVICE),
            default,
            Some("docker.io library/debian"),
        ),
        (
            "repository:library/debian:pull",
            Some("no host"),
            None,
            None,
        ),
        ("repository:../x:pull", None, default, None),
        ("repository:X:pull", None, default, None),
        ("registry:catalog:*", None, default, None),
    ] {
        let source = source_of(scope, service, default);
        let told = source.map(|(source, _)| format!("{} {}", source.registry, source.repository));
        assert_eq!(told.as_deref(), expected, "{scope} {service:?}");
    }
}

#[test]
fn tokens_end_and_are_no_two_the_same() {
    let tokens = Tokens::new();
    let source = Source {
        registry: "r".into(),
        repository: "a".into(),
    };
    let mint = || tokens.mint(vec![(source.clone(), None)], Duration::ZERO);
    let (a, b) = (mint(), mint());
    assert!(a != b && a.len() == PREFIX.len() + 64);
    assert_eq!(tokens.right(&a, Some(&source)), Some(None));
    tokens.book().all.get_mut(&a).unwrap().until = Instant::now();
    assert_eq!(tokens.right(&a, Some(&source)), None);
    for _ in 0..2 * CAPACITY.get() {
        mint();
    }
    assert_eq!(tokens.book().all.len(), CAPACITY.get());
}

#[test]
fn tokens_have_a_bound_in_bytes() {
    let tokens = Tokens::new();
    let source = Source {
        registry: "r".into(),
        repository: "a".into(),
    };
    let long = HeaderValue::try_from("x".repeat(16 << 10)).unwrap();
    let mint = || tokens.mint(vec![(source.clone(), Some(long.clone()))], ANYBODY_LIFE);
    let first = mint();
    let minted: Vec<String> = (1..CAPACITY.get()).map(|_| mint()).collect();
    let last = minted.last().unwrap();
    assert_eq!(tokens.right(&first, Some(&source)), None);
    assert!(tokens.right(last, Some(&source)).is_some());
    let kept = tokens.book().all.len();
    assert_eq!(
        (tokens.book().bytes, kept),
        (kept * long.len(), CAPACITY_BYTES / long.len())
    );
}

#[test]
fn what_is_wished_for_is_not_shown() {
    let wish =
        Wish::parse(format!("username=user&password={SECRET}&refresh_token={SECRET}").as_bytes());
    assert!(wish.credential.is_some() && !format!("{wish:?}").contains(SECRET));
    let wish = Wish::parse(format!("refresh_token={SECRET}").as_bytes());
    assert_eq!(
        wish.credential,
        Some(Credential::IdentityToken(Secret::new(SECRET)))
    );
}

#[test]
fn times_are_written_as_rfc_3339_has_them() {
    for (seconds, expected) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_782_399, "2000-02-28T23:59:59Z"),
        (951_782_400, "2000-02-29T00:00:00Z"),
        (951_868_800, "2000-03-01T00:00:00Z"),
        (1_735_689_599, "2024-12-31T23:59:59Z"),
        (4_107_542_400, "2100-03-01T00:00:00Z"),
    ] {
        assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
    }
}
