//! Messages on the control connection: any size up to a bound, sent as numbered parts so that a long one never delays
//! a heartbeat, and put together again on the other side.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::frame::{self, FrameError};

/// The most bytes of one message. Lists of files are packed before they are sent.
pub const MESSAGE_BYTES_MAX: usize = 256 << 20;
/// Bytes in one part: some milliseconds on the slowest link we hop over.
const PART_BYTES: usize = 256 << 10;
/// Messages that may be in the making at once; more is not our peer.
const UNFINISHED_MAX: usize = 64;
/// Parts waiting to be written.
const OUTBOX_PARTS: usize = 16;

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum Topic {
    /// A request of the agent's own vocabulary.
    Call,
    /// One that is carried out once parts of the hop have arrived.
    CallAfter,
    /// The answer to either, under the same number.
    Reply,
    /// The request cannot be decoded there.
    Unreadable,
    /// A request about trees.
    Ask,
    /// The answer to one, under the same number.
    Answer,
    /// Nothing but a sign of life.
    Beat,
    /// A question for a sign of life; answered by `Pong` at once.
    Ping,
    /// The answer to `Ping`.
    Pong,
    /// A request about pages of memory.
    PageAsk,
    /// The answer to one, under the same number.
    PageAnswer,
}

#[derive(Debug, Serialize, Deserialize)]
struct PartHead {
    topic: Topic,
    number: u64,
    is_last: bool,
}

/// A whole message.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) topic: Topic,
    pub(crate) number: u64,
    pub(crate) bytes: Vec<u8>,
}

/// Where messages are handed in; a bounded queue in front of the one task that writes.
#[derive(Debug, Clone)]
pub(crate) struct Outbox(mpsc::Sender<Vec<u8>>);

/// The other end of an [`Outbox`].
pub(crate) struct Pending(mpsc::Receiver<Vec<u8>>);

/// Makes the pair.
pub(crate) fn outbox() -> (Outbox, Pending) {
    let (tx, rx) = mpsc::channel(OUTBOX_PARTS);
    (Outbox(tx), Pending(rx))
}

impl Outbox {
    /// Queues a message, waiting for room; `false` when the connection is gone or the message too long.
    pub(crate) async fn send(&self, topic: Topic, number: u64, bytes: &[u8]) -> bool {
        if bytes.len() > MESSAGE_BYTES_MAX {
            return false;
        }
        let mut rest = bytes;
        loop {
            let (part, next) = rest.split_at(rest.len().min(PART_BYTES));
            let Ok(frame) = frame::encode(
                &PartHead {
                    topic,
                    number,
                    is_last: next.is_empty(),
                },
                part,
            ) else {
                return false;
            };
            if self.0.send(frame).await.is_err() {
                return false;
            }
            if next.is_empty() {
                return true;
            }
            rest = next;
        }
    }

    /// Queues a short message if there is room now; a sign of life may be left out, a full queue is one in itself.
    pub(crate) fn offer(&self, topic: Topic, number: u64, bytes: &[u8]) -> bool {
        let frame = frame::encode(
            &PartHead {
                topic,
                number,
                is_last: true,
            },
            bytes,
        );
        frame.is_ok_and(|frame| self.0.try_send(frame).is_ok())
    }
}

/// Writes what is queued until the queue or the connection ends.
pub(crate) async fn write<W: AsyncWrite + Unpin>(
    mut pending: Pending,
    stream: &mut W,
) -> std::io::Result<()> {
    while let Some(frame) = pending.0.recv().await {
        stream.write_all(&frame).await?;
        stream.flush().await?;
    }
    stream.shutdown().await
}

/// Puts parts together.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    unfinished: HashMap<(Topic, u64), Vec<u8>>,
}

impl Inbox {
    /// Reads until a message is whole; `None` when the peer closed.
    ///
    /// # Errors
    /// When the connection breaks, or a message exceeds its bound.
    ///
    /// # Cancel safety
    /// None; see [`frame::read`].
    pub(crate) async fn next<R: AsyncRead + Unpin>(
        &mut self,
        stream: &mut R,
    ) -> Result<Option<Message>, FrameError> {
        while let Some(frame) = frame::read(stream).await? {
            if let Some(message) = self.part(&frame)? {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }

    fn part(&mut self, frame: &frame::Frame) -> Result<Option<Message>, FrameError> {
        let PartHead {
            topic,
            number,
            is_last,
        } = frame.head()?;
        let held: usize = self.unfinished.values().map(Vec::len).sum();
        if held + frame.body().len() > MESSAGE_BYTES_MAX {
            return Err(FrameError::TooLong { bytes: held });
        }
        let mut bytes = self.unfinished.remove(&(topic, number)).unwrap_or_default();
        bytes.extend_from_slice(frame.body());
        if is_last {
            return Ok(Some(Message {
                topic,
                number,
                bytes,
            }));
        }
        if self.unfinished.len() >= UNFINISHED_MAX {
            return Err(FrameError::Garbled);
        }
        self.unfinished.insert((topic, number), bytes);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_long_message_arrives_whole_and_a_short_one_may_overtake_it() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let (outbox, pending) = outbox();
        let writer = tokio::spawn(async move {
            let mut near = near;
            write(pending, &mut near).await
        });
        let long = vec![7_u8; PART_BYTES * 3 + 5];
        assert!(outbox.send(Topic::Ask, 1, &long).await);
        outbox.offer(Topic::Beat, 0, &[]);
        drop(outbox);
        let mut inbox = Inbox::default();
        let mut seen = Vec::new();
        while let Some(message) = inbox.next(&mut far).await.unwrap() {
            seen.push((message.topic, message.bytes.len()));
        }
        writer.await.unwrap().unwrap();
        assert_eq!(seen, [(Topic::Ask, long.len()), (Topic::Beat, 0)]);
    }
}
