//! Lines about writes and what limits them.

use cutover_protocol::hold::{Command, WriteLimit, WritesStatus};
use cutover_protocol::id::Epoch;
use serde_json::from_str;

use super::{STATUS, assert_line, status, web};

#[test]
fn every_command_about_writes_is_this_line() {
    let admit = Command::Admit {
        service: web(),
        epoch: Epoch(7),
        interval_us: 12_500.try_into().unwrap(),
        delay_ms_max: 2000,
        lease_ms: 10_000,
    };
    let text = r#"{"command":"admit","service":"web","epoch":7,"interval_us":12500,"delay_ms_max":2000,"lease_ms":10000}"#;
    assert_line(&admit, text);
    // No time at all from one to the next is no limit, and has a command of its own.
    from_str::<Command>(&text.replace("12500", "0")).unwrap_err();
    let freely = Command::AdmitFreely {
        service: web(),
        epoch: Epoch(7),
    };
    assert_line(
        &freely,
        r#"{"command":"admit_freely","service":"web","epoch":7}"#,
    );
}

#[test]
fn a_status_tells_of_writes_where_there_were_any() {
    let written = STATUS.replace(r#","evicted":6"#, r#","evicted":6,"writes":{"admitted":9}"#);
    let mut status = status();
    status.writes.admitted = 9;
    assert_line(&status, &written);
    status.writes = WritesStatus {
        admitted: 9,
        delayed: 4,
        delayed_now: 1,
        limit: Some(WriteLimit {
            interval_us: 12_500.try_into().unwrap(),
            delay_ms_max: 2000,
            lease_ms_left: 800,
            holder: Some("hop-1".parse().unwrap()),
        }),
    };
    let limited = written.replace(
        r#"{"admitted":9}"#,
        r#"{"admitted":9,"delayed":4,"delayed_now":1,"limit":{"interval_us":12500,"delay_ms_max":2000,"lease_ms_left":800,"holder":"hop-1"}}"#,
    );
    assert_line(&status, &limited);
}
