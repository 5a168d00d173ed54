//! The target of a proxied request: the host, the way to it, and its name in settings and rules.

use hawker_oci::reference::canonical_host;
use http::uri::{Authority, Scheme};
use http::{Method, Request};

use crate::origin::{Upstream, is_listed_realm};
use crate::registry::Problem;
use crate::settings::Registries;

/// The port of plain HTTP, which needs no mention either where it is what is spoken.
const HTTP_SUFFIX: &str = ":80";

/// The host that a request to a forward proxy names: by CONNECT, or by a whole address (RFC 9112, 3.2.2 and 3.2.3).
pub(super) fn of<B>(request: &Request<B>, registries: &Registries) -> Result<Upstream, Problem> {
    let uri = request.uri();
    let authority = uri.authority().ok_or(Problem::NotProxied)?;
    let scheme = match uri.scheme() {
        None if *request.method() == Method::CONNECT => Scheme::HTTPS,
        Some(scheme) if *scheme == Scheme::HTTP || *scheme == Scheme::HTTPS => scheme.clone(),
        _ => return Err(Problem::NotProxied),
    };
    if *request.method() == Method::CONNECT && authority.port().is_none() {
        return Err(Problem::Malformed("CONNECT names no port"));
    }
    let name = name(authority, &scheme, registries)?;
    Ok(Upstream {
        name,
        scheme,
        authority: authority.clone(),
        is_registry: false,
    })
}

/// A host in its one spelling, without a port that goes without saying.
fn name(
    authority: &Authority,
    scheme: &Scheme,
    registries: &Registries,
) -> Result<String, Problem> {
    let bad = |_| Problem::Malformed("its address has no host");
    let name = canonical_host(authority.as_str()).map_err(bad)?;
    match name.strip_suffix(HTTP_SUFFIX) {
        // A registry may well be named with it.
        Some(host) if !registries.is_listed(&name) => Ok(host.to_owned()),
        // HTTPS's port, with plain HTTP, is not what goes without saying.
        None if *scheme == Scheme::HTTP && authority.port_u16() == Some(443) => {
            Ok(format!("{name}:443"))
        }
        _ => Ok(name),
    }
}

/// Whether a host may be reached that no rule names: the configuration lists it as a registry or as a realm, or it lists no
/// registry and this is the public web. Its addresses are looked at later.
pub(super) fn is_allowed(upstream: &Upstream, registries: &Registries) -> bool {
    is_allowed_name(&upstream.name, registries)
        || is_listed_realm(registries, upstream.authority.host(), upstream.port())
}

fn is_allowed_name(name: &str, registries: &Registries) -> bool {
    let with_port = name
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
    registries.is_listed(name) || (registries.allow.is_empty() && !with_port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::RegistrySettings;

    fn registries() -> Registries {
        let mut registries = Registries {
            default: Some("docker.io".into()),
            ..Registries::default()
        };
        for known in ["reg:5000", "old:80", "[fd00::1]:5000"] {
            let own = RegistrySettings::default();
            registries.known.insert(known.into(), own);
        }
        registries
    }

    fn named(method: &str, target: &str) -> Option<(String, bool)> {
        let request = Request::builder()
            .method(method)
            .uri(target)
            .body(())
            .unwrap();
        let registries = registries();
        let upstream = of(&request, &registries).ok()?;
        let allowed = is_allowed(&upstream, &registries);
        Some((upstream.name, allowed))
    }

    #[test]
    fn a_host_is_known_by_one_name_and_strange_ports_by_their_own() {
        for (method, target, expected) in [
            ("CONNECT", "quay.io:443", Some(("quay.io", true))),
            (
                "CONNECT",
                "Registry-1.Docker.IO:443",
                Some(("docker.io", true)),
            ),
            ("CONNECT", "reg:5000", Some(("reg:5000", true))),
            ("CONNECT", "reg:5001", Some(("reg:5001", false))),
            ("CONNECT", "quay.io:22", Some(("quay.io:22", false))),
            ("CONNECT", "quay.io:80", Some(("quay.io", true))),
            (
                "CONNECT",
                "[FD00:0::1]:5000",
                Some(("[fd00::1]:5000", true)),
            ),
            ("CONNECT", "[fd00::1]:443", Some(("[fd00::1]", true))),
            ("CONNECT", "quay.io", None),
            ("GET", "http://quay.io/v2/", Some(("quay.io", true))),
            ("GET", "http://quay.io:80/v2/", Some(("quay.io", true))),
            ("GET", "http://old:80/v2/", Some(("old:80", true))),
            (
                "GET",
                "http://quay.io:443/v2/",
                Some(("quay.io:443", false)),
            ),
            ("GET", "https://quay.io/v2/", Some(("quay.io", true))),
            ("GET", "http://reg:5000/v2/", Some(("reg:5000", true))),
            ("GET", "/v2/", None),
            ("GET", "ftp://quay.io/v2/", None),
            ("GET", "http://a_b/v2/", None),
            ("GET", "quay.io:443", None),
        ] {
            let expected = expected.map(|(name, allowed)| (name.to_owned(), allowed));
            assert_eq!(named(method, target), expected, "{method} {target}");
        }
    }

    #[test]
    fn realms_of_the_configuration_are_reached_and_nothing_else_on_their_host() {
        let mut registries = Registries {
            allow: vec!["quay.io".into()],
            ..Registries::default()
        };
        let realms = vec![
            "http://sso.corp:8080/x".parse().unwrap(),
            "https://sso.corp/y".parse().unwrap(),
        ];
        registries.known.insert(
            "reg.corp".into(),
            RegistrySettings {
                realms,
                ..RegistrySettings::default()
            },
        );
        for (method, target, allowed) in [
            ("GET", "http://sso.corp:8080/token", true),
            ("CONNECT", "sso.corp:443", true),
            ("CONNECT", "SSO.corp:8080", true),
            ("GET", "http://sso.corp/token", false),
            ("CONNECT", "sso.corp:22", false),
            ("CONNECT", "other.corp:443", false),
        ] {
            let request = Request::builder()
                .method(method)
                .uri(target)
                .body(())
                .unwrap();
            let upstream = of(&request, &registries).unwrap();
            assert_eq!(
                is_allowed(&upstream, &registries),
                allowed,
                "{method} {target}"
            );
        }
    }

    #[test]
    fn with_an_allow_list_nothing_else_is_reached() {
        let registries = Registries {
            allow: vec!["*.example.com".into()],
            ..Registries::default()
        };
        for (name, allowed) in [
            ("a.example.com", true),
            ("a.example.com:22", false),
            ("quay.io", false),
        ] {
            assert_eq!(is_allowed_name(name, &registries), allowed, "{name}");
        }
    }
}
