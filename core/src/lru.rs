//! Maps that forget the entry used longest ago.

use std::hash::Hash;
use std::num::NonZeroUsize;

use ::lru::LruCache;

/// An empty map of at most `capacity` entries, whose memory grows with them.
///
/// [`LruCache::new`] reserves memory for all entries at once. A few entries then touch most of its pages, since hashes scatter
/// them: a daemon would hold that memory for good after one busy minute.
pub fn bounded<K: Hash + Eq, V>(capacity: NonZeroUsize) -> LruCache<K, V> {
    let mut map = LruCache::unbounded();
    map.resize(capacity);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_keeps_to_its_capacity() {
        let mut map = bounded(NonZeroUsize::new(2).unwrap());
        for key in 0..5 {
            map.put(key, key);
        }
        let kept: Vec<i32> = map.iter().map(|(key, _)| *key).collect();
        assert_eq!(kept, [4, 3]);
    }
}
