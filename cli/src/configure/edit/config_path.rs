//! containerd's configuration: the folder in which CRI looks for hosts.toml.

use super::toml::{self, Toml};
use super::{NOTE, Unfit};
use crate::configure::containerd::CRI;

const CRI_OF_2: &str = CRI[2];

/// The start of a new file: containerd takes one without a version for the oldest.
const VERSION_2: &str = "version = 2";
/// The same for a plugin of containerd 2.x.
const VERSION_3: &str = "version = 3";

/// Whether a line is the version that a new file begins with.
pub(super) fn is_version(line: &str) -> bool {
    matches!(line, VERSION_2 | VERSION_3)
}

/// Sets the directory.
pub(super) fn apply(text: Option<&str>, plugin: &str, dir: &str) -> Result<String, Unfit> {
    let version = if plugin == CRI_OF_2 {
        VERSION_3
    } else {
        VERSION_2
    };
    let new = format!("{NOTE}\n{version}\n");
    toml::set(
        text.unwrap_or(&new),
        &table(plugin),
        "config_path",
        &toml::literal(dir),
    )
}

/// Takes the directory out, unless it is another by now.
pub(super) fn undo(
    text: &str,
    plugin: &str,
    dir: &str,
    original: Option<&Toml<'_>>,
) -> Result<String, Unfit> {
    let path = ["plugins", plugin, "registry", "config_path"];
    let now = Toml::parse(text)?
        .item(&path)
        .and_then(|item| item.as_str().map(str::to_owned));
    if now.as_deref() != Some(dir) {
        return Ok(text.to_owned());
    }
    toml::unset(text, &table(plugin), "config_path", original)
}

fn table(plugin: &str) -> [&str; 3] {
    ["plugins", plugin, "registry"]
}

#[cfg(test)]
mod tests {
    use super::super::Edit;
    use super::{CRI_OF_2, NOTE, apply};

    const CRI: &str = "io.containerd.grpc.v1.cri";
    const DIR: &str = "/etc/containerd/certs.d";

    fn edit() -> Edit {
        Edit::ConfigPath {
            plugin: CRI.into(),
            dir: DIR.into(),
        }
    }

    #[test]
    fn a_new_file_says_its_version_and_goes_when_nothing_else_came_into_it() {
        let text = apply(None, CRI, DIR).unwrap();
        assert_eq!(
            text,
            format!(
                "{NOTE}\nversion = 2\n\n[plugins.\"{CRI}\".registry]\n  config_path = \"{DIR}\"\n"
            )
        );
        assert_eq!(edit().undo(&text, None), Ok(None));
        let of_2 = apply(None, CRI_OF_2, DIR).unwrap();
        assert!(
            of_2.starts_with(&format!("{NOTE}\nversion = 3\n")),
            "{of_2}"
        );
        let edit_of_2 = Edit::ConfigPath {
            plugin: CRI_OF_2.into(),
            dir: DIR.into(),
        };
        assert_eq!(edit_of_2.undo(&of_2, None), Ok(None));
        let more = format!("{text}  [plugins.\"{CRI}\".registry.configs]\n");
        let left = edit().undo(&more, None).unwrap().unwrap();
        assert!(
            left.contains("configs") && !left.contains("config_path"),
            "{left}"
        );
    }

    #[test]
    fn a_directory_that_somebody_else_set_since_stays() {
        let text = apply(Some("version = 2\n"), CRI, DIR)
            .unwrap()
            .replace(DIR, "/other");
        assert_eq!(edit().undo(&text, Some("version = 2\n")), Ok(Some(text)));
    }
}
