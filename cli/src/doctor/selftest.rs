//! Pulling something with the real client, and watching whether the mirror was asked.

use std::time::Duration;

use anyhow::bail;
use tokio::process::Command;

use super::Check;
use crate::client;
use crate::program::run;

const PULL_TIMEOUT: Duration = Duration::from_secs(300);

/// Manifest and blob requests at the mirror so far.
pub(super) async fn requests(admin: &str) -> anyhow::Result<u64> {
    let answer = client::get(admin, "/metrics").await?;
    if answer.status != 200 {
        bail!("{admin} answers {} to /metrics", answer.status);
    }
    Ok(count_requests(&answer.body))
}

fn count_requests(metrics: &str) -> u64 {
    metrics
        .lines()
        .filter(|line| line.starts_with("hawker_requests_total{"))
        .filter(|line| line.contains("kind=\"manifest\"") || line.contains("kind=\"blob\""))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}

/// A pull that shall go through the mirror.
pub(super) struct Pull<'a> {
    /// The check's name.
    pub(super) name: &'static str,
    pub(super) runtime: &'a str,
    pub(super) image: &'a str,
    /// Where the daemon counts requests.
    pub(super) admin: &'a str,
    /// What to do when the pull goes past the mirror.
    pub(super) cure: String,
}

impl Pull<'_> {
    /// Pulls by `pull` and says whether that went through the mirror.
    pub(super) async fn through(self, pull: impl Future<Output = anyhow::Result<()>>) -> Check {
        let Self { name, runtime, image, admin, cure } = self;
        let before = match requests(admin).await {
            Ok(before) => before,
            Err(error) => {
                let found = format!("the mirror's requests can't be counted: {error}");
                return Check::skip(name, found, "start the daemon, or name it by --admin");
            }
        };
        let pulled = match tokio::time::timeout(PULL_TIMEOUT, pull).await {
            Ok(pulled) => pulled,
            Err(_) => Err(anyhow::anyhow!("it took longer than {} s", PULL_TIMEOUT.as_secs())),
        };
        let seen = requests(admin).await.unwrap_or(before).saturating_sub(before);
        match (seen, pulled) {
            (0, Ok(())) => Check::fail(name, format!("{runtime} pulled {image}, but past Hawker"), cure),
            (0, Err(error)) => {
                let found =
                    format!("{runtime} asked the mirror nothing, and could not pull {image}: {error}");
                Check::fail(name, found, format!("is the image's name right, the network up? If so:\n{cure}"))
            }
            (n, Ok(())) => Check::pass(
                name,
                format!("{runtime} pulls through Hawker: {image}, {n} requests at the mirror"),
            ),
            (n, Err(error)) => {
                let found =
                    format!("{runtime} asked the mirror ({n} requests), but could not pull {image}: {error}");
                Check::fail(
                    name,
                    found,
                    "the daemon's log says why; without a network, choose an image of a registry that answers",
                )
            }
        }
    }
}

/// A pull by a program.
pub(super) async fn by(program: Command) -> anyhow::Result<()> {
    run(program, PULL_TIMEOUT).await.map(drop)
}

/// The full form of a reference: `alpine` is `docker.io/library/alpine:latest`.
pub(super) fn full_reference(image: &str) -> String {
    let (first, rest) = image.split_once('/').unwrap_or(("", image));
    let has_host = first.contains(['.', ':']) || first == "localhost";
    let named = match (has_host, first) {
        (true, _) => image.to_owned(),
        (false, "") => format!("docker.io/library/{rest}"),
        (false, _) => format!("docker.io/{image}"),
    };
    let last = named.rsplit('/').next().unwrap_or_default();
    if last.contains([':', '@']) { named } else { format!("{named}:latest") }
}

/// The registry in a full reference.
pub(super) fn registry_of(reference: &str) -> &str {
    reference.split('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_manifests_and_blobs_count() {
        let metrics = "# TYPE hawker_requests counter\n\
            hawker_requests_total{kind=\"ping\",code=\"200\"} 100\n\
            hawker_requests_total{kind=\"manifest\",code=\"200\"} 2\n\
            hawker_requests_total{kind=\"blob\",code=\"206\"} 3\n\
            hawker_tasks_active 9\n# EOF\n";
        assert_eq!(count_requests(metrics), 5);
    }

    #[test]
    fn short_references_get_what_docker_gives_them() {
        for (short, full) in [
            ("alpine", "docker.io/library/alpine:latest"),
            ("alpine:3", "docker.io/library/alpine:3"),
            ("me/app", "docker.io/me/app:latest"),
            ("10.0.0.1:5000/a/b", "10.0.0.1:5000/a/b:latest"),
            ("localhost/a@sha256:00", "localhost/a@sha256:00"),
        ] {
            assert_eq!(full_reference(short), full);
        }
        assert_eq!(registry_of("10.0.0.1:5000/a/b:c"), "10.0.0.1:5000");
    }
}
