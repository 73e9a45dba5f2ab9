//! The rows of HTTP/2: what a stream says must come out of the proxy as exactly the request the row names, or not at
//! all; and the next stream of the connection must be answered, unless the row says that the connection ends.

use std::path::Path;

use serde::Deserialize;

use super::case::{bytes, folder};
use super::frames::{Ending, Frames};
use super::reading::Read;
use super::recorder::Recorder;
use super::{Outcome, compare, report, same};
use crate::world::{Nobody, PATIENCE, Plan};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rows {
    case: Vec<Row>,
}

/// One stream.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    name: String,
    source: String,
    /// Lines of `name: value`, with the escapes of the other files. They are sent as they are.
    headers: Vec<String>,
    /// DATA frames; without any the header list ends the stream.
    #[serde(default)]
    data: Vec<String>,
    #[serde(default)]
    trailers: Vec<String>,
    forwarded: Option<String>,
    /// The request of which the origin may have got a beginning, depending on which frame was looked at first.
    broken_off: Option<String>,
    /// How the stream ends when it is not answered 200: `status 400`, `reset 1`, `connection 1` or `connection`.
    ends: Option<String>,
}

#[test]
fn streams_that_become_requests_are_refused_or_read_once() {
    let text = std::fs::read_to_string(folder().join(Path::new("streams.toml"))).unwrap();
    let rows: Rows = toml::from_str(&text).unwrap();
    report(
        "streams.toml",
        rows.case
            .iter()
            .map(|row| (&row.name[..], &row.source[..], run(row))),
    );
}

fn run(row: &Row) -> Outcome {
    let recorder = Recorder::new(Vec::new());
    let mut plan = Plan::new(recorder.address(), Nobody::new().address());
    plan.workers = 1;
    let mut world = plan.start();
    let mut client = Frames::connect(world.address());
    send(&mut client, row);
    let ending = client.ending(1);
    let mut forwarded: Vec<String> = row
        .forwarded
        .iter()
        .map(|text| text.trim_end().to_owned())
        .collect();
    let mut next = Ok(());
    if !matches!(ending, Ending::Connection(_)) {
        let list = [
            ":method: GET",
            ":scheme: http",
            ":authority: h",
            ":path: /next",
        ]
        .map(field);
        client.headers(3, &list, true);
        forwarded.push("GET /next HTTP/1.1\nHost: h".to_owned());
        next = same("the next stream", &Ending::Status(200), &client.ending(3));
    }
    drop(client);
    world.proxy.take().unwrap().stop(PATIENCE);
    let mut seen = recorder.finish();
    let ends = row.ends.as_deref().map_or(Ending::Status(200), expected);
    same("the stream", &ends, &ending)?;
    next?;
    if let Some(may) = &row.broken_off {
        let is_beginning = |begun: &Read| may.starts_with(&begun.text());
        seen.broken_off.retain(|begun| !is_beginning(begun));
    }
    compare(&forwarded, None, Some(seen.connections), &seen)
}

fn send(client: &mut Frames, row: &Row) {
    let list = |lines: &[String]| lines.iter().map(|line| field(line)).collect::<Vec<_>>();
    let only_head = row.data.is_empty() && row.trailers.is_empty();
    client.headers(1, &list(&row.headers), only_head);
    for (number, data) in row.data.iter().enumerate() {
        let ends = row.trailers.is_empty() && number + 1 == row.data.len();
        client.data(1, &bytes(data), ends);
    }
    if !row.trailers.is_empty() {
        client.headers(1, &list(&row.trailers), true);
    }
}

/// Parted at the first `: ` behind the first byte, so that pseudo-headers can be written.
fn field(line: &str) -> (Vec<u8>, Vec<u8>) {
    let (name, value) = line.split_once(": ").unwrap_or((line, ""));
    (bytes(name), bytes(value))
}

fn expected(text: &str) -> Ending {
    let (kind, code) = text.split_once(' ').unwrap_or((text, ""));
    match kind {
        "status" => Ending::Status(code.parse().unwrap()),
        "reset" => Ending::Reset(code.parse().unwrap()),
        "connection" => Ending::Connection(code.parse().ok()),
        other => panic!("the ending {other}"),
    }
}
