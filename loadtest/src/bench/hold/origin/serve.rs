//! One connection of an origin: requests whose paths name their ids, or raw TCP.

use std::io;
use std::rc::Rc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::desk::Desk;
use crate::bench::client::answer::UPGRADE_ACCEPT;
use crate::bench::hold::plan::{Method, answer};

/// Most header fields a request may have.
const FIELDS_MAX: usize = 64;
/// What is read at once, in bytes: a head and a body of a KiB.
const READ_BYTES: usize = 2048;

/// A request's head.
struct Head {
    bytes: usize,
    what: What,
    body_bytes: usize,
    closes: bool,
}

/// What a request asks for.
enum What {
    Execute(Method, u64),
    Upgrade(u64),
    Health,
    Nothing,
}

/// Serves HTTP/1.1 until the other side has enough.
pub(super) async fn http(mut stream: TcpStream, desk: Rc<Desk>) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(READ_BYTES);
    loop {
        let head = loop {
            if let Some(head) = parse(&bytes)? {
                break head;
            }
            more(&mut stream, &mut bytes).await?;
        };
        bytes.drain(..head.bytes);
        match head.what {
            What::Execute(method, id) => {
                let work = desk.begin(id, method);
                while bytes.len() < head.body_bytes {
                    more(&mut stream, &mut bytes).await?;
                }
                bytes.drain(..head.body_bytes);
                work.done().await;
                work.finish();
                drop(work);
                say(&mut stream, 200, &answer(id)).await?;
            }
            What::Upgrade(id) => return upgrade(&mut stream, &desk, id).await,
            What::Health if desk.is_ready() => say(&mut stream, 200, "ready\n").await?,
            What::Health => say(&mut stream, 503, "not yet\n").await?,
            What::Nothing => say(&mut stream, 404, "nothing\n").await?,
        }
        if head.closes {
            return Ok(());
        }
    }
}

async fn upgrade(stream: &mut TcpStream, desk: &Desk, id: u64) -> io::Result<()> {
    {
        let work = desk.begin(id, Method::Get);
        work.done().await;
        work.finish();
    }
    let head = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {UPGRADE_ACCEPT}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    let mut rest = [0; 64];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

/// Serves raw TCP: an id and a length, then so many bytes; the id goes back.
pub(super) async fn raw(mut stream: TcpStream, desk: Rc<Desk>) -> io::Result<()> {
    let id = stream.read_u64().await?;
    let length = stream.read_u32().await?;
    let method = if length == 0 {
        Method::Get
    } else {
        Method::Post
    };
    let work = desk.begin(id, method);
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body).await?;
    work.done().await;
    work.finish();
    drop(work);
    stream.write_u64(id).await?;
    Ok(())
}

async fn more(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> io::Result<()> {
    bytes.reserve(READ_BYTES);
    match stream.read_buf(bytes).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

async fn say(stream: &mut TcpStream, status: u16, body: &str) -> io::Result<()> {
    let answer = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).await
}

/// The head at the start of `bytes`, if it is whole.
fn parse(bytes: &[u8]) -> io::Result<Option<Head>> {
    let nonsense = || io::Error::from(io::ErrorKind::InvalidData);
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    let parsed = request.parse(bytes).map_err(|_| nonsense())?;
    let httparse::Status::Complete(length) = parsed else {
        return Ok(None);
    };
    let (mut body_bytes, mut closes) = (0, request.version == Some(0));
    for field in request.headers.iter() {
        let value = std::str::from_utf8(field.value).map_err(|_| nonsense())?;
        if field.name.eq_ignore_ascii_case("content-length") {
            body_bytes = value.parse().map_err(|_| nonsense())?;
        } else if field.name.eq_ignore_ascii_case("connection") {
            closes |= value.eq_ignore_ascii_case("close");
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            // Our clients always say how long a body is.
            return Err(nonsense());
        }
    }
    let method = match request.method {
        Some("POST") => Method::Post,
        _ => Method::Get,
    };
    let id = |text: &str| u64::from_str_radix(text, 16).ok();
    let path = request.path.unwrap_or("");
    let executed = path.strip_prefix("/do/").and_then(id);
    let upgraded = path.strip_prefix("/ws/").and_then(id);
    let what = match (executed, upgraded) {
        (Some(id), _) => What::Execute(method, id),
        (None, Some(id)) => What::Upgrade(id),
        (None, None) if path == "/health" => What::Health,
        (None, None) => What::Nothing,
    };
    Ok(Some(Head {
        bytes: length,
        what,
        body_bytes,
        closes,
    }))
}
