//! Peers in memory, for tests: members of one process, joined by a [`MemoryNetwork`] in place of sockets and TLS.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hawker_core::message::{Message, Refusal, Role};
use hawker_core::piece::PeerId;
use tokio::sync::{mpsc, oneshot};

use super::{Dial, Download, PeerError, PeerEvent, Peers, PeersFuture, PieceSource, Received};
use hawker_lanes::{self as lanes, Lane};

/// Requests of one member at another one that are noted at once, as on a connection.
const ASKED_AT_MOST: usize = 64;

/// Events that wait for one member.
const INBOX: usize = 64 << 10;

/// How a member behaves on the network.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Conduct {
    /// Every piece that it sends has a wrong byte.
    pub(crate) lies: bool,
    /// Bytes a second that it sends of each piece, at most.
    pub(crate) rate_bytes: Option<u64>,
}

/// All members that can reach each other. Clones are the same network.
#[derive(Clone, Default)]
pub(crate) struct MemoryNetwork(Arc<Mutex<Network>>);

#[derive(Default)]
struct Network {
    members: HashMap<PeerId, Member>,
    /// Pairs that are connected, each in both orders.
    links: HashSet<(PeerId, PeerId)>,
    /// By the member that asked, the member that was asked, and the number of the request.
    requests: HashMap<(PeerId, PeerId, u32), Request>,
    next_serial: u64,
}

/// An event, and whom to tell that it was taken.
type Delivery = (PeerEvent, Option<oneshot::Sender<()>>);

struct Member {
    role: Role,
    address: String,
    conduct: Conduct,
    /// Events in the order in which they happen.
    inbox: mpsc::Sender<Delivery>,
    sent_bytes: u64,
}

struct Request {
    serial: u64,
    download: Download,
    /// Its piece was handed over to be sent.
    is_sent: bool,
}

impl MemoryNetwork {
    fn lock(&self) -> MutexGuard<'_, Network> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A member that others reach at `address`. It leaves when the handle is dropped.
    pub(crate) fn join(
        &self,
        me: PeerId,
        role: Role,
        address: &str,
        events: mpsc::Sender<PeerEvent>,
    ) -> MemoryPeers {
        let (inbox, mut queue) = mpsc::channel::<Delivery>(INBOX);
        tokio::spawn(async move {
            while let Some((event, taken)) = queue.recv().await {
                if events.send(event).await.is_err() {
                    return;
                }
                taken.map(|taken| taken.send(()));
            }
        });
        let (address, conduct) = (address.to_owned(), Conduct::default());
        self.lock().members.insert(
            me,
            Member {
                role,
                address,
                conduct,
                inbox,
                sent_bytes: 0,
            },
        );
        MemoryPeers {
            network: self.clone(),
            me,
        }
    }

    /// The member behaves like this from now on.
    pub(crate) fn conduct(&self, peer: PeerId, conduct: Conduct) {
        if let Some(member) = self.lock().members.get_mut(&peer) {
            member.conduct = conduct;
        }
    }

    /// The bytes of pieces that a member has sent.
    pub(crate) fn sent_bytes(&self, peer: PeerId) -> u64 {
        self.lock()
            .members
            .get(&peer)
            .map_or(0, |member| member.sent_bytes)
    }

    /// A member is gone at once, as after a power failure.
    pub(crate) fn remove(&self, peer: PeerId) {
        let mut network = self.lock();
        network.members.remove(&peer);
        network
            .neighbours(peer)
            .into_iter()
            .for_each(|other| network.disconnect(peer, other));
    }

    /// Sends a piece that was handed over, all at once when its time has come.
    async fn transmit(
        self,
        from: PeerId,
        to: PeerId,
        request: u32,
        serial: u64,
        piece: PieceSource,
    ) {
        let bytes = match piece {
            PieceSource::Memory(bytes) => Some(bytes),
            PieceSource::File { file, range } => {
                let read = move || {
                    let mut bytes = vec![0; (range.end - range.start) as usize];
                    file.read_exact_at(&mut bytes, range.start)
                        .ok()
                        .map(|()| Bytes::from(bytes))
                };
                lanes::run(Lane::Uploads, read).await.flatten()
            }
        };
        let conduct = self
            .lock()
            .members
            .get(&from)
            .map(|member| member.conduct)
            .unwrap_or_default();
        if let (Some(rate_bytes), Some(bytes)) = (conduct.rate_bytes, &bytes) {
            tokio::time::sleep(Duration::from_secs_f64(
                bytes.len() as f64 / rate_bytes as f64,
            ))
            .await;
        }
        let mut network = self.lock();
        // Its end was told when it was cancelled or lost.
        if network
            .requests
            .get(&(to, from, request))
            .is_none_or(|request| request.serial != serial)
        {
            return;
        }
        let Some(Request { download, .. }) = network.requests.remove(&(to, from, request)) else {
            return;
        };
        let Download {
            mut buffer,
            mut chain,
            done,
            ..
        } = download;
        let (outcome, sent_bytes) = match bytes {
            Some(bytes) => {
                let mut bytes = Vec::from(bytes);
                if conduct.lies
                    && let Some(byte) = bytes.last_mut()
                {
                    *byte ^= 1;
                }
                let taken = buffer.extend(&bytes);
                chain.update(&bytes[..taken]);
                let is_whole = buffer.missing() == 0 && taken == bytes.len();
                (
                    if is_whole {
                        Ok(Received { buffer, chain })
                    } else {
                        Err(PeerError::Stalled)
                    },
                    taken as u64,
                )
            }
            None => (Err(PeerError::Refused(Refusal::Unable)), 0),
        };
        let complete = outcome.is_ok();
        if let Some(member) = network.members.get_mut(&from) {
            member.sent_bytes += sent_bytes;
        }
        // Nobody may wait any more.
        let _ = done.send(outcome);
        network.tell(
            from,
            PeerEvent::Uploaded {
                peer: to,
                request,
                bytes: sent_bytes,
                complete,
            },
        );
    }
}

impl Network {
    fn tell(&self, to: PeerId, event: PeerEvent) {
        if let Some(member) = self.members.get(&to) {
            // An error means that the member is ending, or that a test forgot to take its events.
            let _ = member.inbox.try_send((event, None));
        }
    }

    fn neighbours(&self, peer: PeerId) -> Vec<PeerId> {
        self.links
            .iter()
            .filter(|(one, _)| *one == peer)
            .map(|(_, other)| *other)
            .collect()
    }

    fn disconnect(&mut self, one: PeerId, other: PeerId) {
        if !self.links.remove(&(one, other)) || !self.links.remove(&(other, one)) {
            return;
        }
        let is_between =
            |asker: PeerId, asked: PeerId| [(one, other), (other, one)].contains(&(asker, asked));
        let lost: Vec<_> = self
            .requests
            .keys()
            .filter(|(asker, asked, _)| is_between(*asker, *asked))
            .copied()
            .collect();
        for key in lost {
            self.end_request(key, PeerError::Lost);
        }
        self.tell(one, PeerEvent::Down { peer: other });
        self.tell(other, PeerEvent::Down { peer: one });
    }

    /// A request comes to nothing; whether there was one.
    fn end_request(&mut self, key: (PeerId, PeerId, u32), error: PeerError) -> bool {
        let Some(ended) = self.requests.remove(&key) else {
            return false;
        };
        let _ = ended.download.done.send(Err(error));
        if ended.is_sent {
            let (peer, asked, request) = key;
            self.tell(
                asked,
                PeerEvent::Uploaded {
                    peer,
                    request,
                    bytes: 0,
                    complete: false,
                },
            );
        }
        true
    }

    /// The member at an address, if it is the one that is sought; else why not.
    fn reach(
        &self,
        me: PeerId,
        sought: Option<PeerId>,
        address: &str,
    ) -> Result<PeerId, &'static str> {
        let at_address = self
            .members
            .iter()
            .find(|(_, member)| member.address == address);
        let (peer, member) = at_address.ok_or("nobody answers")?;
        match sought {
            _ if *peer == me => Err("that is this node itself"),
            Some(sought) if sought != *peer => Err("it is another member"),
            None if member.role != Role::Seed => Err("it is no seed"),
            _ => Ok(*peer),
        }
    }
}

/// One member's connections.
pub(crate) struct MemoryPeers {
    network: MemoryNetwork,
    me: PeerId,
}

impl MemoryPeers {
    fn connect(&self, dial: &Dial) -> Result<(PeerId, Option<oneshot::Receiver<()>>), PeerError> {
        let mut network = self.network.lock();
        let reached: Vec<_> = dial
            .addresses
            .iter()
            .map(|address| network.reach(self.me, dial.peer, address))
            .collect();
        let Some(peer) = reached.iter().find_map(|reached| reached.ok()) else {
            let why: Vec<&str> = reached.iter().filter_map(|reached| reached.err()).collect();
            return Err(PeerError::Unreachable(why.join("; ")));
        };
        if !network.links.insert((self.me, peer)) {
            return Ok((peer, None));
        }
        network.links.insert((peer, self.me));
        let (taken, is_taken) = oneshot::channel();
        let mut taken = Some(taken);
        for (to, about) in [(self.me, peer), (peer, self.me)] {
            let (Some(member), Some(other)) =
                (network.members.get(&to), network.members.get(&about))
            else {
                continue;
            };
            let up = PeerEvent::Up {
                peer: about,
                role: other.role,
                name: "test".to_owned(),
                addresses: vec![other.address.clone()],
            };
            let _ = member.inbox.try_send((up, taken.take()));
        }
        Ok((peer, Some(is_taken)))
    }
}

impl Peers for MemoryPeers {
    fn dial<'a>(&'a self, dial: &'a Dial) -> PeersFuture<'a, Result<PeerId, PeerError>> {
        Box::pin(async move {
            let (peer, up) = self.connect(dial)?;
            if let Some(up) = up {
                let _ = up.await;
            }
            Ok(peer)
        })
    }

    fn send(&self, peer: PeerId, message: &Message) -> bool {
        let mut network = self.network.lock();
        if !network.links.contains(&(self.me, peer)) {
            return false;
        }
        match message {
            Message::Reject { request, reason } => {
                network.end_request((peer, self.me, *request), PeerError::Refused(*reason));
            }
            _ => {
                let (message, places) = (message.clone(), Vec::new());
                network.tell(
                    peer,
                    PeerEvent::Message {
                        peer: self.me,
                        message,
                        places,
                    },
                );
            }
        }
        true
    }

    fn download(&self, peer: PeerId, download: Download) {
        let mut network = self.network.lock();
        let is_theirs =
            |(asker, asked, _): &&(PeerId, PeerId, u32)| (*asker, *asked) == (self.me, peer);
        let refusal = match network.requests.keys().filter(is_theirs).count() {
            _ if !network.links.contains(&(self.me, peer)) => Some(PeerError::Lost),
            ASKED_AT_MOST.. => Some(PeerError::Refused(Refusal::Busy)),
            _ => None,
        };
        if let Some(refusal) = refusal {
            let _ = download.done.send(Err(refusal));
            return;
        }
        let Download {
            request,
            task,
            piece,
            prefetch,
            priority,
            ..
        } = download;
        network.next_serial += 1;
        let serial = network.next_serial;
        network.requests.insert(
            (self.me, peer, request),
            Request {
                serial,
                download,
                is_sent: false,
            },
        );
        let message = Message::Request {
            request,
            task,
            piece,
            prefetch,
            priority,
        };
        network.tell(
            peer,
            PeerEvent::Message {
                peer: self.me,
                message,
                places: Vec::new(),
            },
        );
    }

    fn cancel(&self, peer: PeerId, request: u32) {
        let mut network = self.network.lock();
        if network.end_request((self.me, peer, request), PeerError::Cancelled) {
            let (message, places) = (Message::Cancel { request }, Vec::new());
            network.tell(
                peer,
                PeerEvent::Message {
                    peer: self.me,
                    message,
                    places,
                },
            );
        }
    }

    fn upload(&self, peer: PeerId, request: u32, piece: PieceSource) {
        let mut network = self.network.lock();
        match network.requests.get_mut(&(peer, self.me, request)) {
            Some(asked) if !asked.is_sent => {
                asked.is_sent = true;
                let serial = asked.serial;
                tokio::spawn(
                    self.network
                        .clone()
                        .transmit(self.me, peer, request, serial, piece),
                );
            }
            // The asker is gone or has cancelled.
            _ => network.tell(
                self.me,
                PeerEvent::Uploaded {
                    peer,
                    request,
                    bytes: 0,
                    complete: false,
                },
            ),
        }
    }

    fn drop_peer(&self, peer: PeerId) {
        self.network.lock().disconnect(self.me, peer);
    }

    fn connected(&self) -> Vec<PeerId> {
        let connected: BTreeSet<PeerId> = self
            .network
            .lock()
            .neighbours(self.me)
            .into_iter()
            .collect();
        connected.into_iter().collect()
    }
}

impl Drop for MemoryPeers {
    fn drop(&mut self) {
        self.network.remove(self.me);
    }
}
