//! What a process remembers about itself, for `ctl status` and metrics.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::control::words::{ListenerStatus, ProcessStatus};
use crate::snapshot::Snapshot;

/// Shared by everybody who reports.
#[derive(Debug)]
pub(crate) struct Facts {
    started: Instant,
    reloads_done: AtomicU64,
    reloads_refused: AtomicU64,
    last_refusal: Mutex<Option<String>>,
}

impl Facts {
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
            reloads_done: AtomicU64::new(0),
            reloads_refused: AtomicU64::new(0),
            last_refusal: Mutex::new(None),
        }
    }

    pub(super) fn reloaded(&self) {
        self.reloads_done.fetch_add(1, Ordering::Relaxed);
        self.remember(None);
    }

    pub(super) fn refused(&self, why: String) {
        self.reloads_refused.fetch_add(1, Ordering::Relaxed);
        self.remember(Some(why));
    }

    fn remember(&self, refusal: Option<String>) {
        let mut last = self
            .last_refusal
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *last = refusal;
    }

    /// Why the last reload was refused, if it was.
    pub(crate) fn last_refusal(&self) -> Option<String> {
        let last = self.last_refusal.lock();
        last.unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn reloads_done(&self) -> u64 {
        self.reloads_done.load(Ordering::Relaxed)
    }

    pub(crate) fn reloads_refused(&self) -> u64 {
        self.reloads_refused.load(Ordering::Relaxed)
    }

    /// As Prometheus wants them.
    pub(crate) fn write_metrics(&self, out: &mut String, generation: u64) -> std::fmt::Result {
        let last_ok = u64::from(self.last_refusal().is_none());
        let singles = [
            (
                "hopgate_config_generation",
                "gauge",
                "Configurations so far, the one in force included",
                generation,
            ),
            (
                "hopgate_config_last_reload_ok",
                "gauge",
                "0 when the last reload was refused",
                last_ok,
            ),
        ];
        for (name, kind, help, value) in singles {
            writeln!(
                out,
                "# HELP {name} {help}.\n# TYPE {name} {kind}\n{name} {value}"
            )?;
        }
        let name = "hopgate_reloads_total";
        writeln!(
            out,
            "# HELP {name} Reloads by what came of them.\n# TYPE {name} counter"
        )?;
        writeln!(out, "{name}{{outcome=\"done\"}} {}", self.reloads_done())?;
        writeln!(
            out,
            "{name}{{outcome=\"refused\"}} {}",
            self.reloads_refused()
        )
    }

    /// Everything a person may want to know of the process.
    pub(crate) fn status(&self, snapshot: &Snapshot, predecessor: Option<i32>) -> ProcessStatus {
        let mut listeners = Vec::new();
        for serving in &snapshot.services {
            let service = serving.service.name();
            listeners.extend(serving.listeners.iter().map(|bound| ListenerStatus {
                service: Some(service.clone()),
                address: bound.place.address.clone(),
                bound: bound.address,
            }));
        }
        listeners.extend(snapshot.metrics.iter().map(|bound| ListenerStatus {
            service: None,
            address: bound.place.address.clone(),
            bound: bound.address,
        }));
        ProcessStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            workers: snapshot.config.workers,
            config: snapshot.config.file.clone(),
            generation: snapshot.generation,
            reloads_done: self.reloads_done(),
            reloads_refused: self.reloads_refused(),
            last_refusal: self.last_refusal(),
            predecessor,
            listeners,
        }
    }
}
