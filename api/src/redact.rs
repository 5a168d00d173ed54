//! Messages that carry secrets, shown without them.

use std::fmt;

use crate::v1::{Interest, JoinRequest, ManifestRequest};

impl fmt::Debug for Interest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            task,
            source,
            size_bytes,
            token: _,
            purpose,
            far_share,
            passive,
            partial,
        } = self;
        f.debug_struct("Interest")
            .field("task", task)
            .field("source", source)
            .field("size_bytes", size_bytes)
            .field("purpose", purpose)
            .field("far_share", far_share)
            .field("passive", passive)
            .field("partial", partial)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ManifestRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            request,
            source,
            digest,
            token: _,
        } = self;
        f.debug_struct("ManifestRequest")
            .field("request", request)
            .field("source", source)
            .field("digest", digest)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            version,
            token_id,
            token_secret: _,
            certificate_request: _,
            name,
        } = self;
        f.debug_struct("JoinRequest")
            .field("version", version)
            .field("token_id", token_id)
            .field("name", name)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_secret_is_shown() {
        let secret = "s3cret".to_owned();
        let interest = Interest {
            token: secret.clone(),
            ..Interest::default()
        };
        let manifest = ManifestRequest {
            token: secret.clone(),
            ..ManifestRequest::default()
        };
        let join = JoinRequest {
            token_secret: secret.clone(),
            ..JoinRequest::default()
        };
        for shown in [
            format!("{interest:?}"),
            format!("{manifest:?}"),
            format!("{join:?}"),
        ] {
            assert!(!shown.contains(&secret), "{shown}");
        }
    }
}
