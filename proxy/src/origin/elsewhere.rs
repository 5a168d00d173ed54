//! Blobs that a registry does not have itself: manifests name URLs for layers that may not be distributed with the rest (OCI image
//! spec, "Descriptors", `urls`).
//!
//! A person who may push a manifest chooses these URLs. So they are treated like registries that only a client named:
//! public addresses, no credentials, TLS, no authorities but the system's. Their bytes are verified by the digest like
//! all others.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::lru::LruCache;
use hawker_core::lru;
use hawker_oci::digest::Digest;
use hawker_oci::manifest::{MAX_URLS, Part};
use hawker_oci::reference::Source;
use url::Url;

use super::{Content, Target};

/// Blobs remembered.
const CAPACITY: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
/// Longest URL remembered.
const MAX_URL_BYTES: usize = 2048;

/// The other places of a blob besides its registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Elsewhere {
    /// The manifest that says so.
    pub(crate) manifest: Digest,
    /// How long it is, as that says.
    pub(crate) size_bytes: Option<u64>,
    /// In the order in which it names them.
    pub(super) urls: Vec<Url>,
}

/// The remembered URLs, each for the repository whose manifest it was in.
pub(super) struct Remembered(Mutex<LruCache<(Source, Digest), Arc<Elsewhere>>>);

impl Remembered {
    pub(super) fn new() -> Self {
        Self(Mutex::new(lru::bounded(CAPACITY)))
    }

    fn all(&self) -> MutexGuard<'_, LruCache<(Source, Digest), Arc<Elsewhere>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `manifest`, read from `source`, names this part.
    pub(super) fn note(&self, source: &Source, manifest: &Digest, part: &Part) {
        let urls: Vec<Url> = part
            .urls
            .iter()
            .filter_map(|url| usable(url))
            .take(MAX_URLS)
            .collect();
        if !urls.is_empty() {
            let elsewhere = Elsewhere {
                manifest: *manifest,
                size_bytes: part.size_bytes,
                urls,
            };
            self.all()
                .put((source.clone(), part.digest), Arc::new(elsewhere));
        }
    }

    /// The known URLs of the blob.
    pub(super) fn of(&self, target: &Target) -> Option<Arc<Elsewhere>> {
        let Content::Blob(blob) = &target.content else {
            return None;
        };
        self.all().get(&(target.source.clone(), *blob)).cloned()
    }
}

/// The URL, if it is one that a blob may be fetched from. A name and password in it are nobody's to use.
fn usable(text: &str) -> Option<Url> {
    let mut url = Url::parse(text)
        .ok()
        .filter(|url| text.len() <= MAX_URL_BYTES && url.has_host())?;
    url.set_fragment(None);
    let bare = url.set_username("").is_ok() && url.set_password(None).is_ok();
    (bare && matches!(url.scheme(), "http" | "https")).then_some(url)
}

#[cfg(test)]
mod tests {
    use hawker_oci::digest::Algorithm;

    use super::*;

    #[test]
    fn urls_are_remembered_for_the_repository_whose_manifest_names_them() {
        let digest = |n: u8| Digest::of(Algorithm::Sha256, &[n]);
        let source = |name: &str| Source {
            registry: "r.example".into(),
            repository: name.into(),
        };
        let target = |name: &str, n: u8| Target {
            source: source(name),
            content: Content::Blob(digest(n)),
        };
        let long = format!("https://x.example/{}", "a".repeat(MAX_URL_BYTES));
        let urls = [
            "file:///etc/passwd",
            "ftp://x.example/l",
            "nonsense",
            "http://",
            &long,
        ]
        .into_iter()
        .chain([
            "https://me:secret@x.example/layer?a=b#c",
            "http://10.0.0.1/l",
        ])
        .map(str::to_owned);
        let remembered = Remembered::new();
        let part = |n, urls| Part {
            digest: digest(n),
            size_bytes: Some(9),
            urls,
            vouched: false,
        };
        remembered.note(&source("a"), &digest(0), &part(1, urls.collect()));
        remembered.note(
            &source("a"),
            &digest(0),
            &part(2, vec!["gopher://x.example".to_owned()]),
        );
        let known = remembered.of(&target("a", 1)).unwrap();
        let told: Vec<&str> = known.urls.iter().map(Url::as_str).collect();
        assert_eq!(told, ["https://x.example/layer?a=b", "http://10.0.0.1/l"]);
        assert_eq!((known.manifest, known.size_bytes), (digest(0), Some(9)));
        assert_eq!(remembered.of(&target("a", 2)), None);
        assert_eq!(remembered.of(&target("b", 1)), None);
        let manifest = Content::Manifest(digest(1).to_string());
        assert_eq!(
            remembered.of(&Target {
                source: source("a"),
                content: manifest
            }),
            None
        );
    }
}
