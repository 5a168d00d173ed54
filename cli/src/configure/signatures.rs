//! registries.d: podman and CRI-O look there, by the mirror's location, for how an image's signatures are found. A registry whose
//! signatures are attached to its images needs the same word for its mirror, or policies that demand signatures refuse its images.

use std::path::{Path, PathBuf};

use super::edit::{Edit, Mirrored};
use super::plan::{Past, View, Wanted};
use super::yaml::{self, Node};
use crate::args::Runtime;

/// The file of ours. podman and CRI-O share it: no key may stand in two files.
const FILE: &str = "/etc/containers/registries.d/50-hawker.yaml";
/// The vendor's folder, and the administrator's.
const FOLDERS: [&str; 2] = [
    "/usr/share/containers/registries.d",
    "/etc/containers/registries.d",
];
const ATTACHMENTS: &str = "use-sigstore-attachments";
/// Signatures beside the registry, with their older name.
const LOOKASIDE: [&str; 2] = ["lookaside", "sigstore"];

/// The settings of one registry, repository or wildcard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    file: PathBuf,
    /// `quay.io`, `quay.io/team`, `*.example.com`.
    scope: String,
    attachments: bool,
    lookaside: bool,
}

/// All settings by scope, but those in our own file.
pub(super) fn settings(view: &View<'_>) -> anyhow::Result<Vec<Setting>> {
    let mut settings = Vec::new();
    let files = FOLDERS
        .iter()
        .flat_map(|folder| view.files(Path::new(folder)));
    for file in files.filter(|file| {
        file.extension().is_some_and(|end| end == "yaml") && *file != Path::new(FILE)
    }) {
        let text = view.read(&file)?.unwrap_or_default();
        let tree = yaml::parse(&text)
            .map_err(|why| anyhow::anyhow!("{} is no YAML: {why}", view.show(&file)))?;
        let scopes = tree
            .as_ref()
            .and_then(|tree| tree.get("docker"))
            .map_or(&[][..], Node::entries);
        settings.extend(scopes.iter().filter_map(|(scope, setting)| {
            let is_true = |node: &Node| {
                node.as_str()
                    .is_some_and(|text| matches!(text, "true" | "True" | "TRUE"))
            };
            Some(Setting {
                file: file.clone(),
                scope: scope.as_str()?.to_owned(),
                attachments: setting.get(ATTACHMENTS).is_some_and(is_true),
                lookaside: LOOKASIDE.iter().any(|key| setting.get(key).is_some()),
            })
        }));
    }
    Ok(settings)
}

impl Setting {
    /// The part below a registry that this is about: empty for all of it, `/team` for a part; `None` if it is about another.
    fn below(&self, registry: &str) -> Option<&str> {
        if let Some(domain) = self.scope.strip_prefix("*.") {
            let host = registry.split(':').next().unwrap_or_default();
            return host.strip_suffix(domain)?.ends_with('.').then_some("");
        }
        self.scope
            .strip_prefix(registry)
            .filter(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

/// The mirror's locations that need the word, for these registries: those that no file has yet.
pub(super) fn scopes(settings: &[Setting], mirror: &str, registries: &[Mirrored]) -> Vec<String> {
    let mut scopes = Vec::new();
    for Mirrored { registry, name } in registries {
        let attached = settings.iter().filter(|setting| setting.attachments);
        scopes.extend(
            attached.filter_map(|it| Some(format!("{mirror}/{name}{}", it.below(registry)?))),
        );
    }
    scopes.retain(|scope| settings.iter().all(|setting| setting.scope != *scope));
    scopes.sort();
    scopes.dedup();
    scopes
}

/// A note for registries whose signatures are beside them: containers/image looks for these by the path at the mirror.
pub(super) fn notes(view: &View<'_>, settings: &[Setting], registries: &[Mirrored]) -> Vec<String> {
    let beside = |it: &Mirrored| {
        settings.iter().find(|setting| {
            setting.lookaside && !setting.attachments && setting.below(&it.registry).is_some()
        })
    };
    let found = registries.iter().filter_map(|it| Some((it, beside(it)?)));
    found
        .map(|(it, setting)| {
            format!(
                "{} names a lookaside for the signatures of {}, which podman and CRI-O do not find for images that come through a \
                 mirror: where policy.json demands signatures of that registry, name the others by --registry and leave it out",
                view.show(&setting.file),
                it.registry
            )
        })
        .collect()
}

/// The file for what is mirrored for `runtime` from now on and for the other of the two since before; `None` where none is needed.
pub(super) fn wanted(
    view: &View<'_>,
    past: &Past,
    runtime: Runtime,
    mirror: &str,
    registries: &[Mirrored],
) -> anyhow::Result<Option<Wanted>> {
    let settings = settings(view)?;
    let mut all = scopes(&settings, mirror, registries);
    for (mirror, registries) in past.drop_ins_of_others(runtime) {
        all.extend(scopes(&settings, mirror, registries));
    }
    all.sort();
    all.dedup();
    Ok((!all.is_empty()).then(|| Wanted {
        path: FILE.into(),
        edit: Edit::Signatures { scopes: all },
    }))
}
