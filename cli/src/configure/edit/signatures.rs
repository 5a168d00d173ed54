//! A file of registries.d: signatures of images at these locations are attached to the images.

use super::{NOTE, Unfit};
use crate::configure::yaml;

const TOP: &str = "docker:";

fn lines(scope: &str) -> String {
    format!("  \"{scope}\":\n    use-sigstore-attachments: true\n")
}

/// Adds the locations that are missing.
pub(super) fn apply(text: Option<&str>, scopes: &[String]) -> Result<String, Unfit> {
    let mut edited = match text {
        Some(text) if !text.trim().is_empty() => text.to_owned(),
        _ => format!("{NOTE}\n{TOP}\n"),
    };
    let top = format!("{TOP}\n");
    let found = if edited.starts_with(&top) {
        Some(0)
    } else {
        edited.find(&format!("\n{top}")).map(|at| at + 1)
    };
    let Some(at) = found.map(|at| at + top.len()) else {
        return Err(Unfit::new(
            "is there already, and not by `hawker configure`",
            "move it to another name",
        ));
    };
    let missing: String = scopes
        .iter()
        .map(|scope| lines(scope))
        .filter(|lines| !edited.contains(lines))
        .collect();
    edited.insert_str(at, &missing);
    match yaml::parse(&edited) {
        Ok(_) => Ok(edited),
        Err(why) => Err(Unfit::new(
            format!("would be no YAML: {why}"),
            "move it to another name",
        )),
    }
}

/// Takes our locations out.
pub(super) fn undo(text: &str, scopes: &[String]) -> String {
    scopes.iter().fold(text.to_owned(), |text, scope| {
        text.replacen(&lines(scope), "", 1)
    })
}

/// Whether a line is ours.
pub(super) fn is_ours(line: &str) -> bool {
    line == TOP
}
