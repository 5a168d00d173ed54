//! A map by peer that is looked into all the time: with each piece of news, four times.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::piece::PeerId;

/// A map by peer. Its order has no meaning, but is the same whenever the same happened before.
pub type PeerMap<T> = HashMap<PeerId, T, BuildHasherDefault<PeerHasher>>;

/// An odd number whose bits look drawn by lot.
const SPREADS: u64 = 0x9e37_79b9_7f4a_7c15;

/// Ids are digests of keys that the cluster's authority has certified: they are spread already, and nobody picks them to collide.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeerHasher(u64);

impl Hasher for PeerHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(SPREADS);
    }

    fn write_usize(&mut self, _length: usize) {}

    fn finish(&self) -> u64 {
        let mixed = (self.0 ^ self.0 >> 32).wrapping_mul(SPREADS);
        mixed ^ mixed >> 32
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::hash::BuildHasher;

    use super::*;

    #[test]
    fn ids_that_differ_little_are_spread_as_well() {
        let map = PeerMap::<()>::default();
        let place = |n: u32, at: usize| {
            let mut id = [0; 16];
            id[at..at + 4].copy_from_slice(&n.to_be_bytes());
            map.hasher().hash_one(PeerId(id)) % 1024
        };
        for at in [0, 6, 12] {
            let places: BTreeSet<u64> = (0..1024).map(|n| place(n, at)).collect();
            assert!(places.len() > 550, "{at}: {}", places.len());
        }
    }
}
