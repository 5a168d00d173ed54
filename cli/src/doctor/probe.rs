//! A blob asked from the mirror by this program itself, for a pull whose runtime held all layers already.

use std::time::Duration;

use hawker_oci::digest::Digest;
use hawker_proxy::recent::RecentRequest;
use serde::Deserialize;

use crate::client;

const TIMEOUT: Duration = Duration::from_secs(60);
const MANIFEST_MAX_BYTES: usize = 4 << 20;
/// A larger smallest blob is not asked for.
const BLOB_MAX_BYTES: usize = 64 << 20;
const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// Why no blob came.
#[derive(Debug)]
pub(super) enum Failed {
    /// The mirror wants credentials, which this program has not.
    Unauthorized,
    /// The mirror's refusal, in its words.
    Refused(String),
    /// Anything else.
    Other(String),
}

/// Manifest and index alike, as far as they matter here.
#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Clone, Deserialize)]
struct Descriptor {
    digest: String,
    #[serde(default)]
    size: usize,
    platform: Option<Platform>,
}

#[derive(Clone, Deserialize)]
struct Platform {
    architecture: String,
}

/// Asks for the smallest blob of the image whose manifest the mirror gave; its size, when its bytes match its digest.
pub(super) async fn a_blob(mirror: &str, manifest: &RecentRequest) -> Result<usize, Failed> {
    let RecentRequest {
        registry,
        repository,
        reference,
        ..
    } = manifest;
    let ns = if registry.is_empty() {
        String::new()
    } else {
        format!("?ns={registry}")
    };
    let at = |kind: &str, reference: &str| format!("/v2/{repository}/{kind}/{reference}{ns}");
    let mut found = read(&get(mirror, &at("manifests", reference), MANIFEST_MAX_BYTES).await?)?;
    if let Some(one) = for_this_machine(&found.manifests) {
        found = read(&get(mirror, &at("manifests", &one.digest), MANIFEST_MAX_BYTES).await?)?;
    }
    let smallest = found
        .layers
        .into_iter()
        .chain(found.config)
        .min_by_key(|blob| blob.size);
    let Some(blob) = smallest.filter(|blob| blob.size <= BLOB_MAX_BYTES) else {
        return Err(Failed::Other("its manifest names no small blob".to_owned()));
    };
    let bytes = get(mirror, &at("blobs", &blob.digest), BLOB_MAX_BYTES).await?;
    let digest: Digest = blob
        .digest
        .parse()
        .map_err(|_| Failed::Other("its digest is odd".to_owned()))?;
    if Digest::of(digest.algorithm(), &bytes) != digest {
        return Err(Failed::Refused(format!(
            "200 to GET blob {digest}, with other bytes"
        )));
    }
    Ok(bytes.len())
}

fn read(bytes: &[u8]) -> Result<Manifest, Failed> {
    serde_json::from_slice(bytes)
        .map_err(|error| Failed::Other(format!("its manifest can't be read: {error}")))
}

/// The entry of an index for this machine, else the first.
fn for_this_machine(manifests: &[Descriptor]) -> Option<&Descriptor> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let fits = |one: &&Descriptor| {
        one.platform
            .as_ref()
            .is_some_and(|it| it.architecture == architecture)
    };
    manifests.iter().find(fits).or(manifests.first())
}

async fn get(mirror: &str, path: &str, max_bytes: usize) -> Result<Vec<u8>, Failed> {
    let answer = client::get_bytes(mirror, path, Some(ACCEPT), TIMEOUT, max_bytes).await;
    let (status, body) = answer.map_err(|error| Failed::Other(error.to_string()))?;
    match status {
        200 => Ok(body.into()),
        401 => Err(Failed::Unauthorized),
        _ => {
            let words: String = String::from_utf8_lossy(&body).chars().take(300).collect();
            Err(Failed::Refused(format!("{status} to GET {path}: {words}")))
        }
    }
}
