//! What follows the register: commit, settle, redirect, and the undos. Nothing here decides; it asks the register,
//! and brings gates and containers where the register says they belong.

use cutover_protocol::hold::{Command, Gate, Refusal, ServiceStatus};
use cutover_protocol::hop::Undo;
use cutover_protocol::id::{Epoch, Register, ServiceName, Site};
use cutover_protocol::plan::Engine;
use cutover_protocol::wire::Request;

use super::Driver;
use super::act::KILL_MAX;
use super::lease::Lease;
use crate::peer::Priority;
use crate::proxy::ProxyError;
use crate::{durable, probe};

impl Driver {
    pub(super) async fn commit(&mut self, epoch: Epoch) -> Result<Register, String> {
        let command = Command::Commit {
            service: self.deciding(),
            epoch,
            to: Site::Target,
        };
        self.register_after(&command).await
    }

    pub(super) async fn settle(&mut self, epoch: Epoch) -> Result<Register, String> {
        let command = Command::Abort {
            service: self.deciding(),
            epoch,
        };
        self.register_after(&command).await
    }

    /// A refusal that names the register is an answer: somebody else was first. Not so where another may still decide.
    async fn register_after(&mut self, command: &Command) -> Result<Register, String> {
        match self.proxy.command(command).await {
            Ok(status) => Ok(status.register),
            Err(ProxyError::Refused {
                register: Some(register),
                reason,
                ..
            }) if reason != Refusal::HeldByOther => Ok(register),
            Err(error) => Err(error.to_string()),
        }
    }

    pub(super) async fn redirect(&mut self) -> Result<(), String> {
        let hop = self.header.hop.clone();
        self.flip().await?;
        for (service, epoch) in self.holds().into_iter().rev() {
            self.give(&service, epoch, Site::Target).await?;
        }
        self.lease = None;
        self.link.set_priority(Priority::Background);
        for name in self.containers().iter().rev() {
            self.host
                .retire(self.engine(), name, self.step_max())
                .await
                .map_err(|error| error.to_string())?;
            durable::empty_folder(&self.host.config.images(name))
                .map_err(|error| error.to_string())?;
        }
        self.link
            .order(&Request::Finish { hop }, self.step_max())
            .await
    }

    /// Brings one service's register and gate where the deciding register has gone.
    async fn give(
        &mut self,
        service: &ServiceName,
        epoch: Epoch,
        owner: Site,
    ) -> Result<(), String> {
        let mut register = self.status(service).await?.register;
        if register.epoch == epoch {
            register = self.decide(service, epoch, owner).await?;
        }
        if owner == Site::Target && register.owner == Site::Source {
            // This gate's lease ran out after the deciding register had gone to the target: follow it.
            let settings = self.header.plan.settings();
            let hold = Command::Hold {
                service: service.clone(),
                epoch: register.epoch,
                lease_ms: settings.lease_ms,
                drain_ms_max: settings.drain_ms_max,
            };
            match self.proxy.command(&hold).await {
                // What is in flight goes to a source that is fenced for good: it cannot be drained.
                Ok(_) | Err(ProxyError::NotDrained { .. }) => {}
                Err(error) => return Err(error.to_string()),
            }
            register = self.decide(service, register.epoch, owner).await?;
        }
        if register.owner != owner {
            return Err(format!(
                "the register of {service} is at epoch {} and says {}, not {owner}",
                register.epoch, register.owner
            ));
        }
        if matches!(
            self.status(service).await?.gate,
            Gate::Open | Gate::Releasing
        ) {
            return Ok(());
        }
        let release = Command::Release {
            service: service.clone(),
            epoch: register.epoch,
            to: owner,
        };
        let released = self.proxy.command(&release).await;
        released.map(drop).map_err(|error| error.to_string())
    }

    async fn status(&self, service: &ServiceName) -> Result<ServiceStatus, String> {
        let status = self.proxy.status(service).await;
        status.map_err(|error| error.to_string())
    }

    /// One compare-and-set of a register, in the direction of `owner`.
    async fn decide(
        &mut self,
        service: &ServiceName,
        epoch: Epoch,
        owner: Site,
    ) -> Result<Register, String> {
        let service = service.clone();
        let command = match owner {
            Site::Target => Command::Commit {
                service,
                epoch,
                to: owner,
            },
            Site::Source => Command::Abort { service, epoch },
        };
        self.register_after(&command).await
    }

    /// Renews every hold of this hop from now on.
    pub(super) fn renew_leases(&mut self) {
        let lease_ms = self.header.plan.settings().lease_ms;
        self.lease = Some(Lease::keep(self.proxy.clone(), self.holds(), lease_ms));
    }

    pub(super) async fn undo(&mut self, undo: Undo) -> Result<(), String> {
        let hop = self.header.hop.clone();
        match undo {
            Undo::KillTarget => self.link.order(&Request::Kill { hop }, KILL_MAX).await,
            Undo::Thaw => self.thaw().await,
            Undo::Reopen => {
                self.dismiss_dumps().await?;
                for (service, epoch) in self.holds().into_iter().rev() {
                    self.give(&service, epoch, Site::Source).await?;
                }
                self.lease = None;
                self.link.set_priority(Priority::Background);
                Ok(())
            }
            Undo::DropStaging => {
                self.writes.lift().await;
                self.unthrottle().await?;
                for name in self.containers() {
                    durable::empty_folder(&self.host.config.images(&name))
                        .map_err(|error| error.to_string())?;
                }
                let containers = self.containers();
                self.link
                    .order(&Request::Drop { hop, containers }, KILL_MAX)
                    .await
            }
            Undo::CloseTunnel => self.lower_tunnel().await,
        }
    }

    async fn thaw(&mut self) -> Result<(), String> {
        self.files = None;
        let (engine, limit) = (self.engine(), self.step_max());
        for name in self.containers() {
            self.host
                .thaw(engine, &name, limit)
                .await
                .map_err(|error| error.to_string())?;
        }
        if engine == Engine::Restart {
            // Started anew, it serves only once it answers; thawed memory answers at once.
            for wanted in &self.header.plan.settings().probes {
                probe::ask(wanted).await?;
            }
        }
        Ok(())
    }
}
