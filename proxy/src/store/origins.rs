//! Which registries gave the content that is here, or proved that they have it: a small file of names beside each blob and manifest.

use std::fs::File;

use hawker_oci::digest::Digest;

use super::state::{Entry, Inner, Key};
use super::{StoreError, disk};

/// Names kept for one digest: the earliest go first.
pub(super) const MAX_ORIGINS: usize = 8;
/// Longer names are not kept (RFC 1035 allows 253, and a port follows).
const MAX_NAME_BYTES: usize = 260;
const MAX_FILE_BYTES: u64 = 4 << 10;

pub(super) fn get(store: &Inner, digest: &Digest) -> Vec<String> {
    let file = File::open(store.layout.origins_of(digest));
    let raw = file
        .and_then(|file| disk::read_whole(&file, MAX_FILE_BYTES))
        .unwrap_or_default();
    let text = String::from_utf8(raw).unwrap_or_default();
    // A line that a crash cut off has no end and could be another name: the first line must be the digest, each line ended.
    let mut lines = text
        .split_inclusive('\n')
        .filter_map(|line| line.strip_suffix('\n'));
    match lines.next() {
        Some(first) if first == digest.to_string() => {
            lines.take(MAX_ORIGINS).map(str::to_owned).collect()
        }
        _ => Vec::new(),
    }
}

pub(super) fn add(store: &Inner, digest: &Digest, registry: &str) -> Result<(), StoreError> {
    let is_here = {
        let state = store.state();
        matches!(state.tasks.get(digest), Some(Entry::Blob { .. }))
            || state.cache.size_bytes(&Key::Manifest(*digest)).is_some()
    };
    if !is_here || registry.len() > MAX_NAME_BYTES || registry.contains('\n') {
        return Ok(());
    }
    let mut names = get(store, digest);
    if names.iter().any(|name| name == registry) {
        return Ok(());
    }
    if names.len() >= MAX_ORIGINS {
        names.remove(0);
    }
    names.push(registry.to_owned());
    let text: String = std::iter::once(digest.to_string())
        .chain(names)
        .map(|line| line + "\n")
        .collect();
    let path = store.layout.origins_of(digest);
    store
        .write(
            || format!("writing {}", path.display()),
            text.len() as u64,
            || store.disk.replace_unsynced(&path, &[text.as_bytes()]),
        )
        .map(drop)
}
