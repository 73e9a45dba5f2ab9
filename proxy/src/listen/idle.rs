//! Clients between two requests: ends those that are idle for too long, and all of them when they have to go.
//!
//! An idle client is the bulk of what a proxy keeps, so it has no timer of its own: it has a place in one list a port,
//! in order of deadlines, and one keeper sleeps until the first of them. Deadlines mostly come in order, so a place
//! costs a link at the end of the list. Nothing here closes a connection: the client's own task does.

use std::cell::{Cell, RefCell};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::clock;

/// No place.
const NONE: u32 = u32::MAX;
/// In place of the one before: the keeper has taken it off the list, and its client has to go.
const OVER: u32 = u32::MAX - 1;

/// The idle clients of one port.
#[derive(Debug, Default)]
pub(crate) struct IdleClients {
    list: RefCell<List>,
    /// When the keeper looks next; without a time it waits for a word.
    next_look: Cell<Option<Instant>>,
    look_earlier: Notify,
}

#[derive(Debug)]
struct List {
    places: Vec<Place>,
    /// The first of the places that nobody has, linked by `next`.
    free: u32,
    first: u32,
    last: u32,
}

impl Default for List {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            free: NONE,
            first: NONE,
            last: NONE,
        }
    }
}

#[derive(Debug)]
struct Place {
    deadline: Instant,
    waker: Option<Waker>,
    previous: u32,
    next: u32,
}

/// One client's place; it leaves the list when dropped.
#[derive(Debug)]
pub(crate) struct IdlePlace<'i> {
    clients: &'i IdleClients,
    index: u32,
}

impl IdleClients {
    /// Enters a client that has to go after `idle_max`.
    pub(crate) fn enter(&self, idle_max: Duration) -> IdlePlace<'_> {
        let deadline = clock::end_of(idle_max).into();
        let index = self.list.borrow_mut().insert(deadline);
        if self.next_look.get().is_none_or(|next| deadline < next) {
            self.next_look.set(Some(deadline));
            self.look_earlier.notify_one();
        }
        IdlePlace {
            clients: self,
            index,
        }
    }

    /// Nobody may be idle for longer than `grace` from now on.
    pub(crate) fn hurry(&self, grace: Duration) {
        let latest = Instant::now() + grace;
        let mut list = self.list.borrow_mut();
        let mut at = list.last;
        while at != NONE {
            let place = &mut list.places[at as usize];
            if place.deadline <= latest {
                break;
            }
            place.deadline = latest;
            at = place.previous;
        }
        self.next_look.set(None);
        self.look_earlier.notify_one();
    }

    /// Keeps the deadlines, for ever.
    pub(crate) async fn keep(&self) {
        loop {
            let next = self.list.borrow_mut().expire(Instant::now());
            self.next_look.set(next);
            match next {
                Some(next) => tokio::select! {
                    () = sleep_until(next) => {}
                    () = self.look_earlier.notified() => {}
                },
                None => self.look_earlier.notified().await,
            }
        }
    }
}

impl List {
    fn insert(&mut self, deadline: Instant) -> u32 {
        // Only a reload brings a deadline before one that was there already.
        let mut before = self.last;
        while before != NONE && self.places[before as usize].deadline > deadline {
            before = self.places[before as usize].previous;
        }
        let next = match before {
            NONE => self.first,
            before => self.places[before as usize].next,
        };
        let place = Place {
            deadline,
            waker: None,
            previous: before,
            next,
        };
        let index = self.take_free(place);
        self.join(before, index);
        self.join(index, next);
        index
    }

    fn take_free(&mut self, place: Place) -> u32 {
        match self.places.get_mut(self.free as usize) {
            Some(free) => {
                let index = self.free;
                self.free = free.next;
                *free = place;
                index
            }
            None => {
                self.places.push(place);
                // Places are as many as connections, which are far fewer.
                u32::try_from(self.places.len() - 1).unwrap_or(NONE)
            }
        }
    }

    /// Makes `after` follow `before`; either may be the end of the list.
    fn join(&mut self, before: u32, after: u32) {
        match before {
            NONE => self.first = after,
            before => self.places[before as usize].next = after,
        }
        match after {
            NONE => self.last = before,
            after => self.places[after as usize].previous = before,
        }
    }

    fn unlink(&mut self, index: u32) {
        let Place { previous, next, .. } = self.places[index as usize];
        self.join(previous, next);
    }

    /// Tells those whose time is over; returns the next deadline.
    fn expire(&mut self, now: Instant) -> Option<Instant> {
        while let Some(first) = self.places.get_mut(self.first as usize) {
            if first.deadline > now {
                return Some(first.deadline);
            }
            // It only makes the client's task run later.
            if let Some(waker) = first.waker.take() {
                waker.wake();
            }
            let index = self.first;
            self.unlink(index);
            self.places[index as usize].previous = OVER;
        }
        None
    }
}

impl IdlePlace<'_> {
    /// Completes when the client has to go.
    pub(crate) fn poll_over(&self, context: &Context<'_>) -> Poll<()> {
        let place = &mut self.clients.list.borrow_mut().places[self.index as usize];
        if place.previous == OVER {
            return Poll::Ready(());
        }
        match &mut place.waker {
            Some(waker) => waker.clone_from(context.waker()),
            empty @ None => *empty = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}

impl Drop for IdlePlace<'_> {
    fn drop(&mut self) {
        let list = &mut *self.clients.list.borrow_mut();
        if list.places[self.index as usize].previous != OVER {
            list.unlink(self.index);
        }
        let place = &mut list.places[self.index as usize];
        place.waker = None;
        place.next = list.free;
        list.free = self.index;
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::rc::Rc;

    use proptest::prelude::*;
    use tokio::task::LocalSet;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// The deadlines in the list, in its order; its links hold together.
    fn deadlines(list: &List) -> Vec<Instant> {
        let (mut at, mut seen, mut previous) = (list.first, Vec::new(), NONE);
        while at != NONE {
            let place = &list.places[at as usize];
            assert_eq!(place.previous, previous);
            seen.push(place.deadline);
            (previous, at) = (at, place.next);
        }
        assert_eq!(list.last, previous);
        seen
    }

    #[test]
    fn each_client_goes_at_its_own_deadline_in_whatever_order_they_came() {
        let clients = IdleClients::default();
        let places = [3, 1, 2].map(|seconds| clients.enter(SECOND * seconds));
        let later = Instant::now() + SECOND * 5 / 2;
        let next = clients.list.borrow_mut().expire(later);
        assert!(next > Some(later));
        let over = |place: &IdlePlace<'_>| {
            clients.list.borrow().places[place.index as usize].previous == OVER
        };
        assert_eq!(places.each_ref().map(over), [false, true, true]);
        drop(places);
        assert_eq!(clients.list.borrow_mut().expire(later), None);
    }

    #[test]
    fn in_a_hurry_nobody_stays_longer_than_the_grace_and_nobody_longer_than_before() {
        let clients = IdleClients::default();
        let _places = [1, 50, 100].map(|seconds| clients.enter(SECOND * seconds));
        let before = deadlines(&clients.list.borrow());
        clients.hurry(SECOND * 5);
        let after = deadlines(&clients.list.borrow());
        assert_eq!(after[0], before[0]);
        assert!(after[1] == after[2] && after[2] < before[1]);
    }

    #[test]
    fn the_keeper_wakes_who_comes_after_it_fell_asleep_and_who_is_hurried() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        LocalSet::new().block_on(&runtime, async {
            let clients = Rc::new(IdleClients::default());
            let kept = Rc::clone(&clients);
            tokio::task::spawn_local(async move { kept.keep().await });
            let idle = async |idle_max| {
                let (began, place) = (Instant::now(), clients.enter(idle_max));
                poll_fn(|context| place.poll_over(context)).await;
                began.elapsed()
            };
            let short = SECOND / 100;
            assert!(idle(short).await >= short);
            let hurry = async {
                tokio::task::yield_now().await;
                clients.hurry(short);
            };
            let (was_idle, ()) = tokio::join!(idle(SECOND * 1000), hurry);
            assert!(was_idle >= short);
        });
    }

    proptest! {
        #[test]
        fn the_list_is_in_order_and_whole_whatever_comes_and_goes(
            steps in proptest::collection::vec((0..20_u32, any::<bool>(), any::<prop::sample::Index>()), 1..60),
        ) {
            let clients = IdleClients::default();
            let mut places = Vec::new();
            for (seconds, comes, which) in steps {
                if comes || places.is_empty() {
                    places.push(clients.enter(SECOND * seconds));
                } else {
                    places.swap_remove(which.index(places.len()));
                }
                let deadlines = deadlines(&clients.list.borrow());
                prop_assert_eq!(deadlines.len(), places.len());
                prop_assert!(deadlines.is_sorted());
            }
        }
    }
}
