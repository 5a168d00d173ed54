//! The subject of a request to the mirror: a `/v2/` path, with or without `ns`, as a type.
//!
//! The grammar is the OCI distribution spec's ("Pull", "Content Discovery"); how runtimes name the upstream registry is
//! three things: containerd's `ns` parameter, a host before `/v2/`, a host as the first part of the repository's name.

mod host;

use crate::digest::{Digest, DigestError};

use host::is_hub;
pub use host::{HostError, api_host, canonical_host, host_matches, host_name, is_public};

/// Longest path and query looked at, each, in bytes. The longest legal one (a name, a digest, escapes) is far below.
pub const MAX_TARGET_BYTES: usize = 4096;

/// Longest repository name, in bytes (distribution spec, "Pulling manifests").
pub const MAX_NAME_BYTES: usize = 255;

/// Longest tag, in bytes (distribution spec, "Pulling manifests").
pub const MAX_TAG_BYTES: usize = 128;

/// The place of content: a registry and a repository there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Source {
    /// The registry's host as references name it, with the port where it has one: `docker.io`, `[::1]:5000`.
    pub registry: String,
    /// The repository: `library/debian`.
    pub repository: String,
}

/// A request of the pull API, as [`parse`] understood it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// `/v2/`: "do you speak this API?"
    Ping {
        /// The registry it is about, when it names one, as [`canonical_host`] writes it.
        registry: Option<String>,
    },
    /// Something of a repository.
    Content(Request),
}

/// A request for something of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The registry, as [`canonical_host`] writes it; `None`: the default upstream.
    pub registry: Option<String>,
    /// The repository's name, of the spec's grammar.
    pub repository: String,
    /// The content within it.
    pub content: Content,
}

/// The content that a request names within a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// `manifests/<tag or digest>`
    Manifest(ManifestRef),
    /// `blobs/<digest>`
    Blob(Digest),
    /// `tags/list`
    Tags {
        /// The query for the registry: the client's without `ns`. Registries name the next page by parameters of their own.
        query: String,
    },
    /// `referrers/<digest>`
    Referrers {
        /// The subject.
        digest: Digest,
        /// The query for the registry, as for tags.
        query: String,
    },
}

/// How a manifest is named.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ManifestRef {
    /// By a tag, which may move.
    Tag(String),
    /// By its digest.
    Digest(Digest),
}

/// Why a request is refused before anybody is asked. The client's fault; a retry does not help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Not a read.
    #[error("this mirror only serves pulls: use GET or HEAD, and push to the registry itself")]
    Method,
    /// No such thing in the pull API.
    #[error("no such endpoint: a mirror serves /v2/, manifests, blobs, tags/list and referrers")]
    Endpoint,
    /// Too long to be a legal request.
    #[error("the path or the query is longer than {MAX_TARGET_BYTES} bytes")]
    TooLong,
    /// A name that is not of the grammar.
    #[error(
        "bad repository name: lower-case words with . _ or - between them, joined by /, at most 255 characters"
    )]
    Name,
    /// A host that is none.
    #[error("bad registry host: {0}")]
    Registry(#[from] HostError),
    /// A digest that is none.
    #[error("{0}")]
    Digest(#[from] DigestError),
    /// A parameter that makes no sense.
    #[error("bad query parameter")]
    Query,
    /// A tag that no manifest can have.
    #[error("no manifest can have such a tag: letters, digits, _ . and -, at most 128 characters")]
    Tag,
}

impl Refused {
    /// The code of the answer (distribution spec, "Error Codes").
    pub const fn code(self) -> &'static str {
        match self {
            Refused::Method | Refused::Endpoint | Refused::Query => "UNSUPPORTED",
            Refused::TooLong | Refused::Name | Refused::Registry(_) => "NAME_INVALID",
            Refused::Digest(_) => "DIGEST_INVALID",
            Refused::Tag => "MANIFEST_UNKNOWN",
        }
    }

    /// The HTTP status of the answer.
    pub const fn status(self) -> u16 {
        match self {
            Refused::Method => 405,
            Refused::Endpoint | Refused::Tag => 404,
            _ => 400,
        }
    }
}

/// Understands a request. `path` and `query` (without the `?`) are as they came, not decoded.
///
/// The registry is, first found: a host before `/v2/` (containerd's path prefix); `ns`; the first part of the name,
/// when it contains `.` or `:` or is `localhost` (containers/image; containerd's `override_path`). If `ns` is given, a
/// first part counts as host only if it is the same.
pub fn parse(method: &str, path: &str, query: Option<&str>) -> Result<Asked, Refused> {
    let (parts, query) = looked_at(method, path, query)?;
    let (prefix, parts) = match parts.as_slice() {
        ["v2", rest @ ..] => (None, rest),
        [host, "v2", rest @ ..] => (Some(canonical_host(&decode_host(host)?)?), rest),
        _ => return Err(Refused::Endpoint),
    };
    let registry = match prefix {
        Some(host) => Some(host),
        None => namespace(query)?,
    };
    match parts {
        [] | [""] => Ok(Asked::Ping { registry }),
        [name @ .., kind, what] => {
            let content = content(kind, what, query)?;
            let (registry, name) = split_host(registry, name)?;
            Ok(Asked::Content(Request {
                registry,
                repository: repository(name)?,
                content,
            }))
        }
        _ => Err(Refused::Endpoint),
    }
}

/// Understands a request as `registry` itself (given as [`canonical_host`] writes it) would take it: nothing in it names
/// another one.
pub fn parse_at(
    registry: &str,
    method: &str,
    path: &str,
    query: Option<&str>,
) -> Result<Asked, Refused> {
    let (parts, query) = looked_at(method, path, query)?;
    let registry = Some(registry.to_owned());
    match parts.as_slice() {
        ["v2"] | ["v2", ""] => Ok(Asked::Ping { registry }),
        ["v2", name @ .., kind, what] => {
            let content = content(kind, what, query)?;
            Ok(Asked::Content(Request {
                registry,
                repository: repository(name)?,
                content,
            }))
        }
        _ => Err(Refused::Endpoint),
    }
}

/// The parts of the path, and the query, of a read of bearable length.
fn looked_at<'a>(
    method: &str,
    path: &'a str,
    query: Option<&'a str>,
) -> Result<(Vec<&'a str>, &'a str), Refused> {
    if !matches!(method, "GET" | "HEAD") {
        return Err(Refused::Method);
    }
    let query = query.unwrap_or_default();
    if path.len().max(query.len()) > MAX_TARGET_BYTES {
        return Err(Refused::TooLong);
    }
    Ok((
        path.strip_prefix('/')
            .ok_or(Refused::Endpoint)?
            .split('/')
            .collect(),
        query,
    ))
}

impl Request {
    /// The place of this content, `default_registry` being the upstream of requests that name none. A name of one part
    /// is Docker Hub's `library/` of that name: clients that put a mirror's host before `docker.io/nginx` leave
    /// `library/` out.
    pub fn source(&self, default_registry: &str) -> Source {
        let registry = self
            .registry
            .clone()
            .unwrap_or_else(|| default_registry.to_owned());
        let repository = match is_hub(&registry) && !self.repository.contains('/') {
            true => format!("library/{}", self.repository),
            false => self.repository.clone(),
        };
        Source {
            registry,
            repository,
        }
    }

    /// Path and query of the same request to the registry itself.
    pub fn origin_path(&self) -> String {
        let name = &self.repository;
        match &self.content {
            Content::Manifest(ManifestRef::Tag(tag)) => format!("/v2/{name}/manifests/{tag}"),
            Content::Manifest(ManifestRef::Digest(digest)) => {
                format!("/v2/{name}/manifests/{digest}")
            }
            Content::Blob(digest) => format!("/v2/{name}/blobs/{digest}"),
            Content::Tags { query } => with_query(format!("/v2/{name}/tags/list"), query),
            Content::Referrers { digest, query } => {
                with_query(format!("/v2/{name}/referrers/{digest}"), query)
            }
        }
    }
}

/// The registry that `ns` names. It must not come twice.
fn namespace(query: &str) -> Result<Option<String>, Refused> {
    let mut values = query.split('&').filter_map(|pair| pair.strip_prefix("ns="));
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => Ok(Some(canonical_host(
            &decode(value).ok_or(HostError::Form)?,
        )?)),
        (Some(_), Some(_)) => Err(HostError::Form.into()),
    }
}

fn content(kind: &str, what: &str, query: &str) -> Result<Content, Refused> {
    // `<name>/tags/list` ends in a fixed word, the others in what they are about.
    Ok(match (kind, what) {
        ("manifests", what) => Content::Manifest(manifest_ref(what)?),
        ("blobs", what) => Content::Blob(digest(what)?),
        ("referrers", what) => Content::Referrers {
            digest: digest(what)?,
            query: for_registry(query),
        },
        ("tags", "list") => Content::Tags {
            query: for_registry(query),
        },
        _ => return Err(Refused::Endpoint),
    })
}

/// Takes the registry off the front of a name, where it is there.
fn split_host<'a>(
    registry: Option<String>,
    name: &'a [&'a str],
) -> Result<(Option<String>, &'a [&'a str]), Refused> {
    let [first, rest @ ..] = name else {
        return Ok((registry, name));
    };
    let Ok(first) = decode_host(first) else {
        return Ok((registry, name));
    };
    if rest.is_empty() || !(first.contains(['.', ':']) || first == "localhost") {
        return Ok((registry, name));
    }
    match (registry, canonical_host(&first)) {
        (None, host) => Ok((Some(host?), rest)),
        (Some(registry), Ok(host)) if registry == host => Ok((Some(registry), rest)),
        (registry, _) => Ok((registry, name)),
    }
}

/// Joins and checks a repository's name: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*`.
fn repository(parts: &[&str]) -> Result<String, Refused> {
    let name = parts.join("/");
    if name.len() <= MAX_NAME_BYTES && is_repository(&name) {
        Ok(name)
    } else {
        Err(Refused::Name)
    }
}

/// Whether this is a repository's name of the distribution spec's grammar, of any length.
pub fn is_repository(name: &str) -> bool {
    name.split('/').all(is_name_component)
}

fn is_name_component(component: &str) -> bool {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    // The separators between the words; nothing stands before the first and after the last.
    let separators: Vec<&str> = component
        .split(word)
        .filter(|separator| !separator.is_empty())
        .collect();
    let ends_in_words = component.starts_with(word) && component.ends_with(word);
    ends_in_words
        && separators
            .iter()
            .all(|s| matches!(*s, "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

/// Whether this is a tag: `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
pub fn is_tag(tag: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    tag.len() <= MAX_TAG_BYTES
        && tag.starts_with(word)
        && tag.chars().all(|c| word(c) || c == '.' || c == '-')
}

fn manifest_ref(text: &str) -> Result<ManifestRef, Refused> {
    let text = decode_path(text).ok_or(Refused::Tag)?;
    match text.contains(':') {
        true => Ok(ManifestRef::Digest(text.parse()?)),
        false if is_tag(&text) => Ok(ManifestRef::Tag(text)),
        false => Err(Refused::Tag),
    }
}

fn digest(text: &str) -> Result<Digest, Refused> {
    Ok(decode_path(text).ok_or(DigestError::Form)?.parse()?)
}

/// Whether a parameter (`key=value`, not decoded) is the namespace, however its name is escaped.
fn is_namespace(pair: &str) -> bool {
    let key = pair.split_once('=').map_or(pair, |(key, _)| key);
    decode(key).is_some_and(|key| key == "ns")
}

/// The query for a registry: every parameter as the client wrote it, except `ns`. The result is printable ASCII.
fn for_registry(query: &str) -> String {
    let pairs = query
        .split('&')
        .filter(|pair| !pair.is_empty() && !is_namespace(pair));
    let mut kept = String::with_capacity(query.len());
    for pair in pairs {
        if !kept.is_empty() {
            kept.push('&');
        }
        for byte in pair.bytes() {
            match byte {
                b'#' => kept.push_str("%23"),
                byte if byte.is_ascii_graphic() => kept.push(byte.into()),
                byte => kept.push_str(&format!("%{byte:02X}")),
            }
        }
    }
    kept
}

fn with_query(mut path: String, query: &str) -> String {
    if !query.is_empty() {
        path.push('?');
        path.push_str(query);
    }
    path
}

/// The target of the next page: this request's own, with the query of the registry's link, which says where the page begins.
///
/// `target` is the client's request as it came, so that the next page leads the same way: through the same mirror, by the same
/// name of the registry. `None` if the registry's link has no query of its own.
pub fn next_page(target_path: &str, target_query: Option<&str>, link: &str) -> Option<String> {
    let (_, query) = link.split('#').next()?.split_once('?')?;
    let mut next = for_registry(query);
    if next.is_empty() {
        return None;
    }
    for namespace in target_query
        .unwrap_or_default()
        .split('&')
        .filter(|pair| is_namespace(pair))
    {
        next.push('&');
        next.push_str(namespace);
    }
    Some(with_query(target_path.to_owned(), &next))
}

fn decode_host(text: &str) -> Result<String, Refused> {
    Ok(decode_path(text).ok_or(HostError::Form)?)
}

/// Decodes one part of a path. Only `:`, `[` and `]` may be escaped: the other characters of a legal path need no
/// escape, so that an escaped dot or slash never means anything here.
fn decode_path(part: &str) -> Option<String> {
    let escapes = part
        .match_indices('%')
        .map(|(at, _)| part.get(at + 1..at + 3));
    let mut legal = escapes
        .map(|hex| hex.is_some_and(|hex| matches!(&*hex.to_ascii_uppercase(), "3A" | "5B" | "5D")));
    if legal.all(|legal| legal) {
        decode(part)
    } else {
        None
    }
}

/// Percent-decoding (RFC 3986, 2.1); `None` for a bad escape, for control characters and for what is not UTF-8.
fn decode(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let byte = match byte {
            b'%' => hex_digit(rest.next()?)? << 4 | hex_digit(rest.next()?)?,
            byte => byte,
        };
        if byte.is_ascii_control() {
            return None;
        }
        decoded.push(byte);
    }
    String::from_utf8(decoded).ok()
}

fn hex_digit(c: u8) -> Option<u8> {
    char::from(c)
        .to_digit(16)
        .and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn get(target: &str) -> Result<Asked, Refused> {
        match target.split_once('?') {
            Some((path, query)) => parse("GET", path, Some(query)),
            None => parse("GET", target, None),
        }
    }

    /// Registry (`-`: default), repository and rest of the path to the origin, or the error's code.
    fn summary(target: &str) -> String {
        match get(target) {
            Ok(Asked::Ping { registry }) => format!("{} ping", registry.as_deref().unwrap_or("-")),
            Ok(Asked::Content(request)) => {
                let registry = request.registry.as_deref().unwrap_or("-");
                let what = &request.origin_path()[format!("/v2/{}/", request.repository).len()..];
                format!("{registry} {} {what}", request.repository).replace(HEX, "HEX")
            }
            Err(refused) => format!("{} {}", refused.status(), refused.code()),
        }
    }

    fn check(table: &[(&str, &str)]) {
        for (target, expected) in table {
            assert_eq!(summary(&target.replace("HEX", HEX)), *expected, "{target}");
        }
    }

    #[test]
    fn the_shapes_that_runtimes_send() {
        check(&[
            ("/v2/", "- ping"),
            ("/v2", "- ping"),
            ("/v2/?ns=quay.io", "quay.io ping"),
            ("/quay.io/v2/", "quay.io ping"),
            // containerd: ns
            (
                "/v2/library/debian/manifests/12?ns=docker.io",
                "docker.io library/debian manifests/12",
            ),
            (
                "/v2/foo/manifests/v1?ns=reg%3A5000",
                "reg:5000 foo manifests/v1",
            ),
            (
                "/v2/foo/manifests/v1?ns=reg:5000",
                "reg:5000 foo manifests/v1",
            ),
            (
                "/v2/foo/manifests/v1?ns=%5B%3A%3A1%5D%3A5000",
                "[::1]:5000 foo manifests/v1",
            ),
            (
                "/v2/foo/manifests/v1?ns=[::1]:5000",
                "[::1]:5000 foo manifests/v1",
            ),
            (
                "/v2/foo/blobs/sha256:HEX?ns=quay.io",
                "quay.io foo blobs/sha256:HEX",
            ),
            (
                "/v2/foo/blobs/sha256%3aHEX?x=y&ns=quay.io",
                "quay.io foo blobs/sha256:HEX",
            ),
            (
                "/v2/foo/manifests/sha256:HEX?ns=quay.io",
                "quay.io foo manifests/sha256:HEX",
            ),
            // containerd: path prefix, and override_path
            (
                "/quay.io/v2/foo/bar/manifests/v1?ns=quay.io",
                "quay.io foo/bar manifests/v1",
            ),
            (
                "/mirror.example/v2/foo/manifests/v1?ns=quay.io",
                "mirror.example foo manifests/v1",
            ),
            (
                "/reg%3A5000/v2/foo/manifests/v1",
                "reg:5000 foo manifests/v1",
            ),
            (
                "/v2/quay.io/foo/bar/manifests/v1?ns=quay.io",
                "quay.io foo/bar manifests/v1",
            ),
            (
                "/v2/registry-1.docker.io/foo/manifests/v1?ns=docker.io",
                "docker.io foo manifests/v1",
            ),
            (
                "/v2/quay.io/foo/manifests/v1?ns=other.example",
                "other.example quay.io/foo manifests/v1",
            ),
            // containers/image
            (
                "/v2/quay.io/foo/bar/blobs/sha256:HEX",
                "quay.io foo/bar blobs/sha256:HEX",
            ),
            (
                "/v2/docker.io/debian/manifests/12",
                "docker.io debian manifests/12",
            ),
            (
                "/v2/localhost/foo/manifests/v1",
                "localhost foo manifests/v1",
            ),
            (
                "/v2/localhost:5000/foo/manifests/v1",
                "localhost:5000 foo manifests/v1",
            ),
            (
                "/v2/[fd00::1]:5000/foo/manifests/v1",
                "[fd00::1]:5000 foo manifests/v1",
            ),
            ("/v2/Quay.IO/foo/manifests/v1", "quay.io foo manifests/v1"),
            // dockerd, and the default upstream
            (
                "/v2/library/debian/manifests/12",
                "- library/debian manifests/12",
            ),
            ("/v2/foo.bar/manifests/v1", "- foo.bar manifests/v1"),
            ("/v2/a/b/c/d/e/manifests/v1", "- a/b/c/d/e manifests/v1"),
            (
                "/v2/a/manifests/b/manifests/blobs",
                "- a/manifests/b manifests/blobs",
            ),
            ("/v2/v2/blobs/sha256:HEX", "- v2 blobs/sha256:HEX"),
        ]);
    }

    #[test]
    fn at_the_registry_itself_nothing_names_another_one() {
        for (target, expected) in [
            ("/v2/", Ok(("ping", ""))),
            ("/v2/a/b/manifests/v1", Ok(("a/b", "/v2/a/b/manifests/v1"))),
            (
                "/v2/a/b/manifests/v1?ns=evil.example",
                Ok(("a/b", "/v2/a/b/manifests/v1")),
            ),
            (
                "/v2/quay.io/b/manifests/v1",
                Ok(("quay.io/b", "/v2/quay.io/b/manifests/v1")),
            ),
            ("/evil.example/v2/b/manifests/v1", Err(Refused::Endpoint)),
            ("/v2/../b/manifests/v1", Err(Refused::Name)),
        ] {
            let (path, query) = target
                .split_once('?')
                .map_or((target, None), |(path, q)| (path, Some(q)));
            let asked = parse_at("quay.io", "GET", path, query);
            let summary = asked.map(|asked| match asked {
                Asked::Ping { registry } => (registry, "ping".to_owned(), String::new()),
                Asked::Content(r) => (r.registry.clone(), r.repository.clone(), r.origin_path()),
            });
            let expected = expected
                .map(|(name, path)| (Some("quay.io".to_owned()), name.to_owned(), path.to_owned()));
            assert_eq!(summary, expected, "{target}");
        }
        assert_eq!(
            parse_at("quay.io", "PUT", "/v2/a/manifests/v1", None),
            Err(Refused::Method)
        );
    }

    #[test]
    fn lists_and_referrers() {
        check(&[
            ("/v2/foo/tags/list", "- foo tags/list"),
            (
                "/v2/foo/tags/list?n=10&last=v1&ns=quay.io",
                "quay.io foo tags/list?n=10&last=v1",
            ),
            ("/v2/foo/tags/list?last=a%26b", "- foo tags/list?last=a%26b"),
            // The registry judges the faults of a query.
            ("/v2/foo/tags/list?n=ten", "- foo tags/list?n=ten"),
            ("/v2/foo/tags/list?n=1&n=2", "- foo tags/list?n=1&n=2"),
            (
                "/v2/foo/tags/list?next_page=gAAA%2F%3D%3D&n=50",
                "- foo tags/list?next_page=gAAA%2F%3D%3D&n=50",
            ),
            (
                "/v2/foo/tags/list?ns=quay.io&token",
                "quay.io foo tags/list?token",
            ),
            ("/v2/foo/tags/list?&&ns=quay.io&", "quay.io foo tags/list"),
            (
                "/v2/foo/tags/list?n%73=evil.example&a=%zz&b=é",
                "- foo tags/list?a=%zz&b=%C3%A9",
            ),
            ("/v2/foo/tags/list?ns", "- foo tags/list"),
            ("/v2/foo/referrers/sha256:HEX", "- foo referrers/sha256:HEX"),
            (
                "/v2/foo/referrers/sha256:HEX?artifactType=application/a+json",
                "- foo referrers/sha256:HEX?artifactType=application/a+json",
            ),
            (
                "/v2/foo/referrers/sha256:HEX?cursor=x%3D&ns=quay.io",
                "quay.io foo referrers/sha256:HEX?cursor=x%3D",
            ),
        ]);
    }

    #[test]
    fn the_next_page_leads_the_same_way_as_this_one() {
        for (target, link, next) in [
            (
                "/v2/q.io/a/tags/list",
                "/v2/a/tags/list?page=2%3D",
                Some("/v2/q.io/a/tags/list?page=2%3D"),
            ),
            (
                "/v2/q.io/a/tags/list?page=1",
                "?page=2",
                Some("/v2/q.io/a/tags/list?page=2"),
            ),
            (
                "/v2/a/tags/list?n=1&ns=q.io%3A5000",
                "https://q.io:5000/v2/a/tags/list?last=x&n=1#top",
                Some("/v2/a/tags/list?last=x&n=1&ns=q.io%3A5000"),
            ),
            // A registry behind another path, and one that names a namespace of its own.
            (
                "/q.io/v2/a/tags/list",
                "http://in/proj/v2/p/a/tags/list?t=1&ns=x",
                Some("/q.io/v2/a/tags/list?t=1"),
            ),
            ("/v2/a/tags/list", "/v2/a/tags/list", None),
            ("/v2/a/tags/list", "/v2/a/tags/list?", None),
            ("/v2/a/tags/list", "", None),
        ] {
            let (path, query) = target
                .split_once('?')
                .map_or((target, None), |(path, q)| (path, Some(q)));
            assert_eq!(
                next_page(path, query, link).as_deref(),
                next,
                "{target} {link}"
            );
        }
    }

    #[test]
    fn what_is_refused_says_why() {
        check(&[
            ("/", "404 UNSUPPORTED"),
            ("", "404 UNSUPPORTED"),
            ("/v1/search", "404 UNSUPPORTED"),
            ("/v2/_catalog", "404 UNSUPPORTED"),
            ("/v2/foo/blobs/uploads/", "404 UNSUPPORTED"),
            ("/v2/foo/tags/all", "404 UNSUPPORTED"),
            ("/a/b/v2/foo/manifests/v1", "404 UNSUPPORTED"),
            ("/v2/manifests/v1", "400 NAME_INVALID"),
            ("/v2//manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo//bar/manifests/v1", "400 NAME_INVALID"),
            ("/v2/../foo/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo/../bar/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo/./bar/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo/%2e%2e/bar/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo%2ebar/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo%2Fbar/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo%00/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo\0/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo%zz/manifests/v1", "400 NAME_INVALID"),
            ("/v2/Foo/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo-/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo___bar/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo..bar/manifests/v1", "400 NAME_INVALID"),
            ("/v2/fö/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo/manifests/v1?ns=", "400 NAME_INVALID"),
            ("/v2/foo/manifests/v1?ns=a/b", "400 NAME_INVALID"),
            ("/v2/foo/manifests/v1?ns=user@host", "400 NAME_INVALID"),
            ("/v2/foo/manifests/v1?ns=a%00b", "400 NAME_INVALID"),
            ("/v2/foo/manifests/v1?ns=a%2", "400 NAME_INVALID"),
            ("/v2/foo/manifests/v1?ns=a.b&ns=c.d", "400 NAME_INVALID"),
            ("/%2e%2e/v2/foo/manifests/v1", "400 NAME_INVALID"),
            ("/../v2/foo/manifests/v1", "400 NAME_INVALID"),
            ("/v2/quay..io/foo/manifests/v1", "400 NAME_INVALID"),
            ("/v2/foo/manifests/", "404 MANIFEST_UNKNOWN"),
            ("/v2/foo/manifests/.hidden", "404 MANIFEST_UNKNOWN"),
            ("/v2/foo/manifests/a%2Fb", "404 MANIFEST_UNKNOWN"),
            ("/v2/foo/manifests/sha256:123", "400 DIGEST_INVALID"),
            ("/v2/foo/manifests/sha999:HEX", "400 DIGEST_INVALID"),
            ("/v2/foo/blobs/", "400 DIGEST_INVALID"),
            ("/v2/foo/blobs/HEX", "400 DIGEST_INVALID"),
            ("/v2/foo/blobs/sha256:..", "400 DIGEST_INVALID"),
            ("/v2/foo/blobs/sha256%zz", "400 DIGEST_INVALID"),
            ("/v2/foo/referrers/latest", "400 DIGEST_INVALID"),
        ]);
    }

    #[test]
    fn only_reads_are_served() {
        for method in [
            "PUT", "POST", "PATCH", "DELETE", "OPTIONS", "CONNECT", "get", "",
        ] {
            let refused = parse(method, "/v2/foo/blobs/uploads/", None).unwrap_err();
            assert_eq!((refused.status(), refused.code()), (405, "UNSUPPORTED"));
        }
        assert!(parse("HEAD", "/v2/", None).is_ok());
    }

    #[test]
    fn names_and_tags_have_a_length() {
        let manifest = |name: &str, tag: &str| get(&format!("/v2/{name}/manifests/{tag}"));
        assert!(manifest(&"a".repeat(255), &"t".repeat(128)).is_ok());
        assert_eq!(manifest(&"a".repeat(256), "t"), Err(Refused::Name));
        assert_eq!(manifest("a", &"t".repeat(129)), Err(Refused::Tag));
        assert_eq!(manifest(&"a/".repeat(4096), "t"), Err(Refused::TooLong));
        assert_eq!(
            get(&format!("/v2/?x={}", "y".repeat(4096))),
            Err(Refused::TooLong)
        );
        assert!(
            manifest(&format!("quay.io/{}", "a".repeat(255)), "t").is_ok(),
            "the host is no part of the name"
        );
    }

    #[test]
    fn the_default_upstream_fills_in() {
        let Ok(Asked::Content(request)) = get("/v2/library/debian/manifests/12") else {
            panic!("no content")
        };
        let source = Source {
            registry: "docker.io".to_owned(),
            repository: "library/debian".to_owned(),
        };
        assert_eq!(request.source("docker.io"), source);
    }

    #[test]
    fn names_of_one_part_are_in_docker_hubs_library() {
        for (target, registry, repository) in [
            (
                "/v2/docker.io/nginx/manifests/1",
                "docker.io",
                "library/nginx",
            ),
            (
                "/v2/index.docker.io/nginx/manifests/1",
                "docker.io",
                "library/nginx",
            ),
            (
                "/v2/nginx/manifests/1?ns=registry-1.docker.io",
                "docker.io",
                "library/nginx",
            ),
            ("/v2/nginx/manifests/1", "docker.io", "library/nginx"),
            (
                "/docker.io/v2/nginx/tags/list",
                "docker.io",
                "library/nginx",
            ),
            (
                "/v2/docker.io/library/nginx/manifests/1",
                "docker.io",
                "library/nginx",
            ),
            (
                "/v2/docker.io/bitnami/nginx/manifests/1",
                "docker.io",
                "bitnami/nginx",
            ),
            ("/v2/quay.io/nginx/manifests/1", "quay.io", "nginx"),
            (
                "/v2/nginx/manifests/1?ns=docker.io:5000",
                "docker.io:5000",
                "nginx",
            ),
        ] {
            let Ok(Asked::Content(request)) = get(target) else {
                panic!("{target}")
            };
            let source = Source {
                registry: registry.to_owned(),
                repository: repository.to_owned(),
            };
            assert_eq!(request.source("docker.io"), source, "{target}");
        }
    }

    /// The spec's grammar of a name component, as a machine that reads one character after the other.
    fn naive_component(text: &str) -> bool {
        let mut separator = String::new();
        let mut words = 0;
        for c in text.chars() {
            if c.is_ascii_digit() || c.is_ascii_lowercase() {
                let legal = matches!(separator.as_str(), "" | "." | "_" | "__")
                    || separator.chars().all(|c| c == '-');
                if !legal || (words == 0 && !separator.is_empty()) {
                    return false;
                }
                separator.clear();
                words += 1;
            } else {
                separator.push(c);
            }
        }
        words > 0 && separator.is_empty()
    }

    proptest! {
        #[test]
        fn the_name_grammar_is_the_specs(name in "[a-c0._/A-]{0,12}") {
            prop_assert_eq!(is_repository(&name), name.split('/').all(naive_component));
        }

        #[test]
        fn a_legal_request_survives_the_way_to_the_origin(
            repository in "[a-z0-9]{1,4}((\\.|_|__|-{1,3})[a-z0-9]{1,3}){0,2}(/[a-z0-9]{1,4}){1,3}",
            tag in "[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20}",
            by_digest in any::<bool>(),
        ) {
            let what = if by_digest { format!("sha256:{HEX}") } else { tag };
            let asked = get(&format!("/v2/{repository}/manifests/{what}?ns=quay.io"));
            let Ok(Asked::Content(request)) = asked else { return Err(TestCaseError::fail(format!("{asked:?}"))) };
            prop_assert_eq!(&request.repository, &repository);
            let again = get(&format!("{}?ns=quay.io", request.origin_path()));
            prop_assert_eq!(again, Ok(Asked::Content(request)));
        }

        #[test]
        fn whatever_is_accepted_is_clean(
            path in "(/(v2|blobs|manifests|tags|list|[.]{1,2}|%2e|%2F|%00|a|b[.]c|:|sha256:|\\PC{0,3})){0,6}",
            query in "(ns=|&|%|[a-z.:]{0,5}|\\PC{0,5}){0,5}",
        ) {
            if let Ok(Asked::Content(request)) = parse("GET", &path, Some(&query)) {
                prop_assert!(is_repository(&request.repository));
                let origin = request.origin_path();
                // A tag may well end in dots; no part of the path may be nothing else.
                let is_path = origin.split('?').next().is_some_and(|path| {
                    path.split('/').skip(1).all(|part| !matches!(part, "" | "." | ".."))
                });
                prop_assert!(origin.is_ascii() && is_path, "{origin}");
                if let Some(registry) = request.registry {
                    prop_assert_eq!(canonical_host(&registry), Ok(registry.clone()));
                }
            }
        }

        #[test]
        fn a_query_for_the_registry_is_printable_and_stays_the_same(query in "(ns=|n|s|=|&|%|#|[a-z]{0,2}|\\PC{0,3}){0,8}") {
            let once = for_registry(&query);
            prop_assert!(once.bytes().all(|byte| byte.is_ascii_graphic()) && !once.contains('#'));
            prop_assert_eq!(for_registry(&once), once);
        }
    }
}
