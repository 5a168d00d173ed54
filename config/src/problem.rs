//! The problems of a configuration. All of them are reported at once, each with its key, the fault and the cure.

use std::fmt;

/// Why a value can't be used, and what to write in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The fault, as the end of a sentence that begins with the key.
    pub what: String,
    /// The cure.
    pub cure: String,
}

/// Between the fault and its cure where both are one text: serde's errors are texts.
const CURE: &str = " → ";

impl Wrong {
    /// Both parts of a text that [`Wrong`]'s `Display` wrote; other texts have a general cure.
    pub(crate) fn from_text(text: &str) -> Self {
        let (what, cure) = text
            .rsplit_once(CURE)
            .unwrap_or((text, "see docs/configuration.md"));
        Self {
            what: what.to_owned(),
            cure: cure.to_owned(),
        }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{CURE}{}", self.what, self.cure)
    }
}

/// A value that can't be used, and what to write in its place.
///
/// # Errors
/// Always.
pub fn wrong<T>(what: impl Into<String>, cure: impl Into<String>) -> Result<T, Wrong> {
    Err(Wrong {
        what: what.into(),
        cure: cure.into(),
    })
}

/// One thing to mend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// As the person wrote it: `--cache-high`, or `cache.high (/etc/hawker.toml)`.
    pub key: String,
    /// The fault.
    pub what: String,
    /// The cure.
    pub cure: String,
}

impl Problem {
    /// A problem of this key.
    pub fn new(key: impl Into<String>, what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            what: what.into(),
            cure: cure.into(),
        }
    }

    /// A problem with the value of this key.
    pub fn of(key: impl Into<String>, wrong: Wrong) -> Self {
        Self {
            key: key.into(),
            what: wrong.what,
            cure: wrong.cure,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}\n    → {}", self.key, self.what, self.cure)
    }
}

/// Everything that is wrong with a configuration; never empty when it is an error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0.len();
        write!(
            f,
            "the configuration has {n} {}:",
            if n == 1 { "error" } else { "errors" }
        )?;
        self.0
            .iter()
            .try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl std::error::Error for Problems {}
