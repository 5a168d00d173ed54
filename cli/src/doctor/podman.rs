//! podman, CRI-O, skopeo, buildah: mirrors by registry in registries.conf, the registry's name in the mirror's path.

use std::path::Path;

use super::selftest::{self, Pull};
use super::{Check, configure};
use crate::args::{DoctorArgs, Runtime};
use crate::configure::containers::{Block, FILE, FOLDER, blocks, drop_in};
use crate::configure::plan::View;
use crate::configure::request::can_be_path;
use crate::configure::root::Root;
use crate::program::{command, quick};

/// The configuration, and with `--image` a pull.
pub(super) async fn check(args: &DoctorArgs, mirror: &str) -> Vec<Check> {
    let image = args.image.as_deref().map(selftest::full_reference);
    let registry = image.as_deref().map(selftest::registry_of);
    let pointed = configured("podman", Runtime::Podman, registry, mirror);
    // Many nodes have podman as a tool beside their runtime. It is looked at closely once something points it at the mirror.
    if args.runtime.is_none() && is_left_alone(mirror) {
        return vec![Check::skip("podman", pointed.found, pointed.cure)];
    }
    let mut checks = vec![pointed];
    let Some(image) = &image else {
        checks.push(Check::skip(
            "podman pull",
            "no image to try",
            "name one: --image REF",
        ));
        return checks;
    };
    let had = quick(command("podman", ["image", "exists", image]))
        .await
        .is_ok();
    let cure = cure(Runtime::Podman, registry.unwrap_or("docker.io"), mirror);
    let pull = Pull {
        name: "podman pull",
        runtime: "podman",
        image,
        admin: &args.admin,
        mirror,
        cure,
    };
    checks.push(
        pull.through(selftest::by(command("podman", ["pull", "--quiet", image])))
            .await,
    );
    if !had {
        let _ = quick(command("podman", ["image", "rm", image])).await;
    }
    checks
}

/// Whether no registry of podman goes to the mirror.
fn is_left_alone(mirror: &str) -> bool {
    let blocks = blocks(&View::plain(&Root::new(Path::new("/"))));
    blocks.is_ok_and(|blocks| blocks.iter().all(|block| block.goes_to(mirror).is_none()))
}

/// How to send a registry's pulls to the mirror.
pub(super) fn cure(runtime: Runtime, registry: &str, mirror: &str) -> String {
    if !can_be_path(registry) {
        return format!(
            "a mirror's path holds no port, so give the registry a name in Hawker's configuration:\n\
             [registries.\"corp.internal\"]\nendpoints = [\"https://{registry}\"]\nthen {}=corp.internal",
            configure(runtime, mirror, Some(registry))
        );
    }
    format!(
        "{}; or write {}, one such block for each registry:\n[[registry]]\nlocation = \"{registry}\"\n[[registry.mirror]]\n\
         location = \"{mirror}/{registry}\"\ninsecure = true",
        configure(runtime, mirror, Some(registry)),
        drop_in(runtime).display()
    )
}

/// Whether `registry`'s pulls (or any, where none is asked about) go to the mirror.
pub(super) fn configured(
    name: &'static str,
    runtime: Runtime,
    registry: Option<&str>,
    mirror: &str,
) -> Check {
    match blocks(&View::plain(&Root::new(Path::new("/")))) {
        Ok(blocks) => judge(name, runtime, &blocks, registry, mirror),
        Err(error) => Check::fail(name, format!("{error:#}"), "mend that file"),
    }
}

fn judge(
    name: &'static str,
    runtime: Runtime,
    blocks: &[Block],
    registry: Option<&str>,
    mirror: &str,
) -> Check {
    let cure = cure(runtime, registry.unwrap_or("docker.io"), mirror);
    // Of several blocks for a prefix the last one counts.
    let counts = |i: usize, block: &Block| {
        blocks[i + 1..]
            .iter()
            .all(|later| later.prefix != block.prefix)
    };
    let counting = blocks
        .iter()
        .enumerate()
        .filter(|(i, block)| counts(*i, block));
    let found: Vec<(&str, bool)> = counting
        .filter_map(|(_, block)| Some((block.prefix.as_str(), block.goes_to(mirror)?)))
        .collect();
    let secure: Vec<&str> = found
        .iter()
        .filter(|(_, plain)| !plain)
        .map(|(name, _)| *name)
        .collect();
    if !secure.is_empty() {
        let found = format!(
            "the mirror of {} lacks insecure = true, and would be asked by TLS",
            secure.join(", ")
        );
        return Check::fail(name, found, cure);
    }
    let covers = |prefix: &str| {
        registry.is_none_or(|registry| {
            prefix == registry || prefix.starts_with(&format!("{registry}/"))
        })
    };
    if found.iter().any(|(prefix, _)| covers(prefix)) {
        let names: Vec<&str> = found.iter().map(|(prefix, _)| *prefix).collect();
        return Check::pass(name, format!("{} go to the mirror", names.join(", ")));
    }
    let what = registry.map_or_else(
        || "no registry goes to the mirror".to_owned(),
        |registry| format!("{registry} does not go to the mirror"),
    );
    Check::fail(name, format!("{FILE} and {FOLDER}: {what}"), cure)
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::*;

    const MIRROR: &str = "127.0.0.1:6500";

    fn judged(text: &str, registry: Option<&str>) -> Outcome {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("etc/containers")).unwrap();
        std::fs::write(dir.path().join("etc/containers/registries.conf"), text).unwrap();
        let blocks = blocks(&View::plain(&Root::new(dir.path()))).unwrap();
        judge("podman", Runtime::Podman, &blocks, registry, MIRROR).outcome
    }

    #[test]
    fn the_mirror_is_found_in_registries_conf() {
        let text = "[[registry]]\nlocation = 'quay.io'\n[[registry.mirror]]\nlocation = '127.0.0.1:6500/quay.io'\n\
                    insecure = true\n[[registry]]\nlocation = 'a.example'\n";
        assert_eq!(judged(text, Some("quay.io")), Outcome::Pass);
        assert_eq!(judged(text, None), Outcome::Pass);
        assert_eq!(judged(text, Some("docker.io")), Outcome::Fail);
        assert_eq!(
            judged(&text.replace("insecure = true", ""), None),
            Outcome::Fail
        );
        let hidden = format!("{text}[[registry]]\nprefix = 'quay.io'\nlocation = 'corp.example'\n");
        assert_eq!(judged(&hidden, Some("quay.io")), Outcome::Fail);
    }

    #[test]
    fn what_is_told_to_write_is_what_is_looked_for() {
        let cure = cure(Runtime::Podman, "docker.io", MIRROR);
        let (_, block) = cure.split_once('\n').unwrap();
        assert_eq!(judged(block, Some("docker.io")), Outcome::Pass);
        let ported = super::cure(Runtime::Podman, "10.0.0.1:5000", MIRROR);
        assert!(
            ported.ends_with("hawker configure podman --registry 10.0.0.1:5000=corp.internal"),
            "{ported}"
        );
    }
}
