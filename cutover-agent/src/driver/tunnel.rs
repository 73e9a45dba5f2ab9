//! What a hop does with its tunnel: raises it before bytes move, flips addresses after the commit, and takes it down
//! when the hop is undone. A committed hop leaves it up, for late clients and carried connections.

use std::collections::BTreeSet;

use cutover_protocol::tunnel::Kind;
use cutover_protocol::tunnel::flip::{AFTER_COMMIT, Moved, Step};
use cutover_protocol::wire::{Request, Response};

use super::Driver;
use super::act::KILL_MAX;
use crate::tunnel;

impl Driver {
    /// Makes both ends; from then on the link goes through them.
    pub(super) async fn raise_tunnel(&mut self) -> Result<(), String> {
        let settings = self.header.plan.settings();
        let (kind, network, hop) = (
            settings.tunnel,
            settings.tunnel_network,
            self.header.hop.clone(),
        );
        if kind == Kind::None {
            return Ok(());
        }
        let limit = self.step_max();
        let target = self.link.outer().await?.ip();
        let failed = |error: tunnel::TunnelError| error.to_string();
        let offered = self
            .tunnel
            .offer(&hop, kind, network, target)
            .await
            .map_err(failed)?;
        let request = Request::OpenTunnel(offered.offer.clone());
        let answer = match self.link.call(&request, limit).await? {
            Response::Tunnel(answer) => answer,
            other => {
                return Err(format!(
                    "the target answered nonsense to a tunnel: {other:?}"
                ));
            }
        };
        let mtu = self
            .tunnel
            .accept(offered, &answer, target)
            .await
            .map_err(failed)?;
        let fit = Request::FitTunnel {
            hop: hop.clone(),
            mtu,
        };
        self.link.order(&fit, limit).await?;
        self.tunnel.set_mtu(&hop, mtu).await.map_err(failed)?;
        tracing::info!(%hop, kind = kind.as_str(), mtu, there = ?answer.carrier, "the tunnel is up");
        // The next connection goes through it.
        self.link.close().await;
        Ok(())
    }

    /// Has resolvers forget the services' names soon, so that they can be turned.
    pub(super) async fn prepare_names(&self) -> Result<(), String> {
        let settings = self.header.plan.settings();
        let redirect = (settings.redirect, settings.redirect_step_s);
        self.names
            .prepare(&self.header.hop, redirect, settings.services.clone())
            .await
    }

    /// Takes both ends down, and lets names live as long as before.
    pub(super) async fn lower_tunnel(&mut self) -> Result<(), String> {
        let hop = self.header.hop.clone();
        if let Err(message) = self.names.give_up(&hop).await {
            // They point where they should; a short life is all that is left.
            tracing::warn!("names keep their short time to live: {message}");
        }
        self.link.close().await;
        self.tunnel
            .close(&hop)
            .await
            .map_err(|error| error.to_string())?;
        if self.header.plan.settings().tunnel == Kind::None {
            return Ok(());
        }
        let outcome = self
            .link
            .order(&Request::CloseTunnel { hop }, KILL_MAX)
            .await;
        self.link.close().await;
        outcome
    }

    /// Notes which addresses will move, and who has connections with them, while everything stands still.
    pub(super) async fn note_moving(&self) -> Result<(), String> {
        if self.header.plan.settings().tunnel == Kind::None {
            return Ok(());
        }
        let mut namespaces = Vec::new();
        for name in self.containers() {
            let container = self.container(&name)?;
            namespaces.push(container.network_namespace.clone());
        }
        let mut peers = self.host.config.tunnel.carried.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let (mut addresses, mut peers) = (BTreeSet::new(), BTreeSet::new());
            for namespace in &namespaces {
                addresses.extend(tunnel::addresses_in(namespace)?);
                peers.extend(tunnel::peers_of(namespace)?);
            }
            Ok::<_, std::io::Error>((addresses, peers))
        });
        let (addresses, connected) = looked
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("cannot see who is connected to the containers: {error}"))?;
        peers.extend(connected);
        let noted = self.tunnel.note(&self.header.hop, &addresses, &peers).await;
        noted.map_err(|error| error.to_string())
    }

    /// After the commit: the target speaks, and what moved is reached there. Without a tunnel only the first.
    pub(super) async fn flip(&mut self) -> Result<(), String> {
        let (hop, limit) = (self.header.hop.clone(), self.step_max());
        let moved: Option<Moved> = self.tunnel.noted(&hop).await;
        for step in AFTER_COMMIT {
            match (step, &moved) {
                (Step::TargetSpeaks, _) => {
                    let unfence = Request::Unfence { hop: hop.clone() };
                    self.link.order(&unfence, limit).await?;
                }
                (Step::TargetReturns, Some(moved)) => {
                    let back = Request::ReturnThrough {
                        hop: hop.clone(),
                        moved: moved.clone(),
                    };
                    self.link.order(&back, limit).await?;
                }
                (Step::SourceForwards, Some(moved)) => {
                    let led = self.tunnel.flip(&hop, moved.clone()).await;
                    led.map_err(|error| error.to_string())?;
                }
                (Step::TargetReturns | Step::SourceForwards, None) => {}
            }
        }
        self.names.commit(&hop).await
    }
}
