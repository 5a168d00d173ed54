//! The pattern of an entry: `quay.io`, `https://index.docker.io/v1/`, `reg:5000/team`, `*.azurecr.io`.

use hawker_oci::reference::canonical_host;

/// A host, with or without globs in its labels, and the first parts of repositories' names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern {
    host: Host,
    path: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    /// As [`canonical_host`] writes it.
    Exact(String),
    /// Label by label, `*` and `?` in them.
    Glob {
        labels: Vec<String>,
        port: Option<String>,
    },
}

/// How closely a pattern matches: a longer path more than a shorter one, then a host more than a glob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Closeness {
    path: usize,
    exact: bool,
}

impl Pattern {
    /// The pattern of a key as docker, podman and kubelet write it; `None` for what is none.
    pub(super) fn parse(key: &str) -> Option<Self> {
        let key = key.trim();
        let key = key
            .strip_prefix("https://")
            .or_else(|| key.strip_prefix("http://"))
            .unwrap_or(key);
        let (host, path) = key.split_once('/').unwrap_or((key, ""));
        let mut path: Vec<String> = path
            .split('/')
            .filter(|part| !part.is_empty())
            .map(str::to_owned)
            .collect();
        // The version of the API that docker's oldest entries name says nothing.
        if path
            .first()
            .is_some_and(|first| first == "v1" || first == "v2")
        {
            path.remove(0);
        }
        let host = match host.contains(['*', '?']) {
            true => {
                let (name, port) = host
                    .split_once(':')
                    .map_or((host, None), |(name, port)| (name, Some(port)));
                let labels = name.split('.').map(str::to_ascii_lowercase).collect();
                Host::Glob {
                    labels,
                    port: port.filter(|port| *port != "443").map(str::to_owned),
                }
            }
            false => Host::Exact(canonical_host(host).ok()?),
        };
        Some(Self { host, path })
    }

    /// Whether, and how closely, this is about `repository` at `registry` (as [`canonical_host`] writes it).
    ///
    /// Each glob stands for one label, as with kubelet. A path counts in whole parts, as with podman: `quay.io/org` is not about
    /// `quay.io/organisation`.
    pub(super) fn matches(&self, registry: &str, repository: &str) -> Option<Closeness> {
        let mut parts = repository.split('/');
        let matches =
            self.host.matches(registry) && self.path.iter().all(|part| parts.next() == Some(part));
        matches.then_some(Closeness {
            path: self.path.len(),
            exact: matches!(self.host, Host::Exact(_)),
        })
    }
}

impl Host {
    fn matches(&self, registry: &str) -> bool {
        match self {
            Host::Exact(host) => host == registry,
            Host::Glob { labels, port } => {
                let (name, its_port) = registry
                    .rsplit_once(':')
                    .filter(|(name, _)| !name.contains(':') || name.ends_with(']'))
                    .map_or((registry, None), |(name, port)| (name, Some(port)));
                let mut its_labels = name.split('.');
                port.as_deref() == its_port
                    && labels
                        .iter()
                        .all(|glob| its_labels.next().is_some_and(|label| fits(glob, label)))
                    && its_labels.next().is_none()
            }
        }
    }
}

/// Whether a text fits a glob of `*` (anything) and `?` (one character). At most one way is tried for each `*`.
fn fits(glob: &str, text: &str) -> bool {
    let (glob, text): (Vec<char>, Vec<char>) = (glob.chars().collect(), text.chars().collect());
    let (mut g, mut t) = (0, 0);
    // The position of the last `*`, and the length of the text that it stands for.
    let mut star = None;
    while t < text.len() {
        match glob.get(g) {
            Some('*') => {
                star = Some((g, t));
                g += 1;
            }
            Some(c) if *c == '?' || *c == text[t] => {
                g += 1;
                t += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    g = at + 1;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    glob[g..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_match_as_docker_and_kubelet_have_it() {
        for (key, registry, repository, closeness) in [
            ("quay.io", "quay.io", "a/b", Some((0, true))),
            ("QUAY.io", "quay.io", "a/b", Some((0, true))),
            ("https://quay.io", "quay.io", "a/b", Some((0, true))),
            ("http://reg:5000/v2/", "reg:5000", "a", Some((0, true))),
            ("quay.io:443", "quay.io", "a", Some((0, true))),
            ("quay.io", "quay.io:8443", "a", None),
            ("quay.io", "evilquay.io", "a", None),
            (
                "https://index.docker.io/v1/",
                "docker.io",
                "library/debian",
                Some((0, true)),
            ),
            (
                "index.docker.io",
                "docker.io",
                "library/debian",
                Some((0, true)),
            ),
            (
                "registry-1.docker.io",
                "docker.io",
                "library/debian",
                Some((0, true)),
            ),
            ("docker.io", "docker.io", "library/debian", Some((0, true))),
            (
                "docker.io/library",
                "docker.io",
                "library/debian",
                Some((1, true)),
            ),
            (
                "docker.io/library/debian",
                "docker.io",
                "library/debian",
                Some((2, true)),
            ),
            (
                "docker.io/library/debian/x",
                "docker.io",
                "library/debian",
                None,
            ),
            ("docker.io/lib", "docker.io", "library/debian", None),
            ("docker.io/library", "docker.io", "", None),
            ("*.azurecr.io", "x.azurecr.io", "a", Some((0, false))),
            ("*.azurecr.io", "x.y.azurecr.io", "a", None),
            ("*.azurecr.io", "azurecr.io", "a", None),
            ("*.*.azurecr.io", "x.y.azurecr.io", "a", Some((0, false))),
            ("registry.*", "registry.io", "a", Some((0, false))),
            ("app*.k8s.io", "app-1.k8s.io", "a", Some((0, false))),
            ("app?.k8s.io", "app-1.k8s.io", "a", None),
            (
                "*.example.com:5000/team",
                "r.example.com:5000",
                "team/x",
                Some((1, false)),
            ),
            ("*.example.com:5000", "r.example.com", "team/x", None),
            ("*.example.com", "r.example.com:5000", "team/x", None),
            ("*", "[::1]:5000", "a", None),
            ("[::1]:5000", "[::1]:5000", "a", Some((0, true))),
        ] {
            let found = Pattern::parse(key).and_then(|p| p.matches(registry, repository));
            let expected = closeness.map(|(path, exact)| Closeness { path, exact });
            assert_eq!(found, expected, "{key} {registry}/{repository}");
        }
        for none in ["", "a b", "user@host", "/x"] {
            assert_eq!(Pattern::parse(none), None, "{none}");
        }
    }

    /// The same by trying all ways.
    fn naive(glob: &[u8], text: &[u8]) -> bool {
        match (glob, text) {
            ([], []) => true,
            ([b'*', rest @ ..], _) => (0..=text.len()).any(|n| naive(rest, &text[n..])),
            ([b'?', glob @ ..], [_, text @ ..]) => naive(glob, text),
            ([a, glob @ ..], [b, text @ ..]) => a == b && naive(glob, text),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn globs_fit_what_they_should(glob in "[ab*?]{0,6}", text in "[ab]{0,6}") {
            prop_assert_eq!(fits(&glob, &text), naive(glob.as_bytes(), text.as_bytes()));
        }
    }
}
