//! The access log: one line a request, written by a thread of its own so that no worker waits for a disk.
//!
//! The queue is bounded; when the disk cannot follow, lines are dropped and counted, requests are not delayed.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::config::{LogConfig, LogFormat, LogTarget};
use crate::error::RequestError;
use crate::http::request::RequestId;
use crate::http::served::Served;
use crate::listen::port::{FrontCheckOf, Passage, Port};
use crate::service::inflight::Progress;
use crate::upstream::Endpoint;

/// Lines that may wait for the disk.
const QUEUE_LINES_MAX: usize = 8192;

/// A worker's end of the log.
#[derive(Debug, Clone)]
pub(crate) struct AccessLog {
    lines: SyncSender<String>,
    format: LogFormat,
    dropped: Arc<AtomicU64>,
}

impl AccessLog {
    /// Opens the log and starts its thread, which ends when the last worker's end is dropped. It goes on with the
    /// counter of the log before it.
    pub(crate) fn open(
        config: &LogConfig,
        before: Option<&Self>,
    ) -> io::Result<(Self, JoinHandle<()>)> {
        let out: Box<dyn Write + Send> = match &config.target {
            LogTarget::Stdout => Box::new(io::stdout()),
            LogTarget::File(path) => {
                Box::new(File::options().create(true).append(true).open(path)?)
            }
        };
        let (lines, receiver) = sync_channel(QUEUE_LINES_MAX);
        let thread = std::thread::Builder::new().name("access-log".to_owned());
        let thread = thread.spawn(move || write_lines(&receiver, BufWriter::new(out)))?;
        Ok((
            Self {
                lines,
                format: config.format,
                dropped: before.map_or_else(Arc::default, |before| Arc::clone(&before.dropped)),
            },
            thread,
        ))
    }

    pub(crate) fn write(&self, line: &Line<'_>) {
        if let Err(TrySendError::Full(_)) = self.lines.try_send(line.text(self.format)) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lines lost to a slow disk.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// Writes what has queued up, then flushes: nothing stays in memory while the proxy is quiet.
fn write_lines(lines: &Receiver<String>, mut out: BufWriter<Box<dyn Write + Send>>) {
    while let Ok(first) = lines.recv() {
        let queued = std::iter::once(first).chain(lines.try_iter());
        for line in queued.take(QUEUE_LINES_MAX) {
            if let Err(error) = writeln!(out, "{line}") {
                tracing::warn!("the access log cannot be written: {error}");
            }
        }
        if let Err(error) = out.flush() {
            tracing::warn!("the access log cannot be written: {error}");
        }
    }
}

/// One line.
#[derive(Debug)]
pub(crate) struct Line<'l> {
    service: &'l str,
    client: SocketAddr,
    what: What<'l>,
    status: u16,
    bytes: u64,
    age: Duration,
    held: Duration,
    delayed: Duration,
    upstream: Option<(Endpoint, cutover_protocol::id::Register)>,
    answered_by: Option<&'static str>,
    id: RequestId,
}

/// A line as JSON has it.
#[derive(Debug, Serialize)]
struct Json<'l> {
    time: &'l str,
    service: &'l str,
    client: SocketAddr,
    request: Cow<'l, str>,
    status: u16,
    bytes: u64,
    duration_ms: f64,
    held_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    delayed_ms: Option<f64>,
    upstream: Option<String>,
    site: Option<String>,
    epoch: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    answered_by: Option<&'l str>,
    id: String,
}

#[derive(Debug)]
enum What<'l> {
    Request(&'l [u8]),
    Refused(&'l RequestError),
    /// A raw connection, and the name it asked for where that was looked at.
    Raw(Option<&'l str>),
}

impl<'l> Line<'l> {
    /// Of a request that was understood, whatever became of it.
    pub(crate) fn served(port: &'l Port, client: SocketAddr, served: &'l Served) -> Self {
        Self {
            service: port.service.name().as_str(),
            client,
            what: What::Request(served.line()),
            status: served.progress.status.get(),
            bytes: served.progress.answered.get(),
            age: served.age(),
            held: served.passage.held,
            delayed: served.passage.delayed,
            upstream: upstream(&served.passage),
            answered_by: (served.passage.front_check == FrontCheckOf::Answered)
                .then_some("front_check"),
            id: served.id,
        }
    }

    fn text(&self, format: LogFormat) -> String {
        match format {
            LogFormat::Text => self.to_string(),
            LogFormat::Json => self.json(),
            LogFormat::Common => self.common(),
        }
    }

    fn json(&self) -> String {
        let mut time = String::new();
        // Writing to a string cannot fail; nor can numbers and texts be turned into JSON.
        write_time(&mut time, since_1970()).ok();
        let served = self.upstream.as_ref();
        let object = Json {
            time: &time,
            service: self.service,
            client: self.client,
            request: self.what(),
            status: self.status,
            bytes: self.bytes,
            duration_ms: self.age.as_secs_f64() * 1000.0,
            held_ms: self.held.as_secs_f64() * 1000.0,
            delayed_ms: self.delayed_ms(),
            upstream: served.map(|(endpoint, _)| endpoint.to_string()),
            site: served.map(|(_, register)| register.owner.to_string()),
            epoch: served.map(|(_, register)| register.epoch.0),
            answered_by: self.answered_by,
            id: self.id.to_string(),
        };
        serde_json::to_string(&object).unwrap_or_default()
    }

    /// `host - - [day/month/year:time zone] "request" status bytes`, in UTC.
    fn common(&self) -> String {
        const MONTHS: [&str; 12] = [
            "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
        ];
        let seconds = since_1970().as_secs();
        let (year, month, day) = date(seconds / 86_400);
        let month = usize::try_from(month - 1).map_or("", |index| MONTHS[index % 12]);
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let request = self.what().replace('\\', "\\\\").replace('"', "\\\"");
        format!(
            "{} - - [{day:02}/{month}/{year:04}:{hour:02}:{minute:02}:{second:02} +0000] \"{request}\" {} {}",
            self.client.ip(),
            self.status,
            self.bytes
        )
    }

    /// Nothing where it was not delayed.
    fn delayed_ms(&self) -> Option<f64> {
        (!self.delayed.is_zero()).then_some(self.delayed.as_secs_f64() * 1000.0)
    }

    fn what(&self) -> Cow<'_, str> {
        match self.what {
            What::Request(line) => String::from_utf8_lossy(line),
            What::Refused(error) => format!("({error})").into(),
            What::Raw(None) => "tcp".into(),
            What::Raw(Some(name)) => format!("tcp {name}").into(),
        }
    }

    /// Of bytes that were no acceptable request.
    pub(crate) fn refused(
        port: &'l Port,
        client: SocketAddr,
        status: u16,
        bytes: usize,
        error: &'l RequestError,
    ) -> Self {
        Self {
            service: port.service.name().as_str(),
            client,
            what: What::Refused(error),
            status,
            bytes: bytes as u64,
            age: Duration::ZERO,
            held: Duration::ZERO,
            delayed: Duration::ZERO,
            upstream: None,
            answered_by: None,
            id: port.next_id(),
        }
    }

    /// Of a raw connection; its status is 200 when it reached the upstream.
    pub(crate) fn raw(
        port: &'l Port,
        client: SocketAddr,
        name: Option<&'l str>,
        passage: &Passage,
        progress: &Progress,
    ) -> Self {
        Self {
            service: port.service.name().as_str(),
            client,
            what: What::Raw(name),
            status: progress.status.get(),
            bytes: progress.answered.get(),
            age: passage.terms.arrival.elapsed(),
            held: passage.held,
            delayed: passage.delayed,
            upstream: upstream(passage),
            answered_by: None,
            id: port.next_id(),
        }
    }
}

pub(crate) fn since_1970() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

fn upstream(passage: &Passage) -> Option<(Endpoint, cutover_protocol::id::Register)> {
    passage.server.clone().zip(passage.register)
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_time(out, since_1970())?;
        write!(
            out,
            " service={} client={} request=\"",
            self.service, self.client
        )?;
        write_quoted(out, &self.what())?;
        let (age, held) = (
            self.age.as_secs_f64() * 1000.0,
            self.held.as_secs_f64() * 1000.0,
        );
        write!(
            out,
            "\" status={} bytes={} duration_ms={age:.3} held_ms={held:.3}",
            self.status, self.bytes
        )?;
        if let Some(delayed) = self.delayed_ms() {
            write!(out, " delayed_ms={delayed:.3}")?;
        }
        match self.upstream {
            Some((ref address, register)) => {
                write!(
                    out,
                    " upstream={address} site={} epoch={}",
                    register.owner, register.epoch
                )?;
            }
            None => out.write_str(" upstream=- site=- epoch=-")?,
        }
        if let Some(whom) = self.answered_by {
            write!(out, " answered_by={whom}")?;
        }
        write!(out, " id={}", self.id)
    }
}

/// Quotes and backslashes escaped; other bytes of a request line are visible characters already.
fn write_quoted(out: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    for character in text.chars() {
        match character {
            '"' | '\\' => write!(out, "\\{character}")?,
            _ => out.write_char(character)?,
        }
    }
    Ok(())
}

/// RFC 3339 in UTC, to the millisecond.
pub(crate) fn write_time(out: &mut impl fmt::Write, since_1970: Duration) -> fmt::Result {
    let seconds = since_1970.as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let millisecond = since_1970.subsec_millis();
    write!(
        out,
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millisecond:03}Z"
    )
}

/// Gregorian date of a day counted from 1970-01-01, by 400-year eras that begin on 1 March (so that the leap day
/// is the last of its year): 719,468 days lie between 0000-03-01 and 1970-01-01.
const fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + if month <= 2 { 1 } else { 0 };
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_as_calendars_have_it() {
        let write = |seconds, ms| {
            let mut out = String::new();
            write_time(
                &mut out,
                Duration::from_secs(seconds) + Duration::from_millis(ms),
            )
            .unwrap();
            out
        };
        assert_eq!(write(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(write(951_782_399, 7), "2000-02-28T23:59:59.007Z");
        assert_eq!(write(951_782_400, 0), "2000-02-29T00:00:00.000Z");
        assert_eq!(write(1_795_564_800, 0), "2026-11-25T00:00:00.000Z");
    }
}
