//! A registry's blob: read through the mirror's origin client, with the rights of the clients who want it.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use hawker_core::node::Failure;
use hawker_core::piece::MAX_BLOB_BYTES;
use hawker_oci::digest::Digest;
use http::header::{ACCEPT_RANGES, RANGE};
use http::{HeaderMap, Response, StatusCode};
use tokio::sync::watch;

use super::{Ask, Opened, Source, SourceBody, SourceError, SourceFuture};
use crate::grant::Grant;
use crate::origin::ranges::{Answered, content_range_size, range_header, skip};
use crate::origin::{Content, Origin, OriginBody, OriginError, Target, content_length};

/// One blob at the registries that its clients named.
pub(crate) struct RegistryBlob {
    pub(crate) origin: Origin,
    pub(crate) task: Digest,
    /// The newest last: clients bring fresh tokens while it is read.
    pub(crate) grants: watch::Receiver<Vec<Grant>>,
}

impl Source for RegistryBlob {
    fn open(&self, ask: Ask) -> SourceFuture<'_, Result<Opened, SourceError>> {
        Box::pin(self.open_by_any_grant(ask))
    }

    fn place(&self) -> String {
        self.grants
            .borrow()
            .last()
            .map(|grant| grant.source.registry.clone())
            .unwrap_or_default()
    }
}

impl RegistryBlob {
    /// Tries each grant once, the newest first, until one opens the blob.
    async fn open_by_any_grant(&self, ask: Ask) -> Result<Opened, SourceError> {
        let mut tried: Vec<Grant> = Vec::new();
        let mut last = SourceError::Final {
            failure: Failure::Unreachable,
            reason: "no registry is known for it".to_owned(),
        };
        while let Some(grant) = self.untried(&tried) {
            match self.open_by(&grant, &ask).await {
                Ok(opened) => return Ok(opened),
                Err(error) => last = error,
            }
            tried.push(grant);
        }
        Err(last)
    }

    fn untried(&self, tried: &[Grant]) -> Option<Grant> {
        self.grants
            .borrow()
            .iter()
            .rev()
            .find(|grant| !tried.contains(grant))
            .cloned()
    }

    async fn open_by(&self, grant: &Grant, ask: &Ask) -> Result<Opened, SourceError> {
        let Some(range) = ask.range.as_ref().filter(|range| !range.is_empty()) else {
            return self.open_whole(grant, ask).await;
        };
        let answer = self.get(grant, Some(range)).await?;
        match Answered::of(answer.status(), answer.headers(), range.start, true) {
            Answered::From(start) if answer.status() == StatusCode::PARTIAL_CONTENT => {
                let size_bytes = match told_size(&answer, ask) {
                    Err(SourceError::Final {
                        failure: Failure::UnknownLength,
                        ..
                    }) => {
                        return self.open_whole(grant, ask).await;
                    }
                    told => told?,
                };
                let (body, first) = skip(answer.into_body(), range.start - start)
                    .await
                    .map_err(broken)?;
                let body = Box::new(Rest { first, body });
                let place = place(grant);
                Ok(Opened {
                    size_bytes,
                    is_range: true,
                    takes_ranges: true,
                    place,
                    body,
                })
            }
            Answered::From(_) => opened_whole(answer, grant, ask),
            Answered::NoRanges => self.open_whole(grant, ask).await,
            Answered::Nothing(status) if may_refuse_ranges(status, range.start) => self
                .open_whole(grant, ask)
                .await
                .map_err(|_| refused(status)),
            Answered::Nothing(status) => Err(refused(status)),
        }
    }

    async fn open_whole(&self, grant: &Grant, ask: &Ask) -> Result<Opened, SourceError> {
        let answer = self.get(grant, None).await?;
        match Answered::of(answer.status(), answer.headers(), 0, false) {
            Answered::From(_) => opened_whole(answer, grant, ask),
            Answered::NoRanges => Err(refused(answer.status())),
            Answered::Nothing(status) => Err(refused(status)),
        }
    }

    async fn get(
        &self,
        grant: &Grant,
        range: Option<&Range<u64>>,
    ) -> Result<Response<OriginBody>, SourceError> {
        let target = Target {
            source: grant.source.clone(),
            content: Content::Blob(self.task),
        };
        let mut headers: HeaderMap = grant.headers();
        let range = range.and_then(|range| range_header(range.start, range.end));
        headers.extend(range.map(|range| (RANGE, range)));
        self.origin
            .get(&target, &headers)
            .await
            .map_err(|error| match error {
                OriginError::Forbidden(_) => SourceError::Final {
                    failure: Failure::Status(StatusCode::FORBIDDEN.as_u16()),
                    reason: error.to_string(),
                },
                error => broken(error),
            })
    }
}

/// Whether a refusal may be meant for the range, not for the blob. Filters on the way to a registry refuse partial downloads, some of
/// them with a server's error; a real one of these would cost what is here already, so that they count at the start only.
fn may_refuse_ranges(status: StatusCode, start: u64) -> bool {
    match status {
        StatusCode::FORBIDDEN
        | StatusCode::NOT_FOUND
        | StatusCode::CONFLICT
        | StatusCode::PAYLOAD_TOO_LARGE => true,
        StatusCode::INTERNAL_SERVER_ERROR
        | StatusCode::BAD_GATEWAY
        | StatusCode::GATEWAY_TIMEOUT => start == 0,
        _ => false,
    }
}

fn place(grant: &Grant) -> Arc<str> {
    Arc::from(grant.source.registry.as_str())
}

fn opened_whole(
    answer: Response<OriginBody>,
    grant: &Grant,
    ask: &Ask,
) -> Result<Opened, SourceError> {
    let size_bytes = told_size(&answer, ask)?;
    let takes_ranges = answer
        .headers()
        .get(ACCEPT_RANGES)
        .is_some_and(|value| value.as_bytes() == b"bytes");
    let body = Box::new(Rest {
        first: Bytes::new(),
        body: answer.into_body(),
    });
    Ok(Opened {
        size_bytes,
        is_range: false,
        takes_ranges,
        place: place(grant),
        body,
    })
}

/// The blob's size as an answer tells it, if that is the size that is known.
fn told_size(answer: &Response<OriginBody>, ask: &Ask) -> Result<Option<u64>, SourceError> {
    let told = match answer.status() {
        StatusCode::PARTIAL_CONTENT => content_range_size(answer.headers()),
        _ => content_length(answer.headers()),
    };
    let told = told.filter(|size| *size <= MAX_BLOB_BYTES);
    match (ask.size_bytes, told) {
        (Some(known), Some(told)) if known != told => {
            let reason = format!("it says {told} bytes where {known} are known");
            Err(SourceError::Final {
                failure: Failure::WrongSize,
                reason,
            })
        }
        (None, None) => {
            let reason = "it does not say how long the blob is".to_owned();
            Err(SourceError::Final {
                failure: Failure::UnknownLength,
                reason,
            })
        }
        _ => Ok(told),
    }
}

fn refused(status: StatusCode) -> SourceError {
    match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => SourceError::Throttled {
            status: status.as_u16(),
        },
        _ => SourceError::Final {
            failure: Failure::Status(status.as_u16()),
            reason: format!("it answered {status}"),
        },
    }
}

fn broken(error: OriginError) -> SourceError {
    SourceError::Broken(error.to_string())
}

/// A body, and the bytes that were read of it already.
struct Rest {
    first: Bytes,
    body: OriginBody,
}

impl SourceBody for Rest {
    fn next(&mut self) -> SourceFuture<'_, Option<Result<Bytes, SourceError>>> {
        Box::pin(async move {
            if !self.first.is_empty() {
                return Some(Ok(std::mem::take(&mut self.first)));
            }
            Some(self.body.next().await?.map_err(broken))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::suite;
    use super::*;
    use crate::origin::testing::{TestRegistry, knowing, origin, say};

    fn blob() -> Vec<u8> {
        (0..300_000_u32).map(|at| (at / 7) as u8).collect()
    }

    /// A registry whose answer to a range, if it names one, is this status; 206: the range.
    async fn source_before(status: u16) -> (RegistryBlob, TestRegistry) {
        let blob = blob();
        let task = Digest::of(hawker_oci::digest::Algorithm::Sha256, &blob);
        let registry = TestRegistry::start(move |seen| {
            let range = seen
                .header("range")
                .and_then(|range| range.strip_prefix("bytes="));
            let range = range.and_then(|range| range.split_once('-'));
            match (range, status) {
                (None, _) => say(seen, 200, &[("Accept-Ranges", "bytes")], &blob),
                (Some((first, last)), 206) => {
                    let (first, last): (usize, usize) =
                        (first.parse().unwrap(), last.parse().unwrap());
                    let told = format!("bytes {first}-{last}/{}", blob.len());
                    say(seen, 206, &[("Content-Range", &told)], &blob[first..=last])
                }
                (Some(_), status) => say(seen, status, &[], b"no"),
            }
        })
        .await;
        let grant = Grant {
            source: registry.source("a/b"),
            authorization: None,
        };
        let (_, grants) = watch::channel(vec![grant]);
        (
            RegistryBlob {
                origin: origin(&knowing(&[&registry])),
                task,
                grants,
            },
            registry,
        )
    }

    #[tokio::test]
    async fn a_registry_honours_ranges() {
        let (source, _registry) = source_before(206).await;
        suite::honours_ranges(&source, &blob()).await;
    }

    #[tokio::test]
    async fn a_registry_that_refuses_ranges_is_asked_for_the_whole() {
        for (status, start, is_given) in [
            (400, 5, true),
            (403, 5, true),
            (404, 5, true),
            (409, 5, true),
            (413, 5, true),
            (416, 5, true),
            (500, 0, true),
            (502, 0, true),
            (504, 0, true),
            // Bytes that are here already would be read again.
            (500, 5, false),
            (401, 0, false),
            (429, 0, false),
            (503, 0, false),
        ] {
            let (source, _registry) = source_before(status).await;
            let opened = source
                .open(Ask {
                    range: Some(start..9),
                    size_bytes: Some(300_000),
                })
                .await;
            assert_eq!(opened.is_ok(), is_given, "{status} from {start}");
            if let Ok(opened) = opened {
                assert!(!opened.is_range);
                assert_eq!(suite::collect(opened).await, Ok(blob()));
            }
        }
    }
}
