//! dockerd: mirrors of Docker Hub in daemon.json. (Other registries reach Hawker only as a forward proxy, which dockerd is told
//! by its environment, not here.)

use std::path::{Path, PathBuf};

use super::edit::Edit;
use super::plan::{Change, View, Wanted};
use super::request::{Own, Request};
use super::{Restart, Wishes};
use hawker_config::problem::Problem;

/// The usual place of its configuration.
pub(crate) const FILE: &str = "/etc/docker/daemon.json";

/// The usual places of dockerd's flags: a flag that is also a key of the file keeps dockerd from starting.
const FLAGS: [&str; 4] = [
    "/etc/systemd/system/docker.service",
    "/lib/systemd/system/docker.service",
    "/etc/default/docker",
    "/etc/sysconfig/docker",
];
const FLAGS_FOLDER: &str = "/etc/systemd/system/docker.service.d";

/// The files to write.
pub(super) fn wishes(request: &Request, view: &View<'_>) -> Wishes {
    let path = request
        .config
        .as_deref()
        .unwrap_or(Path::new(FILE))
        .to_owned();
    let problems = flagged(view).into_iter().map(|file| {
        let what =
            "starts dockerd with --registry-mirror, and it refuses a key that is also a flag";
        Problem::new(
            view.show(&file),
            what,
            format!(
                "move these mirrors to registry-mirrors in {}",
                view.show(&path)
            ),
        )
    });
    let mut wishes = Wishes {
        problems: problems.collect(),
        ..Wishes::default()
    };
    if Own::read(view)
        .default
        .is_none_or(|default| default != "docker.io")
    {
        wishes.notes.push(
            "docker does not say which registry it means: the daemon needs --default-registry docker.io (default_registry in \
             its configuration)"
                .to_owned(),
        );
    }
    wishes
        .notes
        .push("docker asks its mirrors for docker.io's images alone".to_owned());
    wishes.files.push(Wanted {
        path,
        edit: Edit::DockerMirror {
            url: request.mirror.url.clone(),
        },
    });
    wishes
}

/// The files that give dockerd the flag.
fn flagged(view: &View<'_>) -> Vec<PathBuf> {
    let files = FLAGS
        .into_iter()
        .map(PathBuf::from)
        .chain(view.files(Path::new(FLAGS_FOLDER)));
    let has = |file: &PathBuf| {
        let text = view.read(file).ok().flatten().unwrap_or_default();
        text.lines()
            .any(|line| !line.trim_start().starts_with('#') && line.contains("--registry-mirror"))
    };
    files.filter(has).collect()
}

/// A reload tells dockerd of mirrors, but not that there are none any more.
pub(super) fn restart(changes: &[Change]) -> Restart {
    let has = |text: &String| text.to_ascii_lowercase().contains("\"registry-mirrors\"");
    if changes
        .iter()
        .all(|change| change.after.as_ref().is_some_and(has))
    {
        return Restart::Unit {
            verb: "reload",
            unit: "docker",
            why: "dockerd reads its mirrors again",
        };
    }
    let why = "a reload would keep the mirror; containers restart too, unless live-restore is set";
    Restart::Unit {
        verb: "restart",
        unit: "docker",
        why,
    }
}
