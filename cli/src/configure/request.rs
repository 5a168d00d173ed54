//! A person's request, checked: the mirror, and the registries whose pulls go to it.

use std::path::{Path, PathBuf};

use hawker_oci::reference::{canonical_host, host_matches};
use toml::{Table, Value};

use super::edit::Mirrored;
use super::mirror::Mirror;
use super::plan::View;
use crate::args::{ConfigureArgs, Runtime};
use hawker_config::problem::Problem;

/// containerd's name for all registries.
pub(crate) const ALL: &str = "_default";

/// The registries of most clusters' images. podman, CRI-O and BuildKit have no word for all registries.
const WELL_KNOWN: [&str; 7] = [
    "docker.io",
    "quay.io",
    "ghcr.io",
    "registry.k8s.io",
    "gcr.io",
    "mcr.microsoft.com",
    "public.ecr.aws",
];

/// Hawker's own configuration, as its systemd units name it.
const OWN: [&str; 2] = ["/etc/hawker/proxy.toml", "/etc/hawker/up.toml"];

/// A runtime to be pointed at a mirror.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) mirror: Mirror,
    /// The runtime's own configuration, where it is not where it is by custom.
    pub(crate) config: Option<PathBuf>,
    /// Those that were named; none: as is best for the runtime.
    pub(crate) registries: Vec<Mirrored>,
}

impl Request {
    /// Checks the flags, and tells all that is wrong.
    pub(crate) fn of(args: &ConfigureArgs) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let mut take = |result: Result<Mirrored, Problem>| {
            result.map_err(|problem| problems.push(problem)).ok()
        };
        let registries: Vec<Mirrored> = args
            .registry
            .iter()
            .filter_map(|text| take(registry(text, args.runtime)))
            .collect();
        let mirror = Mirror::parse(&args.mirror).map_err(|problem| problems.push(problem));
        if args.restart && args.root != Path::new("/") {
            let what = "restarts a runtime of this system, and --root says that it is another's";
            problems.push(Problem::new("--restart", what, "leave one of the two out"));
        }
        match mirror {
            Ok(mirror) if problems.is_empty() => Ok(Self {
                mirror,
                config: args.config.clone(),
                registries,
            }),
            _ => Err(problems),
        }
    }

    /// The registries to write about, for runtimes that have no word for all: those that were named, else `usual`.
    pub(crate) fn chosen(&self, usual: impl FnOnce() -> Vec<Mirrored>) -> Vec<Mirrored> {
        if self.registries.is_empty() {
            usual()
        } else {
            self.registries.clone()
        }
    }
}

/// `HOST[:PORT][=NAME]`.
fn registry(text: &str, runtime: Runtime) -> Result<Mirrored, Problem> {
    let problem = |what: String, cure: &str| Err(Problem::new("--registry", what, cure));
    let (host, name) = text
        .split_once('=')
        .map_or((text, None), |(host, name)| (host, Some(name)));
    let by_path = matches!(runtime, Runtime::Podman | Runtime::Crio);
    if name.is_some() && !by_path {
        return problem(
            format!("`{text}` gives the registry another name"),
            "only podman and crio need that",
        );
    }
    if host == ALL {
        return match runtime {
            Runtime::Containerd => Ok(Mirrored {
                registry: ALL.into(),
                name: ALL.into(),
            }),
            _ => problem(
                format!("`{ALL}` is containerd's word"),
                "name each registry",
            ),
        };
    }
    let canonical = |host: &str| match canonical_host(host) {
        Ok(host) => Ok(host),
        Err(error) => Err(Problem::new(
            "--registry",
            format!("`{host}` is no registry: {error}"),
            "write it as in an image's name: docker.io, registry.example:5000",
        )),
    };
    let registry = canonical(host)?;
    if runtime == Runtime::Docker && registry != "docker.io" {
        let cure = "leave it out; other registries' images reach Hawker through docker's proxy settings only";
        return problem(
            format!("`{text}`: docker asks its mirrors for docker.io's images alone"),
            cure,
        );
    }
    let name = name.map_or_else(|| Ok(registry.clone()), canonical)?;
    if by_path && name.contains(':') {
        return problem(
            format!("`{name}` has a port, which no path of a mirror can hold"),
            &format!(
                "give it a name in Hawker's configuration, [registries.\"corp.internal\"] endpoints = [\"https://{name}\"], \
                 and say --registry {host}=corp.internal"
            ),
        );
    }
    if by_path && !can_be_path(&name) {
        let what = format!("`{name}` without a dot would be taken for a part of the repository");
        return problem(
            what,
            "give it a name with a dot: --registry HOST=NAME, and NAME in Hawker's configuration",
        );
    }
    Ok(Mirrored { registry, name })
}

/// Whether a mirror understands this as the registry, where it begins a path.
pub(crate) fn can_be_path(name: &str) -> bool {
    !name.contains(':') && (name.contains('.') || name == "localhost")
}

/// The registries in Hawker's own configuration; all empty if there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Own {
    known: Vec<String>,
    allow: Vec<String>,
    pub(crate) default: Option<String>,
}

impl Own {
    pub(crate) fn read(view: &View<'_>) -> Self {
        let text = OWN
            .iter()
            .find_map(|path| view.read(Path::new(path)).ok().flatten());
        text.and_then(|text| text.parse().ok())
            .map_or_else(Self::default, |table| Self::of(&table))
    }

    fn of(table: &Table) -> Self {
        let texts = |key: &str| -> Vec<String> {
            let value = table.get(key);
            let one = value.and_then(Value::as_str).into_iter();
            let many = value
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(Value::as_str);
            one.chain(many).map(str::to_owned).collect()
        };
        let known = table
            .get("registries")
            .and_then(Value::as_table)
            .into_iter()
            .flatten();
        Self {
            known: known
                .filter_map(|(host, _)| canonical_host(host).ok())
                .collect(),
            allow: texts("allow_registry"),
            default: texts("default_registry").pop(),
        }
    }

    /// Those that it knows, and of the well-known ones those that it lets be asked.
    pub(crate) fn registries(&self) -> Vec<Mirrored> {
        let allowed = |host: &str| {
            self.allow.is_empty() || self.allow.iter().any(|one| host_matches(one, host))
        };
        let well_known = WELL_KNOWN
            .into_iter()
            .filter(|host| allowed(host))
            .map(str::to_owned);
        let exact = self
            .allow
            .iter()
            .filter(|one| !one.contains('*'))
            .filter_map(|one| canonical_host(one).ok());
        let all = well_known
            .chain(self.known.iter().cloned())
            .chain(exact)
            .chain(self.default.clone());
        let mut registries: Vec<Mirrored> = Vec::new();
        for registry in all {
            if registries.iter().all(|other| other.registry != registry) {
                registries.push(Mirrored {
                    name: registry.clone(),
                    registry,
                });
            }
        }
        registries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_is_written_as_its_runtime_needs_it() {
        let as_for = |text, runtime| registry(text, runtime).map(|it| (it.registry, it.name));
        let same = |name: &str| Ok((name.to_owned(), name.to_owned()));
        assert_eq!(
            as_for("index.docker.io", Runtime::Containerd),
            same("docker.io")
        );
        assert_eq!(
            as_for("reg.example:5000", Runtime::Containerd),
            same("reg.example:5000")
        );
        assert_eq!(as_for("_default", Runtime::Containerd), same("_default"));
        assert_eq!(
            as_for("reg.example:5000=corp.internal", Runtime::Podman),
            Ok(("reg.example:5000".into(), "corp.internal".into()))
        );
        for (text, runtime) in [
            ("_default", Runtime::Podman),
            ("reg.example:5000", Runtime::Crio),
            ("plain", Runtime::Crio),
            ("a.example=b.example", Runtime::Containerd),
            ("quay.io", Runtime::Docker),
            ("https://quay.io", Runtime::Containerd),
            ("*.example.com", Runtime::Podman),
            ("../etc", Runtime::Containerd),
            ("", Runtime::Containerd),
        ] {
            assert!(registry(text, runtime).is_err(), "{text}");
        }
    }

    #[test]
    fn what_hawker_knows_and_allows_is_mirrored() {
        let registries = |text: &str| -> Vec<String> {
            let own = Own::of(&text.parse().unwrap());
            own.registries().into_iter().map(|it| it.registry).collect()
        };
        assert_eq!(registries(""), WELL_KNOWN);
        let text = "allow_registry = [\"*.io\", \"corp.example\"]\ndefault_registry = \"docker.io\"\n\
                    [registries.\"own.example:5000\"]\n";
        let expected = [
            "docker.io",
            "quay.io",
            "ghcr.io",
            "registry.k8s.io",
            "gcr.io",
            "own.example:5000",
            "corp.example",
        ];
        assert_eq!(registries(text), expected);
    }
}
