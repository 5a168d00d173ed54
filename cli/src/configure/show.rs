//! A change as a unified diff, for people: without what looks like a secret.

use similar::TextDiff;

use super::plan::{Change, View};

/// Words in keys and tables whose values nobody's terminal log should have.
const SECRETS: [&str; 7] = [
    "auth",
    "credential",
    "header",
    "passw",
    "proxy",
    "secret",
    "token",
];

/// The difference, with file names as they are on disk.
pub(super) fn difference(view: &View<'_>, change: &Change) -> String {
    let path = view.show(&change.path);
    let name = |text: &Option<String>| {
        if text.is_some() {
            path.clone()
        } else {
            "/dev/null".to_owned()
        }
    };
    let text = |text: &Option<String>| masked(text.as_deref().unwrap_or_default());
    let (before, after) = (text(&change.before), text(&change.after));
    let diff = TextDiff::from_lines(before.as_str(), after.as_str());
    diff.unified_diff()
        .header(&name(&change.before), &name(&change.after))
        .to_string()
}

/// The same lines, values hidden that may be secrets.
fn masked(text: &str) -> String {
    let mut in_secrets = false;
    let is_secret = |text: &str| {
        let text = text.to_ascii_lowercase();
        SECRETS.iter().any(|word| text.contains(word))
    };
    let mask = |line: &str| {
        let content = line.trim_start();
        if content.starts_with('[') && content.trim_end().ends_with(']') && !content.contains('=') {
            in_secrets = is_secret(content);
            return line.to_owned();
        }
        let key = content.find(['=', ':']).map_or("", |at| &content[..at]);
        let quiet = content.trim().is_empty() || content.starts_with('#') && !is_secret(content);
        if quiet || !(in_secrets || is_secret(key) || content.starts_with('#')) {
            return line.to_owned();
        }
        let start = line.len() - content.len() + key.len();
        let end = if line.ends_with('\n') { "\n" } else { "" };
        let sign = content[key.len()..]
            .chars()
            .next()
            .filter(|_| !key.is_empty());
        format!(
            "{}{} ***{end}",
            &line[..start],
            sign.map_or(String::new(), String::from)
        )
    };
    text.split_inclusive('\n').map(mask).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let text = "version = 2 # plain\n[host.\"https://a\".header]\n  x-key = [\n    \"hidden\",\n  ]\n[b]\n  password='hidden'\n\
                    # password: hidden\n# a word\n\"http-proxy\": \"http://u:hidden@p\",\n[c]\n  path = \"shown\"";
        let masked = masked(text);
        assert!(!masked.contains("hidden"), "{masked}");
        assert_eq!(masked.lines().count(), text.lines().count());
        for shown in [
            "version = 2 # plain\n",
            "  path = \"shown\"",
            "# a word\n",
            "  x-key = ***\n",
        ] {
            assert!(masked.contains(shown), "{shown}: {masked}");
        }
    }

    #[test]
    fn a_difference_names_the_file_and_the_lines() {
        let root = super::super::root::Root::new("/image");
        let change = Change {
            path: "/etc/a.toml".into(),
            before: Some("a = 1\nb = 2\n".to_owned()),
            after: Some("a = 1\nc = 3\nb = 2\n".to_owned()),
        };
        assert_eq!(
            difference(&View::plain(&root), &change),
            "--- /image/etc/a.toml\n+++ /image/etc/a.toml\n@@ -1,2 +1,3 @@\n a = 1\n+c = 3\n b = 2\n"
        );
        let gone = Change {
            after: None,
            ..change
        };
        assert!(difference(&View::plain(&root), &gone).contains("+++ /dev/null\n"));
    }
}
