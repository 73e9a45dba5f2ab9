//! What we tell an upstream about the client: X-Forwarded-*, Forwarded (RFC 7239), X-Request-Id and the W3C trace
//! context; and what we believe when a client tells us.
//!
//! Only peers in `trusted_from` are believed. What anybody else sends in these fields never reaches an upstream: it
//! is replaced by what we know ourselves. A spelling with underscores counts as the field, because many upstreams
//! (whoever speaks CGI) cannot tell the two apart. The usual request, with none of these fields, is three lines
//! appended to the head, without an allocation.

mod loop_guard;
mod node;
mod passed;
mod trace;

use std::net::IpAddr;

use ipnet::IpNet;

use crate::http::fields::Fields;
use crate::http::head::same_field;
use crate::http::request::RequestId;
use crate::listen::client::Client;
pub(crate) use loop_guard::{FIELD as LOOP_FIELD, LoopId};
pub(crate) use node::AddressText;
pub(crate) use passed::{Circle, Passed, TLV as PASSED_TLV};
pub(crate) use trace::Hop;
#[cfg(any(test, feature = "fuzzing", feature = "otel"))]
pub(crate) use trace::TraceParent;

/// Longest X-Request-Id that is passed on, in bytes: four times a UUID.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Networks whose word is believed.
#[derive(Debug, Clone, Default)]
pub(crate) struct TrustedFrom(Vec<IpNet>);

impl TrustedFrom {
    pub(crate) fn new(networks: Vec<IpNet>) -> Self {
        Self(networks)
    }

    /// Whether a peer at this address is believed; without networks nobody is, at no cost. IPv4 inside IPv6 is the IPv4 address.
    pub(crate) fn believes(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address))
    }
}

/// Fields that we write ourselves, or only let pass from some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OurField {
    /// X-Forwarded-For.
    For,
    /// X-Forwarded-Proto.
    Proto,
    /// X-Forwarded-Host.
    Host,
    /// X-Forwarded-Port.
    Port,
    /// Forwarded.
    Forwarded,
    /// X-Request-Id.
    RequestId,
    /// traceparent.
    TraceParent,
    /// tracestate.
    TraceState,
}

impl OurField {
    /// Which of them a name is, if any.
    pub(crate) fn of(name: &str) -> Option<Self> {
        // The length tells most names apart before any is compared.
        let candidates: &[(&str, Self)] = match name.len() {
            9 => &[("forwarded", Self::Forwarded)],
            10 => &[("tracestate", Self::TraceState)],
            11 => &[("traceparent", Self::TraceParent)],
            12 => &[("x-request-id", Self::RequestId)],
            15 => &[("x-forwarded-for", Self::For)],
            16 => &[
                ("x-forwarded-host", Self::Host),
                ("x-forwarded-port", Self::Port),
            ],
            17 => &[("x-forwarded-proto", Self::Proto)],
            _ => &[],
        };
        let found = candidates.iter().find(|(known, _)| same_field(name, known));
        found.map(|(_, field)| *field)
    }
}

/// Which of our fields a request came with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Seen(u8);

impl Seen {
    pub(crate) const fn insert(&mut self, field: OurField) {
        self.0 |= 1 << field as u8;
    }

    pub(crate) const fn has(self, field: OurField) -> bool {
        self.0 & (1 << field as u8) != 0
    }

    const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Whether spans of ours are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tracing {
    /// They are: a trace goes on with a span of ours, or begins with one.
    On,
    /// They are not: a trace passes through as it is.
    Off,
}

/// The connection a request came by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrived<'a> {
    /// Who is at its other end.
    pub(crate) peer: IpAddr,
    /// The same as text, made once a connection.
    pub(crate) peer_text: &'a [u8],
    /// `http` or `https`.
    pub(crate) scheme: &'static [u8],
    /// Whether the peer is in `trusted_from`.
    pub(crate) trusted: bool,
    pub(crate) tracing: Tracing,
}

/// What a request says about itself.
#[derive(Clone, Copy)]
pub(crate) struct Said<'r> {
    pub(crate) fields: &'r dyn Fields,
    pub(crate) seen: Seen,
    /// As in the Host field; characters of a host and port only.
    pub(crate) host: &'r [u8],
}

impl<'a> Arrived<'a> {
    /// By the connection of this client.
    pub(crate) fn by(client: &'a Client, trust: &TrustedFrom) -> Self {
        let peer = client.address.ip();
        Self {
            peer,
            peer_text: client.shown_address(),
            scheme: client.scheme.name(),
            trusted: trust.believes(peer),
            tracing: Tracing::Off,
        }
    }

    /// The client a request is from: the last address in the chain that we do not trust, and the first of all if we
    /// trust every one. What stands before an entry that is no address is not believed.
    pub(crate) fn client(&self, said: Said<'_>, trust: &TrustedFrom) -> IpAddr {
        if !self.trusted || said.seen.is_empty() {
            return self.peer;
        }
        let mut chain = Chain::default();
        let mut next = |address: Option<IpAddr>| match address {
            Some(address) => chain.push(address, trust),
            None => chain = Chain::default(),
        };
        if said.seen.has(OurField::For) {
            said.fields.visit("x-forwarded-for", &mut |value| {
                value
                    .split(|byte| *byte == b',')
                    .for_each(|entry| next(node::address(entry)));
            });
        } else {
            said.fields
                .visit("forwarded", &mut |value| node::clients(value, &mut next));
        }
        chain.untrusted.or(chain.first).unwrap_or(self.peer)
    }

    /// How the client reached the first proxy that we trust, else us.
    pub(crate) fn scheme(&self, said: Said<'_>) -> &'static [u8] {
        match self.believed(said, OurField::Proto, "x-forwarded-proto") {
            Some(b"http") => b"http",
            Some(b"https") => b"https",
            _ => self.scheme,
        }
    }

    /// The id that a trusted peer gave the request, if it is one.
    pub(crate) fn request_id<'r>(&self, said: Said<'r>) -> Option<&'r [u8]> {
        self.believed(said, OurField::RequestId, "x-request-id")
            .filter(|id| is_request_id(id))
    }

    /// The value of one of our fields, if it is there once and from somebody we trust.
    fn believed<'r>(&self, said: Said<'r>, field: OurField, name: &str) -> Option<&'r [u8]> {
        if !self.trusted || !said.seen.has(field) {
            return None;
        }
        said.fields.single(name)
    }

    /// Appends our fields to a head, each with its line end.
    pub(crate) fn write(&self, said: Said<'_>, id: RequestId, out: &mut Vec<u8>) {
        out.extend_from_slice(b"X-Forwarded-For: ");
        if self.trusted && said.seen.has(OurField::For) {
            append_all(out, said.fields, "x-forwarded-for");
        }
        out.extend_from_slice(self.peer_text);
        out.extend_from_slice(b"\r\nX-Forwarded-Proto: ");
        out.extend_from_slice(self.scheme(said));
        out.extend_from_slice(b"\r\nX-Request-Id: ");
        match self.request_id(said) {
            Some(theirs) => out.extend_from_slice(theirs),
            None => id.write(out),
        }
        out.extend_from_slice(b"\r\n");
        if !said.seen.is_empty() {
            self.write_rarer(said, out);
        }
        if !said.seen.is_empty() || self.tracing == Tracing::On {
            trace::write(said, self.tracing, id, out);
        }
    }

    /// Fields that an upstream gets only if the client sent them: ours in place of theirs, or theirs if we trust it.
    fn write_rarer(&self, said: Said<'_>, out: &mut Vec<u8>) {
        if said.seen.has(OurField::Host) {
            out.extend_from_slice(b"X-Forwarded-Host: ");
            let theirs = self.believed(said, OurField::Host, "x-forwarded-host");
            out.extend_from_slice(theirs.unwrap_or(said.host));
            out.extend_from_slice(b"\r\n");
        }
        if said.seen.has(OurField::Port) {
            out.extend_from_slice(b"X-Forwarded-Port: ");
            let theirs = self.believed(said, OurField::Port, "x-forwarded-port");
            let own_port = || {
                port_of(said.host).unwrap_or(if self.scheme == b"https" {
                    b"443"
                } else {
                    b"80"
                })
            };
            out.extend_from_slice(theirs.unwrap_or_else(own_port));
            out.extend_from_slice(b"\r\n");
        }
        if said.seen.has(OurField::Forwarded) {
            out.extend_from_slice(b"Forwarded: ");
            if self.trusted {
                append_all(out, said.fields, "forwarded");
            }
            self.write_element(said.host, out);
        }
    }

    /// Our own element of Forwarded: addresses of IPv6 are bracketed and quoted (RFC 7239, section 6).
    fn write_element(&self, host: &[u8], out: &mut Vec<u8>) {
        let (before, after): (&[u8], &[u8]) = if self.peer_text.contains(&b':') {
            (b"\"[", b"]\"")
        } else {
            (b"", b"")
        };
        let parts: [&[u8]; 6] = [
            b"for=",
            before,
            self.peer_text,
            after,
            b";proto=",
            self.scheme,
        ];
        parts.iter().for_each(|part| out.extend_from_slice(part));
        if !host.is_empty() {
            // The characters of a host need no escape inside quotes.
            let parts: [&[u8]; 3] = [b";host=\"", host, b"\""];
            parts.iter().for_each(|part| out.extend_from_slice(part));
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// Every value of a field, each with the separator behind it.
fn append_all(out: &mut Vec<u8>, fields: &dyn Fields, name: &str) {
    fields.visit(name, &mut |value| {
        if !value.is_empty() {
            out.extend_from_slice(value);
            out.extend_from_slice(b", ");
        }
    });
}

/// Addresses of a chain, from the first to the last.
#[derive(Debug, Default)]
struct Chain {
    first: Option<IpAddr>,
    untrusted: Option<IpAddr>,
}

impl Chain {
    fn push(&mut self, address: IpAddr, trust: &TrustedFrom) {
        self.first = self.first.or(Some(address));
        if !trust.believes(address) {
            self.untrusted = Some(address);
        }
    }
}

fn is_request_id(id: &[u8]) -> bool {
    let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.~+/=:@".contains(byte);
    (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.iter().all(is_allowed)
}

/// The port behind a host, if there is one.
fn port_of(host: &[u8]) -> Option<&[u8]> {
    let colon = host.iter().rposition(|byte| *byte == b':')?;
    let port = &host[colon + 1..];
    let is_port = (1..=5).contains(&port.len()) && port.iter().all(u8::is_ascii_digit);
    is_port.then_some(port)
}

#[cfg(test)]
mod tests;
