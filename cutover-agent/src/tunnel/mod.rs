//! This agent's tunnel to the other site: at most one, made for a hop, kept after its commit until it is retired.
//!
//! The source offers, the target answers, both make their end (`end`); the largest packet is found by echoes (`echo`).
//! WireGuard runs in the kernel (`wireguard`) or in this process (`userspace`), IPsec in strongSwan (`ipsec`). What
//! makes an end is kept in the state folder, readable by nobody else, so that an agent that was killed makes the same
//! end again: the other end notices nothing but a pause. This module never decides when to open, flip or close.

mod echo;
mod end;
mod ipsec;
mod netlink;
mod network;
mod tun;
mod userspace;
mod vici;
mod wireguard;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use cutover_protocol::id::HopId;
use cutover_protocol::tunnel::flip::{self, Moved};
use cutover_protocol::tunnel::{Answer, Carrier, Fare, Key, Kind, Offer, address, mtu};
use ipnet::IpNet;
use tokio::sync::{Mutex, watch};

use crate::config::TunnelSettings;
use crate::connections;
use crate::durable;
use echo::{Asker, Echo};
use end::{Adopt, End, Flip, Made};
pub(crate) use network::within;

/// Seconds between packets that keep translators on the way from forgetting us.
const KEEPALIVE_S: u16 = 20;

/// What an end has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counters {
    bytes_sent: u64,
    bytes_received: u64,
    handshake_age_s: Option<u64>,
}

/// A tunnel could not be opened, changed or closed.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The system refused.
    #[error("cannot {what} the tunnel: {source}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// No pair of addresses is free.
    #[error(
        "no two neighbouring addresses of `tunnel_network` {0} are free at both sites: name another network in the plan"
    )]
    NoAddress(IpNet),
    /// The link is too narrow.
    #[error("the link to {peer} carries packets of {mtu} bytes: too few for a tunnel")]
    Narrow {
        /// The other site.
        peer: IpAddr,
        /// What its link carries.
        mtu: u16,
    },
    /// Nothing comes back.
    #[error(
        "the tunnel to {endpoint} is made, but nothing comes back through it: let UDP port {} of the target through its firewall", endpoint.port()
    )]
    Silent {
        /// Where the target should be.
        endpoint: SocketAddr,
    },
    /// Another hop's tunnel is in use.
    #[error("the tunnel of {0} still forwards late clients: run `cutover-agent retire` first")]
    InUse(HopId),
    /// There is none.
    #[error("there is no tunnel of {0} here")]
    Unknown(HopId),
    /// The kept state cannot be read or written.
    #[error("cannot keep the state of the tunnel in {path}: {source}")]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The agent's tunnel, open or not.
#[derive(Debug)]
pub struct Tunnel {
    state: PathBuf,
    port: u16,
    charon: PathBuf,
    agent: u16,
    open: Mutex<Option<Open>>,
    door: watch::Sender<Option<SocketAddr>>,
}

#[derive(Debug)]
struct Open {
    end: End,
    /// Only at the target.
    echo: Option<Echo>,
}

/// An offer and the secret that belongs to it.
#[derive(Debug)]
pub struct Offered {
    /// What the target is told.
    pub offer: Offer,
    secret: Key,
}

impl Tunnel {
    /// No tunnel yet. `agent` is the port on which this agent listens for others.
    #[must_use]
    pub fn new(state_dir: &Path, settings: &TunnelSettings, agent: u16) -> Self {
        Self {
            state: state_dir.join("tunnel.json"),
            port: settings.port,
            charon: settings.vici.clone(),
            agent,
            open: Mutex::new(None),
            door: watch::Sender::new(None),
        }
    }

    /// Makes the end again that an earlier life of this agent had.
    ///
    /// # Errors
    /// [`TunnelError`]; there is no tunnel then, and a hop that wants one makes a new one.
    pub async fn restore(&self) -> Result<(), TunnelError> {
        let kept: Option<Made> =
            durable::read_json(&self.state).map_err(|source| self.state_error(source))?;
        let Some(made) = kept else { return Ok(()) };
        let mut open = self.open.lock().await;
        *open = Some(Self::make(made, Adopt::Yes).await?);
        self.tell_door(open.as_ref());
        Ok(())
    }

    /// Makes an offer to the target at `target`.
    ///
    /// # Errors
    /// [`TunnelError`], also when another hop's tunnel is still in use here.
    pub async fn offer(
        &self,
        hop: &HopId,
        kind: Kind,
        network: IpNet,
        target: IpAddr,
    ) -> Result<Offered, TunnelError> {
        self.make_room(hop).await?;
        let made = blocking("prepare", move || {
            Ok((
                wireguard::new_secret()?,
                taken()?,
                echo::own_address(target)?,
            ))
        });
        let (secret, taken, source) = made.await?;
        let offer = Offer {
            hop: hop.clone(),
            kind,
            key: public_part(kind, &secret),
            network,
            taken,
            source,
        };
        Ok(Offered { offer, secret })
    }

    /// The target's part: makes its end for an offer. `known` are the addresses its containers have here.
    ///
    /// # Errors
    /// [`TunnelError`]; nothing is left behind then.
    pub async fn answer(
        &self,
        offer: Offer,
        known: BTreeSet<IpAddr>,
    ) -> Result<Answer, TunnelError> {
        self.make_room(&offer.hop).await?;
        let mut taken = blocking("prepare", taken).await?;
        taken.extend(&offer.taken);
        let addresses = address::choose(offer.network, offer.hop.as_str(), &taken)
            .ok_or(TunnelError::NoAddress(offer.network))?;
        let secret = blocking("prepare", wireguard::new_secret).await?;
        let mtu = fitting(offer.kind, offer.source)?;
        let (kind, charon) = (offer.kind, self.charon.clone());
        let carrier = blocking("prepare", move || carrier(kind, &charon)).await?;
        let made = Made {
            hop: offer.hop,
            kind: offer.kind,
            end: flip::End::Target,
            carrier,
            secret,
            peer_key: offer.key,
            port: self.port,
            outer: offer.source,
            // The source speaks first: it may be behind a translator.
            endpoint: None,
            addresses,
            agent: self.agent,
            mtu,
            charon: self.charon.clone(),
            known: BTreeSet::new(),
            moved: Moved::default(),
            flip: Flip::Ahead,
        };
        let mut open = self.open.lock().await;
        let new = self.keep(Self::make(made, Adopt::No).await?)?;
        let answer = Answer {
            key: public_part(offer.kind, &secret),
            port: new.end.made.port,
            addresses,
            mtu,
            carrier,
            echo: new.echo.as_ref().map_or(0, |echo| echo.port),
            agent: self.agent,
            known,
        };
        *open = Some(new);
        self.tell_door(open.as_ref());
        Ok(answer)
    }

    /// The source's part: makes its end for an answer of the target at `target`, and finds out what passes.
    ///
    /// # Errors
    /// [`TunnelError`]; nothing is left behind then.
    pub async fn accept(
        &self,
        offered: Offered,
        answer: &Answer,
        target: IpAddr,
    ) -> Result<u16, TunnelError> {
        let Offered { offer, secret } = offered;
        let mtu = fitting(offer.kind, target)?.min(answer.mtu);
        let (kind, charon) = (offer.kind, self.charon.clone());
        let endpoint = SocketAddr::new(target, answer.port);
        let made = Made {
            hop: offer.hop.clone(),
            kind,
            end: flip::End::Source,
            carrier: blocking("prepare", move || carrier(kind, &charon)).await?,
            secret,
            peer_key: answer.key,
            port: self.port,
            outer: target,
            endpoint: Some(endpoint),
            addresses: answer.addresses,
            agent: answer.agent,
            mtu,
            charon: self.charon.clone(),
            known: answer.known.clone(),
            moved: Moved::default(),
            flip: Flip::Ahead,
        };
        *self.open.lock().await = Some(self.keep(Self::make(made, Adopt::No).await?)?);
        let fitted = self.fit(answer, mtu).await;
        match fitted {
            Ok(Some(mtu)) => Ok(mtu),
            other => {
                self.close(&offer.hop).await?;
                other.and(Err(TunnelError::Silent { endpoint }))
            }
        }
    }

    async fn fit(&self, answer: &Answer, most: u16) -> Result<Option<u16>, TunnelError> {
        let system = |source| TunnelError::System {
            what: "probe",
            source,
        };
        let (own, peer) = (answer.addresses.source, answer.addresses.target);
        let asker = Asker::wait_for(own, (peer, answer.echo).into())
            .await
            .map_err(system)?;
        match asker {
            Some(mut asker) => Ok(asker.largest(most).await),
            None => Ok(None),
        }
    }

    /// Sets the largest packet of this end.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn set_mtu(&self, hop: &HopId, mtu: u16) -> Result<(), TunnelError> {
        self.change(hop, "set the MTU of", |end| end.set_mtu(mtu))
            .await
    }

    /// Remembers what will move, without moving it: those `addresses` of the source's containers that the target's
    /// have as well, and the `peers` of their open connections.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn note(
        &self,
        hop: &HopId,
        addresses: &BTreeSet<IpAddr>,
        peers: &BTreeSet<IpAddr>,
    ) -> Result<(), TunnelError> {
        self.change(hop, "keep", |end| {
            end.made.moved = Moved::new(addresses, &end.made.known, peers);
            Ok(())
        })
        .await
    }

    /// What was noted for a hop; nothing when it has no tunnel here.
    pub async fn noted(&self, hop: &HopId) -> Option<Moved> {
        let open = self.open.lock().await;
        let made = open.as_ref().map(|open| &open.end.made)?;
        (&made.hop == hop).then(|| made.moved.clone())
    }

    /// Leads what moved through the tunnel from now on. May be repeated.
    ///
    /// # Errors
    /// [`TunnelError`]; some of it may be led already.
    pub async fn flip(&self, hop: &HopId, moved: Moved) -> Result<(), TunnelError> {
        self.change(hop, "lead addresses into", |end| end.flip(moved))
            .await
    }

    async fn change(
        &self,
        hop: &HopId,
        what: &'static str,
        change: impl FnOnce(&mut End) -> io::Result<()> + Send,
    ) -> Result<(), TunnelError> {
        let mut open = self.open.lock().await;
        let current = open.as_mut().filter(|open| &open.end.made.hop == hop);
        let current = current.ok_or_else(|| TunnelError::Unknown(hop.clone()))?;
        tokio::task::block_in_place(|| change(&mut current.end))
            .map_err(|source| TunnelError::System { what, source })?;
        self.write(Some(&current.end.remember()))
    }

    /// Closes the tunnel of a hop; one that is not there is closed.
    ///
    /// # Errors
    /// [`TunnelError`].
    pub async fn close(&self, hop: &HopId) -> Result<(), TunnelError> {
        let mut open = self.open.lock().await;
        if open.as_ref().is_some_and(|open| &open.end.made.hop == hop) {
            self.close_open(&mut open)?;
        }
        Ok(())
    }

    fn close_open(&self, open: &mut Option<Open>) -> Result<(), TunnelError> {
        // The door first: nobody is to come in by an address that is about to go.
        self.tell_door(None);
        if let Some(Open { end, echo }) = open.take() {
            drop(echo);
            tokio::task::block_in_place(|| end.close()).map_err(|source| TunnelError::System {
                what: "close",
                source,
            })?;
        }
        self.write(None)
    }

    /// Closes what an earlier hop left, unless it committed.
    async fn make_room(&self, hop: &HopId) -> Result<(), TunnelError> {
        let mut open = self.open.lock().await;
        match open.as_ref().map(|open| &open.end.made) {
            Some(made) if made.flip == Flip::Done && &made.hop != hop => {
                Err(TunnelError::InUse(made.hop.clone()))
            }
            Some(_) => self.close_open(&mut open),
            None => Ok(()),
        }
    }

    /// How the tunnel fares, if there is one.
    pub async fn fare(&self) -> Option<Fare> {
        let open = self.open.lock().await;
        let end = &open.as_ref()?.end;
        let counters = end.counters().unwrap_or_default();
        let made = &end.made;
        let is_source = made.end == flip::End::Source && made.flip == Flip::Done;
        Some(Fare {
            hop: made.hop.clone(),
            kind: made.kind,
            carrier: made.carrier,
            device: made.device().to_owned(),
            address: made.own(),
            peer: made.peer(),
            mtu: made.mtu,
            bytes_sent: counters.bytes_sent,
            bytes_received: counters.bytes_received,
            handshake_age_s: counters.handshake_age_s,
            forwarded: made
                .moved
                .addresses
                .iter()
                .copied()
                .filter(|_| is_source)
                .collect(),
        })
    }

    /// Where the target's agent is reached through the tunnel of a hop, from its source.
    pub async fn way(&self, hop: &HopId) -> Option<SocketAddr> {
        let open = self.open.lock().await;
        let made = open.as_ref().map(|open| &open.end.made)?;
        (&made.hop == hop && made.end == flip::End::Source)
            .then(|| (made.peer(), made.agent).into())
    }

    /// The hop whose tunnel is open here, and the target's agent outside of it; only at a source that has committed.
    pub async fn kept(&self) -> Option<(HopId, SocketAddr)> {
        let open = self.open.lock().await;
        let made = open.as_ref().map(|open| &open.end.made)?;
        let is_kept = made.end == flip::End::Source && made.flip == Flip::Done;
        is_kept.then(|| (made.hop.clone(), (made.outer, made.agent).into()))
    }

    /// The inside address at which this agent, a target, is to be reached.
    pub fn door(&self) -> watch::Receiver<Option<SocketAddr>> {
        self.door.subscribe()
    }

    fn tell_door(&self, open: Option<&Open>) {
        let made = open.map(|open| &open.end.made);
        let target = made.filter(|made| made.end == flip::End::Target);
        self.door
            .send_replace(target.map(|made| (made.own(), made.agent).into()));
    }

    async fn make(made: Made, adopt: Adopt) -> Result<Open, TunnelError> {
        let end = blocking("open", move || End::open(made, adopt)).await?;
        let echo = match end.made.end {
            flip::End::Source => None,
            flip::End::Target => {
                let echo = Echo::at(end.made.own()).await;
                Some(echo.map_err(|source| TunnelError::System {
                    what: "listen in",
                    source,
                })?)
            }
        };
        Ok(Open { end, echo })
    }

    fn keep(&self, open: Open) -> Result<Open, TunnelError> {
        self.write(Some(&open.end.made))?;
        Ok(open)
    }

    fn write(&self, made: Option<&Made>) -> Result<(), TunnelError> {
        durable::write_json(&self.state, &made).map_err(|source| self.state_error(source))
    }

    fn state_error(&self, source: io::Error) -> TunnelError {
        TunnelError::State {
            path: self.state.clone(),
            source,
        }
    }
}

/// The addresses in a container's network namespace that others may know it by.
///
/// # Errors
/// When the namespace cannot be entered or read.
pub fn addresses_in(namespace: &Path) -> io::Result<BTreeSet<IpAddr>> {
    within(namespace, || {
        let held = network::Network::open()?.addresses()?;
        let known = held.iter().map(|held| held.net.addr());
        Ok(known
            .filter(|address| !address.is_loopback() && !is_link_local(*address))
            .collect())
    })
}

/// Who has a TCP connection with a network namespace, whatever its processes are doing: the other addresses.
///
/// # Errors
/// When the namespace cannot be entered or read.
pub fn peers_of(namespace: &Path) -> io::Result<BTreeSet<IpAddr>> {
    within(namespace, || {
        let mut peers = BTreeSet::new();
        for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
            match std::fs::read_to_string(table) {
                Ok(text) => peers.extend(connections::peers(&text)),
                // A kernel without IPv6.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(peers)
    })
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Networks that are in use here.
fn taken() -> io::Result<Vec<IpNet>> {
    let mut network = network::Network::open()?;
    let mut taken: Vec<IpNet> = network
        .addresses()?
        .iter()
        .map(|held| held.net.trunc())
        .collect();
    taken.extend(network.routes()?);
    Ok(taken)
}

fn carrier(kind: Kind, charon: &Path) -> io::Result<Carrier> {
    match kind {
        Kind::Wireguard => {
            let in_kernel = wireguard::is_in_kernel(&mut network::Network::open()?)?;
            Ok(if in_kernel {
                Carrier::Kernel
            } else {
                Carrier::User
            })
        }
        Kind::Ipsec => ipsec::carrier(charon),
        Kind::None => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn public_part(kind: Kind, secret: &Key) -> Key {
    match kind {
        Kind::None | Kind::Wireguard => wireguard::public(secret),
        Kind::Ipsec => *secret,
    }
}

fn fitting(kind: Kind, peer: IpAddr) -> Result<u16, TunnelError> {
    let link = echo::link_mtu(peer).map_err(|source| TunnelError::System {
        what: "prepare",
        source,
    })?;
    mtu::inside(kind, link, peer).ok_or(TunnelError::Narrow { peer, mtu: link })
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, TunnelError> {
    let failed = |source| TunnelError::System { what, source };
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(failed),
        Err(error) => Err(failed(io::Error::other(error))),
    }
}
