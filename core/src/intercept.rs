//! The forward proxy's rules: which connections are opened, which requests peers may answer, and whom it refuses to reach.

use regex::{Regex, RegexBuilder};

use hawker_oci::reference::host_matches;

/// The compiled form of a path's pattern is no larger than this.
const PATTERN_BYTES: usize = 256 << 10;

/// The handling of a request to a host that a rule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Peers may answer, where it is about a blob or a manifest.
    P2p,
    /// It goes to the host as it is.
    Direct,
}

/// Names hosts, and paths there.
#[derive(Clone, Debug)]
pub struct Rule {
    /// As [`host_matches`] has it: `quay.io`, `reg:5000`, `*.example.com`.
    pub host: String,
    /// Found anywhere in the path; `None`: any path.
    pub path: Option<Regex>,
    /// The handling of matching requests.
    pub action: Action,
}

/// The handling of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It ends here: requests are looked at one by one.
    Open,
    /// Its bytes go to the host, whatever they are.
    Tunnel,
    /// Nobody said that the host may be reached.
    Refuse,
}

/// Rules, the first that fits counts.
#[derive(Clone, Debug, Default)]
pub struct Rules(Vec<Rule>);

/// A path's pattern; the error is for people. Matching takes time linear in the path, whatever the pattern.
pub fn path_pattern(text: &str) -> Result<Regex, String> {
    RegexBuilder::new(text)
        .size_limit(PATTERN_BYTES)
        .build()
        .map_err(|error| error.to_string())
}

impl Rules {
    /// These, in this order.
    pub const fn new(rules: Vec<Rule>) -> Self {
        Self(rules)
    }

    /// The same rules, and after them those that share the pull API of these registries.
    #[must_use]
    pub fn with_registries(mut self, hosts: impl IntoIterator<Item = String>) -> Self {
        let path = path_pattern("^/v2/").ok();
        let rule = |host| Rule {
            host,
            path: path.clone(),
            action: Action::P2p,
        };
        self.0.extend(hosts.into_iter().map(rule));
        self
    }

    /// The handling of a connection to `host`, given as [`hawker_oci::reference::canonical_host`] writes it.
    /// `allowed`: the host may be reached though no rule names it.
    pub fn way(&self, host: &str, allowed: bool) -> Way {
        for rule in self.of(host) {
            match rule.action {
                Action::P2p => return Way::Open,
                // No request gets past it.
                Action::Direct if rule.path.is_none() => return Way::Tunnel,
                Action::Direct => {}
            }
        }
        if allowed || self.of(host).next().is_some() {
            Way::Tunnel
        } else {
            Way::Refuse
        }
    }

    /// The handling of a request for `path` at `host`.
    pub fn action(&self, host: &str, path: &str) -> Action {
        let fits = |rule: &&Rule| {
            rule.path
                .as_ref()
                .is_none_or(|pattern| pattern.is_match(path))
        };
        self.of(host)
            .find(fits)
            .map_or(Action::Direct, |rule| rule.action)
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn of(&self, host: &str) -> impl Iterator<Item = &Rule> {
        self.0
            .iter()
            .filter(move |rule| host_matches(&rule.host, host))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(action: Action, host: &str, path: &str) -> Rule {
        let path = (!path.is_empty()).then(|| path_pattern(path).unwrap());
        Rule {
            host: host.to_owned(),
            path,
            action,
        }
    }

    fn rules() -> Rules {
        use Action::{Direct, P2p};
        Rules::new(vec![
            rule(Direct, "quay.io", "/private/"),
            rule(P2p, "quay.io", "^/v2/"),
            rule(Direct, "git.example.com", ""),
            rule(P2p, "*.example.com", "blobs/sha256.*"),
            rule(Direct, "docs.example.org", "^/pages/"),
            rule(P2p, "reg:5000", ""),
        ])
    }

    #[test]
    fn a_connection_is_opened_tunnelled_or_refused() {
        for (host, allowed, way) in [
            ("quay.io", false, Way::Open),
            ("git.example.com", false, Way::Tunnel),
            ("a.example.com", false, Way::Open),
            ("a.example.com:8443", false, Way::Refuse),
            ("docs.example.org", false, Way::Tunnel),
            ("reg:5000", false, Way::Open),
            ("reg", false, Way::Refuse),
            ("reg", true, Way::Tunnel),
            ("elsewhere.example", true, Way::Tunnel),
            ("elsewhere.example", false, Way::Refuse),
        ] {
            assert_eq!(rules().way(host, allowed), way, "{host} {allowed}");
        }
        assert_eq!(Rules::default().way("quay.io", false), Way::Refuse);
    }

    #[test]
    fn the_first_rule_that_fits_a_request_counts() {
        for (host, path, action) in [
            ("quay.io", "/v2/a/blobs/sha256:x", Action::P2p),
            ("quay.io", "/v2/private/a/blobs/sha256:x", Action::Direct),
            ("quay.io", "/api/v2/", Action::Direct),
            ("git.example.com", "/v2/a/blobs/sha256:x", Action::Direct),
            ("a.example.com", "/v2/a/blobs/sha256:x", Action::P2p),
            ("a.example.com", "/v2/a/manifests/v1", Action::Direct),
            ("reg:5000", "/anything", Action::P2p),
            ("elsewhere.example", "/v2/a/blobs/sha256:x", Action::Direct),
        ] {
            assert_eq!(rules().action(host, path), action, "{host}{path}");
        }
    }

    #[test]
    fn registries_have_their_pull_api_shared() {
        let hosts = ["quay.io".to_owned(), "*.example.com".to_owned()];
        let rules = Rules::default().with_registries(hosts.clone());
        assert_eq!(
            (rules.way("quay.io", true), rules.way("a.example.com", true)),
            (Way::Open, Way::Open)
        );
        assert_eq!(rules.action("quay.io", "/v2/a/manifests/v1"), Action::P2p);
        assert_eq!(rules.action("quay.io", "/token"), Action::Direct);
        assert_eq!(rules.way("example.com", false), Way::Refuse);
        // Written rules come first, and leave the sharing of all others as it is.
        let written = vec![
            rule(Action::Direct, "git.example.com", ""),
            rule(Action::Direct, "quay.io", "/private/"),
        ];
        let rules = Rules::new(written).with_registries(hosts);
        assert_eq!(
            (rules.way("quay.io", true), rules.way("a.example.com", true)),
            (Way::Open, Way::Open)
        );
        assert_eq!(rules.way("git.example.com", true), Way::Tunnel);
        assert_eq!(
            rules.action("quay.io", "/v2/private/a/manifests/v1"),
            Action::Direct
        );
        assert_eq!(rules.action("quay.io", "/v2/a/manifests/v1"), Action::P2p);
    }

    #[test]
    fn a_pattern_that_is_none_or_too_large_is_refused() {
        assert!(path_pattern("(").is_err());
        assert!(path_pattern("(a{1000}){1000}").is_err());
    }

    proptest! {
        /// A request that peers may answer is only ever on a connection that is opened.
        #[test]
        fn what_peers_may_answer_is_opened(
            parts in proptest::collection::vec((any::<bool>(), 0..3_usize, 0..3_usize), 0..6),
            host in 0..2_usize,
            path in 0..3_usize,
            allowed in any::<bool>(),
        ) {
            let (hosts, paths) = (["a.example", "b.example", "*.example"], ["", "^/v2/", "blobs"]);
            let rules = parts.into_iter().map(|(p2p, host, path)| {
                rule(if p2p { Action::P2p } else { Action::Direct }, hosts[host], paths[path])
            });
            let rules = Rules::new(rules.collect());
            let path = ["/v2/a/blobs/x", "/v2/a/manifests/x", "/x"][path];
            if rules.action(hosts[host], path) == Action::P2p {
                prop_assert_eq!(rules.way(hosts[host], allowed), Way::Open);
            }
        }
    }
}
