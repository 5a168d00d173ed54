//! `hawker doctor`: is the daemon well, and does the runtime really pull through it?

mod buildkit;
mod containerd;
mod cri;
mod crio;
mod daemon;
mod docker;
mod podman;
mod selftest;

use std::path::Path;

pub(crate) use crio::SOCKET as CRIO_SOCKET;
use serde::Serialize;

use crate::args::{DoctorArgs, Runtime};
use crate::print;

/// What came out of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Pass,
    /// It works, but not as well as it could.
    Warn,
    Fail,
    /// Could not be checked.
    Skip,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    outcome: Outcome,
    /// What was found.
    found: String,
    /// What to do, lines with exact contents where a file is to be written. Empty when nothing is.
    #[serde(skip_serializing_if = "String::is_empty")]
    cure: String,
}

impl Check {
    fn pass(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Pass, found: found.into(), cure: String::new() }
    }

    fn warn(name: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Warn, found: found.into(), cure: cure.into() }
    }

    fn fail(name: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Fail, found: found.into(), cure: cure.into() }
    }

    fn skip(name: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Skip, found: found.into(), cure: cure.into() }
    }

    fn render(&self) -> String {
        let mark = match self.outcome {
            Outcome::Pass => "✓",
            Outcome::Warn => "!",
            Outcome::Fail => "✗",
            Outcome::Skip => "-",
        };
        let mut text =
            format!("{mark} {:<12} {}\n", self.name, self.found.replace('\n', "\n               "));
        for (i, line) in self.cure.lines().enumerate() {
            let arrow = if i == 0 { "→ " } else { "  " };
            text.push_str(format!("               {arrow}{line}").trim_end());
            text.push('\n');
        }
        text
    }
}

/// Runs all checks and prints them; whether none failed.
pub(crate) async fn run(args: &DoctorArgs) -> anyhow::Result<bool> {
    let mut checks = Vec::new();
    let mut tell = |new: Vec<Check>| {
        if !args.json {
            // What can't be printed has been looked at all the same.
            new.iter().for_each(|check| drop(print::line(check.render().trim_end())));
        }
        checks.extend(new);
    };
    let (daemon, status) = daemon::check(args).await;
    tell(daemon);
    let mirror = daemon::mirror_address(args, status.as_ref());
    tell(daemon::check_mirror(&mirror).await);
    for runtime in runtimes(args) {
        match runtime {
            Runtime::Containerd => tell(containerd::check(args, &mirror).await),
            Runtime::Docker => tell(docker::check(args, &mirror).await),
            Runtime::Crio => tell(crio::check(args, &mirror).await),
            Runtime::Podman => tell(podman::check(args, &mirror).await),
            Runtime::Buildkit => tell(buildkit::check(args, &mirror).await),
        }
    }
    let well = checks.iter().all(|check| check.outcome != Outcome::Fail);
    if args.json {
        print::line(serde_json::to_string_pretty(&serde_json::json!({ "well": well, "checks": checks }))?)?;
    } else {
        print::line(if well { "All is well." } else { "Something is wrong: see the lines with ✗." })?;
    }
    Ok(well)
}

/// The command that points a runtime at the mirror.
fn configure(runtime: Runtime, mirror: &str, registry: Option<&str>) -> String {
    let mut command = format!("hawker configure {}", crate::configure::name(runtime));
    if mirror != crate::resolve::MIRROR {
        command += &format!(" --mirror http://{mirror}");
    }
    if let Some(registry) = registry.filter(|_| runtime != Runtime::Docker) {
        command += &format!(" --registry {registry}");
    }
    command
}

/// The one asked for, else those that are configured on this machine.
fn runtimes(args: &DoctorArgs) -> Vec<Runtime> {
    if let Some(runtime) = args.runtime {
        return vec![runtime];
    }
    let found = [
        (Runtime::Containerd, args.containerd_config.as_path()),
        (Runtime::Containerd, Path::new(containerd::SOCKET)),
        (Runtime::Docker, Path::new("/var/run/docker.sock")),
        (Runtime::Crio, args.crio_address.as_path()),
        (Runtime::Podman, Path::new("/usr/bin/podman")),
        (Runtime::Buildkit, Path::new(buildkit::SOCKET)),
    ];
    let mut runtimes: Vec<Runtime> =
        found.iter().filter(|(_, path)| path.exists()).map(|(r, _)| *r).collect();
    runtimes.dedup();
    if runtimes.is_empty() { vec![Runtime::Containerd] } else { runtimes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_shows_its_mark_and_the_lines_to_write() {
        let text = Check::fail("hosts.toml", "is missing", "write it:\n[host.\"a\"]\n").render();
        assert_eq!(
            text,
            "✗ hosts.toml   is missing\n               → write it:\n                 [host.\"a\"]\n"
        );
    }
}
