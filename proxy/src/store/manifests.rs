//! Manifests, by digest. They are small, and hashed each time they are read: so they need no fsync and no index. The media type is
//! not stored: it is found in the body, or is what the registry tells that is asked.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use hawker_oci::digest::Digest;

use super::blob::note_use;
use super::state::{Inner, Key, leave};
use super::{StoreError, disk, record};

/// Longer ones are not cached (registries must take 4 MiB; OCI distribution spec, "Pushing Manifests").
const MAX_MANIFEST_BYTES: usize = 16 << 20;
/// Room for framing.
const MAX_FILE_BYTES: u64 = MAX_MANIFEST_BYTES as u64 + (64 << 10);

/// The place of a manifest's body on disk; reading goes on even if the file is unlinked.
pub type Place = (Arc<File>, Range<u64>);

/// A manifest on disk.
#[derive(Clone, Debug)]
pub struct StoredManifest {
    /// The bytes that hash to its digest.
    pub body: Bytes,
    /// The place of these bytes.
    pub place: Place,
}

/// Writes a manifest; gives the place of its body, unless it is too long to be kept.
pub(super) fn put(
    store: &Inner,
    digest: &Digest,
    body: &Bytes,
) -> Result<Option<Place>, StoreError> {
    if body.len() > MAX_MANIFEST_BYTES {
        return Ok(None);
    }
    if Digest::of(digest.algorithm(), body) != *digest {
        return Err(StoreError::Rotten(*digest));
    }
    let path = store.layout.manifest(digest);
    let (before, after) = record::manifest(digest, body);
    let (start, end) = (before.len() as u64, (before.len() + body.len()) as u64);
    let file_bytes = end + after.len() as u64;
    let file = store.write(
        || format!("writing {}", path.display()),
        file_bytes,
        || store.disk.replace_unsynced(&path, &[&before, body, &after]),
    )?;
    let now = store.now();
    store
        .state()
        .cache
        .insert(Key::Manifest(*digest), file_bytes, now);
    Ok(Some((Arc::new(file), start..end)))
}

/// Reads a manifest; one that does not hash to its digest goes.
pub(super) fn get(store: &Inner, digest: &Digest) -> Option<StoredManifest> {
    let now = store.now();
    if !store.state().cache.touch(&Key::Manifest(*digest), now) {
        return None;
    }
    let path = store.layout.manifest(digest);
    let Some(kept) = disk::open_to_read(&path)
        .ok()
        .and_then(|file| read(file, digest))
    else {
        tracing::warn!(%digest, "a cached manifest is rotten or gone");
        store.state().cache.remove(&Key::Manifest(*digest));
        leave(&path);
        return None;
    };
    note_use(&kept.place.0);
    Some(kept)
}

fn read(file: File, digest: &Digest) -> Option<StoredManifest> {
    let raw: Bytes = disk::read_whole(&file, MAX_FILE_BYTES).ok()?.into();
    let (named, range) = record::read_manifest(&raw)?;
    let body = raw.slice(range.clone());
    let right = named == *digest && Digest::of(digest.algorithm(), &body) == *digest;
    let range = range.start as u64..range.end as u64;
    right.then(|| StoredManifest {
        body,
        place: (Arc::new(file), range),
    })
}
