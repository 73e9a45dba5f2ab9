//! Programs the benchmark needs: the peers and load generators from Debian, and Hopgate from this checkout.

use crate::command::{Shell, installed};
use crate::lab::error::Result;
use crate::lab::folders::Folders;
use crate::lab::packages::{self, Need};
use crate::progress::Progress;

/// Needed by the comparison.
pub const PEERS: &[Need] = &[
    Need {
        program: "haproxy",
        package: "haproxy",
        why: "is one of the proxies Hopgate is compared with",
    },
    Need {
        program: "nginx",
        package: "nginx",
        why: "is the other",
    },
    Need {
        program: "/usr/lib/nginx/modules/ngx_stream_module.so",
        package: "libnginx-mod-stream",
        why: "lets nginx forward raw TCP",
    },
    Need {
        program: "h2load",
        package: "nghttp2-client",
        why: "makes the load of the HTTP/2 case",
    },
    TASKSET,
];

/// Needed by the soak.
pub const SOAKERS: &[Need] = &[
    Need {
        program: "siege",
        package: "siege",
        why: "makes a part of the mixed load",
    },
    Need {
        program: "wrk",
        package: "wrk",
        why: "makes a part of the mixed load",
    },
    Need {
        program: "ab",
        package: "apache2-utils",
        why: "makes a part of the mixed load",
    },
    TASKSET,
];

const TASKSET: Need = Need {
    program: "taskset",
    package: "util-linux",
    why: "keeps each program on its core",
};

/// Installs what is missing of `needs`. The services Debian starts with the proxies are stopped again: they take ports, and the
/// benchmark starts its own.
///
/// # Errors
/// When something is missing and cannot be installed.
pub fn install(needs: &[Need], folders: &Folders, progress: &Progress) -> Result<()> {
    let _lock = folders.lock("install")?;
    let new: Vec<&str> = ["haproxy", "nginx"]
        .into_iter()
        .filter(|program| !installed(program))
        .collect();
    packages::install(needs, progress)?;
    for service in new.into_iter().filter(|program| installed(program)) {
        stop_service(service, progress);
    }
    Ok(())
}

fn stop_service(service: &str, progress: &Progress) {
    let systemd = std::path::Path::new("/run/systemd/system").is_dir();
    let stopped = if systemd {
        Shell::new("systemctl").args(["disable", "--now", service])
    } else {
        Shell::new("service").args([service, "stop"])
    };
    // Where the package started nothing there is nothing to stop.
    if stopped.succeeds() {
        progress.say(format!("stopped the service {service} of the new package"));
    }
}
