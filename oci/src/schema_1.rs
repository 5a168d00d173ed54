//! Signed manifests of docker's first schema. Their digest is that of the payload: the document as it was before its signatures
//! were put in (image manifest v2, schema 1, "Signed Manifests").

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

use crate::digest::{Algorithm, Digest};

#[derive(Deserialize)]
struct Signed {
    signatures: Vec<Signature>,
}

#[derive(Deserialize)]
struct Signature {
    protected: String,
}

/// How to get the payload back out of the document.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Protected {
    /// The payload begins with this many bytes of the document.
    format_length: usize,
    /// The rest of the payload.
    format_tail: String,
}

/// The signed payload; `None` for a document that is not signed in this way.
fn payload(body: &[u8]) -> Option<Vec<u8>> {
    let signed: Signed = serde_json::from_slice(body).ok()?;
    let protected = decode(&signed.signatures.first()?.protected)?;
    let protected: Protected = serde_json::from_slice(&protected).ok()?;
    Some(
        [
            body.get(..protected.format_length)?,
            &decode(&protected.format_tail)?,
        ]
        .concat(),
    )
}

fn decode(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok()
}

/// The digest of a signed manifest: clients that know such manifests compute it in the same way. `None` for any other document.
pub fn digest(body: &[u8], algorithm: Algorithm) -> Option<Digest> {
    let payload = payload(body).filter(|_| crate::media_type::is_signed_schema_1(body))?;
    Some(Digest::of(algorithm, &payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A signed document and its payload.
    fn signed(format_length: usize, tail: &str) -> (String, String) {
        let head = "{\"schemaVersion\":1,\"fsLayers\":[]";
        let protected =
            serde_json::json!({ "formatLength": format_length, "formatTail": tail }).to_string();
        let protected = URL_SAFE_NO_PAD.encode(protected);
        let body = format!(
            "{head},\"signatures\":[{{\"protected\":\"{protected}\",\"signature\":\"x\"}}]}}"
        );
        (body, format!("{head}}}"))
    }

    #[test]
    fn the_digest_of_a_signed_manifest_is_that_of_its_payload() {
        let (body, payload) = signed(32, "fQ");
        let of = |text: &str| digest(text.as_bytes(), Algorithm::Sha256);
        let expected = Some(Digest::of(Algorithm::Sha256, payload.as_bytes()));
        assert_eq!(of(&body), expected);
        assert_eq!(of(&signed(32, "fQ==").0), expected, "padded");
        assert_eq!(of(&payload), None, "not signed");
        assert_ne!(of(&signed(31, "fQ").0), expected);
        assert_ne!(of(&signed(32, "").0), expected);
        for (length, tail) in [(usize::MAX, "fQ"), (32, "?")] {
            assert_eq!(of(&signed(length, tail).0), None, "{length} {tail}");
        }
        assert_eq!(of(&body.replace("protected", "other")), None);
        assert_eq!(
            of(&body.replace("\"schemaVersion\":1", "\"schemaVersion\":2")),
            None
        );
    }
}
