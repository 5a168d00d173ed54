//! The media types that registries told of manifests: each counts for its own registry and repository, and only where the
//! manifest's bytes do not say it.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ::lru::LruCache;
use hawker_core::lru;
use hawker_oci::digest::Digest;
use hawker_oci::media_type;
use hawker_oci::reference::Source;
use http::HeaderMap;
use http::header::CONTENT_TYPE;

/// Manifests remembered. Nearly all say their type themselves.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

pub(super) struct Told(Mutex<LruCache<(Source, Digest), Box<str>>>);

impl Told {
    pub(super) fn new() -> Self {
        Self(Mutex::new(lru::bounded(CAPACITY)))
    }

    fn all(&self) -> MutexGuard<'_, LruCache<(Source, Digest), Box<str>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what an answer about a manifest tells, unless it tells nothing.
    pub(super) fn note(&self, source: &Source, digest: &Digest, head: &HeaderMap) {
        if let Some(told) = told(head).filter(|told| media_type::is_specific(told)) {
            self.all().put((source.clone(), *digest), told.into());
        }
    }

    pub(super) fn get(&self, source: &Source, digest: &Digest) -> Option<Box<str>> {
        self.all().get(&(source.clone(), *digest)).cloned()
    }
}

/// The media type that an answer tells, in its normal form. Of several lines the first that can be a manifest's counts.
pub(super) fn told(head: &HeaderMap) -> Option<String> {
    let lines = head
        .get_all(CONTENT_TYPE)
        .iter()
        .filter_map(|line| line.to_str().ok());
    let types: Vec<String> = lines.filter_map(media_type::normal).collect();
    let specific = types.iter().find(|told| media_type::is_specific(told));
    specific.or(types.first()).cloned()
}
