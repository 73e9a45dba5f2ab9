//! One hop driven through the world. The driver here does what the agent's does, deed by deed, and dies with
//! whatever it has not journalled.

use std::collections::HashSet;

use super::fault::{Fault, Faults};
use super::world::{self, CONTAINERS, Gate, Order, Request, World};
use crate::hold::Command;
use crate::hop::*;

/// Records after which a hop that still has not ended never will.
const RECORDS_MAX: usize = 2000;

/// How many records the target stays out of reach.
const AWAY_RECORDS: u32 = 6;

/// Why an action ends without success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    Failed,
    Crashed,
}

/// What is not left to chance in a run with chosen faults.
#[derive(Debug, Clone, Copy)]
pub(super) struct Circumstances {
    /// The lease runs out while the driver is dead.
    pub(super) lease_is_short: bool,
    /// Records until a late message arrives.
    pub(super) late_records: u32,
}

pub(super) const CALM: Circumstances = Circumstances {
    lease_is_short: false,
    late_records: 1,
};

/// What a run leaves behind.
pub(super) struct Account {
    pub(super) ending: Ending,
    /// How many points it had at which a fault can strike.
    pub(super) points: u32,
    /// Those just after a record became durable.
    pub(super) record_points: Vec<u32>,
    pub(super) trace: Vec<String>,
}

/// One hop being driven through the world.
pub(super) struct Run {
    name: String,
    world: World,
    faults: Faults,
    circumstances: Circumstances,
    point: u32,
    record_points: Vec<u32>,
    number: u32,
    begun: Epoch,
    bounds: Bounds,
    journal: Vec<String>,
    taken_back: HashSet<Undo>,
    away: u32,
    late_since: u32,
    trace: Vec<String>,
}

impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.name, self.trace.join("\n"));
        }
    }
}

impl Run {
    pub(super) fn new(
        name: String,
        world: World,
        faults: Faults,
        circumstances: Circumstances,
    ) -> Self {
        Self {
            name,
            begun: world.register.epoch,
            number: world.standing.map_or(0, |standing| standing.hop) + 1,
            world,
            faults,
            circumstances,
            point: 0,
            record_points: Vec::new(),
            bounds: Bounds {
                rounds_max: 2,
                stall_ms_max: 2000,
                throttle_percent_max: 0,
                costs: Costs::default(),
            },
            journal: Vec::new(),
            taken_back: HashSet::new(),
            away: 0,
            late_since: 0,
            trace: Vec::new(),
        }
    }

    // The driver: record, step, act.

    fn drive(&mut self) -> (Ending, Hop) {
        let mut hop = Hop::new(self.bounds);
        let mut event = Event::Begun { epoch: self.begun };
        loop {
            assert!(
                self.journal.len() < RECORDS_MAX,
                "{}: the hop does not end",
                self.name
            );
            self.pass_time(false);
            if self.is_aborted(&hop) {
                match self.record(&mut hop, Event::AbortAsked) {
                    Ok(step) => assert_eq!(step, Step::Nothing),
                    Err(_) => {
                        (hop, event) = self.restart();
                        continue;
                    }
                }
            }
            let result = match self.record(&mut hop, event) {
                Ok(Step::Act(action)) => self.act(action),
                Ok(Step::Over(ending)) => return (ending, hop),
                Ok(Step::Nothing) => panic!("{}: nothing is outstanding", self.name),
                Err(stop) => Err((stop, ActionName::Preflight)),
            };
            event = match result {
                Ok(event) => event,
                Err((Stop::Failed, action)) => Event::Failed {
                    action,
                    failure: Failure::new("simulated"),
                },
                Err((Stop::Crashed, _)) => {
                    (hop, event) = self.restart();
                    continue;
                }
            };
        }
    }

    fn is_aborted(&mut self, hop: &Hop) -> bool {
        hop.phase() != Phase::Plan
            && hop.phase().is_before_commit()
            && self.faults.are_left()
            && self.faults.chance(40)
    }

    /// A driver that cannot write its journal stops, as one that dies.
    fn record(&mut self, hop: &mut Hop, event: Event) -> Result<Step, Stop> {
        self.strike().map_err(|_| Stop::Crashed)?;
        self.trace
            .push(format!("{:?} at {}: {event:?}", hop.phase(), self.point));
        self.journal.push(serde_json::to_string(&event).unwrap());
        if let Event::Done {
            action: ActionName::Undo,
        } = event
        {
            self.taken_back.extend(hop.undos.last());
        }
        self.record_points.push(self.point);
        self.strike().map_err(|_| Stop::Crashed)?;
        Ok(hop.step(event).unwrap())
    }

    /// A new driver folds the journal.
    fn restart(&mut self) -> (Hop, Event) {
        self.trace.push("the driver dies".to_owned());
        self.pass_time(true);
        let mut hop = Hop::new(self.bounds);
        for line in &self.journal {
            hop.step(serde_json::from_str(line).unwrap()).unwrap();
        }
        let event = match hop.phase() {
            Phase::Plan => Event::Begun { epoch: self.begun },
            _ => Event::Restarted,
        };
        (hop, event)
    }

    /// What happens by itself: leases run out, late messages arrive, the target comes back.
    fn pass_time(&mut self, driver_is_dead: bool) {
        let expires = if driver_is_dead {
            self.circumstances.lease_is_short || self.faults.chance(2)
        } else {
            self.faults.are_left() && self.faults.chance(60)
        };
        if expires && self.world.gate != Gate::Open {
            self.trace.push("the lease runs out".to_owned());
            self.world.expire_lease();
        }
        self.away = self.away.saturating_sub(1);
        if self.world.late_commands.is_empty() && self.world.late_requests.is_empty() {
            return;
        }
        self.late_since += 1;
        let is_time = match self.faults {
            Faults::At(_) => self.late_since > self.circumstances.late_records,
            Faults::Drawn { .. } => self.faults.chance(4),
        };
        if is_time {
            self.late_since = 0;
            self.deliver();
        }
    }

    fn deliver(&mut self) {
        if let Some(command) = self.world.late_commands.pop() {
            let answer = self.world.command(&command);
            self.trace.push(format!("late {command:?}: {answer:?}"));
        }
        self.world.handle_late_requests();
    }

    fn fault(&mut self) -> Option<Fault> {
        let fault = self.faults.strike(self.point);
        self.point += 1;
        if let Some(fault) = fault {
            self.trace.push(format!("{fault:?} at {}", self.point - 1));
        }
        match fault {
            Some(Fault::TargetGone) => self.away = AWAY_RECORDS,
            Some(Fault::TargetLost) => self.away = u32::MAX,
            other => return other,
        }
        None
    }

    fn strike(&mut self) -> Result<(), Stop> {
        match self.fault() {
            None => Ok(()),
            Some(Fault::Crashes) => Err(Stop::Crashed),
            Some(_) => Err(Stop::Failed),
        }
    }

    // The actions, as the agent's driver does them.

    fn act(&mut self, action: Action) -> Result<Event, (Stop, ActionName)> {
        self.trace.push(format!("  {action:?}"));
        let result = self.do_one(action);
        // Whatever it came to: the answer may be lost.
        match self.strike().and(result) {
            Ok(event) => Ok(event),
            Err(stop) => Err((stop, action.name())),
        }
    }

    fn do_one(&mut self, action: Action) -> Result<Event, Stop> {
        let service = World::service();
        match action {
            Action::Preflight | Action::SyncFiles | Action::Transfer => self.reach_target()?,
            Action::OpenTunnel => {
                self.ask(Request::Begin)?;
                let link = Link {
                    rtt_ms: 20.0,
                    bytes_per_second: 1e8,
                };
                return Ok(Event::Measured { link });
            }
            Action::PreCopy { round } => {
                self.reach_target()?;
                let round = Round {
                    pages: 1000 / u64::from(round),
                    bytes: 4_096_000 / u64::from(round),
                    seconds: 0.1,
                    resident_bytes: 0,
                };
                return Ok(Event::PreCopied { round });
            }
            Action::Hold { epoch } => {
                let hold = Command::Hold {
                    service,
                    epoch,
                    lease_ms: 1,
                    drain_ms_max: 1,
                };
                self.send(hold)?.map_err(|_| Stop::Failed)?;
            }
            Action::Checkpoint => self.checkpoint()?,
            Action::Restore => self.ask(Request::Restore)?,
            Action::Verify => self.ask(Request::Verify)?,
            Action::Commit { epoch } => {
                let to = Site::Target;
                let register = self.register_after(Command::Commit { service, epoch, to })?;
                return Ok(Event::Committed { register });
            }
            Action::Settle { epoch } => {
                let register = self.register_after(Command::Abort { service, epoch })?;
                return Ok(Event::Settled { register });
            }
            Action::Redirect => self.redirect()?,
            Action::Undo(undo) => self.undo_twice(undo)?,
        }
        Ok(Event::Done {
            action: action.name(),
        })
    }

    fn reach_target(&mut self) -> Result<(), Stop> {
        self.strike()?;
        if self.away > 0 {
            Err(Stop::Failed)
        } else {
            Ok(())
        }
    }

    fn send(&mut self, command: Command) -> Result<Result<Register, Register>, Stop> {
        match self.fault() {
            None | Some(Fault::TargetGone | Fault::TargetLost) => Ok(self.world.command(&command)),
            Some(Fault::Fails) => Err(Stop::Failed),
            Some(Fault::Crashes) => Err(Stop::Crashed),
            Some(Fault::Late) => {
                self.world.late_commands.push(command);
                Err(Stop::Failed)
            }
            // The refusal names the register, as every refusal does.
            Some(Fault::NotDurable) => Ok(Err(self.world.register)),
        }
    }

    fn register_after(&mut self, command: Command) -> Result<Register, Stop> {
        Ok(match self.send(command)? {
            Ok(register) | Err(register) => register,
        })
    }

    fn ask(&mut self, request: Request) -> Result<(), Stop> {
        let order = Order {
            hop: self.number,
            begun: self.begun,
            request,
        };
        if self.away > 0 {
            return Err(Stop::Failed);
        }
        match self.fault() {
            Some(Fault::Late) => {
                self.world.late_requests.push_back(order);
                return Err(Stop::Failed);
            }
            Some(Fault::Crashes) => return Err(Stop::Crashed),
            Some(_) => return Err(Stop::Failed),
            None => self.world.handle_late_requests(),
        }
        let mut deed = 0;
        while self
            .world
            .deed(order, deed)
            .map_err(|refusal| self.told(refusal))?
        {
            self.strike()?;
            deed += 1;
        }
        self.strike()?;
        // The target has done it all, and cannot say so.
        if self.away > 0 {
            return Err(Stop::Failed);
        }
        Ok(())
    }

    fn told(&mut self, refusal: &str) -> Stop {
        self.trace.push(format!("the target refuses: {refusal}"));
        Stop::Failed
    }

    fn checkpoint(&mut self) -> Result<(), Stop> {
        for container in 0..CONTAINERS {
            self.strike()?;
            self.world.freeze(container);
            self.strike()?;
            self.world.shut_source(container);
        }
        Ok(())
    }

    fn redirect(&mut self) -> Result<(), Stop> {
        self.ask(Request::Unfence)?;
        self.give(Site::Target)?;
        for container in (0..CONTAINERS).rev() {
            self.strike()?;
            self.world.retire(container, self.begun);
        }
        self.ask(Request::Finish)
    }

    /// Brings register and gate where the deciding register has gone.
    fn give(&mut self, to: Site) -> Result<(), Stop> {
        let service = World::service();
        let epoch = self.begun;
        self.strike()?;
        if self.world.register.epoch == epoch {
            let service = service.clone();
            self.register_after(match to {
                Site::Target => Command::Commit { service, epoch, to },
                Site::Source => Command::Abort { service, epoch },
            })?;
        }
        self.strike()?;
        let Register { epoch, owner } = self.world.register;
        if owner != to {
            return Err(Stop::Failed);
        }
        if self.world.gate == Gate::Open {
            return Ok(());
        }
        let release = Command::Release { service, epoch, to };
        self.send(release)?.map(drop).map_err(|_| Stop::Failed)
    }

    fn undo_twice(&mut self, undo: Undo) -> Result<(), Stop> {
        assert!(
            !self.taken_back.contains(&undo),
            "{}: {undo} is undone again",
            self.name
        );
        self.undo(undo)?;
        let before = self.world.clone();
        let faults = std::mem::replace(&mut self.faults, Faults::At(Vec::new()));
        let again = self.undo(undo);
        self.faults = faults;
        // A target that has gone away meanwhile refuses the repetition; nothing else may.
        assert!(again.is_ok() || self.away > 0, "{}: {undo}", self.name);
        assert_eq!(
            self.world, before,
            "{}: {undo} is not idempotent",
            self.name
        );
        Ok(())
    }

    fn undo(&mut self, undo: Undo) -> Result<(), Stop> {
        match undo {
            Undo::KillTarget => self.ask(Request::Kill),
            Undo::Thaw => {
                for container in 0..CONTAINERS {
                    self.strike()?;
                    self.world.wake(container, self.begun);
                    self.strike()?;
                    self.world.lift_source(container, self.begun);
                }
                Ok(())
            }
            Undo::Reopen => self.give(Site::Source),
            Undo::DropStaging => self.ask(Request::Drop),
            Undo::CloseTunnel => self.strike(),
        }
    }

    // A whole run.

    /// Drives the hop to its end, judges the world, and hops once more without faults when this one was undone.
    pub(super) fn judge(mut self) -> Account {
        let (ending, hop) = self.drive();
        self.assert_ended(ending);
        let nothing_is_late =
            self.world.late_requests.is_empty() && self.world.late_commands.is_empty();
        if ending == Ending::Undone && hop.owed().is_empty() && nothing_is_late {
            let is_clean =
                |one: &world::Container| one.tasks == world::Tasks::Nothing && !one.fenced;
            assert!(
                self.world.target.iter().all(is_clean),
                "{}: {:?}",
                self.name,
                self.world
            );
        }
        while !self.world.late_commands.is_empty() || !self.world.late_requests.is_empty() {
            self.deliver();
        }
        self.assert_ended(ending);
        if ending == Ending::Undone {
            let name = format!("{}, and once more", self.name);
            let mut second = Self::new(name, self.world.clone(), Faults::At(Vec::new()), CALM);
            second.number = self.number + 1;
            let (ending, _) = second.drive();
            assert_eq!(ending, Ending::Committed, "{}", second.name);
            second.assert_ended(ending);
        }
        Account {
            ending,
            points: self.point,
            record_points: std::mem::take(&mut self.record_points),
            trace: std::mem::take(&mut self.trace),
        }
    }

    fn assert_ended(&self, ending: Ending) {
        match ending {
            Ending::Committed => self.world.assert_target_serves(),
            Ending::Undone => self.world.assert_source_serves(),
        }
    }
}
