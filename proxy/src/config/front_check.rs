//! `[[service.front_check]]` and those of routes: which requests are health probes of balancers in front of us, and
//! what they are told while their service is held.

use toml::Table;

use super::route::{networks, path_text};
use super::table::{Problem, Section};
use crate::http::front_check::{FrontCheck, FrontChecks, Green};

const KEYS: &[&str] = &["path", "user_agent", "from", "status", "body"];
/// What a check is told in so many bytes at most: a balancer looks for a word, not for a page.
const BODY_BYTES_MAX: usize = 1024;

/// As the tables say; without any, as in `before`.
pub(super) fn front_checks(
    section: &Section<'_>,
    before: Option<&FrontChecks>,
) -> Result<FrontChecks, Problem> {
    let place =
        |index: usize, _: &Table| format!("front_check {} of {}", index + 1, section.place());
    let checks = section.sections_at("front_check", place, KEYS)?;
    if checks.is_empty() {
        return Ok(before.cloned().unwrap_or_default());
    }
    let checks = checks.iter().map(front_check);
    checks.collect::<Result<_, _>>().map(FrontChecks::new)
}

fn front_check(section: &Section<'_>) -> Result<FrontCheck, Problem> {
    if !["path", "user_agent", "from"]
        .iter()
        .any(|key| section.has(key))
    {
        return Err(section.together(
            "has neither \"path\" nor \"user_agent\" nor \"from\"; without a condition every GET would be a check",
        ));
    }
    let paths = section.text_or_texts("path")?.map(|texts| {
        let paths = texts.into_iter().map(|text| match text {
            "*" => Ok(text.to_owned()),
            _ => path_text(section, "path", text),
        });
        paths.collect::<Result<Vec<_>, _>>()
    });
    let user_agents = section.text_or_texts("user_agent")?.map(|texts| {
        let agents = texts.into_iter().map(|text| {
            let is_text = !text.is_empty() && !text.bytes().any(|byte| byte.is_ascii_control());
            let agent = is_text.then(|| text.to_owned());
            agent.ok_or_else(|| {
                section.bad_text(
                    "user_agent",
                    text,
                    "how a User-Agent begins, such as kube-probe/",
                )
            })
        });
        agents.collect::<Result<Vec<_>, _>>()
    });
    let status = section.whole("status", 200..=299)?.unwrap_or(200);
    let body = section.text("body")?.unwrap_or("ok\n");
    if body.len() > BODY_BYTES_MAX {
        return Err(section.bad_text("body", "…", "at most 1024 bytes"));
    }
    let from = section.has("from").then(|| networks(section, "from"));
    Ok(FrontCheck {
        paths: paths.transpose()?,
        user_agents: user_agents.transpose()?,
        from: from.transpose()?,
        green: Green {
            status: u16::try_from(status).unwrap_or(200),
            // Neither has a body (RFC 9110, sections 15.3.5 and 15.3.6).
            body: if matches!(status, 204 | 205) {
                ""
            } else {
                body
            }
            .into(),
        },
    })
}
