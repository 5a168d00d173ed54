//! `hawker config`: the effective configuration with its origins, the faults of a file, the reference.

use std::ffi::OsString;

use anyhow::Result;
use hawker_config::reference::{self, Shown};
use hawker_config::{Daemon, Effective, Layered, Problems};

use crate::args::{ConfigCheckArgs, ConfigCommand, ConfigShowArgs, DaemonName};
use crate::resolve::{self, Surroundings};
use crate::{flags, print, reload, surroundings};

impl From<DaemonName> for Daemon {
    fn from(name: DaemonName) -> Self {
        match name {
            DaemonName::Proxy => Self::Proxy,
            DaemonName::Scheduler => Self::Scheduler,
            DaemonName::Up => Self::Up,
        }
    }
}

/// Carries out a command.
pub(crate) fn run(command: &ConfigCommand) -> Result<()> {
    match command {
        ConfigCommand::Show(args) => show(args),
        ConfigCommand::Check(args) => check(args),
        ConfigCommand::Reference => Ok(print::line(reference::markdown())?),
    }
}

fn show(args: &ConfigShowArgs) -> Result<()> {
    let argv: Vec<OsString> = args.flags.clone();
    let daemon = args.daemon.into();
    let own = flags::layers(daemon, &argv);
    let (pushed, _, warning) = reload::load_pushed(daemon, &own);
    warn(warning.as_deref());
    let effective = Effective::new(daemon, pushed.layers().chain(own));
    let around = match effective.daemon {
        Daemon::Scheduler => surroundings::of_scheduler(&effective),
        _ => surroundings::of_proxy(&effective),
    };
    problems(&effective, around)?;
    if !args.json {
        return Ok(print::line(reference::show_text(&effective).trim_end())?);
    }
    let one = |Shown {
                   key,
                   value,
                   default,
                   origin,
               }: Shown| serde_json::json!({ "key": key, "value": value, "default": default, "origin": origin });
    let all: Vec<_> = reference::show(&effective).into_iter().map(one).collect();
    Ok(print::line(serde_json::to_string_pretty(&all)?)?)
}

#[expect(clippy::print_stderr, reason = "it must not get among the values")]
fn warn(text: Option<&str>) {
    if let Some(text) = text {
        eprintln!("hawker: {text}");
    }
}

fn check(args: &ConfigCheckArgs) -> Result<()> {
    // Flags and environment of the daemon may hold the rest: a token, a cluster to join.
    let around = Surroundings {
        has_identity: true,
        has_token: true,
    };
    let checked = |daemon: Daemon| {
        let effective = Effective::new(daemon, [Layered::file(daemon, &args.file)]);
        let problems = problems(&effective, around);
        (daemon, problems)
    };
    let daemons = args
        .daemon
        .map_or_else(|| Daemon::ALL.to_vec(), |daemon| vec![daemon.into()]);
    let all = daemons.into_iter().map(checked);
    let best = all.min_by_key(|(_, problems)| {
        problems
            .as_ref()
            .err()
            .map_or(0, |problems| problems.0.len())
    });
    let Some((daemon, problems)) = best else {
        return Ok(());
    };
    problems?;
    Ok(print::line(format!(
        "{}: no errors, as a file of `hawker {}`",
        args.file.display(),
        daemon.name()
    ))?)
}

/// All faults, also those of values that do not fit each other.
fn problems(effective: &Effective, around: Surroundings) -> Result<(), Problems> {
    match effective.daemon {
        Daemon::Proxy => resolve::proxy(effective, around).map(drop),
        Daemon::Scheduler => resolve::scheduler(effective, around).map(drop),
        Daemon::Up => resolve::up(effective, effective).map(drop),
    }
}
