//! The mounts of a snapshot, as containerd's own overlay snapshotter returns them.

use std::path::{Path, PathBuf};

use crate::api::types::Mount;
use crate::catalog::{Id, Kind};

/// The kernel's needs, found once at the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct OverlayOptions {
    /// The overlay module has the inode index, which must be off where lower folders are shared.
    pub index_off: bool,
    /// In a user namespace overlay keeps its marks in `user.*` attributes.
    pub userxattr: bool,
}

impl OverlayOptions {
    /// Asks the kernel.
    #[must_use]
    pub fn of_this_kernel() -> Self {
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        Self {
            index_off: Path::new("/sys/module/overlay/parameters/index").exists(),
            userxattr: is_user_namespace(&map),
        }
    }
}

/// Whether this `uid_map` is one of a user namespace: the first one maps all numbers to themselves.
fn is_user_namespace(uid_map: &str) -> bool {
    let fields: Vec<&str> = uid_map.split_ascii_whitespace().collect();
    !fields.is_empty() && fields != ["0", "0", "4294967295"]
}

/// The folders of a snapshot.
#[derive(Clone, Debug)]
pub struct Folders(PathBuf);

impl Folders {
    /// Those of the snapshot `id` below `dir`.
    #[must_use]
    pub fn of(dir: &Path, id: Id) -> Self {
        Self(dir.join(id.to_string()))
    }

    /// The folder that has the others.
    #[must_use]
    pub fn all(&self) -> &Path {
        &self.0
    }

    /// Its files: overlay's upper folder while it is active, a lower one of its children.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        self.0.join("fs")
    }

    /// Overlay's work folder.
    #[must_use]
    pub fn work(&self) -> PathBuf {
        self.0.join("work")
    }
}

/// The mounts of a snapshot over `ancestors`, from its parent down. A committed snapshot has none of its own.
#[must_use]
pub fn mounts(
    dir: &Path,
    kind: Kind,
    id: Id,
    ancestors: &[Id],
    overlay: OverlayOptions,
) -> Vec<Mount> {
    let own = Folders::of(dir, id);
    match (kind, ancestors) {
        (Kind::Active, []) => vec![bind(&own, "rw")],
        (_, []) => vec![bind(&own, "ro")],
        (Kind::View | Kind::Committed, [only]) => vec![bind(&Folders::of(dir, *only), "ro")],
        _ => {
            let mut options = Vec::new();
            if overlay.index_off {
                options.push("index=off".to_owned());
            }
            if overlay.userxattr {
                options.push("userxattr".to_owned());
            }
            if kind == Kind::Active {
                options.push(format!("workdir={}", own.work().display()));
                options.push(format!("upperdir={}", own.files().display()));
            }
            let lower: Vec<String> = ancestors
                .iter()
                .map(|id| Folders::of(dir, *id).files().display().to_string())
                .collect();
            options.push(format!("lowerdir={}", lower.join(":")));
            vec![Mount {
                r#type: "overlay".into(),
                source: "overlay".into(),
                target: String::new(),
                options,
            }]
        }
    }
}

fn bind(folders: &Folders, access: &str) -> Mount {
    Mount {
        r#type: "bind".into(),
        source: folders.files().display().to_string(),
        target: String::new(),
        options: vec![access.into(), "rbind".into()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(kind: Kind, ancestors: &[Id], overlay: OverlayOptions) -> String {
        let mounts = mounts(Path::new("/s"), kind, 9, ancestors, overlay);
        assert_eq!(mounts.len(), 1);
        let mount = &mounts[0];
        format!(
            "{} {} {}",
            mount.r#type,
            mount.source,
            mount.options.join(",")
        )
    }

    #[test]
    fn mounts_are_those_of_containerds_overlay() {
        let plain = OverlayOptions::default();
        let both = OverlayOptions {
            index_off: true,
            userxattr: true,
        };
        for (kind, ancestors, overlay, expected) in [
            (Kind::Active, &[][..], both, "bind /s/9/fs rw,rbind"),
            (Kind::View, &[], both, "bind /s/9/fs ro,rbind"),
            (Kind::View, &[4], both, "bind /s/4/fs ro,rbind"),
            (
                Kind::Active,
                &[4],
                plain,
                "overlay overlay workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/s/4/fs",
            ),
            (
                Kind::Active,
                &[4, 2],
                both,
                "overlay overlay index=off,userxattr,workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/s/4/fs:/s/2/fs",
            ),
            (
                Kind::View,
                &[4, 2],
                plain,
                "overlay overlay lowerdir=/s/4/fs:/s/2/fs",
            ),
        ] {
            assert_eq!(show(kind, ancestors, overlay), expected);
        }
    }

    #[test]
    fn a_user_namespace_is_told_by_its_map() {
        assert!(!is_user_namespace("         0          0 4294967295\n"));
        assert!(!is_user_namespace(""));
        assert!(is_user_namespace("0 100000 65536\n"));
    }
}
