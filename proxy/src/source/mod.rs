//! Places outside the cluster that a blob can be read from.
//!
//! A [`Source`] answers range requests for one blob. [`registry`] reads a registry's blob; the in-memory one serves tests. Further
//! sources arrive as one file each: everything above them sees this trait only.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use hawker_core::node::Failure;

#[cfg(test)]
pub(crate) mod memory;
mod registry;

pub(crate) use registry::RegistryBlob;

/// A future that a source returns.
pub(crate) type SourceFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One blob at one place.
pub(crate) trait Source: Send + Sync + 'static {
    /// Asks for the blob, or for a part of it.
    ///
    /// A source that knows no ranges answers with the whole blob.
    fn open(&self, ask: Ask) -> SourceFuture<'_, Result<Opened, SourceError>>;

    /// The name of the place that is asked first. All blobs of one place share its bounds.
    fn place(&self) -> String;
}

/// A request to a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ask {
    /// These bytes; `None`: the whole blob, by a plain request.
    pub(crate) range: Option<Range<u64>>,
    /// The blob's size, where it is known: a source that has another blob is of no use.
    pub(crate) size_bytes: Option<u64>,
}

/// An answer whose bytes are still to come.
pub(crate) struct Opened {
    /// The blob's size, where the answer tells it.
    pub(crate) size_bytes: Option<u64>,
    /// The bytes begin where the range does that was asked for. Else they are those of the whole blob.
    pub(crate) is_range: bool,
    /// The source says that it takes ranges, or has just taken one.
    pub(crate) takes_ranges: bool,
    /// The name of the place that gives the bytes.
    pub(crate) place: Arc<str>,
    /// The bytes.
    pub(crate) body: Box<dyn SourceBody>,
}

/// The bytes of an answer, in order.
pub(crate) trait SourceBody: Send {
    /// The next bytes, at most 64 KiB; `None` at the end.
    fn next(&mut self) -> SourceFuture<'_, Option<Result<Bytes, SourceError>>>;
}

/// Why a source gave nothing, or no more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SourceError {
    /// The source answered, and another try will not change the answer.
    #[error("{reason}")]
    Final {
        /// The meaning for the download.
        failure: Failure,
        /// For people.
        reason: String,
    },
    /// The source asks for fewer requests.
    #[error("it answered {status}: it asks for fewer requests")]
    Throttled {
        /// The status of its answer.
        status: u16,
    },
    /// The answer broke off or never came; another try may help.
    #[error("{0}")]
    Broken(String),
}

#[cfg(test)]
pub(crate) mod suite {
    //! The behaviour that all sources share.

    use super::*;

    fn plain() -> Ask {
        Ask {
            range: None,
            size_bytes: None,
        }
    }

    /// Reads a whole answer.
    pub(crate) async fn collect(mut opened: Opened) -> Result<Vec<u8>, SourceError> {
        let mut all = Vec::new();
        while let Some(bytes) = opened.body.next().await {
            let bytes = bytes?;
            assert!(
                !bytes.is_empty() && bytes.len() <= 64 << 10,
                "{} bytes at once",
                bytes.len()
            );
            all.extend_from_slice(&bytes);
        }
        Ok(all)
    }

    /// A source that holds `blob` and honours ranges.
    pub(crate) async fn honours_ranges(source: &dyn Source, blob: &[u8]) {
        let size = blob.len() as u64;
        let whole = source.open(plain()).await.expect("the blob is there");
        assert_eq!((whole.size_bytes, whole.is_range), (Some(size), false));
        assert_eq!(collect(whole).await.as_deref(), Ok(blob));
        for range in [
            0..1,
            0..size,
            5..size,
            size / 2..size / 2 + 7,
            size - 1..size,
        ] {
            let ask = Ask {
                range: Some(range.clone()),
                size_bytes: Some(size),
            };
            let opened = source.open(ask).await.expect("the range is there");
            let told = (opened.size_bytes, opened.is_range, opened.takes_ranges);
            assert_eq!(told, (Some(size), true, true), "{range:?}");
            let part = &blob[range.start as usize..range.end as usize];
            assert_eq!(collect(opened).await.as_deref(), Ok(part), "{range:?}");
        }
        let other = source
            .open(Ask {
                size_bytes: Some(size + 1),
                ..plain()
            })
            .await;
        assert!(matches!(
            other,
            Err(SourceError::Final {
                failure: Failure::WrongSize,
                ..
            })
        ));
    }
}
