//! Answers of our own: short, plain, and honest about why.

use std::io::Write;

use super::front_check::Green;
use crate::error::{RequestError, Words};
use crate::route::action::RedirectStatus;

/// Whether the client's connection goes on after an answer of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    KeepAlive,
    Close,
}

/// Appends the answer to a failed request.
pub(crate) fn write(
    out: &mut Vec<u8>,
    status: u16,
    error: &RequestError,
    retry_after_s: u64,
    after: After,
    head: bool,
) {
    if let RequestError::FrontCheck(green) = error {
        return write_green(out, green, after, head);
    }
    let retry_s = error.retry_after_s(retry_after_s);
    let (kind, body) = match error.words() {
        Words::Text => (
            "text/plain; charset=utf-8",
            format!("{}: {error}\n", reason(status)),
        ),
        Words::Page => (
            "text/html; charset=utf-8",
            page(retry_s.unwrap_or(retry_after_s)),
        ),
        Words::Grpc => ("application/grpc", String::new()),
    };
    // Writing to a vector cannot fail.
    drop(write!(
        out,
        "HTTP/1.1 {status} {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nCache-Control: no-store\r\n",
        reason(status),
        body.len(),
    ));
    if let Some(code) = error.grpc_status() {
        // An answer of trailers only: a head that ends the stream. The message has no byte that would need escaping.
        drop(write!(
            out,
            "Grpc-Status: {code}\r\nGrpc-Message: {error}\r\n"
        ));
    }
    if let Some(retry_after_s) = retry_s {
        drop(write!(out, "Retry-After: {retry_after_s}\r\n"));
    }
    if let RequestError::Cut(id) = error {
        drop(write!(out, "X-Request-Id: {id}\r\n"));
    }
    if status == 405 {
        out.extend_from_slice(b"Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n");
    }
    if after == After::Close {
        out.extend_from_slice(b"Connection: close\r\n");
    }
    out.extend_from_slice(b"\r\n");
    if !head {
        out.extend_from_slice(body.as_bytes());
    }
}

/// Appends what a front check is told.
fn write_green(out: &mut Vec<u8>, green: &Green, after: After, head: bool) {
    let Green { status, body } = green;
    // Writing to a vector cannot fail.
    drop(write!(
        out,
        "HTTP/1.1 {status} {}\r\nCache-Control: no-store\r\n",
        reason(*status)
    ));
    match (*status, body.len()) {
        (204, _) => {}
        (_, 0) => out.extend_from_slice(b"Content-Length: 0\r\n"),
        (_, length) => drop(write!(
            out,
            "Content-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\n"
        )),
    }
    if after == After::Close {
        out.extend_from_slice(b"Connection: close\r\n");
    }
    out.extend_from_slice(b"\r\n");
    if !head {
        out.extend_from_slice(body.as_bytes());
    }
}

/// A page that asks again after so many seconds, also where scripts are off.
fn page(retry_after_s: u64) -> String {
    let retry_after_s = retry_after_s.max(1);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"refresh\" content=\"{retry_after_s}\">\n\
         <title>One moment</title>\n\
         <p>This site is being moved and will be back in a moment. This page asks again by itself.</p>\n\
         </html>\n"
    )
}

/// The answer to a CONNECT: behind it come the tunnel's bytes.
pub(crate) const TUNNEL: &[u8] = b"HTTP/1.1 200 Connection Established\r\n\r\n";

/// Appends what an authority reads to be sure that we control a name (RFC 8555, section 8.3).
pub(crate) fn write_proof(out: &mut Vec<u8>, proof: &[u8]) {
    // Writing to a vector cannot fail.
    drop(write!(
        out,
        "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        proof.len(),
    ));
    out.extend_from_slice(proof);
}

/// Appends the answer that sends a client elsewhere; `lines` are whole header lines.
pub(crate) fn write_redirect(
    out: &mut Vec<u8>,
    status: RedirectStatus,
    location: &[u8],
    lines: &[u8],
    after: After,
) {
    // Writing to a vector cannot fail.
    drop(write!(
        out,
        "HTTP/1.1 {} {}\r\nContent-Length: 0\r\n",
        status.code(),
        status.reason()
    ));
    super::head::write_field(out, "Location", location);
    out.extend_from_slice(lines);
    if after == After::Close {
        out.extend_from_slice(b"Connection: close\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

const fn reason(status: u16) -> &'static str {
    match status {
        200..=299 => "OK",
        400 => "Bad Request",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        508 => "Loop Detected",
        _ => "Bad Gateway",
    }
}
