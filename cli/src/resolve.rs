//! The configuration as resolved: what was written becomes what the daemons run with, or a list of all that is wrong with it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hawker_core::application::{Applications, MAX_RULES, Rule};
use hawker_core::intercept::{Action, Rules};
use hawker_core::place::{Networks, Place};
use hawker_proxy::registry::tls;
use hawker_proxy::settings::{
    AuthorizationMode, CacheSettings, LiveSettings, Rates, Registries, RegistrySettings, Settings, Staleness,
};
use url::Url;

use crate::args::{LogArgs, NetworkArgs, NodeArgs, ProxyArgs, SchedulerArgs, UpArgs};
use crate::log::{Format, LogSettings};
use crate::problem::{Problem, Problems};
use crate::quantity::{self, Wrong, wrong};
use crate::written::{Places, Written};

/// Where data is unless told otherwise.
pub(crate) const DATA_DIR: &str = "/var/lib/hawker";
/// The mirror unless told otherwise.
pub(crate) const MIRROR: &str = "127.0.0.1:6500";
/// Peers unless told otherwise.
pub(crate) const PEERS: &str = "[::]:6501";
/// The scheduler unless told otherwise.
pub(crate) const SCHEDULER: &str = "[::]:6502";
/// A proxy's admin address unless told otherwise.
pub(crate) const ADMIN: &str = "127.0.0.1:6503";
/// A scheduler's admin address unless told otherwise.
const SCHEDULER_ADMIN: &str = "127.0.0.1:6504";

const HOW_TO_JOIN: &str = "add --join HOST:PORT with a token, or start a cluster with `hawker up`";

const UPLOAD_SLOTS: u32 = 8;
const MEMORY_BYTES: u64 = 48 << 20;
const LINGER: Duration = Duration::from_secs(60);
const PULL_GRACE: Duration = Duration::from_secs(60);
const DRAIN: Duration = Duration::from_secs(30);

/// What the configuration can't know by itself.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Surroundings {
    /// DATA_DIR/identity holds one already.
    pub(crate) has_identity: bool,
    /// The environment has HAWKER_TOKEN.
    pub(crate) has_token: bool,
}

/// Where to join and where the token is.
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
    pub(crate) advertise: Option<String>,
    pub(crate) admin: SocketAddr,
    pub(crate) cluster: String,
    /// Others of the same cluster.
    pub(crate) schedulers: Vec<String>,
    /// For a second scheduler.
    pub(crate) join: Option<Join>,
    pub(crate) applications: Arc<Applications>,
    /// Where members stand who do not say it.
    pub(crate) networks: Networks,
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
pub(crate) fn proxy(written: &Written<ProxyArgs>, around: Surroundings) -> Result<Proxy, Problems> {
    let args = &written.args;
    let mut reader = Reader::new(&written.places, &written.problems);
    let mut settings = reader.node(&args.node);
    settings.seed = args.seed;
    let join = reader.optional("join", args.join.as_deref(), quantity::host_port);
    let token_file = args.token_file.as_ref().map(PathBuf::from);
    reader.cluster(args, around);
    if let Some(address) = &join
        && !settings.schedulers.contains(address)
    {
        settings.schedulers.push(address.clone());
    }
    let log = reader.log(&args.node.log);
    let warnings = warnings(&settings);
    let join = join.map(|address| Join { address, token_file });
    reader.finish(Proxy { settings, join, log, warnings })
}

/// Resolves `hawker scheduler`.
pub(crate) fn scheduler(
    written: &Written<SchedulerArgs>,
    around: Surroundings,
) -> Result<Scheduler, Problems> {
    let args = &written.args;
    let mut reader = Reader::new(&written.places, &written.problems);
    reader.token(args.join.as_deref(), args.token_file.as_deref(), around);
    let join = reader.optional("join", args.join.as_deref(), quantity::host_port);
    let token_file = args.token_file.as_ref().map(PathBuf::from);
    let scheduler = Scheduler {
        name: reader.name(args.name.as_deref()),
        data_dir: reader.data_dir(args.data_dir.as_deref()),
        listen: reader.listeners("listen", &args.listen, SCHEDULER),
        advertise: reader.optional("advertise", args.advertise.as_deref(), quantity::host_port),
        admin: reader.one("admin", args.admin.as_deref(), fixed(SCHEDULER_ADMIN), quantity::listen),
        cluster: reader.cluster_name(args.cluster.as_deref()),
        schedulers: reader.many("scheduler", &args.scheduler, quantity::host_port),
        join: join.map(|address| Join { address, token_file }),
        applications: Arc::new(reader.applications(&args.applications.application)),
        networks: reader.networks(&args.networks),
        log: reader.log(&args.log),
    };
    let listeners = scheduler.listen.iter().map(|a| ("listen", *a)).chain([("admin", scheduler.admin)]);
    reader.no_address_twice(listeners.collect());
    reader.finish(scheduler)
}

/// Resolves `hawker up`.
pub(crate) fn up(written: &Written<UpArgs>) -> Result<Up, Problems> {
    let args = &written.args;
    let mut reader = Reader::new(&written.places, &written.problems);
    let mut settings = reader.node(&args.node);
    let data_dir = settings.data_dir.clone();
    settings.seed = true;
    settings.data_dir = data_dir.join("proxy");
    let log = reader.log(&args.node.log);
    let listen = reader.listeners("scheduler-listen", &args.scheduler_listen, SCHEDULER);
    let advertise =
        reader.optional("scheduler-advertise", args.scheduler_advertise.as_deref(), quantity::host_port);
    let scheduler = Scheduler {
        name: settings.name.clone(),
        data_dir: data_dir.clone(),
        admin: settings.admin,
        cluster: reader.cluster_name(args.cluster.as_deref()),
        schedulers: Vec::new(),
        join: None,
        applications: Arc::clone(&settings.live.load().applications),
        networks: reader.networks(&args.networks),
        log: log.clone(),
        listen,
        advertise,
    };
    let all = node_listeners(&settings).into_iter();
    reader.no_address_twice(all.chain(scheduler.listen.iter().map(|a| ("scheduler-listen", *a))).collect());
    let warnings = warnings(&settings);
    reader.finish(Up { proxy: Proxy { settings, join: None, log, warnings }, scheduler, data_dir })
}

fn fixed(address: &str) -> SocketAddr {
    address.parse().expect("a default address is an address")
}

pub(crate) fn node_listeners(settings: &Settings) -> Vec<(&'static str, SocketAddr)> {
    let mirrors = settings.mirror.iter().map(|address| ("mirror", *address));
    let forward = settings.forward_proxy.iter().map(|address| ("forward-proxy", *address));
    let peers = settings.peer_listen.iter().map(|address| ("peer-listen", *address));
    mirrors.chain(forward).chain(peers).chain([("admin", settings.admin)]).collect()
}

fn warnings(settings: &Settings) -> Vec<String> {
    let open = |what: &str, address: &SocketAddr, risk: &str| {
        (!address.ip().is_loopback()).then(|| format!("{what} {address} is not loopback: {risk}"))
    };
    let mirrors = settings.mirror.iter().filter_map(|address| {
        open("the mirror's address", address, "whoever reaches it may pull through this node")
    });
    let forward = settings.forward_proxy.iter().filter_map(|address| {
        open("the forward proxy's address", address, "whoever reaches it may reach through it what you allow")
    });
    let unnamed = !settings.forward_proxy.is_empty() && settings.live.load().intercept.is_empty();
    let unnamed = unnamed.then(|| {
        "no [[intercept]] rule and no registry is named: the forward proxy lets everything through as it is".to_owned()
    });
    let admin = open("the admin address", &settings.admin, "whoever reaches it may read status and metrics");
    let modes = unsafe_modes(settings).into_iter().chain(unused_credentials(settings));
    mirrors.chain(forward).chain(unnamed).chain(admin).chain(modes).collect()
}

/// Modes that rely on nobody else reaching the mirror.
fn unsafe_modes(settings: &Settings) -> Vec<String> {
    if settings.mirror.iter().all(|address| address.ip().is_loopback()) {
        return Vec::new();
    }
    let risks = [
        (AuthorizationMode::Node, "whoever reaches the mirror may pull what this node's credentials may"),
        (AuthorizationMode::Token, "clients' passwords come to the mirror in plain HTTP"),
    ];
    let used = risks.into_iter().filter(|(mode, _)| is_used(settings, *mode));
    used.map(|(_, risk)| format!("the mirror's address is not loopback: {risk}")).collect()
}

fn unused_credentials(settings: &Settings) -> Option<String> {
    let given = !settings.live.load().credentials.is_empty();
    (given && !is_used(settings, AuthorizationMode::Node)).then(|| {
        "credentials are given, but no registry has authorization = \"node\": they are not used".to_owned()
    })
}

fn is_used(settings: &Settings, mode: AuthorizationMode) -> bool {
    let registries = &settings.live.load().registries;
    registries.authorization == mode
        || registries.known.values().any(|known| known.authorization == Some(mode))
}

/// Reads settings one by one; what is wrong is noted, and a default stands in so that the rest is read too.
struct Reader<'a> {
    places: &'a Places,
    problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    fn new(places: &'a Places, problems: &[Problem]) -> Self {
        Self { places, problems: problems.to_vec() }
    }

    fn finish<T>(self, value: T) -> Result<T, Problems> {
        if self.problems.is_empty() { Ok(value) } else { Err(Problems(self.problems)) }
    }

    fn problem(&mut self, flag: &str, what: impl Into<String>, cure: impl Into<String>) {
        self.problems.push(Problem::new(self.places.name(flag), what, cure));
    }

    fn check<T>(&mut self, flag: &str, result: Result<T, Wrong>) -> Option<T> {
        result.map_err(|wrong| self.problems.push(Problem::of(self.places.name(flag), wrong))).ok()
    }

    fn optional<T>(
        &mut self,
        flag: &str,
        text: Option<&str>,
        parse: impl Fn(&str) -> Result<T, Wrong>,
    ) -> Option<T> {
        text.and_then(|text| self.check(flag, parse(text)))
    }

    fn one<T>(
        &mut self,
        flag: &str,
        text: Option<&str>,
        default: T,
        parse: impl Fn(&str) -> Result<T, Wrong>,
    ) -> T {
        self.optional(flag, text, parse).unwrap_or(default)
    }

    fn many<T>(&mut self, flag: &str, texts: &[String], parse: impl Fn(&str) -> Result<T, Wrong>) -> Vec<T> {
        texts.iter().filter_map(|text| self.check(flag, parse(text))).collect()
    }

    fn listeners(&mut self, flag: &str, texts: &[String], default: &str) -> Vec<SocketAddr> {
        if texts.is_empty() { vec![fixed(default)] } else { self.many(flag, texts, quantity::listen) }
    }

    fn name(&mut self, text: Option<&str>) -> String {
        let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        text.and_then(|text| self.check("name", quantity::printable(text))).unwrap_or_else(host)
    }

    fn cluster_name(&mut self, text: Option<&str>) -> String {
        self.one("cluster", text, "hawker".to_owned(), quantity::printable)
    }

    fn data_dir(&mut self, text: Option<&str>) -> PathBuf {
        self.one("data-dir", text, PathBuf::from(DATA_DIR), |text| match text {
            "" => wrong("is empty", "name a directory"),
            _ => Ok(PathBuf::from(text)),
        })
    }

    fn node(&mut self, args: &NodeArgs) -> Settings {
        let mut registries = self.registries(args);
        let live = LiveSettings {
            rates: self
                .rates("", [&args.upload_rate, &args.download_rate, &args.origin_rate, &args.prefetch_rate]),
            task_rates: self.rates(
                "task-",
                [
                    &args.task_upload_rate,
                    &args.task_download_rate,
                    &args.task_origin_rate,
                    &args.task_prefetch_rate,
                ],
            ),
            applications: Arc::new(self.applications(&args.applications.application)),
            intercept: self.intercept(args, &mut registries),
            registries,
            credentials: self.many("credentials", &args.credentials, quantity::credentials),
            staleness: self.staleness(args),
            tls: self.certificate(args),
        };
        self.nodes_own_right(args, &live);
        let settings = Settings {
            name: self.name(args.name.as_deref()),
            place: Place {
                zone: self
                    .optional("zone", args.zone.as_deref(), quantity::printable)
                    .unwrap_or_default()
                    .into(),
                rack: self
                    .optional("rack", args.rack.as_deref(), quantity::printable)
                    .unwrap_or_default()
                    .into(),
            },
            data_dir: self.data_dir(args.data_dir.as_deref()),
            mirror: self.listeners("mirror", &args.mirror, MIRROR),
            forward_proxy: self.many("forward-proxy", &args.forward_proxy, quantity::listen),
            admin: self.one("admin", args.admin.as_deref(), fixed(ADMIN), quantity::listen),
            peer_listen: self.listeners("peer-listen", &args.peer_listen, PEERS),
            advertise: self.many("advertise", &args.advertise, quantity::host_port),
            seed: false,
            seeds: self.many("seed-address", &args.seed_address, quantity::host_port),
            schedulers: self.many("scheduler", &args.scheduler, quantity::host_port),
            live: Arc::new(Arc::new(live).into()),
            cache: self.cache(args),
            upload_slots: self.one("upload-slots", args.upload_slots.as_deref(), UPLOAD_SLOTS, |text| {
                quantity::count(text, 1, 1024)
            }),
            memory_bytes: self.one("memory", args.memory.as_deref(), MEMORY_BYTES, |text| {
                at_least(
                    quantity::size(text)?,
                    16 << 20,
                    "16MiB holds one of the longest pieces; give that or more",
                )
            }),
            linger: self.one("linger", args.linger.as_deref(), LINGER, |text| {
                at_most(quantity::duration(text)?, Duration::from_secs(86_400), "give a day at most")
            }),
            seed_uses_client_token: self.one(
                "seed-uses-client-token",
                args.seed_uses_client_token.as_deref(),
                true,
                quantity::yes_or_no,
            ),
            pull_grace: self.one("pull-grace", args.pull_grace.as_deref(), PULL_GRACE, |text| {
                at_most(quantity::duration(text)?, Duration::from_secs(3_600), "give an hour at most")
            }),
            drain: self.one("drain", args.drain.as_deref(), DRAIN, |text| {
                at_most(quantity::duration(text)?, Duration::from_secs(3_600), "give an hour at most")
            }),
        };
        self.no_address_twice(node_listeners(&settings));
        settings
    }

    /// `of`: what the flags' names begin with.
    fn rates(&mut self, of: &str, [upload, download, origin, prefetch]: [&Option<String>; 4]) -> Rates {
        let mut rate = |kind: &str, text: &Option<String>| {
            self.optional(&format!("{of}{kind}-rate"), text.as_deref(), quantity::rate)
        };
        Rates {
            upload: rate("upload", upload),
            download: rate("download", download),
            origin: rate("origin", origin),
            prefetch: rate("prefetch", prefetch),
        }
    }

    /// Where the members of each network stand: of each once.
    fn networks(&mut self, args: &NetworkArgs) -> Networks {
        let networks = self.many("network", &args.network, quantity::place);
        let twice = |at: usize| networks[..at].iter().any(|(network, _)| *network == networks[at].0);
        if (1..networks.len()).any(twice) {
            self.problem("network", "there are two entries for one network", "make them one");
        }
        Networks::new(networks)
    }

    /// What is said of applications: of each once.
    fn applications(&mut self, texts: &[String]) -> Applications {
        let rules = self.many("application", texts, quantity::application);
        if rules.len() > MAX_RULES {
            let cure = format!("write {MAX_RULES} at most; patterns may have * for any text");
            self.problem("application", format!("there are {} entries", rules.len()), cure);
        }
        let twice = |(at, rule): (usize, &Rule)| rules[..at].iter().any(|other| other.labels == rule.labels);
        for (_, rule) in rules.iter().enumerate().filter(|(at, rule)| twice((*at, rule))) {
            let what = format!("there are two entries for {}", rule.labels);
            self.problem("application", what, "make them one; match may be a list");
        }
        Applications::new(rules)
    }

    fn staleness(&mut self, args: &NodeArgs) -> Staleness {
        let month = Duration::from_secs(30 * 86_400);
        let bounded = |text: &str| at_most(quantity::duration(text)?, month, "give 30 days at most");
        let default = Staleness::default().public_grace;
        Staleness {
            tags: self.optional("stale-tags", args.stale_tags.as_deref(), bounded),
            public_grace: self.one("public-grace", args.public_grace.as_deref(), default, bounded),
        }
    }

    fn cache(&mut self, args: &NodeArgs) -> CacheSettings {
        let default = CacheSettings::default();
        let high = self.optional("cache-high", args.cache_high.as_deref(), quantity::percent);
        let low = self.optional("cache-low", args.cache_low.as_deref(), quantity::percent);
        let high_percent = high.unwrap_or(default.high_percent);
        // Who lowers the high mark alone gets a low mark below it.
        let low_percent =
            low.unwrap_or_else(|| default.low_percent.min(high_percent.saturating_sub(10).max(1)));
        if low_percent >= high_percent {
            let flag = if low.is_some() { "cache-low" } else { "cache-high" };
            self.problem(
                flag,
                format!("the low mark ({low_percent} %) is not below the high mark ({high_percent} %)"),
                "eviction runs from the high mark down to the low one: make cache-low smaller than cache-high",
            );
        }
        let max_bytes = self.optional("cache-max", args.cache_max.as_deref(), |text| {
            at_least(quantity::size(text)?, 64 << 20, "give 64MiB or more")
        });
        CacheSettings { high_percent, low_percent, max_bytes }
    }

    fn registries(&mut self, args: &NodeArgs) -> Registries {
        let default =
            self.optional("default-registry", args.default_registry.as_deref(), quantity::registry_host);
        let allow = self.many("allow-registry", &args.allow_registry, quantity::registry_pattern);
        let allow_networks = self.many("allow-network", &args.allow_network, quantity::network);
        let known = self.known(args);
        if let Some(host) = &default
            && !allow.is_empty()
            && !known.contains_key(host)
            && !allow.iter().any(|pattern| matches(pattern, host))
        {
            let cure = format!("add {host} to the allowed registries, or choose another default");
            self.problem("default-registry", format!("{host} is not among the allowed registries"), cure);
        }
        let authorization =
            self.optional("authorization", args.authorization.as_deref(), quantity::authorization);
        let authorization = authorization.unwrap_or_default();
        Registries { default, allow, known, allow_networks, authorization }
    }

    /// Node mode needs credentials; without any it would be a slow way to be anonymous.
    fn nodes_own_right(&mut self, args: &NodeArgs, live: &LiveSettings) {
        if !args.credentials.is_empty() {
            return;
        }
        let cure = "say where they are, e.g. --credentials docker:/root/.docker/config.json, or choose relay";
        let what = "node mode pulls with this node's credentials, and there are none";
        if live.registries.authorization == AuthorizationMode::Node {
            self.problem("authorization", what, cure);
        }
        let of_one = |known: &RegistrySettings| known.authorization == Some(AuthorizationMode::Node);
        if live.registries.known.values().any(of_one) {
            self.problem("registry-authorization", what, cure);
        }
    }

    /// The forward proxy's rules, or those that follow from the registries. What peers may answer, registries may be asked for.
    fn intercept(&mut self, args: &NodeArgs, registries: &mut Registries) -> Rules {
        let rules = self.many("intercept", &args.intercept, quantity::rule);
        if args.forward_proxy.is_empty() {
            if !args.intercept.is_empty() {
                let cure = "add --forward-proxy 127.0.0.1:6505, or take the rules out";
                self.problem("intercept", "there are rules for a forward proxy, and there is none", cure);
            }
            return Rules::default();
        }
        if rules.is_empty() {
            let known = registries.known.keys().chain(&registries.default).chain(&registries.allow);
            return Rules::for_registries(known.cloned());
        }
        if !registries.allow.is_empty() {
            let shared = rules.iter().filter(|rule| rule.action == Action::P2p);
            registries.allow.extend(shared.map(|rule| rule.host.clone()));
        }
        Rules::new(rules)
    }

    /// What the mirror shows to clients that want TLS.
    fn certificate(&mut self, args: &NodeArgs) -> Option<Arc<rustls::ServerConfig>> {
        match (&args.tls_cert, &args.tls_key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => {
                let config = tls::from_files(Path::new(certificate), Path::new(key));
                self.check(
                    "tls-cert",
                    config.or_else(|what| wrong(what, "give a PEM file each of certificate and key")),
                )
            }
            (Some(_), None) => {
                self.problem("tls-cert", "there is a certificate, but no key", "add --tls-key FILE");
                None
            }
            (None, Some(_)) => {
                self.problem("tls-key", "there is a key, but no certificate", "add --tls-cert FILE");
                None
            }
        }
    }

    fn known(&mut self, args: &NodeArgs) -> BTreeMap<String, RegistrySettings> {
        let mut known: BTreeMap<String, RegistrySettings> = BTreeMap::new();
        for (host, url) in
            self.many("registry", &args.registry, |text| pair(text, "HOST=URL", quantity::endpoint))
        {
            known.entry(host).or_default().endpoints.push(url);
        }
        for (host, file) in
            self.many("registry-ca", &args.registry_ca, |text| pair(text, "HOST=FILE", readable))
        {
            known.entry(host).or_default().ca = Some(file);
        }
        for host in self.many("registry-insecure", &args.registry_insecure, quantity::registry_host) {
            known.entry(host).or_default().insecure = true;
        }
        for (host, url) in self
            .many("registry-realm", &args.registry_realm, |text| pair(text, "HOST=URL", quantity::endpoint))
        {
            known.entry(host).or_default().realms.push(url);
        }
        for (host, mode) in self.many("registry-authorization", &args.registry_authorization, |text| {
            pair(text, "HOST=MODE", quantity::authorization)
        }) {
            known.entry(host).or_default().authorization = Some(mode);
        }
        for (host, registry) in &mut known {
            if registry.endpoints.is_empty() {
                registry.endpoints.extend(own_endpoint(host));
            }
            self.tls(host, registry);
        }
        known
    }

    fn tls(&mut self, host: &str, registry: &RegistrySettings) {
        let plain = registry.endpoints.iter().all(|url| url.scheme() == "http");
        let cure = "write its endpoints with https://, or take that out";
        if plain && registry.ca.is_some() {
            self.problem(
                "registry-ca",
                format!("{host} is reached by http, where there is no certificate"),
                cure,
            );
        }
        if plain && registry.insecure {
            let what = format!("{host} is reached by http, where there is no certificate");
            self.problem("registry-insecure", what, cure);
        }
        if registry.insecure && registry.ca.is_some() {
            self.problem(
                "registry-insecure",
                format!("{host} has authorities of its own, and would accept any certificate all the same"),
                "keep one of registry-ca and registry-insecure; the first is the safe one",
            );
        }
    }

    /// Joining, seeds and schedulers: what makes sense together.
    fn cluster(&mut self, args: &ProxyArgs, around: Surroundings) {
        self.token(args.join.as_deref(), args.token_file.as_deref(), around);
        if around.has_identity || args.join.is_some() {
            return;
        }
        if args.seed {
            self.problem("seed", "a seed serves a cluster, and this node is in none", HOW_TO_JOIN);
        }
        let not_member = "only members may talk to it, and this node is in no cluster";
        for (flag, given) in [("scheduler", &args.node.scheduler), ("seed-address", &args.node.seed_address)]
        {
            if !given.is_empty() {
                self.problem(flag, not_member, HOW_TO_JOIN);
            }
        }
    }

    /// Who is to join needs a token, and a token needs somewhere to join. Members need neither any more.
    fn token(&mut self, join: Option<&str>, token_file: Option<&str>, around: Surroundings) {
        if around.has_identity {
            return;
        }
        if join.is_some() && token_file.is_none() && !around.has_token {
            let cure = "make a token with `hawker token create` where the authority is, and give it by --token-file FILE, \
                        by --token-file - on standard input, or in the environment's HAWKER_TOKEN";
            self.problem("join", "there is no token, and this node is no member yet", cure);
        }
        if join.is_none() && token_file.is_some() {
            self.problem("token-file", "there is a token, but nowhere to join with it", HOW_TO_JOIN);
        }
    }

    /// Two listeners on one port would fail at start with less to say.
    fn no_address_twice(&mut self, listeners: Vec<(&'static str, SocketAddr)>) {
        for (i, (flag, address)) in listeners.iter().enumerate() {
            let clash = |other: &SocketAddr| {
                address.port() != 0
                    && other.port() == address.port()
                    && (other.ip() == address.ip()
                        || other.ip().is_unspecified()
                        || address.ip().is_unspecified())
            };
            // An IPv4 and an IPv6 wildcard on one port are a common pair of one listener.
            let pair = |other: &SocketAddr| other.is_ipv4() != address.is_ipv4();
            if let Some((first, other)) =
                listeners[..i].iter().find(|(first, other)| clash(other) && !(first == flag && pair(other)))
            {
                let what = format!("{address} is taken already by {} ({other})", self.places.name(first));
                let known = self.problems.iter().any(|p| p.what == what);
                if !known {
                    self.problem(flag, what, "give each its own port");
                }
            }
        }
    }

    fn log(&mut self, args: &LogArgs) -> LogSettings {
        LogSettings {
            level: self.one("log-level", args.log_level.as_deref(), "info".to_owned(), crate::log::level),
            format: self.one("log-format", args.log_format.as_deref(), Format::Text, |text| match text {
                "text" => Ok(Format::Text),
                "json" => Ok(Format::Json),
                _ => wrong(format!("`{text}` is no format"), "write text or json"),
            }),
        }
    }
}

/// Where a registry answers that only has its name. Docker Hub's name is not its address.
fn own_endpoint(host: &str) -> Option<Url> {
    let host = if host == "docker.io" { "registry-1.docker.io" } else { host };
    Url::parse(&format!("https://{host}")).ok()
}

fn matches(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(end) => host.len() > end.len() && host.ends_with(end),
        None => pattern == host,
    }
}

fn at_least(bytes: u64, least: u64, cure: &str) -> Result<u64, Wrong> {
    if bytes < least {
        wrong(format!("{} is too little", quantity::human_size(bytes)), cure)
    } else {
        Ok(bytes)
    }
}

fn at_most(duration: Duration, most: Duration, cure: &str) -> Result<Duration, Wrong> {
    if duration > most { wrong("is too long", cure) } else { Ok(duration) }
}

fn pair<T>(text: &str, shape: &str, parse: impl Fn(&str) -> Result<T, Wrong>) -> Result<(String, T), Wrong> {
    let Some((host, value)) = text.split_once('=') else {
        return wrong(format!("has no `=`, so no {shape}"), format!("write {shape}"));
    };
    Ok((quantity::registry_host(host)?, parse(value)?))
}

fn readable(text: &str) -> Result<PathBuf, Wrong> {
    match std::fs::File::open(text) {
        Ok(_) => Ok(Path::new(text).to_owned()),
        Err(error) => wrong(format!("{text}: {error}"), "name a PEM file that this user may read"),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::io::Write;

    use hawker_core::intercept::Way;
    use hawker_proxy::settings::CredentialSource;

    use super::*;

    const MEMBER: Surroundings = Surroundings { has_identity: true, has_token: false };

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(|word| word.replace('~', " ").into()).collect()
    }

    fn typed(line: &str) -> Written<ProxyArgs> {
        crate::written::read("hawker proxy", &words(line))
    }

    fn errors(line: &str, around: Surroundings) -> Vec<String> {
        proxy(&typed(line), around).map(|_| Vec::new()).unwrap_or_else(|problems| {
            assert!(problems.0.iter().all(|p| !p.cure.is_empty()));
            problems.0.iter().map(|p| format!("{}: {}", p.key, p.what)).collect()
        })
    }

    #[test]
    fn nothing_written_is_a_node_that_runs_alone() {
        let proxy = proxy(&typed(""), Surroundings::default()).unwrap();
        let s = &proxy.settings;
        assert_eq!(s.mirror, [MIRROR.parse().unwrap()]);
        assert_eq!((s.admin, s.peer_listen[0]), (ADMIN.parse().unwrap(), PEERS.parse().unwrap()));
        assert_eq!(s.data_dir, Path::new(DATA_DIR));
        assert_eq!((s.linger, s.drain), (LINGER, DRAIN));
        assert!(!s.seed && s.schedulers.is_empty() && proxy.join.is_none() && proxy.warnings.is_empty());
        assert!(!s.name.is_empty());
        assert_eq!(s.live.load().rates, Rates::default());
    }

    #[test]
    fn networks_say_where_members_stand() {
        let resolved = |line: &str| {
            scheduler(&crate::written::read("hawker scheduler", &words(line)), Surroundings::default())
        };
        let two = "--network cidr=10.0.0.0/8~zone=a --network cidr=10.1.0.0/16~zone=b~rack=7";
        let networks = resolved(two).unwrap().networks;
        let of = |ip: &str| networks.of(ip.parse().unwrap()).map(|place| (&*place.zone, &*place.rack));
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
            assert!(problems.iter().any(|problem| problem.what.contains(told)), "{line}: {problems:?}");
        }
    }

    #[test]
    fn an_application_is_said_once_and_there_are_not_too_many() {
        let told = |line: &str| proxy(&typed(line), Surroundings::default()).unwrap_err().to_string();
        let twice = told("--application name=a~priority=1 --application name=a");
        assert!(twice.contains("two entries for a") && twice.contains("match may be a list"), "{twice}");
        let many: String = (0..=MAX_RULES).map(|n| format!("--application name=a{n} ")).collect();
        assert!(told(&many).contains("write 64 at most"));
        assert!(told("--application priority=1").contains("names neither"));
    }

    #[test]
    fn everything_written_arrives() {
        let line = "--name n --zone z --rack r --data-dir /d --mirror 127.0.0.1:1 --mirror [::1]:2 --admin 127.0.0.1:3 \
                    --peer-listen 0.0.0.0:4 --advertise n.example:5 --seed --join s.example:6 --token-file - \
                    --scheduler t.example:7 --seed-address u.example:8 --default-registry docker.io \
                    --allow-registry *.example.com --allow-registry docker.io --allow-network 10.0.0.0/8 \
                    --registry 10.0.0.1:5000=http://10.0.0.1:5000 --registry-insecure a.example \
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
        let Proxy { settings: s, join, log, .. } = proxy(&typed(line), Surroundings::default()).unwrap();
        assert_eq!((s.name.as_str(), &*s.place.zone, &*s.place.rack, s.seed), ("n", "z", "r", true));
        assert_eq!(s.mirror.len(), 2);
        assert_eq!(s.schedulers, ["t.example:7", "s.example:6"]);
        assert_eq!((s.seeds, s.advertise), (vec!["u.example:8".to_owned()], vec!["n.example:5".to_owned()]));
        assert_eq!(join, Some(Join { address: "s.example:6".into(), token_file: Some("-".into()) }));
        let cache = CacheSettings { high_percent: 70, low_percent: 60, max_bytes: Some(10_000_000_000) };
        assert_eq!(s.cache, cache);
        assert_eq!((s.upload_slots, s.memory_bytes), (8, 64 << 20));
        assert_eq!((s.linger, s.drain), (Duration::from_secs(300), Duration::from_secs(10)));
        assert_eq!((s.seed_uses_client_token, s.pull_grace), (false, Duration::from_secs(5)));
        assert_eq!(log, LogSettings { level: "debug".into(), format: Format::Json });
        let live = s.live.load();
        let rates = Rates {
            upload: Some(100_000_000),
            download: Some(12 << 20),
            origin: Some(1_000_000),
            prefetch: Some(9_000_000),
        };
        assert_eq!(live.rates, rates);
        let rules = live.applications.rules().iter();
        let said: Vec<_> = rules.map(|r| (r.labels.to_string(), r.limits.rates.download)).collect();
        assert_eq!(said, [("shop".to_owned(), Some(2_000_000)), ("tag night".to_owned(), None)]);
        assert_eq!(live.task_rates, Rates { upload: Some(8_000_000), ..Rates::default() });
        let (hour, two_days) = (Duration::from_secs(3_600), Duration::from_secs(2 * 86_400));
        assert_eq!(live.staleness, Staleness { tags: Some(hour), public_grace: two_days });
        assert_eq!(live.registries.known["10.0.0.1:5000"].endpoints[0].as_str(), "http://10.0.0.1:5000/");
        assert!(live.registries.known["a.example"].insecure);
        assert_eq!(live.registries.known["a.example"].endpoints[0].as_str(), "https://a.example/");
        assert_eq!(
            live.registries.allow_networks,
            [hawker_core::place::Network::new("10.0.0.0".parse().unwrap(), 8).unwrap()]
        );
        let modes = ["a.example", "b.example"].map(|host| live.registries.authorization(host));
        assert_eq!(modes, [AuthorizationMode::Token, AuthorizationMode::Node]);
        assert_eq!(live.registries.known["b.example"].realms[0].as_str(), "https://sso.example:8443/");
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
        assert!(live.registries.allow.contains(&"quay.io".to_owned()), "what peers may answer is a registry");
    }

    #[test]
    fn without_rules_the_registries_named_are_shared() {
        let line =
            "--forward-proxy 127.0.0.1:9 --allow-registry *.example.com --registry reg:5000=http://reg:5000";
        let proxy = proxy(&typed(line), Surroundings::default()).unwrap();
        let live = proxy.settings.live.load();
        for host in ["a.example.com", "reg:5000"] {
            assert_eq!(live.intercept.way(host, true), Way::Open, "{host}");
        }
        assert!(proxy.warnings.is_empty(), "{:?}", proxy.warnings);
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
        let (certificate, key) = (file("c", &one.cert.pem()), file("k", &one.signing_key.serialize_pem()));
        let foreign = file("f", &other.signing_key.serialize_pem());
        let line = format!("--tls-cert {certificate} --tls-key {key}");
        assert!(proxy(&typed(&line), Surroundings::default()).unwrap().settings.live.load().tls.is_some());
        for (line, expected) in [
            (format!("--tls-cert {certificate}"), "--tls-cert: there is a certificate, but no key"),
            (format!("--tls-key {key}"), "--tls-key: there is a key, but no certificate"),
            (format!("--tls-cert {certificate} --tls-key {foreign}"), "--tls-cert: "),
            (format!("--tls-cert {key} --tls-key {key}"), "--tls-cert: "),
            (format!("--tls-cert {certificate} --tls-key /nonexistent"), "--tls-cert: /nonexistent has no"),
        ] {
            let told = errors(&line, Surroundings::default());
            assert!(told.len() == 1 && told[0].starts_with(expected), "{line}: {told:?}");
            assert!(!told[0].contains("PRIVATE"), "{told:?}");
        }
    }

    #[test]
    fn each_bad_value_and_impossible_combination_is_named() {
        let alone = Surroundings::default();
        for (line, around, expected) in [
            ("--mirror localhost:1", alone, "--mirror: `localhost:1` is no address"),
            ("--cache-low 95", alone, "--cache-low: the low mark (95 %) is not below the high mark (90 %)"),
            ("--cache-high 50 --cache-low 50", alone, "--cache-low: the low mark"),
            ("--cache-high 100", alone, "--cache-high: `100` is no percentage"),
            ("--cache-max 1KB", alone, "--cache-max: 1000 B is too little"),
            ("--seed", alone, "--seed: a seed serves a cluster"),
            ("--scheduler a:1", alone, "--scheduler: only members"),
            ("--seed-address a:1", alone, "--seed-address: only members"),
            ("--join a:1", alone, "--join: there is no token"),
            ("--token-file f", alone, "--token-file: there is a token, but nowhere"),
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
            ("--registry-ca a.example=/nonexistent", alone, "--registry-ca: /nonexistent: No such file"),
            ("--registry a.example", alone, "--registry: has no `=`"),
            ("--registry a.example=ftp://a", alone, "--registry: `ftp://a` is no registry's address"),
            (
                "--default-registry a.example --allow-registry b.example",
                alone,
                "--default-registry: a.example is not",
            ),
            ("--allow-network 10.0.0.0/99", alone, "--allow-network: `10.0.0.0/99` is no network"),
            ("--admin 127.0.0.1:6500", alone, "--admin: 127.0.0.1:6500 is taken already by --mirror"),
            ("--mirror 127.0.0.1:7 --peer-listen [::]:7", alone, "--peer-listen: [::]:7 is taken already"),
            ("--forward-proxy 127.0.0.1:6500", alone, "--forward-proxy: 127.0.0.1:6500 is taken already"),
            ("--intercept p2p~quay.io", alone, "--intercept: there are rules for a forward proxy"),
            (
                "--forward-proxy 127.0.0.1:7 --intercept quay.io",
                alone,
                "--intercept: `quay.io` names no action",
            ),
            ("--upload-rate 1", alone, "--upload-rate: `1` is no size"),
            ("--upload-slots 0", alone, "--upload-slots: `0` is out of range"),
            ("--memory 1MiB", alone, "--memory: 1.0 MiB is too little"),
            ("--linger 60", alone, "--linger: `60` is no duration"),
            ("--seed-uses-client-token maybe", alone, "--seed-uses-client-token: `maybe` is neither"),
            ("--authorization me", alone, "--authorization: `me` is no way to authorize"),
            ("--authorization node", alone, "--authorization: node mode pulls with this node's credentials"),
            ("--registry-authorization a.example=node", alone, "--registry-authorization: node mode"),
            ("--registry-authorization node", alone, "--registry-authorization: has no `=`"),
            ("--registry-realm a.example=sso", alone, "--registry-realm: `sso` is no registry's address"),
            ("--credentials /root/x", alone, "--credentials: `/root/x` does not say what kind"),
            ("--credentials vault:x", alone, "--credentials: `vault` is no kind"),
            ("--credentials docker:/nonexistent", alone, "--credentials: /nonexistent: No such file"),
            ("--credentials env:HAWKER_TEST_NOT_SET", alone, "--credentials: the environment has no HAWKER"),
            ("--pull-grace 1d", alone, "--pull-grace: is too long"),
            ("--stale-tags 60d", alone, "--stale-tags: is too long"),
            ("--public-grace 1", alone, "--public-grace: `1` is no duration"),
            ("--drain 2d", alone, "--drain: is too long"),
            ("--log-level loud", alone, "--log-level: `loud` is no log level"),
            ("--log-format xml", alone, "--log-format: `xml` is no format"),
            ("--advertise a", MEMBER, "--advertise: `a` has no port"),
            ("--data-dir=", alone, "--data-dir: is empty"),
        ] {
            let told = errors(line, around);
            assert_eq!(told.len(), 1, "{line}: {told:?}");
            assert!(told[0].starts_with(expected), "{line}: {told:?}");
        }
        let with_token = Surroundings { has_token: true, ..alone };
        for (line, around) in [
            ("--seed", MEMBER),
            ("--scheduler a:1 --seed-address b:2", MEMBER),
            ("--join a:1", MEMBER),
            ("--join a:1 --seed", with_token),
            ("--cache-high 60", alone),
            ("--default-registry a.example --allow-registry *.example", alone),
            ("--mirror 0.0.0.0:7 --mirror [::]:7", alone),
            ("--mirror 127.0.0.1:0 --admin 127.0.0.1:0", alone),
        ] {
            assert_eq!(errors(line, around), [""; 0], "{line}");
        }
    }

    #[test]
    fn file_and_flags_are_told_together_each_in_its_own_words() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"nmae = 'a'\nlinger = '60'\nseed = true\n[cache]\nlow = 95\n").unwrap();
        let told =
            errors(&format!("--config {} --memory much", file.path().display()), Surroundings::default());
        assert_eq!(told.len(), 5, "{told:?}");
        for start in ["nmae (", "linger (", "seed (", "cache.low (", "--memory:"] {
            assert!(told.iter().any(|line| line.starts_with(start)), "{start} in {told:?}");
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
            ("--credentials docker:/dev/null --registry-authorization a.example=node".to_owned(), 0),
        ] {
            let warnings = proxy(&typed(&line), Surroundings::default()).unwrap().warnings;
            assert_eq!(warnings.len(), expected, "{line}: {warnings:?}");
        }
    }

    #[test]
    fn up_is_a_seed_and_a_scheduler_below_one_directory() {
        let argv = ["--data-dir", "/d", "--scheduler-listen", "[::]:7"].map(OsString::from);
        let up = up(&crate::written::read("hawker up", &argv)).unwrap();
        assert!(up.proxy.settings.seed);
        assert_eq!(up.proxy.settings.data_dir, Path::new("/d/proxy"));
        assert_eq!(up.scheduler.data_dir, Path::new("/d"));
        assert_eq!(up.scheduler.listen, ["[::]:7".parse().unwrap()]);
        let argv = ["--scheduler-listen", "[::]:6501"].map(OsString::from);
        assert!(super::up(&crate::written::read("hawker up", &argv)).is_err());
    }

    #[test]
    fn a_scheduler_has_its_own_ports() {
        let argv = ["--cluster", "lab"].map(OsString::from);
        let scheduler = scheduler(&crate::written::read("hawker scheduler", &argv), MEMBER).unwrap();
        assert_eq!((scheduler.listen[0], scheduler.admin), (fixed(SCHEDULER), fixed(SCHEDULER_ADMIN)));
        assert_eq!(scheduler.cluster, "lab");
    }
}
