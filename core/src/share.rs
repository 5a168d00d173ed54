//! Which pieces a peer takes from other zones. A link between zones is dear: each piece is to come over it once, by one of the
//! zone's gateways, and the others have it from there. See [`crate::swarm`] for who becomes a gateway.

use std::fmt;

use crate::piece::PieceIndex;

/// Into how many shares a task is cut: gateways of one zone at most.
pub const SHARES: u32 = 8;

/// Some of a task's [`SHARES`] shares, one bit each. Piece `p` is in share `p % SHARES`: so each share is everywhere in the blob, and
/// all gateways get on alike while it comes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Share(u8);

impl Share {
    /// All pieces.
    pub const ALL: Self = Self(u8::MAX);
    /// No piece.
    pub const NONE: Self = Self(0);

    /// From the wire: bits past [`SHARES`] say nothing.
    pub const fn from_bits(bits: u32) -> Self {
        Self((bits & u8::MAX as u32) as u8)
    }

    /// For the wire.
    pub fn bits(self) -> u32 {
        u32::from(self.0)
    }

    /// These, by number.
    pub fn of(shares: impl IntoIterator<Item = usize>) -> Self {
        Self::from_bits(
            shares
                .into_iter()
                .fold(0, |bits, share| bits | 1 << (share as u32 % SHARES)),
        )
    }

    /// Whether a piece is in it.
    pub const fn contains(self, piece: PieceIndex) -> bool {
        self.0 >> (piece % SHARES) & 1 == 1
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Share({:08b})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_of_a_zone_are_all_pieces_and_none_twice() {
        let shares: Vec<Share> = (0..SHARES as usize).map(|n| Share::of([n])).collect();
        for piece in 0..100 {
            assert_eq!(
                shares.iter().filter(|share| share.contains(piece)).count(),
                1,
                "{piece}"
            );
            assert!(Share::ALL.contains(piece) && !Share::NONE.contains(piece));
        }
        assert_eq!(Share::of(0..SHARES as usize), Share::ALL);
        assert_eq!(Share::from_bits(0x1_05), Share::of([0, 2]));
    }
}
