//! The commanding end of the control socket, blocking: for `hopgate-proxy ctl` and for tests.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use cutover_protocol::hold::{Answer, Command, LINE_BYTES_MAX, Order};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::seen::{Event, Look, Seen};
use super::words::{ProcessAnswer, ProcessCommand};

/// A connection to a proxy's control socket.
#[derive(Debug)]
pub struct ControlClient {
    stream: BufReader<UnixStream>,
}

/// Why a command got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody there.
    #[error("no proxy answers on {}; is it running, and is --socket right?", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection broke. Whether the command took effect, only `status` can tell.
    #[error("the proxy went away before it answered; ask for its status")]
    Broken(#[source] io::Error),
    /// The answer is not in our words.
    #[error("the proxy's answer is not understood; are both of the same version?")]
    Answer(#[source] serde_json::Error),
}

impl ControlClient {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there, or we may not connect.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path);
        let stream = stream.map_err(|source| ClientError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Sends a command and waits for its answer, as long as that takes.
    ///
    /// # Errors
    /// The connection breaks, or the answer makes no sense.
    pub fn command(&mut self, command: &Command) -> Result<Answer, ClientError> {
        self.ask(command)
    }

    /// The same in somebody's name.
    ///
    /// # Errors
    /// The connection breaks, or the answer makes no sense.
    pub fn order(&mut self, order: &Order) -> Result<Answer, ClientError> {
        self.ask(order)
    }

    /// The same for what is asked of the process.
    ///
    /// # Errors
    /// The connection breaks, or the answer makes no sense.
    pub fn process(&mut self, command: &ProcessCommand) -> Result<ProcessAnswer, ClientError> {
        self.ask(command)
    }

    /// The same for what may be looked at. After [`Look::Watch`] the connection carries events and nothing else.
    ///
    /// # Errors
    /// The connection breaks, or the answer makes no sense.
    pub fn look(&mut self, look: &Look) -> Result<Seen, ClientError> {
        self.ask(look)
    }

    /// The next event, or `None` when the proxy tells no more.
    ///
    /// # Errors
    /// The connection breaks, or the line makes no sense.
    pub fn next_event(&mut self) -> Result<Option<Event>, ClientError> {
        match self.line()? {
            line if line.is_empty() => Ok(None),
            line => serde_json::from_slice(&line)
                .map(Some)
                .map_err(ClientError::Answer),
        }
    }

    fn ask<A: DeserializeOwned>(&mut self, command: &impl Serialize) -> Result<A, ClientError> {
        let mut line = serde_json::to_vec(command).map_err(ClientError::Answer)?;
        line.push(b'\n');
        self.stream
            .get_mut()
            .write_all(&line)
            .map_err(ClientError::Broken)?;
        match self.line()? {
            line if line.is_empty() => {
                Err(ClientError::Broken(io::ErrorKind::UnexpectedEof.into()))
            }
            line => serde_json::from_slice(&line).map_err(ClientError::Answer),
        }
    }

    /// Empty at the end.
    fn line(&mut self) -> Result<Vec<u8>, ClientError> {
        let mut line = Vec::new();
        let limit = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
        let read = io::Read::take(&mut self.stream, limit).read_until(b'\n', &mut line);
        read.map_err(ClientError::Broken)?;
        Ok(line)
    }
}
