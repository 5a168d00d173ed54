//! containerd: the targets of pulls in its configuration; a pull by `ctr` through the same hosts directory, and one as
//! the kubelet asks for it.

use std::path::{Path, PathBuf};

use super::cri::{self, Cri};
use super::selftest::{self, Pull};
use super::{Check, Outcome, configure, state};
use crate::args::{DoctorArgs, Runtime};
use crate::configure::containerd::{Config, FILE, HOSTS_DIR, folders_of};
use crate::configure::edit::hosts::{Verdict, judge, table};
use crate::configure::plan::View;
use crate::configure::rancher::{self, Distribution};
use crate::configure::root::Root;
use crate::program::{command, quick};

/// The default socket of containerd.
pub(super) const SOCKET: &str = "/run/containerd/containerd.sock";
/// The namespace of the self-test's pulls; it is removed with them.
const NAMESPACE: &str = "hawker-doctor";

/// A containerd of this machine.
#[derive(Clone, Debug)]
pub(super) struct Install {
    pub(super) config: PathBuf,
    /// The socket that was named, or that is there by custom where the configuration names none.
    named: Option<PathBuf>,
    usual: &'static str,
    /// The unit to restart.
    unit: &'static str,
    /// k3s or RKE2, which write the configuration themselves.
    of: Option<Distribution>,
}

impl Install {
    fn read(&self) -> anyhow::Result<Config> {
        Config::read(&View::plain(&Root::new("/")), &self.config)
    }

    /// The socket, as far as it is known.
    pub(super) fn socket(&self) -> PathBuf {
        let said = || self.read().ok().and_then(|config| config.address);
        self.named
            .clone()
            .or_else(said)
            .unwrap_or_else(|| PathBuf::from(self.usual))
    }

    fn restart(&self) -> String {
        format!("systemctl restart {}", self.unit)
    }

    /// The command line that begins with `ctr`: k3s and RKE2 bring their own.
    fn ctr(&self) -> Vec<String> {
        let own = self
            .of
            .map(|of| of.programs().join("ctr"))
            .filter(|own| own.is_file());
        match own {
            _ if state::is_installed("ctr") => vec!["ctr".to_owned()],
            Some(own) => vec![own.display().to_string()],
            None if self.of.is_some() => vec!["k3s".to_owned(), "ctr".to_owned()],
            None => vec!["ctr".to_owned()],
        }
    }
}

/// The containerd that the flags name, else all that are found.
pub(super) fn installs(args: &DoctorArgs) -> Vec<Install> {
    let plain = |config: &Path| Install {
        config: config.to_owned(),
        named: args.containerd_address.clone(),
        usual: SOCKET,
        unit: "containerd",
        of: None,
    };
    if args.containerd_config.is_some() || args.containerd_address.is_some() {
        return vec![plain(
            args.containerd_config.as_deref().unwrap_or(Path::new(FILE)),
        )];
    }
    let root = Root::new("/");
    let view = View::plain(&root);
    let mut installs: Vec<Install> = Distribution::found(&view)
        .into_iter()
        .map(|of| Install {
            config: of.config(),
            named: None,
            usual: rancher::SOCKET,
            unit: of.unit(&view),
            of: Some(of),
        })
        .collect();
    if installs.is_empty() || Path::new(FILE).exists() || Path::new(SOCKET).exists() {
        installs.push(plain(Path::new(FILE)));
    }
    installs
}

/// All checks, the self-test last.
pub(super) async fn check(args: &DoctorArgs, mirror: &str) -> Vec<Check> {
    let mut checks = Vec::new();
    for install in installs(args) {
        checks.extend(check_one(&install, args, mirror).await);
    }
    checks
}

async fn check_one(install: &Install, args: &DoctorArgs, mirror: &str) -> Vec<Check> {
    let config = match install.read() {
        Ok(config) => config,
        Err(error) => {
            let cure = "mend it, or name its configuration by --containerd-config";
            return vec![Check::fail("containerd", format!("{error:#}"), cure)];
        }
    };
    let ctr = Ctr {
        socket: install.socket(),
        program: install.ctr(),
    };
    let mut checks = Vec::new();
    let of = install
        .of
        .map_or_else(String::new, |of| format!("{}'s ", of.name));
    let version = match ctr.version().await {
        Ok(version) => {
            checks.push(Check::pass(
                "containerd",
                format!("{of}version {version} at {}", ctr.socket.display()),
            ));
            version
        }
        Err(error) => {
            let cure = "is it running, are you root? Name its socket by --containerd-address";
            checks.push(Check::fail(
                "containerd",
                format!("{of}{}: {error}", ctr.socket.display()),
                cure,
            ));
            String::new()
        }
    };
    checks.extend(
        config
            .warning(&View::plain(&Root::new("/")))
            .map(|warning| {
                Check::warn(
                    "config",
                    warning,
                    "the pulls below show whether that works; a newer hawker may know this version",
                )
            }),
    );
    let (found, hosts_dir) = judge_config(&config, install, &version);
    checks.extend(found);
    let image = match &args.image {
        Some(image) => Some(selftest::full_reference(image)),
        None => ctr.any_image().await,
    };
    let registry = image.as_deref().map(selftest::registry_of);
    let dir = hosts_dir.unwrap_or_else(|| PathBuf::from(HOSTS_DIR));
    checks.extend(judge_hosts_dir(&dir, registry, mirror, install));
    let alive = checks
        .first()
        .is_some_and(|check| check.outcome == Outcome::Pass);
    match image {
        Some(image) if alive => {
            checks.push(self_test(&ctr, &dir, &image, mirror, &args.admin, install).await);
            if !config.cri_disabled {
                let cure = format!(
                    "{}, then {}",
                    configure(Runtime::Containerd, mirror, None),
                    install.restart()
                );
                checks.push(kubelets_pull(&ctr.socket, &image, mirror, &args.admin, cure).await);
            }
        }
        Some(_) => checks.push(Check::skip(
            "self-test",
            "containerd does not answer",
            "start it",
        )),
        None => checks.push(Check::skip(
            "self-test",
            "containerd holds no image to try",
            "name one: --image REF",
        )),
    }
    checks
}

async fn self_test(
    ctr: &Ctr,
    dir: &Path,
    image: &str,
    mirror: &str,
    admin: &str,
    install: &Install,
) -> Check {
    let dir_text = dir.to_string_lossy();
    let command = ctr.command([
        "-n",
        NAMESPACE,
        "images",
        "pull",
        "--hosts-dir",
        &dir_text,
        image,
    ]);
    let cure = write_hosts(&dir.join("_default/hosts.toml"), mirror, None, install);
    let pull = Pull {
        name: "self-test",
        runtime: "containerd",
        image,
        admin,
        mirror,
        cure,
    };
    let check = pull.through(selftest::by(command)).await;
    ctr.clean_up().await;
    check
}

/// The same by CRI, which has its own idea of where hosts.toml files are.
async fn kubelets_pull(
    socket: &Path,
    image: &str,
    mirror: &str,
    admin: &str,
    cure: String,
) -> Check {
    let pull = Pull {
        name: cri::CHECK,
        runtime: "containerd's CRI",
        image,
        admin,
        mirror,
        cure,
    };
    match Cri::connect(socket).await {
        Ok(mut cri) => cri.pull_through(pull).await,
        Err(error) => {
            let found = format!("{}: {error}", socket.display());
            Check::fail(
                cri::CHECK,
                found,
                "containerd's log says why its CRI plugin did not start",
            )
        }
    }
}

fn write_hosts(path: &Path, mirror: &str, registry: Option<&str>, install: &Install) -> String {
    let configure = configure(Runtime::Containerd, mirror, registry);
    if let Some(of) = install.of {
        return format!(
            "{configure}, then {} (it writes {}, from which {} makes hosts.toml when it starts)",
            install.restart(),
            of.registries().display(),
            of.name
        );
    }
    format!(
        "{configure}; or write {}:\n{}",
        path.display(),
        table(&format!("http://{mirror}"))
    )
}

/// `ctr` at one socket.
struct Ctr {
    socket: PathBuf,
    /// The program, and words before its arguments.
    program: Vec<String>,
}

impl Ctr {
    fn command<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> tokio::process::Command {
        let (program, words) = self
            .program
            .split_first()
            .map_or(("ctr", &[][..]), |(p, w)| (p.as_str(), w));
        let mut command = command(program, words.iter().map(String::as_str));
        command.arg("--address").arg(&self.socket).args(arguments);
        command
    }

    async fn version(&self) -> anyhow::Result<String> {
        let text = quick(self.command(["version"])).await?;
        let server = text.split_once("Server:").map_or("", |(_, server)| server);
        let version = server
            .lines()
            .find_map(|line| line.trim().strip_prefix("Version:"));
        Ok(version.unwrap_or("unknown").trim().to_owned())
    }

    async fn lines(&self, arguments: &[&str]) -> Vec<String> {
        let text = quick(self.command(arguments.iter().copied()))
            .await
            .unwrap_or_default();
        text.lines()
            .map(|line| line.trim().to_owned())
            .filter(|line| !line.is_empty())
            .collect()
    }

    /// An image that containerd holds, whose name says where it came from.
    async fn any_image(&self) -> Option<String> {
        for namespace in self.lines(&["namespaces", "list", "-q"]).await {
            let images = self
                .lines(&["-n", &namespace, "images", "list", "-q"])
                .await;
            let named = |image: &String| {
                selftest::registry_of(image).contains('.') && !image.starts_with("import")
            };
            if let Some(image) = images.into_iter().find(named) {
                return Some(image);
            }
        }
        None
    }

    /// Takes away what the self-test left; content that others hold stays theirs.
    async fn clean_up(&self) {
        for image in self.lines(&["-n", NAMESPACE, "images", "list", "-q"]).await {
            let _ = quick(self.command(["-n", NAMESPACE, "images", "rm", "--sync", &image])).await;
        }
        for lease in self.lines(&["-n", NAMESPACE, "leases", "list", "-q"]).await {
            let _ =
                quick(self.command(["-n", NAMESPACE, "leases", "delete", "--sync", &lease])).await;
        }
        for digest in self
            .lines(&["-n", NAMESPACE, "content", "list", "-q"])
            .await
        {
            let _ = quick(self.command(["-n", NAMESPACE, "content", "delete", &digest])).await;
        }
        // The rest, snapshots that nothing refers to, goes by the collection that the above set off.
        for _ in 0..10 {
            if quick(self.command(["namespaces", "rm", NAMESPACE]))
                .await
                .is_ok()
            {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        }
    }
}

/// Whether CRI looks for hosts.toml at all, and in which directory.
fn judge_config(
    config: &Config,
    install: &Install,
    version: &str,
) -> (Vec<Check>, Option<PathBuf>) {
    const NAME: &str = "config_path";
    let file = install.config.display();
    let restart = install.restart();
    let write = match install.of {
        Some(of) => {
            format!(
                "hawker configure containerd, then {restart}: {} sets it once there is a mirror",
                of.name
            )
        }
        None => format!(
            "hawker configure containerd, then {restart}; or write into {file} before that:\n\
             [plugins.\"{}\".registry]\n  config_path = \"{HOSTS_DIR}\"",
            config.plugin()
        ),
    };
    let mut checks = Vec::new();
    if config.cri_disabled {
        let cure = format!("for Kubernetes take \"cri\" out of disabled_plugins in {file}");
        checks.push(Check::warn(
            "cri",
            "containerd's CRI plugin is disabled; ctr and nerdctl work all the same",
            cure,
        ));
        return (checks, config.hosts_dir().map(Path::to_owned));
    }
    if let Some((what, cure)) = config.excluded() {
        checks.push(Check::fail(
            NAME,
            format!("{file}: {what}"),
            format!("{cure}\nthen {write}"),
        ));
        return (checks, config.hosts_dir().map(Path::to_owned));
    }
    let Some(dirs) = &config.config_path else {
        if release(version) >= (2, 2) {
            let found = "not set: containerd 2.2 and later then take /etc/containerd/certs.d:/etc/docker/certs.d, which some \
                         pulls do not split";
            checks.push(Check::warn(NAME, found, write));
            return (checks, Some(PathBuf::from(HOSTS_DIR)));
        }
        checks.push(Check::fail(
            NAME,
            format!("{file} sets none: Kubernetes' pulls read no hosts.toml"),
            write,
        ));
        return (checks, None);
    };
    let replaced = config.is_replaced().filter(|_| release(version) < (2, 0));
    if let Some(last) = replaced {
        let found = format!(
            "{} has that plugin's section without it, and containerd 1.x takes only the last one",
            last.file.display()
        );
        checks.push(Check::fail(NAME, found, write));
    } else if dirs.contains(':') {
        let found = format!(
            "{dirs} are two directories, which some pulls of containerd 2.2 and later do not split"
        );
        checks.push(Check::fail(NAME, found, write));
    } else {
        checks.push(Check::pass(NAME, dirs.clone()));
    }
    (checks, config.hosts_dir().map(Path::to_owned))
}

/// Major and minor; 0.0 where it is not known.
fn release(version: &str) -> (u32, u32) {
    let mut parts = version
        .trim_start_matches('v')
        .split(|c: char| !c.is_ascii_digit());
    let mut next = || {
        parts
            .next()
            .and_then(|part| part.parse::<u32>().ok())
            .unwrap_or(0)
    };
    (next(), next())
}

/// Whether the hosts directory sends `registry`'s pulls (or all, where none is asked about) to the mirror.
fn judge_hosts_dir(
    dir: &Path,
    registry: Option<&str>,
    mirror: &str,
    install: &Install,
) -> Vec<Check> {
    const NAME: &str = "hosts.toml";
    let default = dir.join("_default");
    let own = registry.and_then(|registry| {
        folders_of(dir, registry)
            .into_iter()
            .find(|dir| dir.is_dir())
    });
    let write = write_hosts(
        &own.as_ref().unwrap_or(&default).join("hosts.toml"),
        mirror,
        registry.filter(|_| own.is_some()),
        install,
    );
    let folder = own.unwrap_or(default);
    let file = folder.join("hosts.toml");
    let mut checks = Vec::new();
    checks.push(match std::fs::read_to_string(&file) {
        Err(error) => Check::fail(NAME, format!("{}: {error}", file.display()), write),
        Ok(text) => match judge(&text, mirror) {
            Verdict::Good => Check::pass(NAME, format!("{} names the mirror", file.display())),
            Verdict::Poor(found) => {
                Check::warn(NAME, format!("{}: {found}", file.display()), write)
            }
            Verdict::Bad(found) => Check::fail(NAME, format!("{}: {found}", file.display()), write),
        },
    });
    checks.extend(shadows(dir, &folder, mirror));
    checks
}

/// Registries with a directory of their own never see `_default`.
fn shadows(dir: &Path, judged: &Path, mirror: &str) -> Option<Check> {
    let entries = std::fs::read_dir(dir)
        .ok()?
        .flatten()
        .map(|entry| entry.path());
    let past = |folder: &PathBuf| {
        let text = std::fs::read_to_string(folder.join("hosts.toml")).unwrap_or_default();
        folder.is_dir() && folder != judged && matches!(judge(&text, mirror), Verdict::Bad(_))
    };
    let mut names: Vec<String> = entries
        .filter(past)
        .map(|f| {
            f.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    let cure = configure(
        Runtime::Containerd,
        mirror,
        Some(&names.join(" --registry ")),
    );
    (!names.is_empty()).then(|| {
        Check::warn(
            "registries",
            format!("past Hawker go: {}", names.join(", ")),
            cure,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIRROR: &str = "127.0.0.1:6500";
    const CRI_1: &str = crate::configure::containerd::CRI[1];
    const CRI_2: &str = crate::configure::containerd::CRI[2];

    fn config(text: &str) -> Config {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        Config::read(&View::plain(&Root::new("/")), &path).unwrap()
    }

    fn install() -> Install {
        Install {
            config: FILE.into(),
            named: None,
            usual: SOCKET,
            unit: "containerd",
            of: None,
        }
    }

    fn outcomes(config: &Config, version: &str) -> Vec<Outcome> {
        let (checks, _) = judge_config(config, &install(), version);
        checks.iter().map(|check| check.outcome).collect()
    }

    #[test]
    fn debians_configuration_of_1_6_has_no_config_path_and_is_told_what_to_write() {
        let text = "version = 2\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    \
                    [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n\
                    [grpc]\naddress = \"/run/other.sock\"\n";
        let config = config(text);
        assert_eq!(
            config.address.as_deref(),
            Some(Path::new("/run/other.sock"))
        );
        let (checks, dir) = judge_config(&config, &install(), "1.6.20~ds1");
        assert_eq!((checks[0].outcome, dir), (Outcome::Fail, None));
        assert!(
            checks[0].cure.contains(
                "[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"/etc"
            )
        );
    }

    #[test]
    fn the_known_pitfalls_are_told() {
        let disabled = config("disabled_plugins = [\"cri\"]\n");
        assert_eq!(outcomes(&disabled, "1.6.20"), [Outcome::Warn]);
        let pair =
            format!("version = 3\n[plugins.\"{CRI_2}\".registry]\nconfig_path = \"/a:/b\"\n");
        let pair = config(&pair);
        assert_eq!(outcomes(&pair, "2.2.0"), [Outcome::Fail]);
        assert_eq!(
            judge_config(&pair, &install(), "2.2.0").1,
            Some(PathBuf::from("/a"))
        );
        let old = format!(
            "version = 2\n[plugins.\"{CRI_1}\".registry.mirrors.\"docker.io\"]\nendpoint = [\"http://a\"]\n"
        );
        assert_eq!(outcomes(&config(&old), "1.7.3"), [Outcome::Fail]);
        assert_eq!(
            outcomes(
                &Config {
                    version: 3,
                    ..Config::default()
                },
                "v2.2.1"
            ),
            [Outcome::Warn]
        );
        assert_eq!(
            outcomes(
                &Config {
                    version: 3,
                    ..Config::default()
                },
                "2.1.4"
            ),
            [Outcome::Fail]
        );
        let newest = format!(
            "version = 4\n[plugins.'io.containerd.server.v1.grpc']\naddress = '/run/a.sock'\n\
             [plugins.'{CRI_2}'.registry]\nconfig_path = '/a'\n"
        );
        let newest = config(&newest);
        assert_eq!(newest.address.as_deref(), Some(Path::new("/run/a.sock")));
        assert_eq!(outcomes(&newest, "2.3.7"), [Outcome::Pass]);
    }

    #[test]
    fn a_registrys_own_directory_shadows_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
        };
        let judge = |registry| -> Vec<Outcome> {
            judge_hosts_dir(dir.path(), registry, MIRROR, &install())
                .iter()
                .map(|check| check.outcome)
                .collect()
        };
        assert_eq!(judge(None), [Outcome::Fail]);
        write("_default", &table("http://127.0.0.1:6500"));
        assert_eq!(judge(Some("docker.io")), [Outcome::Pass]);
        write("10.0.0.1_5000_", "server = \"http://10.0.0.1:5000\"\n");
        assert_eq!(judge(Some("10.0.0.1:5000")), [Outcome::Fail]);
        assert_eq!(judge(Some("docker.io")), [Outcome::Pass, Outcome::Warn]);
    }
}
