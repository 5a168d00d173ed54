//! Connection slots: the connections of this node to each place that gives blobs, and the experience with each place.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::lru::LruCache;
use hawker_core::lru;
use hawker_core::origin_reads::Experience;

/// Connections of this node to one place at most, for all tasks together. The first one of each task is not counted.
const CONNECTIONS_OF_PLACE: usize = 32;

/// Places whose earlier reads are remembered.
const PLACES_REMEMBERED: NonZeroUsize = NonZeroUsize::new(256).expect("more than none");

/// Connections to each place, for all tasks of this node together.
#[derive(Clone, Default)]
pub(in crate::driver) struct Slots {
    places: Arc<Mutex<Places>>,
}

struct Places {
    taken: HashMap<String, usize>,
    experience: LruCache<String, Experience>,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            taken: HashMap::new(),
            experience: lru::bounded(PLACES_REMEMBERED),
        }
    }
}

/// One connection's share; dropping it frees it.
pub(super) struct Slot {
    of: Slots,
    place: String,
}

impl Slots {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn experience(&self, place: &str) -> Experience {
        self.places()
            .experience
            .get(place)
            .copied()
            .unwrap_or_default()
    }

    pub(super) fn learn(&self, place: &str, experience: Experience) {
        let mut places = self.places();
        match places.experience.get_mut(place) {
            Some(known) => *known = experience,
            None => drop(places.experience.put(place.to_owned(), experience)),
        }
    }

    /// Connections that may still be opened.
    pub(super) fn left(&self, place: &str) -> usize {
        CONNECTIONS_OF_PLACE.saturating_sub(self.places().taken.get(place).copied().unwrap_or(0))
    }

    pub(super) fn take(&self, place: &str) -> Option<Slot> {
        let mut places = self.places();
        let count = places.taken.entry(place.to_owned()).or_default();
        (*count < CONNECTIONS_OF_PLACE).then(|| {
            *count += 1;
            Slot {
                of: self.clone(),
                place: place.to_owned(),
            }
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let taken = &mut self.of.places().taken;
        if let Some(count) = taken.get_mut(&self.place) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                taken.remove(&self.place);
            }
        }
    }
}
