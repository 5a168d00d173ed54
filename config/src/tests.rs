//! Layers, faults and pages together.

use std::io::Write;

use hawker_core::application::{Pattern, Priority};
use hawker_core::intercept::Action;

use crate::layers::{Effective, Layered};
use crate::problem::Problem;
use crate::schema::{Applies, Config, Daemon, Registry, flag_of, registry_flag_of, variable_of};
use crate::value::Shape;
use crate::{Layer, reference};

fn read(daemon: Daemon, text: &str, flags: &[(&str, &[&str])]) -> Effective {
    let flags = flags.iter().map(|(flag, values)| {
        (
            (*flag).to_owned(),
            values
                .iter()
                .map(|value| (*value).to_owned())
                .collect::<Vec<_>>(),
        )
    });
    Effective::new(
        daemon,
        [
            Layered::toml(daemon, "/f.toml", text),
            Layered::flags(daemon, flags),
        ],
    )
}

fn proxy(text: &str) -> Effective {
    read(Daemon::Proxy, text, &[])
}

fn application(words: &str) -> Effective {
    read(Daemon::Proxy, "", &[("application", &[words])])
}

/// A value that a key of this kind takes.
fn sample(value_name: &str) -> &'static str {
    match value_name {
        "ADDR" => "127.0.0.1:9",
        "HOST:PORT" => "a.example:9",
        "HOST" | "PATTERN" | "NAME" => "a.example",
        "CIDR" | "CIDR|HOST" => "10.0.0.0/8",
        "DIR" => "/d",
        "FILE" => "/dev/null",
        "SIZE" => "100MB",
        "DURATION" => "5s",
        "PERCENT" => "50",
        "N" => "4",
        "BOOL" => "true",
        "MODE" => "relay",
        "KIND:PLACE" => "docker:/dev/null",
        "LEVEL" => "debug",
        "FORMAT" => "json",
        other => panic!("no sample for {other}"),
    }
}

#[test]
fn every_key_is_read_from_the_file_the_environment_and_flags() {
    let mut checked = 0;
    for key in Config::keys() {
        let Some(variable) = variable_of(&key) else {
            continue;
        };
        let (daemon, value) = (key.daemons[0], sample(key.value_name));
        let of_file = read(daemon, &format!("{} = \"{value}\"", key.path), &[]);
        let text = |name: &str| (name == variable).then(|| value.to_owned());
        let of_environment = Effective::new(daemon, [Layered::environment(daemon, text)]);
        let values: &[&str] = if key.shape == Shape::Switch {
            &[]
        } else {
            &[value]
        };
        let of_flag = read(daemon, "", &[(flag_of(key.path).as_str(), values)]);
        for (layer, effective) in [
            (Layer::File, of_file),
            (Layer::Environment, of_environment),
            (Layer::Flag, of_flag),
        ] {
            assert_eq!(effective.problems, [], "{} in {layer:?}", key.path);
            assert_eq!(effective.origin(key.path).layer, layer, "{}", key.path);
            assert_eq!(
                effective.config,
                read(daemon, &format!("{} = '{value}'", key.path), &[]).config
            );
        }
        checked += 1;
    }
    assert!(checked > 40, "{checked}");
}

#[test]
fn every_flag_of_a_registry_is_a_key_of_its_table() {
    for field in Registry::fields() {
        let is_switch = field.shape == Shape::Switch;
        let value = match field.name {
            "endpoints" | "realms" => "https://x",
            "authorization" => "node",
            _ => "/dev/null",
        };
        let of_flag = if is_switch {
            "a.example".to_owned()
        } else {
            format!("a.example={value}")
        };
        let flag = read(
            Daemon::Proxy,
            "",
            &[(registry_flag_of(field.name).as_str(), &[&of_flag])],
        );
        let in_file = if is_switch {
            "true".to_owned()
        } else {
            format!("'{value}'")
        };
        let file = proxy(&format!(
            "registries.'a.example'.{} = {in_file}",
            field.name
        ));
        assert_eq!(
            (&flag.problems, &file.problems),
            (&vec![], &vec![]),
            "{}",
            field.name
        );
        assert_eq!(flag.config, file.config, "{}", field.name);
        assert_ne!(flag.config, Config::default(), "{}", field.name);
        let path = format!("registries.\"a.example\".{}", field.name);
        assert_eq!(
            flag.name(&path),
            format!("--{}", registry_flag_of(field.name))
        );
        assert_eq!(file.name(&path), format!("{path} (/f.toml:1)"));
    }
}

#[test]
fn defaults_are_values_of_their_keys_and_no_key_lacks_a_text() {
    let shown = reference::show(&proxy(""));
    assert!(
        shown
            .iter()
            .all(|one| one.value.is_none() && one.origin == "default")
    );
    for key in Config::keys() {
        assert!(
            !key.doc.is_empty() && !key.default.is_empty() && !key.kind.is_empty(),
            "{}",
            key.path
        );
    }
}

#[test]
fn flags_override_the_environment_and_that_the_file() {
    let text = "name = 'file'\nzone = 'z'\nrack = 'r'\nmirror = ['127.0.0.1:1', '127.0.0.1:2']\n[cache]\nhigh = 70";
    let environment = |name: &str| match name {
        "HAWKER_NAME" => Some("environment".to_owned()),
        "HAWKER_RACK" => Some("x".to_owned()),
        "HAWKER_MIRROR" => Some("127.0.0.1:4, 127.0.0.1:5".to_owned()),
        _ => None,
    };
    let file = Layered::toml(Daemon::Proxy, "/f.toml", text);
    let environment = Layered::environment(Daemon::Proxy, environment);
    let flags = [("name", "flag"), ("mirror", "127.0.0.1:3")]
        .map(|(f, v)| (f.to_owned(), vec![v.to_owned()]));
    let flags = Layered::flags(Daemon::Proxy, flags);
    let effective = Effective::new(Daemon::Proxy, [file, environment, flags]);
    let config = &effective.config;
    assert_eq!(config.name.as_ref().unwrap().0, "flag");
    assert_eq!(config.zone.as_ref().unwrap().0, "z");
    assert_eq!(config.rack.as_ref().unwrap().0, "x");
    assert_eq!(config.mirror.len(), 1, "a list replaces the whole list");
    assert_eq!(*config.cache_high, 70);
    assert_eq!(effective.name("name"), "--name");
    assert_eq!(effective.name("rack"), "HAWKER_RACK");
    assert_eq!(effective.name("cache.high"), "cache.high (/f.toml:6)");
    assert_eq!(effective.name("cache.low"), "--cache-low");
    let page = reference::show_text(&effective);
    for line in ["cache.high = 70", "name = \"flag\"", "linger: 60s"] {
        assert!(page.contains(line), "{page}");
    }
    assert!(
        page.contains("# /f.toml:6")
            && page.contains("# HAWKER_RACK")
            && page.contains("# default")
    );
}

#[test]
fn registries_are_tables_by_host_and_flags_add_to_them() {
    let text = "[registries.'10.0.0.1:5000']\nendpoints = ['http://10.0.0.1:5000', 'http://10.0.0.2:5000']\n\
                [registries.'a.example']\nca = '/dev/null'\ninsecure = false\n\
                realms = ['https://b.example']\nauthorization = 'node'";
    let effective = read(
        Daemon::Proxy,
        text,
        &[("registry", &["a.example=https://c.example"])],
    );
    assert_eq!(effective.problems, []);
    let registries = &effective.config.registries;
    let of = |host: &str| {
        registries
            .iter()
            .find(|(name, _)| name.0 == host)
            .unwrap()
            .1
    };
    let urls: Vec<&str> = of("10.0.0.1:5000")
        .endpoints
        .iter()
        .map(|url| url.as_str())
        .collect();
    assert_eq!(urls, ["http://10.0.0.1:5000/", "http://10.0.0.2:5000/"]);
    let one = of("a.example");
    assert!(one.ca.is_some() && !*one.insecure && one.authorization.is_some());
    assert_eq!(one.endpoints[0].as_str(), "https://c.example/");
    assert_eq!(one.realms[0].as_str(), "https://b.example/");
    assert_eq!(
        effective.name("registries.\"a.example\".ca"),
        "registries.\"a.example\".ca (/f.toml:4)"
    );
    assert_eq!(
        effective.name("registries.\"a.example\".endpoints"),
        "--registry"
    );
}

#[test]
fn rules_of_the_forward_proxy_keep_their_order() {
    let text = "forward_proxy = '127.0.0.1:6505'\n\
                [[intercept]]\nhost = 'quay.io'\naction = 'direct'\npath = '/private/'\n\
                [[intercept]]\naction = 'p2p'\nhost = '*.example.com'";
    let short = |effective: &Effective| -> Vec<_> {
        let rules = effective
            .config
            .intercept
            .iter()
            .map(|entry| entry.rule().unwrap());
        rules
            .map(|rule| {
                (
                    rule.action,
                    rule.host,
                    rule.path.map(|path| path.to_string()),
                )
            })
            .collect()
    };
    let effective = proxy(text);
    assert_eq!(effective.problems, []);
    let expected = [
        (
            Action::Direct,
            "quay.io".to_owned(),
            Some("/private/".to_owned()),
        ),
        (Action::P2p, "*.example.com".to_owned(), None),
    ];
    assert_eq!(short(&effective), expected);
    assert!(*effective.config.intercept_defaults);
    for text in [
        "[[intercept]]\ndefaults = false\n[[intercept]]\nhost = 'quay.io'\naction = 'p2p'",
        "[[intercept]]\nhost = 'quay.io'\naction = 'p2p'\ndefaults = false",
        "intercept_defaults = false\n[[intercept]]\nhost = 'quay.io'\naction = 'p2p'",
    ] {
        let effective = proxy(text);
        assert_eq!(effective.problems, [], "{text}");
        assert_eq!(
            short(&effective),
            [(Action::P2p, "quay.io".to_owned(), None)],
            "{text}"
        );
        assert!(!*effective.config.intercept_defaults, "{text}");
    }
    let text = "[[intercept]]\nhost = 'quay.io'\n[[intercept]]\nhsot = 'a'\naction = 'p2p'\n\
                [[intercept]]\nhost = 'a b'\naction = 1";
    let problems = proxy(text).problems;
    for start in [
        "intercept[0] ",
        "intercept[1].hsot",
        "intercept[1] ",
        "intercept[2].host",
        "intercept[2].action",
    ] {
        assert!(
            problems.iter().any(|p| p.key.starts_with(start)),
            "{start} in {problems:?}"
        );
    }
    assert_eq!(
        short(&read(
            Daemon::Proxy,
            "",
            &[("intercept", &["direct  *.example.com ^/v2/"])]
        )),
        [(
            Action::Direct,
            "*.example.com".to_owned(),
            Some("^/v2/".to_owned())
        )]
    );
    for text in [
        "",
        "p2p",
        "tunnel a",
        "p2p *",
        "p2p a (",
        "p2p a b c",
        "p2p http://a",
    ] {
        let problems = read(Daemon::Proxy, "", &[("intercept", &[text])]).problems;
        assert!(
            problems.iter().any(|p| p.key == "--intercept"),
            "{text}: {problems:?}"
        );
    }
}

#[test]
fn a_truth_in_the_file_needs_no_quotes() {
    for text in [
        "seed_uses_client_token = false",
        "seed_uses_client_token = 'false'",
    ] {
        let effective = proxy(text);
        assert_eq!(effective.problems, [], "{text}");
        assert!(!*effective.config.seed_uses_client_token);
    }
    assert!(*proxy("seed = true").config.seed && !*proxy("seed = false").config.seed);
}

#[test]
fn networks_are_tables_of_schedulers_only() {
    let text = "[[network]]\ncidr = '10.1.0.0/16'\nzone = 'eu-1'\nrack = 7\n[[network]]\ncidr = 'fd00::/8'\nzone = 'b'";
    for daemon in [Daemon::Scheduler, Daemon::Up] {
        let effective = read(daemon, text, &[]);
        assert_eq!(effective.problems, []);
        let places: Vec<_> = effective
            .config
            .network
            .iter()
            .map(|entry| entry.place().unwrap().1)
            .collect();
        assert_eq!(
            [&*places[0].zone, &*places[0].rack, &*places[1].zone],
            ["eu-1", "7", "b"]
        );
    }
    let problems = proxy(text).problems;
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0]
            .cure
            .contains("`hawker scheduler` and `hawker up`"),
        "{problems:?}"
    );
}

#[test]
fn applications_are_tables_and_each_fault_in_them_is_named() {
    let text = "[[application]]\nname = 'shop'\nmatch = ['quay.io/shop/*', 'reg:5000']\npriority = 1\n\
                upload = '10MB'\n[[application]]\ntag = 'night'\nrequests = 2";
    for daemon in Daemon::ALL {
        let effective = read(daemon, text, &[]);
        assert_eq!(effective.problems, []);
        let rules: Vec<_> = effective
            .config
            .application
            .iter()
            .map(|entry| entry.rule().unwrap())
            .collect();
        assert_eq!(
            (rules[0].labels.to_string(), rules[1].labels.to_string()),
            ("shop".into(), "tag night".into())
        );
        assert_eq!(
            (rules[0].limits.rates.upload, rules[1].limits.requests),
            (Some(10_000_000), Some(2))
        );
    }
    let text = "[[application]]\nnmae = 'a'\n[[application]]\nname = 'a b'\nmatch = [1, true]";
    let problems = proxy(text).problems;
    for (start, cure) in [
        ("application[0].nmae", "did you mean `name`?"),
        ("application[1].name", "without spaces"),
        ("application[1].match", "one text"),
    ] {
        let problem = problems
            .iter()
            .find(|p| p.key.starts_with(start))
            .expect(start);
        assert!(problem.cure.contains(cure), "{problem:?}");
    }
}

#[test]
fn an_application_is_written_in_words_on_the_command_line() {
    let effective = application(
        "name=shop tag=night match=quay.io/shop/* match=reg:5000 priority=1 upload=10MB requests=2",
    );
    assert_eq!(effective.problems, []);
    let rule = effective.config.application[0].rule().unwrap();
    assert_eq!(
        (
            rule.labels.to_string().as_str(),
            rule.priority.map(Priority::level)
        ),
        ("shop tag night", Some(1))
    );
    let patterns: Vec<&str> = rule.patterns.iter().map(Pattern::as_str).collect();
    assert_eq!(patterns, ["quay.io/shop/*", "reg:5000/*"]);
    assert_eq!(
        (rule.limits.rates.upload, rule.limits.requests),
        (Some(10_000_000), Some(2))
    );
    for (text, what, cure) in [
        ("", "names neither", "name=shop"),
        ("priority=1", "names neither", "name=shop"),
        ("shop", "is not KEY=VALUE", "name=shop"),
        (
            "name=shop priority=7",
            "priority `7`",
            "0 (first) to 6 (last)",
        ),
        ("name=shop name=b", "says name twice", "once"),
        ("name=sh\"op", "is no label", "letters"),
        (
            "name=shop match=https://quay.io",
            "is an address",
            "quay.io/shop/*",
        ),
        ("name=shop upload=fast", "upload", ""),
        ("name=shop requests=0", "requests", ""),
        (
            "name=shop speed=1MB",
            "`speed` is nothing",
            "upload, download",
        ),
    ] {
        let problems = application(text).problems;
        assert_eq!(problems.len(), 1, "{text}: {problems:?}");
        let Problem {
            key,
            what: told,
            cure: said,
        } = &problems[0];
        assert!(
            key == "--application" && told.contains(what) && said.contains(cure),
            "{text}: {problems:?}"
        );
        assert!(!said.is_empty());
    }
}

#[test]
fn unknown_keys_are_reported_at_once_with_the_likely_key_and_the_line() {
    let text = "nmae = 'a'\ncache_high = 90\nfrobnicate = 1\nzone = ['a']\nseed = 'yes'\n\
                [rates]\nuplaod = '1MB'\n[registries.'a.example']\nendpoint = 'https://a'\n[cahce]\nlow = 3";
    let problems = proxy(text).problems;
    let told = |key: &str| {
        let problem = problems
            .iter()
            .find(|p| p.key.starts_with(&format!("{key} (")))
            .expect(key);
        format!("{} | {}", problem.what, problem.cure)
    };
    assert!(told("nmae").contains("did you mean `name`?"));
    assert!(told("cache_high").contains("did you mean `cache.high`?"));
    assert!(told("frobnicate").contains("--help"));
    assert!(told("zone").contains("no single value"));
    assert!(told("seed").contains("true or false"));
    assert!(told("rates.uplaod").contains("did you mean `rates.upload`?"));
    assert!(told("registries.\"a.example\".endpoint").contains("\"a.example\".endpoints`?"));
    assert!(told("cahce").contains("unknown"));
    assert_eq!(problems.len(), 8);
    assert!(
        problems.iter().any(|p| p.key == "rates.uplaod (/f.toml:7)"),
        "{problems:?}"
    );
}

#[test]
fn a_value_in_place_of_a_table_is_told_how_to_be_written() {
    for (text, key, cure) in [
        ("cache = 5", "cache (/f.toml:1)", "write [cache]"),
        (
            "registries = 3",
            "registries (/f.toml:1)",
            "[registries.\"HOST\"]",
        ),
        (
            "registries.'a.example' = 3",
            "registries.\"a.example\" (/f.toml:1)",
            "endpoints",
        ),
        (
            "intercept = 'p2p a'",
            "intercept (/f.toml:1)",
            "[[intercept]]",
        ),
        (
            "application = ['name=a']",
            "application[0] (/f.toml:1)",
            "[[application]]",
        ),
        (
            "rates.upload = { a = 1 }",
            "rates.upload (/f.toml:1)",
            "one text or number",
        ),
    ] {
        let problems = proxy(text).problems;
        assert_eq!(problems.len(), 1, "{text}: {problems:?}");
        assert!(
            problems[0].key == key && problems[0].cure.contains(cure),
            "{text}: {problems:?}"
        );
    }
}

#[test]
fn a_file_that_is_missing_or_no_toml_is_reported() {
    let missing = Layered::file(Daemon::Proxy, "/nonexistent/hawker.toml".as_ref());
    assert!(
        Effective::new(Daemon::Proxy, [missing]).problems[0]
            .what
            .contains("cannot be read")
    );
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"name = ").unwrap();
    let broken = Layered::file(Daemon::Proxy, file.path());
    assert!(
        Effective::new(Daemon::Proxy, [broken]).problems[0]
            .what
            .contains("is no TOML")
    );
}

#[test]
fn an_endpoint_with_a_password_is_neither_repeated_nor_shown() {
    let effective = proxy("registries.'a.example'.endpoints = 'https://me:hunter2@a.example'");
    assert_eq!(effective.problems.len(), 1);
    assert!(!format!("{:?}", effective.problems).contains("hunter2"));
}

#[test]
fn live_keys_need_no_restart() {
    for key in Config::keys()
        .into_iter()
        .filter(|key| key.shape == Shape::One)
    {
        let daemon = key.daemons[0];
        let new = read(
            daemon,
            &format!("{} = '{}'", key.path, sample(key.value_name)),
            &[],
        );
        let waiting = read(daemon, "", &[]).needs_restart(&new);
        assert_eq!(
            waiting.is_empty(),
            key.applies != Applies::Start,
            "{}",
            key.path
        );
    }
}

/// The reference in docs/ has the tables that the schema yields.
#[test]
fn the_reference_is_up_to_date() {
    let page = include_str!("../../docs/configuration.md");
    let generated = reference::markdown();
    assert!(
        page.contains(&generated),
        "docs/configuration.md is stale: replace its part from `{}` to `{}` by the output of `hawker config reference`",
        reference::BEGIN,
        reference::END
    );
}
