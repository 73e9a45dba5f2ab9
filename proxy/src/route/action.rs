//! What a route does to a request and its answer, besides choosing who serves it: header fields, redirects, paths.
//!
//! Nothing here can touch what frames a message, names its connection or speaks for the client: those fields are
//! refused when the configuration is read.

use regex::Regex;

use super::condition::below;
use super::template::{Template, Values};
use crate::http::head::same_field;

/// Fields that frame a message or belong to one connection.
const FRAMING: [&str; 9] = [
    "connection",
    "content-length",
    "expect",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Whether a configuration may set or remove a field.
pub(crate) fn may_edit(name: &str) -> bool {
    let framing = FRAMING.iter().any(|known| known.eq_ignore_ascii_case(name));
    let is_loop = name.eq_ignore_ascii_case(crate::forwarded::LOOP_FIELD);
    !framing && !is_loop && crate::forwarded::OurField::of(name).is_none()
}

/// Changes to the header fields of a message.
#[derive(Debug, Clone, Default)]
pub(crate) struct FieldEdits {
    /// In the order of the file; names in lower case.
    set: Vec<(String, Template)>,
    /// Names in lower case.
    remove: Vec<String>,
}

impl FieldEdits {
    pub(crate) fn new(set: Vec<(String, Template)>, remove: Vec<String>) -> Self {
        Self { set, remove }
    }

    /// Whether there is nothing to change.
    pub(crate) const fn is_empty(&self) -> bool {
        self.set.is_empty() && self.remove.is_empty()
    }

    /// Whether a field of the message is left out: removed, or about to be set.
    pub(crate) fn drops(&self, name: &str) -> bool {
        self.remove.iter().any(|known| same_field(name, known)) || self.sets(name)
    }

    /// Whether a field gets a value of ours.
    pub(crate) fn sets(&self, name: &str) -> bool {
        self.set.iter().any(|(known, _)| same_field(name, known))
    }

    /// Appends the lines of all fields that are set.
    pub(crate) fn write(&self, values: &Values<'_>, out: &mut Vec<u8>) {
        for (name, template) in &self.set {
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(b": ");
            template.write(values, out);
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// An answer that sends the client elsewhere. It never reaches an upstream, so it works while a service holds, too.
#[derive(Debug, Clone)]
pub(crate) struct Redirect {
    pub(crate) status: RedirectStatus,
    /// An absolute URL, or a path.
    pub(crate) to: Template,
}

/// How it says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RedirectStatus {
    /// 301: for good; a POST may come back as a GET.
    MovedPermanently,
    /// 302: for now; a POST may come back as a GET.
    Found,
    /// 303: come back with a GET.
    SeeOther,
    /// 307: for now, with the same method.
    TemporaryRedirect,
    /// 308: for good, with the same method.
    PermanentRedirect,
}

impl RedirectStatus {
    pub(crate) const fn of(code: i64) -> Option<Self> {
        Some(match code {
            301 => Self::MovedPermanently,
            302 => Self::Found,
            303 => Self::SeeOther,
            307 => Self::TemporaryRedirect,
            308 => Self::PermanentRedirect,
            _ => return None,
        })
    }

    pub(crate) const fn code(self) -> u16 {
        match self {
            Self::MovedPermanently => 301,
            Self::Found => 302,
            Self::SeeOther => 303,
            Self::TemporaryRedirect => 307,
            Self::PermanentRedirect => 308,
        }
    }

    /// The words of its status line.
    pub(crate) const fn reason(self) -> &'static str {
        match self {
            Self::MovedPermanently => "Moved Permanently",
            Self::Found => "Found",
            Self::SeeOther => "See Other",
            Self::TemporaryRedirect => "Temporary Redirect",
            Self::PermanentRedirect => "Permanent Redirect",
        }
    }
}

impl Redirect {
    /// Appends the value of the Location field. Bytes that no URL may have are encoded.
    pub(crate) fn write_location(&self, values: &Values<'_>, out: &mut Vec<u8>) {
        let mut location = Vec::new();
        self.to.write(values, &mut location);
        for byte in location {
            if byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&byte) {
                out.push(byte);
            } else {
                const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
                out.extend_from_slice(&[
                    b'%',
                    DIGITS[usize::from(byte >> 4)],
                    DIGITS[usize::from(byte & 15)],
                ]);
            }
        }
    }
}

/// A change of the path on its way to the upstream. The query stays.
#[derive(Debug, Clone)]
pub(crate) enum Rewrite {
    /// The prefix goes, or another takes its place. A path that is not below it stays as it is.
    Prefix {
        /// Without a slash at its end, unless it is only that.
        prefix: String,
        /// Likewise; empty to strip.
        to: String,
    },
    /// The first place where the expression matches is replaced; `$1` is its first group.
    Regex {
        /// The expression.
        regex: Regex,
        /// Begins with a slash.
        to: String,
    },
}

impl Rewrite {
    /// Appends the new path.
    pub(crate) fn write(&self, path: &str, out: &mut Vec<u8>) {
        match self {
            // The asterisk of OPTIONS stands for the server.
            _ if !path.starts_with('/') => out.extend_from_slice(path.as_bytes()),
            Self::Prefix { prefix, to } => match below(prefix, path) {
                Some("") if !to.is_empty() => out.extend_from_slice(to.as_bytes()),
                Some(rest) => {
                    out.extend_from_slice(to.strip_suffix('/').unwrap_or(to).as_bytes());
                    out.push(b'/');
                    out.extend_from_slice(rest.strip_prefix('/').unwrap_or(rest).as_bytes());
                }
                None => out.extend_from_slice(path.as_bytes()),
            },
            Self::Regex { regex, to } => {
                let new = regex.replace(path, to.as_str());
                // The path may have begun before the match.
                if !new.starts_with('/') {
                    out.push(b'/');
                }
                out.extend_from_slice(new.as_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::template::tests::VALUES;
    use super::*;

    fn rewritten(rewrite: &Rewrite, path: &str) -> String {
        let mut out = Vec::new();
        rewrite.write(path, &mut out);
        String::from_utf8(out).unwrap()
    }

    fn prefix(prefix: &str, to: &str) -> Rewrite {
        Rewrite::Prefix {
            prefix: prefix.to_owned(),
            to: to.to_owned(),
        }
    }

    #[test]
    fn a_prefix_is_stripped_or_replaced_at_a_border() {
        for (from, to, path, new) in [
            ("/api", "", "/api/x", "/x"),
            ("/api", "", "/api", "/"),
            ("/api", "", "/api/", "/"),
            ("/api", "", "/apix", "/apix"),
            ("/api", "/v2", "/api/x", "/v2/x"),
            ("/api", "/v2", "/api", "/v2"),
            ("/api", "/", "/api/x", "/x"),
            ("/", "/v2", "/x", "/v2/x"),
            ("/", "/v2", "/", "/v2"),
            ("/api/", "/v2/", "/api/x", "/v2/x"),
        ] {
            assert_eq!(
                rewritten(&prefix(from, to), path),
                new,
                "{from} {to} {path}"
            );
        }
    }

    #[test]
    fn an_expression_replaces_what_it_matches() {
        let rewrite = Rewrite::Regex {
            regex: Regex::new("^/old/([a-z]+)").unwrap(),
            to: "/new/$1".to_owned(),
        };
        assert_eq!(rewritten(&rewrite, "/old/abc/d"), "/new/abc/d");
        assert_eq!(rewritten(&rewrite, "/other"), "/other");
    }

    #[test]
    fn fields_are_removed_and_set() {
        let template = |text: &str| Template::parse(text).unwrap();
        let edits = FieldEdits::new(
            vec![("x-client".to_owned(), template("{client}"))],
            vec!["server".to_owned()],
        );
        assert!(edits.drops("x_client"), "CGI cannot tell it from x-client");
        assert!(edits.drops("Server") && edits.drops("X-Client") && !edits.drops("Date"));
        let mut out = Vec::new();
        edits.write(&VALUES, &mut out);
        assert_eq!(out, b"x-client: 192.0.2.7\r\n");
    }

    #[test]
    fn what_frames_a_message_or_speaks_for_the_client_is_not_editable() {
        for name in [
            "Content-Length",
            "te",
            "X-Forwarded-For",
            "x_request_id",
            "Upgrade",
        ] {
            assert!(!may_edit(name), "{name}");
        }
        assert!(may_edit("host") && may_edit("server"));
    }

    #[test]
    fn a_location_is_a_url_whatever_the_path() {
        let redirect = Redirect {
            status: RedirectStatus::PermanentRedirect,
            to: Template::parse("https://{host}{path}{query}").unwrap(),
        };
        let values = Values {
            path: "/a\"b<é>",
            ..VALUES
        };
        let mut out = Vec::new();
        redirect.write_location(&values, &mut out);
        assert_eq!(out, b"https://example.org/a%22b%3C%C3%A9%3E?c=d");
    }

    proptest! {
        #[test]
        fn a_rewritten_path_begins_with_a_slash(
            from in "(/[ab]{1,2}){1,2}|/", to in "|/|(/[ab]{1,2}){1,2}/?", path in "(/[ab]{0,2}){1,4}"
        ) {
            let new = rewritten(&prefix(&from, &to), &path);
            prop_assert!(new.starts_with('/'), "{from} {to} {path} {new}");
        }
    }
}
