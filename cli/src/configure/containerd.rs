//! containerd: hosts.toml for all registries or for some, and the key that makes CRI look for them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::edit::Edit;
use super::edit::hosts::{self, Verdict};
use super::plan::{Change, View, Wanted};
use super::rancher::{self, Distribution};
use super::request::{ALL, Request};
use super::{Restart, Wishes};
use hawker_config::problem::Problem;

/// The usual place of its configuration.
pub(crate) const FILE: &str = "/etc/containerd/config.toml";
/// The usual folder of hosts.toml files.
pub(crate) const HOSTS_DIR: &str = "/etc/containerd/certs.d";
/// The part of [`super::containerd`]'s default from 2.2 on that is docker's.
const DOCKER_DIR: &str = "/etc/docker/certs.d";

/// The plugin that has the registries: in files of version 1, 2, and 3 with all later ones.
pub(crate) const CRI: [&str; 3] = [
    "cri",
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
];
/// The plugin that listens, in files of version 4 and later; before that, the table `grpc`.
const SERVER: &str = "io.containerd.server.v1.grpc";
/// The newest format that this program knows: the default of containerd 2.3 and 2.4.
const NEWEST: i64 = 4;
/// The name of the drop-in for a configuration of a later format.
const DROP_IN: &str = "50-hawker.toml";

/// Files that a configuration may import, its own included.
const FILES_MAX: usize = 64;

/// The parts of containerd's configuration that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Config {
    /// The format of the main file: 1 and 2 for containerd 1.x, 3 from 2.0 on, 4 from 2.3 on.
    pub(crate) version: i64,
    /// A file of a format that is later than [`NEWEST`].
    pub(crate) later: Option<(PathBuf, i64)>,
    /// The folder from which the main file imports all `*.toml`.
    pub(crate) drop_ins: Option<PathBuf>,
    pub(crate) address: Option<PathBuf>,
    pub(crate) cri_disabled: bool,
    pub(crate) config_path: Option<String>,
    /// The last file with a section for the plugin. To 1.x only that one counts; to 2.x, all of them together.
    pub(crate) last: Option<Section>,
    /// The old way, `registry.mirrors`, with the endpoints of each: excludes `config_path`.
    pub(crate) old_mirrors: BTreeMap<String, Vec<String>>,
    /// `registry.configs` with a `tls` table: excludes it too.
    pub(crate) old_tls: BTreeSet<String>,
}

/// A plugin's section in one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Section {
    pub(crate) file: PathBuf,
    pub(crate) plugin: &'static str,
    pub(crate) config_path: Option<String>,
}

impl Config {
    /// The file and what it imports. A file that is missing is an empty one, as for containerd.
    pub(crate) fn read(view: &View<'_>, path: &Path) -> anyhow::Result<Self> {
        let mut config = Self::default();
        let mut seen = BTreeSet::new();
        let mut pending = VecDeque::from([path.to_owned()]);
        while let Some(file) = pending.pop_front() {
            if !seen.insert(file.clone()) {
                continue;
            }
            anyhow::ensure!(
                seen.len() <= FILES_MAX,
                "{} imports more than {FILES_MAX} files",
                view.show(path)
            );
            let Some(text) = view.read(&file)? else {
                continue;
            };
            let table: Table = text.parse().map_err(|error: toml::de::Error| {
                let message = error.message().trim().replace('\n', ", ");
                anyhow::anyhow!("{} is no TOML: {message}", view.show(&file))
            })?;
            let version = version_of(&table).map_err(|found| {
                let file = view.show(&file);
                anyhow::anyhow!(
                    "{file} says `version = {found}`, which is no version of containerd's configuration; write version = 1, 2, 3 \
                     or 4, as a number without quotes (`containerd config migrate` gives a file of this containerd's version)"
                )
            })?;
            config.take(&file, file == path, version, &table);
            let imports = table
                .get("imports")
                .and_then(Value::as_array)
                .into_iter()
                .flatten();
            let imports: Vec<&str> = imports.filter_map(Value::as_str).collect();
            if file == path {
                config.drop_ins = imports
                    .iter()
                    .find_map(|import| all_of_a_folder(&file, import));
            }
            pending.extend(
                imports
                    .into_iter()
                    .flat_map(|import| expand(view, &file, import)),
            );
        }
        if seen.len() == 1 && !view.exists(path) {
            config.version = 2;
        }
        Ok(config)
    }

    fn take(&mut self, file: &Path, is_main: bool, version: Option<i64>, table: &Table) {
        if is_main {
            self.version = version.unwrap_or(1);
        }
        if let Some(later) = version.filter(|version| *version > NEWEST) {
            self.later.get_or_insert((file.to_owned(), later));
        }
        let at = |path: &[&str]| look(table, path);
        let address = at(&["plugins", SERVER, "address"]).or_else(|| at(&["grpc", "address"]));
        if let Some(address) = address
            .and_then(Value::as_str)
            .filter(|address| !address.is_empty())
        {
            self.address = Some(PathBuf::from(address));
        }
        let disabled = at(&["disabled_plugins"])
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        self.cri_disabled |= disabled
            .filter_map(Value::as_str)
            .any(|name| CRI.contains(&name));
        let plugin = plugin_of(version.unwrap_or(self.version));
        if at(&["plugins", plugin]).is_none() {
            return;
        }
        let own = at(&["plugins", plugin, "registry", "config_path"]).and_then(Value::as_str);
        let own = own.filter(|path| !path.is_empty()).map(str::to_owned);
        self.config_path = own.clone().or(self.config_path.take());
        self.last = Some(Section {
            file: file.to_owned(),
            plugin,
            config_path: own,
        });
        let tables = |key| {
            at(&["plugins", plugin, "registry", key])
                .and_then(Value::as_table)
                .into_iter()
                .flatten()
        };
        for (registry, mirror) in tables("mirrors") {
            let endpoints = mirror
                .get("endpoint")
                .and_then(Value::as_array)
                .into_iter()
                .flatten();
            let endpoints = endpoints
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect();
            self.old_mirrors.insert(registry.clone(), endpoints);
        }
        let tls = tables("configs").filter(|(_, config)| config.get("tls").is_some());
        self.old_tls
            .extend(tls.map(|(registry, _)| registry.clone()));
    }

    /// The plugin's name in a file that has none of it yet.
    pub(crate) fn plugin(&self) -> &'static str {
        plugin_of(self.version)
    }

    /// A warning about a format that this program does not know, if there is one.
    pub(crate) fn warning(&self, view: &View<'_>) -> Option<String> {
        let (file, version) = self.later.as_ref()?;
        Some(format!(
            "{} is of version {version}, and this hawker knows containerd's configuration up to version {NEWEST}: it is read as \
             version {NEWEST}",
            view.show(file)
        ))
    }

    /// The first folder that containerd searches for hosts.toml files.
    pub(crate) fn hosts_dir(&self) -> Option<&Path> {
        self.config_path
            .as_deref()
            .and_then(|dirs| dirs.split(':').next())
            .map(Path::new)
    }

    /// Whether an import has a section without the directory, which takes it away from containerd 1.x.
    pub(crate) fn is_replaced(&self) -> Option<&Section> {
        self.last
            .as_ref()
            .filter(|last| last.config_path.is_none() && self.config_path.is_some())
    }

    /// Why CRI would not start with `config_path`, if so, and what to write instead.
    pub(crate) fn excluded(&self) -> Option<(String, String)> {
        if self.old_mirrors.is_empty() && self.old_tls.is_empty() {
            return None;
        }
        let dir = self.hosts_dir().unwrap_or(Path::new(HOSTS_DIR)).display();
        let mut what = Vec::new();
        let mut cure = "take these tables out".to_owned();
        if !self.old_mirrors.is_empty() {
            let names: Vec<&str> = self.old_mirrors.keys().map(String::as_str).collect();
            what.push(format!("registry.mirrors (of {})", names.join(", ")));
        }
        for (registry, endpoints) in &self.old_mirrors {
            let name = if registry == "*" { ALL } else { registry };
            let hosts: String = endpoints.iter().map(|url| hosts::table(url)).collect();
            cure += &format!("; in their place {dir}/{name}/hosts.toml:\n{hosts}");
        }
        if !self.old_tls.is_empty() {
            let names: Vec<&str> = self.old_tls.iter().map(String::as_str).collect();
            what.push(format!("registry.configs…tls (of {})", names.join(", ")));
            cure += "; in place of tls: ca, client, skip_verify in that registry's hosts.toml";
        }
        Some((
            format!(
                "{} excludes config_path: CRI does not start with both",
                what.join(" and ")
            ),
            cure,
        ))
    }
}

/// The version that a file says it is of, if any; an error is what it says instead. A later version than [`NEWEST`] is none.
fn version_of(table: &Table) -> Result<Option<i64>, &Value> {
    let Some(version) = table.get("version") else {
        return Ok(None);
    };
    version
        .as_integer()
        .filter(|version| *version >= 1)
        .map(Some)
        .ok_or(version)
}

/// The folder whose `*.toml` an import names.
fn all_of_a_folder(importer: &Path, import: &str) -> Option<PathBuf> {
    let path = importer.parent().unwrap_or(Path::new("/")).join(import);
    path.file_name()
        .is_some_and(|name| name == "*.toml")
        .then(|| path.parent().map(Path::to_owned))
        .flatten()
}

fn plugin_of(version: i64) -> &'static str {
    CRI[usize::try_from(version - 1).unwrap_or(0).min(CRI.len() - 1)]
}

fn look<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (last, parents) = path.split_last()?;
    parents
        .iter()
        .try_fold(table, |table, name| table.get(*name)?.as_table())?
        .get(*last)
}

/// The files that an import names, relative to the file that imports; `*` stands for any name in the last part.
fn expand(view: &View<'_>, importer: &Path, import: &str) -> Vec<PathBuf> {
    let path = importer.parent().unwrap_or(Path::new("/")).join(import);
    let pattern = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let Some((start, end)) = pattern.split_once('*') else {
        return vec![path];
    };
    let matches = |file: &PathBuf| {
        let name = file
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    view.files(folder).into_iter().filter(matches).collect()
}

/// The names under which containerd looks for a registry's directory, the first that is there.
pub(crate) fn folders_of(dir: &Path, registry: &str) -> Vec<PathBuf> {
    let underscored = registry
        .rsplit_once(':')
        .map(|(host, port)| format!("{host}_{port}_"));
    underscored
        .into_iter()
        .chain([registry.to_owned()])
        .map(|name| dir.join(name))
        .collect()
}

/// The files to write.
pub(super) fn wishes(request: &Request, view: &View<'_>) -> anyhow::Result<Wishes> {
    let mut wishes = Wishes::default();
    let path = request.config.as_deref().unwrap_or(Path::new(FILE));
    if request.config.is_none() {
        let found = Distribution::found(view);
        for of in &found {
            rancher::add_wishes(*of, request, view, &mut wishes)?;
        }
        // The containerd of k3s and RKE2 reads no file in /etc/containerd.
        if !found.is_empty() && !view.exists(path) {
            return Ok(wishes);
        }
    }
    let config = Config::read(view, path)?;
    wishes.notes.extend(config.warning(view).map(|warning| {
        warning
            + "; restart containerd and run `hawker doctor`, which pulls an image to see whether that works"
    }));
    let dir = directory(&config, path, view, &mut wishes);
    let all = [ALL.to_owned()];
    let named: Vec<String> = request
        .registries
        .iter()
        .map(|it| it.registry.clone())
        .collect();
    for registry in if named.is_empty() { &all[..] } else { &named } {
        host(request, view, &dir, registry, &mut wishes)?;
    }
    if named.is_empty() || named.iter().any(|name| name == ALL) {
        wishes
            .notes
            .extend(shadows(view, &dir, &request.mirror.authority, &named));
    }
    Ok(wishes)
}

/// Makes sure that CRI looks for hosts.toml, in one directory.
fn directory(config: &Config, path: &Path, view: &View<'_>, wishes: &mut Wishes) -> PathBuf {
    let dir = config
        .hosts_dir()
        .unwrap_or(Path::new(HOSTS_DIR))
        .to_owned();
    let file = config.last.as_ref().map_or(path, |last| &last.file);
    if config.cri_disabled {
        let note = format!(
            "{} disables the CRI plugin, so config_path is left alone: nerdctl looks in {} by itself, ctr takes --hosts-dir",
            view.show(path),
            dir.display()
        );
        wishes.notes.push(note);
        return dir;
    }
    if let Some((what, cure)) = config.excluded() {
        wishes
            .problems
            .push(Problem::new(view.show(file), what, cure));
    }
    let dirs = config.config_path.as_deref().unwrap_or_default();
    for more in dirs
        .split(':')
        .skip(1)
        .map(Path::new)
        .filter(|more| !view.files(more).is_empty())
    {
        let what = format!(
            "config_path is {dirs}; some pulls of containerd 2.2 and later do not split that"
        );
        let cure = format!(
            "move what is in {} to {}, then try again",
            view.show(more),
            view.show(&dir)
        );
        wishes
            .problems
            .push(Problem::new(view.show(file), what, cure));
    }
    let own = config
        .last
        .as_ref()
        .and_then(|last| last.config_path.as_deref());
    if own != dir.to_str() {
        let drop_in = config
            .later
            .as_ref()
            .and(config.drop_ins.as_ref())
            .map(|folder| folder.join(DROP_IN));
        if config.config_path.is_none() && !view.files(Path::new(DOCKER_DIR)).is_empty() {
            wishes.notes.push(format!(
                "containerd 2.2 and later looked in {DOCKER_DIR} too, and does not any more: move to {} what it needs",
                dir.display()
            ));
        }
        let plugin = config
            .last
            .as_ref()
            .map_or(config.plugin(), |last| last.plugin)
            .to_owned();
        let edit = Edit::ConfigPath {
            plugin,
            dir: dir.display().to_string(),
        };
        // containerd migrates a drop-in of an earlier version by itself, whatever the main file's version.
        wishes.files.push(Wanted {
            path: drop_in.as_deref().unwrap_or(file).to_owned(),
            edit,
        });
    }
    dir
}

/// Makes one registry's pulls ask the mirror first.
fn host(
    request: &Request,
    view: &View<'_>,
    dir: &Path,
    registry: &str,
    wishes: &mut Wishes,
) -> anyhow::Result<()> {
    let own = folders_of(dir, registry);
    let folder = own
        .iter()
        .find(|folder| view.is_dir(folder))
        .or(own.last())
        .cloned()
        .unwrap_or_default();
    let file = folder.join("hosts.toml");
    let text = view.read(&file)?;
    match text
        .as_deref()
        .map(|text| hosts::judge(text, &request.mirror.authority))
    {
        Some(Verdict::Good) => return Ok(()),
        Some(Verdict::Poor(found)) => {
            wishes.notes.push(format!(
                "{} names the mirror already, but {found}",
                view.show(&file)
            ));
            return Ok(());
        }
        Some(Verdict::Bad(_)) => {}
        None => {
            if let Some(problem) = certificates(view, &folder, registry) {
                wishes.problems.push(problem);
            }
        }
    }
    wishes.files.push(Wanted {
        path: file,
        edit: Edit::Host {
            url: request.mirror.url.clone(),
        },
    });
    Ok(())
}

/// Without a hosts.toml, containerd takes certificates from the folder as docker does; with one, only those it names.
fn certificates(view: &View<'_>, folder: &Path, registry: &str) -> Option<Problem> {
    let files = view.files(folder);
    let named = |end: &str| -> Vec<String> {
        let ours = files
            .iter()
            .filter(|file| file.extension().is_some_and(|extension| extension == end));
        ours.map(|file| format!("\"{}\"", file.display())).collect()
    };
    let (authorities, clients) = (named("crt"), named("cert"));
    if authorities.is_empty() && clients.is_empty() {
        return None;
    }
    let mut cure = format!(
        "write {}:\nserver = \"https://{registry}\"",
        view.show(&folder.join("hosts.toml"))
    );
    if !authorities.is_empty() {
        cure += &format!("\nca = [{}]", authorities.join(", "));
    }
    if !clients.is_empty() {
        let pairs: Vec<String> = clients
            .iter()
            .map(|cert| format!("[{cert}, {}]", cert.replace(".cert\"", ".key\"")))
            .collect();
        cure += &format!("\nclient = [{}]", pairs.join(", "));
    }
    let what =
        "holds certificates, which containerd no longer takes by itself once there is a hosts.toml";
    Some(Problem::new(
        view.show(folder),
        what,
        cure + "\nthen try again",
    ))
}

/// Registries with a directory of their own never see `_default`.
fn shadows(view: &View<'_>, dir: &Path, mirror: &str, named: &[String]) -> Option<String> {
    let past = |folder: &PathBuf| {
        let text = view.read(&folder.join("hosts.toml")).ok().flatten();
        let is_past =
            text.is_some_and(|text| matches!(hosts::judge(&text, mirror), Verdict::Bad(_)));
        let known = named
            .iter()
            .flat_map(|name| folders_of(dir, name))
            .any(|other| other == *folder);
        is_past && !known && *folder != dir.join(ALL)
    };
    let folders: Vec<PathBuf> = view.files(dir).into_iter().filter(past).collect();
    let names: Vec<String> = folders
        .iter()
        .filter_map(|folder| registry_of(folder))
        .collect();
    (!names.is_empty()).then(|| {
        format!(
            "a directory of their own have, and so go past {ALL}: {}; to include them: --registry {ALL} --registry {}",
            names.join(", "),
            names.join(" --registry ")
        )
    })
}

/// The registry that a directory is for.
fn registry_of(folder: &Path) -> Option<String> {
    let name = folder.file_name()?.to_str()?;
    let port = name
        .strip_suffix('_')
        .and_then(|name| name.rsplit_once('_'));
    Some(port.map_or_else(|| name.to_owned(), |(host, port)| format!("{host}:{port}")))
}

/// hosts.toml is read at each pull, the rest when containerd starts.
pub(super) fn restart(changes: &[Change], view: &View<'_>) -> Restart {
    if let Some(restart) = rancher::restart(changes, view) {
        return restart;
    }
    if changes.iter().all(|change| {
        change
            .path
            .file_name()
            .is_some_and(|name| name == "hosts.toml")
    }) {
        return Restart::None("containerd reads hosts.toml at each pull");
    }
    Restart::Unit {
        verb: "restart",
        unit: "containerd",
        why: "containers run on meanwhile",
    }
}
