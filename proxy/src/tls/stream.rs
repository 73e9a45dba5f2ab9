//! A TLS connection with the same calls as a plain socket: shared, non-blocking, nothing kept while idle.
//!
//! One request costs one read and one write: records are received into a buffer of the thread, opened there and
//! copied out; answers are sealed into another and handed to the kernel at once. Only what a call leaves over (half
//! a record, more data than the caller had room for, what the kernel did not take) is kept with the connection.
//! Both buffers are lent for the length of a call, never across an await.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::{ClientConfig, ServerConfig};
use tokio::time::timeout;

use super::SessionError;
pub(crate) use super::handshake::Agreed;
use super::handshake::{self, Shaken, Side};
use super::record::{PLAIN_BYTES_MAX, RECORD_OVERHEAD};
use super::session::{Received, Session};
use crate::stream::Socket;

/// Most plaintext sealed for one write: four records, so that a fast peer costs few calls and a slow one few bytes.
const SEALED_BYTES_MAX: usize = 4 * PLAIN_BYTES_MAX;
/// Most ciphertext received at once.
const RECEIVED_BYTES_MAX: usize = 4 * (PLAIN_BYTES_MAX + RECORD_OVERHEAD);
/// Reads in one call that may bring records without data, before the others of the thread have their turn.
const READS_MAX: usize = 8;

thread_local! {
    static RECEIVED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static SEALED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// An established TLS connection.
pub(crate) struct TlsStream {
    socket: Socket,
    agreed: Agreed,
    state: RefCell<State>,
    /// Ciphertext the kernel has taken, handshake not counted.
    sent: Cell<u64>,
}

/// A place in the ciphertext we have made; see [`TlsStream::left_since`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark(u64);

struct State {
    session: Box<Session>,
    end: End,
    /// Ciphertext of an unfinished record, or of records for which the caller had no room.
    incoming: Vec<u8>,
    /// Data that the caller had no room for.
    plain: Vec<u8>,
    plain_from: usize,
    /// Ciphertext that the kernel has not taken.
    outgoing: Vec<u8>,
    /// Whether the kernel refused the last of it; if not, it has not been tried.
    full: bool,
    farewell_said: bool,
}

/// How far the peer's half of the session has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Open,
    /// The peer has said that nothing more comes.
    Closed,
    /// The session is beyond repair.
    Failed,
}

impl TlsStream {
    /// Waits for a client's handshake and answers it.
    ///
    /// # Errors
    /// The socket failed, `limit` passed, or the two could not agree: then a [`SessionError`] is inside.
    ///
    /// # Cancel safety
    /// Dropping the future drops the connection.
    pub(crate) async fn accept(
        socket: Socket,
        config: &Arc<ServerConfig>,
        limit: Duration,
    ) -> io::Result<Self> {
        let side = UnbufferedServerConnection::new(Arc::clone(config)).map_err(invalid)?;
        Self::shake(side, socket, limit).await
    }

    /// Shakes hands with the server `name` and verifies that it is the one.
    ///
    /// # Errors
    /// As [`TlsStream::accept`].
    ///
    /// # Cancel safety
    /// Dropping the future drops the connection.
    pub(crate) async fn connect(
        socket: Socket,
        config: &Arc<ClientConfig>,
        name: ServerName<'static>,
        limit: Duration,
    ) -> io::Result<Self> {
        let side = UnbufferedClientConnection::new(Arc::clone(config), name).map_err(invalid)?;
        Self::shake(side, socket, limit).await
    }

    async fn shake<S: Side>(side: S, socket: Socket, limit: Duration) -> io::Result<Self> {
        // In a box: the state of a handshake is large, and what is left of it is small.
        let shaken = timeout(limit, Box::pin(handshake::shake(side, &socket)))
            .await
            .map_err(|_| io::ErrorKind::TimedOut)??;
        let Shaken {
            session,
            agreed,
            incoming,
            plain,
            outgoing,
        } = shaken;
        Ok(Self {
            socket,
            agreed,
            sent: Cell::new(0),
            state: RefCell::new(State {
                session: Box::new(session),
                end: End::Open,
                incoming,
                plain,
                plain_from: 0,
                outgoing,
                full: false,
                farewell_said: false,
            }),
        })
    }

    #[cfg(test)]
    pub(super) fn renew_keys_after(&self, records: u64) {
        self.state.borrow_mut().session.renew_keys_after(records);
    }

    /// What the handshake settled.
    pub(crate) const fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// The socket below. Whoever reads from or writes to it breaks the session.
    pub(crate) const fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Takes data that is there. Zero only at the peer's close_notify (or for an empty `out`).
    ///
    /// # Errors
    /// `WouldBlock` when there is none yet; `UnexpectedEof` when the peer's socket closed without close_notify, so
    /// that whoever cuts a connection cannot pass for the end of an answer; a [`SessionError`] inside otherwise.
    pub(crate) fn try_read(&self, out: &mut [u8]) -> io::Result<usize> {
        self.read_with(out, |into| self.socket.try_read(into))
    }

    fn read_with(
        &self,
        out: &mut [u8],
        receive: impl Fn(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        if out.is_empty() {
            return Ok(0);
        }
        let count = state.take_plain(out);
        if count > 0 {
            return Ok(count);
        }
        let read = RECEIVED.with_borrow_mut(|buffer| state.read(buffer, out, receive));
        if matches!(&read, Err(error) if error.kind() == io::ErrorKind::InvalidData) {
            // Carries the alert.
            self.flush(&mut state).ok();
        }
        read
    }

    /// Seals data and hands it to the kernel; says how much of it was accepted. What the kernel does not take stays
    /// with the connection: [`TlsStream::try_flush`] sends it.
    ///
    /// # Errors
    /// `WouldBlock` while earlier data waits for the peer.
    pub(crate) fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        if state.end == End::Failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if state.full {
            self.flush(&mut state)?;
        }
        SEALED.with_borrow_mut(|sealed| {
            sealed.clear();
            let accepted = state.session.seal(slices, SEALED_BYTES_MAX, sealed);
            let accepted = accepted.map_err(|error| state.fail(error))?;
            self.send(&mut state, sealed)?;
            Ok(accepted)
        })
    }

    /// Sends what earlier writes left over.
    ///
    /// # Errors
    /// `WouldBlock` while the peer takes nothing.
    pub(crate) fn try_flush(&self) -> io::Result<()> {
        self.flush(&mut self.state.borrow_mut())
    }

    fn flush(&self, state: &mut State) -> io::Result<()> {
        while !state.outgoing.is_empty() {
            self.send(state, &[])?;
            if state.full {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        Ok(())
    }

    /// One write of what waits and of `sealed` behind it; keeps the rest of both.
    fn send(&self, state: &mut State, sealed: &[u8]) -> io::Result<()> {
        let waiting = state.outgoing.len();
        let attempt = match (waiting, sealed.len()) {
            (0, 0) => return Ok(()),
            (0, _) => self.socket.try_write(&[IoSlice::new(sealed)]),
            (_, 0) => self.socket.try_write(&[IoSlice::new(&state.outgoing)]),
            _ => {
                let both = [IoSlice::new(&state.outgoing), IoSlice::new(sealed)];
                self.socket.try_write(&both)
            }
        };
        let count = match attempt {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                state.end = End::Failed;
                return Err(error);
            }
        };
        self.sent.set(self.sent.get() + count as u64);
        if count >= waiting {
            // An idle connection keeps no buffer.
            state.outgoing = sealed[count - waiting..].to_vec();
        } else {
            state.outgoing.drain(..count);
            state.outgoing.extend_from_slice(sealed);
        }
        state.full = !state.outgoing.is_empty();
        Ok(())
    }

    /// Whether ciphertext waits for the peer to take it.
    #[cfg(test)]
    pub(crate) fn wants_write(&self) -> bool {
        !self.state.borrow().outgoing.is_empty()
    }

    /// The end of all ciphertext made so far.
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.sent.get() + self.state.borrow().outgoing.len() as u64)
    }

    /// Whether the kernel has taken any byte that was made after the mark. If not, nothing of it can reach the peer
    /// once the connection is dropped.
    pub(crate) const fn left_since(&self, mark: Mark) -> bool {
        self.sent.get() > mark.0
    }

    /// Completes when a read may bring something, and meanwhile sends what is left to send: the peer may wait for it.
    pub(crate) fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.state.borrow().has_more() {
            return Poll::Ready(Ok(()));
        }
        // The socket wakes us when it takes more.
        if let Poll::Ready(Err(error)) = self.poll_flush(context) {
            return Poll::Ready(Err(error));
        }
        self.socket.poll_readable(context)
    }

    /// Completes when a write that met `WouldBlock` is worth trying again.
    pub(crate) fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_writable(context)
    }

    /// Tells the peer that nothing more will come, first in the session and then below it.
    pub(crate) fn finish(&self) {
        self.say_farewell();
        self.socket.finish().ok();
    }

    /// The first half of that, for a socket that is closed right after.
    pub(crate) fn say_farewell(&self) {
        let mut state = self.state.borrow_mut();
        if state.end == End::Failed || state.farewell_said {
            return;
        }
        state.farewell_said = true;
        let State {
            session, outgoing, ..
        } = &mut *state;
        // A peer that is gone already needs no telling.
        session.close(outgoing).ok();
        self.flush(&mut state).ok();
    }

    /// Whether the peer has sent data that nobody has taken. Asks the kernel and does not look at a closed end.
    pub(crate) fn has_unread(&self) -> bool {
        let state = self.state.borrow();
        state.has_more() || (state.end == End::Open && self.socket.has_unread())
    }

    /// Whether the peer has neither closed nor sent data at this moment. Takes in what the two sessions may have to
    /// say to each other, such as tickets.
    pub(crate) fn is_silent(&self) -> bool {
        if self.state.borrow().has_more() {
            return false;
        }
        // A byte taken by this is lost, and so is the connection: data out of turn ends it.
        let taken = self.read_with(&mut [0], |into| self.socket.read_now(into));
        matches!(taken, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Completes when nothing is left to send.
    pub(crate) fn poll_flush(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            match self.try_flush() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.socket.poll_writable(context))?;
                }
                other => return Poll::Ready(other),
            }
        }
    }
}

impl State {
    /// Whether a read would find something without asking the socket.
    fn has_more(&self) -> bool {
        self.plain_from < self.plain.len()
            || self.end != End::Open
            || !matches!(self.session.whole_record(&self.incoming), Ok(None))
    }

    fn take_plain(&mut self, out: &mut [u8]) -> usize {
        let rest = &self.plain[self.plain_from..];
        let count = rest.len().min(out.len());
        out[..count].copy_from_slice(&rest[..count]);
        self.plain_from += count;
        if self.plain_from == self.plain.len() {
            self.plain = Vec::new();
            self.plain_from = 0;
        }
        count
    }

    fn fail(&mut self, error: SessionError) -> io::Error {
        if self.end != End::Failed {
            self.end = End::Failed;
            self.session.give_up(&error, &mut self.outgoing);
        }
        invalid(error)
    }

    fn read(
        &mut self,
        buffer: &mut Vec<u8>,
        out: &mut [u8],
        receive: impl Fn(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        for _ in 0..READS_MAX {
            match self.end {
                End::Open => {}
                End::Closed => return Ok(0),
                End::Failed => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
            let kept = std::mem::take(&mut self.incoming);
            let filled = match self.session.whole_record(&kept) {
                Ok(Some(_)) => {
                    fit(buffer, kept.len())[..kept.len()].copy_from_slice(&kept);
                    kept.len()
                }
                Ok(None) => match top_up(buffer, &kept, out.len(), &receive) {
                    Ok(filled) => filled,
                    Err(error) => {
                        self.incoming = kept;
                        return Err(error);
                    }
                },
                Err(error) => return Err(self.fail(error)),
            };
            let count = self.open(&mut buffer[..filled], out)?;
            if count > 0 {
                return Ok(count);
            }
        }
        match self.end {
            End::Open => Err(io::ErrorKind::WouldBlock.into()),
            End::Closed => Ok(0),
            End::Failed => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }

    /// Opens the records at the front as long as there is room for what they hold, and keeps what is behind them.
    fn open(&mut self, bytes: &mut [u8], out: &mut [u8]) -> io::Result<usize> {
        let (mut from, mut count) = (0, 0);
        while self.end == End::Open && count < out.len() {
            let whole = self.session.whole_record(&bytes[from..]);
            let Some(length) = whole.map_err(|error| self.fail(error))? else {
                break;
            };
            let record = &mut bytes[from..from + length];
            from += length;
            match self.session.open(record, &mut self.outgoing) {
                Ok(Received::Data(data)) => {
                    let fits = data.len().min(out.len() - count);
                    out[count..count + fits].copy_from_slice(&data[..fits]);
                    count += fits;
                    // Empty but for the last record.
                    self.plain.extend_from_slice(&data[fits..]);
                }
                Ok(Received::Nothing) => {}
                Ok(Received::Closed) => self.end = End::Closed,
                // What came before is handed out first; the session fails at the next call.
                Err(error) if count > 0 => {
                    self.fail(error);
                }
                Err(error) => return Err(self.fail(error)),
            }
        }
        if self.end == End::Open {
            self.incoming = bytes[from..].to_vec();
        }
        Ok(count)
    }
}

/// The bytes kept from earlier and what the socket has behind them; zero at its end is an error, for a session ends
/// with an alert.
fn top_up(
    buffer: &mut Vec<u8>,
    kept: &[u8],
    room: usize,
    receive: impl Fn(&mut [u8]) -> io::Result<usize>,
) -> io::Result<usize> {
    let wanted = room.max(PLAIN_BYTES_MAX);
    let wanted = wanted + (1 + wanted / PLAIN_BYTES_MAX) * RECORD_OVERHEAD;
    let end = kept.len() + wanted.min(RECEIVED_BYTES_MAX);
    let bytes = fit(buffer, end);
    match receive(&mut bytes[kept.len()..end])? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        count => {
            bytes[..kept.len()].copy_from_slice(kept);
            Ok(kept.len() + count)
        }
    }
}

fn fit(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    buffer
}

fn invalid(error: impl Into<SessionError>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.into())
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let agreed = &self.agreed;
        f.debug_struct("TlsStream")
            .field("socket", &self.socket)
            .field("agreed", agreed)
            .finish_non_exhaustive()
    }
}
