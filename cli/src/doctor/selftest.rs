//! Pulling something with the real client, and watching whether the mirror was asked.

use std::process::Stdio;
use std::time::Duration;

use anyhow::bail;
use tokio::process::Command;

use super::Check;
use crate::client;

const PULL_TIMEOUT: Duration = Duration::from_secs(300);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);

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

/// Pulls by `pull` and says whether that went through the mirror. `cure` is what to do when it did not.
pub(super) async fn pull_through(
    name: &'static str,
    runtime: &str,
    image: &str,
    admin: &str,
    pull: Command,
    cure: String,
) -> Check {
    let before = match requests(admin).await {
        Ok(before) => before,
        Err(error) => {
            let found = format!("the mirror's requests can't be counted: {error}");
            return Check::skip(name, found, "start the daemon, or name it by --admin");
        }
    };
    let pulled = run(pull, PULL_TIMEOUT).await;
    let seen = requests(admin).await.unwrap_or(before).saturating_sub(before);
    match (seen, pulled) {
        (0, Ok(_)) => Check::fail(name, format!("{runtime} pulled {image}, but past Hawker"), cure),
        (0, Err(error)) => {
            let found = format!("{runtime} asked the mirror nothing, and could not pull {image}: {error}");
            Check::fail(name, found, format!("is the image's name right, the network up? If so:\n{cure}"))
        }
        (n, Ok(_)) => {
            Check::pass(name, format!("{runtime} pulls through Hawker: {image}, {n} requests at the mirror"))
        }
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

/// Runs a command without asking anyone anything; its standard output, or the last it said about why it failed.
pub(super) async fn run(mut command: Command, timeout: Duration) -> anyhow::Result<String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let output = match tokio::time::timeout(timeout, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => bail!("{program} can't be run: {error}"),
        Err(_) => bail!("{program} took longer than {} s", timeout.as_secs()),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it failed without a word");
        bail!("{}", last.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A quick command.
pub(super) async fn quick(command: Command) -> anyhow::Result<String> {
    run(command, COMMAND_TIMEOUT).await
}

/// `program` with these arguments.
pub(super) fn command<'a>(program: &str, arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
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

    #[tokio::test]
    async fn a_command_that_hangs_or_fails_says_so() {
        let error = run(command("sleep", ["9"]), Duration::from_millis(50)).await.unwrap_err();
        assert!(error.to_string().contains("longer than"), "{error}");
        let error = quick(command("sh", ["-c", "echo first >&2; echo last >&2; exit 3"])).await.unwrap_err();
        assert_eq!(error.to_string(), "last");
        assert!(quick(command("/nonexistent/program", [])).await.is_err());
    }
}
