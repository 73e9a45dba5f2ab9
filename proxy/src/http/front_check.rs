//! Front checks: health probes of balancers in front of us, and what they are told while their service is held.
//!
//! A balancer that gets no answer for the seconds of a hold takes us out of its list, and every client with us. So a
//! front check that would have to wait is answered here instead, green, without a place among the held and without
//! reaching an application. While the gate is open it is a request like any other: it must tell the truth.

use std::net::IpAddr;
use std::sync::Arc;

use super::head::{Framing, same_field};
use super::request::{Method, Request, Upgrade};
use crate::forwarded::TrustedFrom;

/// Fields that only a request which was passed on has. Whoever is known by its address alone must not have them: a
/// balancer's checks and its clients' requests come from the same place.
const PASSED_ON: [&str; 3] = ["forwarded", "x-forwarded-for", "via"];

/// The front checks of a service or a route.
#[derive(Debug, Clone, Default)]
pub(crate) struct FrontChecks(Arc<[FrontCheck]>);

impl FrontChecks {
    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// One kind of front check: every condition that is there is met.
#[derive(Debug)]
pub(crate) struct FrontCheck {
    /// The path as it is sent, without query: any of these.
    pub(crate) paths: Option<Vec<String>>,
    /// How User-Agent begins: any of these.
    pub(crate) user_agents: Option<Vec<String>>,
    /// Where it comes from.
    pub(crate) from: Option<TrustedFrom>,
    pub(crate) green: Green,
}

/// What a front check is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Green {
    /// From 200 to 299.
    pub(crate) status: u16,
    pub(crate) body: Arc<str>,
}

/// What of a request is looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen<'r> {
    pub(crate) request: &'r Request,
    /// Path and query as they were sent.
    pub(crate) target: &'r str,
    pub(crate) fields: &'r [httparse::Header<'r>],
    pub(crate) peer: IpAddr,
}

impl FrontChecks {
    pub(crate) fn new(checks: Vec<FrontCheck>) -> Self {
        Self(checks.into())
    }

    /// What a request is told if it would have to wait; `None` for whoever waits like all the others. Only what asks
    /// for nothing but an answer can be one: GET, HEAD or OPTIONS, without a body.
    pub(crate) fn find(&self, seen: Seen<'_>) -> Option<&Green> {
        let Seen { request, .. } = seen;
        let asks_only = matches!(request.method, Method::Safe | Method::Head)
            && request.framing == Framing::Empty
            && request.upgrade == Upgrade::None;
        let mut checks = self.0.iter().filter(|_| asks_only);
        checks
            .find(|check| check.is_met_by(seen))
            .map(|check| &check.green)
    }
}

impl FrontCheck {
    fn is_met_by(&self, seen: Seen<'_>) -> bool {
        let Self {
            paths,
            user_agents,
            from,
            ..
        } = self;
        let (path, _) = seen.target.split_once('?').unwrap_or((seen.target, ""));
        let by_path = paths
            .as_ref()
            .is_none_or(|paths| paths.iter().any(|known| known == path));
        let by_agent = user_agents
            .as_ref()
            .is_none_or(|agents| agents.iter().any(|agent| seen.agent_begins(agent)));
        let by_address = from.as_ref().is_none_or(|from| from.believes(seen.peer));
        let by_address_only = paths.is_none() && user_agents.is_none();
        by_path && by_agent && by_address && !(by_address_only && seen.was_passed_on())
    }
}

impl Seen<'_> {
    fn values(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        let fields = self.fields.iter();
        let named = fields.filter(move |field| same_field(field.name, name));
        named.map(|field| field.value)
    }

    fn agent_begins(&self, agent: &str) -> bool {
        self.values("user-agent")
            .any(|value| value.starts_with(agent.as_bytes()))
    }

    fn was_passed_on(&self) -> bool {
        PASSED_ON
            .iter()
            .any(|name| self.values(name).next().is_some())
    }
}
