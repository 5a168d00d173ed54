//! Bytes in a task's file that came from an origin and that nothing has verified yet.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use hawker_core::byte_set::ByteSet;

/// Loose bytes, and the registry that gave each. Only clients of that registry may see them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Loose {
    by: BTreeMap<Arc<str>, ByteSet>,
}

impl Loose {
    /// A registry gave these bytes, and they have been written.
    pub(crate) fn insert(&mut self, registry: &Arc<str>, range: Range<u64>) {
        self.remove(range.clone());
        self.by
            .entry(Arc::clone(registry))
            .or_default()
            .insert(range);
    }

    /// These bytes count no more.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        self.by
            .values_mut()
            .for_each(|bytes| bytes.remove(range.clone()));
        self.by.retain(|_, bytes| !bytes.is_empty());
    }

    /// The end of the bytes from `at` on that this registry gave; `at` itself where there are none.
    pub(crate) fn end_of(&self, registry: &str, at: u64) -> u64 {
        self.by.get(registry).map_or(at, |bytes| bytes.end_of(at))
    }

    /// The end of the bytes from `at` on that one registry gave, and that registry.
    pub(crate) fn run_at(&self, at: u64) -> Option<(u64, Arc<str>)> {
        let mut runs = self
            .by
            .iter()
            .map(|(registry, bytes)| (bytes.end_of(at), registry));
        runs.find(|(end, _)| *end > at)
            .map(|(end, registry)| (end, Arc::clone(registry)))
    }

    /// Adds all of them to `set`.
    pub(crate) fn add_to(&self, set: &mut ByteSet) {
        self.by
            .values()
            .flat_map(ByteSet::iter)
            .for_each(|range| set.insert(range));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_belongs_to_the_registry_that_gave_it_last() {
        let (a, b): (Arc<str>, Arc<str>) = (Arc::from("a.test"), Arc::from("b.test"));
        let mut loose = Loose::default();
        loose.insert(&a, 0..100);
        loose.insert(&b, 40..60);
        assert_eq!(
            (loose.end_of("a.test", 0), loose.end_of("b.test", 0)),
            (40, 0)
        );
        assert_eq!(loose.run_at(40), Some((60, b)));
        assert_eq!(loose.run_at(60), Some((100, Arc::clone(&a))));
        let mut all = ByteSet::default();
        loose.add_to(&mut all);
        assert_eq!(all.iter().next(), Some(0..100));
        loose.remove(0..50);
        assert_eq!((loose.run_at(0), loose.end_of("c.test", 70)), (None, 70));
    }
}
