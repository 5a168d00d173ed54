//! A source in memory, for tests: a blob, its faults, and a log of what was asked.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use hawker_core::node::Failure;

use super::{Ask, Opened, Source, SourceBody, SourceError, SourceFuture};

/// How the source behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Behaviour {
    /// Ranges are answered with 206.
    pub(crate) honours_ranges: bool,
    /// The answer tells the size.
    pub(crate) tells_size: bool,
    /// The rate of one connection, in bytes a second.
    pub(crate) rate_bytes: Option<u64>,
    /// Each answer breaks off after so many bytes; with [`Behaviour::breaks_once`] the first one only.
    pub(crate) breaks_after_bytes: Option<u64>,
    /// Only the first answer breaks off.
    pub(crate) breaks_once: bool,
    /// Each answer to a range ends, as if in order, after so many bytes.
    pub(crate) part_bytes: Option<u64>,
    /// More connections at once are answered with 429.
    pub(crate) throttles_above: Option<usize>,
    /// Every request is answered with this status.
    pub(crate) refuses: Option<u16>,
    /// Ranges that begin past the start are answered with this status.
    pub(crate) refuses_ranges: Option<u16>,
    /// The size that answers tell, if it is another than the right one.
    pub(crate) lies_about_size: Option<u64>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            honours_ranges: true,
            tells_size: true,
            rate_bytes: None,
            breaks_after_bytes: None,
            breaks_once: false,
            part_bytes: None,
            throttles_above: None,
            refuses: None,
            refuses_ranges: None,
            lies_about_size: None,
        }
    }
}

/// A blob in memory.
#[derive(Clone)]
pub(crate) struct MemorySource {
    blob: Bytes,
    behaviour: Behaviour,
    asked: Arc<Mutex<Vec<Option<Range<u64>>>>>,
    sent_bytes: Arc<AtomicU64>,
    open_now: Arc<AtomicUsize>,
    most_open: Arc<AtomicUsize>,
}

impl MemorySource {
    pub(crate) fn new(blob: Vec<u8>, behaviour: Behaviour) -> Self {
        Self {
            blob: blob.into(),
            behaviour,
            asked: Arc::default(),
            sent_bytes: Arc::default(),
            open_now: Arc::default(),
            most_open: Arc::default(),
        }
    }

    /// Every request so far.
    pub(crate) fn asked(&self) -> Vec<Option<Range<u64>>> {
        self.asked.lock().expect("no test panics with it").clone()
    }

    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn most_connections(&self) -> usize {
        self.most_open.load(Ordering::Relaxed)
    }
}

impl Source for MemorySource {
    fn open(&self, ask: Ask) -> SourceFuture<'_, Result<Opened, SourceError>> {
        let answer = self.answer(ask);
        Box::pin(async move { answer })
    }

    fn place(&self) -> String {
        "memory".to_owned()
    }
}

impl MemorySource {
    fn answer(&self, ask: Ask) -> Result<Opened, SourceError> {
        let Ask {
            range,
            size_bytes: known,
        } = ask;
        let Behaviour {
            honours_ranges,
            tells_size,
            part_bytes,
            ..
        } = self.behaviour;
        self.asked
            .lock()
            .expect("no test panics with it")
            .push(range.clone());
        let is_later = range.as_ref().is_some_and(|range| range.start > 0);
        let refuses_this = self.behaviour.refuses_ranges.filter(|_| is_later);
        if let Some(status) = self.behaviour.refuses.or(refuses_this) {
            if matches!(status, 429 | 503) {
                return Err(SourceError::Throttled { status });
            }
            let (failure, reason) = (Failure::Status(status), "it refuses".to_owned());
            return Err(SourceError::Final { failure, reason });
        }
        if self
            .behaviour
            .throttles_above
            .is_some_and(|most| self.open_now.load(Ordering::Relaxed) >= most)
        {
            return Err(SourceError::Throttled { status: 429 });
        }
        let told = self
            .behaviour
            .lies_about_size
            .unwrap_or(self.blob.len() as u64);
        let size_bytes = tells_size.then_some(told);
        match (known, size_bytes) {
            (Some(known), Some(told)) if known != told => {
                let (failure, reason) = (Failure::WrongSize, "another size".to_owned());
                return Err(SourceError::Final { failure, reason });
            }
            (None, None) => {
                let (failure, reason) = (Failure::UnknownLength, "no size".to_owned());
                return Err(SourceError::Final { failure, reason });
            }
            _ => {}
        }
        let range = range.filter(|_| honours_ranges);
        let is_range = range.is_some();
        let mut range = range.unwrap_or(0..self.blob.len() as u64);
        if let Some(most) = part_bytes.filter(|_| is_range) {
            range.end = range.end.min(range.start + most);
        }
        let open = self.open_now.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_open.fetch_max(open, Ordering::Relaxed);
        let body = MemoryBody {
            of: self.clone(),
            at: range.start,
            end: range.end,
            sent_bytes: 0,
            is_first: self.asked().len() == 1,
        };
        let place = Arc::from(self.place().as_str());
        Ok(Opened {
            size_bytes,
            is_range,
            takes_ranges: honours_ranges,
            place,
            body: Box::new(body),
        })
    }
}

struct MemoryBody {
    of: MemorySource,
    at: u64,
    end: u64,
    sent_bytes: u64,
    is_first: bool,
}

impl Drop for MemoryBody {
    fn drop(&mut self) {
        self.of.open_now.fetch_sub(1, Ordering::Relaxed);
    }
}

impl SourceBody for MemoryBody {
    fn next(&mut self) -> SourceFuture<'_, Option<Result<Bytes, SourceError>>> {
        Box::pin(async move {
            let len = (self.end - self.at).min(64 << 10);
            if len == 0 {
                return None;
            }
            if self
                .of
                .behaviour
                .breaks_after_bytes
                .filter(|_| self.is_first || !self.of.behaviour.breaks_once)
                .is_some_and(|after| self.sent_bytes >= after)
            {
                return Some(Err(SourceError::Broken("it broke off".to_owned())));
            }
            if let Some(rate) = self.of.behaviour.rate_bytes {
                tokio::time::sleep(Duration::from_secs_f64(len as f64 / rate as f64)).await;
            }
            let bytes = self
                .of
                .blob
                .slice(self.at as usize..(self.at + len) as usize);
            self.at += len;
            self.sent_bytes += len;
            self.of.sent_bytes.fetch_add(len, Ordering::Relaxed);
            Some(Ok(bytes))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::suite;

    #[tokio::test]
    async fn the_memory_source_honours_ranges() {
        let blob: Vec<u8> = (0..300_000_u32).map(|n| n as u8).collect();
        suite::honours_ranges(
            &MemorySource::new(blob.clone(), Behaviour::default()),
            &blob,
        )
        .await;
    }
}
