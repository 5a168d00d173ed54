//! SIGHUP: log level, rates, applications, registries, credentials, staleness, the forward proxy's rules and the mirror's certificate
//! change in place; what else changed is named, and waits for a restart.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use hawker_core::application::Applications;
use hawker_proxy::settings::LiveSettings;

use crate::log::LogHandle;
use crate::problem::Problems;

/// Flags that take effect at SIGHUP.
const LIVE: [&str; 25] = [
    "log-level",
    "upload-rate",
    "download-rate",
    "origin-rate",
    "prefetch-rate",
    "task-upload-rate",
    "task-download-rate",
    "task-origin-rate",
    "task-prefetch-rate",
    "application",
    "default-registry",
    "allow-registry",
    "allow-network",
    "registry",
    "registry-ca",
    "registry-insecure",
    "registry-realm",
    "registry-authorization",
    "authorization",
    "credentials",
    "stale-tags",
    "public-grace",
    "intercept",
    "tls-cert",
    "tls-key",
];

/// What a fresh look at the configuration yields.
pub(crate) struct Fresh {
    pub(crate) live: Option<Arc<LiveSettings>>,
    pub(crate) applications: Arc<Applications>,
    pub(crate) log_level: String,
    /// By flag.
    pub(crate) values: BTreeMap<String, Vec<String>>,
}

/// Applies changed configuration.
pub(crate) struct Reloader<F> {
    pub(crate) log: LogHandle,
    /// The proxy's live settings, where there is a proxy.
    pub(crate) live: Option<Arc<ArcSwap<LiveSettings>>>,
    /// What the scheduler says of applications, where there is a scheduler.
    pub(crate) applications: Option<Arc<ArcSwap<Applications>>>,
    /// What the daemon was started with, by flag.
    pub(crate) values: BTreeMap<String, Vec<String>>,
    /// Reads and resolves the same command line again.
    pub(crate) read: F,
}

impl<F: FnMut() -> Result<Fresh, Problems>> Reloader<F> {
    /// Reads again; on any error everything stays as it was.
    pub(crate) fn reload(&mut self) {
        let fresh = match (self.read)() {
            Ok(fresh) => fresh,
            Err(problems) => {
                tracing::error!("nothing was reloaded: {problems}");
                return;
            }
        };
        if let Err(error) = self.log.set(&fresh.log_level) {
            tracing::error!(%error, "the log level stays");
        }
        if let (Some(live), Some(new)) = (&self.live, fresh.live) {
            live.store(new);
        }
        if let Some(applications) = &self.applications {
            applications.store(fresh.applications);
        }
        let waiting = needs_restart(&self.values, &fresh.values);
        if waiting.is_empty() {
            tracing::info!(
                "reloaded: log level, rates, applications, registries, credentials, staleness, rules, certificate"
            );
        } else {
            tracing::warn!(
                settings = waiting.join(", "),
                "reloaded; these settings changed too and need a restart"
            );
        }
    }
}

/// Settings that differ from those the daemon was started with and are not live.
fn needs_restart(old: &BTreeMap<String, Vec<String>>, new: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let changed = new.iter().filter(|(flag, values)| old.get(*flag) != Some(*values));
    changed.map(|(flag, _)| flag.clone()).filter(|flag| !LIVE.contains(&flag.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::ProxyArgs;

    #[test]
    fn what_needs_a_restart_is_named() {
        let read = |line: &str| {
            let argv: Vec<_> = line.split_whitespace().map(Into::into).collect();
            crate::written::read::<ProxyArgs>("hawker proxy", &argv).values
        };
        let old = read("--name a --upload-rate 1MB");
        assert_eq!(needs_restart(&old, &read("--name a --upload-rate 2MB --registry a=http://a")), [""; 0]);
        assert_eq!(needs_restart(&old, &read("--upload-rate 1MB --drain 5s")), ["drain", "name"]);
    }

    #[test]
    fn live_flags_are_flags() {
        use clap::Args;
        let command = ProxyArgs::augment_args(clap::Command::new("hawker"));
        for flag in LIVE {
            assert!(command.get_arguments().any(|arg| arg.get_long() == Some(flag)), "{flag}");
        }
    }
}
