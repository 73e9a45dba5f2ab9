//! Spans of requests, as a collector and the upstream see them: one trace, one span of ours, known to both.

#[cfg(not(feature = "otel"))]
#[test]
fn a_build_without_spans_refuses_to_be_asked_for_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("proxy.toml");
    let text = "state_dir = \"s\"\ncontrol = \"c\"\n[traces]\nendpoint = \"http://127.0.0.1:4318/v1/traces\"\n\
                [[service]]\nname = \"web\"\nlisten = \"127.0.0.1:0\"\nsource = \"127.0.0.1:1\"\ntarget = \"127.0.0.1:1\"\n";
    std::fs::write(&path, text).unwrap();
    let error = hopgate_proxy::config::Config::load(&path).unwrap_err();
    let said = "[traces] needs a hopgate-proxy with the feature \"otel\"; build it with --features otel, or leave the table out";
    assert_eq!(error.to_string(), format!("{}: {said}", path.display()));
}

#[cfg(feature = "otel")]
mod exported {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener};
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, sync_channel};
    use std::thread;

    use http::Request;
    use rustls::{ServerConnection, StreamOwned};

    use crate::client2::Client2;
    use crate::process::Running;
    use crate::tls::Authority;
    use crate::world::{Message, Nobody, PATIENCE, Peer, Plan, Stage, World};

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

    fn world(stage: &Stage, collector: SocketAddr) -> World {
        Plan::new(stage.address(), stage.address())
            .table(&format!(
                "[traces]\nendpoint = \"http://{collector}/v1/traces\"\nservice_name = \"edge\""
            ))
            .service("[[service.route]]\nname = \"api\"\npath_prefix = \"/api\"")
            .start()
    }

    fn bytes(digits: &str) -> Vec<u8> {
        let pairs = digits.as_bytes().chunks(2);
        pairs
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    fn holds(body: &[u8], part: impl AsRef<[u8]>) -> bool {
        let part = part.as_ref();
        body.windows(part.len()).any(|window| window == part)
    }

    /// Trace id, span id and flags that the upstream was told.
    fn told(request: &Message) -> (String, String, String) {
        let told = request.field("traceparent").unwrap();
        let parts: Vec<String> = told.split('-').map(str::to_owned).collect();
        assert_eq!(parts[0], "00");
        (parts[1].clone(), parts[2].clone(), parts[3].clone())
    }

    /// Stops the proxy, which sends what is left, and reads that as a collector does.
    fn collected(mut world: World, collector: &Stage) -> Vec<u8> {
        let proxy = world.proxy.take().unwrap();
        let stopping = thread::spawn(move || proxy.stop(PATIENCE));
        let mut exporter = collector.accept();
        let mut body = Vec::new();
        // Spans that took longer than others may come in a batch of their own.
        while !exporter.is_closed() {
            let head = exporter.head();
            assert_eq!(head.first_line, "POST /v1/traces HTTP/1.1");
            assert_eq!(head.field("content-type"), Some("application/x-protobuf"));
            let length = head.field("content-length").unwrap().parse().unwrap();
            body.extend(exporter.bytes(length));
            exporter.send(OK);
        }
        stopping.join().unwrap();
        body
    }

    fn answer(stage: &Stage) -> Message {
        let mut upstream = stage.accept();
        let request = upstream.message();
        upstream.send(
            "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        );
        request
    }

    #[test]
    fn a_request_has_one_span_in_the_trace_it_came_with_and_the_upstream_is_told_its_id() {
        let (stage, collector) = (Stage::new(), Stage::new());
        let world = world(&stage, collector.address());
        let caller = "00f067aa0ba902b7";
        let mut client = world.client();
        client.send(format!(
            "GET /api/x?secret HTTP/1.1\r\nHost: h\r\ntraceparent: 00-{TRACE}-{caller}-01\r\ntracestate: a=b\r\n\r\n"
        ));
        let request = answer(&stage);
        assert_eq!(client.message().status(), 503);
        let (trace, span, flags) = told(&request);
        assert_eq!((trace.as_str(), flags.as_str()), (TRACE, "01"));
        assert_ne!(span, caller);
        assert_eq!(request.field("tracestate"), Some("a=b"));

        let mut client2 = Client2::connect(world.address());
        let begun = Request::builder().uri("http://h/begins");
        let stream = client2.send(begun.body(()).unwrap(), true);
        let (new_trace, new_span, _) = told(&answer(&stage));
        assert_eq!(client2.answer(stream).status, 503);
        assert_ne!(new_trace, TRACE);
        drop((client, client2));

        let body = collected(world, &collector);
        for id in [TRACE, &span, caller, &new_trace, &new_span] {
            assert!(holds(&body, bytes(id)), "{id}");
        }
        for text in [
            "service.name",
            "edge",
            "GET api",
            "http.response.status_code",
            "/api/x",
            "/begins",
            "hopgate.epoch",
            "source",
        ] {
            assert!(holds(&body, text), "{text}");
        }
        assert!(!holds(&body, "secret"));
    }

    #[test]
    fn a_trace_that_nobody_records_goes_on_with_our_span_and_is_not_exported() {
        let (stage, collector) = (Stage::new(), Stage::new());
        let world = world(&stage, collector.address());
        for (trace, flags) in [(TRACE, "00"), ("5bf92f3577b34da6a3ce929d0e0e4736", "01")] {
            let mut client = world.client();
            client.send(format!(
                "GET / HTTP/1.1\r\nHost: h\r\ntraceparent: 00-{trace}-00f067aa0ba902b7-{flags}\r\n\r\n"
            ));
            let (told, _, said) = told(&answer(&stage));
            assert_eq!((told.as_str(), said.as_str()), (trace, flags));
            client.message();
        }
        let body = collected(world, &collector);
        assert!(!holds(&body, bytes(TRACE)));
        assert!(holds(&body, bytes("5bf92f3577b34da6a3ce929d0e0e4736")));
    }

    #[test]
    fn a_collector_that_is_not_there_delays_nobody() {
        let (stage, nobody) = (Stage::new(), Nobody::new());
        let mut world = world(&stage, nobody.address());
        let mut client: Peer = world.client();
        client.get("/");
        answer(&stage);
        assert_eq!(client.message().status(), 503);
        drop(client);
        world.proxy.take().unwrap().stop(PATIENCE);
    }

    /// A collector behind TLS; what it is told comes out at the other end.
    fn secure_collector(authority: &Authority) -> (SocketAddr, Receiver<Vec<u8>>) {
        let config = authority.server(&["127.0.0.1"]);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (told, heard) = sync_channel(8);
        thread::spawn(move || {
            for socket in listener.incoming() {
                let session = ServerConnection::new(Arc::clone(&config)).unwrap();
                let mut stream = StreamOwned::new(session, socket.unwrap());
                let (mut said, mut bytes) = (Vec::new(), [0; 4096]);
                // All of it, as soon as nothing of a trace is missing; or why there is nothing.
                let ended = loop {
                    match stream.read(&mut bytes) {
                        Ok(0) => break Vec::new(),
                        Ok(count) => said.extend_from_slice(&bytes[..count]),
                        Err(error) => break error.to_string().into_bytes(),
                    }
                    if holds(&said, "service.name") && holds(&said, "hopgate.epoch") {
                        break said;
                    }
                };
                stream.write_all(OK.as_bytes()).ok();
                if told.send(ended).is_err() {
                    return;
                }
            }
        });
        (address, heard)
    }

    #[test]
    fn a_collector_behind_tls_is_verified_by_the_authorities_of_the_system() {
        let (authority, other) = (Authority::new(), Authority::new());
        for (trusted, is_told) in [(&authority, true), (&other, false)] {
            let stage = Stage::new();
            let (collector, heard) = secure_collector(&authority);
            let folder = tempfile::tempdir().unwrap();
            let ca = folder.path().join("ca.pem");
            std::fs::write(&ca, trusted.pem()).unwrap();
            Plan::new(stage.address(), stage.address())
                .table(&format!(
                    "[traces]\nendpoint = \"https://{collector}/v1/traces\""
                ))
                .write(&folder);
            let ca = ca.display().to_string();
            let running = Running::start_among(&folder, &[("SSL_CERT_FILE", &ca)]);
            let mut client = Peer::connect(running.address);
            client.get("/seen");
            answer(&stage);
            assert_eq!(client.message().status(), 503);
            let said = heard.recv_timeout(PATIENCE).unwrap();
            assert_eq!(
                holds(&said, "POST /v1/traces"),
                is_told,
                "{}",
                said.escape_ascii()
            );
            assert_eq!(holds(&said, "/seen"), is_told);
        }
    }
}
