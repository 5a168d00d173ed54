//! What an image's manifest names: its configuration and layers; and which of it its registry must have.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::digest::Digest;

/// Parts that are looked at. An image has at most 127 layers; of what comes after these the registry is asked.
pub const MAX_PARTS: usize = 1024;
/// URLs of one part that are looked at.
pub const MAX_URLS: usize = 4;

/// What manifests of one image are called, where the body says it.
const OF_IMAGES: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];

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
    /// push. They do not for what has URLs, nor, all of them, for an index's manifests; and of a document that can be read in
    /// two ways nobody knows which one they looked at. Whoever may push could name what is not there to be read.
    pub vouched: bool,
}

/// The configuration and the layers that a manifest names, the first [`MAX_PARTS`]. Nothing for what is no manifest.
pub fn parts(body: &[u8]) -> Vec<Part> {
    let Ok(named) = serde_json::from_slice::<Named>(body) else { return Vec::new() };
    let media_type = named.media_type.as_deref();
    let is_image = named.plain && media_type.is_none_or(|given| OF_IMAGES.contains(&given));
    let layers = named.layers.map_or_else(Vec::new, |layers| layers.0);
    let descriptors = named.config.into_iter().chain(layers).take(MAX_PARTS);
    descriptors
        .filter_map(|descriptor| {
            let urls = descriptor.urls.map_or_else(Vec::new, |urls| urls.0);
            let vouched = is_image && descriptor.plain && urls.is_empty();
            let digest = descriptor.digest?.parse().ok()?;
            Some(Part { digest, size_bytes: descriptor.size, urls, vouched })
        })
        .collect()
}

/// What manifests of the OCI image spec, and docker's second schema, name.
struct Named {
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<First<Descriptor, MAX_PARTS>>,
    /// Whoever reads it reads the same, and it is not an index, or of the first schema, as well.
    plain: bool,
}

struct Descriptor {
    digest: Option<String>,
    size: Option<u64>,
    urls: Option<First<String, MAX_URLS>>,
    plain: bool,
}

/// Whether another reader could take a key that is not one of `known` for one of them: some fold case, and not of ASCII alone.
fn is_ambiguous(key: &str, known: &[&str]) -> bool {
    !key.is_ascii() || known.iter().any(|known| known.eq_ignore_ascii_case(key))
}

/// Reads a value into its place; `false` if there was one already: readers differ in which one counts.
fn put<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
    place: &mut Option<T>,
    map: &mut A,
) -> Result<bool, A::Error> {
    let before = place.take();
    *place = map.next_value()?;
    Ok(before.is_none())
}

impl<'de> Deserialize<'de> for Named {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Named;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a manifest")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Named, A::Error> {
                let mut named = Named { media_type: None, config: None, layers: None, plain: true };
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    named.plain &= match &*key {
                        "mediaType" => put(&mut named.media_type, &mut map)?,
                        "config" => put(&mut named.config, &mut map)?,
                        "layers" => put(&mut named.layers, &mut map)?,
                        other => {
                            map.next_value::<IgnoredAny>()?;
                            let known = ["mediaType", "config", "layers", "manifests", "fsLayers"];
                            !is_ambiguous(other, &known)
                        }
                    };
                }
                Ok(named)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl<'de> Deserialize<'de> for Descriptor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Descriptor;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a descriptor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Descriptor, A::Error> {
                let mut told = Descriptor { digest: None, size: None, urls: None, plain: true };
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    told.plain &= match &*key {
                        "digest" => put(&mut told.digest, &mut map)?,
                        "size" => put(&mut told.size, &mut map)?,
                        "urls" => put(&mut told.urls, &mut map)?,
                        other => {
                            let mine = other == "mediaType";
                            map.next_value::<IgnoredAny>()?;
                            mine || !is_ambiguous(other, &["digest", "size", "urls", "mediaType"])
                        }
                    };
                }
                Ok(told)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// The first `N` of a list; the others take no memory.
struct First<T, const N: usize>(Vec<T>);

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for First<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<T, const N: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Elements<T, N> {
            type Value = First<T, N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<First<T, N>, A::Error> {
                let mut first = Vec::new();
                while first.len() < N
                    && let Some(element) = seq.next_element()?
                {
                    first.push(element);
                }
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(First(first))
            }
        }
        deserializer.deserialize_seq(Elements(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;

    const OCI: &str = OF_IMAGES[0];

    fn digest(n: u8) -> Digest {
        Digest::of(Algorithm::Sha256, &[n])
    }

    fn parts_of(manifest: &serde_json::Value) -> Vec<Part> {
        parts(manifest.to_string().as_bytes())
    }

    #[test]
    fn an_images_configuration_and_layers_are_found() {
        let part = |n: u8, size_bytes, urls: &[&str], vouched| Part {
            digest: digest(n),
            size_bytes,
            urls: urls.iter().map(|&url| url.to_owned()).collect(),
            vouched,
        };
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "config": { "digest": digest(1).to_string(), "size": 1, "mediaType": "x" },
            "layers": [
                { "digest": digest(2).to_string(), "size": 2, "urls": ["https://x.example/l"] },
                { "digest": "md5:x", "size": 3 },
                { "digest": digest(3).to_string(), "urls": null, "annotations": { "a": "b" } },
            ],
            "annotations": { "Layers": "not these" },
        });
        let named = parts_of(&manifest);
        let foreign = part(2, Some(2), &["https://x.example/l"], false);
        assert_eq!(named, [part(1, Some(1), &[], true), foreign, part(3, None, &[], true)]);
        assert!(
            parts_of(&serde_json::json!({ "manifests": [{ "digest": digest(3).to_string() }] })).is_empty()
        );
        for text in ["no manifest", "[1, 2]", "{\"layers\":7}", "{\"config\":{\"digest\":7}}", ""] {
            assert!(parts(text.as_bytes()).is_empty(), "{text}");
        }
    }

    /// A registry reads as Go does: keys whatever their case, and the last one counts. It looked for `own`.
    #[test]
    fn nothing_is_vouched_for_in_what_can_be_read_in_two_ways() {
        let (own, bait) = (digest(1), digest(2));
        let layer = |of: &Digest| format!("{{\"digest\":\"{of}\"}}");
        let (own, bait) = (layer(&own), layer(&bait));
        let plain = format!("{{\"mediaType\":\"{OCI}\",\"layers\":[{bait}]}}");
        assert!(parts(plain.as_bytes())[0].vouched);
        for text in [
            format!("{{\"layers\":[{bait}],\"Layers\":[{own}]}}"),
            format!("{{\"layers\":[{bait}],\"LAYERS\":[{own}]}}"),
            format!("{{\"layers\":[{bait}],\"layer\u{17f}\":[{own}]}}"),
            format!("{{\"layers\":[{bait}],\"layers\":[{own}]}}"),
            format!("{{\"layers\":[{own}],\"layers\":[{bait}]}}"),
            format!("{{\"layers\":[{bait}],\"la\\u0079ers\":[{own}]}}"),
            format!("{{\"config\":{bait},\"Config\":{own}}}"),
            format!("{{\"layers\":[{}]}}", bait.replace('}', ",\"Digest\":\"x\"}")),
            format!("{{\"layers\":[{}]}}", bait.replace('}', ",\"URLs\":[\"http://x\"]}")),
            format!("{{\"layers\":[{}]}}", bait.replace('}', ",\"MediaType\":\"x\"}")),
            format!("{{\"layers\":[{bait}],\"fsLayers\":[]}}"),
            format!("{{\"layers\":[{bait}],\"manifests\":[]}}"),
            format!("{{\"layers\":[{bait}],\"Manifests\":null}}"),
            format!("{{\"mediaType\":\"{OCI}\",\"MediaType\":\"x\",\"layers\":[{bait}]}}"),
            format!("{{\"mediaType\":\"application/vnd.oci.image.index.v1+json\",\"layers\":[{bait}]}}"),
            format!("{{\"mediaType\":\"application/x\",\"layers\":[{bait}]}}"),
        ] {
            assert!(parts(text.as_bytes()).iter().all(|part| !part.vouched), "{text}");
        }
        let old = format!("{{\"fsLayers\":[{{\"blobSum\":\"{}\"}}]}}", digest(2));
        assert!(parts(old.as_bytes()).is_empty(), "only what was signed of the first schema was looked at");
    }

    #[test]
    fn no_more_parts_and_urls_are_looked_at_than_an_image_can_have() {
        let layer = serde_json::json!({ "digest": digest(1).to_string(), "urls": vec!["u"; 99] });
        let named = parts_of(&serde_json::json!({ "layers": vec![layer; 40_000] }));
        assert_eq!((named.len(), named[0].urls.len()), (MAX_PARTS, MAX_URLS));
    }
}
