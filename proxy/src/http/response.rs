//! An upstream's response head: read as strictly as a request, and written anew for the client.

use std::mem::MaybeUninit;

use super::decide::AnswerEdits;
use super::head::{
    ConnectionHeader, FIELDS_MAX, Framing, HeadError, Lengths, Version, syntax, write_decimal,
    write_field,
};
use super::request::{Method, Request, Upgrade};

/// What we need to know of a response after its head was written for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) status: u16,
    /// How the upstream frames its body.
    pub(crate) framing: Framing,
    /// Whether the upstream keeps its connection.
    pub(crate) upstream_persists: bool,
    /// Whether the client's connection goes on after this response.
    pub(crate) client_persists: bool,
    /// How the body is framed for the client.
    pub(crate) encoding: Encoding,
}

/// How a body is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As it is: counted by a length, or ended by the close.
    Plain,
    /// In chunks.
    Chunked,
}

/// Reads a complete head (as found by `scan`) and appends the client's version of it to `out`. `may_persist` says
/// whether we ourselves would go on with the client.
pub(crate) fn rewrite(
    head: &[u8],
    request: &Request,
    may_persist: bool,
    edits: Option<AnswerEdits<'_>>,
    out: &mut Vec<u8>,
) -> Result<Response, HeadError> {
    let mut fields = [MaybeUninit::<httparse::Header<'_>>::uninit(); FIELDS_MAX];
    let mut parsed = httparse::Response::new(&mut []);
    let read = httparse::ParserConfig::default()
        .parse_response_with_uninit_headers(&mut parsed, head, &mut fields)
        .map_err(syntax)?;
    if read.is_partial() {
        return Err(HeadError::Syntax);
    }
    let version = Version::of(parsed.version)?;
    let status = parsed
        .code
        .filter(|code| (100..1000).contains(code))
        .ok_or(HeadError::Syntax)?;
    let mut lengths = Lengths::default();
    let mut connection = ConnectionHeader::default();
    for field in parsed.headers.iter() {
        match field.name.len() {
            10 if field.name.eq_ignore_ascii_case("connection") => connection.read(field.value)?,
            14 if field.name.eq_ignore_ascii_case("content-length") => {
                lengths.content_length(field.value)?
            }
            17 if field.name.eq_ignore_ascii_case("transfer-encoding") => {
                lengths.transfer_encoding(field.value)?
            }
            _ => {}
        }
    }
    let declared = lengths.framing(version)?;
    let response = settle(
        status,
        request,
        may_persist,
        declared,
        connection.persists(version),
    );

    out.extend_from_slice(b"HTTP/1.1 ");
    write_decimal(out, u64::from(status));
    out.push(b' ');
    out.extend_from_slice(parsed.reason.unwrap_or_default().as_bytes());
    out.extend_from_slice(b"\r\n");
    let upgraded = status == 101 && request.upgrade == Upgrade::Asked;
    for field in parsed.headers.iter() {
        let kept = upgraded && field.name.eq_ignore_ascii_case("upgrade");
        let goes = is_ours(field.name)
            || connection.names(field.name)
            || edits.is_some_and(|edits| edits.fields.drops(field.name))
            || (request.alt_svc.is_some() && field.name.eq_ignore_ascii_case("alt-svc"));
        if kept || !goes {
            write_field(out, field.name, field.value);
        }
    }
    if let Some(edits) = edits.filter(|_| status >= 200) {
        out.extend_from_slice(edits.lines);
    }
    if let Some(line) = request.set_cookie.as_ref().filter(|_| status >= 200) {
        out.extend_from_slice(line.as_bytes());
    }
    if let Some(value) = request.alt_svc.as_ref().filter(|_| status >= 200) {
        write_field(out, "Alt-Svc", value.as_bytes());
    }
    write_framing(out, declared, request, &response, upgraded);
    Ok(response)
}

fn settle(
    status: u16,
    request: &Request,
    may_persist: bool,
    declared: Option<Framing>,
    upstream_persists: bool,
) -> Response {
    let bodiless = status < 200 || status == 204 || status == 304 || request.method == Method::Head;
    let framing = if bodiless {
        Framing::Empty
    } else {
        declared.unwrap_or(Framing::UntilClose)
    };
    // A body it announces and must not have may come all the same, and be taken for the next answer.
    let lies = status == 204 && !matches!(declared, None | Some(Framing::Empty));
    let by_length = matches!(framing, Framing::Empty | Framing::Length(_));
    let encoding = match request.version {
        Version::Http11 if !by_length => Encoding::Chunked,
        _ => Encoding::Plain,
    };
    // An old client sees the end of an uncounted body only in the close.
    let counted = by_length || encoding == Encoding::Chunked;
    Response {
        status,
        framing,
        upstream_persists: upstream_persists && framing != Framing::UntilClose && !lies,
        client_persists: request.persists && may_persist && counted,
        encoding,
    }
}

fn write_framing(
    out: &mut Vec<u8>,
    declared: Option<Framing>,
    request: &Request,
    response: &Response,
    upgraded: bool,
) {
    match (response.encoding, declared) {
        _ if response.status < 200 || response.status == 204 => {}
        (Encoding::Chunked, _) => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        // Also where no body follows: HEAD and 304 tell how long it would be.
        (Encoding::Plain, Some(Framing::Length(length))) => {
            out.extend_from_slice(b"Content-Length: ");
            write_decimal(out, length);
            out.extend_from_slice(b"\r\n");
        }
        (Encoding::Plain, Some(Framing::Empty)) => out.extend_from_slice(b"Content-Length: 0\r\n"),
        (Encoding::Plain, _) => {}
    }
    if upgraded {
        out.extend_from_slice(b"Connection: upgrade\r\n");
    } else if response.status >= 200 && !response.client_persists {
        out.extend_from_slice(b"Connection: close\r\n");
    } else if response.status >= 200 && request.version == Version::Http10 {
        out.extend_from_slice(b"Connection: keep-alive\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

fn is_ours(name: &str) -> bool {
    const OURS: [&str; 7] = [
        "connection",
        "content-length",
        "keep-alive",
        "proxy-connection",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    OURS.iter().any(|ours| ours.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(method: Method, version: Version) -> Request {
        Request {
            version,
            method,
            line_bytes: 0,
            framing: Framing::Empty,
            persists: true,
            upgrade: Upgrade::None,
            expects_continue: false,
            set_cookie: None,
            alt_svc: None,
        }
    }

    fn read(head: &str, request: &Request) -> Result<(Response, String), HeadError> {
        let mut out = Vec::new();
        let response = rewrite(head.as_bytes(), request, true, None, &mut out)?;
        Ok((response, String::from_utf8(out).unwrap()))
    }

    #[test]
    fn a_body_until_close_becomes_chunks_and_the_client_stays() {
        let get = request(Method::Safe, Version::Http11);
        let (response, head) = read("HTTP/1.0 200 OK\r\nServer: x\r\n\r\n", &get).unwrap();
        assert_eq!(
            head,
            "HTTP/1.1 200 OK\r\nServer: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        assert!(response.client_persists && !response.upstream_persists);
    }

    #[test]
    fn an_old_client_sees_the_end_of_chunks_in_the_close() {
        let get = request(Method::Safe, Version::Http10);
        let (response, head) = read(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            &get,
        )
        .unwrap();
        assert_eq!(head, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
        assert_eq!(
            (response.framing, response.encoding),
            (Framing::Chunked, Encoding::Plain)
        );
    }

    #[test]
    fn an_answer_to_head_keeps_its_length_and_has_no_body() {
        let head_request = request(Method::Head, Version::Http11);
        let (response, head) = read(
            "HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n",
            &head_request,
        )
        .unwrap();
        assert!(head.contains("Content-Length: 12\r\n"), "{head}");
        assert_eq!(response.framing, Framing::Empty);
    }

    #[test]
    fn an_upstream_with_two_lengths_is_not_believed() {
        let get = request(Method::Safe, Version::Http11);
        let two = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(read(two, &get), Err(HeadError::TwoLengths));
    }

    proptest! {
        #[test]
        fn no_head_makes_the_reader_panic(head in proptest::collection::vec(any::<u8>(), 0..300)) {
            let get = request(Method::Safe, Version::Http11);
            let _ = rewrite(&head, &get, true, None, &mut Vec::new());
        }
    }
}
