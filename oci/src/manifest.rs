//! The content of an image's manifest: its configuration and layers, and those of them that its registry must have.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::digest::Digest;

/// Parts that are looked at. An image has at most 127 layers; of what comes after these the registry is asked.
pub const MAX_PARTS: usize = 1024;
/// URLs of one part that are looked at.
pub const MAX_URLS: usize = 4;

/// The media types of one image's manifests, if the body names one.
const OF_IMAGES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// The media types of an image's configuration and of its layers. Some registries look at an artifact's blobs less
/// closely, or at those of layers that are not to be distributed (zot checks neither).
const CONFIGURATIONS: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];
const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// One thing that a manifest names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its digest.
    pub digest: Digest,
    /// Its size, where the manifest tells it.
    pub size_bytes: Option<u64>,
    /// Other places of it, if the registry does not have it (image spec, "Content Descriptors").
    pub urls: Vec<String>,
    /// The registry took the manifest because it has this blob in the same repository: registries look for an image's
    /// blobs at the push. They do not look for a blob with URLs, nor, all of them, for an index's manifests or an
    /// artifact's blobs. For a document that can be read in two ways nobody knows which one they looked at. A person
    /// with the right to push could name a blob that may not be read.
    pub vouched: bool,
}

/// The configuration and the layers that a manifest names, the first [`MAX_PARTS`]. Nothing for what is no manifest.
pub fn parts(body: &[u8]) -> Vec<Part> {
    let Ok(named) = serde_json::from_slice::<Named>(body) else {
        return Vec::new();
    };
    let media_type = named.media_type.as_deref();
    let is_configured = named
        .config
        .as_ref()
        .is_some_and(|config| config.plain && config.is(&CONFIGURATIONS));
    let is_image =
        named.plain && is_configured && media_type.is_none_or(|given| OF_IMAGES.contains(&given));
    let layers = named.layers.map_or_else(Vec::new, |layers| layers.0);
    let configuration = named
        .config
        .into_iter()
        .map(|config| (config, CONFIGURATIONS.as_slice()));
    let layers = layers.into_iter().map(|layer| (layer, LAYERS.as_slice()));
    let descriptors = configuration.chain(layers).take(MAX_PARTS);
    descriptors
        .filter_map(|(descriptor, kinds)| {
            let kind = descriptor.is(kinds);
            let urls = descriptor.urls.map_or_else(Vec::new, |urls| urls.0);
            let vouched = is_image && descriptor.plain && kind && urls.is_empty();
            let digest = descriptor.digest?.parse().ok()?;
            Some(Part {
                digest,
                size_bytes: descriptor.size,
                urls,
                vouched,
            })
        })
        .collect()
}

/// The content of manifests of the OCI image spec, and of docker's second schema.
struct Named {
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<First<Descriptor, MAX_PARTS>>,
    /// Every parser reads the same, and it is not an index, or of the first schema, as well.
    plain: bool,
}

struct Descriptor {
    media_type: Option<String>,
    digest: Option<String>,
    size: Option<u64>,
    urls: Option<First<String, MAX_URLS>>,
    plain: bool,
}

impl Descriptor {
    fn is(&self, kinds: &[&str]) -> bool {
        self.media_type
            .as_deref()
            .is_some_and(|given| kinds.contains(&given))
    }
}

/// Whether another reader could take a key that is not one of `known` for one of them: some fold case, and not of ASCII alone.
pub(crate) fn is_ambiguous(key: &str, known: &[&str]) -> bool {
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
                let mut named = Named {
                    media_type: None,
                    config: None,
                    layers: None,
                    plain: true,
                };
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
                let mut told = Descriptor {
                    media_type: None,
                    digest: None,
                    size: None,
                    urls: None,
                    plain: true,
                };
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    told.plain &= match &*key {
                        "mediaType" => put(&mut told.media_type, &mut map)?,
                        "digest" => put(&mut told.digest, &mut map)?,
                        "size" => put(&mut told.size, &mut map)?,
                        "urls" => put(&mut told.urls, &mut map)?,
                        other => {
                            map.next_value::<IgnoredAny>()?;
                            !is_ambiguous(other, &["digest", "size", "urls", "mediaType"])
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
            "config": { "digest": digest(1).to_string(), "size": 1, "mediaType": CONFIGURATIONS[0] },
            "layers": [
                { "digest": digest(2).to_string(), "size": 2, "urls": ["https://x.example/l"], "mediaType": LAYERS[1] },
                { "digest": "md5:x", "size": 3, "mediaType": LAYERS[1] },
                { "digest": digest(3).to_string(), "urls": null, "annotations": { "a": "b" }, "mediaType": LAYERS[2] },
            ],
            "annotations": { "Layers": "not these" },
        });
        let named = parts_of(&manifest);
        let foreign = part(2, Some(2), &["https://x.example/l"], false);
        assert_eq!(
            named,
            [
                part(1, Some(1), &[], true),
                foreign,
                part(3, None, &[], true)
            ]
        );
        assert!(
            parts_of(&serde_json::json!({ "manifests": [{ "digest": digest(3).to_string() }] }))
                .is_empty()
        );
        for text in [
            "no manifest",
            "[1, 2]",
            "{\"layers\":7}",
            "{\"config\":{\"digest\":7}}",
            "",
        ] {
            assert!(parts(text.as_bytes()).is_empty(), "{text}");
        }
    }

    /// A registry reads as Go does: keys whatever their case, and the last one counts. It looked for `own`.
    #[test]
    fn nothing_is_vouched_for_in_what_can_be_read_in_two_ways() {
        let (own, bait) = (digest(1), digest(2));
        let of =
            |kind: &str, of: &Digest| format!("{{\"mediaType\":\"{kind}\",\"digest\":\"{of}\"}}");
        let config = format!("\"config\":{}", of(CONFIGURATIONS[0], &digest(3)));
        let (own, bait) = (of(LAYERS[0], &own), of(LAYERS[0], &bait));
        let plain = format!("{{\"mediaType\":\"{OCI}\",{config},\"layers\":[{bait}]}}");
        assert!(parts(plain.as_bytes()).iter().all(|part| part.vouched));
        for text in [
            format!("{{{config},\"layers\":[{bait}],\"Layers\":[{own}]}}"),
            format!("{{{config},\"layers\":[{bait}],\"LAYERS\":[{own}]}}"),
            format!("{{{config},\"layers\":[{bait}],\"layer\u{17f}\":[{own}]}}"),
            format!("{{{config},\"layers\":[{bait}],\"layers\":[{own}]}}"),
            format!("{{{config},\"layers\":[{own}],\"layers\":[{bait}]}}"),
            format!("{{{config},\"layers\":[{bait}],\"la\\u0079ers\":[{own}]}}"),
            format!("{{{config},\"Config\":{own},\"layers\":[{bait}]}}"),
            format!(
                "{{{config},\"layers\":[{}]}}",
                bait.replace('}', ",\"Digest\":\"x\"}")
            ),
            format!(
                "{{{config},\"layers\":[{}]}}",
                bait.replace('}', ",\"URLs\":[\"http://x\"]}")
            ),
            format!(
                "{{{config},\"layers\":[{}]}}",
                bait.replace('}', ",\"MediaType\":\"x\"}")
            ),
            format!("{{{config},\"layers\":[{bait}],\"fsLayers\":[]}}"),
            format!("{{{config},\"layers\":[{bait}],\"manifests\":[]}}"),
            format!("{{{config},\"layers\":[{bait}],\"Manifests\":null}}"),
            format!("{{\"mediaType\":\"{OCI}\",\"MediaType\":\"x\",{config},\"layers\":[{bait}]}}"),
            format!(
                "{{\"mediaType\":\"application/vnd.oci.image.index.v1+json\",{config},\"layers\":[{bait}]}}"
            ),
            format!("{{\"mediaType\":\"application/x\",{config},\"layers\":[{bait}]}}"),
        ] {
            let named = parts(text.as_bytes());
            assert!(
                !named
                    .iter()
                    .any(|part| part.digest == digest(2) && part.vouched),
                "{text}"
            );
        }
        let old = format!("{{\"fsLayers\":[{{\"blobSum\":\"{}\"}}]}}", digest(2));
        assert!(
            parts(old.as_bytes()).is_empty(),
            "only what was signed of the first schema was looked at"
        );
    }

    /// zot takes an artifact without a look at its blobs, and an image without one at its layers that are not to be distributed.
    #[test]
    fn nothing_is_vouched_for_but_what_images_are_made_of() {
        let part = |kind: Option<&str>, n| match kind {
            Some(kind) => serde_json::json!({ "mediaType": kind, "digest": digest(n).to_string() }),
            None => serde_json::json!({ "digest": digest(n).to_string() }),
        };
        let hidden = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
        for (config, layer, vouched) in [
            (Some(CONFIGURATIONS[0]), Some(LAYERS[1]), [true, true]),
            (Some(CONFIGURATIONS[1]), Some(LAYERS[4]), [true, true]),
            (Some(CONFIGURATIONS[0]), Some(hidden), [true, false]),
            (
                Some(CONFIGURATIONS[0]),
                Some("application/x"),
                [true, false],
            ),
            (Some(CONFIGURATIONS[0]), None, [true, false]),
            (
                Some(CONFIGURATIONS[0]),
                Some(CONFIGURATIONS[0]),
                [true, false],
            ),
            (Some("application/x"), Some(LAYERS[1]), [false, false]),
            (Some(LAYERS[1]), Some(LAYERS[1]), [false, false]),
            (None, Some(LAYERS[1]), [false, false]),
        ] {
            let named = parts_of(
                &serde_json::json!({ "config": part(config, 1), "layers": [part(layer, 2)] }),
            );
            let told: Vec<bool> = named.iter().map(|part| part.vouched).collect();
            assert_eq!(told, vouched, "{config:?} {layer:?}");
        }
        let unconfigured = serde_json::json!({ "layers": [part(Some(LAYERS[1]), 2)] });
        assert!(!parts_of(&unconfigured)[0].vouched);
    }

    #[test]
    fn no_more_parts_and_urls_are_looked_at_than_an_image_can_have() {
        let layer = serde_json::json!({ "digest": digest(1).to_string(), "urls": vec!["u"; 99] });
        let named = parts_of(&serde_json::json!({ "layers": vec![layer; 40_000] }));
        assert_eq!((named.len(), named[0].urls.len()), (MAX_PARTS, MAX_URLS));
    }
}
