//! The applications the lab can move, and the containers each is made of.

use std::path::Path;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum App {
    /// WordPress (nginx and PHP) and MariaDB, in a container each.
    Wordpress,
    /// A small stateful program of the lab's own.
    Counter,
    /// Four of them.
    Counters,
}

impl App {
    /// The word used on the command line and as a folder of `configs/lab`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wordpress => "wordpress",
            Self::Counter => "counter",
            Self::Counters => "counters",
        }
    }

    /// Its containers, in the order they are started.
    #[must_use]
    pub const fn containers(self) -> &'static [ContainerKind] {
        match self {
            Self::Wordpress => &[ContainerKind::Db, ContainerKind::Web],
            Self::Counter => &[ContainerKind::Counter],
            Self::Counters => &ContainerKind::COUNTERS,
        }
    }

    /// The service clients reach, named after its container.
    #[must_use]
    pub const fn service(self) -> ContainerKind {
        match self {
            Self::Wordpress => ContainerKind::Web,
            Self::Counter | Self::Counters => ContainerKind::Counter,
        }
    }

    /// Where a client posts an id.
    #[must_use]
    pub const fn add_path(self) -> &'static str {
        match self {
            Self::Wordpress => "/add.php",
            Self::Counter | Self::Counters => "/add",
        }
    }

    /// A page a client reads between two ids.
    #[must_use]
    pub const fn page_path(self) -> &'static str {
        match self {
            Self::Wordpress => "/wp-login.php",
            Self::Counter | Self::Counters => "/",
        }
    }
}

/// One container of an application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerKind {
    /// MariaDB.
    Db,
    /// nginx, PHP-FPM, WordPress and a keeper of database connections.
    Web,
    /// The lab's stateful program.
    Counter,
    /// A second one, beside the first.
    Counter2,
    /// A third.
    Counter3,
    /// A fourth.
    Counter4,
}

/// MariaDB as CRIU can dump it: no kernel AIO and no `io_uring`, memory sized for a lab.
const MARIADB: &[&str] = &[
    "mariadbd",
    "--no-defaults",
    "--user=root",
    "--socket=/run/mysqld/mysqld.sock",
    "--pid-file=/run/mysqld/mysqld.pid",
    "--log-error=/run/mysqld/error.log",
    "--bind-address=0.0.0.0",
    "--skip-name-resolve",
    "--skip-log-bin",
    "--innodb-use-native-aio=0",
    "--innodb-buffer-pool-size=24M",
    "--innodb-buffer-pool-size-max=128M",
    "--innodb-log-buffer-size=2M",
    "--aria-pagecache-buffer-size=2M",
    "--key-buffer-size=1M",
    "--innodb-log-file-size=16M",
];

impl ContainerKind {
    /// The lab's stateful program, as often as there can be one.
    pub const COUNTERS: [Self; 4] = [
        Self::Counter,
        Self::Counter2,
        Self::Counter3,
        Self::Counter4,
    ];

    /// Every container there can be, in the order in which they are ended.
    pub const ALL: [Self; 6] = [
        Self::Web,
        Self::Db,
        Self::Counter,
        Self::Counter2,
        Self::Counter3,
        Self::Counter4,
    ];

    /// Whether it is the lab's stateful program.
    #[must_use]
    pub const fn is_counter(self) -> bool {
        !matches!(self, Self::Db | Self::Web)
    }

    /// Its name at both sites.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Db => "db",
            Self::Web => "web",
            Self::Counter => "counter",
            Self::Counter2 => "counter-2",
            Self::Counter3 => "counter-3",
            Self::Counter4 => "counter-4",
        }
    }

    /// The last part of its addresses: 10.44.0.K at both sites, 10.45.SITE.K for the proxy.
    #[must_use]
    pub const fn host(self) -> u8 {
        match self {
            Self::Db => 2,
            Self::Web => 3,
            Self::Counter => 4,
            Self::Counter2 => 5,
            Self::Counter3 => 6,
            Self::Counter4 => 7,
        }
    }

    /// The TCP port it serves.
    #[must_use]
    pub const fn port(self) -> u16 {
        match self {
            Self::Db => 3306,
            Self::Web => 80,
            Self::Counter | Self::Counter2 | Self::Counter3 | Self::Counter4 => 8000,
        }
    }

    /// Its first process.
    #[must_use]
    pub const fn args(self) -> &'static [&'static str] {
        match self {
            Self::Db => MARIADB,
            Self::Web => &["/start.sh"],
            Self::Counter | Self::Counter2 | Self::Counter3 | Self::Counter4 => &[
                "/lab",
                "counter",
                "--listen",
                "0.0.0.0:8000",
                "--file",
                "/data/ids",
            ],
        }
    }

    /// Where its volume is mounted inside, if it has one.
    #[must_use]
    pub const fn volume(self) -> Option<&'static str> {
        match self {
            Self::Db => Some("/var/lib/mysql"),
            Self::Web => None,
            Self::Counter | Self::Counter2 | Self::Counter3 | Self::Counter4 => Some("/data"),
        }
    }

    /// The address the proxy reaches it by at one site (0 source, 1 target).
    #[must_use]
    pub fn address_at(self, site: usize) -> String {
        format!("10.45.{}.{}:{}", site + 1, self.host(), self.port())
    }

    /// The folder of its bundle below `run`.
    #[must_use]
    pub fn bundle(self, run: &Path, site: &str) -> std::path::PathBuf {
        run.join(site).join(self.name())
    }
}
