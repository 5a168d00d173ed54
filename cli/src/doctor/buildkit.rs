//! BuildKit: mirrors by registry in buildkitd.toml, and a build that needs nothing but its base image.

use std::path::PathBuf;

use toml::{Table, Value};

use super::selftest::{self, Pull};
use super::{Check, configure};
use crate::args::{DoctorArgs, Runtime};
use crate::configure::buildkit::FILE;
use crate::configure::mirror::is_mirror;
use crate::program::command;

/// Where buildkitd listens unless told otherwise.
pub(super) const SOCKET: &str = "/run/buildkit/buildkitd.sock";

/// The configuration, and with `--image` a build.
pub(super) async fn check(args: &DoctorArgs, mirror: &str) -> Vec<Check> {
    let image = args.image.as_deref().map(selftest::full_reference);
    let registry = image.as_deref().map_or("docker.io", selftest::registry_of);
    let text = std::fs::read_to_string(FILE).unwrap_or_default();
    let mut checks = vec![judge(&text, registry, mirror)];
    let Some(image) = &image else {
        checks.push(Check::skip("build", "no image to try", "name one: --image REF"));
        return checks;
    };
    let cure = configure(Runtime::Buildkit, mirror, Some(registry)) + ", then systemctl restart buildkit";
    let pull = Pull { name: "build", runtime: "buildkit", image, admin: &args.admin, cure };
    checks.push(pull.through(build(image)).await);
    checks
}

/// Builds from a file of one line, and throws the result away.
async fn build(image: &str) -> anyhow::Result<()> {
    let folder = Folder::new()?;
    std::fs::write(folder.0.join("Dockerfile"), format!("FROM {image}\n"))?;
    let (context, file) =
        (format!("context={}", folder.0.display()), format!("dockerfile={}", folder.0.display()));
    let address = format!("unix://{SOCKET}");
    let words =
        ["--addr", &address, "build", "--no-cache", "--progress", "plain", "--frontend", "dockerfile.v0"];
    selftest::by(command("buildctl", words.into_iter().chain(["--local", &context, "--local", &file]))).await
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
    let cure = configure(Runtime::Buildkit, mirror, Some(registry)) + ", then systemctl restart buildkit";
    let table: Table = match text.parse() {
        Ok(table) => table,
        Err(_) => return Check::fail(NAME, format!("{FILE} is no TOML"), "mend it"),
    };
    let of = |name: &str, key: &str| table.get("registry")?.get(name)?.get(key).cloned();
    let mirrors = of(registry, "mirrors").and_then(|mirrors| mirrors.as_array().cloned()).unwrap_or_default();
    let mirrors: Vec<&str> = mirrors.iter().filter_map(Value::as_str).collect();
    let Some(position) = mirrors.iter().position(|one| is_mirror(one, mirror)) else {
        return Check::fail(NAME, format!("{FILE}: {registry} does not go to the mirror"), cure);
    };
    let host = mirrors[position].split('/').next().unwrap_or_default();
    // Only of loopback buildkitd supposes it by itself.
    let plain = of(host, "http").and_then(|http| http.as_bool());
    let local = is_mirror(host, "localhost") || is_mirror(host, mirror) && mirror.starts_with("127.");
    if !plain.unwrap_or(local) {
        let found = format!("{FILE}: {host} lacks http = true, and would be asked by TLS");
        return Check::fail(NAME, found, cure);
    }
    if position > 0 {
        let found = format!("{FILE}: {registry} goes to {} before the mirror", mirrors[0]);
        return Check::warn(NAME, found, "put it first among its mirrors");
    }
    Check::pass(NAME, format!("{FILE}: {registry} goes to the mirror"))
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    #[test]
    fn the_mirror_is_found_in_buildkitd_toml() {
        let judge = |text: &str| judge(text, "docker.io", "127.0.0.1:6500").outcome;
        let good = "[registry.\"docker.io\"]\nmirrors = [\"127.0.0.1:6500\", \"a\"]\n";
        assert_eq!(judge(good), Outcome::Pass);
        assert_eq!(judge(&format!("{good}[registry.\"127.0.0.1:6500\"]\nhttp = true\n")), Outcome::Pass);
        assert_eq!(judge(&format!("{good}[registry.\"127.0.0.1:6500\"]\nhttp = false\n")), Outcome::Fail);
        assert_eq!(judge("[registry.\"docker.io\"]\nmirrors = [\"a\", \"127.0.0.1:6500\"]\n"), Outcome::Warn);
        assert_eq!(judge("[registry.\"quay.io\"]\nmirrors = [\"127.0.0.1:6500\"]\n"), Outcome::Fail);
        assert_eq!(judge(""), Outcome::Fail);
        assert_eq!(judge("["), Outcome::Fail);
    }
}
