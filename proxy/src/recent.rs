//! The latest requests for manifests and blobs at the mirror, for `hawker doctor`: it proves from them that a runtime's pull was
//! answered here, and it shows the mirror's own words where it was not.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use hawker_oci::reference::{Asked, Content, ManifestRef};
use serde::{Deserialize, Serialize};

/// Requests that are kept; `hawker doctor` reads them several times a second.
const KEPT: usize = 512;
/// Bytes of a reason that are kept.
const REASON_MAX_BYTES: usize = 300;

/// A request that was answered. Fields that another version lacks are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecentRequest {
    /// `GET` or `HEAD`.
    pub method: String,
    /// The registry; empty where the request named none.
    pub registry: String,
    /// The repository.
    pub repository: String,
    /// `manifest` or `blob`.
    pub kind: String,
    /// The tag or the digest.
    pub reference: String,
    /// The answer's status.
    pub status: u16,
    /// The reason of a refusal; empty for content.
    pub reason: String,
}

/// The content of `/requests?after=N`: the requests with numbers from N on, as far as they are still kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecentPage {
    /// The number that the next request will have: the next `after`.
    pub next: u64,
    /// Requests since `after` that are no longer kept.
    pub missed: u64,
    /// Oldest first.
    pub requests: Vec<RecentRequest>,
}

/// A bounded list of the latest requests.
#[derive(Debug, Default)]
pub struct RecentRequests(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    next: u64,
    requests: VecDeque<RecentRequest>,
}

impl RecentRequest {
    /// A request that is not answered yet; `None` for anything but manifests and blobs. `at` is the registry that a request
    /// without a name in it was sent to.
    pub(crate) fn of(method: &str, asked: &Asked, at: Option<&str>) -> Option<Self> {
        let Asked::Content(request) = asked else {
            return None;
        };
        let (kind, reference) = match &request.content {
            Content::Manifest(ManifestRef::Tag(tag)) => ("manifest", tag.clone()),
            Content::Manifest(ManifestRef::Digest(digest)) => ("manifest", digest.to_string()),
            Content::Blob(digest) => ("blob", digest.to_string()),
            Content::Tags { .. } | Content::Referrers { .. } => return None,
        };
        Some(Self {
            method: method.to_owned(),
            registry: request
                .registry
                .as_deref()
                .or(at)
                .unwrap_or_default()
                .to_owned(),
            repository: request.repository.clone(),
            kind: kind.to_owned(),
            reference,
            ..Self::default()
        })
    }
}

impl RecentRequests {
    /// Keeps a request with its answer.
    pub(crate) fn answered(&self, mut request: RecentRequest, status: u16, mut reason: String) {
        let mut end = reason.len().min(REASON_MAX_BYTES);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        reason.truncate(end);
        (request.status, request.reason) = (status, reason);
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.next += 1;
        if ring.requests.len() == KEPT {
            ring.requests.pop_front();
        }
        ring.requests.push_back(request);
    }

    /// The requests with numbers from `after` on.
    pub fn after(&self, after: u64) -> RecentPage {
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = ring.next - ring.requests.len() as u64;
        let known = usize::try_from(after.saturating_sub(oldest)).unwrap_or(usize::MAX);
        RecentPage {
            next: ring.next,
            missed: oldest.saturating_sub(after),
            requests: ring.requests.iter().skip(known).cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use hawker_oci::reference;

    use super::*;

    fn request(path: &str) -> Option<RecentRequest> {
        RecentRequest::of(
            "GET",
            &reference::parse("GET", path, Some("ns=quay.io")).unwrap(),
            None,
        )
    }

    #[test]
    fn only_manifests_and_blobs_are_kept_with_their_names() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let blob = request(&format!("/v2/a/b/blobs/{digest}")).unwrap();
        assert_eq!(
            (blob.kind.as_str(), blob.registry.as_str()),
            ("blob", "quay.io")
        );
        assert_eq!((blob.repository.as_str(), blob.reference), ("a/b", digest));
        assert_eq!(request("/v2/a/b/manifests/v1").unwrap().reference, "v1");
        assert_eq!(request("/v2/a/b/tags/list"), None);
        assert_eq!(request("/v2/"), None);
        let named = reference::parse_at("reg:5000", "GET", "/v2/a/manifests/v1", None).unwrap();
        assert_eq!(
            RecentRequest::of("GET", &named, Some("reg:5000"))
                .unwrap()
                .registry,
            "reg:5000"
        );
    }

    #[test]
    fn a_reader_gets_each_request_once_and_learns_of_those_that_were_dropped() {
        let recent = RecentRequests::default();
        let add = |n: usize| {
            for number in 0..n {
                recent.answered(
                    request("/v2/a/manifests/v1").unwrap(),
                    200,
                    format!("{number}"),
                );
            }
        };
        assert_eq!(recent.after(0), RecentPage::default());
        add(3);
        let page = recent.after(1);
        assert_eq!((page.next, page.missed, page.requests.len()), (3, 0, 2));
        assert_eq!(page.requests[0].reason, "1");
        assert!(recent.after(3).requests.is_empty() && recent.after(u64::MAX).requests.is_empty());
        add(KEPT + 5);
        let page = recent.after(3);
        assert_eq!((page.missed, page.requests.len()), (5, KEPT));
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let recent = RecentRequests::default();
        recent.answered(RecentRequest::default(), 502, "é".repeat(REASON_MAX_BYTES));
        assert_eq!(
            recent.after(0).requests[0].reason,
            "é".repeat(REASON_MAX_BYTES / 2)
        );
    }
}
