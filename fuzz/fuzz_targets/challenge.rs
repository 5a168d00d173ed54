//! The lines of a `WWW-Authenticate`: a parsed challenge is bounded, can be written again, and is parsed as the same.

#![no_main]

use hawker_oci::challenge::{Challenge, MAX_CHALLENGES, is_trusted, parse, repository_of};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|header: &[u8]| {
    let challenges = parse(header.split(|byte| *byte == b'\n'));
    assert!(challenges.len() <= MAX_CHALLENGES);
    let again: Vec<_> = challenges.iter().map(ToString::to_string).collect();
    assert!(
        again.iter().all(|line| !line.chars().any(char::is_control)),
        "{again:?}"
    );
    assert_eq!(
        parse(again.iter().map(String::as_bytes)),
        challenges,
        "{again:?}"
    );
    for challenge in &challenges {
        let Challenge::Bearer(bearer) = challenge else {
            continue;
        };
        assert!(!bearer.realm.is_empty());
        let scopes = bearer.scopes("a/b");
        assert!(
            scopes.iter().any(|scope| repository_of(scope).is_some()),
            "{scopes:?}"
        );
        assert!(is_trusted(&bearer.realm, &bearer.realm));
        is_trusted("registry.example.com", &bearer.realm);
    }
});
