//! `hawker doctor`: is the daemon well, and does the runtime really pull through it?

mod buildkit;
mod containerd;
mod cri;
mod crio;
mod daemon;
mod docker;
mod podman;
mod probe;
mod selftest;
mod state;

use serde::Serialize;

use crate::args::{DoctorArgs, Runtime};
use crate::print;

/// The outcome of one check.
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
    /// The finding.
    found: String,
    /// The cure: lines with exact contents if a file is to be written. Empty when nothing is to be done.
    #[serde(skip_serializing_if = "String::is_empty")]
    cure: String,
    /// Whether the mirror is known to have served a runtime's pull.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    proves_pull: bool,
}

impl Check {
    fn pass(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Pass,
            found: found.into(),
            cure: String::new(),
            proves_pull: false,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Warn,
            found: found.into(),
            cure: cure.into(),
            proves_pull: false,
        }
    }

    fn fail(name: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Fail,
            found: found.into(),
            cure: cure.into(),
            proves_pull: false,
        }
    }

    fn skip(name: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Skip,
            found: found.into(),
            cure: cure.into(),
            proves_pull: false,
        }
    }

    fn proving_a_pull(self) -> Self {
        Self {
            proves_pull: true,
            ..self
        }
    }

    fn render(&self) -> String {
        let mark = match self.outcome {
            Outcome::Pass => "✓",
            Outcome::Warn => "!",
            Outcome::Fail => "✗",
            Outcome::Skip => "-",
        };
        let mut text = format!(
            "{mark} {:<12} {}\n",
            self.name,
            self.found.replace('\n', "\n               ")
        );
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
            // A check that can't be printed was made all the same.
            new.iter()
                .for_each(|check| drop(print::line(check.render().trim_end())));
        }
        checks.extend(new);
    };
    let (daemon, status) = daemon::check(args).await;
    tell(daemon);
    let mirror = daemon::mirror_address(args, status.as_ref());
    tell(daemon::check_mirror(&mirror).await);
    let mut unproved = Vec::new();
    for runtime in RUNTIMES
        .into_iter()
        .filter(|it| args.runtime.is_none_or(|named| named == *it))
    {
        // A runtime that was named is looked at whatever its state.
        if args.runtime.is_none() {
            let state = state::of(runtime, args).await;
            tell(vec![state.check(runtime)]);
            if !state.is_usable() {
                continue;
            }
        }
        let checks = match runtime {
            Runtime::Containerd => containerd::check(args, &mirror).await,
            Runtime::Docker => docker::check(args, &mirror).await,
            Runtime::Crio => crio::check(args, &mirror).await,
            Runtime::Podman => podman::check(args, &mirror).await,
            Runtime::Buildkit => buildkit::check(args, &mirror).await,
        };
        if !checks.iter().any(|check| check.proves_pull) {
            unproved.push(crate::configure::name(runtime));
        }
        tell(checks);
    }
    let failed = checks.iter().any(|check| check.outcome == Outcome::Fail);
    let proved = checks.iter().any(|check| check.proves_pull);
    let well = proved && !failed;
    if args.json {
        let json = serde_json::json!({ "well": well, "unproved": unproved, "checks": checks });
        print::line(serde_json::to_string_pretty(&json)?)?;
    } else {
        print::line(verdict(failed, proved, &unproved))?;
    }
    Ok(well)
}

/// The last line.
fn verdict(failed: bool, proved: bool, unproved: &[&str]) -> String {
    match (failed, proved, unproved) {
        (true, ..) => "Something is wrong: see the lines with ✗.".to_owned(),
        (_, false, _) => {
            "No pull through Hawker was proved: see the lines with -. Name an image to pull: --image REF."
                .to_owned()
        }
        (_, _, []) => "All is well.".to_owned(),
        _ => format!(
            "All that was tried is well. Not tried: pulls by {}; see the lines with -.",
            unproved.join(", ")
        ),
    }
}

/// All runtimes, in the order in which they are looked at.
const RUNTIMES: [Runtime; 5] = [
    Runtime::Containerd,
    Runtime::Docker,
    Runtime::Crio,
    Runtime::Podman,
    Runtime::Buildkit,
];

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_well_only_where_a_pull_was_proved() {
        assert_eq!(verdict(false, true, &[]), "All is well.");
        assert!(
            verdict(false, false, &["containerd"]).starts_with("No pull through Hawker was proved")
        );
        assert!(verdict(false, false, &[]).starts_with("No pull through Hawker was proved"));
        assert!(verdict(true, true, &[]).starts_with("Something is wrong"));
        assert!(
            verdict(false, true, &["docker", "podman"])
                .contains("Not tried: pulls by docker, podman")
        );
    }

    #[test]
    fn a_check_shows_its_mark_and_the_lines_to_write() {
        let text = Check::fail("hosts.toml", "is missing", "write it:\n[host.\"a\"]\n").render();
        assert_eq!(
            text,
            "✗ hosts.toml   is missing\n               → write it:\n                 [host.\"a\"]\n"
        );
    }
}
