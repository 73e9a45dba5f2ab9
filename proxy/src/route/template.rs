//! Texts with variables: `{client}`, `{host}`, `{path}`, `{query}`, `{scheme}`, `{request_id}`, `{tls_subject}`.
//!
//! What is filled in never ends a header line: bytes that could are left out, whoever sent them. Braces around
//! anything that is not a word are ordinary text.

use crate::http::request::RequestId;

/// One variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Variable {
    /// The client's address, as far as we believe the request.
    Client,
    /// The host that was asked for, without port.
    Host,
    /// The path as it is matched, without query.
    Path,
    /// The query with its question mark; empty if there is none.
    Query,
    /// `http` or `https`, as the client asked.
    Scheme,
    /// The id in X-Request-Id.
    RequestId,
    /// Subject of the client's certificate; empty without one.
    TlsSubject,
}

impl Variable {
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "client" => Self::Client,
            "host" => Self::Host,
            "path" => Self::Path,
            "query" => Self::Query,
            "scheme" => Self::Scheme,
            "request_id" => Self::RequestId,
            "tls_subject" => Self::TlsSubject,
            _ => return None,
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Variable(Variable),
}

/// A text with places to fill in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Template(Vec<Part>);

/// A text that is no template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BadTemplate {
    /// A variable nobody knows.
    Variable,
    /// A byte that no header line can carry.
    Control,
}

impl Template {
    /// Reads a text.
    ///
    /// # Errors
    /// It names an unknown variable, or has a control byte in it.
    pub(crate) fn parse(text: &str) -> Result<Self, BadTemplate> {
        if text.chars().any(char::is_control) {
            return Err(BadTemplate::Control);
        }
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            plain.push_str(before);
            rest = after;
            let word = after.split_once('}').filter(|(word, _)| is_word(word));
            let Some((word, after)) = word else {
                plain.push('{');
                continue;
            };
            let variable = Variable::of(word).ok_or(BadTemplate::Variable)?;
            if !plain.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut plain)));
            }
            parts.push(Part::Variable(variable));
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        Ok(Self(parts))
    }

    /// Whether a variable occurs.
    pub(crate) fn names(&self, variable: Variable) -> bool {
        self.0.contains(&Part::Variable(variable))
    }

    /// Appends the text with everything filled in.
    pub(crate) fn write(&self, values: &Values<'_>, out: &mut Vec<u8>) {
        for part in &self.0 {
            match part {
                Part::Text(text) => out.extend_from_slice(text.as_bytes()),
                Part::Variable(Variable::RequestId) => match values.request_id {
                    Id::Ours(id) => id.write(out),
                    Id::Theirs(id) => out.extend_from_slice(id),
                },
                Part::Variable(variable) => {
                    let value = values.of(*variable);
                    out.extend(value.iter().filter(|byte| !byte.is_ascii_control()));
                }
            }
        }
    }
}

fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

/// The id a request goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Id<'r> {
    /// We gave it one.
    Ours(RequestId),
    /// It came with one from somebody we trust.
    Theirs(&'r [u8]),
}

/// What is filled in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Values<'r> {
    pub(crate) client: &'r [u8],
    pub(crate) host: &'r [u8],
    pub(crate) path: &'r str,
    /// With its question mark.
    pub(crate) query: &'r str,
    pub(crate) scheme: &'r [u8],
    pub(crate) request_id: Id<'r>,
    pub(crate) tls_subject: &'r [u8],
}

impl Values<'_> {
    const fn of(&self, variable: Variable) -> &[u8] {
        match variable {
            Variable::Client => self.client,
            Variable::Host => self.host,
            Variable::Path => self.path.as_bytes(),
            Variable::Query => self.query.as_bytes(),
            Variable::Scheme => self.scheme,
            Variable::TlsSubject => self.tls_subject,
            Variable::RequestId => b"",
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) const VALUES: Values<'_> = Values {
        client: b"192.0.2.7",
        host: b"example.org",
        path: "/a/b",
        query: "?c=d",
        scheme: b"https",
        request_id: Id::Ours(RequestId {
            origin: 1,
            number: 2,
        }),
        tls_subject: b"CN=me",
    };

    fn written(text: &str) -> String {
        let mut out = Vec::new();
        Template::parse(text).unwrap().write(&VALUES, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn variables_are_filled_in() {
        assert_eq!(
            written("{scheme}://{host}{path}{query}"),
            "https://example.org/a/b?c=d"
        );
        assert_eq!(
            written("for {client} by {tls_subject} as {request_id}."),
            "for 192.0.2.7 by CN=me as 0000000000000001-2."
        );
    }

    #[test]
    fn braces_that_are_no_variable_are_text() {
        for text in [
            "{\"max_age\":10,\"a\":{}}",
            "{",
            "}",
            "{{}",
            "{A}",
            "{ host }",
            "",
        ] {
            assert_eq!(written(text), text);
        }
        assert_eq!(written("{{host}}"), "{example.org}");
    }

    #[test]
    fn an_unknown_variable_and_a_control_byte_are_refused() {
        assert_eq!(Template::parse("{hots}"), Err(BadTemplate::Variable));
        for text in ["a\r\nb", "a\0", "a\nb"] {
            assert_eq!(Template::parse(text), Err(BadTemplate::Control));
        }
    }

    proptest! {
        #[test]
        fn nothing_that_is_filled_in_ends_a_line(value in proptest::collection::vec(any::<u8>(), 0..40)) {
            let values = Values { tls_subject: &value, host: &value, ..VALUES };
            let mut out = Vec::new();
            Template::parse("{tls_subject} {host}").unwrap().write(&values, &mut out);
            prop_assert!(!out.iter().any(u8::is_ascii_control));
        }
    }
}
