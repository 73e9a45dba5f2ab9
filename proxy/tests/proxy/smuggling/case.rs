//! One row of the corpus, as the files in `tests/smuggling` write it.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// A file of rows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rows {
    case: Vec<Case>,
}

/// What is sent, and the one thing that may come of it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    /// Says what is tried.
    pub(crate) name: String,
    /// Where it is known from.
    pub(crate) source: String,
    /// What the client sends. Each further part is sent when one more answer, an interim one included, has come.
    send: Vec<String>,
    /// What the origin answers, in order; without it, and for further requests, 200 with the body `ok`.
    #[serde(default)]
    answers: Vec<String>,
    /// The requests the origin must have read, in order, and no others.
    #[serde(default)]
    forwarded: Vec<String>,
    /// The one request of which the origin must have got only the beginning before its connection ended.
    pub(crate) broken_off: Option<String>,
    /// The answers the client must have read; without it one `ok` for each forwarded request.
    received: Option<Vec<String>>,
    /// The answer of which the client must have got only the beginning before its connection ended.
    pub(crate) cut: Option<String>,
    /// The status of our own answer behind those, after which the connection must be closed.
    pub(crate) refused: Option<u16>,
    /// How many connections the origin must have seen; one at most when left out.
    pub(crate) connections: Option<usize>,
}

impl Case {
    pub(crate) fn send(&self) -> Vec<Vec<u8>> {
        self.send.iter().map(|part| bytes(part)).collect()
    }

    pub(crate) fn answers(&self) -> Vec<Vec<u8>> {
        self.answers.iter().map(|answer| bytes(answer)).collect()
    }

    pub(crate) fn forwarded(&self) -> Vec<String> {
        self.forwarded
            .iter()
            .map(|text| text.trim_end().to_owned())
            .collect()
    }

    pub(crate) fn received(&self) -> Vec<String> {
        let plain =
            || vec!["HTTP/1.1 200 OK\nContent-Length: 2\n\nok".to_owned(); self.forwarded.len()];
        let given = |texts: &Vec<String>| {
            texts
                .iter()
                .map(|text| text.trim_end().to_owned())
                .collect()
        };
        self.received.as_ref().map_or_else(plain, given)
    }
}

/// Where the files are.
pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/smuggling")
}

/// The rows of one file.
pub(crate) fn load(name: &str) -> Vec<Case> {
    let text = std::fs::read_to_string(folder().join(name)).unwrap();
    let rows: Rows = toml::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
    rows.case
}

/// Line breaks of the file are only for the eye: `\r`, `\n`, `\t`, `\0`, `\\` and `\xHH` stand for bytes, and `\*N{...}`
/// for N times what is in the braces.
pub(crate) fn bytes(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text.chars();
    while let Some(char) = rest.next() {
        match char {
            '\n' => {}
            '\\' => escape(&mut rest, &mut out),
            char => out.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    out
}

fn escape(rest: &mut std::str::Chars<'_>, out: &mut Vec<u8>) {
    match rest.next() {
        Some('r') => out.push(b'\r'),
        Some('n') => out.push(b'\n'),
        Some('t') => out.push(b'\t'),
        Some('0') => out.push(0),
        Some('\\') => out.push(b'\\'),
        Some('x') => {
            let digits: String = rest.take(2).collect();
            out.push(u8::from_str_radix(&digits, 16).unwrap());
        }
        Some('*') => {
            let count: String = rest.take_while(|char| *char != '{').collect();
            let what: String = rest.take_while(|char| *char != '}').collect();
            out.extend(bytes(&what).repeat(count.parse().unwrap()));
        }
        other => panic!("the escape {other:?}"),
    }
}
