//! containerd's configuration: where CRI looks for hosts.toml.

use super::toml::{self, Toml};
use super::{NOTE, Unfit};

/// What a new file begins with: containerd takes one without a version for the oldest.
pub(super) const VERSION: &str = "version = 2";

/// Sets the directory.
pub(super) fn apply(text: Option<&str>, plugin: &str, dir: &str) -> Result<String, Unfit> {
    let new = format!("{NOTE}\n{VERSION}\n");
    toml::set(text.unwrap_or(&new), &table(plugin), "config_path", &toml::literal(dir))
}

/// Takes the directory out, unless it is another by now.
pub(super) fn undo(
    text: &str,
    plugin: &str,
    dir: &str,
    original: Option<&Toml<'_>>,
) -> Result<String, Unfit> {
    let path = ["plugins", plugin, "registry", "config_path"];
    let now = Toml::parse(text)?.item(&path).and_then(|item| item.as_str().map(str::to_owned));
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
    use super::*;

    const CRI: &str = "io.containerd.grpc.v1.cri";
    const DIR: &str = "/etc/containerd/certs.d";

    fn edit() -> Edit {
        Edit::ConfigPath { plugin: CRI.into(), dir: DIR.into() }
    }

    #[test]
    fn a_new_file_says_its_version_and_goes_when_nothing_else_came_into_it() {
        let text = apply(None, CRI, DIR).unwrap();
        assert_eq!(
            text,
            format!("{NOTE}\nversion = 2\n\n[plugins.\"{CRI}\".registry]\n  config_path = \"{DIR}\"\n")
        );
        assert_eq!(edit().undo(&text, None), Ok(None));
        let more = format!("{text}  [plugins.\"{CRI}\".registry.configs]\n");
        let left = edit().undo(&more, None).unwrap().unwrap();
        assert!(left.contains("configs") && !left.contains("config_path"), "{left}");
    }

    #[test]
    fn a_directory_that_somebody_else_set_since_stays() {
        let text = apply(Some("version = 2\n"), CRI, DIR).unwrap().replace(DIR, "/other");
        assert_eq!(edit().undo(&text, Some("version = 2\n")), Ok(Some(text)));
    }
}
