//! Copies bytes both ways until both ends have finished, one has failed, or both were silent for too long.
//!
//! An end that finishes sending is passed on as such: half-closed connections stay half open. One task looks after
//! both directions, and does little besides two system calls for each piece: a tunnel may carry many small ones.

use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::time::{Sleep, sleep_until};

use crate::buffer::{Buffer, Buffers};
use crate::clock;
use crate::service::inflight::Progress;
use crate::stream::Stream;
use crate::stream::splice::{Load, SpliceError};

/// Pieces of this many bytes are worth a pipe.
const LARGE_BYTES: usize = 16 * 1024;
/// Most pieces that one direction moves before others have their turn.
const TURN_PIECES_MAX: usize = 8;

/// Copies until it is over, however it ends; what is copied is added to the progress.
///
/// # Cancel safety
/// None: after a drop both connections must be closed. It must be polled by one task only.
pub(crate) async fn tunnel(
    client: &Stream,
    upstream: &Stream,
    buffers: &Buffers,
    idle_max: Duration,
    progress: &Progress,
) {
    // A client has often said something already; most servers wait for that.
    let mut up = Direction::new(client, upstream, buffers, &progress.sent, Hope::Likely);
    let mut down = Direction::new(upstream, client, buffers, &progress.answered, Hope::None);
    let mut touched = clock::recently();
    let mut timer = pin!(sleep_until(clock::end_of(idle_max).into()));
    let mut is_timed = false;
    poll_fn(|context| {
        let before = up.moved.get() + down.moved.get();
        let both = (up.poll(context), down.poll(context));
        match both {
            // An error ends both directions; whose it was makes no difference to what has been copied.
            (Poll::Ready(Err(_)), _) | (_, Poll::Ready(Err(_))) => return Poll::Ready(()),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(()),
            _ => {}
        }
        let has_moved = up.moved.get() + down.moved.get() != before;
        if has_moved {
            touched = clock::recently();
        }
        // What moves need not set the timer each time: when it is over, it is seen how much time is left. It keeps
        // the task's waker from one poll to the next.
        if has_moved && is_timed && !timer.is_elapsed() {
            return Poll::Pending;
        }
        is_timed = true;
        let oldest = [up.blocked, down.blocked].into_iter().flatten();
        let since = oldest.fold(touched, Instant::min);
        poll_idle(timer.as_mut(), since, idle_max, context)
    })
    .await;
}

/// Completes when nothing has moved since then for too long.
fn poll_idle(
    mut timer: std::pin::Pin<&mut Sleep>,
    since: Instant,
    idle_max: Duration,
    context: &mut Context<'_>,
) -> Poll<()> {
    loop {
        ready!(timer.as_mut().poll(context));
        let left = idle_max.saturating_sub(clock::recently().saturating_duration_since(since));
        if left.is_zero() {
            return Poll::Ready(());
        }
        timer.as_mut().reset(clock::end_of(left).into());
    }
}

/// Whether a first read is likely to bring something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hope {
    Likely,
    /// The reactor is asked first.
    None,
}

/// What has been taken from one end and not been handed to the other.
#[derive(Debug)]
enum Freight {
    None,
    /// In a buffer; an empty one has been handed over and may have to be flushed.
    Bytes(Buffer),
    Piped(Load),
    /// The end has been passed on.
    Finished,
}

struct Direction<'d> {
    from: &'d Stream,
    to: &'d Stream,
    buffers: &'d Buffers,
    moved: &'d Cell<u64>,
    freight: Freight,
    hope: Hope,
    /// A read has filled its buffer, and the pieces have been large since: the rest is left to the kernel.
    is_bulk: bool,
    /// Since when the other end takes nothing.
    blocked: Option<Instant>,
}

impl<'d> Direction<'d> {
    const fn new(
        from: &'d Stream,
        to: &'d Stream,
        buffers: &'d Buffers,
        moved: &'d Cell<u64>,
        hope: Hope,
    ) -> Self {
        Self {
            from,
            to,
            buffers,
            moved,
            freight: Freight::None,
            hope,
            is_bulk: false,
            blocked: None,
        }
    }

    /// Completes when the end has been passed on.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        for _ in 0..TURN_PIECES_MAX {
            ready!(self.poll_deliver(context))?;
            if matches!(self.freight, Freight::Finished) {
                return Poll::Ready(Ok(()));
            }
            if self.hope == Hope::None {
                ready!(self.from.poll_readable(context))?;
                self.hope = Hope::Likely;
            }
            match self.fetch() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.hope = Hope::None,
                done => done?,
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes a piece. Borrows a buffer or a pipe only while bytes are under way.
    fn fetch(&mut self) -> io::Result<()> {
        if let (true, Some(from), Some(_)) = (self.is_bulk, self.from.plain(), self.to.plain()) {
            match self.buffers.pipes.load(from, usize::MAX) {
                Ok(Some(load)) => {
                    self.is_bulk = load.left() >= LARGE_BYTES;
                    self.freight = Freight::Piped(load);
                    return Ok(());
                }
                Ok(None) => {
                    self.finish();
                    return Ok(());
                }
                Err(SpliceError::NoPipe) => {}
                Err(SpliceError::Read(error) | SpliceError::Write(error)) => return Err(error),
            }
        }
        let mut buffer = self.buffers.take();
        let room = buffer.room();
        let size = room.len();
        match self.from.try_read(room) {
            Ok(0) => {
                self.buffers.give(buffer);
                self.finish();
            }
            Ok(count) => {
                buffer.advance(count);
                self.is_bulk = count == size;
                // A socket that did not fill the room is empty.
                if count < size && self.from.plain().is_some() {
                    self.hope = Hope::None;
                }
                self.freight = Freight::Bytes(buffer);
            }
            Err(error) => {
                self.buffers.give(buffer);
                return Err(error);
            }
        }
        Ok(())
    }

    fn finish(&mut self) {
        self.to.finish();
        self.freight = Freight::Finished;
    }

    /// Completes when nothing is under way.
    fn poll_deliver(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while matches!(self.freight, Freight::Bytes(_) | Freight::Piped(_)) {
            match self.deliver() {
                Ok(count) => {
                    self.moved.set(self.moved.get() + count as u64);
                    self.blocked = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked.get_or_insert_with(clock::recently);
                    if let (Freight::Piped(load), Some(from)) =
                        (&mut self.freight, self.from.plain())
                    {
                        load.top_up(from, usize::MAX);
                    }
                    ready!(self.to.poll_writable(context))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Hands over what the other end takes; bytes.
    fn deliver(&mut self) -> io::Result<usize> {
        let count = match &mut self.freight {
            Freight::None | Freight::Finished => 0,
            Freight::Bytes(buffer) if buffer.is_empty() => {
                self.to.try_flush()?;
                0
            }
            Freight::Bytes(buffer) => match self.to.try_write(&[IoSlice::new(buffer.filled())])? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => {
                    buffer.consume(count);
                    if !buffer.is_empty() || self.to.plain().is_none() {
                        return Ok(count);
                    }
                    count
                }
            },
            Freight::Piped(load) => {
                let to = self.to.plain().ok_or(io::ErrorKind::Unsupported)?;
                let count = load.deliver(to)?;
                if load.left() > 0 {
                    return Ok(count);
                }
                count
            }
        };
        match std::mem::replace(&mut self.freight, Freight::None) {
            Freight::Bytes(buffer) => self.buffers.give(buffer),
            Freight::Piped(load) => self.buffers.pipes.unload(load)?,
            Freight::None | Freight::Finished => {}
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::thread;

    use super::*;
    use crate::stream::Socket;

    /// Long enough that a busy machine runs every thread within it.
    const IDLE_MAX: Duration = Duration::from_secs(1);

    /// Our end of a connection, and the peer's.
    fn connection() -> (Stream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Stream::Plain(Socket::new(OwnedFd::from(ours))), peer)
    }

    /// Runs a tunnel to its end and returns what went each way, in bytes.
    fn run(client: Stream, upstream: Stream, idle_max: Duration) -> (u64, u64) {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        let (buffers, progress) = (Buffers::new(16 * 1024), Progress::default());
        runtime.block_on(async {
            tunnel(&client, &upstream, &buffers, idle_max, &progress).await;
            drop((client, upstream));
        });
        (progress.sent.get(), progress.answered.get())
    }

    #[test]
    fn large_and_small_pieces_come_through_whole_and_each_end_is_passed_on_by_itself() {
        let ((client, mut asker), (upstream, mut server)) = (connection(), connection());
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
        let expected = bytes.clone();
        let serving = thread::spawn(move || {
            let mut received = Vec::new();
            server.read_to_end(&mut received).unwrap();
            // The client has finished, and still hears us.
            for piece in [&b"a"[..], b"bc", &received] {
                server.write_all(piece).unwrap();
            }
        });
        let asking = thread::spawn(move || {
            asker.write_all(b"x").unwrap();
            asker.write_all(&bytes).unwrap();
            asker.shutdown(Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            asker.read_to_end(&mut answer).unwrap();
            answer
        });
        let moved = run(client, upstream, Duration::from_secs(3600));
        serving.join().unwrap();
        let answer = asking.join().unwrap();
        assert_eq!(answer, [b"abcx", expected.as_slice()].concat());
        let asked = expected.len() as u64 + 1;
        assert_eq!(moved, (asked, asked + 3));
    }

    #[test]
    fn a_tunnel_without_a_word_ends_when_its_time_is_over_and_no_earlier() {
        let ((client, _asker), (upstream, _server)) = (connection(), connection());
        let (began, idle_max) = (Instant::now(), IDLE_MAX / 10);
        assert_eq!(run(client, upstream, idle_max), (0, 0));
        assert!(began.elapsed() >= idle_max);
    }

    #[test]
    fn who_takes_nothing_ends_the_tunnel_though_he_talks() {
        let ((client, mut asker), (upstream, mut server)) = (connection(), connection());
        let asking = thread::spawn(move || while asker.write_all(&[0; 65_536]).is_ok() {});
        let serving = thread::spawn(move || {
            while server.write_all(b"!").is_ok() {
                thread::sleep(IDLE_MAX / 10);
            }
        });
        let began = Instant::now();
        let (sent, answered) = run(client, upstream, IDLE_MAX);
        assert!(sent > 65_536 && answered > 0 && began.elapsed() >= IDLE_MAX);
        asking.join().unwrap();
        serving.join().unwrap();
    }

    #[test]
    fn one_direction_may_be_silent_for_as_long_as_the_other_talks() {
        let ((client, mut asker), (upstream, mut server)) = (connection(), connection());
        let serving = thread::spawn(move || {
            let mut received = [0; 200_000];
            server.read_exact(&mut received).unwrap();
            let began = Instant::now();
            while began.elapsed() < IDLE_MAX * 2 {
                server.write_all(b"!").unwrap();
                thread::sleep(IDLE_MAX / 50);
            }
        });
        let asking = thread::spawn(move || {
            asker.write_all(&[0; 200_000]).unwrap();
            let mut answer = Vec::new();
            asker.read_to_end(&mut answer).unwrap();
        });
        let began = Instant::now();
        let (sent, answered) = run(client, upstream, IDLE_MAX);
        assert_eq!(sent, 200_000);
        assert!(answered > 0 && began.elapsed() >= IDLE_MAX * 2);
        asking.join().unwrap();
        serving.join().unwrap();
    }
}
