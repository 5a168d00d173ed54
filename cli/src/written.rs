//! The configuration as written: a TOML file is turned into the flags it stands for, and parsed with the command line's, which win.
//!
//! So every key is a flag and every flag a key, by construction.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgAction, Args, Command, FromArgMatches};

use crate::problem::Problem;
use crate::quantity::{APPLICATION_KEYS, PLACE_KEYS};

/// Flags that are no keys: they say where the file is.
const NOT_KEYS: [&str; 3] = ["config", "help", "version"];

/// What was written, and where.
pub(crate) struct Written<T> {
    /// Flags and file together.
    pub(crate) args: T,
    /// For naming a setting as the person wrote it.
    pub(crate) places: Places,
    /// The values of each flag, for telling what a changed file changes.
    pub(crate) values: BTreeMap<String, Vec<String>>,
    /// What is wrong with the file itself; what was understood of it is in `args` all the same.
    pub(crate) problems: Vec<Problem>,
}

/// Where each setting was written.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places {
    from_file: BTreeMap<String, String>,
}

impl Places {
    /// The setting of this flag (without `--`) as the person wrote it.
    pub(crate) fn name(&self, flag: &str) -> String {
        self.from_file.get(flag).cloned().unwrap_or_else(|| format!("--{flag}"))
    }
}

/// One key of the file, as flags.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    key: String,
    flag: String,
    values: Vec<String>,
}

/// Parses `argv` (the subcommand's arguments alone, without its name) for a daemon, with the file that `--config` names.
///
/// Errors of the command line itself (an unknown flag) are clap's and end the program; errors of the file are collected.
pub(crate) fn read<T: Args + FromArgMatches>(name: &'static str, argv: &[OsString]) -> Written<T> {
    let command = T::augment_args(Command::new(name).no_binary_name(true));
    let typed = command.clone().try_get_matches_from(argv).unwrap_or_else(|error| error.exit());
    let mut places = Places::default();
    let mut problems = Vec::new();
    let mut all = Vec::new();
    if let Some(file) = typed.get_one::<PathBuf>("config") {
        let (entries, wrong) = read_file(file, &command);
        problems = wrong;
        for entry in entries {
            let on_command_line =
                typed.value_source(&entry.flag.replace('-', "_")) == Some(ValueSource::CommandLine);
            if !on_command_line {
                places.from_file.insert(entry.flag.clone(), format!("{} ({})", entry.key, file.display()));
                all.extend(as_flags(&entry, &command));
            }
        }
    }
    all.extend(argv.iter().cloned());
    let matches = command.clone().try_get_matches_from(&all).unwrap_or_else(|error| error.exit());
    let args = T::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let values = command
        .get_arguments()
        .filter_map(|arg| Some((arg.get_long()?.to_owned(), raw_values(&matches, arg.get_id().as_str()))))
        .collect();
    Written { args, places, values, problems }
}

fn raw_values(matches: &clap::ArgMatches, id: &str) -> Vec<String> {
    let values = matches.get_raw(id).into_iter().flatten();
    values.map(|value| value.to_string_lossy().into_owned()).collect()
}

fn as_flags(entry: &Entry, command: &Command) -> Vec<OsString> {
    let is_switch = argument(command, &entry.flag).is_some_and(|arg| !arg.get_action().takes_values());
    if is_switch {
        return if entry.values == ["true"] { vec![format!("--{}", entry.flag).into()] } else { Vec::new() };
    }
    entry.values.iter().map(|value| format!("--{}={value}", entry.flag).into()).collect()
}

fn argument<'a>(command: &'a Command, flag: &str) -> Option<&'a clap::Arg> {
    command.get_arguments().find(|arg| arg.get_long() == Some(flag) && !NOT_KEYS.contains(&flag))
}

/// The key of the file that stands for a flag.
fn key_of(flag: &str) -> String {
    match flag {
        "registry" => "registries.\"HOST\".endpoints".to_owned(),
        "registry-ca" => "registries.\"HOST\".ca".to_owned(),
        "registry-insecure" => "registries.\"HOST\".insecure".to_owned(),
        "registry-realm" => "registries.\"HOST\".realms".to_owned(),
        "registry-authorization" => "registries.\"HOST\".authorization".to_owned(),
        _ => {
            if let Some(direction) = flag.strip_suffix("-rate") {
                return match direction.strip_prefix("task-") {
                    Some(direction) => format!("task_rates.{direction}"),
                    None => format!("rates.{direction}"),
                };
            }
            for section in ["cache", "log"] {
                if let Some(key) = flag.strip_prefix(section).and_then(|rest| rest.strip_prefix('-')) {
                    return format!("{section}.{key}");
                }
            }
            flag.replace('-', "_")
        }
    }
}

fn read_file(path: &Path, command: &Command) -> (Vec<Entry>, Vec<Problem>) {
    let one =
        |what: String, cure: &str| (Vec::new(), vec![Problem::new(path.display().to_string(), what, cure)]);
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => return one(format!("cannot be read: {error}"), "name a readable file with --config"),
    };
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(error) => {
            let error: toml::de::Error = error;
            return one(
                format!("is no TOML: {}", error.to_string().trim_end().replace('\n', "\n    ")),
                "mend that line",
            );
        }
    };
    let mut walk = Walk { command, file: path, entries: Vec::new(), problems: Vec::new() };
    walk.table("", &table);
    (walk.entries, walk.problems)
}

struct Walk<'a> {
    command: &'a Command,
    file: &'a Path,
    entries: Vec<Entry>,
    problems: Vec<Problem>,
}

impl Walk<'_> {
    fn table(&mut self, prefix: &str, table: &toml::Table) {
        for (name, value) in table {
            let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            match (key.as_str(), value) {
                ("registries", toml::Value::Table(hosts)) if argument(self.command, "registry").is_some() => {
                    self.registries(hosts);
                }
                ("rates" | "task_rates" | "cache" | "log", toml::Value::Table(section)) => {
                    self.table(&key, section)
                }
                ("intercept", toml::Value::Array(rules)) if rules.iter().any(toml::Value::is_table) => {
                    self.rules(rules);
                }
                ("application", toml::Value::Array(rules)) if rules.iter().any(toml::Value::is_table) => {
                    let known = &APPLICATION_KEYS;
                    self.in_words(
                        "application",
                        rules,
                        known,
                        "write each as [[application]] with name, match and limits",
                    );
                }
                ("network", toml::Value::Array(rules)) if rules.iter().any(toml::Value::is_table) => {
                    self.in_words(
                        "network",
                        rules,
                        &PLACE_KEYS,
                        "write each as [[network]] with cidr and zone",
                    );
                }
                _ => self.key(&key, value),
            }
        }
    }

    fn key(&mut self, key: &str, value: &toml::Value) {
        let known: Vec<(String, String)> = self.keys();
        match known.iter().find(|(known, _)| known == key) {
            Some((_, flag)) => self.value(key, flag, value, |text| text),
            None => self.unknown(key, known.iter().map(|(key, _)| key.as_str())),
        }
    }

    /// All keys but those of registries, with their flags.
    fn keys(&self) -> Vec<(String, String)> {
        let flags = self.command.get_arguments().filter_map(|arg| arg.get_long());
        flags
            .filter(|flag| !NOT_KEYS.contains(flag) && !flag.starts_with("registry"))
            .map(|flag| (key_of(flag), flag.to_owned()))
            .collect()
    }

    fn registries(&mut self, hosts: &toml::Table) {
        for (host, value) in hosts {
            let at = format!("registries.\"{host}\"");
            let toml::Value::Table(settings) = value else {
                self.problem(
                    &at,
                    "is no table",
                    &format!("write [{at}] and below it endpoints = [\"https://…\"]"),
                );
                continue;
            };
            for (name, value) in settings {
                let key = format!("{at}.{name}");
                match (name.as_str(), value) {
                    ("endpoints", _) => self.value(&key, "registry", value, |url| format!("{host}={url}")),
                    ("ca", _) => self.value(&key, "registry-ca", value, |file| format!("{host}={file}")),
                    ("realms", _) => self.value(&key, "registry-realm", value, |url| format!("{host}={url}")),
                    ("authorization", _) => {
                        self.value(&key, "registry-authorization", value, |mode| format!("{host}={mode}"))
                    }
                    ("insecure", toml::Value::Boolean(true)) => {
                        self.entry(&key, "registry-insecure", vec![host.clone()])
                    }
                    ("insecure", toml::Value::Boolean(false)) => {}
                    ("insecure", _) => self.problem(&key, "is neither true nor false", "write true or false"),
                    _ => {
                        let known = ["endpoints", "ca", "insecure", "realms", "authorization"];
                        self.unknown(&key, known.into_iter());
                    }
                }
            }
        }
    }

    /// `[[intercept]]`: tables of `action`, `host`, `path`, as the words of the flag.
    fn rules(&mut self, rules: &[toml::Value]) {
        let mut values = Vec::new();
        for (number, rule) in rules.iter().enumerate() {
            let at = format!("intercept[{number}]");
            let toml::Value::Table(rule) = rule else {
                self.problem(&at, "is no table", "write each rule as [[intercept]] with host and action");
                continue;
            };
            let mut words = [("action", None), ("host", None), ("path", None)];
            for (name, value) in rule {
                let key = format!("{at}.{name}");
                let word =
                    value.as_str().filter(|text| !text.is_empty() && !text.contains(char::is_whitespace));
                match (words.iter_mut().find(|(known, _)| known == name), word) {
                    (None, _) => self.unknown(&key, ["action", "host", "path"].into_iter()),
                    (Some(_), None) => self.problem(&key, "is no word", "write a text without spaces"),
                    (Some((_, place)), word) => *place = word,
                }
            }
            match words {
                [(_, Some(action)), (_, Some(host)), (_, path)] => {
                    values.push([action, host].into_iter().chain(path).collect::<Vec<_>>().join(" "));
                }
                _ => self.problem(
                    &at,
                    "lacks its action or its host",
                    "write host = \"…\" and action = \"p2p\"",
                ),
            }
        }
        self.entry("intercept", "intercept", values);
    }

    /// `[[application]]`, `[[network]]`: tables, as the words KEY=VALUE of their flag.
    fn in_words(&mut self, flag: &str, tables: &[toml::Value], known: &[&str], cure: &str) {
        if argument(self.command, flag).is_none() {
            return self.key(flag, &toml::Value::Boolean(true));
        }
        let mut values = Vec::new();
        for (number, table) in tables.iter().enumerate() {
            let at = format!("{flag}[{number}]");
            let toml::Value::Table(table) = table else {
                self.problem(&at, "is no table", cure);
                continue;
            };
            let mut words = Vec::new();
            for (name, value) in table {
                let key = format!("{at}.{name}");
                if !known.contains(&name.as_str()) {
                    self.unknown(&key, known.iter().copied());
                    continue;
                }
                let items = match value {
                    toml::Value::Array(items) if name == "match" => items.iter().map(scalar).collect(),
                    value => scalar(value).map(|text| vec![text]),
                };
                let is_word = |text: &String| !text.is_empty() && !text.contains(char::is_whitespace);
                match items.filter(|items: &Vec<String>| items.iter().all(is_word)) {
                    Some(items) => words.extend(items.into_iter().map(|text| format!("{name}={text}"))),
                    None => self.problem(&key, "is no word", "write a text without spaces, or a number"),
                }
            }
            values.push(words.join(" "));
        }
        self.entry(flag, flag, values);
    }

    fn value(&mut self, key: &str, flag: &str, value: &toml::Value, shape: impl Fn(String) -> String) {
        let Some(arg) = argument(self.command, flag) else { return };
        let is_switch = !arg.get_action().takes_values();
        let many = matches!(arg.get_action(), ArgAction::Append);
        match value {
            toml::Value::Boolean(on) if is_switch => self.entry(key, flag, vec![on.to_string()]),
            _ if is_switch => self.problem(key, "is neither true nor false", "write true or false"),
            // A registry has one of these, though the flag may be repeated for several registries.
            toml::Value::Array(items)
                if many && !["registry-ca", "registry-authorization"].contains(&flag) =>
            {
                match items.iter().map(scalar).collect() {
                    Some(texts) => {
                        let texts: Vec<String> = texts;
                        self.entry(key, flag, texts.into_iter().map(shape).collect());
                    }
                    None => self.problem(key, "holds something that is no text", "write [\"…\", \"…\"]"),
                }
            }
            _ => match scalar(value) {
                Some(text) => self.entry(key, flag, vec![shape(text)]),
                None if many => self.problem(key, "is no list of texts", "write [\"…\", \"…\"]"),
                None => self.problem(key, "is no single value", "write one text or number"),
            },
        }
    }

    fn entry(&mut self, key: &str, flag: &str, values: Vec<String>) {
        self.entries.push(Entry { key: key.to_owned(), flag: flag.to_owned(), values });
    }

    fn problem(&mut self, key: &str, what: &str, cure: &str) {
        self.problems.push(Problem::new(format!("{key} ({})", self.file.display()), what, cure));
    }

    fn unknown<'k>(&mut self, key: &str, known: impl Iterator<Item = &'k str>) {
        let (parent, last) = key.rsplit_once('.').unwrap_or(("", key));
        // A person who knows the flag writes cache_high for cache.high: told apart by punctuation only.
        let plain = |text: &str| text.replace(['.', '-'], "_");
        let nearest = known
            .map(|candidate| {
                let whole = distance(&plain(key), &plain(candidate));
                (whole.min(distance(last, candidate)), candidate)
            })
            .min();
        let cure = match nearest {
            Some((d, candidate)) if d <= 1 + last.len() / 4 => {
                let same_table = parent.starts_with("registries.");
                let candidate =
                    if same_table { format!("{parent}.{candidate}") } else { candidate.to_owned() };
                format!("did you mean `{candidate}`?")
            }
            _ => "take it out; `--help` names all flags, and each is a key".to_owned(),
        };
        self.problem(key, "is an unknown key", &cure);
    }
}

/// Numbers are taken as written: `high = 90` is as good as `high = "90"`.
fn scalar(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        _ => None,
    }
}

/// Levenshtein's: how many letters to insert, delete or replace.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::args::{ProxyArgs, SchedulerArgs, UpArgs};

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn read_with<T: Args + FromArgMatches>(text: &str, flags: &[&str]) -> Written<T> {
        let file = file(text);
        let mut argv: Vec<OsString> = vec!["--config".into(), file.path().into()];
        argv.extend(flags.iter().map(OsString::from));
        read("hawker", &argv)
    }

    /// Every flag, as a key of a file, arrives as if it had been typed.
    fn every_flag_is_a_key<T: Args + FromArgMatches>() -> usize {
        let command = T::augment_args(Command::new("hawker"));
        let mut checked = 0;
        for arg in command.get_arguments() {
            let flag = arg.get_long().unwrap();
            if NOT_KEYS.contains(&flag) {
                continue;
            }
            let key = key_of(flag).replace("\"HOST\"", "\"a.example\"");
            let switch = !arg.get_action().takes_values();
            let host_switch = flag == "registry-insecure";
            let text = format!("{key} = {}", if switch || host_switch { "true" } else { "\"https://x\"" });
            let written: Written<T> = read_with(&text, &[]);
            assert_eq!(written.problems, [], "{text}");
            let expected = match flag {
                "registry" | "registry-ca" | "registry-realm" | "registry-authorization" => {
                    "a.example=https://x"
                }
                "registry-insecure" => "a.example",
                _ if switch => "true",
                _ => "https://x",
            };
            if !switch {
                assert_eq!(written.values[flag], [expected], "{text}");
            }
            assert!(written.places.name(flag).starts_with(&key), "{}", written.places.name(flag));
            checked += 1;
        }
        checked
    }

    #[test]
    fn every_flag_of_a_daemon_is_a_key_of_its_file() {
        assert!(every_flag_is_a_key::<ProxyArgs>() > 25);
        assert!(every_flag_is_a_key::<SchedulerArgs>() > 5);
        assert!(every_flag_is_a_key::<UpArgs>() > 25);
    }

    #[test]
    fn a_switch_in_the_file_is_a_switch() {
        assert!(read_with::<ProxyArgs>("seed = true", &[]).args.seed);
        assert!(!read_with::<ProxyArgs>("seed = false", &[]).args.seed);
    }

    #[test]
    fn flags_override_the_file_and_lists_are_replaced_whole() {
        let text = "name = 'file'\nzone = 'z'\nmirror = ['127.0.0.1:1', '127.0.0.1:2']\n[cache]\nhigh = 70";
        let written: Written<ProxyArgs> = read_with(text, &["--name", "flag", "--mirror", "127.0.0.1:3"]);
        let node = &written.args.node;
        assert_eq!(node.name.as_deref(), Some("flag"));
        assert_eq!(node.zone.as_deref(), Some("z"));
        assert_eq!(node.mirror, ["127.0.0.1:3"]);
        assert_eq!(node.cache_high.as_deref(), Some("70"));
        assert_eq!(written.places.name("name"), "--name");
        assert!(written.places.name("cache-high").starts_with("cache.high ("));
    }

    #[test]
    fn registries_are_tables_by_host() {
        let text = "[registries.'10.0.0.1:5000']\nendpoints = ['http://10.0.0.1:5000', 'http://10.0.0.2:5000']\n\
                    [registries.'a.example']\nca = '/ca.pem'\ninsecure = false\n\
                    realms = ['https://b.example']\nauthorization = 'node'";
        let written: Written<ProxyArgs> = read_with(text, &[]);
        assert_eq!(written.problems, []);
        let node = &written.args.node;
        assert_eq!(
            node.registry,
            ["10.0.0.1:5000=http://10.0.0.1:5000", "10.0.0.1:5000=http://10.0.0.2:5000"]
        );
        assert_eq!(node.registry_ca, ["a.example=/ca.pem"]);
        assert!(node.registry_insecure.is_empty());
        assert_eq!(node.registry_realm, ["a.example=https://b.example"]);
        assert_eq!(node.registry_authorization, ["a.example=node"]);
    }

    #[test]
    fn rules_are_tables_in_their_order() {
        let text = "forward_proxy = '127.0.0.1:6505'\n\
                    [[intercept]]\nhost = 'quay.io'\naction = 'direct'\npath = '/private/'\n\
                    [[intercept]]\naction = 'p2p'\nhost = '*.example.com'";
        let written: Written<ProxyArgs> = read_with(text, &[]);
        assert_eq!(written.problems, []);
        assert_eq!(written.args.node.intercept, ["direct quay.io /private/", "p2p *.example.com"]);
        let text = "[[intercept]]\nhost = 'quay.io'\n[[intercept]]\nhsot = 'a'\naction = 'p2p'\n\
                    [[intercept]]\nhost = 'a b'\naction = 1";
        let problems = read_with::<ProxyArgs>(text, &[]).problems;
        for start in [
            "intercept[0] ",
            "intercept[1].hsot",
            "intercept[1] ",
            "intercept[2].host",
            "intercept[2].action",
        ] {
            assert!(problems.iter().any(|p| p.key.starts_with(start)), "{start} in {problems:?}");
        }
    }

    #[test]
    fn networks_are_tables_for_who_runs_a_scheduler() {
        let text = "[[network]]\ncidr = '10.1.0.0/16'\nzone = 'eu-1'\nrack = 7\n[[network]]\ncidr = 'fd00::/8'\nzone = 'b'";
        let expected = ["cidr=10.1.0.0/16 rack=7 zone=eu-1", "cidr=fd00::/8 zone=b"];
        assert_eq!(read_with::<SchedulerArgs>(text, &[]).args.networks.network, expected);
        assert_eq!(read_with::<UpArgs>(text, &[]).args.networks.network, expected);
        let written = read_with::<ProxyArgs>(text, &[]);
        assert_eq!(written.problems.len(), 1, "{:?}", written.problems);
    }

    #[test]
    fn applications_are_tables_whose_keys_are_words() {
        let text = "[[application]]\nname = 'shop'\nmatch = ['quay.io/shop/*', 'reg:5000']\npriority = 1\n\
                    upload = '10MB'\n[[application]]\ntag = 'night'\nrequests = 2";
        let written: Written<ProxyArgs> = read_with(text, &[]);
        assert_eq!(written.problems, []);
        let expected =
            ["match=quay.io/shop/* match=reg:5000 name=shop priority=1 upload=10MB", "requests=2 tag=night"];
        assert_eq!(written.args.node.applications.application, expected);
        assert_eq!(read_with::<SchedulerArgs>(text, &[]).args.applications.application, expected);
        let text = "[[application]]\nnmae = 'a'\n[[application]]\nname = 'a b'\nmatch = [1, true]";
        let problems = read_with::<ProxyArgs>(text, &[]).problems;
        for (start, cure) in [
            ("application[0].nmae", "did you mean `name`?"),
            ("application[1].name", "without spaces"),
            ("application[1].match", "without spaces"),
        ] {
            let told = problems.iter().find(|p| p.key.starts_with(start)).expect(start);
            assert!(told.cure.contains(cure), "{told:?}");
        }
    }

    #[test]
    fn unknown_keys_are_told_all_at_once_with_what_was_meant() {
        let text = "nmae = 'a'\ncache_high = 90\nfrobnicate = 1\nzone = ['a']\nseed = 'yes'\n\
                    [rates]\nuplaod = '1MB'\n[registries.'a.example']\nendpoint = 'https://a'\n[cahce]\nlow = 3";
        let problems = read_with::<ProxyArgs>(text, &[]).problems;
        let told = |key: &str| {
            let problem = problems.iter().find(|p| p.key.starts_with(&format!("{key} ("))).expect(key);
            format!("{} | {}", problem.what, problem.cure)
        };
        assert!(told("nmae").contains("did you mean `name`?"));
        assert!(told("cache_high").contains("did you mean `cache.high`?"));
        assert!(told("frobnicate").contains("--help"));
        assert!(told("zone").contains("no single value"));
        assert!(told("seed").contains("true or false"));
        assert!(told("rates.uplaod").contains("did you mean `rates.upload`?"));
        assert!(told("registries.\"a.example\".endpoint").contains("\"a.example\".endpoints`?"));
        assert!(told("cahce").contains("unknown"));
        assert_eq!(problems.len(), 8);
    }

    #[test]
    fn a_file_that_is_missing_or_no_toml_is_said_so() {
        let missing = read::<ProxyArgs>("hawker", &["--config=/nonexistent/hawker.toml".into()]);
        assert!(missing.problems[0].what.contains("cannot be read"));
        assert!(read_with::<ProxyArgs>("name = ", &[]).problems[0].what.contains("is no TOML"));
    }
}
