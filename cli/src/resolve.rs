//! The effective configuration becomes the settings that the daemons run with, or a list of all its problems.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use hawker_config::problem::wrong;
use hawker_config::pushed::MAX_DOCUMENT_BYTES;
use hawker_config::quantity::NetworkOrHost;
use hawker_config::{Config, Document, Effective, Problems, Wrong};
use hawker_core::application::{Applications, MAX_RULES, Rule};
use hawker_core::intercept::{Action, Rules};
use hawker_core::place::{Network, Networks, Place};
use hawker_proxy::origin::check_identity;
use hawker_proxy::registry::tls;
use hawker_proxy::settings::{
    AuthorizationMode, CacheSettings, ClientIdentity, LiveSettings, Rates, Registries,
    RegistrySettings, Settings, Staleness,
};
use hawker_scheduler::advertise::AllowedAddresses;
use url::Url;

use crate::log::LogSettings;

/// The data directory unless told otherwise, as in the schema.
pub(crate) const DATA_DIR: &str = "/var/lib/hawker";
/// The mirror unless told otherwise, as in the schema.
pub(crate) const MIRROR: &str = "127.0.0.1:6500";
/// A proxy's admin address unless told otherwise.
pub(crate) const ADMIN: &str = "127.0.0.1:6503";
/// A scheduler's admin address unless told otherwise.
const SCHEDULER_ADMIN: &str = "127.0.0.1:6504";

const HOW_TO_JOIN: &str = "add --join HOST:PORT with a token, or start a cluster with `hawker up`";

/// The facts that the configuration can't know by itself.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Surroundings {
    /// DATA_DIR/identity holds one already.
    pub(crate) has_identity: bool,
    /// The environment has HAWKER_TOKEN.
    pub(crate) has_token: bool,
}

/// The scheduler to join, and the place of the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Join {
    pub(crate) address: String,
    /// `-` is standard input; `None` is the environment.
    pub(crate) token_file: Option<PathBuf>,
}

/// `hawker proxy`, resolved.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) settings: Settings,
    pub(crate) join: Option<Join>,
    pub(crate) log: LogSettings,
    /// Fine, but a person may not have meant it.
    pub(crate) warnings: Vec<String>,
}

/// `hawker scheduler`, resolved.
#[derive(Debug)]
pub(crate) struct Scheduler {
    pub(crate) name: String,
    pub(crate) data_dir: PathBuf,
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) advertise: Vec<String>,
    pub(crate) admin: SocketAddr,
    pub(crate) cluster: String,
    /// Others of the same cluster.
    pub(crate) schedulers: Vec<String>,
    /// For a second scheduler.
    pub(crate) join: Option<Join>,
    pub(crate) live: hawker_scheduler::LiveSettings,
    /// The addresses that members may advertise besides the one that they connect from.
    pub(crate) allowed_addresses: AllowedAddresses,
    pub(crate) log: LogSettings,
}

/// `hawker up`, resolved: authority and scheduler in the data directory, the node in `proxy/` below.
#[derive(Debug)]
pub(crate) struct Up {
    pub(crate) proxy: Proxy,
    pub(crate) scheduler: Scheduler,
    pub(crate) data_dir: PathBuf,
}

/// Resolves `hawker proxy`.
pub(crate) fn proxy(effective: &Effective, around: Surroundings) -> Result<Proxy, Problems> {
    let mut reader = Reader::new(effective);
    let config = reader.config;
    let mut settings = reader.node();
    settings.seed = *config.seed;
    let join = reader.join();
    reader.cluster(around);
    if let Some(join) = &join
        && !settings.schedulers.contains(&join.address)
    {
        settings.schedulers.push(join.address.clone());
    }
    let log = reader.log();
    let warnings = warnings(&settings);
    reader.finish(Proxy {
        settings,
        join,
        log,
        warnings,
    })
}

/// Resolves `hawker scheduler`.
pub(crate) fn scheduler(
    effective: &Effective,
    around: Surroundings,
) -> Result<Scheduler, Problems> {
    let mut reader = Reader::new(effective);
    let config = reader.config;
    reader.token(around);
    let scheduler = Scheduler {
        name: reader.name(),
        data_dir: config.data_dir.0.clone(),
        listen: unwrapped(&config.listen),
        advertise: unwrapped(&config.advertise),
        admin: config
            .admin
            .as_ref()
            .map_or_else(|| fixed(SCHEDULER_ADMIN), |admin| admin.0),
        cluster: config.cluster.0.clone(),
        schedulers: unwrapped(&config.scheduler),
        join: reader.join(),
        live: reader.cluster_settings(),
        allowed_addresses: allowed_addresses(config),
        log: reader.log(),
    };
    let listeners = scheduler
        .listen
        .iter()
        .map(|a| ("listen", *a))
        .chain([("admin", scheduler.admin)]);
    reader.no_address_twice(listeners.collect());
    reader.finish(scheduler)
}

/// Resolves `hawker up`. `own` is the configuration without what was pushed to the node: the scheduler runs by it.
pub(crate) fn up(effective: &Effective, own: &Effective) -> Result<Up, Problems> {
    let mut reader = Reader::new(effective);
    let config = reader.config;
    let mut settings = reader.node();
    let data_dir = settings.data_dir.clone();
    settings.seed = true;
    settings.data_dir = data_dir.join("proxy");
    let log = reader.log();
    reader.networks();
    let mut allowed_addresses = allowed_addresses(config);
    // The node of this process advertises what its own configuration says.
    for address in &settings.advertise {
        let host = address
            .rsplit_once(':')
            .map_or(address.as_str(), |(host, _)| host);
        let ip = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .parse::<IpAddr>();
        match ip
            .ok()
            .and_then(|ip| Network::new(ip, if ip.is_ipv4() { 32 } else { 128 }))
        {
            Some(network) => allowed_addresses.networks.push(network),
            None => allowed_addresses.hosts.push(host.to_ascii_lowercase()),
        }
    }
    let scheduler = Scheduler {
        allowed_addresses,
        name: settings.name.clone(),
        data_dir: data_dir.clone(),
        admin: settings.admin,
        cluster: config.cluster.0.clone(),
        schedulers: Vec::new(),
        join: None,
        live: Reader::new(own).cluster_settings(),
        log: log.clone(),
        listen: unwrapped(&config.scheduler_listen),
        advertise: config
            .scheduler_advertise
            .iter()
            .map(|address| address.0.clone())
            .collect(),
    };
    let all = node_listeners(&settings).into_iter();
    reader.no_address_twice(
        all.chain(scheduler.listen.iter().map(|a| ("scheduler_listen", *a)))
            .collect(),
    );
    let warnings = warnings(&settings);
    reader.finish(Up {
        proxy: Proxy {
            settings,
            join: None,
            log,
            warnings,
        },
        scheduler,
        data_dir,
    })
}

/// The plain values of a list.
fn unwrapped<T: Clone>(list: &[impl std::ops::Deref<Target = T>]) -> Vec<T> {
    list.iter().map(|item| (**item).clone()).collect()
}

fn fixed(address: &str) -> SocketAddr {
    address.parse().expect("a default address is an address")
}

pub(crate) fn node_listeners(settings: &Settings) -> Vec<(&'static str, SocketAddr)> {
    let mirrors = settings.mirror.iter().map(|address| ("mirror", *address));
    let forward = settings
        .forward_proxy
        .iter()
        .map(|address| ("forward_proxy", *address));
    let peers = settings
        .peer_listen
        .iter()
        .map(|address| ("peer_listen", *address));
    mirrors
        .chain(forward)
        .chain(peers)
        .chain([("admin", settings.admin)])
        .collect()
}

fn warnings(settings: &Settings) -> Vec<String> {
    let open = |what: &str, address: &SocketAddr, risk: &str| {
        (!address.ip().is_loopback()).then(|| format!("{what} {address} is not loopback: {risk}"))
    };
    let mirrors = settings.mirror.iter().filter_map(|address| {
        open(
            "the mirror's address",
            address,
            "every host that reaches it may pull through this node",
        )
    });
    let forward = settings.forward_proxy.iter().filter_map(|address| {
        open(
            "the forward proxy's address",
            address,
            "every host that reaches it may use this proxy to reach the hosts that you allow",
        )
    });
    let unnamed = !settings.forward_proxy.is_empty() && settings.live.load().intercept.is_empty();
    let unnamed = unnamed.then(|| {
        "no [[intercept]] rule and no registry is named: the forward proxy lets everything through as it is".to_owned()
    });
    let admin = open(
        "the admin address",
        &settings.admin,
        "every host that reaches it may read status and metrics",
    );
    let modes = unsafe_modes(settings)
        .into_iter()
        .chain(unused_credentials(settings));
    mirrors
        .chain(forward)
        .chain(unnamed)
        .chain(admin)
        .chain(modes)
        .collect()
}

/// Modes that rely on nobody else reaching the mirror.
fn unsafe_modes(settings: &Settings) -> Vec<String> {
    if settings
        .mirror
        .iter()
        .all(|address| address.ip().is_loopback())
    {
        return Vec::new();
    }
    let risks = [
        (
            AuthorizationMode::Node,
            "every host that reaches the mirror may pull with this node's credentials",
        ),
        (
            AuthorizationMode::Token,
            "clients' passwords come to the mirror in plain HTTP",
        ),
    ];
    let used = risks
        .into_iter()
        .filter(|(mode, _)| is_used(settings, *mode));
    used.map(|(_, risk)| format!("the mirror's address is not loopback: {risk}"))
        .collect()
}

fn unused_credentials(settings: &Settings) -> Option<String> {
    let given = !settings.live.load().credentials.is_empty();
    (given && !is_used(settings, AuthorizationMode::Node)).then(|| {
        "credentials are given, but no registry has authorization = \"node\": they are not used"
            .to_owned()
    })
}

fn is_used(settings: &Settings, mode: AuthorizationMode) -> bool {
    let registries = &settings.live.load().registries;
    registries.authorization == mode
        || registries
            .known
            .values()
            .any(|known| known.authorization == Some(mode))
}

/// Checks values that must fit each other, and notes all faults.
struct Reader<'a> {
    config: &'a Config,
    effective: Effective,
}

impl<'a> Reader<'a> {
    fn new(effective: &'a Effective) -> Self {
        Self {
            config: &effective.config,
            effective: effective.clone(),
        }
    }

    fn finish<T>(self, value: T) -> Result<T, Problems> {
        let problems = self.effective.problems;
        if problems.is_empty() {
            Ok(value)
        } else {
            Err(Problems(problems))
        }
    }

    fn problem(&mut self, path: &str, what: impl Into<String>, cure: impl Into<String>) {
        self.effective.problem(
            path,
            Wrong {
                what: what.into(),
                cure: cure.into(),
            },
        );
    }

    fn check<T>(&mut self, path: &str, result: Result<T, Wrong>) -> Option<T> {
        result
            .map_err(|wrong| self.effective.problem(path, wrong))
            .ok()
    }

    fn name(&self) -> String {
        let host = || {
            rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned()
        };
        self.config
            .name
            .as_ref()
            .map_or_else(host, |name| name.0.clone())
    }

    fn join(&self) -> Option<Join> {
        let token_file = self.config.token_file.as_ref().map(|file| file.0.clone());
        self.config.join.as_ref().map(|address| Join {
            address: address.0.clone(),
            token_file,
        })
    }

    fn node(&mut self) -> Settings {
        let config = self.config;
        let mut registries = self.registries();
        let live = LiveSettings {
            config: config.clone(),
            cache: self.cache(),
            rates: Rates {
                upload: config.upload_rate.as_deref().copied(),
                download: config.download_rate.as_deref().copied(),
                origin: config.origin_rate.as_deref().copied(),
                prefetch: config.prefetch_rate.as_deref().copied(),
            },
            task_rates: Rates {
                upload: config.task_upload_rate.as_deref().copied(),
                download: config.task_download_rate.as_deref().copied(),
                origin: config.task_origin_rate.as_deref().copied(),
                prefetch: config.task_prefetch_rate.as_deref().copied(),
            },
            applications: Arc::new(self.applications()),
            intercept: self.intercept(&mut registries),
            registries,
            credentials: unwrapped(&config.credentials),
            staleness: Staleness {
                tags: config.stale_tags.as_deref().copied(),
                public_grace: *config.public_grace,
            },
            tls: self.certificate(),
        };
        self.nodes_own_right(&live);
        let text = |text: &Option<hawker_config::value::Text>| {
            text.as_ref().map_or("", |text| text.0.as_str()).into()
        };
        let settings = Settings {
            problem: None,
            name: self.name(),
            place: Place {
                zone: text(&config.zone),
                rack: text(&config.rack),
            },
            data_dir: config.data_dir.0.clone(),
            mirror: unwrapped(&config.mirror),
            forward_proxy: unwrapped(&config.forward_proxy),
            admin: config
                .admin
                .as_ref()
                .map_or_else(|| fixed(ADMIN), |admin| admin.0),
            peer_listen: unwrapped(&config.peer_listen),
            advertise: unwrapped(&config.advertise),
            seed: false,
            seeds: unwrapped(&config.seed_address),
            schedulers: unwrapped(&config.scheduler),
            live: Arc::new(Arc::new(live).into()),
            push: None,
            memory_bytes: *config.memory,
            seed_uses_client_token: *config.seed_uses_client_token,
            pull_grace: *config.pull_grace,
            drain: *config.drain,
        };
        self.no_address_twice(node_listeners(&settings));
        settings
    }

    /// The settings of a scheduler that may change.
    fn cluster_settings(&mut self) -> hawker_scheduler::LiveSettings {
        let mut table = self.config.nodes.0.clone();
        if let Some(entries) = self.effective.value("application") {
            table.insert("application".to_owned(), entries.clone());
        }
        let document = Document::new(table);
        if let Err((key, wrong)) = cache_marks(&document.config()) {
            self.effective.problem(&format!("nodes.{key}"), wrong);
        }
        let document = document.text();
        if document.len() > MAX_DOCUMENT_BYTES {
            let what = format!("has {} bytes with the applications", document.len());
            self.problem(
                "nodes",
                what,
                format!("push {MAX_DOCUMENT_BYTES} bytes at most"),
            );
        }
        hawker_scheduler::LiveSettings {
            applications: Arc::new(self.applications()),
            networks: Arc::new(self.networks()),
            document: document.into(),
        }
    }

    /// The places of the members of each network: one entry for each.
    fn networks(&mut self) -> Networks {
        // The schema has reported entries that say no place.
        let networks: Vec<_> = self
            .config
            .network
            .iter()
            .filter_map(|entry| entry.place().ok())
            .collect();
        let twice = |at: usize| {
            networks[..at]
                .iter()
                .any(|(network, _)| *network == networks[at].0)
        };
        if (1..networks.len()).any(twice) {
            self.problem(
                "network",
                "there are two entries for one network",
                "make them one",
            );
        }
        Networks::new(networks)
    }

    /// The rules of applications: one for each pair of labels.
    fn applications(&mut self) -> Applications {
        // The schema has reported entries that are no rules.
        let rules: Vec<Rule> = self
            .config
            .application
            .iter()
            .filter_map(|entry| entry.rule().ok())
            .collect();
        if rules.len() > MAX_RULES {
            let cure = format!("write {MAX_RULES} at most; patterns may have * for any text");
            self.problem(
                "application",
                format!("there are {} entries", rules.len()),
                cure,
            );
        }
        let twice = |(at, rule): (usize, &Rule)| {
            rules[..at].iter().any(|other| other.labels == rule.labels)
        };
        for (_, rule) in rules
            .iter()
            .enumerate()
            .filter(|(at, rule)| twice((*at, rule)))
        {
            let what = format!("there are two entries for {}", rule.labels);
            self.problem("application", what, "make them one; match may be a list");
        }
        Applications::new(rules)
    }

    fn cache(&mut self) -> CacheSettings {
        cache_marks(self.config).unwrap_or_else(|(key, wrong)| {
            self.effective.problem(key, wrong);
            CacheSettings::default()
        })
    }

    fn registries(&mut self) -> Registries {
        let default = self.config.default_registry.as_deref().cloned();
        let allow: Vec<String> = unwrapped(&self.config.allow_registry);
        let known = self.known();
        if let Some(host) = &default
            && !allow.is_empty()
            && !known.contains_key(host)
            && !allow.iter().any(|pattern| matches(pattern, host))
        {
            let cure = format!("add {host} to the allowed registries, or choose another default");
            self.problem(
                "default_registry",
                format!("{host} is not among the allowed registries"),
                cure,
            );
        }
        let allow_networks = unwrapped(&self.config.allow_network);
        Registries {
            default,
            allow,
            known,
            allow_networks,
            authorization: *self.config.authorization,
        }
    }

    /// Node mode needs credentials; without any it would be a slow way to be anonymous.
    fn nodes_own_right(&mut self, live: &LiveSettings) {
        if self.effective.is_set("credentials") {
            return;
        }
        let cure = "say where they are, e.g. --credentials docker:/root/.docker/config.json, or choose relay";
        let what = "node mode pulls with this node's credentials, and there are none";
        if live.registries.authorization == AuthorizationMode::Node {
            self.problem("authorization", what, cure);
        }
        let of_one =
            |known: &&RegistrySettings| known.authorization == Some(AuthorizationMode::Node);
        if let Some((host, _)) = live
            .registries
            .known
            .iter()
            .find(|(_, known)| of_one(known))
        {
            self.problem(&of_registry(host, "authorization"), what, cure);
        }
    }

    /// The forward proxy's rules, and unless the configuration says otherwise those that follow from the registries. Registries
    /// that peers may answer for may be asked.
    fn intercept(&mut self, registries: &mut Registries) -> Rules {
        let rules: Vec<_> = self
            .config
            .intercept
            .iter()
            .filter_map(|entry| entry.rule().ok())
            .collect();
        if !self.effective.is_set("forward_proxy") {
            if self.effective.is_set("intercept") && !self.config.intercept.is_empty() {
                let cure = "add --forward-proxy 127.0.0.1:6505, or take the rules out";
                self.problem(
                    "intercept",
                    "there are rules for a forward proxy, and there is none",
                    cure,
                );
            }
            return Rules::default();
        }
        let listed = registries
            .known
            .keys()
            .chain(&registries.default)
            .chain(&registries.allow);
        let listed: Vec<String> = listed
            .filter(|_| *self.config.intercept_defaults)
            .cloned()
            .collect();
        if !registries.allow.is_empty() {
            let shared = rules.iter().filter(|rule| rule.action == Action::P2p);
            registries
                .allow
                .extend(shared.map(|rule| rule.host.clone()));
        }
        Rules::new(rules).with_registries(listed)
    }

    /// The certificate that the mirror shows to clients that want TLS.
    fn certificate(&mut self) -> Option<Arc<rustls::ServerConfig>> {
        match (&self.config.tls_cert, &self.config.tls_key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => {
                let config = tls::from_files(certificate, key);
                self.check(
                    "tls_cert",
                    config
                        .or_else(|what| wrong(what, "give a PEM file each of certificate and key")),
                )
            }
            (Some(_), None) => {
                self.problem(
                    "tls_cert",
                    "there is a certificate, but no key",
                    "add --tls-key FILE",
                );
                None
            }
            (None, Some(_)) => {
                self.problem(
                    "tls_key",
                    "there is a key, but no certificate",
                    "add --tls-cert FILE",
                );
                None
            }
        }
    }

    fn known(&mut self) -> BTreeMap<String, RegistrySettings> {
        let mut all = BTreeMap::new();
        for (host, registry) in &self.config.registries {
            let host = &host.0;
            let mut known = RegistrySettings {
                endpoints: unwrapped(&registry.endpoints),
                ca: registry.ca.as_deref().cloned(),
                insecure: *registry.insecure,
                identity: None,
                realms: unwrapped(&registry.realms),
                authorization: registry.authorization.as_deref().copied(),
                must_prove: *registry.must_prove,
            };
            match (&registry.client_cert, &registry.client_key) {
                (Some(certificate), Some(key)) => {
                    let identity = ClientIdentity {
                        certificate: certificate.0.clone(),
                        key: key.0.clone(),
                    };
                    let usable = check_identity(&identity)
                        .or_else(|what| wrong(what, "give a PEM file each"));
                    self.check(&of_registry(host, "client_cert"), usable);
                    known.identity = Some(identity);
                }
                (Some(_), None) => {
                    let what = format!("{host} has a client's certificate, but no key");
                    let cure = "add client_key (--registry-client-key HOST=FILE)";
                    self.problem(&of_registry(host, "client_cert"), what, cure);
                }
                (None, Some(_)) => {
                    let what = format!("{host} has a client's key, but no certificate");
                    let cure = "add client_cert (--registry-client-cert HOST=FILE)";
                    self.problem(&of_registry(host, "client_key"), what, cure);
                }
                (None, None) => {}
            }
            if known.endpoints.is_empty() {
                known.endpoints.extend(own_endpoint(host));
            }
            self.tls(host, &known);
            all.insert(host.clone(), known);
        }
        all
    }

    fn tls(&mut self, host: &str, registry: &RegistrySettings) {
        let plain = registry.endpoints.iter().all(|url| url.scheme() == "http");
        let cure = "write its endpoints with https://, or take that out";
        if plain && registry.ca.is_some() {
            let what = format!("{host} is reached by http, where there is no certificate");
            self.problem(&of_registry(host, "ca"), what, cure);
        }
        if plain && registry.identity.is_some() {
            let what = format!("{host} is reached by http, where no certificate is asked for");
            self.problem(&of_registry(host, "client_cert"), what, cure);
        }
        if plain && registry.insecure {
            let what = format!("{host} is reached by http, where there is no certificate");
            self.problem(&of_registry(host, "insecure"), what, cure);
        }
        if registry.insecure && registry.ca.is_some() {
            self.problem(
                &of_registry(host, "insecure"),
                format!("{host} has authorities of its own, and would accept any certificate all the same"),
                "keep one of registry-ca and registry-insecure; the first is the safe one",
            );
        }
    }

    /// Joining, seeds and schedulers: combinations that make sense.
    fn cluster(&mut self, around: Surroundings) {
        self.token(around);
        if around.has_identity || self.config.join.is_some() {
            return;
        }
        if *self.config.seed {
            self.problem(
                "seed",
                "a seed serves a cluster, and this node is in none",
                HOW_TO_JOIN,
            );
        }
        let not_member = "only members may talk to it, and this node is in no cluster";
        for key in ["scheduler", "seed_address"] {
            if self.effective.is_set(key) {
                self.problem(key, not_member, HOW_TO_JOIN);
            }
        }
    }

    /// Joining needs a token, and a token needs somewhere to join. Members need neither any more.
    fn token(&mut self, around: Surroundings) {
        if around.has_identity {
            return;
        }
        let (join, token_file) = (
            self.effective.is_set("join"),
            self.effective.is_set("token_file"),
        );
        if join && !token_file && !around.has_token {
            let cure = "make a token with `hawker token create` where the authority is, and give it by --token-file FILE, \
                        by --token-file - on standard input, or in the environment's HAWKER_TOKEN";
            self.problem(
                "join",
                "there is no token, and this node is no member yet",
                cure,
            );
        }
        if !join && token_file {
            self.problem(
                "token_file",
                "there is a token, but nowhere to join with it",
                HOW_TO_JOIN,
            );
        }
    }

    /// Two listeners on one port would fail at start with less to say.
    fn no_address_twice(&mut self, listeners: Vec<(&'static str, SocketAddr)>) {
        for (i, (key, address)) in listeners.iter().enumerate() {
            let clash = |other: &SocketAddr| {
                address.port() != 0
                    && other.port() == address.port()
                    && (other.ip() == address.ip()
                        || other.ip().is_unspecified()
                        || address.ip().is_unspecified())
            };
            // An IPv4 and an IPv6 wildcard on one port are a common pair of one listener.
            let pair = |other: &SocketAddr| other.is_ipv4() != address.is_ipv4();
            if let Some((first, other)) = listeners[..i]
                .iter()
                .find(|(first, other)| clash(other) && !(first == key && pair(other)))
            {
                let what = format!(
                    "{address} is taken already by {} ({other})",
                    self.effective.name(first)
                );
                let known = self.effective.problems.iter().any(|p| p.what == what);
                if !known {
                    self.problem(key, what, "give each its own port");
                }
            }
        }
    }

    fn log(&mut self) -> LogSettings {
        let level = self.check("log.level", crate::log::level(&self.config.log_level));
        LogSettings {
            level: level.unwrap_or_else(|| "info".to_owned()),
            format: *self.config.log_format,
        }
    }
}

/// The marks of the cache, or the key with the fault.
fn cache_marks(config: &Config) -> Result<CacheSettings, (&'static str, Wrong)> {
    let (high_percent, low) = (*config.cache_high, config.cache_low.as_deref().copied());
    // A lower high mark alone lowers the low mark too.
    let usual = CacheSettings::default().low_percent;
    let low_percent = low.unwrap_or_else(|| usual.min(high_percent.saturating_sub(10).max(1)));
    if low_percent < high_percent {
        let max_bytes = config.cache_max.as_deref().copied();
        return Ok(CacheSettings {
            high_percent,
            low_percent,
            max_bytes,
        });
    }
    let what =
        format!("the low mark ({low_percent} %) is not below the high mark ({high_percent} %)");
    let cure = "eviction runs from the high mark down to the low one: make cache-low smaller than cache-high";
    let key = if low.is_some() {
        "cache.low"
    } else {
        "cache.high"
    };
    Err((
        key,
        Wrong {
            what,
            cure: cure.to_owned(),
        },
    ))
}

/// Networks and hosts that members may advertise.
fn allowed_addresses(config: &Config) -> AllowedAddresses {
    let mut allowed = AllowedAddresses::default();
    for one in config.allow_advertise.iter() {
        match &one.0 {
            NetworkOrHost::Network(network) => allowed.networks.push(*network),
            NetworkOrHost::Host(host) => allowed.hosts.push(host.clone()),
        }
    }
    allowed
}

/// The path of a registry's key.
fn of_registry(host: &str, field: &str) -> String {
    format!("registries.\"{host}\".{field}")
}

/// The endpoint of a registry of which only the name is known. Docker Hub's name is not its address.
fn own_endpoint(host: &str) -> Option<Url> {
    let host = if host == "docker.io" {
        "registry-1.docker.io"
    } else {
        host
    };
    Url::parse(&format!("https://{host}")).ok()
}

fn matches(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(end) => host.len() > end.len() && host.ends_with(end),
        None => pattern == host,
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::io::Write;
    use std::path::Path;
    use std::time::Duration;

    use hawker_config::Daemon;
    use hawker_config::schema::LogFormat as Format;
    use hawker_core::intercept::Way;
    use hawker_proxy::settings::CredentialSource;

    use super::*;
    use crate::flags;

    const MEMBER: Surroundings = Surroundings {
        has_identity: true,
        has_token: false,
    };

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace()
            .map(|word| word.replace('~', " ").into())
            .collect()
    }

    fn read(daemon: Daemon, argv: &[OsString]) -> Effective {
        Effective::new(daemon, flags::layers(daemon, argv))
    }

    fn typed(line: &str) -> Effective {
        read(Daemon::Proxy, &words(line))
    }

    fn errors(line: &str, around: Surroundings) -> Vec<String> {
        proxy(&typed(line), around)
            .map(|_| Vec::new())
            .unwrap_or_else(|problems| {
                assert!(problems.0.iter().all(|p| !p.cure.is_empty()));
                problems
                    .0
                    .iter()
                    .map(|p| format!("{}: {}", p.key, p.what))
                    .collect()
            })
    }

    #[test]
    fn nothing_written_is_a_node_that_runs_alone() {
        let proxy = proxy(&typed(""), Surroundings::default()).unwrap();
        let s = &proxy.settings;
        assert_eq!(s.mirror, [MIRROR.parse().unwrap()]);
        assert_eq!(
            (s.admin, s.peer_listen[0]),
            (ADMIN.parse().unwrap(), "[::]:6501".parse().unwrap())
        );
        assert_eq!(s.data_dir, Path::new(DATA_DIR));
        assert_eq!(
            (*s.live.load().config.linger, s.drain),
            (Duration::from_secs(60), Duration::from_secs(30))
        );
        assert!(
            !s.seed && s.schedulers.is_empty() && proxy.join.is_none() && proxy.warnings.is_empty()
        );
        assert!(!s.name.is_empty());
        assert_eq!(s.live.load().rates, Rates::default());
    }

    #[test]
    fn networks_say_where_members_stand() {
        let resolved = |line: &str| {
            scheduler(
                &read(Daemon::Scheduler, &words(line)),
                Surroundings::default(),
            )
        };
        let two = "--network cidr=10.0.0.0/8~zone=a --network cidr=10.1.0.0/16~zone=b~rack=7";
        let networks = resolved(two).unwrap().live.networks;
        let of = |ip: &str| {
            networks
                .of(ip.parse().unwrap())
                .map(|place| (&*place.zone, &*place.rack))
        };
        assert_eq!(of("10.2.0.1"), Some(("a", "")));
        assert_eq!(of("10.1.0.1"), Some(("b", "7")));
        for (line, told) in [
            (
                "--network cidr=10.0.0.0/8~zone=a --network zone=b~cidr=10.0.0.0/8",
                "two entries for one network",
            ),
            ("--network zone=a", "names no network"),
            ("--network cidr=10.0.0.0/8", "says not where"),
            ("--network cidr=10.0.0.0/33~zone=a", "is no network"),
            ("--network cidr=10.0.0.0/8~zone=a~zone=b", "something twice"),
            ("--network cidr=10.0.0.0/8~zone=", "is empty"),
            ("--network cidr=10.0.0.0/8~row=3", "nothing that is said"),
        ] {
            let problems = resolved(line).unwrap_err().0;
            assert!(
                problems.iter().any(|problem| problem.what.contains(told)),
                "{line}: {problems:?}"
            );
        }
    }

    #[test]
    fn an_application_is_said_once_and_there_are_not_too_many() {
        let told = |line: &str| {
            proxy(&typed(line), Surroundings::default())
                .unwrap_err()
                .to_string()
        };
        let twice = told("--application name=a~priority=1 --application name=a");
        assert!(
            twice.contains("two entries for a") && twice.contains("match may be a list"),
            "{twice}"
        );
        let many: String = (0..=MAX_RULES)
            .map(|n| format!("--application name=a{n} "))
            .collect();
        assert!(told(&many).contains("write 64 at most"));
        assert!(told("--application priority=1").contains("names neither"));
    }

    #[test]
    fn everything_written_arrives() {
        let line = "--name n --zone z --rack r --data-dir /d --mirror 127.0.0.1:1 --mirror [::1]:2 --admin 127.0.0.1:3 \
                    --peer-listen 0.0.0.0:4 --advertise n.example:5 --seed --join s.example:6 --token-file - \
                    --scheduler t.example:7 --seed-address u.example:8 --default-registry docker.io \
                    --allow-registry *.example.com --allow-registry docker.io --allow-network 10.0.0.0/8 \
                    --registry 10.0.0.1:5000=http://10.0.0.1:5000 --registry-insecure a.example --registry-must-prove a.example \
                    --upload-rate 100MB --download-rate 12MiB --origin-rate 1MB/s --prefetch-rate 9MB --task-upload-rate 8MB \
                    --application name=shop~priority=1~download=2MB --application tag=night --cache-high 70 --cache-low 60% \
                    --cache-max 10GB --upload-slots 8 --memory 64MiB --linger 5m --drain 10s \
                    --seed-uses-client-token false --pull-grace 5s --authorization token \
                    --registry-authorization b.example=node --registry-realm b.example=https://sso.example:8443 \
                    --credentials docker:/dev/null --credentials containerd:/dev/null \
                    --credentials kubernetes:/dev --credentials env:PATH \
                    --stale-tags 1h --public-grace 2d \
                    --forward-proxy 127.0.0.1:9 --intercept p2p~quay.io~^/v2/ --intercept direct~auth.example \
                    --log-level debug --log-format json";
        let Proxy {
            settings: s,
            join,
            log,
            ..
        } = proxy(&typed(line), Surroundings::default()).unwrap();
        assert_eq!(
            (s.name.as_str(), &*s.place.zone, &*s.place.rack, s.seed),
            ("n", "z", "r", true)
        );
        assert_eq!(s.mirror.len(), 2);
        assert_eq!(s.schedulers, ["t.example:7", "s.example:6"]);
        assert_eq!(
            (s.seeds, s.advertise),
            (
                vec!["u.example:8".to_owned()],
                vec!["n.example:5".to_owned()]
            )
        );
        assert_eq!(
            join,
            Some(Join {
                address: "s.example:6".into(),
                token_file: Some("-".into())
            })
        );
        let cache = CacheSettings {
            high_percent: 70,
            low_percent: 60,
            max_bytes: Some(10_000_000_000),
        };
        assert_eq!(s.live.load().cache, cache);
        assert_eq!(
            (*s.live.load().config.upload_slots, s.memory_bytes),
            (8, 64 << 20)
        );
        assert_eq!(
            (*s.live.load().config.linger, s.drain),
            (Duration::from_secs(300), Duration::from_secs(10))
        );
        assert_eq!(
            (s.seed_uses_client_token, s.pull_grace),
            (false, Duration::from_secs(5))
        );
        assert_eq!(
            log,
            LogSettings {
                level: "debug".into(),
                format: Format::Json
            }
        );
        let live = s.live.load();
        let rates = Rates {
            upload: Some(100_000_000),
            download: Some(12 << 20),
            origin: Some(1_000_000),
            prefetch: Some(9_000_000),
        };
        assert_eq!(live.rates, rates);
        let rules = live.applications.rules().iter();
        let said: Vec<_> = rules
            .map(|r| (r.labels.to_string(), r.limits.rates.download))
            .collect();
        assert_eq!(
            said,
            [
                ("shop".to_owned(), Some(2_000_000)),
                ("tag night".to_owned(), None)
            ]
        );
        assert_eq!(
            live.task_rates,
            Rates {
                upload: Some(8_000_000),
                ..Rates::default()
            }
        );
        let (hour, two_days) = (Duration::from_secs(3_600), Duration::from_secs(2 * 86_400));
        assert_eq!(
            live.staleness,
            Staleness {
                tags: Some(hour),
                public_grace: two_days
            }
        );
        assert_eq!(
            live.registries.known["10.0.0.1:5000"].endpoints[0].as_str(),
            "http://10.0.0.1:5000/"
        );
        assert!(live.registries.known["a.example"].insecure);
        assert!(
            live.registries.known["a.example"].must_prove
                && !live.registries.is_believed("a.example")
        );
        assert_eq!(
            live.registries.known["a.example"].endpoints[0].as_str(),
            "https://a.example/"
        );
        assert_eq!(
            live.registries.allow_networks,
            [Network::new("10.0.0.0".parse().unwrap(), 8).unwrap()]
        );
        let modes = ["a.example", "b.example"].map(|host| live.registries.authorization(host));
        assert_eq!(modes, [AuthorizationMode::Token, AuthorizationMode::Node]);
        assert_eq!(
            live.registries.known["b.example"].realms[0].as_str(),
            "https://sso.example:8443/"
        );
        let sources = [
            CredentialSource::Docker("/dev/null".into()),
            CredentialSource::Containerd("/dev/null".into()),
            CredentialSource::Kubernetes("/dev".into()),
            CredentialSource::Environment("PATH".into()),
        ];
        assert_eq!(live.credentials, sources);
        assert_eq!(s.forward_proxy, ["127.0.0.1:9".parse().unwrap()]);
        assert_eq!(live.intercept.way("auth.example", false), Way::Tunnel);
        assert_eq!(live.intercept.way("quay.io", false), Way::Open);
        assert!(
            live.registries.allow.contains(&"quay.io".to_owned()),
            "what peers may answer is a registry"
        );
    }

    #[test]
    fn the_registries_named_are_shared_with_and_without_rules_until_that_is_turned_off() {
        let line = "--forward-proxy 127.0.0.1:9 --allow-registry *.example.com --registry reg:5000=http://reg:5000";
        for (more, way) in [
            ("", Way::Open),
            (" --intercept p2p~quay.io~^/v2/", Way::Open),
            (
                " --intercept direct~auth.example --intercept-defaults true",
                Way::Open,
            ),
            (
                " --intercept p2p~quay.io~^/v2/ --intercept-defaults false",
                Way::Tunnel,
            ),
        ] {
            let proxy = proxy(&typed(&format!("{line}{more}")), Surroundings::default()).unwrap();
            let live = proxy.settings.live.load();
            for host in ["a.example.com", "reg:5000"] {
                assert_eq!(live.intercept.way(host, true), way, "{host} {more}");
            }
            assert!(proxy.warnings.is_empty(), "{:?}", proxy.warnings);
        }
    }

    #[test]
    fn a_certificate_and_its_key_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let made = || rcgen::generate_simple_self_signed(["a.example".into()]).unwrap();
        let (one, other) = (made(), made());
        let (certificate, key) = (
            file("c", &one.cert.pem()),
            file("k", &one.signing_key.serialize_pem()),
        );
        let foreign = file("f", &other.signing_key.serialize_pem());
        let line = format!("--tls-cert {certificate} --tls-key {key}");
        assert!(
            proxy(&typed(&line), Surroundings::default())
                .unwrap()
                .settings
                .live
                .load()
                .tls
                .is_some()
        );
        for (line, expected) in [
            (
                format!("--tls-cert {certificate}"),
                "--tls-cert: there is a certificate, but no key",
            ),
            (
                format!("--tls-key {key}"),
                "--tls-key: there is a key, but no certificate",
            ),
            (
                format!("--tls-cert {certificate} --tls-key {foreign}"),
                "--tls-cert: ",
            ),
            (format!("--tls-cert {key} --tls-key {key}"), "--tls-cert: "),
            (
                format!("--tls-cert {certificate} --tls-key /nonexistent"),
                "--tls-cert: /nonexistent has no",
            ),
        ] {
            let told = errors(&line, Surroundings::default());
            assert!(
                told.len() == 1 && told[0].starts_with(expected),
                "{line}: {told:?}"
            );
            assert!(!told[0].contains("PRIVATE"), "{told:?}");
        }
    }

    #[test]
    fn each_bad_value_and_impossible_combination_is_named() {
        let alone = Surroundings::default();
        for (line, around, expected) in [
            (
                "--mirror localhost:1",
                alone,
                "--mirror: `localhost:1` is no address",
            ),
            (
                "--cache-low 95",
                alone,
                "--cache-low: the low mark (95 %) is not below the high mark (90 %)",
            ),
            (
                "--cache-high 50 --cache-low 50",
                alone,
                "--cache-low: the low mark",
            ),
            (
                "--cache-high 100",
                alone,
                "--cache-high: `100` is no percentage",
            ),
            (
                "--cache-max 1KB",
                alone,
                "--cache-max: 1000 B is too little",
            ),
            ("--seed", alone, "--seed: a seed serves a cluster"),
            ("--scheduler a:1", alone, "--scheduler: only members"),
            ("--seed-address a:1", alone, "--seed-address: only members"),
            ("--join a:1", alone, "--join: there is no token"),
            (
                "--token-file f",
                alone,
                "--token-file: there is a token, but nowhere",
            ),
            (
                "--registry a.example=http://a.example --registry-ca a.example=/dev/null",
                alone,
                "--registry-ca: a.ex",
            ),
            (
                "--registry a.example=http://a.example --registry-insecure a.example",
                alone,
                "--registry-insecure: a",
            ),
            (
                "--registry-ca a.example=/dev/null --registry-insecure a.example",
                alone,
                "--registry-insecure: a.ex",
            ),
            (
                "--registry-ca a.example=/nonexistent",
                alone,
                "--registry-ca: /nonexistent: No such file",
            ),
            ("--registry a.example", alone, "--registry: has no `=`"),
            (
                "--registry a.example=ftp://a",
                alone,
                "--registry: `ftp://a` is no registry's address",
            ),
            (
                "--default-registry a.example --allow-registry b.example",
                alone,
                "--default-registry: a.example is not",
            ),
            (
                "--allow-network 10.0.0.0/99",
                alone,
                "--allow-network: `10.0.0.0/99` is no network",
            ),
            (
                "--admin 127.0.0.1:6500",
                alone,
                "--admin: 127.0.0.1:6500 is taken already by --mirror",
            ),
            (
                "--mirror 127.0.0.1:7 --peer-listen [::]:7",
                alone,
                "--peer-listen: [::]:7 is taken already",
            ),
            (
                "--forward-proxy 127.0.0.1:6500",
                alone,
                "--forward-proxy: 127.0.0.1:6500 is taken already",
            ),
            (
                "--intercept p2p~quay.io",
                alone,
                "--intercept: there are rules for a forward proxy",
            ),
            (
                "--forward-proxy 127.0.0.1:7 --intercept quay.io",
                alone,
                "--intercept: `quay.io` names no action",
            ),
            ("--upload-rate 1", alone, "--upload-rate: `1` is no size"),
            (
                "--upload-slots 0",
                alone,
                "--upload-slots: `0` is out of range",
            ),
            ("--memory 1MiB", alone, "--memory: 1.0 MiB is too little"),
            ("--linger 60", alone, "--linger: `60` is no duration"),
            (
                "--forward-proxy 127.0.0.1:7 --intercept-defaults no",
                alone,
                "--intercept-defaults: `no` is neither",
            ),
            (
                "--seed-uses-client-token maybe",
                alone,
                "--seed-uses-client-token: `maybe` is neither",
            ),
            (
                "--authorization me",
                alone,
                "--authorization: `me` is no way to authorize",
            ),
            (
                "--authorization node",
                alone,
                "--authorization: node mode pulls with this node's credentials",
            ),
            (
                "--registry-authorization a.example=node",
                alone,
                "--registry-authorization: node mode",
            ),
            (
                "--registry-authorization node",
                alone,
                "--registry-authorization: has no `=`",
            ),
            (
                "--registry-realm a.example=sso",
                alone,
                "--registry-realm: `sso` is no registry's address",
            ),
            (
                "--credentials /root/x",
                alone,
                "--credentials: `/root/x` does not say what kind",
            ),
            (
                "--credentials vault:x",
                alone,
                "--credentials: `vault` is no kind",
            ),
            (
                "--credentials docker:/nonexistent",
                alone,
                "--credentials: /nonexistent: No such file",
            ),
            (
                "--credentials env:HAWKER_TEST_NOT_SET",
                alone,
                "--credentials: the environment has no HAWKER",
            ),
            ("--pull-grace 1d", alone, "--pull-grace: is too long"),
            ("--stale-tags 60d", alone, "--stale-tags: is too long"),
            (
                "--public-grace 1",
                alone,
                "--public-grace: `1` is no duration",
            ),
            ("--drain 2d", alone, "--drain: is too long"),
            (
                "--log-level loud",
                alone,
                "--log-level: `loud` is no log level",
            ),
            (
                "--log-format xml",
                alone,
                "--log-format: `xml` is no format",
            ),
            ("--advertise a", MEMBER, "--advertise: `a` has no port"),
            ("--data-dir=", alone, "--data-dir: is empty"),
        ] {
            let told = errors(line, around);
            assert_eq!(told.len(), 1, "{line}: {told:?}");
            assert!(told[0].starts_with(expected), "{line}: {told:?}");
        }
        let with_token = Surroundings {
            has_token: true,
            ..alone
        };
        for (line, around) in [
            ("--seed", MEMBER),
            ("--scheduler a:1 --seed-address b:2", MEMBER),
            ("--join a:1", MEMBER),
            ("--join a:1 --seed", with_token),
            ("--cache-high 60", alone),
            (
                "--default-registry a.example --allow-registry *.example",
                alone,
            ),
            ("--mirror 0.0.0.0:7 --mirror [::]:7", alone),
            ("--mirror 127.0.0.1:0 --admin 127.0.0.1:0", alone),
        ] {
            assert_eq!(errors(line, around), [""; 0], "{line}");
        }
    }

    #[test]
    fn file_and_flags_are_told_together_each_in_its_own_words() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"nmae = 'a'\nlinger = '60'\nseed = true\n[cache]\nlow = 95\n")
            .unwrap();
        let told = errors(
            &format!("--config {} --memory much", file.path().display()),
            Surroundings::default(),
        );
        assert_eq!(told.len(), 5, "{told:?}");
        for start in ["nmae (", "linger (", "seed (", "cache.low (", "--memory:"] {
            assert!(
                told.iter().any(|line| line.starts_with(start)),
                "{start} in {told:?}"
            );
        }
    }

    #[test]
    fn an_address_beyond_loopback_is_allowed_and_said() {
        let proxy = proxy(
            &typed("--mirror 0.0.0.0:6500 --admin [::]:6503 --forward-proxy 0.0.0.0:6505"),
            Surroundings::default(),
        )
        .unwrap();
        // The last one: the forward proxy has nothing to share.
        assert_eq!(proxy.warnings.len(), 4, "{:?}", proxy.warnings);
    }

    #[test]
    fn modes_that_rely_on_loopback_and_credentials_without_a_use_are_said() {
        let node = "--credentials docker:/dev/null --authorization node";
        let open = "--mirror 0.0.0.0:6500";
        for (line, expected) in [
            (node.to_owned(), 0),
            (format!("{node} {open}"), 2),
            ("--authorization token".to_owned(), 0),
            (format!("--authorization token {open}"), 2),
            ("--credentials docker:/dev/null".to_owned(), 1),
            (
                "--credentials docker:/dev/null --registry-authorization a.example=node".to_owned(),
                0,
            ),
        ] {
            let warnings = proxy(&typed(&line), Surroundings::default())
                .unwrap()
                .warnings;
            assert_eq!(warnings.len(), expected, "{line}: {warnings:?}");
        }
    }

    #[test]
    fn up_is_a_seed_and_a_scheduler_below_one_directory() {
        let resolved = |argv: &[OsString]| {
            let effective = read(Daemon::Up, argv);
            up(&effective, &effective)
        };
        let argv = ["--data-dir", "/d", "--scheduler-listen", "[::]:7"].map(OsString::from);
        let up = resolved(&argv).unwrap();
        assert!(up.proxy.settings.seed);
        assert_eq!(up.proxy.settings.data_dir, Path::new("/d/proxy"));
        assert_eq!(up.scheduler.data_dir, Path::new("/d"));
        assert_eq!(up.scheduler.listen, ["[::]:7".parse().unwrap()]);
        let argv = ["--scheduler-listen", "[::]:6501"].map(OsString::from);
        assert!(resolved(&argv).is_err());
    }

    #[test]
    fn pushed_marks_that_do_not_fit_each_other_are_told_at_the_scheduler() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"[nodes.cache]\nlow = 70\nhigh = 60\n")
            .unwrap();
        let argv = [format!("--config={}", file.path().display()).into()];
        let problems = scheduler(&read(Daemon::Scheduler, &argv), MEMBER)
            .unwrap_err()
            .0;
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(
            problems[0].key.starts_with("nodes.cache.low (") && problems[0].key.ends_with(":2)")
        );
    }

    #[test]
    fn a_scheduler_has_its_own_ports() {
        let argv = ["--cluster", "lab"].map(OsString::from);
        let scheduler = scheduler(&read(Daemon::Scheduler, &argv), MEMBER).unwrap();
        assert_eq!(
            (scheduler.listen[0], scheduler.admin),
            (fixed("[::]:6502"), fixed(SCHEDULER_ADMIN))
        );
        assert_eq!(scheduler.cluster, "lab");
    }
}
