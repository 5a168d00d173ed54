//! The command lines of the daemons: every key of the schema is a flag.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use hawker_config::{Daemon, Layered, reference};

macro_rules! daemons {
    ($($(#[$meta:meta])* $name:ident = $daemon:ident;)*) => { $(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct $name;

        impl Args for $name {
            fn augment_args(command: Command) -> Command {
                command.args(arguments(Daemon::$daemon))
            }

            fn augment_args_for_update(command: Command) -> Command {
                Self::augment_args(command)
            }
        }

        impl FromArgMatches for $name {
            fn from_arg_matches(_: &ArgMatches) -> Result<Self, clap::Error> {
                Ok(Self)
            }

            fn update_from_arg_matches(&mut self, _: &ArgMatches) -> Result<(), clap::Error> {
                Ok(())
            }
        }
    )* };
}

daemons! {
    /// The flags of `hawker proxy`. The daemon reads them again, with the file, at each SIGHUP.
    ProxyFlags = Proxy;
    /// The flags of `hawker scheduler`.
    SchedulerFlags = Scheduler;
    /// The flags of `hawker up`.
    UpFlags = Up;
}

const CONFIG: &str = "config";

fn arguments(daemon: Daemon) -> Vec<Arg> {
    let config = Arg::new(CONFIG)
        .long(CONFIG)
        .value_name("FILE")
        .value_parser(clap::value_parser!(PathBuf))
        .help("TOML file; every flag is a key there, and flags override it");
    let flag = |flag: reference::Flag| {
        let arg = Arg::new(flag.name.clone()).long(flag.name).help(flag.help);
        let arg = match (flag.is_switch, flag.is_list) {
            (true, _) => arg.action(ArgAction::SetTrue),
            (_, true) => arg.action(ArgAction::Append).value_name(flag.value_name),
            _ => arg.action(ArgAction::Set).value_name(flag.value_name),
        };
        match flag.heading {
            Some(heading) => arg.help_heading(heading),
            None => arg,
        }
    };
    std::iter::once(config)
        .chain(reference::flags(daemon).into_iter().map(flag))
        .collect()
}

/// The daemon's own layers for `argv`, its arguments alone: file, environment, flags.
///
/// Errors of the command line itself (an unknown flag) are clap's and end the program; all others are in the layers.
pub(crate) fn layers(daemon: Daemon, argv: &[OsString]) -> Vec<Layered> {
    let name = format!("hawker {}", daemon.name());
    let command = Command::new(name)
        .no_binary_name(true)
        .args(arguments(daemon));
    let typed = command
        .try_get_matches_from(argv)
        .unwrap_or_else(|error| error.exit());
    let given = reference::flags(daemon).into_iter().filter_map(|flag| {
        let is_given =
            typed.value_source(&flag.name) == Some(clap::parser::ValueSource::CommandLine);
        let values = || typed.get_raw(&flag.name).into_iter().flatten();
        let texts = || {
            values()
                .map(|value| value.to_string_lossy().into_owned())
                .collect()
        };
        is_given.then(|| {
            (
                flag.name.clone(),
                if flag.is_switch { Vec::new() } else { texts() },
            )
        })
    });
    let flags = Layered::flags(daemon, given);
    let environment = Layered::environment(daemon, |name| std::env::var(name).ok());
    let file = typed
        .get_one::<PathBuf>(CONFIG)
        .map(|file| Layered::file(daemon, file));
    file.into_iter().chain([environment, flags]).collect()
}
