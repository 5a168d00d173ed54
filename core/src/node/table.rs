//! Which piece tables count, and for what.

use crate::message::{Offer, Role};
use crate::piece::{PeerId, PieceLayout, PieceTable, SignedPrefix};
use hawker_oci::digest::ChainValue;

/// The use that pieces may have once they match a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trust {
    /// Other peers' disks: an elected peer issued the table and has not sealed it.
    Peers,
    /// Clients.
    Clients,
}

/// Signs for this node and checks what others signed: the shell has the keys.
pub trait TableSigner {
    /// The role of the member who signed, if the signature and its certificate hold.
    fn check(&self, signed: &SignedPrefix, statement: &[u8]) -> Option<Role>;

    /// Signs all values of `table` as this node and attaches the statement.
    fn sign(&self, table: &mut PieceTable, sealed: bool);
}

/// The value of a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    /// It counts: a seed signed it, or the issuer that the scheduler named.
    Counts(Trust),
    /// A member signed it that the scheduler may still name as the issuer.
    Undecided,
    /// The signature or its certificate does not hold.
    Nothing,
}

impl Weight {
    pub(super) fn trust(self) -> Option<Trust> {
        if let Self::Counts(trust) = self {
            Some(trust)
        } else {
            None
        }
    }
}

/// The value of a statement, if the scheduler named this issuer.
pub(super) fn weigh<N: TableSigner>(
    notary: &N,
    signed: &SignedPrefix,
    statement: &[u8],
    named: Option<PeerId>,
) -> Weight {
    match notary.check(signed, statement) {
        None => Weight::Nothing,
        Some(Role::Seed) => Weight::Counts(Trust::Clients),
        Some(_) if named == Some(signed.issuer) => Weight::Counts(if signed.sealed {
            Trust::Clients
        } else {
            Trust::Peers
        }),
        Some(_) => Weight::Undecided,
    }
}

/// Memory for what one peer said of all its tasks and what does not count yet: tables of an issuer that was not named yet, and
/// offers of tasks of unknown size. A table of 100 GiB has 460 KiB here.
pub(super) const UNPROVEN_A_PEER_BYTES: usize = 1 << 20;

/// Offers kept at most while the size is unknown.
const EARLY_OFFERS: usize = 64;

/// The part of a table that one peer sent, until a statement makes it count.
#[derive(Clone, Debug, Default)]
pub(super) struct Unproven {
    size_bytes: u64,
    values: Vec<ChainValue>,
    signed: Option<SignedPrefix>,
    news: bool,
    early: Vec<(u64, Offer)>,
}

impl Unproven {
    /// Takes values that follow, or repeat, the values sent before; another size or a gap starts over. `known`: this
    /// node's own table. A value that is in there is not kept here a second time for each peer that sends it.
    pub(super) fn accept_values(
        &mut self,
        size_bytes: u64,
        first: u32,
        values: Vec<ChainValue>,
        signed: Option<SignedPrefix>,
        known: Option<&PieceTable>,
    ) {
        let first = first as usize;
        // No more than the size allows: nobody has vouched for these yet.
        if first + values.len() > PieceLayout::new(size_bytes).count() as usize {
            return;
        }
        if size_bytes != self.size_bytes || first > self.values.len() {
            self.values.clear();
            self.signed = None;
            let known = known.filter(|table| size_bytes == table.layout().size_bytes());
            match known.and_then(|table| table.values().get(..first)) {
                // It goes on where this node is. Should it have said something else before, its statement does not hold for this.
                Some(counted) => self.values.extend(counted),
                None if first > 0 => return,
                None => {}
            }
        }
        self.size_bytes = size_bytes;
        self.values.truncate(first);
        self.values.extend(values);
        if signed.is_some() {
            self.signed = signed;
        }
        self.news = true;
    }

    /// Memory that it takes.
    pub(super) fn bytes(&self) -> usize {
        let offers = self
            .early
            .iter()
            .map(|(_, offer)| size_of::<Offer>() + offer.bytes());
        self.values.len() * size_of::<ChainValue>() + offers.sum::<usize>()
    }

    /// It does not count, and will not.
    pub(super) fn forget_table(&mut self) {
        self.settle();
        (self.size_bytes, self.signed) = (0, None);
    }

    /// Offers that came before the size was known.
    pub(super) fn early(&mut self, size_bytes: u64, offer: &Offer) {
        if self.early.len() < EARLY_OFFERS {
            self.early.push((size_bytes, offer.clone()));
        }
    }

    pub(super) fn take_early(&mut self) -> Vec<(u64, Offer)> {
        std::mem::take(&mut self.early)
    }

    /// Whether anything came since it last counted.
    pub(super) const fn has_news(&self) -> bool {
        self.news
    }

    /// It counts now, and is in the table.
    pub(super) fn settle(&mut self) {
        self.news = false;
        self.values = Vec::new();
    }

    /// Whether it only says again what `table` has by a statement of the same issuer: most peers pass on the same.
    pub(super) fn repeats(&self, table: &PieceTable) -> bool {
        let (Some(said), Some(known)) = (&self.signed, table.signed()) else {
            return false;
        };
        let older = said.issuer == known.issuer && !said.sealed && said.count <= known.count;
        let values = self.values.get(..said.count as usize);
        (said == known || older)
            && self.size_bytes == table.layout().size_bytes()
            && values.is_some_and(|values| table.values().starts_with(values))
    }

    /// All that is covered by a statement: size, values, statement.
    pub(super) fn complete(&self) -> Option<(u64, Vec<ChainValue>, SignedPrefix)> {
        let signed = self
            .signed
            .as_ref()
            .filter(|s| s.count as usize <= self.values.len())?;
        Some((self.size_bytes, self.values.clone(), signed.clone()))
    }
}
