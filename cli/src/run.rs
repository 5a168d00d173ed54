//! `hawker proxy`, `hawker scheduler`, `hawker up`: from the configuration to a running daemon and its end.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use arc_swap::ArcSwap;
use hawker_config::{Daemon, Problem};
use hawker_core::message::Role;
use hawker_identity::authority::{AUTHORITY_DIR, Authority, AuthorityError, CERTIFICATE_LIFE};
use hawker_identity::member::{Identity, IdentityError};
use hawker_proxy::admin::Admin;
use hawker_proxy::daemon;
use hawker_proxy::settings::Settings;
use hawker_scheduler::SchedulerConfig;
use hawker_tracker::Push;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::member::Beginning;
use crate::reload::{self, Reloader, Resolved, Start};
use crate::resolve;
use crate::scheduler_page::SchedulerPage;
use crate::signals::Signals;
use crate::{join_help, log, member, system};

/// `hawker proxy`.
pub(crate) async fn proxy(argv: Vec<OsString>) -> anyhow::Result<()> {
    let Start {
        resolved,
        mut warnings,
        layers,
    } = reload::start(Daemon::Proxy, argv)?;
    let Resolved::Proxy(resolved) = resolved else {
        unreachable!("a proxy's configuration")
    };
    warnings.extend(resolved.warnings);
    let log = start(&resolved.log, &warnings)?;
    let mut settings = resolved.settings;
    check_host(&settings.data_dir, &resolve::node_listeners(&settings))?;
    let beginning = member::beginning(&settings.data_dir, resolved.join.as_ref())?;

    let signals = Signals::new()?;
    let shutdown = CancellationToken::new();
    let reloader = layers.reloader(log, Some(Arc::clone(&settings.live)), None);
    settings.push = Some(Arc::clone(&reloader) as Arc<dyn Push>);
    let body = async {
        let (mut identity, mut rejoin) = (None, None);
        match beginning {
            Beginning::Alone => {
                tracing::info!("no identity and no --join: running alone, as a verified cache");
            }
            Beginning::Member(member) => identity = Some(member),
            Beginning::Joining(address, token) => {
                let joining = member::enter(&address, &token, &settings.data_dir, &settings.name);
                identity = tokio::select! {
                    identity = joining => Some(identity?),
                    () = shutdown.cancelled() => return Ok(()),
                };
            }
            Beginning::Impaired(impaired) => {
                (identity, rejoin) = (impaired.identity, impaired.rejoin);
                settings.problem = Some(impaired.problem);
            }
        }
        member::check_role(identity.as_ref(), settings.seed, &settings.data_dir)?;
        if let Some((address, token)) = rejoin {
            let alone = shutdown.child_token();
            let running = daemon::run(
                settings.clone(),
                identity.take(),
                alone.clone(),
                Box::new(tell_ready),
                None,
            );
            tokio::pin!(running);
            tokio::select! {
                ended = &mut running => return Ok(ended?),
                joined = member::rejoin(&address, &token, settings.seed, &settings.data_dir, &settings.name) => {
                    identity = Some(joined);
                }
            }
            tracing::info!(
                "this node is a member again: it serves what is under way, then begins anew as such"
            );
            alone.cancel();
            running.await?;
            settings.problem = None;
        }
        daemon::run(
            settings,
            identity,
            shutdown.clone(),
            Box::new(tell_ready),
            None,
        )
        .await?;
        Ok(())
    };
    attend(signals, &shutdown, reloader, Box::pin(body)).await
}

/// `hawker scheduler`.
pub(crate) async fn scheduler(argv: Vec<OsString>) -> anyhow::Result<()> {
    let Start {
        resolved,
        warnings,
        layers,
    } = reload::start(Daemon::Scheduler, argv)?;
    let Resolved::Scheduler(resolved) = resolved else {
        unreachable!("a scheduler's configuration")
    };
    let log = start(&resolved.log, &warnings)?;
    let admin = ("admin", resolved.admin);
    let listeners: Vec<_> = resolved
        .listen
        .iter()
        .map(|a| ("listen", *a))
        .chain([admin])
        .collect();
    check_host(&resolved.data_dir, &listeners)?;
    let config = scheduler_config(&resolved).await?;

    let signals = Signals::new()?;
    let shutdown = CancellationToken::new();
    let reloader = layers.reloader(log, None, Some(Arc::clone(&config.live)));
    let body = async {
        let page = SchedulerPage::new(&config);
        let admin = Admin {
            status: page.clone(),
            metrics: Box::new(move || page.metrics() + "# EOF\n"),
        };
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
    let Start {
        resolved,
        mut warnings,
        layers,
    } = reload::start(Daemon::Up, argv)?;
    let Resolved::Up(resolved) = resolved else {
        unreachable!("the configuration of `hawker up`")
    };
    let resolved = *resolved;
    warnings.extend(resolved.proxy.warnings);
    let log = start(&resolved.proxy.log, &warnings)?;
    let scheduler = resolved.scheduler;
    let mut settings = resolved.proxy.settings;
    let mut listeners = resolve::node_listeners(&settings);
    listeners.extend(
        scheduler
            .listen
            .iter()
            .map(|address| ("scheduler_listen", *address)),
    );
    check_host(&resolved.data_dir, &listeners)?;

    let authority = match Authority::open_or_create(
        &scheduler.data_dir,
        &scheduler.cluster,
        CERTIFICATE_LIFE,
    ) {
        Ok(authority) => authority,
        Err(AuthorityError::Identity(error)) => {
            let path = scheduler.data_dir.join(AUTHORITY_DIR);
            let reloader = layers.reloader(log, Some(Arc::clone(&settings.live)), None);
            return without_authority(settings, &path, &error, reloader).await;
        }
        Err(error) => return Err(error.into()),
    };
    let identity = seed_identity(&authority, &settings.data_dir)?;
    settings
        .schedulers
        .push(local(scheduler.listen[0]).to_string());
    let config = scheduler_config(&scheduler).await?;
    let help = join_help::JoinHelp {
        scheduler: config.advertise.first().cloned().unwrap_or_default(),
        mirror: settings.mirror[0].to_string(),
        data_dir: resolved.data_dir.clone(),
    };

    let signals = Signals::new()?;
    let shutdown = CancellationToken::new();
    let reloader = layers.reloader(
        log,
        Some(Arc::clone(&settings.live)),
        Some(Arc::clone(&config.live)),
    );
    settings.push = Some(Arc::clone(&reloader) as Arc<dyn Push>);
    let ready = Box::new(move || {
        tell_ready();
        help.print();
    });
    let page = SchedulerPage::new(&config);
    let of_problem = Arc::clone(&page);
    let beside = daemon::Beside {
        metrics: Arc::new(move || page.metrics()),
        problem: Arc::new(move || of_problem.problem()),
    };
    let both = async {
        let scheduler = async {
            hawker_scheduler::run(config, shutdown.clone())
                .await
                .context("the scheduler ended")
        };
        let proxy = async {
            daemon::run(
                settings,
                Some(identity),
                shutdown.clone(),
                ready,
                Some(beside),
            )
            .await
            .context("the proxy ended")
        };
        // Neither goes on without the other, and both drain at once.
        let (scheduler, proxy) =
            tokio::join!(ending(&shutdown, scheduler), ending(&shutdown, proxy));
        scheduler.and(proxy)
    };
    attend(signals, &shutdown, reloader, Box::pin(both)).await
}

/// `hawker up` whose authority is damaged. Runtimes depend on its mirror, so that goes on: as the seed that it was, if its own
/// identity is sound, and without a scheduler.
async fn without_authority(
    mut settings: Settings,
    authority: &Path,
    error: &IdentityError,
    reloader: Arc<Reloader>,
) -> anyhow::Result<()> {
    let problem = format!(
        "the authority in {} is damaged ({error}): this process goes on without scheduler and authority, and no node can join. \
         Restore the folder from a backup and restart; or delete it together with every node's identity and let all join anew.",
        authority.display()
    );
    tracing::error!("{problem}");
    settings.problem = Some(problem);
    let identity = Identity::load(&member::identity_dir(&settings.data_dir)).unwrap_or_default();
    let identity = identity.filter(|identity| !identity.has_expired(SystemTime::now()));
    let (signals, shutdown) = (Signals::new()?, CancellationToken::new());
    let body = async {
        Ok(daemon::run(
            settings,
            identity,
            shutdown.clone(),
            Box::new(tell_ready),
            None,
        )
        .await?)
    };
    attend(signals, &shutdown, reloader, Box::pin(body)).await
}

async fn ending<T>(shutdown: &CancellationToken, part: impl Future<Output = T>) -> T {
    let _end = shutdown.clone().drop_guard();
    part.await
}

/// Runs `body` to its end while signals and systemd's watchdog are attended to.
async fn attend(
    signals: Signals,
    shutdown: &CancellationToken,
    reloader: Arc<Reloader>,
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
    warnings
        .iter()
        .for_each(|warning| tracing::warn!("{warning}"));
    system::raise_open_files();
    Ok(handle)
}

/// All that stands in the way on this host, at once.
fn check_host(data_dir: &Path, listeners: &[(&str, SocketAddr)]) -> Result<(), Unable> {
    let problems: Vec<Problem> = system::check_data_dir(data_dir)
        .into_iter()
        .chain(system::check_listeners(listeners))
        .collect();
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Unable(problems))
    }
}

/// The configuration makes sense, but not on this host now.
#[derive(Debug)]
struct Unable(Vec<Problem>);

impl std::fmt::Display for Unable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "can't start here:")?;
        self.0
            .iter()
            .try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl std::error::Error for Unable {}

/// Makes the authority, if this is the cluster's first scheduler, and takes the listeners.
async fn scheduler_config(resolved: &resolve::Scheduler) -> anyhow::Result<SchedulerConfig> {
    let is_member = member::has_identity(&member::scheduler_identity_dir(&resolved.data_dir));
    let join = match &resolved.join {
        Some(join) if !is_member => Some((
            join.address.clone(),
            member::read_token(join.token_file.as_deref())?,
        )),
        Some(_) => None,
        None if is_member => None,
        None => {
            Authority::open_or_create(&resolved.data_dir, &resolved.cluster, CERTIFICATE_LIFE)?;
            None
        }
    };
    let others = resolved
        .schedulers
        .iter()
        .chain(resolved.join.as_ref().map(|join| &join.address));
    Ok(SchedulerConfig {
        name: resolved.name.clone(),
        cluster: resolved.cluster.clone(),
        data_dir: resolved.data_dir.clone(),
        listeners: hawker_scheduler::bind(&resolved.listen).await?,
        advertise: match resolved.advertise.is_empty() {
            true => vec![hawker_network::address::advertised(resolved.listen[0])],
            false => resolved.advertise.clone(),
        },
        schedulers: others.cloned().collect(),
        join,
        live: Arc::new(ArcSwap::from_pointee(resolved.live.clone())),
        allowed_addresses: resolved.allowed_addresses.clone(),
        certificate_life: CERTIFICATE_LIFE,
        numbers: Arc::default(),
    })
}

/// The seed's identity in `hawker up`: the authority is at hand, so no token is needed.
fn seed_identity(authority: &Authority, data_dir: &Path) -> anyhow::Result<Identity> {
    let dir = member::identity_dir(data_dir);
    // With the authority at hand a damaged identity is replaced.
    let loaded = Identity::load(&dir).unwrap_or_else(|error| {
        tracing::warn!(dir = %dir.display(), %error, "the seed's identity is damaged: the authority makes a new one");
        None
    });
    let identity = match loaded.filter(|identity| identity.authority() == authority.certificate()) {
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
