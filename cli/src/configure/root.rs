//! The files below a root: links followed inside it, texts replaced whole or not at all.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{XattrFlags, fsetxattr, lgetxattr, llistxattr};

/// No configuration is longer.
const TEXT_MAX_BYTES: u64 = 4 << 20;
/// As the kernel has it.
const LINKS_MAX: usize = 40;
const ATTRIBUTES_MAX_BYTES: usize = 64 << 10;

/// A file system, or a folder that holds one: an image, a test.
#[derive(Clone, Debug)]
pub(crate) struct Root(PathBuf);

impl Root {
    pub(crate) fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// Whether this is the system that runs.
    pub(crate) fn is_system(&self) -> bool {
        self.0 == Path::new("/")
    }

    /// The place of a root's path on this machine.
    pub(crate) fn on_disk(&self, path: &Path) -> PathBuf {
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// One process at a time changes what is below the root: this waits for no other.
    pub(crate) fn lock(&self) -> io::Result<File> {
        let root = File::open(&self.0)?;
        root.try_lock().map_err(|_| {
            io::Error::new(ErrorKind::ResourceBusy, "another `hawker configure` runs")
        })?;
        Ok(root)
    }

    /// The path that `path` leads to: links followed as if the root were `/`, so that none leads out of it.
    pub(crate) fn real(&self, path: &Path) -> io::Result<PathBuf> {
        let parts = |path: &Path| -> Vec<OsString> {
            let parts = path
                .components()
                .filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
            parts.map(|part| part.as_os_str().to_owned()).collect()
        };
        let mut real = PathBuf::from("/");
        let mut rest: VecDeque<OsString> = parts(path).into();
        let mut links = 0;
        while let Some(part) = rest.pop_front() {
            if part == ".." {
                real.pop();
                continue;
            }
            let next = real.join(&part);
            let Ok(target) = fs::read_link(self.on_disk(&next)) else {
                real = next;
                continue;
            };
            links += 1;
            if links > LINKS_MAX {
                return Err(io::Error::new(
                    ErrorKind::InvalidInput,
                    "too many symbolic links",
                ));
            }
            if target.is_absolute() {
                real = PathBuf::from("/");
            }
            parts(&target)
                .into_iter()
                .rev()
                .for_each(|part| rest.push_front(part));
        }
        Ok(real)
    }

    /// The text of a real path; `None` where there is no file.
    pub(crate) fn read(&self, real: &Path) -> io::Result<Option<String>> {
        let file = match OpenOptions::new()
            .read(true)
            .custom_flags(nonblocking())
            .open(self.on_disk(real))
        {
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                return Ok(None);
            }
            file => file?,
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "is no file"));
        }
        let mut text = String::new();
        file.take(TEXT_MAX_BYTES + 1).read_to_string(&mut text)?;
        if text.len() as u64 > TEXT_MAX_BYTES {
            return Err(io::Error::new(
                ErrorKind::FileTooLarge,
                "is too large to be a configuration",
            ));
        }
        Ok(Some(text))
    }

    /// The names in a folder, sorted; none where there is no folder.
    pub(crate) fn names(&self, folder: &Path) -> Vec<String> {
        let Ok(real) = self.real(folder) else {
            return Vec::new();
        };
        let entries = fs::read_dir(self.on_disk(&real))
            .into_iter()
            .flatten()
            .flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    pub(crate) fn is_dir(&self, path: &Path) -> bool {
        self.real(path)
            .is_ok_and(|real| self.on_disk(&real).is_dir())
    }

    pub(crate) fn exists(&self, path: &Path) -> bool {
        self.real(path)
            .is_ok_and(|real| self.on_disk(&real).exists())
    }

    /// Makes a folder and those above it; the new ones, outermost first.
    pub(crate) fn make_folders(&self, real: &Path) -> io::Result<Vec<PathBuf>> {
        let missing: Vec<&Path> = real
            .ancestors()
            .take_while(|folder| !self.on_disk(folder).exists())
            .collect();
        for folder in missing.iter().rev() {
            let on_disk = self.on_disk(folder);
            DirBuilder::new().mode(0o755).create(&on_disk)?;
            // The umask must not matter: other users' runtimes read these.
            fs::set_permissions(&on_disk, Permissions::from_mode(0o755))?;
        }
        Ok(missing.into_iter().rev().map(Path::to_owned).collect())
    }

    /// Write, fsync, rename, fsync of the folder. The new file has owner, mode and attributes of `like`, else mode 0644.
    pub(crate) fn write(&self, real: &Path, text: &str, like: &Path) -> io::Result<()> {
        let path = self.on_disk(real);
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::new(ErrorKind::InvalidInput, "names no file"));
        };
        let mut new = OsString::from(".");
        new.push(name);
        new.push(".hawker-new");
        let new = folder.join(new);
        let like = self.on_disk(like);
        let written = write_new(&new, text, &like).and_then(|()| fs::rename(&new, &path));
        if let Err(error) = written {
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        File::open(folder)?.sync_all()
    }

    /// Removes a file, if it is there.
    pub(crate) fn remove(&self, real: &Path) -> io::Result<()> {
        match fs::remove_file(self.on_disk(real)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => real
                .parent()
                .map_or(Ok(()), |folder| match File::open(self.on_disk(folder)) {
                    Ok(folder) => folder.sync_all(),
                    Err(_) => Ok(()),
                }),
        }
    }

    /// Removes a folder that is empty; whether it is gone.
    pub(crate) fn remove_folder(&self, real: &Path) -> bool {
        match fs::remove_dir(self.on_disk(real)) {
            Ok(()) => true,
            Err(error) => error.kind() == ErrorKind::NotFound,
        }
    }
}

/// A pipe in a file's place must not hold us up.
fn nonblocking() -> i32 {
    rustix::fs::OFlags::NONBLOCK.bits().cast_signed()
}

fn write_new(new: &Path, text: &str, like: &Path) -> io::Result<()> {
    match fs::remove_file(new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(new)?;
    file.write_all(text.as_bytes())?;
    match fs::symlink_metadata(like) {
        Ok(metadata) => take_after(&file, like, &metadata)?,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            file.set_permissions(Permissions::from_mode(0o644))?;
        }
        Err(error) => return Err(error),
    }
    file.sync_all()
}

/// Owner before mode, which a change of owner may cut.
fn take_after(file: &File, like: &Path, metadata: &Metadata) -> io::Result<()> {
    let own = file.metadata()?;
    if (own.uid(), own.gid()) != (metadata.uid(), metadata.gid()) {
        fchown(file, Some(metadata.uid()), Some(metadata.gid()))?;
    }
    file.set_permissions(Permissions::from_mode(metadata.mode() & 0o7777))?;
    copy_attributes(file, like);
    Ok(())
}

/// SELinux labels and ACLs, as far as the file system has them.
fn copy_attributes(file: &File, like: &Path) {
    let mut names = vec![0; ATTRIBUTES_MAX_BYTES];
    let Ok(len) = llistxattr(like, &mut names) else {
        return;
    };
    for name in names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; ATTRIBUTES_MAX_BYTES];
        if let Ok(len) = lgetxattr(like, name, &mut value) {
            let _ = fsetxattr(file, name, &value[..len], XattrFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_stay_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        root.make_folders(Path::new("/etc/real")).unwrap();
        for (link, target) in [
            ("abs", "/etc/real/file"),
            ("rel", "real/../real/file"),
            ("out", "../../../../etc/passwd"),
            ("dir", "real"),
        ] {
            symlink(target, dir.path().join("etc").join(link)).unwrap();
        }
        symlink("loop", dir.path().join("etc/loop")).unwrap();
        let real = |path: &str| root.real(Path::new(path)).ok();
        for path in ["/etc/abs", "/etc/rel", "/etc/dir/file", "/etc/real/file"] {
            assert_eq!(real(path), Some("/etc/real/file".into()), "{path}");
        }
        assert_eq!(real("/etc/out"), Some("/etc/passwd".into()));
        assert_eq!(real("/etc/loop"), None);
        assert_eq!(
            root.read(Path::new("/etc/passwd")).unwrap(),
            None,
            "not the machine's own"
        );
    }

    #[test]
    fn a_file_is_replaced_with_its_mode_and_owner_kept() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        let path = Path::new("/config");
        root.write(path, "one", path).unwrap();
        let mode = || fs::metadata(dir.path().join("config")).unwrap().mode() & 0o7777;
        assert_eq!(mode(), 0o644);
        fs::set_permissions(dir.path().join("config"), Permissions::from_mode(0o640)).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(dir.path().join("config"), Some(12), Some(34)).unwrap();
        }
        root.write(path, "two", path).unwrap();
        assert_eq!(root.read(path).unwrap().as_deref(), Some("two"));
        assert_eq!(mode(), 0o640);
        if rustix::process::geteuid().is_root() {
            let metadata = fs::metadata(dir.path().join("config")).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (12, 34));
        }
        assert_eq!(
            root.names(Path::new("/")),
            ["config"],
            "nothing is left over"
        );
    }

    #[test]
    fn what_is_no_text_is_no_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        fs::write(dir.path().join("bytes"), [0xff, 0xfe]).unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        assert!(root.read(Path::new("/bytes")).is_err());
        assert!(root.read(Path::new("/folder")).is_err());
        assert_eq!(root.read(Path::new("/bytes/below")).unwrap(), None);
    }
}
