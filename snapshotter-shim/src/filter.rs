//! The filters of `List`, in containerd's grammar: `field OP value` with `==`, `!=` and `~=` (a regular expression), or a field alone
//! for its presence. A comma joins conditions of one filter. Of several filters, one must match.

use regex::{Regex, RegexBuilder};

use crate::catalog::{Record, Refusal};

/// The longest filter.
const FILTER_MAX_BYTES: usize = 8192;
/// The most filters of one request.
const FILTERS_MAX: usize = 1024;
/// The memory that one compiled expression may take.
const EXPRESSION_MAX_BYTES: usize = 1 << 20;

/// All filters of one request.
#[derive(Debug)]
pub struct Filters(Vec<Vec<Condition>>);

#[derive(Debug)]
struct Condition {
    field: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    /// Reads the filters of a request. No filter means that all snapshots match.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] when one is not in the grammar, or too long.
    pub fn parse(filters: &[String]) -> Result<Self, Refusal> {
        let wrong = |filter: &str, why| {
            Refusal::Invalid(format!("the filter `{filter:.200}` is wrong: {why}"))
        };
        if filters.len() > FILTERS_MAX {
            return Err(Refusal::Invalid(format!("more than {FILTERS_MAX} filters")));
        }
        let parse = |filter: &String| {
            if filter.len() > FILTER_MAX_BYTES {
                return Err(wrong(filter, "it is too long"));
            }
            Parser(filter)
                .conditions()
                .map_err(|why| wrong(filter, why))
        };
        filters
            .iter()
            .map(parse)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether a snapshot matches.
    #[must_use]
    pub fn match_record(&self, record: &Record) -> bool {
        self.0.is_empty()
            || self
                .0
                .iter()
                .any(|filter| filter.iter().all(|condition| condition.holds(record)))
    }
}

impl Condition {
    fn holds(&self, record: &Record) -> bool {
        let field = field(record, &self.field);
        match &self.test {
            Test::Present => field.is_some(),
            Test::Equal(value) => field == Some(value),
            // A field that is missing differs from every value, as in containerd.
            Test::NotEqual(value) => field.unwrap_or_default() != value,
            Test::Matches(expression) => expression.is_match(field.unwrap_or_default()),
        }
    }
}

fn field<'a>(record: &'a Record, path: &[String]) -> Option<&'a str> {
    let (first, rest) = path.split_first()?;
    match (first.as_str(), rest) {
        ("name", []) => Some(&record.name),
        ("parent", []) => Some(record.parent.as_deref().unwrap_or_default()),
        ("kind", []) => Some(record.kind.name()),
        ("labels", [_, ..]) => record.labels.get(&rest.join(".")).map(String::as_str),
        _ => None,
    }
}

/// The rest of a filter.
struct Parser<'a>(&'a str);

impl<'a> Parser<'a> {
    fn conditions(mut self) -> Result<Vec<Condition>, &'static str> {
        let mut conditions = Vec::new();
        if self.0.is_empty() {
            return Ok(conditions);
        }
        loop {
            conditions.push(self.condition()?);
            if self.0.is_empty() {
                return Ok(conditions);
            }
            if !self.take(",") {
                return Err("a comma is missing between two conditions");
            }
        }
    }

    fn condition(&mut self) -> Result<Condition, &'static str> {
        let mut field = vec![self.name()?];
        while self.take(".") {
            field.push(self.name()?);
        }
        let test = if self.take("==") {
            Test::Equal(self.value()?)
        } else if self.take("!=") {
            Test::NotEqual(self.value()?)
        } else if self.take("~=") {
            let expression = RegexBuilder::new(&self.expression()?)
                .size_limit(EXPRESSION_MAX_BYTES)
                .build();
            Test::Matches(expression.map_err(|_| "its regular expression cannot be used")?)
        } else {
            Test::Present
        };
        Ok(Condition { field, test })
    }

    fn take(&mut self, token: &str) -> bool {
        let rest = self.0.strip_prefix(token);
        self.0 = rest.unwrap_or(self.0);
        rest.is_some()
    }

    fn take_while(&mut self, belongs: impl Fn(char) -> bool) -> &'a str {
        let end = self.0.find(|c| !belongs(c)).unwrap_or(self.0.len());
        let (taken, rest) = self.0.split_at(end);
        self.0 = rest;
        taken
    }

    fn name(&mut self) -> Result<String, &'static str> {
        if self.0.starts_with('"') {
            return self.quoted('"');
        }
        let name = self.take_while(|c| c.is_alphanumeric() || c == '_');
        if name.starts_with(|c: char| c.is_alphabetic() || c == '_') {
            return Ok(name.to_owned());
        }
        Err("a field's name is missing; names with other characters stand in double quotes")
    }

    fn value(&mut self) -> Result<String, &'static str> {
        if self.0.starts_with('"') {
            return self.quoted('"');
        }
        let value = self.take_while(|c| c != ',' && !c.is_whitespace());
        if value.is_empty() {
            return Err("a value is missing");
        }
        Ok(value.to_owned())
    }

    /// An expression may also stand between slashes or bars.
    fn expression(&mut self) -> Result<String, &'static str> {
        for delimiter in ['/', '|'] {
            if self.0.starts_with(delimiter) {
                return self.quoted(delimiter);
            }
        }
        self.value()
    }

    fn quoted(&mut self, delimiter: char) -> Result<String, &'static str> {
        let mut text = String::new();
        let mut chars = self.0.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            if c == delimiter {
                self.0 = &self.0[at + c.len_utf8()..];
                return Ok(text);
            }
            if c != '\\' {
                text.push(c);
                continue;
            }
            match chars.next() {
                Some((_, 'n')) if delimiter == '"' => text.push('\n'),
                Some((_, 't')) if delimiter == '"' => text.push('\t'),
                Some((_, escaped))
                    if escaped == delimiter || escaped == '\\' && delimiter == '"' =>
                {
                    text.push(escaped);
                }
                // A backslash of the expression itself.
                Some((_, escaped)) if delimiter != '"' => text.extend(['\\', escaped]),
                _ => return Err("an escape is not known"),
            }
        }
        Err("a closing quote is missing")
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::*;
    use crate::catalog::Kind;

    fn record() -> Record {
        let labels = [("containerd.io/snapshot.ref", "sha256:ab"), ("a.b", "x y")];
        Record {
            id: 1,
            name: "k8s.io/7/layer".into(),
            parent: Some("k8s.io/6/base".into()),
            kind: Kind::Committed,
            labels: labels
                .map(|(name, value)| (name.into(), value.into()))
                .into(),
            created: SystemTime::UNIX_EPOCH,
            updated: SystemTime::UNIX_EPOCH,
            usage: None,
        }
    }

    fn matches(filters: &[&str]) -> Result<bool, Refusal> {
        let filters: Vec<String> = filters.iter().map(|it| (*it).to_owned()).collect();
        Filters::parse(&filters).map(|filters| filters.match_record(&record()))
    }

    #[test]
    fn filters_of_containerds_grammar() {
        for (filters, expected) in [
            (&[][..], true),
            (&[""], true),
            (&["kind==committed"], true),
            (&["kind==active"], false),
            (&["kind==active", "kind==committed"], true),
            (&["name==k8s.io/7/layer,parent==k8s.io/6/base"], true),
            (&["name==k8s.io/7/layer,parent!=k8s.io/6/base"], false),
            (&[r#"labels."containerd.io/snapshot.ref"==sha256:ab"#], true),
            (
                &[r#"labels."containerd.io/snapshot.ref"=="sha256:ac""#],
                false,
            ),
            (&["labels.a.b==\"x y\""], true),
            (&["labels.a.b"], true),
            (&["labels.a"], false),
            (&["labels.gone!=x"], true),
            (&["nothing"], false),
            (&["name~=/^k8s.io\\/\\d/"], true),
            (&["name~=|^k8s.io/x|"], false),
            (&["name~=layer$"], true),
        ] {
            assert_eq!(matches(filters), Ok(expected), "{filters:?}");
        }
    }

    #[test]
    fn other_text_is_refused() {
        for bad in [
            ",",
            "name==",
            "name=x",
            "==x",
            "name==a b",
            "name~=(",
            "labels.\"x",
            "1a",
            "name==a,",
        ] {
            assert!(matches(&[bad]).is_err(), "{bad}");
        }
        assert!(matches(&[&"a".repeat(FILTER_MAX_BYTES + 1)]).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,60}") {
            let _ = matches(&[&text]);
        }

        #[test]
        fn any_label_is_found_by_its_quoted_name(name in "[a-z./\"\\\\]{1,20}", value in "[a-z \"\\\\,]{1,20}") {
            let quote = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
            let mut record = record();
            record.labels.insert(name.clone(), value.clone());
            let filter = format!("labels.\"{}\"==\"{}\"", quote(&name), quote(&value));
            prop_assert!(Filters::parse(&[filter]).unwrap().match_record(&record));
        }
    }
}
