//! What a client writes down about one request: the only evidence the verdict has from the client's side.

use std::time::Duration;

/// What was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// To store this id. Each id is sent exactly once in a run, and never again whatever comes of it.
    Add(String),
    /// A page to read.
    Page,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A complete answer with this status.
    Answered(u16),
    /// No complete answer, and why.
    Broken(String),
}

/// One request, with times since the load began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Which client.
    pub client: usize,
    /// What was asked.
    pub asked: Asked,
    /// When its first byte was about to be sent.
    pub sent_at: Duration,
    /// When the answer was complete, or given up.
    pub ended_at: Duration,
    /// What came of it.
    pub outcome: Outcome,
}

impl Record {
    /// Whether the client may believe that it worked.
    #[must_use]
    pub const fn acknowledged(&self) -> bool {
        matches!(self.outcome, Outcome::Answered(200..=299))
    }

    /// How long the client waited.
    #[must_use]
    pub const fn latency(&self) -> Duration {
        self.ended_at.saturating_sub(self.sent_at)
    }
}

/// The longest wait of any request.
#[must_use]
pub fn stall(records: &[Record]) -> Duration {
    records
        .iter()
        .map(Record::latency)
        .max()
        .unwrap_or_default()
}

/// How many ids were sent, and acknowledged in the end, while the gate held: between `from` and `to`.
#[must_use]
pub fn ids_between(records: &[Record], from: Duration, to: Duration) -> usize {
    let sent_then = |record: &&Record| record.sent_at >= from && record.sent_at < to;
    let ids = records
        .iter()
        .filter(|record| matches!(record.asked, Asked::Add(_)) && record.acknowledged());
    ids.filter(sent_then).count()
}
