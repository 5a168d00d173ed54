//! A request's line, `METHOD PATH?QUERY`: an accepted request is clean, and means the same when it is written again.

#![no_main]

use hawker_oci::reference::{Asked, MAX_TARGET_BYTES, canonical_host, is_repository, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &str| {
    let (method, target) = line.split_once(' ').unwrap_or(("GET", line));
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    let asked = match parse(method, path, query) {
        Ok(Asked::Content(asked)) => asked,
        Ok(Asked::Ping { registry }) => {
            return assert!(registry.is_none_or(|host| is_canonical(&host)));
        }
        Err(refused) => {
            return assert!((400..500).contains(&refused.status()) && !refused.code().is_empty());
        }
    };
    assert!(method == "GET" || method == "HEAD", "{method}");
    assert!(is_repository(&asked.repository), "{}", asked.repository);
    let origin = asked.origin_path();
    assert!(
        origin.bytes().all(|byte| byte.is_ascii_graphic()),
        "{origin}"
    );
    let (path, query) = origin.split_once('?').unwrap_or((&origin, ""));
    assert!(
        path.split('/')
            .skip(1)
            .all(|part| !matches!(part, "" | "." | "..")),
        "{path}"
    );
    let Some(registry) = &asked.registry else {
        return;
    };
    assert!(is_canonical(registry), "{registry}");
    if asked.repository.split('/').next() == Some(registry) {
        // Said again, that first part would count as the registry, as containers/image means it.
        return;
    }
    // The same request as containerd writes it. The added `ns` may make a query too long that was not.
    let again = format!("{query}&ns={registry}");
    if again.len() > MAX_TARGET_BYTES {
        return;
    }
    assert_eq!(
        parse("GET", path, Some(&again)),
        Ok(Asked::Content(asked)),
        "{path}?{again}"
    );
});

fn is_canonical(host: &str) -> bool {
    canonical_host(host).is_ok_and(|canonical| canonical == host)
}
