//! The words of the command line, and what their values may be.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use cutover_protocol::hop::Phase;
use loadtest::lab::app::App;
use loadtest::lab::hop::{Again, Engine};
use loadtest::lab::kill::Victim;
use loadtest::lab::link::Link;
use loadtest::lab::place::{Place, Wish};
use loadtest::lab::tunnel::Tunnel;
use loadtest::lab::writes::Writes;
use loadtest::{bench, counter};

/// Moves a real application between two sites under load, and proves that nothing was lost or doubled.
#[derive(Debug, Parser)]
#[command(name = "lab", bin_name = "cargo lab", version)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What both the host and the guest are told about a hop.
#[derive(Debug, clap::Args)]
pub(crate) struct HopOptions {
    /// The application to move.
    #[arg(long, default_value = "wordpress")]
    pub(crate) app: App,
    /// How many clients post ids and read pages.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=5000))]
    pub(crate) clients: u16,
    /// What the clients' writes do to memory: few pages, or so much of a counter's that the hop has to slow them down; for
    /// 50 clients and a link of 200mbit,20ms,0%.
    #[arg(long, default_value = "few")]
    pub(crate) writes: Writes,
    /// Checkpoint and restore, or clean stop and start.
    #[arg(long, default_value = "criu")]
    pub(crate) engine: Engine,
    /// The link between the sites: rate, round trip and loss in each direction, or none.
    #[arg(long, default_value = "800mbit,20ms,0.1%")]
    pub(crate) link: Link,
    /// What carries the bytes between the sites: mutual TLS alone, or that inside a tunnel which the agents make.
    #[arg(long, default_value = "none")]
    pub(crate) tunnel: Tunnel,
    /// A phase to make fail, such as Checkpoint or Verify; the source must then serve as before.
    #[arg(long, value_name = "PHASE")]
    pub(crate) fault: Option<String>,
    /// A process to kill with -9 while the source is frozen.
    #[arg(long)]
    pub(crate) kill: Option<Victim>,
    /// A phase to cut the link in for five seconds, such as PreCopy or Transfer; repeat for several. The hop must go on.
    #[arg(long, value_name = "PHASE")]
    pub(crate) cut: Vec<Phase>,
    /// After a hop that was made to fail, hop again in the same world.
    #[arg(long)]
    pub(crate) then_hop_again: bool,
}

impl HopOptions {
    pub(crate) fn wish(self, place: Place) -> Wish {
        let again = if self.then_hop_again {
            Again::Yes
        } else {
            Again::No
        };
        let clients = usize::from(self.clients);
        Wish {
            app: self.app,
            clients,
            writes: self.writes,
            engine: self.engine,
            place,
            link: self.link,
            tunnel: self.tunnel,
            fault: self.fault,
            kill: self.kill,
            cut: self.cut,
            again,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Moves an application under load and prints a verdict.
    Hop {
        #[command(flatten)]
        options: HopOptions,
        /// Where: on this host if CRIU can run here, otherwise in a guest.
        #[arg(long = "where", default_value = "auto")]
        place: Place,
        /// Also write the report to this file, as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Runs every test of the workspace, then the end-to-end tests of the lab.
    Test {
        /// Only the tests whose name contains this, such as "bad input"; all of them by default.
        #[arg(default_value = "")]
        filter: String,
        /// Change the proxy under load as often as it promises to bear (60 reloads and 10 upgrades, not a few), and hop
        /// in a virtual machine, too.
        #[arg(long)]
        full: bool,
        /// The program hopgate-proxy for other makers' clients and for the hold; by default one is built.
        #[arg(long, value_name = "FILE")]
        hopgate: Option<PathBuf>,
    },
    /// The part of a hop that runs inside the guest.
    #[command(hide = true)]
    Inside {
        #[command(flatten)]
        options: HopOptions,
        /// The folder shared with the host.
        #[arg(long)]
        out: PathBuf,
    },
    /// The part of a case of `bench freeze` that runs inside the guest.
    #[command(hide = true)]
    InsideFreeze {
        /// The case's line.
        #[arg(long = "case")]
        line: String,
        /// Its mode.
        #[arg(long)]
        mode: bench::freeze::case::Mode,
        /// The link between the sites.
        #[arg(long)]
        link: Link,
        /// The folder shared with the host.
        #[arg(long)]
        out: PathBuf,
    },
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
    /// Compares Hopgate with HAProxy and nginx, or wears it out.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// The load of one measurement.
    #[command(hide = true)]
    BenchClient {
        /// What to do, as JSON.
        #[arg(long)]
        plan: String,
        /// Open the connections, so many at once, and keep them until we are killed.
        #[arg(long, value_name = "AT_ONCE")]
        hold: Option<usize>,
    },
    /// The target's end of Hopgate's own copies in a benchmark.
    #[command(hide = true)]
    BytesTarget {
        /// Where to listen.
        listen: SocketAddr,
        #[command(flatten)]
        end: EndOptions,
    },
    /// The source's end of them; reads what to do from standard input.
    #[command(hide = true)]
    BytesSource {
        /// The target's end.
        connect: SocketAddr,
        #[command(flatten)]
        end: EndOptions,
    },
    /// The server behind the proxies of a benchmark.
    #[command(hide = true)]
    BenchOrigin,
    /// Clients that are held.
    #[command(hide = true)]
    HoldClient {
        /// What they do, as JSON.
        #[arg(long)]
        plan: String,
    },
    /// One of the two sites of a hold: it writes down what it executes.
    #[command(hide = true)]
    HoldOrigin(bench::hold::origin::Options),
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

/// What both ends of a copy are told.
#[derive(Debug, clap::Args)]
pub(crate) struct EndOptions {
    /// The folder of the certificates.
    #[arg(long)]
    pub(crate) tls: PathBuf,
    /// The tree.
    #[arg(long)]
    pub(crate) tree: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Copies data sets over emulated links, beside rsync and iperf3 on the same link in the same run.
    Bytes(BytesOptions),
    /// Runs HAProxy, nginx and Hopgate in turn, on one core, and prints medians and the bars of each case.
    Proxy(ProxyOptions),
    /// Holds thousands of requests of every protocol, and proves that each was executed exactly once.
    Hold(HoldOptions),
    /// Moves counters that write their memory, and prints what crossed while they were frozen, and for how long.
    Freeze {
        /// Only the cases whose line contains this, such as "content, gang".
        #[arg(long = "case", value_name = "FILTER", default_value = "")]
        filter: String,
        /// How changed memory is found; repeat for several. Soft-dirty needs a kernel that tracks it: a guest has one.
        #[arg(long = "mode", value_enum, default_values = ["content", "none"])]
        modes: Vec<bench::freeze::case::Mode>,
        /// How often all cases run; schedules are compared by the median.
        #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=100))]
        times: u32,
        /// The link between the sites. Otherwise 800mbit,20ms,0.1%, and 100mbit,80ms,1% for rounds of four counters.
        #[arg(long)]
        link: Option<Link>,
        /// Where: on this machine, or each case in a virtual machine of its own.
        #[arg(long = "where", default_value = "host")]
        place: Place,
        /// Also write all figures to this file, as JSON.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Sends siege, wrk and ab through Hopgate at full speed; its memory must stay flat and no request may fail.
    Soak {
        /// How long.
        #[arg(long, default_value_t = 10.0, value_parser = minutes)]
        minutes: f64,
        /// Use this hopgate-proxy instead of the one of this checkout.
        #[arg(long, value_name = "FILE")]
        hopgate: Option<PathBuf>,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct BytesOptions {
    /// Only the cases whose name contains this, such as noise@800mbit; may be given more than once.
    #[arg(long = "case", value_name = "FILTER")]
    pub(crate) cases: Vec<String>,
    /// Only the data sets whose name contains this; may be given more than once.
    #[arg(long = "set", value_name = "FILTER")]
    pub(crate) sets: Vec<String>,
    /// Only the links whose name contains this; may be given more than once.
    #[arg(long = "link", value_name = "FILTER")]
    pub(crate) links: Vec<String>,
    /// An eighth of every data set: a quick look, no bar is about it.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Also write all figures to this file, as JSON; to standard output for "-".
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Lists the cases and ends.
    #[arg(long)]
    pub(crate) list: bool,
}

fn minutes(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.5..=10_000.0).contains(&value) {
        Ok(value)
    } else {
        Err("must be from 0.5 to 10000".to_owned())
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct ProxyOptions {
    /// Only the cases whose name contains this; may be given more than once.
    #[arg(long = "case", value_name = "FILTER")]
    pub(crate) cases: Vec<String>,
    /// Length of each measurement in seconds.
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// Measurements of each proxy in each case; fewer than five are good for a quick look only.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) rounds: u16,
    /// Measure this hopgate-proxy instead of the one of this checkout.
    #[arg(long, value_name = "FILE")]
    pub(crate) hopgate: Option<PathBuf>,
    /// Also write all figures to this file, as JSON; to standard output for "-".
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Lists the cases and ends.
    #[arg(long)]
    pub(crate) list: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct HoldOptions {
    /// Only the cases whose name contains this; may be given more than once.
    #[arg(long = "case", value_name = "FILTER")]
    pub(crate) cases: Vec<String>,
    /// Clients, or requests where several share a connection, in place of the cases' own number.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=150_000))]
    pub(crate) clients: Option<u32>,
    /// How long everything stands still, in place of the cases' own time.
    #[arg(long, value_parser = seconds)]
    pub(crate) seconds: Option<f64>,
    /// Hold with this hopgate-proxy instead of the one of this checkout.
    #[arg(long, value_name = "FILE")]
    pub(crate) hopgate: Option<PathBuf>,
    /// Also write all figures to this file, as JSON; to standard output for "-".
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Fail also when a bar of time or memory is missed.
    #[arg(long)]
    pub(crate) strict: bool,
    /// Lists the cases and ends.
    #[arg(long)]
    pub(crate) list: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.05..=3600.0).contains(&value) {
        Ok(value)
    } else {
        Err("must be from 0.05 to 3600".to_owned())
    }
}
