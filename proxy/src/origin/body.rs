//! A response's body, as it comes from a registry.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::{Instant, timeout};

use super::OriginError;
use super::parking::{Lot, Ticket};
use super::request::reasons;
use crate::limits::{Direction, Limits};
use crate::metrics::Metrics;

/// Between two frames of a body.
const BODY_IDLE: Duration = Duration::from_secs(30);
/// The part of a body handed out at once, and charged to the rate at once.
pub(super) const FRAME_BYTES: usize = 64 << 10;

/// A body from the origin, frame by frame, each wait with a deadline, charged to the origin's rate.
pub struct OriginBody {
    pub(super) incoming: Option<Incoming>,
    /// Bytes that came and are not handed out yet.
    pub(super) pending: Bytes,
    /// The bytes that the origin still owes, if it said how many there are.
    pub(super) remaining_bytes: Option<u64>,
    pub(super) registry: String,
    pub(super) limits: Limits,
    pub(super) metrics: Arc<Metrics>,
    /// The place for bodies whose clients are busy with what came before.
    pub(super) lot: Arc<Lot<OriginBody>>,
}

impl OriginBody {
    /// The next bytes, at most 64 KiB; `None` at the end. A body that ends before its Content-Length is `Broken`.
    pub async fn next(&mut self) -> Option<Result<Bytes, OriginError>> {
        let frame = self.frame().await.transpose()?;
        if frame.is_err() {
            self.incoming = None;
            self.pending.clear();
        }
        Some(frame)
    }

    async fn frame(&mut self) -> Result<Option<Bytes>, OriginError> {
        if self.pending.is_empty() {
            match self.receive().await? {
                Some(data) => self.pending = data,
                None => return Ok(None),
            }
        }
        let frame = self.pending.split_to(self.pending.len().min(FRAME_BYTES));
        self.metrics.received_origin.inc_by(frame.len() as u64);
        self.limits
            .take(Direction::Origin, frame.len() as u64)
            .await;
        Ok(Some(frame))
    }

    /// The bytes that the connection has read; not empty.
    async fn receive(&mut self) -> Result<Option<Bytes>, OriginError> {
        loop {
            let Some(incoming) = &mut self.incoming else {
                return Ok(None);
            };
            let frame = match timeout(BODY_IDLE, incoming.frame()).await {
                Err(_) => {
                    return Err(self.broken(format!("nothing came for {} s", BODY_IDLE.as_secs())));
                }
                Ok(Some(Err(e))) => return Err(self.broken(reasons(&e))),
                Ok(Some(Ok(frame))) => frame,
                Ok(None) => {
                    self.incoming = None;
                    return match self.remaining_bytes {
                        Some(missing @ 1..) => {
                            Err(self.broken(format!("{missing} bytes are missing")))
                        }
                        _ => Ok(None),
                    };
                }
            };
            let Ok(data) = frame.into_data() else {
                continue;
            };
            if data.is_empty() {
                continue;
            }
            if let Some(remaining) = &mut self.remaining_bytes {
                let Some(rest) = remaining.checked_sub(data.len() as u64) else {
                    return Err(self.broken("it sent more than it said".to_owned()));
                };
                *remaining = rest;
            }
            return Ok(Some(data));
        }
    }

    fn broken(&self, reason: String) -> OriginError {
        OriginError::Broken {
            registry: self.registry.clone(),
            reason,
        }
    }
}

/// A body that is passed through to one client. It is parked while the client takes what was read of it.
pub(crate) struct PassedBody {
    place: Option<Place>,
    may_wait: Duration,
    registry: String,
}

enum Place {
    Here(OriginBody),
    Parked(Ticket<OriginBody>),
}

impl PassedBody {
    /// A body that may give way to others once its client has not read for `may_wait`.
    pub(crate) fn new(body: OriginBody, may_wait: Duration) -> Self {
        let registry = body.registry.clone();
        Self {
            place: Some(Place::Here(body)),
            may_wait,
            registry,
        }
    }

    /// The next bytes, at most 64 KiB; `None` at the end. [`OriginError::GaveWay`] when the body was dropped meanwhile.
    pub(crate) async fn next(&mut self) -> Option<Result<Bytes, OriginError>> {
        let mut body = match self.place.take()? {
            Place::Here(body) => body,
            Place::Parked(ticket) => match ticket.take() {
                Some(body) => body,
                None => {
                    return Some(Err(OriginError::GaveWay {
                        registry: self.registry.clone(),
                    }));
                }
            },
        };
        let next = body.next().await;
        if matches!(next, Some(Ok(_))) {
            let lot = Arc::clone(&body.lot);
            self.place = Some(Place::Parked(lot.park(Instant::now(), body, self.may_wait)));
        }
        next
    }
}
