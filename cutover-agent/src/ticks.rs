//! Times of a process as the kernel tells them, in clock ticks.

/// A clock tick of `/proc/PID/stat`, in microseconds: USER_HZ is 100 wherever Linux runs containers.
pub(crate) const TICK_US: u64 = 10_000;

/// The number at `index` behind the name in the text of `/proc/PID/stat`, counted from 0; field 3 of proc_pid_stat(5) has
/// index 0. The name, in brackets, may hold anything.
pub(crate) fn behind_name(stat: &str, index: usize) -> Option<u64> {
    let rest = stat.rsplit_once(')')?.1;
    rest.split_whitespace().nth(index)?.parse().ok()
}
