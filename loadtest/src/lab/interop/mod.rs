//! Clients and servers of other makers through one real proxy: each test starts what it talks to, lets a client do
//! what its users do, and compares what came of it word for word. Nothing here knows how the proxy works inside.

mod changes;
mod clients;
mod database;
mod load;
mod python;
mod stage;

use std::path::PathBuf;

use crate::interrupt;
use crate::lab::error::{LabError, Result};
use crate::lab::folders::Folders;
use crate::lab::packages::{self, Need};
use crate::lab::programs;
use crate::progress::Progress;
use stage::Stage;

/// How often the proxy is changed under load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// Reloads of its configuration, one a second.
    pub reloads: u32,
    /// Upgrades of its program.
    pub upgrades: u32,
}

impl Times {
    /// Enough to see that it works.
    pub const FEW: Self = Self {
        reloads: 10,
        upgrades: 3,
    };
    /// As often as the product promises.
    pub const FULL: Self = Self {
        reloads: 60,
        upgrades: 10,
    };
}

/// One test, its name as a sentence.
struct Case {
    name: &'static str,
    run: fn(&mut Stage) -> Result<()>,
}

/// All tests, in the order in which they run.
const CASES: &[Case] = &[
    Case {
        name: "curl gets, posts and uploads over HTTP/1 and HTTP/2, clear and TLS",
        run: clients::curl,
    },
    Case {
        name: "h2load loses no request over HTTP/2 and HTTP/1, clear and TLS",
        run: clients::loads,
    },
    Case {
        name: "wrk, ab and siege find no error",
        run: clients::generators,
    },
    Case {
        name: "WebSockets talk over HTTP/1 and HTTP/2, clear and TLS",
        run: python::websockets,
    },
    Case {
        name: "a browser's kind of HTTP/3 client gets, posts and asks for much at once",
        run: python::http3,
    },
    Case {
        name: "gRPC talks in every manner, with trailers, errors and deadlines, clear and TLS",
        run: python::grpc,
    },
    Case {
        name: "the mariadb client talks to its server through raw TCP",
        run: database::talk,
    },
    Case {
        name: "a reload a second under load fails no request",
        run: changes::reloads,
    },
    Case {
        name: "upgrades of the program under load fail no request",
        run: changes::upgrades,
    },
];

const CLIENTS: &[Need] = &[
    need("curl", "curl", "asks over HTTP/1 and HTTP/2"),
    need("h2load", "nghttp2-client", "asks much over HTTP/2"),
    need("wrk", "wrk", "asks much over HTTP/1"),
    need("ab", "apache2-utils", "asks much over HTTP/1.0"),
    need("siege", "siege", "asks much from many"),
    need("mariadb", "mariadb-client", "talks to a database"),
    need("mariadbd", "mariadb-server-core", "is that database"),
    need(
        "python3",
        "python3",
        "runs clients from its package registry",
    ),
];

const fn need(program: &'static str, package: &'static str, why: &'static str) -> Need {
    Need {
        program,
        package,
        why,
    }
}

/// How the cases are to be played.
#[derive(Debug, Clone)]
pub struct Wish {
    /// How often the proxy is changed under load.
    pub times: Times,
    /// The program `hopgate-proxy`; without it one is built from this checkout.
    pub hopgate: Option<PathBuf>,
}

/// Plays the wanted cases, all on one stage, and hands each outcome to `count`.
///
/// # Errors
/// When the lab was interrupted.
pub fn run(
    wish: &Wish,
    wanted: impl Fn(&str) -> bool,
    folders: &Folders,
    progress: &Progress,
    mut count: impl FnMut(&str, std::result::Result<(), String>),
) -> Result<()> {
    let cases: Vec<&Case> = CASES.iter().filter(|case| wanted(case.name)).collect();
    if cases.is_empty() {
        return Ok(());
    }
    let mut stage = match set(wish, folders, progress) {
        Ok(stage) => stage,
        Err(error) => {
            count(
                "the stage of the interoperability tests",
                Err(error.to_string()),
            );
            return Ok(());
        }
    };
    for case in cases {
        if interrupt::requested() {
            return Err(LabError::Interrupted);
        }
        progress.say(format!("other makers' clients: {}", case.name));
        let outcome = (case.run)(&mut stage).and_then(|()| stage.lives());
        count(case.name, outcome.map_err(|error| error.to_string()));
    }
    Ok(())
}

/// Installs what is missing, and starts the proxy with what is behind it.
fn set(wish: &Wish, folders: &Folders, progress: &Progress) -> Result<Stage> {
    let hopgate = match &wish.hopgate {
        Some(program) => program.clone(),
        None => programs::proxy(folders, progress)?,
    };
    let environment = {
        let _lock = folders.lock("install")?;
        packages::install(CLIENTS, progress)?;
        python::environment(folders, progress)?
    };
    Stage::start(&hopgate, environment, wish.times, folders, progress)
}

/// The error of a case: `what` was expected to be `expected`.
fn differs(what: &str, expected: &str, found: &str) -> LabError {
    LabError::Differs {
        what: format!("{what}: expected {expected:?}, found {found:?}"),
    }
}

fn same(what: &str, expected: &str, found: &str) -> Result<()> {
    if expected == found {
        Ok(())
    } else {
        Err(differs(what, expected, found))
    }
}
