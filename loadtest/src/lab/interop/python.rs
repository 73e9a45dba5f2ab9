//! Clients and servers from Python's registry, in an environment of their own below `target/lab`.

use std::path::PathBuf;

use super::stage::{Service, Stage};
use crate::lab::error::Result;
use crate::lab::folders::Folders;
use crate::lab::python;
use crate::progress::Progress;

const TALKED: &str = "text hello\nbinary 1048576 True\nin order True\npong\nclosed 4001 bye\n";
const TALKED_IN_A_STREAM: &str =
    "extended connect 1\nstatus 200\ntext hello\nbinary 2 5000\nclosed 8 4001 bye\n";

const TALKED_BY_CALLS: &str = "unary hello you OK unary\nlarge 3000006 OK\nserver streaming True OK counting\n\
     bidi you said one\nbidi you said two\nbidi you said three\nbidi [] OK\n\
     failing NOT_FOUND no such thing: ä failing\nnowhere UNIMPLEMENTED\ndeadline DEADLINE_EXCEEDED\n";

const TALKED_BY_DATAGRAMS: &str = "get 200 GET /three https\npost 200 True\nmany True\n";

/// The Python program that has the packages of our list.
pub(super) fn environment(folders: &Folders, progress: &Progress) -> Result<PathBuf> {
    let list = folders
        .workspace
        .join("loadtest/assets/interop/requirements.txt");
    python::environment("python", &list, folders, progress)
}

pub(super) fn websockets(stage: &mut Stage) -> Result<()> {
    let (clear, tls) = (stage.clear(Service::Chat), stage.tls(Service::Chat));
    let talk = stage
        .python("talk_websocket.py")
        .arg(format!("ws://127.0.0.1:{clear}/"));
    stage.says("WebSocket over HTTP/1 clear", &talk, TALKED)?;
    let talk = stage
        .python("talk_websocket.py")
        .arg(format!("wss://127.0.0.1:{tls}/"));
    stage.says("WebSocket over HTTP/1 TLS", &talk.arg(stage.ca()), TALKED)?;
    let talk = stage.python("talk_websocket_h2.py").arg(clear.to_string());
    stage.says(
        "WebSocket in a stream of HTTP/2 clear",
        &talk,
        TALKED_IN_A_STREAM,
    )?;
    let talk = stage.python("talk_websocket_h2.py").arg(tls.to_string());
    let expected = format!("alpn h2\n{TALKED_IN_A_STREAM}");
    stage.says(
        "WebSocket in a stream of HTTP/2 TLS",
        &talk.arg(stage.ca()),
        &expected,
    )
}

pub(super) fn http3(stage: &mut Stage) -> Result<()> {
    let talk = stage
        .python("talk_http3.py")
        .arg(stage.tls(Service::Echo).to_string());
    stage.says(
        "aioquic: GET, POST, fifty at once",
        &talk.arg(stage.ca()),
        TALKED_BY_DATAGRAMS,
    )
}

pub(super) fn grpc(stage: &mut Stage) -> Result<()> {
    let (clear, tls) = (stage.clear(Service::Greeter), stage.tls(Service::Greeter));
    let talk = stage.python("talk_grpc.py").arg(clear.to_string());
    stage.says("gRPC clear", &talk, TALKED_BY_CALLS)?;
    let talk = stage.python("talk_grpc.py").arg(tls.to_string());
    stage.says("gRPC TLS", &talk.arg(stage.ca()), TALKED_BY_CALLS)
}
