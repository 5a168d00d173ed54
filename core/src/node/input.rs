//! The events that a shell feeds into a node. [`Node::handle`] is the only way in, [`Node::poll`] the only way out.

use std::ops::Range;
use std::sync::Arc;

use super::{Child, Failure, Named, Node, Opening, TableSigner, Verdict};
use crate::Time;
use crate::application::{Applications, Purpose};
use crate::limit::Rates;
use crate::message::{Message, Refusal, Role};
use crate::parents::Fault;
use crate::piece::{PeerId, PieceIndex, PieceSet};
use crate::right::Right;
use crate::share::Share;
use hawker_oci::digest::{Chain, Digest};
use hawker_oci::reference::Source;

/// An event for a [`Node`].
#[derive(Clone)]
pub enum Input {
    /// The seeds that are alive, as the member list has them.
    Seeds(Vec<Named>),
    /// A scheduler is connected, or none is.
    Scheduler(bool),
    /// The rates of each task, and the rate of all prefetching together. [`super::Output::RatesChanged`] follows if they are new.
    Rates {
        /// The rates of each task.
        each_task: Rates,
        /// Bytes a second of all prefetching.
        prefetch: Option<u64>,
    },
    /// The number of pieces that are sent at once. Pieces under way are finished.
    UploadSlots(usize),
    /// The limits of applications and tags. [`super::Output::RatesChanged`] follows if they are new.
    Applications(Arc<Applications>),
    /// The peers that nobody fetches from.
    Isolated(Vec<PeerId>),

    /// A connection with a peer stands.
    PeerUp {
        /// The peer.
        peer: PeerId,
        /// Its role.
        role: Role,
    },
    /// The last connection with a peer is gone. Its transfers fail by themselves.
    PeerDown(PeerId),
    /// No connection led to a peer.
    DialFailed(PeerId),
    /// A peer sent a message.
    Message {
        /// The sender.
        peer: PeerId,
        /// The message.
        message: Message,
    },

    /// A task comes into play: a client reads it, or a peer asked for it.
    Open {
        /// The task.
        task: Digest,
        /// The known facts about it.
        opening: Box<Opening>,
    },
    /// A task goes out of play: no client reads it, and no peer asks for it.
    Close(Digest),
    /// The newest source and right of a task. Seeds that did without it are asked again.
    Authorize {
        /// The task.
        task: Digest,
        /// The place that has it.
        source: Source,
        /// The right to read it there.
        right: Right,
    },
    /// A download is to start or to go on.
    Run {
        /// The task.
        task: Digest,
        /// All of it is wanted, not only what readers read.
        whole: bool,
        /// Another seed asks for it. The origin is then read here, whichever seed owns the task by rendezvous hashing: two seeds
        /// with different member lists would otherwise wait for each other.
        as_owner: bool,
    },
    /// A download is to rest. Pieces that are held stay on offer.
    Pause(Digest),
    /// Clients of this node read a task, or none does any more. A download that neither clients nor waiting children need is
    /// prefetch, and comes after everything else.
    Read {
        /// The task.
        task: Digest,
        /// Clients read it.
        is_read: bool,
    },
    /// The labels and the priority of all clients that read a task.
    Purpose {
        /// The task.
        task: Digest,
        /// The common purpose of all readers.
        purpose: Purpose,
    },
    /// A client's reader has come, moved or left.
    Reader {
        /// The task.
        task: Digest,
        /// The reader's number.
        reader: u64,
        /// The pieces that it still needs; `None` when it has left.
        pieces: Option<Range<PieceIndex>>,
        /// The pieces that it reads after these.
        ahead: Option<PieceSet>,
        /// It reads a range.
        partial: bool,
    },
    /// The size became known, from the origin or from a manifest.
    Sized {
        /// The task.
        task: Digest,
        /// Its size.
        size_bytes: u64,
    },
    /// The scheduler named parents.
    Parents {
        /// The task.
        task: Digest,
        /// The parents.
        parents: Vec<Named>,
        /// The peer that issues the piece table.
        issuer: Option<PeerId>,
        /// This node is to read the origin and to issue the table.
        elected: bool,
        /// The pieces that this node takes from parents in other zones.
        share: Share,
    },
    /// The scheduler elects a reader of the origin later.
    Postponed(Digest),
    /// A peer that asked for a task becomes a child.
    Adopt {
        /// The task.
        task: Digest,
        /// The peer, and its terms.
        child: Child,
    },
    /// A peer that asked for a task gets nothing.
    Refuse {
        /// The peer.
        peer: PeerId,
        /// The task.
        task: Digest,
        /// The reason.
        reason: Refusal,
    },

    /// A piece came from a peer. The answer of [`Node::handle`] is its verdict.
    Piece {
        /// The sender.
        peer: PeerId,
        /// The number of the request.
        request: u32,
        /// The hash over its bytes, from the piece's start.
        chain: Chain,
    },
    /// A request to a peer failed.
    PieceFailed {
        /// The peer.
        peer: PeerId,
        /// The number of the request.
        request: u32,
        /// The peer's own refusal.
        refused: Option<Refusal>,
        /// The fault otherwise.
        fault: Fault,
    },
    /// A piece was sent to the last byte.
    Delivered {
        /// The child.
        peer: PeerId,
        /// The number of its request.
        request: u32,
    },
    /// An upload is over, in whatever way.
    Uploaded {
        /// The child.
        peer: PeerId,
        /// The number of its request.
        request: u32,
    },

    /// The next piece of the origin's stream is whole. The answer of [`Node::handle`] is its verdict.
    OriginPiece {
        /// The task.
        task: Digest,
        /// The piece.
        piece: PieceIndex,
        /// The hash over its bytes, from the piece's start.
        chain: Chain,
    },
    /// The origin's stream is over, by itself or by a failure.
    OriginOver {
        /// The task.
        task: Digest,
        /// The failure.
        failure: Option<Failure>,
    },

    /// A blob is committed.
    Committed(Digest),
    /// The disk takes no more pieces of a task. All pieces that are held and not on disk are in memory.
    WithoutDisk {
        /// The task.
        task: Digest,
        /// The pieces on disk.
        on_disk: PieceSet,
        /// Memory for the others.
        budget_bytes: u64,
    },
    /// The memory of a task without disk. With none its readers read the origin by themselves.
    MemoryBudget {
        /// The task.
        task: Digest,
        /// The memory.
        budget_bytes: u64,
    },
    /// The disk took a piece of a task without disk after all.
    OnDisk {
        /// The task.
        task: Digest,
        /// The piece.
        piece: PieceIndex,
    },
    /// The disk takes pieces of a task again, and will get those in memory. Other pieces are fetched again: from peers, and from
    /// the origin only if somebody waits.
    DiskAgain {
        /// The task.
        task: Digest,
        /// The pieces on disk.
        on_disk: PieceSet,
    },

    /// All that happened at this moment has been told: the node decides what follows. It is due after other inputs, and at
    /// [`Node::deadline`].
    Decide,
    /// Only requests came, or uploads ended: upload slots are filled, and nothing else follows.
    Serve,
}

impl<N: TableSigner> Node<N> {
    /// Takes in an event. The answer is the verdict on the piece that came with it, if one did.
    pub fn handle(&mut self, now: Time, input: Input) -> Option<Verdict> {
        match input {
            Input::Seeds(seeds) => self.seeds(seeds),
            Input::Scheduler(listens) => self.scheduler(listens),
            Input::Rates {
                each_task,
                prefetch,
            } => self.rates(now, each_task, prefetch),
            Input::UploadSlots(slots) => self.upload_slots(slots),
            Input::Applications(applications) => self.applications(now, &applications),
            Input::Isolated(peers) => self.isolated(now, peers),
            Input::PeerUp { peer, role } => self.peer_up(now, peer, role),
            Input::PeerDown(peer) => self.peer_down(now, peer),
            Input::DialFailed(peer) => self.dial_failed(now, peer),
            Input::Message { peer, message } => self.message(now, peer, message),
            Input::Open { task, opening } => self.open(now, task, *opening),
            Input::Close(task) => self.close(&task),
            Input::Authorize {
                task,
                source,
                right,
            } => self.authorize(&task, source, right),
            Input::Run {
                task,
                whole,
                as_owner,
            } => self.run(now, task, whole, as_owner),
            Input::Pause(task) => self.pause(&task),
            Input::Read { task, is_read } => self.read(&task, is_read),
            Input::Purpose { task, purpose } => self.purpose(&task, purpose),
            Input::Reader {
                task,
                reader,
                pieces,
                ahead,
                partial,
            } => {
                self.reader(now, &task, reader, pieces, partial);
                if let Some(ahead) = ahead {
                    self.reads_ahead(&task, reader, ahead);
                }
            }
            Input::Sized { task, size_bytes } => self.sized(now, task, size_bytes),
            Input::Parents {
                task,
                parents,
                issuer,
                elected,
                share,
            } => {
                self.parents(now, task, &parents, issuer, elected, share);
            }
            Input::Postponed(task) => self.postponed(now, &task),
            Input::Adopt { task, child } => self.adopt(now, &task, &child),
            Input::Refuse { peer, task, reason } => self.refuse(peer, task, reason),
            Input::Piece {
                peer,
                request,
                chain,
            } => return Some(self.piece(now, peer, request, &chain)),
            Input::PieceFailed {
                peer,
                request,
                refused,
                fault,
            } => {
                self.piece_failed(now, peer, request, refused, fault);
            }
            Input::Delivered { peer, request } => self.delivered(now, peer, request),
            Input::Uploaded { peer, request } => self.uploads.over(peer, request),
            Input::OriginPiece { task, piece, chain } => {
                return Some(self.origin_piece(now, &task, piece, &chain));
            }
            Input::OriginOver { task, failure } => self.origin_over(now, &task, failure),
            Input::Committed(task) => self.committed(&task),
            Input::WithoutDisk {
                task,
                on_disk,
                budget_bytes,
            } => {
                self.without_disk(now, &task, on_disk, budget_bytes);
            }
            Input::MemoryBudget { task, budget_bytes } => {
                self.memory_budget(now, &task, budget_bytes)
            }
            Input::OnDisk { task, piece } => self.on_disk(&task, piece),
            Input::DiskAgain { task, on_disk } => self.disk_again(now, &task, &on_disk),
            Input::Decide => self.decide(now),
            Input::Serve => self.serve(now),
        }
        None
    }
}
