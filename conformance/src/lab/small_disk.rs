//! A member's data folder on a small disk of its own, which tests fill and empty.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::process::run;

/// The file that fills the disk.
const BALLAST: &str = "ballast";

/// A tmpfs. The lab unmounts it.
#[derive(Clone, Debug)]
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Mounts an empty disk at a folder, which is made.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn mount(path: &Path, size_mib: u64) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))?;
        let options = format!("size={size_mib}m,mode=700");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(path))?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// The disk that is mounted at a folder.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Fills it to the last byte.
    ///
    /// # Errors
    /// When writing fails for another reason than a full disk.
    pub fn fill(&self) -> Result<()> {
        let mut ballast = File::options()
            .create(true)
            .append(true)
            .open(self.path.join(BALLAST))?;
        for chunk_bytes in [1 << 20, 4096] {
            let chunk = vec![0; chunk_bytes];
            loop {
                match ballast.write_all(&chunk) {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::StorageFull => break,
                    Err(error) => return Err(error).context("filling the disk"),
                }
            }
        }
        Ok(())
    }

    /// Removes what fills it.
    ///
    /// # Errors
    /// When it is not there.
    pub fn make_room(&self) -> Result<()> {
        fs::remove_file(self.path.join(BALLAST)).context("making room")
    }
}
