//! What a manifest names: its configuration and layers, or the manifests of an index; and which of it its registry must have.

use serde::Deserialize;

use crate::digest::Digest;

/// What manifests and indexes of the OCI image spec, and docker's of both schemas, name.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    media_type: Option<String>,
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
    /// The registry took the manifest because it has this in the same repository: registries look for an image's blobs at the
    /// push. They do not for what has URLs, and not all of them do for an index's manifests, nor for what a document names that
    /// can be read as two kinds at once: whoever may push could name what is not there to be read.
    pub vouched: bool,
}

/// Parts that are looked at. An image has at most 127 layers; of what comes after these the registry is asked.
pub const MAX_PARTS: usize = 1024;

/// What manifests of one image are called, where the body says it.
const OF_IMAGES: [&str; 3] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
];

/// What a manifest names, its first [`MAX_PARTS`]. Nothing for what is no manifest.
pub fn parts(body: &[u8]) -> Vec<Part> {
    let Ok(named) = serde_json::from_slice::<Named>(body) else { return Vec::new() };
    let media_type = named.media_type.as_deref();
    let is_image = named.manifests.is_empty() && media_type.is_none_or(|given| OF_IMAGES.contains(&given));
    let new = named.config.into_iter().chain(named.layers).chain(named.manifests);
    let new = new.map(|d| (d.digest, d.size, d.urls.unwrap_or_default()));
    let old = named.fs_layers.into_iter().map(|d| (d.blob_sum, None, Vec::new()));
    new.chain(old)
        .take(MAX_PARTS)
        .filter_map(|(digest, size_bytes, urls)| {
            let vouched = is_image && urls.is_empty();
            Some(Part { digest: digest.parse().ok()?, size_bytes, urls, vouched })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;

    fn digest(n: u8) -> Digest {
        Digest::of(Algorithm::Sha256, &[n])
    }

    fn parts_of(manifest: &serde_json::Value) -> Vec<Part> {
        parts(manifest.to_string().as_bytes())
    }

    #[test]
    fn all_that_a_manifest_names_is_found() {
        let part = |n: u8, size_bytes, urls: &[&str], vouched| Part {
            digest: digest(n),
            size_bytes,
            urls: urls.iter().map(|&url| url.to_owned()).collect(),
            vouched,
        };
        let manifest = serde_json::json!({
            "config": { "digest": digest(1).to_string(), "size": 1 },
            "layers": [
                { "digest": digest(2).to_string(), "size": 2, "urls": ["https://x.example/l"] },
                { "digest": "md5:x", "size": 3 },
            ],
        });
        let named = parts_of(&manifest);
        assert_eq!(named, [part(1, Some(1), &[], true), part(2, Some(2), &["https://x.example/l"], false)]);
        let index = serde_json::json!({ "manifests": [{ "digest": digest(3).to_string() }] });
        assert_eq!(parts_of(&index), [part(3, None, &[], false)]);
        let old = serde_json::json!({ "fsLayers": [{ "blobSum": digest(4).to_string() }] });
        assert_eq!(parts_of(&old), [part(4, None, &[], true)]);
        assert!(parts(b"no manifest").is_empty());
        assert!(parts(b"[1, 2]").is_empty());
    }

    #[test]
    fn a_registry_vouches_for_an_images_blobs_and_for_nothing_that_it_need_not_have_looked_for() {
        let layers = serde_json::json!([{ "digest": digest(1).to_string() }]);
        for (media_type, vouched) in OF_IMAGES.map(|of_image| (of_image, true)).into_iter().chain([
            ("application/vnd.oci.image.index.v1+json", false),
            ("application/vnd.docker.distribution.manifest.list.v2+json", false),
            ("application/x", false),
        ]) {
            let manifest = serde_json::json!({ "mediaType": media_type, "layers": layers });
            assert_eq!(parts_of(&manifest)[0].vouched, vouched, "{media_type}");
        }
        let both = serde_json::json!({ "layers": layers, "manifests": layers });
        assert!(parts_of(&both).iter().all(|part| !part.vouched), "a document of two kinds");
    }

    #[test]
    fn no_more_parts_are_looked_at_than_an_image_can_have() {
        let layer = serde_json::json!({ "digest": digest(1).to_string() });
        let manifest = serde_json::json!({ "layers": vec![layer; 40_000] });
        assert_eq!(parts_of(&manifest).len(), MAX_PARTS);
    }
}
