//! Whether those in front of the proxy, and the proxy itself, are patient enough for the stall that is predicted. It
//! warns and never refuses: a prediction is not exact, and who waits how long is for people to weigh.

use cutover_protocol::id::ServiceName;
use cutover_protocol::wire::{Finding, Severity};

use crate::proxy::Proxy;

/// A warning for each service whose clients may not wait so long, and for each of which that is not known.
pub(super) async fn findings(
    proxy: &Proxy,
    services: &[ServiceName],
    stall_ms: u64,
) -> Vec<Finding> {
    let mut messages = Vec::new();
    for service in services {
        match proxy.status(service).await {
            Ok(status) => messages.extend(status.stall_warnings(stall_ms)),
            Err(error) => messages.push(format!(
                "whether clients wait long enough for {service} is not known: {error}"
            )),
        }
    }
    let warning = |message| Finding {
        severity: Severity::Warning,
        message,
    };
    messages.into_iter().map(warning).collect()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;

    /// What a proxy says of its only service.
    const STATUS: &str = concat!(
        r#"{"answer":"status","services":[{"service":"web","register":{"epoch":1,"owner":"source"},"gate":"open","#,
        r#""hold_ms_max":60000,"front_timeout_ms":5000,"in_flight":0,"upstream_connections":0,"held_now":0,"#,
        r#""held":0,"released":0,"gave_up":0,"evicted":0}]}"#,
        "\n"
    );

    #[tokio::test]
    async fn a_stall_that_passes_what_those_in_front_bear_is_a_warning() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let services = ["web".parse().unwrap()];
        let proxy = Proxy::new(&path);
        let unknown = findings(&proxy, &services, 1).await;
        assert!(unknown[0].message.contains("is not known"), "{unknown:?}");

        let listener = UnixListener::bind(&path).unwrap();
        let serve = async {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                assert!(stream.read(&mut [0; 1024]).await.unwrap() > 0);
                stream.write_all(STATUS.as_bytes()).await.unwrap();
            }
        };
        let ask = async {
            assert_eq!(findings(&proxy, &services, 4_000).await, []);
            let found = findings(&proxy, &services, 4_001).await;
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].severity, Severity::Warning);
            let said = &found[0].message;
            assert!(said.contains("0.8 of front_timeout_ms = 5000"), "{said}");
        };
        tokio::select! {
            () = serve => {}
            () = ask => {}
        }
    }
}
