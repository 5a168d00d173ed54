//! The decisions of the disk cache: which blobs are in use, which of the others are evicted first, and when a blob
//! that was verified long ago is hashed again before it is served.
//!
//! This is policy only. The store tells it what happens and deletes what [`Cache::victims`] names.

use std::collections::BTreeMap;
use std::hash::Hash;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::time::Duration;

use lru::LruCache;

use crate::Time;

/// A client that asks for the same bytes of a blob again this soon probably found them wrong.
pub const RECHECK_WITHIN: Duration = Duration::from_secs(10 * 60);

/// How long bytes that were just hashed and found right are taken for right.
pub const SOUND_FOR: Duration = Duration::from_secs(30);

/// The committed entries of a store in the order of their last use, and the leases on them.
///
/// A lease keeps an entry from becoming a victim. It belongs to the key, not to the entry: it outlives a
/// [`Cache::remove`], so that a reader of a removed entry never releases somebody else's lease.
#[derive(Clone, Debug)]
pub struct Cache<K> {
    entries: BTreeMap<K, Entry>,
    /// The keys of `entries` by last use, the oldest first.
    by_use: BTreeMap<Use, K>,
    /// Leases that are out, by key; never zero.
    leases: BTreeMap<K, u32>,
    total_bytes: u64,
    uses: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    size_bytes: u64,
    last_use: Use,
}

/// When an entry was used last. The counter keeps uses at the same time apart, in their order.
type Use = (Time, u64);

impl<K> Default for Cache<K> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            by_use: BTreeMap::new(),
            leases: BTreeMap::new(),
            total_bytes: 0,
            uses: 0,
        }
    }
}

impl<K: Clone + Ord> Cache<K> {
    /// A cache that holds nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes an entry, used now. An entry that was there already gets the new size and keeps its leases.
    pub fn insert(&mut self, key: K, size_bytes: u64, now: Time) {
        self.remove(&key);
        let last_use = self.next_use(now);
        self.entries.insert(
            key.clone(),
            Entry {
                size_bytes,
                last_use,
            },
        );
        self.by_use.insert(last_use, key);
        self.total_bytes = self.total_bytes.saturating_add(size_bytes);
    }

    /// Forgets an entry, leased or not; its size, when it was there.
    pub fn remove(&mut self, key: &K) -> Option<u64> {
        let entry = self.entries.remove(key)?;
        self.by_use.remove(&entry.last_use);
        self.total_bytes = self.total_bytes.saturating_sub(entry.size_bytes);
        Some(entry.size_bytes)
    }

    /// Notes that an entry was used now; `false` when there is none.
    pub fn touch(&mut self, key: &K, now: Time) -> bool {
        let last_use = self.next_use(now);
        let Some(entry) = self.entries.get_mut(key) else {
            return false;
        };
        self.by_use.remove(&entry.last_use);
        entry.last_use = last_use;
        self.by_use.insert(last_use, key.clone());
        true
    }

    /// The size of an entry in bytes, as it was said to be; `None` when there is none.
    pub fn size_bytes(&self, key: &K) -> Option<u64> {
        self.entries.get(key).map(|entry| entry.size_bytes)
    }

    /// Takes a lease: until as many [`Cache::release`]s, the entry is no victim. It counts as a use. `false`, and no
    /// lease, when there is no such entry.
    pub fn lease(&mut self, key: &K, now: Time) -> bool {
        let there = self.touch(key, now);
        if there {
            *self.leases.entry(key.clone()).or_default() += 1;
        }
        there
    }

    /// Gives a lease back. Nothing happens when none is out.
    pub fn release(&mut self, key: &K) {
        let Some(count) = self.leases.get_mut(key) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            self.leases.remove(key);
        }
    }

    /// Whether there is such an entry. This is no use of it.
    pub fn contains(&self, key: &K) -> bool {
        self.entries.contains_key(key)
    }

    /// Whether a lease on this key is out.
    pub fn is_leased(&self, key: &K) -> bool {
        self.leases.contains_key(key)
    }

    /// The sizes of all entries together.
    pub const fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The sizes together of all entries that could go now.
    pub fn evictable_bytes(&self) -> u64 {
        let leased = self
            .leases
            .keys()
            .filter_map(|key| self.entries.get(key))
            .map(|entry| entry.size_bytes);
        self.total_bytes.saturating_sub(leased.sum())
    }

    /// Which entries to delete to gain `free_bytes_wanted`: the longest unused first, none that is leased, and no more
    /// than it takes. All that may go, when even they are too few.
    pub fn victims(&self, free_bytes_wanted: u64) -> Vec<K> {
        let mut gained = 0u64;
        let mut victims = Vec::new();
        for key in self.by_use.values().filter(|key| !self.is_leased(key)) {
            if gained >= free_bytes_wanted {
                break;
            }
            gained =
                gained.saturating_add(self.entries.get(key).map_or(0, |entry| entry.size_bytes));
            victims.push(key.clone());
        }
        victims
    }

    fn next_use(&mut self, now: Time) -> Use {
        self.uses += 1;
        (now, self.uses)
    }
}

/// How many bytes to delete now, given what the file system and the cache hold.
///
/// The disk counts as full when more than `high_percent` of it is used, by whomever; then so much goes that `low_percent`
/// is used, and it is quiet for a while. `held_bytes` is the cache's own part: never more than that can go, and what of it
/// is above `max_bytes` goes in any case.
///
/// `total_bytes` and `available_bytes` (what an ordinary user may still write) come from `statvfs`.
pub fn bytes_to_free(
    total_bytes: u64,
    available_bytes: u64,
    held_bytes: u64,
    high_percent: u8,
    low_percent: u8,
    max_bytes: Option<u64>,
) -> u64 {
    let used = total_bytes.saturating_sub(available_bytes);
    let over_disk = if used > percent_of(total_bytes, high_percent) {
        used.saturating_sub(percent_of(total_bytes, low_percent.min(high_percent)))
    } else {
        0
    };
    let over_max = max_bytes.map_or(0, |max| held_bytes.saturating_sub(max));
    over_disk.max(over_max).min(held_bytes)
}

/// Whether a blob can be kept at all: it fits below `max_bytes`, and on the disk below `high_percent`, once everything that
/// may go ([`Cache::evictable_bytes`]) has gone. One that can't is passed on without being stored, and evicts nothing.
pub fn admits(
    size_bytes: u64,
    total_bytes: u64,
    available_bytes: u64,
    evictable_bytes: u64,
    high_percent: u8,
    max_bytes: Option<u64>,
) -> bool {
    let reserved = total_bytes.saturating_sub(percent_of(total_bytes, high_percent));
    let room = available_bytes
        .saturating_add(evictable_bytes)
        .saturating_sub(reserved);
    size_bytes <= room && max_bytes.is_none_or(|max| size_bytes <= max)
}

/// `percent` of `whole`, rounded down; all of it from 100 on.
fn percent_of(whole: u64, percent: u8) -> u64 {
    let part = u128::from(whole) * u128::from(percent.min(100)) / 100;
    u64::try_from(part).unwrap_or(whole)
}

/// Remembers which client `C` asked for which bytes of which blob `K`, to notice those who ask again.
///
/// A runtime keeps what it pulled. One that asks for the same again within [`RECHECK_WITHIN`] may have got bytes that did not
/// match: they are hashed again before they are served, and thrown away if the disk let them rot.
/// Memory is bounded: beyond the capacity the oldest questions are forgotten.
#[derive(Debug)]
pub struct Recheck<C: Hash + Eq, K: Hash + Eq> {
    asked: LruCache<(C, K, Range<u64>), Time>,
    sound: LruCache<K, (Range<u64>, Time)>,
}

impl<C: Hash + Eq, K: Hash + Eq> Recheck<C, K> {
    /// A memory of at most `capacity` questions.
    pub fn new(capacity: NonZeroUsize) -> Self {
        Self {
            asked: LruCache::new(capacity),
            sound: LruCache::new(capacity),
        }
    }

    /// Notes that `client` asks for these bytes of `task`. `true`: hash them first.
    pub fn asked(&mut self, client: C, task: K, bytes: &Range<u64>, now: Time) -> bool {
        let sound = self.found(&task, now);
        let sound =
            sound.is_some_and(|(sound, _)| sound.start <= bytes.start && bytes.end <= sound.end);
        let before = self.asked.put((client, task, bytes.clone()), now);
        before.is_some_and(|at| now.since(at) < RECHECK_WITHIN) && !sound
    }

    /// Notes that these bytes were hashed and found right: for [`SOUND_FOR`] none of them need be hashed again, so that a client
    /// that asks over and over does not keep a core busy.
    pub fn found_sound(&mut self, task: K, bytes: Range<u64>, now: Time) {
        let found = match self.found(&task, now) {
            Some((known, at)) if known.start <= bytes.end && bytes.start <= known.end => {
                (known.start.min(bytes.start)..known.end.max(bytes.end), at)
            }
            _ => (bytes, now),
        };
        self.sound.put(task, found);
    }

    /// The range that was found intact lately, and the time of that check.
    fn found(&self, task: &K, now: Time) -> Option<(Range<u64>, Time)> {
        self.sound
            .peek(task)
            .filter(|(_, at)| now.since(*at) < SOUND_FOR)
            .cloned()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const GB: u64 = 1_000_000_000;

    fn at(seconds: u64) -> Time {
        Time(Duration::from_secs(seconds))
    }

    #[test]
    fn the_longest_unused_go_first_and_no_more_than_it_takes() {
        let mut cache = Cache::new();
        for (second, key) in ["a", "b", "c", "d"].into_iter().enumerate() {
            cache.insert(key, 10, at(second as u64));
        }
        cache.touch(&"a", at(9));
        assert_eq!(cache.victims(0), Vec::<&str>::new());
        assert_eq!(cache.victims(1), ["b"]);
        assert_eq!(cache.victims(10), ["b"]);
        assert_eq!(cache.victims(11), ["b", "c"]);
        assert_eq!(cache.victims(1000), ["b", "c", "d", "a"]);
    }

    #[test]
    fn uses_at_the_same_time_keep_their_order() {
        let mut cache = Cache::new();
        for key in [3, 1, 2] {
            cache.insert(key, 1, at(0));
        }
        assert_eq!(cache.victims(3), [3, 1, 2]);
    }

    #[test]
    fn an_entry_is_safe_until_its_last_lease_is_back() {
        let mut cache = Cache::new();
        cache.insert("a", 10, at(0));
        assert!(cache.lease(&"a", at(1)) && cache.lease(&"a", at(2)));
        cache.release(&"a");
        assert!(cache.victims(10).is_empty());
        assert_eq!(cache.evictable_bytes(), 0);
        cache.release(&"a");
        assert_eq!(cache.victims(10), ["a"]);
    }

    #[test]
    fn a_reader_of_a_removed_entry_does_not_release_its_successor() {
        let mut cache = Cache::new();
        cache.insert("a", 10, at(0));
        assert!(cache.lease(&"a", at(0)));
        assert_eq!(cache.remove(&"a"), Some(10));
        assert!(!cache.lease(&"a", at(1)), "what is gone can't be leased");
        cache.insert("a", 20, at(2));
        assert!(cache.lease(&"a", at(3)));
        cache.release(&"a");
        assert!(cache.is_leased(&"a"));
        cache.release(&"a");
        assert!(!cache.is_leased(&"a"));
        cache.release(&"a");
        assert_eq!(cache.total_bytes(), 20);
    }

    #[test]
    fn watermarks() {
        // total, available, held, high, low, max -> to free
        let table = [
            (100 * GB, 50 * GB, 10 * GB, 90, 80, None, 0),
            (100 * GB, 10 * GB, 50 * GB, 90, 80, None, 0), // exactly at the high mark
            (100 * GB, 10 * GB - 1, 50 * GB, 90, 80, None, 10 * GB + 1), // just above: down to the low mark
            (100 * GB, 0, 50 * GB, 90, 80, None, 20 * GB),
            (100 * GB, 0, 5 * GB, 90, 80, None, 5 * GB), // others filled the disk: all of ours, no more
            (100 * GB, 50 * GB, 30 * GB, 90, 80, Some(20 * GB), 10 * GB),
            (100 * GB, 50 * GB, 20 * GB, 90, 80, Some(20 * GB), 0),
            (100 * GB, 0, 50 * GB, 90, 80, Some(45 * GB), 20 * GB), // the greater of the two
            (100 * GB, 50 * GB, 20 * GB, 90, 80, Some(0), 20 * GB),
            (100 * GB, 5 * GB, 50 * GB, 90, 99, None, 5 * GB), // a low mark above the high one counts as that
            (0, 0, 7, 90, 80, None, 0),                        // a file system that tells nothing
            (100, 200, 7, 90, 80, None, 0),
            (u64::MAX, 0, u64::MAX, 100, 100, None, 0),
            (u64::MAX, 0, u64::MAX, 0, 0, None, u64::MAX),
        ];
        for (total, available, held, high, low, max, expected) in table {
            let freed = bytes_to_free(total, available, held, high, low, max);
            assert_eq!(
                freed, expected,
                "{total} {available} {held} {high} {low} {max:?}"
            );
        }
    }

    #[test]
    fn admission() {
        // size, total, available, evictable, high, max -> admitted
        let table = [
            (10 * GB, 100 * GB, 50 * GB, 0, 90, None, true),
            (40 * GB, 100 * GB, 50 * GB, 0, 90, None, true),
            (40 * GB + 1, 100 * GB, 50 * GB, 0, 90, None, false),
            (45 * GB, 100 * GB, 50 * GB, 5 * GB, 90, None, true),
            (10 * GB, 100 * GB, 50 * GB, 0, 90, Some(10 * GB - 1), false),
            (0, 100 * GB, 0, 0, 90, None, true),
            (1, 0, 0, 0, 90, None, false),
        ];
        for (size, total, available, evictable, high, max, expected) in table {
            let admitted = admits(size, total, available, evictable, high, max);
            assert_eq!(
                admitted, expected,
                "{size} {total} {available} {evictable} {high} {max:?}"
            );
        }
    }

    #[test]
    fn the_same_client_asking_again_soon_is_noticed() {
        let mut recheck = Recheck::new(NonZeroUsize::new(8).unwrap());
        let window = RECHECK_WITHIN.as_secs();
        assert!(!recheck.asked("a", 1, &(0..9), at(0)));
        assert!(!recheck.asked("b", 1, &(0..9), at(1)), "another client");
        assert!(!recheck.asked("a", 2, &(0..9), at(2)), "another blob");
        assert!(!recheck.asked("a", 1, &(1..9), at(2)), "other bytes");
        assert!(recheck.asked("a", 1, &(0..9), at(window - 1)));
        assert!(
            recheck.asked("a", 1, &(0..9), at(2 * window - 2)),
            "the window starts anew with each question"
        );
        assert!(
            !recheck.asked("a", 1, &(0..9), at(3 * window - 2)),
            "too long ago"
        );
    }

    #[test]
    fn what_was_just_found_sound_is_not_hashed_again() {
        let mut recheck = Recheck::new(NonZeroUsize::new(8).unwrap());
        for range in [2..8, 3..7, 2..9] {
            recheck.asked("a", 1, &range, at(0));
        }
        recheck.found_sound(1, 2..8, at(10));
        let later = 10 + SOUND_FOR.as_secs();
        assert!(!recheck.asked("a", 1, &(2..8), at(later - 1)));
        assert!(
            !recheck.asked("a", 1, &(3..7), at(later - 1)),
            "a part of it"
        );
        assert!(
            recheck.asked("a", 1, &(2..9), at(later - 1)),
            "more than that"
        );
        recheck.found_sound(1, 7..9, at(later - 1));
        assert!(
            !recheck.asked("a", 1, &(2..9), at(later - 1)),
            "both together"
        );
        assert!(recheck.asked("a", 1, &(2..8), at(later)));
    }

    #[test]
    fn the_memory_of_questions_is_bounded() {
        let mut recheck = Recheck::new(NonZeroUsize::new(8).unwrap());
        for task in 0..1000 {
            recheck.asked("a", task, &(0..9), at(0));
            recheck.found_sound(task, 0..9, at(0));
        }
        assert_eq!((recheck.asked.len(), recheck.sound.len()), (8, 8));
        assert!(
            !recheck.asked("a", 0, &(0..9), at(SOUND_FOR.as_secs())),
            "forgotten"
        );
        assert!(
            recheck.asked("a", 999, &(0..9), at(SOUND_FOR.as_secs())),
            "remembered"
        );
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u8, u64),
        Remove(u8),
        Lease(u8),
        Release(u8),
        Touch(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let key = 0..12u8;
        prop_oneof![
            (key.clone(), 0..100u64).prop_map(|(key, size)| Step::Insert(key, size)),
            key.clone().prop_map(Step::Remove),
            key.clone().prop_map(Step::Lease),
            key.clone().prop_map(Step::Release),
            key.prop_map(Step::Touch),
        ]
    }

    /// The oracle: a list in the order of use, the oldest first, and a list with one item for each lease.
    #[derive(Default)]
    struct Naive {
        entries: Vec<(u8, u64)>,
        leases: Vec<u8>,
    }

    impl Naive {
        fn take(&mut self, key: u8) -> Option<(u8, u64)> {
            let place = self.entries.iter().position(|(k, _)| *k == key)?;
            Some(self.entries.remove(place))
        }

        fn touch(&mut self, key: u8) -> bool {
            let entry = self.take(key);
            self.entries.extend(entry);
            entry.is_some()
        }

        fn apply(&mut self, step: &Step) -> bool {
            match *step {
                Step::Insert(key, size) => {
                    self.take(key);
                    self.entries.push((key, size));
                    true
                }
                Step::Remove(key) => self.take(key).is_some(),
                Step::Touch(key) => self.touch(key),
                Step::Lease(key) => {
                    let there = self.touch(key);
                    self.leases.extend(there.then_some(key));
                    there
                }
                Step::Release(key) => {
                    let place = self.leases.iter().position(|k| *k == key);
                    place.map(|place| self.leases.remove(place));
                    true
                }
            }
        }

        fn victims(&self, wanted: u64) -> Vec<u8> {
            let free: Vec<_> = self
                .entries
                .iter()
                .filter(|(key, _)| !self.leases.contains(key))
                .collect();
            let enough = (0..=free.len())
                .find(|n| free[..*n].iter().map(|(_, size)| size).sum::<u64>() >= wanted);
            free[..enough.unwrap_or(free.len())]
                .iter()
                .map(|(key, _)| *key)
                .collect()
        }
    }

    fn apply(cache: &mut Cache<u8>, step: &Step, now: Time) -> bool {
        match *step {
            Step::Insert(key, size) => {
                cache.insert(key, size, now);
                true
            }
            Step::Remove(key) => cache.remove(&key).is_some(),
            Step::Lease(key) => cache.lease(&key, now),
            Step::Touch(key) => cache.touch(&key, now),
            Step::Release(key) => {
                cache.release(&key);
                true
            }
        }
    }

    proptest! {
        #[test]
        fn the_cache_does_what_a_plain_list_does(
            steps in prop::collection::vec((step(), 0..2u64), 0..200),
            wanted in 0..600u64,
        ) {
            let (mut cache, mut naive, mut now) = (Cache::new(), Naive::default(), 0);
            for (step, pause) in &steps {
                now += pause;
                prop_assert_eq!(apply(&mut cache, step, at(now)), naive.apply(step));
                prop_assert_eq!(cache.victims(wanted), naive.victims(wanted));
                prop_assert_eq!(cache.total_bytes(), naive.entries.iter().map(|(_, size)| size).sum::<u64>());
                prop_assert_eq!(cache.len(), naive.entries.len());
                let sizes = naive.entries.iter().filter(|(key, _)| !naive.leases.contains(key)).map(|(_, size)| size);
                prop_assert_eq!(cache.evictable_bytes(), sizes.sum::<u64>());
            }
            let all: BTreeSet<u8> = cache.victims(u64::MAX).into_iter().collect();
            prop_assert!(all.iter().all(|key| cache.contains(key) && !cache.is_leased(key)));
        }

        #[test]
        fn freeing_what_is_asked_reaches_the_low_mark_and_then_nothing_more(
            total in 1..=u64::MAX, used in any::<u64>(), held in any::<u64>(),
            high in 0..=100u8, low in 0..=100u8, max in prop::option::of(any::<u64>()),
        ) {
            let used = used % total;
            let held = held.min(used);
            let available = total - used;
            let free = bytes_to_free(total, available, held, high, low, max);
            prop_assert!(free <= held);
            prop_assert_eq!(bytes_to_free(total, available + free, held - free, high, low, max), 0);
        }
    }
}
