//! The gate of a reader whose bytes came from elsewhere than its own registry. It shows bytes that this registry gave,
//! or has proved to have.

use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use hawker_core::piece::{PieceIndex, PieceLayout, PieceSet};
use http::HeaderMap;
use tokio::time::Instant;

use super::Flight;
use crate::download::{FILE_SEGMENT_BYTES, FlightError, State};
use crate::proof::{Asking, Proofs, Unproved};

/// An issuer's word about where a piece came from may arrive a moment after the piece.
const WORD_WITHIN: Duration = Duration::from_millis(100);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A further proof is asked for once half as much again is here, or after this long.
const PROOF_EVERY: Duration = Duration::from_secs(5);

/// Holds bytes back until the reader's registry gave them or has proved to have them.
///
/// A proof covers the pieces that were here when it was made. While more come in, further proofs follow: a registry that has only
/// the beginning of a blob opens no more than that.
pub(crate) struct Gate {
    proofs: Arc<Proofs>,
    client: IpAddr,
    /// The headers for requests to the registry.
    headers: HeaderMap,
    /// Pieces that a proof covers.
    passed: Option<PieceSet>,
    /// The piece that is held back, and since when.
    held_back: Option<(PieceIndex, Instant)>,
}

impl Gate {
    pub(crate) const fn new(proofs: Arc<Proofs>, client: IpAddr, headers: HeaderMap) -> Self {
        Self {
            proofs,
            client,
            headers,
            passed: None,
            held_back: None,
        }
    }

    /// All that was here turned out to be wrong: proofs were about other bytes.
    pub(super) fn begin_anew(&mut self) {
        self.passed = None;
    }

    /// How far bytes may be shown, from the start of `bytes` on; no further than a reader takes at once.
    pub(super) fn open_to(&self, flight: &Flight, layout: PieceLayout, bytes: Range<u64>) -> u64 {
        let (task, registry) = (&flight.shared.task, &flight.grant.source.registry);
        let end = bytes.end.min(bytes.start + FILE_SEGMENT_BYTES);
        if self.proofs.is_proved(registry, task) {
            return end;
        }
        let mut at = bytes.start;
        while at < end {
            let piece = layout.containing(at);
            let passed = self
                .passed
                .as_ref()
                .is_some_and(|passed| passed.contains(piece));
            if !passed && !self.proofs.has_given(registry, task, piece) {
                break;
            }
            at = layout.range(piece).end.min(end);
        }
        at
    }

    /// Waits for the issuer's word about the piece at `at`, or makes the registry prove that it has what is here. The caller looks
    /// again afterwards.
    pub(super) async fn pass(
        &mut self,
        flight: &Flight,
        layout: PieceLayout,
        at: u64,
    ) -> Result<(), FlightError> {
        let piece = layout.containing(at);
        let since = match self.held_back {
            Some((held_back, since)) if held_back == piece => since.elapsed(),
            _ => {
                self.held_back = Some((piece, Instant::now()));
                Duration::ZERO
            }
        };
        if since < WORD_WITHIN {
            tokio::time::sleep(LOOK_EVERY).await;
            return Ok(());
        }
        let (shared, source) = (&flight.shared, &flight.grant.source);
        let (mut news, whole, epoch) = {
            let state = shared.lock();
            let whole = state.shown.as_ref().is_some_and(PieceSet::is_full);
            (readable(&state, layout), whole, state.epoch)
        };
        let passed = self
            .passed
            .get_or_insert_with(|| PieceSet::empty(layout.count()));
        news.subtract(passed);
        self.proofs
            .subtract_given(&source.registry, &shared.task, &mut news);
        let enough = passed.is_empty() || whole || news.len() >= passed.len().div_ceil(2);
        if news.is_empty() || !enough && since < PROOF_EVERY {
            tokio::time::sleep(LOOK_EVERY).await;
            return Ok(());
        }
        let held: Vec<Range<u64>> = news.iter().map(|piece| layout.range(piece)).collect();
        let asking = Asking {
            source,
            headers: self.headers.clone(),
            client: self.client,
        };
        let read = |bytes: &Range<u64>| shared.lock().bytes_at(bytes.start, bytes.end);
        self.proofs
            .challenge(&asking, &shared.task, &held, read)
            .await
            .map_err(|reason| match reason {
                Unproved::Unclear(task) => FlightError::Unprovable(task),
                Unproved::Refused(status, _) => FlightError::Origin(status.as_u16()),
                reason => FlightError::Unproved(reason.to_string()),
            })?;
        if shared.lock().epoch != epoch {
            return Ok(());
        }
        passed.unite(&news);
        if whole {
            self.proofs.note(&source.registry, &shared.task);
        }
        Ok(())
    }
}

/// The pieces whose bytes a reader could take now.
fn readable(state: &State, layout: PieceLayout) -> PieceSet {
    let mut pieces = PieceSet::empty(layout.count());
    for piece in state.shown.iter().flat_map(PieceSet::iter) {
        let in_file =
            state.file.is_some() && state.written.as_ref().is_some_and(|w| w.contains(piece));
        if in_file || state.hot.contains_key(&piece) {
            pieces.insert(piece);
        }
    }
    pieces
}
