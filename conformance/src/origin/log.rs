//! The requests to the origin and its answers: the proof of each fetch.

use std::sync::Mutex;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::http::Request;
use super::lock;

/// Enough for any test; a log that grows beyond it drops what is new, never what a test looks for first.
const MAX_ENTRIES: usize = 1 << 20;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When it came, in milliseconds from the origin's start.
    pub at_ms: u64,
    /// Its method.
    pub method: String,
    /// Its path and query.
    pub target: String,
    /// Its `Range`.
    pub range: Option<String>,
    /// Whether it had an `Authorization`; never which.
    pub authorization: bool,
    /// Its `User-Agent`.
    pub user_agent: Option<String>,
    /// Its `Via`.
    pub via: Option<String>,
    /// The names of all its fields.
    #[serde(default)]
    pub fields: Vec<String>,
    /// The status answered; 0 while there is no answer.
    pub status: u16,
    /// Body bytes handed to the kernel so far.
    pub body_bytes: u64,
}

/// Sums over the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// How many requests came.
    pub requests: u64,
    /// How many of them asked for a blob by GET.
    pub blob_gets: u64,
    /// Body bytes sent, of blobs and all else.
    pub body_bytes: u64,
    /// Body bytes sent of blobs.
    pub blob_bytes: u64,
}

pub(super) struct Log {
    start: Instant,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// How often the log was cleared: an entry of before must not be written to.
    generation: u64,
    entries: Vec<Entry>,
}

/// The note of an answer under way.
pub(super) struct Mark {
    generation: u64,
    index: usize,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            inner: Mutex::default(),
        }
    }
}

impl Log {
    pub(super) fn begin(&self, request: &Request) -> Mark {
        let text = |name| request.header(name).map(str::to_owned);
        let entry = Entry {
            at_ms: u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX),
            method: request.method.clone(),
            target: request.target.clone(),
            range: text("range"),
            authorization: request.header("authorization").is_some(),
            user_agent: text("user-agent"),
            via: text("via"),
            fields: request.names().map(str::to_ascii_lowercase).collect(),
            status: 0,
            body_bytes: 0,
        };
        let mut inner = lock(&self.inner);
        let index = inner.entries.len();
        if index < MAX_ENTRIES {
            inner.entries.push(entry);
        }
        Mark {
            generation: inner.generation,
            index,
        }
    }

    pub(super) fn status(&self, mark: &Mark, status: u16) {
        self.update(mark, |entry| entry.status = status);
    }

    pub(super) fn sent(&self, mark: &Mark, body_bytes: usize) {
        self.update(mark, |entry| entry.body_bytes += body_bytes as u64);
    }

    fn update(&self, mark: &Mark, change: impl FnOnce(&mut Entry)) {
        let mut inner = lock(&self.inner);
        if inner.generation == mark.generation
            && let Some(entry) = inner.entries.get_mut(mark.index)
        {
            change(entry);
        }
    }

    pub(super) fn entries(&self) -> Vec<Entry> {
        lock(&self.inner).entries.clone()
    }

    pub(super) fn clear(&self) {
        let mut inner = lock(&self.inner);
        inner.generation += 1;
        inner.entries.clear();
    }

    pub(super) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for entry in &lock(&self.inner).entries {
            let blob = entry.target.contains("/blobs/");
            totals.requests += 1;
            totals.blob_gets += u64::from(blob && entry.method == "GET");
            totals.body_bytes += entry.body_bytes;
            totals.blob_bytes += if blob { entry.body_bytes } else { 0 };
        }
        totals
    }
}
