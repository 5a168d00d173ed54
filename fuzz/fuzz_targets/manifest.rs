//! A manifest: each digest that it is found to name stands in it, and its media type can stand in a header.

#![no_main]

use hawker_oci::digest::{Algorithm, Digest};
use hawker_oci::manifest::parts;
use hawker_oci::{media_type, schema_1};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    let told = std::str::from_utf8(body).ok();
    let found = media_type::media_type(body, told);
    assert_eq!(media_type::normal(&found).as_ref(), Some(&found));
    assert!(schema_1::digest(body, Algorithm::Sha256).is_none() || media_type::is_whole(body));
    let named = parts(body);
    // A part takes more bytes to say than its digest has.
    assert!(named.len() <= body.len() / "sha256:".len());
    let plain = std::str::from_utf8(body).is_ok_and(|text| !text.contains('\\'));
    for part in named {
        let digest = part.digest.to_string();
        assert_eq!(digest.parse::<Digest>().as_ref(), Ok(&part.digest));
        let holds = |text: &str| {
            body.windows(text.len())
                .any(|window| window == text.as_bytes())
        };
        // JSON can say the same letters by escapes.
        assert!(!plain || holds(&digest), "{digest}");
        assert!(
            !plain || part.urls.iter().all(|url| url.is_empty() || holds(url)),
            "{:?}",
            part.urls
        );
    }
});
