//! The mirror that runtimes are pointed at.

use url::{Host, Url};

use hawker_config::problem::Problem;

/// A mirror's address, as each runtime writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mirror {
    /// `http://127.0.0.1:6500`, without a slash at the end.
    pub(crate) url: String,
    /// `127.0.0.1:6500`.
    pub(crate) authority: String,
    /// Whether it is asked in the clear.
    pub(crate) http: bool,
}

impl Mirror {
    /// Checks what was given to `--mirror`.
    pub(crate) fn parse(text: &str) -> Result<Self, Problem> {
        let problem = |what: &str| {
            let what = format!("`{text}` {what}");
            Problem::new(
                "--mirror",
                what,
                "write the daemon's mirror address: http://127.0.0.1:6500",
            )
        };
        let url = Url::parse(text).map_err(|error| problem(&format!("is no URL: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(problem("begins with neither http:// nor https://"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(Problem::new(
                "--mirror",
                "holds a user's name or password",
                "take it out",
            ));
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(problem("has a path, which dockerd refuses"));
        }
        let host = url.host_str().ok_or_else(|| problem("names no host"))?;
        let authority = url
            .port()
            .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        let http = url.scheme() == "http";
        Ok(Self {
            url: format!("{}://{authority}", url.scheme()),
            authority,
            http,
        })
    }
}

/// Whether a host's URL, or its `host:port/path`, leads to the mirror (`host:port`); all names of loopback are one.
pub(crate) fn is_mirror(url: &str, mirror: &str) -> bool {
    let parse = |url: &str| {
        Url::parse(&if url.contains("://") {
            url.to_owned()
        } else {
            format!("http://{url}")
        })
    };
    let (Ok(url), Ok(mirror)) = (parse(url), parse(mirror)) else {
        return false;
    };
    let local = |host: &Host<&str>| match host {
        Host::Domain(name) => *name == "localhost",
        Host::Ipv4(ip) => ip.is_loopback() || ip.is_unspecified(),
        Host::Ipv6(ip) => ip.is_loopback() || ip.is_unspecified(),
    };
    let (Some(a), Some(b)) = (url.host(), mirror.host()) else {
        return false;
    };
    url.port_or_known_default() == mirror.port_or_known_default()
        && (a == b || (local(&a) && local(&b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_is_a_scheme_a_host_and_a_port() {
        let mirror = Mirror::parse("http://127.0.0.1:6500/").unwrap();
        let expected = Mirror {
            url: "http://127.0.0.1:6500".into(),
            authority: "127.0.0.1:6500".into(),
            http: true,
        };
        assert_eq!(mirror, expected);
        assert_eq!(
            Mirror::parse("https://[::1]:6500").unwrap().authority,
            "[::1]:6500"
        );
        assert_eq!(
            Mirror::parse("https://hawker.example").unwrap().url,
            "https://hawker.example"
        );
        for text in [
            "127.0.0.1:6500",
            "ftp://a",
            "http://a/path",
            "http://u:secret@a",
            "http://a?x",
            "",
            "http://",
        ] {
            let problem = Mirror::parse(text).unwrap_err();
            assert!(!problem.to_string().contains("secret"), "{problem}");
        }
    }

    #[test]
    fn all_names_of_loopback_are_one_mirror() {
        for (url, is) in [
            ("http://127.0.0.1:6500", true),
            ("http://localhost:6500/", true),
            ("[::1]:6500/quay.io", true),
            ("0.0.0.0:6500", true),
            ("http://127.0.0.1:6501", false),
            ("http://corp.example:6500", false),
            ("://", false),
        ] {
            assert_eq!(is_mirror(url, "127.0.0.1:6500"), is, "{url}");
        }
    }
}
