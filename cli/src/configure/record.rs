//! The record of the written files, so that the edits can be taken out again.
//!
//! The record belongs to root: its entries are undone with root's rights. So it is not in the daemon's DATA_DIR, which
//! belongs to the user that the daemon runs as.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use hawker_oci::digest::{Algorithm, Digest};
use serde::{Deserialize, Serialize};

use super::edit::Edit;
use super::plan::BACKUP;
use super::root::Root;
use crate::args::Runtime;

pub(super) const FILE: &str = "/var/lib/hawker-configure/record.json";
const VERSION: u32 = 1;

/// All that `hawker configure` did below a root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    /// Folders that were made, outermost first.
    pub(crate) folders: Vec<PathBuf>,
    pub(crate) files: Vec<Written>,
}

/// A file that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Written {
    pub(crate) runtime: Runtime,
    /// Links followed.
    pub(crate) path: PathBuf,
    pub(crate) edit: Edit,
    /// Hash of what was there before: the text of the backup. None where no file was.
    pub(crate) original: Option<String>,
    /// Hash of what was written.
    pub(crate) written: String,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            version: VERSION,
            folders: Vec::new(),
            files: Vec::new(),
        }
    }
}

impl Record {
    /// An empty one where nothing was written.
    pub(crate) fn read(root: &Root) -> anyhow::Result<Self> {
        let path = root.real(Path::new(FILE))?;
        let at = root.on_disk(&path).display().to_string();
        let Some(text) = root.read(&path).with_context(|| at.clone())? else {
            return Ok(Self::default());
        };
        let record: Self = serde_json::from_str(&text).with_context(|| {
            format!("{at} is not what this version of hawker writes: undo by the version that wrote it, or from the files *{BACKUP} beside the originals")
        })?;
        ensure!(
            record.version == VERSION,
            "{at} is of another version of hawker: use that one"
        );
        Ok(record)
    }

    /// Puts it in place, or takes it and all empty folders away when there is nothing to remember.
    pub(crate) fn write(&mut self, root: &Root) -> io::Result<()> {
        let path = root.real(Path::new(FILE))?;
        if self.files.is_empty() {
            root.remove(&path)?;
            self.drop_folders(root);
            return Ok(());
        }
        let folder = path.parent().unwrap_or(Path::new("/"));
        self.folders.extend(root.make_folders(folder)?);
        root.write(&path, &(serde_json::to_string_pretty(self)? + "\n"), &path)
    }

    /// Removes the folders that were made, if nobody uses them.
    pub(crate) fn drop_folders(&mut self, root: &Root) {
        let mut kept = Vec::new();
        while let Some(folder) = self.folders.pop() {
            if !root.remove_folder(&folder) {
                kept.insert(0, folder);
            }
        }
        self.folders = kept;
    }
}

/// The fingerprint of a text.
pub(crate) fn hash(text: &str) -> String {
    Digest::of(Algorithm::Sha256, text.as_bytes()).to_string()
}
