//! The command line. The flags of the daemons come from the configuration's schema (`flags`).

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::flags::{ProxyFlags, SchedulerFlags, UpFlags};

/// The default socket of CRI-O.
pub(crate) const CRIO_SOCKET: &str = "/run/crio/crio.sock";

/// Hands every node its container images: a registry mirror that takes layers from other nodes.
#[derive(Debug, Parser)]
#[command(
    name = "hawker",
    version,
    propagate_version = false,
    disable_help_subcommand = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The daemon of each node: the mirror that runtimes pull through
    Proxy(ProxyFlags),
    /// The scheduler and the authority for certificates, without a mirror
    Scheduler(SchedulerFlags),
    /// Scheduler, authority and a seed in one process: a cluster's first node
    Up(UpFlags),
    /// A containerd snapshotter (proxy plugin) with overlay for every image
    Snapshotter(SnapshotterArgs),
    /// Tokens, with which nodes join
    #[command(subcommand)]
    Token(TokenCommand),
    /// Members of the cluster: listed, and removed
    #[command(subcommand)]
    Member(MemberCommand),
    /// The certificate that clients of the forward proxy are to trust, in PEM; run it where the daemon's data is
    Ca(CaArgs),
    /// Show the members of the cluster, the served blobs and the sources of the bytes
    Status(StatusArgs),
    /// The configuration of a daemon: its effective values, its faults, the reference of all keys
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Points a runtime's pulls at the mirror, or takes that back
    Configure(ConfigureArgs),
    /// Whether all is well, and whether the runtime really pulls through Hawker
    Doctor(DoctorArgs),
    /// The version of this program
    Version,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Makes a token and prints it; run it where the authority's data is
    Create(TokenArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum MemberCommand {
    /// Lists all members with id, addresses, certificate, and whether they are connected; run it where the authority's data is
    Ls(MemberListArgs),
    /// Removes a member for ever: schedulers and nodes refuse its key within seconds; run it where the authority's data is
    Rm(MemberRemoveArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Prints the effective value and the origin of each key, for a daemon with these flags
    Show(ConfigShowArgs),
    /// Reports all faults of a configuration file; exit code 2 if there is one
    Check(ConfigCheckArgs),
    /// Prints the reference of all keys, in Markdown
    Reference,
}

/// The daemon whose configuration is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DaemonName {
    Proxy,
    Scheduler,
    Up,
}

/// `hawker config show`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ConfigShowArgs {
    /// The daemon
    #[arg(value_enum)]
    pub(crate) daemon: DaemonName,
    /// The values as JSON; before the daemon's flags
    #[arg(long)]
    pub(crate) json: bool,
    /// The flags that the daemon is started with, for example --config FILE
    #[arg(
        value_name = "FLAGS",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub(crate) flags: Vec<std::ffi::OsString>,
}

/// `hawker config check`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ConfigCheckArgs {
    /// The TOML file
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// The daemon that the file is for [default: the one that the file fits best]
    #[arg(long, value_enum)]
    pub(crate) daemon: Option<DaemonName>,
}

/// `hawker snapshotter`.
#[derive(Args, Clone, Debug)]
pub(crate) struct SnapshotterArgs {
    /// The folder of all snapshots; its file system must carry overlay's upper folders
    #[arg(
        long,
        value_name = "DIR",
        env = "HAWKER_SNAPSHOTTER_ROOT",
        default_value = "/var/lib/hawker-snapshotter"
    )]
    pub(crate) root: PathBuf,
    /// The unix socket that containerd's proxy_plugins name
    #[arg(
        long,
        value_name = "SOCKET",
        env = "HAWKER_SNAPSHOTTER_SOCKET",
        default_value = "/run/hawker-snapshotter/snapshotter.sock"
    )]
    pub(crate) socket: PathBuf,
    /// The log level, or directives such as info,hawker_snapshotter=debug
    #[arg(
        long,
        value_name = "LEVEL",
        env = "HAWKER_LOG_LEVEL",
        default_value = "info"
    )]
    pub(crate) log_level: String,
}

/// `hawker member ls`.
#[derive(Args, Clone, Debug)]
pub(crate) struct MemberListArgs {
    /// The list as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The authority's data: the --data-dir of `hawker scheduler` or `hawker up`
    #[arg(long, value_name = "DIR", default_value = crate::resolve::DATA_DIR)]
    pub(crate) data_dir: PathBuf,
}

/// `hawker member rm`.
#[derive(Args, Clone, Debug)]
pub(crate) struct MemberRemoveArgs {
    /// The member's id, or its name if no other member has it
    #[arg(value_name = "ID|NAME")]
    pub(crate) member: String,
    /// The authority's data: the --data-dir of `hawker scheduler` or `hawker up`
    #[arg(long, value_name = "DIR", default_value = crate::resolve::DATA_DIR)]
    pub(crate) data_dir: PathBuf,
}

/// The role that a token gives to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TokenRole {
    Peer,
    Seed,
    Scheduler,
}

/// `hawker token create`.
#[derive(Args, Clone, Debug)]
pub(crate) struct TokenArgs {
    /// The role of the node that joins with it
    #[arg(long, value_enum, default_value = "peer")]
    pub(crate) role: TokenRole,
    /// How long it can be used
    #[arg(long, value_name = "DURATION", default_value = "1h")]
    pub(crate) ttl: String,
    /// The authority's data: the --data-dir of `hawker scheduler` or `hawker up`
    #[arg(long, value_name = "DIR", default_value = crate::resolve::DATA_DIR)]
    pub(crate) data_dir: PathBuf,
}

/// `hawker ca`.
#[derive(Args, Clone, Debug)]
pub(crate) struct CaArgs {
    /// The --data-dir of `hawker proxy` or `hawker up`
    #[arg(long, value_name = "DIR", default_value = crate::resolve::DATA_DIR)]
    pub(crate) data_dir: PathBuf,
}

/// `hawker status`.
#[derive(Args, Clone, Debug)]
pub(crate) struct StatusArgs {
    /// The daemon's admin address
    #[arg(long, value_name = "ADDR", default_value = crate::resolve::ADMIN)]
    pub(crate) admin: String,
    /// The daemon's own JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// The runtimes that `configure` and `doctor` know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Runtime {
    /// Also that of k3s and RKE2, found by itself
    #[value(aliases = ["k3s", "rke2"])]
    Containerd,
    Docker,
    Crio,
    /// Also skopeo and buildah
    Podman,
    Buildkit,
}

/// `hawker configure`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ConfigureArgs {
    /// The runtime to point at the mirror
    #[arg(value_enum)]
    pub(crate) runtime: Runtime,
    /// The mirror, as the runtime reaches it
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:6500")]
    pub(crate) mirror: String,
    /// A registry whose pulls go to the mirror, for podman and crio with the name that Hawker knows it by where that is
    /// another; may be repeated [default: containerd: all; docker: docker.io; others: the well-known ones and those in Hawker's
    /// configuration]
    #[arg(long, value_name = "HOST[=NAME]")]
    pub(crate) registry: Vec<String>,
    /// The runtime's configuration [default: its usual place]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Take the mirror out again: files are what they were before
    #[arg(long)]
    pub(crate) remove: bool,
    /// Show what would change, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Restart or reload the runtime by systemctl, if it needs that
    #[arg(long)]
    pub(crate) restart: bool,
    /// The system whose files these are, e.g. an image that is being built
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: PathBuf,
}

/// `hawker doctor`.
#[derive(Args, Clone, Debug)]
pub(crate) struct DoctorArgs {
    /// The daemon's admin address
    #[arg(long, value_name = "ADDR", default_value = crate::resolve::ADMIN)]
    pub(crate) admin: String,
    /// The mirror's address [default: as the daemon says, else 127.0.0.1:6500]
    #[arg(long, value_name = "ADDR")]
    pub(crate) mirror: Option<String>,
    /// The runtime to look at, also one that does not run [default: all, with the state of each]
    #[arg(long, value_enum)]
    pub(crate) runtime: Option<Runtime>,
    /// The image to pull in the self-test [default: one that containerd already has]
    #[arg(long, value_name = "REF")]
    pub(crate) image: Option<String>,
    /// containerd's configuration [default: /etc/containerd/config.toml, and those of k3s and RKE2]
    #[arg(long, value_name = "FILE")]
    pub(crate) containerd_config: Option<PathBuf>,
    /// containerd's socket [default: as its configuration says]
    #[arg(long, value_name = "SOCKET")]
    pub(crate) containerd_address: Option<PathBuf>,
    /// CRI-O's socket
    #[arg(long, value_name = "SOCKET", default_value = CRIO_SOCKET)]
    pub(crate) crio_address: PathBuf,
    /// The results as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
