//! Upstream connections that many requests share: those of HTTP/2.
//!
//! Kept by server and register like the others, and never handed out for another epoch. One is opened at a time for
//! a server: whoever comes meanwhile waits for it rather than for a connection of his own. To let go of a connection
//! is to close it: it ends with its last request, and is counted until then.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use cutover_protocol::id::Register;
use tokio::sync::Mutex;

use super::pool::{NoConnection, Upstream};
use crate::config::Limits;
use crate::http::h2::upstream::{Session, Slot};
use crate::upstream::ServerId;

#[derive(Debug)]
struct Entry {
    session: Rc<Session>,
    register: Register,
}

/// What is known of one server.
#[derive(Debug, Default)]
struct Place {
    entries: RefCell<Vec<Entry>>,
    /// Held by whoever opens a connection.
    opening: Mutex<()>,
    /// Attempts that came to nothing: those who waited for one share its fate.
    failures: Cell<u64>,
}

/// The shared connections of one service on one worker.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    places: RefCell<BTreeMap<ServerId, Rc<Place>>>,
}

impl Sessions {
    /// A place on a connection to this server, which `connect` makes where there is none.
    ///
    /// # Cancel safety
    /// Dropping the future drops the attempt.
    pub(super) async fn slot(
        &self,
        server: ServerId,
        register: Register,
        limits: &Limits,
        connect: impl Future<Output = Result<Upstream, NoConnection>>,
    ) -> Result<Slot, NoConnection> {
        let place = Rc::clone(self.places.borrow_mut().entry(server).or_default());
        if let Some(slot) = place.slot(register) {
            return Ok(slot);
        }
        let failures = place.failures.get();
        let _opening = place.opening.lock().await;
        if let Some(slot) = place.slot(register) {
            return Ok(slot);
        }
        if place.failures.get() != failures {
            let shared = std::io::ErrorKind::NotConnected;
            return Err(NoConnection::Failed(shared.into()));
        }
        let opened = place.open(register, limits, connect).await;
        if matches!(opened, Err(NoConnection::Failed(_))) {
            place.failures.set(failures + 1);
        }
        opened
    }

    /// Lets go of what is no longer allowed, dead, or idle for too long.
    pub(super) fn sweep(
        &self,
        idle_max: Duration,
        is_allowed: impl Fn(ServerId, Register) -> bool,
    ) {
        self.places.borrow_mut().retain(|server, place| {
            place.entries.borrow_mut().retain(|entry| {
                let idle = entry
                    .session
                    .idle_for()
                    .is_some_and(|idle| idle >= idle_max);
                is_allowed(*server, entry.register) && !entry.session.has_ended() && !idle
            });
            // Somebody may be opening one just now.
            !place.entries.borrow().is_empty() || Rc::strong_count(place) > 1
        });
    }
}

impl Place {
    fn slot(&self, register: Register) -> Option<Slot> {
        let mut entries = self.entries.borrow_mut();
        entries.retain(|entry| !entry.session.has_ended());
        let mut fitting = entries.iter().filter(|entry| entry.register == register);
        fitting.find_map(|entry| entry.session.slot())
    }

    async fn open(
        &self,
        register: Register,
        limits: &Limits,
        connect: impl Future<Output = Result<Upstream, NoConnection>>,
    ) -> Result<Slot, NoConnection> {
        let upstream = connect.await?;
        let (stream, counted) = upstream.into_parts();
        let session = Session::open(stream, limits, counted).await;
        let session = session.map_err(NoConnection::Failed)?;
        let slot = session.slot();
        self.entries.borrow_mut().push(Entry { session, register });
        slot.ok_or_else(|| NoConnection::Failed(std::io::ErrorKind::ConnectionRefused.into()))
    }
}
