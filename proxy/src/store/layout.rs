//! The paths of everything below the store's folder. Names derive from a digest's algorithm and hex alone.

use std::path::{Path, PathBuf};

use hawker_oci::digest::{Algorithm, Digest};

/// Ending of a piece table's name, beside its blob.
pub(super) const TABLE: &str = ".table";
/// Ending of an index's name, beside its partial file.
pub(super) const INDEX: &str = ".index";
/// Ending of a file that is not whole yet: the next start removes it.
pub(super) const TEMPORARY: &str = ".tmp";

/// The algorithms that have a folder.
pub(super) const ALGORITHMS: [Algorithm; 2] = [Algorithm::Sha256, Algorithm::Sha512];

/// All paths of one store.
pub(super) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Held with an exclusive lock while a daemon uses the store.
    pub(super) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub(super) fn partials(&self) -> PathBuf {
        self.root.join("partial")
    }

    pub(super) fn manifests(&self) -> PathBuf {
        self.root.join("manifests")
    }

    /// The folder of the files that name the registries which gave some content.
    pub(super) fn origins(&self) -> PathBuf {
        self.root.join("origins")
    }

    pub(super) fn origins_of(&self, digest: &Digest) -> PathBuf {
        self.origins().join(flat_name(digest))
    }

    /// The folder of all committed blobs of one algorithm.
    pub(super) fn blobs(&self, algorithm: Algorithm) -> PathBuf {
        self.root.join("blobs").join(algorithm.name())
    }

    /// The folder of a committed blob: 256 of them, so that none grows too long.
    pub(super) fn shard(&self, task: &Digest) -> PathBuf {
        self.blobs(task.algorithm()).join(&task.hex()[..2])
    }

    pub(super) fn blob(&self, task: &Digest) -> PathBuf {
        self.shard(task).join(task.hex())
    }

    pub(super) fn table(&self, task: &Digest) -> PathBuf {
        self.shard(task).join(task.hex() + TABLE)
    }

    pub(super) fn partial(&self, task: &Digest) -> PathBuf {
        self.partials().join(flat_name(task))
    }

    pub(super) fn index(&self, task: &Digest) -> PathBuf {
        self.partials().join(flat_name(task) + INDEX)
    }

    pub(super) fn manifest(&self, digest: &Digest) -> PathBuf {
        self.manifests().join(flat_name(digest))
    }
}

/// `algorithm-hex`.
fn flat_name(digest: &Digest) -> String {
    format!("{}-{}", digest.algorithm().name(), digest.hex())
}

/// The digest that `algorithm-hex` names.
pub(super) fn parse_flat_name(name: &str) -> Option<Digest> {
    name.replacen('-', ":", 1).parse().ok()
}

/// The digest of the blob `name` in the folder `shard` of `algorithm`.
pub(super) fn parse_blob_name(algorithm: Algorithm, shard: &str, name: &str) -> Option<Digest> {
    if !name.starts_with(shard) {
        return None;
    }
    format!("{}:{name}", algorithm.name()).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_are_not_taken_for_ours() {
        for algorithm in ALGORITHMS {
            let digest = Digest::of(algorithm, b"blob");
            let hex = digest.hex();
            assert_eq!(parse_flat_name(&flat_name(&digest)), Some(digest));
            assert_eq!(parse_blob_name(algorithm, &hex[..2], &hex), Some(digest));
            assert_eq!(parse_blob_name(algorithm, "zz", &hex), None);
        }
        assert_eq!(parse_flat_name("lost+found"), None);
        assert_eq!(parse_blob_name(Algorithm::Sha256, "..", ".."), None);
    }
}
