//! `hawker configure`: points a runtime at the mirror, and back.
//!
//! `request` checks the flags; `containerd`, `docker`, `containers` and `buildkit` say which files want which edit, looking at the
//! files as they would be without what was written before; `edit` makes new texts of old ones, and old ones of new ones; `plan`
//! carries that out.

pub(crate) mod buildkit;
pub(crate) mod containerd;
pub(crate) mod containers;
pub(crate) mod docker;
pub(crate) mod edit;
pub(crate) mod mirror;
pub(crate) mod plan;
pub(crate) mod rancher;
mod record;
pub(crate) mod request;
pub(crate) mod root;
mod show;
mod signatures;
#[cfg(test)]
mod tests;
pub(crate) mod yaml;

use std::fmt;
use std::path::Path;

use self::plan::{Change, Past, Plan, View, Wanted};
use self::request::Request;
use self::root::Root;
use crate::args::{ConfigureArgs, Runtime};
use crate::{print, program};
use hawker_config::problem::{Problem, Problems};

/// The files that a runtime needs, remarks for the person, and obstacles.
#[derive(Debug, Default)]
struct Wishes {
    files: Vec<Wanted>,
    notes: Vec<String>,
    problems: Vec<Problem>,
}

/// The action that makes a runtime take notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restart {
    /// Nothing, for this reason.
    None(&'static str),
    Unit {
        verb: &'static str,
        unit: &'static str,
        why: &'static str,
    },
}

/// The obstacles to a change of the files.
#[derive(Debug)]
struct InTheWay(Vec<Problem>);

impl fmt::Display for InTheWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nothing was changed:")?;
        self.0
            .iter()
            .try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl std::error::Error for InTheWay {}

/// Shows what changes, and changes it unless that was not wanted.
pub(crate) async fn run(args: &ConfigureArgs) -> anyhow::Result<()> {
    let mut args = args.clone();
    args.root = std::path::absolute(&args.root)?;
    if let Some(config) = &mut args.config {
        *config = if args.root == Path::new("/") {
            std::path::absolute(&config)?
        } else {
            Path::new("/").join(&config)
        };
    }
    let request = Request::of(&args).map_err(Problems)?;
    let root = Root::new(&args.root);
    let lock = (!args.dry_run).then(|| root.lock()).transpose();
    let _lock = lock.map_err(|error| anyhow::anyhow!("{}: {error}", args.root.display()))?;
    let (plan, notes) = plan(&root, &args, &request)?;
    let view = View::plain(&root);
    for change in &plan.changes {
        print::line(show::difference(&view, change))?;
    }
    if !args.dry_run && !plan.is_empty() {
        plan.carry_out(&root)?;
    }
    print::line(outcome(&args, &request, &view, &plan))?;
    for path in &plan.kept {
        let file = view.show(path);
        print::line(format_args!(
            "{file} was changed by others since: that stays, only Hawker's part is taken out."
        ))?;
    }
    for note in &notes {
        print::line(format_args!("Note: {note}."))?;
    }
    if plan.changes.is_empty() {
        return Ok(());
    }
    match restart(args.runtime, &plan.changes, &view) {
        Restart::None(why) => print::line(format_args!("Nothing needs a restart: {why}."))?,
        Restart::Unit { verb, unit, .. } if args.restart && !args.dry_run => {
            program::quick(program::command("systemctl", [verb, unit])).await?;
            print::line(format_args!("Done: systemctl {verb} {unit}."))?;
        }
        Restart::Unit { verb, unit, why } => {
            print::line(format_args!(
                "To take effect: systemctl {verb} {unit} ({why})."
            ))?;
        }
    }
    if !args.remove && root.is_system() {
        let runtime = name(args.runtime);
        print::line(format_args!(
            "To see whether it works: hawker doctor --runtime {runtime}."
        ))?;
    }
    Ok(())
}

/// The changes, with the remarks about them.
fn plan(
    root: &Root,
    args: &ConfigureArgs,
    request: &Request,
) -> anyhow::Result<(Plan, Vec<String>)> {
    let past = Past::read(root, args.runtime)?;
    let view = past.view(root);
    let Wishes {
        files,
        notes,
        mut problems,
    } = match args.runtime {
        Runtime::Crio | Runtime::Podman if args.remove => {
            let shared = signatures::wanted(&view, &past, args.runtime, "", &[])?;
            Wishes {
                files: shared.into_iter().collect(),
                ..Wishes::default()
            }
        }
        _ if args.remove => Wishes::default(),
        Runtime::Containerd => containerd::wishes(request, &view)?,
        Runtime::Docker => docker::wishes(request, &view),
        Runtime::Crio | Runtime::Podman => containers::wishes(request, &view, &past, args.runtime)?,
        Runtime::Buildkit => buildkit::wishes(request, &view),
    };
    match Plan::make(root, args.runtime, past, files) {
        Ok(plan) if problems.is_empty() => Ok((plan, notes)),
        Ok(_) => Err(InTheWay(problems).into()),
        Err(more) => {
            problems.extend(more);
            Err(InTheWay(problems).into())
        }
    }
}

fn restart(runtime: Runtime, changes: &[Change], view: &View<'_>) -> Restart {
    match runtime {
        Runtime::Containerd => containerd::restart(changes, view),
        Runtime::Docker => docker::restart(changes),
        Runtime::Crio | Runtime::Podman => containers::restart(runtime),
        Runtime::Buildkit => buildkit::restart(),
    }
}

/// The outcome, in a line.
fn outcome(args: &ConfigureArgs, request: &Request, view: &View<'_>, plan: &Plan) -> String {
    let runtime = name(args.runtime);
    let paths: Vec<String> = plan
        .changes
        .iter()
        .map(|change| view.show(&change.path))
        .collect();
    let paths = paths.join(", ");
    let had = plan.changes.iter().any(|change| change.before.is_some());
    let beside = format!(" (what was there before is beside it, *{})", plan::BACKUP);
    match (plan.is_empty(), args.dry_run, args.remove) {
        (true, _, true) => {
            format!("Nothing to undo: `hawker configure {runtime}` has written nothing here.")
        }
        (true, ..) => format!(
            "Nothing to change: {runtime} is pointed at {}.",
            request.mirror.url
        ),
        (_, true, _) => "Nothing was written: --dry-run.".to_owned(),
        (.., true) => format!("Taken out again: {paths}."),
        (.., false) => format!("Written: {paths}{}.", if had { &beside } else { "" }),
    }
}

/// As it is typed.
pub(crate) fn name(runtime: Runtime) -> &'static str {
    match runtime {
        Runtime::Containerd => "containerd",
        Runtime::Docker => "docker",
        Runtime::Crio => "crio",
        Runtime::Podman => "podman",
        Runtime::Buildkit => "buildkit",
    }
}
