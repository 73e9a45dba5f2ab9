//! One exchange of HTTP/1.1, or the upgrade to a WebSocket.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::dial::Wire;
use super::notes::Place;
use super::{Fault, connect};
use crate::bench::certificate::NAME;
use crate::bench::client::answer::{UPGRADE_ACCEPT, UPGRADE_KEY};
use crate::bench::hold::plan::{BODY_BYTES, Method, Redirects, answer, path};

/// Most header fields an answer may have.
const FIELDS_MAX: usize = 32;
/// Longest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 16 << 10;
/// What is read at once, in bytes: answers are short.
const READ_BYTES: usize = 1024;
/// Longest way of an answer through other places, as browsers allow.
const REDIRECTS_MAX: usize = 20;

/// A whole answer.
struct Answer {
    status: u16,
    accept: Option<String>,
    location: Option<String>,
    body: Vec<u8>,
}

/// Asks, and reads the answer.
pub(super) async fn exchange(
    wire: &mut Wire,
    place: &Place,
    redirects: Redirects,
) -> Result<u16, Fault> {
    wire.write_all(&request(place)).await?;
    wire.flush().await?;
    place.sent();
    let mut got = read(wire).await?;
    let mut followed = 0;
    while redirects == Redirects::Follow && matches!(got.status, 301..=303) {
        followed += 1;
        if followed > REDIRECTS_MAX {
            return Err(Fault::Status(got.status));
        }
        got = follow(&got).await?;
    }
    match got.status {
        200 if got.body == answer(place.id).as_bytes() => Ok(200),
        200 => Err(Fault::Foreign),
        status => Err(Fault::Status(status)),
    }
}

/// Goes where an answer sends us, with a GET and without a body, as browsers do since the first ones did.
async fn follow(redirect: &Answer) -> Result<Answer, Fault> {
    let location = redirect.location.as_deref().ok_or(Fault::Malformed)?;
    let rest = location.strip_prefix("http://").ok_or(Fault::Malformed)?;
    let (host, path) = rest.split_once('/').ok_or(Fault::Malformed)?;
    let address = host.parse().map_err(|_| Fault::Malformed)?;
    let mut wire: Wire = Box::new(connect(address).await?);
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    wire.write_all(request.as_bytes()).await?;
    read(&mut wire).await
}

fn request(place: &Place) -> Vec<u8> {
    let path = path(place.kind, place.id);
    match place.method {
        Method::Get => {
            format!("GET {path} HTTP/1.1\r\nHost: {NAME}\r\nUser-Agent: lab\r\n\r\n").into_bytes()
        }
        Method::Post => {
            let mut request = format!(
                "POST {path} HTTP/1.1\r\nHost: {NAME}\r\nUser-Agent: lab\r\nContent-Type: text/plain\r\nContent-Length: {BODY_BYTES}\r\n\r\n"
            )
            .into_bytes();
            request.resize(request.len() + BODY_BYTES, b'b');
            request
        }
    }
}

/// Asks for a WebSocket.
pub(super) async fn upgrade(wire: &mut Wire, place: &Place) -> Result<u16, Fault> {
    let path = path(place.kind, place.id);
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {NAME}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {UPGRADE_KEY}\r\n\r\n"
    );
    wire.write_all(request.as_bytes()).await?;
    place.sent();
    let got = read(wire).await?;
    match got.status {
        101 if got.accept.as_deref() == Some(UPGRADE_ACCEPT) => Ok(200),
        101 => Err(Fault::Foreign),
        status => Err(Fault::Status(status)),
    }
}

async fn read(wire: &mut Wire) -> Result<Answer, Fault> {
    let mut bytes = Vec::new();
    loop {
        if let Some(answer) = parse(&bytes)? {
            return Ok(answer);
        }
        if bytes.len() > ANSWER_BYTES_MAX {
            return Err(Fault::Malformed);
        }
        bytes.reserve(READ_BYTES);
        if wire.read_buf(&mut bytes).await? == 0 {
            return Err(Fault::Closed);
        }
    }
}

/// The answer at the start of `bytes`, if it is whole.
fn parse(bytes: &[u8]) -> Result<Option<Answer>, Fault> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut head = httparse::Response::new(&mut fields);
    let parsed = head.parse(bytes).map_err(|_| Fault::Malformed)?;
    let httparse::Status::Complete(length) = parsed else {
        return Ok(None);
    };
    let field = |name: &str| {
        let mut fields = head.headers.iter();
        let found = fields.find(|field| field.name.eq_ignore_ascii_case(name));
        found.map(|field| String::from_utf8_lossy(field.value).into_owned())
    };
    let status = head.code.ok_or(Fault::Malformed)?;
    let size = match field("content-length") {
        Some(size) => size.parse::<usize>().map_err(|_| Fault::Malformed)?,
        None if status == 101 => 0,
        None => return Err(Fault::Malformed),
    };
    let Some(body) = bytes.get(length..length + size) else {
        return Ok(None);
    };
    Ok(Some(Answer {
        status,
        accept: field("sec-websocket-accept"),
        location: field("location"),
        body: body.to_vec(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_with_its_last_byte() {
        let text =
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/x\r\nContent-Length: 2\r\n\r\nab";
        for end in 0..text.len() {
            assert!(parse(&text[..end]).unwrap().is_none(), "{end}");
        }
        let answer = parse(text).unwrap().unwrap();
        assert_eq!((answer.status, answer.body.as_slice()), (302, &b"ab"[..]));
        assert_eq!(answer.location.as_deref(), Some("http://127.0.0.1:1/x"));
    }
}
