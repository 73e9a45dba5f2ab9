//! One flag, set by SIGINT and SIGTERM, that every wait of the lab looks at: a world is always taken down in
//! order, never by dying in the middle of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

static REQUESTED: AtomicBool = AtomicBool::new(false);
static SHIELDED: AtomicBool = AtomicBool::new(false);

/// How often a condition is looked at, in milliseconds.
const LOOK_MS: u64 = 20;

/// Whether the lab was asked to stop, and is not busy taking things down because of it.
#[must_use]
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed) && !SHIELDED.load(Ordering::Relaxed)
}

/// Runs `work`, the taking down of something, to its end whatever was requested.
pub fn shielded<T>(work: impl FnOnce() -> T) -> T {
    SHIELDED.store(true, Ordering::Relaxed);
    let value = work();
    SHIELDED.store(false, Ordering::Relaxed);
    value
}

/// Starts listening for SIGINT and SIGTERM on a thread of its own, for the life of the process.
///
/// # Errors
/// When the thread or its signal handlers cannot be set up.
pub fn listen() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            runtime.block_on(async {
                use tokio::signal::unix::{SignalKind, signal};
                let (Ok(mut int), Ok(mut term)) = (
                    signal(SignalKind::interrupt()),
                    signal(SignalKind::terminate()),
                ) else {
                    return;
                };
                loop {
                    tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
                    REQUESTED.store(true, Ordering::Relaxed);
                }
            });
        })?;
    Ok(())
}

/// Looks at `condition` every few milliseconds until it holds. False when `limit` passes or the lab is interrupted.
pub fn wait_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if requested() || Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(LOOK_MS));
    }
}

/// Sleeps, but wakes early when the lab is interrupted.
pub fn pause(length: Duration) {
    wait_until(length, || false);
}
