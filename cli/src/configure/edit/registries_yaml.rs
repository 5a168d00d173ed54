//! `registries.yaml` of k3s and RKE2: the mirror before the other endpoints of a registry.

use super::{NOTE, Unfit};
use crate::configure::request::ALL;
use crate::configure::yaml::{self, Node, Value};

/// The registries that have an entry among the mirrors; none where the file can't be read.
pub(crate) fn mirrored(text: &str) -> Vec<String> {
    let tree = yaml::parse(text).ok().flatten();
    let mirrors = tree.as_ref().and_then(|tree| tree.get("mirrors"));
    let names = mirrors
        .into_iter()
        .flat_map(Node::entries)
        .filter_map(|(name, _)| name.as_str());
    names.map(str::to_owned).collect()
}

/// The name of a registry here: `*` for all.
fn name(registry: &str) -> &str {
    if registry == ALL { "*" } else { registry }
}

fn quoted(text: &str) -> String {
    // Hosts and URLs hold nothing that needs escaping.
    format!("\"{text}\"")
}

/// Puts the mirror first among the endpoints of each registry.
pub(super) fn apply(text: Option<&str>, url: &str, registries: &[String]) -> Result<String, Unfit> {
    let mut edited = text.map_or_else(|| format!("{NOTE}\n"), str::to_owned);
    for registry in registries {
        let next = apply_one(&edited, url, name(registry))?;
        let (before, after) = (
            endpoints(&edited, name(registry))?,
            endpoints(&next, name(registry))?,
        );
        let mut meant = vec![url.to_owned()];
        meant.extend(before.iter().filter(|endpoint| *endpoint != url).cloned());
        if before.first().is_some_and(|first| first == url) {
            continue;
        }
        if after != meant || without(&edited, name(registry))? != without(&next, name(registry))? {
            return Err(shape());
        }
        edited = next;
    }
    Ok(edited)
}

fn apply_one(text: &str, url: &str, registry: &str) -> Result<String, Unfit> {
    let tree = parse(text)?;
    let (key, item) = (quoted(registry), quoted(url));
    let eol = if text.contains("\r\n") { "\r\n" } else { "\n" };
    let lines = |lines: &[String]| {
        lines
            .iter()
            .map(|line| format!("{line}{eol}"))
            .collect::<String>()
    };
    let entry = |indent: usize| {
        let pad = " ".repeat(indent);
        [
            format!("{pad}{key}:"),
            format!("{pad}  endpoint:"),
            format!("{pad}    - {item}"),
        ]
    };
    let mut all = vec!["mirrors:".to_owned()];
    all.extend(entry(2));
    let Some(tree) = tree else {
        return Ok(at_the_end(text, &lines(&all), eol));
    };
    let Some((name, mirrors)) = tree.entry("mirrors") else {
        return if is_block(text, &tree) {
            Ok(at_the_end(text, &lines(&all), eol))
        } else {
            Err(shape())
        };
    };
    if mirrors.is_null() {
        return Ok(splice_line_after(
            text,
            name.at.start,
            &lines(&entry(2)),
            eol,
        ));
    }
    let Some((first, _)) = mirrors
        .entries()
        .first()
        .filter(|_| is_block(text, mirrors))
    else {
        return Err(shape());
    };
    let Some((own, settings)) = mirrors.entry(registry) else {
        return Ok(splice_line_after(
            text,
            name.at.start,
            &lines(&entry(first.column)),
            eol,
        ));
    };
    let Some((endpoint, list)) = settings.entry("endpoint") else {
        let indent = settings
            .entries()
            .first()
            .map_or(own.column + 2, |(key, _)| key.column);
        if !settings.is_null() && !is_block(text, settings) {
            return Err(shape());
        }
        let pad = " ".repeat(indent);
        let more = lines(&[format!("{pad}endpoint:"), format!("{pad}  - {item}")]);
        return Ok(splice_line_after(text, own.at.start, &more, eol));
    };
    match list.items().first() {
        Some(first) if text[list.at.clone()].starts_with('[') => Ok(format!(
            "{}{item}, {}",
            &text[..first.at.start],
            &text[first.at.start..]
        )),
        Some(first) => {
            let line = text[..first.at.start].rfind('\n').map_or(0, |at| at + 1);
            let start = &text[line..first.at.start];
            if start.trim() != "-" {
                return Err(shape());
            }
            Ok(format!(
                "{}{start}{item}{eol}{}",
                &text[..line],
                &text[line..]
            ))
        }
        None if list.is_null() => {
            let pad = " ".repeat(endpoint.column + 2);
            Ok(splice_line_after(
                text,
                endpoint.at.start,
                &lines(&[format!("{pad}- {item}")]),
                eol,
            ))
        }
        None => Err(shape()),
    }
}

/// Takes the mirror out again, and entries of ours that hold nothing else; `original` is the text that the edit was applied to.
pub(super) fn undo(
    text: &str,
    url: &str,
    registries: &[String],
    original: Option<&str>,
) -> Result<String, Unfit> {
    let mut left = text.to_owned();
    for registry in registries {
        left = undo_one(&left, url, name(registry), original.unwrap_or_default())?;
    }
    Ok(left)
}

fn undo_one(text: &str, url: &str, registry: &str, original: &str) -> Result<String, Unfit> {
    let Some(tree) = parse(text)? else {
        return Ok(text.to_owned());
    };
    let Some((mirrors_key, mirrors)) = tree.entry("mirrors") else {
        return Ok(text.to_owned());
    };
    let Some((own, settings)) = mirrors.entry(registry) else {
        return Ok(text.to_owned());
    };
    let Some((endpoint, list)) = settings.entry("endpoint") else {
        return Ok(text.to_owned());
    };
    let Some(position) = list
        .items()
        .iter()
        .position(|item| item.as_str() == Some(url))
    else {
        return Ok(text.to_owned());
    };
    let before = yaml::parse(original).ok().flatten();
    let had_mirrors = before.as_ref().and_then(|tree| tree.get("mirrors"));
    let had = had_mirrors.and_then(|mirrors| mirrors.get(registry));
    let had_endpoint = had.is_some_and(|settings| settings.get("endpoint").is_some());
    let item = &list.items()[position];
    let cut = match (
        list.items().len(),
        settings.entries().len(),
        mirrors.entries().len(),
    ) {
        (1, 1, 1) if had_mirrors.is_none() => lines_of(text, mirrors_key.at.start, item.at.end),
        (1, 1, _) if had.is_none() => lines_of(text, own.at.start, item.at.end),
        (1, _, _) if !had_endpoint => lines_of(text, endpoint.at.start, item.at.end),
        _ if text[list.at.clone()].starts_with('[') => {
            let next = list
                .items()
                .get(position + 1)
                .map_or(item.at.end, |next| next.at.start);
            item.at.start..next
        }
        _ => lines_of(text, item.at.start, item.at.end),
    };
    let left = format!("{}{}", &text[..cut.start], &text[cut.end..]);
    if without(text, registry)? != without(&left, registry)? {
        return Err(shape());
    }
    Ok(left)
}

fn parse(text: &str) -> Result<Option<Node>, Unfit> {
    yaml::parse(text)
        .map_err(|why| Unfit::new(format!("is no YAML: {why}"), "mend it, or move it away"))
}

fn endpoints(text: &str, registry: &str) -> Result<Vec<String>, Unfit> {
    let tree = parse(text)?;
    let list = tree
        .as_ref()
        .and_then(|tree| tree.get("mirrors")?.get(registry)?.get("endpoint"));
    Ok(list
        .into_iter()
        .flat_map(Node::items)
        .filter_map(Node::as_str)
        .map(str::to_owned)
        .collect())
}

/// The file's meaning without one registry's endpoints, and without what is empty then.
fn without(text: &str, registry: &str) -> Result<Option<Node>, Unfit> {
    let Some(mut tree) = parse(text)? else {
        return Ok(None);
    };
    let Value::Mapping(top) = &mut tree.value else {
        return Ok(Some(tree));
    };
    for (key, mirrors) in top
        .iter_mut()
        .filter(|(key, _)| key.as_str() == Some("mirrors"))
    {
        let _ = key;
        let Value::Mapping(entries) = &mut mirrors.value else {
            continue;
        };
        for (_, settings) in entries
            .iter_mut()
            .filter(|(key, _)| key.as_str() == Some(registry))
        {
            if let Value::Mapping(settings) = &mut settings.value {
                settings.retain(|(key, _)| key.as_str() != Some("endpoint"));
            }
        }
        let is_empty = |settings: &Node| {
            settings.is_null() || matches!(&settings.value, Value::Mapping(all) if all.is_empty())
        };
        entries.retain(|(key, settings)| key.as_str() != Some(registry) || !is_empty(settings));
    }
    let is_empty = |value: &Node| {
        value.is_null() || matches!(&value.value, Value::Mapping(all) if all.is_empty())
    };
    top.retain(|(key, value)| key.as_str() != Some("mirrors") || !is_empty(value));
    let is_empty = top.is_empty();
    Ok(Some(tree).filter(|_| !is_empty))
}

fn is_block(text: &str, node: &Node) -> bool {
    matches!(node.value, Value::Mapping(_)) && !text[node.at.start..].starts_with('{')
}

fn at_the_end(text: &str, more: &str, eol: &str) -> String {
    let gap = if text.is_empty() || text.ends_with('\n') {
        ""
    } else {
        eol
    };
    format!("{text}{gap}{more}")
}

/// Adds lines below the line of a place.
fn splice_line_after(text: &str, at: usize, more: &str, eol: &str) -> String {
    match text[at..].find('\n') {
        Some(end) => format!("{}{more}{}", &text[..=at + end], &text[at + end + 1..]),
        None => at_the_end(text, more, eol),
    }
}

/// Whole lines from a place to another.
fn lines_of(text: &str, from: usize, to: usize) -> std::ops::Range<usize> {
    let start = text[..from].rfind('\n').map_or(0, |at| at + 1);
    let end = text[to..].find('\n').map_or(text.len(), |at| to + at + 1);
    start..end
}

fn shape() -> Unfit {
    Unfit::new(
        "is written in a way that `hawker configure` cannot add to",
        "write mirrors, the registry's name and endpoint on lines of their own; or add the mirror by hand, first among the endpoints",
    )
}

#[cfg(test)]
mod tests {
    use super::super::Edit;
    use super::*;

    const URL: &str = "http://127.0.0.1:6500";

    #[test]
    fn the_mirror_comes_first_and_goes_again_whatever_the_file_looks_like() {
        let all = [ALL.to_owned(), "docker.io".to_owned()];
        for text in [
            "",
            "# ours\n",
            "configs:\n  a.example:\n    auth: {username: u}\n",
            "mirrors:\n",
            "mirrors:\n  docker.io:\n    endpoint:\n      - \"https://cache.example\" # near\n      - https://b\n",
            "mirrors:\n    docker.io:\n        endpoint: [\"https://cache.example\"]\n    \"*\":\n        rewrite:\n            \"a\": \"b\"\n",
            "mirrors:\n  docker.io:\n  quay.io:\n    endpoint:\n    - https://c\nconfigs: {}\n",
            "mirrors:\n  \"*\":\n    endpoint:\n    - http://127.0.0.1:6500\n",
            "mirrors:\r\n  docker.io:\r\n    endpoint:\r\n      - a\r\n",
        ] {
            let edited = apply(Some(text), URL, &all).unwrap();
            for registry in ["*", "docker.io"] {
                assert_eq!(
                    endpoints(&edited, registry).unwrap()[0],
                    URL,
                    "{text}\n{edited}"
                );
            }
            assert_eq!(apply(Some(&edited), URL, &all).unwrap(), edited, "{text}");
            if endpoints(text, "*").unwrap().is_empty() {
                assert_eq!(
                    undo(&edited, URL, &all, Some(text)).unwrap(),
                    text,
                    "{edited}"
                );
            }
        }
        let new = apply(None, URL, &[ALL.to_owned()]).unwrap();
        assert_eq!(
            new,
            format!("{NOTE}\nmirrors:\n  \"*\":\n    endpoint:\n      - \"{URL}\"\n")
        );
        let edit = Edit::RegistriesYaml {
            url: URL.into(),
            registries: vec![ALL.into()],
        };
        assert_eq!(edit.undo(&new, None), Ok(None));
    }

    #[test]
    fn what_others_added_since_stays() {
        let all = [ALL.to_owned()];
        let edited = apply(None, URL, &all).unwrap();
        let more = format!("{edited}      - \"https://other\"\nconfigs:\n  a: {{}}\n");
        let left = undo(&more, URL, &all, None).unwrap();
        assert_eq!(endpoints(&left, "*").unwrap(), ["https://other"]);
        assert!(left.ends_with("configs:\n  a: {}\n"), "{left}");
    }

    #[test]
    fn what_cannot_be_edited_is_told() {
        for text in [
            "{mirrors: {}}\n",
            "mirrors: {docker.io: {endpoint: [a]}}\n",
            "mirrors: [\n",
            "- a\n",
            "a: 1\n---\nb: 1\n",
        ] {
            assert!(
                apply(Some(text), URL, &["docker.io".to_owned()]).is_err(),
                "{text}"
            );
        }
    }
}
