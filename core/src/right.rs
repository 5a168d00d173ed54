//! With what right content is read at an origin. Access comes before bytes, and a secret goes no further than it must.

use std::fmt;

/// Longest token taken, in bytes: registries with many claims make them a few kilobytes long.
pub const MAX_TOKEN_BYTES: usize = 16 << 10;

/// A bearer token (RFC 6750) that lets whoever has it pull from one repository for a short while. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Bearer(String);

impl Bearer {
    /// `None` where `text` is no token: `b64token` of RFC 6750, section 2.1, and not too long.
    pub fn new(text: &str) -> Option<Self> {
        let word = text.trim_end_matches('=');
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte);
        let is = !word.is_empty() && text.len() <= MAX_TOKEN_BYTES && word.bytes().all(legal);
        is.then(|| Self(text.to_owned()))
    }

    /// The token itself, for whom it is meant.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bearer(…)")
    }
}

/// The right with which a node reads a task from its origin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Right {
    /// Its own, as any member has one: anonymous, or by what the member's configuration says.
    #[default]
    Own,
    /// A client's token, which may be lent to a seed for this one transfer.
    Token(Bearer),
    /// A client's credentials that don't leave the node: a password, or a token that is not to be lent.
    Kept,
}

impl Right {
    /// The token that may go to a seed.
    pub const fn token(&self) -> Option<&Bearer> {
        match self {
            Right::Token(token) => Some(token),
            Right::Own | Right::Kept => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_header_can_carry_is_a_token() {
        for (text, is) in [
            ("abc.DEF-_~+/123==", true),
            ("a", true),
            ("", false),
            ("==", false),
            ("a=b", false),
            ("a b", false),
            ("a\r\nX: y", false),
            ("é", false),
        ] {
            assert_eq!(Bearer::new(text).is_some(), is, "{text:?}");
        }
        assert!(Bearer::new(&"a".repeat(MAX_TOKEN_BYTES)).is_some());
        assert!(Bearer::new(&"a".repeat(MAX_TOKEN_BYTES + 1)).is_none());
    }

    #[test]
    fn a_token_is_not_shown() {
        let right = Right::Token(Bearer::new("secret").unwrap());
        assert!(!format!("{right:?}").contains("secret"));
    }
}
