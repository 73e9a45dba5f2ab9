//! Carries pages and what is said of them to the target, also over connections that break: what was sent and may not
//! have arrived is kept until the target says that it has it, and is sent again over the next connection if it has not.
//!
//! What it never does: send a page again that has arrived, or keep more than [`WINDOW_FRAMES`] frames and one for each container.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::RwLock;

use super::MemoryError;
use super::runs::Run;
use super::wire::{PageAnswer, PageAsk, Piece};
use crate::peer::message::Topic;
use crate::peer::{Link, PeerError, Session};

/// Frames that may be on their way, each of up to 1 MiB: twice what the streams' queue holds, so that asking what has
/// arrived leaves no gap.
const WINDOW_FRAMES: usize = 32;
/// So many of the oldest are asked about at once.
const ASKED_FRAMES: usize = WINDOW_FRAMES / 2;
/// How long a question about what has arrived may take; frames before it may still be in the streams' queue.
const ASK_MAX: Duration = Duration::from_secs(600);

/// A session's way for pages.
#[derive(Debug)]
pub(super) struct Carrier {
    session: Arc<Session>,
    /// The connections over which everything in the window was sent.
    link: RwLock<Arc<Link>>,
    window: Mutex<Window>,
}

/// What may not have arrived.
#[derive(Debug, Default)]
struct Window {
    frames: VecDeque<Arc<Sent>>,
    pieces: Vec<Arc<Said>>,
}

#[derive(Debug)]
struct Sent {
    runs: Vec<Run>,
    frame: Arc<Vec<u8>>,
}

#[derive(Debug)]
struct Said {
    container: String,
    words: Vec<u8>,
}

impl Carrier {
    pub(super) fn new(session: &Arc<Session>) -> Self {
        Self {
            link: RwLock::new(session.link()),
            session: Arc::clone(session),
            window: Mutex::default(),
        }
    }

    /// The connections of now, for a look at how busy they are.
    pub(super) fn link(&self) -> Arc<Link> {
        self.session.link()
    }

    /// Sends a frame with pages for the slots of `runs`. Whoever does calls [`Self::narrow`] before the next one.
    ///
    /// # Errors
    /// When the session is lost and cannot be taken up again.
    pub(super) async fn send(&self, runs: Vec<Run>, frame: Vec<u8>) -> Result<(), MemoryError> {
        let frame = Arc::new(frame);
        let sent = Arc::new(Sent { runs, frame });
        let link = self.link.read().await;
        // Noted first: whoever mends the session meanwhile sends it as well.
        self.lock().frames.push_back(Arc::clone(&sent));
        let is_taken = link.frames.push(Arc::clone(&sent.frame)).await;
        let used = Arc::clone(&link);
        drop(link);
        if !is_taken {
            self.mend(&used).await?;
        }
        Ok(())
    }

    /// Tells a piece; gives the bytes that took.
    ///
    /// # Errors
    /// When the session is lost and cannot be taken up again.
    pub(super) async fn tell(&self, piece: Piece) -> Result<u64, MemoryError> {
        let container = piece.container.clone();
        let words = encoded(&PageAsk::Piece(piece))?;
        let said = Arc::new(Said { container, words });
        let link = self.link.read().await;
        self.lock().pieces.push(Arc::clone(&said));
        let told = link.tell(Topic::PageAsk, link.number(), &said.words).await;
        let used = Arc::clone(&link);
        drop(link);
        if told.is_err() {
            self.mend(&used).await?;
        }
        Ok(said.words.len() as u64)
    }

    /// Asks until there is an answer, over as many connections as it takes.
    ///
    /// # Errors
    /// When the target refuses, the time is over, or the session is lost and cannot be taken up again.
    pub(super) async fn ask(
        &self,
        ask: &PageAsk,
        what: &'static str,
        limit: Duration,
    ) -> Result<(), MemoryError> {
        loop {
            let link = Arc::clone(&*self.link.read().await);
            match ask_over(&link, ask, what, limit).await {
                Err(MemoryError::Peer(PeerError::Lost { .. })) => self.mend(&link).await?,
                outcome => return outcome.map(drop),
            }
        }
    }

    /// Whether a frame may be sent before it is full: frames that nobody waits for must not be what others wait for.
    pub(super) fn has_room(&self) -> bool {
        self.lock().frames.len() < ASKED_FRAMES
    }

    /// Forgets all frames: everything has arrived, and nobody sends.
    pub(super) fn forget_frames(&self) {
        self.lock().frames.clear();
    }

    /// Forgets the pieces of a container, whose images are complete.
    pub(super) fn forget(&self, container: &str) {
        self.lock()
            .pieces
            .retain(|said| said.container != container);
    }

    /// Keeps the window within its bound, but for a frame of everybody who sends: waits until the target has the oldest
    /// frames.
    ///
    /// # Errors
    /// When the session is lost and cannot be taken up again.
    pub(super) async fn narrow(&self) -> Result<(), MemoryError> {
        let oldest: Vec<Arc<Sent>> = {
            let window = self.lock();
            if window.frames.len() < WINDOW_FRAMES {
                return Ok(());
            }
            window.frames.iter().take(ASKED_FRAMES).cloned().collect()
        };
        let runs = oldest.iter().flat_map(|sent| sent.runs.clone()).collect();
        self.ask(&PageAsk::Await { runs }, "pages to arrive", ASK_MAX)
            .await?;
        self.lock()
            .frames
            .retain(|sent| !oldest.iter().any(|old| Arc::ptr_eq(old, sent)));
        Ok(())
    }

    /// Takes the session up again, and sends what has not arrived. Whoever comes second finds it done.
    async fn mend(&self, broken: &Arc<Link>) -> Result<(), MemoryError> {
        let mut link = self.link.write().await;
        if !Arc::ptr_eq(&link, broken) {
            return Ok(());
        }
        loop {
            self.session.revive().await?;
            let fresh = self.session.link();
            match self.repeat(&fresh).await {
                Ok(()) => {
                    *link = fresh;
                    return Ok(());
                }
                // Broken again: the next try has its own time to come up.
                Err(MemoryError::Peer(PeerError::Lost { .. })) => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn repeat(&self, link: &Link) -> Result<(), MemoryError> {
        let (frames, pieces) = {
            let window = self.lock();
            (window.frames.clone(), window.pieces.clone())
        };
        let asked = PageAsk::Missing {
            frames: frames.iter().map(|sent| sent.runs.clone()).collect(),
        };
        let missing = match ask_over(link, &asked, "what has arrived", ASK_MAX).await? {
            PageAnswer::Missing(missing) => missing,
            _ => return Err(PeerError::Vocabulary.into()),
        };
        tracing::info!(
            kept = frames.len(),
            again = missing.len(),
            "frames of pages are sent again"
        );
        for index in missing {
            let sent = frames.get(index as usize).ok_or(PeerError::Vocabulary)?;
            if !link.frames.push(Arc::clone(&sent.frame)).await {
                return Err(link.lost_error().into());
            }
        }
        for said in pieces {
            link.tell(Topic::PageAsk, link.number(), &said.words)
                .await?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn ask_over(
    link: &Link,
    ask: &PageAsk,
    what: &'static str,
    limit: Duration,
) -> Result<PageAnswer, MemoryError> {
    let bytes = encoded(ask)?;
    let answer = link.ask(Topic::PageAsk, bytes, what, limit).await?;
    match postcard::from_bytes(&answer.bytes) {
        Ok(PageAnswer::Failed(fault)) => Err(fault.into()),
        Ok(answer) => Ok(answer),
        Err(_) => Err(PeerError::Vocabulary.into()),
    }
}

fn encoded(ask: &PageAsk) -> Result<Vec<u8>, MemoryError> {
    postcard::to_stdvec(ask).map_err(|_| PeerError::Vocabulary.into())
}
