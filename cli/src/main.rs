//! `hawker`, the one binary: its subcommands and their modules.
//!
//! Exit codes: 0 fine, 1 failed, 2 usage or configuration.

mod args;
mod ca;
mod client;
mod config;
mod configure;
mod doctor;
mod flags;
mod join_help;
mod log;
mod log_limit;
mod member;
mod members;
mod print;
mod program;
mod reload;
mod resolve;
mod run;
mod scheduler_page;
mod signals;
mod snapshotter;
mod status;
mod surroundings;
mod system;
mod token;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command, MemberCommand, TokenCommand};
use hawker_config::problem::Problems;

/// A daemon lives for months, and an attack or a burst must not leave it large. The C library's allocator keeps most of what was
/// freed. This one returns it, with the settings in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> ExitCode {
    let command = Cli::parse().command;
    // A daemon reads its arguments again, with the file's, now and at each SIGHUP.
    let argv = std::env::args_os().skip(2).collect();
    let result = match command {
        Command::Proxy(_) => run::proxy(argv).await,
        Command::Scheduler(_) => run::scheduler(argv).await,
        Command::Up(_) => run::up(argv).await,
        Command::Snapshotter(args) => snapshotter::run(&args).await,
        Command::Token(TokenCommand::Create(args)) => token::create(&args),
        Command::Member(MemberCommand::Ls(args)) => members::list(&args).await,
        Command::Member(MemberCommand::Rm(args)) => members::remove(&args).await,
        Command::Ca(args) => ca::print(&args),
        Command::Status(args) => status::run(&args).await,
        Command::Config(command) => config::run(&command),
        Command::Configure(args) => configure::run(&args).await,
        Command::Doctor(args) => match doctor::run(&args).await {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(error) => Err(error),
        },
        Command::Version => {
            print::line(concat!("hawker ", env!("CARGO_PKG_VERSION"))).map_err(Into::into)
        }
    };
    result.map_or_else(|error| report(&error), |()| ExitCode::SUCCESS)
}

#[expect(clippy::print_stderr, reason = "the error goes to standard error")]
fn report(error: &anyhow::Error) -> ExitCode {
    eprintln!("hawker: {error:#}");
    if error.is::<Problems>() {
        ExitCode::from(2)
    } else {
        ExitCode::FAILURE
    }
}
