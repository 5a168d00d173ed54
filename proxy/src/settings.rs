//! What the daemon runs with: resolved and checked. `cli` makes it out of what a person wrote.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use hawker_core::application::Applications;
use hawker_core::intercept::Rules;
pub use hawker_core::limit::Rates;
use hawker_core::place::{Network, Place};
use rustls::ServerConfig;
use url::Url;

/// All settings of one node's daemon.
#[derive(Clone, Debug)]
pub struct Settings {
    /// For people: the host's name unless told otherwise.
    pub name: String,
    /// Where this node stands, as far as it is told.
    pub place: Place,
    /// Identity, members, store.
    pub data_dir: PathBuf,
    /// Where runtimes reach the mirror.
    pub mirror: Vec<SocketAddr>,
    /// Where the forward proxy listens; empty: there is none.
    pub forward_proxy: Vec<SocketAddr>,
    /// Metrics, health, status.
    pub admin: SocketAddr,
    /// Where peers reach this node.
    pub peer_listen: Vec<SocketAddr>,
    /// How peers are told to reach this node, `host:port`; empty: the addresses the listener has.
    pub advertise: Vec<String>,
    /// Seed mode: fetch from the origin for others and issue piece tables.
    pub seed: bool,
    /// Seeds by `host:port`, besides those the scheduler names.
    pub seeds: Vec<String>,
    /// Schedulers by `host:port`.
    pub schedulers: Vec<String>,
    /// What may be changed while the daemon runs (SIGHUP).
    pub live: Arc<ArcSwap<LiveSettings>>,
    /// Room on disk.
    pub cache: CacheSettings,
    /// How many pieces are sent at once.
    pub upload_slots: u32,
    /// Bytes of pieces in memory at most, receiving and not yet written together.
    pub memory_bytes: u64,
    /// How long a download goes on after its last reader left.
    pub linger: Duration,
    /// A client's pull-scoped token may be lent to a seed for one transfer.
    pub seed_uses_client_token: bool,
    /// How long a pull may go on after its token has run out, from its last request on.
    pub pull_grace: Duration,
    /// How long bodies may go on after SIGTERM.
    pub drain: Duration,
}

/// Settings that SIGHUP reads again.
#[derive(Clone, Debug, Default)]
pub struct LiveSettings {
    /// Of the host.
    pub rates: Rates,
    /// Of each task.
    pub task_rates: Rates,
    /// What is said of applications, their tags and their limits.
    pub applications: Arc<Applications>,
    /// Upstream registries.
    pub registries: Registries,
    /// Where this node's own names and passwords for registries are; the first that has one counts.
    pub credentials: Vec<CredentialSource>,
    /// How old what the origin said may be while it can't be asked.
    pub staleness: Staleness,
    /// What the forward proxy does with whom.
    pub intercept: Rules,
    /// The mirror speaks TLS with clients that want it.
    pub tls: Option<Arc<ServerConfig>>,
}

/// How old what the origin said may be while it can't be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staleness {
    /// Where a tag was; `None`: that is not enough.
    pub tags: Option<Duration>,
    /// That anybody may read something.
    pub public_grace: Duration,
}

impl Default for Staleness {
    fn default() -> Self {
        Self { tags: None, public_grace: Duration::from_secs(24 * 60 * 60) }
    }
}

/// Where names and passwords for registries are written. Files are read when they are needed, and again when they change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialSource {
    /// Docker's `config.json`, or podman's `auth.json`: with credential helpers.
    Docker(PathBuf),
    /// containerd's `config.toml`: what its CRI plugin has under `registry`.
    Containerd(PathBuf),
    /// A Kubernetes pull secret, or a folder of them as they are mounted.
    Kubernetes(PathBuf),
    /// A variable of the environment that holds what would stand in Docker's `config.json`.
    Environment(String),
}

/// Whose right a registry's content is read by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AuthorizationMode {
    /// The client's, which it gets from the registry's own realm: challenges and tokens are passed on.
    #[default]
    Relay,
    /// The client's, which it gets here: this mirror is the realm, and asks the registry's with what the client gave.
    Token,
    /// This node's, for whoever asks. It does not keep clients apart.
    Node,
}

/// Which registries may be asked, and how each is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registries {
    /// The registry of requests that name none.
    pub default: Option<String>,
    /// Hosts that `ns` may name: exact, or `*.example.com`. Empty: any whose addresses are public, and all of `known`.
    pub allow: Vec<String>,
    /// Registries with settings of their own, by the host that references name.
    pub known: BTreeMap<String, RegistrySettings>,
    /// Networks that may be reached though they are loopback, private or link-local: address and prefix length.
    pub allow_networks: Vec<Network>,
    /// Whose right counts at registries that do not say.
    pub authorization: AuthorizationMode,
}

impl Registries {
    /// Whose right counts at `registry`.
    pub fn authorization(&self, registry: &str) -> AuthorizationMode {
        let own = self.known.get(registry).and_then(|known| known.authorization);
        own.unwrap_or(self.authorization)
    }
}

/// How one registry is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistrySettings {
    /// Base addresses to try in order: the registry's own, or mirrors of it. `http` is taken as it is: insecure by choice.
    pub endpoints: Vec<Url>,
    /// A PEM file of further authorities.
    pub ca: Option<PathBuf>,
    /// Accept any certificate. Said in the configuration, never by default.
    pub insecure: bool,
    /// Where tokens for it may be had, besides its own domain: scheme, host and port count.
    pub realms: Vec<Url>,
    /// Whose right counts, if not the one that counts everywhere.
    pub authorization: Option<AuthorizationMode>,
}

/// Room on disk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CacheSettings {
    /// Eviction starts when the file system is this full, in percent.
    pub high_percent: u8,
    /// Eviction stops when the file system is this full, in percent.
    pub low_percent: u8,
    /// Bytes at most, whatever the file system says.
    pub max_bytes: Option<u64>,
}

impl Default for CacheSettings {
    fn default() -> Self {
        Self { high_percent: 90, low_percent: 80, max_bytes: None }
    }
}
