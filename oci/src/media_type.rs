//! The media type of a manifest. Registries tell it in `Content-Type`, and some tell it wrongly. The bytes decide if
//! they can: they are the same at every registry.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_IMAGE: &str = "application/vnd.docker.distribution.manifest.v2+json";
const SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+json";
const SIGNED_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";

/// The type of content that says nothing about itself.
pub const UNKNOWN: &str = "application/octet-stream";

/// Longest media type that is believed, in bytes: two names of at most 127 bytes each (RFC 6838, 4.2).
const MAX_TYPE_BYTES: usize = 255;

/// The kind of a document, judged by its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Index,
    Image,
    /// Docker's first schema.
    Old {
        signed: bool,
    },
}

impl Shape {
    /// The shape that documents of a well-known type have.
    fn of_type(media_type: &str) -> Option<Self> {
        match media_type {
            OCI_INDEX | DOCKER_LIST => Some(Shape::Index),
            OCI_IMAGE | DOCKER_IMAGE => Some(Shape::Image),
            SCHEMA_1 => Some(Shape::Old { signed: false }),
            SIGNED_SCHEMA_1 => Some(Shape::Old { signed: true }),
            _ => None,
        }
    }

    const fn default_type(self) -> &'static str {
        match self {
            Shape::Index => OCI_INDEX,
            Shape::Image => OCI_IMAGE,
            Shape::Old { signed: false } => SCHEMA_1,
            Shape::Old { signed: true } => SIGNED_SCHEMA_1,
        }
    }
}

/// A media type in its one form, without parameters; `None` for what is none.
pub fn normal(told: &str) -> Option<String> {
    let bare = told.split(';').next()?.trim();
    let (kind, name) = bare.split_once('/')?;
    let is_name = |name: &str| {
        let rest = |c: u8| c.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&c);
        (1..=127).contains(&name.len()) && name.bytes().all(rest)
    };
    let legal = bare.len() <= MAX_TYPE_BYTES && is_name(kind) && is_name(name);
    legal.then(|| bare.to_ascii_lowercase())
}

/// Whether a type (in its normal form) can be a manifest's, and not one that servers give to whatever they do not know.
pub fn is_specific(normal: &str) -> bool {
    let generic = [
        "octet-stream",
        "json",
        "xml",
        "x-gzip",
        "gzip",
        "x-www-form-urlencoded",
        "x-tar",
        "problem+json",
    ];
    normal
        .strip_prefix("application/")
        .is_some_and(|name| !generic.contains(&name))
}

/// Whether content of this type (in its normal form) is for people to read: a page that asks for a login, not content.
pub fn is_page(normal: &str) -> bool {
    matches!(normal, "text/html" | "application/xhtml+xml")
}

/// The media type of a manifest with this body, where the registry that was asked told `told`.
///
/// The media type, in this order: the body's own `mediaType`; the type that its keys suggest; the registry's. A
/// registry's type counts before the keys only if it does not contradict them.
pub fn media_type(body: &[u8], told: Option<&str>) -> String {
    let told = told.and_then(normal);
    let specific = told.as_deref().filter(|told| is_specific(told));
    let document = Document::of(body).unwrap_or_default();
    if let Some(own) = document.own_type() {
        return own;
    }
    let by_looks = match (document.shape(), specific) {
        (Some(shape), Some(told))
            if Shape::of_type(told).is_some_and(|of_told| of_told != shape) =>
        {
            Some(shape.default_type())
        }
        (_, Some(told)) => Some(told),
        (Some(shape), None) => Some(shape.default_type()),
        (None, None) => None,
    };
    by_looks.or(told.as_deref()).unwrap_or(UNKNOWN).to_owned()
}

/// Whether this is one whole JSON object, as every manifest is.
pub fn is_whole(body: &[u8]) -> bool {
    Document::of(body).is_some()
}

/// Whether a body may be a signed manifest of docker's first schema.
pub fn is_signed_schema_1(body: &[u8]) -> bool {
    Document::of(body).is_some_and(|document| document.shape() == Some(Shape::Old { signed: true }))
}

/// A value, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Value {
    #[default]
    Absent,
    Text(String),
    Number(u64),
    Map,
    List {
        is_empty: bool,
    },
    Other,
}

impl Value {
    const fn is_list(&self) -> bool {
        matches!(self, Value::List { .. })
    }
}

/// The keys of a document that say what it is.
#[derive(Default)]
struct Document {
    /// In the order of [`KEYS`].
    values: [Value; KEYS.len()],
    /// Two readers could understand it differently: a key comes twice, or in a spelling that some take for another.
    is_ambiguous: bool,
}

const KEYS: [&str; 7] = [
    "mediaType",
    "schemaVersion",
    "config",
    "layers",
    "manifests",
    "fsLayers",
    "signatures",
];

impl Document {
    fn of(body: &[u8]) -> Option<Self> {
        serde_json::from_slice(body).ok()
    }

    /// The type that it gives itself.
    fn own_type(&self) -> Option<String> {
        match &self.values[0] {
            Value::Text(own) if !self.is_ambiguous && !own.contains(';') => {
                normal(own).filter(|own| is_specific(own))
            }
            _ => None,
        }
    }

    fn shape(&self) -> Option<Shape> {
        if self.is_ambiguous {
            return None;
        }
        let [
            _,
            version,
            config,
            layers,
            manifests,
            old_layers,
            signatures,
        ] = &self.values;
        let has = |value: &Value| *value != Value::Absent;
        match () {
            () if manifests.is_list() => {
                (!has(layers) && !has(config) && !has(old_layers)).then_some(Shape::Index)
            }
            () if layers.is_list() && *config == Value::Map => {
                (!has(manifests) && !has(old_layers)).then_some(Shape::Image)
            }
            () if old_layers.is_list()
                && *version == Value::Number(1)
                && !has(layers)
                && !has(manifests) =>
            {
                Some(Shape::Old {
                    signed: *signatures == Value::List { is_empty: false },
                })
            }
            () => None,
        }
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Document;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
                let mut document = Document::default();
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    match KEYS.iter().position(|known| *known == key) {
                        Some(at) => {
                            document.is_ambiguous |= document.values[at] != Value::Absent;
                            document.values[at] = map.next_value()?;
                        }
                        None => {
                            map.next_value::<IgnoredAny>()?;
                            document.is_ambiguous |= crate::manifest::is_ambiguous(&key, &KEYS);
                        }
                    }
                }
                Ok(document)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_str<E>(self, text: &str) -> Result<Value, E> {
                // A longer one is no media type.
                let text = if text.len() <= MAX_TYPE_BYTES {
                    text
                } else {
                    ""
                };
                Ok(Value::Text(text.to_owned()))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
                Ok(Value::Number(number))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Value, E> {
                Ok(Value::Other)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
                Ok(Value::Other)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Value, E> {
                Ok(Value::Other)
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Value::Map)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
                let mut is_empty = true;
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    is_empty = false;
                }
                Ok(Value::List { is_empty })
            }
        }
        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ARTIFACT: &str = "application/vnd.oci.artifact.manifest.v1+json";

    #[test]
    fn the_bodys_own_type_counts_before_the_registrys_word() {
        let index = format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[]}}"#);
        for told in [
            None,
            Some("application/octet-stream"),
            Some(DOCKER_LIST),
            Some("text/plain"),
            Some(""),
        ] {
            assert_eq!(media_type(index.as_bytes(), told), OCI_INDEX, "{told:?}");
        }
        let upper = index.replace("application/vnd.oci", "Application/Vnd.OCI");
        assert_eq!(media_type(upper.as_bytes(), None), OCI_INDEX);
    }

    #[test]
    fn without_a_type_of_its_own_a_body_is_what_it_looks_like_unless_the_registry_says_better() {
        let (index, image) = (r#"{"manifests":[]}"#, r#"{"config":{},"layers":[]}"#);
        let old = r#"{"schemaVersion":1,"fsLayers":[],"history":[]}"#;
        let signed = r#"{"schemaVersion":1,"fsLayers":[],"signatures":[{}]}"#;
        let own = "application/vnd.acme.thing.v1+json";
        for (body, told, expected) in [
            (index, None, OCI_INDEX),
            (index, Some(DOCKER_LIST), DOCKER_LIST),
            (index, Some(DOCKER_IMAGE), OCI_INDEX),
            (
                index,
                Some("Application/Vnd.OCI.image.index.v1+json; charset=utf-8"),
                OCI_INDEX,
            ),
            (image, Some("text/plain; charset=utf-8"), OCI_IMAGE),
            (image, Some("application/json"), OCI_IMAGE),
            (image, Some(DOCKER_IMAGE), DOCKER_IMAGE),
            (image, Some(OCI_INDEX), OCI_IMAGE),
            (image, Some(own), own),
            (old, None, SCHEMA_1),
            (old, Some(SIGNED_SCHEMA_1), SCHEMA_1),
            (signed, Some("application/json"), SIGNED_SCHEMA_1),
            (r#"{"blobs":[]}"#, Some(ARTIFACT), ARTIFACT),
            (
                r#"{"blobs":[]}"#,
                Some("application/json"),
                "application/json",
            ),
            (r#"{"blobs":[]}"#, Some("no type"), UNKNOWN),
            (r#"{"blobs":[]}"#, None, UNKNOWN),
            ("no JSON", Some("text/plain"), "text/plain"),
        ] {
            assert_eq!(
                media_type(body.as_bytes(), told),
                expected,
                "{body} {told:?}"
            );
        }
    }

    #[test]
    fn a_body_that_can_be_read_in_two_ways_or_has_no_usable_type_says_nothing_of_itself() {
        for body in [
            format!(r#"{{"mediaType":"{OCI_INDEX}","mediaType":"{OCI_IMAGE}","manifests":[]}}"#),
            format!(r#"{{"mediaType":"{OCI_INDEX}","MediaType":"{OCI_IMAGE}","manifests":[]}}"#),
            format!(r#"{{"manifests":[],"mediaTyp\u0065":"{OCI_INDEX}","mediatype":"x"}}"#),
            r#"{"manifests":[],"config":{},"layers":[]}"#.to_owned(),
            r#"{"manifests":[],"Manifests":[]}"#.to_owned(),
            r#"{"manifests":{}}"#.to_owned(),
            r#"{"mediaType":7}"#.to_owned(),
            r#"{"mediaType":"text/html"}"#.to_owned(),
            r#"{"mediaType":"application/json"}"#.to_owned(),
            r#"{"mediaType":"application/vnd.x\r\nSet-Cookie: a"}"#.to_owned(),
            format!(r#"{{"mediaType":"application/{}"}}"#, "x".repeat(128)),
        ] {
            assert_eq!(
                media_type(body.as_bytes(), Some(ARTIFACT)),
                ARTIFACT,
                "{body}"
            );
            assert_eq!(media_type(body.as_bytes(), None), UNKNOWN, "{body}");
        }
    }

    #[test]
    fn a_truncated_body_is_not_whole() {
        let body = r#"{"schemaVersion":2,"manifests":[{"digest":"x"}]}"#;
        assert!(is_whole(body.as_bytes()) && is_whole(format!(" {body}\n").as_bytes()));
        for end in 0..body.len() {
            assert!(!is_whole(&body.as_bytes()[..end]), "{end}");
        }
        assert!(!is_whole(b"[]") && !is_whole(format!("{body}{body}").as_bytes()));
    }

    proptest! {
        #[test]
        fn whatever_comes_out_can_stand_in_a_header(body in any::<Vec<u8>>(), own in "\\PC{0,40}", told in "\\PC{0,40}") {
            for body in [body, serde_json::json!({ "mediaType": own, "manifests": [] }).to_string().into_bytes()] {
                let found = media_type(&body, Some(&told));
                prop_assert_eq!(normal(&found), Some(found));
            }
        }
    }
}
