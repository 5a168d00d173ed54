//! buildkitd.toml: the mirrors of each registry; how a mirror is reached stands under its own name.

use super::toml::{self, Toml};
use super::{NOTE, Unfit};

/// Puts the mirror first for each registry.
pub(super) fn apply(
    text: Option<&str>,
    mirror: &str,
    http: bool,
    registries: &[String],
) -> Result<String, Unfit> {
    let mut edited = text.map_or_else(|| format!("{NOTE}\n"), str::to_owned);
    for registry in registries {
        let file = Toml::parse(&edited)?;
        let mirrors = file.array(&["registry", registry, "mirrors"]);
        let has =
            mirrors.is_some_and(|mirrors| mirrors.iter().any(|one| one.as_str() == Some(mirror)));
        if !has {
            edited = toml::prepend(&edited, &["registry", registry], "mirrors", mirror)?;
        }
    }
    let now = Toml::parse(&edited)?
        .item(&["registry", mirror, "http"])
        .and_then(|item| item.as_bool());
    match (http, now) {
        (true, Some(false)) | (false, Some(true)) => Err(Unfit::new(
            format!("says http = {} of {mirror}", !http),
            format!("write http = {http} under [registry.\"{mirror}\"]"),
        )),
        (true, None) => toml::set(&edited, &["registry", mirror], "http", "true"),
        _ => Ok(edited),
    }
}

/// Takes the mirror out.
pub(super) fn undo(
    text: &str,
    mirror: &str,
    registries: &[String],
    original: Option<&Toml<'_>>,
) -> Result<String, Unfit> {
    let http = Toml::parse(text)?
        .item(&["registry", mirror, "http"])
        .and_then(|item| item.as_bool());
    let mut left = match http {
        Some(true) => toml::unset(text, &["registry", mirror], "http", original)?,
        _ => text.to_owned(),
    };
    for registry in registries.iter().rev() {
        let had = original.and_then(|original| original.array(&["registry", registry, "mirrors"]));
        if !had.is_some_and(|mirrors| mirrors.iter().any(|one| one.as_str() == Some(mirror))) {
            left = toml::withdraw(&left, &["registry", registry], "mirrors", mirror, original)?;
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::super::Edit;

    fn edit() -> Edit {
        let registries = vec!["docker.io".to_owned(), "quay.io".to_owned()];
        Edit::Buildkitd {
            mirror: "127.0.0.1:6500".into(),
            http: true,
            registries,
        }
    }

    #[test]
    fn the_mirror_comes_first_and_is_asked_in_the_clear() {
        let before = "debug = true # loud\n\n[registry.\"docker.io\"]\n  mirrors = [\"corp.example\"]\n  http = true\n\
                      [worker.oci]\n  enabled = true\n";
        let after = edit().apply(Some(before)).unwrap();
        assert_eq!(
            after,
            "debug = true # loud\n\n[registry.\"docker.io\"]\n  mirrors = [\"127.0.0.1:6500\", \"corp.example\"]\n  \
             http = true\n[worker.oci]\n  enabled = true\n\n[registry.\"quay.io\"]\n  mirrors = [\"127.0.0.1:6500\"]\n\n\
             [registry.\"127.0.0.1:6500\"]\n  http = true\n"
        );
        assert_eq!(edit().apply(Some(&after)).unwrap(), after, "twice is once");
        let changed = format!("{after}[grpc]\n");
        assert_eq!(
            edit().undo(&changed, Some(before)),
            Ok(Some(format!("{before}[grpc]\n")))
        );
    }

    #[test]
    fn a_file_of_ours_goes_and_a_contradiction_is_told() {
        let ours = edit().apply(None).unwrap();
        assert_eq!(edit().undo(&ours, None), Ok(None));
        let text = "[registry.\"127.0.0.1:6500\"]\nhttp = false\n";
        assert!(
            edit()
                .apply(Some(text))
                .unwrap_err()
                .what
                .contains("http = false")
        );
        let theirs = "[registry.\"127.0.0.1:6500\"]\n  http = true\n";
        let with = edit().apply(Some(theirs)).unwrap();
        assert_eq!(
            edit().undo(&with, Some(theirs)),
            Ok(Some(theirs.to_owned()))
        );
    }
}
