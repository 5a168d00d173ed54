//! Blobs without bytes, and signatures without keys.

use std::sync::Arc;

use hawker_core::message::Role;
use hawker_core::node::TableSigner;
use hawker_core::piece::{PeerId, PieceIndex, PieceLayout, PieceTable, SignedPrefix};
use hawker_oci::digest::{Algorithm, Chain, ChainValue, Digest};

/// Sizes are multiples of this, so that the last piece, too, ends where a chaining value is.
const BLOCK_BYTES: u64 = 64;

/// A blob: made-up chaining values that end in a true digest.
pub struct Blob {
    /// Its digest.
    pub digest: Digest,
    /// How it is cut.
    pub layout: PieceLayout,
    /// The value after each piece.
    values: Vec<ChainValue>,
}

impl Blob {
    /// Blob number `number`, of `size_bytes` rounded up to whole blocks, and so cut.
    pub fn new(number: u32, size_bytes: u64, layout: fn(u64) -> PieceLayout) -> Self {
        let layout = layout(size_bytes.max(1).next_multiple_of(BLOCK_BYTES));
        let mut chain = Chain::new(Algorithm::Sha256);
        let values: Vec<ChainValue> = (0..layout.count())
            .filter_map(|piece| {
                let mut block = [0; BLOCK_BYTES as usize];
                block[..4].copy_from_slice(&number.to_be_bytes());
                block[4..8].copy_from_slice(&piece.to_be_bytes());
                chain.update(&block);
                chain.value()
            })
            .collect();
        let last = values
            .last()
            .copied()
            .unwrap_or(ChainValue::initial(Algorithm::Sha256));
        let digest = Chain::resume(last, layout.size_bytes()).finish();
        Self {
            digest,
            layout,
            values,
        }
    }

    /// The hash after the bytes of a piece: as they are, or, from a liar, as they are not.
    pub fn chain_after(&self, piece: PieceIndex, right: bool) -> Chain {
        let right = self.values.get(piece as usize).filter(|_| right).copied();
        let value = right.unwrap_or(ChainValue::initial(Algorithm::Sha256));
        Chain::resume(value, self.layout.range(piece).end)
    }
}

/// The id of host `index`; [`index_of`] is the way back.
pub fn peer_id(index: u32) -> PeerId {
    let mut id = [0; 16];
    id[..4].copy_from_slice(&index.to_be_bytes());
    PeerId(id)
}

/// The host of that id.
pub fn index_of(peer: PeerId) -> u32 {
    u32::from_be_bytes([peer.0[0], peer.0[1], peer.0[2], peer.0[3]])
}

/// "Signs" with a sum over the statement. Nobody here forges: liars lie about bytes.
#[derive(Clone)]
pub struct Keys {
    me: PeerId,
    /// Hosts below this index are seeds.
    seeds: u32,
    certificate: Arc<[u8]>,
}

impl Keys {
    /// Of host `me` in a cluster whose first `seeds` hosts are seeds.
    pub fn new(me: u32, seeds: u32) -> Self {
        Self {
            me: peer_id(me),
            seeds,
            certificate: Arc::new([]),
        }
    }
}

/// FNV-1a: the sum need not withstand anybody.
fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

impl TableSigner for Keys {
    fn check(&self, signed: &SignedPrefix, statement: &[u8]) -> Option<Role> {
        let is_seed = index_of(signed.issuer) < self.seeds;
        let good = signed.signature == sum(statement).to_be_bytes();
        good.then_some(if is_seed { Role::Seed } else { Role::Peer })
    }

    fn sign(&self, table: &mut PieceTable, sealed: bool) {
        let signature = sum(&table.statement(sealed, 0, &[])).to_be_bytes().to_vec();
        table.sign(SignedPrefix {
            count: table.values().len() as u32,
            sealed,
            signed_at_s: 0,
            issuer: self.me,
            registries: Vec::new(),
            certificate: Arc::clone(&self.certificate),
            signature,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_pieces_verify_and_wrong_ones_do_not() {
        for size in [1, 300 << 10, 5 << 20] {
            let blob = Blob::new(3, size, PieceLayout::new);
            let mut table = PieceTable::new(blob.digest, blob.layout);
            for piece in 0..blob.layout.count() {
                if let Some(value) = blob.chain_after(piece, true).value() {
                    table.push(value);
                }
            }
            for piece in 0..blob.layout.count() {
                assert_eq!(
                    table.verify(piece, &blob.chain_after(piece, true)),
                    Some(true),
                    "{size} {piece}"
                );
                assert_eq!(
                    table.verify(piece, &blob.chain_after(piece, false)),
                    Some(false),
                    "{size} {piece}"
                );
            }
        }
    }

    #[test]
    fn a_signature_is_good_for_its_own_statement_only() {
        let blob = Blob::new(1, 4 << 20, PieceLayout::new);
        let mut table = PieceTable::new(blob.digest, blob.layout);
        Keys::new(0, 1).sign(&mut table, false);
        let signed = table.signed().unwrap().clone();
        let keys = Keys::new(7, 1);
        assert_eq!(
            keys.check(&signed, &table.statement_of(&signed)),
            Some(Role::Seed)
        );
        assert_eq!(keys.check(&signed, b"another"), None);
    }
}
