//! The cases: what is held, for how long, and which bars Hopgate must meet there. A table and nothing else.

use crate::bench;
use std::time::Duration;

use crate::bench::hold::origin::Spoil;
use crate::bench::hold::plan::Kind;

/// What a case plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Play {
    /// Clients of several kinds, some of which never pause, before, while and after everything is held.
    Mixed,
    /// Clients of one kind that come and ask while the service is held.
    One {
        /// What they speak.
        kind: Kind,
        /// Requests at once on each connection.
        streams: usize,
        /// The most memory that one of them may take, in bytes; where it is zero there is no such bar.
        bytes_max: u32,
    },
    /// Clients of every kind, some of which never pause, with an origin that may do something wrong.
    Every {
        /// What it does wrong.
        spoil: Spoil,
    },
    /// More clients than the target can serve at once, and some that come behind them.
    Capacity,
    /// Clients that leave while they are held.
    Leavers,
    /// Clients that wait, with a request and without, longer than most timeouts.
    Idle,
    /// The proxy dies while it holds, so many times.
    Crash {
        /// How many times.
        times: usize,
    },
    /// The published arrangement beside ours.
    Published,
}

/// One case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Its name on the command line and in the report.
    pub name: &'static str,
    /// What it shows.
    pub title: &'static str,
    /// Clients, or requests where several share a connection.
    pub clients: usize,
    /// How long everything stands still.
    pub freeze: Duration,
    /// What happens.
    pub play: Play,
}

const fn one(
    name: &'static str,
    title: &'static str,
    kind: Kind,
    (clients, streams): (usize, usize),
    bytes_max: u32,
) -> Case {
    Case {
        name,
        title,
        clients,
        freeze: Duration::from_secs(5),
        play: Play::One {
            kind,
            streams,
            bytes_max,
        },
    }
}

/// All cases, in the order in which they run.
pub const CASES: &[Case] = &[
    Case {
        name: "mixed-15k",
        title: "15,000 clients of HTTP/1, TLS and HTTP/2 are held in one process for 20 s",
        clients: 15_000,
        freeze: Duration::from_secs(20),
        play: Play::Mixed,
    },
    one(
        "streams-100k",
        "100,000 requests are held as streams of HTTP/2",
        Kind::H2,
        (100_000, 100),
        2 << 10,
    ),
    one(
        "clear",
        "HTTP/1.1 in clear: what one held request costs",
        Kind::Clear,
        (10_000, 1),
        6 << 10,
    ),
    one(
        "tls",
        "HTTP/1.1 over TLS: what one held request costs",
        Kind::Tls,
        (10_000, 1),
        20 << 10,
    ),
    one(
        "h2-streams",
        "HTTP/2: what one more held stream costs",
        Kind::H2,
        (10_000, 100),
        2 << 10,
    ),
    one(
        "h3",
        "HTTP/3: what one more held stream costs",
        Kind::H3,
        (5_000, 50),
        0,
    ),
    one(
        "tcp",
        "raw TCP, held before anything is connected: what one costs",
        Kind::Tcp,
        (10_000, 1),
        0,
    ),
    one(
        "websocket",
        "handshakes of WebSockets: what one held costs",
        Kind::Websocket,
        (10_000, 1),
        0,
    ),
    Case {
        name: "release",
        title: "15,000 held requests go to an origin that bears 4,000 a second, 80 at once",
        clients: 15_000,
        freeze: Duration::from_secs(3),
        play: Play::Capacity,
    },
    Case {
        name: "leavers",
        title: "clients of each protocol leave while held, half with unread bodies",
        clients: 1_000,
        freeze: Duration::from_secs(1),
        play: Play::Leavers,
    },
    Case {
        name: "idle-90s",
        title: "HTTP/2 and HTTP/3 clients, idle and held, survive 90 s",
        clients: 200,
        freeze: Duration::from_secs(90),
        play: Play::Idle,
    },
    Case {
        name: "kill-9",
        title: "the proxy is killed 20 times while it holds; a supervisor keeps its sockets",
        clients: 200,
        freeze: Duration::from_secs(1),
        play: Play::Crash { times: 20 },
    },
    Case {
        name: "published",
        title: "the published arrangement and Hopgate hold the same writes for 7 s",
        clients: 400,
        freeze: Duration::from_secs(7),
        play: Play::Published,
    },
];

/// A short one for the tests: it proves what it proves on a machine of any speed.
#[must_use]
pub const fn short(spoil: Spoil) -> Case {
    Case {
        name: "short",
        title: "clients of every kind are held for a second",
        clients: 300,
        freeze: Duration::from_millis(match spoil {
            Spoil::Nothing => 1000,
            Spoil::Lose | Spoil::Double => 100,
        }),
        play: Play::Every { spoil },
    }
}

/// The cases that fit one of `filters`, a whole name or a part of several; all without a filter.
///
/// # Errors
/// The first filter that fits none.
pub fn chosen(filters: &[String]) -> Result<Vec<Case>, &str> {
    bench::case::select(CASES, |case| case.name, filters)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(filters: &[&str]) -> Vec<&'static str> {
        let filters: Vec<String> = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let cases = chosen(&filters).unwrap();
        cases.iter().map(|case| case.name).collect()
    }

    #[test]
    fn a_filter_is_a_whole_name_or_a_part_of_several() {
        assert_eq!(names(&[]).len(), CASES.len());
        assert_eq!(names(&["tls"]), ["tls"]);
        assert_eq!(names(&["streams"]), ["streams-100k", "h2-streams"]);
        assert_eq!(chosen(&["nonsense".to_owned()]), Err("nonsense"));
    }
}
