//! Which route a request takes, and which requests take none.

use proptest::prelude::*;

use super::condition::{FieldPattern, HostPattern, PathPattern, Wanted};
use super::*;

fn route(name: &str) -> Route {
    Route {
        name: name.to_owned(),
        condition: Condition::default(),
        servers: None,
        redirect: None,
        rewrite: None,
        request_fields: FieldEdits::default(),
        response_fields: FieldEdits::default(),
        retry_methods: None,
        rate: None,
        hold: HoldConfig::default(),
        front_checks: FrontChecks::default(),
        limits: None,
    }
}

fn below(name: &str, prefix: &str) -> Route {
    let mut route = route(name);
    route.condition.path = Some(PathPattern::Prefix(prefix.to_owned()));
    route
}

fn at_host(name: &str, host: &str) -> Route {
    let mut route = route(name);
    route.condition.hosts = vec![HostPattern::parse(host).unwrap()];
    route
}

/// Name of the route for `METHOD host path`, `-` for none, `!` for a refusal.
fn taken(table: &RouteTable, request: &str, fields: &[(&str, &str)]) -> String {
    let fields: Vec<httparse::Header<'_>> = fields
        .iter()
        .map(|(name, value)| httparse::Header {
            name,
            value: value.as_bytes(),
        })
        .collect();
    let fields = &fields[..];
    let [method, host, path] = request.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{request}");
    };
    let found = table.read_path(path).and_then(|path| {
        let view = RequestView {
            method,
            host: bare_host(host.as_bytes()),
            path: &path,
            fields: &fields,
        };
        table
            .find(&view)
            .map(|route| route.map_or("-".to_owned(), |route| route.name.clone()))
    });
    found.unwrap_or_else(|_| "!".to_owned())
}

#[test]
fn the_first_route_whose_conditions_are_met_is_taken() {
    let mut get = below("get", "/api");
    get.condition.methods = vec!["GET".to_owned()];
    let table = RouteTable::new(vec![
        get,
        below("api", "/api"),
        at_host("host", "*.example.org"),
    ]);
    for (request, name) in [
        ("GET h /api/x", "get"),
        ("POST h /api/x", "api"),
        ("get h /api/x", "api"),
        ("GET a.example.org:80 /apix", "host"),
        ("GET example.org /apix", "-"),
    ] {
        assert_eq!(taken(&table, request, &[]), name, "{request}");
    }
}

#[test]
fn header_fields_are_asked_for_by_value_presence_and_absence() {
    let wanting = |name: &str, wanted| {
        let mut route = route(name);
        route.condition.fields = vec![FieldPattern {
            name: "x-beta".to_owned(),
            wanted,
        }];
        route
    };
    let table = RouteTable::new(vec![
        wanting("two", Wanted::Value(b"2".to_vec())),
        wanting("some", Wanted::Present),
        wanting("none", Wanted::Absent),
    ]);
    for (fields, name) in [
        (&[("X-Beta", "2")][..], "two"),
        (&[("X-Beta", "1"), ("x-beta", "2")], "two"),
        (&[("X-Beta", "22")], "some"),
        (&[("X-Alpha", "2")], "none"),
    ] {
        assert_eq!(taken(&table, "GET h /", fields), name, "{fields:?}");
    }
}

#[test]
fn an_ambiguous_path_slips_past_no_rule() {
    let table = RouteTable::new(vec![below("admin", "/admin"), below("api", "/api")]);
    for (path, name) in [
        ("/admin", "admin"),
        ("/%61dmin", "admin"),
        ("/api/../admin", "!"),
        ("/api/%2e%2e/admin", "!"),
        ("/api/..%2fadmin", "!"),
        ("/api/..;/admin", "!"),
        ("/api/..%5cadmin", "!"),
        ("//admin", "!"),
        ("/./admin", "!"),
        ("/x/../admin", "!"),
        ("/admin;x", "!"),
        ("/admin%2fx", "!"),
        ("/%2561dmin", "!"),
        ("/admin/../x", "!"),
        ("/api/queues/%2f/name", "api"),
        ("/api//x", "api"),
        ("/web/2020/https://example.org/", "-"),
        ("/x/../y", "-"),
        ("/../x", "!"),
        ("/%00", "!"),
    ] {
        assert_eq!(taken(&table, &format!("GET h {path}"), &[]), name, "{path}");
    }
}

#[test]
fn a_path_with_two_readings_is_not_rewritten() {
    let mut rewriting = below("api", "/api");
    rewriting.rewrite = Some(Rewrite::Prefix {
        prefix: "/api".to_owned(),
        to: "/tenant".to_owned(),
    });
    let table = RouteTable::new(vec![rewriting]);
    assert_eq!(taken(&table, "GET h /api/x", &[]), "api");
    assert_eq!(taken(&table, "GET h /api/../api/x", &[]), "!");
}

#[test]
fn where_no_rule_looks_at_paths_they_stay_as_they_are() {
    let table = RouteTable::new(vec![at_host("host", "h")]);
    assert_eq!(taken(&table, "GET h /../%zz//x", &[]), "host");
}

#[test]
fn a_tls_name_finds_its_route() {
    let mut database = route("db");
    database.condition.sni = vec![HostPattern::parse("db.example.org").unwrap()];
    let table = RouteTable::new(vec![database]);
    assert!(
        table
            .find_sni("DB.example.org")
            .is_some_and(|route| route.name == "db")
    );
    assert!(table.find_sni("web.example.org").is_none());
}

proptest! {
    /// Whatever the most generous upstream makes of a path, it is below the prefix of the route that was taken, and
    /// below no other route's.
    #[test]
    fn what_matches_a_prefix_is_below_it_for_everybody(
        path in "(/|/|a|b|admin|api|\\.|\\.\\.|%2e|%2F|%5c|%25|;x|%61|\\\\){1,10}"
    ) {
        let path = format!("/{path}");
        let table = RouteTable::new(vec![below("admin", "/admin"), below("api", "/api")]);
        let name = taken(&table, &format!("GET h {path}"), &[]);
        if name != "!" {
            let read = Path::read(&path).unwrap();
            let resolved = read.loose().unwrap_or(read.as_str());
            let is_below = |prefix| condition::below(prefix, resolved).is_some();
            prop_assert_eq!(is_below("/admin"), name == "admin", "{}", path);
            prop_assert_eq!(is_below("/api"), name == "api", "{}", path);
        }
    }
}
