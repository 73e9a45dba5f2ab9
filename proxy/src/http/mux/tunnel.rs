//! A WebSocket between a stream and an HTTP/1 upstream that has switched protocols: bytes both ways, each end's
//! half-close passed on, until both have ended, one has failed or both were silent for too long.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::{AnswerSink, More, Part, RequestBody, Reset};
use crate::buffer::{Buffer, Buffers};
use crate::http::exchange::Progress;
use crate::stream::{self, Stream};

/// What a tunnel needs besides its two ends.
pub(super) struct Tunnel<'t> {
    pub(super) upstream: &'t Stream,
    pub(super) buffers: &'t Buffers,
    pub(super) idle_max: Duration,
    pub(super) progress: &'t Progress,
}

impl Tunnel<'_> {
    /// Copies until it is over, however it ends. `early` is what the upstream has sent since it switched.
    pub(super) async fn run<B: RequestBody, A: AnswerSink>(
        &self,
        early: Buffer,
        body: &mut B,
        answer: &mut A,
    ) {
        let idle = Idle::new(self.idle_max);
        let both =
            async { tokio::try_join!(self.up(body, &idle), self.down(early, answer, &idle)) };
        let whole = tokio::select! {
            biased;
            both = both => both.is_ok(),
            () = idle.run() => false,
        };
        if !whole {
            answer.reset(Reset::Broken);
        }
    }

    async fn up<B: RequestBody>(&self, body: &mut B, idle: &Idle) -> io::Result<()> {
        loop {
            match body.next().await {
                Ok(Part::Data(data)) => {
                    let mut slices = [IoSlice::new(&data)];
                    stream::write_all(self.upstream, &mut slices, self.idle_max)
                        .await
                        .map_err(|failed| failed.source)?;
                    body.written(data.len());
                    idle.touch();
                }
                Ok(Part::End { .. }) => {
                    self.upstream.finish();
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn down<A: AnswerSink>(
        &self,
        mut buffer: Buffer,
        answer: &mut A,
        idle: &Idle,
    ) -> io::Result<()> {
        loop {
            if !buffer.is_empty() {
                answer.data(buffer.filled(), More::Follows).await?;
                let answered = &self.progress.answered;
                answered.set(answered.get() + buffer.filled().len() as u64);
                buffer.consume(usize::MAX);
                idle.touch();
                self.buffers.give_empty(&mut buffer);
            }
            if stream::read(self.upstream, self.buffers, &mut buffer, self.idle_max).await? == 0 {
                return answer.data(&[], More::Ends).await;
            }
        }
    }
}

/// Notices when both directions of a tunnel have been silent for too long.
#[derive(Debug)]
pub(crate) struct Idle {
    touched: Cell<Instant>,
    max: Duration,
}

impl Idle {
    pub(crate) fn new(max: Duration) -> Self {
        Self {
            touched: Cell::new(Instant::now()),
            max,
        }
    }

    /// Something has moved.
    pub(crate) fn touch(&self) {
        self.touched.set(Instant::now());
    }

    /// Completes when nothing has moved for too long.
    pub(crate) async fn run(&self) {
        loop {
            let deadline = self.touched.get() + self.max;
            if deadline <= Instant::now() {
                return;
            }
            sleep_until(deadline).await;
        }
    }
}
