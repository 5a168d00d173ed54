//! A committed blob whose pieces were not all hashed since the daemon started: each is hashed before its bytes leave,
//! once for all readers. If one is wrong, the rest comes from a new download.

use std::ops::Range;
use std::sync::Arc;

use hawker_core::application::Purpose;
use tokio::task::JoinHandle;

use crate::download::{FlightError, Segment};
use crate::flight::{Flights, Reader};
use crate::grant::Grant;
use crate::store::Blob;

/// How the rest of a blob is downloaded when the disk has let it rot.
#[derive(Clone)]
pub(super) struct Again {
    pub(super) flights: Flights,
    pub(super) grant: Grant,
    pub(super) purpose: Purpose,
}

/// Reads ranges of a committed blob.
pub(crate) struct Stored {
    blob: Blob,
    again: Again,
    /// The rest of the current range.
    range: Range<u64>,
    /// The piece that comes next, while the one before it is sent.
    ahead: Option<JoinHandle<bool>>,
    /// Takes over where a piece was wrong.
    download: Option<Box<Reader>>,
    /// The blob was found wrong: nothing is read from it any more.
    rotten: bool,
}

impl Stored {
    pub(super) const fn new(blob: Blob, again: Again) -> Self {
        Self {
            blob,
            again,
            range: 0..0,
            ahead: None,
            download: None,
            rotten: false,
        }
    }

    /// Reads this range next.
    pub(super) fn read(&mut self, range: Range<u64>) {
        self.range = range;
        self.ahead = None;
        self.download = None;
    }

    /// Makes sure of the first bytes, so that an answer is begun only with right ones. `false`: the blob is gone from the store.
    pub(super) async fn is_sound(blob: &Blob, ranges: &[Range<u64>], flights: &Flights) -> bool {
        let Some(first) = ranges.iter().find(|range| !range.is_empty()) else {
            return true;
        };
        let right = blob
            .check(blob.table.layout().containing(first.start))
            .await;
        if !right {
            flights.rotten(blob).await;
        }
        right
    }

    /// The next bytes of the range; `None` at its end.
    pub(super) async fn next(&mut self) -> Result<Option<Segment>, FlightError> {
        if let Some(download) = &mut self.download {
            return download.next().await;
        }
        if self.range.is_empty() {
            return Ok(None);
        }
        if self.rotten || !self.is_next_right().await {
            return self.download_rest().await;
        }
        let layout = self.blob.table.layout();
        let piece = layout.containing(self.range.start);
        let mut end = layout.range(piece).end;
        while end < self.range.end && self.blob.is_checked(&(end..end + 1)) {
            end = layout.range(layout.containing(end)).end;
        }
        let range = self.range.start..end.min(self.range.end);
        self.range.start = range.end;
        if !self.range.is_empty() {
            let (blob, next) = (self.blob.clone(), layout.containing(range.end));
            self.ahead = Some(tokio::spawn(async move { blob.check(next).await }));
        }
        Ok(Some(Segment::File {
            file: Arc::clone(&self.blob.file),
            range,
        }))
    }

    async fn is_next_right(&mut self) -> bool {
        if let Some(ahead) = self.ahead.take()
            && !ahead.await.unwrap_or(false)
        {
            return false;
        }
        self.blob
            .check(self.blob.table.layout().containing(self.range.start))
            .await
    }

    async fn download_rest(&mut self) -> Result<Option<Segment>, FlightError> {
        let (task, size_bytes) = (*self.blob.table.task(), self.blob.size_bytes());
        let Again {
            flights,
            grant,
            purpose,
        } = self.again.clone();
        if !std::mem::replace(&mut self.rotten, true) {
            tracing::info!(%task, at = self.range.start, "the rest of a rotten blob is downloaded again");
            flights.rotten(&self.blob).await;
        }
        let in_part = self.range.end < size_bytes;
        let flight = flights
            .open(task, grant, purpose, Some(size_bytes), in_part)
            .await?;
        if flight.size_bytes() != size_bytes {
            return Err(FlightError::WrongSize(task));
        }
        let mut download = Box::new(flight.read(vec![self.range.clone()]));
        let first = download.next().await;
        self.download = Some(download);
        first
    }
}
