//! containerd's hosts.toml: which hosts a registry's pulls ask, in the order of the file.

use ::toml::{Table, Value};

use super::super::mirror::is_mirror;
use super::toml::{self, Toml, eol, line_start};
use super::{NOTE, Unfit};

/// The table in hosts.toml for all registries at once (in `_default`), or for one. There is a `[host]` always: 1.6 and
/// 1.7 ignore a file without.
pub(crate) fn table(url: &str) -> String {
    format!(
        "[host.{}]\n  capabilities = [\"pull\", \"resolve\"]\n",
        toml::literal(url)
    )
}

/// Puts the host first.
pub(super) fn apply(text: &str, url: &str) -> Result<String, Unfit> {
    let file = Toml::parse(text)?;
    if file.item(&["host", url]).is_some() {
        return match judge(text, url.trim_start_matches("http://")) {
            Verdict::Bad(found) => Err(Unfit::new(found, "give that host what it lacks")),
            _ => Ok(text.to_owned()),
        };
    }
    let (at, before, behind) = place(text, &file);
    let eol = eol(text);
    let blank = |is: bool| if is { eol } else { "" };
    let end = if text[..at].is_empty() || text[..at].ends_with('\n') {
        ""
    } else {
        eol
    };
    let ours = format!("{NOTE}\n{}", table(url)).replace('\n', eol);
    let block = format!("{end}{}{ours}{}", blank(before), blank(behind));
    let edited = toml::splice(text, at..at, &block);
    let capabilities = Value::Array(vec!["pull".into(), "resolve".into()]);
    toml::meant(text, edited, |model| {
        toml::put(model, &["host", url], "capabilities", capabilities)
    })
}

/// The place for the host, and whether a blank line is needed before it and behind it.
fn place(text: &str, file: &Toml<'_>) -> (usize, bool, bool) {
    let at = file.before_tables();
    let above = text[..at].trim_end_matches(['\n', '\r']);
    let last = &text[line_start(text, above.len())..at];
    let before = !above.is_empty() && last.matches('\n').count() < 2;
    (at, before, at < text.len())
}

/// Takes the host out, whatever else the file holds by now.
pub(super) fn undo(text: &str, url: &str, original: Option<&str>) -> Result<String, Unfit> {
    let original = original.unwrap_or_default();
    let (_, before, behind) = place(original, &Toml::parse(original)?);
    let mut left = text.to_owned();
    loop {
        let file = Toml::parse(&left)?;
        let Some(header) = file
            .headers()
            .iter()
            .rfind(|header| header.is_below(&["host", url]))
        else {
            let gone = file.item(&["host", url]).is_none();
            return if gone { Ok(left) } else { Err(Unfit::shape()) };
        };
        let mut block = file.block(header);
        if header.is(&["host", url]) {
            let note = line_start(&left, block.start.saturating_sub(1));
            if left[note..block.start].trim() == NOTE {
                block.start = note;
            }
            if before {
                block = toml::with_blank_before(&left, block);
            }
            if behind {
                block = toml::with_blank_behind(&left, block);
            }
        }
        left = toml::splice(&left, block, "");
    }
}

/// The effect of one hosts.toml on pulls.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Good,
    /// Works, but not always or not first.
    Poor(String),
    /// Pulls go past the mirror.
    Bad(String),
}

/// Whether this hosts.toml sends pulls to the mirror (`host:port`).
pub(crate) fn judge(text: &str, mirror: &str) -> Verdict {
    let table: Table = match text.parse() {
        Ok(table) => table,
        Err(_) => return Verdict::Bad("is no TOML".to_owned()),
    };
    let Some(hosts) = table
        .get("host")
        .and_then(Value::as_table)
        .filter(|hosts| !hosts.is_empty())
    else {
        return Verdict::Bad(
            "has no [host.\"…\"] table, and containerd 1.6 and 1.7 then ignore it".to_owned(),
        );
    };
    let Some((url, host)) = hosts.iter().find(|(url, _)| is_mirror(url, mirror)) else {
        return Verdict::Bad(format!("names no host http://{mirror}"));
    };
    if let Some(capabilities) = host.get("capabilities").and_then(Value::as_array) {
        let has = |wanted: &str| capabilities.iter().any(|c| c.as_str() == Some(wanted));
        if !has("pull") {
            return Verdict::Bad(format!("the host {url} lacks the capability \"pull\""));
        }
        if !has("resolve") {
            return Verdict::Poor(format!(
                "the host {url} lacks the capability \"resolve\": tags go past it"
            ));
        }
    }
    let tls = ["ca", "client", "skip_verify"]
        .into_iter()
        .find(|key| host.get(key).is_some());
    if let Some(key) = tls.filter(|_| url.starts_with("http://")) {
        return Verdict::Poor(format!(
            "the host {url} has `{key}`: containerd 1.7 and later then try HTTPS first"
        ));
    }
    if first_host(text).is_some_and(|first| first != *url) {
        return Verdict::Poor(format!(
            "another host stands before {url} and is asked first"
        ));
    }
    Verdict::Good
}

/// The first host of the file.
fn first_host(text: &str) -> Option<String> {
    let file = Toml::parse(text).ok()?;
    let host = file
        .headers()
        .iter()
        .find(|header| header.path.len() == 2 && header.path[0] == "host")?;
    Some(host.path[1].clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "http://127.0.0.1:6500";
    const MIRROR: &str = "127.0.0.1:6500";

    fn ours() -> String {
        format!("{NOTE}\n{}", table(URL))
    }

    #[test]
    fn the_mirror_comes_first_and_what_was_there_stays_behind_it() {
        let corp = "[host.\"https://corp.example\"]\n  capabilities = [\"pull\"]\n  # a header\n  \
                    [host.\"https://corp.example\".header]\n    x-key = [\"secret\"]\n";
        for (before, after) in [
            (String::new(), ours()),
            (
                "server = \"https://a\"\n".into(),
                format!("server = \"https://a\"\n\n{}", ours()),
            ),
            (
                "server = \"https://a\"".into(),
                format!("server = \"https://a\"\n\n{}", ours()),
            ),
            (corp.into(), format!("{}\n{corp}", ours())),
            (
                format!("# the corporation's\n{corp}"),
                format!("{}\n# the corporation's\n{corp}", ours()),
            ),
            (
                format!("# Licence\n\nserver = \"https://a\" # own\n\n\n# corp\n  {corp}# end"),
                format!(
                    "# Licence\n\nserver = \"https://a\" # own\n\n\n{}\n# corp\n  {corp}# end",
                    ours()
                ),
            ),
            (
                format!("# Licence\n\n{corp}"),
                format!("# Licence\n\n{}\n{corp}", ours()),
            ),
            (
                format!("server = \"a\"\n{corp}").replace('\n', "\r\n"),
                format!("server = \"a\"\n\n{}\n{corp}", ours()).replace('\n', "\r\n"),
            ),
        ] {
            let applied = apply(&before, URL).unwrap();
            assert_eq!(applied, after);
            assert_eq!(judge(&applied, MIRROR), Verdict::Good, "{applied}");
            assert_eq!(apply(&applied, URL).unwrap(), applied, "twice is once");
            let back = undo(&applied, URL, Some(&before)).unwrap();
            assert_eq!(back.trim_end(), before.trim_end(), "{applied}");
            let changed = format!("# above\n{applied}\n[host.\"https://new.example\"]\n");
            let back = undo(&changed, URL, Some(&before)).unwrap();
            let lines = |text: &str| -> Vec<String> {
                text.lines()
                    .filter(|line| !line.is_empty())
                    .map(str::to_owned)
                    .collect()
            };
            let expected = format!("# above\n{before}\n[host.\"https://new.example\"]\n");
            assert_eq!(lines(&back), lines(&expected));
        }
    }

    #[test]
    fn a_host_that_cannot_pull_is_told_not_doubled() {
        let text = table(URL).replace("\"pull\", ", "");
        assert!(apply(&text, URL).unwrap_err().what.contains("pull"));
        assert!(apply("host = { \"https://a\" = {} }\n", URL).is_err());
    }

    #[test]
    fn what_was_added_to_our_host_goes_with_it() {
        let text = format!("{}  [host.\"{URL}\".header]\n    a = \"b\"\n", ours());
        assert_eq!(undo(&text, URL, None).unwrap(), "");
    }

    #[test]
    fn a_hosts_toml_is_judged_by_what_containerd_does_with_it() {
        let good = table(URL);
        assert_eq!(judge(&good, MIRROR), Verdict::Good);
        assert_eq!(
            judge(&good.replace("127.0.0.1", "localhost"), MIRROR),
            Verdict::Good
        );
        assert_eq!(
            judge(&format!("server = \"https://a\"\n{good}"), MIRROR),
            Verdict::Good
        );
        let bad = |text: &str| matches!(judge(text, MIRROR), Verdict::Bad(_));
        assert!(
            bad("server = \"https://docker.io\"\n"),
            "1.6 and 1.7 ignore a file without a host"
        );
        assert!(bad(&good.replace("6500", "6501")));
        assert!(bad(&good.replace("\"pull\", ", "")));
        assert!(bad("[host"));
        let poor = |text: &str| matches!(judge(text, MIRROR), Verdict::Poor(_));
        assert!(poor(&good.replace(", \"resolve\"", "")));
        assert!(poor(&format!("{good}  skip_verify = true\n")));
        assert!(poor(&format!("[host.\"https://a.example\"]\n{good}")));
        assert_eq!(
            judge(&format!("{good}[host.\"https://a.example\"]\n"), MIRROR),
            Verdict::Good
        );
    }
}
