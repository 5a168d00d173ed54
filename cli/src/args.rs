//! The command line, as typed: text everywhere, so that flags and the configuration file are checked by the same hand and all
//! errors are told at once.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

/// Hands every node its container images: a registry mirror that takes layers from other nodes.
#[derive(Debug, Parser)]
#[command(name = "hawker", version, propagate_version = false, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The daemon of each node: the mirror that runtimes pull through
    Proxy(Box<ProxyArgs>),
    /// The scheduler and the authority for certificates, without a mirror
    Scheduler(SchedulerArgs),
    /// Scheduler, authority and a seed in one process: a cluster's first node
    Up(Box<UpArgs>),
    /// Tokens, with which nodes join
    #[command(subcommand)]
    Token(TokenCommand),
    /// The certificate that clients of the forward proxy are to trust, in PEM; run it where the daemon's data is
    Ca(CaArgs),
    /// Who is in the cluster, what this node serves, where the bytes came from
    Status(StatusArgs),
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

/// How to log.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct LogArgs {
    /// error, warn, info, debug, trace, or directives such as `info,hawker_proxy=debug` [default: info]
    #[arg(long, value_name = "LEVEL", help_heading = "Logs")]
    pub(crate) log_level: Option<String>,
    /// text or json [default: text]
    #[arg(long, value_name = "FORMAT", help_heading = "Logs")]
    pub(crate) log_format: Option<String>,
}

/// What `proxy` and `up` share: one node's mirror.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct NodeArgs {
    /// TOML file; every flag is a key there, flags override it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// This node's name, for people [default: the host's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Where this node stands, e.g. a data centre's zone: pieces come from nodes of the same zone, and into a zone once
    #[arg(long, value_name = "ZONE")]
    pub(crate) zone: Option<String>,
    /// Within the zone: nodes of the same rack are asked first
    #[arg(long, value_name = "NAME")]
    pub(crate) rack: Option<String>,
    /// Identity, members, blobs [default: /var/lib/hawker]
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<String>,
    /// Where runtimes reach the mirror; may be repeated [default: 127.0.0.1:6500]
    #[arg(long, value_name = "ADDR")]
    pub(crate) mirror: Vec<String>,
    /// A certificate for the mirror, its issuers after it, in PEM: TLS is spoken with clients that want it
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_cert: Option<String>,
    /// Its key, in PEM
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_key: Option<String>,
    /// Where runtimes reach the forward proxy, for HTTP_PROXY and HTTPS_PROXY, e.g. 127.0.0.1:6505; may be repeated [default: none]
    #[arg(long, value_name = "ADDR", help_heading = "Forward proxy")]
    pub(crate) forward_proxy: Vec<String>,
    /// What the forward proxy does with whom: `p2p` or `direct`, a host as in --allow-registry, and a pattern for paths if not all
    /// are meant; the first that fits counts; may be repeated [default: p2p for /v2/ of the registries named]
    #[arg(long, value_name = "ACTION HOST [REGEX]", help_heading = "Forward proxy")]
    pub(crate) intercept: Vec<String>,
    /// Health, metrics, status [default: 127.0.0.1:6503]
    #[arg(long, value_name = "ADDR")]
    pub(crate) admin: Option<String>,
    /// Where peers reach this node; may be repeated [default: [::]:6501]
    #[arg(long, value_name = "ADDR")]
    pub(crate) peer_listen: Vec<String>,
    /// How peers are told to reach this node, e.g. behind NAT; may be repeated [default: this host's addresses]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Vec<String>,
    /// A scheduler; may be repeated
    #[arg(long, value_name = "HOST:PORT", help_heading = "Cluster")]
    pub(crate) scheduler: Vec<String>,
    /// A seed, besides those the scheduler names; may be repeated
    #[arg(long, value_name = "HOST:PORT", help_heading = "Cluster")]
    pub(crate) seed_address: Vec<String>,

    /// The registry of requests that name none
    #[arg(long, value_name = "HOST", help_heading = "Registries")]
    pub(crate) default_registry: Option<String>,
    /// A registry that may be asked, exact or *.example.com; may be repeated [default: any at a public address]
    #[arg(long, value_name = "PATTERN", help_heading = "Registries")]
    pub(crate) allow_registry: Vec<String>,
    /// A loopback, private or link-local network where registries may be; may be repeated
    #[arg(long, value_name = "CIDR", help_heading = "Registries")]
    pub(crate) allow_network: Vec<String>,
    /// A registry's endpoints, tried in order; also allows its private addresses; may be repeated
    #[arg(long, value_name = "HOST=URL", help_heading = "Registries")]
    pub(crate) registry: Vec<String>,
    /// A PEM file of further authorities for a registry; may be repeated
    #[arg(long, value_name = "HOST=FILE", help_heading = "Registries")]
    pub(crate) registry_ca: Vec<String>,
    /// Accept any certificate of this registry; may be repeated
    #[arg(long, value_name = "HOST", help_heading = "Registries")]
    pub(crate) registry_insecure: Vec<String>,
    /// Where a registry's tokens may be had, besides its own domain; may be repeated
    #[arg(long, value_name = "HOST=URL", help_heading = "Registries")]
    pub(crate) registry_realm: Vec<String>,

    /// How old a tag may be that is served while its registry can't be asked, marked as stale [default: none is]
    #[arg(long, value_name = "DURATION", help_heading = "Registries")]
    pub(crate) stale_tags: Option<String>,
    /// How long public content is served after its registry was last asked, while that is down [default: 24h]
    #[arg(long, value_name = "DURATION", help_heading = "Registries")]
    pub(crate) public_grace: Option<String>,

    /// Whose right counts: relay (each client's own, from the registry's realm), token (each client's own, from this mirror), node
    /// (this node's credentials, for everybody) [default: relay]
    #[arg(long, value_name = "MODE", help_heading = "Private images")]
    pub(crate) authorization: Option<String>,
    /// The same for one registry; may be repeated
    #[arg(long, value_name = "HOST=MODE", help_heading = "Private images")]
    pub(crate) registry_authorization: Vec<String>,
    /// Where this node's credentials are: docker:FILE, containerd:FILE, kubernetes:FILE-OR-FOLDER, env:VARIABLE; may be repeated
    #[arg(long, value_name = "KIND:PLACE", help_heading = "Private images")]
    pub(crate) credentials: Vec<String>,
    /// Whether a client's pull-scoped token may be lent to a seed for one transfer, true or false [default: true]
    #[arg(long, value_name = "BOOL", help_heading = "Private images")]
    pub(crate) seed_uses_client_token: Option<String>,
    /// How long a pull goes on after its token has run out, from its last request on [default: 60s]
    #[arg(long, value_name = "DURATION", help_heading = "Private images")]
    pub(crate) pull_grace: Option<String>,

    /// To peers at most, a second, e.g. 100MB [default: no limit]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) upload_rate: Option<String>,
    /// From peers at most, a second [default: no limit]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) download_rate: Option<String>,
    /// From registries at most, a second [default: no limit]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) origin_rate: Option<String>,
    /// Of what nobody waits for at most, from peers and registries, a second [default: no limit]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) prefetch_rate: Option<String>,
    /// Of one blob to peers at most, a second [default: no limit]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) task_upload_rate: Option<String>,
    /// Of one blob from peers at most, a second [default: no limit]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) task_download_rate: Option<String>,
    /// Of one blob from its registry for the cluster at most, a second [default: no limit]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) task_origin_rate: Option<String>,
    /// Of one blob that nobody waits for at most, a second [default: no limit]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) task_prefetch_rate: Option<String>,
    #[command(flatten)]
    pub(crate) applications: ApplicationArgs,
    /// Evict from when the disk is this full [default: 90]
    #[arg(long, value_name = "PERCENT", help_heading = "Limits")]
    pub(crate) cache_high: Option<String>,
    /// Evict until the disk is this full [default: 80]
    #[arg(long, value_name = "PERCENT", help_heading = "Limits")]
    pub(crate) cache_low: Option<String>,
    /// Bytes on disk at most [default: as the disk allows]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) cache_max: Option<String>,
    /// Pieces sent to peers at once [default: 8]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub(crate) upload_slots: Option<String>,
    /// Memory for pieces at most [default: 48MiB]
    #[arg(long, value_name = "SIZE", help_heading = "Limits")]
    pub(crate) memory: Option<String>,
    /// How long a download goes on after its last reader left [default: 60s]
    #[arg(long, value_name = "DURATION", help_heading = "Limits")]
    pub(crate) linger: Option<String>,
    /// How long bodies may go on after SIGTERM [default: 30s]
    #[arg(long, value_name = "DURATION", help_heading = "Limits")]
    pub(crate) drain: Option<String>,
    #[command(flatten)]
    pub(crate) log: LogArgs,
}

/// `hawker proxy`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ProxyArgs {
    #[command(flatten)]
    pub(crate) node: NodeArgs,
    /// Fetch from registries for the others, and stay
    #[arg(long, help_heading = "Cluster")]
    pub(crate) seed: bool,
    /// The scheduler to join at first start; remembered afterwards
    #[arg(long, value_name = "HOST:PORT", help_heading = "Cluster")]
    pub(crate) join: Option<String>,
    /// Where the token is, `-` for standard input [default: the environment's HAWKER_TOKEN]
    #[arg(long, value_name = "FILE", help_heading = "Cluster")]
    pub(crate) token_file: Option<String>,
}

/// What is said of applications.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ApplicationArgs {
    /// What is said of an application's or a tag's pulls, in words KEY=VALUE: name, tag, match (HOST/REPOSITORY, * for any text),
    /// priority (0 first, 6 last), upload, download, origin, prefetch (sizes a second, at each node), requests and origins (at once),
    /// seeds (named by the scheduler); may be repeated
    #[arg(long, value_name = "KEY=VALUE ...", help_heading = "Limits")]
    pub(crate) application: Vec<String>,
}

/// Where members stand who do not say it.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct NetworkArgs {
    /// Where the members of a network stand that say neither zone nor rack themselves, in words: cidr=10.1.0.0/16 zone=eu-1
    /// rack=r7; the smallest network that an address lies in counts; may be repeated
    #[arg(long, value_name = "KEY=VALUE ...", help_heading = "Cluster")]
    pub(crate) network: Vec<String>,
}

/// `hawker scheduler`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct SchedulerArgs {
    /// TOML file; every flag is a key there, flags override it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// This scheduler's name, for people [default: the host's name]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Authority and identity [default: /var/lib/hawker]
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<String>,
    /// Where members reach the scheduler; may be repeated [default: [::]:6502]
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Vec<String>,
    /// How members are told to reach it [default: the first global address of this host]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise: Option<String>,
    /// Health, metrics, status [default: 127.0.0.1:6504]
    #[arg(long, value_name = "ADDR")]
    pub(crate) admin: Option<String>,
    /// The cluster's name, for people [default: hawker]
    #[arg(long, value_name = "NAME")]
    pub(crate) cluster: Option<String>,
    /// Another scheduler of the cluster; may be repeated
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) scheduler: Vec<String>,
    /// For a second scheduler: the first one, to join at first start
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) join: Option<String>,
    /// Where the token (of role scheduler) is, `-` for standard input [default: the environment's HAWKER_TOKEN]
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<String>,
    #[command(flatten)]
    pub(crate) applications: ApplicationArgs,
    #[command(flatten)]
    pub(crate) networks: NetworkArgs,
    #[command(flatten)]
    pub(crate) log: LogArgs,
}

/// `hawker up`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    pub(crate) node: NodeArgs,
    /// Where members reach the scheduler; may be repeated [default: [::]:6502]
    #[arg(long, value_name = "ADDR", help_heading = "Cluster")]
    pub(crate) scheduler_listen: Vec<String>,
    /// How members are told to reach the scheduler [default: the host of --advertise, else this host's first global address]
    #[arg(long, value_name = "HOST:PORT", help_heading = "Cluster")]
    pub(crate) scheduler_advertise: Option<String>,
    /// The cluster's name, for people [default: hawker]
    #[arg(long, value_name = "NAME", help_heading = "Cluster")]
    pub(crate) cluster: Option<String>,
    #[command(flatten)]
    pub(crate) networks: NetworkArgs,
}

/// What a token lets a node be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TokenRole {
    Peer,
    Seed,
    Scheduler,
}

/// `hawker token create`.
#[derive(Args, Clone, Debug)]
pub(crate) struct TokenArgs {
    /// What the node may be that joins with it
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
    /// The runtime's configuration [default: where it is by custom]
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
    /// The runtime to look at [default: those installed]
    #[arg(long, value_enum)]
    pub(crate) runtime: Option<Runtime>,
    /// The image to pull in the self-test [default: one that containerd already has]
    #[arg(long, value_name = "REF")]
    pub(crate) image: Option<String>,
    /// containerd's configuration
    #[arg(long, value_name = "FILE", default_value = crate::configure::containerd::FILE)]
    pub(crate) containerd_config: PathBuf,
    /// containerd's socket [default: as its configuration says]
    #[arg(long, value_name = "SOCKET")]
    pub(crate) containerd_address: Option<PathBuf>,
    /// CRI-O's socket
    #[arg(long, value_name = "SOCKET", default_value = crate::doctor::CRIO_SOCKET)]
    pub(crate) crio_address: PathBuf,
    /// The results as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
