//! The media types that a client accepts, in one form for all equal headers (RFC 9110, 12.5.1): a registry's answer to
//! one of them counts for the others.

use std::collections::BTreeMap;

use crate::digest::{Algorithm, Chain, Digest};

/// Longest `Accept`, all its lines together, that is looked at. The longest that runtimes send is a tenth of that.
pub const MAX_ACCEPT_BYTES: usize = 4 << 10;

/// Weights are in thousandths (RFC 9110, 12.4.2).
const FULL: u16 = 1000;

/// The accepted media types, each with its weight. Two values are equal when they accept the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Accept(Vec<(String, u16)>);

impl Accept {
    /// Parses the lines of an `Accept`; no line at all accepts everything. `None` for a list that is too long to be
    /// remembered, or has an invalid weight: registries treat those in unknown ways.
    pub fn parse<'a>(lines: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let (mut accepted, mut bytes) = (BTreeMap::new(), 0);
        for line in lines {
            bytes += line.len();
            if bytes > MAX_ACCEPT_BYTES {
                return None;
            }
            for element in line
                .split(',')
                .map(str::trim)
                .filter(|element| !element.is_empty())
            {
                let (range, weight) = range_and_weight(element)?;
                let most = accepted.entry(range).or_insert(weight);
                *most = weight.max(*most);
            }
        }
        if accepted.is_empty() {
            accepted.insert("*/*".to_owned(), FULL);
        }
        Some(Self(accepted.into_iter().collect()))
    }

    /// The hash of its one form, to be remembered in its place.
    pub fn digest(&self) -> Digest {
        let mut chain = Chain::new(Algorithm::Sha256);
        for (range, weight) in &self.0 {
            chain.update(format!("{range},{weight}\n").as_bytes());
        }
        chain.finish()
    }
}

/// A media range with its parameters in lower case and without blanks, and its weight.
fn range_and_weight(element: &str) -> Option<(String, u16)> {
    let mut weight = FULL;
    let mut range = String::with_capacity(element.len());
    for (at, part) in element.split(';').map(str::trim).enumerate() {
        let part = part.to_ascii_lowercase();
        match part.strip_prefix("q=") {
            Some(q) if at > 0 => weight = thousandths(q)?,
            _ if part.is_empty() => {}
            _ => {
                range.push_str(if range.is_empty() { "" } else { ";" });
                range.push_str(&part);
            }
        }
    }
    Some((range, weight))
}

/// `0`, `1`, or a fraction of three digits at most.
fn thousandths(q: &str) -> Option<u16> {
    let (whole, fraction) = q.split_once('.').unwrap_or((q, ""));
    let digits = fraction.len() <= 3 && fraction.bytes().all(|b| b.is_ascii_digit());
    let thousandths: u16 = if digits {
        format!("{fraction:0<3}").parse().ok()?
    } else {
        return None;
    };
    match (whole, thousandths) {
        ("0", thousandths) => Some(thousandths),
        ("1", 0) => Some(FULL),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accept(lines: &[&str]) -> Option<Accept> {
        Accept::parse(lines.iter().copied())
    }

    #[test]
    fn the_same_said_in_other_words_is_the_same() {
        for (one, other) in [
            (&["a/b, c/d"][..], &["a/b", "c/d"][..]),
            (&["a/b,c/d"], &["c/d ,, a/b", ""]),
            (&["A/B"], &["a/b;q=1"]),
            (&["a/b;q=1.000"], &["a/b; Q=1"]),
            (&["a/b;q=0.5"], &["a/b ; q=0.50"]),
            (&["a/b;q=0"], &["a/b;q=0.000"]),
            (&["a/b;q=0.5, a/b"], &["a/b"]),
            (&["a/b;charset=X; q=0.1"], &["a/b; CHARSET=x;q=0.1"]),
            (&[], &["*/*"]),
            (&[""], &["*/*"]),
        ] {
            assert_eq!(
                accept(one).unwrap(),
                accept(other).unwrap(),
                "{one:?} {other:?}"
            );
        }
    }

    #[test]
    fn what_may_be_answered_in_another_way_differs() {
        let all = [
            "a/b",
            "a/b;q=0.9",
            "a/b;q=0.901",
            "a/b;q=0",
            "a/b, c/d",
            "a/b, c/d;q=0.5",
            "a/b;q=0.5, c/d",
            "a/b;x=1",
            "*/*",
            "a/*",
        ]
        .map(|line| accept(&[line]).unwrap());
        for (i, one) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|other| other != one), "{one:?}");
        }
    }

    #[test]
    fn what_is_too_long_or_weighs_nonsense_is_not_understood() {
        let long = "a/b, ".repeat(MAX_ACCEPT_BYTES);
        for line in [
            "a/b;q=2",
            "a/b;q=1.1",
            "a/b;q=-1",
            "a/b;q=",
            "a/b;q=.5",
            "a/b;q=0.1234",
            "a/b;q=x",
            &long,
        ] {
            assert_eq!(accept(&[line]), None, "{}", &line[..line.len().min(20)]);
        }
    }
}
