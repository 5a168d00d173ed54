use std::fs;
use std::os::unix::fs::symlink;

use super::*;

fn password(user: &str, password: &str) -> Credential {
    Credential::Password {
        user: user.into(),
        password: Secret::new(password),
    }
}

fn token(token: &str) -> Credential {
    Credential::IdentityToken(Secret::new(token))
}

fn encoded(text: &str) -> String {
    BASE64.encode(text)
}

fn say(entries: &Entries, wanted: &[(&str, &str)], expected: &[&[Found<'_>]]) {
    for ((registry, repository), expected) in wanted.iter().zip(expected) {
        assert_eq!(
            entries.find(registry, repository),
            *expected,
            "{registry}/{repository}"
        );
    }
}

#[test]
fn a_docker_config_is_read_with_its_helpers() {
    let text = format!(
        r#"{{
        "auths": {{
            "https://index.docker.io/v1/": {{ "auth": "{hub}", "email": "a@b.example" }},
            "quay.io": {{ "username": "u", "password": "general" }},
            "quay.io/team": {{ "auth": "{team}" }},
            "acr.example": {{ "auth": "{ignored}", "identitytoken": "refresh" }},
            "helper.example": {{}},
            "bad host": {{ "auth": "{team}" }},
            "broken.example": {{ "auth": "%%%" }}
        }},
        "credHelpers": {{ "1.dkr.ecr.eu-west-1.amazonaws.com": "ecr-login" }},
        "HttpHeaders": {{ "User-Agent": "x" }}
    }}"#,
        hub = encoded("hub:a:b"),
        team = encoded("team:special\0\0").trim_end_matches('='),
        ignored = encoded("00000000:"),
    );
    let (hub, general, team, acr) = (
        password("hub", "a:b"),
        password("u", "general"),
        password("team", "special"),
        token("refresh"),
    );
    let wanted = [
        ("docker.io", "library/debian"),
        ("quay.io", "other/x"),
        ("quay.io", "team/x"),
        ("quay.io", "teams/x"),
        ("acr.example", "x"),
        ("helper.example", "x"),
        ("broken.example", "x"),
        ("1.dkr.ecr.eu-west-1.amazonaws.com", "x"),
    ];
    let expected: [&[Found<'_>]; 8] = [
        &[Found::Here(&hub)],
        &[Found::Here(&general)],
        &[Found::Here(&team)],
        &[Found::Here(&general)],
        &[Found::Here(&acr)],
        &[],
        &[],
        &[Found::AtHelper("ecr-login")],
    ];
    say(&docker::parse(&text).unwrap(), &wanted, &expected);
    let store = docker::parse(r#"{ "auths": { "a.example": {} }, "credsStore": "pass" }"#).unwrap();
    say(&store, &[("a.example", "x")], &[&[Found::AtHelper("pass")]]);
    assert!(docker::parse("{}").unwrap().listed.is_empty());
}

#[test]
fn containerds_configuration_is_read_in_each_of_its_versions() {
    for plugin in [
        "\"io.containerd.grpc.v1.cri\"",
        "\"io.containerd.cri.v1.images\"",
        "cri",
    ] {
        let text = format!(
            "version = 2\n[plugins.{plugin}.registry]\nconfig_path = '/etc/containerd/certs.d'\n\
             [plugins.{plugin}.registry.configs.\"a.example:5000\".auth]\nusername = 'u'\npassword = 'p'\n\
             [plugins.{plugin}.registry.configs.\"b.example\".tls]\ninsecure_skip_verify = true\n\
             [plugins.{plugin}.registry.configs.\"c.example\".auth]\nidentitytoken = 'refresh'\n\
             [plugins.{plugin}.registry.auths.\"https://d.example\"]\nauth = '{}'\n",
            encoded("old:way"),
        );
        let (a, c, d) = (password("u", "p"), token("refresh"), password("old", "way"));
        let wanted = [
            ("a.example:5000", "x"),
            ("b.example", "x"),
            ("c.example", "x"),
            ("d.example", "x"),
        ];
        let expected: [&[Found<'_>]; 4] = [
            &[Found::Here(&a)],
            &[],
            &[Found::Here(&c)],
            &[Found::Here(&d)],
        ];
        say(&containerd::parse(&text).unwrap(), &wanted, &expected);
    }
    assert!(containerd::parse("version = 3").unwrap().listed.is_empty());
}

#[test]
fn pull_secrets_are_read_in_each_of_their_shapes() {
    let auths = format!(
        r#"{{ "*.corp.example": {{ "auth": "{}" }} }}"#,
        encoded("u:p")
    );
    let config = format!(r#"{{ "auths": {auths}, "credsStore": "never-run" }}"#);
    let secret = format!(
        r#"{{ "kind": "Secret", "type": "kubernetes.io/dockerconfigjson",
              "data": {{ ".dockerconfigjson": "{}" }} }}"#,
        encoded(&config)
    );
    let old = format!(
        r#"{{ "kind": "Secret", "data": {{ ".dockercfg": "{}" }} }}"#,
        encoded(&auths)
    );
    let plain = serde_json::json!({ "stringData": { ".dockerconfigjson": config } }).to_string();
    let opaque = r#"{ "kind": "Secret", "data": { "key": "dmFsdWU=" } }"#;
    let list = format!(r#"{{ "kind": "List", "items": [{opaque}, {secret}] }}"#);
    let up = password("u", "p");
    for text in [&config, &auths, &secret, &old, &plain, &list] {
        let entries = kubernetes::parse(text).unwrap();
        say(&entries, &[("r.corp.example", "x")], &[&[Found::Here(&up)]]);
    }
    assert!(kubernetes::parse(opaque).unwrap().listed.is_empty());
}

#[test]
fn no_error_quotes_a_secret() {
    let errors = [
        docker::parse(r#"{ "auths": { "a": { "auth": ["hunter2"] } } }"#),
        docker::parse(r#"{ "auths": "hunter2" }"#),
        docker::parse(r#"{ "auths": { "a": "hunter2 "#),
        kubernetes::parse(r#"{ "auths": { "a": "hunter2" } }"#),
        kubernetes::parse(r#"{ "data": { ".dockercfg": "hunter2 " } }"#),
        kubernetes::parse("\"hunter2\""),
        containerd::parse("version = 2\npassword = 'hunter2"),
        containerd::parse("password = hunter2"),
    ];
    for error in errors {
        let error = error.map(|_| ()).unwrap_err();
        assert!(!error.is_empty() && !error.contains("hunter2"), "{error}");
    }
}

#[test]
fn secrets_are_not_in_debug() {
    let shown = format!(
        "{:?} {:?} {:?}",
        password("user", "hunter2"),
        token("hunter2"),
        docker::parse(&format!(
            r#"{{ "auths": {{ "a.example": {{ "auth": "{}" }} }} }}"#,
            encoded("u:hunter2")
        ))
    );
    assert!(
        !shown.contains("hunter2") && !shown.contains(&encoded("u:hunter2")),
        "{shown}"
    );
    assert!(!format!("{:?}", password("u", "hunter2").to_basic()).contains(&encoded("u:hunter2")));
}

#[test]
fn basic_is_read_and_written() {
    for (header, expected) in [
        (
            format!("Basic {}", encoded("u:p:q")),
            Some(password("u", "p:q")),
        ),
        (format!("basic {}", encoded("u:")), Some(password("u", ""))),
        (format!("Basic {}", encoded("<token>:t")), Some(token("t"))),
        (format!("Basic {}", encoded(":")), None),
        (format!("Basic {}", encoded("u")), None),
        ("Basic %%%".to_owned(), None),
        (format!("Bearer {}", encoded("u:p")), None),
        ("Basic".to_owned(), None),
    ] {
        let value = HeaderValue::try_from(&header).unwrap();
        assert_eq!(Credential::from_basic(&value), expected, "{header}");
    }
    let up = password("u", "pä:s");
    assert_eq!(Credential::from_basic(&up.to_basic().unwrap()), Some(up));
    assert_eq!(token("t").to_basic(), None);
}

fn config_of(user: &str) -> String {
    format!(
        r#"{{ "auths": {{ "a.example": {{ "auth": "{}" }} }} }}"#,
        encoded(&format!("{user}:p"))
    )
}

#[tokio::test]
async fn the_first_source_that_has_one_counts_and_files_are_read_again_when_they_change() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (
        folder.path().join("first.json"),
        folder.path().join("second.json"),
    );
    let keychain = Keychain::new(vec![
        CredentialSource::Environment("HAWKER_TEST_THAT_NOBODY_SETS".into()),
        CredentialSource::Docker(first.clone()),
        CredentialSource::Docker(second.clone()),
    ]);
    assert_eq!(keychain.find("a.example", "x").await, None);
    fs::write(&second, config_of("second")).unwrap();
    assert_eq!(
        keychain.find("a.example", "x").await,
        Some(password("second", "p"))
    );
    fs::write(&first, config_of("first")).unwrap();
    assert_eq!(
        keychain.find("a.example", "x").await,
        Some(password("first", "p"))
    );
    assert_eq!(keychain.find("b.example", "x").await, None);
    fs::write(&first, "nonsense").unwrap();
    assert_eq!(
        keychain.find("a.example", "x").await,
        Some(password("second", "p"))
    );
}

#[tokio::test]
async fn a_mounted_folder_of_secrets_is_followed() {
    let volume = tempfile::tempdir().unwrap();
    let at = |path: &str| volume.path().join(path);
    let publish = |version: &str, user: &str| {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join(".dockerconfigjson"), config_of(user)).unwrap();
        symlink(version, at("..new")).unwrap();
        fs::rename(at("..new"), at("..data")).unwrap();
    };
    publish("..1", "one");
    symlink("..data/.dockerconfigjson", at(".dockerconfigjson")).unwrap();
    fs::create_dir(at("team")).unwrap();
    fs::write(
        at("team/secret.json"),
        config_of("team").replace("a.example", "b.example"),
    )
    .unwrap();
    let keychain = Keychain::new(vec![CredentialSource::Kubernetes(volume.path().to_owned())]);
    assert_eq!(
        keychain.find("a.example", "x").await,
        Some(password("one", "p"))
    );
    assert_eq!(
        keychain.find("b.example", "x").await,
        Some(password("team", "p"))
    );
    publish("..2", "two");
    assert_eq!(
        keychain.find("a.example", "x").await,
        Some(password("two", "p"))
    );
}
