//! Every key of `hawker proxy`, `hawker scheduler` and `hawker up`: its type, default and meaning, and the moment when a change
//! applies. Flags, environment, file, `--help` and the reference all follow from it.

use std::collections::BTreeMap;

use hawker_core::application::{Labels, Limits, Rule};
use hawker_core::intercept;
use hawker_core::limit::Rates;
use hawker_core::place::{Network, Place};
use serde::Deserialize;

pub use crate::choice::{AuthorizationMode, CredentialSource, LogFormat};
use crate::de;
use crate::problem::{Wrong, wrong};
use crate::value::{
    ActionText, AnyFile, AtOnce, Cidr, CidrOrHost, Credentials, Directory, DiskSize, Endpoint,
    Format, Host, HostPattern, HostPort, LabelText, Level, Listen, LogLevel, Many, MemorySize,
    Mode, PathPattern, PatternText, PemFile, PemPair, Percent, Rate, Shape, Slots, Switch, Text,
    Timeout, Truth, UpToADay, UpToAMonth, UpToAnHour, Value,
};

/// The daemons that have a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    /// `hawker proxy`.
    Proxy,
    /// `hawker scheduler`.
    Scheduler,
    /// `hawker up`.
    Up,
}

impl Daemon {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Proxy, Self::Scheduler, Self::Up];

    /// Its name behind `hawker`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Scheduler => "scheduler",
            Self::Up => "up",
        }
    }
}

/// The moment when a change of a key applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applies {
    /// At the daemon's next start.
    Start,
    /// At SIGHUP.
    Live,
    /// At SIGHUP, or when a scheduler pushes it.
    Pushed,
}

impl Applies {
    /// No restart is needed.
    pub const fn is_live(self) -> bool {
        !matches!(self, Self::Start)
    }
}

/// The heading that a key stands under in the reference and in `--help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// The node itself.
    Node,
    /// Members, schedulers, seeds.
    Cluster,
    /// Registries.
    Registries,
    /// Rights and credentials.
    PrivateImages,
    /// Rates, disk, memory, time.
    Limits,
    /// The forward proxy.
    ForwardProxy,
    /// Logs.
    Logs,
}

impl Group {
    /// All of them, in the reference's order.
    pub const ALL: [Self; 7] = [
        Self::Node,
        Self::Cluster,
        Self::Registries,
        Self::PrivateImages,
        Self::Limits,
        Self::ForwardProxy,
        Self::Logs,
    ];

    /// The heading.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Node => "Node",
            Self::Cluster => "Cluster",
            Self::Registries => "Registries",
            Self::PrivateImages => "Private images",
            Self::Limits => "Limits",
            Self::ForwardProxy => "Forward proxy",
            Self::Logs => "Logs",
        }
    }
}

/// One key of the configuration.
#[derive(Clone, Debug)]
pub struct Key {
    /// The key in the file, with the table that it is in: `cache.high`.
    pub path: &'static str,
    /// The type as the reference names it.
    pub kind: &'static str,
    /// The type as `--help` names it.
    pub value_name: &'static str,
    /// One value, or several.
    pub shape: Shape,
    /// The default, for people.
    pub default: &'static str,
    /// The meaning.
    pub doc: String,
    /// The moment when a change applies.
    pub applies: Applies,
    /// The heading.
    pub group: Group,
    /// The daemons that have it.
    pub daemons: &'static [Daemon],
}

/// A key within a table of its own: `name` in `[[application]]`.
#[derive(Clone, Debug)]
pub struct Field {
    /// The key in its table.
    pub name: &'static str,
    /// The type as the reference names it.
    pub kind: &'static str,
    /// One value, or several.
    pub shape: Shape,
    /// The default, for people.
    pub default: &'static str,
    /// The meaning.
    pub doc: String,
}

fn doc(lines: &[&str]) -> String {
    lines.concat().trim().to_owned()
}

macro_rules! initial {
    (default $ty:ty, $text:literal) => {
        de::from_text::<$ty>($text)
            .expect("the schema's defaults are values; a test reads them all")
    };
    (unset $ty:ty, $text:literal) => {
        <$ty>::default()
    };
}

macro_rules! schema {
    (
        $(#[$meta:meta])*
        pub struct $name:ident { $(
            $(#[doc = $doc:literal])+
            $field:ident: $ty:ty = { key: $key:literal, $how:ident: $default:literal, $applies:ident, $group:ident, $daemons:expr }
        )* }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Deserialize)]
        #[serde(default)]
        pub struct $name { $(
            $(#[doc = $doc])+
            #[serde(rename = $key)]
            pub $field: $ty,
        )* }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: initial!($how $ty, $default), )* }
            }
        }

        impl $name {
            /// All keys.
            pub fn keys() -> Vec<Key> {
                vec![ $( Key {
                    path: $key,
                    kind: <$ty>::KIND,
                    value_name: <$ty>::NAME,
                    shape: <$ty>::SHAPE,
                    default: $default,
                    doc: doc(&[$($doc),+]),
                    applies: Applies::$applies,
                    group: Group::$group,
                    daemons: $daemons,
                }, )* ]
            }
        }
    };
}

macro_rules! table {
    (
        $(#[$meta:meta])*
        pub struct $name:ident { $(
            $(#[doc = $doc:literal])+
            $field:ident: $ty:ty = { key: $key:literal, unset: $default:literal }
        )* }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Deserialize)]
        #[serde(default)]
        pub struct $name { $(
            $(#[doc = $doc])+
            #[serde(rename = $key)]
            pub $field: $ty,
        )* }

        impl $name {
            /// All keys of the table.
            pub fn fields() -> Vec<Field> {
                vec![ $( Field {
                    name: $key,
                    kind: <$ty>::KIND,
                    shape: <$ty>::SHAPE,
                    default: $default,
                    doc: doc(&[$($doc),+]),
                }, )* ]
            }
        }
    };
}

const ALL: &[Daemon] = &Daemon::ALL;
const NODE: &[Daemon] = &[Daemon::Proxy, Daemon::Up];
const PROXY: &[Daemon] = &[Daemon::Proxy];
const UP: &[Daemon] = &[Daemon::Up];
const SCHEDULER: &[Daemon] = &[Daemon::Scheduler];
const JOINING: &[Daemon] = &[Daemon::Proxy, Daemon::Scheduler];
const SCHEDULING: &[Daemon] = &[Daemon::Scheduler, Daemon::Up];

schema! {
    /// The values of all keys. A daemon reads those that it has; the others keep their defaults.
    pub struct Config {
        /// this member's name, for people
        name: Option<Text> = { key: "name", unset: "the host's name", Start, Node, ALL }
        /// the zone of this node, for example a data centre; each piece comes into a zone about once
        zone: Option<Text> = { key: "zone", unset: "none", Start, Node, NODE }
        /// the rack within the zone; nodes of the same rack are asked first
        rack: Option<Text> = { key: "rack", unset: "none", Start, Node, NODE }
        /// identity, member list, blobs; at a scheduler the authority
        data_dir: Directory = { key: "data_dir", default: "/var/lib/hawker", Start, Node, ALL }
        /// the addresses where runtimes reach the mirror
        mirror: Many<Listen> = { key: "mirror", default: "127.0.0.1:6500", Start, Node, NODE }
        /// the mirror's certificate with its issuers; the mirror then speaks TLS as well
        tls_cert: Option<PemPair> = { key: "tls_cert", unset: "none", Live, Node, NODE }
        /// the key of `tls_cert`
        tls_key: Option<PemPair> = { key: "tls_key", unset: "none", Live, Node, NODE }
        /// health, metrics, status
        admin: Option<Listen> = { key: "admin", unset: "127.0.0.1:6503; at a scheduler 127.0.0.1:6504", Start, Node, ALL }
        /// the addresses where peers reach this node
        peer_listen: Many<Listen> = { key: "peer_listen", default: "[::]:6501", Start, Node, NODE }
        /// the addresses that other members dial, for example behind NAT
        advertise: Many<HostPort> = { key: "advertise", unset: "this host's addresses", Start, Node, ALL }

        /// the scheduler to join at the first start; remembered afterwards
        join: Option<HostPort> = { key: "join", unset: "none", Start, Cluster, JOINING }
        /// the token to join with
        token_file: Option<AnyFile> = { key: "token_file", unset: "the environment's HAWKER_TOKEN", Start, Cluster, JOINING }
        /// this node fetches from registries for the others and keeps the blobs
        seed: Switch = { key: "seed", unset: "false", Start, Cluster, PROXY }
        /// further schedulers of the cluster
        scheduler: Many<HostPort> = { key: "scheduler", unset: "none", Start, Cluster, ALL }
        /// seeds besides those that the scheduler names
        seed_address: Many<HostPort> = { key: "seed_address", unset: "none", Start, Cluster, NODE }
        /// the addresses where members reach the scheduler
        listen: Many<Listen> = { key: "listen", default: "[::]:6502", Start, Cluster, SCHEDULER }
        /// the addresses where members reach the scheduler
        scheduler_listen: Many<Listen> = { key: "scheduler_listen", default: "[::]:6502", Start, Cluster, UP }
        /// the scheduler's address for members
        scheduler_advertise: Option<HostPort> = { key: "scheduler_advertise", unset: "the host of `advertise`, else the first global address", Start, Cluster, UP }
        /// the cluster's name, for people
        cluster: Text = { key: "cluster", default: "hawker", Start, Cluster, SCHEDULING }
        /// the zones of members that name none; see [zones](#zones-and-racks)
        network: Vec<NetworkEntry> = { key: "network", unset: "none", Live, Cluster, SCHEDULING }
        /// keys of nodes that the scheduler pushes to all of them; see [pushed keys](#pushed-keys)
        nodes: Pushable = { key: "nodes", unset: "none", Live, Cluster, SCHEDULING }
        /// addresses that members may advertise besides the one that they connect from; see [addresses](#advertised-addresses)
        allow_advertise: Many<CidrOrHost> = { key: "allow_advertise", unset: "none", Start, Cluster, SCHEDULING }

        /// the registry of requests that name none
        default_registry: Option<Host> = { key: "default_registry", unset: "none", Live, Registries, NODE }
        /// the registries that may be asked
        allow_registry: Many<HostPattern> = { key: "allow_registry", unset: "any at a public address", Live, Registries, NODE }
        /// loopback, private or link-local networks where registries may be
        allow_network: Many<Cidr> = { key: "allow_network", unset: "none", Live, Registries, NODE }
        /// the registries with settings of their own
        registries: BTreeMap<Host, Registry> = { key: "registries", unset: "none", Live, Registries, NODE }
        /// the age of a tag that is served while its registry cannot be asked
        stale_tags: Option<UpToAMonth> = { key: "stale_tags", unset: "off", Pushed, Registries, NODE }
        /// the time that public content is served after its registry was last asked, while the registry is down
        public_grace: UpToAMonth = { key: "public_grace", default: "24h", Live, Registries, NODE }

        /// the right that counts; see [modes](security.md#authorization-modes)
        authorization: Mode = { key: "authorization", default: "relay", Live, PrivateImages, NODE }
        /// the node's credentials
        credentials: Many<Credentials> = { key: "credentials", unset: "none", Live, PrivateImages, NODE }
        /// a client's pull-scoped token may be lent to a seed for one transfer
        seed_uses_client_token: Truth = { key: "seed_uses_client_token", default: "true", Start, PrivateImages, NODE }
        /// the time that a pull goes on after its token has expired without a byte to its client; 15 minutes in all
        pull_grace: UpToAnHour = { key: "pull_grace", default: "60s", Start, PrivateImages, NODE }

        /// bytes to peers, a second
        upload_rate: Option<Rate> = { key: "rates.upload", unset: "no limit", Pushed, Limits, NODE }
        /// bytes from peers, a second
        download_rate: Option<Rate> = { key: "rates.download", unset: "no limit", Pushed, Limits, NODE }
        /// bytes from registries, a second
        origin_rate: Option<Rate> = { key: "rates.origin", unset: "no limit", Pushed, Limits, NODE }
        /// bytes of downloads that no client waits for, from peers and registries, a second
        prefetch_rate: Option<Rate> = { key: "rates.prefetch", unset: "no limit", Pushed, Limits, NODE }
        /// bytes of one blob to peers, a second
        task_upload_rate: Option<Rate> = { key: "task_rates.upload", unset: "no limit", Pushed, Limits, NODE }
        /// bytes of one blob from peers, a second
        task_download_rate: Option<Rate> = { key: "task_rates.download", unset: "no limit", Pushed, Limits, NODE }
        /// bytes of one blob from its registry for the cluster, a second
        task_origin_rate: Option<Rate> = { key: "task_rates.origin", unset: "no limit", Pushed, Limits, NODE }
        /// bytes of one blob that no client waits for, a second
        task_prefetch_rate: Option<Rate> = { key: "task_rates.prefetch", unset: "no limit", Pushed, Limits, NODE }
        /// priorities and limits of applications; see [applications](#applications-and-priorities)
        application: Vec<ApplicationEntry> = { key: "application", unset: "none", Pushed, Limits, ALL }
        /// the fill level of the disk at which eviction begins
        cache_high: Percent = { key: "cache.high", default: "90", Pushed, Limits, NODE }
        /// the fill level at which eviction ends
        cache_low: Option<Percent> = { key: "cache.low", unset: "80, or `cache.high` minus 10 if that is less", Pushed, Limits, NODE }
        /// bytes on disk
        cache_max: Option<DiskSize> = { key: "cache.max", unset: "as the disk allows", Pushed, Limits, NODE }
        /// pieces sent to peers at once
        upload_slots: Slots = { key: "upload_slots", default: "8", Pushed, Limits, NODE }
        /// memory for pieces
        memory: MemorySize = { key: "memory", default: "48MiB", Start, Limits, NODE }
        /// the time that a download goes on after its last reader left
        linger: UpToADay = { key: "linger", default: "60s", Pushed, Limits, NODE }
        /// the time after which a connection with a peer is closed that carries nothing but pings
        peer_idle_timeout: Timeout = { key: "peer_idle_timeout", default: "2m", Pushed, Limits, NODE }
        /// the time that bodies go on after SIGTERM
        drain: UpToAnHour = { key: "drain", default: "30s", Start, Limits, NODE }

        /// the addresses where runtimes reach the forward proxy
        forward_proxy: Many<Listen> = { key: "forward_proxy", unset: "none", Start, ForwardProxy, NODE }
        /// rules in order; the first one that fits counts
        intercept: Vec<InterceptEntry> = { key: "intercept", unset: "p2p for `/v2/` of the registries that the configuration names", Live, ForwardProxy, NODE }
        /// the default rules follow the written ones
        intercept_defaults: Truth = { key: "intercept_defaults", default: "true", Live, ForwardProxy, NODE }

        /// the level of log lines
        log_level: LogLevel = { key: "log.level", default: "info", Pushed, Logs, ALL }
        /// the format of log lines
        log_format: Format = { key: "log.format", default: "text", Start, Logs, ALL }
    }
}

table! {
    /// One registry: `[registries."HOST"]`.
    pub struct Registry {
        /// the addresses where the registry is reached, in order; allows its private addresses too
        endpoints: Many<Endpoint> = { key: "endpoints", unset: "`https://HOST` (`docker.io`: `registry-1.docker.io`)" }
        /// further authorities for the registry
        ca: Option<PemFile> = { key: "ca", unset: "the system's authorities" }
        /// the certificate to show to a registry that wants one
        client_cert: Option<PemFile> = { key: "client_cert", unset: "none" }
        /// the key of `client_cert`, unencrypted
        client_key: Option<PemFile> = { key: "client_key", unset: "none" }
        /// accept any certificate of the registry
        insecure: Switch = { key: "insecure", unset: "false" }
        /// the registry must [prove](security.md#registries-that-must-prove-their-content) that it has content that came from elsewhere
        must_prove: Switch = { key: "must_prove", unset: "false; true for registries that the configuration does not name" }
        /// further places that give its tokens
        realms: Many<Endpoint> = { key: "realms", unset: "the registry's own domain" }
        /// the [mode](security.md#authorization-modes) for this registry
        authorization: Option<Mode> = { key: "authorization", unset: "`authorization`" }
    }
}

table! {
    /// One application or tag: `[[application]]`.
    pub struct ApplicationEntry {
        /// the application; `name` or `tag` is required
        name: Option<LabelText> = { key: "name", unset: "none" }
        /// the tag
        tag: Option<LabelText> = { key: "tag", unset: "none" }
        /// pulls that get these labels by themselves
        patterns: Many<PatternText> = { key: "match", unset: "none" }
        /// the order among pulls
        priority: Option<Level> = { key: "priority", unset: "3" }
        /// bytes a second to peers, of all pulls with these labels at one node
        upload: Option<Rate> = { key: "upload", unset: "no limit" }
        /// the same, from peers
        download: Option<Rate> = { key: "download", unset: "no limit" }
        /// the same, from registries
        origin: Option<Rate> = { key: "origin", unset: "no limit" }
        /// the same, of downloads that no client waits for
        prefetch: Option<Rate> = { key: "prefetch", unset: "no limit" }
        /// clients' requests for blobs at once
        requests: Option<AtOnce> = { key: "requests", unset: "no limit" }
        /// blobs read from registries at once; at the scheduler, peers elected to read for the application
        origins: Option<AtOnce> = { key: "origins", unset: "no limit" }
        /// seeds that the scheduler names to each peer of the application
        seeds: Option<AtOnce> = { key: "seeds", unset: "all" }
    }
}

table! {
    /// The members of one network: `[[network]]`.
    pub struct NetworkEntry {
        /// the network
        cidr: Option<Cidr> = { key: "cidr", unset: "required" }
        /// the zone of its members; `zone` or `rack` is required
        zone: Option<Text> = { key: "zone", unset: "none" }
        /// the rack of its members
        rack: Option<Text> = { key: "rack", unset: "none" }
    }
}

table! {
    /// One rule of the forward proxy: `[[intercept]]`.
    pub struct InterceptEntry {
        /// `p2p` or `direct`
        action: Option<ActionText> = { key: "action", unset: "required" }
        /// the host
        host: Option<HostPattern> = { key: "host", unset: "required" }
        /// a part of the request's path
        path: Option<PathPattern> = { key: "path", unset: "any" }
    }
}

/// The keys of `[nodes]`: they are checked as a pushed document.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct Pushable(pub toml::Table);

macro_rules! tables {
    ($($name:ty: $kind:literal, $value:literal, $shape:ident;)*) => { $(
        impl Value for $name {
            const KIND: &'static str = $kind;
            const NAME: &'static str = $value;
            const SHAPE: Shape = Shape::$shape;
        }
    )* };
}

tables! {
    Vec<ApplicationEntry>: "tables", "KEY=VALUE ...", Entries;
    Vec<NetworkEntry>: "tables", "KEY=VALUE ...", Entries;
    Vec<InterceptEntry>: "tables", "ACTION HOST [REGEX]", Entries;
    BTreeMap<Host, Registry>: "tables", "HOST=URL", Hosts;
    Pushable: "table", "TABLE", Table;
}

impl ApplicationEntry {
    /// The rule that the entry stands for.
    ///
    /// # Errors
    /// When it names neither an application nor a tag, or has too many patterns.
    pub fn rule(&self) -> Result<Rule, Wrong> {
        use hawker_core::application::MAX_PATTERNS;

        let rate = |rate: &Option<Rate>| rate.as_ref().map(|rate| rate.0);
        let at_once = |count: &Option<AtOnce>| count.as_ref().map(|count| count.0);
        let label = |label: &Option<LabelText>| label.as_ref().map(|label| label.0.clone());
        let rule = Rule {
            labels: Labels {
                application: label(&self.name),
                tag: label(&self.tag),
            },
            patterns: self
                .patterns
                .iter()
                .map(|pattern| pattern.0.clone())
                .collect(),
            priority: self.priority.as_ref().map(|level| level.0),
            limits: Limits {
                rates: Rates {
                    upload: rate(&self.upload),
                    download: rate(&self.download),
                    origin: rate(&self.origin),
                    prefetch: rate(&self.prefetch),
                },
                requests: at_once(&self.requests),
                origins: at_once(&self.origins),
                seeds: at_once(&self.seeds),
            },
        };
        if rule.labels == Labels::default() {
            return wrong(
                "names neither an application nor a tag",
                "write name=shop match=quay.io/shop/* priority=1",
            );
        }
        if rule.patterns.len() > MAX_PATTERNS {
            let what = format!("{} has {} patterns", rule.labels, rule.patterns.len());
            return wrong(
                what,
                format!("write {MAX_PATTERNS} at most; * stands for any text"),
            );
        }
        Ok(rule)
    }
}

impl NetworkEntry {
    /// The network and the place of its members.
    ///
    /// # Errors
    /// When one of them is missing.
    pub fn place(&self) -> Result<(Network, Place), Wrong> {
        const EXAMPLE: &str = "write cidr=10.1.0.0/16 zone=eu-1, and rack=r7 where there are racks";
        let Some(cidr) = &self.cidr else {
            return wrong("names no network", EXAMPLE);
        };
        if self.zone.is_none() && self.rack.is_none() {
            return wrong("says not where its members stand", EXAMPLE);
        }
        let name = |text: &Option<Text>| text.as_ref().map_or("", |text| text.0.as_str()).into();
        Ok((
            cidr.0,
            Place {
                zone: name(&self.zone),
                rack: name(&self.rack),
            },
        ))
    }
}

impl InterceptEntry {
    /// The rule of the forward proxy.
    ///
    /// # Errors
    /// When it has no host or no action.
    pub fn rule(&self) -> Result<intercept::Rule, Wrong> {
        let (Some(action), Some(host)) = (&self.action, &self.host) else {
            return wrong(
                "lacks its action or its host",
                "write host = \"…\" and action = \"p2p\"",
            );
        };
        let path = self
            .path
            .as_ref()
            .and_then(|path| intercept::path_pattern(path).ok());
        Ok(intercept::Rule {
            host: host.0.clone(),
            path,
            action: action.0,
        })
    }
}

/// The flag of a key, without `--`.
pub fn flag_of(path: &str) -> String {
    let (section, key) = path.split_once('.').unwrap_or(("", path));
    match section {
        "rates" => format!("{key}-rate"),
        "task_rates" => format!("task-{key}-rate"),
        "" => key.replace('_', "-"),
        _ => format!("{section}-{key}").replace('_', "-"),
    }
}

/// The variable of the environment for a key; `None` for keys that hold tables.
pub fn variable_of(key: &Key) -> Option<String> {
    let is_plain = !matches!(key.shape, Shape::Entries | Shape::Hosts | Shape::Table);
    is_plain.then(|| {
        format!(
            "HAWKER_{}",
            flag_of(key.path).replace('-', "_").to_ascii_uppercase()
        )
    })
}

/// The flag of a key of `[registries."HOST"]`, without `--`.
pub fn registry_flag_of(field: &str) -> String {
    match field {
        "endpoints" => "registry".to_owned(),
        "realms" => "registry-realm".to_owned(),
        _ => format!("registry-{}", field.replace('_', "-")),
    }
}
