//! One fetch for all: a caller that asks for something under way waits for it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OnceCell;

/// The fetches under way, by key: as many entries as there are keys that somebody waits for.
pub(crate) struct Coalesced<K, V>(Mutex<HashMap<K, Fetch<V>>>);

struct Fetch<V> {
    waiting: usize,
    result: Arc<OnceCell<V>>,
}

impl<K, V> Default for Coalesced<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Clone + Eq + Hash, V: Clone> Coalesced<K, V> {
    /// The result of `fetch`; of many callers at once only one runs it. If that one goes away, the next one runs it.
    pub(crate) async fn run(&self, key: K, fetch: impl Future<Output = V>) -> V {
        let (result, _waiting) = self.join(key);
        result.get_or_init(|| fetch).await.clone()
    }

    fn join(&self, key: K) -> (Arc<OnceCell<V>>, Waiting<'_, K, V>) {
        let mut all = self.all();
        let fetch = all.entry(key.clone()).or_insert_with(|| Fetch {
            waiting: 0,
            result: Arc::default(),
        });
        fetch.waiting += 1;
        (Arc::clone(&fetch.result), Waiting { all: self, key })
    }

    fn all(&self) -> MutexGuard<'_, HashMap<K, Fetch<V>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller that waits for a fetch. The last caller to go removes the entry.
struct Waiting<'a, K: Clone + Eq + Hash, V: Clone> {
    all: &'a Coalesced<K, V>,
    key: K,
}

impl<K: Clone + Eq + Hash, V: Clone> Drop for Waiting<'_, K, V> {
    fn drop(&mut self) {
        let mut all = self.all.all();
        if let Some(fetch) = all.get_mut(&self.key) {
            fetch.waiting -= 1;
            if fetch.waiting == 0 {
                all.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    use std::time::Duration;

    use tokio::time::{sleep, timeout};

    use super::*;

    #[tokio::test]
    async fn one_fetches_for_all_and_the_next_one_if_it_goes_away() {
        let (coalesced, fetches) = (Arc::new(Coalesced::default()), Arc::new(AtomicU32::new(0)));
        let fetch = |fetches: Arc<AtomicU32>| async move {
            sleep(Duration::from_millis(50)).await;
            fetches.fetch_add(1, Relaxed) + 1
        };
        let first = coalesced.run("a", fetch(Arc::clone(&fetches)));
        assert!(timeout(Duration::from_millis(5), first).await.is_err());
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..10 {
            let (coalesced, fetches) = (Arc::clone(&coalesced), Arc::clone(&fetches));
            all.spawn(async move { coalesced.run("a", fetch(fetches)).await });
        }
        assert_eq!(all.join_all().await, [1; 10]);
        assert!(coalesced.all().is_empty());
        assert_eq!(coalesced.run("a", fetch(fetches)).await, 2);
    }
}
