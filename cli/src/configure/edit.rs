//! The edits of `hawker configure` in one file, and their removal: text in, text out.

mod buildkitd;
mod config_path;
mod daemon_json;
mod drop_in;
pub(crate) mod hosts;
pub(crate) mod registries_yaml;
mod signatures;
mod toml;

use std::fmt;

use serde::{Deserialize, Serialize};

use self::toml::Toml;

/// The wanted content of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Edit {
    /// containerd's hosts.toml: this host before all others.
    Host { url: String },
    /// containerd's configuration: `plugins.PLUGIN.registry.config_path`.
    ConfigPath { plugin: String, dir: String },
    /// dockerd's daemon.json: this URL before the other `registry-mirrors`.
    DockerMirror { url: String },
    /// A drop-in of registries.conf: each registry's mirror, by the name that the mirror knows the registry by.
    DropIn {
        mirror: String,
        insecure: bool,
        registries: Vec<Mirrored>,
    },
    /// buildkitd.toml: this mirror before the others of each registry.
    Buildkitd {
        mirror: String,
        http: bool,
        registries: Vec<String>,
    },
    /// `registries.yaml` of k3s and RKE2: this URL before the other endpoints of each registry.
    RegistriesYaml {
        url: String,
        registries: Vec<String>,
    },
    /// registries.d: signatures of images at these locations are attached to the images.
    Signatures { scopes: Vec<String> },
}

/// A registry, and what the mirror calls it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mirrored {
    pub(crate) registry: String,
    pub(crate) name: String,
}

/// Why a file cannot be edited, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unfit {
    pub(crate) what: String,
    pub(crate) cure: String,
}

impl Edit {
    /// The file's text with the edit in it; the same text when that is so already. `None` is a file that is not there.
    pub(crate) fn apply(&self, text: Option<&str>) -> Result<String, Unfit> {
        match self {
            Edit::Host { url } => hosts::apply(text.unwrap_or_default(), url),
            Edit::ConfigPath { plugin, dir } => config_path::apply(text, plugin, dir),
            Edit::DockerMirror { url } => daemon_json::apply(text.unwrap_or_default(), url),
            Edit::DropIn {
                mirror,
                insecure,
                registries,
            } => drop_in::apply(text, mirror, *insecure, registries),
            Edit::Buildkitd {
                mirror,
                http,
                registries,
            } => buildkitd::apply(text, mirror, *http, registries),
            Edit::RegistriesYaml { url, registries } => {
                registries_yaml::apply(text, url, registries)
            }
            Edit::Signatures { scopes } => signatures::apply(text, scopes),
        }
    }

    /// A text without the edit, whatever else was changed in it since; `original` is what the edit was applied to. `None`
    /// when nothing is left of a file that was not there before.
    pub(crate) fn undo(&self, text: &str, original: Option<&str>) -> Result<Option<String>, Unfit> {
        let before = original.map(Toml::parse).and_then(Result::ok);
        let left = match self {
            Edit::Host { url } => hosts::undo(text, url, original),
            Edit::ConfigPath { plugin, dir } => {
                config_path::undo(text, plugin, dir, before.as_ref())
            }
            Edit::DockerMirror { url } => daemon_json::undo(text, url, original),
            Edit::DropIn { mirror, .. } => drop_in::undo(text, mirror),
            Edit::Buildkitd {
                mirror, registries, ..
            } => buildkitd::undo(text, mirror, registries, before.as_ref()),
            Edit::RegistriesYaml { url, registries } => {
                registries_yaml::undo(text, url, registries, original)
            }
            Edit::Signatures { scopes } => Ok(signatures::undo(text, scopes)),
        }?;
        Ok(Some(left).filter(|left| original.is_some() || !self.is_nothing(left)))
    }

    /// Whether podman and CRI-O share the file, so that a run for either makes it anew for both.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self, Edit::Signatures { .. })
    }

    /// Whether a file of ours holds nothing of anybody else's.
    fn is_nothing(&self, text: &str) -> bool {
        let of_kind =
            |line: &str| matches!(self, Edit::Signatures { .. }) && signatures::is_ours(line);
        let ours = |line: &str| {
            of_kind(line) || line.is_empty() || line == NOTE || config_path::is_version(line)
        };
        match self {
            Edit::DockerMirror { .. } => {
                text.trim().is_empty() || text.split_whitespace().eq(["{}"])
            }
            _ => text.lines().all(|line| ours(line.trim())),
        }
    }
}

/// Above what is ours, in files that know comments.
const NOTE: &str = "# By `hawker configure`, which takes it out again with --remove.";

impl Unfit {
    fn new(what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            cure: cure.into(),
        }
    }

    /// A file that its own program could not read either. The line is named, not shown: it may hold a password.
    fn no_toml(error: &toml_edit::TomlError) -> Self {
        let message = error.message().trim().replace('\n', ", ");
        Self::new(format!("is no TOML: {message}"), "mend it, or move it away")
    }

    /// A file that says the same in words which leave no place for the edit.
    fn shape() -> Self {
        Self::new(
            "is written in a way that `hawker configure` cannot add to (inline tables, dotted keys)",
            "write these tables as [table] headers, or make the change by hand: `hawker doctor` says which",
        )
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.cure)
    }
}
