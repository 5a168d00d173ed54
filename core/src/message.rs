//! The messages between two peers about pieces. The bytes of pieces are not here: they follow a granted
//! [`Message::Request`].
//!
//! `api` gives these words their form on the wire.

use std::fmt;

use crate::application::{Priority, Purpose};
use crate::piece::{PieceIndex, SignedPrefix};
use crate::right::Bearer;
use crate::share::Share;
use hawker_oci::digest::{ChainValue, Digest};
use hawker_oci::reference::Source;

/// The role of a member, as its certificate names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// A node: takes and gives pieces.
    Peer,
    /// A seed peer: fetches from the origin first and issues piece tables.
    Seed,
    /// A scheduler: never a parent.
    Scheduler,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Peer => "peer",
            Role::Seed => "seed",
            Role::Scheduler => "scheduler",
        })
    }
}

/// Pieces that a peer offers, as said once: in addition to what it offered before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Every piece.
    All,
    /// A bitfield, one bit a piece, lowest bit first.
    Bits(Vec<u8>),
    /// A few pieces.
    Some(Vec<PieceIndex>),
}

impl Offer {
    /// Memory that it takes beside its own size.
    pub fn bytes(&self) -> usize {
        match self {
            Self::All => 0,
            Self::Bits(bits) => bits.len(),
            Self::Some(pieces) => size_of_val(pieces.as_slice()),
        }
    }
}

/// Why a peer can't help with a task, or with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// It does not hold that, and is not getting it.
    NotHeld,
    /// The origin refused it: the HTTP status.
    Origin(u16),
    /// It could not reach the origin.
    OriginUnreachable,
    /// All its upload slots and its queue are taken: try elsewhere.
    Busy,
    /// It is about to stop.
    Draining,
    /// It can't store or relay this task (full disk, unknown length).
    Unable,
}

/// One message between two peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// "Tell me what you hold of this task, now and as it comes. If you are a seed, get it."
    Interest {
        /// The task.
        task: Digest,
        /// The registry and repository where a seed may get it.
        source: Source,
        /// Its size, when known.
        size_bytes: Option<u64>,
        /// With what a seed may read it there. Lent for this one transfer, and to seeds only.
        token: Option<Bearer>,
        /// For whom, and how urgent. Said again when that changes.
        purpose: Purpose,
        /// The two stand in different zones, and the asker takes this share of the pieces; `None`: in the same zone, and all of
        /// them. Said again when that changes.
        far: Option<Share>,
        /// Nobody waits for the task at the asker: it only wants to hear what the other side holds. The other side does not get the
        /// task for its sake. Said again when that changes.
        passive: bool,
        /// Clients at the asker read ranges only. The asker passes on little, and needs to know all that the other side holds.
        /// Said again when that changes.
        partial: bool,
    },
    /// "I offer you these pieces."
    Have {
        /// The task.
        task: Digest,
        /// Its size.
        size_bytes: u64,
        /// The pieces.
        offer: Offer,
    },
    /// "These are values of the piece table."
    Table {
        /// The task.
        task: Digest,
        /// Its size.
        size_bytes: u64,
        /// Index of the first of `values`.
        first: u32,
        /// Values, each after one piece.
        values: Vec<ChainValue>,
        /// The issuer's statement over all values up to the last of these, or further back.
        signed: Option<SignedPrefix>,
    },
    /// "I hold nothing of it yet but am getting it: wait for me."
    Working {
        /// The task.
        task: Digest,
    },
    /// "Do not wait for me."
    Unavailable {
        /// The task.
        task: Digest,
        /// Why.
        reason: Refusal,
    },
    /// "Tell me no more of this task."
    Leave {
        /// The task.
        task: Digest,
    },
    /// "The bytes of this piece that you sent do not match." Whoever sent them looks at its disk.
    Wrong {
        /// The task.
        task: Digest,
        /// The piece.
        piece: PieceIndex,
    },
    /// "Send me this piece." The bytes come under `request`, a number the asker picks, unique on the connection.
    Request {
        /// The asker's number.
        request: u32,
        /// The task.
        task: Digest,
        /// The piece.
        piece: PieceIndex,
        /// Nobody waits for it: serve others first.
        prefetch: bool,
        /// How urgent it is.
        priority: Priority,
    },
    /// "I don't want it any more." Bytes under way are thrown away.
    Cancel {
        /// The number.
        request: u32,
    },
    /// "You don't get it from me."
    Reject {
        /// The number.
        request: u32,
        /// Why.
        reason: Refusal,
    },
}
