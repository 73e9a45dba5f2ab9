//! What a hop moves: two containers at two sites, a gate with its register, and messages that arrive late. Every
//! change checks what must hold at every moment, so a wrong deed fails where it is done.

use std::collections::VecDeque;

use crate::hold::Command;
use crate::id::{Epoch, Register, ServiceName, Site};

/// Containers of the service; two, so that every deed can be done by half.
pub(super) const CONTAINERS: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tasks {
    Nothing,
    /// At the source frozen and thawable, at the target built and not yet running.
    Parked,
    Running,
}

/// One container at one site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Container {
    pub(super) tasks: Tasks,
    pub(super) fenced: bool,
}

impl Container {
    const NONE: Self = Self {
        tasks: Tasks::Nothing,
        fenced: false,
    };

    pub(super) fn serves(self) -> bool {
        self.tasks == Tasks::Running && !self.fenced
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    Open,
    /// Since this epoch; undecided as long as the register is still there.
    Holding(Epoch),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    First,
    Commit,
    Abort,
}

/// How far a hop has come, in the target's own memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Staging,
    Built,
    Fenced,
    Serving,
}

/// What the target remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) hop: u32,
    pub(super) stage: Stage,
}

/// What the source asks of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Begin,
    Restore,
    Verify,
    Unfence,
    Kill,
    Drop,
    Finish,
}

/// A request with the hop it is for and the epoch that hop began with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) hop: u32,
    pub(super) begun: Epoch,
    pub(super) request: Request,
}

/// Everything that outlives a driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct World {
    pub(super) source: [Container; CONTAINERS],
    pub(super) target: [Container; CONTAINERS],
    pub(super) standing: Option<Standing>,
    pub(super) gate: Gate,
    pub(super) register: Register,
    decided: Decision,
    /// Gate commands whose sender has given up. Each came by a connection of its own, so their order is lost.
    pub(super) late_commands: Vec<Command>,
    /// Requests to the target whose sender has given up; they keep their order, and come before any later one.
    pub(super) late_requests: VecDeque<Order>,
}

impl World {
    pub(super) fn new() -> Self {
        let running = Container {
            tasks: Tasks::Running,
            fenced: false,
        };
        Self {
            source: [running; CONTAINERS],
            target: [Container::NONE; CONTAINERS],
            standing: None,
            gate: Gate::Open,
            register: Register {
                epoch: Epoch::FIRST,
                owner: Site::Source,
            },
            decided: Decision::First,
            late_commands: Vec::new(),
            late_requests: VecDeque::new(),
        }
    }

    /// What holds at every moment, whatever has failed.
    fn check(&self) {
        let serves = |site: &[Container]| site.iter().any(|container| container.serves());
        let (source, target) = (serves(&self.source), serves(&self.target));
        assert!(!(source && target), "both sides run unfenced: {self:?}");
        assert!(
            !source || self.register.owner == Site::Source,
            "the source runs unfenced and the register is not its: {self:?}"
        );
        assert!(
            !target || self.register.owner == Site::Target,
            "the target runs unfenced and the register is not its: {self:?}"
        );
    }

    // The gate: the rules of the proxy's service.

    /// Obeys or refuses; either way the register now.
    pub(super) fn command(&mut self, command: &Command) -> Result<Register, Register> {
        let obeyed = match command {
            Command::Status { .. } => true,
            Command::Hold { epoch, .. } => {
                let obeyed = self.register.epoch == *epoch;
                if obeyed {
                    self.gate = Gate::Holding(*epoch);
                }
                obeyed
            }
            Command::Renew { .. } => self.gate != Gate::Open,
            Command::Commit { epoch, to, .. } => self.compare_and_set(*epoch, *to),
            Command::Abort { epoch, .. } => self.compare_and_set(*epoch, Site::Source),
            Command::Release { epoch, to, .. } => self.release(*epoch, *to),
            // Neither register nor gate know of it.
            Command::Admit { .. } | Command::AdmitFreely { .. } => true,
            Command::HoldAll { .. }
            | Command::CommitAll { .. }
            | Command::AbortAll { .. }
            | Command::ReleaseAll { .. } => unreachable!("here a hop has one service"),
        };
        self.check();
        if obeyed {
            Ok(self.register)
        } else {
            Err(self.register)
        }
    }

    fn compare_and_set(&mut self, epoch: Epoch, to: Site) -> bool {
        let decision = if to == Site::Target {
            Decision::Commit
        } else {
            Decision::Abort
        };
        if self.register.epoch == epoch.next() && self.decided == decision {
            return true;
        }
        let held = decision == Decision::Abort || self.gate != Gate::Open;
        if self.register.epoch != epoch || !held {
            return false;
        }
        self.decided = decision;
        self.register = Register {
            epoch: epoch.next(),
            owner: to,
        };
        true
    }

    fn release(&mut self, epoch: Epoch, to: Site) -> bool {
        let fits = self.register == Register { epoch, owner: to };
        // A hold whose epoch is still the register's is undecided: a commit may yet arrive.
        if !fits || self.gate == Gate::Holding(epoch) {
            return false;
        }
        self.gate = Gate::Open;
        true
    }

    /// The lease runs out, if there is one: the gate aborts what is undecided, and opens to the owner.
    pub(super) fn expire_lease(&mut self) {
        if let Gate::Holding(since) = self.gate {
            if self.register.epoch == since {
                assert!(self.compare_and_set(since, Site::Source));
            }
            self.gate = Gate::Open;
        }
        self.check();
    }

    // The source's deeds; each may be repeated.

    pub(super) fn freeze(&mut self, container: usize) {
        assert_ne!(
            self.source[container].tasks,
            Tasks::Nothing,
            "what has ended is frozen"
        );
        self.source[container].tasks = Tasks::Parked;
        self.check();
    }

    pub(super) fn shut_source(&mut self, container: usize) {
        self.source[container].fenced = true;
        self.check();
    }

    /// Only once an abort has won: a commit on its way must find the epoch gone.
    pub(super) fn wake(&mut self, container: usize, begun: Epoch) {
        self.assert_decided(Site::Source, begun, "the source is thawed");
        assert_ne!(
            self.source[container].tasks,
            Tasks::Nothing,
            "what has ended is thawed"
        );
        self.source[container].tasks = Tasks::Running;
        self.check();
    }

    pub(super) fn lift_source(&mut self, container: usize, begun: Epoch) {
        self.assert_decided(Site::Source, begun, "the source's fence is lifted");
        self.source[container].fenced = false;
        self.check();
    }

    pub(super) fn retire(&mut self, container: usize, begun: Epoch) {
        self.assert_decided(Site::Target, begun, "the source is ended");
        assert!(
            self.target.iter().all(|one| one.serves()),
            "the source is ended before the target serves: {self:?}"
        );
        self.source[container].tasks = Tasks::Nothing;
        self.check();
    }

    // The target's deeds. Every request is handled alone and in order, and checked against the hop it is for.

    /// One deed of a request, counted from 0; whether there is more to do, or why it is refused.
    pub(super) fn deed(&mut self, order: Order, deed: usize) -> Result<bool, &'static str> {
        let Order {
            hop,
            begun,
            request,
        } = order;
        let is_ours = self.standing.is_some_and(|standing| standing.hop == hop);
        let result = match request {
            Request::Begin => Ok(self.begin(hop, deed)),
            // What is staged now belongs to another hop, or to none.
            Request::Kill | Request::Drop if !is_ours => Ok(false),
            _ if !is_ours => Err("the target knows no such hop"),
            Request::Restore => Ok(self.restore(deed)),
            Request::Verify => Ok(self.verify(deed)),
            Request::Unfence => Ok(self.unfence(deed)),
            Request::Kill | Request::Drop if self.stage() == Some(Stage::Serving) => {
                Err("its containers serve")
            }
            Request::Kill => {
                self.assert_decided(Site::Source, begun, "the target is killed");
                Ok(self.take_down(deed) || self.reach(Stage::Staging))
            }
            Request::Drop => {
                let more = self.take_down(deed);
                if !more {
                    self.standing = None;
                }
                Ok(more)
            }
            Request::Finish => Ok(false),
        };
        self.check();
        result
    }

    /// All deeds of the requests whose senders have given up.
    pub(super) fn handle_late_requests(&mut self) {
        while let Some(order) = self.late_requests.pop_front() {
            let mut deed = 0;
            while self.deed(order, deed) == Ok(true) {
                deed += 1;
            }
        }
    }

    fn stage(&self) -> Option<Stage> {
        self.standing.map(|standing| standing.stage)
    }

    /// Writes the stage down; never more to do.
    fn reach(&mut self, stage: Stage) -> bool {
        self.standing.as_mut().unwrap().stage = stage;
        false
    }

    fn begin(&mut self, hop: u32, deed: usize) -> bool {
        let more = self.stage() != Some(Stage::Serving) && self.take_down(deed);
        if !more {
            assert!(
                self.target.iter().all(|one| *one == Container::NONE),
                "{self:?}"
            );
            self.standing = Some(Standing {
                hop,
                stage: Stage::Staging,
            });
        }
        more
    }

    fn restore(&mut self, deed: usize) -> bool {
        if deed == 0 {
            self.reach(Stage::Built);
        }
        let container = &mut self.target[deed / 2];
        if deed.is_multiple_of(2) {
            container.fenced = true;
        } else {
            assert!(container.fenced, "the target is built without a fence");
            container.tasks = Tasks::Parked;
        }
        deed + 1 < 2 * CONTAINERS
    }

    fn verify(&mut self, deed: usize) -> bool {
        if deed == 0 {
            self.reach(Stage::Fenced);
        }
        self.target[deed].tasks = Tasks::Running;
        deed + 1 < CONTAINERS
    }

    fn unfence(&mut self, deed: usize) -> bool {
        self.target[deed].fenced = false;
        deed + 1 < CONTAINERS || self.reach(Stage::Serving)
    }

    /// The last container first; its tasks before its fence.
    fn take_down(&mut self, deed: usize) -> bool {
        let Some(last) = (CONTAINERS - 1).checked_sub(deed / 2) else {
            return false;
        };
        assert!(
            !self.target[last].serves(),
            "what serves is killed: {self:?}"
        );
        if deed.is_multiple_of(2) {
            self.target[last].tasks = Tasks::Nothing;
        } else {
            self.target[last].fenced = false;
        }
        true
    }

    fn assert_decided(&self, owner: Site, begun: Epoch, deed: &str) {
        assert!(
            self.register.owner == owner && self.register.epoch > begun,
            "{deed} before the register says so; the hop began at epoch {begun}: {self:?}"
        );
    }

    // How it must look in the end.

    pub(super) fn assert_source_serves(&self) {
        assert!(self.source.iter().all(|one| one.serves()), "{self:?}");
        assert!(!self.target.iter().any(|one| one.serves()), "{self:?}");
        assert_eq!(
            (self.gate, self.register.owner),
            (Gate::Open, Site::Source),
            "{self:?}"
        );
    }

    pub(super) fn assert_target_serves(&self) {
        assert!(self.target.iter().all(|one| one.serves()), "{self:?}");
        assert!(
            self.source.iter().all(|one| one.tasks == Tasks::Nothing),
            "{self:?}"
        );
        assert_eq!(
            (self.gate, self.register.owner),
            (Gate::Open, Site::Target),
            "{self:?}"
        );
    }

    pub(super) fn service() -> ServiceName {
        "web".parse().unwrap()
    }
}
