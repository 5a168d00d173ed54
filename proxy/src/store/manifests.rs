//! Manifests, by digest. They are small, and hashed each time they are read: so they need no fsync and no index.

use std::fs::File;

use bytes::Bytes;
use hawker_core::digest::Digest;

use super::blob::note_use;
use super::state::{Inner, Key, leave};
use super::{StoreError, disk, record};

/// Longer ones are not cached (registries must take 4 MiB; OCI distribution spec, "Pushing Manifests").
const MAX_MANIFEST_BYTES: usize = 16 << 20;
/// Room for media type and framing.
const MAX_FILE_BYTES: u64 = MAX_MANIFEST_BYTES as u64 + (64 << 10);

/// Writes a manifest, if it is not there.
pub(super) fn put(store: &Inner, digest: &Digest, media_type: &str, body: &Bytes) -> Result<(), StoreError> {
    if body.len() > MAX_MANIFEST_BYTES {
        return Ok(());
    }
    if Digest::of(digest.algorithm(), body) != *digest {
        return Err(StoreError::Rotten(*digest));
    }
    let path = store.layout.manifest(digest);
    let content = record::manifest(digest, media_type, body);
    store.write(
        || format!("writing {}", path.display()),
        content.len() as u64,
        || disk::replace_unsynced(&path, &content),
    )?;
    let now = store.now();
    store.state().cache.insert(Key::Manifest(*digest), content.len() as u64, now);
    Ok(())
}

/// Reads a manifest; one that does not hash to its digest goes.
pub(super) fn get(store: &Inner, digest: &Digest) -> Option<(String, Bytes)> {
    let now = store.now();
    if !store.state().cache.touch(&Key::Manifest(*digest), now) {
        return None;
    }
    let path = store.layout.manifest(digest);
    let raw = disk::read_whole(&path, MAX_FILE_BYTES).ok();
    let right = raw
        .as_deref()
        .and_then(record::read_manifest)
        .filter(|(named, _, body)| named == digest && Digest::of(digest.algorithm(), body) == *digest);
    let Some((_, media_type, body)) = right else {
        tracing::warn!(%digest, "a cached manifest is rotten or gone");
        store.state().cache.remove(&Key::Manifest(*digest));
        leave(&path);
        return None;
    };
    if let Ok(file) = File::open(&path) {
        note_use(&file);
    }
    Some((media_type, Bytes::copy_from_slice(body)))
}
