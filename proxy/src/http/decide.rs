//! What becomes of a request once its head was read: how much of it we take, which route it goes, what is changed.
//!
//! HTTP/1 connections and streams come here with the same parsed form, so there is one set of rules. The head is
//! written in any case, as it would go upstream: refused requests have a log line, too. Where nothing is configured
//! this is a few comparisons, without an allocation.

use std::sync::Arc;
use std::time::Instant;

use super::front_check::{Green, Seen};
use super::head::{Framing, HeadError, same_field};
use super::request::{Method, Parsed, Request, RequestId, Told, class};
use crate::config::{Limits, ServiceConfig};
use crate::error::RequestError;
use crate::forwarded::{AddressText, Arrived, Hop, Tracing};
use crate::listen::client::Client;
use crate::listen::port::{FrontCheckOf, Passage, Settings};
use crate::route::action::{FieldEdits, RedirectStatus};
use crate::route::template::{Id, Values, Variable};
use crate::route::{Path, RequestView, Route, bare_host};
use crate::service::terms::{Asker, Terms, Weight};

/// By what a request is judged.
#[derive(Clone, Copy)]
pub(crate) struct Rules<'r> {
    pub(crate) service: &'r ServiceConfig,
    pub(crate) limits: &'r Limits,
    /// Whether there is too little memory for any request.
    pub(crate) is_pressed: bool,
    /// Whether spans are recorded.
    pub(crate) tracing: Tracing,
    pub(crate) client: &'r Client,
    pub(crate) id: RequestId,
    pub(crate) now: Instant,
}

/// A request as it was understood and written.
#[derive(Debug)]
pub(crate) struct Decided {
    pub(crate) request: Request,
    pub(crate) treatment: Option<Box<Treatment>>,
    /// Its place in a trace, where spans are recorded.
    pub(crate) hop: Option<Box<Hop>>,
    /// On what terms it is held.
    pub(crate) terms: Terms,
    /// What it is told if it would have to wait, where it is a front check.
    pub(crate) front_check: Option<Green>,
    /// Why it is refused, if it is.
    pub(crate) refusal: Option<RequestError>,
}

/// What a route means for one request.
#[derive(Debug)]
pub(crate) struct Treatment {
    pub(crate) route: Arc<Route>,
    /// Header lines for the answer.
    answer_lines: Vec<u8>,
    /// Method and target as the client sent them, where the upstream gets others.
    pub(crate) asked: Option<Vec<u8>>,
    pub(crate) redirect: Option<RedirectTo>,
}

/// Where a client is sent.
#[derive(Debug)]
pub(crate) struct RedirectTo {
    pub(crate) status: RedirectStatus,
    pub(crate) location: Vec<u8>,
}

/// Changes to the header fields of an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AnswerEdits<'a> {
    pub(crate) fields: &'a FieldEdits,
    /// The lines of those that are set.
    pub(crate) lines: &'a [u8],
}

impl Decided {
    /// The beginning of its way upstream: to whom, and with how much patience.
    pub(crate) fn passage(&self, settings: &Settings) -> Passage {
        let mut passage = passage(
            self.terms,
            self.request.method,
            self.treatment.as_deref(),
            settings,
        );
        if let Some(green) = &self.front_check {
            passage.front_check = FrontCheckOf::Asks(green.clone());
        }
        passage
    }
}

/// The beginning of a request's way upstream: to whom, and with how much patience.
pub(crate) fn passage(
    terms: Terms,
    method: Method,
    treatment: Option<&Treatment>,
    settings: &Settings,
) -> Passage {
    let mut passage = Passage::new(terms);
    passage.intent = method.intent();
    if let Some(treatment) = treatment {
        let route = &treatment.route;
        passage.sites = settings.route_sites.get(&route.name).cloned();
        passage.route = Some(Arc::clone(route));
        passage.connect_max = route.limits.as_ref().map(|limits| limits.connect_max);
    }
    passage
}

impl Treatment {
    /// What of an answer is changed, if anything.
    pub(crate) fn answer_edits(&self) -> Option<AnswerEdits<'_>> {
        let fields = &self.route.response_fields;
        (!fields.is_empty()).then_some(AnswerEdits {
            fields,
            lines: &self.answer_lines,
        })
    }
}

/// Decides, and appends the head that the upstream gets.
pub(crate) fn decide(by: Rules<'_>, parsed: &Parsed<'_, '_>, out: &mut Vec<u8>) -> Decided {
    let arrived = Arrived {
        tracing: by.tracing,
        ..Arrived::by(by.client, &by.service.trusted_from)
    };
    let hop = (by.tracing == Tracing::On).then(|| Box::new(Hop::of(parsed.said(), by.id)));
    let marker = by.service.own_marker.as_deref();
    let plain = Told {
        strip: marker.filter(|_| !arrived.trusted),
        loop_id: by.service.loop_id.as_ref(),
        ..Told::plain(&arrived, by.id)
    };
    let judged = if by.is_pressed {
        Err(RequestError::Memory)
    } else if plain.loop_id.is_some_and(|id| id.has_seen(&parsed.fields)) {
        Err(RequestError::Loop)
    } else if class(parsed.method) == Method::Connect {
        judge_tunnel(by, parsed, &arrived, out)
    } else if by.service.rate.is_none() && by.service.routes.is_empty() {
        Ok(None)
    } else {
        judge(by, parsed, plain, out)
    };
    let (mut request, treatment, refusal) = match judged {
        Ok(Some((request, treatment))) => (request, treatment, None),
        Ok(None) => (parsed.write(plain, out), None, None),
        Err(error) => (parsed.write(plain, out), None, Some(error)),
    };
    request.alt_svc = by.client.alt_svc().cloned();
    let limits = treatment
        .as_ref()
        .and_then(|treatment| treatment.route.limits.as_deref());
    let terms = terms(by, parsed, &arrived, treatment.as_deref());
    let front_check = front_check(by, parsed, &request, treatment.as_deref());
    let body_bytes_max = limits.unwrap_or(by.limits).body_bytes_max;
    let too_long = matches!(request.framing, Framing::Length(length) if body_bytes_max > 0 && length > body_bytes_max);
    Decided {
        request,
        treatment,
        hop,
        terms,
        front_check,
        refusal: refusal.or_else(|| too_long.then_some(RequestError::BodyTooLong)),
    }
}

/// On what terms a request is held.
fn terms(
    by: Rules<'_>,
    parsed: &Parsed<'_, '_>,
    arrived: &Arrived<'_>,
    treatment: Option<&Treatment>,
) -> Terms {
    let hold = treatment.map_or(&by.service.hold, |treatment| &treatment.route.hold);
    let marker = by.service.own_marker.as_deref();
    let is_marked = |name| {
        arrived.trusted
            && parsed
                .fields
                .iter()
                .any(|field| same_field(field.name, name))
    };
    let is_own = hold.own_from.believes(by.client.address.ip()) || marker.is_some_and(is_marked);
    Terms {
        arrival: by.now,
        client: by.client.address,
        asker: if is_own {
            Asker::Application
        } else {
            Asker::Client
        },
        at_cut: hold.at_cut,
        class: hold.release_class,
        end: None,
        weight: Weight {
            when_full: hold.when_full,
            ..Weight::default()
        },
    }
}

/// What a front check is told, if the request is one.
fn front_check(
    by: Rules<'_>,
    parsed: &Parsed<'_, '_>,
    request: &Request,
    treatment: Option<&Treatment>,
) -> Option<Green> {
    let of_service = &by.service.front_checks;
    let checks = treatment.map_or(of_service, |treatment| &treatment.route.front_checks);
    let seen = Seen {
        request,
        target: parsed.path,
        fields: parsed.fields,
        peer: by.client.address.ip(),
    };
    checks.find(seen).cloned()
}

type Treated = (Request, Option<Box<Treatment>>);

/// Applies rates and routes. `None` where the head is to be written as it is.
fn judge(
    by: Rules<'_>,
    parsed: &Parsed<'_, '_>,
    plain: Told<'_>,
    out: &mut Vec<u8>,
) -> Result<Option<Treated>, RequestError> {
    let arrived = plain.arrived;
    let client = arrived.client(parsed.said(), &by.service.trusted_from);
    if let Some(rate) = &by.service.rate {
        rate.take(client, by.now).map_err(RequestError::Rate)?;
    }
    if by.service.routes.is_empty() {
        return Ok(None);
    }
    let (path, query) = split_query(parsed.path);
    let path = by
        .service
        .routes
        .read_path(path)
        .map_err(RequestError::Path)?;
    let view = RequestView {
        method: parsed.method,
        host: bare_host(parsed.host),
        path: &path,
        fields: &parsed.fields,
    };
    let found = by.service.routes.find(&view).map_err(RequestError::Path)?;
    let text = AddressText::of(client);
    let subject = by.client.certificate_subject();
    let said = parsed.said();
    let values = Values {
        client: text.as_bytes(),
        host: view.host,
        path: path.as_str(),
        query,
        scheme: arrived.scheme(said),
        request_id: arrived.request_id(said).map_or(Id::Ours(by.id), Id::Theirs),
        tls_subject: subject.unwrap_or_default().as_bytes(),
    };
    let Some(route) = found else {
        let target = new_target(None, &path, query, parsed);
        let told = Told {
            target: target.as_deref(),
            ..plain
        };
        return Ok(target.is_some().then(|| (parsed.write(told, out), None)));
    };
    if let Some(rate) = &route.rate {
        rate.take(client, by.now).map_err(RequestError::Rate)?;
    }
    let target = new_target(Some(route), &path, query, parsed);
    let told = Told {
        target: target.as_deref(),
        ..plain
    };
    let told = Told {
        edits: (!route.request_fields.is_empty()).then_some((&route.request_fields, &values)),
        ..told
    };
    let treatment = treat(route, &values, target.as_deref().map(|_| parsed))?;
    Ok(Some((parsed.write(told, out), Some(Box::new(treatment)))))
}

/// The same for a CONNECT: it goes where a route has its place in the list, and nowhere else.
fn judge_tunnel(
    by: Rules<'_>,
    parsed: &Parsed<'_, '_>,
    arrived: &Arrived<'_>,
    out: &mut Vec<u8>,
) -> Result<Option<Treated>, RequestError> {
    let client = arrived.client(parsed.said(), &by.service.trusted_from);
    if let Some(rate) = &by.service.rate {
        rate.take(client, by.now).map_err(RequestError::Rate)?;
    }
    let route = by.service.routes.find_place(parsed.path);
    let route = route.ok_or(RequestError::Head(HeadError::Connect))?;
    if let Some(rate) = &route.rate {
        rate.take(client, by.now).map_err(RequestError::Rate)?;
    }
    let treatment = Treatment {
        route: Arc::clone(route),
        answer_lines: Vec::new(),
        asked: None,
        redirect: None,
    };
    let request = parsed.write(Told::plain(arrived, by.id), out);
    Ok(Some((request, Some(Box::new(treatment)))))
}

fn split_query(target: &str) -> (&str, &str) {
    target.split_at(target.find('?').unwrap_or(target.len()))
}

/// Path and query as the upstream gets them, where they differ from what the client sent.
fn new_target(
    route: Option<&Arc<Route>>,
    path: &Path<'_>,
    query: &str,
    parsed: &Parsed<'_, '_>,
) -> Option<Vec<u8>> {
    let rewrite = route.and_then(|route| route.rewrite.as_ref());
    if rewrite.is_none() && path.is_as_sent() {
        return None;
    }
    let mut target = Vec::with_capacity(parsed.path.len());
    match rewrite {
        Some(rewrite) => rewrite.write(path.as_str(), &mut target),
        None => target.extend_from_slice(path.as_str().as_bytes()),
    }
    target.extend_from_slice(query.as_bytes());
    Some(target)
}

fn treat(
    route: &Arc<Route>,
    values: &Values<'_>,
    changed: Option<&Parsed<'_, '_>>,
) -> Result<Treatment, RequestError> {
    let mut answer_lines = Vec::new();
    route.response_fields.write(values, &mut answer_lines);
    let redirect = match &route.redirect {
        // HTTP/1.0 without Host: there is no telling where it wants to go.
        Some(redirect) if values.host.is_empty() && redirect.to.names(Variable::Host) => {
            return Err(RequestError::Head(HeadError::Host));
        }
        Some(redirect) => {
            let mut location = Vec::new();
            redirect.write_location(values, &mut location);
            Some(RedirectTo {
                status: redirect.status,
                location,
            })
        }
        None => None,
    };
    let asked = changed.map(|parsed| format!("{} {}", parsed.method, parsed.path).into_bytes());
    Ok(Treatment {
        route: Arc::clone(route),
        answer_lines,
        asked,
        redirect,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_begins_with_its_question_mark() {
        assert_eq!(split_query("/a?b?c"), ("/a", "?b?c"));
        assert_eq!(split_query("/a"), ("/a", ""));
    }
}
