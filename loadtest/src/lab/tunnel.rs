//! The tunnel between the two sites, as the agents made it: what is asked of them, and what their status says.

use std::net::SocketAddr;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::client::http::{fetch, request};
use crate::lab::actors::Actors;
use crate::lab::error::Result;
use crate::lab::netns::within;
use crate::lab::world::{HOST, World};

/// Longest a late client waits for its page.
const LATE: Duration = Duration::from_secs(60);

/// What carries the bytes between the sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tunnel {
    /// The agents' own mutual TLS.
    None,
    /// WireGuard, in the kernel where it is there, otherwise in the agents.
    Wireguard,
    /// IPsec by strongSwan.
    Ipsec,
}

impl Tunnel {
    /// The word of plans and reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Wireguard => "wireguard",
            Self::Ipsec => "ipsec",
        }
    }
}

/// Asks the application for a page by the address that its container had at the source, as a late client does.
#[must_use]
pub fn serves_late_clients(world: &World) -> bool {
    let to = SocketAddr::from((
        [10, 44, 0, world.app.service().host()],
        world.app.service().port(),
    ));
    let bytes = request(world.app.page_path(), HOST, None);
    let asked = within(&world.run.names.path("edge"), || fetch(to, &bytes, LATE));
    asked.is_ok_and(|answer| answer.is_ok_and(|answer| answer.status == 200))
}

/// How one end fares, of what an agent's status says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fare {
    /// `wireguard` or `ipsec`.
    pub kind: String,
    /// `kernel` or `user`.
    pub carrier: String,
    /// The largest packet inside, in bytes.
    pub mtu: u16,
    /// Bytes sent into it.
    pub bytes_sent: u64,
    /// Bytes that came out of it.
    pub bytes_received: u64,
    /// Seconds since the last handshake.
    pub handshake_age_s: Option<u64>,
    /// Addresses of moved containers that are reached through it.
    pub forwarded: Vec<String>,
}

#[derive(Deserialize)]
struct Status {
    tunnel: Option<Fare>,
}

/// What the agent of a site says of its tunnel, if it has one.
///
/// # Errors
/// When the agent does not answer.
pub fn fare(actors: &Actors, site: usize) -> Result<Option<Fare>> {
    let text = actors.command(site, &["status", "--json"]).run()?;
    // A status without a tunnel is all that other text could be.
    Ok(serde_json::from_str::<Status>(&text)
        .ok()
        .and_then(|status| status.tunnel))
}
