//! Signals: SIGTERM and SIGINT drain, a second one ends at once, SIGHUP reads the configuration again.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::system;

/// The signals that a daemon listens to.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Listens from now on: before this, a signal has its default effect.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Cancels `shutdown` at the first signal to end, exits at the second, calls `reload` at each SIGHUP. Never returns.
    pub(crate) async fn obey(mut self, shutdown: CancellationToken, mut reload: impl FnMut()) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => end(&shutdown),
                _ = self.interrupt.recv() => end(&shutdown),
                _ = self.hangup.recv() => {
                    system::tell_reloading();
                    reload();
                    system::tell(&[sd_notify::NotifyState::Ready]);
                }
            }
        }
    }
}

fn end(shutdown: &CancellationToken) {
    if shutdown.is_cancelled() {
        tracing::warn!("second signal: ending at once");
        std::process::exit(1);
    }
    tracing::info!(
        "draining: no new connections, bodies in flight are finished; another signal ends at once"
    );
    system::tell(&[sd_notify::NotifyState::Stopping]);
    shutdown.cancel();
}
