//! `hawker configure` on whole systems: folders with the files that runtimes have in the world.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use clap::Parser;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::args::{Cli, Command};

const CRI_1: &str = containerd::CRI[1];
const CRI_2: &str = containerd::CRI[2];

/// A system's files.
struct System(TempDir);

/// All that is below a root: links, modes and texts.
type Snapshot = BTreeMap<PathBuf, String>;

impl System {
    fn with(files: &[(&str, &str)]) -> Self {
        let system = Self(tempfile::tempdir().unwrap());
        files
            .iter()
            .for_each(|(path, text)| system.write(path, text));
        system
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, text: &str) {
        fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        fs::write(self.at(path), text).unwrap();
    }

    fn text(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap()
    }

    fn snapshot(&self) -> Snapshot {
        let mut all = Snapshot::new();
        let mut pending = vec![self.0.path().to_owned()];
        while let Some(path) = pending.pop() {
            let metadata = fs::symlink_metadata(&path).unwrap();
            let what = if metadata.is_symlink() {
                fs::read_link(&path).unwrap().display().to_string()
            } else if metadata.is_dir() {
                pending.extend(
                    fs::read_dir(&path)
                        .unwrap()
                        .map(|entry| entry.unwrap().path()),
                );
                "folder".to_owned()
            } else {
                format!("{:?}", fs::read(&path).unwrap())
            };
            all.insert(path, format!("{:o} {what}", metadata.mode()));
        }
        all
    }

    /// The changes of a run, made; with their notes.
    fn run(&self, line: &str) -> anyhow::Result<(Plan, Vec<String>)> {
        let root = self.0.path().to_str().unwrap();
        let words = ["hawker", "configure"]
            .into_iter()
            .chain(line.split(' '))
            .chain(["--root", root]);
        let Command::Configure(args) = Cli::try_parse_from(words)?.command else {
            panic!("{line}")
        };
        let request = Request::of(&args).map_err(Problems)?;
        let root = Root::new(&args.root);
        let (plan, notes) = plan(&root, &args, &request)?;
        plan.carry_out(&root)?;
        Ok((plan, notes))
    }

    fn refused(&self, line: &str) -> String {
        let before = self.snapshot();
        let error = self.run(line).expect_err("refused").to_string();
        assert_eq!(
            self.snapshot(),
            before,
            "refused, and nothing done: {error}"
        );
        error
    }

    /// Runs it, runs it again in vain, takes it out: nothing is different.
    fn there_and_back(&self, line: &str) -> anyhow::Result<()> {
        let before = self.snapshot();
        self.run(line)?;
        let after = self.snapshot();
        let (again, _) = self.run(line)?;
        assert!(again.is_empty(), "{line}: {:?}", again.changes);
        assert_eq!(self.snapshot(), after);
        let runtime = line.split(' ').next().unwrap();
        self.run(&format!("{runtime} --remove"))?;
        assert_eq!(self.snapshot(), before, "{line}");
        Ok(())
    }
}

const CONFIG: &str = containerd::FILE;
const HOSTS: &str = "/etc/containerd/certs.d/_default/hosts.toml";

fn config_path(text: &str, plugin: &str) -> Option<String> {
    let table: toml::Table = text.parse().unwrap();
    Some(
        table
            .get("plugins")?
            .get(plugin)?
            .get("registry")?
            .get("config_path")?
            .as_str()?
            .to_owned(),
    )
}

#[test]
fn containerd_looks_for_hosts_toml_whatever_its_configuration_looks_like() {
    let debian = format!(
        "version = 2\n\n[plugins]\n  [plugins.\"{CRI_1}\"]\n    [plugins.\"{CRI_1}\".cni]\n      bin_dir = \"/usr/lib/cni\"\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\n    path = \"/var/lib/containerd/opt\"\n"
    );
    let dumped = format!(
        "version = 2\n[plugins]\n  [plugins.\"{CRI_1}\"]\n    sandbox_image = \"pause\"\n\n    [plugins.\"{CRI_1}\".registry]\n      \
         config_path = \"\"\n\n      [plugins.\"{CRI_1}\".registry.auths]\n\n      [plugins.\"{CRI_1}\".registry.mirrors]\n"
    );
    let dumped_2 = format!(
        "version = 3\n[plugins.'{CRI_2}']\n  snapshotter = 'overlayfs'\n  [plugins.'{CRI_2}'.registry]\n    config_path = '/etc/containerd/certs.d:/etc/docker/certs.d'\n"
    );
    let dumped_2_3 = format!(
        "version = 4\nroot = '/var/lib/containerd'\nimports = ['/etc/containerd/conf.d/*.toml']\n\n[plugins]\n  \
         [plugins.'{CRI_2}']\n    snapshotter = 'overlayfs'\n\n    [plugins.'{CRI_2}'.registry]\n      config_path = ''\n\n  \
         [plugins.'io.containerd.server.v1.grpc']\n    address = '/run/containerd/containerd.sock'\n\n  \
         [plugins.'io.containerd.transfer.v1.local']\n    config_path = ''\n"
    );
    for (name, text, plugin) in [
        ("Debian's", Some(debian.as_str()), CRI_1),
        ("dumped by 1.7", Some(&dumped), CRI_1),
        ("dumped by 2.2", Some(&dumped_2), CRI_2),
        ("none", None, CRI_1),
        ("without a version", Some("oom_score = 0\n"), "cri"),
        ("of version 3", Some("version = 3\n"), CRI_2),
        ("of version 4", Some("version = 4\n"), CRI_2),
        ("dumped by 2.3", Some(&dumped_2_3), CRI_2),
        ("empty", Some(""), "cri"),
    ] {
        let files: Vec<_> = text.map(|text| (CONFIG, text)).into_iter().collect();
        let system = System::with(&files);
        system.run("containerd").unwrap();
        let written = system.text(CONFIG);
        assert_eq!(
            config_path(&written, plugin).as_deref(),
            Some(containerd::HOSTS_DIR),
            "{name}: {written}"
        );
        assert!(
            system
                .text(HOSTS)
                .contains("[host.\"http://127.0.0.1:6500\"]"),
            "{name}"
        );
        let kept = |line: &&str| !line.contains("config_path");
        if text.is_some_and(|text| text.contains("transfer.v1")) {
            assert!(
                written.ends_with(
                    "[plugins.'io.containerd.transfer.v1.local']\n    config_path = ''\n"
                )
            );
        }
        let lines = text.unwrap_or_default().lines().filter(kept);
        lines.for_each(|line| {
            assert!(
                written.lines().any(|other| other == line),
                "{name}: {line} is lost"
            )
        });
        System::with(&files).there_and_back("containerd").unwrap();
    }
}

#[test]
fn a_directory_that_is_set_already_is_used() {
    let text =
        format!("version = 2\n[plugins.\"{CRI_1}\".registry]\nconfig_path = \"/opt/certs\"\n");
    let system = System::with(&[(CONFIG, &text)]);
    let (plan, _) = system
        .run("containerd --registry quay.io --registry reg.example:5000")
        .unwrap();
    let paths: Vec<_> = plan
        .changes
        .iter()
        .map(|change| change.path.display().to_string())
        .collect();
    assert_eq!(
        paths,
        [
            "/opt/certs/quay.io/hosts.toml",
            "/opt/certs/reg.example:5000/hosts.toml"
        ]
    );
    assert!(matches!(
        restart(
            Runtime::Containerd,
            &plan.changes,
            &View::plain(&Root::new(system.0.path()))
        ),
        Restart::None(_)
    ));
}

#[test]
fn the_last_import_with_the_plugins_section_gets_the_directory() {
    let section = format!("[plugins.\"{CRI_1}\".registry]\nconfig_path = \"/opt/certs\"\n");
    let main = format!(
        "version = 2\nimports = [\"conf.d/*.toml\", \"/etc/containerd/other.toml\"]\n{section}"
    );
    let system = System::with(&[
        (CONFIG, &main),
        (
            "/etc/containerd/conf.d/10.toml",
            "[debug]\nlevel = \"info\"\n",
        ),
        (
            "/etc/containerd/conf.d/20.toml",
            &format!("[plugins.\"{CRI_1}\"]\nsandbox_image = \"p\"\n"),
        ),
        ("/etc/containerd/conf.d/30.text", "not imported"),
    ]);
    system.there_and_back("containerd").unwrap();
    system.run("containerd").unwrap();
    assert_eq!(system.text(CONFIG), main);
    let imported = system.text("/etc/containerd/conf.d/20.toml");
    assert_eq!(
        config_path(&imported, CRI_1).as_deref(),
        Some("/opt/certs"),
        "{imported}"
    );
    assert!(system.at("/opt/certs/_default/hosts.toml").exists());
}

#[test]
fn what_would_keep_cri_from_starting_is_told_with_the_cure() {
    let of = |rest: &str| format!("version = 2\n[plugins.\"{CRI_1}\".registry]\n{rest}");
    let mirrors = of(&format!(
        "[plugins.\"{CRI_1}\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://corp.example\"]\n"
    ));
    let said = System::with(&[(CONFIG, &mirrors)]).refused("containerd");
    for part in [
        "registry.mirrors (of docker.io)",
        "certs.d/docker.io/hosts.toml",
        "[host.\"https://corp.example\"]",
        CONFIG,
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let tls = of(&format!(
        "[plugins.\"{CRI_1}\".registry.configs.\"a.example\".tls]\nca_file = \"x\"\n"
    ));
    assert!(
        System::with(&[(CONFIG, &tls)])
            .refused("containerd")
            .contains("a.example")
    );
    let auth = of(&format!(
        "[plugins.\"{CRI_1}\".registry.configs.\"a.example\".auth]\npassword = \"x\"\n"
    ));
    System::with(&[(CONFIG, &auth)])
        .there_and_back("containerd")
        .unwrap();
    let pair = of("config_path = \"/a:/b\"\n");
    let system = System::with(&[(CONFIG, &pair), ("/b/reg.example/ca.crt", "x")]);
    assert!(system.refused("containerd").contains("/b"));
    assert!(
        System::with(&[(CONFIG, "version = [")])
            .refused("containerd")
            .contains(CONFIG)
    );
    for version in ["\"4\"", "0", "-1", "2.0", "[2]"] {
        let said =
            System::with(&[(CONFIG, &format!("version = {version}\n"))]).refused("containerd");
        assert!(
            said.contains(CONFIG) && said.contains(&format!("`version = {version}`")),
            "{said}"
        );
        assert!(said.contains("write version = 1, 2, 3 or 4"), "{said}");
    }
    let imported = [
        (CONFIG, "version = 2\nimports = [\"a.toml\"]\n"),
        ("/etc/containerd/a.toml", "version = 0\n"),
    ];
    assert!(
        System::with(&imported)
            .refused("containerd")
            .contains("/etc/containerd/a.toml")
    );
    let inline =
        System::with(&[(CONFIG, "version = 2\nplugins = { x = {} }\n")]).refused("containerd");
    assert!(inline.contains("[table]"), "{inline}");
}

#[test]
fn a_later_version_gets_a_warning_and_a_drop_in_that_containerd_migrates() {
    let text = "version = 5\nimports = ['/etc/containerd/conf.d/*.toml']\n";
    let system = System::with(&[(CONFIG, text)]);
    system.there_and_back("containerd").unwrap();
    let (_, notes) = system.run("containerd").unwrap();
    assert!(
        notes[0].contains("version 5") && notes[0].contains(CONFIG),
        "{notes:?}"
    );
    assert_eq!(system.text(CONFIG), text, "the main file stays");
    let drop_in = system.text("/etc/containerd/conf.d/50-hawker.toml");
    assert!(drop_in.contains("\nversion = 3\n"), "{drop_in}");
    assert_eq!(
        config_path(&drop_in, CRI_2).as_deref(),
        Some(containerd::HOSTS_DIR)
    );
    assert!(system.at(HOSTS).exists());
    // A main file that imports no folder gets the key itself.
    for text in ["version = 5\n", "version = 99\nimports = ['other.toml']\n"] {
        let system = System::with(&[(CONFIG, text)]);
        system.there_and_back("containerd").unwrap();
        let (_, notes) = system.run("containerd").unwrap();
        assert!(notes[0].contains("is read as version 4"), "{notes:?}");
        assert_eq!(
            config_path(&system.text(CONFIG), CRI_2).as_deref(),
            Some(containerd::HOSTS_DIR)
        );
    }
    // A directory that works already needs no drop-in.
    let set = format!("version = 5\n[plugins.'{CRI_2}'.registry]\nconfig_path = '/opt/certs'\n");
    let system = System::with(&[(CONFIG, &set)]);
    system.run("containerd").unwrap();
    assert_eq!(system.text(CONFIG), set);
    assert!(system.at("/opt/certs/_default/hosts.toml").exists());
}

#[test]
fn k3s_and_rke2_get_their_registries_yaml_and_the_words_to_restart() {
    for (folder, server, unit) in [
        ("k3s", true, "k3s"),
        ("k3s", false, "k3s-agent"),
        ("rke2", true, "rke2-server"),
        ("rke2", false, "rke2-agent"),
    ] {
        let generated = format!("/var/lib/rancher/{folder}/agent/etc/containerd/config.toml");
        let system = System::with(&[(&generated, "version = 3\n")]);
        if server {
            system.write(&format!("/var/lib/rancher/{folder}/server/token"), "");
        }
        system.there_and_back("containerd").unwrap();
        let (plan, _) = system.run("containerd").unwrap();
        let path = format!("/etc/rancher/{folder}/registries.yaml");
        let changed: Vec<_> = plan
            .changes
            .iter()
            .map(|change| change.path.display().to_string())
            .collect();
        assert_eq!(
            changed,
            [path.as_str()],
            "what is generated stays, and so does /etc/containerd"
        );
        assert!(
            system
                .text(&path)
                .contains("  \"*\":\n    endpoint:\n      - \"http://127.0.0.1:6500\"\n")
        );
        let root = Root::new(system.0.path());
        let told = restart(Runtime::Containerd, &plan.changes, &View::plain(&root));
        assert!(
            matches!(told, Restart::Unit { verb: "restart", unit: it, .. } if it == unit),
            "{told:?}"
        );
    }
    let theirs = "mirrors:\n  docker.io:\n    endpoint:\n      - https://cache.example\n";
    let path = "/etc/rancher/k3s/registries.yaml";
    let system = System::with(&[(path, theirs)]);
    let (_, notes) = system.run("containerd").unwrap();
    assert!(
        notes
            .iter()
            .any(|note| note.contains("--registry docker.io")),
        "{notes:?}"
    );
    system.run("containerd --remove").unwrap();
    assert_eq!(system.text(path), theirs);
    system
        .there_and_back("containerd --registry _default --registry docker.io")
        .unwrap();
    // Beside a containerd of docker's, both are configured.
    let both = System::with(&[(path, theirs), (CONFIG, "version = 2\n")]);
    both.run("containerd").unwrap();
    assert!(both.text(path).contains("6500") && both.at(HOSTS).exists());
    // The same name as in containerd's own configuration leads to that one alone.
    let named = System::with(&[(path, theirs)]);
    named.run(&format!("containerd --config {CONFIG}")).unwrap();
    assert_eq!(named.text(path), theirs);
}

#[test]
fn a_disabled_cri_is_left_alone() {
    let system = System::with(&[(CONFIG, "disabled_plugins = [\"cri\"]\n")]);
    let (plan, notes) = system.run("containerd").unwrap();
    assert_eq!(plan.changes.len(), 1);
    assert!(notes[0].contains("CRI"), "{notes:?}");
}

#[test]
fn registries_with_a_directory_of_their_own_are_told_of_and_merged_when_named() {
    let theirs = "server = \"https://reg.example:5000\"\n\n[host.\"https://cache.example\"]\n  capabilities = [\"pull\"]\n";
    let path = "/etc/containerd/certs.d/reg.example_5000_/hosts.toml";
    let system = System::with(&[(path, theirs)]);
    let (_, notes) = system.run("containerd").unwrap();
    assert!(
        notes
            .iter()
            .any(|note| note.contains("--registry reg.example:5000")),
        "{notes:?}"
    );
    system.run("containerd --remove").unwrap();
    system
        .run("containerd --registry _default --registry reg.example:5000")
        .unwrap();
    let merged = system.text(path);
    let (ours, cache) = (
        merged.find(":6500").unwrap(),
        merged.find("cache.example").unwrap(),
    );
    assert!(merged.starts_with("server") && ours < cache, "{merged}");
    let certificates = System::with(&[("/etc/containerd/certs.d/reg.example/ca.crt", "x")]);
    let said = certificates.refused("containerd --registry reg.example");
    assert!(
        said.contains("ca = [\"/etc/containerd/certs.d/reg.example/ca.crt\"]"),
        "{said}"
    );
}

#[test]
fn docker_keeps_its_other_keys_and_hears_of_flags_that_would_clash() {
    let path = docker::FILE;
    System::with(&[]).there_and_back("docker").unwrap();
    System::with(&[(path, "")])
        .there_and_back("docker")
        .unwrap();
    let system = System::with(&[(
        path,
        "{\"registry-mirrors\": [\"https://a\"], \"debug\": true}",
    )]);
    system.there_and_back("docker").unwrap();
    let (_, notes) = system.run("docker").unwrap();
    assert!(notes[0].contains("--default-registry docker.io"));
    assert_eq!(
        system.text(path),
        "{\"registry-mirrors\": [\"http://127.0.0.1:6500\", \"https://a\"], \"debug\": true}"
    );
    assert!(
        System::with(&[(path, "{")])
            .refused("docker")
            .contains("no JSON")
    );
    // A reload does not make dockerd forget.
    let system = System::with(&[(path, "{}")]);
    let verb = |line: &str| match docker::restart(&system.run(line).unwrap().0.changes) {
        Restart::Unit { verb, .. } => verb,
        Restart::None(why) => why,
    };
    assert_eq!(
        (verb("docker"), verb("docker --remove")),
        ("reload", "restart")
    );
    let unit = (
        "/etc/systemd/system/docker.service.d/flags.conf",
        "ExecStart=dockerd --registry-mirror=https://a\n",
    );
    assert!(
        System::with(&[unit])
            .refused("docker")
            .contains("flags.conf")
    );
    let own = (
        "/etc/hawker/proxy.toml",
        "default_registry = \"docker.io\"\n",
    );
    let (_, notes) = System::with(&[own]).run("docker").unwrap();
    assert!(!notes[0].contains("--default-registry"));
}

#[test]
fn podman_and_crio_have_a_drop_in_each_and_undo_their_own() {
    let main = (
        containers::FILE,
        "unqualified-search-registries = [\"docker.io\"]\n",
    );
    let system = System::with(&[main]);
    let before = system.snapshot();
    system.run("podman").unwrap();
    system.run("crio").unwrap();
    assert!(
        system.run("podman").unwrap().0.is_empty(),
        "the other one's record is no change"
    );
    let [podman, crio] = [Runtime::Podman, Runtime::Crio].map(containers::drop_in);
    let text = system.text(podman.to_str().unwrap());
    for registry in ["docker.io", "quay.io", "public.ecr.aws"] {
        assert!(
            text.contains(&format!("\"127.0.0.1:6500/{registry}\"")),
            "{text}"
        );
    }
    system.run("podman --remove").unwrap();
    assert!(
        !system.at(podman.to_str().unwrap()).exists() && system.at(crio.to_str().unwrap()).exists()
    );
    system.run("crio --remove").unwrap();
    assert_eq!(system.snapshot(), before);
}

#[test]
fn signatures_that_are_attached_are_looked_for_at_the_mirror_too() {
    let ours = "/etc/containers/registries.d/50-hawker.yaml";
    let theirs = "default-docker:\n  lookaside-staging: file:///var/x\ndocker:\n  quay.io:\n    use-sigstore-attachments: true\n  \
                  ghcr.io/team/app:\n    use-sigstore-attachments: true\n  gcr.io:\n    lookaside: https://a\n  \
                  docker.io:\n    use-sigstore-attachments: false\n";
    let vendor = "docker:\n    '*.example.com': {use-sigstore-attachments: true}\n";
    let system = System::with(&[
        ("/etc/containers/registries.d/own.yaml", theirs),
        ("/usr/share/containers/registries.d/vendor.yaml", vendor),
        ("/etc/containers/registries.d/notes.txt", "["),
    ]);
    system.there_and_back("podman").unwrap();
    let before = system.snapshot();
    let (plan, notes) = system.run("podman").unwrap();
    assert!(
        plan.changes
            .iter()
            .any(|change| change.path == Path::new(ours)),
        "a dry run shows it"
    );
    let scopes = |text: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix("  \""));
        lines
            .filter_map(|line| Some(line.strip_suffix("\":")?.to_owned()))
            .collect()
    };
    let podmans = ["127.0.0.1:6500/ghcr.io/team/app", "127.0.0.1:6500/quay.io"];
    assert_eq!(scopes(&system.text(ours)), podmans);
    assert!(
        notes
            .iter()
            .any(|note| note.contains("gcr.io") && note.contains("lookaside")),
        "{notes:?}"
    );
    // CRI-O shares the file, since no location may stand in two.
    system
        .run("crio --registry quay.io --registry reg.example.com")
        .unwrap();
    assert!(system.run("podman").unwrap().0.is_empty());
    let both = [
        "127.0.0.1:6500/ghcr.io/team/app",
        "127.0.0.1:6500/quay.io",
        "127.0.0.1:6500/reg.example.com",
    ];
    assert_eq!(scopes(&system.text(ours)), both);
    system.run("podman --remove").unwrap();
    assert_eq!(scopes(&system.text(ours)), [both[1], both[2]]);
    system
        .run("podman --registry ghcr.io=corp.internal --mirror http://10.0.0.1:7000")
        .unwrap();
    assert_eq!(
        scopes(&system.text(ours)),
        ["10.0.0.1:7000/corp.internal/team/app", both[1], both[2]]
    );
    // Additions of others stay.
    let more = "  \"other.example\":\n    use-sigstore-attachments: true\n";
    system.write(ours, &(system.text(ours) + more));
    system.run("crio --remove").unwrap();
    system.run("podman --remove").unwrap();
    assert!(
        system.text(ours).ends_with(&format!("docker:\n{more}")),
        "{}",
        system.text(ours)
    );
    fs::remove_file(system.at(ours)).unwrap();
    assert_eq!(system.snapshot(), before);
    // A location that a person wrote already is not written twice.
    let by_hand = "docker:\n  127.0.0.1:6500/quay.io:\n    use-sigstore-attachments: true\n  quay.io:\n    \
                   use-sigstore-attachments: true\n";
    let system = System::with(&[("/etc/containers/registries.d/own.yaml", by_hand)]);
    system.run("podman").unwrap();
    assert!(!system.at(ours).exists());
    let broken = System::with(&[("/etc/containers/registries.d/own.yaml", "docker: [")]);
    assert!(broken.refused("podman").contains("own.yaml is no YAML"));
    let taken = System::with(&[
        (ours, "docker: {}\n"),
        ("/etc/containers/registries.d/own.yaml", theirs),
    ]);
    assert!(taken.refused("podman").contains("move it to another name"));
}

#[test]
fn a_registry_that_another_file_defines_is_not_hidden() {
    let theirs = "[[registry]]\nprefix = \"quay.io\"\nlocation = \"corp.example/quay\"\n[[registry]]\nlocation = \"docker.io/team\"\n";
    let system = System::with(&[("/etc/containers/registries.conf.d/99-corp.conf", theirs)]);
    let said = system.refused("podman --registry quay.io");
    assert!(
        said.contains("99-corp.conf") && said.contains("127.0.0.1:6500/quay.io"),
        "{said}"
    );
    let (_, notes) = system.run("podman").unwrap();
    assert!(
        notes
            .iter()
            .any(|note| note.contains("quay.io is left out")),
        "{notes:?}"
    );
    assert!(
        notes
            .iter()
            .any(|note| note.contains("docker.io/team goes past")),
        "{notes:?}"
    );
    assert!(
        !system
            .text(containers::drop_in(Runtime::Podman).to_str().unwrap())
            .contains("quay.io")
    );
}

#[test]
fn links_are_followed_and_stay() {
    let system = System::with(&[("/opt/real/daemon.json", "{}\n")]);
    fs::create_dir_all(system.at("/etc/docker")).unwrap();
    symlink(
        "/opt/real/daemon.json",
        system.at("/etc/docker/daemon.json"),
    )
    .unwrap();
    fs::set_permissions(
        system.at("/opt/real/daemon.json"),
        fs::Permissions::from_mode(0o600),
    )
    .unwrap();
    system.there_and_back("docker").unwrap();
    system.run("docker").unwrap();
    assert!(system.at("/etc/docker/daemon.json").is_symlink());
    assert!(system.text("/opt/real/daemon.json").contains("6500"));
    let backup = system.at("/opt/real/daemon.json.before-hawker");
    assert_eq!(fs::metadata(backup).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn another_mirror_takes_the_first_ones_place_and_the_original_comes_back() {
    let theirs = "[host.\"https://a\"]\n";
    for line in ["containerd", "docker", "podman", "crio", "buildkit"] {
        let system = System::with(&[
            (HOSTS, theirs),
            (docker::FILE, "{\"a\": 1}"),
            (buildkit::FILE, "debug = true"),
        ]);
        let before = system.snapshot();
        system.run(line).unwrap();
        system
            .run(&format!("{line} --mirror http://10.0.0.1:7000"))
            .unwrap();
        for (path, text) in system.snapshot() {
            assert!(!text.contains("127.0.0.1:6500"), "{}", path.display());
        }
        system.run(&format!("{line} --remove")).unwrap();
        assert_eq!(system.snapshot(), before, "{line}");
    }
}

#[test]
fn what_others_changed_since_stays() {
    let theirs = "server = \"https://a\"\n";
    let system = System::with(&[(HOSTS, theirs), (CONFIG, "version = 2\n")]);
    system.run("containerd").unwrap();
    let more = "\n[host.\"https://b\"]\n  capabilities = [\"pull\"]\n";
    system.write(HOSTS, &(system.text(HOSTS) + more));
    let (again, _) = system.run("containerd").unwrap();
    assert!(again.is_empty(), "{:?}", again.changes);
    let (plan, _) = system.run("containerd --remove").unwrap();
    assert_eq!(plan.kept, [PathBuf::from(HOSTS)]);
    assert_eq!(system.text(HOSTS), format!("{theirs}{more}"));
    assert_eq!(system.text(CONFIG), "version = 2\n");
    assert!(!system.at("/var").exists());
    // A file of ours with something of theirs in it stays, and so do its folders.
    let system = System::with(&[]);
    system.run("containerd").unwrap();
    system.write(HOSTS, &(system.text(HOSTS) + more));
    system.run("containerd --remove").unwrap();
    assert_eq!(system.text(HOSTS).trim(), more.trim());
    assert!(!system.at(CONFIG).exists());
}

#[test]
fn a_file_that_was_removed_since_stays_removed() {
    let system = System::with(&[(docker::FILE, "{}")]);
    system.run("docker").unwrap();
    fs::remove_file(system.at(docker::FILE)).unwrap();
    system.run("docker --remove").unwrap();
    assert!(
        !system.at(docker::FILE).exists()
            && !system.at("/etc/docker/daemon.json.before-hawker").exists()
    );
}

#[test]
fn after_a_crash_at_any_moment_the_next_run_knows_what_was_written() {
    let files = [
        (CONFIG, "version = 2\n"),
        (HOSTS, "server = \"https://a\"\n"),
    ];
    let [config, hosts] = files;
    let whole = System::with(&files);
    let before: Vec<String> = whole.snapshot().into_values().collect();
    whole.run("containerd").unwrap();
    let record = "/var/lib/hawker-configure/record.json";
    // The record is there, and of the files none, the first, or both; then either the same again, or back.
    for written in 0..3 {
        for line in ["containerd", "containerd --remove"] {
            let system = System::with(&files);
            for (path, text) in files {
                system.write(&format!("{path}.before-hawker"), text);
            }
            system.write(record, &whole.text(record));
            for (path, _) in [config, hosts].into_iter().take(written) {
                system.write(path, &whole.text(path));
            }
            system.run(line).unwrap();
            system.run("containerd --remove").unwrap();
            let after: Vec<String> = system.snapshot().into_values().collect();
            assert_eq!(after, before, "{written} {line}");
        }
    }
}

#[test]
fn a_backup_whose_record_is_gone_is_not_overwritten() {
    let system = System::with(&[
        (docker::FILE, "{}"),
        ("/etc/docker/daemon.json.before-hawker", "{\"old\": 1}"),
    ]);
    assert!(system.refused("docker").contains("before-hawker"));
    let nothing = System::with(&[]);
    let (plan, _) = nothing.run("docker --remove").unwrap();
    assert!(plan.is_empty());
    nothing.write("/var/lib/hawker-configure/record.json", "{\"version\": 9}");
    assert!(nothing.run("docker").is_err());
}

#[test]
fn what_is_wrong_with_the_flags_is_told_at_once() {
    let system = System::with(&[]);
    let said =
        system.refused("podman --mirror ftp://a --registry _default --registry reg:5000 --restart");
    for part in ["--mirror", "containerd's word", "has a port", "--restart"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

/// A file made of some of these parts, in this order.
fn made_of(parts: &'static [&'static str]) -> impl Strategy<Value = Option<String>> {
    let text = (
        proptest::sample::subsequence(parts, 0..=parts.len()),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(parts, crlf, cut)| {
            let text = parts.concat();
            let text = if cut {
                text.trim_end().to_owned()
            } else {
                text
            };
            if crlf {
                text.replace('\n', "\r\n")
            } else {
                text
            }
        });
    proptest::option::of(text)
}

fn json() -> impl Strategy<Value = Option<String>> {
    let text = "[a-z\"\\\\é ]{0,6}";
    let leaf = prop_oneof![
        any::<i32>().prop_map(Into::into),
        any::<bool>().prop_map(serde_json::Value::from),
        text.prop_map(serde_json::Value::from)
    ];
    let value = leaf.prop_recursive(2, 8, 3, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..3).prop_map(serde_json::Value::from),
            proptest::collection::hash_map(text, inner, 0..3)
                .prop_map(|map| map.into_iter().collect::<serde_json::Map<_, _>>().into())
        ]
    });
    let mirrors = proptest::collection::vec("https://[a-z]{1,3}", 0..3);
    let mirrors = proptest::option::of(("registry-mirrors|Registry-Mirrors", mirrors));
    let file = (
        proptest::collection::btree_map("[a-z-]{1,8}", value, 0..4),
        mirrors,
        any::<bool>(),
    );
    proptest::option::of(file.prop_map(|(keys, mirrors, pretty)| {
        let mut object: serde_json::Map<String, serde_json::Value> = keys.into_iter().collect();
        if let Some((key, mirrors)) = mirrors {
            object.insert(key, mirrors.into());
        }
        let value = serde_json::Value::from(object);
        if pretty {
            serde_json::to_string_pretty(&value).unwrap() + "\n"
        } else {
            value.to_string()
        }
    }))
}

const CONFIG_PARTS: &[&str] = &[
    "# containerd\n\n",
    "version = 2\n",
    "oom_score = -999 # never\n",
    "imports = [\n  \"conf.d/*.toml\", # more\n]\n",
    "\n[debug]\n\tlevel = 'info'\n",
    "[plugins]\n",
    "  [plugins.\"io.containerd.grpc.v1.cri\"]\n    sandbox_image = \"pause\"\n",
    "    [plugins.\"io.containerd.grpc.v1.cri\".registry]\n",
    "      [plugins.\"io.containerd.grpc.v1.cri\".registry.headers]\n        a = [\"b\"]\n",
    "\n\n[[x.y]]\n# end\n",
    "note = '''\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n'''\n\n",
];
const HOSTS_PARTS: &[&str] = &[
    "# Licence\n",
    "\n",
    "server = \"https://a\"\n",
    "ca = \"x\" # own\n",
    "\n# first\n",
    "[host.\"https://b\"]\n  capabilities = [\"pull\"]\n",
    "  [host.\"https://b\".header]\n    x = [\"[host]\"]\n",
    "[host.'https://c']\n",
    "# end\n",
];
const REGISTRIES_PARTS: &[&str] = &[
    "unqualified-search-registries = [\"docker.io\"]\n",
    "[[registry]]\nlocation = \"corp.example\"\n",
    "[[registry]]\nprefix = \"quay.io\"\nlocation = \"corp.example/quay\"\n",
    "[aliases]\n\"a\" = \"docker.io/a\"\n",
];
const BUILDKIT_PARTS: &[&str] = &[
    "debug = true\n",
    "[grpc]\n  address = [ \"unix:///x\" ]\n",
    "[registry.\"docker.io\"]\n",
    "  mirrors = [\"corp.example\",\n    \"other.example\", # second\n  ]\n",
    "\n[registry.\"corp.example\"]\n  http = true\n",
    "# end\n",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// For all files and all runs in between: the original content comes back, byte for byte.
    #[test]
    fn to_configure_and_to_remove_is_to_do_nothing(
        config in made_of(CONFIG_PARTS),
        hosts in made_of(HOSTS_PARTS),
        registries in made_of(REGISTRIES_PARTS),
        buildkitd in made_of(BUILDKIT_PARTS),
        daemon in json(),
        order in Just(["containerd", "docker", "podman", "crio", "buildkit"]).prop_shuffle(),
    ) {
        let files = [(CONFIG, config), (HOSTS, hosts), (containers::FILE, registries), (buildkit::FILE, buildkitd), (docker::FILE, daemon)];
        let files: Vec<(&str, &str)> = files.iter().filter_map(|(path, text)| Some((*path, text.as_deref()?))).collect();
        let system = System::with(&files);
        let before = system.snapshot();
        for runtime in order {
            // An unreadable file is refused, and then nothing is done.
            let _ = system.run(runtime);
            let _ = system.run(&format!("{runtime} --mirror https://m.example"));
        }
        for runtime in order {
            system.run(&format!("{runtime} --remove")).unwrap();
        }
        prop_assert_eq!(system.snapshot(), before);
    }

    /// Additions of others at either end, made while it is configured, are there afterwards, and nothing else is.
    #[test]
    fn what_others_add_meanwhile_is_all_that_is_new(
        config in made_of(CONFIG_PARTS),
        hosts in made_of(HOSTS_PARTS),
        buildkitd in made_of(BUILDKIT_PARTS),
    ) {
        let tables = |text: &str| text.parse::<toml::Table>().ok();
        for (runtime, path, text) in [("containerd", CONFIG, config), ("containerd", HOSTS, hosts), ("buildkit", buildkit::FILE, buildkitd)] {
            let text = text.unwrap_or_default();
            let system = System::with(&[(path, &text)]);
            if system.run(runtime).is_err() {
                continue;
            }
            let add = |text: &str| format!("# above\n{text}\n[theirs]\nx = 1\n");
            system.write(path, &add(&system.text(path)));
            system.run(&format!("{runtime} --remove")).unwrap();
            let (left, expected) = (system.text(path), add(&text));
            prop_assert_eq!(tables(&left), tables(&expected), "{}", left);
            let lines = |text: &str| -> Vec<String> { text.lines().map(str::to_owned).filter(|line| !line.is_empty()).collect() };
            prop_assert_eq!(lines(&left), lines(&expected));
        }
    }
}
