//! The words between whoever commands a gate and the proxy that owns it: one JSON object a line, each way.
//!
//! Every command that changes anything names the epoch it expects, and repeating a command that already took
//! effect answers with success. A commit and an abort are both a compare-and-set of the register from the same
//! epoch, so exactly one of them wins and the loser is told the register that beat it.
//!
//! A hold may have a holder. Until it ends, only commands given in the holder's name change it, or such as insist. A
//! write limit is held to the same rules.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use crate::id::{Epoch, Holder, Register, ServiceName, Site};

/// Longest line of the control protocol, in bytes, in either direction.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// A stall longer than so many tenths of the shortest timeout in front of a proxy is worth a warning: predictions are
/// not exact, and what was held is not answered all at once.
pub const FRONT_TENTHS_MAX: u8 = 8;

/// Most services of one command.
pub const SERVICES_MAX: usize = 64;

/// One line to the proxy: a command, and in whose name it is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// In whose name.
    #[serde(default, skip_serializing_if = "Claim::is_nobodys")]
    pub claim: Claim,
    /// What is to be done.
    #[serde(flatten)]
    pub command: Command,
}

/// In whose name a command is given. A hold that is begun in a holder's name is that holder's until it ends.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Claim {
    /// Nobody's in particular: enough for a hold without a holder.
    #[default]
    Nobody,
    /// This holder's.
    Holder(Holder),
    /// Whoever the holder is: a person who insists. A hold that is begun, or held on to, by force has no holder.
    Force,
}

impl Claim {
    /// Whether there is nothing to be said of it.
    #[must_use]
    pub const fn is_nobodys(&self) -> bool {
        matches!(self, Self::Nobody)
    }

    /// Whether it suffices to change what `holder` holds.
    #[must_use]
    pub fn suffices_for(&self, holder: Option<&Holder>) -> bool {
        match (self, holder) {
            (Self::Force, _) | (_, None) => true,
            (Self::Holder(ours), Some(holder)) => ours == holder,
            (Self::Nobody, Some(_)) => false,
        }
    }
}

/// A service, and the epoch its commander believes in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// The service.
    pub service: ServiceName,
    /// Its epoch, as the command would name it for this service alone.
    pub epoch: Epoch,
}

/// One command to the proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Report every service, or one.
    Status {
        /// Only this service when given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        service: Option<ServiceName>,
    },
    /// Hold new requests, drain those in flight, close idle upstream connections; answers once nothing is left
    /// or the drain limit has passed (the gate then still holds, and the answer lists what is left).
    Hold {
        /// The service to hold.
        service: ServiceName,
        /// The epoch the caller believes in.
        epoch: Epoch,
        /// The hold aborts by itself when it is not renewed for this long, in milliseconds.
        lease_ms: u64,
        /// How long the drain may take, in milliseconds.
        drain_ms_max: u64,
    },
    /// Give a hold another lease.
    Renew {
        /// The held service.
        service: ServiceName,
        /// The epoch of the hold.
        epoch: Epoch,
        /// The new lease, from now, in milliseconds.
        lease_ms: u64,
    },
    /// Compare-and-set the register from `(epoch, owner)` to `(epoch + 1, to)`. The gate goes on holding.
    Commit {
        /// The held service.
        service: ServiceName,
        /// The epoch to commit from.
        epoch: Epoch,
        /// The new owner.
        to: Site,
    },
    /// Compare-and-set the register from `(epoch, owner)` to `(epoch + 1, owner)`. The gate goes on holding.
    Abort {
        /// The service.
        service: ServiceName,
        /// The epoch to abort from.
        epoch: Epoch,
    },
    /// Open the gate towards the register's owner, which must be `to`, at exactly this epoch.
    Release {
        /// The held service.
        service: ServiceName,
        /// The epoch *after* the commit or the abort.
        epoch: Epoch,
        /// The site the caller believes to be the owner.
        to: Site,
    },
    /// While the gate is open, admit writes (HTTP requests whose method is not safe) evenly, one every `interval_us` at
    /// most. One that comes earlier is delayed, never refused. The limit ends by itself when a hold begins or the epoch
    /// moves; given again, it has a new lease and the new bounds.
    Admit {
        /// The service, whose gate must be open.
        service: ServiceName,
        /// The epoch the caller believes in.
        epoch: Epoch,
        /// From one write to the next, in microseconds.
        interval_us: NonZeroU64,
        /// No write is delayed for longer, in milliseconds: then it goes through all the same.
        delay_ms_max: u64,
        /// The limit ends by itself when it is not given again for this long, in milliseconds.
        lease_ms: u64,
    },
    /// Lift the write limit, where there is one: whoever is delayed goes on at once.
    AdmitFreely {
        /// The service.
        service: ServiceName,
        /// The epoch of the limit.
        epoch: Epoch,
    },
    /// Hold several services, each drained before the next is held: the one clients meet first comes first. If one
    /// cannot be held, or is not drained in time, those this command has held are reopened.
    HoldAll {
        /// The services, from the outside in; each once, [`SERVICES_MAX`] at most.
        services: Vec<Expected>,
        /// Each hold aborts by itself when it is not renewed for this long after the answer, in milliseconds.
        lease_ms: u64,
        /// How long the drain of all of them together may take, in milliseconds.
        drain_ms_max: u64,
    },
    /// [`Command::Commit`] for several services, in this order, or for none of them.
    CommitAll {
        /// The held services, from the outside in.
        services: Vec<Expected>,
        /// The new owner of all of them.
        to: Site,
    },
    /// [`Command::Abort`] for several services, in this order, or for none of them.
    AbortAll {
        /// The services, from the outside in.
        services: Vec<Expected>,
    },
    /// [`Command::Release`] for several services, the last one first, or for none of them.
    ReleaseAll {
        /// The held services, from the outside in.
        services: Vec<Expected>,
        /// The site the caller believes to be the owner of all of them.
        to: Site,
    },
}

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// Answer to `status`.
    Status {
        /// One entry a service, in the order of the configuration.
        services: Vec<ServiceStatus>,
    },
    /// Answer to every other command that took effect, or had already.
    Done {
        /// The service after the command.
        service: ServiceStatus,
    },
    /// The hold stands, but the drain did not end in time.
    NotDrained {
        /// The service after the command.
        service: ServiceStatus,
        /// What still keeps the source busy, oldest first, at most a hundred.
        left: Vec<InFlight>,
    },
    /// Nothing was changed.
    Refused {
        /// Why, for a program.
        reason: Refusal,
        /// Why, for a person, and what to do.
        message: String,
        /// The register now, where the service is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        register: Option<Register>,
    },
    /// A command for several services took effect for all of them, or had already.
    DoneAll {
        /// The services after the command, in its order.
        services: Vec<ServiceStatus>,
    },
    /// A command for several services came to nothing because of one of them.
    RefusedAll {
        /// Because of which.
        service: ServiceName,
        /// Why, for a program.
        reason: Refusal,
        /// Why, for a person, and what to do.
        message: String,
        /// What of that service was still in flight when the drain ran out of time, as in [`Answer::NotDrained`].
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        left: Vec<InFlight>,
        /// The services now, in the command's order; unknown ones are left out.
        services: Vec<ServiceStatus>,
    },
}

/// Why a command was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// No such service is configured.
    UnknownService,
    /// The register is at another epoch: somebody else was first.
    WrongEpoch,
    /// The register's owner is not the one the command names.
    WrongOwner,
    /// The gate does not hold.
    NotHolding,
    /// The gate holds, and writes with it: there is nothing to limit.
    Holding,
    /// The hold is another's, who alone may change it.
    HeldByOther,
    /// Something was still in flight at the end of the time for it.
    NotDrained,
    /// The state could not be made durable, so nothing was changed.
    NotDurable,
    /// The proxy is being replaced by another process, or the one before it has not ended; repeat it shortly.
    Busy,
    /// The line was not a command.
    BadCommand,
}

/// What a gate does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// Requests pass to the owner.
    Open,
    /// New requests are held; some are still in flight.
    Draining,
    /// New requests are held and nothing is in flight.
    Holding,
    /// The held are being let through, paced; newcomers queue behind them.
    Releasing,
}

/// What is done because of how full the budget of the held is. Each tier does what those before it do, too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// There is room: requests are held.
    #[default]
    Park,
    /// No more is read of clients that are connected, and none of their streams is taken up.
    StopReading,
    /// No more clients are accepted: they wait in the kernel.
    StopAccepting,
    /// Whoever comes through none the less is refused.
    Refuse,
}

/// How full the budget of the held is. A bound of zero is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BudgetStatus {
    /// What is done because of that.
    pub tier: Tier,
    /// Most that may be held.
    pub held_max: u64,
    /// Memory that the held keep, by our own count.
    pub held_bytes: u64,
    /// Most that they may keep.
    pub held_bytes_max: u64,
    /// Most that may be held of one client address.
    pub held_per_address_max: u64,
}

/// The writes of a service: HTTP requests whose method is not safe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WritesStatus {
    /// Ever admitted, those that were delayed or held before included.
    pub admitted: u64,
    /// Ever delayed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub delayed: u64,
    /// Delayed now: neither held nor in flight.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub delayed_now: u64,
    /// The limit in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<WriteLimit>,
}

impl WritesStatus {
    /// Whether there were none, and nothing limits them.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        *self == Self::default()
    }
}

/// A limit on writes that is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteLimit {
    /// From one write to the next, in microseconds.
    pub interval_us: NonZeroU64,
    /// No write is delayed for longer, in milliseconds.
    pub delay_ms_max: u64,
    /// What is left of its lease, in milliseconds.
    pub lease_ms_left: u64,
    /// Whose it is, if it is somebody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
}

/// One service as the proxy sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub service: ServiceName,
    /// The arbiter's register.
    pub register: Register,
    /// What the gate does.
    pub gate: Gate,
    /// What is left of the lease in milliseconds, while the gate holds under one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_ms_left: Option<u64>,
    /// Who holds, while the gate holds in somebody's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
    /// The epoch at which the hold began, while the gate holds; while it is the register's, the hold is undecided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_since: Option<Epoch>,
    /// How long a request may be held, in milliseconds; shorter on some routes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_ms_max: Option<u64>,
    /// The shortest timeout of what stands in front of the proxy, in milliseconds, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub front_timeout_ms: Option<u64>,
    /// Requests (or raw connections) between their admission and their last byte.
    pub in_flight: u64,
    /// Open connections to upstreams, idle ones included.
    pub upstream_connections: u64,
    /// Requests and raw connections whose route lets them be carried through a hop: not among those in flight, and
    /// their connections not among the upstream's.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub carried: u64,
    /// Held now.
    pub held_now: u64,
    /// Ever held. `held = released + gave_up + evicted + held_now` at all times.
    pub held: u64,
    /// Held and then let through.
    pub released: u64,
    /// Held, and the client left.
    pub gave_up: u64,
    /// Held, and refused by us: over a limit, too old, or at shutdown.
    pub evicted: u64,
    /// Health probes of balancers that were answered instead of being held; not among the above.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub front_checks_answered: u64,
    /// HTTP requests that ask for a change, and what limits them.
    #[serde(default, skip_serializing_if = "WritesStatus::is_quiet")]
    pub writes: WritesStatus,
    /// How full the budget of the held is, where the proxy says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetStatus>,
    /// The servers of both sites, where the question was for the status.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<ServerStatus>,
}

impl ServiceStatus {
    /// Whether the gate holds and neither a commit nor an abort has moved the register since.
    #[must_use]
    pub fn is_undecided(&self) -> bool {
        self.held_since == Some(self.register.epoch)
    }

    /// What clients would see of a stall of so many milliseconds, where they would: a line each, with what to do.
    #[must_use]
    pub fn stall_warnings(&self, stall_ms: u64) -> Vec<String> {
        let service = &self.service;
        let front = self.front_timeout_ms.filter(|front| {
            u128::from(stall_ms) * 10 > u128::from(*front) * u128::from(FRONT_TENTHS_MAX)
        });
        let front = front.map(|front| {
            format!(
                "{service}: a stall of {stall_ms} ms passes 0.{FRONT_TENTHS_MAX} of front_timeout_ms = {front}; clients may see a timeout of what stands in front of the proxy: raise that, or make the stall shorter"
            )
        });
        let bound = self.hold_ms_max.filter(|bound| stall_ms > *bound);
        let bound = bound.map(|bound| {
            format!(
                "{service}: a stall of {stall_ms} ms is longer than any request is held ({bound} ms); those who came first would be refused: raise hold_ms_max, or make the stall shorter"
            )
        });
        front.into_iter().chain(bound).collect()
    }
}

/// One server of a service, as the proxy sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Where it belongs to.
    pub site: Site,
    /// The upstream group that it is one of.
    pub group: String,
    /// Where it accepts connections.
    pub address: String,
    /// Whether it takes requests.
    pub state: ServerState,
    /// Its share within its group.
    pub weight: u32,
    /// Used only when no other is usable.
    pub backup: bool,
    /// How much of its weight it has now, in hundredths, where it starts slowly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_percent: Option<u8>,
    /// Why it is spared requests, and for how long, where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ejected: Option<EjectedStatus>,
    /// Requests it has now, of all services.
    pub active: u64,
    /// Connections to it that are open now, idle ones included, without those of checks.
    #[serde(default)]
    pub connections: u64,
    /// Requests it ever had.
    pub requests: u64,
    /// Connections to it that did not come about.
    pub connect_errors: u64,
    /// Its answers of 500 and above.
    pub server_errors: u64,
    /// Its answers that were cut or not understood.
    pub broken: u64,
    /// What the last check found, where there are checks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<CheckStatus>,
}

/// Whether a server takes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerState {
    /// It does.
    Up,
    /// Fewer than its weight says; it came back a moment ago.
    SlowStart,
    /// It failed its checks.
    Down,
    /// It failed its requests, and is spared some.
    Ejected,
}

/// A server that is spared requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EjectedStatus {
    /// What it did, for a person.
    pub reason: String,
    /// Until it is asked again, in milliseconds.
    pub ms_left: u64,
}

/// One check of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckStatus {
    /// Whether the server did as it should.
    pub good: bool,
    /// What it did, for a person.
    pub reason: String,
    /// Since the check, in milliseconds.
    pub age_ms: u64,
}

/// One request (or raw connection) that is in flight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InFlight {
    /// The client's address.
    pub client: String,
    /// Method and path, or `tcp`.
    pub what: String,
    /// Since its admission, in milliseconds.
    pub age_ms: u64,
    /// The request's id, as the application and the access log have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The route it took, if it took one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// The server that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// How far it has come.
    #[serde(default)]
    pub phase: InFlightPhase,
    /// Bytes that went to the upstream.
    #[serde(default)]
    pub sent_bytes: u64,
    /// Bytes that went to the client.
    #[serde(default)]
    pub answered_bytes: u64,
    /// What becomes of it when a drain takes too long.
    #[serde(default)]
    pub at_cut: AtCut,
    /// Held requests that come from its server: it may be waiting for them, and they for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waits_for: Vec<String>,
}

/// How far a request in flight has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InFlightPhase {
    /// The request is on its way to the upstream.
    #[default]
    Sending,
    /// It is there; no byte of the answer has come.
    Waiting,
    /// The answer is on its way to the client.
    Answering,
    /// Bytes go both ways, until both ends have finished.
    Tunnel,
    /// Its client was answered by us or has left; the upstream has not finished with it.
    Abandoned,
}

/// What becomes of a request in flight when a drain takes longer than it may.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AtCut {
    /// The drain waits for it, and fails if it does not end.
    #[default]
    Wait,
    /// It is answered with an error that names its id, and noted in the ledger of unknown outcomes.
    Cut,
    /// It stays as it is and is not waited for: its connection moves with the application.
    Carry,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde gives a reference
const fn is_zero(count: &u64) -> bool {
    *count == 0
}
