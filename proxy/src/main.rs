//! `hopgate-proxy`: the command line. `run` serves, `check` looks at a configuration, `ctl` commands a running proxy.

mod ctl;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use hopgate_proxy::Proxy;
use hopgate_proxy::config::{Config, ListenAddress, Machine};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// A data-plane reverse proxy that forwards, holds and releases.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Serve until SIGTERM or SIGINT; read the configuration again on SIGHUP, give way to a new process on SIGUSR2.
    Run {
        /// The configuration, TOML.
        #[arg(long)]
        config: PathBuf,
        /// Take over from the proxy that runs with this configuration's control socket, without losing a connection.
        #[arg(long)]
        upgrade: bool,
    },
    /// Read a configuration and say what is wrong with it.
    Check {
        /// The configuration, TOML.
        #[arg(long)]
        config: PathBuf,
    },
    /// Command a running proxy.
    Ctl(ctl::Arguments),
}

/// Exit codes: 0 done, 1 failed or refused, 2 usage or configuration, 3 not drained.
fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Subcommands::Run { config, upgrade } => run(&config, upgrade),
        Subcommands::Check { config } => check(&config),
        Subcommands::Ctl(arguments) => ctl::execute(&arguments),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("hopgate-proxy: {error:#}");
            let bad_config = error.is::<hopgate_proxy::config::ConfigError>();
            ExitCode::from(if bad_config { 2 } else { 1 })
        }
    }
}

fn check(path: &std::path::Path) -> anyhow::Result<ExitCode> {
    let config = Config::load(path)?;
    for service in &config.services {
        for listen in &service.listen {
            println!(
                "{}: {} -> source {}, target {}",
                service.name, listen.address, service.source, service.target
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run(path: &std::path::Path, upgrade: bool) -> anyhow::Result<ExitCode> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let config = Config::load(path)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    runtime.block_on(async {
        // Listening for signals begins before serving does: no early signal is lost.
        let mut signals = Signals::new().context("cannot wait for signals")?;
        let proxy = if upgrade {
            Proxy::take_over(&config)?
        } else {
            Proxy::start_supervised(&config)?
        };
        say_ready(&proxy, &config);
        loop {
            let wanted = tokio::select! {
                wanted = signals.next() => wanted,
                // Another process has taken over.
                () = proxy.ended() => break,
            };
            match wanted {
                Wanted::Reload => proxy.reload(),
                Wanted::Upgrade => proxy.upgrade(),
                Wanted::End => break,
            }
        }
        finish(proxy, &mut signals).await;
        Ok(ExitCode::SUCCESS)
    })
}

async fn finish(proxy: Proxy, signals: &mut Signals) {
    let limit = proxy.shutdown_max();
    if !proxy.has_ended() {
        tracing::info!(
            limit_ms = limit.as_millis(),
            "stopping: no new clients, finishing what runs; a second signal ends it now"
        );
        proxy.begin_stop(limit);
    }
    tokio::select! {
        () = proxy.ended() => {}
        () = signals.end() => {
            tracing::warn!("a second signal: ending now");
            proxy.cut();
        }
    }
    drop(proxy);
    tracing::info!("stopped");
}

fn say_ready(proxy: &Proxy, config: &Config) {
    for service in &config.services {
        let Some(status) = proxy.status(&service.name) else {
            continue;
        };
        let addresses = proxy.addresses(service.name.as_str());
        for (bound, listen) in addresses.into_iter().zip(&service.listen) {
            let address = bound.map_or_else(|| listen.address.clone(), ListenAddress::Tcp);
            let (gate, register) = (status.gate, &status.register);
            tracing::info!(service = %service.name, %address, ?gate, epoch = %register.epoch, owner = %register.owner, "serving");
        }
    }
    let machine = Machine::look();
    tracing::info!(
        workers = config.workers,
        connections_max = config.limits.connections_max,
        held_max = config.limits.held_max,
        held_bytes_max = config.limits.held_bytes_max,
        held_per_address_max = config.limits.held_per_address_max,
        open_files = machine.open_files,
        memory_free_bytes = machine.memory_bytes,
        control = %config.control.display(),
        "ready"
    );
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Reload,
    Upgrade,
    End,
}

/// The signals we listen for.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user2: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            user2: signal(SignalKind::user_defined2())?,
        })
    }

    async fn next(&mut self) -> Wanted {
        tokio::select! {
            _ = self.terminate.recv() => Wanted::End,
            _ = self.interrupt.recv() => Wanted::End,
            _ = self.hangup.recv() => Wanted::Reload,
            _ = self.user2.recv() => Wanted::Upgrade,
        }
    }

    async fn end(&mut self) {
        while self.next().await != Wanted::End {}
    }
}
