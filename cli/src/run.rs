//! `hawker proxy`, `hawker scheduler`, `hawker up`: from the configuration to a running daemon and its end.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use hawker_api::identity::Identity;
use hawker_core::message::Role;
use hawker_proxy::admin::Admin;
use hawker_proxy::daemon;
use hawker_scheduler::SchedulerConfig;
use hawker_scheduler::authority::{Authority, CERTIFICATE_LIFE};
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::args::{ProxyArgs, SchedulerArgs, UpArgs};
use crate::problem::{Problem, Problems};
use crate::reload::{Fresh, Reloader};
use crate::resolve::{self, Surroundings};
use crate::scheduler_page::SchedulerPage;
use crate::signals::Signals;
use crate::written::{self, Written};
use crate::{join_help, log, member, system};

/// `hawker proxy`.
pub(crate) async fn proxy(argv: Vec<OsString>) -> anyhow::Result<()> {
    let written = written::read::<ProxyArgs>("hawker proxy", &argv);
    let resolved = resolve::proxy(&written, surroundings(&written))?;
    let log = start(&resolved.log, &resolved.warnings)?;
    let settings = resolved.settings;
    check_host(&settings.data_dir, &resolve::node_listeners(&settings))?;
    let beginning = member::beginning(&settings.data_dir, resolved.join.as_ref())?;

    let signals = Signals::new()?;
    let shutdown = CancellationToken::new();
    let reloader = Reloader {
        log,
        live: Some(Arc::clone(&settings.live)),
        applications: None,
        values: written.values,
        read: move || {
            let written = written::read::<ProxyArgs>("hawker proxy", &argv);
            let fresh = resolve::proxy(&written, surroundings(&written))?;
            let live = fresh.settings.live.load_full();
            let (applications, live) = (Arc::clone(&live.applications), Some(live));
            Ok(Fresh { live, applications, log_level: fresh.log.level, values: written.values })
        },
    };
    let body = async {
        let joining = member::enter(beginning, &settings.data_dir, &settings.name);
        let identity = tokio::select! {
            identity = joining => identity?,
            () = shutdown.cancelled() => return Ok(()),
        };
        member::check_role(identity.as_ref(), settings.seed, &settings.data_dir)?;
        if identity.is_none() {
            tracing::info!("no identity and no --join: running alone, as a verified cache");
        }
        daemon::run(settings, identity, shutdown.clone(), Box::new(tell_ready), None).await?;
        Ok(())
    };
    attend(signals, &shutdown, reloader, Box::pin(body)).await
}

/// `hawker scheduler`.
pub(crate) async fn scheduler(argv: Vec<OsString>) -> anyhow::Result<()> {
    let written = written::read::<SchedulerArgs>("hawker scheduler", &argv);
    let resolved = resolve::scheduler(&written, scheduler_surroundings(&written))?;
    let log = start(&resolved.log, &[])?;
    let admin = ("admin", resolved.admin);
    let listeners: Vec<_> = resolved.listen.iter().map(|a| ("listen", *a)).chain([admin]).collect();
    check_host(&resolved.data_dir, &listeners)?;
    let config = scheduler_config(&resolved).await?;

    let signals = Signals::new()?;
    let shutdown = CancellationToken::new();
    let reloader = Reloader {
        log,
        live: None,
        applications: Some(Arc::clone(&config.applications)),
        values: written.values,
        read: move || {
            let written = written::read::<SchedulerArgs>("hawker scheduler", &argv);
            let fresh = resolve::scheduler(&written, scheduler_surroundings(&written))?;
            let applications = fresh.applications;
            Ok(Fresh { live: None, applications, log_level: fresh.log.level, values: written.values })
        },
    };
    let body = async {
        let page = SchedulerPage::new(&config);
        let admin = Admin { status: page.clone(), metrics: Box::new(move || page.metrics() + "# EOF\n") };
        let admin = admin.serve(TcpListener::bind(resolved.admin).await?, shutdown.clone());
        let scheduler = async {
            // Connections wait in the listeners' queues from here on.
            tell_ready();
            hawker_scheduler::run(config, shutdown.clone()).await
        };
        let (result, ()) = tokio::join!(ending(&shutdown, scheduler), admin);
        Ok(result?)
    };
    attend(signals, &shutdown, reloader, Box::pin(body)).await
}

/// `hawker up`.
pub(crate) async fn up(argv: Vec<OsString>) -> anyhow::Result<()> {
    let written = written::read::<UpArgs>("hawker up", &argv);
    let resolved = resolve::up(&written)?;
    let log = start(&resolved.proxy.log, &resolved.proxy.warnings)?;
    let scheduler = resolved.scheduler;
    let mut settings = resolved.proxy.settings;
    let mut listeners = resolve::node_listeners(&settings);
    listeners.extend(scheduler.listen.iter().map(|address| ("scheduler-listen", *address)));
    check_host(&resolved.data_dir, &listeners)?;

    let authority = Authority::open_or_create(&scheduler.data_dir, &scheduler.cluster, CERTIFICATE_LIFE)?;
    let identity = seed_identity(&authority, &settings.data_dir)?;
    settings.schedulers.push(local(scheduler.listen[0]).to_string());
    let config = scheduler_config(&scheduler).await?;
    let help = join_help::JoinHelp {
        scheduler: config.advertise.first().cloned().unwrap_or_default(),
        mirror: settings.mirror[0].to_string(),
        data_dir: resolved.data_dir.clone(),
    };

    let signals = Signals::new()?;
    let shutdown = CancellationToken::new();
    let reloader = Reloader {
        log,
        live: Some(Arc::clone(&settings.live)),
        applications: Some(Arc::clone(&config.applications)),
        values: written.values,
        read: move || {
            let written = written::read::<UpArgs>("hawker up", &argv);
            let fresh = resolve::up(&written)?.proxy;
            let live = fresh.settings.live.load_full();
            let (applications, live) = (Arc::clone(&live.applications), Some(live));
            Ok(Fresh { live, applications, log_level: fresh.log.level, values: written.values })
        },
    };
    let ready = Box::new(move || {
        tell_ready();
        help.print();
    });
    let page = SchedulerPage::new(&config);
    let more: daemon::MoreMetrics = Arc::new(move || page.metrics());
    let both = async {
        let scheduler =
            async { hawker_scheduler::run(config, shutdown.clone()).await.context("the scheduler ended") };
        let proxy = async {
            daemon::run(settings, Some(identity), shutdown.clone(), ready, Some(more))
                .await
                .context("the proxy ended")
        };
        // Neither goes on without the other, and both drain at once.
        let (scheduler, proxy) = tokio::join!(ending(&shutdown, scheduler), ending(&shutdown, proxy));
        scheduler.and(proxy)
    };
    attend(signals, &shutdown, reloader, Box::pin(both)).await
}

async fn ending<T>(shutdown: &CancellationToken, part: impl Future<Output = T>) -> T {
    let _end = shutdown.clone().drop_guard();
    part.await
}

/// Runs `body` to its end while signals and systemd's watchdog are attended to.
async fn attend<F: FnMut() -> Result<Fresh, Problems>>(
    signals: Signals,
    shutdown: &CancellationToken,
    mut reloader: Reloader<F>,
    body: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let result = tokio::select! {
        result = body => result,
        () = signals.obey(shutdown.clone(), || reloader.reload()) => Ok(()),
        () = system::feed_watchdog() => Ok(()),
    };
    system::tell(&[NotifyState::Stopping]);
    result
}

fn tell_ready() {
    tracing::info!("ready");
    system::tell(&[NotifyState::Ready]);
}

fn start(settings: &log::LogSettings, warnings: &[String]) -> anyhow::Result<log::LogHandle> {
    let handle = log::start(settings)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "hawker");
    warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    system::raise_open_files();
    Ok(handle)
}

/// All that stands in the way on this host, at once.
fn check_host(data_dir: &Path, listeners: &[(&str, SocketAddr)]) -> Result<(), Unable> {
    let problems: Vec<Problem> =
        system::check_data_dir(data_dir).into_iter().chain(system::check_listeners(listeners)).collect();
    if problems.is_empty() { Ok(()) } else { Err(Unable(problems)) }
}

/// The configuration makes sense, but not on this host now.
#[derive(Debug)]
struct Unable(Vec<Problem>);

impl std::fmt::Display for Unable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "can't start here:")?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl std::error::Error for Unable {}

fn surroundings(written: &Written<ProxyArgs>) -> Surroundings {
    let data_dir = written.args.node.data_dir.as_deref().unwrap_or(resolve::DATA_DIR);
    surroundings_of(&member::identity_dir(Path::new(data_dir)))
}

fn scheduler_surroundings(written: &Written<SchedulerArgs>) -> Surroundings {
    let data_dir = written.args.data_dir.as_deref().unwrap_or(resolve::DATA_DIR);
    surroundings_of(&scheduler_identity_dir(Path::new(data_dir)))
}

fn surroundings_of(identity_dir: &Path) -> Surroundings {
    Surroundings {
        has_identity: member::has_identity(identity_dir),
        has_token: std::env::var_os(member::TOKEN_VARIABLE).is_some(),
    }
}

/// A scheduler's identity is apart from that of a proxy with the same data directory.
fn scheduler_identity_dir(data_dir: &Path) -> PathBuf {
    member::identity_dir(&data_dir.join("scheduler"))
}

/// Makes the authority, if this is the cluster's first scheduler, and takes the listeners.
async fn scheduler_config(resolved: &resolve::Scheduler) -> anyhow::Result<SchedulerConfig> {
    let is_member = member::has_identity(&scheduler_identity_dir(&resolved.data_dir));
    let join = match &resolved.join {
        Some(join) if !is_member => {
            Some((join.address.clone(), member::read_token(join.token_file.as_deref())?))
        }
        Some(_) => None,
        None if is_member => None,
        None => {
            Authority::open_or_create(&resolved.data_dir, &resolved.cluster, CERTIFICATE_LIFE)?;
            None
        }
    };
    let others = resolved.schedulers.iter().chain(resolved.join.as_ref().map(|join| &join.address));
    Ok(SchedulerConfig {
        name: resolved.name.clone(),
        cluster: resolved.cluster.clone(),
        data_dir: resolved.data_dir.clone(),
        listeners: hawker_scheduler::bind(&resolved.listen).await?,
        advertise: vec![
            resolved.advertise.clone().unwrap_or_else(|| hawker_api::address::advertised(resolved.listen[0])),
        ],
        schedulers: others.cloned().collect(),
        join,
        applications: Arc::new(Arc::clone(&resolved.applications).into()),
        networks: resolved.networks.clone(),
        certificate_life: CERTIFICATE_LIFE,
        numbers: Arc::default(),
    })
}

/// The seed's identity in `hawker up`: the authority is at hand, so no token is needed.
fn seed_identity(authority: &Authority, data_dir: &Path) -> anyhow::Result<Identity> {
    let dir = member::identity_dir(data_dir);
    let identity = match Identity::load(&dir)? {
        Some(identity) if SystemTime::now() < identity.renew_at() => return Ok(identity),
        // However long this process was away: nobody else could renew it.
        Some(identity) => {
            let request = identity.renewal_request()?;
            let member = (identity.peer_id(), identity.role());
            identity.renew(authority.renew(member, &request, SystemTime::now())?)?;
            identity
        }
        None => authority.identity(Role::Seed)?,
    };
    identity.save(&dir)?;
    Ok(identity)
}

/// How this process reaches a listener of its own.
fn local(listener: SocketAddr) -> SocketAddr {
    let ip = match listener.ip() {
        ip if !ip.is_unspecified() => ip,
        std::net::IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
        std::net::IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, listener.port())
}
