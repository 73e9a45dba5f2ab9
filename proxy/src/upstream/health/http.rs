//! A check by one HTTP request, in the version the group speaks.

use bytes::Bytes;
use http::Request;
use tokio::io::AsyncReadExt as _;

use super::probe::{CheckError, Wire, send};
use crate::config::HttpCheck;
use crate::http::chunked::Chunks;

/// Longest head, in bytes.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// What of a body is looked at, in bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;
/// Most fields of a head.
const FIELDS_MAX: usize = 128;
/// Who asks.
const AGENT: &str = "hopgate-health";

/// What is known of an answer from its head.
struct Head {
    status: u16,
    bytes: usize,
    chunked: bool,
    length: Option<usize>,
}

/// Asks over HTTP/1.1 and says what came.
pub(super) async fn ask_http1(
    stream: &mut impl Wire,
    check: &HttpCheck,
    host: &str,
) -> Result<String, CheckError> {
    let HttpCheck { method, path, .. } = check;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {AGENT}\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    send(stream, request.as_bytes()).await?;
    let mut received = Vec::new();
    let head = loop {
        if let Some(head) = parse(&received)? {
            received.drain(..head.bytes);
            // 100 and 103 come before the answer.
            if head.status >= 200 {
                break head;
            }
        } else if received.len() > HEAD_BYTES_MAX {
            return Err(CheckError::NotHttp);
        } else if read(stream, &mut received).await? == 0 {
            return Err(CheckError::Closed);
        }
    };
    judge_status(check, head.status)?;
    let Some(wanted) = &check.body else {
        return Ok(said(head.status));
    };
    let mut body = Vec::new();
    let mut chunks = head.chunked.then(Chunks::new);
    loop {
        let last = match &mut chunks {
            None => {
                body.append(&mut received);
                head.length.is_some_and(|length| body.len() >= length)
            }
            Some(chunks) => {
                let piece = chunks
                    .decode(&mut received)
                    .map_err(|_| CheckError::NotHttp)?;
                body.extend_from_slice(&received[piece.start..piece.end]);
                received.clear();
                piece.last
            }
        };
        if contains(&body, wanted) {
            return Ok(said(head.status));
        }
        let over = last || body.len() >= BODY_BYTES_MAX;
        if over || read(stream, &mut received).await? == 0 {
            return Err(CheckError::Body(head.status));
        }
    }
}

/// Asks over HTTP/2 and says what came.
pub(super) async fn ask_http2(
    stream: impl Wire,
    check: &HttpCheck,
    host: &str,
) -> Result<String, CheckError> {
    let (mut sender, connection) = h2::client::handshake(stream)
        .await
        .map_err(CheckError::Http2)?;
    let request = Request::builder()
        .method(check.method.as_str())
        .uri(format!("http://{host}{}", check.path))
        .header("user-agent", AGENT)
        .body(())
        .map_err(|_| CheckError::NotHttp)?;
    let exchange = async {
        let (response, _) = sender
            .send_request(request, true)
            .map_err(CheckError::Http2)?;
        let response = response.await.map_err(CheckError::Http2)?;
        let status = response.status().as_u16();
        judge_status(check, status)?;
        let Some(wanted) = &check.body else {
            return Ok(said(status));
        };
        let mut stream = response.into_body();
        let mut body: Vec<u8> = Vec::new();
        while let Some(piece) = stream.data().await {
            let piece: Bytes = piece.map_err(CheckError::Http2)?;
            body.extend_from_slice(&piece);
            // Nobody is left to tell when the connection goes.
            stream.flow_control().release_capacity(piece.len()).ok();
            if contains(&body, wanted) {
                return Ok(said(status));
            }
            if body.len() >= BODY_BYTES_MAX {
                break;
            }
        }
        Err(CheckError::Body(status))
    };
    tokio::select! {
        biased;
        outcome = exchange => outcome,
        ended = connection => Err(ended.err().map_or(CheckError::Closed, CheckError::Http2)),
    }
}

async fn read(stream: &mut impl Wire, into: &mut Vec<u8>) -> Result<usize, CheckError> {
    stream.read_buf(into).await.map_err(CheckError::Connection)
}

fn parse(bytes: &[u8]) -> Result<Option<Head>, CheckError> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut response = httparse::Response::new(&mut fields);
    let parsed = response.parse(bytes).map_err(|_| CheckError::NotHttp)?;
    let httparse::Status::Complete(bytes) = parsed else {
        return Ok(None);
    };
    let field = |name: &str| {
        let mut fields = response.headers.iter();
        fields
            .find(|field| field.name.eq_ignore_ascii_case(name))
            .map(|field| field.value)
    };
    let length = field("content-length").and_then(|value| str::from_utf8(value).ok());
    Ok(Some(Head {
        status: response.code.unwrap_or_default(),
        bytes,
        chunked: field("transfer-encoding").is_some(),
        length: length.and_then(|length| length.parse().ok()),
    }))
}

fn judge_status(check: &HttpCheck, status: u16) -> Result<(), CheckError> {
    let good = |(first, last): &(u16, u16)| (*first..=*last).contains(&status);
    if check.status.iter().any(good) {
        Ok(())
    } else {
        Err(CheckError::Status(status))
    }
}

fn contains(body: &[u8], wanted: &str) -> bool {
    memchr::memmem::find(body, wanted.as_bytes()).is_some()
}

fn said(status: u16) -> String {
    format!("status {status}")
}
