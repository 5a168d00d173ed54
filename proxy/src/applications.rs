//! Applications at this node: which rules count now, what a client's request is for, how many may run, and what each has moved.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use hawker_core::application::{
    Applications, Label, Labels, MAX_LABEL_BYTES, Priority, Purpose, Told,
};
use hawker_oci::reference::Source;
use http::{HeaderMap, HeaderName};

use crate::admin::ApplicationStatus;
use crate::metrics::{Metrics, Moved};
use crate::settings::LiveSettings;

/// `X-Hawker-Application`, and the same word of Dragonfly's clients.
const APPLICATION: [HeaderName; 2] = [
    HeaderName::from_static("x-hawker-application"),
    HeaderName::from_static("x-dragonfly-application"),
];
/// `X-Hawker-Tag`, and the same word of Dragonfly's clients.
const TAG: [HeaderName; 2] = [
    HeaderName::from_static("x-hawker-tag"),
    HeaderName::from_static("x-dragonfly-tag"),
];
/// `X-Hawker-Priority`. Dragonfly's own levels say who goes to the origin, not who goes first: they are not taken for these.
const PRIORITY: HeaderName = HeaderName::from_static("x-hawker-priority");

/// Takes out of a request's headers whatever is about this alone: it is nobody's business further on.
pub(crate) fn strip(headers: &mut HeaderMap) {
    for name in APPLICATION.iter().chain(&TAG).chain([&PRIORITY]) {
        headers.remove(name);
    }
}

/// The labels of a request. The error is for people.
pub(crate) fn told(headers: &HeaderMap) -> Result<Told, &'static str> {
    let label = |names: &[HeaderName], what: &'static str| {
        let Some(value) = names.iter().find_map(|name| headers.get(name)) else {
            return Ok(None);
        };
        value
            .to_str()
            .ok()
            .and_then(|text| Label::new(text.trim()))
            .map(Some)
            .ok_or(what)
    };
    const _: () = assert!(MAX_LABEL_BYTES == 64, "the words below say so");
    let application = "its X-Hawker-Application is none: write 1 to 64 letters, digits or ._-/:@+";
    let tag = "its X-Hawker-Tag is none: write 1 to 64 letters, digits or ._-/:@+";
    let labels = Labels {
        application: label(&APPLICATION, application)?,
        tag: label(&TAG, tag)?,
    };
    let priority = match headers.get(PRIORITY) {
        None => None,
        Some(value) => {
            let level = value
                .to_str()
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .and_then(Priority::new);
            Some(level.ok_or("its X-Hawker-Priority is none: write 0 (first) to 6 (last)")?)
        }
    };
    Ok(Told { labels, priority })
}

/// The rules that count, and what is counted by them. One a process, shared by `Arc`.
pub struct Desk {
    live: Arc<ArcSwap<LiveSettings>>,
    metrics: Arc<Metrics>,
    /// Requests under way, by the labels of the rules that limit them.
    open: Mutex<BTreeMap<Labels, u32>>,
}

impl Desk {
    /// With the rules of the live settings.
    pub fn new(live: Arc<ArcSwap<LiveSettings>>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            live,
            metrics,
            open: Mutex::default(),
        })
    }

    /// The rules that count now.
    pub(crate) fn rules(&self) -> Arc<Applications> {
        Arc::clone(&self.live.load().applications)
    }

    /// The purpose of a request for something of `source`.
    pub(crate) fn purpose(&self, source: &Source, told: &Told) -> Purpose {
        self.rules().purpose(source, told)
    }

    /// A place for one request, until the guard is dropped; `None`: there are as many as there may be.
    pub(crate) fn admit(self: &Arc<Self>, purpose: &Purpose) -> Option<Turn> {
        let rules = self.rules();
        let limited: Vec<(&Labels, u32)> = rules
            .of(&purpose.labels)
            .filter_map(|rule| Some((&rule.labels, rule.limits.requests?)))
            .collect();
        let mut open = self.open();
        if limited
            .iter()
            .any(|(labels, most)| open.get(*labels).is_some_and(|now| now >= most) || *most == 0)
        {
            drop(open);
            self.metrics
                .application_refused(self.name(&purpose.labels).as_deref().unwrap_or("other"));
            return None;
        }
        for (labels, _) in &limited {
            *open.entry((*labels).clone()).or_default() += 1;
        }
        let taken = limited
            .into_iter()
            .map(|(labels, _)| labels.clone())
            .collect();
        Some(Turn {
            desk: Arc::clone(self),
            taken,
            labels: purpose.labels.clone(),
        })
    }

    /// Bytes of a pull with these labels went some way.
    pub(crate) fn moved(&self, labels: &Labels, how: Moved, bytes: u64) {
        if let Some(name) = self.name(labels) {
            self.metrics.application_bytes(&name, how, bytes);
        }
    }

    /// The applications in `/status`: each that a rule names, and all the others together if there are any.
    pub(crate) fn status(&self) -> Vec<ApplicationStatus> {
        let rules = self.rules();
        let named = rules
            .rules()
            .iter()
            .filter_map(|rule| rule.labels.application.as_ref());
        let mut names: Vec<&str> = named.map(Label::as_str).chain(["other"]).collect();
        names.sort_unstable();
        names.dedup();
        let all = names.into_iter().map(|name| self.metrics.application(name));
        let is_shown = |status: &ApplicationStatus| status.name != "other" || status.is_any();
        all.filter(is_shown).collect()
    }

    fn name(&self, labels: &Labels) -> Option<String> {
        // Most pulls are nobody's.
        labels.application.as_ref()?;
        self.rules().name(labels).map(str::to_owned)
    }

    fn open(&self) -> MutexGuard<'_, BTreeMap<Labels, u32>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of a request that is being answered.
pub(crate) struct Turn {
    desk: Arc<Desk>,
    taken: Vec<Labels>,
    labels: Labels,
}

impl Turn {
    /// Bytes of its answer went out.
    pub(crate) fn served(&self, bytes: u64) {
        self.desk.moved(&self.labels, Moved::Served, bytes);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut open = self.desk.open();
        for labels in &self.taken {
            if let Some(count) = open.get_mut(labels) {
                *count -= 1;
                if *count == 0 {
                    open.remove(labels);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use hawker_core::application::{Limits, Rule};
    use http::HeaderValue;

    use super::*;

    fn headers(all: &[(&'static str, &'static str)]) -> HeaderMap {
        all.iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    fn labels(application: &str, tag: &str) -> Labels {
        Labels {
            application: Label::new(application),
            tag: Label::new(tag),
        }
    }

    #[test]
    fn a_request_says_what_it_is_for_in_bounds() {
        for (given, expected) in [
            (&[][..], Some(("", "", None))),
            (
                &[
                    ("x-hawker-application", " shop "),
                    ("x-hawker-tag", "night"),
                ],
                Some(("shop", "night", None)),
            ),
            (
                &[
                    ("x-dragonfly-application", "shop"),
                    ("x-dragonfly-tag", "n"),
                ],
                Some(("shop", "n", None)),
            ),
            (
                &[
                    ("x-hawker-application", "a"),
                    ("x-dragonfly-application", "b"),
                ],
                Some(("a", "", None)),
            ),
            (&[("x-hawker-priority", "0")], Some(("", "", Some(0)))),
            (&[("x-dragonfly-priority", "6")], Some(("", "", None))),
            (&[("x-hawker-priority", "7")], None),
            (&[("x-hawker-priority", "-1")], None),
            (&[("x-hawker-application", "")], None),
            (&[("x-hawker-tag", "two words")], None),
        ] {
            let told = told(&headers(given)).ok();
            let expected = expected.map(|(application, tag, level)| Told {
                labels: labels(application, tag),
                priority: level.and_then(Priority::new),
            });
            assert_eq!(told, expected, "{given:?}");
        }
        let mut all = headers(&[
            ("x-hawker-application", "a"),
            ("x-hawker-priority", "1"),
            ("range", "bytes=0-"),
        ]);
        strip(&mut all);
        assert_eq!(all, headers(&[("range", "bytes=0-")]));
    }

    fn desk(rules: Vec<Rule>) -> Arc<Desk> {
        let applications = Arc::new(Applications::new(rules));
        let live = LiveSettings {
            applications,
            ..LiveSettings::default()
        };
        Desk::new(
            Arc::new(ArcSwap::from_pointee(live)),
            Arc::new(Metrics::new()),
        )
    }

    #[test]
    fn no_more_requests_of_an_application_or_a_tag_run_than_may_and_the_others_are_counted() {
        let limited = |labels, most| Rule {
            labels,
            limits: Limits {
                requests: Some(most),
                ..Limits::default()
            },
            ..Rule::default()
        };
        let desk = desk(vec![
            limited(labels("shop", ""), 2),
            limited(labels("", "night"), 1),
        ]);
        let ask = |application, tag| {
            desk.admit(&Purpose {
                labels: labels(application, tag),
                ..Purpose::default()
            })
        };
        let night = ask("shop", "night").expect("there is room");
        assert!(ask("data", "night").is_none(), "one of the tag runs");
        let day = ask("shop", "day").expect("there is room");
        assert!(ask("shop", "").is_none());
        let free: Vec<Turn> = (0..10).filter_map(|_| ask("data", "")).collect();
        assert_eq!(free.len(), 10, "nobody limits these");
        drop(night);
        assert!(ask("shop", "night").is_some());
        drop((day, free));
        assert!(desk.open().is_empty());
        let text = desk.metrics.encode();
        assert!(
            text.contains("hawker_application_refused_total{application=\"shop\"} 1"),
            "{text}"
        );
        assert!(
            text.contains("hawker_application_refused_total{application=\"other\"} 1"),
            "{text}"
        );
    }

    #[test]
    fn only_applications_that_a_rule_names_have_figures_of_their_own() {
        let desk = desk(vec![Rule {
            labels: labels("shop", ""),
            ..Rule::default()
        }]);
        for n in 0..100 {
            desk.moved(&labels(&format!("made-up-{n}"), ""), Moved::Served, 1);
        }
        desk.moved(&labels("shop", "x"), Moved::Received, 5);
        desk.moved(&labels("", "x"), Moved::Received, 7);
        let shown: Vec<_> = desk
            .status()
            .into_iter()
            .map(|s| (s.name, s.served, s.received))
            .collect();
        assert_eq!(
            shown,
            [("other".to_owned(), 100, 0), ("shop".to_owned(), 0, 5)]
        );
        assert_eq!(
            desk.metrics
                .encode()
                .matches("hawker_application_bytes_total{")
                .count(),
            2
        );
    }
}
