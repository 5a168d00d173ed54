//! The demands of a registry: the challenges of `WWW-Authenticate` (RFC 9110, 11.6.1; distribution's token
//! specification), and whether a realm in them may be trusted to speak for the registry.

use std::fmt;

use crate::reference::host_name;

/// Longest line looked at, in bytes. Docker Hub's has 200.
pub const MAX_LINE_BYTES: usize = 8 << 10;

/// Challenges of one response that are looked at.
pub const MAX_CHALLENGES: usize = 8;

/// A challenge that registries use. Other schemes are none of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    /// Get a token at the realm.
    Bearer(Bearer),
    /// Send name and password to the registry itself.
    Basic {
        /// For people.
        realm: String,
    },
}

/// The endpoint of a token and its scope.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bearer {
    /// The token endpoint's address, as it came.
    pub realm: String,
    /// The service of the token: the registry, as the token endpoint knows it.
    pub service: Option<String>,
    /// Rights, separated by spaces: `repository:library/debian:pull`.
    pub scope: Option<String>,
    /// Why the token that came with the request was not good enough.
    pub error: Option<String>,
}

impl Bearer {
    /// The rights to ask for in order to read `repository`: those of the challenge, and the repository's own if the
    /// challenge names no repository. Empty for `/v2/` (an empty name) if the challenge names nothing at all.
    pub fn scopes(&self, repository: &str) -> Vec<String> {
        let said = self
            .scope
            .as_deref()
            .unwrap_or_default()
            .split_ascii_whitespace();
        let mut scopes: Vec<String> = said.map(str::to_owned).collect();
        if !repository.is_empty() && !scopes.iter().any(|scope| repository_of(scope).is_some()) {
            scopes.push(pull_scope(repository));
        }
        scopes
    }
}

/// The right to read a repository.
pub fn pull_scope(repository: &str) -> String {
    format!("repository:{repository}:pull")
}

/// The repository that a scope (`repository:NAME:ACTIONS`) is about; the name may contain a host with a port.
pub fn repository_of(scope: &str) -> Option<&str> {
    let (name, _) = scope.strip_prefix("repository:")?.rsplit_once(':')?;
    Some(name).filter(|name| !name.is_empty())
}

impl fmt::Display for Challenge {
    /// As a line of `WWW-Authenticate`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Challenge::Basic { realm } => write!(f, "Basic realm={}", Quoted(realm)),
            Challenge::Bearer(bearer) => {
                write!(f, "Bearer realm={}", Quoted(&bearer.realm))?;
                let more = [
                    ("service", &bearer.service),
                    ("scope", &bearer.scope),
                    ("error", &bearer.error),
                ];
                more.iter()
                    .filter_map(|(name, value)| value.as_ref().map(|value| (name, value)))
                    .try_for_each(|(name, value)| write!(f, ",{name}={}", Quoted(value)))
            }
        }
    }
}

/// A quoted string (RFC 9110, 5.6.4).
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "\"{}\"",
            self.0.replace('\\', "\\\\").replace('"', "\\\"")
        )
    }
}

/// The challenges in all lines of a response, in order. A challenge that can't be parsed is left out with the rest of
/// its line; so is a challenge that has a parameter twice.
pub fn parse<'a>(lines: impl IntoIterator<Item = &'a [u8]>) -> Vec<Challenge> {
    let lines = lines
        .into_iter()
        .filter(|line| line.len() <= MAX_LINE_BYTES)
        .take(MAX_CHALLENGES);
    lines
        .flat_map(|line| Cursor(line).take(MAX_CHALLENGES))
        .flatten()
        .take(MAX_CHALLENGES)
        .collect()
}

/// The rest of a line. Each step yields one challenge, `None` for one that is left out.
struct Cursor<'a>(&'a [u8]);

impl Iterator for Cursor<'_> {
    type Item = Option<Challenge>;

    fn next(&mut self) -> Option<Self::Item> {
        self.pass(|c| matches!(c, b' ' | b'\t' | b','));
        let scheme = self.token()?.to_ascii_lowercase();
        let mut said = Parameters::default();
        while let Some(name) = self.name() {
            let Some(value) = self.value() else {
                self.0 = b"";
                return None;
            };
            said.add(&name, value);
            self.pass(|c| matches!(c, b' ' | b'\t' | b','));
        }
        Some(said.challenge(&scheme))
    }
}

impl<'a> Cursor<'a> {
    fn pass(&mut self, what: impl Fn(u8) -> bool) {
        self.span(what);
    }

    /// Takes what `what` holds for.
    fn span(&mut self, what: impl Fn(u8) -> bool) -> &'a [u8] {
        let end = self
            .0
            .iter()
            .position(|c| !what(*c))
            .unwrap_or(self.0.len());
        let (taken, rest) = self.0.split_at(end);
        self.0 = rest;
        taken
    }

    fn token(&mut self) -> Option<&'a str> {
        let token = self.span(is_token);
        std::str::from_utf8(token)
            .ok()
            .filter(|token| !token.is_empty())
    }

    /// A parameter's name with its `=`. Any other text begins the next challenge, and stays.
    fn name(&mut self) -> Option<String> {
        let blank = |c| matches!(c, b' ' | b'\t' | b',');
        let mut ahead = Cursor(self.0);
        ahead.pass(blank);
        let name = ahead.token()?.to_ascii_lowercase();
        ahead.pass(|c| matches!(c, b' ' | b'\t'));
        ahead.0 = ahead.0.strip_prefix(b"=")?;
        ahead.pass(|c| matches!(c, b' ' | b'\t'));
        *self = ahead;
        Some(name)
    }

    /// A value, quoted or not. Unquoted addresses are no tokens, and some registries send them.
    fn value(&mut self) -> Option<String> {
        match self.0.strip_prefix(b"\"") {
            Some(rest) => {
                self.0 = rest;
                self.quoted()
            }
            None => text(self.span(|c| c.is_ascii_graphic() && !matches!(c, b',' | b'"'))),
        }
    }

    /// The rest of a quoted string.
    fn quoted(&mut self) -> Option<String> {
        let mut value = Vec::new();
        loop {
            let (c, rest) = self.0.split_first()?;
            self.0 = rest;
            match c {
                b'"' => return text(&value),
                b'\\' => {
                    let (escaped, rest) = rest.split_first()?;
                    self.0 = rest;
                    value.push(*escaped);
                }
                c => value.push(*c),
            }
        }
    }
}

/// Characters of a token (RFC 9110, 5.6.2).
fn is_token(c: u8) -> bool {
    c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c)
}

/// A value that can be written into a header again.
fn text(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?;
    Some(text.to_owned()).filter(|text| !text.chars().any(char::is_control))
}

/// The parameters of a challenge that Hawker needs.
#[derive(Default)]
struct Parameters {
    realm: Option<String>,
    service: Option<String>,
    scope: Option<String>,
    error: Option<String>,
    contradictory: bool,
}

impl Parameters {
    fn add(&mut self, name: &str, value: String) {
        let place = match name {
            "realm" => &mut self.realm,
            "service" => &mut self.service,
            "scope" => &mut self.scope,
            "error" => &mut self.error,
            _ => return,
        };
        self.contradictory |= place.replace(value).is_some();
    }

    fn challenge(self, scheme: &str) -> Option<Challenge> {
        let Parameters {
            realm,
            service,
            scope,
            error,
            contradictory,
        } = self;
        match scheme {
            _ if contradictory => None,
            "bearer" => {
                let realm = realm.filter(|realm| !realm.is_empty())?;
                Some(Challenge::Bearer(Bearer {
                    realm,
                    service,
                    scope,
                    error,
                }))
            }
            "basic" => Some(Challenge::Basic {
                realm: realm.unwrap_or_default(),
            }),
            _ => None,
        }
    }
}

/// Realms outside their registry's domain that are known to be right. Others are for the configuration to list.
const ELSEWHERE: [(&str, &str); 1] = [("lscr.io", "ghcr.io")];

/// Domains below which strangers have registries side by side.
const SHARED: [&str; 15] = [
    "amazonaws.com",
    "amazonaws.com.cn",
    "azurecr.cn",
    "azurecr.io",
    "azurewebsites.net",
    "cloudapp.azure.com",
    "fly.dev",
    "herokuapp.com",
    "jfrog.io",
    "onrender.com",
    "run.app",
    "scw.cloud",
    "sslip.io",
    "svc.cluster.local",
    "nip.io",
];

/// Second-level labels below which anybody gets a name, in countries that have them; so do all labels of one or two letters.
const HANDED_OUT: [&str; 14] = [
    "asn", "biz", "com", "edu", "gob", "gov", "ltd", "mil", "net", "nom", "org", "plc", "sch",
    "web",
];

/// Whether a realm at the host `realm` may give rights for a registry, both without or with ports, in lower case: secrets for
/// the registry go there, and clients are sent there.
///
/// A realm is trusted if it is the same host, above it or below it in the DNS (the owner of one owns the other), or
/// beside it in one organisation's domain. The start of an organisation's domain is told without the public suffix
/// list, which would be 9 MB of generated code that is out of date a week later. A realm that can't be judged for
/// certain is not trusted, and left to the configuration.
pub fn is_trusted(registry: &str, realm: &str) -> bool {
    let (registry, realm) = (host_name(registry), host_name(realm));
    if registry == realm || ELSEWHERE.contains(&(registry, realm)) {
        return true;
    }
    if is_address(registry) || is_address(realm) {
        return false;
    }
    let labels = |host: &str| host.split('.').count();
    let common = common_domain(registry, realm);
    match labels(common) {
        0 | 1 => false,
        _ if common == registry || common == realm => true,
        _ if SHARED.iter().any(|shared| common.ends_with(shared)) => false,
        2 => !is_handed_out(common),
        _ => true,
    }
}

fn is_address(host: &str) -> bool {
    host.starts_with('[') || host.parse::<std::net::Ipv4Addr>().is_ok()
}

/// The longest domain that both hosts are in, or are.
fn common_domain<'a>(a: &'a str, b: &str) -> &'a str {
    let same = a.rsplit('.').zip(b.rsplit('.')).take_while(|(x, y)| x == y);
    let bytes: usize = same.map(|(label, _)| label.len() + 1).sum();
    &a[(a.len() + 1).saturating_sub(bytes).min(a.len())..]
}

/// Whether a domain of two labels may be one where everybody gets a name, like `co.uk`.
fn is_handed_out(domain: &str) -> bool {
    domain.split_once('.').is_some_and(|(label, top)| {
        top.len() == 2 && (label.len() <= 2 || HANDED_OUT.contains(&label))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: &str, scope: &str) -> Challenge {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Challenge::Bearer(Bearer {
            realm: realm.to_owned(),
            service: some(service),
            scope: some(scope),
            error: None,
        })
    }

    fn basic(realm: &str) -> Challenge {
        Challenge::Basic {
            realm: realm.to_owned(),
        }
    }

    #[test]
    fn the_challenges_that_registries_send() {
        let hub = "Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\",\
                   scope=\"repository:library/debian:pull\"";
        let table: [(&[&str], Vec<Challenge>); 22] = [
            (&[], vec![]),
            (&[""], vec![]),
            (&[", ,"], vec![]),
            (
                &[hub],
                vec![bearer(
                    "https://auth.docker.io/token",
                    "registry.docker.io",
                    "repository:library/debian:pull",
                )],
            ),
            (
                &["bEARER Realm = \"https://r/\" , SERVICE=s"],
                vec![bearer("https://r/", "s", "")],
            ),
            (
                &["Bearer realm=https://r/t?a=b,service=x y"],
                vec![bearer("https://r/t?a=b", "x", "")],
            ),
            (
                &["Bearer realm=\"r\" service=\"s\" scope=\"t\""],
                vec![bearer("r", "s", "t")],
            ),
            (
                &["Basic realm=\"Registry Realm\""],
                vec![basic("Registry Realm")],
            ),
            (&["Basic"], vec![basic("")]),
            (
                &["Basic, Bearer realm=\"r\""],
                vec![basic(""), bearer("r", "", "")],
            ),
            (
                &["Bearer realm=\"r\",service=\"a, b\",Basic realm=\"x\""],
                vec![bearer("r", "a, b", ""), basic("x")],
            ),
            (
                &["Bearer realm=\"r\"", "Basic realm=\"x\""],
                vec![bearer("r", "", ""), basic("x")],
            ),
            (
                &["Bearer realm=\"a\\\"b\\\\c\""],
                vec![bearer("a\"b\\c", "", "")],
            ),
            (
                &["Negotiate", "Bearer realm=\"r\""],
                vec![bearer("r", "", "")],
            ),
            (
                &["NTLM TlRMTVNTUAAB==, Basic realm=\"x\""],
                vec![basic("x")],
            ),
            (&["Bearer service=\"s\""], vec![]),
            (&["Bearer realm=\"\""], vec![]),
            (&["Bearer realm=\"r\",realm=\"evil\""], vec![]),
            (&["Bearer realm=\"r"], vec![]),
            (&["Bearer realm=\"r\\"], vec![]),
            (
                &["Basic realm=\"x\", Bearer realm=\"r\u{7}\", Basic realm=\"y\""],
                vec![basic("x")],
            ),
            (&["Bearer realm=\"r\",error=\"invalid_token\",x=\"y\""], {
                let error = Some("invalid_token".to_owned());
                vec![Challenge::Bearer(Bearer {
                    realm: "r".to_owned(),
                    error,
                    ..Bearer::default()
                })]
            }),
        ];
        for (lines, expected) in table {
            assert_eq!(
                parse(lines.iter().map(|line| line.as_bytes())),
                expected,
                "{lines:?}"
            );
        }
    }

    #[test]
    fn lines_and_challenges_have_a_bound() {
        let long = format!("Bearer realm=\"{}\"", "r".repeat(MAX_LINE_BYTES));
        assert_eq!(parse([long.as_bytes(), b"Basic"]), [basic("")]);
        let many = "Basic,".repeat(MAX_LINE_BYTES / 6);
        assert_eq!(parse([many.as_bytes()]).len(), MAX_CHALLENGES);
        assert_eq!(parse([b"Basic".as_slice(); 100]).len(), MAX_CHALLENGES);
    }

    #[test]
    fn the_repositorys_scope_is_merged_in_where_it_is_left_out() {
        let own = "repository:a/b:pull";
        for (said, repository, expected) in [
            (None, "a/b", vec![own]),
            (Some(""), "a/b", vec![own]),
            (Some(own), "a/b", vec![own]),
            (
                Some("repository:library/b:pull"),
                "a/b",
                vec!["repository:library/b:pull"],
            ),
            (Some("aws"), "a/b", vec!["aws", own]),
            (
                Some("registry:catalog:*  x"),
                "a/b",
                vec!["registry:catalog:*", "x", own],
            ),
            (None, "", vec![]),
        ] {
            let challenge = Bearer {
                scope: said.map(str::to_owned),
                ..Bearer::default()
            };
            assert_eq!(challenge.scopes(repository), expected, "{said:?}");
        }
    }

    #[test]
    fn a_scope_names_its_repository() {
        for (scope, expected) in [
            ("repository:a/b:pull", Some("a/b")),
            (
                "repository:quay.io:8443/a:pull,push",
                Some("quay.io:8443/a"),
            ),
            ("repository:a", None),
            ("repository::pull", None),
            ("registry:catalog:*", None),
            ("", None),
        ] {
            assert_eq!(repository_of(scope), expected, "{scope}");
        }
        assert_eq!(repository_of(&pull_scope("a/b")), Some("a/b"));
    }

    #[test]
    fn a_realm_is_trusted_in_its_registrys_own_domain() {
        for (registry, realm, trusted) in [
            ("docker.io", "auth.docker.io", true),
            ("registry-1.docker.io", "auth.docker.io", true),
            ("quay.io", "quay.io", true),
            ("quay.io", "auth.quay.io", true),
            ("lscr.io", "ghcr.io", true),
            ("ghcr.io", "lscr.io", false),
            ("registry.gitlab.com", "gitlab.com", true),
            ("docker.elastic.co", "docker-auth.elastic.co", true),
            ("registry.eu.example.com", "auth.example.com", true),
            ("reg.example.com:5000", "reg.example.com:5001", true),
            ("reg:5000", "reg:5001", true),
            ("reg:5000", "auth:5001", false),
            ("10.0.0.1:5000", "10.0.0.1", true),
            ("10.0.0.1:5000", "11.0.0.1", false),
            ("1.10.0.0", "2.10.0.0", false),
            ("[::1]:5000", "[::1]:5001", true),
            ("[fd00::1]", "[fd00::2]", false),
            ("quay.io", "evil.io", false),
            ("quay.io", "evilquay.io", false),
            ("quay.io", "io", false),
            ("registry.example.com", "com", false),
            ("example.com", "evil.com", false),
            ("good.co.uk", "evil.co.uk", false),
            ("registry.good.co.uk", "auth.good.co.uk", true),
            ("registry.good.co.uk", "evil.co.uk", false),
            ("good.com.au", "evil.com.au", false),
            ("good.org.br", "evil.org.br", false),
            ("good.azurecr.io", "evil.azurecr.io", false),
            ("good.azurecr.io", "good.azurecr.io", true),
            (
                "harbor.mine.svc.cluster.local",
                "auth.theirs.svc.cluster.local",
                false,
            ),
            ("mine.herokuapp.com", "theirs.herokuapp.com", false),
            (
                "mine.eu.cloudapp.azure.com",
                "theirs.eu.cloudapp.azure.com",
                false,
            ),
            ("mine.a.run.app", "theirs.a.run.app", false),
            (
                "1.dkr.ecr.us-east-1.amazonaws.com",
                "bucket.s3.us-east-1.amazonaws.com",
                false,
            ),
            ("", "", true),
            ("", "evil.com", false),
        ] {
            assert_eq!(is_trusted(registry, realm), trusted, "{registry} {realm}");
        }
    }

    #[derive(Clone, Debug)]
    struct Style {
        blank: String,
        comma: String,
        quoted: bool,
        upper: bool,
    }

    fn style() -> impl Strategy<Value = Style> {
        (" {0,2}", " ?,[ \t]?,?", any::<bool>(), any::<bool>()).prop_map(
            |(blank, comma, quoted, upper)| Style {
                blank,
                comma,
                quoted,
                upper,
            },
        )
    }

    fn challenges() -> impl Strategy<Value = Vec<Challenge>> {
        let word = || proptest::option::of("[a-z:/.]{1,9}|[ -~é]{0,9}");
        let one = (any::<bool>(), "[!-~]{1,9}", word(), word(), word());
        let one = one.prop_map(
            |(is_bearer, realm, service, scope, error)| match is_bearer {
                true => Challenge::Bearer(Bearer {
                    realm,
                    service,
                    scope,
                    error,
                }),
                false => Challenge::Basic { realm },
            },
        );
        proptest::collection::vec(one, 0..MAX_CHALLENGES)
    }

    /// One challenge as some server may write it.
    fn written(challenge: &Challenge, style: &Style) -> String {
        let (scheme, realm, more) = match challenge {
            Challenge::Basic { realm } => ("Basic", realm, [None, None, None]),
            Challenge::Bearer(b) => (
                "Bearer",
                &b.realm,
                [b.scope.as_ref(), b.error.as_ref(), b.service.as_ref()],
            ),
        };
        let named = [Some(realm), more[0], more[1], more[2]]
            .into_iter()
            .zip(["realm", "scope", "error", "service"]);
        let parameters: Vec<String> = named
            .filter_map(|(value, name)| {
                let value = value?;
                let bare = !style.quoted && !value.is_empty() && value.bytes().all(is_token);
                let value = if bare {
                    value.clone()
                } else {
                    Quoted(value).to_string()
                };
                let name = if style.upper {
                    name.to_ascii_uppercase()
                } else {
                    name.to_owned()
                };
                Some(format!("{name}{}={}{value}", style.blank, style.blank))
            })
            .collect();
        format!("{scheme} {}", parameters.join(&style.comma))
    }

    proptest! {
        #[test]
        fn however_challenges_are_written_they_are_understood(
            challenges in challenges(), style in style(), one_line in any::<bool>(),
        ) {
            let mut lines: Vec<String> = challenges.iter().map(|c| written(c, &style)).collect();
            if one_line {
                lines = vec![lines.join(&style.comma)];
            }
            prop_assert_eq!(parse(lines.iter().map(String::as_bytes)), challenges, "{:?}", lines);
        }

        #[test]
        fn whatever_comes_is_understood_once_and_for_all(
            line in proptest::collection::vec(any::<u8>(), 0..200),
            near in "((Bearer|Basic|x)[ ,]{0,2}((realm|scope|error)[ =]{0,2}[\"\\\\a,]{0,4}){0,4}){0,4}",
        ) {
            for line in [line.as_slice(), near.as_bytes()] {
                let understood = parse([line]);
                let again: Vec<String> = understood.iter().map(Challenge::to_string).collect();
                prop_assert_eq!(parse(again.iter().map(String::as_bytes)), understood);
            }
        }

        #[test]
        fn trust_needs_a_common_domain(a in "[a-c]{1,3}([.][a-c]{1,3}){0,3}", b in "[a-c]{1,3}([.][a-c]{1,3}){0,3}") {
            let suffixes = |host: &str| -> Vec<String> {
                let labels: Vec<&str> = host.split('.').collect();
                (0..labels.len()).map(|at| labels[at..].join(".")).filter(|s| s.contains('.')).collect()
            };
            let common = suffixes(&a).into_iter().any(|suffix| suffixes(&b).contains(&suffix));
            prop_assert!(is_trusted(&a, &a));
            prop_assert!(a == b || common || !is_trusted(&a, &b), "{} {}", a, b);
            prop_assert_eq!(is_trusted(&a, &b), is_trusted(&b, &a));
        }
    }
}
