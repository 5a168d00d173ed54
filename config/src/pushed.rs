//! Configuration that schedulers push to nodes: the document that they send, and the copy that a node keeps on disk.
//!
//! A document holds keys that the schema lets be pushed, and no others: a lying scheduler reaches no secret, path, address or
//! security boundary of a node.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use hawker_core::piece::PeerId;
use serde::{Deserialize, Serialize};

use crate::layers::{Effective, Layered};
use crate::problem::{Problem, Problems};
use crate::schema::{Config, Daemon};

/// Longest document.
pub const MAX_DOCUMENT_BYTES: usize = 256 << 10;
/// Schedulers whose documents are kept at most.
const MAX_DOCUMENTS: usize = 32;
/// Longest file that is read.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// The form of the file.
const VERSION: u32 = 1;

/// Keys of nodes, as TOML.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Document(toml::Table);

impl Document {
    /// A document of these keys.
    pub const fn new(keys: toml::Table) -> Self {
        Self(keys)
    }

    /// Reads a document and checks all its values.
    ///
    /// # Errors
    /// All faults: it is refused as a whole.
    pub fn parse(text: &str) -> Result<Self, Problems> {
        let one = |what: String| {
            Problems(vec![Problem::new(
                "the document",
                what,
                "correct it at the scheduler",
            )])
        };
        if text.len() > MAX_DOCUMENT_BYTES {
            return Err(one(format!("has more than {MAX_DOCUMENT_BYTES} bytes")));
        }
        let table = text
            .parse()
            .map_err(|error: toml::de::Error| one(format!("is no TOML: {}", error.message())))?;
        let (_, faults) = Layered::document("", &table);
        if faults.is_empty() {
            return Ok(Self(table));
        }
        Err(Problems(
            faults
                .into_iter()
                .map(|(path, wrong)| Problem::of(path, wrong))
                .collect(),
        ))
    }

    /// The values of a node that has nothing else.
    pub fn config(&self) -> Config {
        Effective::new(Daemon::Proxy, [Layered::document("", &self.0).0]).config
    }

    /// The text to send.
    pub fn text(&self) -> String {
        toml::to_string(&self.0).expect("a table that was read can be written")
    }
}

/// The last document of each scheduler.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pushed(BTreeMap<PeerId, Document>);

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    /// Texts by the scheduler's id.
    documents: BTreeMap<String, String>,
}

impl Pushed {
    /// The documents in the file; none when there is no file. Documents with a fault are left out.
    ///
    /// # Errors
    /// When the file cannot be read. It can be removed; it fills again.
    pub fn load(path: &Path) -> io::Result<Self> {
        match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error),
            Ok(metadata) if metadata.len() > MAX_FILE_BYTES => {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            Ok(_) => {}
        }
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let file: File = toml::from_str(&std::fs::read_to_string(path)?)
            .map_err(|error| invalid(error.to_string()))?;
        if file.version != VERSION {
            return Err(invalid(
                "pushed configuration of another version of Hawker".to_owned(),
            ));
        }
        let document =
            |(id, text): (String, String)| Some((id.parse().ok()?, Document::parse(&text).ok()?));
        Ok(Self(
            file.documents
                .into_iter()
                .filter_map(document)
                .take(MAX_DOCUMENTS)
                .collect(),
        ))
    }

    /// Puts the file in place: by write, fsync, rename.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let documents = self
            .0
            .iter()
            .map(|(id, document)| (id.to_string(), document.text()))
            .collect();
        let text = toml::to_string(&File {
            version: VERSION,
            documents,
        })
        .map_err(io::Error::other)?;
        let new = path.with_extension("new");
        let mut out = std::fs::File::create(&new)?;
        out.write_all(text.as_bytes())?;
        out.sync_all()?;
        std::fs::rename(new, path)
    }

    /// Takes a scheduler's document. Of the other schedulers' documents only those of `known` ones are kept.
    pub fn set(&mut self, from: PeerId, known: &[PeerId], document: Document) {
        self.0.retain(|scheduler, _| known.contains(scheduler));
        if self.0.len() < MAX_DOCUMENTS || self.0.contains_key(&from) {
            self.0.insert(from, document);
        }
    }

    /// Whether no scheduler has pushed anything.
    pub fn is_empty(&self) -> bool {
        self.0.values().all(|document| document.0.is_empty())
    }

    /// The layers, the least one first: of several schedulers the one with the least id counts.
    pub fn layers(&self) -> impl Iterator<Item = Layered> {
        self.0.iter().rev().map(|(id, document)| {
            let place = format!("pushed by scheduler {id}");
            Layered::document(&place, &document.0).0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Document {
        Document::parse(text).unwrap()
    }

    fn pushed(all: &[(u8, &str)]) -> Pushed {
        let mut pushed = Pushed::default();
        let known: Vec<PeerId> = all.iter().map(|(id, _)| PeerId([*id; 16])).collect();
        all.iter()
            .for_each(|(id, text)| pushed.set(PeerId([*id; 16]), &known, document(text)));
        pushed
    }

    fn effective(pushed: &Pushed, file: &str) -> Effective {
        let file = Layered::toml(Daemon::Proxy, "/f.toml", file);
        Effective::new(Daemon::Proxy, pushed.layers().chain([file]))
    }

    #[test]
    fn pushed_values_go_before_defaults_and_after_the_file() {
        let pushed = pushed(&[
            (2, "linger = '5m'\nupload_slots = 3"),
            (1, "linger = '4m'\n[cache]\nhigh = 70"),
        ]);
        let all = effective(&pushed, "upload_slots = 5");
        assert_eq!(all.problems, []);
        assert_eq!(
            (
                all.config.linger.as_secs(),
                *all.config.upload_slots,
                *all.config.cache_high
            ),
            (240, 5, 70)
        );
        assert!(
            all.name("linger")
                .starts_with("linger (pushed by scheduler 0101"),
            "{}",
            all.name("linger")
        );
        assert_eq!(all.name("upload_slots"), "upload_slots (/f.toml:1)");
    }

    #[test]
    fn an_entry_of_the_node_replaces_the_pushed_one_with_its_labels() {
        let pushed = pushed(&[(
            1,
            "[[application]]\nname = 'shop'\npriority = 6\n[[application]]\nname = 'data'\npriority = 5",
        )]);
        let all = effective(&pushed, "[[application]]\nname = 'shop'\npriority = 1");
        let levels: Vec<_> = all
            .config
            .application
            .iter()
            .map(|entry| {
                (
                    entry.rule().unwrap().labels.to_string(),
                    entry.priority.as_ref().unwrap().0.level(),
                )
            })
            .collect();
        assert_eq!(levels, [("shop".to_owned(), 1), ("data".to_owned(), 5)]);
        assert!(
            all.name("application[0]").contains("/f.toml:1")
                && all.name("application[1]").contains("pushed")
        );
    }

    #[test]
    fn a_document_with_one_fault_is_refused_as_a_whole() {
        for (text, told) in [
            (
                "linger = '5s'\nupload_slots = 0",
                "upload_slots: `0` is out of range",
            ),
            ("linger = '5s'\nlingr = '5s'", "lingr: is an unknown key"),
            ("linger = ", "is no TOML"),
            (
                "[log]\nlevel = 'info,a[b{c=.*}]=trace'",
                "log.level: is more than a level",
            ),
            (
                "[[application]]\npriority = 1",
                "application[0]: names neither",
            ),
            (
                "[[application]]\nname = 'a'\nspeed = 1",
                "application[0].speed: is an unknown key",
            ),
        ] {
            let problems = Document::parse(text).unwrap_err().to_string();
            assert!(problems.contains(told), "{text}: {problems}");
        }
        assert!(Document::parse(&format!("# {}", "x".repeat(MAX_DOCUMENT_BYTES))).is_err());
    }

    /// The scheduler may lie: nothing that guards a node's secrets, files, addresses or rights comes from it.
    #[test]
    fn no_key_of_a_secret_a_path_an_address_or_a_right_can_be_pushed() {
        use crate::schema::{Applies, Group};
        use crate::value::Shape;

        let guarded = [
            "ADDR",
            "HOST:PORT",
            "HOST",
            "PATTERN",
            "CIDR",
            "CIDR|HOST",
            "DIR",
            "FILE",
            "MODE",
            "KIND:PLACE",
        ];
        let mut pushable = 0;
        for key in Config::keys() {
            let is_guarded = guarded.contains(&key.value_name)
                || matches!(
                    key.group,
                    Group::Node | Group::Cluster | Group::PrivateImages | Group::ForwardProxy
                )
                || matches!(key.shape, Shape::Hosts | Shape::Table)
                || ["public_grace", "token_file"].contains(&key.path);
            assert!(
                !(is_guarded && key.applies == Applies::Pushed),
                "{}",
                key.path
            );
            pushable += usize::from(key.applies == Applies::Pushed);
            if is_guarded {
                let problems =
                    Document::parse(&format!("linger = '5s'\n{} = 'x'", key.path)).unwrap_err();
                assert!(
                    problems.0[0].what.contains("may not be pushed"),
                    "{problems}"
                );
            }
        }
        assert!(pushable > 10);
    }

    #[test]
    fn the_documents_of_known_schedulers_survive_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pushed.toml");
        assert_eq!(Pushed::load(&path).unwrap(), Pushed::default());
        let mut all = pushed(&[
            (1, "linger = '5s'\n[cache]\nhigh = 70"),
            (2, "[[application]]\nname = 'a'"),
        ]);
        all.save(&path).unwrap();
        assert_eq!(Pushed::load(&path).unwrap(), all);
        all.set(
            PeerId([3; 16]),
            &[PeerId([2; 16]), PeerId([3; 16])],
            document("linger = '6s'"),
        );
        assert_eq!(
            all.0.keys().copied().collect::<Vec<_>>(),
            [PeerId([2; 16]), PeerId([3; 16])]
        );
        std::fs::write(&path, "version = 2\n[documents]\n").unwrap();
        assert!(Pushed::load(&path).is_err());
        std::fs::write(&path, "version = 1\n[documents]\nx = ''\n").unwrap();
        assert!(Pushed::load(&path).unwrap().is_empty());
    }

    #[test]
    fn the_nodes_table_of_a_scheduler_is_checked_with_its_lines() {
        let file = Layered::toml(
            Daemon::Scheduler,
            "/s.toml",
            "[nodes]\nlinger = 'soon'\ndata_dir = '/x'\n[nodes.cache]\nhgih = 3",
        );
        let problems = Effective::new(Daemon::Scheduler, [file]).problems;
        let keys: Vec<&str> = problems
            .iter()
            .map(|problem| problem.key.as_str())
            .collect();
        assert_eq!(keys.len(), 3, "{problems:?}");
        for key in [
            "nodes.linger (/s.toml:2)",
            "nodes.data_dir (/s.toml:3)",
            "nodes.cache.hgih (/s.toml:5)",
        ] {
            assert!(keys.contains(&key), "{key} in {keys:?}");
        }
    }
}
