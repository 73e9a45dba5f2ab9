//! One client connection as a state machine: it opens, asks, reads, and asks again or leaves. It never asks a second
//! time for the same answer.

use std::io::ErrorKind;
use std::time::Instant;

use crate::bench::client::answer::{Fault, Progress, Reader, Script};
use crate::bench::client::channel::Channel;
use crate::bench::origin::content::Content;
use crate::bench::plan::Connection;

/// Where an exchange stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing is under way.
    Idle,
    /// Bytes are left to send.
    Asking,
    /// Everything was sent.
    Reading,
    /// Everything was read, and the other side is to close.
    Leaving,
}

/// What an advance led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The socket has no more to give now.
    Waiting,
    /// The answer is complete.
    Answered,
    /// The other side has closed after a complete answer.
    Left,
}

/// One connection and its exchange.
#[derive(Debug)]
pub struct Asker {
    channel: Option<Channel>,
    stage: Stage,
    opening: bool,
    sent: usize,
    upload_left: u64,
    reader: Reader,
    /// When the exchange under way began.
    pub began: Instant,
}

impl Asker {
    /// One without a connection.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            channel: None,
            stage: Stage::Idle,
            opening: false,
            sent: 0,
            upload_left: 0,
            reader: Reader::default(),
            began: now,
        }
    }

    /// Whether an exchange is under way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.stage != Stage::Idle
    }

    /// Begins an exchange; `open` is called for a connection where there is none.
    ///
    /// # Errors
    /// What `open` says.
    pub fn begin(
        &mut self,
        now: Instant,
        script: &Script,
        open: impl FnOnce() -> Result<Channel, Fault>,
    ) -> Result<(), Fault> {
        self.began = now;
        self.stage = Stage::Asking;
        if self.channel.is_none() {
            self.channel = Some(open()?);
            self.opening = script.opening.is_some();
        }
        self.ask(script);
        Ok(())
    }

    fn ask(&mut self, script: &Script) {
        self.stage = Stage::Asking;
        self.sent = 0;
        self.upload_left = if self.opening { 0 } else { script.upload };
        self.reader.reset();
    }

    /// Closes the connection and forgets the exchange.
    pub fn close(&mut self) {
        self.channel = None;
        self.stage = Stage::Idle;
    }

    /// Sends as far as the socket allows, and reads nothing.
    ///
    /// # Errors
    /// As [`Self::advance`].
    pub fn push(&mut self, script: &Script, content: &Content) -> Result<(), Fault> {
        while self.stage == Stage::Asking {
            match self.send(script, content) {
                Err(Fault::Io(error)) if error.kind() == ErrorKind::WouldBlock => break,
                sent => sent?,
            }
        }
        Ok(())
    }

    /// Goes on as far as the socket allows.
    ///
    /// # Errors
    /// When the exchange failed; the caller closes.
    pub fn advance(
        &mut self,
        script: &Script,
        content: &Content,
        buffer: &mut [u8],
    ) -> Result<Step, Fault> {
        loop {
            let step = match self.stage {
                Stage::Idle => return Ok(Step::Waiting),
                Stage::Asking => self.send(script, content).map(|()| None),
                Stage::Reading => self.read(script, buffer),
                Stage::Leaving => self.leave(buffer),
            };
            match step {
                Ok(None) => {}
                Ok(Some(step)) => return Ok(step),
                Err(Fault::Io(error)) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(Step::Waiting);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn send(&mut self, script: &Script, content: &Content) -> Result<(), Fault> {
        let bytes = match &script.opening {
            Some((opening, _)) if self.opening => opening,
            _ => &script.request,
        };
        let channel = self.channel.as_mut().ok_or(Fault::Closed)?;
        if let Some(rest @ [_, ..]) = bytes.get(self.sent..) {
            self.sent += channel.send(rest)?;
        } else if self.upload_left > 0 {
            self.upload_left -= channel.send_content(content, self.upload_left)? as u64;
        } else {
            self.stage = Stage::Reading;
        }
        Ok(())
    }

    fn read(&mut self, script: &Script, buffer: &mut [u8]) -> Result<Option<Step>, Fault> {
        let expect = match &script.opening {
            Some((_, expect)) if self.opening => expect,
            _ => &script.expect,
        };
        let channel = self.channel.as_mut().ok_or(Fault::Closed)?;
        let unseen = self.reader.unseen();
        let progress = if unseen > 0 {
            match channel.discard(buffer, unseen)? {
                0 => return Err(Fault::Closed),
                count => self.reader.skip(count as u64)?,
            }
        } else {
            match channel.read(buffer)? {
                0 => return Err(Fault::Closed),
                count => self.reader.feed(&buffer[..count], expect)?,
            }
        };
        match progress {
            Progress::More => Ok(None),
            Progress::Done(_) if self.opening => {
                self.opening = false;
                self.ask(script);
                Ok(None)
            }
            Progress::Done(_) if script.connection == Connection::Fresh => {
                self.stage = Stage::Leaving;
                Ok(Some(Step::Answered))
            }
            Progress::Done(Connection::Fresh) => {
                self.close();
                Ok(Some(Step::Answered))
            }
            Progress::Done(Connection::Kept) => {
                self.stage = Stage::Idle;
                Ok(Some(Step::Answered))
            }
        }
    }

    /// The proxy closes first, as it was asked to: the port numbers of the client are free again at once then.
    fn leave(&mut self, buffer: &mut [u8]) -> Result<Option<Step>, Fault> {
        let channel = self.channel.as_mut().ok_or(Fault::Closed)?;
        match channel.read(buffer)? {
            0 => {
                self.close();
                Ok(Some(Step::Left))
            }
            _ => Err(Fault::Length),
        }
    }
}
