//! All connections of this daemon: the connected members, their connections, and the events for the driver.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hawker_api::v1::peer_message::Message as Wire;
use hawker_api::{VERSION, v1};
use hawker_core::Time;
use hawker_core::admission::{Handshakes, Refusals};
use hawker_core::message::Role;
use hawker_core::piece::PeerId;
use hawker_identity::member::Identity;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::{Connection, Queues, Remote};
use super::dial::Halves;
use super::frame::FrameError;
use super::member::Member;
use super::receive::Receiver;
use super::transmit::Transmitter;
use super::{Dial, ManifestSource, PeerError, PeerEvent, PeersConfig};
use crate::limits::Limits;
use crate::log_limit::LogLimit;

const ALPN: &[u8] = b"hawker-peer/3";
const PING_EVERY: Duration = Duration::from_secs(15);
/// A connection on which not even pings come is dead.
const SILENCE_AT_MOST: Duration = Duration::from_secs(30);
/// How often connections are looked after.
const TICK: Duration = Duration::from_millis(500);
/// How long a new connection waits for the end of those it replaces.
const REPLACE_DEADLINE: Duration = Duration::from_secs(5);

/// Connections of one member at most. Both sides may dial at once, and each may take the last connection for dead.
const CONNECTIONS_A_MEMBER: usize = 4;
/// Members whose allowances are remembered though they are not connected.
const MEMBERS_REMEMBERED: usize = 4096;

/// The key that coalesces concurrent dials: the peer, or for "any seed" the addresses.
pub(super) type DialKey = (Option<PeerId>, Vec<String>);
type DialWaiters = Vec<oneshot::Sender<Result<PeerId, PeerError>>>;

pub(super) struct Hub {
    pub(super) identity: Identity,
    pub(super) hello: v1::Hello,
    pub(super) limits: Limits,
    pub(super) manifests: Arc<dyn ManifestSource>,
    pub(super) events: mpsc::Sender<PeerEvent>,
    pub(super) tasks: TaskTracker,
    pub(super) connector: TlsConnector,
    pub(super) acceptor: TlsAcceptor,
    /// No more connections, no more requests.
    pub(super) draining: CancellationToken,
    /// Everything ends.
    pub(super) stop: CancellationToken,
    /// Lines about connections that strangers and refused members cause.
    pub(super) refused_log: LogLimit,
    max_connections: usize,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The newest last. Never an empty list.
    peers: HashMap<PeerId, Vec<Arc<Connection>>>,
    dials: HashMap<DialKey, DialWaiters>,
    members: HashMap<PeerId, Arc<Member>>,
    refusals: Refusals,
    handshakes: Handshakes,
    /// Ends each of the handshakes.
    strangers: HashMap<u64, CancellationToken>,
}

/// A stranger's handshake, as long as it lasts.
pub(super) struct Handshake {
    hub: Arc<Hub>,
    number: u64,
    /// It has to give way.
    pub(super) gives_way: CancellationToken,
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut state = self.hub.state();
        state.handshakes.over(self.number);
        state.strangers.remove(&self.number);
    }
}

impl State {
    fn connections(&self) -> impl Iterator<Item = &Arc<Connection>> {
        self.peers.values().flatten()
    }
}

/// The part of a caller in a dial.
pub(super) enum DialTurn {
    /// There is a connection.
    Warm(PeerId),
    /// Somebody dials already.
    Wait,
    /// It is the caller's to dial.
    Ours,
}

impl Hub {
    pub(super) fn new(config: PeersConfig) -> Arc<Self> {
        let PeersConfig {
            identity,
            name,
            addresses,
            limits,
            max_connections,
            manifests,
            events,
        } = config;
        let hello = v1::Hello {
            version: Some(VERSION),
            name,
            addresses,
            instance: rand::random(),
        };
        Arc::new(Self {
            connector: TlsConnector::from(identity.client_config(ALPN)),
            acceptor: TlsAcceptor::from(identity.server_config(ALPN, false)),
            identity,
            hello,
            limits,
            manifests,
            events,
            tasks: TaskTracker::new(),
            draining: CancellationToken::new(),
            stop: CancellationToken::new(),
            refused_log: LogLimit::new(),
            max_connections,
            started: Instant::now(),
            state: Mutex::default(),
        })
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// The newest connection with a peer.
    pub(super) fn newest(&self, peer: PeerId) -> Option<Arc<Connection>> {
        self.state().peers.get(&peer)?.last().map(Arc::clone)
    }

    /// All connections with a peer, the newest first.
    pub(super) fn with(&self, peer: PeerId) -> Vec<Arc<Connection>> {
        self.state()
            .peers
            .get(&peer)
            .into_iter()
            .flatten()
            .rev()
            .map(Arc::clone)
            .collect()
    }

    pub(super) fn all(&self) -> Vec<Arc<Connection>> {
        self.state().connections().map(Arc::clone).collect()
    }

    pub(super) fn connected(&self) -> Vec<PeerId> {
        self.state().peers.keys().copied().collect()
    }

    fn now(&self) -> Time {
        Time(self.started.elapsed())
    }

    /// A place for a stranger's handshake, if there is one.
    pub(super) fn handshake(self: &Arc<Self>, address: IpAddr) -> Option<Handshake> {
        let mut state = self.state();
        let begun = state.handshakes.begin(self.now(), address)?;
        if let Some(other) = begun
            .instead_of
            .and_then(|other| state.strangers.remove(&other))
        {
            other.cancel();
        }
        let gives_way = CancellationToken::new();
        state.strangers.insert(begun.handshake, gives_way.clone());
        Some(Handshake {
            hub: Arc::clone(self),
            number: begun.handshake,
            gives_way,
        })
    }

    /// How long a member is refused because it broke the protocol.
    pub(super) fn refused_for(&self, peer: PeerId) -> Option<Duration> {
        self.state().refusals.refused_for(self.now(), peer)
    }

    /// A member broke the protocol: it loses all its connections, and is refused for a while.
    pub(super) fn broke_protocol(&self, peer: PeerId, name: &str, error: &str) {
        let refused_for = {
            let mut state = self.state();
            state
                .peers
                .get(&peer)
                .into_iter()
                .flatten()
                .for_each(|connection| connection.close.cancel());
            state.refusals.broke_protocol(self.now(), peer)
        };
        if let Some(left_out) = self.refused_log.admit() {
            tracing::warn!(%peer, name, error, ?refused_for, left_out, "dropped a member and refuse it for a while");
        }
    }

    /// A caller wants a connection: whether there is one, is one coming, or must be made. The waiter is kept unless there
    /// is one.
    pub(super) fn dial_turn(
        &self,
        dial: &Dial,
        key: &DialKey,
        waiter: oneshot::Sender<Result<PeerId, PeerError>>,
    ) -> DialTurn {
        let mut state = self.state();
        if let Some(peer) = warm(&state, dial) {
            return DialTurn::Warm(peer);
        }
        let waiters = state.dials.entry(key.clone()).or_default();
        waiters.push(waiter);
        if waiters.len() == 1 {
            DialTurn::Ours
        } else {
            DialTurn::Wait
        }
    }

    pub(super) fn dial_over(&self, key: &DialKey, result: &Result<PeerId, PeerError>) {
        let waiters = self.state().dials.remove(key).unwrap_or_default();
        for waiter in waiters {
            let _ = waiter.send(result.clone());
        }
    }

    /// Whether there is, or could be made, room for a member that dials in.
    pub(super) fn may_have_room(&self) -> bool {
        let state = self.state();
        state.connections().count() < self.max_connections
            || state.peers.values().any(|list| list.len() > 1)
    }

    /// Makes room for one more connection by ending the idlest; `false` when all are busy. A member that dials in gets the place of one
    /// that has several.
    pub(super) fn make_room(&self, dials_in: bool) -> bool {
        let state = self.state();
        if state.connections().count() < self.max_connections {
            return true;
        }
        let lists = state
            .peers
            .values()
            .filter(|list| !dials_in || list.len() > 1);
        let idle = lists.flat_map(|list| {
            let several = dials_in.then_some(list.len());
            list.iter()
                .filter_map(move |c| c.idle().map(|idle| ((several, idle), c)))
        });
        match idle.max_by_key(|(rank, _)| *rank) {
            Some((_, idlest)) => {
                idlest.close.cancel();
                true
            }
            None => false,
        }
    }

    /// Takes in an authenticated connection: from here on it lives on its own.
    pub(super) async fn adopt(
        self: &Arc<Self>,
        remote: Remote,
        halves: Halves,
    ) -> Result<(), PeerError> {
        let member = self.member(&remote);
        let (connection, queues) = Connection::new(remote, member, self.stop.child_token());
        self.register(&connection).await?;
        let hub = Arc::clone(self);
        self.tasks
            .spawn(async move { hub.run(connection, halves, queues).await });
        Ok(())
    }

    /// The state that a member's connections share. It outlives them, so that nobody begins anew by coming back.
    fn member(&self, remote: &Remote) -> Arc<Member> {
        let mut state = self.state();
        if state.members.len() >= MEMBERS_REMEMBERED {
            state
                .members
                .retain(|_, member| Arc::strong_count(member) > 1);
        }
        let member = state
            .members
            .entry(remote.peer)
            .or_insert_with(|| Arc::new(Member::new(remote.role)));
        Arc::clone(member)
    }

    async fn register(&self, connection: &Arc<Connection>) -> Result<(), PeerError> {
        let peer = connection.remote.peer;
        let deadline = tokio::time::Instant::now() + REPLACE_DEADLINE;
        loop {
            // The event's place is taken before the lock, so that `Up` and `Down` are told in the order they happen.
            let permit = self.events.reserve().await.map_err(|_| PeerError::Lost)?;
            let stale = {
                let mut state = self.state();
                if self.is_draining() {
                    return Err(PeerError::Unreachable("this node is stopping".to_owned()));
                }
                if state.refusals.refused_for(self.now(), peer).is_some() {
                    return Err(PeerError::Unreachable("it broke the protocol".to_owned()));
                }
                // Its handshake may have been over just before it was removed.
                if self.identity.removed().contains(peer) {
                    return Err(PeerError::Unreachable(
                        "it was removed from the cluster".to_owned(),
                    ));
                }
                let list = state.peers.entry(peer).or_default();
                let stale = list
                    .iter()
                    .find(|old| old.remote.instance != connection.remote.instance);
                match stale.map(Arc::clone) {
                    None if list.len() >= CONNECTIONS_A_MEMBER => {
                        return Err(PeerError::Unreachable(
                            "it has too many connections".to_owned(),
                        ));
                    }
                    None => {
                        if list.is_empty() {
                            permit.send(up(connection));
                        }
                        list.push(Arc::clone(connection));
                        return Ok(());
                    }
                    stale => stale,
                }
            };
            // The other daemon has restarted and knows nothing of what was said to its predecessor: the driver must see
            // that one go before this one comes.
            drop(permit);
            let Some(stale) = stale else { continue };
            stale.close.cancel();
            if tokio::time::timeout_at(deadline, stale.gone.cancelled())
                .await
                .is_err()
            {
                return Err(PeerError::Lost);
            }
        }
    }

    async fn run(self: Arc<Self>, connection: Arc<Connection>, halves: Halves, queues: Queues) {
        let Halves { frames, writer } = halves;
        let transmitter =
            Transmitter::new(Arc::clone(&self), Arc::clone(&connection), writer, queues);
        let writing = self.tasks.spawn(transmitter.run());
        let mut receiver = Receiver {
            hub: Arc::clone(&self),
            connection: Arc::clone(&connection),
            frames,
        };
        let end = tokio::select! {
            end = receiver.run() => Some(end),
            () = look_after(&connection, &self.limits) => None,
            () = connection.close.cancelled() => None,
        };
        let quiet = match &end {
            Some(Err(error @ FrameError::Protocol(_))) => {
                self.broke_protocol(
                    connection.remote.peer,
                    &connection.remote.name,
                    &error.to_string(),
                );
                false
            }
            _ => connection.is_quiet(),
        };
        connection.close.cancel();
        connection.shut();
        // It ends within its own deadlines, now that the connection is closing.
        let _ = writing.await;
        let name = &connection.remote.name;
        match end {
            // It has been told.
            Some(Err(FrameError::Protocol(_))) => {}
            Some(Err(error)) => tracing::debug!(peer = %name, %error, "a connection broke"),
            Some(Ok(())) | None => tracing::debug!(peer = %name, "a connection was closed"),
        }
        self.unregister(&connection, quiet).await;
    }

    async fn unregister(&self, connection: &Arc<Connection>, quiet: bool) {
        let peer = connection.remote.peer;
        // None when nobody listens any more.
        let permit = self.events.reserve().await.ok();
        {
            let mut state = self.state();
            if let Some(list) = state.peers.get_mut(&peer) {
                list.retain(|other| !Arc::ptr_eq(other, connection));
                if !quiet {
                    // Messages on it may be lost. The driver learns that by `Down`, so the others must go as well.
                    list.iter().for_each(|other| other.close.cancel());
                }
                if list.is_empty() {
                    state.peers.remove(&peer);
                    if let Some(permit) = permit {
                        permit.send(PeerEvent::Down { peer });
                    }
                }
            }
        }
        connection.gone.cancel();
    }

    /// Tells the driver how an upload ended.
    pub(super) async fn uploaded(&self, peer: PeerId, request: u32, bytes: u64, complete: bool) {
        // An error means that the daemon is ending.
        let _ = self
            .events
            .send(PeerEvent::Uploaded {
                peer,
                request,
                bytes,
                complete,
            })
            .await;
    }

    /// Ends what is under way within `deadline`, then everything.
    pub(super) async fn drain(&self, deadline: Duration) {
        self.draining.cancel();
        let uploads_over = async {
            while self
                .all()
                .iter()
                .any(|connection| connection.is_uploading())
            {
                tokio::time::sleep(TICK / 10).await;
            }
        };
        let _ = timeout(deadline, uploads_over).await;
        self.stop.cancel();
        self.tasks.close();
        if timeout(REPLACE_DEADLINE, self.tasks.wait()).await.is_err() {
            tracing::debug!("some connections did not end in time");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn warm(state: &State, dial: &Dial) -> Option<PeerId> {
    match dial.peer {
        Some(peer) => state.peers.contains_key(&peer).then_some(peer),
        None => state.connections().map(|c| &c.remote).find_map(|remote| {
            let dialled = remote
                .dialled
                .as_ref()
                .is_some_and(|address| dial.addresses.contains(address));
            (remote.role == Role::Seed && dialled).then_some(remote.peer)
        }),
    }
}

fn up(connection: &Connection) -> PeerEvent {
    let Remote {
        peer,
        role,
        name,
        addresses,
        ..
    } = &connection.remote;
    PeerEvent::Up {
        peer: *peer,
        role: *role,
        name: name.clone(),
        addresses: addresses.clone(),
    }
}

/// Pings, and ends the connection when it is idle or dead; gives up pieces that do not move.
async fn look_after(connection: &Connection, limits: &Limits) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut pinged = tokio::time::Instant::now();
    loop {
        let now = ticks.tick().await;
        connection.give_up_stalled();
        if connection
            .idle()
            .is_some_and(|idle| idle >= *limits.settings().config.peer_idle_timeout)
        {
            return;
        }
        if connection.clock.silence() >= SILENCE_AT_MOST {
            tracing::debug!(peer = %connection.remote.name, "nothing was heard of a peer for too long");
            return;
        }
        if now.duration_since(pinged) >= PING_EVERY {
            pinged = now;
            let ping = v1::PeerMessage {
                message: Some(Wire::Ping(v1::Ping {
                    nonce: rand::random(),
                })),
            };
            connection.say_raw(ping, None);
        }
    }
}
