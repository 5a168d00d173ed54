//! What is wrong with a configuration: all of it at once, each with the key, what is wrong and the cure.

use std::fmt;

use crate::quantity::Wrong;

/// One thing to mend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// As the person wrote it: `--cache-high`, or `cache.high (/etc/hawker.toml)`.
    pub(crate) key: String,
    pub(crate) what: String,
    pub(crate) cure: String,
}

impl Problem {
    pub(crate) fn new(key: impl Into<String>, what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { key: key.into(), what: what.into(), cure: cure.into() }
    }

    pub(crate) fn of(key: impl Into<String>, wrong: Wrong) -> Self {
        Self { key: key.into(), what: wrong.what, cure: wrong.cure }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}\n    → {}", self.key, self.what, self.cure)
    }
}

/// Everything that is wrong with a configuration; never empty when it is an error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Problems(pub(crate) Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0.len();
        write!(f, "the configuration has {n} {}:", if n == 1 { "error" } else { "errors" })?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl std::error::Error for Problems {}
