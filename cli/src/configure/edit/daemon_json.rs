//! dockerd's daemon.json: `registry-mirrors`, asked in order for Docker Hub's images.

use jsonc_parser::ParseOptions;
use jsonc_parser::cst::{CstArray, CstInputValue, CstNode, CstObject, CstObjectProp, CstRootNode};
use serde_json::Value;

use super::Unfit;

const KEY: &str = "registry-mirrors";

/// Puts the URL first.
pub(super) fn apply(text: &str, url: &str) -> Result<String, Unfit> {
    let (mut wanted, object, root) = parse(text)?;
    let input = CstInputValue::String(url.to_owned());
    match &lists(&object)[..] {
        [] => {
            object.insert(0, KEY, CstInputValue::Array(vec![input]));
            wanted[KEY] = vec![url].into();
        }
        // dockerd itself compares names exactly, and refuses a file with any other.
        [(name, _)] if name != KEY => {
            return Err(Unfit::new(
                format!("has `{name}`: dockerd would not start with it"),
                format!("write `{KEY}`"),
            ));
        }
        [(name, property)] => {
            let array = property.array_value();
            let array =
                array.ok_or_else(|| Unfit::new(format!("`{name}` is no list"), "mend it"))?;
            if position(&array, url).is_some() {
                return Ok(text.to_owned());
            }
            array.insert(0, input);
            wanted[name]
                .as_array_mut()
                .ok_or_else(unfit)?
                .insert(0, url.into());
        }
        _ => {
            return Err(Unfit::new(
                format!("has `{KEY}` more than once"),
                "leave one of them",
            ));
        }
    }
    meant(root.to_string(), &wanted)
}

/// Takes the URL out.
pub(super) fn undo(text: &str, url: &str, original: Option<&str>) -> Result<String, Unfit> {
    let (mut wanted, object, root) = parse(text)?;
    let found = lists(&object).into_iter().find_map(|(name, property)| {
        let array = property.array_value()?;
        let at = position(&array, url)?;
        Some((name, property, array, at))
    });
    let Some((name, property, array, at)) = found else {
        return Ok(text.to_owned());
    };
    let there = original
        .is_some_and(|text| parse(text).is_ok_and(|(model, ..)| model.get(&name).is_some()));
    let model = wanted.as_object_mut().ok_or_else(unfit)?;
    if array.elements().len() == 1 && !there {
        property.remove();
        model.remove(&name);
    } else {
        array.elements().swap_remove(at).remove();
        // A name that is there twice is the last one to the model, the first one here.
        let list = model
            .get_mut(&name)
            .and_then(Value::as_array_mut)
            .filter(|list| at < list.len());
        list.ok_or_else(unfit)?.remove(at);
    }
    meant(root.to_string(), &wanted)
}

/// The value of the file, and the object in it. dockerd takes no comments and no trailing commas; an empty file counts
/// as one without keys.
fn parse(text: &str) -> Result<(Value, CstObject, CstRootNode), Unfit> {
    let model = if text.trim().is_empty() { "{}" } else { text };
    let model: Value = serde_json::from_str(model).map_err(|error| {
        let place = format!("line {}, column {}", error.line(), error.column());
        Unfit::new(
            format!("is no JSON ({place}): dockerd would not start with it"),
            "mend it, or move it away",
        )
    })?;
    if !model.is_object() {
        return Err(Unfit::new(
            "holds no object",
            "write { } around its keys, or move it away",
        ));
    }
    let root = CstRootNode::parse(text, &ParseOptions::default()).map_err(|_| unfit())?;
    let object = root.object_value_or_create().ok_or_else(unfit)?;
    Ok((model, object, root))
}

/// The key with its name as it is written, in any case.
fn lists(object: &CstObject) -> Vec<(String, CstObjectProp)> {
    let named = |property: CstObjectProp| Some((property.decoded_name()?, property));
    let properties = object.properties().into_iter().filter_map(named);
    properties
        .filter(|(name, _)| name.eq_ignore_ascii_case(KEY))
        .collect()
}

/// The position of the mirror: dockerd ends each URL with a slash, whether it is written with one or without.
fn position(array: &CstArray, url: &str) -> Option<usize> {
    let bare = |url: &str| url.strip_suffix('/').unwrap_or(url).to_owned();
    let text = |node: &CstNode| node.as_string_lit()?.decoded_value().ok();
    array
        .elements()
        .iter()
        .position(|node| text(node).is_some_and(|text| bare(&text) == bare(url)))
}

fn meant(edited: String, wanted: &Value) -> Result<String, Unfit> {
    match serde_json::from_str::<Value>(&edited) {
        Ok(value) if value == *wanted => Ok(edited),
        _ => Err(unfit()),
    }
}

fn unfit() -> Unfit {
    Unfit::new(
        "has a key twice, or a form that cannot be added to",
        "mend it, or add the mirror by hand",
    )
}

#[cfg(test)]
mod tests {
    use super::super::Edit;
    use super::*;

    const URL: &str = "http://127.0.0.1:6500";

    fn model(text: &str) -> Value {
        parse(text).unwrap().0
    }

    #[test]
    fn the_mirror_comes_first_and_the_rest_keeps_its_order_and_look() {
        for (before, after) in [
            (
                "",
                "{\n  \"registry-mirrors\": [\"http://127.0.0.1:6500\"]\n}\n",
            ),
            (
                "{}",
                "{\n  \"registry-mirrors\": [\"http://127.0.0.1:6500\"]\n}",
            ),
            (
                "{\n    \"log-driver\": \"journald\",\n    \"a\": {\"z\":1,\"b\":2}\n}\n",
                "{\n    \"registry-mirrors\": [\"http://127.0.0.1:6500\"],\n    \"log-driver\": \"journald\",\n    \
                 \"a\": {\"z\":1,\"b\":2}\n}\n",
            ),
            (
                "{\"registry-mirrors\": [\"https://b\", \"https://a\"], \"x\": 1}",
                "{\"registry-mirrors\": [\"http://127.0.0.1:6500\", \"https://b\", \"https://a\"], \"x\": 1}",
            ),
        ] {
            let applied = apply(before, URL).unwrap();
            assert_eq!(applied, after);
            assert_eq!(apply(&applied, URL).unwrap(), applied, "twice is once");
            assert_eq!(
                model(&undo(&applied, URL, Some(before)).unwrap()),
                model(before)
            );
        }
    }

    #[test]
    fn a_url_with_a_slash_is_the_same_and_a_key_in_other_case_is_refused() {
        let odd = "{\"Registry-Mirrors\": [\"https://b\"], \"x\": 1}";
        assert!(
            apply(odd, URL)
                .unwrap_err()
                .what
                .contains("`Registry-Mirrors`: dockerd would not start")
        );
        // Text written beside such a key is removed again.
        let written =
            "{\"Registry-Mirrors\": [\"http://127.0.0.1:6500\", \"https://b\"], \"x\": 1}";
        assert_eq!(model(&undo(written, URL, Some(odd)).unwrap()), model(odd));
        let slashed = "{\"registry-mirrors\": [\"https://b\", \"http://127.0.0.1:6500/\"]}";
        assert_eq!(apply(slashed, URL).unwrap(), slashed, "it is there already");
        let ours = apply("{}", URL).unwrap().replace("6500", "6500/");
        assert_eq!(undo(&ours, URL, Some("{}")).unwrap(), "{}");
        let twice = "{\"registry-mirrors\": [\"http://127.0.0.1:6500\"], \"Registry-Mirrors\": [\"https://b\"]}";
        assert!(
            apply(twice, URL)
                .unwrap_err()
                .what
                .contains("more than once")
        );
        let left = undo(twice, URL, Some("{\"Registry-Mirrors\": [\"https://b\"]}")).unwrap();
        assert_eq!(
            left, "{ \"Registry-Mirrors\": [\"https://b\"]}",
            "what an earlier hawker wrote goes"
        );
        let alike =
            "{\"registry-mirrors\": [\"a\", \"http://127.0.0.1:6500\"], \"registry-mirrors\": []}";
        assert!(undo(alike, URL, Some("{}")).is_err());
    }

    #[test]
    fn what_dockerd_would_not_read_is_refused() {
        for text in [
            "{",
            "[]",
            "{\"a\": 1,}",
            "{} // why",
            "{\"registry-mirrors\": \"http://a\"}",
            "null",
        ] {
            assert!(apply(text, URL).is_err(), "{text}");
        }
        assert!(
            apply("{\"a\": 1,\n}", URL)
                .unwrap_err()
                .what
                .contains("line 2")
        );
    }

    #[test]
    fn keys_that_came_since_stay_and_a_file_of_ours_goes() {
        let edit = Edit::DockerMirror { url: URL.into() };
        let ours = apply("", URL).unwrap();
        assert_eq!(edit.undo(&ours, None), Ok(None));
        let more = ours.replace("\"registry", "\"debug\": true,\n  \"registry");
        let left = edit.undo(&more, None).unwrap().unwrap();
        assert_eq!(left, "{\n  \"debug\": true\n}\n");
    }
}
