//! Requests to the peer's handler: those that are answered now, and those that wait for what is still on its way.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::message::{Message, Topic};
use super::{Part, PeerError, Session};

impl Session {
    /// Asks the peer's [`super::Handler`] and waits for its answer, at most `limit`. Calls are handled one after the
    /// other, in the order in which they were made; one whose time ran out may still be carried out there.
    ///
    /// # Errors
    /// When the time is over, the session is lost, or either side does not know the other's type.
    pub async fn call<Q: Serialize + Sync, R: DeserializeOwned>(
        &self,
        request: &Q,
        limit: Duration,
    ) -> Result<R, PeerError> {
        let bytes = postcard::to_stdvec(request).map_err(|_| PeerError::Vocabulary)?;
        let link = self.link();
        reply(&link.ask(Topic::Call, bytes, "a request", limit).await?)
    }

    /// As [`Self::call`], of a request that the peer carries out once each of `parts` has arrived there whole, counted
    /// from the moment when this returns: what is to be waited for begins after that.
    ///
    /// # Errors
    /// When the session is lost, or the request cannot be encoded; what else may go wrong is in the answer.
    pub async fn call_after<Q: Serialize + Sync, R: DeserializeOwned + Send + 'static>(
        &self,
        parts: &[Part],
        request: &Q,
        limit: Duration,
    ) -> Result<Answering<R>, PeerError> {
        let encoded = postcard::to_stdvec(request)
            .and_then(|bytes| postcard::to_stdvec(&(parts, bytes)))
            .map_err(|_| PeerError::Vocabulary)?;
        let (link, (told, is_told)) = (self.link(), oneshot::channel());
        let mut waiting = JoinSet::new();
        waiting.spawn(async move {
            let number = link.number();
            let answer = link.expect(number);
            let waiting = async {
                link.tell(Topic::CallAfter, number, &encoded).await?;
                // Nobody waits any more: neither do we.
                let _ = told.send(());
                reply(&link.answer(answer).await?)
            };
            let what = "a request that waits for what arrives";
            let waited = tokio::time::timeout(limit, waiting).await;
            waited.map_err(|_| PeerError::Deadline { what, limit })?
        });
        let answering = Answering { waiting };
        match is_told.await {
            Ok(()) => Ok(answering),
            // It ended before: its answer says why.
            Err(_) => Err(answering
                .answer()
                .await
                .err()
                .unwrap_or(PeerError::Vocabulary)),
        }
    }
}

fn reply<R: DeserializeOwned>(answer: &Message) -> Result<R, PeerError> {
    match answer.topic {
        Topic::Reply => postcard::from_bytes(&answer.bytes).map_err(|_| PeerError::Vocabulary),
        _ => Err(PeerError::Vocabulary),
    }
}

/// The answer to come of [`Session::call_after`]. Dropped, it is no longer waited for.
#[derive(Debug)]
pub struct Answering<R> {
    waiting: JoinSet<Result<R, PeerError>>,
}

impl<R: Send + 'static> Answering<R> {
    /// Waits for the answer.
    ///
    /// # Errors
    /// As [`Session::call`].
    pub async fn answer(mut self) -> Result<R, PeerError> {
        match self.waiting.join_next().await {
            Some(Ok(answer)) => answer,
            _ => Err(PeerError::Lost {
                reason: "nobody waits for the answer any more".into(),
            }),
        }
    }
}
