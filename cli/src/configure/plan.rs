//! From what is there, what was written before and what is wanted to what changes; and the changes made, so that a crash at any
//! moment leaves something that the next run understands.
//!
//! To configure is to undo what was written before, in mind, and to apply what is wanted to what that leaves: so a second run
//! changes nothing, and a run with other flags leaves nothing of the first.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::InTheWay;
use super::edit::{Edit, Mirrored, Unfit};
use super::record::{Record, Written, hash};
use super::root::Root;
use crate::args::Runtime;
use hawker_config::problem::Problem;

/// The suffix of a file's original, kept beside it.
pub(crate) const BACKUP: &str = ".before-hawker";

/// A file that a runtime wants edited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) path: PathBuf,
    pub(crate) edit: Edit,
}

/// The files below a root as they would be without what was written before.
#[derive(Debug)]
pub(crate) struct View<'a> {
    root: &'a Root,
    instead: BTreeMap<PathBuf, Option<String>>,
}

/// A file that was written before.
#[derive(Debug)]
struct Earlier {
    written: Written,
    now: Option<String>,
    /// Without our part.
    base: Option<String>,
    /// Whether somebody else changed it since.
    changed: bool,
}

/// The changes to make.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) changes: Vec<Change>,
    /// Files that were changed by others since, of which only our part goes.
    pub(crate) kept: Vec<PathBuf>,
    before: Record,
    after: Record,
    backups: BTreeMap<PathBuf, Option<String>>,
}

/// One file's texts; `None` where there is no file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) path: PathBuf,
    pub(crate) before: Option<String>,
    pub(crate) after: Option<String>,
}

/// The files written before for a runtime, and their content without Hawker.
#[derive(Debug)]
pub(crate) struct Past {
    files: BTreeMap<PathBuf, Earlier>,
    record: Record,
}

impl<'a> View<'a> {
    /// The files as they are.
    pub(crate) fn plain(root: &'a Root) -> Self {
        Self {
            root,
            instead: BTreeMap::new(),
        }
    }

    /// The text of a file, if it is there.
    pub(crate) fn read(&self, path: &Path) -> anyhow::Result<Option<String>> {
        let at = || self.root.on_disk(path).display().to_string();
        let real = self.root.real(path).with_context(at)?;
        match self.instead.get(&real) {
            Some(text) => Ok(text.clone()),
            None => self.root.read(&real).with_context(at),
        }
    }

    /// The files in a folder, sorted by name.
    pub(crate) fn files(&self, folder: &Path) -> Vec<PathBuf> {
        let paths = self
            .root
            .names(folder)
            .into_iter()
            .map(|name| folder.join(name));
        paths.filter(|path| !self.is_gone(path)).collect()
    }

    pub(crate) fn is_dir(&self, path: &Path) -> bool {
        self.root.is_dir(path)
    }

    pub(crate) fn exists(&self, path: &Path) -> bool {
        self.root.exists(path) && !self.is_gone(path)
    }

    /// As a person finds it.
    pub(crate) fn show(&self, path: &Path) -> String {
        self.root.on_disk(path).display().to_string()
    }

    fn is_gone(&self, path: &Path) -> bool {
        self.root
            .real(path)
            .is_ok_and(|real| self.instead.get(&real).is_some_and(Option::is_none))
    }
}

impl Past {
    /// Reads the record, and undoes it in mind.
    pub(crate) fn read(root: &Root, runtime: Runtime) -> anyhow::Result<Self> {
        let record = Record::read(root)?;
        let mut files: BTreeMap<PathBuf, Earlier> = BTreeMap::new();
        for written in record.files.iter().filter(|file| is_of(file, runtime)) {
            let earlier = Earlier::of(root, written.clone())?;
            // A crash between two runs' records leaves both: the one that fits counts.
            if files.get(&written.path).is_none_or(|other| other.changed) {
                files.insert(written.path.clone(), earlier);
            }
        }
        Ok(Self { files, record })
    }

    /// The mirrors of registries.conf that were written for other runtimes.
    pub(crate) fn drop_ins_of_others(
        &self,
        runtime: Runtime,
    ) -> impl Iterator<Item = (&str, &[Mirrored])> {
        self.record
            .files
            .iter()
            .filter(move |file| file.runtime != runtime)
            .filter_map(|file| match &file.edit {
                Edit::DropIn {
                    mirror, registries, ..
                } => Some((mirror.as_str(), registries.as_slice())),
                _ => None,
            })
    }

    pub(crate) fn view<'a>(&self, root: &'a Root) -> View<'a> {
        let instead = self
            .files
            .iter()
            .map(|(path, file)| (path.clone(), file.base.clone()));
        View {
            root,
            instead: instead.collect(),
        }
    }
}

impl Earlier {
    fn of(root: &Root, written: Written) -> anyhow::Result<Self> {
        let at = |path: &Path| root.on_disk(path).display().to_string();
        let now = root
            .read(&written.path)
            .with_context(|| at(&written.path))?;
        let is = |text: &Option<String>, told: &Option<String>| text.as_deref().map(hash) == *told;
        if is(&now, &written.original) {
            return Ok(Self {
                written,
                base: now.clone(),
                now,
                changed: false,
            });
        }
        let backup = match &written.original {
            Some(_) => root
                .read(&backup_of(&written.path))
                .with_context(|| at(&backup_of(&written.path)))?,
            None => None,
        };
        let intact = is(&backup, &written.original);
        if intact && now.as_deref().map(hash).as_ref() == Some(&written.written) {
            return Ok(Self {
                written,
                now,
                base: backup,
                changed: false,
            });
        }
        let base = match &now {
            Some(text) => written
                .edit
                .undo(
                    text,
                    backup
                        .as_deref()
                        .filter(|_| intact)
                        .or(written.original.as_ref().map(|_| "")),
                )
                .map_err(|unfit| InTheWay(vec![problem(root, &written.path, unfit)]))?,
            None => None,
        };
        Ok(Self {
            written,
            now,
            base,
            changed: true,
        })
    }
}

impl Plan {
    /// The changes, or all obstacles.
    pub(crate) fn make(
        root: &Root,
        runtime: Runtime,
        past: Past,
        wanted: Vec<Wanted>,
    ) -> Result<Self, Vec<Problem>> {
        let Past { mut files, record } = past;
        let others = record
            .files
            .iter()
            .filter(|file| !is_of(file, runtime))
            .cloned()
            .collect();
        let mut after = record.clone();
        after.files = others;
        let mut plan = Self {
            before: record,
            after,
            ..Self::default()
        };
        let mut problems = Vec::new();
        for wanted in wanted {
            if let Err(problem) = plan.want(root, runtime, &mut files, wanted) {
                problems.push(problem);
            }
        }
        for (path, earlier) in files {
            plan.backups.insert(path.clone(), None);
            plan.change(path, earlier.now, earlier.base, earlier.changed);
        }
        if problems.is_empty() {
            Ok(plan)
        } else {
            Err(problems)
        }
    }

    fn want(
        &mut self,
        root: &Root,
        runtime: Runtime,
        files: &mut BTreeMap<PathBuf, Earlier>,
        Wanted { path, edit }: Wanted,
    ) -> Result<(), Problem> {
        let failed = |error: io::Error| {
            Problem::new(
                root.on_disk(&path).display().to_string(),
                error.to_string(),
                "mend it, or move it away",
            )
        };
        let real = root.real(&path).map_err(failed)?;
        if self
            .after
            .files
            .iter()
            .any(|file| file.path == real && file.runtime == runtime && file.edit == edit)
        {
            // By another link.
            return Ok(());
        }
        let earlier = files.remove(&real);
        if let Some(earlier) = &earlier
            && earlier.written.edit == edit
            && earlier.now.is_some()
            && edit.apply(earlier.now.as_deref()).ok() == earlier.now
        {
            self.after.files.push(earlier.written.clone());
            return Ok(());
        }
        let ours = earlier.is_some();
        let (now, base, changed) = match earlier {
            Some(Earlier {
                now, base, changed, ..
            }) => (now, base, changed),
            None => {
                let now = root.read(&real).map_err(failed)?;
                (now.clone(), now, false)
            }
        };
        let text = edit
            .apply(base.as_deref())
            .map_err(|unfit| problem(root, &real, unfit))?;
        if base.as_deref() == Some(&text) {
            // So already, without us.
            if ours {
                self.backups.insert(real.clone(), None);
            }
        } else {
            self.back_up(root, &real, base.as_deref(), ours)?;
            let original = base.as_deref().map(hash);
            let written = hash(&text);
            self.after.files.push(Written {
                runtime,
                path: real.clone(),
                edit,
                original,
                written,
            });
        }
        self.change(real, now, Some(text), changed);
        Ok(())
    }

    fn change(
        &mut self,
        path: PathBuf,
        before: Option<String>,
        after: Option<String>,
        changed: bool,
    ) {
        if changed && before.is_some() {
            self.kept.push(path.clone());
        }
        if before != after {
            self.changes.push(Change {
                path,
                before,
                after,
            });
        }
    }

    /// The text that `--remove` will put back, beside the file.
    fn back_up(
        &mut self,
        root: &Root,
        real: &Path,
        text: Option<&str>,
        ours: bool,
    ) -> Result<(), Problem> {
        let backup = backup_of(real);
        let at = root.on_disk(&backup).display().to_string();
        let there = root
            .read(&backup)
            .map_err(|error| Problem::new(&at, error.to_string(), "move it away"))?;
        if !ours && there.is_some() && there.as_deref() != text {
            let what = "is of an earlier `hawker configure` whose record is gone";
            return Err(Problem::new(
                at,
                what,
                "compare it with the file that it is beside, then move it away",
            ));
        }
        self.backups
            .insert(real.to_owned(), text.map(str::to_owned));
        Ok(())
    }

    /// Whether all is as it shall be.
    pub(crate) fn is_empty(&self) -> bool {
        let (before, after) = (&self.before.files, &self.after.files);
        let same = before.len() == after.len() && before.iter().all(|file| after.contains(file));
        self.changes.is_empty() && same
    }

    /// Makes the changes. Backups and the record come before, so that what is written can always be undone.
    pub(crate) fn carry_out(&self, root: &Root) -> anyhow::Result<()> {
        let Self {
            changes,
            before,
            after,
            backups,
            ..
        } = self;
        let (mut record, mut after) = (before.clone(), after.clone());
        let failed = |path: &Path| {
            let at = root.on_disk(path).display().to_string();
            move |error: io::Error| told(&at, &error)
        };
        for change in changes.iter().filter(|change| change.after.is_some()) {
            let folder = change.path.parent().unwrap_or(Path::new("/"));
            record
                .folders
                .extend(root.make_folders(folder).map_err(failed(folder))?);
        }
        for (path, text) in backups {
            if let Some(text) = text {
                let backup = backup_of(path);
                root.write(&backup, text, path).map_err(failed(&backup))?;
            }
        }
        let new: Vec<Written> = after
            .files
            .iter()
            .filter(|file| !record.files.contains(file))
            .cloned()
            .collect();
        record.files.extend(new);
        record
            .write(root)
            .map_err(failed(Path::new(super::record::FILE)))?;
        for Change { path, after, .. } in changes {
            match after {
                Some(text) => root.write(path, text, path),
                None => root.remove(path),
            }
            .map_err(failed(path))?;
        }
        for (path, text) in backups {
            if text.is_none() {
                root.remove(&backup_of(path))
                    .map_err(failed(&backup_of(path)))?;
            }
        }
        after.folders = record.folders;
        after.drop_folders(root);
        after
            .write(root)
            .map_err(failed(Path::new(super::record::FILE)))
    }
}

/// Whether a run for `runtime` makes this file anew.
fn is_of(file: &Written, runtime: Runtime) -> bool {
    let by_path = |runtime| matches!(runtime, Runtime::Crio | Runtime::Podman);
    file.runtime == runtime || (file.edit.is_shared() && by_path(runtime))
}

fn backup_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(BACKUP);
    PathBuf::from(name)
}

fn problem(root: &Root, path: &Path, Unfit { what, cure }: Unfit) -> Problem {
    Problem::new(root.on_disk(path).display().to_string(), what, cure)
}

/// An error of the file system, with the cure where there is one.
fn told(at: &str, error: &io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            anyhow::anyhow!("{at}: {error}; this needs root: run it with sudo")
        }
        io::ErrorKind::ReadOnlyFilesystem => anyhow::anyhow!(
            "{at}: {error}; make the change where this system's files are built (--root DIR, for an image)"
        ),
        _ => anyhow::anyhow!("{at}: {error}"),
    }
}
