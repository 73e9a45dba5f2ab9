//! The client: a closed loop of connections on one thread, cheap enough that the proxy's core is the bottleneck.
//!
//! It runs in a process of its own. Every exchange that begins is either answered in full or an error; those of the
//! warm-up are not counted, their errors are. Counting ends with the last answer, so that no exchange is cut in two.

pub mod answer;
pub mod channel;
pub mod connection;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustls::ClientConfig;

use crate::bench::client::answer::{Fault, Script};
use crate::bench::client::channel::{Channel, tls_config};
use crate::bench::client::connection::{Asker, Step};
use crate::bench::origin::content::Content;
use crate::bench::plan::{Connection, Opened, Plan, Sample, Transport};
use crate::bench::usage::processor_time;

/// Errors after which a phase ends: a proxy that refuses everything would be asked as fast as we can.
const ERRORS_MAX: u64 = 1000;
/// Longest wait for the answers that are still out at the end of a phase, in seconds.
const DRAIN_S: u64 = 20;
/// Events taken from the kernel at once.
const EVENTS: usize = 256;
/// Most bytes read, or thrown away, at once.
const BUFFER_BYTES: usize = 256 << 10;
/// Longest latency that is told apart, in nanoseconds.
const LATENCY_NS_MAX: u64 = 120_000_000_000;
/// Latencies are kept in steps of about this many nanoseconds.
const LATENCY_NS_STEP: u64 = 500;

/// Why the client could not measure at all.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The system refused something.
    #[error("the client cannot {what}: {source}")]
    System {
        /// What, as a verb.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// TLS cannot be set up.
    #[error("the client cannot speak TLS: {0}")]
    Tls(Fault),
}

fn system(what: &'static str) -> impl Fn(rustix::io::Errno) -> ClientError {
    move |errno| ClientError::System {
        what,
        source: errno.into(),
    }
}

/// Measures what `plan` says.
///
/// # Errors
/// When the system gives no memory or event queue; failing exchanges are counted instead.
pub fn measure(plan: &Plan) -> Result<Sample, ClientError> {
    let mut crowd = Crowd::new(plan)?;
    crowd.run(Duration::from_millis(plan.warm_up_ms))?;
    let warm_up = crowd.begin_counting();
    let (before, began) = (processor_time(&plan.watched), Instant::now());
    crowd.run(Duration::from_millis(plan.measured_ms))?;
    let (elapsed, after) = (began.elapsed(), processor_time(&plan.watched));
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    Ok(Sample {
        requests: crowd.latencies.len(),
        errors: crowd.errors + warm_up,
        first_error: crowd.first_error.take(),
        elapsed_ns: nanoseconds(elapsed),
        processor_ns: nanoseconds(after.saturating_sub(before)),
        p50_ns: crowd.latencies.value_at_quantile(0.5),
        p99_ns: crowd.latencies.value_at_quantile(0.99),
    })
}

/// Opens the plan's connections, has each do one exchange, and returns with all of them open and idle; they close
/// when the value is dropped.
///
/// # Errors
/// As [`measure`].
pub fn hold(plan: &Plan, at_once: usize) -> Result<(Held, Opened), ClientError> {
    let mut crowd = Crowd::new(plan)?;
    crowd.open_all(at_once)?;
    let opened = Opened {
        errors: crowd.errors,
        first_error: crowd.first_error.take(),
    };
    Ok((Held { _crowd: crowd }, opened))
}

/// Idle connections.
#[derive(Debug)]
pub struct Held {
    _crowd: Crowd,
}

#[derive(Debug)]
struct Crowd {
    askers: Vec<Asker>,
    script: Script,
    plan: Plan,
    tls: Option<Arc<ClientConfig>>,
    content: Content,
    queue: rustix::fd::OwnedFd,
    buffer: Vec<u8>,
    latencies: Histogram<u64>,
    errors: u64,
    first_error: Option<String>,
    busy: usize,
}

impl Crowd {
    fn new(plan: &Plan) -> Result<Self, ClientError> {
        let tls = match plan.transport {
            Transport::Clear => None,
            Transport::Tls => Some(tls_config().map_err(ClientError::Tls)?),
        };
        let latencies =
            Histogram::new_with_bounds(LATENCY_NS_STEP, LATENCY_NS_MAX, 3).map_err(|error| {
                ClientError::System {
                    what: "keep latencies",
                    source: io::Error::other(error),
                }
            })?;
        let now = Instant::now();
        Ok(Self {
            askers: (0..plan.connections).map(|_| Asker::new(now)).collect(),
            script: Script::of(plan.exchange),
            plan: plan.clone(),
            tls,
            content: Content::default(),
            queue: epoll::create(CreateFlags::CLOEXEC).map_err(system("make an event queue"))?,
            buffer: vec![0; BUFFER_BYTES],
            latencies,
            errors: 0,
            first_error: None,
            busy: 0,
        })
    }

    /// Forgets the latencies so far, and gives the number of errors so far.
    fn begin_counting(&mut self) -> u64 {
        self.latencies.reset();
        std::mem::take(&mut self.errors)
    }

    /// Load for `length`, and then the wait for what is still out.
    fn run(&mut self, length: Duration) -> Result<(), ClientError> {
        let end = Instant::now() + length;
        for number in 0..self.askers.len() {
            self.begin(number);
        }
        self.serve(
            end,
            end + Duration::from_secs(DRAIN_S),
            |crowd, number, now| {
                if now < end && crowd.errors < ERRORS_MAX {
                    crowd.begin(number);
                }
            },
        )
    }

    fn open_all(&mut self, at_once: usize) -> Result<(), ClientError> {
        let mut next = at_once.min(self.askers.len());
        for number in 0..next {
            self.begin(number);
        }
        let limit = Instant::now() + Duration::from_secs(DRAIN_S * 3);
        self.serve(limit, limit, |crowd, _, _| {
            if next < crowd.askers.len() && crowd.errors < ERRORS_MAX {
                crowd.begin(next);
                next += 1;
            }
        })
    }

    /// Takes events until nothing is out any more; what is still out at `limit` is late.
    fn serve(
        &mut self,
        end: Instant,
        limit: Instant,
        mut over: impl FnMut(&mut Self, usize, Instant),
    ) -> Result<(), ClientError> {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        while self.busy > 0 {
            let now = Instant::now();
            if now >= limit {
                self.give_up();
                break;
            }
            let until = if now < end { end } else { limit };
            let wait = Timespec::try_from(until - now).unwrap_or(Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            });
            events.clear();
            match epoll::wait(
                &self.queue,
                rustix::buffer::spare_capacity(&mut events),
                Some(&wait),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(system("wait for events")(errno)),
            }
            for event in &events {
                let number = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
                self.advance(number, &mut over);
            }
        }
        Ok(())
    }

    fn begin(&mut self, number: usize) {
        let (queue, address, tls) = (&self.queue, self.plan.address, self.tls.as_ref());
        self.busy += 1;
        let begun = self.askers[number].begin(Instant::now(), &self.script, || {
            let channel = Channel::open(address, tls)?;
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            epoll::add(
                queue,
                channel.stream(),
                EventData::new_u64(number as u64),
                flags,
            )
            .map_err(io::Error::from)?;
            Ok(channel)
        });
        // Whatever comes back does so as an event, so nothing is read in vain here.
        let pushed = begun.and_then(|()| self.askers[number].push(&self.script, &self.content));
        if let Err(fault) = pushed {
            self.failed(number, &fault);
        }
    }

    fn answered(&mut self, number: usize, now: Instant) {
        let took = now.duration_since(self.askers[number].began).as_nanos();
        self.latencies
            .saturating_record(u64::try_from(took).unwrap_or(LATENCY_NS_MAX));
        if self.script.connection == Connection::Kept {
            self.busy -= 1;
        }
    }

    fn failed(&mut self, number: usize, fault: &Fault) {
        self.askers[number].close();
        self.busy -= 1;
        self.errors += 1;
        self.first_error.get_or_insert_with(|| fault.to_string());
    }

    fn give_up(&mut self) {
        for number in 0..self.askers.len() {
            if self.askers[number].is_busy() {
                self.failed(number, &Fault::Late);
            }
        }
    }

    fn advance(&mut self, number: usize, over: &mut impl FnMut(&mut Self, usize, Instant)) {
        if !self.askers.get(number).is_some_and(Asker::is_busy) {
            return;
        }
        loop {
            match self.askers[number].advance(&self.script, &self.content, &mut self.buffer) {
                Ok(Step::Waiting) => return,
                Ok(Step::Answered) => {
                    let now = Instant::now();
                    self.answered(number, now);
                    if self.script.connection == Connection::Kept {
                        over(self, number, now);
                        return;
                    }
                }
                Ok(Step::Left) => {
                    self.busy -= 1;
                    over(self, number, Instant::now());
                    return;
                }
                Err(fault) => {
                    self.failed(number, &fault);
                    over(self, number, Instant::now());
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener};
    use std::thread;

    use super::*;
    use crate::bench::origin::Origin;
    use crate::bench::plan::Exchange;

    fn plan(address: SocketAddr, exchange: Exchange) -> Plan {
        Plan {
            address,
            transport: Transport::Clear,
            exchange,
            connections: 4,
            warm_up_ms: 1,
            measured_ms: 10,
            watched: vec![std::process::id()],
        }
    }

    /// A server that gives each connection `answer` and closes it.
    fn server(answer: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(answer);
            }
        });
        address
    }

    #[test]
    fn every_exchange_with_the_origin_ends_well() {
        let origin = Origin::bind().unwrap();
        let addresses = origin.addresses;
        thread::spawn(move || origin.serve());
        let (kept, fresh) = (Connection::Kept, Connection::Fresh);
        let get = |bytes, connection| Exchange::Get { bytes, connection };
        let raw = |bytes, connection| Exchange::Raw { bytes, connection };
        for (address, exchange) in [
            (addresses.http, get(64, kept)),
            (addresses.http, get(64, fresh)),
            (addresses.http, get(3 << 20, kept)),
            (addresses.http, Exchange::Post { bytes: 1024 }),
            (addresses.http, Exchange::Post { bytes: 3 << 20 }),
            (addresses.http, Exchange::Echo { bytes: 64 }),
            (addresses.raw, raw(3 << 20, kept)),
            (addresses.raw, raw(64, fresh)),
        ] {
            let sample = measure(&plan(address, exchange)).unwrap();
            assert_eq!(
                (sample.errors, sample.first_error),
                (0, None),
                "{exchange:?}"
            );
            assert!(sample.requests >= 4, "{exchange:?}");
            assert!(sample.processor_ns > 0 && sample.p50_ns <= sample.p99_ns);
        }
    }

    #[test]
    fn held_connections_are_open_and_had_an_answer() {
        let origin = Origin::bind().unwrap();
        let get = Exchange::Get {
            bytes: 64,
            connection: Connection::Kept,
        };
        let plan = plan(origin.addresses.http, get);
        thread::spawn(move || origin.serve());
        let (held, opened) = hold(&plan, 2).unwrap();
        assert_eq!((opened.errors, opened.first_error), (0, None));
        assert_eq!(held._crowd.latencies.len(), 4);
    }

    #[test]
    fn what_is_not_the_right_answer_is_an_error_with_its_reason() {
        let get = Exchange::Get {
            bytes: 5,
            connection: Connection::Kept,
        };
        for (answer, why) in [
            (
                &b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"[..],
                "status 503",
            ),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel",
                "closed in the middle of an exchange",
            ),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhell",
                "an answer of the wrong length",
            ),
        ] {
            let sample = measure(&plan(server(answer), get)).unwrap();
            assert_eq!(sample.requests, 0);
            assert!(sample.errors >= 4, "{sample:?}");
            assert_eq!(sample.first_error.as_deref(), Some(why));
        }
    }
}
