//! For whom a pull is and how urgent: the words for it, and what a configuration says of those that carry them.
//!
//! An *application* and a *tag* are labels that people choose (a tag here is no image's tag). A pull gets its labels from the
//! client that asks, or from the first [`Rule`] whose patterns fit the repository. A rule's limits hold for all pulls together
//! that carry its labels, whoever gave them these.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use crate::limit::Rates;
use hawker_oci::reference::{Source, canonical_host};

/// Longest label, in bytes.
pub const MAX_LABEL_BYTES: usize = 64;

/// Most rules of a node, its own and its cluster's: each is looked at for each piece.
pub const MAX_RULES: usize = 64;

/// Most patterns of one rule.
pub const MAX_PATTERNS: usize = 64;

/// Longest pattern, in bytes.
pub const MAX_PATTERN_BYTES: usize = 512;

/// How urgent a pull is: level 0 first, level 6 last, level 3 where nobody says. All of them come before what is prefetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Priority(u8);

impl Priority {
    /// The most urgent priority.
    pub const FIRST: Self = Self(0);
    /// The least urgent priority. Only prefetched blobs come after it.
    pub const LAST: Self = Self(6);

    /// `None`: there is no such level.
    pub fn new(level: u32) -> Option<Self> {
        u8::try_from(level)
            .ok()
            .map(Self)
            .filter(|priority| *priority <= Self::LAST)
    }

    /// 0 to 6.
    pub const fn level(self) -> u8 {
        self.0
    }
}

impl Default for Priority {
    fn default() -> Self {
        Self(3)
    }
}

/// A name of an application or a tag. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(Arc<str>);

impl Label {
    /// `None` where `text` is none: 1 to [`MAX_LABEL_BYTES`] letters, digits and `._-/:@+`. So it can stand in a header, in a
    /// metric's label and among the words of a flag.
    pub fn new(text: &str) -> Option<Self> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/:@+".contains(&byte);
        let is = (1..=MAX_LABEL_BYTES).contains(&text.len()) && text.bytes().all(legal);
        is.then(|| Self(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// The labels of a pull, or those that a rule matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Labels {
    /// For which application.
    pub application: Option<Label>,
    /// The tag within the application.
    pub tag: Option<Label>,
}

impl Labels {
    /// Whether a pull with the `other` labels carries all of these.
    pub fn are_among(&self, other: &Self) -> bool {
        let is = |mine: &Option<Label>, theirs: &Option<Label>| mine.is_none() || mine == theirs;
        is(&self.application, &other.application) && is(&self.tag, &other.tag)
    }

    /// How many there are; an application says more than a tag.
    fn weight(&self) -> u8 {
        2 * u8::from(self.application.is_some()) + u8::from(self.tag.is_some())
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.application, &self.tag) {
            (Some(application), Some(tag)) => write!(f, "{application} tag {tag}"),
            (Some(application), None) => write!(f, "{application}"),
            (None, Some(tag)) => write!(f, "tag {tag}"),
            (None, None) => f.write_str("-"),
        }
    }
}

/// For whom a pull is, and how urgent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Purpose {
    /// For whom.
    pub labels: Labels,
    /// How urgent.
    pub priority: Priority,
}

impl Purpose {
    /// The purpose of a download that serves both purposes. It is as urgent as the more urgent one. Only limits that
    /// hold for both apply, so that a limit of one pull delays no other.
    pub fn and(&self, other: &Self) -> Self {
        let common = |a: &Option<Label>, b: &Option<Label>| a.clone().filter(|_| a == b);
        Self {
            labels: Labels {
                application: common(&self.labels.application, &other.labels.application),
                tag: common(&self.labels.tag, &other.labels.tag),
            },
            priority: self.priority.min(other.priority),
        }
    }

    /// The same for any number; `None` for none.
    pub fn common<'a>(all: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let mut all = all.into_iter();
        let first = all.next()?.clone();
        Some(all.fold(first, |common, one| common.and(one)))
    }
}

/// The labels that a client sends with its pull.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// For whom.
    pub labels: Labels,
    /// How urgent.
    pub priority: Option<Priority>,
}

/// Names repositories: `HOST/REPOSITORY`, where each `*` stands for any text, also with slashes; a host alone: all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// The error is for people.
    pub fn new(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() || text.len() > MAX_PATTERN_BYTES {
            return Err("is empty or too long");
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("has something else in it than letters, digits and signs");
        }
        if text.contains("://") {
            return Err("is an address");
        }
        let (host, repository) = text.split_once('/').unwrap_or((text, "*"));
        let host = if host.contains('*') {
            host.to_owned()
        } else {
            canonical_host(host).map_err(|_| "has no host")?
        };
        // As it is said to others, with what was left out.
        let whole = format!("{host}/{repository}");
        if whole.len() <= MAX_PATTERN_BYTES {
            Ok(Self(whole))
        } else {
            Err("is too long")
        }
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn fits(&self, source: &Source) -> bool {
        glob(
            self.0.as_bytes(),
            format!("{}/{}", source.registry, source.repository).as_bytes(),
        )
    }
}

/// Whether `text` is what `pattern` says. It goes back to the last star only, so it takes their lengths' product at most.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(byte) if *byte == text[t] => (p, t) = (p + 1, t + 1),
            _ => {
                let Some((at, from)) = star else { return false };
                star = Some((at, from + 1));
                (p, t) = (at + 1, from + 1);
            }
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// The limits of all pulls together that carry a rule's labels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// How fast, at each node.
    pub rates: Rates,
    /// How many of clients' requests for blobs a node answers at once.
    pub requests: Option<u32>,
    /// How many blobs a node reads from their origins at once, and how many peers a scheduler has elected to do so at once.
    pub origins: Option<u32>,
    /// How many seeds a scheduler names to each of them.
    pub seeds: Option<u32>,
}

/// One entry of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Of which pulls it is: those that carry these.
    pub labels: Labels,
    /// Pulls from there get its labels, if their client says nothing else.
    pub patterns: Vec<Pattern>,
    /// How urgent they are, if their client says nothing else.
    pub priority: Option<Priority>,
    /// The limits of these pulls.
    pub limits: Limits,
}

/// All rules that count, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applications(Vec<Rule>);

impl Applications {
    /// These rules; of two with the same labels the first one counts, and none beyond [`MAX_RULES`].
    pub fn new(rules: impl IntoIterator<Item = Rule>) -> Self {
        let mut seen = BTreeSet::new();
        Self(
            rules
                .into_iter()
                .filter(|rule| seen.insert(rule.labels.clone()))
                .take(MAX_RULES)
                .collect(),
        )
    }

    /// These, and those of the `cluster` that they do not replace.
    pub fn before(&self, cluster: &Self) -> Self {
        Self::new(self.0.iter().chain(&cluster.0).cloned())
    }

    /// The rules, in their order.
    pub fn rules(&self) -> &[Rule] {
        &self.0
    }

    /// The purpose of a pull from `source` whose client sent labels.
    pub fn purpose(&self, source: &Source, told: &Told) -> Purpose {
        let fits = |rule: &&Rule| rule.patterns.iter().any(|pattern| pattern.fits(source));
        let found = self
            .0
            .iter()
            .find(fits)
            .map(|rule| rule.labels.clone())
            .unwrap_or_default();
        let labels = match &told.labels.application {
            // Another application's tag says nothing about this one.
            Some(_) => told.labels.clone(),
            None => Labels {
                application: found.application,
                tag: told.labels.tag.clone().or(found.tag),
            },
        };
        let priority = told
            .priority
            .or_else(|| self.priority(&labels))
            .unwrap_or_default();
        Purpose { labels, priority }
    }

    /// The priority of the closest rule that names one.
    fn priority(&self, labels: &Labels) -> Option<Priority> {
        let rules = self.of(labels).filter(|rule| rule.priority.is_some());
        rules
            .max_by_key(|rule| rule.labels.weight())
            .and_then(|rule| rule.priority)
    }

    /// The rules that hold for pulls with these labels.
    pub fn of<'a>(&'a self, labels: &'a Labels) -> impl Iterator<Item = &'a Rule> {
        self.0.iter().filter(|rule| rule.labels.are_among(labels))
    }

    /// The application of these labels as figures name it, so that there are few of them: one that no rule names is `other`;
    /// none is none.
    pub fn name<'a>(&self, labels: &'a Labels) -> Option<&'a str> {
        let label = labels.application.as_ref()?;
        let is_named = self
            .0
            .iter()
            .any(|rule| rule.labels.application.as_ref() == Some(label));
        Some(if is_named { label.as_str() } else { "other" })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn label(text: &str) -> Option<Label> {
        (!text.is_empty()).then(|| Label::new(text).unwrap())
    }

    fn labels(application: &str, tag: &str) -> Labels {
        Labels {
            application: label(application),
            tag: label(tag),
        }
    }

    /// The purpose of a pull for an application.
    pub(crate) fn purpose(application: &str, level: u32) -> Purpose {
        let labels = Labels {
            application: Label::new(application),
            tag: None,
        };
        Purpose {
            labels,
            priority: Priority::new(level).unwrap(),
        }
    }

    /// One rule: the limits of an application's pulls.
    pub(crate) fn limited(application: &str, limits: Limits) -> Arc<Applications> {
        let labels = purpose(application, 3).labels;
        Arc::new(Applications::new([Rule {
            labels,
            limits,
            ..Rule::default()
        }]))
    }

    fn rule(application: &str, tag: &str, pattern: &str, priority: Option<u32>) -> Rule {
        Rule {
            labels: labels(application, tag),
            patterns: if pattern.is_empty() {
                Vec::new()
            } else {
                vec![Pattern::new(pattern).unwrap()]
            },
            priority: priority.and_then(Priority::new),
            limits: Limits::default(),
        }
    }

    fn source(registry: &str, repository: &str) -> Source {
        Source {
            registry: registry.into(),
            repository: repository.into(),
        }
    }

    #[test]
    fn a_label_can_stand_wherever_it_is_written() {
        for (text, is) in [
            ("shop", true),
            ("team-a/shop_2.0:x@y+z", true),
            ("", false),
            ("two words", false),
            ("quote\"", false),
            ("a=b", false),
            ("é", false),
        ] {
            assert_eq!(Label::new(text).is_some(), is, "{text:?}");
        }
        assert!(Label::new(&"a".repeat(MAX_LABEL_BYTES)).is_some());
        assert!(Label::new(&"a".repeat(MAX_LABEL_BYTES + 1)).is_none());
    }

    #[test]
    fn there_are_seven_levels_and_the_middle_one_goes_without_saying() {
        let levels: Vec<u8> = (0..20)
            .filter_map(Priority::new)
            .map(Priority::level)
            .collect();
        assert_eq!(levels, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(Priority::default().level(), 3);
        assert!(Priority::FIRST < Priority::default() && Priority::default() < Priority::LAST);
        assert_eq!(Priority::new(u32::MAX), None);
    }

    #[test]
    fn a_pattern_names_repositories() {
        for (pattern, registry, repository, fits) in [
            ("quay.io/shop/*", "quay.io", "shop/cart", true),
            ("quay.io/shop/*", "quay.io", "shop/cart/deep", true),
            ("quay.io/shop/*", "quay.io", "shop", false),
            ("quay.io/shop*", "quay.io", "shopping", true),
            ("quay.io", "quay.io", "any/thing", true),
            ("quay.io", "quay.io.evil", "any/thing", false),
            ("*.example.com/shop/*", "eu.example.com", "shop/a", true),
            ("*/shop/cart", "reg:5000", "shop/cart", true),
            ("*/shop/cart", "reg:5000", "other/shop/cart", true),
            ("*", "reg:5000", "a", true),
            ("reg:5000/a", "reg:5000", "a", true),
            ("reg:5000/a", "reg:5000", "ab", false),
            ("quay.io/*a*b", "quay.io", "xaxbxb", true),
            ("quay.io/*a*b", "quay.io", "xaxbxc", false),
        ] {
            let pattern = Pattern::new(pattern).unwrap();
            assert_eq!(
                pattern.fits(&source(registry, repository)),
                fits,
                "{pattern:?} {registry}/{repository}"
            );
        }
        for bad in ["", "https://quay.io/shop", "quay.io/a b", "quay.io/ä"] {
            assert!(Pattern::new(bad).is_err(), "{bad:?}");
        }
        assert!(Pattern::new(&"a".repeat(MAX_PATTERN_BYTES + 1)).is_err());
        // A pattern that is valid in a file is valid on the wire, where the omitted part is added again.
        for len in MAX_PATTERN_BYTES - 4..=MAX_PATTERN_BYTES {
            let said = Pattern::new(&format!("*{}", "a".repeat(len - 1)));
            assert_eq!(said.is_ok(), len + "/*".len() <= MAX_PATTERN_BYTES, "{len}");
            assert!(
                said.is_err()
                    || said
                        .as_ref()
                        .is_ok_and(|said| Pattern::new(said.as_str()).as_ref() == Ok(said))
            );
        }
    }

    #[test]
    fn a_client_says_what_a_pull_is_for_and_the_rules_say_the_rest() {
        let rules = Applications::new([
            rule("shop", "night", "quay.io/shop/night*", None),
            rule("shop", "", "quay.io/shop/*", Some(1)),
            rule("", "night", "", Some(6)),
            rule("data", "night", "", Some(5)),
        ]);
        let told = |application, tag, level: Option<u32>| Told {
            labels: labels(application, tag),
            priority: level.and_then(Priority::new),
        };
        for (repository, told, expected, level) in [
            ("other/x", told("", "", None), labels("", ""), 3),
            ("other/x", told("", "", Some(0)), labels("", ""), 0),
            ("shop/cart", told("", "", None), labels("shop", ""), 1),
            (
                "shop/nightly",
                told("", "", None),
                labels("shop", "night"),
                1,
            ),
            (
                "shop/cart",
                told("", "day", Some(4)),
                labels("shop", "day"),
                4,
            ),
            (
                "shop/nightly",
                told("data", "", None),
                labels("data", ""),
                3,
            ),
            (
                "shop/cart",
                told("data", "night", None),
                labels("data", "night"),
                5,
            ),
            ("other/x", told("", "night", None), labels("", "night"), 6),
            (
                "other/x",
                told("unknown", "night", None),
                labels("unknown", "night"),
                6,
            ),
        ] {
            let purpose = rules.purpose(&source("quay.io", repository), &told);
            assert_eq!(
                (&purpose.labels, purpose.priority.level()),
                (&expected, level),
                "{repository} {told:?}"
            );
        }
        let name = |application| rules.name(&labels(application, "")).map(str::to_owned);
        assert_eq!(
            ["shop", "unknown", ""].map(name),
            [Some("shop".into()), Some("other".into()), None]
        );
    }

    #[test]
    fn a_nodes_own_rule_takes_the_place_of_the_clusters() {
        let own = Applications::new([rule("shop", "", "", Some(0))]);
        let cluster = Applications::new([
            rule("shop", "", "quay.io", Some(6)),
            rule("data", "", "", Some(5)),
        ]);
        let all = own.before(&cluster);
        let said: Vec<_> = all
            .rules()
            .iter()
            .map(|rule| (rule.labels.to_string(), rule.priority))
            .collect();
        assert_eq!(
            said,
            [
                ("shop".into(), Priority::new(0)),
                ("data".into(), Priority::new(5))
            ]
        );
        let many = (0..200).map(|n| rule(&format!("app{n}"), "", "", None));
        assert_eq!(Applications::new(many).rules().len(), MAX_RULES);
    }

    fn any_purpose() -> impl Strategy<Value = Purpose> {
        ("[ab]{0,1}", "[xy]{0,1}", 0..=6u32).prop_map(|(application, tag, level)| Purpose {
            labels: labels(&application, &tag),
            priority: Priority::new(level).unwrap(),
        })
    }

    proptest! {
        #[test]
        fn what_a_download_is_for_does_not_depend_on_who_came_first(a in any_purpose(), b in any_purpose(), c in any_purpose()) {
            prop_assert_eq!(a.and(&b), b.and(&a));
            prop_assert_eq!(a.and(&b).and(&c), a.and(&b.and(&c)));
            prop_assert_eq!(a.and(&a), a.clone());
            prop_assert_eq!(Purpose::common([&a, &b, &c]), Some(a.and(&b).and(&c)));
        }

        #[test]
        fn nobody_is_held_up_by_a_limit_of_somebody_elses(a in any_purpose(), b in any_purpose(), limit in any_purpose()) {
            let holds = |purpose: &Purpose| limit.labels.are_among(&purpose.labels);
            let both = a.and(&b);
            prop_assert_eq!(holds(&both), holds(&a) && holds(&b));
            prop_assert!(both.priority <= a.priority && both.priority <= b.priority);
        }

        #[test]
        fn a_star_stands_for_any_text(pattern in "[ab*]{0,8}", text in "[ab]{0,10}") {
            let regex = regex::Regex::new(&format!("^{}$", pattern.replace('*', ".*"))).unwrap();
            prop_assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), regex.is_match(&text));
        }
    }
}
