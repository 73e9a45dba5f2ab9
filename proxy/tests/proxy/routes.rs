//! Routes, and what upstreams are told about clients, as both ends see it.

use crate::world::{Message, Origin, Plan, Stage, World};

fn staged(service: &str) -> (World, Stage) {
    let stage = Stage::new();
    let world = Plan::new(stage.address(), stage.address())
        .table("[metrics]\nlisten = \"127.0.0.1:0\"")
        .service(service)
        .start();
    (world, stage)
}

/// What the upstream gets of a request, and what the client gets of the answer.
fn passed(service: &str, request: &str, answer: &str) -> (Message, Message) {
    let (world, stage) = staged(service);
    let mut client = world.client();
    client.send(request);
    let mut upstream = stage.accept();
    let got = upstream.message();
    upstream.send(answer);
    (got, client.message())
}

const OK: &str = "HTTP/1.1 200 OK\r\nServer: secret\r\nX-Frame: a\r\nContent-Length: 0\r\n\r\n";

#[test]
fn a_route_changes_header_fields_both_ways_and_the_path() {
    let route = "[[service.route]]\nname = \"api\"\nhost = \"*.example.org\"\npath_prefix = \"/api\"\n\
                 rewrite = { strip_prefix = \"/api\" }\n\
                 request_headers = { set = { \"x-real-ip\" = \"{client}\", \"x-was\" = \"{host}{path}{query} {scheme}\", \"host\" = \"inside\" }, remove = [\"x-debug\"] }\n\
                 response_headers = { set = { \"x-frame\" = \"deny\", \"x-id\" = \"{request_id}\" }, remove = \"server\" }";
    let request = "GET /api/x?y=z HTTP/1.1\r\nHost: A.example.org:80\r\nX-Debug: 1\r\nx_real_ip: forged\r\n\r\n";
    let (got, answer) = passed(route, request, OK);
    assert_eq!(got.first_line, "GET /x?y=z HTTP/1.1");
    assert_eq!(got.field("host"), Some("inside"));
    assert_eq!(got.field("x-real-ip"), Some("127.0.0.1"));
    assert_eq!(got.field("x-was"), Some("A.example.org/api/x?y=z http"));
    assert_eq!(got.field("x-debug"), None);
    assert_eq!(got.field("x_real_ip"), None);
    assert_eq!(answer.field("server"), None);
    assert_eq!(answer.field("x-frame"), Some("deny"));
    assert_eq!(answer.field("x-id"), got.field("x-request-id"));
}

#[test]
fn a_request_without_a_route_is_not_changed() {
    let route = "[[service.route]]\nname = \"api\"\npath_prefix = \"/api\"\nrewrite = { strip_prefix = \"/api\" }\n\
                 response_headers = { remove = \"server\" }";
    let request = "GET /apix//y/../%2F?a HTTP/1.1\r\nHost: h\r\n\r\n";
    let (got, answer) = passed(route, request, OK);
    assert_eq!(got.first_line, "GET /apix//y/../%2F?a HTTP/1.1");
    assert_eq!(answer.field("server"), Some("secret"));
}

#[test]
fn what_is_matched_is_what_is_forwarded() {
    let route = "[[service.route]]\nname = \"user\"\npath_prefix = \"/~user\"\nresponse_headers = { remove = \"server\" }";
    let (got, answer) = passed(
        route,
        "GET /%7euser/caf%c3%a9?%7e HTTP/1.1\r\nHost: h\r\n\r\n",
        OK,
    );
    assert_eq!(got.first_line, "GET /~user/caf%C3%A9?%7e HTTP/1.1");
    assert_eq!(answer.field("server"), None);
}

#[test]
fn an_ambiguous_path_reaches_nobody() {
    let origin = Origin::new("source");
    let world = Plan::new(origin.address(), origin.address())
        .service("[[service.route]]\nname = \"admin\"\npath_prefix = \"/admin\"\nrewrite = { strip_prefix = \"/admin\" }")
        .start();
    let mut client = world.client();
    for path in [
        "/x/../admin",
        "//admin",
        "/admin/%2e%2e%2fx",
        "/%2e/admin",
        "/admin/..%5cadmin",
        "/%00",
    ] {
        let answer = client.get(path).message();
        assert_eq!(answer.status(), 400, "{path}");
        assert!(
            answer.body.starts_with("Bad Request: the request has a"),
            "{path}: {}",
            answer.body
        );
    }
    assert_eq!(client.get("/admin/x").message().body, "source GET /x");
    assert_eq!(origin.seen(), ["GET /x"]);
}

#[test]
fn a_redirect_is_answered_by_us_also_while_the_service_holds() {
    let origin = Origin::new("source");
    let world = Plan::new(origin.address(), origin.address())
        .service(
            "[[service.route]]\nname = \"secure\"\nheader = { \"x-secure\" = false }\n\
                  redirect = { status = 308, to = \"https://{host}{path}{query}\" }\n\
                  response_headers = { set = { \"x-why\" = \"clear\" } }",
        )
        .start();
    world.hold();
    let mut client = world.client();
    for method in ["GET", "HEAD"] {
        client.send(format!(
            "{method} /a%20b?c=\"d HTTP/1.1\r\nHost: example.org:8080\r\n\r\n"
        ));
        let answer = client.message();
        assert_eq!(answer.first_line, "HTTP/1.1 308 Permanent Redirect");
        assert_eq!(
            answer.field("Location"),
            Some("https://example.org/a%20b?c=%22d")
        );
        assert_eq!(answer.field("x-why"), Some("clear"));
    }
    // Nobody knows where this one wants to go.
    client.send("GET / HTTP/1.0\r\n\r\n");
    assert_eq!(client.message().status(), 400);
    assert_eq!(origin.seen(), Vec::<String>::new());
}

#[test]
fn a_route_decides_which_requests_are_sent_again() {
    for (methods, again) in [("[\"PUT\"]", true), ("[\"GET\"]", false)] {
        let route = format!("[[service.route]]\nname = \"all\"\nretry_methods = {methods}");
        let (world, stage) = staged(&route);
        let mut client = world.client();
        client.send("PUT /x HTTP/1.1\r\nHost: h\r\n\r\n");
        let mut upstream = stage.accept();
        upstream.head();
        drop(upstream);
        if again {
            let mut upstream = stage.accept();
            assert_eq!(upstream.message().first_line, "PUT /x HTTP/1.1");
            drop(upstream);
        }
        // Never a third time.
        assert_eq!(client.message().status(), 502, "{methods}");
        assert!(stage.is_deserted(), "{methods}");
    }
}

#[test]
fn only_a_trusted_peer_speaks_for_its_clients() {
    let request = "GET / HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\n\
                   X-Request-Id: theirs\r\nForwarded: for=192.0.2.1\r\nX_Forwarded_For: 192.0.2.9\r\n\r\n";
    let (got, _) = passed("trusted_from = [\"127.0.0.0/8\"]", request, OK);
    assert_eq!(got.field("x-forwarded-for"), Some("192.0.2.1, 127.0.0.1"));
    assert_eq!(got.field("x-forwarded-proto"), Some("https"));
    assert_eq!(got.field("x-request-id"), Some("theirs"));
    assert_eq!(
        got.field("forwarded"),
        Some("for=192.0.2.1, for=127.0.0.1;proto=http;host=\"h\"")
    );
    assert_eq!(got.field("x_forwarded_for"), None);
    let (got, _) = passed("trusted_from = [\"10.0.0.0/8\", \"::1\"]", request, OK);
    assert_eq!(got.field("x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(got.field("x-forwarded-proto"), Some("http"));
    assert_ne!(got.field("x-request-id"), Some("theirs"));
    assert_eq!(
        got.field("forwarded"),
        Some("for=127.0.0.1;proto=http;host=\"h\"")
    );
    assert_eq!(got.field("x_forwarded_for"), None);
}

#[test]
fn a_rate_counts_the_clients_behind_a_trusted_peer_one_by_one() {
    let (world, stage) =
        staged("trusted_from = \"127.0.0.1\"\nrate = { requests_per_s = 0.001, burst = 1 }");
    let mut client = world.client();
    let from =
        |address: &str| format!("GET / HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: {address}\r\n\r\n");
    client.send(from("192.0.2.1"));
    let mut upstream = stage.accept();
    for next in ["192.0.2.2", "192.0.2.3"] {
        upstream.message();
        upstream.send(OK);
        assert_eq!(client.message().status(), 200);
        client.send(from(next));
    }
    upstream.message();
    upstream.send(OK);
    assert_eq!(client.message().status(), 200);
    assert_eq!(client.send(from("192.0.2.1")).message().status(), 429);
}

#[test]
fn a_route_has_servers_of_its_own_at_each_site_and_moves_with_the_service() {
    let [source, target] = ["source", "target"].map(Origin::new);
    let [api_source, api_target] = ["api-source", "api-target"].map(Origin::new);
    let world = Plan::new(source.address(), target.address())
        .service(&format!(
            "[[service.route]]\nname = \"api\"\npath_prefix = \"/api\"\nsource = \"{}\"\ntarget = \"{}\"",
            api_source.address(),
            api_target.address()
        ))
        .start();
    let mut client = world.client();
    assert_eq!(client.get("/api").message().body, "api-source GET /api");
    assert_eq!(client.get("/").message().body, "source GET /");
    world.hold();
    world.move_to(cutover_protocol::id::Site::Target);
    assert_eq!(client.get("/api").message().body, "api-target GET /api");
    assert_eq!(client.get("/").message().body, "target GET /");
    assert_eq!((source.seen().len(), api_source.seen().len()), (1, 1));
}
