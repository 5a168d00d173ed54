//! Changes of the configuration while a daemon runs: SIGHUP, and documents that schedulers push.
//!
//! Keys that the schema calls live change in place. Other changed keys are named, and wait for a restart. A
//! configuration with a fault changes nothing.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use hawker_config::{Daemon, Document, Effective, Layered, Problems, Pushed};
use hawker_core::piece::PeerId;
use hawker_proxy::settings::LiveSettings;
use hawker_scheduler::LiveSettings as ClusterSettings;
use hawker_tracker::Push;

use crate::log::LogHandle;
use crate::{flags, resolve, surroundings};

/// The settings of a daemon after all layers.
pub(crate) enum Resolved {
    Proxy(resolve::Proxy),
    Scheduler(resolve::Scheduler),
    Up(Box<resolve::Up>),
}

impl Resolved {
    fn log_level(&self) -> &str {
        match self {
            Self::Proxy(proxy) => &proxy.log.level,
            Self::Scheduler(scheduler) => &scheduler.log.level,
            Self::Up(up) => &up.proxy.log.level,
        }
    }

    fn node(&self) -> Option<Arc<LiveSettings>> {
        match self {
            Self::Proxy(proxy) => Some(proxy.settings.live.load_full()),
            Self::Scheduler(_) => None,
            Self::Up(up) => Some(up.proxy.settings.live.load_full()),
        }
    }

    fn cluster(self) -> Option<ClusterSettings> {
        match self {
            Self::Proxy(_) => None,
            Self::Scheduler(scheduler) => Some(scheduler.live),
            Self::Up(up) => Some(up.scheduler.live),
        }
    }
}

/// The configuration of a daemon at its start.
pub(crate) struct Start {
    pub(crate) resolved: Resolved,
    /// Notes about the pushed configuration.
    pub(crate) warnings: Vec<String>,
    pub(crate) layers: Layers,
}

/// The layers of a daemon, to be read again.
pub(crate) struct Layers {
    argv: Vec<OsString>,
    state: State,
}

/// The layers that count now.
#[derive(Clone)]
struct State {
    daemon: Daemon,
    /// File, environment and flags.
    own: Vec<Layered>,
    pushed: Pushed,
    /// The file of the pushed documents.
    file: PathBuf,
}

impl State {
    fn resolve(&self) -> Result<(Resolved, Effective), Problems> {
        let all = Effective::new(self.daemon, self.pushed.layers().chain(self.own.clone()));
        let resolved = match self.daemon {
            Daemon::Proxy => Resolved::Proxy(resolve::proxy(&all, surroundings::of_proxy(&all))?),
            Daemon::Scheduler => {
                Resolved::Scheduler(resolve::scheduler(&all, surroundings::of_scheduler(&all))?)
            }
            // The scheduler does not push what was pushed.
            Daemon::Up => {
                let own = Effective::new(self.daemon, self.own.clone());
                Resolved::Up(Box::new(resolve::up(&all, &own)?))
            }
        };
        Ok((resolved, all))
    }

    /// The same; pushed documents that do not fit this node's own configuration are left out, with a warning.
    fn resolve_own(&self) -> Result<(Resolved, Effective, Option<String>), Problems> {
        match self.resolve() {
            Ok((resolved, all)) => Ok((resolved, all, None)),
            Err(problems) => {
                let own = Self {
                    pushed: Pushed::default(),
                    ..self.clone()
                };
                // If the fault is in the node's own layers, it is there without the pushed ones too.
                let (resolved, all) = own.resolve()?;
                let warning =
                    format!("the pushed configuration does not fit and does not apply: {problems}");
                Ok((resolved, all, Some(warning)))
            }
        }
    }
}

/// The file of the pushed documents of a node with this configuration.
pub(crate) fn pushed_file(daemon: Daemon, data_dir: &Path) -> PathBuf {
    match daemon {
        Daemon::Up => data_dir.join("proxy/pushed.toml"),
        _ => data_dir.join("pushed.toml"),
    }
}

/// The pushed documents that the node has on disk, and a warning if they cannot be read.
pub(crate) fn load_pushed(daemon: Daemon, own: &[Layered]) -> (Pushed, PathBuf, Option<String>) {
    let own = Effective::new(daemon, own.to_vec());
    let file = pushed_file(daemon, &own.config.data_dir);
    if daemon == Daemon::Scheduler {
        return (Pushed::default(), file, None);
    }
    match Pushed::load(&file) {
        Ok(pushed) => (pushed, file, None),
        Err(error) => {
            let warning = format!(
                "{}: the pushed configuration cannot be read: {error}",
                file.display()
            );
            (Pushed::default(), file, Some(warning))
        }
    }
}

/// Reads the configuration of a daemon with these arguments.
pub(crate) fn start(daemon: Daemon, argv: Vec<OsString>) -> Result<Start, Problems> {
    let own = flags::layers(daemon, &argv);
    let (pushed, file, unread) = load_pushed(daemon, &own);
    let state = State {
        daemon,
        own,
        pushed,
        file,
    };
    let (resolved, _, unfit) = state.resolve_own()?;
    let warnings = unread.into_iter().chain(unfit).collect();
    Ok(Start {
        resolved,
        warnings,
        layers: Layers { argv, state },
    })
}

impl Layers {
    /// The reloader of the daemon, which has these live settings.
    pub(crate) fn reloader(
        self,
        log: LogHandle,
        node: Option<Arc<ArcSwap<LiveSettings>>>,
        cluster: Option<Arc<ArcSwap<ClusterSettings>>>,
    ) -> Arc<Reloader> {
        let Self { argv, state } = self;
        let started = Effective::new(state.daemon, state.own.clone());
        Arc::new(Reloader {
            log,
            node,
            cluster,
            argv,
            started,
            state: Mutex::new(state),
        })
    }
}

/// Applies changed configuration.
pub(crate) struct Reloader {
    log: LogHandle,
    /// The proxy's live settings, where there is a proxy.
    node: Option<Arc<ArcSwap<LiveSettings>>>,
    /// The scheduler's, where there is a scheduler.
    cluster: Option<Arc<ArcSwap<ClusterSettings>>>,
    argv: Vec<OsString>,
    /// The node's own configuration at its start.
    started: Effective,
    state: Mutex<State>,
}

impl fmt::Debug for Reloader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloader").finish_non_exhaustive()
    }
}

impl Reloader {
    /// Reads file and environment again; on any fault everything stays as it was.
    pub(crate) fn reload(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = State {
            own: flags::layers(state.daemon, &self.argv),
            ..state.clone()
        };
        let resolved = match fresh.resolve_own() {
            Ok((resolved, _, warning)) => {
                if let Some(warning) = warning {
                    tracing::warn!("{warning}");
                }
                resolved
            }
            Err(problems) => {
                tracing::error!("nothing was reloaded: {problems}");
                return;
            }
        };
        self.apply(resolved);
        let waiting = self
            .started
            .needs_restart(&Effective::new(fresh.daemon, fresh.own.clone()));
        *state = fresh;
        if waiting.is_empty() {
            tracing::info!("reloaded: every changed key applies now");
        } else {
            tracing::warn!(
                settings = waiting.join(", "),
                "reloaded; these settings changed too and need a restart"
            );
        }
    }

    fn apply(&self, resolved: Resolved) {
        if let Err(error) = self.log.set(resolved.log_level()) {
            tracing::error!(%error, "the log level stays");
        }
        if let (Some(live), Some(new)) = (&self.node, resolved.node()) {
            live.store(new);
        }
        if let (Some(live), Some(new)) = (&self.cluster, resolved.cluster()) {
            live.store(Arc::new(new));
        }
    }
}

impl Push for Reloader {
    fn push(&self, from: PeerId, known: &[PeerId], document: &str) -> Result<(), String> {
        let document = Document::parse(document).map_err(|problems| problems.to_string())?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut fresh = state.clone();
        fresh.pushed.set(from, known, document);
        if fresh.pushed == state.pushed || (fresh.pushed.is_empty() && state.pushed.is_empty()) {
            *state = fresh;
            return Ok(());
        }
        let (resolved, _) = fresh.resolve().map_err(|problems| problems.to_string())?;
        self.apply(resolved);
        if let Err(error) = fresh.pushed.save(&fresh.file) {
            let file = fresh.file.display();
            tracing::warn!(%file, %error, "the pushed configuration cannot be saved; it comes again from a scheduler");
        }
        *state = fresh;
        tracing::info!(scheduler = %from, "pushed configuration applies now");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_keys_that_are_not_live_are_named() {
        let read = |line: &str| {
            let argv: Vec<_> = line.split_whitespace().map(Into::into).collect();
            Effective::new(Daemon::Proxy, flags::layers(Daemon::Proxy, &argv))
        };
        let old = read("--name a --upload-rate 1MB");
        let live = read("--name a --upload-rate 2MB --registry a=http://a");
        assert_eq!(old.needs_restart(&live), [""; 0]);
        assert_eq!(
            old.needs_restart(&read("--upload-rate 1MB --drain 5s")),
            ["name", "drain"]
        );
    }

    /// A node with these flags and its own data directory.
    fn node(dir: &Path, flags: &str) -> (Arc<ArcSwap<LiveSettings>>, Arc<Reloader>) {
        let data_dir = format!("--data-dir={}", dir.display());
        let argv = flags
            .split_whitespace()
            .chain([data_dir.as_str()])
            .map(OsString::from)
            .collect();
        let Start {
            resolved,
            warnings,
            layers,
        } = start(Daemon::Proxy, argv).unwrap();
        assert_eq!(warnings, [""; 0]);
        let Resolved::Proxy(proxy) = resolved else {
            panic!("a proxy")
        };
        let live = proxy.settings.live;
        (
            Arc::clone(&live),
            layers.reloader(LogHandle::unused(), Some(live), None),
        )
    }

    const A: PeerId = PeerId([1; 16]);

    #[test]
    fn a_pushed_document_applies_at_once_and_after_a_restart_without_a_scheduler() {
        let dir = tempfile::tempdir().unwrap();
        let (live, reloader) = node(dir.path(), "--upload-slots 5");
        let text = "linger = '7s'\nupload_slots = 3\n[rates]\nupload = '2MB'\n[cache]\nhigh = 60\n[[application]]\nname = 'a'";
        reloader.push(A, &[A], text).unwrap();
        let is_applied = |live: &LiveSettings| {
            assert_eq!(
                (live.config.linger.as_secs(), *live.config.upload_slots),
                (7, 5),
                "its own flag goes before"
            );
            assert_eq!(
                (
                    live.rates.upload,
                    live.cache.high_percent,
                    live.cache.low_percent
                ),
                (Some(2_000_000), 60, 50)
            );
            assert_eq!(live.applications.rules().len(), 1);
        };
        is_applied(&live.load());
        reloader.reload();
        is_applied(&live.load());
        let (again, reloader) = node(dir.path(), "--upload-slots 5");
        is_applied(&again.load());
        reloader.push(A, &[A], "").unwrap();
        assert_eq!(
            (
                again.load().config.linger.as_secs(),
                again.load().rates.upload
            ),
            (60, None)
        );
    }

    #[test]
    fn a_document_that_is_wrong_or_does_not_fit_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (live, reloader) = node(dir.path(), "--cache-low 70");
        reloader.push(A, &[A], "linger = '7s'").unwrap();
        for (text, reason) in [
            (
                "linger = '8s'\nregistries.'a.example'.insecure = true",
                "registries: may not be pushed",
            ),
            (
                "linger = '8s'\ncredentials = 'docker:/etc/shadow'",
                "credentials: may not be pushed",
            ),
            (
                "linger = '8s'\nallow_network = '0.0.0.0/0'",
                "allow_network: may not be pushed",
            ),
            (
                "linger = '8s'\n[cache]\nhigh = 60",
                "cache-low: the low mark (70 %) is not below the high mark (60 %)",
            ),
            (
                "linger = '8s'\nupload_slots = 0",
                "upload_slots: `0` is out of range",
            ),
        ] {
            let refused = reloader.push(A, &[A], text).unwrap_err();
            assert!(refused.contains(reason), "{refused}");
            assert_eq!(live.load().config.linger.as_secs(), 7, "{text}");
        }
        let (again, _) = node(dir.path(), "--cache-low 70");
        assert_eq!(again.load().config.linger.as_secs(), 7);
    }

    #[test]
    fn pushed_values_that_fit_no_more_do_not_keep_a_node_from_starting() {
        let dir = tempfile::tempdir().unwrap();
        let (_, reloader) = node(dir.path(), "");
        reloader
            .push(A, &[A], "linger = '7s'\n[cache]\nhigh = 60")
            .unwrap();
        let argv = vec![
            format!("--data-dir={}", dir.path().display()).into(),
            "--cache-low=70".into(),
        ];
        let Start {
            resolved, warnings, ..
        } = start(Daemon::Proxy, argv).unwrap();
        assert!(
            warnings.len() == 1 && warnings[0].contains("does not fit"),
            "{warnings:?}"
        );
        let Resolved::Proxy(proxy) = resolved else {
            panic!("a proxy")
        };
        assert_eq!(proxy.settings.live.load().config.linger.as_secs(), 60);
    }

    #[test]
    fn a_node_that_is_a_scheduler_does_not_push_what_was_pushed_to_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("proxy")).unwrap();
        let config = dir.path().join("up.toml");
        std::fs::write(
            &config,
            "[nodes]\nlinger = '9s'\n[[application]]\nname = 'own'",
        )
        .unwrap();
        let argv = [
            format!("--data-dir={}", dir.path().display()),
            format!("--config={}", config.display()),
        ];
        let argv = || argv.iter().map(OsString::from).collect();
        let reloader =
            start(Daemon::Up, argv())
                .unwrap()
                .layers
                .reloader(LogHandle::unused(), None, None);
        reloader
            .push(A, &[A], "[[application]]\nname = 'other'")
            .unwrap();
        let resolved = start(Daemon::Up, argv()).unwrap().resolved;
        let Resolved::Up(up) = resolved else {
            panic!("hawker up")
        };
        assert_eq!(up.proxy.settings.live.load().applications.rules().len(), 2);
        let document = &up.scheduler.live.document;
        assert!(
            document.contains("own") && document.contains("linger = \"9s\""),
            "{document}"
        );
        assert!(!document.contains("other"), "{document}");
        assert_eq!(up.scheduler.live.applications.rules().len(), 1);
    }
}
