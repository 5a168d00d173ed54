//! Content that came from elsewhere goes to a registry's clients only once the registry has proved that it has it.

use std::collections::HashSet;

use super::*;
use crate::store::TaskStore;

/// How a registry that says yes to every HEAD answers a GET.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Gives {
    Nothing,
    /// Ranges of the right length, of zeros.
    Zeros,
    /// Its bytes, by ranges.
    Ranges,
    /// Its bytes, whole for any range.
    Whole,
}

/// A registry that claims to have everything, and gives `contents` in this way.
async fn claiming(contents: Vec<Vec<u8>>, gives: Gives) -> TestRegistry {
    TestRegistry::start(move |seen| {
        let named = seen.target.rsplit(['/', '=']).next().unwrap_or_default();
        // By its tag: the last of the contents.
        let named = if named == "v1" {
            sha256(contents.last().unwrap()).to_string()
        } else {
            named.to_owned()
        };
        let digest = [
            ("Docker-Content-Digest", named.as_str()),
            ("Content-Type", MANIFEST),
        ];
        if seen.method == "HEAD" {
            return say(
                seen,
                200,
                &[digest[0], digest[1], ("Content-Length", "77")],
                b"",
            );
        }
        let held = contents
            .iter()
            .find(|held| sha256(held).to_string() == named);
        let range = seen.header("range").and_then(|range| {
            let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?))
        });
        match (gives, range, held) {
            (Gives::Zeros, Some((first, last)), _) => {
                let told = format!("bytes {first}-{last}/*");
                say(
                    seen,
                    206,
                    &[("Content-Range", &told)],
                    &vec![0; last + 1 - first],
                )
            }
            (Gives::Ranges, Some((first, last)), Some(held)) => {
                let told = format!("bytes {first}-{last}/{}", held.len());
                say(seen, 206, &[("Content-Range", &told)], &held[first..=last])
            }
            (Gives::Ranges | Gives::Whole, _, Some(held)) => say(seen, 200, &digest, held),
            _ => say(seen, 404, &[], b"{}"),
        }
    })
    .await
}

/// A node in front of a registry that must prove what it has.
async fn doubting(registry: &TestRegistry) -> Node {
    let node = Node::before(registry).await;
    let mut settings = (**node.live.load()).clone();
    settings
        .registries
        .known
        .get_mut(&registry.name())
        .unwrap()
        .must_prove = true;
    node.live.store(Arc::new(settings));
    node
}

fn hold(node: &Node, image: &Image) {
    node.commit(&image.blob);
    let manifest = Bytes::from(image.manifest.clone());
    node.mirror
        .inner
        .store
        .put_manifest(&image.manifest_digest(), &manifest)
        .unwrap();
}

#[tokio::test]
async fn a_registry_that_only_claims_to_have_an_image_gets_none_of_it() {
    let image = Image::new(300_000);
    for gives in [Gives::Nothing, Gives::Zeros] {
        let evil = claiming(vec![image.manifest.clone().into_bytes()], gives).await;
        // It knows which digest it wants, and has nothing.
        let node = doubting(&evil).await;
        hold(&node, &image);
        for (method, target, range) in [
            ("GET", format!("manifests/{}", image.manifest_digest()), ""),
            ("GET", "manifests/v1".to_owned(), ""),
            ("GET", format!("blobs/{}", image.blob_digest()), ""),
            ("GET", format!("blobs/{}", image.blob_digest()), "bytes=0-0"),
            ("GET", format!("blobs/{}", image.blob_digest()), "bytes=-9"),
            (
                "GET",
                format!("blobs/{}", image.blob_digest()),
                "bytes=0-9,20-29",
            ),
            (
                "GET",
                format!("blobs/{}", image.blob_digest()),
                "bytes=99999999-",
            ),
            ("HEAD", format!("blobs/{}", image.blob_digest()), ""),
            (
                "HEAD",
                format!("blobs/{}", image.blob_digest()),
                "bytes=5-9",
            ),
        ] {
            let headers = if range.is_empty() {
                vec![]
            } else {
                vec![("Range", range)]
            };
            let got = node
                .ask(method, &format!("/v2/a/b/{target}"), &headers)
                .await;
            let length = if method == "HEAD" {
                got.header("content-length")
            } else {
                ""
            };
            assert!(
                method == "HEAD" || matches!(got.status, 404 | 416 | 502),
                "{gives:?} {method} {target} {range}: {}",
                got.status
            );
            assert!(
                matches!(length, "" | "77" | "5"),
                "only what the registry itself says of the length: {length}"
            );
            let held = image.blob.len().to_string();
            assert!(
                !got.header("content-range").contains(&held),
                "{gives:?} {method} {target} {range}"
            );
        }
    }
}

#[tokio::test]
async fn a_registry_that_proves_what_it_has_is_asked_for_one_part_and_never_again() {
    let image = Image::new(300_000);
    for gives in [Gives::Ranges, Gives::Whole] {
        let contents = vec![image.blob.clone(), image.manifest.clone().into_bytes()];
        let registry = claiming(contents, gives).await;
        let node = doubting(&registry).await;
        hold(&node, &image);
        let target = format!("/v2/a/b/blobs/{}", image.blob_digest());
        // It says another length by HEAD, which is no proof of anything; a manifest tells the right one.
        let manifest = node.get("/v2/a/b/manifests/v1").await;
        assert!(manifest.body == image.manifest.as_bytes(), "{gives:?}");
        for _ in 0..3 {
            let got = node.get(&target).await;
            assert!(
                got.status == 200 && got.body == image.blob,
                "{gives:?}: {}",
                got.status
            );
        }
        assert_eq!(registry.count("GET", &target), 1, "{gives:?}");
        assert_eq!(registry.count("GET", "/v2/a/b/manifests/"), 1, "{gives:?}");
        let asked = registry
            .seen()
            .into_iter()
            .find(|seen| seen.method == "GET" && seen.target == target);
        assert!(asked.unwrap().header("range").is_some(), "a part is enough");
        let (store, origin) = (node.mirror.inner.store.clone(), origin(&node.live));
        let kept = || !store.origins(&image.blob_digest()).is_empty();
        while !kept() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let after_a_restart = Proofs::new(Arc::new(store.clone()), origin);
        assert!(
            after_a_restart
                .has_proved(&registry.name(), &image.blob_digest())
                .await
        );
        assert!(
            !after_a_restart
                .has_proved("other.example", &image.blob_digest())
                .await
        );
    }
}

#[tokio::test]
async fn a_registry_can_not_choose_which_part_it_is_asked_for() {
    let image = Image::new(3_000_000);
    let mut parts = HashSet::new();
    for _ in 0..3 {
        // It looks at each question and leaves those unanswered that it has no answer to.
        let evil = TestRegistry::start(|seen| match seen.method.as_str() {
            "HEAD" => say(seen, 200, &[("Content-Length", "3000000")], b""),
            _ => say(seen, 404, &[], b"{}"),
        })
        .await;
        let node = doubting(&evil).await;
        hold(&node, &image);
        for _ in 0..5 {
            let got = node
                .get(&format!("/v2/a/b/blobs/{}", image.blob_digest()))
                .await;
            assert_eq!(got.status, 404);
        }
        let asked: HashSet<String> = evil
            .seen()
            .iter()
            .filter_map(|seen| seen.header("range").map(str::to_owned))
            .collect();
        assert_eq!(asked.len(), 1, "{asked:?}");
        parts.extend(asked);
    }
    assert_eq!(
        parts.len(),
        3,
        "each daemon asks for another part: {parts:?}"
    );
}

#[tokio::test]
async fn padding_proves_nothing() {
    // As a layer's end is, and a registry that guesses zeros.
    let mut blob = vec![0; 400_000];
    blob[..4096].copy_from_slice(&noise(4096, 3));
    let evil = claiming(vec![b"{}".to_vec()], Gives::Zeros).await;
    let node = doubting(&evil).await;
    node.commit(&blob);
    for _ in 0..20 {
        let got = node.get(&format!("/v2/a/b/blobs/{}", sha256(&blob))).await;
        assert!(matches!(got.status, 404 | 502), "{}", got.status);
    }
}

#[tokio::test]
async fn a_seed_says_of_a_manifest_whether_this_registry_gave_it() {
    let image = Image::new(10);
    for (gives, expected) in [(Gives::Ranges, true), (Gives::Nothing, false)] {
        let registry = claiming(vec![image.manifest.clone().into_bytes()], gives).await;
        let node = doubting(&registry).await;
        hold(&node, &image);
        for _ in 0..3 {
            let answer = node
                .mirror
                .manifest(registry.source("a/b"), image.manifest_digest(), None)
                .await;
            assert_eq!((answer.0, answer.3), (200, expected), "{gives:?}");
        }
        assert_eq!(
            registry.count("GET", "/v2/a/b/manifests/"),
            1,
            "{gives:?}: asked once for all peers"
        );
    }
}

#[tokio::test]
async fn a_seeds_manifest_that_another_registry_gave_is_asked_of_this_one() {
    let image = Image::new(10);
    let body = Bytes::from(image.manifest.clone());
    for (given, gives, status, asked) in [
        (true, Gives::Nothing, 200, 0),
        (false, Gives::Nothing, 404, 1),
        (false, Gives::Ranges, 200, 1),
    ] {
        let registry = claiming(vec![image.manifest.clone().into_bytes()], gives).await;
        let seed = Seed(vec![(200, MANIFEST.to_owned(), body.clone(), given)]);
        let node = Node::with_seeds(&registry, Some(Arc::new(seed))).await;
        let mut settings = (**node.live.load()).clone();
        settings
            .registries
            .known
            .get_mut(&registry.name())
            .unwrap()
            .must_prove = true;
        node.live.store(Arc::new(settings));
        let got = node
            .get(&format!("/v2/a/b/manifests/{}", image.manifest_digest()))
            .await;
        assert_eq!(
            (got.status, registry.count("GET", "/v2/a/b/manifests/")),
            (status, asked),
            "{given} {gives:?}"
        );
    }
}
