//! A drop-in of registries.conf (podman, CRI-O, skopeo, buildah): one mirror for each registry, and the registry's name in the
//! mirror's path, since these programs tell a mirror nothing else.

use ::toml::{Table, Value};

use super::toml::{self, Toml};
use super::{Mirrored, NOTE, Unfit};

const REGISTRY: &str = "registry";

/// Adds a block for each registry that has none.
pub(super) fn apply(
    text: Option<&str>,
    mirror: &str,
    insecure: bool,
    registries: &[Mirrored],
) -> Result<String, Unfit> {
    let mut edited = text.map_or_else(|| format!("{NOTE}\n"), str::to_owned);
    for mirrored in registries {
        let model: Table = edited.parse().map_err(|_| Unfit::shape())?;
        let wanted: Table = block(mirror, insecure, mirrored)
            .parse()
            .map_err(|_| Unfit::shape())?;
        let (there, wanted) = (blocks_of(&model), blocks_of(&wanted));
        if wanted.iter().all(|block| there.contains(block)) {
            continue;
        }
        let same = |block: &Value| {
            block.get("prefix").or(block.get("location")) == wanted[0].get("location")
        };
        if there.iter().any(same) {
            let cure = "add the mirror to that block, or take the block out";
            return Err(Unfit::new(
                format!("has another block for {}", mirrored.registry),
                cure,
            ));
        }
        let more = toml::append(
            &edited,
            &block(mirror, insecure, mirrored).replace('\n', toml::eol(&edited)),
        );
        edited = toml::meant(&edited, more, |model| {
            let blocks = model
                .entry(REGISTRY)
                .or_insert_with(|| Value::Array(Vec::new()));
            blocks
                .as_array_mut()
                .map(|blocks| blocks.extend(wanted))
                .unwrap_or_default();
        })?;
    }
    Ok(edited)
}

fn blocks_of(model: &Table) -> Vec<Value> {
    model
        .get(REGISTRY)
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default()
}

/// The block for a registry's mirror.
pub(crate) fn block(mirror: &str, insecure: bool, mirrored: &Mirrored) -> String {
    let location = toml::literal(&mirrored.registry);
    let path = toml::literal(&format!("{mirror}/{}", mirrored.name));
    let insecure = if insecure { "insecure = true\n" } else { "" };
    format!(
        "[[registry]]\nlocation = {location}\n[[registry.mirror]]\nlocation = {path}\n{insecure}"
    )
}

/// Takes out the registries that have our mirror, and of those that got more since our mirror alone.
pub(super) fn undo(text: &str, mirror: &str) -> Result<String, Unfit> {
    let mut left = text.to_owned();
    while let Some(cut) = ours(&left, mirror)? {
        left = toml::splice(&left, cut, "");
    }
    Ok(left)
}

/// The first thing of ours: a registry with nothing but our mirror, or a mirror of ours among others.
fn ours(text: &str, mirror: &str) -> Result<Option<std::ops::Range<usize>>, Unfit> {
    let file = Toml::parse(text)?;
    let parsed: Table = text.parse().map_err(|_| Unfit::shape())?;
    let mut headers = file.headers().iter();
    for registry in blocks_of(&parsed).iter().filter_map(Value::as_table) {
        let head = headers
            .find(|header| header.is(&[REGISTRY]))
            .ok_or_else(Unfit::shape)?;
        let mirrors = registry
            .get("mirror")
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        let mirrors: Vec<bool> = mirrors.map(|one| is_ours(one, mirror)).collect();
        let alone = registry
            .keys()
            .all(|key| key == "location" || key == "mirror")
            && mirrors == [true];
        let mut range = file.block(head);
        for ours in mirrors {
            let own = headers
                .find(|header| header.is(&[REGISTRY, "mirror"]))
                .ok_or_else(Unfit::shape)?;
            if ours && !alone {
                return Ok(Some(file.block(own)));
            }
            range.end = file.block(own).end;
        }
        if alone {
            return Ok(Some(toml::with_blank_before(text, range)));
        }
    }
    Ok(None)
}

fn is_ours(one: &Value, mirror: &str) -> bool {
    let path = one
        .get("location")
        .and_then(Value::as_str)
        .and_then(|location| location.strip_prefix(mirror));
    path.is_some_and(|path| path.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::super::Edit;
    use super::*;

    const MIRROR: &str = "127.0.0.1:6500";

    fn registries() -> Vec<Mirrored> {
        ["docker.io", "quay.io"]
            .map(|name| Mirrored {
                registry: name.into(),
                name: name.into(),
            })
            .into()
    }

    #[test]
    fn each_registry_is_a_path_of_the_mirror() {
        let text = apply(None, MIRROR, true, &registries()).unwrap();
        assert!(text.ends_with(
            "\n[[registry]]\nlocation = \"quay.io\"\n[[registry.mirror]]\nlocation = \"127.0.0.1:6500/quay.io\"\ninsecure = true\n"
        ));
        assert_eq!(
            apply(Some(&text), MIRROR, true, &registries()).unwrap(),
            text
        );
        let more = format!("{text}\n[[registry]]\nlocation = \"corp.example\"\n");
        assert_eq!(
            apply(Some(&more), MIRROR, true, &registries()).unwrap(),
            more,
            "nothing is missing"
        );
        let other = "[[registry]]\nprefix = \"quay.io\"\nlocation = \"corp.example\"\n";
        assert!(
            apply(Some(other), MIRROR, true, &registries())
                .unwrap_err()
                .what
                .contains("quay.io")
        );
        assert!(
            !apply(None, MIRROR, false, &registries())
                .unwrap()
                .contains("insecure")
        );
    }

    #[test]
    fn what_came_into_it_since_stays() {
        let edit = Edit::DropIn {
            mirror: MIRROR.into(),
            insecure: true,
            registries: registries(),
        };
        let text = edit.apply(None).unwrap();
        assert_eq!(edit.undo(&text, None), Ok(None));
        let other = "\n[[registry.mirror]]\nlocation = \"corp.example/quay\"\n";
        let left = edit.undo(&format!("{text}{other}"), None).unwrap().unwrap();
        assert_eq!(
            left,
            format!("{NOTE}\n\n[[registry]]\nlocation = \"quay.io\"\n{other}")
        );
        let own = "\n[[registry]]\nlocation = \"127.0.0.1:65000/a\"\n";
        let left = edit.undo(&format!("{text}{own}"), None).unwrap().unwrap();
        assert_eq!(left.trim_start_matches(NOTE).trim(), own.trim());
    }
}
