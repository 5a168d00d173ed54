//! The layers of a configuration, and the values that come out of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use hawker_core::application::MAX_RULES;
use toml::Value;
use toml::de::{DeTable, DeValue};

use crate::de::{self, Failure, child};
use crate::problem::{Problem, Wrong, wrong};
use crate::schema::{
    ApplicationEntry, Applies, Config, Daemon, Key, NetworkEntry, Registry, flag_of,
    registry_flag_of, variable_of,
};
use crate::value::Shape;

/// The layers, each of which goes before those above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// The schema.
    Default,
    /// The schedulers.
    Pushed,
    /// The TOML file that `--config` names.
    File,
    /// Variables `HAWKER_…`.
    Environment,
    /// The command line.
    Flag,
}

/// The place that a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The layer.
    pub layer: Layer,
    /// Within the layer: the file and the line, the variable, the flag.
    pub place: String,
}

impl Origin {
    fn is_pushed(&self) -> bool {
        self.layer == Layer::Pushed
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Layer::Default => f.write_str("default"),
            _ => f.write_str(&self.place),
        }
    }
}

/// The values of one layer.
#[derive(Clone, Debug, Default)]
pub struct Layered {
    /// By key, tables resolved: `cache.high`.
    values: BTreeMap<String, Value>,
    /// By path; a path within a value may have an origin of its own.
    origins: BTreeMap<String, Origin>,
    problems: Vec<Problem>,
}

impl Layered {
    fn set(&mut self, path: &str, value: Value, origin: Origin) {
        self.values.insert(path.to_owned(), value);
        self.origins.insert(path.to_owned(), origin);
    }

    /// The layer of a TOML file.
    pub fn file(daemon: Daemon, path: &Path) -> Self {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::toml(daemon, &path.display().to_string(), &text),
            Err(error) => Self::broken(
                &path.display().to_string(),
                format!("cannot be read: {error}"),
                "name a readable file with --config",
            ),
        }
    }

    fn broken(place: &str, what: String, cure: &str) -> Self {
        Self {
            problems: vec![Problem::new(place, what, cure)],
            ..Self::default()
        }
    }

    /// The layer of a TOML text that stands at `place`.
    pub fn toml(daemon: Daemon, place: &str, text: &str) -> Self {
        // The error of this parser shows the line.
        let table = match text.parse::<toml::Table>() {
            Ok(_) => DeTable::parse(text),
            Err(error) => Err(error),
        };
        let table = match table {
            Ok(table) => table,
            Err(error) => {
                let error = error.to_string().trim_end().replace('\n', "\n    ");
                return Self::broken(place, format!("is no TOML: {error}"), "mend that line");
            }
        };
        let mut walk = Walk {
            daemon,
            keys: Config::keys(),
            place,
            text,
            layer: Self::default(),
        };
        walk.table("", table.get_ref());
        walk.layer
    }

    /// The layer that a pushed document makes, and its faults by path. `place` is for people.
    pub(crate) fn document(place: &str, table: &toml::Table) -> (Self, Vec<(String, Wrong)>) {
        let (mut layer, mut faults) = (Self::default(), Vec::new());
        let origin = Origin {
            layer: Layer::Pushed,
            place: place.to_owned(),
        };
        layer.pushed("", table, &origin, &mut faults);
        let values = Value::Table(layer.values.clone().into_iter().collect());
        let config: Config = de::read(&values, |Failure { path, wrong, known }| {
            let cure = known.map(|known| nearest(&path, known.iter().copied()));
            faults.push((
                path,
                Wrong {
                    cure: cure.unwrap_or(wrong.cure),
                    ..wrong
                },
            ));
        });
        let rules = config
            .application
            .iter()
            .enumerate()
            .filter_map(|(at, entry)| Some((at, entry.rule().err()?)));
        faults.extend(rules.map(|(at, wrong)| (format!("application[{at}]"), wrong)));
        // Directives may hold patterns of any cost.
        if config.log_level.contains(['=', '[', ',']) {
            let wrong = Wrong {
                what: "is more than a level".to_owned(),
                cure: "push error, warn, info, debug or trace".to_owned(),
            };
            faults.push(("log.level".to_owned(), wrong));
        }
        (layer, faults)
    }

    fn pushed(
        &mut self,
        prefix: &str,
        table: &toml::Table,
        origin: &Origin,
        faults: &mut Vec<(String, Wrong)>,
    ) {
        let keys = Config::keys();
        for (name, value) in table {
            let path = child(prefix, name);
            let is_section = |key: &Key| {
                key.path
                    .strip_prefix(&path)
                    .is_some_and(|rest| rest.starts_with('.'))
            };
            match (keys.iter().find(|key| key.path == path), value) {
                (Some(key), _) if key.applies == Applies::Pushed => {
                    self.set(&path, value.clone(), origin.clone())
                }
                (Some(_), _) => {
                    let cure = "set it in each node's own configuration; docs/configuration.md lists the keys that are pushed";
                    let wrong = Wrong {
                        what: "may not be pushed to nodes".to_owned(),
                        cure: cure.to_owned(),
                    };
                    faults.push((path, wrong));
                }
                (None, Value::Table(inner)) if keys.iter().any(is_section) => {
                    self.pushed(&path, inner, origin, faults)
                }
                (None, _) => {
                    let cure = nearest(&path, keys.iter().map(|key| key.path));
                    faults.push((
                        path,
                        Wrong {
                            what: "is an unknown key".to_owned(),
                            cure,
                        },
                    ));
                }
            }
        }
    }

    /// The layer of the environment.
    pub fn environment(daemon: Daemon, variable: impl Fn(&str) -> Option<String>) -> Self {
        let mut layer = Self::default();
        for key in Config::keys()
            .iter()
            .filter(|key| key.daemons.contains(&daemon))
        {
            let Some(name) = variable_of(key) else {
                continue;
            };
            let Some(text) = variable(&name) else {
                continue;
            };
            let value = match key.shape {
                Shape::Many => {
                    let items = text
                        .split(',')
                        .map(str::trim)
                        .filter(|item| !item.is_empty());
                    Value::Array(items.map(|item| Value::String(item.to_owned())).collect())
                }
                _ => Value::String(text),
            };
            layer.set(
                key.path,
                value,
                Origin {
                    layer: Layer::Environment,
                    place: name,
                },
            );
        }
        layer
    }

    /// The layer of the command line: flags without `--`, and their values. A switch has none.
    pub fn flags(daemon: Daemon, given: impl IntoIterator<Item = (String, Vec<String>)>) -> Self {
        let mut layer = Self::default();
        let keys = Config::keys();
        for (flag, texts) in given {
            let origin = Origin {
                layer: Layer::Flag,
                place: format!("--{flag}"),
            };
            if let Some(field) = Registry::fields()
                .iter()
                .find(|field| registry_flag_of(field.name) == flag)
            {
                layer.registry_flag(field.name, &texts, &origin);
                continue;
            }
            let is_flag = |key: &&Key| key.daemons.contains(&daemon) && flag_of(key.path) == flag;
            let Some(key) = keys.iter().find(is_flag) else {
                continue;
            };
            let value = match key.shape {
                Shape::Switch => Value::Boolean(true),
                Shape::Many => Value::Array(texts.into_iter().map(Value::String).collect()),
                Shape::Entries => {
                    let entries = texts.iter().map(|text| entry(key.path, text));
                    let read = entries.filter_map(|entry| {
                        let problem =
                            |wrong| layer.problems.push(Problem::of(&origin.place, wrong));
                        entry.map_err(problem).ok()
                    });
                    Value::Array(read.map(Value::Table).collect())
                }
                _ => texts
                    .into_iter()
                    .next_back()
                    .map_or(Value::Boolean(true), Value::String),
            };
            layer.set(key.path, value, origin);
        }
        layer
    }

    /// `--registry-ca HOST=FILE` and the like; a flag that is a switch in the table names the host alone.
    fn registry_flag(&mut self, field: &str, texts: &[String], origin: &Origin) {
        for text in texts {
            let (host, value) = match field {
                "insecure" | "must_prove" => (text.as_str(), Value::Boolean(true)),
                _ => match text.split_once('=') {
                    Some((host, value)) => (host, Value::String(value.to_owned())),
                    None => {
                        let shape = match field {
                            "endpoints" | "realms" => "HOST=URL",
                            "authorization" => "HOST=MODE",
                            _ => "HOST=FILE",
                        };
                        let what = format!("has no `=`, so no {shape}");
                        self.problems.push(Problem::new(
                            &origin.place,
                            what,
                            format!("write {shape}"),
                        ));
                        continue;
                    }
                },
            };
            let hosts = self
                .values
                .entry("registries".to_owned())
                .or_insert_with(|| Value::Table(toml::Table::new()));
            let Value::Table(hosts) = hosts else { continue };
            let table = hosts
                .entry(host)
                .or_insert_with(|| Value::Table(toml::Table::new()));
            let Value::Table(table) = table else { continue };
            match (field, table.get_mut(field)) {
                ("endpoints" | "realms", Some(Value::Array(items))) => items.push(value),
                ("endpoints" | "realms", _) => {
                    table.insert(field.to_owned(), Value::Array(vec![value]));
                }
                _ => {
                    table.insert(field.to_owned(), value);
                }
            }
            let host = child("registries", host);
            self.origins.insert(child(&host, field), origin.clone());
            self.origins.entry(host).or_insert_with(|| origin.clone());
        }
    }
}

/// The words of a flag as the table that they stand for.
fn entry(key: &str, text: &str) -> Result<toml::Table, Wrong> {
    let mut table = toml::Table::new();
    let mut insert =
        |name: &str, value: &str| table.insert(name.to_owned(), Value::String(value.to_owned()));
    if key == "intercept" {
        let words: Vec<&str> = text.split_whitespace().collect();
        match words[..] {
            [action, host, ..] => {
                insert("action", action);
                insert("host", host);
            }
            ["p2p" | "direct"] => {
                return wrong(
                    format!("`{text}` names no host"),
                    "write quay.io or *.example.com after the action",
                );
            }
            _ => {
                return wrong(
                    format!("`{text}` names no action"),
                    "write p2p or direct, then the host",
                );
            }
        }
        if let Some(path) = words.get(2) {
            insert("path", path);
        }
        if words.len() > 3 {
            return wrong(
                format!("`{text}` has too many words"),
                "write ACTION HOST [REGEX]; a path has no spaces",
            );
        }
        return Ok(table);
    }
    let is_network = key == "network";
    let (known, of, example) = match is_network {
        true => (
            NetworkEntry::fields(),
            "a network",
            "write cidr=10.1.0.0/16 zone=eu-1, and rack=r7 where there are racks",
        ),
        false => (
            ApplicationEntry::fields(),
            "an application",
            "write name=shop match=quay.io/shop/* priority=1",
        ),
    };
    for word in text.split_whitespace() {
        let Some((name, value)) = word.split_once('=') else {
            return wrong(format!("`{word}` is not KEY=VALUE"), example);
        };
        if !known.iter().any(|field| field.name == name) {
            let names: Vec<&str> = known.iter().map(|field| field.name).collect();
            return wrong(
                format!("`{name}` is nothing that is said of {of}"),
                format!("write one of {}", names.join(", ")),
            );
        }
        let value = Value::String(value.to_owned());
        match table.get_mut(name) {
            Some(Value::Array(items)) => items.push(value),
            Some(_) if is_network => {
                return wrong(
                    format!("`{text}` says something twice: {name}"),
                    "say it once",
                );
            }
            Some(_) => return wrong(format!("`{text}` says {name} twice"), "say it once"),
            None if name == "match" => {
                table.insert(name.to_owned(), Value::Array(vec![value]));
            }
            None => {
                table.insert(name.to_owned(), value);
            }
        }
    }
    Ok(table)
}

/// Reads the tables of a file.
struct Walk<'a> {
    daemon: Daemon,
    keys: Vec<Key>,
    place: &'a str,
    text: &'a str,
    layer: Layered,
}

impl Walk<'_> {
    fn table(&mut self, prefix: &str, table: &DeTable<'_>) {
        for (name, value) in table {
            let path = child(prefix, name.get_ref());
            let origin = self.origin(name.span().start);
            let key = self.keys.iter().find(|key| key.path == path);
            match (key.map(|key| key.daemons), value.get_ref()) {
                (Some(daemons), _) if !daemons.contains(&self.daemon) => {
                    let names: Vec<_> = daemons
                        .iter()
                        .map(|daemon| format!("`hawker {}`", daemon.name()))
                        .collect();
                    let what = format!("is no key of `hawker {}`", self.daemon.name());
                    let cure = format!("take it out; it is a key of {}", names.join(" and "));
                    self.problem(&path, &origin, Wrong { what, cure });
                }
                (Some(_), value) => {
                    self.origins(&path, value);
                    let mut value = plain(value);
                    if path == "intercept" {
                        self.intercept_defaults(&mut value);
                    }
                    self.layer.set(&path, value, origin);
                }
                (None, DeValue::Table(inner)) if self.is_section(&path) => self.table(&path, inner),
                (None, _) if self.is_section(&path) => {
                    let cure = format!("write [{path}] and its keys below it");
                    self.problem(
                        &path,
                        &origin,
                        Wrong {
                            what: "is a table of keys".to_owned(),
                            cure,
                        },
                    );
                }
                (None, _) => {
                    let known = self
                        .keys
                        .iter()
                        .filter(|key| key.daemons.contains(&self.daemon));
                    let cure = nearest(&path, known.map(|key| key.path));
                    self.problem(
                        &path,
                        &origin,
                        Wrong {
                            what: "is an unknown key".to_owned(),
                            cure,
                        },
                    );
                }
            }
        }
    }

    fn is_section(&self, path: &str) -> bool {
        self.keys.iter().any(|key| {
            key.path
                .strip_prefix(path)
                .is_some_and(|rest| rest.starts_with('.'))
        })
    }

    fn origin(&self, offset: usize) -> Origin {
        let line = 1 + self
            .text
            .as_bytes()
            .iter()
            .take(offset)
            .filter(|byte| **byte == b'\n')
            .count();
        Origin {
            layer: Layer::File,
            place: format!("{}:{line}", self.place),
        }
    }

    fn problem(&mut self, path: &str, origin: &Origin, wrong: Wrong) {
        self.layer
            .problems
            .push(Problem::of(format!("{path} ({origin})"), wrong));
    }

    /// The lines of everything within a value.
    fn origins(&mut self, path: &str, value: &DeValue<'_>) {
        match value {
            DeValue::Table(table) => {
                for (name, value) in table {
                    let path = child(path, name.get_ref());
                    self.layer
                        .origins
                        .insert(path.clone(), self.origin(name.span().start));
                    self.origins(&path, value.get_ref());
                }
            }
            DeValue::Array(items) => {
                for (at, item) in items.iter().enumerate() {
                    let path = format!("{path}[{at}]");
                    self.layer
                        .origins
                        .insert(path.clone(), self.origin(item.span().start));
                    self.origins(&path, item.get_ref());
                }
            }
            _ => {}
        }
    }

    /// `defaults` may stand in a rule, or be all of one.
    fn intercept_defaults(&mut self, rules: &mut Value) {
        let Value::Array(rules) = rules else { return };
        for (at, rule) in rules.iter_mut().enumerate() {
            let defaults = rule.as_table_mut().and_then(|rule| rule.remove("defaults"));
            if let Some(defaults) = defaults {
                let path = format!("intercept[{at}].defaults");
                let origin = self
                    .layer
                    .origins
                    .get(&path)
                    .cloned()
                    .unwrap_or_else(|| self.origin(0));
                self.layer.set("intercept_defaults", defaults, origin);
            }
        }
        rules.retain(|rule| !rule.as_table().is_some_and(toml::Table::is_empty));
    }
}

fn plain(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.clone().into_owned()),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Integer(number),
            Err(_) => Value::String(number.as_str().to_owned()),
        },
        DeValue::Float(number) => match number.as_str().parse() {
            Ok(number) => Value::Float(number),
            Err(_) => Value::String(number.as_str().to_owned()),
        },
        DeValue::Boolean(truth) => Value::Boolean(*truth),
        DeValue::Datetime(time) => Value::Datetime(*time),
        DeValue::Array(items) => {
            Value::Array(items.iter().map(|item| plain(item.get_ref())).collect())
        }
        DeValue::Table(table) => {
            let entries = table
                .iter()
                .map(|(name, value)| (name.get_ref().clone().into_owned(), plain(value.get_ref())));
            Value::Table(entries.collect())
        }
    }
}

/// The cure for an unknown key: the known one that looks most like it.
fn nearest<'k>(path: &str, known: impl Iterator<Item = &'k str>) -> String {
    let (parent, last) = path.rsplit_once('.').unwrap_or(("", path));
    // A person who knows the flag writes cache_high for cache.high: told apart by punctuation only.
    let plain = |text: &str| text.replace(['.', '-'], "_");
    let nearest = known
        .map(|candidate| {
            let whole = strsim::levenshtein(&plain(path), &plain(candidate));
            (whole.min(strsim::levenshtein(last, candidate)), candidate)
        })
        .min();
    match nearest {
        Some((distance, candidate)) if distance <= 1 + last.len() / 4 => {
            let is_registry = parent.starts_with("registries.");
            let candidate = if is_registry {
                format!("{parent}.{candidate}")
            } else {
                candidate.to_owned()
            };
            format!("did you mean `{candidate}`?")
        }
        _ => "take it out; `--help` names all flags, and each is a key".to_owned(),
    }
}

/// The configuration that comes out of all layers.
#[derive(Clone, Debug)]
pub struct Effective {
    /// The daemon whose configuration it is.
    pub daemon: Daemon,
    /// The values, with defaults where a value has a problem.
    pub config: Config,
    /// All faults of all layers.
    pub problems: Vec<Problem>,
    values: BTreeMap<String, Value>,
    origins: BTreeMap<String, Origin>,
}

impl Effective {
    /// Merges layers, the least one first.
    pub fn new(daemon: Daemon, layers: impl IntoIterator<Item = Layered>) -> Self {
        let mut all = Layered::default();
        for layer in layers {
            all.problems.extend(layer.problems);
            // An empty list is as good as none.
            let is_empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
            for (key, value) in layer
                .values
                .into_iter()
                .filter(|(_, value)| !is_empty(value))
            {
                let is_within = |path: &str| is_within(path, &key);
                match (all.values.get_mut(&key), value) {
                    (Some(Value::Table(hosts)), Value::Table(more)) if key == "registries" => {
                        merge_hosts(hosts, more);
                    }
                    (Some(Value::Array(pushed)), Value::Array(mut entries))
                        if key == "application"
                            && all.origins.get(&key).is_some_and(Origin::is_pushed) =>
                    {
                        // A cluster's entry counts where this node has none with the same labels.
                        let labels =
                            |entry: &Value| ["name", "tag"].map(|label| entry.get(label).cloned());
                        let own: Vec<_> = entries.iter().map(labels).collect();
                        let room = MAX_RULES.saturating_sub(entries.len());
                        let more = pushed
                            .drain(..)
                            .filter(|entry| !own.contains(&labels(entry)))
                            .take(room);
                        entries.extend(more);
                        let origin = all.origins.get(&key).cloned();
                        all.origins.retain(|path, _| !is_within(path));
                        let paths = (own.len()..entries.len()).map(|at| format!("{key}[{at}]"));
                        all.origins.extend(
                            paths
                                .zip(std::iter::repeat(origin))
                                .filter_map(|(at, o)| Some((at, o?))),
                        );
                        all.values.insert(key.clone(), Value::Array(entries));
                    }
                    (_, value) => {
                        all.values.insert(key.clone(), value);
                        all.origins.retain(|path, _| !is_within(path));
                    }
                }
                let origins = layer.origins.iter().filter(|(path, _)| is_within(path));
                all.origins
                    .extend(origins.map(|(path, origin)| (path.clone(), origin.clone())));
            }
        }
        let Layered {
            values,
            origins,
            problems,
        } = all;
        let mut effective = Self {
            daemon,
            config: Config::default(),
            problems,
            values,
            origins,
        };
        effective.read();
        effective
    }

    fn read(&mut self) {
        let table = Value::Table(self.values.clone().into_iter().collect());
        let mut failures = Vec::new();
        self.config = de::read(&table, |failure| failures.push(failure));
        let (mut unread, mut faulty) = (BTreeSet::new(), BTreeSet::new());
        for Failure { path, wrong, known } in failures {
            let (entry, _) = path
                .split_once("].")
                .unwrap_or((path.strip_suffix(']').unwrap_or(""), ""));
            if path.ends_with(']') {
                unread.insert(path.clone());
            } else if known.is_none() {
                faulty.insert(format!("{entry}]"));
            }
            let cure = known.map(|known| nearest(&path, known.iter().copied()));
            let wrong = Wrong {
                cure: cure.unwrap_or(wrong.cure),
                ..wrong
            };
            self.problem(&path, wrong);
        }
        let config = self.config.clone();
        let (_, faults) = Layered::document("", &config.nodes.0);
        for (path, wrong) in faults {
            self.problem(&format!("nodes.{path}"), wrong);
        }
        let entries = [
            (
                "application",
                config
                    .application
                    .iter()
                    .map(|entry| entry.rule().err())
                    .collect::<Vec<_>>(),
            ),
            (
                "network",
                config
                    .network
                    .iter()
                    .map(|entry| entry.place().err())
                    .collect(),
            ),
            (
                "intercept",
                config
                    .intercept
                    .iter()
                    .map(|entry| entry.rule().err())
                    .collect(),
            ),
        ];
        for (key, wrongs) in entries {
            let paths = (0..)
                .map(|at| format!("{key}[{at}]"))
                .filter(|path| !unread.contains(path));
            for (path, wrong) in paths.zip(wrongs) {
                if let Some(wrong) = wrong.filter(|_| !faulty.contains(&path)) {
                    self.problem(&path, wrong);
                }
            }
        }
    }

    /// Notes a fault of the value at `path`.
    pub fn problem(&mut self, path: &str, wrong: Wrong) {
        let origin = self.origin(path);
        let mut wrong = wrong;
        if origin.layer != Layer::File
            && let Some(field) = path
                .strip_prefix("application[")
                .and_then(|rest| rest.split_once("]."))
                .map(|it| it.1)
        {
            let field = field.split('[').next().unwrap_or(field);
            if !wrong.what.starts_with(field) {
                wrong.what = format!("{field} {}", wrong.what);
            }
        }
        let name = self.name(path);
        self.problems.push(Problem::of(name, wrong));
    }

    /// The value's origin, as near as it is known.
    pub fn origin(&self, path: &str) -> Origin {
        let around = self
            .origins
            .iter()
            .filter(|(outer, _)| is_within(path, outer));
        let nearest = around.max_by_key(|(outer, _)| outer.len());
        nearest.map_or(
            Origin {
                layer: Layer::Default,
                place: String::new(),
            },
            |(_, origin)| origin.clone(),
        )
    }

    /// The key at `path` as its author wrote it: `--cache-high`, `cache.high (/etc/hawker.toml:3)`.
    pub fn name(&self, path: &str) -> String {
        let origin = self.origin(path);
        match origin.layer {
            Layer::Default => format!("--{}", flag_of(path.split('[').next().unwrap_or(path))),
            Layer::Pushed | Layer::File => format!("{path} ({origin})"),
            Layer::Environment | Layer::Flag => origin.place,
        }
    }

    /// Whether a layer gives this key a value.
    pub fn is_set(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// Keys whose values differ and that do not apply while the daemon runs.
    pub fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        let text = |value: Option<&Value>| value.map(|value| value.to_string().replace('"', ""));
        let differs = |key: &Key| text(self.values.get(key.path)) != text(new.values.get(key.path));
        let keys = Config::keys()
            .into_iter()
            .filter(|key| !key.applies.is_live() && differs(key));
        keys.map(|key| key.path).collect()
    }

    /// The value that a layer gives to this key, in TOML.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }
}

/// Whether `path` is the value at `outer`, or within it.
fn is_within(path: &str, outer: &str) -> bool {
    path.strip_prefix(outer)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

fn merge_hosts(hosts: &mut toml::Table, more: toml::Table) {
    for (host, value) in more {
        match (hosts.get_mut(&host), value) {
            (Some(Value::Table(table)), Value::Table(fields)) => table.extend(fields),
            (_, value) => {
                hosts.insert(host, value);
            }
        }
    }
}
