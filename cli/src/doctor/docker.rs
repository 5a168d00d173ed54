//! dockerd: its mirrors serve Docker Hub alone, and it names no registry when it asks them.

use super::selftest::{self, Pull};
use super::{Check, Outcome, configure};
use crate::args::{DoctorArgs, Runtime};
use crate::configure::docker::FILE;
use crate::configure::mirror::is_mirror;
use crate::program::{command, quick};

/// The configuration, and with `--image` a pull.
pub(super) async fn check(args: &DoctorArgs, mirror: &str) -> Vec<Check> {
    let text = std::fs::read_to_string(FILE).unwrap_or_default();
    let configured = judge(&text, mirror);
    let well = configured.outcome == Outcome::Pass;
    let mut checks = vec![configured];
    let Some(image) = args.image.as_deref().map(selftest::full_reference) else {
        checks.push(Check::skip(
            "docker pull",
            "no image to try",
            "name one: --image REF",
        ));
        return checks;
    };
    if well && selftest::registry_of(&image) != "docker.io" {
        let found =
            format!("docker asks its mirrors for Docker Hub's images alone, not for {image}");
        checks.push(Check::skip(
            "docker pull",
            found,
            "name an image of docker.io",
        ));
        return checks;
    }
    let had = quick(command("docker", ["image", "inspect", &image]))
        .await
        .is_ok();
    let pull = Pull {
        name: "docker pull",
        runtime: "docker",
        image: &image,
        admin: &args.admin,
        mirror,
        cure: cure(mirror),
    };
    checks.push(
        pull.through(selftest::by(command("docker", ["pull", &image])))
            .await,
    );
    if !had {
        let _ = quick(command("docker", ["image", "rm", &image])).await;
    }
    checks
}

fn cure(mirror: &str) -> String {
    format!(
        "{}; or write into {FILE}:\n{{ \"registry-mirrors\": [\"http://{mirror}\"] }}\nthen systemctl reload docker; \
         and start the daemon with --default-registry docker.io: docker does not say which registry it means",
        configure(Runtime::Docker, mirror, None)
    )
}

fn judge(text: &str, mirror: &str) -> Check {
    let json: serde_json::Value =
        match serde_json::from_str(if text.is_empty() { "{}" } else { text }) {
            Ok(json) => json,
            Err(error) => {
                return Check::fail("docker", format!("{FILE} is no JSON: {error}"), "mend it");
            }
        };
    let mirrors = json
        .get("registry-mirrors")
        .and_then(|mirrors| mirrors.as_array())
        .cloned()
        .unwrap_or_default();
    let position = mirrors
        .iter()
        .filter_map(|url| url.as_str())
        .position(|url| is_mirror(url, mirror));
    match position {
        Some(0) => Check::pass("docker", format!("{FILE} names the mirror")),
        Some(_) => {
            let found = format!("{FILE} names the mirror behind another, which is asked first");
            Check::warn("docker", found, "put it first in registry-mirrors")
        }
        None => Check::fail(
            "docker",
            format!("{FILE} names no mirror http://{mirror}"),
            cure(mirror),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_found_in_daemon_json() {
        let judge = |text: &str| judge(text, "127.0.0.1:6500").outcome;
        assert_eq!(
            judge(r#"{"registry-mirrors":["http://localhost:6500/"]}"#),
            Outcome::Pass
        );
        assert_eq!(
            judge(r#"{"registry-mirrors":["http://a","http://localhost:6500/"]}"#),
            Outcome::Warn
        );
        assert_eq!(
            judge(r#"{"registry-mirrors":["http://localhost:5000"]}"#),
            Outcome::Fail
        );
        assert_eq!(judge(""), Outcome::Fail);
        assert_eq!(judge("{"), Outcome::Fail);
    }
}
