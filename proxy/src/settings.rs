//! The daemon's settings, resolved and checked. `cli` makes them from a person's configuration.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use hawker_config::Config;
pub use hawker_config::schema::{AuthorizationMode, CredentialSource};
use hawker_core::application::Applications;
use hawker_core::intercept::Rules;
pub use hawker_core::limit::Rates;
use hawker_core::place::{Network, Place};
use hawker_oci::reference::host_matches;
use hawker_tracker::Push;
use rustls::ServerConfig;
use url::Url;

/// All settings of one node's daemon.
#[derive(Clone, Debug)]
pub struct Settings {
    /// For people: the host's name unless told otherwise.
    pub name: String,
    /// Why this node serves alone though it was a member before, for people.
    pub problem: Option<String>,
    /// The place of this node, as far as it is told.
    pub place: Place,
    /// Identity, members, store.
    pub data_dir: PathBuf,
    /// The addresses of the mirror for runtimes.
    pub mirror: Vec<SocketAddr>,
    /// The addresses of the forward proxy; empty: there is none.
    pub forward_proxy: Vec<SocketAddr>,
    /// Metrics, health, status.
    pub admin: SocketAddr,
    /// The addresses of this node for peers.
    pub peer_listen: Vec<SocketAddr>,
    /// How peers are told to reach this node, `host:port`; empty: the addresses the listener has.
    pub advertise: Vec<String>,
    /// Seed mode: fetch from the origin for others and issue piece tables.
    pub seed: bool,
    /// Seeds by `host:port`, besides those the scheduler names.
    pub seeds: Vec<String>,
    /// Schedulers by `host:port`.
    pub schedulers: Vec<String>,
    /// The settings that may be changed while the daemon runs (SIGHUP).
    pub live: Arc<ArcSwap<LiveSettings>>,
    /// Takes the configuration that schedulers push; `None`: it is refused.
    pub push: Option<Arc<dyn Push>>,
    /// Bytes of pieces in memory at most, receiving and not yet written together.
    pub memory_bytes: u64,
    /// A client's pull-scoped token may be lent to a seed for one transfer.
    pub seed_uses_client_token: bool,
    /// How long a pull may go on after its token has run out, from its last request on.
    pub pull_grace: Duration,
    /// How long bodies may go on after SIGTERM.
    pub drain: Duration,
}

/// Settings that change while the daemon runs: by SIGHUP, or because a scheduler pushes them.
#[derive(Clone, Debug, Default)]
pub struct LiveSettings {
    /// The values of all keys. Code that needs a value as it is written takes it from here; the fields below are made of several
    /// values, or of files.
    pub config: Config,
    /// Room on disk.
    pub cache: CacheSettings,
    /// Of the host.
    pub rates: Rates,
    /// Of each task.
    pub task_rates: Rates,
    /// The rules of applications, their tags and their limits.
    pub applications: Arc<Applications>,
    /// Upstream registries.
    pub registries: Registries,
    /// The sources of this node's own names and passwords for registries; the first that has one counts.
    pub credentials: Vec<CredentialSource>,
    /// The greatest age of the origin's answers that count while the origin can't be asked.
    pub staleness: Staleness,
    /// Forward-proxy rules: the hosts that are intercepted, tunnelled or refused.
    pub intercept: Rules,
    /// The mirror speaks TLS with clients that want it.
    pub tls: Option<Arc<ServerConfig>>,
}

/// The greatest age of the origin's answers that count while the origin can't be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staleness {
    /// For the digest of a tag; `None`: a remembered digest never answers for the origin.
    pub tags: Option<Duration>,
    /// For the fact that anybody may read a repository.
    pub public_grace: Duration,
}

impl Default for Staleness {
    fn default() -> Self {
        Self {
            tags: None,
            public_grace: Duration::from_secs(24 * 60 * 60),
        }
    }
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
    /// The right that counts at registries without a setting of their own.
    pub authorization: AuthorizationMode,
}

impl Registries {
    /// The right that counts at `registry`.
    pub fn authorization(&self, registry: &str) -> AuthorizationMode {
        let own = self
            .known
            .get(registry)
            .and_then(|known| known.authorization);
        own.unwrap_or(self.authorization)
    }

    /// Whether a registry's word that it has some content is enough. Other registries prove it before its clients get what came
    /// here from elsewhere.
    pub fn is_believed(&self, registry: &str) -> bool {
        match self.known.get(registry) {
            Some(known) => !known.must_prove,
            None => self.is_listed(registry),
        }
    }

    /// Whether the configuration names a registry, given as [`hawker_oci::reference::canonical_host`] writes it.
    pub(crate) fn is_listed(&self, registry: &str) -> bool {
        self.known.contains_key(registry)
            || self
                .default
                .as_deref()
                .is_some_and(|d| d.eq_ignore_ascii_case(registry))
            || self.is_allowed(registry)
    }

    /// Whether a pattern of the list of further registries fits.
    pub(crate) fn is_allowed(&self, host: &str) -> bool {
        self.allow.iter().any(|pattern| host_matches(pattern, host))
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
    /// Shown to its endpoints where they ask for a client's certificate.
    pub identity: Option<ClientIdentity>,
    /// The realms for its tokens, besides its own domain: scheme, host and port count.
    pub realms: Vec<Url>,
    /// The right that counts, if not the one that counts everywhere.
    pub authorization: Option<AuthorizationMode>,
    /// Its word that it has some content is not enough, though the configuration names it.
    pub must_prove: bool,
}

/// A client's certificate and its key, as PEM files. They are read again when they change.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientIdentity {
    /// The certificate, with those between it and its authority behind it.
    pub certificate: PathBuf,
    /// Its key, unencrypted.
    pub key: PathBuf,
}

impl fmt::Display for ClientIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the client's certificate {} with the key {}",
            self.certificate.display(),
            self.key.display()
        )
    }
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
        Self {
            high_percent: 90,
            low_percent: 80,
            max_bytes: None,
        }
    }
}
