//! Listening sockets that somebody else made: the process before an upgrade, or the supervisor. Each is found by
//! its place; what no listener asks for is left to whoever gave it.

use std::os::fd::OwnedFd;

use crate::listen::bound::{Keeper, Place};

/// Sockets that wait for a listener to ask for them.
#[derive(Debug, Default)]
pub(crate) struct Inherited(Vec<Given>);

/// One of them.
#[derive(Debug)]
struct Given {
    place: Place,
    keeper: Keeper,
    socket: OwnedFd,
}

impl Inherited {
    pub(crate) fn add(&mut self, place: Place, keeper: Keeper, socket: OwnedFd) {
        self.0.push(Given {
            place,
            keeper,
            socket,
        });
    }

    /// All sockets of a place, if there are any.
    pub(crate) fn take(&mut self, place: &Place) -> Option<(Keeper, Vec<OwnedFd>)> {
        let (taken, left) = std::mem::take(&mut self.0)
            .into_iter()
            .partition::<Vec<_>, _>(|given| given.place == *place);
        self.0 = left;
        let keeper = taken.first()?.keeper;
        Some((
            keeper,
            taken.into_iter().map(|given| given.socket).collect(),
        ))
    }

    /// Places that nobody has asked for.
    pub(crate) fn left(&self) -> Vec<Place> {
        let mut places: Vec<Place> = Vec::new();
        for given in &self.0 {
            if !places.contains(&given.place) {
                places.push(given.place.clone());
            }
        }
        places
    }
}
