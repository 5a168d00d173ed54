//! All snapshots, and the decisions about them: which request is granted, and which record follows from it.
//!
//! A `plan_*` function changes nothing. It returns the one record that is to be written. The caller makes the record durable, then
//! calls [`Catalog::put`] or [`Catalog::forget`]. The rules are those of containerd's own snapshotters.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// Labels by name.
pub type Labels = BTreeMap<String, String>;

/// A snapshot's number: the name of its record and of its folder.
pub type Id = u64;

/// containerd's bound on one label, name and value together.
const LABEL_MAX_BYTES: usize = 4096;
/// The longest name of a snapshot. containerd's names are below 300 bytes.
const NAME_MAX_BYTES: usize = 4096;
/// The longest chain of layers. The kernel's overlay takes 500 lower folders.
pub const CHAIN_MAX: usize = 500;
/// Labels that ask for other owners of the files. Only a snapshotter that offers `remap-ids` gets them.
const ID_MAPPINGS: [&str; 2] = [
    "containerd.io/snapshot/uidmapping",
    "containerd.io/snapshot/gidmapping",
];

/// The state of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only, never a parent.
    View,
    /// Writable, never a parent.
    Active,
    /// Read-only, may be a parent.
    Committed,
}

impl Kind {
    /// Its name in the filters of `List`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// The space of a snapshot on disk without its parents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes.
    pub size_bytes: u64,
    /// Files and folders.
    pub inodes: u64,
}

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its number, which stays the same when it is committed.
    pub id: Id,
    /// Its key, or its name once it is committed.
    pub name: String,
    /// The name of the committed snapshot below it.
    pub parent: Option<String>,
    /// Its state.
    pub kind: Kind,
    /// Labels that containerd gave it.
    pub labels: Labels,
    /// The time when it was made or committed.
    pub created: SystemTime,
    /// The time of the last change.
    pub updated: SystemTime,
    /// Measured when it was committed.
    pub usage: Option<Usage>,
}

/// The reason why a request is not granted. Repeating the same request changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No snapshot has the name.
    #[error("snapshot {0} does not exist")]
    NotFound(String),
    /// A snapshot has the name already.
    #[error("snapshot {0} exists already")]
    AlreadyExists(String),
    /// The snapshot's state does not allow it.
    #[error("{0}")]
    Precondition(String),
    /// The request is wrong in itself.
    #[error("{0}")]
    Invalid(String),
}

/// A request for a new snapshot.
#[derive(Clone, Debug)]
pub struct Creation {
    /// [`Kind::Active`] or [`Kind::View`].
    pub kind: Kind,
    /// The new key.
    pub key: String,
    /// The committed snapshot below; empty for none.
    pub parent: String,
    /// Its labels.
    pub labels: Labels,
}

/// A request to commit an active snapshot.
#[derive(Clone, Debug)]
pub struct Committal {
    /// The active snapshot.
    pub key: String,
    /// The name that it is to have.
    pub name: String,
    /// The parent that containerd expects; empty if it expects none in particular.
    pub parent: String,
    /// Its labels from now on.
    pub labels: Labels,
}

/// All snapshots.
#[derive(Debug, Default)]
pub struct Catalog {
    by_name: BTreeMap<String, Record>,
    /// Snapshots directly above a name, where there are any.
    children: HashMap<String, usize>,
}

impl Catalog {
    /// A snapshot by its name.
    ///
    /// # Errors
    /// [`Refusal::NotFound`].
    pub fn get(&self, name: &str) -> Result<&Record, Refusal> {
        self.by_name
            .get(name)
            .ok_or_else(|| Refusal::NotFound(name.to_owned()))
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Record> {
        self.by_name.values()
    }

    /// The numbers of the snapshots below one, from its parent down.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] if a record of the chain is missing, [`Refusal::Precondition`] if the chain is longer than
    /// [`CHAIN_MAX`].
    pub fn ancestors(&self, record: &Record) -> Result<Vec<Id>, Refusal> {
        let mut ids = Vec::new();
        let mut next = record.parent.as_deref();
        while let Some(name) = next {
            if ids.len() == CHAIN_MAX {
                return Err(Refusal::Precondition(format!(
                    "snapshot {} has more than {CHAIN_MAX} layers, which overlay cannot mount",
                    record.name
                )));
            }
            let parent = self.get(name)?;
            ids.push(parent.id);
            next = parent.parent.as_deref();
        }
        Ok(ids)
    }

    /// A new snapshot with the number `id`.
    ///
    /// # Errors
    /// When the key is taken, the parent is missing or not committed, or a label cannot be served.
    pub fn plan_create(
        &self,
        request: Creation,
        id: Id,
        now: SystemTime,
    ) -> Result<Record, Refusal> {
        check_name(&request.key)?;
        check_labels(&request.labels)?;
        if self.by_name.contains_key(&request.key) {
            return Err(Refusal::AlreadyExists(request.key));
        }
        let parent = (!request.parent.is_empty()).then_some(request.parent);
        if let Some(parent) = &parent
            && self.get(parent)?.kind != Kind::Committed
        {
            return Err(Refusal::Invalid(format!(
                "parent {parent} is not committed; commit it first"
            )));
        }
        let record = Record {
            id,
            name: request.key,
            parent,
            kind: request.kind,
            labels: kept(request.labels),
            created: now,
            updated: now,
            usage: None,
        };
        self.ancestors(&record)?;
        Ok(record)
    }

    /// An active snapshot as it is after the commit.
    ///
    /// # Errors
    /// When the key is missing or not active, the name is taken, or the parent is another one.
    pub fn plan_commit(
        &self,
        request: Committal,
        usage: Usage,
        now: SystemTime,
    ) -> Result<Record, Refusal> {
        check_name(&request.name)?;
        check_labels(&request.labels)?;
        if self.by_name.contains_key(&request.name) {
            return Err(Refusal::AlreadyExists(request.name));
        }
        let active = self.active(&request.key)?;
        if !request.parent.is_empty() && active.parent.as_deref() != Some(&request.parent) {
            return Err(Refusal::Invalid(format!(
                "snapshot {} was not prepared on parent {}, and this snapshotter does not rebase",
                request.key, request.parent
            )));
        }
        Ok(Record {
            id: active.id,
            name: request.name,
            parent: active.parent.clone(),
            kind: Kind::Committed,
            labels: kept(request.labels),
            created: now,
            updated: now,
            usage: Some(usage),
        })
    }

    /// An active snapshot by its key.
    ///
    /// # Errors
    /// When it is missing or not active.
    pub fn active(&self, key: &str) -> Result<&Record, Refusal> {
        let record = self.get(key)?;
        if record.kind == Kind::Active {
            return Ok(record);
        }
        Err(Refusal::Precondition(format!(
            "snapshot {key} is not active"
        )))
    }

    /// The snapshot that is to be removed.
    ///
    /// # Errors
    /// When it is missing or another snapshot lies on it.
    pub fn plan_remove(&self, name: &str) -> Result<&Record, Refusal> {
        let record = self.get(name)?;
        if self.children.contains_key(name) {
            return Err(Refusal::Precondition(format!(
                "snapshot {name} is the parent of others; remove them first"
            )));
        }
        Ok(record)
    }

    /// A snapshot with other labels. `paths` are those of a field mask: none or `labels` for all labels, `labels.NAME` for one,
    /// which an empty value removes.
    ///
    /// # Errors
    /// When it is missing, or a path names a field that never changes.
    pub fn plan_update(
        &self,
        name: &str,
        labels: &Labels,
        paths: &[String],
        now: SystemTime,
    ) -> Result<Record, Refusal> {
        let mut record = self.get(name)?.clone();
        if paths.is_empty() {
            record.labels.clone_from(labels);
        }
        for path in paths {
            if path == "labels" {
                record.labels.clone_from(labels);
            } else if let Some(label) = path.strip_prefix("labels.") {
                let value = labels.get(label).cloned().unwrap_or_default();
                record.labels.insert(label.to_owned(), value);
            } else {
                return Err(Refusal::Invalid(format!(
                    "the field {path} of snapshot {name} cannot be changed"
                )));
            }
        }
        check_labels(&record.labels)?;
        record.labels = kept(record.labels);
        record.updated = now;
        Ok(record)
    }

    /// Puts a record in, in place of the one with the name `old` if there is one.
    pub fn put(&mut self, old: Option<&str>, record: Record) {
        if let Some(old) = old {
            self.forget(old);
        }
        if let Some(parent) = &record.parent {
            *self.children.entry(parent.clone()).or_default() += 1;
        }
        self.by_name.insert(record.name.clone(), record);
    }

    /// Takes a record out.
    pub fn forget(&mut self, name: &str) {
        let Some(parent) = self.by_name.remove(name).and_then(|record| record.parent) else {
            return;
        };
        if let Some(count) = self.children.get_mut(&parent) {
            *count -= 1;
            if *count == 0 {
                self.children.remove(&parent);
            }
        }
    }
}

fn check_name(name: &str) -> Result<(), Refusal> {
    if name.is_empty() || name.len() > NAME_MAX_BYTES {
        return Err(Refusal::Invalid(format!(
            "the name of a snapshot has 1 to {NAME_MAX_BYTES} bytes, not {}",
            name.len()
        )));
    }
    Ok(())
}

fn check_labels(labels: &Labels) -> Result<(), Refusal> {
    for (name, value) in labels {
        if name.is_empty() || name.len() + value.len() > LABEL_MAX_BYTES {
            return Err(Refusal::Invalid(format!(
                "the label {name:.80} is empty or longer than {LABEL_MAX_BYTES} bytes with its value"
            )));
        }
        if ID_MAPPINGS.contains(&name.as_str()) {
            return Err(Refusal::Invalid(format!(
                "the label {name} asks for mapped owners, which this snapshotter does not offer; containerd maps them itself"
            )));
        }
    }
    Ok(())
}

/// Labels without those of an empty value, as containerd's store keeps them.
fn kept(mut labels: Labels) -> Labels {
    labels.retain(|_, value| !value.is_empty());
    labels
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn creation(kind: Kind, key: &str, parent: &str) -> Creation {
        Creation {
            kind,
            key: key.into(),
            parent: parent.into(),
            labels: Labels::new(),
        }
    }

    fn committal(key: &str, name: &str) -> Committal {
        Committal {
            key: key.into(),
            name: name.into(),
            parent: String::new(),
            labels: Labels::new(),
        }
    }

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        pairs.iter().map(own).collect()
    }

    /// `base` and `top` are committed, `run` is active on `top`, `look` is a view of `base`.
    fn sample() -> Catalog {
        let mut catalog = Catalog::default();
        for (id, kind, name, parent) in [
            (1, Kind::Committed, "base", ""),
            (2, Kind::Committed, "top", "base"),
            (3, Kind::Active, "run", "top"),
            (4, Kind::View, "look", "base"),
        ] {
            let mut record = catalog
                .plan_create(creation(Kind::Active, name, parent), id, NOW)
                .unwrap();
            record.kind = kind;
            catalog.put(None, record);
        }
        catalog
    }

    #[test]
    fn creation_wants_a_free_key_and_a_committed_parent() {
        let catalog = sample();
        let plan = |key, parent| {
            catalog
                .plan_create(creation(Kind::Active, key, parent), 9, NOW)
                .map(|record| record.id)
        };
        assert_eq!(plan("new", "top"), Ok(9));
        assert_eq!(plan("new", ""), Ok(9));
        assert_eq!(plan("run", ""), Err(Refusal::AlreadyExists("run".into())));
        assert_eq!(plan("top", ""), Err(Refusal::AlreadyExists("top".into())));
        assert_eq!(plan("new", "gone"), Err(Refusal::NotFound("gone".into())));
        for parent in ["run", "look"] {
            assert!(matches!(plan("new", parent), Err(Refusal::Invalid(_))));
        }
        assert!(matches!(plan("", ""), Err(Refusal::Invalid(_))));
    }

    #[test]
    fn labels_that_cannot_be_served_are_refused() {
        let long = "x".repeat(LABEL_MAX_BYTES);
        for bad in [
            ("l", long.as_str()),
            ("", "v"),
            (ID_MAPPINGS[0], "0:1000:1"),
        ] {
            let request = Creation {
                labels: labels(&[bad]),
                ..creation(Kind::Active, "new", "")
            };
            let found = sample().plan_create(request, 9, NOW);
            assert!(matches!(found, Err(Refusal::Invalid(_))), "{bad:?}");
        }
    }

    #[test]
    fn only_an_active_snapshot_commits_and_only_to_a_free_name() {
        let catalog = sample();
        let plan = |key, name| catalog.plan_commit(committal(key, name), Usage::default(), NOW);
        let record = plan("run", "done").unwrap();
        assert_eq!((record.id, record.kind), (3, Kind::Committed));
        assert_eq!(record.parent.as_deref(), Some("top"));
        assert!(matches!(
            plan("look", "done"),
            Err(Refusal::Precondition(_))
        ));
        assert!(matches!(plan("top", "done"), Err(Refusal::Precondition(_))));
        assert!(matches!(plan("gone", "done"), Err(Refusal::NotFound(_))));
        assert!(matches!(
            plan("run", "base"),
            Err(Refusal::AlreadyExists(_))
        ));
        let rebase = Committal {
            parent: "base".into(),
            ..committal("run", "done")
        };
        let found = catalog.plan_commit(rebase, Usage::default(), NOW);
        assert!(matches!(found, Err(Refusal::Invalid(_))));
    }

    #[test]
    fn a_parent_is_removed_after_its_children() {
        let mut catalog = sample();
        for name in ["base", "top"] {
            let found = catalog.plan_remove(name);
            assert!(matches!(found, Err(Refusal::Precondition(_))));
        }
        for name in ["run", "top", "look", "base"] {
            assert!(catalog.plan_remove(name).is_ok(), "{name}");
            catalog.forget(name);
            assert_eq!(
                catalog.plan_remove(name),
                Err(Refusal::NotFound(name.into()))
            );
        }
        assert!(catalog.children.is_empty());
    }

    #[test]
    fn a_field_mask_says_which_labels_change() {
        let mut catalog = sample();
        let mut run = catalog.get("run").unwrap().clone();
        run.labels = labels(&[("a", "1"), ("b.c", "2")]);
        catalog.put(Some("run"), run);
        let later = NOW + Duration::from_secs(1);
        let given = labels(&[("a", "9"), ("new", "n")]);
        for (paths, expected) in [
            (&[][..], &[("a", "9"), ("new", "n")][..]),
            (&["labels"], &[("a", "9"), ("new", "n")]),
            (&["labels.a"], &[("a", "9"), ("b.c", "2")]),
            (&["labels.b.c"], &[("a", "1")]),
            (
                &["labels.new", "labels.a"],
                &[("a", "9"), ("b.c", "2"), ("new", "n")],
            ),
        ] {
            let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
            let record = catalog.plan_update("run", &given, &paths, later).unwrap();
            assert_eq!(record.labels, labels(expected), "{paths:?}");
            assert_eq!((record.created, record.updated), (NOW, later));
        }
        for path in ["name", "parent", "kind", "created_at", "labelsx"] {
            let found = catalog.plan_update("run", &given, &[path.to_owned()], later);
            assert!(matches!(found, Err(Refusal::Invalid(_))), "{path}");
        }
    }

    #[test]
    fn ancestors_run_from_the_parent_down_and_have_a_bound() {
        let mut catalog = sample();
        let run = catalog.get("run").unwrap().clone();
        assert_eq!(catalog.ancestors(&run), Ok(vec![2, 1]));
        let mut parent = String::new();
        for id in 10.. {
            let key = format!("layer-{id}");
            let planned = catalog.plan_create(creation(Kind::Active, &key, &parent), id, NOW);
            let Ok(mut record) = planned else {
                assert_eq!(id, 10 + CHAIN_MAX as u64 + 1);
                break;
            };
            record.kind = Kind::Committed;
            catalog.put(None, record);
            parent = key;
        }
    }

    proptest! {
        /// After any requests, no parent of a snapshot is missing or writable.
        #[test]
        fn every_parent_exists_and_is_committed(
            steps in proptest::collection::vec((0..4_u8, 0..6_u8, 0..6_u8), 0..60)
        ) {
            let mut catalog = Catalog::default();
            for (id, (action, first, second)) in (1..).zip(steps) {
                let name = |n: u8| if n == 0 { String::new() } else { format!("s{n}") };
                let (key, other) = (name(first), name(second));
                match action {
                    0 | 1 => {
                        let kind = if action == 0 { Kind::Active } else { Kind::View };
                        if let Ok(record) = catalog.plan_create(creation(kind, &key, &other), id, NOW) {
                            catalog.put(None, record);
                        }
                    }
                    2 => if let Ok(record) = catalog.plan_commit(committal(&key, &other), Usage::default(), NOW) {
                        catalog.put(Some(&key), record);
                    }
                    _ => if catalog.plan_remove(&key).is_ok() {
                        catalog.forget(&key);
                    }
                }
                for record in catalog.iter() {
                    if let Some(parent) = &record.parent {
                        prop_assert_eq!(catalog.get(parent).map(|it| it.kind), Ok(Kind::Committed));
                    }
                }
            }
        }
    }
}
