//! The policy for requests: the registries, and the addresses at which a request may end up.

use std::net::IpAddr;
use std::path::PathBuf;

use hawker_oci::challenge::is_trusted;
use hawker_oci::reference::{api_host, canonical_host, is_public};
use url::{Host, Url};

use super::OriginError;
use crate::settings::{ClientIdentity, Registries};

/// How one registry is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Base addresses, to be tried in order; never empty.
    pub(super) endpoints: Vec<Url>,
    /// The trust in TLS.
    pub(super) trust: Trust,
    /// The addresses that connections may reach.
    pub(super) reach: Reach,
    /// Realms that the configuration trusts, besides those in the registry's own domain.
    realms: Vec<Url>,
}

/// The trust in TLS certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Trust {
    /// A PEM file of authorities, besides the system's.
    pub(super) ca: Option<PathBuf>,
    /// Any certificate will do, and https may lead to http.
    pub(super) insecure: bool,
    /// Shown where the other side asks for a client's certificate.
    pub(super) identity: Option<ClientIdentity>,
}

impl Trust {
    /// The files that it depends on.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let identity = self
            .identity
            .iter()
            .flat_map(|identity| [&identity.certificate, &identity.key]);
        self.ca.iter().chain(identity).cloned().collect()
    }

    /// The same for hosts that the identity is not for.
    pub(super) fn without_identity(&self) -> Self {
        Self {
            identity: None,
            ..self.clone()
        }
    }
}

/// The addresses that connections may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Reach {
    /// Public addresses and the networks that the configuration lists: for registries that only a client named.
    Public,
    /// Also the endpoints of the registries that the configuration knows: for these registries, and where they redirect to.
    Known,
    /// Also the realms that the configuration lists, and other ports of the hosts that those endpoints are on: for the realms of
    /// these registries.
    Realms,
}

/// Why a realm is not asked, and no client is sent there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Untrusted {
    /// Not an address with a host.
    #[error("it is no http or https address")]
    Address,
    /// In the clear, from a registry that is not.
    #[error("{0} is not https")]
    Plain(String),
    /// Outside the registry's domain.
    #[error(
        "{0} is outside its domain; if that is right, list it among this registry's realms in the configuration"
    )]
    Foreign(String),
}

impl Route {
    /// The way to `registry`, if the configuration lets it be asked.
    pub(super) fn to(registries: &Registries, registry: &str) -> Result<Self, OriginError> {
        let forbidden = || OriginError::Forbidden(registry.to_owned());
        let registry = canonical_host(registry).map_err(|_| forbidden())?;
        if !registries.allow.is_empty() && !registries.is_listed(&registry) {
            return Err(forbidden());
        }
        Self::to_allowed(registries, &registry)
    }

    /// The way to a host, given as [`canonical_host`] writes it, that may be asked.
    pub(super) fn to_allowed(registries: &Registries, host: &str) -> Result<Self, OriginError> {
        let forbidden = || OriginError::Forbidden(host.to_owned());
        let Some(known) = registries.known.get(host) else {
            let endpoints = vec![own_endpoint(host).ok_or_else(forbidden)?];
            return Ok(Self {
                endpoints,
                trust: Trust::default(),
                reach: Reach::Public,
                realms: Vec::new(),
            });
        };
        let endpoints = match known.endpoints.as_slice() {
            [] => vec![own_endpoint(host).ok_or_else(forbidden)?],
            listed => listed.to_vec(),
        };
        let trust = Trust {
            ca: known.ca.clone(),
            insecure: known.insecure,
            identity: known.identity.clone(),
        };
        Ok(Self {
            endpoints,
            trust,
            reach: Reach::Known,
            realms: known.realms.clone(),
        })
    }

    /// Whether a connection could be made to any of the endpoints, as far as that can be told without looking names up.
    pub(super) fn is_reachable(&self, registries: &Registries) -> bool {
        self.endpoints.iter().any(|url| {
            let ip = match url.host() {
                Some(Host::Ipv4(ip)) => IpAddr::V4(ip),
                Some(Host::Ipv6(ip)) => IpAddr::V6(ip),
                Some(Host::Domain(_)) => return true,
                None => return false,
            };
            let (host, port) = (
                url.host_str().unwrap_or_default(),
                url.port_or_known_default(),
            );
            port.is_some_and(|port| self.reach.allows(registries, host, port, ip))
        })
    }

    /// Whether a URL is on the host of an endpoint.
    pub(super) fn is_at_home(&self, url: &Url) -> bool {
        self.endpoints
            .iter()
            .any(|endpoint| endpoint.host() == url.host())
    }

    /// The way to `host:port` that a client of the forward proxy names, `name` being its name among registries. Realms of the
    /// configuration may be at private addresses, like its endpoints.
    pub(super) fn to_named(
        registries: &Registries,
        name: &str,
        host: &str,
        port: u16,
    ) -> Result<Self, OriginError> {
        let mut route = Self::to_allowed(registries, name)?;
        if is_listed_realm(registries, host, port) {
            route.reach = Reach::Realms;
        }
        Ok(route)
    }

    /// The endpoint that credentials may go to: the registry itself, which is the one on its own host, or else the last one.
    pub(super) fn home(&self, registry: &str) -> &Url {
        let host = api_host(registry);
        let own = self
            .endpoints
            .iter()
            .find(|url| url.authority().eq_ignore_ascii_case(host));
        own.or(self.endpoints.last())
            .expect("a route has an endpoint")
    }

    /// The address of a realm, if it may speak for `registry`. One that begins with `/` is on the host of the endpoint that named
    /// it.
    pub(super) fn realm(
        &self,
        registry: &str,
        endpoint: &Url,
        realm: &str,
    ) -> Result<Url, Untrusted> {
        let parsed = if realm.starts_with('/') {
            endpoint.join(realm)
        } else {
            Url::parse(realm)
        };
        let mut url = parsed.map_err(|_| Untrusted::Address)?;
        url.set_fragment(None);
        let host = match (url.scheme(), url.host_str()) {
            ("http" | "https", Some(host))
                if url.username().is_empty() && url.password().is_none() =>
            {
                host
            }
            _ => return Err(Untrusted::Address),
        };
        if self
            .realms
            .iter()
            .any(|listed| listed.origin() == url.origin())
        {
            return Ok(url);
        }
        let plain = self.trust.insecure
            || self
                .endpoints
                .iter()
                .any(|endpoint| endpoint.scheme() == "http");
        if url.scheme() == "http" && !plain {
            return Err(Untrusted::Plain(host.to_owned()));
        }
        let hosts = self
            .endpoints
            .iter()
            .filter_map(Url::host_str)
            .chain([registry]);
        match hosts.into_iter().any(|own| is_trusted(own, host)) {
            true => Ok(url),
            false => Err(Untrusted::Foreign(host.to_owned())),
        }
    }

    /// The way to a URL that a manifest names, if hosts like it may be asked. Bytes in the clear could be anybody's,
    /// and most of them are passed on before their digest is known. So plain HTTP is used only for hosts that the
    /// configuration asks in the clear as well.
    pub(super) fn elsewhere(registries: &Registries, url: &Url) -> Result<Self, OriginError> {
        let host = url.host_str().unwrap_or_default();
        let in_the_clear = |known: &Url| known.scheme() == "http" && known.origin() == url.origin();
        let safe = url.scheme() == "https" || is_known_endpoint(registries, in_the_clear);
        if !safe || !registries.allow.is_empty() && !registries.is_allowed(host) {
            return Err(OriginError::Forbidden(host.to_owned()));
        }
        Ok(Self {
            endpoints: vec![url.clone()],
            trust: Trust::default(),
            reach: Reach::Public,
            realms: Vec::new(),
        })
    }
}

/// The endpoint of a registry without configuration: over TLS. One in the clear is configured with an `http` address.
fn own_endpoint(registry: &str) -> Option<Url> {
    Url::parse(&format!("https://{}", api_host(registry))).ok()
}

impl Reach {
    /// Whether a connection made for `host:port` may go to the address `ip`.
    pub(super) fn allows(self, registries: &Registries, host: &str, port: u16, ip: IpAddr) -> bool {
        is_public(ip)
            || registries
                .allow_networks
                .iter()
                .any(|network| network.contains(ip))
            || match self {
                Reach::Public => false,
                Reach::Known => is_known_endpoint(registries, |url| is_at(url, host, Some(port))),
                Reach::Realms => {
                    is_known_endpoint(registries, |url| is_at(url, host, None))
                        || is_listed_realm(registries, host, port)
                }
            }
    }

    /// The same for the realms of the registries that this is for.
    pub(super) fn of_realms(self) -> Self {
        if self == Reach::Public {
            Reach::Public
        } else {
            Reach::Realms
        }
    }
}

fn is_at(url: &Url, host: &str, port: Option<u16>) -> bool {
    url.host_str().is_some_and(|h| h.eq_ignore_ascii_case(host))
        && (port.is_none() || url.port_or_known_default() == port)
}

fn is_known_endpoint(registries: &Registries, here: impl Fn(&Url) -> bool) -> bool {
    registries
        .known
        .iter()
        .any(|(registry, settings)| match settings.endpoints.as_slice() {
            [] => own_endpoint(registry).is_some_and(|own| here(&own)),
            listed => listed.iter().any(&here),
        })
}

/// Whether the configuration names a host as that of an endpoint or a realm.
pub(super) fn is_in_configuration(registries: &Registries, host: &str) -> bool {
    let realms = registries.known.values().flat_map(|known| &known.realms);
    is_known_endpoint(registries, |url| is_at(url, host, None))
        || realms.into_iter().any(|url| is_at(url, host, None))
}

/// Whether the configuration lists a realm here.
pub(crate) fn is_listed_realm(registries: &Registries, host: &str, port: u16) -> bool {
    let realms = registries.known.values().flat_map(|known| &known.realms);
    realms.into_iter().any(|url| is_at(url, host, Some(port)))
}

#[cfg(test)]
mod tests {
    use hawker_core::place::Network;

    use super::*;
    use crate::settings::RegistrySettings;

    fn known(endpoints: &[&str], insecure: bool) -> RegistrySettings {
        let endpoints = endpoints.iter().map(|e| e.parse().unwrap()).collect();
        RegistrySettings {
            endpoints,
            insecure,
            ..RegistrySettings::default()
        }
    }

    #[test]
    fn a_registry_is_asked_only_where_the_configuration_lets_it() {
        let any = Registries::default();
        let mut some = Registries {
            allow: vec!["quay.io".into(), "*.example.com".into()],
            ..any.clone()
        };
        some.known.insert(
            "10.0.0.1:5000".into(),
            known(&["http://10.0.0.1:5000"], false),
        );
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
            assert_eq!(
                Route::to(registries, registry).is_ok(),
                allowed,
                "{registry}"
            );
        }
    }

    #[test]
    fn a_private_address_that_the_configuration_does_not_name_is_not_asked() {
        let mut registries = Registries::default();
        registries.known.insert(
            "10.0.0.1:5000".into(),
            known(&["http://10.0.0.1:5000"], false),
        );
        for (registry, reachable) in [
            ("quay.io", true),
            ("10.0.0.1:5000", true),
            ("10.0.0.1:5001", false),
            ("127.0.0.1:5000", false),
            ("[::1]:5000", false),
            ("8.8.8.8", true),
        ] {
            let route = Route::to(&registries, registry);
            assert_eq!(
                route.is_ok_and(|route| route.is_reachable(&registries)),
                reachable,
                "{registry}"
            );
        }
    }

    #[test]
    fn no_manifest_leads_to_what_is_sent_in_the_clear_unless_the_configuration_does() {
        let mut registries = Registries::default();
        registries.known.insert(
            "plain.example".into(),
            known(&["http://10.0.0.1:5000"], false),
        );
        for (url, allowed) in [
            ("https://x.example/layer", true),
            ("http://x.example/layer", false),
            ("http://10.0.0.1:5000/layer", true),
            ("http://10.0.0.1:5001/layer", false),
            ("http://10.0.0.1/layer", false),
        ] {
            assert_eq!(
                Route::elsewhere(&registries, &url.parse().unwrap()).is_ok(),
                allowed,
                "{url}"
            );
        }
    }

    #[test]
    fn endpoints_come_from_the_configuration_or_the_name() {
        let mut registries = Registries::default();
        registries
            .known
            .insert("old.example".into(), known(&[], true));
        registries.known.insert(
            "m.example".into(),
            known(&["https://a.example/x", "https://m.example"], false),
        );
        for (registry, endpoints) in [
            ("docker.io", vec!["https://registry-1.docker.io/"]),
            ("quay.io:8443", vec!["https://quay.io:8443/"]),
            ("[2606:4700::1]:5000", vec!["https://[2606:4700::1]:5000/"]),
            ("old.example", vec!["https://old.example/"]),
            (
                "m.example",
                vec!["https://a.example/x", "https://m.example/"],
            ),
        ] {
            let route = Route::to(&registries, registry).unwrap();
            let got: Vec<&str> = route.endpoints.iter().map(Url::as_str).collect();
            assert_eq!(got, endpoints);
        }
    }

    #[test]
    fn private_addresses_need_a_word_in_the_configuration() {
        let mut registries = Registries {
            allow_networks: [("192.168.0.0", 16), ("fd00::", 8)]
                .map(|(address, length)| Network::new(address.parse().unwrap(), length).unwrap())
                .into(),
            ..Registries::default()
        };
        registries
            .known
            .insert("r:5000".into(), known(&["http://r:5000"], false));
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

    #[test]
    fn a_realm_speaks_for_its_registry_or_is_listed() {
        let mut registries = Registries::default();
        registries
            .known
            .insert("plain:5000".into(), known(&["http://plain:5000"], false));
        registries
            .known
            .insert("old.example".into(), known(&[], true));
        registries.known.insert(
            "m.example".into(),
            known(&["https://a.corp.net", "https://m.example"], false),
        );
        let listed = RegistrySettings {
            realms: vec!["http://sso.corp.net:8080/x".parse().unwrap()],
            ..known(&["https://r.example"], false)
        };
        registries.known.insert("r.example".into(), listed);
        for (registry, realm, trusted) in [
            ("docker.io", "https://auth.docker.io/token", Ok(())),
            (
                "docker.io",
                "http://auth.docker.io/token",
                Err(Untrusted::Plain("auth.docker.io".into())),
            ),
            (
                "docker.io",
                "https://auth.evil.io/token",
                Err(Untrusted::Foreign("auth.evil.io".into())),
            ),
            (
                "docker.io",
                "https://user@auth.docker.io/token",
                Err(Untrusted::Address),
            ),
            (
                "docker.io",
                "ftp://auth.docker.io/token",
                Err(Untrusted::Address),
            ),
            ("docker.io", "token", Err(Untrusted::Address)),
            ("docker.io", "/token", Ok(())),
            ("docker.io", "//auth.docker.io/token", Ok(())),
            (
                "docker.io",
                "//auth.evil.io/token",
                Err(Untrusted::Foreign("auth.evil.io".into())),
            ),
            ("docker.io", "https://AUTH.docker.io/token?a=b#c", Ok(())),
            ("plain:5000", "http://plain:5001/token", Ok(())),
            (
                "plain:5000",
                "http://other/token",
                Err(Untrusted::Foreign("other".into())),
            ),
            ("old.example", "http://old.example/token", Ok(())),
            ("m.example", "https://auth.corp.net/token", Ok(())),
            ("r.example", "http://sso.corp.net:8080/token", Ok(())),
            (
                "r.example",
                "http://sso.corp.net/token",
                Err(Untrusted::Plain("sso.corp.net".into())),
            ),
            (
                "r.example",
                "https://sso.corp.net:8080/token",
                Err(Untrusted::Foreign("sso.corp.net".into())),
            ),
        ] {
            let route = Route::to(&registries, registry).unwrap();
            let judged = route.realm(registry, route.home(registry), realm);
            assert_eq!(judged.map(|_| ()), trusted, "{registry} {realm}");
        }
        let (inside, reach) = ("10.0.0.1".parse().unwrap(), Reach::Known.of_realms());
        for (reach, host, port, allowed) in [
            (reach, "plain", 5001, true),
            (reach, "sso.corp.net", 8080, true),
            (reach, "sso.corp.net", 8081, false),
            (reach, "other", 5000, false),
            (Reach::Public.of_realms(), "plain", 5000, false),
        ] {
            assert_eq!(
                reach.allows(&registries, host, port, inside),
                allowed,
                "{host}:{port}"
            );
        }
    }
}
