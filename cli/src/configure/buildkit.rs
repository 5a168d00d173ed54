//! BuildKit: mirrors by registry in buildkitd.toml. It names the registry to the mirror as containerd does.

use std::path::Path;

use super::edit::Edit;
use super::plan::{View, Wanted};
use super::request::{Own, Request};
use super::{Restart, Wishes};

/// The usual place of its configuration.
pub(crate) const FILE: &str = "/etc/buildkit/buildkitd.toml";

/// The files to write.
pub(super) fn wishes(request: &Request, view: &View<'_>) -> Wishes {
    let path = request
        .config
        .as_deref()
        .unwrap_or(Path::new(FILE))
        .to_owned();
    let registries = request.chosen(|| Own::read(view).registries());
    let registries = registries.into_iter().map(|it| it.registry).collect();
    let edit = Edit::Buildkitd {
        mirror: request.mirror.authority.clone(),
        http: request.mirror.http,
        registries,
    };
    Wishes {
        files: vec![Wanted { path, edit }],
        ..Wishes::default()
    }
}

pub(super) fn restart() -> Restart {
    Restart::Unit {
        verb: "restart",
        unit: "buildkit",
        why: "builds that run are ended",
    }
}
