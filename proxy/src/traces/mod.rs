//! Spans of requests, for OpenTelemetry: one for each request that was understood, made from what its log line is made
//! of, once it is over. Nothing of it is on a request's way but a place in a trace.
//!
//! Only with the feature `otel`; without it a configuration that asks for spans is refused, so nothing here is ever
//! called. Spans wait in a bounded queue: when the collector cannot follow they are dropped, and requests are not delayed.

#[cfg_attr(not(feature = "otel"), path = "none.rs")]
mod export;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::config::TracesConfig;
use crate::forwarded::Hop;
use crate::http::served::Served;
use crate::listen::client::Client;
use export::Exporter;

/// Where spans go. The last copy of it sends what is left.
#[derive(Debug, Clone)]
pub(crate) struct Traces {
    config: TracesConfig,
    exporter: Arc<Exporter>,
}

impl Traces {
    /// Begins to export, with a thread of its own to be joined at the end; goes on with the exporter before it where
    /// nothing has changed.
    ///
    /// # Errors
    /// There is no thread to be had, or no client for such a collector.
    pub(crate) fn open(
        config: &TracesConfig,
        before: Option<&Self>,
    ) -> io::Result<(Self, Option<JoinHandle<()>>)> {
        if let Some(before) = before.filter(|before| before.config == *config) {
            return Ok((before.clone(), None));
        }
        let (exporter, thread) = Exporter::open(config)?;
        let traces = Self {
            config: config.clone(),
            exporter: Arc::new(exporter),
        };
        Ok((traces, Some(thread)))
    }

    /// Takes the span of a request that is over, unless its trace is one that is not recorded.
    pub(crate) fn record(&self, service: &str, client: &Client, served: &Served, hop: &Hop) {
        if hop.is_recorded() {
            self.exporter.take(service, client, served, hop);
        }
    }
}
