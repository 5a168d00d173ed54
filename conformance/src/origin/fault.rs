//! The faults of the origin, their victims, and their number.

use serde::{Deserialize, Serialize};

/// One way to misbehave. Several may strike the same request: a slow body can also be cut short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "snake_case")]
pub enum Fault {
    /// No listener at all: connections are refused. Strikes the whole origin, whatever the rule's scope says.
    Refuse,
    /// The request is read and never answered.
    Hang,
    /// The head of the answer is late.
    SlowHeaders {
        /// How late.
        delay_ms: u64,
    },
    /// The body trickles.
    SlowBody {
        /// Its rate.
        bytes_per_s: u64,
    },
    /// The connection is reset (RST) after this many body bytes; 0 resets it in place of an answer's head.
    ResetAfter {
        /// Body bytes sent before.
        bytes: u64,
    },
    /// The connection is closed (FIN) after this many body bytes.
    TruncateAfter {
        /// Body bytes sent before.
        bytes: u64,
    },
    /// After this many body bytes nothing more comes, and the connection stays open.
    HangAfter {
        /// Body bytes sent before.
        bytes: u64,
    },
    /// A Range is answered 200 with everything.
    IgnoreRange,
    /// A Range without an end is answered 416, as by go-containerregistry's registry.
    ClosedRangeOnly,
    /// Every Range is answered 416.
    RefuseRange,
    /// A Range is answered with what begins this many bytes earlier.
    EarlierRange {
        /// How many bytes earlier.
        bytes: u64,
    },
    /// A Range is answered with this many bytes at most.
    ShortRange {
        /// How many bytes.
        bytes: u64,
    },
    /// Content-Length is off by this much. Too long: the connection closes early. Too short: bytes follow that
    /// belong to no answer, and the connection stays open.
    LieLength {
        /// The number added to the true length.
        off_by_bytes: i64,
    },
    /// Wrong bytes, at these offsets in the blob.
    WrongBytes {
        /// The first wrong byte.
        offset: u64,
        /// How many are wrong.
        length: u64,
    },
    /// The length is not told, neither by HEAD nor by GET.
    NoLength {
        /// Chunked, or else a body that ends with the connection.
        chunked: bool,
    },
    /// An error in place of the answer: 403, 404, 429, 500, 502, 503, …
    Status {
        /// The status code.
        code: u16,
        /// `Retry-After`, in seconds.
        #[serde(default)]
        retry_after_s: Option<u64>,
    },
    /// Bearer tokens are required; the challenge names this origin's own `/token`.
    Bearer {
        /// `/token` gives one to everybody; or else only to `user` with `password`.
        #[serde(default)]
        anonymous: bool,
        /// The user that may have a token.
        #[serde(default)]
        user: String,
        /// The password of that user.
        #[serde(default)]
        password: String,
        /// How long a token is good, to the second; for ever if not said.
        #[serde(default)]
        life_s: Option<u64>,
    },
    /// Basic credentials are required.
    Basic {
        /// The user that may pull.
        user: String,
        /// The password of that user.
        password: String,
    },
    /// A GET of a blob is sent elsewhere, to a signed URL.
    Redirect {
        /// 301, 302, 303, 307 or 308.
        status: u16,
        /// The start of the signed URL, such as `http://10.0.0.9:80`; empty makes the Location relative.
        #[serde(default)]
        base: String,
        /// How many of the URLs handed out have expired when they are asked (403); those after them work.
        #[serde(default)]
        expired: u64,
    },
}

/// A fault and the requests it strikes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// The fault.
    #[serde(flatten)]
    pub fault: Fault,
    /// Only requests whose path contains this, such as a digest, a repository, `/manifests/`; all when empty.
    #[serde(default)]
    pub path_contains: String,
    /// Only this method.
    #[serde(default)]
    pub method: Option<String>,
    /// How many requests it strikes before it is over; without it, all.
    #[serde(default)]
    pub times: Option<u64>,
}

impl Rule {
    /// A fault that strikes every request, until it is removed.
    pub const fn always(fault: Fault) -> Self {
        Self {
            fault,
            path_contains: String::new(),
            method: None,
            times: None,
        }
    }

    /// Only requests whose path contains this text.
    #[must_use]
    pub fn on(mut self, path_contains: impl ToString) -> Self {
        self.path_contains = path_contains.to_string();
        self
    }

    /// Only this method.
    #[must_use]
    pub fn method(mut self, method: &str) -> Self {
        self.method = Some(method.to_owned());
        self
    }

    /// Only this many requests.
    #[must_use]
    pub const fn times(mut self, times: u64) -> Self {
        self.times = Some(times);
        self
    }

    fn strikes(&self, method: &str, path: &str) -> bool {
        self.times != Some(0)
            && path.contains(&self.path_contains)
            && self
                .method
                .as_deref()
                .is_none_or(|only| only.eq_ignore_ascii_case(method))
    }
}

/// The rules in force.
#[derive(Debug, Default)]
pub(super) struct Rules {
    rules: Vec<(u64, Rule)>,
    next_id: u64,
}

impl Rules {
    pub(super) fn add(&mut self, rule: Rule) -> u64 {
        self.next_id += 1;
        self.rules.push((self.next_id, rule));
        self.next_id
    }

    pub(super) fn remove(&mut self, id: u64) {
        self.rules.retain(|(other, _)| *other != id);
    }

    pub(super) fn clear(&mut self) {
        self.rules.clear();
    }

    /// Whether the listener must be closed.
    pub(super) fn refusing(&self) -> bool {
        self.rules
            .iter()
            .any(|(_, rule)| rule.fault == Fault::Refuse)
    }

    /// The faults that strike this request; each has struck once more by that.
    pub(super) fn strike(&mut self, method: &str, path: &str) -> Vec<Fault> {
        let struck = self
            .rules
            .iter_mut()
            .map(|(_, rule)| rule)
            .filter(|rule| rule.strikes(method, path));
        struck
            .map(|rule| {
                rule.times = rule.times.map(|times| times - 1);
                rule.fault.clone()
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_strikes_what_it_names_as_often_as_it_says() {
        let mut rules = Rules::default();
        rules.add(
            Rule::always(Fault::Hang)
                .on("/blobs/")
                .method("GET")
                .times(2),
        );
        assert!(rules.strike("GET", "/v2/a/manifests/x").is_empty());
        assert!(rules.strike("HEAD", "/v2/a/blobs/x").is_empty());
        assert_eq!(rules.strike("GET", "/v2/a/blobs/x"), [Fault::Hang]);
        let id = rules.add(Rule::always(Fault::IgnoreRange));
        assert_eq!(
            rules.strike("GET", "/v2/a/blobs/x"),
            [Fault::Hang, Fault::IgnoreRange]
        );
        assert_eq!(rules.strike("GET", "/v2/a/blobs/x"), [Fault::IgnoreRange]);
        rules.remove(id);
        assert!(rules.strike("GET", "/v2/a/blobs/x").is_empty());
    }

    #[test]
    fn a_rule_is_one_flat_json_object() {
        let rule: Rule =
            serde_json::from_str(r#"{"fault":"reset_after","bytes":10,"path_contains":"sha256:"}"#)
                .unwrap();
        assert_eq!(
            rule,
            Rule::always(Fault::ResetAfter { bytes: 10 }).on("sha256:")
        );
        assert_eq!(
            serde_json::from_str::<Rule>(&serde_json::to_string(&rule).unwrap()).unwrap(),
            rule
        );
    }
}
