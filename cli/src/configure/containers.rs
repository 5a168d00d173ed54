//! podman and CRI-O (and skopeo, buildah): a drop-in of registries.conf. There is no mirror for all registries in that format,
//! so each has its block. A file for each of the two, so that one can be undone without the other; they read both.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::edit::{Edit, Mirrored};
use super::mirror::is_mirror;
use super::plan::{Past, View, Wanted};
use super::request::{Own, Request, can_be_path};
use super::{Restart, Wishes, signatures};
use crate::args::Runtime;
use hawker_config::problem::Problem;

/// The main file.
pub(crate) const FILE: &str = "/etc/containers/registries.conf";
/// The drop-ins, read after it in the order of their names; a later block for a prefix takes an earlier one's place.
pub(crate) const FOLDER: &str = "/etc/containers/registries.conf.d";

/// The place of a runtime's drop-in.
pub(crate) fn drop_in(runtime: Runtime) -> PathBuf {
    let name = if runtime == Runtime::Crio {
        "50-hawker-crio.conf"
    } else {
        "50-hawker-podman.conf"
    };
    Path::new(FOLDER).join(name)
}

/// A `[[registry]]` of some file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) file: PathBuf,
    pub(crate) prefix: String,
    pub(crate) blocked: bool,
    /// Location of each mirror, and whether it may be asked without TLS.
    pub(crate) mirrors: Vec<(String, bool)>,
}

impl Block {
    /// Whether pulls go to the mirror first; `Some(true)` if it may be asked in the clear.
    pub(crate) fn goes_to(&self, mirror: &str) -> Option<bool> {
        self.mirrors
            .first()
            .filter(|(location, _)| is_mirror(location, mirror))
            .map(|(_, insecure)| *insecure)
    }
}

/// All blocks, in the order in which they count: of those with one prefix, the last one does.
pub(crate) fn blocks(view: &View<'_>) -> anyhow::Result<Vec<Block>> {
    let drop_ins = view.files(Path::new(FOLDER)).into_iter();
    let drop_ins = drop_ins.filter(|file| file.extension().is_some_and(|end| end == "conf"));
    let mut blocks = Vec::new();
    for file in [PathBuf::from(FILE)].into_iter().chain(drop_ins) {
        let text = view.read(&file)?.unwrap_or_default();
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            let message = error.message().trim().replace('\n', ", ");
            anyhow::anyhow!("{} is no TOML: {message}", view.show(&file))
        })?;
        let registries = table
            .get("registry")
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        blocks.extend(registries.filter_map(|registry| block(&file, registry)));
    }
    Ok(blocks)
}

fn block(file: &Path, registry: &Value) -> Option<Block> {
    let prefix = registry
        .get("prefix")
        .or(registry.get("location"))?
        .as_str()?
        .to_owned();
    let is = |value: &Value, key: &str| value.get(key).and_then(Value::as_bool).unwrap_or(false);
    let mirrors = registry
        .get("mirror")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let mirrors = mirrors.filter_map(|mirror| {
        Some((
            mirror.get("location")?.as_str()?.to_owned(),
            is(mirror, "insecure"),
        ))
    });
    Some(Block {
        file: file.to_owned(),
        prefix,
        blocked: is(registry, "blocked"),
        mirrors: mirrors.collect(),
    })
}

/// The files to write.
pub(super) fn wishes(
    request: &Request,
    view: &View<'_>,
    past: &Past,
    runtime: Runtime,
) -> anyhow::Result<Wishes> {
    let mut wishes = Wishes::default();
    let path = request.config.clone().unwrap_or_else(|| drop_in(runtime));
    let others: Vec<Block> = blocks(view)?
        .into_iter()
        .filter(|block| block.file != path)
        .collect();
    let named = !request.registries.is_empty();
    let usual = || Own::read(view).registries();
    let (usable, ported): (Vec<Mirrored>, Vec<Mirrored>) = request
        .chosen(usual)
        .into_iter()
        .partition(|it| can_be_path(&it.name));
    for Mirrored { registry, .. } in ported {
        wishes.notes.push(format!(
            "{registry} is left out: a mirror's path holds no port; give it a name in Hawker's configuration and say \
             --registry {registry}=NAME"
        ));
    }
    let mut registries = Vec::new();
    for it in usable {
        let other = others.iter().rfind(|block| block.prefix == it.registry);
        match other {
            None => registries.push(it),
            Some(block)
                if block.mirrors
                    == [(
                        format!("{}/{}", request.mirror.authority, it.name),
                        request.mirror.http,
                    )] =>
            {
                // The same, by hand or for the other of the two: both may stand.
                registries.push(it);
            }
            Some(block) if named => {
                wishes
                    .problems
                    .push(clash(view, block, &request.mirror.authority, &it))
            }
            Some(block) => {
                let file = view.show(&block.file);
                wishes.notes.push(format!(
                    "{} is left out: {file} has a block for it",
                    it.registry
                ));
            }
        }
    }
    wishes.notes.extend(closer(&others, &registries, view));
    if registries.is_empty() && wishes.problems.is_empty() {
        let cure = "name others by --registry";
        wishes.problems.push(Problem::new(
            view.show(&path),
            "would hold no registry",
            cure,
        ));
    }
    let mirror = request.mirror.authority.clone();
    wishes.notes.extend(signatures::notes(
        view,
        &signatures::settings(view)?,
        &registries,
    ));
    wishes.files.extend(signatures::wanted(
        view,
        past,
        runtime,
        &mirror,
        &registries,
    )?);
    wishes.files.push(Wanted {
        path,
        edit: Edit::DropIn {
            mirror,
            insecure: request.mirror.http,
            registries,
        },
    });
    Ok(wishes)
}

/// Two blocks for a prefix: the later file's would hide the other.
fn clash(view: &View<'_>, block: &Block, mirror: &str, it: &Mirrored) -> Problem {
    let file = view.show(&block.file);
    if block.blocked {
        return Problem::new(
            file,
            format!("blocks {}", it.registry),
            "leave that registry out",
        );
    }
    let what = format!(
        "has a block for {} already, and one of the two would hide the other",
        it.registry
    );
    let cure = format!(
        "leave that registry out and add to that block, first:\n[[registry.mirror]]\nlocation = \"{mirror}/{}\"\ninsecure = true",
        it.name
    );
    Problem::new(file, what, cure)
}

/// Of the blocks that fit an image, the one with the longest prefix counts.
fn closer(others: &[Block], registries: &[Mirrored], view: &View<'_>) -> Vec<String> {
    let is_closer = |block: &&Block| {
        registries.iter().any(|it| {
            block
                .prefix
                .strip_prefix(&it.registry)
                .is_some_and(|rest| rest.starts_with('/'))
        })
    };
    let notes = others.iter().filter(is_closer);
    notes
        .map(|block| {
            format!(
                "{} goes past the mirror: {} has a block for it",
                block.prefix,
                view.show(&block.file)
            )
        })
        .collect()
}

pub(super) fn restart(runtime: Runtime) -> Restart {
    match runtime {
        Runtime::Crio => Restart::Unit {
            verb: "reload",
            unit: "crio",
            why: "CRI-O reads the registries again",
        },
        _ => Restart::None("podman, skopeo and buildah read these files at each pull"),
    }
}
