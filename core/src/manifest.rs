//! What a manifest names: its configuration and layers, or the manifests of an index.

use serde::Deserialize;

use crate::digest::Digest;

/// What manifests and indexes of the OCI image spec, and docker's of both schemas, name.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
    #[serde(default)]
    fs_layers: Vec<OldDescriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    size: Option<u64>,
    urls: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OldDescriptor {
    blob_sum: String,
}

/// One thing that a manifest names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its digest.
    pub digest: Digest,
    /// Its size, where the manifest tells it.
    pub size_bytes: Option<u64>,
    /// Where it may be had if the registry does not have it (image spec, "Content Descriptors").
    pub urls: Vec<String>,
}

/// All that a manifest names. Nothing for what is no manifest.
pub fn parts(body: &[u8]) -> Vec<Part> {
    let Ok(named) = serde_json::from_slice::<Named>(body) else { return Vec::new() };
    let new = named.config.into_iter().chain(named.layers).chain(named.manifests);
    let new = new.map(|d| (d.digest, d.size, d.urls.unwrap_or_default()));
    let old = named.fs_layers.into_iter().map(|d| (d.blob_sum, None, Vec::new()));
    new.chain(old)
        .filter_map(|(digest, size_bytes, urls)| {
            Some(Part { digest: digest.parse().ok()?, size_bytes, urls })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;

    #[test]
    fn all_that_a_manifest_names_is_found() {
        let digest = |n: u8| Digest::of(Algorithm::Sha256, &[n]);
        let part = |n: u8, size_bytes, urls: &[&str]| Part {
            digest: digest(n),
            size_bytes,
            urls: urls.iter().map(|&url| url.to_owned()).collect(),
        };
        let manifest = serde_json::json!({
            "config": { "digest": digest(1).to_string(), "size": 1 },
            "layers": [
                { "digest": digest(2).to_string(), "size": 2, "urls": ["https://x.example/l"] },
                { "digest": "md5:x", "size": 3 },
            ],
        });
        let named = parts(manifest.to_string().as_bytes());
        assert_eq!(named, [part(1, Some(1), &[]), part(2, Some(2), &["https://x.example/l"])]);
        let index = serde_json::json!({ "manifests": [{ "digest": digest(3).to_string() }] });
        assert_eq!(parts(index.to_string().as_bytes()), [part(3, None, &[])]);
        let old = serde_json::json!({ "fsLayers": [{ "blobSum": digest(4).to_string() }] });
        assert_eq!(parts(old.to_string().as_bytes()), [part(4, None, &[])]);
        assert!(parts(b"no manifest").is_empty());
        assert!(parts(b"[1, 2]").is_empty());
    }
}
