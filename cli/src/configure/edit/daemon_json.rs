//! dockerd's daemon.json: `registry-mirrors`, asked in order for Docker Hub's images.

use jsonc_parser::ParseOptions;
use jsonc_parser::cst::{CstArray, CstInputValue, CstNode, CstObject, CstRootNode};
use serde_json::Value;

use super::Unfit;

const KEY: &str = "registry-mirrors";

/// Puts the URL first.
pub(super) fn apply(text: &str, url: &str) -> Result<String, Unfit> {
    let (model, object, root) = parse(text)?;
    let input = CstInputValue::String(url.to_owned());
    match (object.get(KEY), mirrors(&object)) {
        (None, _) => {
            object.insert(0, KEY, CstInputValue::Array(vec![input]));
        }
        (Some(_), Some(array)) if position(&array, url).is_some() => return Ok(text.to_owned()),
        (Some(_), Some(array)) => {
            array.insert(0, input);
        }
        (Some(_), None) => return Err(Unfit::new(format!("`{KEY}` is no list"), "mend it")),
    }
    let mut wanted = model;
    let list = wanted
        .as_object_mut()
        .and_then(|object| object.entry(KEY).or_insert_with(|| Value::Array(Vec::new())).as_array_mut());
    list.ok_or_else(unfit)?.insert(0, url.into());
    meant(root.to_string(), &wanted)
}

/// Takes the URL out.
pub(super) fn undo(text: &str, url: &str, original: Option<&str>) -> Result<String, Unfit> {
    let (mut wanted, object, root) = parse(text)?;
    let there =
        original.is_some_and(|text| parse(text).is_ok_and(|(_, object, _)| object.get(KEY).is_some()));
    let Some((array, at)) = mirrors(&object)
        .and_then(|array| Some((position(&array, url)?, array)))
        .map(|(at, array)| (array, at))
    else {
        return Ok(text.to_owned());
    };
    let model = wanted.as_object_mut().ok_or_else(unfit)?;
    if array.elements().len() == 1 && !there {
        if let Some(property) = object.get(KEY) {
            property.remove();
        }
        model.remove(KEY);
    } else {
        array.elements().swap_remove(at).remove();
        model.get_mut(KEY).and_then(Value::as_array_mut).ok_or_else(unfit)?.remove(at);
    }
    meant(root.to_string(), &wanted)
}

/// What the file means, and the object that it is. dockerd takes no comments, no commas too many; an empty file is one
/// without keys.
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
        return Err(Unfit::new("holds no object", "write { } around its keys, or move it away"));
    }
    let root = CstRootNode::parse(text, &ParseOptions::default()).map_err(|_| unfit())?;
    let object = root.object_value_or_create().ok_or_else(unfit)?;
    Ok((model, object, root))
}

fn mirrors(object: &CstObject) -> Option<CstArray> {
    object.get(KEY)?.array_value()
}

fn position(array: &CstArray, url: &str) -> Option<usize> {
    let same = |node: &CstNode| {
        node.as_string_lit().and_then(|text| text.decoded_value().ok()).is_some_and(|text| text == url)
    };
    array.elements().iter().position(same)
}

fn meant(edited: String, wanted: &Value) -> Result<String, Unfit> {
    match serde_json::from_str::<Value>(&edited) {
        Ok(value) if value == *wanted => Ok(edited),
        _ => Err(unfit()),
    }
}

fn unfit() -> Unfit {
    Unfit::new("has a key twice, or a form that cannot be added to", "mend it, or add the mirror by hand")
}

#[cfg(test)]
mod tests {
    use super::super::Edit;
    use super::*;

    const URL: &str = "http://127.0.0.1:6500";

    #[test]
    fn the_mirror_comes_first_and_the_rest_keeps_its_order_and_look() {
        for (before, after) in [
            ("", "{\n  \"registry-mirrors\": [\"http://127.0.0.1:6500\"]\n}\n"),
            ("{}", "{\n  \"registry-mirrors\": [\"http://127.0.0.1:6500\"]\n}"),
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
            let back: Value = serde_json::from_str(&undo(&applied, URL, Some(before)).unwrap()).unwrap();
            assert_eq!(
                back,
                serde_json::from_str::<Value>(if before.is_empty() { "{}" } else { before }).unwrap()
            );
        }
    }

    #[test]
    fn what_dockerd_would_not_read_is_refused() {
        for text in ["{", "[]", "{\"a\": 1,}", "{} // why", "{\"registry-mirrors\": \"http://a\"}", "null"] {
            assert!(apply(text, URL).is_err(), "{text}");
        }
        assert!(apply("{\"a\": 1,\n}", URL).unwrap_err().what.contains("line 2"));
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
