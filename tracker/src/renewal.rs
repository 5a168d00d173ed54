//! Keeps this node's certificate fresh.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hawker_core::message::Role;
use hawker_identity::join::{self, JoinError};
use rand::RngExt;
use tokio::time::sleep;
use tracing::{info, warn};

use super::Shared;
use hawker_lanes::{self as lanes, Lane};

/// Waits between tries grow from the first to the last: a third of the certificate's life is left to try.
const FIRST_WAIT: Duration = Duration::from_secs(5);
const LAST_WAIT: Duration = Duration::from_secs(600);
/// Nodes that joined together do not renew together: up to this much later.
const SPREAD: Duration = Duration::from_secs(300);
/// The wall clock may be set: it is looked at this often.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// Renews the certificate at two thirds of its life, again and again.
pub(super) async fn keep_fresh(shared: Arc<Shared>) {
    let identity = &shared.config.identity;
    let mut wait = FIRST_WAIT;
    loop {
        let until = identity
            .renew_at()
            .duration_since(SystemTime::now())
            .unwrap_or_default();
        if !until.is_zero() {
            // A short life (in tests) leaves little to spread over.
            let spread = SPREAD
                .min(until / 10)
                .mul_f64(rand::rng().random_range(0.0..1.0));
            sleep(LOOK_INTERVAL.min(until + spread)).await;
            continue;
        }
        match renew(&shared).await {
            Ok(()) => {
                wait = FIRST_WAIT;
                // Were its life so short that it is due again, once in a while must do.
                sleep(FIRST_WAIT).await;
            }
            Err(error) => {
                warn!(%error, "the certificate is not renewed yet; it is tried again");
                let jittered = wait.mul_f64(rand::rng().random_range(0.5..1.5));
                sleep(jittered).await;
                wait = (wait * 2).min(LAST_WAIT);
            }
        }
    }
}

/// Asks one scheduler after another, the connected first, until one has the authority.
async fn renew(shared: &Shared) -> Result<(), JoinError> {
    let mut addresses = shared.outboxes().connected();
    addresses.extend(shared.config.schedulers.iter().cloned());
    let members = shared.outboxes().members();
    addresses.extend(
        members
            .into_iter()
            .filter(|m| m.role == Role::Scheduler)
            .flat_map(|m| m.addresses),
    );
    let mut last =
        JoinError::NoAuthority("no scheduler is known that could renew the certificate".into());
    for (at, address) in addresses.iter().enumerate() {
        if addresses[..at].contains(address) {
            continue;
        }
        match join::renew(address, &shared.config.identity).await {
            Ok(()) => {
                info!(address, "the certificate was renewed");
                save(shared).await;
                return Ok(());
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A certificate that cannot be saved still serves this process.
async fn save(shared: &Shared) {
    let identity = shared.config.identity.clone();
    let dir = shared.identity_dir();
    let path = dir.display().to_string();
    if let Some(Err(error)) = lanes::run(Lane::Upkeep, move || identity.save(&dir)).await {
        warn!(dir = path, %error, "the renewed certificate cannot be saved; after a restart the old one is used");
    }
}
