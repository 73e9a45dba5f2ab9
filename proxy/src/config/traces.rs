//! `[traces]`: where spans go. A build without the feature `otel` refuses the table rather than ignore it.

use super::table::{Problem, Section};

pub(super) const KEYS: &[&str] = &["endpoint", "service_name"];

/// Where spans of requests go, and under whose name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TracesConfig {
    /// The URL that a collector takes spans at: OTLP over HTTP, in clear or through TLS by the authorities of the system.
    pub endpoint: Box<str>,
    /// The `service.name` of all spans.
    pub service_name: Box<str>,
}

pub(super) fn traces(section: &Section<'_>) -> Result<TracesConfig, Problem> {
    if !cfg!(feature = "otel") {
        return Err(section.together(
            "needs a hopgate-proxy with the feature \"otel\"; build it with --features otel, or leave the table out",
        ));
    }
    let endpoint =
        section.required_text("endpoint", "endpoint = \"http://127.0.0.1:4318/v1/traces\"")?;
    let rest = ["https://", "http://"]
        .iter()
        .find_map(|scheme| endpoint.strip_prefix(scheme))
        .unwrap_or_default();
    let is_whole = !rest.is_empty() && !rest.starts_with('/');
    if !is_whole || !rest.bytes().all(|byte| byte.is_ascii_graphic()) {
        const WANTED: &str = "a URL that begins with http:// or https://";
        return Err(section.bad_text("endpoint", endpoint, WANTED));
    }
    Ok(TracesConfig {
        endpoint: endpoint.into(),
        service_name: section
            .text("service_name")?
            .unwrap_or("hopgate-proxy")
            .into(),
    })
}
