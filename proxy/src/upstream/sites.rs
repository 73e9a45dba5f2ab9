//! The groups of one service (or route), one a site, and the server that was chosen for one request.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use cutover_protocol::id::Site;

use super::eject::Outcome;
use super::group::Group;
use super::server::Picked;

/// Who serves at each site.
#[derive(Debug, Clone)]
pub(crate) struct Sites {
    pub(crate) source: Arc<Group>,
    pub(crate) target: Arc<Group>,
}

impl Sites {
    /// Whether a group serves at one of them.
    pub(crate) fn has(&self, group: &Arc<Group>) -> bool {
        [&self.source, &self.target]
            .into_iter()
            .any(|ours| Arc::ptr_eq(ours, group))
    }

    /// The group of a site.
    pub(crate) const fn of(&self, site: Site) -> &Arc<Group> {
        match site {
            Site::Source => &self.source,
            Site::Target => &self.target,
        }
    }
}

/// The server of one request: active until this is dropped.
#[derive(Debug)]
pub(crate) struct Chosen {
    sites: Rc<Sites>,
    site: Site,
    picked: Picked,
}

impl Chosen {
    pub(crate) const fn new(sites: Rc<Sites>, site: Site, picked: Picked) -> Self {
        Self {
            sites,
            site,
            picked,
        }
    }

    /// The group it was chosen from.
    pub(crate) fn group(&self) -> &Arc<Group> {
        self.sites.of(self.site)
    }

    /// Says how the request ended, as far as the server is to praise or to blame.
    pub(crate) fn report(&self, outcome: Outcome) {
        self.group().report(&self.picked, outcome, Instant::now);
    }

    /// The field that makes the client come back to this server, as a line of a head; `None` where it would anyway.
    pub(crate) fn set_cookie(&self, is_secure: bool) -> Option<String> {
        let name = self.group().sticky_cookie()?;
        if self.picked.sticks {
            return None;
        }
        let value = self.picked.cookie();
        let secure = if is_secure { "; Secure" } else { "" };
        // Of no use to scripts, and of none to other sites than the one that set it.
        Some(format!(
            "Set-Cookie: {name}={value}; Path=/; HttpOnly; SameSite=Lax{secure}\r\n"
        ))
    }
}
