//! curl, and the load generators everybody has.

use std::fs;
use std::time::Duration;

use super::stage::{CLIENT_S, Service, Stage};
use super::{differs, same};
use crate::bench::soak::tally::{self, Tally};
use crate::command::Shell;
use crate::lab::error::{OnFile, Result};

/// Size of an upload, in bytes: more than every buffer on its way together.
const UPLOAD_BYTES: usize = 20 << 20;

/// siege's settings, so that those of the user do not matter.
const SIEGE_RC: &str = "verbose = false\nquiet = false\njson_output = true\nlogging = false\nprotocol = HTTP/1.1\n\
                        parser = false\nconnection = keep-alive\n";

/// The ways curl may reach a service: what they are called, the scheme, and curl's option.
const WAYS: [(&str, &str, &str); 4] = [
    ("HTTP/1.1 clear", "http", "--http1.1"),
    ("HTTP/2 clear", "http", "--http2-prior-knowledge"),
    ("HTTP/1.1 TLS", "https", "--http1.1"),
    ("HTTP/2 TLS", "https", "--http2"),
];

pub(super) fn curl(stage: &mut Stage) -> Result<()> {
    let upload = stage.folder.join("upload");
    let bytes: Vec<u8> = (0..UPLOAD_BYTES)
        .map(|at| u8::try_from(at * 31 % 251).unwrap_or(0))
        .collect();
    fs::write(&upload, &bytes).on("write", &upload)?;
    for (way, scheme, version) in WAYS {
        let port = match scheme {
            "http" => stage.clear(Service::Echo),
            _ => stage.tls(Service::Echo),
        };
        let base = format!("{scheme}://bench.test:{port}");
        let asks = Shell::new("curl")
            .args(["--silent", "--show-error", "--fail", version])
            .args([
                "--resolve",
                &format!("bench.test:{port}:127.0.0.1"),
                "--cacert",
            ])
            .arg(stage.ca())
            .within(Duration::from_secs(CLIENT_S));
        let spoken = if version == "--http1.1" { "1.1" } else { "2" };

        let get = asks.clone().args([
            "--write-out",
            "%{http_code} %{http_version} %{num_connects}\n",
        ]);
        let [one, two, chunks] =
            ["one", "two?three=%20", "chunks"].map(|path| format!("{base}/{path}"));
        if version == "--http2-prior-knowledge" {
            // curl before 8.0 cannot use such a connection twice: it ends without having sent a second request.
            let expected = format!("GET /one {scheme}\n200 {spoken} 1\n");
            stage.says(&format!("{way}: GET"), &get.arg(one), &expected)?;
        } else {
            let expected = format!(
                "GET /one {scheme}\n200 {spoken} 1\nGET /two?three=%20 {scheme}\n200 {spoken} 0\n\
                 one two three\n200 {spoken} 0\n"
            );
            let what = format!("{way}: three on one connection");
            stage.says(&what, &get.args([one, two, chunks]), &expected)?;
        }

        let head = asks.clone().args(["--head", "--output", "/dev/null"]);
        let head = head
            .args(["--write-out", "%{http_code} %{size_download}"])
            .arg(format!("{base}/head"));
        stage.says(&format!("{way}: HEAD"), &head, "200 0")?;

        for (what, field) in [
            ("counted", "X-Way: counted"),
            ("chunked", "Transfer-Encoding: chunked"),
        ] {
            let back = stage.folder.join("back");
            let post = asks.clone().args(["--header", field, "--data-binary"]);
            let post = post
                .arg(format!("@{}", upload.display()))
                .arg("--output")
                .arg(&back);
            let post = post
                .args(["--write-out", "%{http_code}"])
                .arg(format!("{base}/echo"));
            stage.says(&format!("{way}: a {what} upload"), &post, "200")?;
            let got = fs::read(&back).on("read", &back)?;
            same(
                "the upload that came back",
                "the same",
                if got == bytes { "the same" } else { "another" },
            )?;
        }
    }
    Ok(())
}

pub(super) fn loads(stage: &mut Stage) -> Result<()> {
    let [clear, tls] = urls(stage);
    for (what, url, options) in [
        (
            "HTTP/2 clear",
            &clear,
            &["-n", "20000", "-c", "8", "-m", "16"][..],
        ),
        ("HTTP/2 TLS", &tls, &["-n", "20000", "-c", "8", "-m", "16"]),
        ("HTTP/1.1 TLS", &tls, &["-n", "5000", "-c", "8", "--h1"]),
    ] {
        let said = run("h2load", options, url)?;
        let all = options[1];
        let line = format!(
            "requests: {all} total, {all} started, {all} done, {all} succeeded, 0 failed, 0 errored, 0 timeout"
        );
        if !said.contains(&line) {
            return Err(differs(what, &line, &said));
        }
        stage
            .progress
            .say(format!("  h2load, {what}: {all} of {all}"));
    }
    Ok(())
}

pub(super) fn generators(stage: &mut Stage) -> Result<()> {
    let [clear, tls] = urls(stage);
    let rc = stage.folder.join("siegerc");
    fs::write(&rc, SIEGE_RC).on("write", &rc)?;
    let rc = format!("--rc={}", rc.display());
    for (what, url, words) in [
        ("wrk, clear", &clear, &["wrk", "-t1", "-c32", "-d3s"][..]),
        ("wrk, TLS", &tls, &["wrk", "-t1", "-c32", "-d3s"]),
        (
            "ab, kept connections",
            &clear,
            &["ab", "-q", "-k", "-n", "20000", "-c", "32"],
        ),
        (
            "ab, a connection a request",
            &clear,
            &["ab", "-q", "-n", "5000", "-c", "32"],
        ),
        (
            "siege",
            &clear,
            &["siege", &rc, "-b", "-c", "16", "-r", "200"],
        ),
    ] {
        let said = run(words[0], &words[1..], url)?;
        let tally = match words[0] {
            "wrk" => tally::wrk(&said),
            "ab" => tally::ab(&said),
            _ => tally::siege(&said),
        };
        let tally = tally.unwrap_or_else(|| Tally::broken(said));
        if tally.errors > 0 || tally.requests == 0 {
            let found = tally.first_error.unwrap_or_default();
            return Err(differs(what, "no error", &found));
        }
        stage
            .progress
            .say(format!("  {what}: {} answered, no error", tally.requests));
    }
    Ok(())
}

/// What the load asks for, clear and through TLS.
fn urls(stage: &Stage) -> [String; 2] {
    let (clear, tls) = (stage.clear(Service::Fast), stage.tls(Service::Fast));
    [
        format!("http://127.0.0.1:{clear}/bytes/1000"),
        format!("https://127.0.0.1:{tls}/bytes/1000"),
    ]
}

fn run(program: &str, options: &[&str], url: &str) -> Result<String> {
    let shell = Shell::new(program).args(options).arg(url);
    Ok(shell.within(Duration::from_secs(CLIENT_S)).run()?)
}
