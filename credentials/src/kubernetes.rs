//! Kubernetes' pull secrets: the content of one (`.dockerconfigjson`, or the older `.dockercfg`), a whole Secret or
//! list of them in JSON, and a folder of either, as a volume shows them.
//!
//! Helpers that a secret names are not run: kubelet does not, and a secret's author is not the node's master.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde_json::Value;

use super::docker::{self, Auths};
use super::{BASE64, Entries, MAX_FILES, json_error};

/// Keys of a Secret's data, newest first.
const KEYS: [&str; 2] = [".dockerconfigjson", ".dockercfg"];

/// The file itself; of a folder, its files and those of the folders in it. Names that begin with `..` are the volume's own.
pub(super) fn files(path: &Path) -> Vec<PathBuf> {
    if !path.is_dir() {
        return vec![path.to_owned()];
    }
    let (folders, mut files): (Vec<_>, Vec<_>) =
        children(path).into_iter().partition(|path| path.is_dir());
    files.extend(
        folders
            .iter()
            .flat_map(|folder| children(folder))
            .filter(|path| !path.is_dir()),
    );
    files.truncate(MAX_FILES);
    files
}

fn children(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(Result::ok);
    let visible = entries.filter(|entry| !entry.file_name().to_string_lossy().starts_with(".."));
    let mut paths: Vec<PathBuf> = visible.take(MAX_FILES).map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

pub(super) fn parse(text: &str) -> Result<Entries, String> {
    let mut all = Entries::default();
    add(
        serde_json::from_str(text).map_err(|e| json_error(&e))?,
        &mut all,
    )?;
    Ok(all)
}

/// Adds the entries of `content`; its keys show its kind.
fn add(mut content: Value, all: &mut Entries) -> Result<(), String> {
    if let Some(Value::Array(items)) = content.get_mut("items").map(Value::take) {
        return items.into_iter().try_for_each(|item| add(item, all));
    }
    if let Some(data) = content.get("data") {
        return secret(data, all, |encoded| {
            String::from_utf8(BASE64.decode(encoded).ok()?).ok()
        });
    }
    if let Some(data) = content.get("stringData") {
        return secret(data, all, |plain| Some(plain.to_owned()));
    }
    let wrapped = content.get_mut("auths").map(Value::take);
    let auths: Auths = serde_json::from_value(wrapped.unwrap_or(content))
        .map_err(|_| "it is no pull secret".to_owned())?;
    all.listed.extend(docker::listed(auths));
    Ok(())
}

/// A Secret's data. A Secret of another kind has nothing for us.
fn secret(
    data: &Value,
    all: &mut Entries,
    decode: impl Fn(&str) -> Option<String>,
) -> Result<(), String> {
    let Some(value) = KEYS.iter().find_map(|key| data.get(key)?.as_str()) else {
        return Ok(());
    };
    let text = decode(value).ok_or("its data is not what a Secret's is: base64 of text")?;
    let inner: Value =
        serde_json::from_str(&text).map_err(|_| "the pull secret in it is no JSON".to_owned())?;
    add(inner, all)
}
