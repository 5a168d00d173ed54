//! Schedulers know each other: each keeps a stream to every other, and by that is on the other's member list.

use std::collections::BTreeSet;
use std::time::Duration;

use hawker_api::convert::{self, Member};
use hawker_api::v1;
use hawker_api::v1::from_peer::Event as Say;
use hawker_api::v1::scheduler_client::SchedulerClient;
use hawker_api::v1::to_peer::Event as Said;
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_identity::join;
use hawker_identity::member::Identity;
use rand::RngExt;
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tracing::debug;

use crate::driver::{Event, Handle};

/// Schedulers that are linked at most.
const MAX_LINKS: usize = 64;
/// Between two tries. Links matter when members change, not by the second.
const RETRY: Duration = Duration::from_secs(5);
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// To hand a message to a link.
const SAY_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a link looks whether the other scheduler was removed from the cluster.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The parts that every link needs.
#[derive(Clone)]
pub(crate) struct Links {
    pub(crate) identity: Identity,
    /// How others reach us.
    pub(crate) ourselves: Member,
    pub(crate) driver: Handle,
    /// Reports that this scheduler vouches for, told to all others.
    pub(crate) vouched: broadcast::Sender<v1::Report>,
}

/// Keeps links to the schedulers at `addresses`, and to those that they name.
pub(crate) async fn keep(us: Links, addresses: Vec<String>, shutdown: CancellationToken) {
    let (found, mut finds) = mpsc::channel::<String>(MAX_LINKS);
    let mut known: BTreeSet<String> = us.ourselves.addresses.iter().cloned().collect();
    let mut links = JoinSet::new();
    let mut link = |address: String, links: &mut JoinSet<()>| {
        if links.len() < MAX_LINKS && known.insert(address.clone()) {
            links.spawn(keep_one(us.clone(), address, found.clone()));
        }
    };
    for address in addresses {
        link(address, &mut links);
    }
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(address) = finds.recv() => link(address, &mut links),
        }
    }
}

async fn keep_one(us: Links, address: String, found: mpsc::Sender<String>) {
    loop {
        match run(&us, &address, &found).await {
            // Another address of this very process.
            Ok(Ended::Ourselves) => return,
            Ok(Ended::Over) => debug!(address, "the link to a scheduler is over"),
            Err(error) => debug!(address, error, "no link to a scheduler"),
        }
        let jitter = rand::rng().random_range(0.8..1.2);
        sleep(RETRY.mul_f64(jitter)).await;
    }
}

enum Ended {
    Ourselves,
    Over,
}

async fn run(us: &Links, address: &str, found: &mpsc::Sender<String>) -> Result<Ended, String> {
    let connection = join::connect(address, &us.identity)
        .await
        .map_err(|error| error.to_string())?;
    let scheduler = connection.peer;
    if scheduler == us.identity.peer_id() {
        return Ok(Ended::Ourselves);
    }
    let (say, outgoing) = mpsc::channel(1);
    let register = v1::Register {
        version: Some(hawker_api::VERSION),
        name: us.ourselves.name.clone(),
        addresses: us.ourselves.addresses.clone(),
        zone: us.ourselves.zone.clone(),
        ..v1::Register::default()
    };
    // There is room for one.
    let _ = say.try_send(v1::FromPeer {
        event: Some(Say::Register(register)),
    });
    let mut client = SchedulerClient::new(connection.channel);
    let opened = timeout(OPEN_TIMEOUT, client.track(ReceiverStream::new(outgoing))).await;
    let opened = opened
        .map_err(|_| "no answer in time")?
        .map_err(|status| status.message().to_owned())?;
    let telling = tell(us.vouched.subscribe(), say);
    let ended = tokio::select! {
        ended = listen(us, scheduler, opened.into_inner(), found) => ended,
        () = telling => Err("the other scheduler does not take what we say".to_owned()),
    };
    us.driver.send(Event::Unlinked(scheduler)).await;
    ended.map(|()| Ended::Over)
}

/// Passes on what this scheduler vouches for, as long as the other side takes it.
async fn tell(mut vouched: broadcast::Receiver<v1::Report>, say: mpsc::Sender<v1::FromPeer>) {
    loop {
        let report = match vouched.recv().await {
            Ok(report) => report,
            // Accusations are rare; one that is lost is one vote less.
            Err(broadcast::error::RecvError::Lagged(_)) => continue,
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        };
        let message = v1::FromPeer {
            event: Some(Say::Reports(v1::Reports {
                reports: vec![report],
            })),
        };
        if say.send_timeout(message, SAY_TIMEOUT).await.is_err() {
            return;
        }
    }
}

/// Hears who else is there and who was removed, until the stream ends.
async fn listen(
    us: &Links,
    scheduler: PeerId,
    mut incoming: Streaming<v1::ToPeer>,
    found: &mpsc::Sender<String>,
) -> Result<(), String> {
    loop {
        if us.identity.removed().contains(scheduler) {
            return Err("it was removed from the cluster".to_owned());
        }
        let Ok(message) = timeout(LOOK_INTERVAL, incoming.message()).await else {
            continue;
        };
        let Some(message) = message.map_err(|status| status.message().to_owned())? else {
            return Ok(());
        };
        let members = match message.event {
            Some(Said::Removed(removed)) => {
                let ids = convert::from_removed(&removed).map_err(|error| error.to_string())?;
                us.driver.send(Event::Removed(ids)).await;
                continue;
            }
            Some(Said::Welcome(welcome)) => welcome.members.unwrap_or_default(),
            Some(Said::Members(members)) => members,
            _ => continue,
        };
        let members = convert::from_members(members.members).map_err(|error| error.to_string())?;
        for member in members
            .into_iter()
            .filter(|member| member.role == Role::Scheduler)
        {
            if member.peer == scheduler {
                us.driver.send(Event::Linked(member)).await;
            } else if let Some(address) = member.addresses.into_iter().next() {
                let _ = found.try_send(address);
            }
        }
    }
}
