//! CDN-Loop (RFC 8586): a request that has passed this proxy before is refused instead of being sent round for ever.
//!
//! Two proxies that each take the other for the way to the application, as the two of a hop might after a mistake in
//! one's configuration, would pass a request to and fro until its head is too long.

use crate::http::fields::Fields;

/// The field's name, in lower case. No client can take it off by naming it in Connection, and no route edits it.
pub(crate) const FIELD: &str = "cdn-loop";

/// What this proxy calls itself in the field.
#[derive(Debug, Clone)]
pub(crate) struct LoopId(Box<str>);

impl LoopId {
    /// A pseudonym: a token, so that it needs no quotes and holds none of the list's separators.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let good = (1..=64).contains(&text.len()) && text.bytes().all(is_token);
        good.then(|| Self(text.into()))
    }

    /// As it is configured.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether that is its name, in capitals or not.
    pub(super) fn is_called(&self, name: &[u8]) -> bool {
        name.eq_ignore_ascii_case(self.0.as_bytes())
    }

    /// Whether a request with these fields has passed us. Letters compare without case, parameters do not count.
    pub(crate) fn has_seen(&self, fields: &dyn Fields) -> bool {
        let mut seen = false;
        fields.visit(FIELD, &mut |value| {
            seen |= value.split(|byte| *byte == b',').any(|entry| {
                let id = entry.split(|byte| *byte == b';').next();
                id.is_some_and(|id| self.is_called(id.trim_ascii()))
            });
        });
        seen
    }

    /// Appends a line of the field; those that were there stay as they are.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let parts: [&[u8]; 3] = [b"CDN-Loop: ", self.0.as_bytes(), b"\r\n"];
        parts.iter().for_each(|part| out.extend_from_slice(part));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(values: &[&'static str]) -> bool {
        let fields: Vec<_> = values
            .iter()
            .map(|value| httparse::Header {
                name: "CDN-Loop",
                value: value.as_bytes(),
            })
            .collect();
        LoopId::new("edge.a").unwrap().has_seen(&&fields[..])
    }

    #[test]
    fn it_is_found_in_every_form_of_the_list_and_nothing_else_is() {
        for found in [
            &["edge.a"] as &[_],
            &["x, EDGE.A"],
            &["x", "edge.a; v=1 ,y"],
        ] {
            assert!(seen(found), "{found:?}");
        }
        for missed in [
            &[] as &[_],
            &[""],
            &["edge.ab"],
            &["x; edge.a"],
            &["edge,a"],
        ] {
            assert!(!seen(missed), "{missed:?}");
        }
    }

    #[test]
    fn it_is_a_short_token() {
        for bad in ["", "a b", "a,b", "a;b", "\"a\"", "ä", &"a".repeat(65)] {
            assert!(LoopId::new(bad).is_none(), "{bad:?}");
        }
    }
}
