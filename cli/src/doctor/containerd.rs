//! containerd: where its configuration sends pulls, and a pull by `ctr` through the same hosts directory.

use std::path::{Path, PathBuf};

use toml::{Table, Value};
use url::Url;

use super::selftest::{self, command, quick};
use super::{Check, Outcome};
use crate::args::DoctorArgs;

/// Where containerd listens unless told otherwise.
pub(super) const SOCKET: &str = "/run/containerd/containerd.sock";
/// Where hosts.toml files are by custom.
pub(crate) const HOSTS_DIR: &str = "/etc/containerd/certs.d";
/// What the self-test pulls lives here, and goes with it.
const NAMESPACE: &str = "hawker-doctor";

const CRI_1: &str = "io.containerd.grpc.v1.cri";
const CRI_2: &str = "io.containerd.cri.v1.images";

/// What a hosts.toml must say for all registries at once (in `_default`), or for one.
pub(crate) fn hosts_toml(mirror: &str) -> String {
    format!("[host.\"http://{mirror}\"]\n  capabilities = [\"pull\", \"resolve\"]\n")
}

/// All checks, the self-test last.
pub(super) async fn check(args: &DoctorArgs, mirror: &str) -> Vec<Check> {
    let config = match Config::read(&args.containerd_config) {
        Ok(config) => config,
        Err(error) => {
            let found = format!("{}: {error}", args.containerd_config.display());
            return vec![Check::fail("containerd", found, "name its configuration by --containerd-config")];
        }
    };
    let socket = args.containerd_address.clone().or_else(|| config.address.clone());
    let socket = socket.unwrap_or_else(|| PathBuf::from(SOCKET));
    let ctr = Ctr { socket };
    let mut checks = Vec::new();
    let version = match ctr.version().await {
        Ok(version) => {
            checks.push(Check::pass("containerd", format!("version {version} at {}", ctr.socket.display())));
            version
        }
        Err(error) => {
            let cure = "is it running, are you root? Name its socket by --containerd-address";
            checks.push(Check::fail("containerd", format!("{}: {error}", ctr.socket.display()), cure));
            String::new()
        }
    };
    let (found, hosts_dir) = judge_config(&config, &args.containerd_config, &version);
    checks.extend(found);
    let image = match &args.image {
        Some(image) => Some(selftest::full_reference(image)),
        None => ctr.any_image().await,
    };
    let registry = image.as_deref().map(selftest::registry_of);
    let dir = hosts_dir.unwrap_or_else(|| PathBuf::from(HOSTS_DIR));
    checks.extend(judge_hosts_dir(&dir, registry, mirror));
    let alive = checks.first().is_some_and(|check| check.outcome == Outcome::Pass);
    match image {
        Some(image) if alive => checks.push(self_test(&ctr, &dir, &image, mirror, &args.admin).await),
        Some(_) => checks.push(Check::skip("self-test", "containerd does not answer", "start it")),
        None => {
            checks.push(Check::skip("self-test", "containerd holds no image to try", "name one: --image REF"))
        }
    }
    checks
}

async fn self_test(ctr: &Ctr, dir: &Path, image: &str, mirror: &str, admin: &str) -> Check {
    let dir_text = dir.to_string_lossy();
    let pull = ctr.command(["-n", NAMESPACE, "images", "pull", "--hosts-dir", &dir_text, image]);
    let cure = write_hosts(&dir.join("_default/hosts.toml"), mirror);
    let check = selftest::pull_through("self-test", "containerd", image, admin, pull, cure).await;
    ctr.clean_up().await;
    check
}

fn write_hosts(path: &Path, mirror: &str) -> String {
    format!("write {}:\n{}", path.display(), hosts_toml(mirror))
}

/// `ctr` at one socket.
struct Ctr {
    socket: PathBuf,
}

impl Ctr {
    fn command<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> tokio::process::Command {
        let mut command = command("ctr", ["--address", &self.socket.to_string_lossy()]);
        command.args(arguments);
        command
    }

    async fn version(&self) -> anyhow::Result<String> {
        let text = quick(self.command(["version"])).await?;
        let server = text.split_once("Server:").map_or("", |(_, server)| server);
        let version = server.lines().find_map(|line| line.trim().strip_prefix("Version:"));
        Ok(version.unwrap_or("unknown").trim().to_owned())
    }

    async fn lines(&self, arguments: &[&str]) -> Vec<String> {
        let text = quick(self.command(arguments.iter().copied())).await.unwrap_or_default();
        text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect()
    }

    /// An image that containerd holds, whose name says where it came from.
    async fn any_image(&self) -> Option<String> {
        for namespace in self.lines(&["namespaces", "list", "-q"]).await {
            let images = self.lines(&["-n", &namespace, "images", "list", "-q"]).await;
            let named =
                |image: &String| selftest::registry_of(image).contains('.') && !image.starts_with("import");
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
            let _ = quick(self.command(["-n", NAMESPACE, "leases", "delete", "--sync", &lease])).await;
        }
        for digest in self.lines(&["-n", NAMESPACE, "content", "list", "-q"]).await {
            let _ = quick(self.command(["-n", NAMESPACE, "content", "delete", &digest])).await;
        }
        // The rest, snapshots that nothing refers to, goes by the collection that the above set off.
        for _ in 0..10 {
            if quick(self.command(["namespaces", "rm", NAMESPACE])).await.is_ok() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        }
    }
}

/// What of containerd's configuration matters here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Config {
    /// The format: 1 and 2 for containerd 1.x, 3 from 2.0.
    version: i64,
    address: Option<PathBuf>,
    cri_disabled: bool,
    config_path: Option<String>,
    /// The old way, `registry.mirrors`, that excludes the new one.
    old_mirrors: bool,
}

impl Config {
    /// The file and what it imports. A file that is missing is an empty one, as for containerd.
    fn read(path: &Path) -> anyhow::Result<Self> {
        let mut config = Config { version: 2, ..Config::default() };
        if !path.exists() {
            return Ok(config);
        }
        let table: Table = std::fs::read_to_string(path)?.parse()?;
        config.take(&table);
        let imports = table.get("imports").and_then(Value::as_array).into_iter().flatten();
        for import in imports.filter_map(Value::as_str).flat_map(|import| expand(path, import)) {
            config.take(&std::fs::read_to_string(&import)?.parse()?);
        }
        Ok(config)
    }

    fn take(&mut self, table: &Table) {
        if let Some(version) = table.get("version").and_then(Value::as_integer) {
            self.version = version;
        }
        let at = |path: &[&str]| look(table, path);
        if let Some(address) = at(&["grpc", "address"]).and_then(Value::as_str) {
            self.address = Some(PathBuf::from(address));
        }
        let disabled = at(&["disabled_plugins"]).and_then(Value::as_array).into_iter().flatten();
        self.cri_disabled |=
            disabled.filter_map(Value::as_str).any(|name| ["cri", CRI_1, CRI_2].contains(&name));
        for plugin in ["cri", CRI_1, CRI_2] {
            if let Some(path) = at(&["plugins", plugin, "registry", "config_path"]).and_then(Value::as_str) {
                self.config_path = Some(path.to_owned()).filter(|path| !path.is_empty());
            }
            let mirrors = at(&["plugins", plugin, "registry", "mirrors"]).and_then(Value::as_table);
            self.old_mirrors |= mirrors.is_some_and(|mirrors| !mirrors.is_empty());
        }
    }

    fn plugin(&self) -> &'static str {
        if self.version >= 3 { CRI_2 } else { CRI_1 }
    }
}

fn look<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (last, parents) = path.split_last()?;
    parents.iter().try_fold(table, |table, name| table.get(*name)?.as_table())?.get(*last)
}

/// The files that an import names, relative to the file that imports; `*` stands for any name in the last part.
fn expand(importer: &Path, import: &str) -> Vec<PathBuf> {
    let base = importer.parent().unwrap_or(Path::new("/"));
    let path = base.join(import);
    let pattern = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((start, end)) = pattern.split_once('*') else {
        return if path.exists() { vec![path] } else { Vec::new() };
    };
    let matches = |file: &PathBuf| {
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
    };
    let entries = path.parent().and_then(|dir| std::fs::read_dir(dir).ok()).into_iter().flatten();
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(matches).collect();
    files.sort();
    files
}

/// Whether CRI looks for hosts.toml at all, and in which directory.
fn judge_config(config: &Config, path: &Path, version: &str) -> (Vec<Check>, Option<PathBuf>) {
    const NAME: &str = "config_path";
    let file = path.display();
    let write = format!(
        "write into {file}, then systemctl restart containerd:\n[plugins.\"{}\".registry]\n  config_path = \"{HOSTS_DIR}\"",
        config.plugin()
    );
    let mut checks = Vec::new();
    if config.cri_disabled {
        let cure = format!("for Kubernetes take \"cri\" out of disabled_plugins in {file}");
        checks.push(Check::warn(
            "cri",
            "containerd's CRI plugin is disabled; ctr and nerdctl work all the same",
            cure,
        ));
    }
    if config.old_mirrors {
        let found =
            format!("{file} has registry.mirrors, which excludes config_path and knows no hosts.toml");
        checks.push(Check::fail(NAME, found, format!("take registry.mirrors out; {write}")));
        return (checks, config.config_path.as_deref().map(first_of));
    }
    let Some(dirs) = &config.config_path else {
        if defaults_to_pair(version) {
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
    if dirs.contains(':') {
        let found =
            format!("{dirs} are two directories, which some pulls of containerd 2.2 and later do not split");
        checks.push(Check::fail(NAME, found, write));
    } else {
        checks.push(Check::pass(NAME, dirs.clone()));
    }
    (checks, Some(first_of(dirs)))
}

fn first_of(dirs: &str) -> PathBuf {
    PathBuf::from(dirs.split(':').next().unwrap_or(dirs))
}

fn defaults_to_pair(version: &str) -> bool {
    let mut parts = version.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
    let mut next = || parts.next().and_then(|part| part.parse::<u32>().ok()).unwrap_or(0);
    (next(), next()) >= (2, 2)
}

/// Whether the hosts directory sends `registry`'s pulls (or all, where none is asked about) to the mirror.
fn judge_hosts_dir(dir: &Path, registry: Option<&str>, mirror: &str) -> Vec<Check> {
    const NAME: &str = "hosts.toml";
    let default = dir.join("_default");
    let own = registry.and_then(|registry| {
        let underscored = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
        let names = underscored.into_iter().chain([registry.to_owned()]);
        names.map(|name| dir.join(name)).find(|dir| dir.is_dir())
    });
    let folder = own.unwrap_or(default);
    let file = folder.join("hosts.toml");
    let write = write_hosts(&file, mirror);
    let mut checks = Vec::new();
    checks.push(match std::fs::read_to_string(&file) {
        Err(error) => Check::fail(NAME, format!("{}: {error}", file.display()), write),
        Ok(text) => match judge_hosts(&text, mirror) {
            Verdict::Good => Check::pass(NAME, format!("{} names the mirror", file.display())),
            Verdict::Poor(found) => Check::warn(NAME, format!("{}: {found}", file.display()), write),
            Verdict::Bad(found) => Check::fail(NAME, format!("{}: {found}", file.display()), write),
        },
    });
    checks.extend(shadows(dir, &folder, mirror));
    checks
}

/// Registries with a directory of their own never see `_default`.
fn shadows(dir: &Path, judged: &Path, mirror: &str) -> Option<Check> {
    let entries = std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    let past = |folder: &PathBuf| {
        let text = std::fs::read_to_string(folder.join("hosts.toml")).unwrap_or_default();
        folder.is_dir() && folder != judged && matches!(judge_hosts(&text, mirror), Verdict::Bad(_))
    };
    let mut names: Vec<String> = entries
        .filter(past)
        .map(|f| f.file_name().unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let cure = format!("add to the hosts.toml of each, first:\n{}", hosts_toml(mirror));
    (!names.is_empty())
        .then(|| Check::warn("registries", format!("past Hawker go: {}", names.join(", ")), cure))
}

/// What one hosts.toml does to pulls.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    /// Works, but not always or not first.
    Poor(String),
    /// Pulls go past the mirror.
    Bad(String),
}

fn judge_hosts(text: &str, mirror: &str) -> Verdict {
    let table: Table = match text.parse() {
        Ok(table) => table,
        Err(_) => return Verdict::Bad("is no TOML".to_owned()),
    };
    let Some(hosts) = table.get("host").and_then(Value::as_table).filter(|hosts| !hosts.is_empty()) else {
        return Verdict::Bad(
            "has no [host.\"…\"] table, and containerd 1.6 and 1.7 then ignore it".to_owned(),
        );
    };
    let Some((url, host)) = hosts.iter().find(|(url, _)| is_mirror(url, mirror)) else {
        return Verdict::Bad(format!("names no host http://{mirror}"));
    };
    if let Some(capabilities) = host.get("capabilities").and_then(Value::as_array) {
        let has = |wanted: &str| capabilities.iter().any(|c| c.as_str() == Some(wanted));
        if !has("pull") {
            return Verdict::Bad(format!("the host {url} lacks the capability \"pull\""));
        }
        if !has("resolve") {
            return Verdict::Poor(format!(
                "the host {url} lacks the capability \"resolve\": tags go past it"
            ));
        }
    }
    let tls = ["ca", "client", "skip_verify"].into_iter().find(|key| host.get(key).is_some());
    if let Some(key) = tls.filter(|_| url.starts_with("http://")) {
        return Verdict::Poor(format!(
            "the host {url} has `{key}`: containerd 1.7 and later then try HTTPS first"
        ));
    }
    let position = |url: &str| text.find(&format!("[host.\"{url}\"]")).unwrap_or(usize::MAX);
    if hosts.keys().any(|other| other != url && position(other) < position(url)) {
        return Verdict::Poor(format!("another host stands before {url} and is asked first"));
    }
    Verdict::Good
}

/// Whether a host's URL leads to the mirror; all names of loopback are one.
pub(super) fn is_mirror(url: &str, mirror: &str) -> bool {
    let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    let (Ok(url), Ok(mirror)) = (Url::parse(&url), Url::parse(&format!("http://{mirror}"))) else {
        return false;
    };
    let local = |host: &str| {
        let ip = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
        host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback() || ip.is_unspecified())
    };
    let (Some(a), Some(b)) = (url.host_str(), mirror.host_str()) else { return false };
    url.port_or_known_default() == mirror.port_or_known_default() && (a == b || (local(a) && local(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIRROR: &str = "127.0.0.1:6500";

    fn config(text: &str) -> Config {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        Config::read(&path).unwrap()
    }

    fn outcomes(config: &Config, version: &str) -> Vec<Outcome> {
        let (checks, _) = judge_config(config, Path::new("/etc/containerd/config.toml"), version);
        checks.iter().map(|check| check.outcome).collect()
    }

    #[test]
    fn config_path_is_found_under_the_names_of_every_version() {
        for (format, plugin) in [(1, "cri"), (2, CRI_1), (3, CRI_2)] {
            let text =
                format!("version = {format}\n[plugins.\"{plugin}\".registry]\nconfig_path = \"/certs\"\n");
            let config = config(&text);
            assert_eq!((config.version, config.config_path.as_deref()), (format, Some("/certs")), "{plugin}");
            assert_eq!(outcomes(&config, "1.7.0"), [Outcome::Pass]);
        }
    }

    #[test]
    fn debians_configuration_of_1_6_has_no_config_path_and_is_told_what_to_write() {
        let text = "version = 2\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    \
                    [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n\
                    [grpc]\naddress = \"/run/other.sock\"\n";
        let config = config(text);
        assert_eq!(config.address.as_deref(), Some(Path::new("/run/other.sock")));
        let (checks, dir) = judge_config(&config, Path::new("/etc/containerd/config.toml"), "1.6.20~ds1");
        assert_eq!((checks[0].outcome, dir), (Outcome::Fail, None));
        assert!(
            checks[0]
                .cure
                .contains("[plugins.\"io.containerd.grpc.v1.cri\".registry]\n  config_path = \"/etc")
        );
    }

    #[test]
    fn the_known_pitfalls_are_told() {
        let disabled = config("disabled_plugins = [\"cri\"]\n");
        assert_eq!(outcomes(&disabled, "1.6.20"), [Outcome::Warn, Outcome::Fail]);
        let pair = format!("version = 3\n[plugins.\"{CRI_2}\".registry]\nconfig_path = \"/a:/b\"\n");
        let pair = config(&pair);
        assert_eq!(outcomes(&pair, "2.2.0"), [Outcome::Fail]);
        assert_eq!(judge_config(&pair, Path::new("c"), "2.2.0").1, Some(PathBuf::from("/a")));
        let old = format!(
            "version = 2\n[plugins.\"{CRI_1}\".registry.mirrors.\"docker.io\"]\nendpoint = [\"http://a\"]\n"
        );
        assert_eq!(outcomes(&config(&old), "1.7.3"), [Outcome::Fail]);
        assert_eq!(outcomes(&Config { version: 3, ..Config::default() }, "v2.2.1"), [Outcome::Warn]);
        assert_eq!(outcomes(&Config { version: 3, ..Config::default() }, "2.1.4"), [Outcome::Fail]);
    }

    #[test]
    fn imports_are_followed_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("conf.d");
        std::fs::create_dir(&conf).unwrap();
        let with = |path: &str| format!("[plugins.\"{CRI_2}\".registry]\nconfig_path = \"{path}\"\n");
        std::fs::write(conf.join("10.toml"), with("/first")).unwrap();
        std::fs::write(conf.join("20.toml"), with("/second")).unwrap();
        std::fs::write(conf.join("30.txt"), with("/not")).unwrap();
        let main = dir.path().join("config.toml");
        std::fs::write(&main, "version = 3\nimports = [\"conf.d/*.toml\"]\n").unwrap();
        assert_eq!(Config::read(&main).unwrap().config_path.as_deref(), Some("/second"));
        assert_eq!(Config::read(Path::new("/nonexistent/config.toml")).unwrap().config_path, None);
    }

    #[test]
    fn a_hosts_toml_is_judged_by_what_containerd_does_with_it() {
        let good = hosts_toml(MIRROR);
        assert_eq!(judge_hosts(&good, MIRROR), Verdict::Good);
        assert_eq!(judge_hosts(&good.replace("127.0.0.1", "localhost"), MIRROR), Verdict::Good);
        assert_eq!(judge_hosts(&format!("server = \"https://a\"\n{good}"), MIRROR), Verdict::Good);
        let bad = |text: &str| matches!(judge_hosts(text, MIRROR), Verdict::Bad(_));
        assert!(bad("server = \"https://docker.io\"\n"), "1.6 and 1.7 ignore a file without a host");
        assert!(bad(&good.replace("6500", "6501")));
        assert!(bad(&good.replace("\"pull\", ", "")));
        assert!(bad("[host"));
        let poor = |text: &str| matches!(judge_hosts(text, MIRROR), Verdict::Poor(_));
        assert!(poor(&good.replace(", \"resolve\"", "")));
        assert!(poor(&format!("{good}  skip_verify = true\n")));
        assert!(poor(&format!("[host.\"https://a.example\"]\n{good}")));
        assert_eq!(judge_hosts(&format!("{good}[host.\"https://a.example\"]\n"), MIRROR), Verdict::Good);
    }

    #[test]
    fn a_registrys_own_directory_shadows_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
        };
        let judge = |registry| -> Vec<Outcome> {
            judge_hosts_dir(dir.path(), registry, MIRROR).iter().map(|check| check.outcome).collect()
        };
        assert_eq!(judge(None), [Outcome::Fail]);
        write("_default", &hosts_toml(MIRROR));
        assert_eq!(judge(Some("docker.io")), [Outcome::Pass]);
        write("10.0.0.1_5000_", "server = \"http://10.0.0.1:5000\"\n");
        assert_eq!(judge(Some("10.0.0.1:5000")), [Outcome::Fail]);
        assert_eq!(judge(Some("docker.io")), [Outcome::Pass, Outcome::Warn]);
    }
}
