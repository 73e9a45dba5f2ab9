//! Listening sockets that somebody else made: the process before an upgrade, or the supervisor. Each is found by
//! its place; what no listener asks for is left to whoever gave it.

use std::os::fd::OwnedFd;

use crate::listen::bound::{Keeper, Place};
use crate::listen::quic::router::Succession;

/// Sockets that wait for a listener to ask for them.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    sockets: Vec<Given>,
    /// The way back to the process before, one for each listener of QUIC.
    successions: Vec<(Place, Succession)>,
}

/// One of them.
#[derive(Debug)]
struct Given {
    place: Place,
    keeper: Keeper,
    socket: OwnedFd,
}

impl Inherited {
    pub(crate) fn add(&mut self, place: Place, keeper: Keeper, socket: OwnedFd) {
        self.sockets.push(Given {
            place,
            keeper,
            socket,
        });
    }

    /// What the process before says of a listener of QUIC.
    pub(crate) fn add_succession(&mut self, place: Place, succession: Succession) {
        self.successions.push((place, succession));
    }

    /// The same, for the listener that is of this place now.
    pub(crate) fn take_succession(&mut self, place: &Place) -> Option<Succession> {
        let mut given = self.successions.iter();
        let at = given.position(|(given, _)| given == place)?;
        Some(self.successions.swap_remove(at).1)
    }

    /// All sockets of a place, if there are any.
    pub(crate) fn take(&mut self, place: &Place) -> Option<(Keeper, Vec<OwnedFd>)> {
        let (taken, left) = std::mem::take(&mut self.sockets)
            .into_iter()
            .partition::<Vec<_>, _>(|given| given.place == *place);
        self.sockets = left;
        let keeper = taken.first()?.keeper;
        Some((
            keeper,
            taken.into_iter().map(|given| given.socket).collect(),
        ))
    }

    /// Places that nobody has asked for.
    pub(crate) fn left(&self) -> Vec<Place> {
        let mut places: Vec<Place> = Vec::new();
        for given in &self.sockets {
            if !places.contains(&given.place) {
                places.push(given.place.clone());
            }
        }
        places
    }
}
