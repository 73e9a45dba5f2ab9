//! What CRIU says it can do on this machine.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// `criu check` scans the kernel; seconds are plenty.
const CHECK_MAX: Duration = Duration::from_secs(20);

/// CRIU's version line, or why it does not run.
///
/// # Errors
/// One line for a person.
pub async fn version(criu: &Path) -> Result<String, String> {
    let output = run(criu, &["--version"]).await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .find_map(|line| line.strip_prefix("Version: "))
        .map(str::to_owned)
        .ok_or_else(|| format!("{} --version printed no version", criu.display()))
}

/// True when the kernel tracks dirty pages for CRIU, so that memory can be copied in rounds.
pub async fn tracks_dirty_pages(criu: &Path) -> bool {
    run(criu, &["check", "--feature", "mem_dirty_track"])
        .await
        .is_ok_and(|output| output.status.success())
}

/// Whether CRIU keeps what it finds out about the kernel from one start to the next: only below a `/run` that is empty after
/// a reboot (`kerndat_save_cache` in kerndat.c). `None` when that cannot be told.
#[must_use]
pub fn are_remembered(run: &Path) -> Option<bool> {
    /// TMPFS_MAGIC in linux/magic.h.
    const TMPFS: i64 = 0x0102_1994;
    let found = rustix::fs::statfs(run).ok()?;
    Some(found.f_type == TMPFS)
}

async fn run(criu: &Path, arguments: &[&str]) -> Result<std::process::Output, String> {
    let call = Command::new(criu)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(CHECK_MAX, call).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(error)) => Err(format!("cannot run {}: {error}", criu.display())),
        Err(_) => Err(format!(
            "{} did not answer within {} s",
            criu.display(),
            CHECK_MAX.as_secs()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_can_do_is_remembered_only_where_a_reboot_forgets_it() {
        assert_eq!(are_remembered(Path::new("/proc")), Some(false));
        assert_eq!(are_remembered(Path::new("/there/is/nothing")), None);
    }
}
