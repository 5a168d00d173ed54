//! `hawker snapshotter`: from the flags to a running snapshotter and its end.

use hawker_config::schema::LogFormat;
use hawker_snapshotter::server::{self, Settings};
use tokio_util::sync::CancellationToken;

use crate::args::SnapshotterArgs;
use crate::log::{self, LogSettings};
use crate::signals::Signals;
use crate::system;

/// Serves until a signal to end.
pub(crate) async fn run(args: &SnapshotterArgs) -> anyhow::Result<()> {
    let level = log::level(&args.log_level)
        .map_err(|wrong| anyhow::anyhow!("--log-level: {}; {}", wrong.what, wrong.cure))?;
    log::start(&LogSettings {
        level,
        format: LogFormat::Text,
    })?;
    let signals = Signals::new()?;
    let shutdown = CancellationToken::new();
    let settings = Settings {
        root: args.root.clone(),
        socket: args.socket.clone(),
    };
    let ready = || system::tell(&[sd_notify::NotifyState::Ready]);
    let reload = || tracing::info!("nothing to read again: the snapshotter has no file of its own");
    tokio::select! {
        result = server::serve(&settings, shutdown.clone(), ready) => Ok(result?),
        () = signals.obey(shutdown.clone(), reload) => Ok(()),
    }
}
