//! One HTTP GET, to see whether a restored application answers. It asks again until its time is up: "ready" is
//! not "accepting", and an application may need a moment.

use std::time::Duration;

use cutover_protocol::plan::Probe;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(50);

/// No status line is longer.
const HEAD_BYTES_MAX: usize = 1024;

/// Asks until the expected status comes or the probe's time is up. The sentence says how long it took.
///
/// # Errors
/// One line that says what came instead, last.
pub async fn ask(probe: &Probe) -> Result<String, String> {
    let begun = Instant::now();
    let deadline = begun + Duration::from_millis(probe.timeout_ms);
    let mut last = "no answer at all".to_owned();
    while Instant::now() < deadline {
        match tokio::time::timeout_at(deadline, status_of(&probe.url)).await {
            Ok(Ok(status)) if status == probe.status => {
                return Ok(format!(
                    "{} answered {status} after {} ms",
                    probe.url,
                    begun.elapsed().as_millis()
                ));
            }
            Ok(Ok(status)) => last = format!("status {status} where {} was expected", probe.status),
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => break,
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(format!(
        "the probe of {} at {} failed for {} ms: {last}",
        probe.container, probe.url, probe.timeout_ms
    ))
}

async fn status_of(url: &str) -> std::io::Result<u16> {
    let (host, path) = split(url).ok_or_else(|| std::io::Error::other("not an http:// url"))?;
    let address = if host.contains(':') {
        host.to_owned()
    } else {
        format!("{host}:80")
    };
    let mut stream = TcpStream::connect(address).await?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: cutover-agent\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::with_capacity(HEAD_BYTES_MAX);
    while !head.contains(&b'\n') && head.len() < HEAD_BYTES_MAX {
        if stream.read_buf(&mut head).await? == 0 {
            break;
        }
    }
    parse_status(&head).ok_or_else(|| std::io::Error::other("the answer was not HTTP"))
}

fn split(url: &str) -> Option<(&str, &str)> {
    let rest = url.strip_prefix("http://")?;
    match rest.find('/') {
        Some(slash) => Some((&rest[..slash], &rest[slash..])),
        None => Some((rest, "/")),
    }
}

fn parse_status(head: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(head.split(|&byte| byte == b'\n').next()?).ok()?;
    let mut words = line.split_whitespace();
    words
        .next()
        .filter(|version| version.starts_with("HTTP/1."))?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_read_from_the_first_line_only() {
        assert_eq!(
            parse_status(b"HTTP/1.1 200 OK\r\nX: HTTP/1.1 500"),
            Some(200)
        );
        assert_eq!(parse_status(b"5.5.5-MariaDB\0"), None);
        assert_eq!(parse_status(b"\xff\xfe"), None);
    }

    #[tokio::test]
    async fn a_wrong_status_is_told_with_what_was_expected() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 512];
                let _ = stream.read(&mut request).await;
                let _ = stream
                    .write_all(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
                    .await;
            }
        });
        let probe = Probe {
            container: "web".parse().unwrap(),
            url: format!("http://{address}/"),
            status: 200,
            timeout_ms: 200,
        };
        let message = ask(&probe).await.unwrap_err();
        assert!(
            message.ends_with("failed for 200 ms: status 503 where 200 was expected"),
            "{message}"
        );
    }
}
