//! podman, CRI-O, skopeo, buildah: mirrors by registry in registries.conf, the registry's name in the mirror's path.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Check;
use super::containerd::is_mirror;
use super::selftest::{self, command, quick};
use crate::args::DoctorArgs;

const FILE: &str = "/etc/containers/registries.conf";
const FOLDER: &str = "/etc/containers/registries.conf.d";
const OURS: &str = "/etc/containers/registries.conf.d/50-hawker.conf";

/// The configuration, and with `--image` a pull.
pub(super) async fn check(args: &DoctorArgs, mirror: &str) -> Vec<Check> {
    let image = args.image.as_deref().map(selftest::full_reference);
    let registry = image.as_deref().map(selftest::registry_of);
    let found = files()
        .iter()
        .flat_map(|file| mirrored(&std::fs::read_to_string(file).unwrap_or_default(), mirror))
        .collect();
    let mut checks = vec![judge(found, registry, mirror)];
    let Some(image) = &image else {
        checks.push(Check::skip("podman pull", "no image to try", "name one: --image REF"));
        return checks;
    };
    let had = quick(command("podman", ["image", "exists", image])).await.is_ok();
    let pull = command("podman", ["pull", "--quiet", image]);
    let cure = cure(registry.unwrap_or("docker.io"), mirror);
    checks.push(selftest::pull_through("podman pull", "podman", image, &args.admin, pull, cure).await);
    if !had {
        let _ = quick(command("podman", ["image", "rm", image])).await;
    }
    checks
}

fn cure(registry: &str, mirror: &str) -> String {
    format!(
        "write {OURS}, one such block for each registry:\n[[registry]]\nlocation = \"{registry}\"\n[[registry.mirror]]\n\
         location = \"{mirror}/{registry}\"\ninsecure = true"
    )
}

fn files() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(FOLDER).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|end| end == "conf")).collect();
    files.sort();
    files.insert(0, Path::new(FILE).to_owned());
    files
}

/// Registries whose pulls go to the mirror, and whether the mirror may be asked without TLS.
fn mirrored(text: &str, mirror: &str) -> Vec<(String, bool)> {
    let table: Table = text.parse().unwrap_or_default();
    let registries = table.get("registry").and_then(Value::as_array).cloned().unwrap_or_default();
    let of = |registry: &Value| {
        let name = registry.get("prefix").or(registry.get("location"))?.as_str()?.to_owned();
        let mirrors = registry.get("mirror")?.as_array()?;
        let ours = mirrors.iter().find(|m| {
            m.get("location").and_then(Value::as_str).is_some_and(|location| is_mirror(location, mirror))
        })?;
        Some((name, ours.get("insecure").and_then(Value::as_bool).unwrap_or(false)))
    };
    registries.iter().filter_map(of).collect()
}

fn judge(found: Vec<(String, bool)>, registry: Option<&str>, mirror: &str) -> Check {
    let cure = cure(registry.unwrap_or("docker.io"), mirror);
    let secure: Vec<&str> = found.iter().filter(|(_, plain)| !plain).map(|(name, _)| name.as_str()).collect();
    if !secure.is_empty() {
        let found =
            format!("the mirror of {} lacks insecure = true, and would be asked by TLS", secure.join(", "));
        return Check::fail("podman", found, cure);
    }
    let covers = |name: &str| {
        registry.is_none_or(|registry| name == registry || name.starts_with(&format!("{registry}/")))
    };
    if found.iter().any(|(name, _)| covers(name)) {
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        return Check::pass("podman", format!("{} go to the mirror", names.join(", ")));
    }
    let what = registry.map_or("no registry".to_owned(), |registry| format!("{registry} does not"));
    let what = if registry.is_some() {
        format!("{what} go to the mirror")
    } else {
        format!("{what} goes to the mirror")
    };
    Check::fail("podman", format!("{FILE} and {FOLDER}: {what}"), cure)
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    const MIRROR: &str = "127.0.0.1:6500";

    #[test]
    fn the_mirror_is_found_in_registries_conf() {
        let text = "[[registry]]\nlocation = 'quay.io'\n[[registry.mirror]]\nlocation = '127.0.0.1:6500/quay.io'\n\
                    insecure = true\n[[registry]]\nlocation = 'a.example'\n";
        let found = mirrored(text, MIRROR);
        assert_eq!(found, [("quay.io".to_owned(), true)]);
        assert_eq!(judge(found.clone(), Some("quay.io"), MIRROR).outcome, Outcome::Pass);
        assert_eq!(judge(found.clone(), None, MIRROR).outcome, Outcome::Pass);
        assert_eq!(judge(found, Some("docker.io"), MIRROR).outcome, Outcome::Fail);
        let secure = mirrored(&text.replace("insecure = true", ""), MIRROR);
        assert_eq!(judge(secure, None, MIRROR).outcome, Outcome::Fail);
        assert_eq!(judge(mirrored("garbage", MIRROR), None, MIRROR).outcome, Outcome::Fail);
    }

    #[test]
    fn what_is_told_to_write_is_what_is_looked_for() {
        let block = cure("docker.io", MIRROR);
        let (_, block) = block.split_once('\n').unwrap();
        assert_eq!(mirrored(block, MIRROR), [("docker.io".to_owned(), true)]);
    }
}
