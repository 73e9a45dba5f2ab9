//! Routes of a service: which requests go to other servers, or are changed, redirected or limited on their way.
//!
//! The first route whose conditions are met is taken; without one the service's own source and target serve. A
//! service without routes never asks. What is matched is what is forwarded: see `path` for how that is kept.

pub(crate) mod action;
pub(crate) mod condition;
pub(crate) mod path;
pub(crate) mod template;

use std::sync::Arc;

use crate::config::{HoldConfig, Limits, UpstreamRef};
use crate::http::front_check::FrontChecks;
use crate::limit::rate::RateLimit;
use action::{FieldEdits, Redirect, Rewrite};
use condition::{Condition, Place};
pub(crate) use condition::{RequestView, bare_host};
pub(crate) use path::{Path, PathError};

/// One route.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    /// Unique in its service; in logs and metrics.
    pub(crate) name: String,
    pub(crate) condition: Condition,
    /// Whoever serves it at each site, if not the service's own.
    pub(crate) servers: Option<RouteServers>,
    /// Answered by us.
    pub(crate) redirect: Option<Redirect>,
    pub(crate) rewrite: Option<Rewrite>,
    pub(crate) request_fields: FieldEdits,
    pub(crate) response_fields: FieldEdits,
    /// Methods that may be sent again; `None` for what is safe by RFC 9110.
    pub(crate) retry_methods: Option<Vec<String>>,
    pub(crate) rate: Option<Arc<RateLimit>>,
    /// What a hold means for its requests.
    pub(crate) hold: HoldConfig,
    /// Health probes of balancers in front of us.
    pub(crate) front_checks: FrontChecks,
    /// The proxy's limits with the route's own in place; `None` where it has none.
    pub(crate) limits: Option<Box<Limits>>,
}

/// Who serves a route at each site: a hop moves routes, too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RouteServers {
    pub(crate) source: UpstreamRef,
    pub(crate) target: UpstreamRef,
}

impl Route {
    /// Whether a request with this method may be sent again when no byte of an answer came; `by_default` is what
    /// holds where the route says nothing.
    pub(crate) fn may_send_again(&self, method: &[u8], by_default: bool) -> bool {
        match &self.retry_methods {
            Some(methods) => methods.iter().any(|known| known.as_bytes() == method),
            None => by_default,
        }
    }
}

/// All routes of a service, in their order.
#[derive(Debug, Clone, Default)]
pub(crate) struct RouteTable {
    routes: Vec<Arc<Route>>,
    looks_at_path: bool,
}

impl RouteTable {
    pub(crate) fn new(routes: Vec<Route>) -> Self {
        let looks = |route: &Route| {
            route.condition.path.is_some() || route.rewrite.is_some() || route.redirect.is_some()
        };
        Self {
            looks_at_path: routes.iter().any(looks),
            routes: routes.into_iter().map(Arc::new).collect(),
        }
    }

    /// Whether nobody need ask.
    pub(crate) const fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Route> {
        self.routes.iter().map(|route| &**route)
    }

    /// Routes with servers of their own, by name.
    pub(crate) fn with_servers(&self) -> impl Iterator<Item = (&str, &RouteServers)> {
        self.routes.iter().filter_map(|route| {
            let servers = route.servers.as_ref()?;
            Some((route.name.as_str(), servers))
        })
    }

    /// A copy with expressions of its own: their scratch memory is fastest for whoever does not share it.
    pub(crate) fn for_worker(&self) -> Self {
        let own = self.routes.iter();
        Self {
            routes: own.map(|route| Arc::new(Route::clone(route))).collect(),
            looks_at_path: self.looks_at_path,
        }
    }

    /// Reads a path as far as this table needs it read; where no rule looks at paths it stays untouched.
    ///
    /// # Errors
    /// It has no acceptable reading.
    pub(crate) fn read_path<'p>(&self, path: &'p str) -> Result<Path<'p>, PathError> {
        if self.looks_at_path {
            Path::read(path)
        } else {
            Ok(Path::unread(path))
        }
    }

    /// The first route whose conditions are met.
    ///
    /// # Errors
    /// The path leads to different routes in its two readings, or has two where the route changes it.
    pub(crate) fn find(&self, request: &RequestView<'_>) -> Result<Option<&Arc<Route>>, PathError> {
        let first = |path: &str| {
            self.routes
                .iter()
                .find(|route| route.condition.is_met(request, path))
        };
        let found = first(request.path.as_str());
        let Some(loose) = request.path.loose() else {
            return Ok(found);
        };
        let same = match (found, first(loose)) {
            // A changed path would be read in two ways behind us, where no rule sees it any more.
            (Some(found), Some(other)) => Arc::ptr_eq(found, other) && found.rewrite.is_none(),
            (None, None) => true,
            _ => false,
        };
        same.then_some(found).ok_or(PathError::Ambiguous)
    }

    /// The first route for a place that a CONNECT asks for.
    pub(crate) fn find_place(&self, place: &str) -> Option<&Arc<Route>> {
        let place = Place::parse(place)?;
        self.routes.iter().find(|route| {
            let mut places = route.condition.connect.iter();
            places.any(|pattern| pattern.fits(place))
        })
    }

    /// The first route for a name in a TLS greeting.
    pub(crate) fn find_sni(&self, name: &str) -> Option<&Arc<Route>> {
        let name = bare_host(name.as_bytes());
        self.routes.iter().find(|route| {
            let mut names = route.condition.sni.iter();
            names.any(|pattern| pattern.fits(name))
        })
    }
}

#[cfg(test)]
mod tests;
