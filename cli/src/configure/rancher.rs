//! k3s and RKE2: each has a containerd of its own, whose configuration it writes anew at each start, from `registries.yaml`.

use std::path::{Path, PathBuf};

use super::edit::Edit;
use super::plan::{Change, View, Wanted};
use super::request::{ALL, Request};
use super::{Restart, Wishes};

/// A Kubernetes distribution with a containerd of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Distribution {
    pub(crate) name: &'static str,
    /// Its own configuration: of the mirrors too.
    etc: &'static str,
    /// Its data, with containerd's configuration in it.
    data: &'static str,
    /// A folder that a server has and an agent has not.
    server: &'static str,
    units: [&'static str; 2],
}

/// The socket of the containerd of both.
pub(crate) const SOCKET: &str = "/run/k3s/containerd/containerd.sock";

const ALL_OF_THEM: [Distribution; 2] = [
    Distribution {
        name: "k3s",
        etc: "/etc/rancher/k3s",
        data: "/var/lib/rancher/k3s",
        server: "/var/lib/rancher/k3s/server",
        units: ["k3s", "k3s-agent"],
    },
    Distribution {
        name: "RKE2",
        etc: "/etc/rancher/rke2",
        data: "/var/lib/rancher/rke2",
        server: "/var/lib/rancher/rke2/server",
        units: ["rke2-server", "rke2-agent"],
    },
];

impl Distribution {
    /// The distributions that a system has.
    pub(crate) fn found(view: &View<'_>) -> Vec<Self> {
        let is_there =
            |it: &Self| view.is_dir(Path::new(it.etc)) || view.is_dir(Path::new(it.data));
        ALL_OF_THEM.into_iter().filter(is_there).collect()
    }

    /// The file that names mirrors.
    pub(crate) fn registries(&self) -> PathBuf {
        Path::new(self.etc).join("registries.yaml")
    }

    /// containerd's configuration, as it is written at each start.
    pub(crate) fn config(&self) -> PathBuf {
        Path::new(self.data).join("agent/etc/containerd/config.toml")
    }

    /// The folder of the programs that it brings, `ctr` among them.
    pub(crate) fn programs(&self) -> PathBuf {
        Path::new(self.data).join("bin")
    }

    /// The unit that has to restart.
    pub(crate) fn unit(&self, view: &View<'_>) -> &'static str {
        let [server, agent] = self.units;
        let is_agent = view.is_dir(Path::new(self.data)) && !view.is_dir(Path::new(self.server));
        if is_agent { agent } else { server }
    }
}

/// Adds what one distribution needs.
pub(super) fn add_wishes(
    of: Distribution,
    request: &Request,
    view: &View<'_>,
    wishes: &mut Wishes,
) -> anyhow::Result<()> {
    let path = of.registries();
    let named: Vec<String> = request
        .registries
        .iter()
        .map(|it| it.registry.clone())
        .collect();
    let named = if named.is_empty() {
        vec![ALL.to_owned()]
    } else {
        named
    };
    let text = view.read(&path)?.unwrap_or_default();
    // A registry with an entry of its own never sees the one for all.
    let past: Vec<String> = super::edit::registries_yaml::mirrored(&text)
        .into_iter()
        .filter(|name| !named.contains(name) && name != "*" && named.iter().any(|it| it == ALL))
        .collect();
    if !past.is_empty() {
        wishes.notes.push(format!(
            "in {} these have an entry of their own, and so go past the one for all: {}; to include them: --registry {ALL} \
             --registry {}",
            view.show(&path),
            past.join(", "),
            past.join(" --registry ")
        ));
    }
    let edit = Edit::RegistriesYaml {
        url: request.mirror.url.clone(),
        registries: named,
    };
    wishes.files.push(Wanted { path, edit });
    Ok(())
}

/// The restart that changed files need, if any is a distribution's.
pub(super) fn restart(changes: &[Change], view: &View<'_>) -> Option<Restart> {
    let changed = |of: &Distribution| changes.iter().any(|change| change.path.starts_with(of.etc));
    let of = ALL_OF_THEM.into_iter().find(changed)?;
    let why = "it writes containerd's configuration anew from registries.yaml when it starts; containers run on meanwhile";
    Some(Restart::Unit {
        verb: "restart",
        unit: of.unit(view),
        why,
    })
}
