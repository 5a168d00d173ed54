//! BuildKit: mirrors by registry in buildkitd.toml, and a build that needs nothing but its base image.

use std::path::PathBuf;

use toml::{Table, Value};

use super::selftest::{self, Pull};
use super::{Check, configure, state};
use crate::args::{DoctorArgs, Runtime};
use crate::configure::buildkit::FILE;
use crate::configure::mirror::is_mirror;
use crate::program::command;

/// The default socket of buildkitd.
const SOCKET: &str = "/run/buildkit/buildkitd.sock";
/// The environment's word for where it listens, as `buildctl` has it.
const HOST: &str = "BUILDKIT_HOST";

/// The address of buildkitd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Socket(PathBuf),
    /// As `buildctl --addr` takes it: `tcp://…`, `docker-container://…`.
    Other(String),
}

impl Address {
    /// The address in `BUILDKIT_HOST`, else where buildkitd listens by custom.
    pub(super) fn of_environment() -> Self {
        Self::of(std::env::var(HOST).ok().as_deref())
    }

    fn of(host: Option<&str>) -> Self {
        match host.unwrap_or_default() {
            "" => Self::Socket(PathBuf::from(SOCKET)),
            host => match host.strip_prefix("unix://") {
                Some(socket) => Self::Socket(PathBuf::from(socket)),
                None => Self::Other(host.to_owned()),
            },
        }
    }

    fn url(&self) -> String {
        match self {
            Self::Socket(socket) => format!("unix://{}", socket.display()),
            Self::Other(address) => address.clone(),
        }
    }
}

/// The configuration, and with `--image` a build.
pub(super) async fn check(args: &DoctorArgs, mirror: &str) -> Vec<Check> {
    let image = args.image.as_deref().map(selftest::full_reference);
    let registry = image.as_deref().map_or("docker.io", selftest::registry_of);
    let address = Address::of_environment();
    let text = std::fs::read_to_string(FILE);
    let mut checks = match (&address, text) {
        (Address::Other(address), Err(_)) => {
            let found =
                format!("buildkitd is at {address}, and its configuration is not on this machine");
            vec![Check::skip(
                "buildkit",
                found,
                "run `hawker configure buildkit` where it runs",
            )]
        }
        (_, text) => vec![judge(&text.unwrap_or_default(), registry, mirror)],
    };
    let Some(image) = &image else {
        checks.push(Check::skip(
            "build",
            "no image to try",
            "name one: --image REF",
        ));
        return checks;
    };
    if !state::is_installed("buildctl") {
        let found = format!(
            "buildctl is not installed, so buildkitd at {} can't be asked for a build",
            address.url()
        );
        let cure = "install it (it comes with BuildKit's release) and put it in PATH; its BUILDKIT_HOST counts here too";
        checks.push(Check::skip("build", found, cure));
        return checks;
    }
    let cure =
        configure(Runtime::Buildkit, mirror, Some(registry)) + ", then systemctl restart buildkit";
    let pull = Pull {
        name: "build",
        runtime: "buildkit",
        image,
        admin: &args.admin,
        mirror,
        cure,
    };
    checks.push(pull.through(build(image, &address.url())).await);
    checks
}

/// Builds from a file of one line, and throws the result away.
async fn build(image: &str, address: &str) -> anyhow::Result<()> {
    let folder = Folder::new()?;
    std::fs::write(folder.0.join("Dockerfile"), format!("FROM {image}\n"))?;
    let (context, file) = (
        format!("context={}", folder.0.display()),
        format!("dockerfile={}", folder.0.display()),
    );
    let words = [
        "--addr",
        address,
        "build",
        "--no-cache",
        "--progress",
        "plain",
        "--frontend",
        "dockerfile.v0",
    ];
    selftest::by(command(
        "buildctl",
        words
            .into_iter()
            .chain(["--local", &context, "--local", &file]),
    ))
    .await
}

/// A folder that goes when it is let go.
struct Folder(PathBuf);

impl Folder {
    fn new() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("hawker-doctor-{}", std::process::id()));
        std::fs::create_dir(&path).map(|()| Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn judge(text: &str, registry: &str, mirror: &str) -> Check {
    const NAME: &str = "buildkit";
    let cure =
        configure(Runtime::Buildkit, mirror, Some(registry)) + ", then systemctl restart buildkit";
    let table: Table = match text.parse() {
        Ok(table) => table,
        Err(_) => return Check::fail(NAME, format!("{FILE} is no TOML"), "mend it"),
    };
    let of = |name: &str, key: &str| table.get("registry")?.get(name)?.get(key).cloned();
    let mirrors = of(registry, "mirrors")
        .and_then(|mirrors| mirrors.as_array().cloned())
        .unwrap_or_default();
    let mirrors: Vec<&str> = mirrors.iter().filter_map(Value::as_str).collect();
    let Some(position) = mirrors.iter().position(|one| is_mirror(one, mirror)) else {
        return Check::fail(
            NAME,
            format!("{FILE}: {registry} does not go to the mirror"),
            cure,
        );
    };
    let host = mirrors[position].split('/').next().unwrap_or_default();
    // Only of loopback buildkitd supposes it by itself.
    let plain = of(host, "http").and_then(|http| http.as_bool());
    let local =
        is_mirror(host, "localhost") || is_mirror(host, mirror) && mirror.starts_with("127.");
    if !plain.unwrap_or(local) {
        let found = format!("{FILE}: {host} lacks http = true, and would be asked by TLS");
        return Check::fail(NAME, found, cure);
    }
    if position > 0 {
        let found = format!(
            "{FILE}: {registry} goes to {} before the mirror",
            mirrors[0]
        );
        return Check::warn(NAME, found, "put it first among its mirrors");
    }
    Check::pass(NAME, format!("{FILE}: {registry} goes to the mirror"))
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    #[test]
    fn the_environment_says_where_buildkitd_listens() {
        for (host, url) in [
            (None, "unix:///run/buildkit/buildkitd.sock"),
            (Some(""), "unix:///run/buildkit/buildkitd.sock"),
            (
                Some("unix:///run/user/1000/buildkit/buildkitd.sock"),
                "unix:///run/user/1000/buildkit/buildkitd.sock",
            ),
            (Some("tcp://10.0.0.1:1234"), "tcp://10.0.0.1:1234"),
            (
                Some("docker-container://buildkitd"),
                "docker-container://buildkitd",
            ),
        ] {
            assert_eq!(Address::of(host).url(), url, "{host:?}");
        }
    }

    #[test]
    fn the_mirror_is_found_in_buildkitd_toml() {
        let judge = |text: &str| judge(text, "docker.io", "127.0.0.1:6500").outcome;
        let good = "[registry.\"docker.io\"]\nmirrors = [\"127.0.0.1:6500\", \"a\"]\n";
        assert_eq!(judge(good), Outcome::Pass);
        assert_eq!(
            judge(&format!(
                "{good}[registry.\"127.0.0.1:6500\"]\nhttp = true\n"
            )),
            Outcome::Pass
        );
        assert_eq!(
            judge(&format!(
                "{good}[registry.\"127.0.0.1:6500\"]\nhttp = false\n"
            )),
            Outcome::Fail
        );
        assert_eq!(
            judge("[registry.\"docker.io\"]\nmirrors = [\"a\", \"127.0.0.1:6500\"]\n"),
            Outcome::Warn
        );
        assert_eq!(
            judge("[registry.\"quay.io\"]\nmirrors = [\"127.0.0.1:6500\"]\n"),
            Outcome::Fail
        );
        assert_eq!(judge(""), Outcome::Fail);
        assert_eq!(judge("["), Outcome::Fail);
    }
}
