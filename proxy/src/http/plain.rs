//! An HTTP/1 client's request as if it came on a stream: for upstreams that do not speak HTTP/1.
//!
//! The body is decoded from the connection piece by piece, never collected; the answer is written as HTTP/1 text
//! with the framing its head announces.

use std::io::{self, IoSlice};

use bytes::Bytes;

use super::body::{self, Body, End, Route};
use super::head::Version;
use super::mux::{AnswerHead, AnswerSink, BodyFailed, More, Part, RequestBody, Reset};
use super::request::{Request, Upgrade};
use super::response::Encoding;
use crate::buffer::{Buffer, Buffers};
use crate::config::Limits;
use crate::stream::{self, Stream, WriteFailed};

/// The request's side of a client's connection.
pub(crate) struct PlainBody<'c> {
    stream: &'c Stream,
    buffers: &'c Buffers,
    buffer: &'c mut Buffer,
    limits: &'c Limits,
    body: Body,
    /// The last part but the end has been given.
    drained: bool,
}

impl<'c> PlainBody<'c> {
    /// `buffer` holds what was read behind the request's head. For an upgrade everything is body until the client
    /// finishes.
    pub(crate) fn new(
        stream: &'c Stream,
        buffers: &'c Buffers,
        buffer: &'c mut Buffer,
        limits: &'c Limits,
        request: &Request,
    ) -> Self {
        let body = match request.upgrade {
            Upgrade::Asked => Body::UntilClose,
            Upgrade::None => Body::new(request.framing),
        };
        Self {
            stream,
            buffers,
            buffer,
            limits,
            body,
            drained: false,
        }
    }

    fn end(&self) -> Part {
        Part::End {
            trailer: self.body.trailer().to_vec(),
        }
    }
}

impl RequestBody for PlainBody<'_> {
    async fn next(&mut self) -> Result<Part, BodyFailed> {
        loop {
            if self.drained {
                return Ok(self.end());
            }
            let piece = self.body.take(self.buffer.filled_mut());
            let piece = piece.map_err(BodyFailed::Chunk)?;
            let data = Bytes::copy_from_slice(&self.buffer.filled()[piece.start..piece.end]);
            self.buffer.consume(piece.used);
            self.drained = piece.last;
            if !data.is_empty() {
                return Ok(Part::Data(data));
            }
            if self.drained {
                continue;
            }
            let silence = match self.body {
                Body::UntilClose => self.limits.tunnel_idle_max,
                Body::Length(_) | Body::Chunked(_) => self.limits.client_silence_max,
            };
            match stream::read(self.stream, self.buffers, self.buffer, silence).await {
                Ok(0) if matches!(self.body, Body::UntilClose) => self.drained = true,
                Ok(0) => return Err(BodyFailed::Left(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) => return Err(BodyFailed::Left(error)),
            }
        }
    }

    fn written(&mut self, _: usize) {
        // What was not read yet waits in the kernel: that is all the flow control there is.
    }
}

/// The answer's side of a client's connection.
pub(crate) struct PlainAnswer<'c> {
    route: Route<'c>,
    version: Version,
    encoding: Encoding,
    /// Broken off, or an answer without an end: the connection cannot go on.
    pub(crate) is_broken: bool,
}

impl<'c> PlainAnswer<'c> {
    pub(crate) const fn new(
        stream: &'c Stream,
        buffers: &'c Buffers,
        limits: &'c Limits,
        version: Version,
    ) -> Self {
        let route = Route {
            from: stream,
            to: stream,
            buffers,
            read_silence: limits.client_silence_max,
            write_silence: limits.client_silence_max,
            intake: None,
        };
        Self {
            route,
            version,
            encoding: Encoding::Plain,
            is_broken: false,
        }
    }

    async fn write(&self, text: &[u8]) -> io::Result<()> {
        let mut slices = [IoSlice::new(text)];
        let written = stream::write_all(self.route.to, &mut slices, self.route.write_silence);
        written.await.map_err(|failed| failed.source)
    }
}

impl AnswerSink for PlainAnswer<'_> {
    async fn interim(&mut self, head: AnswerHead<'_>) -> io::Result<()> {
        match self.version {
            Version::Http11 => self.write(head.text).await,
            Version::Http10 => Ok(()),
        }
    }

    async fn head(&mut self, head: AnswerHead<'_>, more: More) -> io::Result<()> {
        if more == More::Follows && head.is_chunked() {
            self.encoding = Encoding::Chunked;
        }
        self.write(head.text).await
    }

    async fn data(&mut self, data: &[u8], more: More) -> io::Result<()> {
        let end = match more {
            More::Ends => End::Here(&[]),
            More::Follows => End::Later,
        };
        let written = body::write(self.route, &[], data, self.encoding, end).await;
        written.map(drop).map_err(source)
    }

    async fn trailer(&mut self, lines: &[u8]) -> io::Result<()> {
        let end = End::Here(lines);
        let written = body::write(self.route, &[], &[], self.encoding, end).await;
        written.map(drop).map_err(source)
    }

    fn reset(&mut self, _: Reset) {
        self.is_broken = true;
    }
}

fn source(failed: WriteFailed) -> io::Error {
    failed.source
}
