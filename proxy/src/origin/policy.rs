//! Who may be asked: which registries, and which addresses a request may end up at.

use std::net::IpAddr;
use std::path::PathBuf;

use hawker_core::reference::{api_host, canonical_host, host_matches, is_public};
use url::Url;

use super::OriginError;
use crate::settings::Registries;

/// How one registry is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Base addresses, to be tried in order; never empty.
    pub(super) endpoints: Vec<Url>,
    /// Whom to believe on TLS.
    pub(super) trust: Trust,
    /// Where connections may go.
    pub(super) reach: Reach,
}

/// Whom to believe on TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Trust {
    /// A PEM file of authorities, besides the system's.
    pub(super) ca: Option<PathBuf>,
    /// Any certificate will do, and https may lead to http.
    pub(super) insecure: bool,
}

/// Where connections may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Reach {
    /// Public addresses and the networks that the configuration lists: for registries that only a client named.
    Public,
    /// Also the endpoints of the registries that the configuration knows: for these registries, and where they redirect to.
    Known,
}

impl Route {
    /// The way to `registry`, if the configuration lets it be asked.
    pub(super) fn to(registries: &Registries, registry: &str) -> Result<Self, OriginError> {
        let forbidden = || OriginError::Forbidden(registry.to_owned());
        let registry = canonical_host(registry).map_err(|_| forbidden())?;
        if let Some(known) = registries.known.get(&registry) {
            let endpoints = match known.endpoints.as_slice() {
                [] => own_endpoints(&registry, known.insecure).ok_or_else(forbidden)?,
                listed => listed.to_vec(),
            };
            let trust = Trust { ca: known.ca.clone(), insecure: known.insecure };
            return Ok(Self { endpoints, trust, reach: Reach::Known });
        }
        let listed = registries.default.as_deref().is_some_and(|d| d.eq_ignore_ascii_case(&registry))
            || registries.allow.is_empty()
            || registries.allow.iter().any(|pattern| host_matches(pattern, &registry));
        if !listed {
            return Err(forbidden());
        }
        let endpoints = own_endpoints(&registry, false).ok_or_else(forbidden)?;
        Ok(Self { endpoints, trust: Trust::default(), reach: Reach::Public })
    }
}

/// Where a registry is asked when nothing is configured: over TLS; an insecure one in the clear as a second choice.
fn own_endpoints(registry: &str, insecure: bool) -> Option<Vec<Url>> {
    let host = api_host(registry);
    let schemes: &[&str] = if insecure { &["https", "http"] } else { &["https"] };
    schemes.iter().map(|scheme| Url::parse(&format!("{scheme}://{host}")).ok()).collect()
}

impl Reach {
    /// Whether a connection made for `host:port` may go to the address `ip`.
    pub(super) fn allows(self, registries: &Registries, host: &str, port: u16, ip: IpAddr) -> bool {
        is_public(ip)
            || registries.allow_networks.iter().any(|(network, bits)| contains(*network, *bits, ip))
            || (self == Reach::Known && is_known_endpoint(registries, host, port))
    }
}

fn is_known_endpoint(registries: &Registries, host: &str, port: u16) -> bool {
    let here = |url: &Url| {
        url.host_str().is_some_and(|h| h.eq_ignore_ascii_case(host))
            && url.port_or_known_default() == Some(port)
    };
    registries.known.iter().any(|(registry, settings)| match settings.endpoints.as_slice() {
        [] => own_endpoints(registry, settings.insecure).is_some_and(|own| own.iter().any(here)),
        listed => listed.iter().any(here),
    })
}

/// Whether `ip` lies in `network/bits`. An IPv4 address written as IPv6 counts as IPv4.
fn contains(network: IpAddr, bits: u8, ip: IpAddr) -> bool {
    fn same_prefix(a: u128, b: u128, width: u32, bits: u8) -> bool {
        let ignored = width.saturating_sub(u32::from(bits));
        a.checked_shr(ignored).unwrap_or(0) == b.checked_shr(ignored).unwrap_or(0)
    }
    match (network.to_canonical(), ip.to_canonical()) {
        (IpAddr::V4(n), IpAddr::V4(i)) => same_prefix(n.to_bits().into(), i.to_bits().into(), 32, bits),
        (IpAddr::V6(n), IpAddr::V6(i)) => same_prefix(n.to_bits(), i.to_bits(), 128, bits),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::RegistrySettings;

    fn known(endpoints: &[&str], insecure: bool) -> RegistrySettings {
        let endpoints = endpoints.iter().map(|e| e.parse().unwrap()).collect();
        RegistrySettings { endpoints, ca: None, insecure }
    }

    #[test]
    fn a_registry_is_asked_only_where_the_configuration_lets_it() {
        let any = Registries::default();
        let mut some = Registries { allow: vec!["quay.io".into(), "*.example.com".into()], ..any.clone() };
        some.known.insert("10.0.0.1:5000".into(), known(&["http://10.0.0.1:5000"], false));
        for (registries, registry, allowed) in [
            (&any, "quay.io", true),
            (&any, "docker.io", true),
            (&some, "quay.io", true),
            (&some, "QUAY.io", true),
            (&some, "ghcr.io", false),
            (&some, "a.example.com", true),
            (&some, "a.b.example.com", true),
            (&some, "example.com", false),
            (&some, "badexample.com", false),
            (&some, "10.0.0.1:5000", true),
            (&some, "10.0.0.1:5001", false),
        ] {
            assert_eq!(Route::to(registries, registry).is_ok(), allowed, "{registry}");
        }
    }

    #[test]
    fn endpoints_come_from_the_configuration_or_the_name() {
        let mut registries = Registries::default();
        registries.known.insert("old.example".into(), known(&[], true));
        registries
            .known
            .insert("m.example".into(), known(&["https://a.example/x", "https://m.example"], false));
        for (registry, endpoints) in [
            ("docker.io", vec!["https://registry-1.docker.io/"]),
            ("quay.io:8443", vec!["https://quay.io:8443/"]),
            ("[2606:4700::1]:5000", vec!["https://[2606:4700::1]:5000/"]),
            ("old.example", vec!["https://old.example/", "http://old.example/"]),
            ("m.example", vec!["https://a.example/x", "https://m.example/"]),
        ] {
            let route = Route::to(&registries, registry).unwrap();
            let got: Vec<&str> = route.endpoints.iter().map(Url::as_str).collect();
            assert_eq!(got, endpoints);
        }
    }

    #[test]
    fn private_addresses_need_a_word_in_the_configuration() {
        let mut registries = Registries {
            allow_networks: vec![("192.168.0.0".parse().unwrap(), 16), ("fd00::".parse().unwrap(), 8)],
            ..Registries::default()
        };
        registries.known.insert("r:5000".into(), known(&["http://r:5000"], false));
        for (reach, host, port, ip, allowed) in [
            (Reach::Public, "x", 443, "8.8.8.8", true),
            (Reach::Public, "x", 443, "10.0.0.1", false),
            (Reach::Public, "x", 443, "192.168.9.9", true),
            (Reach::Public, "x", 443, "fd12::1", true),
            (Reach::Public, "x", 443, "fc12::1", false),
            (Reach::Public, "r", 5000, "10.0.0.1", false),
            (Reach::Known, "r", 5000, "10.0.0.1", true),
            (Reach::Known, "R", 5000, "127.0.0.1", true),
            (Reach::Known, "r", 5001, "10.0.0.1", false),
            (Reach::Known, "s", 5000, "10.0.0.1", false),
        ] {
            assert_eq!(
                reach.allows(&registries, host, port, ip.parse().unwrap()),
                allowed,
                "{host}:{port} {ip}"
            );
        }
    }
}
