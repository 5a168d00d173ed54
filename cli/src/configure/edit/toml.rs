//! Small changes to TOML files that leave every other byte as it was: toml_edit says where things are, the text is cut there,
//! and the result must mean what was meant.

use std::ops::Range;

use toml::{Table, Value};
use toml_edit::{Array, Document, Item, TableLike};

use super::Unfit;

/// A TOML file, taken apart.
pub(super) struct Toml<'a> {
    text: &'a str,
    document: Document<&'a str>,
    headers: Vec<Header>,
    /// The start of the comments and blank lines after the last key.
    trailing: usize,
}

/// A `[table]` or `[[table]]`, in the order of the file.
pub(super) struct Header {
    pub(super) path: Vec<String>,
    /// The header itself, from bracket to bracket.
    at: Range<usize>,
    /// The start of the comments and blank lines above it.
    from: usize,
}

impl Header {
    pub(super) fn is(&self, path: &[&str]) -> bool {
        self.path == path
    }

    pub(super) fn is_below(&self, path: &[&str]) -> bool {
        self.path.len() >= path.len() && self.path.iter().zip(path).all(|(a, b)| a == b)
    }
}

impl<'a> Toml<'a> {
    pub(super) fn parse(text: &'a str) -> Result<Self, Unfit> {
        let document = Document::parse(text).map_err(|error| Unfit::no_toml(&error))?;
        let mut headers = Vec::new();
        find_headers(document.as_table(), &mut Vec::new(), &mut headers);
        headers.sort_by_key(|header| header.at.start);
        let trailing = document
            .trailing()
            .span()
            .map_or(text.len(), |span| span.start);
        Ok(Self {
            text,
            document,
            headers,
            trailing,
        })
    }

    pub(super) fn headers(&self) -> &[Header] {
        &self.headers
    }

    pub(super) fn item(&self, path: &[&str]) -> Option<&Item> {
        let (last, parents) = path.split_last()?;
        let table: &dyn TableLike = self.document.as_table();
        parents
            .iter()
            .try_fold(table, |table, name| table.get(name)?.as_table_like())?
            .get(last)
    }

    /// The words of a value, as they stand in the file.
    fn literal(&self, path: &[&str]) -> Option<&'a str> {
        let span = self.item(path)?.as_value()?.span()?;
        self.text.get(span)
    }

    pub(super) fn array(&self, path: &[&str]) -> Option<&Array> {
        self.item(path)?.as_array()
    }

    /// The lines from a header to the next header's comments, its own line included.
    pub(super) fn block(&self, header: &Header) -> Range<usize> {
        let next = self
            .headers
            .iter()
            .find(|other| other.at.start > header.at.start);
        line_start(self.text, header.at.start)..next.map_or(self.trailing, |next| next.from)
    }

    /// The place for a table that has to come before all others: behind the keys at the top, and before the comments
    /// that belong to the first table.
    pub(super) fn before_tables(&self) -> usize {
        let Some(first) = self.headers.first() else {
            return self.text.len();
        };
        let line = line_start(self.text, first.at.start);
        let comments = &self.text[first.from..line];
        let mut at = first.from;
        let mut attached = first.from;
        for part in comments.split_inclusive('\n') {
            at += part.len();
            if part.trim().is_empty() {
                attached = at;
            }
        }
        attached
    }
}

fn find_headers(table: &dyn TableLike, path: &mut Vec<String>, found: &mut Vec<Header>) {
    for (key, item) in table.iter() {
        path.push(key.to_owned());
        let tables: Vec<&toml_edit::Table> = match item {
            Item::Table(table) => vec![table],
            Item::ArrayOfTables(tables) => tables.iter().collect(),
            _ => Vec::new(),
        };
        for table in tables {
            if let Some(at) = table
                .span()
                .filter(|_| !table.is_implicit() && !table.is_dotted())
            {
                let from = table.decor().prefix().and_then(|prefix| prefix.span());
                found.push(Header {
                    path: path.clone(),
                    from: from.map_or(at.start, |from| from.start.min(at.start)),
                    at,
                });
            }
            find_headers(table, path, found);
        }
        path.pop();
    }
}

/// Sets `table.key` to a literal: in place of the value that is there, else below the table's header, else in a new table at
/// the end.
pub(super) fn set(text: &str, table: &[&str], key: &str, literal: &str) -> Result<String, Unfit> {
    let toml = Toml::parse(text)?;
    let path = [table, &[key]].concat();
    let eol = eol(text);
    let edited = match toml.item(&path).and_then(|item| item.as_value()?.span()) {
        Some(span) => splice(text, span, literal),
        None => match toml.headers.iter().find(|header| header.is(table)) {
            Some(header) => {
                let at = line_end(text, header.at.end);
                let indent = indent_below(text, &toml.block(header));
                let start = if text[..at].ends_with('\n') { "" } else { eol };
                splice(
                    text,
                    at..at,
                    &format!("{start}{indent}{key} = {literal}{eol}"),
                )
            }
            None => {
                let name: Vec<String> = table.iter().map(|name| key_literal(name)).collect();
                append(
                    text,
                    &format!("[{}]{eol}  {key} = {literal}{eol}", name.join(".")),
                )
            }
        },
    };
    let value = parse_literal(literal)?;
    meant(text, edited, |model| put(model, table, key, value))
}

/// Takes `table.key` out again, or gives it the value it had in `original`; a table that is empty then, and was not there
/// in `original`, goes too.
pub(super) fn unset(
    text: &str,
    table: &[&str],
    key: &str,
    original: Option<&Toml<'_>>,
) -> Result<String, Unfit> {
    let toml = Toml::parse(text)?;
    let path = [table, &[key]].concat();
    let Some(span) = toml.item(&path).and_then(|item| item.as_value()?.span()) else {
        return Ok(text.to_owned());
    };
    if let Some(before) = original.and_then(|original| original.literal(&path)) {
        let value = parse_literal(before)?;
        return meant(text, splice(text, span, before), |model| {
            put(model, table, key, value)
        });
    }
    let line = line_start(text, span.start)..line_end(text, span.end);
    let without = meant(text, splice(text, line, ""), |model| {
        take(model, table, key)
    })?;
    drop_if_empty(without, table, original)
}

fn drop_if_empty(
    text: String,
    table: &[&str],
    original: Option<&Toml<'_>>,
) -> Result<String, Unfit> {
    let toml = Toml::parse(&text)?;
    let ours =
        original.is_none_or(|original| original.headers.iter().all(|header| !header.is(table)));
    // Tables below it have headers of their own.
    let stays =
        |item: &Item| item.is_value() || item.as_table().is_some_and(toml_edit::Table::is_dotted);
    let empty = toml
        .item(table)
        .and_then(Item::as_table_like)
        .is_some_and(|table| !table.iter().any(|(_, item)| stays(item)));
    match toml.headers.iter().find(|header| header.is(table)) {
        Some(header) if ours && empty => {
            let block = with_blank_before(&text, toml.block(header));
            Ok(splice(&text, block, ""))
        }
        _ => Ok(text),
    }
}

/// Puts a text first in the array `table.key`, which is made where it is missing.
pub(super) fn prepend(
    text: &str,
    table: &[&str],
    key: &str,
    element: &str,
) -> Result<String, Unfit> {
    let toml = Toml::parse(text)?;
    let literal = literal(element);
    let path = [table, &[key]].concat();
    let Some(array) = toml.array(&path) else {
        return set(text, table, key, &format!("[{literal}]"));
    };
    let Some(span) = array.span() else {
        return Err(Unfit::shape());
    };
    let inside = span.start + 1;
    let spaced = text[inside..].starts_with(char::is_whitespace);
    let first = match (array.is_empty(), spaced) {
        (true, _) => literal,
        (false, true) => format!("{literal},"),
        (false, false) => format!("{literal}, "),
    };
    meant(text, splice(text, inside..inside, &first), |model| {
        if let Some(Value::Array(elements)) = look_mut(model, &path) {
            elements.insert(0, Value::String(element.to_owned()));
        }
    })
}

/// Takes a text out of the array `table.key`; an array that is empty then, and was not there in `original`, goes too.
pub(super) fn withdraw(
    text: &str,
    table: &[&str],
    key: &str,
    element: &str,
    original: Option<&Toml<'_>>,
) -> Result<String, Unfit> {
    let toml = Toml::parse(text)?;
    let path = [table, &[key]].concat();
    let Some(array) = toml.array(&path) else {
        return Ok(text.to_owned());
    };
    let spans: Vec<Range<usize>> = array.iter().filter_map(toml_edit::Value::span).collect();
    let Some(i) = array
        .iter()
        .position(|value| value.as_str() == Some(element))
    else {
        return Ok(text.to_owned());
    };
    let there = original.is_some_and(|original| original.array(&path).is_some());
    if array.len() == 1 && !there {
        return unset(text, table, key, original);
    }
    // Up to the next element, or from the one before: the comma goes with it.
    let cut = match (spans.get(i), spans.get(i + 1)) {
        (Some(own), Some(next)) => own.start..next.start,
        (Some(own), None) => {
            i.checked_sub(1)
                .map_or(own.start, |before| spans[before].end)..own.end
        }
        (None, _) => return Err(Unfit::shape()),
    };
    meant(text, splice(text, cut, ""), |model| {
        if let Some(Value::Array(elements)) = look_mut(model, &path) {
            elements.remove(i);
        }
    })
}

/// The text that came out of an edit, if it means what the edit was to mean.
pub(super) fn meant(
    before: &str,
    edited: String,
    change: impl FnOnce(&mut Table),
) -> Result<String, Unfit> {
    let mut wanted: Table = before.parse().map_err(|_| Unfit::shape())?;
    change(&mut wanted);
    match edited.parse::<Table>() {
        Ok(table) if table == wanted => Ok(edited),
        _ => Err(Unfit::shape()),
    }
}

/// Puts a value at `table.key` of what a file means, tables made on the way.
pub(super) fn put(model: &mut Table, table: &[&str], key: &str, value: Value) {
    let mut at = model;
    for name in table {
        let entry = at
            .entry((*name).to_owned())
            .or_insert_with(|| Value::Table(Table::new()));
        let Value::Table(next) = entry else { return };
        at = next;
    }
    at.insert(key.to_owned(), value);
}

fn take(model: &mut Table, table: &[&str], key: &str) {
    if let Some(Value::Table(at)) = look_mut(model, table) {
        at.remove(key);
    }
}

fn look_mut<'a>(model: &'a mut Table, path: &[&str]) -> Option<&'a mut Value> {
    let (last, parents) = path.split_last()?;
    parents
        .iter()
        .try_fold(model, |table, name| table.get_mut(*name)?.as_table_mut())?
        .get_mut(*last)
}

fn parse_literal(literal: &str) -> Result<Value, Unfit> {
    let table: Table = format!("it = {literal}")
        .parse()
        .map_err(|_| Unfit::shape())?;
    table.get("it").cloned().ok_or_else(Unfit::shape)
}

/// A text as a TOML string.
pub(super) fn literal(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

fn key_literal(name: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if !name.is_empty() && name.chars().all(bare) {
        name.to_owned()
    } else {
        literal(name)
    }
}

/// How the file ends its lines.
pub(super) fn eol(text: &str) -> &'static str {
    if text.contains("\r\n") { "\r\n" } else { "\n" }
}

/// A block at the end, behind a blank line.
pub(super) fn append(text: &str, block: &str) -> String {
    let eol = eol(text);
    let end = if text.is_empty() || text.ends_with('\n') {
        ""
    } else {
        eol
    };
    let blank = if text.trim().is_empty() { "" } else { eol };
    format!("{text}{end}{blank}{block}")
}

pub(super) fn splice(text: &str, range: Range<usize>, with: &str) -> String {
    format!("{}{with}{}", &text[..range.start], &text[range.end..])
}

pub(super) fn line_start(text: &str, at: usize) -> usize {
    text[..at].rfind('\n').map_or(0, |newline| newline + 1)
}

/// Behind the end of the line.
pub(super) fn line_end(text: &str, at: usize) -> usize {
    text[at..]
        .find('\n')
        .map_or(text.len(), |newline| at + newline + 1)
}

/// The same, and the blank line before it.
pub(super) fn with_blank_before(text: &str, block: Range<usize>) -> Range<usize> {
    let before = line_start(text, block.start.saturating_sub(1));
    if before < block.start && text[before..block.start].trim().is_empty() {
        return before..block.end;
    }
    block
}

/// The same, and the blank line behind it.
pub(super) fn with_blank_behind(text: &str, block: Range<usize>) -> Range<usize> {
    let end = line_end(text, block.end);
    if text[block.end..end].trim().is_empty() {
        block.start..end
    } else {
        block
    }
}

/// How the keys of a block are indented: as the first one, else two spaces more than the header.
fn indent_below(text: &str, block: &Range<usize>) -> String {
    let spaces = |line: &str| -> String {
        line.chars()
            .take_while(|c| matches!(c, ' ' | '\t'))
            .collect()
    };
    let mut lines = text[block.clone()].lines();
    let header = spaces(lines.next().unwrap_or_default());
    let key = lines.find(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'));
    key.map_or_else(|| format!("{header}  "), spaces)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLUGIN: [&str; 3] = ["plugins", "io.containerd.grpc.v1.cri", "registry"];

    fn set_path(text: &str) -> String {
        set(text, &PLUGIN, "config_path", "\"/d\"").unwrap()
    }

    #[test]
    fn a_value_is_set_where_it_stands_and_all_else_stays() {
        let block = "[plugins.\"io.containerd.grpc.v1.cri\".registry]\n";
        for (before, after) in [
            (String::new(), format!("{block}  config_path = \"/d\"\n")),
            (
                "a = 1".to_owned(),
                format!("a = 1\n\n{block}  config_path = \"/d\"\n"),
            ),
            (
                "a = 1\r\n".to_owned(),
                format!("a = 1\r\n\r\n{block}  config_path = \"/d\"\n")
                    .replace("]\n", "]\r\n")
                    .replace("d\"\n", "d\"\r\n"),
            ),
            (
                format!("{block}  config_path = '' # none\n"),
                format!("{block}  config_path = \"/d\" # none\n"),
            ),
            (
                format!("  {block}\n    # c\n\tx.y = 1\n"),
                format!("  {block}\tconfig_path = \"/d\"\n\n    # c\n\tx.y = 1\n"),
            ),
            (
                format!("  {block}  [a]\n"),
                format!("  {block}    config_path = \"/d\"\n  [a]\n"),
            ),
            (
                "plugins.\"io.containerd.grpc.v1.cri\".registry.config_path=\"\"\n".to_owned(),
                "plugins.\"io.containerd.grpc.v1.cri\".registry.config_path=\"/d\"\n".to_owned(),
            ),
        ] {
            assert_eq!(set_path(&before), after, "{before}");
        }
    }

    #[test]
    fn what_cannot_be_extended_is_refused_not_broken() {
        for text in [
            "plugins = { \"io.containerd.grpc.v1.cri\" = { x = 1 } }\n",
            "[plugins.\"io.containerd.grpc.v1.cri\"]\nregistry.x = 1\n",
            "[[plugins]]\n",
            "plugins = 1\n",
            "[plugins",
        ] {
            assert!(
                set(text, &PLUGIN, "config_path", "\"/d\"").is_err(),
                "{text}"
            );
        }
    }

    #[test]
    fn unset_gives_back_what_was_there() {
        for original in [
            "a = 1\n",
            "[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = '' # none\n[b]\n",
            "[plugins.\"io.containerd.grpc.v1.cri\".registry]\n[b]\n",
            "[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  x = 1\n\n# b\n[b]\n",
        ] {
            let toml = Toml::parse(original).unwrap();
            let changed = set_path(original) + "# theirs\n";
            let back = unset(&changed, &PLUGIN, "config_path", Some(&toml)).unwrap();
            assert_eq!(back, format!("{original}# theirs\n"));
        }
    }

    #[test]
    fn arrays_are_extended_in_front_and_shrunk_again() {
        let table = ["registry", "docker.io"];
        for text in [
            "[registry.\"docker.io\"]\n  mirrors = [\"a\", \"b\"]\n",
            "[registry.\"docker.io\"]\n  mirrors = [\n    \"a\", # first\n    \"b\",\n  ]\n",
            "[registry.\"docker.io\"]\n  mirrors = []\n",
            "[registry.\"docker.io\"]\n",
            "[registry]\n  \"docker.io\" = { mirrors = [\"a\"], http = true }\n",
            "",
        ] {
            let original = Toml::parse(text).unwrap();
            let more = prepend(text, &table, "mirrors", "m").unwrap();
            let toml = Toml::parse(&more).unwrap();
            let first = toml
                .array(&["registry", "docker.io", "mirrors"])
                .unwrap()
                .get(0)
                .unwrap();
            assert_eq!(first.as_str(), Some("m"), "{more}");
            let less = withdraw(&more, &table, "mirrors", "m", Some(&original)).unwrap();
            assert_eq!(
                less.parse::<Table>().unwrap(),
                text.parse::<Table>().unwrap(),
                "{more}"
            );
        }
        let last = withdraw("mirrors = [\"a\", \"m\"]\n", &[], "mirrors", "m", None).unwrap();
        assert_eq!(last, "mirrors = [\"a\"]\n");
    }
}
