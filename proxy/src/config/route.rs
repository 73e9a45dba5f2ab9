//! `[[service.route]]`, `rate` and `trusted_from`: from TOML to routes with everything compiled.
//!
//! Whatever a client could use to slip past a rule, or an operator to break a message, is refused here: prefixes
//! that are not in their simplest form, header fields that frame messages, values that end lines.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use regex::{Regex, RegexBuilder};
use toml::{Table, Value};

use super::load::{to_u64, to_usize};
use super::raw;
use super::table::{Problem, Section};
use super::upstream::reference;
use super::{HoldConfig, Limits, Protocol, UpstreamConfig, front_check, hold};
use crate::forwarded::TrustedFrom;
use crate::http::front_check::FrontChecks;
use crate::limit::rate::{Rate, RateLimit};
use crate::route::action::{FieldEdits, Redirect, RedirectStatus, Rewrite, may_edit};
use crate::route::condition::{
    Condition, FieldPattern, HostPattern, PathPattern, PlacePattern, Wanted,
};
use crate::route::template::{BadTemplate, Template};
use crate::route::{Path, Route, RouteServers, RouteTable};

const ROUTE_KEYS: &[&str] = &[
    "name",
    "host",
    "path_prefix",
    "path_regex",
    "method",
    "header",
    "sni",
    "connect",
    "source",
    "target",
    "redirect",
    "rewrite",
    "request_headers",
    "response_headers",
    "retry_methods",
    "rate",
    "at_cut",
    "own_from",
    "release_class",
    "front_check",
    "hold_ms_max",
    "at_limit",
    "when_full",
    "body_bytes_max",
    "connect_ms_max",
    "response_ms_max",
    "between_bytes_ms_max",
    "request_ms_max",
    "client_silence_ms_max",
    "client_body_bytes_per_s_min",
    "tunnel_idle_ms_max",
];
/// Those from here on take the place of one in `[limits]`.
const FIRST_LIMIT: usize = 23;
const _: () = assert!(matches!(
    ROUTE_KEYS[FIRST_LIMIT].as_bytes(),
    b"body_bytes_max"
));
const HEADERS_KEYS: &[&str] = &["set", "remove"];
const REDIRECT_KEYS: &[&str] = &["status", "to"];
const REWRITE_KEYS: &[&str] = &["strip_prefix", "replace_prefix", "regex", "to"];
const RATE_KEYS: &[&str] = &["requests_per_s", "burst", "by", "addresses_max"];

/// Largest compiled form of one expression, in bytes: ordinary ones need a hundredth of it.
const REGEX_BYTES_MAX: usize = 1 << 20;
/// Longest expression as written, in bytes.
const REGEX_TEXT_BYTES_MAX: usize = 4096;
/// Places for addresses in a rate limit, 16 bytes each: one megabyte.
const ADDRESSES_DEFAULT: usize = 65_536;

/// A list of networks.
pub(super) fn networks(section: &Section<'_>, key: &'static str) -> Result<TrustedFrom, Problem> {
    const WANTED: &str = "a network such as 10.0.0.0/8, or an address";
    let texts = section.text_or_texts(key)?.unwrap_or_default();
    let networks = texts.into_iter().map(|text| {
        let network = text.parse::<IpNet>();
        let network = network.or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network.map_err(|_| section.bad_text(key, text, WANTED))
    });
    networks.collect::<Result<_, _>>().map(TrustedFrom::new)
}

/// A table inside another one; errors name both.
fn inner<'t>(
    outer: &Section<'t>,
    key: &'static str,
    known: &'static [&'static str],
) -> Result<Option<Section<'t>>, Problem> {
    outer.section_at(key, format!("{key} of {}", outer.place()), known)
}

/// What of a service holds for its routes where they say nothing else.
#[derive(Clone, Copy)]
pub(super) struct OfService<'s> {
    pub(super) protocol: Protocol,
    pub(super) hold: &'s HoldConfig,
    pub(super) hold_max: Duration,
    pub(super) front_checks: &'s FrontChecks,
}

/// All routes of a service. `limits` are those of the proxy; a route's own take their place.
pub(super) fn routes(
    service: &Section<'_>,
    of_service: OfService<'_>,
    limits: &Limits,
    upstreams: &[UpstreamConfig],
) -> Result<RouteTable, Problem> {
    let mut routes: Vec<Route> = Vec::new();
    let place = |index: usize, table: &Table| match table.get("name") {
        Some(Value::String(name)) => format!("[[service.route]] \"{name}\""),
        _ => format!("[[service.route]] number {}", index + 1),
    };
    for section in service.sections_at("route", place, ROUTE_KEYS)? {
        raw::route_fits(&section, of_service.protocol)?;
        let next = route(&section, limits, upstreams, of_service)?;
        if routes.iter().any(|other| other.name == next.name) {
            return Err(service.together("has two routes with the same name; give each its own"));
        }
        routes.push(next);
    }
    Ok(RouteTable::new(routes))
}

fn route(
    section: &Section<'_>,
    limits: &Limits,
    upstreams: &[UpstreamConfig],
    of_service: OfService<'_>,
) -> Result<Route, Problem> {
    let name = section.required_text("name", "name = \"api\"")?.to_owned();
    let redirect = redirect(section)?;
    let servers = servers(section, upstreams)?;
    let rewrite = rewrite(section)?;
    if redirect.is_some() && (servers.is_some() || rewrite.is_some()) {
        return Err(section.together(
            "has \"redirect\" together with \"source\", \"target\" or \"rewrite\"; a redirected request reaches nobody",
        ));
    }
    let mut hold = hold::hold(section, Some(of_service.hold))?;
    hold.limit = hold::limit(section, hold.at_limit, of_service.hold_max)?;
    Ok(Route {
        name,
        condition: condition(section)?,
        servers,
        redirect,
        rewrite,
        request_fields: edits(section, "request_headers")?,
        response_fields: edits(section, "response_headers")?,
        retry_methods: methods(section, "retry_methods")?,
        rate: rate(section)?,
        hold,
        front_checks: front_check::front_checks(section, Some(of_service.front_checks))?,
        limits: own_limits(section, limits)?,
    })
}

fn condition(section: &Section<'_>) -> Result<Condition, Problem> {
    let path = match (section.text("path_prefix")?, regex(section, "path_regex")?) {
        (None, None) => None,
        (Some(prefix), None) => Some(PathPattern::Prefix(path_text(
            section,
            "path_prefix",
            prefix,
        )?)),
        (None, Some(regex)) => Some(PathPattern::Regex(regex)),
        (Some(_), Some(_)) => {
            return Err(section.together("has both \"path_prefix\" and \"path_regex\"; use one"));
        }
    };
    Ok(Condition {
        hosts: hosts(section, "host")?,
        path,
        methods: methods(section, "method")?.unwrap_or_default(),
        fields: field_patterns(section)?,
        sni: hosts(section, "sni")?,
        connect: places(section)?,
    })
}

fn hosts(section: &Section<'_>, key: &'static str) -> Result<Vec<HostPattern>, Problem> {
    const WANTED: &str = "a host without port, such as example.org or *.example.org";
    let texts = section.text_or_texts(key)?.unwrap_or_default();
    let patterns = texts
        .into_iter()
        .map(|text| HostPattern::parse(text).ok_or_else(|| section.bad_text(key, text, WANTED)));
    patterns.collect()
}

fn places(section: &Section<'_>) -> Result<Vec<PlacePattern>, Problem> {
    const KEY: &str = "connect";
    const WANTED: &str = "a host and a port, such as db.example.org:5432 or *.example.org:443";
    let texts = section.text_or_texts(KEY)?.unwrap_or_default();
    let patterns = texts
        .into_iter()
        .map(|text| PlacePattern::parse(text).ok_or_else(|| section.bad_text(KEY, text, WANTED)));
    patterns.collect()
}

/// A path that has one reading only, so that a request for it is found whichever way it is read.
pub(super) fn path_text(
    section: &Section<'_>,
    key: &'static str,
    text: &str,
) -> Result<String, Problem> {
    const WANTED: &str = "a path that begins with \"/\", has no \"//\", \".\", \"..\", \";\" or \"?\" in it and encodes only what it must";
    let read = Path::read(text).ok();
    let is_simple = read.is_some_and(|read| read.as_str() == text && read.loose().is_none());
    if is_simple && text.starts_with('/') {
        Ok(text.to_owned())
    } else {
        Err(section.bad_text(key, text, WANTED))
    }
}

fn regex(section: &Section<'_>, key: &'static str) -> Result<Option<Regex>, Problem> {
    let Some(text) = section.text(key)? else {
        return Ok(None);
    };
    let built = RegexBuilder::new(text).size_limit(REGEX_BYTES_MAX).build();
    match built {
        Ok(regex) if text.len() <= REGEX_TEXT_BYTES_MAX => Ok(Some(regex)),
        _ => Err(section.bad_text(
            key,
            text,
            "a regular expression (of the Rust crate regex: no look-around, no back-references), and not a huge one",
        )),
    }
}

fn methods(section: &Section<'_>, key: &'static str) -> Result<Option<Vec<String>>, Problem> {
    let Some(texts) = section.text_or_texts(key)? else {
        return Ok(None);
    };
    let methods = texts.into_iter().map(|text| {
        let is_method = !text.is_empty()
            && text
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte == b'-');
        let method = is_method.then(|| text.to_owned());
        method.ok_or_else(|| section.bad_text(key, text, "a method in capitals, such as GET"))
    });
    methods.collect::<Result<_, _>>().map(Some)
}

fn field_patterns(section: &Section<'_>) -> Result<Vec<FieldPattern>, Problem> {
    let patterns = section.entries("header")?.into_iter().map(|(name, value)| {
        let wanted = match value {
            Value::String(text) => Wanted::Value(text.clone().into_bytes()),
            Value::Boolean(true) => Wanted::Present,
            Value::Boolean(false) => Wanted::Absent,
            other => {
                const WANTED: &str =
                    "a table of texts, true (the field is there) and false (it is not)";
                return Err(section.wrong_type("header", other, WANTED));
            }
        };
        let name = field_name(section, "header", name)?;
        Ok(FieldPattern { name, wanted })
    });
    patterns.collect()
}

fn field_name(section: &Section<'_>, key: &'static str, name: &str) -> Result<String, Problem> {
    http::HeaderName::from_bytes(name.as_bytes())
        .map(|name| name.as_str().to_owned())
        .map_err(|_| section.bad_text(key, name, "the name of a header field"))
}

fn servers(
    section: &Section<'_>,
    upstreams: &[UpstreamConfig],
) -> Result<Option<RouteServers>, Problem> {
    let source = reference(section, "source", upstreams)?;
    let target = reference(section, "target", upstreams)?;
    match (source, target) {
        (None, None) => Ok(None),
        (Some(source), Some(target)) => Ok(Some(RouteServers { source, target })),
        _ => Err(section.together(
            "has only one of \"source\" and \"target\"; a hop moves its route, too, so name both",
        )),
    }
}

fn redirect(section: &Section<'_>) -> Result<Option<Redirect>, Problem> {
    let Some(inner) = inner(section, "redirect", REDIRECT_KEYS)? else {
        return Ok(None);
    };
    let code = inner
        .whole("status", 301..=308)?
        .ok_or_else(|| inner.missing("status", "status = 308"))?;
    let status = RedirectStatus::of(code)
        .ok_or_else(|| inner.bad_text("status", &code.to_string(), "301, 302, 303, 307 or 308"))?;
    let text = inner.required_text("to", "to = \"https://{host}{path}{query}\"")?;
    if !leads_where_it_says(text) {
        // "{path}" alone could be "//evil.example": another host.
        return Err(inner.bad_text(
            "to",
            text,
            "a URL that begins with https://, http://, {scheme}:// or with \"/\" and a letter",
        ));
    }
    let to = template(&inner, "to", text)?;
    Ok(Some(Redirect { status, to }))
}

fn leads_where_it_says(to: &str) -> bool {
    let absolute = ["https://", "http://", "{scheme}://"]
        .iter()
        .any(|scheme| to.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty()));
    let path = to.strip_prefix('/').is_some_and(|rest| {
        rest.is_empty() || rest.starts_with(|first: char| first.is_ascii_alphanumeric())
    });
    absolute || path
}

fn rewrite(section: &Section<'_>) -> Result<Option<Rewrite>, Problem> {
    const ONE: &str =
        "must have \"strip_prefix\", or \"replace_prefix\" and \"to\", or \"regex\" and \"to\"";
    let Some(inner) = inner(section, "rewrite", REWRITE_KEYS)? else {
        return Ok(None);
    };
    let to = inner.text("to")?;
    let parts = (
        inner.text("strip_prefix")?,
        inner.text("replace_prefix")?,
        regex(&inner, "regex")?,
        to,
    );
    Ok(Some(match parts {
        (Some(prefix), None, None, None) => Rewrite::Prefix {
            prefix: path_text(&inner, "strip_prefix", prefix)?,
            to: String::new(),
        },
        (None, Some(prefix), None, Some(to)) => Rewrite::Prefix {
            prefix: path_text(&inner, "replace_prefix", prefix)?,
            to: path_text(&inner, "to", to)?,
        },
        (None, None, Some(regex), Some(to)) => {
            let is_path = to.starts_with('/') && to.bytes().all(|byte| byte.is_ascii_graphic());
            if !is_path || to.contains(['?', '#']) {
                return Err(inner.bad_text(
                    "to",
                    to,
                    "a path that begins with \"/\", without a query",
                ));
            }
            Rewrite::Regex {
                regex,
                to: to.to_owned(),
            }
        }
        _ => return Err(inner.together(ONE)),
    }))
}

fn edits(section: &Section<'_>, key: &'static str) -> Result<FieldEdits, Problem> {
    let Some(inner) = inner(section, key, HEADERS_KEYS)? else {
        return Ok(FieldEdits::default());
    };
    let mut set = Vec::new();
    for (name, value) in inner.entries("set")? {
        let Value::String(text) = value else {
            return Err(inner.wrong_type("set", value, "a table of texts"));
        };
        let name = editable(&inner, "set", name)?;
        set.push((name, template(&inner, "set", text)?));
    }
    let removed = inner.text_or_texts("remove")?.unwrap_or_default();
    let removed = removed.into_iter().map(|name| {
        // Without it the upstream could not tell its sites apart, and would have to refuse the request.
        if name.eq_ignore_ascii_case("host") {
            return Err(inner.bad_text("remove", name, "another field: a request needs its host"));
        }
        editable(&inner, "remove", name)
    });
    Ok(FieldEdits::new(set, removed.collect::<Result<_, _>>()?))
}

pub(super) fn editable(
    section: &Section<'_>,
    key: &'static str,
    name: &str,
) -> Result<String, Problem> {
    const WANTED: &str =
        "a field that does not frame a message and that the proxy does not write itself";
    let known = field_name(section, key, name)?;
    if may_edit(&known) {
        Ok(known)
    } else {
        Err(section.bad_text(key, name, WANTED))
    }
}

fn template(section: &Section<'_>, key: &'static str, text: &str) -> Result<Template, Problem> {
    Template::parse(text).map_err(|bad| {
        let wanted = match bad {
            BadTemplate::Variable => {
                "a text with no variables but {client}, {host}, {path}, {query}, {scheme}, {request_id} and {tls_subject}"
            }
            BadTemplate::Control => "a text without line ends and other control characters",
        };
        section.bad_text(key, &text.escape_debug().to_string(), wanted)
    })
}

/// `rate` of a service or a route.
pub(super) fn rate(section: &Section<'_>) -> Result<Option<Arc<RateLimit>>, Problem> {
    const PER_S: &str = "a number between 0.001 and 1000000";
    let Some(inner) = inner(section, "rate", RATE_KEYS)? else {
        return Ok(None);
    };
    let per_s = inner
        .number("requests_per_s", 0.001..=1e6, PER_S)?
        .ok_or_else(|| inner.missing("requests_per_s", "requests_per_s = 10"))?;
    let burst = inner
        .whole("burst", 1..=1_000_000)?
        .ok_or_else(|| inner.missing("burst", "burst = 20"))?;
    let rate = Rate::new(per_s, u32::try_from(burst).unwrap_or(u32::MAX));
    let addresses = inner.whole("addresses_max", 512..=16_777_216)?;
    let began = Instant::now();
    Ok(Some(Arc::new(match inner.text("by")? {
        None | Some("address") => {
            RateLimit::by_address(rate, addresses.map_or(ADDRESSES_DEFAULT, to_usize), began)
        }
        Some("all") if addresses.is_none() => RateLimit::together(rate, began),
        Some("all") => {
            return Err(
                inner.together("has \"addresses_max\", which means nothing with by = \"all\"")
            );
        }
        Some(other) => return Err(inner.bad_text("by", other, "\"address\" or \"all\"")),
    })))
}

/// The proxy's limits with those that the route names in place, if it names any.
fn own_limits(section: &Section<'_>, limits: &Limits) -> Result<Option<Box<Limits>>, Problem> {
    let mut own_keys = ROUTE_KEYS[FIRST_LIMIT..].iter();
    if !own_keys.any(|key| section.has(key)) {
        return Ok(None);
    }
    let mut own = limits.clone();
    if let Some(bytes) = section.whole("body_bytes_max", 0..=i64::MAX)? {
        own.body_bytes_max = to_u64(bytes);
    }
    if let Some(bytes) = section.whole("client_body_bytes_per_s_min", 0..=i64::MAX)? {
        own.client_body_bytes_per_s_min = to_u64(bytes);
    }
    if section.has("request_ms_max") {
        own.request_max = super::load::optional_ms(section, "request_ms_max")?;
    }
    let times = [
        ("connect_ms_max", &mut own.connect_max),
        ("response_ms_max", &mut own.response_max),
        ("between_bytes_ms_max", &mut own.between_bytes_max),
        ("client_silence_ms_max", &mut own.client_silence_max),
        ("tunnel_idle_ms_max", &mut own.tunnel_idle_max),
    ];
    for (key, time) in times {
        *time = super::load::milliseconds_or(section, key, *time)?;
    }
    Ok(Some(Box::new(own)))
}
