//! `lab`: moves a real application under load and prints a verdict. This file only reads the command line and
//! turns outcomes into exit codes.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use loadtest::lab::app::App;
use loadtest::lab::link::Link;
use loadtest::progress::Progress;
use loadtest::{counter, interrupt, lab};

/// Moves a real application between two sites under load, and proves that nothing was lost or doubled.
#[derive(Debug, Parser)]
#[command(name = "lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Sets up both sites with the application at the source, and keeps them until ENTER or a signal.
    #[command(hide = true)]
    World {
        /// The application.
        #[arg(long, default_value = "wordpress")]
        app: App,
        /// The link between the sites.
        #[arg(long, default_value = "800mbit,20ms,0.1%")]
        link: Link,
    },
    /// The stateful program itself.
    #[command(hide = true)]
    Counter(counter::Options),
    /// Delays the packets of a netfilter queue.
    #[command(hide = true)]
    Delay {
        /// Number of the queue.
        #[arg(long)]
        queue: u16,
        /// By how much, in microseconds.
        #[arg(long)]
        delay_us: u64,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().command {
        Command::Counter(options) => counter::run(&options)?,
        Command::Delay { queue, delay_us } => {
            lab::delay::run(queue, Duration::from_micros(delay_us))?
        }
        Command::World { app, link } => {
            interrupt::listen()?;
            lab::by_hand::world(app, link, &Progress::new())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
