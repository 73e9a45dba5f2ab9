//! Which route a raw connection takes: by the name that its client asks for in TLS, whoever ends that TLS. Where the
//! upstream does, the greeting is only looked at: every byte of it goes on untouched.

use std::borrow::Cow;
use std::io;
use std::sync::Arc;

use tokio::time::timeout;

use crate::config::UnknownName;
use crate::error::RequestError;
use crate::listen::hello::{self, Greeting};
use crate::listen::port::Settings;
use crate::route::Route;
use crate::stream::Stream;

/// A fatal alert, `unrecognized_name` (RFC 6066, section 3), in a record as clients of every version read it.
const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// What a raw connection asks for.
#[derive(Debug, Default)]
pub(super) struct Called {
    /// The name, if it gave one and somebody wanted to know.
    pub(super) name: Option<String>,
    /// The route for it.
    pub(super) route: Option<Arc<Route>>,
}

impl Called {
    /// As it is shown to whoever asks who is in flight.
    pub(super) fn what(&self) -> Cow<'static, str> {
        let name = self.name.as_ref();
        name.map_or("tcp".into(), |name| format!("tcp {name}").into())
    }
}

/// Finds the route of a connection. A client has as much time to greet as another has for its head.
///
/// # Errors
/// It said nothing in time, left, or asks for a name that is not served here.
///
/// # Cancel safety
/// Yes: nothing is taken off the connection.
pub(super) async fn called(stream: &Stream, settings: &Settings) -> Result<Called, RequestError> {
    let service = &settings.service;
    if service.routes.is_empty() {
        return Ok(Called::default());
    }
    let greeting = match stream {
        Stream::Tls(session) => match &session.agreed().server_name {
            Some(name) => Greeting::Named(name.to_ascii_lowercase()),
            None => Greeting::Nameless,
        },
        Stream::Plain(socket) => {
            let looking = timeout(settings.limits.client_head_max, hello::look(socket)).await;
            let looked = looking.map_err(|_| RequestError::HeadTimeout)?;
            looked.map_err(RequestError::ClientLeft)?
        }
    };
    let route = greeting
        .name()
        .and_then(|name| service.routes.find_sni(name))
        .map(Arc::clone);
    if route.is_none() && service.unknown_name == UnknownName::Refuse {
        refuse(stream, &greeting);
        return Err(RequestError::ServerName);
    }
    let name = match greeting {
        Greeting::Named(name) => Some(name),
        Greeting::Nameless | Greeting::Foreign => None,
    };
    Ok(Called { name, route })
}

/// Says why in the words of TLS, to whoever speaks it and has not agreed on keys with us.
fn refuse(stream: &Stream, greeting: &Greeting) {
    let Stream::Plain(socket) = stream else {
        return;
    };
    if *greeting != Greeting::Foreign {
        // Into the empty buffer of a new socket, so it never waits; a client that is gone needs no telling.
        drop(socket.try_write(&[io::IoSlice::new(&UNRECOGNIZED_NAME)]));
    }
}
