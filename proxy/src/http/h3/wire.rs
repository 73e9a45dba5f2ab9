//! quinn's streams as the `h3` crate wants them, and a handle of ours on each request stream.
//!
//! The handle sees what `h3` does not show: that the client has taken a request back (RESET_STREAM, STOP_SENDING)
//! while nobody reads it, and that the last byte of an answer was acknowledged. It also keeps `h3` from reading
//! ahead: `h3` takes a packet from the stream with every call, whether it needs one or not, which would lift flow
//! control for whoever sends a body in tiny frames. All of it lives on one worker.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes};
use h3::error::Code;
use h3::quic::{self, ConnectionErrorIncoming, StreamErrorIncoming, StreamId, WriteBuf};
use quinn::{Connection, ConnectionError, ReadError, ResetError, StoppedError, VarInt, WriteError};

/// Bytes that `h3` may keep of one stream without making anything of them: a header list or a frame of an unknown
/// kind that is not complete.
const UNDIGESTED_BYTES_MAX: usize = 128 * 1024;
/// The same for the client's control streams, which bring a few bytes with every request at most, over a whole
/// connection.
const CONTROL_BYTES_FIRST: usize = 64 * 1024;
const CONTROL_BYTES_PER_REQUEST: usize = 1024;

/// What a future of quinn's is kept as: it borrows nothing.
type Kept<T> = Option<Pin<Box<dyn Future<Output = Result<T, ConnectionError>>>>>;

/// One connection.
pub(super) struct Wire {
    connection: Connection,
    accepting: Kept<(quinn::SendStream, quinn::RecvStream)>,
    accepting_control: Kept<quinn::RecvStream>,
    opening: Kept<quinn::SendStream>,
    newest: Newest,
    control_left: Rc<Cell<usize>>,
}

/// The handle of the stream that `h3` accepted last.
pub(super) type Newest = Rc<RefCell<Option<Handle>>>;

impl Wire {
    pub(super) fn new(connection: Connection) -> Self {
        Self {
            connection,
            accepting: None,
            accepting_control: None,
            opening: None,
            newest: Newest::default(),
            control_left: Rc::new(Cell::new(CONTROL_BYTES_FIRST)),
        }
    }

    /// Where handles appear.
    pub(super) fn newest(&self) -> Newest {
        Rc::clone(&self.newest)
    }
}

/// Polls a future that is made anew once it has ended.
fn poll_kept<T, F>(
    kept: &mut Kept<T>,
    connection: &Connection,
    begin: impl FnOnce(Connection) -> F,
    context: &mut Context<'_>,
) -> Poll<Result<T, ConnectionError>>
where
    F: Future<Output = Result<T, ConnectionError>> + 'static,
{
    let future = kept.get_or_insert_with(|| Box::pin(begin(connection.clone())));
    let done = ready!(future.as_mut().poll(context));
    *kept = None;
    Poll::Ready(done)
}

impl quic::Connection<Bytes> for Wire {
    type RecvStream = Receiver;
    type OpenStreams = Self;

    fn poll_accept_recv(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Self::RecvStream, ConnectionErrorIncoming>> {
        let begin = |connection: Connection| async move { connection.accept_uni().await };
        let kept = &mut self.accepting_control;
        let stream = ready!(poll_kept(kept, &self.connection, begin, context));
        let shared = Receiving::new(stream.map_err(connection_lost)?, Permit::Control);
        let control_left = Some(Rc::clone(&self.control_left));
        Poll::Ready(Ok(Receiver {
            shared: Rc::new(shared),
            control_left,
        }))
    }

    fn poll_accept_bidi(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Self::BidiStream, ConnectionErrorIncoming>> {
        let begin = |connection: Connection| async move { connection.accept_bi().await };
        let kept = &mut self.accepting;
        let streams = ready!(poll_kept(kept, &self.connection, begin, context));
        let (send, receive) = streams.map_err(connection_lost)?;
        let left = self.control_left.get();
        self.control_left.set(left + CONTROL_BYTES_PER_REQUEST);
        let shared = Rc::new(Receiving::new(receive, Permit::Head));
        self.newest.replace(Some(Handle {
            stopped: Some(Box::pin(send.stopped())),
            receiving: Rc::clone(&shared),
        }));
        Poll::Ready(Ok(Both {
            sender: Sender {
                stream: send,
                writing: None,
                request: Some(Rc::clone(&shared)),
                begun: false,
            },
            receiver: Receiver {
                shared,
                control_left: None,
            },
        }))
    }

    fn opener(&self) -> Self::OpenStreams {
        Self::new(self.connection.clone())
    }
}

impl quic::OpenStreams<Bytes> for Wire {
    type BidiStream = Both;
    type SendStream = Sender;

    /// A server opens no requests.
    fn poll_open_bidi(
        &mut self,
        _: &mut Context<'_>,
    ) -> Poll<Result<Self::BidiStream, StreamErrorIncoming>> {
        Poll::Pending
    }

    fn poll_open_send(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Self::SendStream, StreamErrorIncoming>> {
        let begin = |connection: Connection| async move { connection.open_uni().await };
        let stream = ready!(poll_kept(
            &mut self.opening,
            &self.connection,
            begin,
            context
        ));
        Poll::Ready(match stream {
            Ok(stream) => Ok(Sender {
                stream,
                writing: None,
                request: None,
                begun: false,
            }),
            Err(error) => Err(stream_lost(error)),
        })
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        self.connection.close(variable(code.value()), reason);
    }
}

/// Both halves of a request stream, before they are parted.
pub(super) struct Both {
    sender: Sender,
    receiver: Receiver,
}

impl quic::BidiStream<Bytes> for Both {
    type SendStream = Sender;
    type RecvStream = Receiver;

    fn split(self) -> (Self::SendStream, Self::RecvStream) {
        (self.sender, self.receiver)
    }
}

impl quic::RecvStream for Both {
    type Buf = Bytes;

    fn poll_data(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        self.receiver.poll_data(context)
    }

    fn stop_sending(&mut self, code: u64) {
        self.receiver.stop_sending(code);
    }

    fn recv_id(&self) -> StreamId {
        self.receiver.recv_id()
    }
}

impl quic::SendStream<Bytes> for Both {
    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.sender.poll_ready(context)
    }

    fn send_data<T: Into<WriteBuf<Bytes>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        self.sender.send_data(data)
    }

    fn poll_finish(&mut self, context: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.sender.poll_finish(context)
    }

    fn reset(&mut self, code: u64) {
        self.sender.reset(code);
    }

    fn send_id(&self) -> StreamId {
        self.sender.send_id()
    }
}

/// How much `h3` may read of a stream now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Permit {
    /// Control streams: all that [`Wire`] allows the connection.
    Control,
    /// Up to the end of the head, which is read packet by packet.
    Head,
    /// Nothing: what was read before is to be made use of first.
    Nothing,
    /// What is there, once.
    Once,
}

/// The receiving half, shared by `h3` and our handle.
struct Receiving {
    stream: RefCell<quinn::RecvStream>,
    permit: Cell<Permit>,
    /// quinn has nothing more at the moment, and will wake us.
    waits: Cell<bool>,
    /// All of it was read, or it failed.
    ended: Cell<bool>,
    /// The body has the length it was to have.
    whole: Cell<bool>,
    undigested: Cell<usize>,
    /// What the client is told if nobody else says anything before the halves are dropped.
    code: Cell<Code>,
    /// The request was given to us: before that, only `h3` answers.
    given: Cell<bool>,
}

impl Receiving {
    fn new(stream: quinn::RecvStream, permit: Permit) -> Self {
        Self {
            stream: RefCell::new(stream),
            permit: Cell::new(permit),
            waits: Cell::new(false),
            ended: Cell::new(false),
            whole: Cell::new(false),
            undigested: Cell::new(0),
            code: Cell::new(Code::H3_REQUEST_CANCELLED),
            given: Cell::new(false),
        }
    }

    fn poll_chunk(&self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>, ReadError>> {
        let mut stream = self.stream.borrow_mut();
        // This future keeps nothing between two calls: polling a new one each time is polling the same.
        let chunk = pin!(stream.read_chunk(usize::MAX, true)).poll(context);
        self.waits.set(chunk.is_pending());
        let chunk = ready!(chunk);
        match &chunk {
            Ok(Some(chunk)) => {
                self.undigested
                    .set(self.undigested.get() + chunk.bytes.len());
            }
            Ok(None) | Err(_) => self.ended.set(true),
        }
        Poll::Ready(chunk.map(|chunk| chunk.map(|chunk| chunk.bytes)))
    }

    fn stop(&self, code: Code) {
        // A stream that has ended needs no stopping.
        self.stream.borrow_mut().stop(variable(code.value())).ok();
    }
}

impl Drop for Receiving {
    /// quinn would stop the stream with a code that means nothing to HTTP/3.
    fn drop(&mut self) {
        if !self.ended.get() {
            let code = variable(self.code.get().value());
            self.stream.get_mut().stop(code).ok();
        }
    }
}

/// A receiving half in `h3`'s hands.
pub(super) struct Receiver {
    shared: Rc<Receiving>,
    /// Bytes the client's control streams may still bring, for these.
    control_left: Option<Rc<Cell<usize>>>,
}

impl Receiver {
    /// Whether `h3` may have the bytes it was just given.
    fn is_too_much(&self, count: usize) -> bool {
        let Some(left) = &self.control_left else {
            return self.shared.undigested.get() > UNDIGESTED_BYTES_MAX;
        };
        let allowed = left.get();
        left.set(allowed.saturating_sub(count));
        count > allowed
    }
}

impl quic::RecvStream for Receiver {
    type Buf = Bytes;

    fn poll_data(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        let shared = &self.shared;
        if shared.permit.get() == Permit::Nothing {
            // Not a wait: whoever polls `h3` gives the next permit, or makes do with what `h3` has.
            return Poll::Pending;
        }
        let chunk = ready!(shared.poll_chunk(context)).map_err(read_failed)?;
        if shared.permit.get() == Permit::Once {
            shared.permit.set(Permit::Nothing);
        }
        let count = chunk.as_ref().map_or(0, Bytes::len);
        if self.is_too_much(count) {
            shared.code.set(Code::H3_EXCESSIVE_LOAD);
            return Poll::Ready(Err(StreamErrorIncoming::StreamTerminated {
                error_code: Code::H3_EXCESSIVE_LOAD.value(),
            }));
        }
        Poll::Ready(Ok(chunk))
    }

    fn stop_sending(&mut self, code: u64) {
        self.shared.stop(Code::from(code));
    }

    fn recv_id(&self) -> StreamId {
        stream_id(self.shared.stream.borrow().id())
    }
}

/// A sending half in `h3`'s hands.
pub(super) struct Sender {
    stream: quinn::SendStream,
    writing: Option<WriteBuf<Bytes>>,
    /// The other half, for answers that have not come to their end.
    request: Option<Rc<Receiving>>,
    /// There is an answer.
    begun: bool,
}

impl quic::SendStream<Bytes> for Sender {
    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        while let Some(data) = self.writing.as_mut().filter(|data| data.has_remaining()) {
            let written = Pin::new(&mut self.stream).poll_write(context, data.chunk());
            data.advance(ready!(written).map_err(write_failed)?);
        }
        self.writing = None;
        Poll::Ready(Ok(()))
    }

    fn send_data<T: Into<WriteBuf<Bytes>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        self.writing = Some(data.into());
        self.begun = true;
        Ok(())
    }

    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.request = None;
        let finished = self.stream.finish();
        Poll::Ready(finished.map_err(|error| StreamErrorIncoming::Unknown(Box::new(error))))
    }

    fn reset(&mut self, code: u64) {
        self.request = None;
        // A stream that has ended needs no reset.
        self.stream.reset(variable(code)).ok();
    }

    fn send_id(&self) -> StreamId {
        stream_id(self.stream.id())
    }
}

impl Drop for Sender {
    /// Half an answer must not look like a whole one, which is how quinn would end it. The one that `h3` gives by
    /// itself (431) is whole, though `h3` does not end it.
    fn drop(&mut self) {
        if let Some(request) = self.request.take() {
            if self.begun && !request.given.get() {
                request.code.set(Code::H3_NO_ERROR);
                self.stream.finish().ok();
                return;
            }
            self.stream.reset(variable(request.code.get().value())).ok();
        }
    }
}

type Stopped = Pin<Box<dyn Future<Output = Result<Option<VarInt>, StoppedError>>>>;

/// What we see of a request stream behind `h3`'s back.
pub(super) struct Handle {
    /// Until it has completed.
    stopped: Option<Stopped>,
    receiving: Rc<Receiving>,
}

impl Handle {
    /// Completes when the client has taken the request back, or the connection has died.
    pub(super) fn poll_gone(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        if let Some(stopped) = &mut self.stopped
            && let Poll::Ready(ended) = stopped.as_mut().poll(context)
        {
            self.stopped = None;
            match ended {
                // The whole answer was acknowledged.
                Ok(None) => {}
                Ok(Some(_)) => return Poll::Ready(io::ErrorKind::ConnectionReset.into()),
                Err(StoppedError::ConnectionLost(error)) => return Poll::Ready(error.into()),
                Err(StoppedError::ZeroRttRejected) => {
                    return Poll::Ready(io::ErrorKind::ConnectionReset.into());
                }
            }
        }
        if self.receiving.ended.get() {
            return Poll::Pending;
        }
        let mut stream = self.receiving.stream.borrow_mut();
        // Like a read, this future keeps nothing between two calls.
        match ready!(pin!(stream.received_reset()).poll(context)) {
            Ok(Some(_)) => Poll::Ready(io::ErrorKind::ConnectionReset.into()),
            Ok(None) => Poll::Pending,
            Err(ResetError::ConnectionLost(error)) => Poll::Ready(error.into()),
            Err(ResetError::ZeroRttRejected) => Poll::Ready(io::ErrorKind::ConnectionReset.into()),
        }
    }

    /// Whether the client had taken the request back when this was asked.
    pub(super) fn is_taken_back(&self) -> bool {
        let mut stream = self.receiving.stream.borrow_mut();
        let mut context = Context::from_waker(Waker::noop());
        matches!(
            pin!(stream.received_reset()).poll(&mut context),
            Poll::Ready(Ok(Some(_)))
        )
    }

    /// Whether the client sent more of its head than is kept of one.
    pub(super) fn is_overfull(&self) -> bool {
        self.receiving.undigested.get() > UNDIGESTED_BYTES_MAX
    }

    /// Completes when nothing of the answer is on its way any more, and the end of a whole request has come: told
    /// to stop just before its end, a client may take the request for failed.
    pub(super) fn poll_over(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Some(stopped) = &mut self.stopped {
            drop(ready!(stopped.as_mut().poll(context)));
            self.stopped = None;
        }
        while self.receiving.whole.get() && !self.receiving.ended.get() {
            // Frames without meaning at most; they are of no interest.
            drop(ready!(self.receiving.poll_chunk(context)));
        }
        Poll::Ready(())
    }

    /// Polls `h3` for more of the body, and gives it only as much to read as it needs for that.
    pub(super) fn poll_sparingly<T>(
        &self,
        context: &mut Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let receiving = &self.receiving;
        receiving.permit.set(Permit::Nothing);
        receiving.waits.set(false);
        loop {
            if let Poll::Ready(done) = poll(context) {
                receiving.undigested.set(0);
                return Poll::Ready(done);
            }
            if receiving.waits.get() {
                return Poll::Pending;
            }
            receiving.permit.set(Permit::Once);
        }
    }

    /// The request has been read, if perhaps not the end of its stream.
    pub(super) fn is_whole(&self) -> bool {
        self.receiving.ended.get() || self.receiving.whole.get()
    }

    /// As many bytes have been read as the request announced.
    pub(super) fn set_whole(&self) {
        self.receiving.whole.set(true);
    }

    /// Tells the client to send no more of its request.
    pub(super) fn stop(&self, code: Code) {
        self.receiving.stop(code);
    }

    /// What the client is told if the stream is dropped without another word; from now on only we speak.
    pub(super) fn on_drop(&self, code: Code) {
        self.receiving.given.set(true);
        self.receiving.code.set(code);
    }
}

fn connection_lost(error: ConnectionError) -> ConnectionErrorIncoming {
    match error {
        ConnectionError::ApplicationClosed(close) => ConnectionErrorIncoming::ApplicationClose {
            error_code: close.error_code.into_inner(),
        },
        ConnectionError::TimedOut => ConnectionErrorIncoming::Timeout,
        other => ConnectionErrorIncoming::Undefined(Arc::new(other)),
    }
}

fn stream_lost(error: ConnectionError) -> StreamErrorIncoming {
    StreamErrorIncoming::ConnectionErrorIncoming {
        connection_error: connection_lost(error),
    }
}

fn read_failed(error: ReadError) -> StreamErrorIncoming {
    match error {
        ReadError::Reset(code) => StreamErrorIncoming::StreamTerminated {
            error_code: code.into_inner(),
        },
        ReadError::ConnectionLost(error) => stream_lost(error),
        other => StreamErrorIncoming::Unknown(Box::new(other)),
    }
}

fn write_failed(error: WriteError) -> StreamErrorIncoming {
    match error {
        WriteError::Stopped(code) => StreamErrorIncoming::StreamTerminated {
            error_code: code.into_inner(),
        },
        WriteError::ConnectionLost(error) => stream_lost(error),
        other => StreamErrorIncoming::Unknown(Box::new(other)),
    }
}

/// Every code of ours, and every code a peer can send, fits.
fn variable(code: u64) -> VarInt {
    VarInt::from_u64(code).unwrap_or(VarInt::MAX)
}

fn stream_id(id: quinn::StreamId) -> StreamId {
    // quinn's ids are variable-length integers as well, so this cannot fail; zero would be the first request.
    let number = VarInt::from(id).into_inner();
    StreamId::try_from(number).unwrap_or_else(|_| unreachable!())
}
