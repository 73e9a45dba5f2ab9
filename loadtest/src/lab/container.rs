//! The lab's containers: their bundles, their configuration, and the few runc commands the lab itself gives.
//!
//! The lab starts them at the source and reads from them; everything else is the agents' work.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use serde_json::{Value, json};

use crate::command::{CommandError, SYSTEM_PATH, Shell};
use crate::lab::app::ContainerKind;
use crate::lab::error::{LabError, OnFile, Result};
use crate::lab::netns::Names;

/// What a database and a web server run as root need, and no more.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// The containers of one site of one run.
#[derive(Debug, Clone)]
pub struct Runtime {
    run: PathBuf,
    site: &'static str,
    names: Names,
}

impl Runtime {
    /// The containers of `site` in the run directory `run`.
    #[must_use]
    pub const fn new(run: PathBuf, site: &'static str, names: Names) -> Self {
        Self { run, site, names }
    }

    fn runc(&self) -> Shell {
        let path = format!("{}:{SYSTEM_PATH}", self.run.join("bin").display());
        Shell::new("runc")
            .path(path)
            .arg("--root")
            .arg(self.run.join(self.site).join("runc"))
    }

    /// Makes the bundle: folders for the overlay and its mount, and `config.json`. Starts and mounts nothing.
    /// `arguments` are added to those of its first process.
    ///
    /// # Errors
    /// When a file cannot be made or runc does not print its default configuration.
    pub fn prepare(&self, kind: ContainerKind, arguments: &[String]) -> Result<()> {
        let bundle = kind.bundle(&self.run, self.site);
        for folder in ["rootfs", "upper", "work"] {
            let path = bundle.join(folder);
            fs::create_dir_all(&path).on("create", &path)?;
        }
        if kind.volume().is_some() {
            let volume = self.volume(kind);
            fs::create_dir_all(&volume).on("create", &volume)?;
        }
        self.runc().arg("spec").arg("--bundle").arg(&bundle).run()?;
        let path = bundle.join("config.json");
        let text = fs::read_to_string(&path).on("read", &path)?;
        let parsed = serde_json::from_str(&text);
        let mut config: Value = parsed.map_err(|error| LabError::Output {
            program: "runc spec",
            what: error.to_string(),
        })?;
        self.configure(kind, &mut config);
        if let Some(all) = config["process"]["args"].as_array_mut() {
            all.extend(arguments.iter().map(|argument| json!(argument)));
        }
        fs::write(&path, config.to_string()).on("write", &path)
    }

    /// The volume's folder outside.
    #[must_use]
    pub fn volume(&self, kind: ContainerKind) -> PathBuf {
        self.run.join(self.site).join("volumes").join(kind.name())
    }

    fn configure(&self, kind: ContainerKind, config: &mut Value) {
        let process = &mut config["process"];
        process["terminal"] = json!(false);
        process["args"] = json!(kind.args());
        process["env"] = json!([format!("PATH={SYSTEM_PATH}"), "TERM=dumb"]);
        process["rlimits"] = json!([]);
        process["noNewPrivileges"] = json!(false);
        process["capabilities"] = json!({});
        for set in ["bounding", "effective", "permitted"] {
            process["capabilities"][set] = json!(CAPABILITIES);
        }
        config["root"]["readonly"] = json!(false);
        config["hostname"] = json!(kind.name());
        let name = format!("{}-{}", self.site, kind.name());
        // Two sites on one machine: the same container must not meet itself in one cgroup.
        config["linux"]["cgroupsPath"] = json!(format!("/{}", self.names.name(&name)));
        let network = self.names.path(&name);
        if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
            for namespace in namespaces
                .iter_mut()
                .filter(|namespace| namespace["type"] == "network")
            {
                namespace["path"] = json!(network);
            }
        }
        if let (Some(inside), Some(mounts)) = (kind.volume(), config["mounts"].as_array_mut()) {
            let source = self.volume(kind);
            mounts.push(json!({"destination": inside, "type": "bind", "source": source, "options": ["rbind", "rw"]}));
        }
    }

    /// Mounts the container's root file system: the cached image below, an empty layer above.
    ///
    /// # Errors
    /// When the kernel refuses the mount.
    pub fn mount(&self, kind: ContainerKind) -> Result<()> {
        let bundle = kind.bundle(&self.run, self.site);
        let lower = self.run.join("images").join(kind.name());
        let lower = fs::canonicalize(&lower).on("find", &lower)?;
        let layers = [
            ("lowerdir", lower),
            ("upperdir", bundle.join("upper")),
            ("workdir", bundle.join("work")),
        ];
        let options = layers
            .map(|(name, path)| format!("{name}={}", path.display()))
            .join(",");
        let options = std::ffi::CString::new(options).unwrap_or_default();
        let rootfs = bundle.join("rootfs");
        mount(
            "overlay",
            &rootfs,
            "overlay",
            MountFlags::empty(),
            options.as_c_str(),
        )
        .on("mount", &rootfs)
    }

    /// Starts it, detached, with /dev/null as its input and output: a terminal or a file of ours outside its
    /// root would make its checkpoint fail.
    ///
    /// # Errors
    /// When runc cannot start it; its log says why.
    pub fn start(&self, kind: ContainerKind) -> Result<()> {
        let log = self
            .run
            .join(format!("runc-{}-{}.log", self.site, kind.name()));
        let shell = self
            .runc()
            .arg("--log")
            .arg(&log)
            .args(["run", "--detach", "--bundle"]);
        let shell = shell
            .arg(kind.bundle(&self.run, self.site))
            .arg(kind.name());
        let line = shell.line();
        let mut command = shell.prepare();
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let status = command.status().map_err(|source| CommandError::Start {
            line: line.clone(),
            source,
        })?;
        if status.success() {
            return Ok(());
        }
        let said = fs::read_to_string(&log)
            .unwrap_or_default()
            .trim()
            .to_owned();
        Err(CommandError::Failed { line, status, said }.into())
    }

    /// Runs a program inside and gives its output.
    ///
    /// # Errors
    /// When it fails, or the container does not run.
    pub fn exec(&self, kind: ContainerKind, args: &[&str]) -> Result<String> {
        Ok(self.exec_shell(kind, args).run()?)
    }

    /// The command that runs a program inside.
    #[must_use]
    pub fn exec_shell(&self, kind: ContainerKind, args: &[&str]) -> Shell {
        self.runc().args(["exec", kind.name()]).args(args)
    }

    /// The run directory.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.run
    }

    /// Asks its first process to end and waits until the container has stopped.
    ///
    /// # Errors
    /// When it does not stop in time.
    pub fn stop(&self, kind: ContainerKind, limit: Duration) -> Result<()> {
        self.runc().args(["kill", kind.name(), "TERM"]).run()?;
        if crate::interrupt::wait_until(limit, || self.status(kind).as_deref() == Some("stopped")) {
            return Ok(());
        }
        let what = format!("the end of container {}", kind.name());
        Err(LabError::NotInTime {
            what,
            seconds: limit.as_secs(),
            hint: String::new(),
        })
    }

    /// What runc says of it: `running`, `paused`, `stopped`; nothing when it does not know it.
    #[must_use]
    pub fn status(&self, kind: ContainerKind) -> Option<String> {
        let printed = self.runc().args(["state", kind.name()]).run().ok()?;
        let state: Value = serde_json::from_str(&printed).ok()?;
        Some(state["status"].as_str()?.to_owned())
    }

    /// The first process of the container, as seen from outside.
    #[must_use]
    pub fn pid(&self, kind: ContainerKind) -> Option<i32> {
        let printed = self.runc().args(["state", kind.name()]).run().ok()?;
        let state: Value = serde_json::from_str(&printed).ok()?;
        i32::try_from(state["pid"].as_i64()?)
            .ok()
            .filter(|pid| *pid > 0)
    }

    /// Removes it, running or not.
    pub fn delete(&self, kind: ContainerKind) {
        // Most of the time there is nothing left to delete, which runc calls an error.
        let _ = self
            .runc()
            .args(["delete", "--force", kind.name()])
            .within(Duration::from_secs(10))
            .run();
    }
}

/// Lets every process of a cgroup run again, on either cgroup version, so that it can be killed.
pub fn thaw(cgroup: &str) {
    let places = [
        ("freezer/", "freezer.state", "THAWED"),
        ("unified/", "cgroup.freeze", "0"),
        ("", "cgroup.freeze", "0"),
    ];
    for (hierarchy, file, word) in places {
        let path = Path::new("/sys/fs/cgroup").join(format!("{hierarchy}{cgroup}/{file}"));
        if path.exists() {
            // Gone between the look and the write: nothing is frozen then.
            let _ = fs::write(path, word);
        }
    }
}
