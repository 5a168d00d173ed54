//! The piece protocol between peers, both ends: one warm TLS connection carries control and pieces.
//!
//! [`Peers`] is the seam to the driver: [`TlsPeers`] in the product, peers in memory in tests, with one suite for both.
//! [`dial`] makes connections, [`hub`] knows them all, [`connection`] knows what one has under way, [`receive`] and
//! [`transmit`] are its two directions, [`frame`] the form on the wire. Nothing is decided here about tasks or pieces.

mod connection;
mod dial;
mod frame;
mod hub;
mod member;
#[cfg(test)]
pub(crate) mod memory;
mod receive;
#[cfg(test)]
mod suite;
mod transmit;

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use hawker_core::application::Priority;
use hawker_core::message::{Message, Refusal, Role};
use hawker_core::piece::{PeerId, PieceIndex};
use hawker_core::right::Bearer;
use hawker_identity::member::Identity;
use hawker_oci::digest::{Chain, Digest};
use hawker_oci::reference::Source;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio_util::sync::DropGuard;

use self::hub::Hub;
use crate::buffer::PieceBuffer;
use crate::limits::Limits;

/// An event on the connections.
#[derive(Debug)]
pub enum PeerEvent {
    /// A connection stands (either side dialled).
    Up {
        /// The peer.
        peer: PeerId,
        /// Its role, by its certificate.
        role: Role,
        /// For people.
        name: String,
        /// How it says it can be reached.
        addresses: Vec<String>,
    },
    /// The last connection with it is gone; its transfers have failed.
    Down {
        /// The peer.
        peer: PeerId,
    },
    /// It said something about pieces. A `Reject` does not come here but as the outcome of its [`Download`]; a `Cancel`
    /// does come, for requests whose upload has not been handed over yet.
    Message {
        /// The sender.
        peer: PeerId,
        /// The message.
        message: Message,
        /// Its places among those of the member's messages that wait: they come free when this is dropped.
        places: Vec<OwnedSemaphorePermit>,
    },
    /// An upload to it is over: sent whole, cancelled by it, or failed.
    Uploaded {
        /// The peer.
        peer: PeerId,
        /// Its number.
        request: u32,
        /// Bytes handed to the connection.
        bytes: u64,
        /// Whether all of it went.
        complete: bool,
    },
}

/// The peer to dial, by any of its addresses in turn.
#[derive(Clone, Debug)]
pub struct Dial {
    /// The id that it must have; `None`: any seed.
    pub peer: Option<PeerId>,
    /// `host:port`, each resolved at every dial.
    pub addresses: Vec<String>,
}

/// Why a transfer or a connection failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// No address led to the right member in time.
    #[error("can't be reached: {0}")]
    Unreachable(String),
    /// The connection went away.
    #[error("the connection was lost")]
    Lost,
    /// It refused.
    #[error("it refused: {0:?}")]
    Refused(Refusal),
    /// Nothing came for too long.
    #[error("it stalled")]
    Stalled,
    /// The asker cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// A piece that has come whole: its bytes, and the hash that ran over them as they came.
pub struct Received {
    /// The bytes.
    pub buffer: PieceBuffer,
    /// The hash after them.
    pub chain: Chain,
}

/// A piece to ask a peer for.
pub struct Download {
    /// Our number, unique on the connection.
    pub request: u32,
    /// The task.
    pub task: Digest,
    /// The piece.
    pub piece: PieceIndex,
    /// Nobody here waits for it.
    pub prefetch: bool,
    /// How urgent it is.
    pub priority: Priority,
    /// The target of its bytes; as long as the piece.
    pub buffer: PieceBuffer,
    /// The hash at the piece's start.
    pub chain: Chain,
    /// The channel for the outcome.
    pub done: oneshot::Sender<Result<Received, PeerError>>,
}

/// A piece to send.
pub enum PieceSource {
    /// From memory.
    Memory(Bytes),
    /// From a file.
    File {
        /// The file.
        file: Arc<File>,
        /// The range in it.
        range: Range<u64>,
    },
}

/// Status, media type, body, and whether the registry that was asked about gave this to the seed.
pub type ManifestAnswer<'a> =
    std::pin::Pin<Box<dyn Future<Output = (u16, String, Bytes, bool)> + Send + 'a>>;

/// Gives manifests to peers that ask: the seed's registry side.
pub trait ManifestSource: Send + Sync + 'static {
    /// `token`: lent by the peer, to read it at its origin.
    fn manifest(&self, source: Source, digest: Digest, token: Option<Bearer>)
    -> ManifestAnswer<'_>;
}

/// A future of [`Peers`].
pub type PeersFuture<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// All connections with peers. When the last handle is dropped, they end.
///
/// All events on them go to the driver as [`PeerEvent`]s, in their order.
pub trait Peers: Send + Sync + 'static {
    /// A connection with this member, new or warm, and the member's name. Events must be taken meanwhile: `Up` comes before the
    /// answer.
    fn dial<'a>(&'a self, dial: &'a Dial) -> PeersFuture<'a, Result<PeerId, PeerError>>;

    /// Says something; `false` when there is no connection. A connection whose control queue is full is closed.
    fn send(&self, peer: PeerId, message: &Message) -> bool;

    /// Asks for a piece: sends the request, fills the buffer, runs the hash as bytes come, reports once.
    fn download(&self, peer: PeerId, download: Download);

    /// Gives up one of our requests.
    fn cancel(&self, peer: PeerId, request: u32);

    /// Sends a piece under the number that its asker gave it; `PeerEvent::Uploaded` follows.
    fn upload(&self, peer: PeerId, request: u32, piece: PieceSource);

    /// Closes the connections with a peer.
    fn drop_peer(&self, peer: PeerId);

    /// The members that are connected now.
    fn connected(&self) -> Vec<PeerId>;
}

/// Connections over TCP with TLS. Cheap to clone.
#[derive(Clone)]
pub struct TlsPeers {
    hub: Arc<Hub>,
    _stop: Arc<DropGuard>,
}

/// How to run [`TlsPeers`].
pub struct PeersConfig {
    /// Our identity.
    pub identity: Identity,
    /// For people.
    pub name: String,
    /// How others reach us.
    pub addresses: Vec<String>,
    /// The rates.
    pub limits: Limits,
    /// Connections at most, in and out together.
    pub max_connections: usize,
    /// Answers for manifests.
    pub manifests: Arc<dyn ManifestSource>,
    /// The channel for events.
    pub events: mpsc::Sender<PeerEvent>,
}

impl TlsPeers {
    /// Serves `listeners` and is ready to dial.
    pub fn start(config: PeersConfig, listeners: Vec<tokio::net::TcpListener>) -> Self {
        let hub = Hub::new(config);
        for listener in listeners {
            let accepting = dial::accept(Arc::clone(&hub), listener);
            let stop = hub.stop.clone();
            hub.tasks
                .spawn(async move { stop.run_until_cancelled(accepting).await });
        }
        let stop = Arc::new(hub.stop.clone().drop_guard());
        Self { hub, _stop: stop }
    }

    /// Asks a peer (a seed) for a manifest: status, media type, body, and whether the registry that `source` names gave it to the
    /// peer. `token`: lent to it, to read it at its origin.
    pub async fn manifest(
        &self,
        peer: PeerId,
        source: &Source,
        digest: &Digest,
        token: Option<&Bearer>,
    ) -> Result<(u16, String, Bytes, bool), PeerError> {
        let connection = self.hub.newest(peer).ok_or(PeerError::Lost)?;
        let answer = connection.ask_manifest(source, digest, token);
        tokio::time::timeout(receive::MANIFEST_DEADLINE, answer)
            .await
            .unwrap_or(Err(PeerError::Stalled))
    }

    /// Stops accepting, tells nobody, ends what is under way within `deadline`.
    pub async fn drain(&self, deadline: std::time::Duration) {
        self.hub.drain(deadline).await;
    }
}

impl Peers for TlsPeers {
    fn dial<'a>(&'a self, dial: &'a Dial) -> PeersFuture<'a, Result<PeerId, PeerError>> {
        Box::pin(dial::dial(&self.hub, dial))
    }

    fn send(&self, peer: PeerId, message: &Message) -> bool {
        if let Message::Reject { request, .. } = message {
            // It belongs to the connection on which it was asked; one that was cancelled needs no answer.
            let connections = self.hub.with(peer);
            let asked = connections
                .iter()
                .find(|connection| connection.no_more_asked(*request));
            return asked.map_or(!connections.is_empty(), |connection| {
                connection.say(message)
            });
        }
        self.hub
            .newest(peer)
            .is_some_and(|connection| connection.say(message))
    }

    fn download(&self, peer: PeerId, download: Download) {
        match self.hub.newest(peer) {
            Some(connection) => connection.download(download),
            // Nobody may wait any more.
            None => drop(download.done.send(Err(PeerError::Lost))),
        }
    }

    fn cancel(&self, peer: PeerId, request: u32) {
        self.hub
            .with(peer)
            .iter()
            .any(|connection| connection.give_up(request, PeerError::Cancelled));
    }

    fn upload(&self, peer: PeerId, request: u32, piece: PieceSource) {
        let refused = self
            .hub
            .with(peer)
            .iter()
            .try_fold(piece, |piece, connection| {
                match connection.upload(request, piece) {
                    Ok(()) => Err(()),
                    Err(piece) => Ok(piece),
                }
            });
        if refused.is_ok() {
            // The asker is gone or has cancelled: told as every other end is.
            let hub = Arc::clone(&self.hub);
            self.hub
                .tasks
                .spawn(async move { hub.uploaded(peer, request, 0, false).await });
        }
    }

    fn drop_peer(&self, peer: PeerId) {
        for connection in self.hub.with(peer) {
            connection.close.cancel();
        }
    }

    fn connected(&self) -> Vec<PeerId> {
        self.hub.connected()
    }
}

#[cfg(test)]
mod tests;
