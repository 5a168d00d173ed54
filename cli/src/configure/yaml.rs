//! YAML as far as runtimes' files need it: a tree with the places of its nodes, so that texts can be cut there.

use std::ops::Range;

use saphyr_parser::{Event, Parser, Span, SpannedEventReceiver};

/// Nodes of one file.
const NODES_MAX: usize = 100_000;
const DEPTH_MAX: usize = 64;

/// A node.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) value: Value,
    /// Bytes of the text.
    pub(crate) at: Range<usize>,
    /// Column of the first character, from 0.
    pub(crate) column: usize,
}

/// A node's value. Aliases and tags are not looked into.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Scalar(String),
    Sequence(Vec<Node>),
    Mapping(Vec<(Node, Node)>),
    Alias,
}

/// Two nodes mean the same wherever they stand.
impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        match (&self.value, &other.value) {
            (Value::Scalar(a), Value::Scalar(b)) => a == b,
            (Value::Sequence(a), Value::Sequence(b)) => a == b,
            (Value::Mapping(a), Value::Mapping(b)) => a == b,
            _ => false,
        }
    }
}

impl Node {
    pub(crate) fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn entries(&self) -> &[(Node, Node)] {
        match &self.value {
            Value::Mapping(entries) => entries,
            _ => &[],
        }
    }

    pub(crate) fn items(&self) -> &[Node] {
        match &self.value {
            Value::Sequence(items) => items,
            _ => &[],
        }
    }

    /// The entry of a mapping with this key.
    pub(crate) fn entry(&self, key: &str) -> Option<&(Node, Node)> {
        self.entries()
            .iter()
            .find(|(name, _)| name.as_str() == Some(key))
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        self.entry(key).map(|(_, value)| value)
    }

    /// Whether there is nothing: `key:` without a value.
    pub(crate) fn is_null(&self) -> bool {
        self.as_str()
            .is_some_and(|text| matches!(text, "" | "~" | "null"))
    }
}

/// The text's only document; `None` where there is nothing but comments. An error is for people.
pub(crate) fn parse(text: &str) -> Result<Option<Node>, String> {
    let mut tree = Tree {
        offsets: offsets(text),
        stack: Vec::new(),
        documents: Vec::new(),
        nodes: 0,
        too_large: false,
    };
    let mut parser = Parser::new_from_str(text);
    parser
        .load(&mut tree, true)
        .map_err(|error| error.to_string())?;
    if tree.too_large {
        return Err("it is too large or too deep".to_owned());
    }
    let mut documents = tree.documents.into_iter();
    match (documents.next(), documents.next()) {
        (_, Some(_)) => Err("it holds more than one document".to_owned()),
        (Some(node), None) if node.is_null() && node.at.is_empty() => Ok(None),
        (document, None) => Ok(document),
    }
}

/// The byte at which each character begins, and the end.
fn offsets(text: &str) -> Vec<usize> {
    text.char_indices()
        .map(|(at, _)| at)
        .chain([text.len()])
        .collect()
}

struct Tree {
    offsets: Vec<usize>,
    stack: Vec<Node>,
    documents: Vec<Node>,
    nodes: usize,
    too_large: bool,
}

impl Tree {
    fn begin(&mut self, value: Value, span: Span) {
        let at = self.bytes(span);
        self.nodes += 1;
        self.too_large |= self.nodes > NODES_MAX || self.stack.len() > DEPTH_MAX;
        self.stack.push(Node {
            value,
            at,
            column: span.start.col(),
        });
    }

    fn bytes(&self, span: Span) -> Range<usize> {
        let at = |index: usize| {
            self.offsets
                .get(index)
                .or(self.offsets.last())
                .copied()
                .unwrap_or(0)
        };
        at(span.start.index())..at(span.end.index())
    }

    fn end(&mut self, span: Option<Span>) {
        let end = span.map(|span| self.bytes(span).end);
        let Some(mut node) = self.stack.pop() else {
            return;
        };
        node.at.end = end.unwrap_or(node.at.end).max(node.at.end);
        match self.stack.last_mut() {
            None => self.documents.push(node),
            Some(Node {
                value: Value::Sequence(items),
                ..
            }) => items.push(node),
            Some(Node {
                value: Value::Mapping(entries),
                ..
            }) => match entries.last_mut() {
                Some((_, value)) if matches!(value.value, Value::Alias) && value.at == (0..0) => {
                    *value = node
                }
                _ => {
                    // The value's place, until it comes.
                    let none = Node {
                        value: Value::Alias,
                        at: 0..0,
                        column: 0,
                    };
                    entries.push((node, none));
                }
            },
            Some(_) => {}
        }
    }
}

impl SpannedEventReceiver<'_> for Tree {
    fn on_event(&mut self, event: Event<'_>, span: Span) {
        if self.too_large {
            return;
        }
        match event {
            Event::Scalar(text, ..) => {
                self.begin(Value::Scalar(text.into_owned()), span);
                self.end(None);
            }
            Event::Alias(_) => {
                self.begin(Value::Alias, span);
                self.end(None);
            }
            Event::SequenceStart(..) => self.begin(Value::Sequence(Vec::new()), span),
            Event::MappingStart(..) => self.begin(Value::Mapping(Vec::new()), span),
            Event::SequenceEnd | Event::MappingEnd => self.end(Some(span)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_knows_where_its_nodes_are() {
        let text = "# é\nmirrors:\n  \"*\":\n    endpoint: [\"a\", b]\n  x:\n    endpoint:\n      - c\nempty:\n";
        let tree = parse(text).unwrap().unwrap();
        let mirrors = tree.get("mirrors").unwrap();
        let (key, all) = mirrors.entry("*").unwrap();
        assert_eq!((&text[key.at.clone()], key.column), ("\"*\"", 2));
        let items = all.get("endpoint").unwrap();
        assert_eq!(&text[items.at.clone()], "[\"a\", b]");
        let words: Vec<&str> = items.items().iter().filter_map(Node::as_str).collect();
        assert_eq!(words, ["a", "b"]);
        let item = &mirrors.get("x").unwrap().get("endpoint").unwrap().items()[0];
        assert_eq!((&text[item.at.clone()], item.column), ("c", 8));
        assert!(tree.get("empty").unwrap().is_null());
    }

    #[test]
    fn what_is_no_single_document_is_told() {
        assert_eq!(parse("").unwrap(), None);
        assert_eq!(parse("# nothing\n").unwrap(), None);
        assert!(parse("a: [").is_err());
        assert!(parse("a: 1\n---\nb: 2\n").is_err());
        assert!(parse(&"[".repeat(1000)).is_err());
        assert!(parse("a: &x 1\nb: *x\n").unwrap().is_some());
    }
}
