//! What the proxy and its supervisor (systemd, or whatever speaks like it) tell each other: readiness, reloads, the
//! end, a sign of life, and sockets that were bound before we began. Without a supervisor nothing of this happens.
//!
//! Only the process that serves speaks: the old one of an upgrade has named the new one, and is silent then.

use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::Path;

use listenfd::ListenFd;
use rustix::net::{SocketAddrAny, SocketAddrUnix, SocketType};
use sd_notify::NotifyState;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::inherited::Inherited;
use crate::config::ListenAddress;
use crate::listen::bound::{Keeper, Kind, Place};
use crate::snapshot::Snapshot;
use crate::worker::Question;

/// Serving by this snapshot, for the first time or again after a reload.
pub(crate) fn ready(snapshot: &Snapshot) {
    let status = format!(
        "{} services, configuration {}",
        snapshot.services.len(),
        snapshot.generation
    );
    say(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

/// Reading the configuration. The time, of the moment when that began, is what tells the [`ready`] that follows
/// from an earlier one.
pub(crate) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => say(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!("the supervisor is not told of the reload: {error}"),
    }
}

/// No new clients any more.
pub(crate) fn stopping() {
    say(&[
        NotifyState::Stopping,
        NotifyState::Status("finishing what runs"),
    ]);
}

/// Another process serves in our place.
pub(crate) fn replaced_by(pid: Option<i32>) {
    if let Some(pid) = pid.and_then(|pid| u32::try_from(pid).ok()) {
        say(&[NotifyState::MainPid(pid)]);
    }
}

fn say(words: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(words) {
        tracing::warn!("the supervisor cannot be told: {error}");
    }
}

/// Says that we are alive twice in the time that the supervisor allows, as long as every worker answers. Returns at
/// once where nobody wants to know.
pub(crate) async fn give_signs_of_life(workers: Vec<mpsc::Sender<Question>>) {
    let Some(allowed) = sd_notify::watchdog_enabled().filter(|allowed| !allowed.is_zero()) else {
        return;
    };
    let pause = allowed / 2;
    let mut turns = interval(pause);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        if timeout(pause, all_answer(&workers)).await.is_ok() {
            say(&[NotifyState::Watchdog]);
        } else {
            tracing::error!(
                "a worker does not answer: the supervisor is not told that we are alive"
            );
        }
    }
}

async fn all_answer(workers: &[mpsc::Sender<Question>]) {
    for worker in workers {
        let (reply, answer) = oneshot::channel();
        // A worker that has ended has nothing more to answer.
        if worker.send(Question::Alive { reply }).await.is_ok() {
            answer.await.ok();
        }
    }
}

/// Sockets that the supervisor has bound for us (`LISTEN_FDS`). They are known by their address; their names are
/// for people.
pub(crate) fn sockets() -> Inherited {
    let mut given = ListenFd::from_env();
    let mut inherited = Inherited::default();
    for index in 0..given.len() {
        let Ok(Some(descriptor)) = given.take_raw_fd(index) else {
            continue;
        };
        // SAFETY: the supervisor passed this descriptor to this process, and nobody else takes it: each index is
        // given out once.
        let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
        match place_of(&socket) {
            Some(place) => inherited.add(place, Keeper::Supervisor, socket),
            None => tracing::warn!(
                descriptor,
                "the supervisor has passed something that is no listening socket"
            ),
        }
    }
    inherited
}

/// Says which of the supervisor's sockets nobody asked for.
pub(crate) fn mention_unused(inherited: &Inherited) {
    for place in inherited.left() {
        tracing::warn!(address = %place.address, "the supervisor has passed a socket that no listener of the configuration has");
    }
}

fn place_of(socket: &OwnedFd) -> Option<Place> {
    let kind = match rustix::net::sockopt::socket_type(socket).ok()? {
        SocketType::STREAM => Kind::Stream,
        SocketType::DGRAM => Kind::Datagram,
        _ => return None,
    };
    Some(Place {
        kind,
        address: address_of(rustix::net::getsockname(socket).ok()?)?,
        of: None,
    })
}

fn address_of(address: SocketAddrAny) -> Option<ListenAddress> {
    if let Ok(unix) = SocketAddrUnix::try_from(address.clone()) {
        let path = unix.path_bytes()?;
        let path = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(path);
        return Some(ListenAddress::Unix(Path::new(path).to_owned()));
    }
    let address = std::net::SocketAddr::try_from(address).ok()?;
    Some(ListenAddress::Tcp(address))
}
