//! One simulated host: a node, what was said to it, what it is sending.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use hawker_core::Time;
use hawker_core::message::{Message, Offer};
use hawker_core::node::{Input, Node};
use hawker_core::parents::Fault;
use hawker_core::piece::{PeerId, PieceIndex, PieceSet};
use hawker_core::swarm::ReportKind;
use hawker_oci::digest::Digest;

use super::content::{Blob, Keys, peer_id};

/// A daemon takes in what has come before it decides: as long as a busy machine takes to get to it.
pub(super) const DECIDES_WITHIN: Duration = Duration::from_micros(750);

/// News of pieces that a node has no room for wait until it decides anyway, and not longer than this.
const NEWS_WAIT: Duration = Duration::from_millis(20);

/// A piece on its way out.
pub(super) struct Sending {
    pub(super) to: u32,
    pub(super) request: u32,
    pub(super) blob: usize,
    pub(super) piece: PieceIndex,
    pub(super) left_bytes: u64,
}

/// A message on its way in.
pub(super) struct Letter {
    pub(super) at: Time,
    pub(super) from: u32,
    pub(super) content: Content,
}

/// Nearly all messages are news of a piece or two: these lie in the inbox itself.
pub(super) enum Content {
    News {
        blob: u16,
        count: u8,
        pieces: [PieceIndex; FEW],
    },
    Other(Box<Message>),
}

const FEW: usize = 3;

impl Content {
    /// News of a few pieces of blob `blob`, or another message.
    pub(super) fn new(message: Message, blob: impl Fn(&Digest) -> Option<usize>) -> Self {
        if let Message::Have {
            task,
            offer: Offer::Some(offered),
            ..
        } = &message
            && offered.len() <= FEW
            && let Some(Ok(blob)) = blob(task).map(u16::try_from)
        {
            let mut pieces = [0; FEW];
            pieces[..offered.len()].copy_from_slice(offered);
            return Self::News {
                blob,
                count: offered.len() as u8,
                pieces,
            };
        }
        Self::Other(Box::new(message))
    }

    /// The message as it was.
    pub(super) fn message(self, blobs: &[Blob]) -> Message {
        match self {
            Self::News {
                blob,
                count,
                pieces,
            } => {
                let blob = &blobs[usize::from(blob)];
                let offer = Offer::Some(pieces[..usize::from(count)].to_vec());
                Message::Have {
                    task: blob.digest,
                    size_bytes: blob.layout.size_bytes(),
                    offer,
                }
            }
            Self::Other(message) => *message,
        }
    }

    fn is_news(&self) -> bool {
        match self {
            Self::News { .. } => true,
            Self::Other(message) => matches!(**message, Message::Have { .. }),
        }
    }
}

/// One blob at one host.
pub(super) struct Local {
    /// Pieces that were really verified here, as the simulation knows.
    pub(super) verified: PieceSet,
    shown: PieceSet,
    reader_at: PieceIndex,
    /// The stream from the origin, while there is one.
    pub(super) reading: Option<u64>,
    pub(super) done_at: Option<Time>,
    pub(super) changed: bool,
    /// The issuer that the scheduler named.
    pub(super) issuer: Option<PeerId>,
}

impl Local {
    fn new(blob: &Blob) -> Self {
        let none = PieceSet::empty(blob.layout.count());
        Self {
            verified: none.clone(),
            shown: none,
            reader_at: 0,
            reading: None,
            done_at: None,
            changed: false,
            issuer: None,
        }
    }

    /// A client may have this piece; gives the client's new position, if it moves.
    pub(super) fn show(&mut self, piece: PieceIndex) -> Option<PieceIndex> {
        self.shown.insert(piece);
        let next = self.shown.first_missing(self.reader_at);
        (next != self.reader_at).then(|| {
            self.reader_at = next;
            next
        })
    }

    pub(super) fn start_over(&mut self) {
        let none = PieceSet::empty(self.verified.count());
        (self.verified, self.shown, self.reader_at) = (none.clone(), none, 0);
    }
}

pub(super) struct Host {
    pub(super) node: Node<Keys>,
    pub(super) slow: bool,
    pub(super) lies: bool,
    pub(super) dead: bool,
    pub(super) blobs: Vec<Local>,
    pub(super) connected: BTreeSet<u32>,
    pub(super) sending: VecDeque<Sending>,
    /// When it looks at its uplink next.
    pub(super) pumps_at: Option<Time>,
    /// The messages to it, by the time of their arrival.
    pub(super) inbox: VecDeque<Letter>,
    /// The tick at which it takes that in.
    pub(super) looks_at: Option<u64>,
    /// Something came from which more may follow than that others are served.
    pub(super) is_stirred: bool,
    /// When it decides though nothing came.
    pub(super) deadline: Option<Time>,
    /// Whether it could ask for more.
    pub(super) has_room: bool,
    /// When it last gathered news for the scheduler.
    pub(super) news_due: bool,
    pub(super) reports: BTreeMap<(PeerId, Digest, ReportKey), u64>,
}

/// Reports of one kind add up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ReportKey {
    WrongBytes,
    Stalled,
    NotHeld,
    Failed,
    Served,
}

impl ReportKey {
    pub(super) const fn kind(self, bytes: u64) -> ReportKind {
        match self {
            ReportKey::WrongBytes => ReportKind::WrongBytes,
            ReportKey::Stalled => ReportKind::Stalled,
            ReportKey::NotHeld => ReportKind::NotHeld,
            ReportKey::Failed => ReportKind::Failed,
            ReportKey::Served => ReportKind::Served(bytes),
        }
    }
}

impl Host {
    pub(super) fn new(node: Node<Keys>, blobs: &[Blob]) -> Self {
        Self {
            node,
            slow: false,
            lies: false,
            dead: false,
            blobs: blobs.iter().map(Local::new).collect(),
            connected: BTreeSet::new(),
            sending: VecDeque::new(),
            pumps_at: None,
            inbox: VecDeque::new(),
            looks_at: None,
            is_stirred: false,
            deadline: None,
            has_room: true,
            news_due: false,
            reports: BTreeMap::new(),
        }
    }

    /// A message is on its way.
    pub(super) fn expect(&mut self, letter: Letter) {
        // Nearly all come in the order in which they were sent.
        let after = self
            .inbox
            .iter()
            .rev()
            .take_while(|other| other.at > letter.at)
            .count();
        self.inbox.insert(self.inbox.len() - after, letter);
    }

    /// How soon after a message is there the node looks at it.
    pub(super) fn waits(&self, content: &Content) -> Duration {
        if content.is_news() && !self.has_room {
            NEWS_WAIT
        } else {
            DECIDES_WITHIN
        }
    }

    /// Takes in the messages that have come by `now`, and decides.
    pub(super) fn decide(&mut self, now: Time, blobs: &[Blob]) {
        while let Some(Letter { from, content, .. }) = self.letter(now) {
            self.arrive(now, from, content.message(blobs));
        }
        if std::mem::take(&mut self.is_stirred) || self.deadline.is_some_and(|at| at <= now) {
            self.node.handle(now, Input::Decide);
            self.has_room = self.node.has_room();
            self.deadline = self.node.deadline(now);
        } else {
            self.node.handle(now, Input::Serve);
        }
    }

    fn letter(&mut self, now: Time) -> Option<Letter> {
        self.inbox.front().filter(|letter| letter.at <= now)?;
        self.inbox.pop_front()
    }

    fn arrive(&mut self, now: Time, from: u32, message: Message) {
        if !self.connected.contains(&from) {
            return;
        }
        let from_id = peer_id(from);
        match message {
            Message::Reject { request, reason } => {
                self.node.handle(
                    now,
                    Input::PieceFailed {
                        peer: from_id,
                        request,
                        refused: Some(reason),
                        fault: Fault::Failed,
                    },
                );
                self.is_stirred = true;
            }
            Message::Cancel { request } => {
                let sent = |sending: &Sending| (sending.to, sending.request) == (from, request);
                if self.sending.iter().any(sent) {
                    self.sending.retain(|sending| !sent(sending));
                    self.node.handle(
                        now,
                        Input::Uploaded {
                            peer: from_id,
                            request,
                        },
                    );
                }
                self.node.handle(
                    now,
                    Input::Message {
                        peer: from_id,
                        message: Message::Cancel { request },
                    },
                );
            }
            // It is served or waits.
            message @ Message::Request { .. } => {
                self.node.handle(
                    now,
                    Input::Message {
                        peer: from_id,
                        message,
                    },
                );
            }
            message => {
                let is_urgent = self.node.is_urgent(from_id, &message);
                self.node.handle(
                    now,
                    Input::Message {
                        peer: from_id,
                        message,
                    },
                );
                self.is_stirred |= is_urgent || self.node.has_outputs();
            }
        }
    }

    /// Pieces that it lacks.
    pub(super) fn missing(&self) -> u32 {
        self.blobs
            .iter()
            .map(|blob| blob.verified.count() - blob.verified.len())
            .sum()
    }

    /// When the last of its blobs was complete.
    pub(super) fn done_at(&self) -> Option<Time> {
        self.blobs
            .iter()
            .map(|blob| blob.done_at)
            .max_by_key(|at| at.map_or(u64::MAX as u128, |at| at.0.as_nanos()))?
    }
}
