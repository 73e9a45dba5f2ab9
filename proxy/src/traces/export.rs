//! From a request that is over to a span at a collector: OTLP over HTTP, by the exporter of the OpenTelemetry project.
//!
//! Its own tracer is not used: the ids are those that the upstream was told, and the times those of the log line.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor,
};

use crate::config::TracesConfig;
use crate::forwarded::{Hop, TraceParent};
use crate::http::served::Served;
use crate::listen::client::Client;

/// Spans that may wait for the collector, about a kilobyte each.
const QUEUE_SPANS_MAX: usize = 8192;
/// How long a span may wait for others to be sent with.
const GATHER: Duration = Duration::from_secs(1);
/// How long the collector may take for one batch; its next ones wait meanwhile.
const SEND_MAX: Duration = Duration::from_secs(5);

/// Sends spans from a thread of its own.
#[derive(Debug)]
pub(super) struct Exporter {
    processor: Arc<BatchSpanProcessor>,
    scope: InstrumentationScope,
    /// Its end tells the thread to send what is left.
    _open: SyncSender<()>,
}

impl Exporter {
    pub(super) fn open(config: &TracesConfig) -> io::Result<(Self, JoinHandle<()>)> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(&*config.endpoint)
            .with_timeout(SEND_MAX)
            .build()
            .map_err(io::Error::other)?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE_SPANS_MAX)
            .with_scheduled_delay(GATHER)
            .build();
        let mut processor = BatchSpanProcessor::builder(exporter)
            .with_batch_config(batches)
            .build();
        let name = config.service_name.to_string();
        processor.set_resource(&Resource::builder_empty().with_service_name(name).build());
        let processor = Arc::new(processor);
        let (open, closed) = sync_channel(0);
        let thread = std::thread::Builder::new().name("traces".to_owned());
        let last = Arc::clone(&processor);
        let thread = thread.spawn(move || {
            // Nobody ever sends: this is the end of the sender.
            let _ = closed.recv();
            if let Err(error) = last.shutdown_with_timeout(SEND_MAX) {
                tracing::warn!("the last spans are lost: {error}");
            }
        })?;
        let exporter = Self {
            processor,
            scope: InstrumentationScope::builder("hopgate-proxy")
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
            _open: open,
        };
        Ok((exporter, thread))
    }

    pub(super) fn take(&self, service: &str, client: &Client, served: &Served, hop: &Hop) {
        let end_time = SystemTime::now();
        let (method, path) = method_and_path(served.line());
        let status = served.progress.status.get();
        let route = served.treatment.as_ref().map(|treatment| &treatment.route);
        self.processor.on_end(SpanData {
            span_context: context(hop.own),
            parent_span_id: hop
                .parent
                .map_or(SpanId::INVALID, |parent| parent.span_id.into()),
            parent_span_is_remote: hop.parent.is_some(),
            span_kind: SpanKind::Server,
            // Few names, whatever clients ask for.
            name: match route {
                Some(route) => format!("{method} {}", route.name).into(),
                None => method.clone().into(),
            },
            start_time: end_time - served.age(),
            end_time,
            attributes: attributes(service, client, served, (method, path)),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            // Nobody had an answer, or it says that we or the upstream failed.
            status: if status == 0 || status >= 500 {
                Status::error("")
            } else {
                Status::Unset
            },
            instrumentation_scope: self.scope.clone(),
        });
    }
}

fn context(place: TraceParent) -> SpanContext {
    SpanContext::new(
        TraceId::from(place.trace_id),
        SpanId::from(place.span_id),
        TraceFlags::new(place.flags & 1),
        false,
        TraceState::NONE,
    )
}

/// By the names of the semantic conventions where they have one.
fn attributes(
    service: &str,
    client: &Client,
    served: &Served,
    (method, path): (String, String),
) -> Vec<KeyValue> {
    let held_ms = i64::try_from(served.passage.held.as_millis()).unwrap_or(i64::MAX);
    let mut attributes = vec![
        KeyValue::new("http.request.method", method),
        KeyValue::new("url.path", path),
        KeyValue::new("client.address", client.address.ip().to_string()),
        KeyValue::new("hopgate.service", service.to_owned()),
        KeyValue::new("hopgate.request_id", served.id.to_string()),
        KeyValue::new("hopgate.held_ms", held_ms),
    ];
    let status = served.progress.status.get();
    if status > 0 {
        attributes.push(KeyValue::new(
            "http.response.status_code",
            i64::from(status),
        ));
    }
    if let Some(server) = &served.passage.server {
        attributes.push(KeyValue::new("server.address", server.to_string()));
    }
    if let Some(register) = served.passage.register {
        let epoch = i64::try_from(register.epoch.0).unwrap_or(i64::MAX);
        attributes.push(KeyValue::new("hopgate.site", register.owner.to_string()));
        attributes.push(KeyValue::new("hopgate.epoch", epoch));
    }
    attributes
}

/// Without the query, which may hold what nobody should read.
fn method_and_path(line: &[u8]) -> (String, String) {
    let line = String::from_utf8_lossy(line);
    let (method, target) = line.split_once(' ').unwrap_or((&line, ""));
    let path = target.split('?').next().unwrap_or_default();
    (method.to_owned(), path.to_owned())
}
